"""Normalisations by name; each is a factory `width -> module`, so that a block takes one as a part."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gramian.errors import InputError

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


def _transformed() -> bool:
    """Whether `torch.compile`, `torch.func` or forward-mode differentiation is at work.

    They need plain operations: in forward mode over forward mode, torch takes the derivative of what a
    Function's own `jvp` returns for zero (pytorch issue 197867).
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square: `torch.nn.RMSNorm` with a backward that is fast on a CPU.

        y = w x / √(mean x² + ε)

    Shapes: (…, width) -> (…, width).
    Holds: exactly; torch's own operation runs on a GPU, under `torch.compile` and under `torch.func`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scale every row; the result has the type of x."""
        unusual = self.weight is None or self.eps is None or x.shape[-1:] != self.normalized_shape
        if unusual or x.device.type != "cpu" or not x.is_floating_point() or _transformed():
            return super().forward(x)
        return _Scale.apply(x, self.weight, self.eps)[0]


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
}
"""layernorm: w (x − mean)/√(var + ε) + b, ε = 1e-5; rmsnorm: w x/√(mean x² + ε), ε = 1e-6 inside the root."""


def norm(name: str) -> Norm:
    """Return the normalisation registered under `name`.

    Raises: InputError when the name is unknown.
    """
    if name not in NORMS:
        raise InputError(f"unknown norm {name!r}; choose one of {', '.join(NORMS)}")
    return NORMS[name]
