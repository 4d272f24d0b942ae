"""Methods of regression side by side on tables: by published splits, and beyond the region learnt from."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from gramian.bayes.dropout import DropoutConfig, fit_dropout
from gramian.data.tables import Table, load_table
from gramian.errors import InputError
from gramian.files import write_json
from gramian.nn.mlp import mlp
from gramian.tasks.regression import split_rows
from gramian.tasks.regression_fit import DEEP, LINEAR, Fitted, Fitter, Latent, Prior, RegressConfig, Trial
from gramian.tasks.regression_scores import Scores, judged, likeliest_noise
from gramian.train.run import open_run, read_json

DROPOUT, PROCESS = "dropout", "gaussian_process"
"""Monte-Carlo dropout; scikit-learn's Gaussian process of a squared exponential with a length a feature."""

METHODS = (DEEP, "rp_param", "ntkgp_param", LINEAR, DROPOUT, PROCESS)

RATES = (0.01, 0.05, 0.2)
"""Dropout rates on trial."""

DRAWS = 100
"""Masks of dropout at prediction."""

EVIDENCE = 400
"""Most rows that scikit-learn's kernel is chosen on."""

INSIDE, BEYOND = "inside", "beyond"
"""Test rows like those learnt from; test rows beyond them in one feature."""

INNER = 2 / 3
"""Share of the rows, the lowest in a feature, that is learnt from when the others are beyond."""


