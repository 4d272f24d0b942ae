"""Examples, and what each may be used for: to make a prior, to bound a risk, to report on."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gramian.bayes.split import Seen, Split, random_split
from gramian.errors import InputError
from gramian.tasks.pruning_data import Examples, standardised


@dataclass(frozen=True, eq=False)
class Evidence:
    """Examples, and what each may be used for."""

    x: Tensor
    """All inputs, in which the indices below count."""
    y: Tensor
    """Their classes."""
    prior: Tensor
    """Examples that may make the prior, and the pruned network."""
    held_out: Tensor
    """Examples that nothing is made from and all errors are reported on."""
    split: Split | None = None
    """Prior and bound set, where something is to be certified."""
    seen: Seen | None = None
    """Examples that the network was trained on, if others than `prior`."""

    def check(self, certify: bool) -> None:
        """Raise InputError for classes or indices that cannot be used, and a cheating split."""
        if self.y.dtype != torch.int64 or self.y.ndim != 1 or len(self.x) != len(self.y):
            raise InputError("every input needs one class, a whole number (int64)")
        if not len(self.held_out):
            raise InputError("held-out examples are needed to say what pruning costs")
        used = self.made_from if self.split is None else torch.cat((self.made_from, self.split.bound))
        everything = torch.cat((used, self.held_out))
        if everything.min() < 0 or everything.max() >= len(self.y):
            raise InputError(f"examples are named by numbers from 0 to {len(self.y) - 1}")
        if torch.isin(self.held_out, used).any():
            raise InputError("the held-out examples must not be among those that are learnt from")
        if not certify:
            return
        if self.split is None:
            raise InputError("a certificate needs a prior and a bound set (bayes.split.random_split)")
        self.split.check(self.prior)
        if self.seen is not None:
            self.split.check(self.seen)

    @property
    def made_from(self) -> Tensor:
        """Everything that the prior comes from."""
        if self.seen is None or isinstance(self.seen, str):
            return self.prior
        return torch.cat((self.prior, torch.as_tensor(self.seen).long())).unique()

    @property
    def judged(self) -> tuple[Tensor, Tensor]:
        """Held-out inputs and their classes."""
        return self.x[self.held_out], self.y[self.held_out]


def split_evidence(examples: Examples, fraction: float, seed: int) -> Evidence:
    """Divide examples into prior, bound and held-out ones, and standardise them by the prior set alone."""
    known = examples.known
    drawn = random_split(len(known), fraction, seed)
    split = replace(drawn, prior=known[drawn.prior], bound=known[drawn.bound])
    x = standardised(examples, split.prior)
    return Evidence(x, examples.y, split.prior, examples.held_out, split)
