"""Ensembles on the toy problem of two intervals, each beside its law of infinite width."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from gramian.bayes.ensemble import METHODS, EnsembleConfig, fit_ensemble
from gramian.bayes.limits import METHODS as LAWS
from gramian.bayes.limits import Kernel, deep_ensemble, ntkgp, randomised_prior
from gramian.data.tables import Table, toy
from gramian.errors import InputError
from gramian.nn.mlp import mlp, prior_variances
from gramian.report.style import save
from gramian.report.toy_ensembles import Panel, panels
from gramian.theory.duals import dual
from gramian.theory.kernels import kernels
from gramian.theory.maps import Activation, Dense, Serial
from gramian.train.run import open_run

ACTIVATION, WEIGHT_STD, BIAS_STD = "erf", 1.5, 0.05
"""Of the published toy problem."""

GRID = tuple(place / 8 for place in range(-48, 49))
"""Where functions are read."""

OUTSIDE = 3.0
"""Distance from 0 from which on an input is far from the data, which end at 2."""


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Which ensembles are trained on y = x sin x + ε."""

    methods: tuple[str, ...] = ("deep_ensemble", "rp_param", "ntkgp_param", "ntkgp_fn", "ntkgp_lin")
    points: int = 20
    noise: float = 0.1
    """σ, the standard deviation of ε."""
    width: int = 256
    """Features of both hidden layers."""
    members: int = 20
    steps: int = 3000
    learning_rate: float = 1e-3
    """Of Adam, which falls to 0 along a cosine."""
    seed: int = 0

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if unknown := set(self.methods) - set(METHODS):
            raise InputError(f"unknown method {min(unknown)!r}; choose some of {', '.join(METHODS)}")
        if not self.methods:
            raise InputError(f"the toy problem needs a method; choose some of {', '.join(METHODS)}")
        if self.width < 1 or self.members < 2:
            raise InputError(f"width and members need 1 and 2 or more, got {self.width}, {self.members}")
        if self.steps < 1 or self.points < 4:
            raise InputError(f"steps and points need 1 and 4 or more, got {self.steps}, {self.points}")
        if not 0 < self.noise < math.inf or not 0 < self.learning_rate < math.inf:
            raise InputError(
                f"noise and learning_rate must be positive, got {self.noise:g}, {self.learning_rate:g}"
            )


@dataclass(frozen=True)
class Toy:
    """What ensembles and their laws say on `GRID`: means, and standard deviations without the noise."""

    x: list[float]
    y: list[float]
    """The training points."""
    mean: dict[str, list[float]]
    deviation: dict[str, list[float]]
    """By method, over members."""
    limit_mean: dict[str, list[float]]
    limit: dict[str, list[float]]
    """The same in closed form, at infinite width."""
    order: dict[str, float]
    """Smallest eigenvalue of the NTKGP's covariance on the grid less another law's, over its largest."""


def toy_ensembles(config: ToyConfig, folder: Path, console: Console) -> Toy:
    """Train every method on the toy problem, and set it beside its law; what is done is not done again.

    Raises: InputError for settings that cannot be used, and a folder that holds another study.
    Source: He, Lakshminarayanan, Teh 2020, arXiv 2007.05864; steps of Adam in place of gradient descent.
    """
    config.check()
    run = open_run(folder, config, resume=True)
    if (known := run.result()) is None:
        table = toy(config.points, noise=config.noise, seed=config.seed)
        grid = torch.tensor(GRID, dtype=torch.float64)[:, None]
        nngp, ntk = limits(table.x, grid)
        mean, deviation, limit_mean, limit = {}, {}, {}, {}
        with Progress(console=console, transient=True) as progress:
            for method in config.methods:
                functions = trained(config, method, table, grid, progress)
                mean[method], deviation[method] = functions.mean(0).tolist(), functions.std(0).tolist()
                law = LAWS[method](nngp, ntk, table.y, config.noise**2)
                limit_mean[method] = law[0].tolist()
                limit[method] = law[1].diagonal().clamp(min=0).sqrt().tolist()
        x, y = table.x[:, 0].tolist(), table.y.tolist()
        found = Toy(x, y, mean, deviation, limit_mean, limit, order(nngp, ntk, table.y, config.noise**2))
        run.write_result(asdict(found))
        known = asdict(found)
    result = Toy(**known)
    save(panels(*drawn(result)), folder / "toy.svg")
    return result


def limits(x: Float[Tensor, "n 1"], grid: Float[Tensor, "m 1"]) -> tuple[Kernel, Kernel]:
    """Return the NNGP's and the NTK's kernels at the training points and on the grid."""
    dense, between = Dense(WEIGHT_STD, BIAS_STD), Activation(dual(ACTIVATION))
    both = kernels(Serial(dense, between, dense, between, dense), torch.cat([x, grid]))
    return Kernel.of(both.nngp, len(x)), Kernel.of(both.ntk, len(x))


def order(nngp: Kernel, ntk: Kernel, y: Tensor, noise_variance: float) -> dict[str, float]:
    """Return how far the NTKGP's covariance less those of other laws is from being positive semidefinite.

        λ_min(Σ_NTKGP − Σ)/λ_max(Σ_NTKGP)

    Holds: at least 0 but for rounding and, of the deep ensemble, the jitter.
    """
    widest = ntkgp(nngp, ntk, y, noise_variance)[1]
    largest = torch.linalg.eigvalsh(widest)[-1]
    others = {"rp_param": randomised_prior, "deep_ensemble": deep_ensemble}
    return {
        name: float(torch.linalg.eigvalsh(widest - law(nngp, ntk, y, noise_variance)[1])[0] / largest)
        for name, law in others.items()
    }


def trained(
    config: ToyConfig, method: str, table: Table, grid: Float[Tensor, "m 1"], progress: Progress
) -> Float[Tensor, "members m"]:
    """Return the functions of trained members on the grid."""
    make = partial(
        mlp, 1, 1, widths=(config.width, config.width), activation=ACTIVATION, weight_std=WEIGHT_STD,
        bias_std=BIAS_STD,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        prior = prior_variances(make())
    linear = method == "ntkgp_lin"
    asked = EnsembleConfig(
        method=method, members=config.members, noise_variance=config.noise**2, prior=prior,
        steps=config.steps, learning_rate=config.learning_rate, seed=config.seed,
    )  # fmt: skip
    number = torch.float64 if linear else torch.float32
    bar = progress.add_task(f"toy problem, {method}", total=config.members if linear else config.steps)
    found = fit_ensemble(
        make, table.x.to(number), table.y.to(number), asked, lambda done: progress.update(bar, completed=done)
    )
    progress.remove_task(bar)
    return found.functions(grid.to(number))[..., 0].double()


def far_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return by how much one standard deviation exceeds another far from the data: a geometric mean."""
    far = [place for place, x in enumerate(GRID) if abs(x) >= OUTSIDE]
    ratios = torch.tensor([over[place] / under[place] for place in far], dtype=torch.float64)
    return float(ratios.log().mean().exp())


def drawn(found: Toy) -> tuple[Sequence[float], list[Panel], Sequence[float], Sequence[float]]:
    """Return what a figure shows."""
    shown = [
        Panel(name, found.mean[name], found.deviation[name], found.limit_mean[name], found.limit[name])
        for name in found.mean
    ]
    return GRID, shown, found.x, found.y
