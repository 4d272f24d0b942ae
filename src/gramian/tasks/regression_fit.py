"""How a table is learnt from: settings, what is tried, and methods fitted to standardised rows."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.progress import Progress, TaskID
from torch import Tensor

from gramian.bayes.ensemble import METHODS, EnsembleConfig, fit_ensemble
from gramian.bayes.members import seeded
from gramian.core.predictive import Predictive
from gramian.data.tables import Standardiser, Table
from gramian.errors import DivergedError, InputError
from gramian.memory import check_memory
from gramian.nn.activations import activation
from gramian.nn.mlp import mlp, prior_variances
from gramian.ranks import on_main, spread
from gramian.tasks.kept_ensembles import kept_ensemble
from gramian.tasks.regression_scores import likeliest_noise

Latent = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Mean and epistemic variance by inputs, both standardised."""

PROCESS, DEEP, LINEAR = "ntkgp", "deep_ensemble", "ntkgp_lin"
"""The Gaussian process of infinite width; networks without a prior; networks linear in their parameters."""

DENSE = 1500
"""Most rows that the Gaussian process is shown beside for."""

EVIDENCE = 250
"""Most rows, drawn at random, that the evidence is taken of."""

SHARED = 2000
"""Training rows beyond which linear members share one linearisation, so that one solution serves all."""

TRIED = 3
"""Most members of an ensemble on trial."""

TOGETHER = 5
"""Most members that are trained as one stack, whole on one of the processes."""

SHARES = (0.15, 0.4, 1.0)
"""Shares of the steps among which those of a deep ensemble are chosen."""

MOST = 10_000
"""Most training rows of the Gaussian process, which factorises a matrix of rows times rows."""

JITTER = 1e-8
"""What the kernel of the Gaussian process gets on its diagonal, as a share of the diagonal's mean."""


@dataclass(frozen=True, kw_only=True)
class RegressConfig:
    """Predict a number with an interval from the other columns of a table."""

    table: Annotated[Path | None, tyro.conf.Positional] = None
    """A .csv, .tsv, .parquet or .npz file, one row an example; scikit-learn's diabetes without one."""
    target: str | None = None
    """The column to predict; known for .npz (y) and the default."""
    predict: Path | None = None
    """New rows to predict, with the same columns; the test rows without."""
    leave_out: tuple[str, ...] = ()
    """Columns that are not to be used."""
    header: bool | None = None
    """Whether the first line names the columns; seen from its cells by default."""
    method: str = "ntkgp_param"
    """deep_ensemble, rp_param, rp_fn, ntkgp_param, ntkgp_fn, ntkgp_lin, or ntkgp for infinite width."""
    members: int = 10
    """Networks of the ensemble, at least 2."""
    exact: bool = False
    """The corrected variants of rp_fn and ntkgp_fn."""
    level: float = 0.9
    """Probability with which an interval is to hold the target, in (0, 1)."""
    widths: tuple[int, ...] = (64, 64)
    """Features of the hidden layers."""
    activation: str = "relu"
    """Of the hidden layers (`gramian list`)."""
    weight_std: float = 0.5
    """σ_w of the prior on trial beside that of largest evidence: weights N(0, σ_w²/fan_in)."""
    bias_std: float = 0.1
    """σ_b of the same: biases N(0, σ_b²); with 0 there are none, whatever the evidence says."""
    noise: tuple[float, ...] = (0.003, 0.03, 0.3)
    """Noise variances σ² on trial, as shares of the target's variance."""
    steps: int = 2000
    """Steps of Adam; of a deep ensemble the most."""
    learning_rate: float = 0.01
    """Its rate, which falls to 0 along a cosine."""
    batch: int = 256
    """Rows of a step, at most."""
    validation: float = 0.15
    """Share of the rows that are not for testing, by which settings are chosen and intervals calibrated."""
    test: float = 0.2
    """Share of the rows kept for the report."""
    split: int | None = None
    """Number of a published split, from 0, whose test rows are taken instead."""
    compare: bool = True
    """Whether a deep ensemble, and the Gaussian process where rows are few, are shown beside."""
    seed: int = 0
    """Seed of split, networks and noise."""
    output: Path | None = None
    """Folder for predictions.csv, report.html, regression.json, figures; regressions/<table> by default."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        if self.output is not None:
            return self.output
        return Path("regressions", "diabetes" if self.table is None else self.table.stem)

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if self.method not in (*METHODS, PROCESS):
            raise InputError(
                f"unknown method {self.method!r}; choose one of {', '.join((*METHODS, PROCESS))}"
            )
        if not 0 < self.level < 1:
            raise InputError(f"the level of intervals must lie between 0 and 1, got {self.level:g}")
        for name in ("validation", "test"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(
                    f"the share for {name} must lie between 0 and 1, got {getattr(self, name):g}"
                )
        for name, least in {"members": 2, "steps": 1, "batch": 1, "seed": 0, "bias_std": 0}.items():
            if not least <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.seed >= 2**32:
            raise InputError(f"seed must be below 2^32, got {self.seed}")
        for name in ("learning_rate", "weight_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive, got {getattr(self, name):g}")
        if not self.noise or not all(0 < each < math.inf for each in self.noise):
            raise InputError(f"noise must be one positive number or more, got {self.noise}")
        if min(self.widths, default=1) < 1:
            raise InputError(f"layers must be at least 1 wide, got widths {self.widths}")
        activation(self.activation)
        if self.method != PROCESS:  # at least 16 bytes a weight: it, its gradient, and two moments or float64
            weights = sum(inputs * outputs for inputs, outputs in pairwise((1, *self.widths, 1)))
            widths = " ".join(f"{width:,}" for width in self.widths) or "no layers"
            check_memory(16.0 * self.members * weights, f"{self.members:,} members of widths {widths}")


@dataclass(frozen=True)
class Prior:
    """What networks are drawn from and how noisy targets are, on the standardised scale."""

    noise_variance: float
    weight_std: float
    bias_std: float


@dataclass(frozen=True)
class Trial:
    """A setting, and the mean negative log-likelihood of the validation rows with it (standardised)."""

    prior: Prior
    steps: int
    """Steps of training; 0 for the Gaussian process, which has none."""
    nll: float
    """Infinite where training diverged."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """A method fitted to training rows, its noise to validation rows; it predicts in the target's unit."""

    name: str
    latent: Latent
    noise: float
    """The noise variance of the intervals, standardised."""
    x_scale: Standardiser
    y_scale: Standardiser
    trial: Trial
    """The setting chosen, with what all members reach."""

    def predict(self, x: Tensor) -> Predictive:
        """Return the Gaussian prediction of rows in their own unit."""
        mean, variance = self.latent(self.x_scale(x))
        unit = self.y_scale.scale**2
        return Predictive(self.y_scale.back(mean), variance * unit, torch.full_like(mean, self.noise) * unit)


