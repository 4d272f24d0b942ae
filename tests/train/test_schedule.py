import itertools

import pytest

from gramian.errors import InputError
from gramian.train.schedule import SCHEDULES, multiplier


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rises_to_one_and_stays_positive(schedule) -> None:
    factors = [multiplier(step, 100, 0.1, schedule) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1
    assert all(0 < factor <= 1 for factor in factors)
    falling = [later <= earlier for earlier, later in itertools.pairwise(factors[10:])]
    assert all(falling)


def test_values_by_hand() -> None:
    assert multiplier(55, 100, 0.1, "linear") == pytest.approx(0.5)
    assert multiplier(55, 100, 0.1, "cosine") == pytest.approx(0.5)
    assert multiplier(99, 100, 0.1, "constant") == 1
    stairs = [multiplier(step, 8, 0.0, "step") for step in range(8)]
    assert stairs == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert multiplier(0, 1, 0.0, "linear") == 1
    assert multiplier(99, 100, 1.0, "linear") == 1


def test_bad_settings_are_named() -> None:
    with pytest.raises(InputError, match="unknown schedule 'stairs'"):
        multiplier(0, 10, 0.1, "stairs")
    with pytest.raises(InputError, match="warm-up"):
        multiplier(0, 10, 1.5, "linear")
    with pytest.raises(InputError, match="outside a run of 10"):
        multiplier(10, 10, 0.1, "linear")
