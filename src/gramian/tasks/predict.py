"""Before training: how signals and gradients go through a network's depth, in the limit and measured."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from gramian.core.gaussian import check_gram
from gramian.core.gram import Gram, gram
from gramian.errors import InputError
from gramian.memory import check_memory
from gramian.nn.attention import Attention
from gramian.nn.resnet import HE_STD
from gramian.tasks.architectures import Architecture, Network, network
from gramian.tasks.verdict import Profile, Verdict, judge, remedies
from gramian.theory.depth import gradient_profile, trace
from gramian.theory.maps import Map, Signal, signal
from gramian.theory.twins import limit

CHANNELS, SIDE = 3, 8
"""Channels and side of the random images that convolutions read."""

BATCH, IMAGES = 128, 12
"""Inputs, and images, of a network with batch norm: random ones beside those that are followed."""

NARROW = 8
"""Width of a network that only its limit is wanted of."""

Pairs = Mapping[str, tuple[int, int] | None]
"""Pairs of inputs by name; None stands for the mean over all pairs."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Architecture):
    """Follow variances, correlations and gradients through a network that is not trained yet."""

    name: Annotated[str, tyro.conf.Positional] = "dense"
    """dense, residual, convolution, residual_convolution, or a transformer block (`gramian list`)."""
    correlations: tuple[float, ...] = (0.0, 0.5, 0.9)
    """Correlations with a first input that further inputs start with; not for transformers."""
    inputs: Path | None = None
    """A .npy file of inputs to follow, one a row, in place of `correlations`."""
    gram: Path | None = None
    """A .npy file of the Gram matrix of inputs (mean products of features), in place of `correlations`."""
    networks: int = 8
    """Finite networks to measure; 0 for theory alone."""
    seed: int = 0
    """Seed of the first network."""
    output: Path | None = None
    """Folder for prediction.json, report.html and the figures; predictions/<name> by default."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path("predictions", self.name) if self.output is None else self.output

    @property
    def architecture(self) -> Architecture:
        """The network alone."""
        return Architecture(**{each.name: getattr(self, each.name) for each in fields(Architecture)})

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        super().check()
        for name in ("networks", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} cannot be negative, got {getattr(self, name)}")
        if wrong := [each for each in self.correlations if not -1 <= each <= 1]:
            raise InputError(f"a correlation must lie in [-1, 1], got {wrong[0]:g}")
        given = [path for path in (self.inputs, self.gram) if path is not None]
        if len(given) > 1 or (given and self.name not in ("dense", "residual")):
            raise InputError("inputs or a gram, one of them only, are for dense and residual networks")
        if not given and not self.transformer and not self.correlations:
            raise InputError("give at least one correlation to start with")
        if self.networks or self.transformer:
            what = f"finite networks of {self.depth:,} layers of width {self.width:,}"
            where = f" on {self.tokens:,} tokens" if self.transformer else " (0 networks is theory alone)"
            check_memory(self.architecture.least_bytes(), what + where)
            curves = 2 + (1 if self.transformer else len(self.correlations))
            kept = 24.0 * curves * (self.depth + 1) * self.networks  # of Python's numbers
            check_memory(kept, f"readings of {self.networks:,} networks of {self.depth:,} layers")


@dataclass(frozen=True, eq=False)
class Prediction:
    """What theory says of a network, what was measured, and what follows."""

    title: str
    theory: Profile
    measured: tuple[Profile, ...]
    verdict: Verdict
    advice: str
    """What to change, with what theory says of the changed network; empty where all is well."""


def predict(config: PredictConfig, console: Console | None = None) -> Prediction:
    """Predict a named architecture and measure finite networks of it.

    Raises: InputError for a setting or a file that cannot be used.
    """
    config.check()
    console = console or Console(quiet=True)
    x, pairs = _inputs(config)
    with console.status("computing the limit"):
        theory = theoretical(*_limit(config.architecture, x), pairs, len(x))
        verdict = judge(theory, config.first)
        advice = _advice(config.architecture, x, pairs, verdict)
    seeds = range(config.seed, config.seed + config.networks)
    measured = tuple(
        empirical(network(config.architecture, x.shape[1], seed), x, pairs, seed)
        for seed in track(seeds, "measuring networks", console=console, transient=True)
    )
    return Prediction(f"{config.name}, {config.depth} layers", theory, measured, verdict, advice)


def predict_module(layers: nn.Sequential | Sequence[nn.Module], x: Tensor) -> Prediction:
    """Predict a network of one's own from inputs like those that it will read, and measure it as it is.

    `layers` are the parts to look between; weights are taken as drawn like those that they have. Features
    are the last axis, or the second one where a layer is a convolution. Of several inputs their
    correlations are followed, of one the correlations of its positions.

    Shapes: x (n, …, features), or (n, channels, …) for convolutions.
    Raises: InputError naming a layer whose limit is not known, and for inputs that are not finite.
    Holds: as width → ∞, error O(width^-1/2).
    """
    if x.ndim < 2 or not bool(torch.isfinite(x).all()):
        raise InputError(f"inputs must be rows of finite numbers, got shape {tuple(x.shape)}")
    layers = [deepcopy(layer).double() for layer in layers]
    maps, pairs = [limit(layer) for layer in layers], {"mean of all pairs": None}
    theory = theoretical(maps, _signal(x.double(), layers), pairs, len(x))
    measured = empirical(Network(layers), x.double(), pairs, 0)
    verdict = judge(theory)
    return Prediction(f"{len(layers)} layers", theory, (measured,), verdict, "")


def theoretical(maps: Sequence[Map], start: Signal, pairs: Pairs, inputs: int | None = None) -> Profile:
    """Return the limit's profile; `inputs` is their number where a signal holds all pairs of positions.

    Holds: as width → ∞.
    """
    signals = trace(maps, start)
    moments, cosines = [], []
    for each in signals:
        norms, products = _by_input(each, inputs)
        moments.append(norms.mean().item())
        cosines.append(products / torch.outer(norms, norms).sqrt())
    gradient = gradient_profile(maps, start).tolist()
    return Profile(moments, _correlations(cosines, pairs), gradient)


def empirical(finite: Network, x: Tensor, pairs: Pairs, seed: int) -> Profile:
    """Return what one network does: a forward pass, and a backward pass of a Gaussian gradient.

    Holds: exactly, for this network and these inputs.
    """
    with torch.enable_grad():
        streams = finite.streams(x.clone().requires_grad_())
        cotangent = torch.randn(
            streams[-1].shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype
        )
        gradients = torch.autograd.grad(streams[-1], streams, cotangent)
    rows = [y.detach()[0] if len(y) == 1 else y.detach().flatten(1) for y in streams]
    products = [gram(y).cross / y.shape[1] for y in rows]
    cosines = [g / torch.outer(g.diagonal(), g.diagonal()).sqrt() for g in products]
    size = cotangent.square().sum()
    return Profile(
        [g.diagonal().mean().item() for g in products],
        _correlations(cosines, pairs),
        [(each.square().sum() / size).item() for each in gradients],
    )


def _correlations(cosines: Sequence[Tensor], pairs: Pairs) -> dict[str, list[float]]:
    """Return a curve for each pair: of two inputs, or the mean over all."""

    def mean(c: Tensor) -> Tensor:
        return (c.sum() - c.diagonal().sum()) / max(1, c.numel() - len(c))

    return {
        name: [(mean(c) if pair is None else c[pair]).item() for c in cosines] for name, pair in pairs.items()
    }


def _by_input(each: Signal, inputs: int | None) -> tuple[Tensor, Tensor]:
    """Return norms (n) and products (n, n) of inputs, averaged over their positions."""
    cross, left = each.activation.cross, each.activation.left
    if cross.ndim > 2:
        return left.flatten(0, -2).mean(0), cross.flatten(0, -3).mean(0)
    if each.space and inputs is not None and inputs > 1:
        blocks = cross.unflatten(0, (inputs, -1)).unflatten(2, (inputs, -1))
        cross = blocks.diagonal(dim1=1, dim2=3).mean(-1)
        return cross.diagonal(), cross
    return left, cross


def _signal(x: Tensor, layers: Sequence[nn.Module]) -> Signal:
    parts = [part for layer in layers for part in layer.modules()]
    rows = x.movedim(1, -1) if any(isinstance(part, nn.Conv1d | nn.Conv2d) for part in parts) else x
    if x.ndim == 2:
        return signal(rows)
    mixing = Attention | nn.AvgPool1d | nn.AvgPool2d | nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d
    pairs = len(x) == 1 or any(isinstance(part, mixing) for part in parts)
    return signal(rows, positions="all" if pairs else "same")


def _limit(architecture: Architecture, x: Tensor) -> tuple[list[Map], Signal]:
    """Return an architecture's maps, and the signal that enters the first layer."""
    if architecture.transformer:
        finite = network(architecture, x.shape[1], seed=0)
        streams = [network(architecture, x.shape[1], seed).enter(x).detach() for seed in range(1, 4)]
        entering = torch.cat([*streams, finite.enter(x).detach()], -1)  # tokens by four embeddings
        return [limit(layer) for layer in finite.layers], signal(entering, positions="all")
    spread = HE_STD if architecture.weight_std is None else architecture.weight_std

    def spreads(module: nn.Module) -> tuple[float, float]:
        return spread, architecture.bias_std

    narrow = Architecture(**{**vars(architecture), "width": NARROW})
    finite = network(narrow, x.shape[1], seed=0)
    assert finite.entrance is not None
    layout = "all" if architecture.norm == "batchnorm" else "same"
    start = signal(x) if x.ndim == 2 else signal(x.movedim(1, -1), positions=layout)
    return [limit(layer, spreads) for layer in finite.layers], limit(finite.entrance, spreads)(start)


