"""Networks to predict, by name: plain and residual, dense and convolutional, and every transformer block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.activations import activation
from gramian.nn.blocks import BLOCKS
from gramian.nn.norms import norm
from gramian.nn.residual import Chain, Residual, through
from gramian.nn.resnet import HE_STD, RULES, gains, initialise_by_fan_in_
from gramian.nn.tailored import deep_kernel_shaped, tailored
from gramian.nn.transformer import Transformer, TransformerConfig, build

PLAIN = ("dense", "residual", "convolution", "residual_convolution")
SHAPINGS = ("none", "tat", "dks")
POSITIONS = 8
"""Side of the random images that convolutions read."""

KERNEL = 3
"""Side of the convolutions."""

LAYER = 5000
"""Bytes that the objects of one layer take at least, whatever its width."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network of L like layers.

    Raises: InputError for a setting that cannot be used.
    """

    name: str = "dense"
    """dense, residual, convolution, residual_convolution, or a transformer block (`gramian list`)."""
    depth: int = 50
    """Layers, or blocks."""
    width: int = 256
    """Features (channels of convolutions)."""
    activation: str = "relu"
    """Elementwise non-linearity; `gramian list` shows them."""
    weight_std: float | None = None
    """σ_w, weights being N(0, σ_w²/fan_in); √2 when not given. Transformer blocks have their own."""
    bias_std: float = 0.0
    """σ_b, biases being N(0, σ_b²)."""
    gains: str = "none"
    """Gains of the residual branches: none for 1, uniform for 1/√L, decreasing for 1/(√l log(l+1))."""
    norm: str = "none"
    """Norm before every activation of a dense or residual network (batchnorm too), or of the blocks."""
    shaping: str = "none"
    """tat or dks replace the activation by one tailored to this depth."""
    tokens: int = 64
    """Tokens of a transformer's sequence."""
    heads: int = 4
    """Attention heads."""

    @property
    def transformer(self) -> bool:
        """Whether the name is that of a transformer block."""
        return self.name in BLOCKS

    @property
    def first(self) -> int:
        """The first layer that is judged: behind a block, since the scale of embeddings is free."""
        return 1 if self.transformer and self.depth > 1 else 0

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if self.name not in PLAIN and not self.transformer:
            known = ", ".join((*PLAIN, *BLOCKS))
            raise InputError(f"unknown architecture {self.name!r}; choose one of {known}")
        for name in ("depth", "width", "tokens", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("weight_std", "bias_std"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise InputError(f"{name} must be zero or above, and finite, got {value:g}")
        for name, known in (("gains", tuple(RULES)), ("shaping", SHAPINGS)):
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} {getattr(self, name)!r}; choose {', '.join(known)}")
        activation(self.activation)
        if self.norm != "batchnorm" or self.transformer:
            norm(self.norm)
        if self.gains != "none" and "residual" not in self.name:
            raise InputError(f"gains are of residual networks, and {self.name} takes none")

    def least_bytes(self) -> float:
        """Return the bytes that one finite network takes at least, with what its layers give out.

            8 L (k w² + p w + T²) + 5 000 L

        L layers of width w at p positions of an input, k weights a pair of features, T² pairs of tokens.
        """
        pairs, weights, positions = 0, 1, 1
        if self.transformer:
            pairs, weights, positions = self.tokens**2, 7, self.tokens
        elif "convolution" in self.name:
            weights, positions = KERNEL**2, POSITIONS**2
        layer = weights * self.width**2 + positions * self.width + pairs
        return (8.0 * layer + LAYER) * self.depth


@dataclass(frozen=True, eq=False)
class Network:
    """A network as what stands before its layers, and the layers one by one."""

    layers: Sequence[nn.Module]
    enter: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    """From inputs to what the first layer reads."""
    entrance: nn.Module | None = None
    """The module behind `enter`, where theory can read it."""

    def streams(self, x: Tensor) -> list[Tensor]:
        """Return what enters the first layer and what leaves each one."""
        streams = [self.enter(x)]
        for layer in self.layers:
            streams.append(through(layer, streams[-1], None))
        return streams


def network(architecture: Architecture, features: int, seed: int) -> Network:
    """Return a finite network with weights drawn by a seed, in float64.

    Raises: InputError as `Architecture.check`.
    """
    architecture.check()
    if architecture.transformer:
        return _transformer(architecture, seed)
    convolves = "convolution" in architecture.name
    with torch.random.fork_rng(devices=[]):  # torch's constructors draw weights that are overwritten
        entrance = _linear(features, architecture, convolves)
        layers = [_layer(architecture, convolves) for _ in range(architecture.depth)]
    if "residual" in architecture.name:
        scales = gains(architecture.gains, architecture.depth)
        layers = [Residual(layer, gain=scale) for layer, scale in zip(layers, scales, strict=True)]
    whole = nn.Sequential(entrance, *layers).double()
    spread = HE_STD if architecture.weight_std is None else architecture.weight_std
    initialise_by_fan_in_(whole, seed, spread, architecture.bias_std)
    return Network(layers, entrance, entrance)


def _linear(features: int, architecture: Architecture, convolves: bool) -> nn.Module:
    bias = architecture.bias_std > 0
    if convolves:
        return nn.Conv2d(features, architecture.width, KERNEL, padding=1, padding_mode="circular", bias=bias)
    return nn.Linear(features, architecture.width, bias=bias)


def _layer(architecture: Architecture, convolves: bool) -> nn.Module:
    """Norm, activation, linear map: what leaves a layer is Gaussian in the limit."""
    parts = [_activation(architecture), _linear(architecture.width, architecture, convolves)]
    if architecture.norm == "batchnorm":
        kind = nn.BatchNorm2d if convolves else nn.BatchNorm1d
        parts.insert(0, kind(architecture.width, eps=1e-12))
    elif architecture.norm != "none":
        if convolves:
            raise InputError(f"convolutions take the norm none or batchnorm, not {architecture.norm}")
        parts.insert(0, norm(architecture.norm)(architecture.width))
    return Chain(*parts)


def _activation(architecture: Architecture) -> nn.Module:
    if architecture.shaping == "none":
        return activation(architecture.activation)()
    make = tailored if architecture.shaping == "tat" else deep_kernel_shaped
    return make(activation(architecture.activation), architecture.depth)


def _transformer(architecture: Architecture, seed: int) -> Network:
    config = TransformerConfig(
        vocabulary=architecture.tokens,
        context=architecture.tokens,
        width=architecture.width,
        depth=architecture.depth,
        heads=architecture.heads,
        block=architecture.name,
        activation=architecture.activation,
        norm="rmsnorm" if architecture.norm == "none" else architecture.norm,
    )
    model: Transformer = build(config, seed).double()
    places = torch.arange(architecture.tokens)

    def enter(x: Tensor) -> Tensor:
        embedded = model.embedding_projection(model.embedding(places))
        return (embedded if model.positions is None else embedded + model.positions(places))[None]

    return Network(list(model.blocks), enter)
