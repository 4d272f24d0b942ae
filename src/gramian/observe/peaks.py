"""Where the largest entry of a stream is: which sequence, token and neuron."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from gramian.core.moments import accumulator


@dataclass(frozen=True)
class Peak:
    """The entry of largest magnitude of a stream, or the first that is not a number."""

    value: float
    """The entry itself, with its sign."""
    sequence: int
    """Its sequence, counted over all batches."""
    position: int
    """Its token, counted with padding; 0 in a stream of rows (batch, d)."""
    neuron: int
    """Its place in the width."""


@dataclass(frozen=True, eq=False)
class Summit:
    """Argument of the largest magnitude so far; `a + b` appends the sequences of b to those of a.

    (b, t, j) = argmax |X_btj| over the tokens that count, the earliest of equal ones; NaN and infinity are
    the largest of all

    Nothing is fetched from the device before `peak`.

    Holds: exactly.
    """

    value: Float[Tensor, ""]
    """The entry, with its sign."""
    magnitude: Float[Tensor, ""]
    """Its magnitude, infinity for NaN, −1 when no token counts."""
    place: Int[Tensor, "3"]
    """Its sequence, position and neuron."""
    sequences: int
    """Number of sequences so far."""

    @classmethod
    def of(cls, x: Shaped[Tensor, "*batch d"], mask: Tensor | None = None, centre: bool = False) -> "Summit":
        """Find the largest magnitude of one batch; with `centre` of each token less its mean over the width.

        Shapes: x (batch, tokens, d) or rows (batch, d), mask (batch, tokens) or (batch).
        """
        x = x.detach()
        x = x[:, None] if x.ndim == 2 else x
        batch, tokens, d = x.shape
        wide = accumulator(x.device)
        if x.numel() == 0:
            nowhere = x.new_zeros(3, dtype=torch.int64)
            return cls(x.new_zeros((), dtype=wide), x.new_full((), -1, dtype=wide), nowhere, batch)
        if centre:
            x = x.to(wide) - x.mean(-1, keepdim=True, dtype=wide)
        magnitude = x.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        if mask is not None:
            kept = mask.to(x.device).bool().reshape(batch, tokens, 1)
            magnitude = torch.where(kept, magnitude, -1)
        at = magnitude.argmax()
        return cls(
            value=x.reshape(-1)[at].to(wide),
            magnitude=magnitude.reshape(-1)[at].to(wide),
            place=torch.stack([at // (tokens * d), at // d % tokens, at % d]),
            sequences=batch,
        )

    def __add__(self, other: "Summit") -> "Summit":
        higher = other.magnitude > self.magnitude
        shift = torch.tensor([self.sequences, 0, 0], device=other.place.device)
        return Summit(
            value=torch.where(higher, other.value, self.value),
            magnitude=torch.where(higher, other.magnitude, self.magnitude),
            place=torch.where(higher, other.place + shift, self.place),
            sequences=self.sequences + other.sequences,
        )

    def peak(self) -> Peak | None:
        """Return the entry and its place; None when no token counted."""
        if self.magnitude < 0:
            return None
        return Peak(self.value.item(), *self.place.tolist())
