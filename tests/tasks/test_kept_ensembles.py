"""Ensembles kept on disk: fitted once, found again bit for bit, fitted again when anything differs."""

from pathlib import Path

import pytest
import torch
from torch import nn

from faults import flip
from gramian.bayes.ensemble import METHODS, EnsembleConfig, fit_ensemble
from gramian.bayes.trained import Ensemble
from gramian.errors import DivergedError
from gramian.tasks.kept_ensembles import MEMBERS, kept_ensemble

X = torch.linspace(-1, 1, 12)[:, None]
Y = X.sin()[:, 0]


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))


class Fits:
    """Counts how often it fits."""

    def __init__(self, method: str = "ntkgp_param", **settings: object) -> None:
        number = torch.float64 if method == "ntkgp_lin" else torch.float32
        self.x, self.y, self.count = X.to(number), Y.to(number), 0
        self.config = EnsembleConfig(method=method, members=2, steps=5, **settings)

    def __call__(self) -> Ensemble:
        self.count += 1
        return fit_ensemble(make, self.x, self.y, self.config)

    def kept(self, folder: Path | None) -> Ensemble:
        return kept_ensemble(folder, vars(self.config), (self.x, self.y), make, self)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_is_found_bit_for_bit(tmp_path: Path, method: str) -> None:
    fits = Fits(method)
    first, second = fits.kept(tmp_path), fits.kept(tmp_path)
    assert fits.count == 1
    assert torch.equal(first.functions(fits.x), second.functions(fits.x))


def test_other_settings_and_other_rows_are_other_work(tmp_path: Path) -> None:
    first, other = Fits(), Fits(seed=1)
    assert not torch.equal(first.kept(tmp_path).functions(first.x), other.kept(tmp_path).functions(first.x))
    first.y = first.y + 1
    first.kept(tmp_path)
    assert (first.count, other.count) == (2, 1)


def test_what_is_damaged_is_fitted_again(tmp_path: Path) -> None:
    fits = Fits()
    whole = fits.kept(tmp_path).functions(fits.x)
    (path,) = tmp_path.rglob(MEMBERS)
    flip(path, 8 * (path.stat().st_size - 3))
    assert torch.equal(fits.kept(tmp_path).functions(fits.x), whole)
    assert fits.count == 2
    fits.kept(tmp_path)
    assert fits.count == 2


def test_nothing_is_kept_without_a_folder_or_of_a_fit_that_failed(tmp_path: Path) -> None:
    fits = Fits()
    fits.kept(None), fits.kept(None)
    assert fits.count == 2

    def diverges() -> Ensemble:
        raise DivergedError("the loss is not finite")

    with pytest.raises(DivergedError):
        kept_ensemble(tmp_path, [], (X, Y), make, diverges)
    assert not list(tmp_path.iterdir())
