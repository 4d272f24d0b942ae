"""Products of a path's start and increments over a run of parameters, and what rounding adds to them."""

import threading
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from gramian.observe.parts import Part

CACHE = 10 * 2**15
"""Numbers that are worked on at once: few enough to stay near a core."""

SAMPLE = 8192
"""Values of a run that are looked at for their rounding, or up to twice as many."""

STRIP = {torch.float32: 12, torch.float64: 32}
"""Rows that are multiplied at once with themselves and all below: half the work, and what is fastest."""

MANTISSA = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
"""Bits behind the leading one of each precision in which checkpoints are kept."""

_EXPONENT = {
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}
"""The bits of a number's exponent: with them alone it is the power of two below its magnitude."""


def add_products(
    grams: Tensor, rows: Tensor | list[Tensor], start: int, parts: Sequence[Part], work: torch.dtype
) -> None:
    """Add to each part's Gram the products of θ_0, θ_1 − θ_0, …, θ_T − θ_{T−1} over a run of parameters.

    G_st += Σ_i x_si x_ti,   x_0 = θ_0,  x_t = θ_t − θ_{t−1}

    Only the upper triangle is meant (`symmetric` mirrors it). The row behind each Gram gathers the
    variance of rounding, of the first checkpoint and of the last.

    Args:
        grams: one Gram a part, changed in place.
        rows: the parameters in every checkpoint, one matrix or several rows of different precision.
        start: the place of the run in the flattened tensor.
        parts: what repeats through the flattened tensor (`parts_of`).
        work: precision of differences and products; sums over `columns(n)` are added up in float64.

    Shapes: grams (parts, n + 1, n) in float64; n rows of equal length.
    """
    n, width = len(rows), len(rows[0])
    at_once = columns(n)
    products = torch.zeros(n, n, dtype=work)
    points, increments = thread_memory("increments", (2, n, at_once), work)
    for low in range(0, width, at_once):
        high = min(low + at_once, width)
        if high - low < at_once:
            points, increments = points[:, : high - low], increments[:, : high - low]
        for place, row in enumerate(rows) if isinstance(rows, list) else ((slice(None), rows),):
            points[place].copy_(row[..., low:high])
        increments[0] = points[0]
        torch.sub(points[1:], points[:-1], out=increments[1:])
        for part, chosen in _divided(start + low, start + high, parts):
            mine = increments if chosen is None else increments[:, chosen]
            for top in range(0, n, STRIP[work]):
                end = min(top + STRIP[work], n)
                torch.mm(mine[top:end], mine[top:].T, out=products[top:end, top:])
            grams[part, :n] += products
    for part, chosen in _divided(start, start + width, parts):
        for place, row in ((0, rows[0]), (-1, rows[-1])):
            grams[part, n, place] += rounding_variance(row if chosen is None else row[chosen])


def columns(n: int) -> int:
    """Return of how many parameters at once the products of n checkpoints are taken."""
    return max(1024, CACHE // n // 1024 * 1024)


_local = threading.local()


def thread_memory(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory of the calling thread that every call under this name uses again; it is not cleared."""
    size = prod(shape) * dtype.itemsize
    memory = getattr(_local, name, None)
    if memory is None or len(memory) < size:
        memory = torch.empty(size, dtype=torch.uint8)
        setattr(_local, name, memory)
    return memory[:size].view(dtype).view(shape)


def symmetric(gram: Tensor) -> Tensor:
    """Return the matrix whose upper triangle is given."""
    return gram.triu() + gram.triu(1).T


def rounding_variance(values: Tensor) -> float:
    """Return the variance that rounding adds to values when they are stored as they are, summed.

    Σ_i ulp(x_i)² / 12,   ulp(x) = 2^(⌊log₂|x|⌋ − mantissa bits)

    Of many values every so-manyth is looked at.

    Holds: for values that were rounded from a wider format, where the rest is uniform; 0 for zeros.
    """
    integers, mask = _EXPONENT[values.dtype]
    looked_at = values[:: max(1, len(values) // SAMPLE)]
    powers = (looked_at.view(integers) & mask).view(values.dtype).double()
    share = len(looked_at) / max(1, len(values))
    return float(powers.square().sum()) * 4.0 ** -MANTISSA[values.dtype] / 12 / share


def _divided(start: int, stop: int, parts: Sequence[Part]) -> Iterator[tuple[int, Tensor | None]]:
    """Yield the parts that a run of a flattened tensor touches, each with its columns; None for all."""
    if len(parts) == 1:
        yield 0, None
        return
    ends = torch.tensor([part.size for part in parts]).cumsum(0)
    places = torch.arange(start, stop) % ends[-1]
    owners = torch.bucketize(places, ends[:-1], right=True)
    touched = owners.unique().tolist()
    for part in touched:
        yield part, None if len(touched) == 1 else (owners == part).nonzero()[:, 0]
