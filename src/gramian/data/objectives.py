"""What a language model is to predict in windows of text: the next token, or tokens that were hidden."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from gramian.errors import InputError

IGNORED = -100
"""The target of a position that is not to be predicted."""

Windows = Int[Tensor, "batch length"]
Batch = Int[Tensor, "batch planes tokens"]
"""Inputs and targets, and the numbers of packed documents where they are kept apart."""


@dataclass(frozen=True)
class NextToken:
    """Predict each next token: the target at t is the token at t + 1.

    Shapes: windows (batch, T + 1) -> (batch, 2, T), or (batch, 3, T) with documents kept apart.
    Holds: exactly.
    """

    separate_documents: bool = False

    def __call__(self, windows: Windows, step: int) -> Batch:
        """Return the batch of a step; the step does not matter."""
        return _planes(windows[:, :-1], windows[:, 1:], self.separate_documents)


@dataclass(frozen=True)
class HiddenTokens:
    """Predict tokens that were hidden, the same number in every sequence.

    round(p T) tokens a sequence are chosen, at least one. Of these 80 % become the mask token, 10 % a random
    one and 10 % stay, each drawn on its own; all others have the target IGNORED.

    Shapes: windows (batch, T + 1) -> (batch, 2, T), or (batch, 3, T) with documents kept apart.
    Raises: InputError unless 0 < probability < 1.
    Holds: exactly; equal seeds and steps hide the same.
    Source: Devlin et al. 2018, arXiv 1810.04805, section 3.1.
    """

    mask: int
    """The mask token, one beyond the vocabulary of the text."""
    probability: float
    seed: int
    separate_documents: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise InputError(f"mask_probability must lie between 0 and 1, got {self.probability:g}")

    def __call__(self, windows: Windows, step: int) -> Batch:
        """Return the batch of a step."""
        tokens = windows[:, :-1]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 2 + 1)
        count = max(1, round(self.probability * tokens.shape[1]))
        order = torch.rand(tokens.shape, generator=generator).argsort(1)
        chosen = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, order[:, :count], True)
        how = torch.rand(tokens.shape, generator=generator)
        random = torch.randint(self.mask, tokens.shape, generator=generator)
        hidden = torch.where(how < 0.8, self.mask, torch.where(how < 0.9, random, tokens))
        inputs, targets = torch.where(chosen, hidden, tokens), torch.where(chosen, tokens, IGNORED)
        return _planes(inputs, targets, self.separate_documents, tokens)


Objective = NextToken | HiddenTokens


def _planes(inputs: Tensor, targets: Tensor, separate: bool, tokens: Tensor | None = None) -> Batch:
    """Stack inputs and targets, and if asked the documents, which the token 0 closes."""
    planes = [inputs, targets]
    if separate:
        closing = (inputs if tokens is None else tokens) == 0
        planes.append(closing.cumsum(1) - closing.long())
    return torch.stack(planes, 1)
