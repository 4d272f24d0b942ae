"""A table in, predictions with intervals out: an ensemble chosen, trained, calibrated and judged."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from gramian.core.predictive import Predictive
from gramian.data.tables import Table, load_rows, load_table
from gramian.errors import InputError
from gramian.tasks.regression_fit import DEEP, DENSE, PROCESS, Fitted, Fitter, RegressConfig, Trial
from gramian.tasks.regression_scores import Scores, constant, far_threshold, judged, likeliest_noise

__all__ = [
    "Fitted",
    "Fitter",
    "RegressConfig",
    "Regression",
    "Rows",
    "Scores",
    "Trial",
    "judged",
    "likeliest_noise",
    "regress",
    "split_rows",
]

CONSTANT = "constant"
"""What predicts mean and deviation of the training rows for every row."""

ROWS = 12
"""Fewest rows of a table."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows, what is predicted of them, and their target where it is known."""

    numbers: Tensor
    """Their places in the file, from 1."""
    x: Tensor
    prediction: Predictive
    y: Tensor | None


@dataclass(frozen=True, eq=False)
class Regression:
    """What became of a table."""

    table: Table
    train: Tensor
    validation: Tensor
    test: Tensor
    trials: tuple[Trial, ...]
    """Of the method asked for."""
    fitted: Fitted
    predictions: Mapping[str, Predictive]
    """Of the test rows by method, the one asked for first."""
    scores: Mapping[str, Scores]
    threshold: float
    """Epistemic variance beyond which a row is out of distribution."""
    chance: float
    """Share of rows like the validation rows that are beyond it."""
    tested: Rows
    new: Rows | None
    """New rows, where some were given."""
    seconds: float

    def far(self, prediction: Predictive) -> Tensor:
        """Tell which rows are out of distribution."""
        return prediction.variance > self.threshold


def regress(config: RegressConfig, console: Console | None = None, keep: Path | None = None) -> Regression:
    """Split a table, choose settings on its training and validation rows, train, calibrate and judge.

    Members learn from the training rows alone, before and after the choice. The settings on trial are the
    prior of largest evidence of the infinitely wide network and `config`'s, with each noise variance; of a
    deep ensemble numbers of steps. The validation rows choose among them, give the noise of the intervals (of
    greatest likelihood) and the epistemic variance beyond which a row is out of distribution. The test rows
    are only reported on. Ensembles are kept in the folder `keep`, if there is one, so that the same call goes
    on from there after a stop.

    Raises: InputError for a setting, a table or a row that cannot be used; DivergedError when the training of
        every setting diverges.
    """
    config.check()
    started = time.monotonic()
    table = load_table(config.table, config.target, leave_out=config.leave_out, header=config.header)
    new = None if config.predict is None else _new_rows(config.predict, table, config.header)
    train, validation, test = split_rows(table, config)
    beside = [DEEP, *[PROCESS] * (len(train) <= DENSE)] if config.compare else []
    with Progress(console=console or Console(quiet=True), transient=True) as progress:
        fitter = Fitter(config, table, train, validation, progress, keep)
        fitted, trials = fitter.best(config.method)
        rivals = [fitter.best(name)[0] for name in beside if name != config.method]
    predictions = {each.name: each.predict(table.x[test]) for each in (fitted, *rivals)}
    tested = Rows(test + 1, table.x[test], predictions[fitted.name], table.y[test])
    predictions[CONSTANT] = constant(table.y[train], len(test))
    scores = {name: judged(each, table.y[test], config.level) for name, each in predictions.items()}
    threshold, chance = far_threshold(fitted.predict(table.x[validation]).variance)
    strangers = None
    if new is not None:
        x, y = new
        strangers = Rows(torch.arange(len(x)) + 1, x, fitted.predict(x), y)
    return Regression(
        table, train, validation, test, tuple(trials), fitted, predictions, scores, threshold, chance,
        tested, strangers, time.monotonic() - started,
    )  # fmt: skip


def _new_rows(path: Path, table: Table, header: bool | None) -> tuple[Tensor, Tensor | None]:
    """Read new rows, and their targets where the file has one for each."""
    x = load_rows(path, table, header=header)
    try:
        return x, load_rows(path, replace(table, columns=(table.target,)), header=header)[:, 0]
    except InputError:
        return x, None


def split_rows(table: Table, config: RegressConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rows to learn from, to choose by and to report on, by the seed.

    Raises: InputError for too few rows, and a published split that is not there or shares rows.
    Holds: the three share no row.
    """
    if len(table) < ROWS:
        raise InputError(
            f"{table.name} has {len(table)} rows; at least {ROWS} are needed to learn, to choose and to judge"
        )
    generator = torch.Generator().manual_seed(config.seed)
    if config.split is None:
        order = torch.randperm(len(table), generator=generator)
        held = min(max(round(config.test * len(table)), 3), len(table) - 6)
        test, rest = order[:held], order[held:]
    elif not 0 <= config.split < len(table.splits):
        there = f"splits 0 to {len(table.splits) - 1}" if table.splits else "no published splits"
        raise InputError(f"{table.name} has {there}, got split {config.split}")
    else:
        rest, test = table.splits[config.split]
        if len(rest) < 6 or len(test) < 3 or len(torch.cat([rest, test]).unique()) < len(rest) + len(test):
            raise InputError(
                f"split {config.split} of {table.name} has {len(rest)} rows to learn from and {len(test)} to "
                "report on; at least 6 and 3 are needed, none of them twice"
            )
        rest = rest[torch.randperm(len(rest), generator=generator)]
    chosen = min(max(round(config.validation * len(rest)), 3), len(rest) - 3)
    return rest[chosen:], rest[:chosen], test.sort().values
