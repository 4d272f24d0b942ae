"""Methods side by side on tables: splits, the peers, resuming, what is refused."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from gramian.data.tables import load_table
from gramian.errors import InputError
from gramian.tasks.regression_fit import Fitter, RegressConfig
from gramian.tasks.regression_scores import judged
from gramian.tasks.table_study import (
    BEYOND,
    DROPOUT,
    INSIDE,
    METHODS,
    PROCESS,
    TableStudy,
    beyond,
    fitted,
    run_study,
)

QUIET = Console(quiet=True)
FITTING = RegressConfig(widths=(8,), steps=30, members=3, noise=(0.01,))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 120 rows, sine in one feature, linear in the other, with two published splits."""
    random = np.random.default_rng(0)
    x = random.normal(size=(120, 2))
    y = 10 * np.sin(x[:, 0]) + x[:, 1] + 0.1 * random.normal(size=120)
    orders = [random.permutation(120) for _ in range(2)]
    place = tmp_path_factory.mktemp("tables") / "waves.npz"
    np.savez(
        place, X=x, y=y,
        train_index=np.stack([order[:100] for order in orders]),
        test_index=np.stack([order[100:] for order in orders]),
    )  # fmt: skip
    return place


def test_every_method_on_every_split_and_it_goes_on(path: Path, tmp_path: Path) -> None:
    study = TableStudy(tables=(path,), splits=1, regions=1, fitting=FITTING)
    found = run_study(study, tmp_path, QUIET)
    assert {(each.kind, each.number, each.method) for each in found} == {
        (kind, 0, method) for kind in (INSIDE, BEYOND) for method in METHODS
    }
    assert len(found) == 12
    assert all(np.isfinite([each.scores.nll, each.scores.rmse]).all() for each in found)
    kept = tmp_path / "waves" / "inside-0-rp_param.json"
    before = kept.stat().st_mtime_ns
    (tmp_path / "waves" / "inside-0-dropout.json").unlink()
    again = run_study(study, tmp_path, QUIET)
    assert [replace(each, seconds=0.0) for each in again] == [replace(each, seconds=0.0) for each in found]
    assert kept.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="resume with the same settings"):
        run_study(replace(study, fitting=replace(FITTING, steps=31)), tmp_path, QUIET)


def test_rows_beyond_lie_above_those_learnt_from(path: Path) -> None:
    table = load_table(path)
    split = beyond(table, 1, 0.2)
    inner = torch.cat([split.train, split.validation])
    assert table.x[inner, 1].amax() <= table.x[split.test, 1].amin()
    assert sorted(torch.cat([inner, split.test]).tolist()) == list(range(120))
    assert len(split.test) == 40
    assert len(split.validation) == 16
    assert table.x[inner, 0].amax() > table.x[split.test, 0].amin()  # control: not so in another feature


def test_large_tables_have_fewer_splits_steps_of_their_own_and_no_regions(path: Path, tmp_path: Path) -> None:
    study = TableStudy(
        tables=(path,), methods=("deep_ensemble",), large=120, large_splits=1, large_steps=3, fitting=FITTING
    )
    (found,) = run_study(study, tmp_path, QUIET)
    assert (found.kind, found.number) == (INSIDE, 0)
    assert '"steps": 3' in (tmp_path / "waves" / "settings.json").read_text()


def test_the_peers_learn(path: Path) -> None:
    table = load_table(path)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    train, validation, test = order[:80], order[80:100], order[100:]
    config = RegressConfig(widths=(32,), steps=600, batch=64)
    with Progress(console=QUIET) as progress:
        fitter = Fitter(config, table, train, validation, progress)
        for method in (DROPOUT, PROCESS):
            scores = judged(fitted(fitter, method).predict(table.x[test]), table.y[test], 0.9)
            assert scores.rmse < 0.4 * table.y[test].std()


def test_a_csv_has_random_splits(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    with (tmp_path / "line.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["a", "price"])
        writer.writerows([[float(a), float(2 * a)] for a in random.normal(size=30)])
    fitting = replace(FITTING, target="price")
    study = TableStudy(
        tables=(tmp_path / "line.csv",), methods=("deep_ensemble",), splits=2, regions=0, fitting=fitting
    )
    assert [each.number for each in run_study(study, tmp_path / "out", QUIET)] == [0, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ("magic",)}, "unknown method 'magic'"),
        ({"methods": ()}, "needs a table and a method"),
        ({"tables": (None, None)}, "different names, got diabetes, diabetes"),
        ({"splits": 0}, "splits must be at least 1"),
        ({"regions": -1}, "regions must be at least 0"),
        ({"tables": (Path("absent.npz"),)}, "no file absent.npz"),
    ],
)
def test_settings_that_cannot_be_used(change, words, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        run_study(replace(TableStudy(fitting=FITTING), **change), tmp_path, QUIET)
