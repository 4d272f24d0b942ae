"""Which examples make the batch of a step."""

import torch
from jaxtyping import Int64
from torch import Tensor


def batch_of(count: int, size: int, seed: int, step: int) -> Int64[Tensor, " size"]:
    """Return which of the examples make the batch of a step, by seed and step alone.

    Every epoch takes as many as fill batches, in an order of its own; more than there are is all of them.

    Shapes: -> (min(size, count)), different numbers from 0 to count − 1.
    Holds: exactly; equal seeds and steps give equal batches, no two of an epoch share an example.
    """
    size = min(size, count)
    epoch, place = divmod(step, count // size)
    stream = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=stream)[place * size : (place + 1) * size]
