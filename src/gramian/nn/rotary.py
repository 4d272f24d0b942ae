"""Positions told to attention by rotating its queries and keys."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gramian.errors import InputError

Heads = Float[Tensor, "batch heads tokens head_width"]


class Rotary(nn.Module):
    """A rotation of each head's features by angles that grow with the position.

        (x_i, x_{i+d/2}) ← R(t ω_i) (x_i, x_{i+d/2}),   ω_i = base^(−2i/d),   R(θ) the plane's rotation by θ

    Products of rotated queries and keys depend on the distance of their positions alone; values know no
    position, and zero queries give zero logits as without.

    Shapes: x (batch, heads, tokens, d), positions (tokens) or (batch, tokens) -> (batch, heads, tokens, d).
    Raises: InputError unless d is even and the base above 1.
    Holds: lengths are kept, exactly.
    Source: Su et al. 2021, arXiv 2104.09864.
    """

    def __init__(self, head_width: int, base: float = 10000.0) -> None:
        super().__init__()
        if head_width < 2 or head_width % 2:
            raise InputError(f"rotary positions need heads of an even width, got {head_width}")
        if not base > 1:
            raise InputError(f"the base of rotary positions must be above 1, got {base:g}")
        self.head_width, self.base = head_width, base

    def forward(self, x: Heads, positions: Int[Tensor, "*batch tokens"]) -> Heads:
        """Rotate; angles are taken in float32 or better, and the result has the type of x."""
        exact = torch.promote_types(x.dtype, torch.float32)
        exponent = torch.arange(0, self.head_width, 2, dtype=exact, device=x.device) / self.head_width
        angle = positions[..., None].to(exact) * self.base**-exponent
        angle = angle if positions.ndim == 1 else angle[:, None]
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        one, other = x.chunk(2, -1)
        return torch.cat((one * cosine - other * sine, one * sine + other * cosine), -1)
