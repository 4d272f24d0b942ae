"""Which token of a sequence is its first: the first real one, wherever the padding stands."""

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor


def first_tokens(mask: Shaped[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """Mark the first real token of each sequence, column 0 only where no padding stands on the left.

    first_bt = [m_bt ≠ 0 and m_bs = 0 for all s < t]

    A sequence of padding alone has none.

    Shapes: mask (batch, tokens), 0 at padding -> (batch, tokens).
    Holds: exactly.
    """
    real = mask != 0
    return real & (real.cumsum(1) == 1)


def split_first(
    mask: Shaped[Tensor, "batch tokens"],
) -> tuple[Shaped[Tensor, "batch tokens"], Shaped[Tensor, "batch tokens"]]:
    """Split a mask into that of the first real tokens and that of all other ones.

    Shapes: mask (batch, tokens) -> two of the same shape and type, whose sum is the mask.
    Holds: exactly.
    """
    first = first_tokens(mask)
    nothing = torch.zeros_like(mask)
    return torch.where(first, mask, nothing), torch.where(first, nothing, mask)