class Fitter:
    """The standardised rows of a table, and how methods are fitted to them.

    Ensembles that are fitted are kept in the folder `keep`, if there is one, and found there the next time.

    Raises: InputError when the target is the same in all training rows.
    """

    def __init__(
        self,
        config: RegressConfig,
        table: Table,
        train: Tensor,
        validation: Tensor,
        progress: Progress,
        keep: Path | None = None,
    ) -> None:
        self.config, self.progress, self.keep = config, progress, keep
        if table.y[train].amin() == table.y[train].amax():
            raise InputError(f"the target {table.target!r} is the same in all {len(train)} training rows")
        self.scales = Standardiser.of(table.x[train]), Standardiser.of(table.y[train])
        self.train, self.validation = (
            (self.scales[0](table.x[rows]), self.scales[1](table.y[rows])) for rows in (train, validation)
        )

    def best(self, method: str) -> tuple[Fitted, list[Trial]]:
        """Fit a method with the setting that does best on the validation rows, and tell what was tried.

        Raises: InputError for the Gaussian process of too many rows; DivergedError when the training of every
            setting diverges.
        """
        if method == PROCESS:
            return self._finished(method, self._infinitely_wide(), self.likeliest, 0), []
        settings = self._settings(method)

        def tried(number: int) -> dict[str, Tensor]:
            label = f"{method}, {number + 1} of {len(settings)}"
            return {"nll": torch.tensor(self._tried(method, *settings[number], label), dtype=torch.float64)}

        reached = spread(tried, range(len(settings)) if len(settings) > 1 else [])
        trials = [Trial(*each, found["nll"].item()) for each, found in zip(settings, reached, strict=False)]
        best = min(trials, key=lambda each: each.nll) if trials else Trial(*settings[0], math.nan)
        latent = self._ensemble(method, best.prior, best.steps, self.config.members, method, TOGETHER)
        return self._finished(method, latent, best.prior, best.steps), trials

    def _settings(self, method: str) -> list[tuple[Prior, int]]:
        """Return what is on trial: priors, or of a deep ensemble numbers of steps."""
        config = self.config
        own = [Prior(each, config.weight_std, config.bias_std) for each in config.noise]
        if method == DEEP:
            steps = dict.fromkeys(max(1, round(share * config.steps)) for share in SHARES)
            return [(Prior(own[0].noise_variance, 1.5, config.bias_std), each) for each in steps]
        return [(prior, config.steps) for prior in (self.likeliest, *own)]

    def _tried(self, method: str, prior: Prior, steps: int, label: str) -> float:
        """Return what a few members with a setting reach on the validation rows."""
        try:
            latent = self._ensemble(method, prior, steps, min(self.config.members, TRIED), label)
        except DivergedError:
            return math.inf
        return likeliest_noise(*latent(self.validation[0]), self.validation[1])[1]

    @cached_property
    def likeliest(self) -> Prior:
        """The prior under which training targets are likeliest for the network of infinite width."""
        bar = self.progress.add_task("evidence of the Gaussian process", total=None)
        start = Prior(0.1, 1.0, 0.3 if self.config.bias_std else 0.0)

        def found() -> dict[str, Tensor]:
            process = self._process(start, EVIDENCE, optimise=True)
            known = (process.noise_variance_, process.weight_std_, process.bias_std_)
            return {"prior": torch.tensor(known, dtype=torch.float64)}

        prior = Prior(*on_main(found)["prior"].tolist())
        self.progress.remove_task(bar)
        return prior

    def _process(self, prior: Prior, rows: int, optimise: bool) -> Any:
        """Fit the Gaussian process to the first rows, which are in no order."""
        from gramian.interop.sklearn import NTKGPRegressor  # a second to import, so only where it is used

        config, (x, y) = self.config, self.train
        process = NTKGPRegressor(
            activation=config.activation, depth=len(config.widths), **vars(prior), optimise=optimise,
            restarts=0, evidence_rows=EVIDENCE, jitter=JITTER, standardise=False, random_state=config.seed,
        )  # fmt: skip
        process.fit(x[:rows].numpy(), y[:rows].numpy())
        return process

    def _infinitely_wide(self) -> Latent:
        if (rows := len(self.train[0])) > MOST:
            raise InputError(
                f"{PROCESS} takes at most {MOST:,} training rows, got {rows:,}; choose another method"
            )
        found = self._process(self.likeliest, rows, optimise=False)

        def latent(x: Tensor) -> tuple[Tensor, Tensor]:
            mean, deviation = (torch.from_numpy(each) for each in found.predict(x.numpy(), return_std=True))
            return mean, (deviation.square() - found.noise_variance_).clamp(min=0)

        return latent

    def _ensemble(
        self, method: str, prior: Prior, steps: int, members: int, label: str, together: int | None = None
    ) -> Latent:
        config, (x, y) = self.config, self.train
        make = partial(
            mlp, x.shape[1], 1, widths=config.widths, activation=config.activation,
            weight_std=prior.weight_std, bias_std=prior.bias_std,
        )  # fmt: skip
        with seeded(config.seed, torch.device("cpu")):
            one = make()
        known = prior_variances(one)
        settings = EnsembleConfig(
            method=method, members=members, noise_variance=prior.noise_variance, exact=config.exact,
            prior=known, steps=steps, learning_rate=config.learning_rate,
            batch=config.batch if config.batch < len(x) else None, seed=config.seed,
        )  # fmt: skip
        number = torch.float64 if method == LINEAR else torch.float32
        bar = self.progress.add_task(label, total=members if method == LINEAR else steps)
        advance = partial(self._advance, bar)
        auxiliary = one.to(number) if method == LINEAR and len(x) > SHARED else None
        rows = x.to(number), y.to(number)
        together = together if auxiliary is None else None
        found = kept_ensemble(
            self.keep, [asdict(settings), make.args, make.keywords, together, auxiliary is None], rows, make,
            lambda: fit_ensemble(make, *rows, settings, advance, together=together, auxiliary=auxiliary),
        )  # fmt: skip
        self.progress.remove_task(bar)

        def latent(x: Tensor) -> tuple[Tensor, Tensor]:
            members = found.functions(x.to(number))[..., 0].double()
            return members.mean(0), members.var(0)

        return latent

    def _advance(self, bar: TaskID, step: int) -> None:
        self.progress.update(bar, completed=step)

    def _finished(self, method: str, latent: Latent, prior: Prior, steps: int) -> Fitted:
        """Give a method the noise under which the validation rows are likeliest."""
        x, y = self.validation
        noise, nll = likeliest_noise(*latent(x), y)
        return Fitted(method, latent, noise, *self.scales, Trial(prior, steps, nll))
