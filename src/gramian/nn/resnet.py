"""Residual networks of linear layers and of convolutions, with the gain of every block passed in."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gramian.core.gram import gram
from gramian.core.readings import cosine_mean
from gramian.errors import InputError
from gramian.nn.activations import Activation
from gramian.nn.residual import Chain, Residual, decreasing_gain, uniform_gain

Norm = Callable[[int], nn.Module]
"""Makes the normalisation of a number of features, such as nn.BatchNorm1d."""

HE_STD = math.sqrt(2.0)
"""σ_w of He's initialisation: weights of variance 2/fan_in."""

DEFAULT_STD = math.sqrt(1 / 3)
"""σ_w of what PyTorch draws when nobody asks: weights of variance 1/(3 fan_in)."""

RULES: dict[str, Callable[[int], list[float]]] = {
    "none": lambda depth: [1.0] * depth,
    "uniform": lambda depth: [uniform_gain(depth)] * depth,
    "decreasing": lambda depth: [decreasing_gain(block) for block in range(1, depth + 1)],
}
"""The gains of L residual blocks by the rule's name: 1, 1/√L, or 1/(√l log(l + 1)) for block l = 1 … L."""


def gains(rule: str, depth: int) -> list[float]:
    """Return the gains λ_1 … λ_L of a depth rule: none, uniform or decreasing.

    Raises: InputError for an unknown rule or a depth below 1.
    Holds: Σ λ² is L, 1 and below 3.39, exactly.
    Source: Hayou et al. 2021, arXiv 2010.12859.
    """
    if rule not in RULES:
        raise InputError(f"unknown depth rule {rule!r}; choose {', '.join(RULES)}")
    if depth < 1:
        raise InputError(f"a residual network needs at least one block, got {depth}")
    return RULES[rule](depth)


class ResNet(nn.Sequential):
    """A stem, residual blocks one after the other, and a read-out.

        y_0 = stem(x),   y_l = block_l(y_{l−1}),   f(x) = readout(y_L)

    Holds: exactly.
    """

    stem: nn.Module
    blocks: nn.Sequential
    readout: nn.Module

    def __init__(self, stem: nn.Module, blocks: nn.Sequential, readout: nn.Module) -> None:
        super().__init__(OrderedDict(stem=stem, blocks=blocks, readout=readout))


class Transition(nn.Module):
    """A residual branch whose skip is a linear map, since the two sides differ in shape.

        R(x) = shortcut(x) + gain · branch(x)

    Shapes: (batch, …) -> (batch, …) of another size.
    Holds: exactly.
    """

    def __init__(self, shortcut: nn.Module, branch: nn.Module, gain: float) -> None:
        super().__init__()
        self.shortcut, self.branch, self.gain = shortcut, branch, gain

    def forward(self, x: Float[Tensor, " batch *size"]) -> Float[Tensor, " batch *other"]:
        """Add the shortcut and the branch."""
        return self.shortcut(x) + self.gain * self.branch(x)


def initialise_by_fan_in_(model: nn.Module, seed: int, weight_std: float, bias_std: float = 0.0) -> nn.Module:
    """Fill the weights of linear layers and convolutions in place, as a function of the seed alone.

        W ~ N(0, σ_w² / fan_in),   b ~ N(0, σ_b²),   fan_in = features in × taps of the kernel

    Other modules keep what they start with.

    Raises: InputError when a standard deviation is negative or not finite.
    Holds: equal seeds give equal weights on the same device type; the stream of a network of another depth
        starts with the same numbers.
    """
    for name, std in (("weight_std", weight_std), ("bias_std", bias_std)):
        if not 0 <= std < math.inf:
            raise InputError(f"{name} must be finite and not negative, got {std:g}")
    parameter = next(model.parameters(), None)
    generator = torch.Generator("cpu" if parameter is None else parameter.device).manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=weight_std / math.sqrt(fan_in), generator=generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=bias_std, generator=generator)
    return model


