"""From a finite module to its limit: the map that it becomes as its widths grow, read off the module."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.activations import ACTIVATIONS
from gramian.nn.attention import Attention
from gramian.nn.init import Reparametrised
from gramian.nn.norms import SingleScaleRMSNorm
from gramian.nn.parts import MLP
from gramian.nn.residual import Gain
from gramian.nn.residual import Residual as ResidualModule
from gramian.nn.residual import Sum as SumModule
from gramian.nn.tailored import Tailored, TailoredLeakyReLU
from gramian.theory.duals import dual
from gramian.theory.maps import (
    Activation,
    AveragePool,
    BatchNorm,
    Convolution,
    Dense,
    Flatten,
    Gated,
    GlobalPool,
    Map,
    Mixing,
    Norm,
    Residual,
    Scale,
    Serial,
    Signal,
    Sum,
    combined,
)


@dataclass(frozen=True)
class Stream:
    """What is known of the features at one point of a module."""

    spreads: "Spreads"
    """How the weights of linear maps were drawn."""
    gaussian: bool = True
    """Whether they are centred and jointly Gaussian in the limit, which an activation needs."""
    fresh: bool = False
    """Whether they come out of weights of their own since the branch began, which a sum needs."""


@dataclass(frozen=True)
class Attended:
    """Token mixing of an attention whose logits are zero, A K Aᵀ averaged over its heads.

    Queries start at zero in shaped and prescribed attention; where they do not, this is the limit of small
    logits.

    Shapes: a signal of all pairs of T tokens -> the same.
    Holds: exactly at zero logits.
    """

    mixing: nn.Module
    heads: int
    head_width: int

    def matrices(self, tokens: int) -> Tensor:
        """Return A of every head: what the mixing does to the unit vectors.

        Shapes: -> (heads, tokens, tokens).
        """
        zero = torch.zeros(1, self.heads, tokens, self.head_width, dtype=torch.float64)
        unit = torch.eye(tokens, dtype=torch.float64).expand(1, self.heads, -1, -1)
        device = next((x.device for x in self.mixing.parameters()), zero.device)
        with torch.no_grad():
            return self.mixing(zero.to(device), zero.to(device), unit.to(device))[0].cpu()

    def __call__(self, signal: Signal) -> Signal:
        """Mix tokens by every head's matrix and average."""
        if len(signal.space) != 1:
            raise InputError(
                f"attention mixes tokens along one axis, and the signal's space is {signal.space or 'empty'}"
            )
        matrices = self.matrices(signal.space[0])
        if (matrices == matrices[:1]).all():
            matrices = matrices[:1]
        mixed = [Mixing(matrix.to(signal.activation.cross))(signal) for matrix in matrices]
        if len(mixed) == 1:
            return mixed[0]
        return Scale(len(mixed) ** -0.5)(combined(*((1.0, each) for each in mixed)))


Spreads = Callable[[nn.Module], tuple[float, float]]
"""From a linear map or convolution to its σ_w and σ_b."""


def measured(module: nn.Module) -> tuple[float, float]:
    """Return σ_w and σ_b of the weights that a linear map or convolution has.

        σ_w² = fan_in · mean W²,   σ_b² = mean b²

    Holds: up to a relative error O(1/√weights) of what they were drawn with.
    """
    weight, bias = module.get_parameter("weight").detach().double(), getattr(module, "bias", None)
    spread = 0.0 if bias is None else bias.detach().double().square().mean().sqrt().item()
    return (weight[0].numel() * weight.square().mean()).sqrt().item(), spread


def limit(module: nn.Module, spreads: Spreads = measured) -> Map:
    """Return what a module does to Gram matrix and tangent kernel as its widths go to infinity.

    `spreads` says how weights were drawn; read off the weights that the module has, it stands for any network
    drawn like it. Read are linear maps and convolutions, elementwise activations, norms,
    pooling, Sequential, and this library's Chain, Residual, Sum, MLP and Attention (`Attended`); dropout as
    in evaluation. Weights must be independent and centred; an activation must read what linear maps gave.

    Raises: InputError naming the layer that has no limit here, and why.
    Holds: as width → ∞, error O(width^-1/2).
    Source: Jacot et al. 2018, arXiv 1806.07572; Yang 2019, arXiv 1910.12478.
    """
    return _read(module, "", Stream(spreads))[0]


