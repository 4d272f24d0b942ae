"""What a token may see: padding, packed documents, and the tokens before it that a cache keeps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gramian.errors import InputError


@dataclass(frozen=True, eq=False)
class Rows:
    """Tokens laid out as one sequence a row, each beginning with its real tokens.

    In this layout a causal mask hides all padding from the real tokens, so that attention stays fused and
    means over the past are plain running means.
    """

    index: Int[Tensor, "rows length"]
    """Place of each entry among the batch · tokens places of the batch."""
    real: Bool[Tensor, "rows length"]
    """Which entries are real tokens; in every row they come first."""

    def take(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "rows length width"]:
        """Return the rows of features."""
        return x.flatten(0, 1).index_select(0, self.index.flatten()).unflatten(0, self.index.shape)


class Past:
    """Keys and values of the tokens so far, of one layer, with the running sum of the values.

        S_t = S_{t−1} + w_t v_t,   w_t = 1 at a real token

    Storage doubles when it is full, so that n tokens cost O(n). No gradient goes through it: it is for
    decoding.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._real: Tensor | None = None
        self.total: Tensor | None = None
        """Σ over real tokens of the values (batch, value heads, 1, value width), in float32 at least."""
        self.length = 0

    @property
    def sequences(self) -> int:
        """Number of sequences remembered."""
        return 0 if self._keys is None else len(self._keys)

    @property
    def padded(self) -> bool:
        """Whether padding is among the tokens so far."""
        return self._real is not None

    def append(
        self,
        keys: Float[Tensor, "batch key_heads tokens head_width"],
        values: Float[Tensor, "batch value_heads tokens value_width"],
        real: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add tokens and return the keys and values of all tokens so far.

        Raises: InputError when the batch is not that of the tokens before.
        """
        if self._keys is not None and len(self._keys) != len(keys):
            raise InputError(f"the cache holds {len(self._keys)} sequences, and {len(keys)} came")
        length = self.length + keys.shape[2]
        if real is None and self._real is not None:
            real = keys.new_ones(len(keys), keys.shape[2], dtype=torch.bool)
        if real is not None and self._real is None and self.length:
            self._real = keys.new_ones(len(keys), self.length, dtype=torch.bool)
        self._keys = _extended(self._keys, keys.detach(), self.length)
        self._values = _extended(self._values, values.detach(), self.length)
        if real is not None:
            self._real = real if self._real is None else torch.cat((self._real, real), 1)
        added = _total(values.detach(), real)
        self.total = added if self.total is None else self.total + added
        self.length = length
        return self._keys[:, :, :length], self._values[:, :, :length]

    def reorder(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these sequences in this order, some perhaps more than once (beams)."""
        if self._keys is None or self._values is None or self.total is None:
            return
        rows = rows.to(self._keys.device)
        self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)
        self.total = self.total.index_select(0, rows)
        self._real = None if self._real is None else self._real.index_select(0, rows)

    def crop(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        if self._values is None or length >= self.length:
            return
        self.length = length
        self._real = None if self._real is None else self._real[:, :length]
        self.total = _total(self._values[:, :, :length], self._real)


def _extended(stored: Tensor | None, new: Tensor, length: int) -> Tensor:
    """Return storage that holds the first `length` tokens of `stored` and then the new ones."""
    needed = length + new.shape[2]
    if stored is None or needed > stored.shape[2]:
        room = new.new_empty(*new.shape[:2], 1 << (needed - 1).bit_length(), new.shape[3])
        if stored is not None:
            room[:, :, :length] = stored[:, :, :length]
        stored = room
    stored[:, :, length:needed] = new
    return stored


def _total(values: Tensor, real: Tensor | None) -> Tensor:
    """Return the sum over real tokens, in float32 at least."""
    wide = torch.promote_types(values.dtype, torch.float32)
    if real is not None:
        values = values * real[:, None, :, None]
    return values.sum(2, keepdim=True, dtype=wide)


@dataclass(frozen=True, eq=False)
class View:
    """What the tokens of a batch may see in one layer, beside what causality forbids.

    Made by `padded` or `packed`, for all layers alike; `after` adds what one layer remembers.
    """

    real: Bool[Tensor, "batch keys"] | None = None
    """Which tokens are real, those of the past included; all when not given."""
    rows: tuple[Rows, ...] = ()
    """The sequences to attend in, where they are not the batch itself."""
    back: Int[Tensor, "batch tokens"] | None = None
    """Place of each token among all entries of `rows`."""
    past: Past | None = None
    """What this layer remembers."""

    @classmethod
    def padded(cls, mask: Tensor, tokens: int, causal: bool) -> "View":
        """Return the view of padded sequences, the padding on either side or between.

        `mask` is true (or 1) at real tokens; it is longer than the tokens where a cache holds those before.

        Shapes: mask (batch, keys), keys ≥ tokens.
        Raises: InputError for a mask of another shape or of floating-point numbers.
        """
        if mask.ndim != 2 or mask.shape[1] < tokens or mask.is_floating_point():
            raise InputError(
                f"an attention mask must be (batch, tokens), true or 1 at real tokens, got {mask.dtype} of "
                f"shape {tuple(mask.shape)} for {tokens} tokens"
            )
        real = mask.bool()
        if not torch.compiler.is_compiling() and bool(real.all()):
            return cls()  # a compiled graph cannot ask
        if not causal or mask.shape[1] != tokens:
            return cls(real)
        order = torch.argsort(~real, dim=1, stable=True)  # real tokens first, in their order
        offset = torch.arange(len(mask), device=mask.device)[:, None] * tokens
        rows = Rows(order + offset, real.gather(1, order))
        return cls(real, (rows,), torch.argsort(order, dim=1) + offset)

    @classmethod
    def packed(cls, documents: Tensor) -> "View":
        """Return the view of rows that hold several documents, which do not see each other.

        `documents` numbers them: tokens of one number in one row are a document; negative ones are padding.
        Documents are laid out as rows of their own, grouped by length within factors of two, so that at most
        half of what is computed is padding and no token-by-token matrix is formed.

        Shapes: documents (batch, tokens), whole numbers.
        Raises: InputError for another shape or type.
        """
        if documents.ndim != 2 or documents.is_floating_point() or documents.dtype == torch.bool:
            raise InputError(
                "documents must be whole numbers (batch, tokens), got "
                f"{documents.dtype} {tuple(documents.shape)}"
            )
        batch, tokens = documents.shape
        numbers = documents.flatten().cpu()
        real = numbers >= 0
        place = torch.nonzero(real).flatten()
        line = place // tokens
        _, number = numbers[place].unique(return_inverse=True)
        _, member, length = (line * tokens * batch + number).unique(return_inverse=True, return_counts=True)
        place = place[torch.argsort(member, stable=True)]  # document by document, each in its order
        start = length.cumsum(0) - length
        back, rows, entries = torch.zeros(batch * tokens, dtype=torch.long), [], 0
        magnitude = torch.tensor([(n - 1).bit_length() for n in length.tolist()], dtype=torch.long)
        for each in magnitude.unique():
            chosen = magnitude == each
            column = torch.arange(int(length[chosen].max()))
            inside = column < length[chosen][:, None]
            index = place[(start[chosen][:, None] + column).clamp(max=len(place) - 1)]
            back[index[inside]] = entries + torch.nonzero(inside.flatten()).flatten()
            entries += index.numel()
            rows.append(Rows(index.to(documents.device), inside.to(documents.device)))
        back = back.view(batch, tokens).to(documents.device)
        return cls(real.view(batch, tokens).to(documents.device), tuple(rows), back)

    def after(self, past: Past | None) -> "View":
        """Return this view with what one layer remembers."""
        return View(self.real, self.rows, self.back, past)

    def restored(self, mixed: Sequence[Tensor]) -> Float[Tensor, "batch tokens width"]:
        """Return the features of `rows`, (rows, length, width) each, as a batch again."""
        assert self.back is not None
        entries = torch.cat([part.flatten(0, 1) for part in mixed])
        return entries.index_select(0, self.back.flatten()).unflatten(0, self.back.shape)


def positions(
    view: View | None, before: int, tokens: int, documents: Tensor | None, device: torch.device
) -> Tensor:
    """Return the position of every token: counted over real tokens, from 0 in every document.

    `before` tokens lie in a cache.

    Shapes: -> (tokens) without padding or documents, (batch, tokens) otherwise.
    Holds: exactly; padding takes position 0, or without documents that of the real token before it.
    """
    if documents is not None:
        return _restarted(documents)
    if view is None or view.real is None:
        return torch.arange(before, before + tokens, device=device)
    return (view.real.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]


def _restarted(documents: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Return how many tokens of the same document stand before each token of its row."""
    order = torch.argsort(documents, dim=1, stable=True)
    ordered = documents.gather(1, order)
    column = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    start = torch.where(first, column, 0).cummax(1).values
    return torch.zeros_like(documents).scatter(1, order, column - start) * (documents >= 0)