def _advice(architecture: Architecture, x: Tensor, pairs: Pairs, verdict: Verdict) -> str:
    """Return the first change that theory finds fine."""
    tried = False
    for words, changed in remedies(architecture, verdict):
        tried = True
        after = judge(theoretical(*_limit(changed, x), pairs, len(x)), changed.first)
        if after.kind == "fine":
            return f"To change: {words}. {after.sentence}"
    return "None of the changes known here helps at this depth; fewer layers do." if tried else ""


def _inputs(config: PredictConfig) -> tuple[Tensor, Pairs]:
    """Return inputs, features (or channels) on axis 1, and which pairs of them to follow."""
    if config.transformer:
        return torch.zeros(1, config.tokens, dtype=torch.float64), {"mean of all pairs of tokens": None}
    if config.inputs is not None:
        x, pairs = matrix(config.inputs), {"mean of all pairs": None}
        check_gram(gram(x))
    else:
        products = _products(config)
        check_gram(_as_gram(products))
        x = _with_gram(products, CHANNELS * SIDE**2, config.seed)
        names = [f"from {each:g}" for each in config.correlations]
        pairs = {name: (0, index + 1) for index, name in enumerate(names)}
        if config.gram is not None:
            pairs = {"mean of all pairs": None}
    batch = IMAGES if "convolution" in config.name else BATCH
    if config.norm == "batchnorm" and len(x) < batch:
        generator = torch.Generator().manual_seed(config.seed)
        others = torch.randn(batch - len(x), x.shape[1], generator=generator, dtype=x.dtype)
        x = torch.cat((x, others * x.square().mean().sqrt()))
    return (x.unflatten(1, (CHANNELS, SIDE, SIDE)) if "convolution" in config.name else x), pairs


