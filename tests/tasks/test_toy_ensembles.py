"""Ensembles on the toy problem: their laws against known numbers, resuming, what is refused."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from gramian.bayes.limits import ntkgp, randomised_prior
from gramian.data.tables import toy
from gramian.errors import InputError
from gramian.tasks.toy_ensembles import GRID, ToyConfig, far_ratio, limits, order, toy_ensembles

QUIET = Console(quiet=True)
QUICK = ToyConfig(methods=("rp_param", "ntkgp_lin"), width=16, members=3, steps=20)


def test_laws_have_the_known_numbers() -> None:
    table = toy(20, seed=None)  # equidistant points without noise
    grid = torch.tensor([[0.0], [1.0], [3.0], [4.5], [6.0]], dtype=torch.float64)
    nngp, ntk = limits(table.x, grid)
    mean, covariance = ntkgp(nngp, ntk, table.y, 0.01)
    known = torch.tensor([0.231520, 0.048875, 0.412777, 1.149548, 1.831464], dtype=torch.float64)
    torch.testing.assert_close(covariance.diagonal().sqrt(), known, rtol=0, atol=1e-6)
    assert mean[0].item() == pytest.approx(0.095485, abs=1e-6)
    rp = randomised_prior(nngp, ntk, table.y, 0.01)[1].diagonal().sqrt()
    assert rp[-1].item() == pytest.approx(0.606317, abs=1e-6)


def test_the_order_is_that_of_loewner_and_a_wider_law_breaks_it() -> None:
    table = toy(20)
    nngp, ntk = limits(table.x, torch.tensor(GRID, dtype=torch.float64)[:, None])
    found = order(nngp, ntk, table.y, 0.01)
    assert set(found) == {"rp_param", "deep_ensemble"}
    assert min(found.values()) > -1e-9
    assert min(order(2.0 * ntk, ntk, table.y, 0.01).values()) < -0.1  # control: members that start wider


def test_it_goes_on_and_repeats(tmp_path) -> None:
    first = toy_ensembles(QUICK, tmp_path / "toy", QUIET)
    assert (tmp_path / "toy" / "toy.svg").exists()
    assert toy_ensembles(QUICK, tmp_path / "toy", QUIET) == first
    again = toy_ensembles(QUICK, tmp_path / "again", QUIET)
    assert again == first
    assert len(first.mean["rp_param"]) == len(GRID)
    assert first.deviation["rp_param"] != first.limit["rp_param"]
    other = toy_ensembles(replace(QUICK, seed=1), tmp_path / "other", QUIET)
    assert other.mean != first.mean
    with pytest.raises(InputError, match="has seed = 0 not 1 as asked"):
        toy_ensembles(replace(QUICK, seed=1), tmp_path / "toy", QUIET)


def test_far_is_away_from_the_data() -> None:
    narrow = [1.0] * len(GRID)
    wide = [2.0 if abs(x) >= 3 else 100.0 for x in GRID]
    assert far_ratio(wide, narrow) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ("magic",)}, "unknown method 'magic'"),
        ({"methods": ()}, "needs a method"),
        ({"members": 1}, "width and members need 1 and 2 or more"),
        ({"width": 0}, "width and members need"),
        ({"steps": 0}, "steps and points need 1 and 4 or more"),
        ({"noise": 0.0}, "noise and learning_rate must be positive"),
        ({"learning_rate": 0.0}, "noise and learning_rate must be positive"),
        ({"points": 3}, "steps and points need"),
    ],
)
def test_settings_that_cannot_be_used(change, words, tmp_path) -> None:
    with pytest.raises(InputError, match=words):
        toy_ensembles(replace(QUICK, **change), tmp_path / "toy", QUIET)
    assert not (tmp_path / "toy").exists()
