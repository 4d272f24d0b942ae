"""Normalisations by name; each is a factory `width -> module`, so that a block takes one as a part."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.transforms import under_transform

Norm = Callable[[int], nn.Module]


class _Scale(torch.autograd.Function):
    """Map x, w, ε to y = w x r and r = 1/√(mean x² + ε), computed in float32 where x has less.

        ∂x = r (w ∂y − x r² (⟨w x, ∂y⟩ + ∂r) / n),   ∂w = Σ_rows r x ∂y

    r is an output, not a hidden intermediate, so that higher derivatives go through it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r = (norm.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, r)
        return (x.to(wide) * r).mul_(weight.to(wide)).to(x.dtype), r

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight, r), (dy, dr) = ctx.saved_tensors, grads
        wide, w, dy = x.to(r.dtype), weight.to(r.dtype), dy.to(r.dtype)
        products = (wide * dy).reshape(-1, x.shape[-1])
        dw = products.mT.mv(r.reshape(-1))
        inner = products.mv(w).reshape(r.shape) + dr
        del products  # its memory is for the next product
        dx = torch.addcmul(wide * (inner * r.square() / -x.shape[-1]), dy, w).mul_(r)
        return dx.to(x.dtype), dw.to(weight.dtype), None


def _plain(x: Tensor) -> bool:
    """Whether an input needs torch's own operations."""
    return x.device.type != "cpu" or not x.is_floating_point() or under_transform()


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square: `torch.nn.RMSNorm` with a backward that is fast on a CPU.

        y = w x / √(mean x² + ε)

    Shapes: (…, width) -> (…, width).
    Holds: exactly; torch's own operation runs on a GPU, under `torch.compile` and under `torch.func`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scale every row; the result has the type of x."""
        unusual = self.weight is None or self.eps is None or x.shape[-1:] != self.normalized_shape
        if unusual or _plain(x):
            return super().forward(x)
        return _Scale.apply(x, self.weight, self.eps)[0]


class SingleScaleRMSNorm(nn.Module):
    """Division by the root mean square with one learned scale for all features.

        y = w x / √(mean x² + ε),   w a number, 1 at the start

    Shapes: (…, width) -> (…, width).
    Holds: exactly; no feature can grow above the others by its scale.
    Source: Park et al. 2025, arXiv 2506.19697 (there as γ x / ‖x‖, γ = w √width).
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Scale every row; the result has the type of x."""
        if x.shape[-1:] != (self.width,) or _plain(x):
            return nn.functional.rms_norm(x, (self.width,), eps=self.eps) * self.weight.to(x.dtype)
        return _Scale.apply(x, self.weight.expand(self.width), self.eps)[0]


class DynamicTanh(nn.Module):
    """A bounded elementwise map in the place of a norm.

        y = γ tanh(αx) + β,   α = ½, γ = 1, β = 0 at the start

    α is one number; γ and β are one a feature.

    Shapes: (…, width) -> (…, width).
    Holds: exactly; y ≈ γαx + β for small x.
    Source: Zhu et al. 2025, arXiv 2503.10622.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Squash every entry; the result has the type of x."""
        squashed = torch.tanh(self.alpha.to(x.dtype) * x)
        return torch.addcmul(self.bias.to(x.dtype), self.weight.to(x.dtype), squashed)


class Derf(nn.Module):
    """A bounded elementwise map in the place of a norm, by the error function.

        y = γ erf(αx + s) + β,   α = ½, s = 0, γ = 1, β = 0 at the start

    α and s are one number each; γ and β are one a feature.

    Shapes: (…, width) -> (…, width).
    Holds: exactly; y ≈ 2γαx/√π + β for small x at s = 0.
    Source: Chen et al. 2025, arXiv 2512.10938.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha, self.shift = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.0))
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Squash every entry; the result has the type of x."""
        squashed = torch.erf(torch.addcmul(self.shift.to(x.dtype), self.alpha.to(x.dtype), x))
        return torch.addcmul(self.bias.to(x.dtype), self.weight.to(x.dtype), squashed)


def identity(width: int) -> nn.Module:
    """No normalisation: N(x) = x for every width.

    Shapes: (…, width) -> (…, width).
    Holds: exactly.
    """
    return nn.Identity()


NORMS: dict[str, Norm] = {
    "layernorm": partial(nn.LayerNorm, eps=1e-5),
    "rmsnorm": partial(RMSNorm, eps=1e-6),
    "none": identity,
    "rmsnorm_no_weight": partial(RMSNorm, eps=1e-6, elementwise_affine=False),
    "single_scale_rmsnorm": partial(SingleScaleRMSNorm, eps=1e-6),
    "dynamic_tanh": DynamicTanh,
    "derf": Derf,
}
"""layernorm: w (x − mean)/√(var + ε) + b, ε = 1e-5; rmsnorm: w x/√(mean x² + ε), ε = 1e-6 inside the root,
w one number a feature, one in all (single_scale_rmsnorm) or none (rmsnorm_no_weight); dynamic_tanh, derf:
γ tanh(αx) + β and γ erf(αx + s) + β."""


def norm(name: str) -> Norm:
    """Return the normalisation registered under `name`.

    Raises: InputError when the name is unknown.
    """
    if name not in NORMS:
        raise InputError(f"unknown norm {name!r}; choose one of {', '.join(NORMS)}")
    return NORMS[name]
