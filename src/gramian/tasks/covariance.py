"""Before training a shaped transformer: the law of its tokens' correlations and norms, and networks."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from gramian.core.gram import Gram
from gramian.core.readings import cosine
from gramian.core.sde import Paths, check_covariance
from gramian.errors import InputError
from gramian.memory import check_memory
from gramian.nn.shaped_networks import ShapedNetworks
from gramian.ranks import ranks, spread
from gramian.tasks.predict import matrix
from gramian.tasks.samples import Distance, Share, Summary, kolmogorov_smirnov, share, summary
from gramian.tasks.verdict import COLLAPSED, FAR
from gramian.theory.covariance_sde import ShapedBlock, simulate

PAIR, MEAN, NORM = "correlation of tokens 1 and 2", "mean correlation", "log norm of token 1"
RARE = 0.01
"""Share of paths that may blow up, or collapse, without its being called unstable."""

GAMMAS, TAUS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0), (0.5, 0.7, 1.0, 2.0, 4.0)
"""Where the stable region is looked for; a user's own γ and τ₀ are added."""

HORIZONS = (0.25, 0.5, 1, 2)
"""Depths over width, in units of the one asked for, at which the region is looked at."""

RECORDS, CELL_PATHS, BATCH = 16, 400, 500
"""Times at which states are kept; paths for each cell of the region; paths at once, for the memory's sake."""