def _products(config: PredictConfig) -> Tensor:
    """Return the Gram matrix that the inputs are to have."""
    if config.gram is not None:
        return matrix(config.gram)
    first = torch.tensor((1.0, *config.correlations), dtype=torch.float64)
    products = torch.outer(first, first)
    return products.fill_diagonal_(1.0)


def _with_gram(products: Tensor, features: int, seed: int) -> Tensor:
    """Return inputs whose mean products of features are these: K^(1/2) times orthogonal directions."""
    n = len(products)
    features = max(features, n)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(features, n, generator=generator, dtype=torch.float64)).Q.mT
    values, vectors = torch.linalg.eigh(products)
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT @ directions * features**0.5


def _as_gram(products: Tensor) -> Gram:
    if products.shape[0] != products.shape[1]:
        raise InputError(f"a Gram matrix must be square, got shape {tuple(products.shape)}")
    return Gram(products, products.diagonal(), products.diagonal())


def matrix(path: Path) -> Tensor:
    """Return the matrix that a .npy file holds.

    Raises: InputError when the file cannot be read or holds something else.
    """
    try:
        with path.open("rb") as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, ValueError) as error:
        what = "there is no such file" if isinstance(error, FileNotFoundError) else "it is no .npy of numbers"
        raise InputError(f"{path} cannot be read: {what}") from error
    if array.ndim != 2 or array.dtype.kind not in "fiu" or len(array) < 2:
        raise InputError(f"{path} must hold a matrix of numbers with two rows or more")
    if not np.isfinite(array).all():
        raise InputError(f"{path} holds numbers that are not finite (NaN or infinity)")
    return torch.from_numpy(array.astype(np.float64))
