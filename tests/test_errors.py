import pytest

from gramian.errors import LONGEST, GramianError, InputError, MissingExtraError


@pytest.mark.parametrize("kind", [GramianError, InputError, MissingExtraError])
def test_a_message_is_one_line_fit_for_a_terminal(kind: type[GramianError]) -> None:
    assert str(kind("column 'ä' × 2 is wrong")) == "column 'ä' × 2 is wrong"
    assert str(kind("a\nb\r\tc\x1b[31m\u2028d\n")) == "a b  c [31m d"
    assert str(kind()) == ""


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    said = str(InputError("the name " + "x" * 10**6 + "\n is too long; at most 40 characters are accepted"))
    assert len(said) <= LONGEST
    assert said.startswith("the name xxx")
    assert said.endswith("x  is too long; at most 40 characters are accepted")
    exact = "y" * LONGEST
    assert str(InputError(exact)) == exact
