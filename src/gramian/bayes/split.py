"""The split of a data set that keeps a prior from the examples of its certificate."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from gramian.errors import InputError

Seen = Sequence[int] | Tensor | str
"""Indices of the examples that something was made from, or their fingerprint."""


@dataclass(frozen=True, eq=False)
class Split:
    """Which examples of a data set may make the prior and which alone make the certificate."""

    prior: Int[Tensor, " prior"]
    """Indices of the prior set; none for a prior that no data made."""
    bound: Int[Tensor, " bound"]
    """Indices of the bound set."""
    seed: int | None = None
    """Seed of the random split; None if the split was given."""

    def __post_init__(self) -> None:
        everything = torch.cat((self.prior, self.bound))
        if len(self.bound) < 8:
            raise InputError(f"a certificate needs a bound set of 8 examples or more, not {len(self.bound)}")
        if len(everything.unique()) < len(everything) or bool((everything < 0).any()):
            raise InputError("prior and bound set have to be disjoint sets of indices, each named once")

    @property
    def n(self) -> int:
        """Examples of the bound set."""
        return len(self.bound)

    def check(self, seen: Seen) -> None:
        """Refuse anything that was made from examples of the bound set.

        Raises: InputError for an index of the bound set, and a fingerprint that is neither that of the prior
            set nor that of no example.
        """
        if isinstance(seen, str):
            if seen not in (fingerprint(self.prior), fingerprint([])):
                raise InputError(
                    f"the examples seen before have fingerprint {seen}, not that of the prior set, "
                    f"{fingerprint(self.prior)}, so the bound set may be among them; give their indices"
                )
            return
        shared = self.bound.cpu()[torch.isin(self.bound.cpu(), _indices(seen))]
        if len(shared):
            raise InputError(
                f"{len(shared)} of the {self.n} examples of the bound set were seen before, such as "
                f"number {int(shared[0])}; make the prior or fixed predictor from others, or split anew"
            )


def random_split(count: int, prior_fraction: float, seed: int) -> Split:
    """Split a data set at random, before anything is looked at, into prior and bound set.

    Shapes: round(count · prior_fraction) indices of the prior set, in increasing order, and the others.
    Raises: InputError for a fraction outside [0, 1), and fewer than 8 examples that are left to the bound.
    Holds: exactly; the same split for the same seed.
    """
    if not 0 <= prior_fraction < 1:
        raise InputError(
            f"the prior's fraction of the examples has to be from 0 to below 1, not {prior_fraction}"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    prior, bound = order.tensor_split((round(count * prior_fraction),))
    return Split(prior.sort().values, bound.sort().values, seed)


def fingerprint(seen: Sequence[int] | Tensor) -> str:
    """Return 16 hexadecimal digits that tell sets of indices apart, whatever their order."""
    return hashlib.sha256(_indices(seen).unique().numpy().astype("<i8").tobytes()).hexdigest()[:16]


def _indices(seen: Sequence[int] | Tensor) -> Tensor:
    indices = torch.as_tensor(seen).cpu()
    if indices.ndim != 1 or (len(indices) and (indices.is_floating_point() or indices.dtype == torch.bool)):
        raise InputError("examples have to be named by whole numbers, their indices in the data set")
    return indices.long()
