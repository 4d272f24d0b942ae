"""Splits of a data set into examples to learn from, to choose by and to report on, and folds."""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from gramian.errors import InputError


@dataclass(frozen=True, eq=False)
class Split:
    """Numbers of the examples to learn from, to choose by and to report on; no two have one in common."""

    train: Int64[Tensor, " train"]
    validation: Int64[Tensor, " validation"]
    test: Int64[Tensor, " test"]

    def check(self, count: int, name: str) -> None:
        """Raise InputError unless the parts count examples from 0 and have none in common."""
        every = torch.cat((self.train, self.validation, self.test))
        inside = not len(every) or (every.min() >= 0 and every.max() < count)
        if not inside or len(every.unique()) < len(every) or not len(self.train):
            raise InputError(
                f"{name}: the parts of a split must count the {count:,} examples from 0, have none in common "
                f"and leave some to learn from"
            )


def random_split(
    count: int,
    *,
    labels: Int64[Tensor, " count"] | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
) -> Split:
    """Split examples at random, each class in the same shares where labels are given.

    The examples are put in a random order, class after class, and every part takes its share of them in even
    steps. A part has at least one example unless its share is 0.

    Raises: InputError unless the shares are at least 0 and leave some examples to learn from.
    Holds: exactly: the parts are a partition, equal seeds give equal parts, and a part's number of examples
        of a class is within 2 of its share.
    """
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise InputError(
            f"the shares for validation and test must be at least 0 and less than 1 together, "
            f"got {validation:g} and {test:g}"
        )
    order = _mixed(count, labels, seed)
    held_out, order = _take(order, test, seed + 1)
    chosen_by, order = _take(order, validation / (1 - test), seed + 2)
    if not len(order):
        raise InputError(f"{count} examples cannot be split; at least one for each part is needed")
    return Split(order.sort().values, chosen_by.sort().values, held_out.sort().values)


def consecutive(sizes: tuple[int, int, int]) -> Split:
    """Return the split into the first examples to learn from, the next to choose by, the last to report on.

    Raises: InputError unless there is at least one for each.
    """
    if len(sizes) != 3 or min(sizes) < 1:
        raise InputError(f"sizes must be three numbers of examples of at least 1, got {tuple(sizes)}")
    return Split(*torch.arange(sum(sizes)).split(list(sizes)))


def folds(
    count: int, *, labels: Int64[Tensor, " count"] | None = None, number: int = 10, seed: int = 0
) -> tuple[Split, ...]:
    """Return the splits of a cross-validation; one fold is to report on, the next to choose by.

    Every example is in the test part of one split and in the validation part of another.

    Raises: InputError unless there are at least 3 folds and as many examples.
    Holds: exactly: the test parts are a partition, and the folds' numbers of examples of a class differ by at
        most 1.
    """
    if not 3 <= number <= count:
        raise InputError(f"{count} examples give 3 to {count} folds, not {number}")
    order = _mixed(count, labels, seed)
    parts = [order[fold::number].sort().values for fold in range(number)]
    splits = []
    for fold in range(number):
        following = (fold + 1) % number
        rest = torch.cat([parts[other] for other in range(number) if other not in (fold, following)])
        splits.append(Split(rest.sort().values, parts[following], parts[fold]))
    return tuple(splits)


def _mixed(count: int, labels: Tensor | None, seed: int) -> Tensor:
    """Return the examples in a random order, class after class."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order if labels is None else order[labels[order].argsort(stable=True)]


def _take(order: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return a share of an order, taken in even steps from a random start, and the rest."""
    count = max(round(share * len(order)), 1) if share and len(order) else 0
    start = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()
    steps = (torch.arange(count, dtype=torch.float64) + start) * (len(order) / max(count, 1))
    taken = torch.zeros(len(order), dtype=torch.bool)
    taken[steps.long().clamp(max=len(order) - 1)] = True
    return order[taken], order[~taken]
