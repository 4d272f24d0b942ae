"""Ensembles that classify: regression on classes, and a temperature that makes probabilities of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from gramian.bayes.members import Make, seed_of
from gramian.bayes.trained import ROWS, Ensemble, facts_of
from gramian.errors import InputError

TEMPERATURES = (1e-3, 1e3)
"""Where the temperature is sought."""

Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Classifier:
    """An ensemble that scores classes, with the temperature that makes probabilities of the scores."""

    ensemble: Ensemble
    temperature: float

    def member_probabilities(
        self, x: Shaped[Tensor, " n *size"], rows: int = ROWS
    ) -> Float[Tensor, "members n classes"]:
        """Return the probabilities of every member, softmax(f̃_m(x)/T).

        Shapes: x (n, …) -> (members, n, K).
        Raises: InputError for inputs that are empty or not finite.
        """
        return (self.ensemble.functions(x, rows) / self.temperature).softmax(-1)

    def predict_probabilities(
        self, x: Shaped[Tensor, " n *size"], rows: int = ROWS
    ) -> Float[Tensor, "n classes"]:
        """Return the mean of the members' probabilities.

        Shapes: x (n, …) -> (n, K).
        Raises: InputError for inputs that are empty or not finite.
        """
        return self.member_probabilities(x, rows).mean(0)

    def predict(self, x: Shaped[Tensor, " n *size"], rows: int = ROWS) -> Int[Tensor, " n"]:
        """Return the most probable class of every row.

        Shapes: x (n, …) -> (n).
        Raises: InputError for inputs that are empty or not finite.
        """
        return self.predict_probabilities(x, rows).argmax(-1)

    def save(self, path: Path | str) -> None:
        """Write everything but the network's code to one safetensors file."""
        self.ensemble.save(path, temperature=self.temperature)

    @classmethod
    def load(cls, path: Path | str, make: Make, device: torch.device | str = "cpu") -> "Classifier":
        """Read a classifier; `make` builds the network whose parameters the file holds.

        Raises: InputError as `Ensemble.load`, and for an ensemble that is no classifier.
        """
        facts = facts_of(path)
        if "temperature" not in facts:
            raise InputError(f"{path} holds an ensemble without a temperature, which is no classifier")
        return cls(Ensemble.load(path, make, device), facts["temperature"])


def calibrated(ensemble: Ensemble, x: Shaped[Tensor, " n *size"], labels: Int[Tensor, " n"]) -> Classifier:
    """Return the classifier whose temperature minimises the cross-entropy on these rows, unseen in training.

        T = argmin −Σ_n log p(label_n | x_n) − mean_{n,k} log p(k | x_n),  p = mean_m softmax(f̃_m/T)

    The second term stands for one more row, whose label is drawn at random: without it rows that are all
    classified rightly, as few rows often are, would have T → 0 and no doubt left.

    Shapes: x (n, …), labels (n) from 0 to K − 1.
    Raises: InputError for labels that are no integers from 0 to K − 1, and inputs that are empty.
    Holds: to 1e-6 in log T, at a local minimum near the best of a grid of 61 between 10⁻³ and 10³.
    Source: Guo, Pleiss, Sun, Weinberger 2017, arXiv 1706.04599, the first term; of the mixture here.
    """
    scores = ensemble.functions(x).double()
    _check_labels(labels, len(x), scores.shape[-1])
    return Classifier(ensemble, _temperature(scores, labels.to(scores.device, torch.long)))


def _temperature(scores: Tensor, labels: Tensor) -> float:
    def loss(logarithm: float) -> float:
        each = (scores / math.exp(logarithm)).log_softmax(-1).logsumexp(0)
        return -float(each.gather(-1, labels[:, None]).mean() + each.mean() / len(labels))

    low, high = (math.log(end) for end in TEMPERATURES)
    step = (high - low) / 60
    best = low + step * min(range(61), key=lambda place: loss(low + step * place))
    return math.exp(_golden(loss, max(low, best - step), min(high, best + step)))


def _golden(loss: Callable[[float], float], low: float, high: float) -> float:
    ratio = (math.sqrt(5) - 1) / 2
    one, two = high - ratio * (high - low), low + ratio * (high - low)
    at_one, at_two = loss(one), loss(two)
    while high - low > 1e-6:
        if at_one <= at_two:
            high, two, at_two = two, one, at_one
            one = high - ratio * (high - low)
            at_one = loss(one)
        else:
            low, one, at_one = one, two, at_two
            two = low + ratio * (high - low)
            at_two = loss(two)
    return (low + high) / 2


def centred_one_hot(labels: Int[Tensor, " n"], classes: int) -> Float[Tensor, "n classes"]:
    """Return what a classifier's members regress on, [label_n = k] − 1/K, in float64.

    Shapes: labels (n) from 0 to K − 1 -> (n, K).
    Raises: InputError for labels that are no integers from 0 to K − 1, or fewer than two classes.
    Holds: exactly; rows sum to 0.
    """
    _check_labels(labels, len(labels), classes)
    return torch.nn.functional.one_hot(labels.long(), classes).double() - 1 / classes


def split(x: Tensor, labels: Tensor, held_out: Labelled | float, seed: int) -> tuple[Labelled, Labelled]:
    """Return what to train on and what to calibrate on: rows and labels given, or a share of every class.

    Of a share at least one row is held out, and of every class at least one row is trained on.

    Raises: InputError for a share that leaves no row to either, and labels of another number than rows.
    """
    if labels.ndim != 1 or len(labels) != len(x):
        raise InputError(f"labels must be one integer for each of {len(x)} rows, got {tuple(labels.shape)}")
    if isinstance(held_out, tuple):
        return (x, labels), held_out
    generator = torch.Generator().manual_seed(seed_of(seed, "held out"))
    order = torch.randperm(len(x), generator=generator)
    order = order[labels.cpu()[order].argsort(stable=True)]
    sorted_labels = labels.cpu()[order]
    spare = order[1:][sorted_labels[1:] == sorted_labels[:-1]]
    count = max(1, round(held_out * len(x))) if 0 < held_out < 1 else 0
    if not 0 < count <= len(spare):
        raise InputError(
            f"a share of {held_out:g} of {len(x)} rows leaves none to calibrate on, or a class without one "
            "to train on"
        )
    start = torch.rand(1, generator=generator, dtype=torch.float64)
    chosen = torch.zeros(len(x), dtype=torch.bool)
    chosen[spare[((torch.arange(count) + start) * len(spare) / count).long()]] = True
    return (x[~chosen], labels[~chosen]), (x[chosen], labels[chosen])


def _check_labels(labels: Tensor, rows: int, classes: int) -> None:
    if classes < 2:
        raise InputError(f"a classifier needs networks of at least 2 outputs, got {classes}")
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if not whole or labels.shape != (rows,) or not bool(((labels >= 0) & (labels < classes)).all()):
        raise InputError(f"labels must be {rows} integers from 0 to {classes - 1}, the network's last output")