@dataclass(frozen=True, kw_only=True)
class CovarianceConfig:
    """Follow the covariance of tokens through a shaped transformer that is not trained yet."""

    depth: int = 64
    """Blocks, each of attention and an MLP; time is depth/width."""
    width: int = 128
    """Features of a token."""
    tokens: int = 8
    """Tokens of a sequence, at least 2; a Gram matrix has its own number."""
    gamma: float = 0.5
    """γ, weight of a branch against its skip √(1 − γ²), in [0, 1]."""
    tau0: float = 1.0
    """τ₀, temperature of attention at width 1, positive."""
    causal: bool = False
    """Attention to the past alone; our extension of the published theory."""
    positive: float = 0.0
    """c₊ of the shaped ReLU, whose slopes are 1 + c±/√width."""
    negative: float = -1.0
    """c₋ of the shaped ReLU."""
    key_width: int = 64
    """Features of a query or key in the finite networks."""
    correlation: float = 0.3
    """Correlation that all pairs of tokens start with, in [−1/(tokens − 1), 1]; their norms start at 1."""
    gram: Path | None = None
    """A .npy file of the covariance of tokens to start from (mean products of features)."""
    paths: int = 2000
    """Paths of the SDE."""
    networks: int = 200
    """Finite networks to measure; 0 for theory alone."""
    steps: int | None = None
    """Steps of the integrator; one a block by default."""
    region: bool = True
    """Look for the γ and τ₀ that are stable at this depth and width."""
    seed: int = 0
    """Seed of all paths and networks."""
    output: Path | None = None
    """Folder for prediction.json, report.html and the figures; predictions/shaped_sde by default."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path("predictions", "shaped_sde") if self.output is None else self.output

    @property
    def time(self) -> float:
        """Depth over width, the time of the SDE."""
        return self.depth / self.width

    @property
    def block(self) -> ShapedBlock:
        """The block of the limit."""
        return ShapedBlock(self.gamma, self.tau0, self.causal, self.positive, self.negative)

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used, or what no memory here holds."""
        least = {"depth": 1, "width": 1, "tokens": 2, "key_width": 1, "paths": 2, "networks": 0, "seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"{name} must be at least {value}, got {getattr(self, name)}")
        if self.networks == 1:
            raise InputError("networks must be 0, for theory alone, or at least 2, got 1")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")
        _ = self.block  # settings that it cannot use raise
        if self.positive <= -(self.width**0.5):
            raise InputError(
                f"positive must be above −√width, which is {-(self.width**0.5):.3g}, got {self.positive:g}"
            )
        self._check_sizes()
        lowest = -1 / (self.tokens - 1)
        if self.gram is None and not lowest <= self.correlation <= 1:
            raise InputError(
                f"{self.tokens} tokens can all correlate at {lowest:.3g} to 1 with one another, got "
                f"{self.correlation:g}"
            )

    def _check_sizes(self) -> None:
        """Refuse what no memory here holds: at least 8 bytes a reading, an entry of a state, a feature."""
        times = RECORDS + 1
        check_memory(8.0 * 3 * times * self.paths, f"readings of {self.paths:,} paths")
        check_memory(8.0 * 3 * times * self.networks, f"readings of {self.networks:,} networks")
        together = min(max(self.paths, self.networks), BATCH)
        tokens = 0 if self.gram is not None else self.tokens
        check_memory(
            8.0 * times * together * tokens**2, f"{together} covariances of {tokens:,} tokens at once"
        )
        if self.networks:
            features = f"finite networks of {tokens:,} tokens and width {self.width:,}"
            check_memory(16.0 * tokens * self.width, f"{features} (0 networks is theory alone)")


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Readings of paths or of networks through depth, and what became of them.

    Those that blew up are in no reading from then on; their number is in `blown_up`.
    """

    depths: Sequence[float]
    through: dict[str, Sequence[Summary]]
    """By reading, a summary at each depth."""
    final: dict[str, Sequence[float]]
    """By reading, the values at the end."""
    blown_up: Share
    collapsed: Share


@dataclass(frozen=True)
class Region:
    """Shares of paths that blow up, or collapse, by γ (rows) and τ₀ (columns)."""

    gammas: Sequence[float]
    taus: Sequence[float]
    paths: int
    blown_up: Sequence[Sequence[float]]
    collapsed: Sequence[Sequence[float]]
    times: Sequence[float]
    """Depths over width, the one asked for among them."""
    blown_up_by: Sequence[Sequence[float]]
    """Shares that blow up by γ (rows) and by the times (columns), at the τ₀ asked for."""

    def stable(self, gamma: float, tau: float) -> bool:
        """Whether both shares are below `RARE`."""
        row, column = self.gammas.index(gamma), self.taus.index(tau)
        return max(self.blown_up[row][column], self.collapsed[row][column]) < RARE


@dataclass(frozen=True, eq=False)
class CovariancePrediction:
    """What the SDE says of a shaped transformer, what networks did, and which settings are stable."""

    time: float
    starts_collapsed: bool
    """Whether the tokens were one from the start; that they stay it says nothing of the network."""
    theory: Ensemble
    measured: Ensemble | None
    distances: dict[str, Distance]
    """By reading, between theory and networks at the end; empty where nothing was measured."""
    region: Region | None


def predict_covariance(config: CovarianceConfig, console: Console | None = None) -> CovariancePrediction:
    """Simulate the SDE to depth/width, finite networks of this depth and width, and the region around.

    Raises: InputError for a setting or a file that cannot be used.
    """
    config.check()
    start = _start(config)
    check_covariance(start)
    if config.networks and config.width < len(start):
        raise InputError(
            f"networks need a width of at least their {len(start)} tokens, got {config.width}; pass "
            "--networks 0 for theory alone"
        )
    seeds = _seeds(config.seed)
    with Progress(console=console or Console(quiet=True), transient=True) as progress:
        theory = _theory(config, start, seeds, progress)
        measured = _networks(config, start, seeds, progress) if config.networks else None
        region = _region(config, start, seeds, progress) if config.region else None
    distances = {}
    if measured is not None:
        for name, values in measured.final.items():
            if values and theory.final[name]:
                distances[name] = kolmogorov_smirnov(theory.final[name], values)
    return CovariancePrediction(config.time, bool(_collapsed(start)), theory, measured, distances, region)


def readings(v: Tensor) -> dict[str, Tensor]:
    """Return one number for each covariance and reading: they are independent from path to path.

    Correlations of a path's pairs depend on each other; so a pair alone, and the mean over all pairs, whose
    law is another one. The norm is ln V₁₁.

    Shapes: v (…, m, m) -> (…).
    """
    pairs = _pairs(v)
    found = {PAIR: pairs[..., 0]}
    if pairs.shape[-1] > 1:
        found[MEAN] = pairs.mean(-1)
    return found | {NORM: v[..., 0, 0].clamp(min=1e-300).log()}


def _pairs(v: Tensor) -> Tensor:
    """Return the correlations above the diagonal, row by row: of tokens 1 and 2 first."""
    norms = v.diagonal(dim1=-2, dim2=-1).clamp(min=1e-300)
    rows, columns = torch.triu_indices(v.shape[-1], v.shape[-1], 1, device=v.device).unbind()
    cosines = cosine(Gram(v, norms, norms))[..., rows, columns]
    return cosines.round(decimals=9)  # or rounding alone would order what is equal


def _collapsed(v: Tensor) -> Tensor:
    """Return which covariances have rank one, nearly."""
    return _pairs(v).abs().amin(-1) >= COLLAPSED


def _start(config: CovarianceConfig) -> Tensor:
    if config.gram is not None:
        return matrix(config.gram)
    start = torch.full((config.tokens, config.tokens), config.correlation, dtype=torch.float64)
    return start.fill_diagonal_(1.0)


def _seeds(seed: int) -> Iterator[int]:
    stream = random.Random(seed)
    while True:
        yield stream.getrandbits(32)


def _batches(total: int) -> list[int]:
    """Return sizes of batches that add up to a total."""
    sizes = [BATCH] * (total // BATCH)
    return sizes + ([total % BATCH] if total % BATCH else [])


def _bound(start: Tensor) -> float:
    """Return the entry beyond which a covariance has blown up."""
    return FAR * start.abs().max().item()


def _depths(depth: int) -> list[int]:
    """Return blocks after which states are kept, evenly apart, the start and the last among them."""
    return sorted({round(depth * part / RECORDS) for part in range(RECORDS + 1)})


def _theory(config: CovarianceConfig, start: Tensor, seeds: Iterator[int], progress: Progress) -> Ensemble:
    records = [depth / config.width for depth in _depths(config.depth)]
    bar = progress.add_task("paths of the SDE", total=config.paths)

    def followed(batch: tuple[int, int]) -> dict[str, Tensor]:
        paths, seed = batch
        found = simulate(
            config.block, start, config.time, paths=paths, steps=config.steps or config.depth, seed=seed,
            records=records, bound=_bound(start),
        )  # fmt: skip
        progress.advance(bar, paths * ranks())
        return _kept(found)

    return _ensemble(spread(followed, zip(_batches(config.paths), seeds, strict=False)), config.width)


def _networks(config: CovarianceConfig, start: Tensor, seeds: Iterator[int], progress: Progress) -> Ensemble:
    finite = ShapedNetworks(
        config.width,
        config.gamma,
        config.tau0,
        key_width=config.key_width,
        causal=config.causal,
        positive=config.positive,
        negative=config.negative,
    )
    bar = progress.add_task("finite networks", total=config.networks)

    def followed(batch: tuple[int, int]) -> dict[str, Tensor]:
        networks, seed = batch
        found = finite.simulate(
            start,
            config.depth,
            networks=networks,
            seed=seed,
            records=_depths(config.depth),
            bound=_bound(start),
        )
        progress.advance(bar, networks * ranks())
        return _kept(found)

    return _ensemble(spread(followed, zip(_batches(config.networks), seeds, strict=False)), config.width)


def _region(config: CovarianceConfig, start: Tensor, seeds: Iterator[int], progress: Progress) -> Region:
    gammas, taus = sorted({*GAMMAS, config.gamma}), sorted({*TAUS, config.tau0})
    cells = list(product(gammas, taus))
    times = [config.time * factor for factor in HORIZONS]
    bar = progress.add_task("stable region", total=len(cells))
    seed = next(seeds)  # one for all cells, so that they differ by their settings alone

    def looked_at(cell: tuple[float, float]) -> dict[str, Tensor]:
        gamma, tau0 = cell
        horizon = HORIZONS[-1] if tau0 == config.tau0 else 1
        found = simulate(
            replace(config.block, gamma=gamma, tau0=tau0), start, config.time * horizon, paths=CELL_PATHS,
            steps=(config.steps or config.depth) * horizon, records=[config.time], seed=seed,
            bound=_bound(start),
        )  # fmt: skip
        progress.advance(bar, ranks())
        lost = [(found.stopped <= time * (1 + 1e-9)).double().mean() for time in times]
        return {"lost": torch.stack(lost), "collapsed": _kept(found)["collapsed"].double().mean()}

    looks = spread(looked_at, cells)
    lost = [look["lost"].tolist() for look in looks]
    together = bool(_collapsed(start))
    return Region(
        gammas,
        taus,
        CELL_PATHS,
        _rows([row[HORIZONS.index(1)] for row in lost], len(taus)),
        _rows([0.0 if together else look["collapsed"].item() for look in looks], len(taus)),
        times,
        [row for row, (_, tau0) in zip(lost, cells, strict=True) if tau0 == config.tau0],
    )


def _rows(values: Sequence[float], columns: int) -> list[list[float]]:
    return [list(values[first : first + columns]) for first in range(0, len(values), columns)]


def _kept(found: Paths) -> dict[str, Tensor]:
    """Return what is kept of some paths: readings (records, paths), who is left when, who collapsed."""
    left = found.stopped > found.times[:, None] * (1 + 1e-9)
    return {
        "times": found.times,
        "left": left,
        "blown up": found.stopped.isfinite(),
        "collapsed": _collapsed(found.states[-1]) & left[-1],
        **readings(found.states),
    }


def _ensemble(parts: Sequence[Mapping[str, Tensor]], width: int) -> Ensemble:
    whole = {name: torch.cat([part[name] for part in parts], -1) for name in parts[0] if name != "times"}
    left, through, final = whole["left"], {}, {}
    for name in (each for each in (PAIR, MEAN, NORM) if each in whole):
        through[name] = [summary(row[kept]) for row, kept in zip(whole[name], left, strict=True)]
        final[name] = whole[name][-1][left[-1]].tolist()
    depths = (parts[0]["times"] * width).tolist()
    return Ensemble(depths, through, final, share(whole["blown up"]), share(whole["collapsed"]))