def dense_resnet(
    inputs: int,
    width: int,
    outputs: int,
    activation: Activation,
    gains: Sequence[float],
    *,
    weight_std: float = HE_STD,
    bias_std: float = 0.0,
    norm: Norm | None = None,
    seed: int = 0,
) -> ResNet:
    """Return the residual network of linear layers whose limit the theory describes, one block a gain.

        y_0 = W_0 x + b_0,   y_l = y_{l−1} + λ_l N(W_l φ(y_{l−1}) + b_l),   f = W y_L + b

    N is left out without a norm. Layers have no bias when σ_b = 0.

    Shapes: (batch, inputs) -> (batch, outputs).
    Raises: InputError for sizes below 1, no gain, or a standard deviation that is not one.
    Holds: exactly; as width → ∞, for ReLU, σ_b = 0 and no norm, E y_L² = E y_0² Π(1 + λ_l² σ_w²/2) at the
        start.
    Source: Hayou et al. 2021, arXiv 2010.12859.
    """
    _check_sizes(gains, inputs=inputs, width=width, outputs=outputs)

    def linear(fan_in: int, fan_out: int) -> nn.Module:
        return nn.Linear(fan_in, fan_out, bias=bias_std > 0)

    def branch() -> nn.Module:
        return nn.Sequential(activation(), linear(width, width), *([norm(width)] if norm else []))

    blocks = Chain(*(Residual(branch(), gain=float(gain)) for gain in gains))
    model = ResNet(linear(inputs, width), blocks, linear(width, outputs))
    initialise_by_fan_in_(model, seed, weight_std, bias_std)
    return model