def _read(module: nn.Module, name: str, stream: Stream) -> tuple[Map, Stream]:
    for kind, reader in READERS.items():
        if isinstance(module, kind):
            return reader(module, name, stream)
    known = ", ".join(kind.__name__ for kind in READERS)
    raise _refused(module, name, f"supported are {known}")


def _refused(module: nn.Module, name: str, why: str) -> InputError:
    where = f"layer {name}" if name else "the module"
    return InputError(f"{where}, a {type(module).__name__}, has no limit here: {why}")


def _linear(module: nn.Linear, name: str, stream: Stream) -> tuple[Map, Stream]:
    return Dense(*stream.spreads(module)), Stream(stream.spreads, fresh=True)


def _convolution(module: Any, name: str, stream: Stream) -> tuple[Map, Stream]:
    same = tuple(size // 2 for size in module.kernel_size)
    padding = same if module.padding == "same" else module.padding
    odd = all(size % 2 for size in module.kernel_size)
    plain = {*module.dilation, module.groups} == {1} and len({*module.stride}) == 1
    if not (plain and odd and padding == same and module.padding_mode in ("zeros", "circular")):
        why = "a convolution has an odd kernel, padding of half of it (zeros or circular), and no groups"
        raise _refused(module, name, why)
    size, mode, stride = tuple(module.kernel_size), module.padding_mode, module.stride[0]
    return Convolution(size, *stream.spreads(module), mode, stride), Stream(stream.spreads, fresh=True)


def _activation(module: nn.Module, name: str, stream: Stream) -> tuple[Map, Stream]:
    if isinstance(module, nn.Identity):
        return Serial(), stream
    if not stream.gaussian:
        raise _refused(module, name, "an activation must read what linear maps gave, not another activation")
    return Activation(dual(module)), replace(stream, gaussian=False)


def _norm(module: nn.Module, name: str, stream: Stream) -> tuple[Map, Stream]:
    if isinstance(module, nn.LayerNorm) and not stream.gaussian:
        raise _refused(module, name, "LayerNorm must read a centred stream, not an activation's; use RMSNorm")
    bias, weight = getattr(module, "bias", None), getattr(module, "weight", None)
    if bias is not None and bool((bias != 0).any()):
        raise _refused(module, name, "theory reads networks at their start, and this norm's bias has moved")
    scale = 1.0 if weight is None else weight.detach().double().square().mean().sqrt().item()
    kind = BatchNorm() if isinstance(module, nn.modules.batchnorm._BatchNorm) else Norm()
    return (kind if scale == 1 else Serial(kind, Scale(scale))), stream


def _serial(module: nn.Sequential, name: str, stream: Stream) -> tuple[Map, Stream]:
    maps = []
    for key, part in module.named_children():
        each, stream = _read(part, f"{name}.{key}" if name else key, stream)
        maps.append(each)
    return (maps[0] if len(maps) == 1 else Serial(*maps)), stream


def _number(gain: Gain) -> float:
    return gain.detach().item() if isinstance(gain, Tensor) else gain


def _residual(module: ResidualModule, name: str, stream: Stream) -> tuple[Map, Stream]:
    branch, after = _read(module.branch, f"{name}.branch" if name else "branch", replace(stream, fresh=False))
    gain, skip = _number(module.gain), _number(module.skip)
    if skip == 0:
        return Serial(branch, Scale(gain)), replace(after, fresh=stream.fresh or after.fresh)
    if not after.fresh or not after.gaussian:
        raise _refused(module, name, "a branch beside a skip must end in a linear map of its own")
    return Residual(branch, gain, skip), stream


def _sum(module: SumModule, name: str, stream: Stream) -> tuple[Map, Stream]:
    start = replace(stream, fresh=False)
    read = [_read(part, f"{name}.branches.{key}", start) for key, part in enumerate(module.branches)]
    if sum(not after.fresh for _, after in read) > 1:
        raise _refused(module, name, "all branches of a sum but one must end in a linear map of their own")
    gaussian = all(after.gaussian for _, after in read)
    fresh = stream.fresh or all(after.fresh for _, after in read)
    return Sum(*(each for each, _ in read)), replace(stream, gaussian=gaussian, fresh=fresh)


def _mlp(module: MLP, name: str, stream: Stream) -> tuple[Map, Stream]:
    up, _ = _read(module.up, f"{name}.up", stream)
    down, after = _read(module.down, f"{name}.down", stream)
    if module.gated:
        return Serial(up, Gated(dual(module.activation)), down), after
    between, _ = _activation(module.activation, f"{name}.activation", replace(stream, gaussian=True))
    return Serial(up, between, down), after


def _attention(module: Attention, name: str, stream: Stream) -> tuple[Map, Stream]:
    value, stream = _read(module.value, f"{name}.value", stream)
    heads = module.sizes[0] // module.head_width
    maps = [value, Attended(module.mixing, heads, module.head_width)]
    if module.gate is not None:
        bias = module.gate.get_parameter("bias").detach().double()
        maps.append(Scale(bias.sigmoid().square().mean().sqrt().item()))
    projection, stream = _read(module.projection, f"{name}.projection", stream)
    return Serial(*maps, projection), stream


def _reparametrised(module: Reparametrised, name: str, stream: Stream) -> tuple[Map, Stream]:
    alpha, beta = _number(module.alpha), _number(module.beta)
    moved = beta * stream.spreads(module.delta)[0]
    if module.base is None:
        start = Scale(alpha)
        return (Sum(start, Dense(moved)) if moved else start), stream
    base = (module.base.shape[1] * module.base.detach().double().square().mean()).item()
    return Dense((alpha**2 * base + moved**2) ** 0.5), Stream(stream.spreads, fresh=True)


def _global_pool(module: Any, name: str, stream: Stream) -> tuple[Map, Stream]:
    size = module.output_size
    if {*((size,) if isinstance(size, int) else size)} != {1}:
        raise _refused(module, name, "adaptive pooling must end in one position")
    return GlobalPool(), stream


def _average_pool(module: Any, name: str, stream: Stream) -> tuple[Map, Stream]:
    axes = 1 if isinstance(module, nn.AvgPool1d) else 2
    size, stride, padding = (
        (each,) * axes if isinstance(each, int) else tuple(each)
        for each in (module.kernel_size, module.stride, module.padding)
    )
    if stride != size or any(padding):
        raise _refused(module, name, "windows must stand side by side: stride equal to size, no padding")
    return AveragePool(size), stream


def _flatten(module: nn.Flatten, name: str, stream: Stream) -> tuple[Map, Stream]:
    return Flatten(), stream


def _nothing(module: nn.Module, name: str, stream: Stream) -> tuple[Map, Stream]:
    return Serial(), stream


Reader = Callable[[Any, str, Stream], tuple[Map, Stream]]

READERS: dict[type[nn.Module], Reader] = {
    nn.Identity: _nothing,
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.LayerNorm: _norm,
    nn.RMSNorm: _norm,
    SingleScaleRMSNorm: _norm,
    nn.BatchNorm1d: _norm,
    nn.BatchNorm2d: _norm,
    nn.Sequential: _serial,
    ResidualModule: _residual,
    SumModule: _sum,
    MLP: _mlp,
    Reparametrised: _reparametrised,
    Attention: _attention,
    nn.AdaptiveAvgPool1d: _global_pool,
    nn.AdaptiveAvgPool2d: _global_pool,
    nn.AvgPool1d: _average_pool,
    nn.AvgPool2d: _average_pool,
    nn.Flatten: _flatten,
    nn.Dropout: _nothing,
}
"""How each kind of layer is read; add a kind of your own with a function of (module, name, stream)."""

READERS |= {type(make()): _activation for make in ACTIVATIONS.values()} | {
    kind: _activation for kind in (nn.LeakyReLU, nn.Softplus, Tailored, TailoredLeakyReLU)
}
READERS[nn.Identity] = _nothing
