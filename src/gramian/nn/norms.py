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

        ∂x = r (w ∂y − x r² (⟨x w, ∂y⟩ + ∂r) / n),   ∂w = Σ_rows r x ∂y

    r is an output, not a hidden intermediate, so that higher derivatives go through it. Whatever is written
    in place starts as a product of all factors that may be batched, since `vmap` refuses anything else.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r = (norm.square() / x.shape[-1] + eps).rsqrt()
        return (x.to(wide) * weight.to(wide)).mul_(r).to(x.dtype), r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight, output[1])

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


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square, with a backward that is fast on a CPU too.

        y = w x / √(mean x² + ε)

    Shapes: (…, width) -> (…, width).
    Holds: exactly; equal to `torch.nn.RMSNorm`, whose own kernels run on a GPU and under `torch.compile`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scale each row; the result has the type of x."""
        # forward mode sees plain operations: torch takes an autograd.Function's own nested `jvp` for constant
        plain = x.device.type != "cpu" or torch.compiler.is_compiling() or forward_ad._current_level >= 0
        unusual = self.weight is None or self.eps is None or x.shape[-1:] != self.normalized_shape
        if plain or unusual or not x.is_floating_point():
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
