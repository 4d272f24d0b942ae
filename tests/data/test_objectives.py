import pytest
import torch

from gramian.data.objectives import IGNORED, HiddenTokens, NextToken
from gramian.errors import InputError

MASK = 500


def windows(batch: int = 64, tokens: int = 100) -> torch.Tensor:
    return torch.randint(1, MASK, (batch, tokens + 1), generator=torch.Generator().manual_seed(0))


def test_the_next_token_is_the_target() -> None:
    read = windows()
    inputs, targets = NextToken()(read, 3).unbind(1)
    assert torch.equal(inputs, read[:, :-1])
    assert torch.equal(targets, read[:, 1:])


def test_hidden_tokens_are_chosen_and_hidden_in_the_stated_shares() -> None:
    read, hide = windows(), HiddenTokens(MASK, 0.15, seed=1)
    inputs, targets = hide(read, 0).unbind(1)
    tokens, chosen = read[:, :-1], targets != IGNORED
    assert (chosen.sum(1) == 15).all()
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    masked = (inputs[chosen] == MASK).double().mean()
    kept = (inputs[chosen] == tokens[chosen]).double().mean()
    count = int(chosen.sum())
    assert abs(masked - 0.8) < 4 * (0.8 * 0.2 / count) ** 0.5
    assert abs(kept - 0.1) < 4 * (0.1 * 0.9 / count) ** 0.5
    places = chosen.double().mean(0)  # no place is favoured
    assert (places - 0.15).abs().max() < 5 * (0.15 * 0.85 / len(read)) ** 0.5


def test_what_is_hidden_is_a_function_of_seed_and_step() -> None:
    read = windows()
    first = HiddenTokens(MASK, 0.15, seed=1)(read, 0)
    assert torch.equal(first, HiddenTokens(MASK, 0.15, seed=1)(read, 0))
    assert not torch.equal(first, HiddenTokens(MASK, 0.15, seed=1)(read, 1))
    assert not torch.equal(first, HiddenTokens(MASK, 0.15, seed=2)(read, 0))


def test_one_token_at_least_is_hidden() -> None:
    _, targets = HiddenTokens(MASK, 0.01, seed=0)(windows(tokens=5), 0).unbind(1)
    assert ((targets != IGNORED).sum(1) == 1).all()


@pytest.mark.parametrize("objective", [NextToken(True), HiddenTokens(9, 0.5, 0, True)])
def test_documents_end_with_their_closing_token(objective) -> None:
    read = torch.tensor([[5, 6, 0, 7, 0, 8, 3]])
    assert objective(read, 0)[0, 2].tolist() == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.1, float("nan")])
def test_a_probability_out_of_range_is_named(probability) -> None:
    with pytest.raises(InputError, match="mask_probability must lie between 0 and 1"):
        HiddenTokens(MASK, probability, 0)