def conv_resnet(
    inputs: int,
    channels: int,
    outputs: int,
    activation: Activation,
    gains: Sequence[float],
    *,
    kernel: int = 3,
    dimensions: int = 2,
    padding: str = "circular",
    weight_std: float = HE_STD,
    bias_std: float = 0.0,
    norm: Norm | None = None,
    seed: int = 0,
) -> ResNet:
    """Return the residual network of convolutions whose limit the theory describes, one block a gain.

        y_0 = W_0 ∗ x + b_0,   y_l = y_{l−1} + λ_l N(W_l ∗ φ(y_{l−1}) + b_l),   f = W mean_α y_L(α) + b

    Shapes: (batch, inputs, *size) -> (batch, outputs), with `dimensions` (1 or 2) axes of size.
    Raises: InputError for sizes below 1, an even kernel, another number of dimensions, a padding that is
        neither circular nor zeros, no gain, or a standard deviation that is not one.
    Holds: exactly; with circular padding the second moments at the start are those of `dense_resnet`.
    Source: Hayou et al. 2021, arXiv 2010.12859.
    """
    _check_sizes(gains, inputs=inputs, channels=channels, outputs=outputs)
    if kernel < 1 or kernel % 2 == 0:
        raise InputError(f"the kernel must be odd, so that it has a centre, got {kernel}")
    if dimensions not in (1, 2):
        raise InputError(f"convolutions have 1 or 2 dimensions here, got {dimensions}")
    if padding not in ("circular", "zeros"):
        raise InputError(f"unknown padding {padding!r}; choose circular or zeros")
    layer, pool = (nn.Conv1d, nn.AdaptiveAvgPool1d) if dimensions == 1 else (nn.Conv2d, nn.AdaptiveAvgPool2d)

    def convolution(fan_in: int) -> nn.Module:
        border = {"padding": kernel // 2, "padding_mode": padding}
        return layer(fan_in, channels, kernel, bias=bias_std > 0, **border)

    def branch() -> nn.Module:
        return nn.Sequential(activation(), convolution(channels), *([norm(channels)] if norm else []))

    blocks = Chain(*(Residual(branch(), gain=float(gain)) for gain in gains))
    head = nn.Sequential(pool(1), nn.Flatten(), nn.Linear(channels, outputs, bias=bias_std > 0))
    model = ResNet(convolution(inputs), blocks, head)
    initialise_by_fan_in_(model, seed, weight_std, bias_std)
    return model


def cifar_resnet(
    per_stage: int,
    widths: Sequence[int],
    classes: int,
    gains: Sequence[float],
    *,
    channels: int = 3,
    norm: Norm | None = None,
    weight_std: float = HE_STD,
    seed: int = 0,
) -> ResNet:
    """Return the image network of 6n + 2 layers: per stage n blocks of two convolutions, ReLU after the sum.

        y_l = relu(S_l y_{l−1} + λ_l N W'_l ∗ relu(N W_l ∗ y_{l−1}))

    S is the identity, or where a stage begins with other channels a 1×1 convolution; every stage after the
    first halves height and width. N is left out without a norm. Convolutions have no bias; that of the
    read-out starts at 0.

    Shapes: (batch, channels, height, width) -> (batch, classes).
    Raises: InputError for sizes below 1 or when there is not one gain a block.
    Holds: exactly. The stream is never negative, so the recursion of `dense_resnet` is not that of this form.
    Source: He et al. 2016, arXiv 1512.03385, section 4.2; gains: Hayou et al. 2021, arXiv 2010.12859.
    """
    _check_sizes(
        gains, per_stage=per_stage, classes=classes, channels=channels, widths=min(widths, default=0)
    )
    if len(gains) != per_stage * len(widths):
        blocks = f"{len(widths)} stages of {per_stage} blocks"
        raise InputError(f"{blocks} need {per_stage * len(widths)} gains, got {len(gains)}")
    stem = nn.Sequential(*_convolution(channels, widths[0], 3, 1, norm), nn.ReLU())
    trunk: list[nn.Module] = []
    before = widths[0]
    for index, gain in enumerate(gains):
        width = widths[index // per_stage]
        stride = 2 if index >= per_stage and index % per_stage == 0 else 1
        trunk.append(_image_block(before, width, stride, float(gain), norm))
        before = width
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
    model = ResNet(stem, nn.Sequential(*trunk), head)
    initialise_by_fan_in_(model, seed, weight_std)
    return model


def _image_block(before: int, width: int, stride: int, gain: float, norm: Norm | None) -> nn.Module:
    first, second = _convolution(before, width, 3, stride, norm), _convolution(width, width, 3, 1, norm)
    branch = nn.Sequential(*first, nn.ReLU(), *second)
    if stride == 1 and before == width:
        return Chain(Residual(branch, gain=gain), nn.ReLU())
    shortcut = nn.Sequential(*_convolution(before, width, 1, stride, norm))
    return nn.Sequential(Transition(shortcut, branch, gain), nn.ReLU())


def _convolution(before: int, width: int, kernel: int, stride: int, norm: Norm | None) -> list[nn.Module]:
    layer = nn.Conv2d(before, width, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [layer, norm(width)] if norm else [layer]


def _check_sizes(gains: Sequence[float], **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} must be at least 1, got {size}")
    if not gains:
        raise InputError("a residual network needs at least one block, and so one gain")


@dataclass(frozen=True)
class Profile:
    """How large the stream and its gradient are after every block, from y_0 to y_L."""

    forward: Float[Tensor, " streams"]
    """Mean square of the entries of y_l."""
    backward: Float[Tensor, " streams"]
    """Mean over inputs of |∂(u·y_L)/∂y_l|² for a Gaussian u."""
    cosine: Float[Tensor, " streams"]
    """Mean cosine between y_l of two different inputs."""


def profile(model: ResNet, x: Float[Tensor, " batch *size"], seed: int = 0) -> Profile:
    """Measure how signals and gradients go through the blocks of a residual network.

        E y_l²,   E |∂(u·y_L)/∂y_l|²,   u ~ N(0, I),   and E cos(y_l(x), y_l(x')) over pairs of inputs

    The network runs in the mode that it is in. Float64 reaches growth by 2^1000, float32 only by 2^120.

    Raises: InputError for fewer than two inputs.
    Holds: exactly, for this network and these inputs.
    """
    if len(x) < 2:
        raise InputError(f"cosines between inputs need at least two inputs, got {len(x)}")
    y = model.stem(x).detach().requires_grad_()
    streams = [y]
    for block in model.blocks:
        streams.append(block(streams[-1]))
    last = streams[-1]
    generator = torch.Generator(last.device).manual_seed(seed)
    u = torch.randn(last.shape, generator=generator, dtype=last.dtype, device=last.device)
    gradients = torch.autograd.grad(last, streams, u)
    return Profile(
        torch.stack([stream.detach().square().mean() for stream in streams]),
        torch.stack([gradient.flatten(1).square().sum(1).mean() for gradient in gradients]),
        torch.stack([cosine_mean(gram(stream.detach().flatten(1))) for stream in streams]),
    )
