"""Bands that hold a share of what was not fitted: by exchangeable groups, and by the split conformal rank."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gramian.core.predictive import Predictive
from gramian.errors import InputError
from gramian.imaging.conformal import conformal_bands, image_conformal

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    found = torch.tensor(values, dtype=F64)
    return float(found.mean()), float(found.std() / math.sqrt(len(found)))


@pytest.mark.parametrize(
    ("groups", "entries", "level"), [(19, 1, 0.9), (9, 1, 0.9), (6, 40, 0.8), (12, 7, 0.5)]
)
def test_bands_hold_their_share_of_exchangeable_groups(groups: int, entries: int, level: float) -> None:
    """Of heavy-tailed groups, the entries of which err together."""
    trials, covered = 3000, []
    width = normal(trials, groups + 1, 1, seed=groups).exp()
    z = width * normal(trials, groups + 1, entries, seed=entries)
    for one in z:
        covered.append(float((one[-1].abs() <= conformal_bands(one[:-1], level)).double().mean()))
    mean, error = mean_and_error(covered)
    assert mean > level - 3 * error
    assert mean < level + 1 / (groups + 1) + 3 * error  # and it is not wasteful
    if entries == 40:  # control: rays taken for exchangeable fall short of a new view
        rays = [
            float((one[-1].abs() <= conformal_bands(one[:-1].flatten(), level)).double().mean()) for one in z
        ]
        assert mean_and_error(rays)[0] < level - 3 * mean_and_error(rays)[1]


@given(st.integers(1, 40), st.floats(0.02, 0.98))
def test_bands_of_rays_are_the_split_conformal_rank(count: int, level: float) -> None:
    scores = normal(count, seed=count)
    rank = math.ceil((count + 1) * level - 1e-9)
    if rank > count:
        with pytest.raises(InputError, match=f"{count} groups allow levels up to {count}/{count + 1}"):
            conformal_bands(scores, level)
        return
    assert conformal_bands(scores, level) == float(scores.abs().sort().values[rank - 1])
    assert conformal_bands(scores.flip(0), level) == conformal_bands(scores, level)


def test_levels_at_the_limit_of_few_groups() -> None:
    z = normal(4, 10)
    assert conformal_bands(z, 0.8) == float(z.abs().max())
    assert conformal_bands(z[:, :1], 0.8) == float(z[:, 0].abs().max())
    with pytest.raises(InputError, match=r"4 groups allow levels up to 4/5 = 0.8, not 0.81"):
        conformal_bands(z, 0.81)


def test_images_calibrate_the_images_after_them() -> None:
    images, trials, level, covered = 9, 400, 0.9, []
    for trial in range(trials):
        std = normal(images + 1, 6, 5, seed=trial).exp()
        width = 2 * normal(images + 1, 1, 1, seed=trial + trials).exp()  # images that are wronger than others
        mean = normal(images + 1, 6, 5, seed=trial + 2 * trials)
        truth = mean + width * std * normal(images + 1, 6, 5, seed=trial + 3 * trials)
        known = [Predictive.gaussian(m, s.square()) for m, s in zip(mean, std, strict=True)]
        factor = image_conformal(known[:-1], list(truth[:-1]), level)
        covered.append(float(((truth[-1] - mean[-1]).abs() <= factor * std[-1]).double().mean()))
    mean, error = mean_and_error(covered)
    assert level - 3 * error < mean < level + 0.1 + 3 * error
    with pytest.raises(InputError, match="9 groups allow levels up to 9/10"):
        image_conformal(known[:-1], list(truth[:-1]), 0.95)


def test_pixels_without_spread() -> None:
    truth = torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    truth[:, :2] = 0
    variance = (truth > 0).to(F64)
    known = [Predictive.gaussian(torch.zeros(5, 5, dtype=F64), one) for one in variance]
    pooled = truth.flatten().sort().values
    assert image_conformal(known, list(truth), 0.6) == float(pooled[math.ceil(0.6 * 5 * 25) - 1])
    wrong = [one.clone() for one in truth]
    for one in wrong:
        one[0] = 1.0
    with pytest.raises(InputError, match=r"no multiple .* reaches the level 0\.79: it is 0 at 0\.2 of all"):
        image_conformal(known, wrong, 0.79)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: conformal_bands(normal(3, 2), 1.0), "between 0 and 1, not 1.0"),
        (lambda: conformal_bands(normal(0, 2), 0.5), "at least one and none of them NaN"),
        (lambda: conformal_bands(torch.tensor([math.nan, 1.0]), 0.5), "none of them NaN"),
        (lambda: image_conformal([], [], 0.5), "not 0 for 0"),
        (
            lambda: image_conformal([Predictive.gaussian(normal(3, 3), 1.0)], [normal(3, 4)], 0.5),
            "of one shape",
        ),
    ],
)
def test_bad_input(make: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()  # type: ignore[operator]
