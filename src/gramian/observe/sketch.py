"""Seeded linear sketches of long vectors, which keep inner products, and error bars for what is read off."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from gramian.core.gram import Gram
from gramian.core.trajectory import steps_of, sum_of
from gramian.errors import InputError

WORD = 64
"""A sketch has a multiple of so many numbers, since so many signs are drawn at a time."""

CHUNK, CHUNK_CUDA = 2**16, 2**22
"""Parameters taken at a time: what fits a core's cache, and what keeps a GPU busy (32 MiB in float64)."""


@dataclass(frozen=True)
class CountSketch:
    """A random linear map that keeps inner products on average, the same wherever the seed is the same.

    S(x) = Σ_b roll(s_b ⊙ x_b, r_b)

    The vector is cut into blocks x_b of `size` numbers; every number has a sign of its own in s_b, and every
    block is shifted round by its own r_b, uniform on 0 … size−1. Signs and shifts are a hash of seed, name
    and place, computed in integers: alike on every device, and nothing is stored.

        E⟨Sa, Sb⟩ = ⟨a, b⟩,    sd² = (1/m) Σ (a_i b_j + a_j b_i)² ≤ (‖a‖²‖b‖² + ⟨a, b⟩²)/m,    m = size,

    the sum over all pairs i < j of different blocks: such a pair falls into one bucket with chance 1/m, a
    pair of one block never, and different pairs are uncorrelated because their signs are independent. Hence a
    vector of no more than `size` numbers is kept exactly, up to order and signs. The variance is that of an
    unstructured count sketch for every vector, also for constant, one-hot, periodic and low-rank ones; with
    one sign pattern for all blocks it would be up to twice that, in errors that are rare and large.

    Cost: one pass, 4 to 8 ns a number on one CPU core.

    Raises: InputError unless size is a positive multiple of `WORD`.
    Holds: exactly.
    Source: Charikar, Chen, Farach-Colton 2002 (count sketch); the blocks are ours.
    """

    size: int
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        if self.size < 1 or self.size % WORD:
            raise InputError(f"a sketch has a positive multiple of {WORD} numbers, not {self.size}")

    def of(self, tensors: Iterable[Shaped[Tensor, "..."]]) -> Float64[Tensor, " m"]:
        """Sketch the vector of all tensors' numbers, one tensor after the other, each in row-major order.

        Sums are taken in float64, so that S(a) − S(b) is S(a − b) up to rounding of a and b.

        Shapes: any -> (m), on the device of the first tensor (on the CPU where that has no float64).
        Holds: exactly.
        """
        total, start = None, 0
        for tensor in tensors:
            flat = tensor.detach().reshape(-1)
            flat = flat.cpu() if flat.device.type == "mps" else flat
            for piece in flat.split(CHUNK_CUDA if flat.is_cuda else CHUNK):
                part = self._of_piece(piece, start)
                total = part if total is None else total + part.to(total.device)
                start += piece.numel()
        return torch.zeros(self.size, dtype=torch.float64) if total is None else total

    def _of_piece(self, piece: Tensor, start: int) -> Tensor:
        """Sketch the numbers of the whole vector from `start` on."""
        size, device = self.size, piece.device
        first, ahead = divmod(start, size)
        count = -(-(ahead + piece.numel()) // size)
        blocks = torch.zeros(count * size, dtype=torch.float64, device=device)
        blocks[ahead : ahead + piece.numel()] = piece
        signs, shifts = self._drawn(first, count, device)
        blocks = blocks.mul_(signs).view(count, size)
        windows = torch.cat([blocks, blocks], 1).unfold(1, size, 1)
        return windows[torch.arange(count, device=device), size - shifts].sum(0)

    def _drawn(self, first: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Signs of the numbers in some blocks, and the blocks' shifts, whose places count from −1 down."""
        blocks = torch.arange(first, first + count, device=device)
        words = torch.arange(first * self.size // WORD, (first + count) * self.size // WORD, device=device)
        drawn = _mixed(self._key, torch.cat([words, ~blocks]))
        signs, shifts = drawn[: len(words)].view(torch.uint8), drawn[len(words) :] & 2**62 - 1
        return _sign_table(device).index_select(0, signs.int()).view(-1), shifts % self.size

    @cached_property
    def _key(self) -> int:
        digest = hashlib.blake2b(f"{self.seed}/{self.name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


@lru_cache
def _sign_table(device: torch.device) -> Tensor:
    """Eight signs for each byte."""
    bits = torch.arange(256)[:, None] >> torch.arange(8)
    return (1.0 - 2.0 * (bits & 1)).double().to(device)


def _mixed(key: int, places: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """Return 64 random bits for each place: the finaliser of SplitMix64, modulo 2⁶⁴ as int64 wraps."""
    x = places * -0x61C8864680B583EB + key
    x = (x ^ (x >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 2**33 - 1)


def inner_product_error(
    left: Float[Tensor, "*batch"], right: Float[Tensor, "*batch"], inner: Float[Tensor, "*batch"], size: int
) -> Float[Tensor, "*batch"]:
    """Bound the standard deviation of an inner product of two sketches, by squared norms and inner product.

    sd ≤ √((‖a‖²‖b‖² + ⟨a, b⟩²)/m)

    Nearly reached by long vectors. A cosine is taken of norms from the same sketch, whose errors partly
    cancel: its sd is (1 − cos²)/√m.

    Shapes: left, right, inner (*batch) -> (*batch).
    Holds: exactly; for the cosine with error O(1/m).
    """
    return ((left * right + inner.square()) / size).sqrt()


def jackknife(
    groups: Sequence[Float[Tensor, "n _"]],
    reading: Callable[[Gram], Tensor],
    parts: int = 20,
    kept: Sequence[Float[Tensor, "n _"]] = (),
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Estimate a reading of a path from its sketches, and the standard error of the estimate.

    f = reading(Σ_j G_j),    f_j = reading(J/(J−1) Σ_{i≠j} G_i),    se² = (J−1)/J Σ_j (f_j − mean_i f_i)²

    The buckets of every sketch are dealt into J = `parts` parts, and G_j is the Gram of the path's steps in
    part j. An interval of 95 % is f ± 2.09 se (Student's t with J−1 = 19 degrees of freedom).

    The estimate is not corrected for bias, which for sketches of 512 numbers is below 0.15 standard errors
    (measured on paths of 60 thousand parameters); the jackknife's own correction changes it by 0.02 of them.
    The error bar is too wide for vectors of which a few blocks hold most, and for those hardly longer than
    the sketch, since numbers of one block never collide. Where a reading is at the end of its range (angle 0,
    ratio 1), it says no more than the order of the error. The spectrum of n points shows the sketch itself
    once n is no longer far below m.

    Args:
        groups: sketches of the path's points, one tensor (n, m_g) for each group of parameters.
        reading: a function of the Gram `steps` of a path (`core.trajectory`).
        parts: how many parts; at least 2, at most the buckets of the smallest sketch.
        kept: tensors (n, p_g) of groups that are kept exactly and have no error.

    Shapes: groups (n, m_g) -> estimate and standard error, each of the shape of the reading.
    Raises: InputError without a group, or for a number of parts that cannot be.
    Holds: empirically: intervals of 95 % cover 90 to 100 %.
    Source: Tukey 1958 (jackknife), deleting groups of observations.
    """
    exact = [steps_of(points) for points in kept]
    if not groups:
        estimate = reading(sum_of(exact))
        return estimate, torch.zeros_like(estimate)
    fewest = min(points.shape[1] for points in groups)
    if not 2 <= parts <= fewest:
        raise InputError(
            f"a jackknife of sketches of {fewest} numbers takes 2 to {fewest} parts, not {parts}"
        )
    grams = [sum_of([steps_of(points[:, part::parts]) for points in groups]) for part in range(parts)]
    whole = sum_of(grams)
    estimate = reading(sum_of([whole, *exact]))
    deleted = [_scaled(_minus(whole, part), parts / (parts - 1)) for part in grams]
    values = torch.stack([reading(sum_of([rest, *exact])) for rest in deleted])
    spread = (values - values.mean(0)).square().sum(0)
    return estimate, (spread * (parts - 1) / parts).sqrt()


def _minus(whole: Gram, part: Gram) -> Gram:
    return Gram(whole.cross - part.cross, whole.left - part.left, whole.right - part.right)


def _scaled(gram: Gram, factor: float) -> Gram:
    return Gram(gram.cross * factor, gram.left * factor, gram.right * factor)