@dataclass(frozen=True, kw_only=True)
class TableStudy:
    """Which methods meet on which tables."""

    tables: tuple[Path | None, ...] = (None,)
    """Files as `gramian regress` reads, .npz with y or published splits; None for the diabetes table."""
    methods: tuple[str, ...] = METHODS
    splits: int = 20
    """Most splits of a table: the published ones, or random ones where there are none."""
    large: int = 4000
    """Rows from which on a table counts as large."""
    large_splits: int = 20
    """Most splits of a large table."""
    large_steps: int = 2000
    """Steps of training on a large table."""
    regions: int = 4
    """Most features along which rows beyond are predicted, of tables that are not large."""
    fitting: RegressConfig = field(default_factory=RegressConfig)
    """Networks, settings on trial and their choice; table, split and seed are those of each fit."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if unknown := set(self.methods) - set(METHODS):
            raise InputError(f"unknown method {min(unknown)!r}; choose some of {', '.join(METHODS)}")
        if not self.tables or not self.methods:
            raise InputError("a study needs a table and a method")
        names = [_name(path) for path in self.tables]
        if len(set(names)) < len(names):
            raise InputError(f"tables need different names, got {', '.join(names)}")
        for name, least in {"splits": 1, "large_splits": 1, "large_steps": 1, "regions": 0}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        self.fitting.check()

    def is_large(self, table: Table) -> bool:
        """Whether a table counts as large."""
        return len(table) >= self.large


@dataclass(frozen=True)
class Split:
    """Rows to learn from and to choose by, and rows to report on."""

    kind: str
    """inside or beyond."""
    number: int
    """Of the split, or of the feature."""
    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True)
class Outcome:
    """How one method did on one split of a table."""

    table: str
    kind: str
    number: int
    method: str
    scores: Scores
    seconds: float
    """Of the processor, for trials and fit."""


def run_study(study: TableStudy, folder: Path, console: Console) -> list[Outcome]:
    """Fit every method to every split of every table; what a stopped study has done is not done again.

    All ensembles have the same networks, members and most steps. The same validation rows choose among the
    settings on trial, and give everyone's noise: the prior of largest evidence and those of `fitting.noise`,
    three numbers of steps (deep ensemble), `RATES` (dropout), none (Gaussian process). An outcome is a JSON
    file of its own in folder/table.

    Raises: InputError for settings that cannot be used, before anything is fitted.
    """
    study.check()
    tables = {path: load_table(path, study.fitting.target) for path in study.tables}
    outcomes = []
    with Progress(console=console, transient=True) as progress:
        for path, table in tables.items():
            settings = replace(study.fitting, table=path)
            if study.is_large(table):
                settings = replace(settings, steps=study.large_steps)
            run = open_run(folder / _name(path), settings, resume=True)
            splits = list(_splits(study, table))
            bar = progress.add_task(_name(path), total=len(splits))
            for split in splits:
                outcomes += _outcomes(study, settings, table, split, run.folder, progress)
                progress.advance(bar)
            progress.remove_task(bar)
    return outcomes


def _name(path: Path | None) -> str:
    return "diabetes" if path is None else path.stem


def _splits(study: TableStudy, table: Table) -> Iterator[Split]:
    large = study.is_large(table)
    count = min(study.splits, study.large_splits) if large else study.splits
    known = len(table.splits)
    for number in range(min(count, known) if known else count):
        config = replace(study.fitting, seed=number, split=number if known else None)
        yield Split(INSIDE, number, *split_rows(table, config))
    for feature in range(0 if large else min(study.regions, table.x.shape[1])):
        yield beyond(table, feature, study.fitting.validation)


def beyond(table: Table, feature: int, validation: float) -> Split:
    """Return the split that learns where a feature is low, and reports where it is high.

    Rows are ordered by the feature, equal ones at random; the first two thirds are learnt from.

    Holds: every test row is at least as high in the feature as every other.
    """
    generator = torch.Generator().manual_seed(feature)
    shuffled = torch.randperm(len(table), generator=generator)
    order = shuffled[table.x[shuffled, feature].argsort(stable=True)]
    inner = round(INNER * len(table))
    known = order[:inner][torch.randperm(inner, generator=generator)]
    chosen = max(3, round(validation * inner))
    return Split(BEYOND, feature, known[chosen:], known[:chosen], order[inner:])


def _outcomes(
    study: TableStudy, settings: RegressConfig, table: Table, split: Split, folder: Path, progress: Progress
) -> Iterator[Outcome]:
    fitter: Fitter | None = None
    for method in study.methods:
        place = folder / f"{split.kind}-{split.number}-{method}.json"
        if place.exists():
            known = read_json(place)
            yield Outcome(**{**known, "scores": Scores(**known["scores"])})
            continue
        if fitter is None:
            config = replace(settings, seed=split.number)
            fitter = Fitter(config, table, split.train, split.validation, progress)
        started = time.process_time()
        prediction = fitted(fitter, method).predict(table.x[split.test])
        spent = time.process_time() - started
        scores = judged(prediction, table.y[split.test], settings.level)
        outcome = Outcome(_name(settings.table), split.kind, split.number, method, scores, spent)
        write_json(place, asdict(outcome))
        yield outcome


def fitted(fitter: Fitter, method: str) -> Fitted:
    """Fit a method with the setting that does best on the validation rows."""
    if method == DROPOUT:
        tried = [_dropout(fitter, rate) for rate in RATES]
    elif method == PROCESS:
        tried = [_process(fitter)]
    else:
        return fitter.best(method)[0]
    x, y = fitter.validation
    noises = [likeliest_noise(*latent(x), y) for latent in tried]
    best = min(range(len(tried)), key=lambda each: noises[each][1])
    noise, nll = noises[best]
    setting = Trial(Prior(noise, nan, nan), fitter.config.steps, nll)
    return Fitted(method, tried[best], noise, *fitter.scales, setting)


def _dropout(fitter: Fitter, rate: float) -> Latent:
    config, (x, y) = fitter.config, fitter.train
    make = partial(
        mlp, x.shape[1], 1, widths=config.widths, activation=config.activation, weight_std=2**0.5,
        bias_std=config.bias_std, dropout=rate,
    )  # fmt: skip
    settings = DropoutConfig(
        steps=config.steps, learning_rate=config.learning_rate, batch=config.batch, samples=DRAWS,
        seed=config.seed,
    )  # fmt: skip
    network = fit_dropout(make, x.float(), y[:, None].float(), settings)

    def latent(x: Tensor) -> tuple[Tensor, Tensor]:
        found = network.predict(x.float())
        return found.mean[:, 0].double(), found.variance[:, 0].double()

    return latent


def _process(fitter: Fitter) -> Latent:
    from sklearn.gaussian_process import GaussianProcessRegressor, kernels  # a second to import

    x, y = (each.numpy() for each in fitter.train)
    lengths = [1.0] * x.shape[1]
    bounds = (1e-2, 1e3)
    kernel = kernels.ConstantKernel(1.0, bounds) * kernels.RBF(lengths, bounds)
    noisy = kernel + kernels.WhiteKernel(0.1, (1e-6, 10))
    chosen = GaussianProcessRegressor(noisy).fit(x[:EVIDENCE], y[:EVIDENCE])
    known: Any = chosen.kernel_
    process = GaussianProcessRegressor(known, optimizer=cast(Any, None)).fit(x, y)
    noise = known.k2.noise_level

    def latent(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = (torch.from_numpy(each) for each in process.predict(x.numpy(), return_std=True))
        return mean, (deviation.square() - noise).clamp(min=0)

    return latent
