"""What a network on graphs is trained by and judged by, for every kind of task."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, l1_loss

from gramian.data.objectives import IGNORED

METRICS = {
    "regression": "mae",
    "node_regression": "mae",
    "classification": "accuracy",
    "node": "accuracy",
    "multilabel": "average_precision",
}
"""The number that a task is judged by: of nodes the accuracy is the mean over classes."""

LOWER = ("mae",)
"""Metrics of which less is better."""


def better(metric: str, value: float, than: float) -> bool:
    """Whether a value of a metric is better than another; one that is not a number never is."""
    return value < than if metric in LOWER else value > than


def worst(metric: str) -> float:
    """Return a value than which every other is better."""
    return float("inf") if metric in LOWER else float("-inf")


@dataclass(frozen=True)
class Scale:
    """Mean and deviation of what is predicted, by which it is standardised: y = mean + deviation · ŷ."""

    mean: Tensor
    deviation: Tensor

    @staticmethod
    def of(y: Tensor, task: str) -> "Scale | None":
        """Return the scale of training targets (rows, t); None where classes or labels are predicted."""
        if METRICS[task] != "mae":
            return None
        values = y.double()
        deviation = values.std(0, correction=0)
        mean, deviation = values.mean(0).float(), deviation.float()
        return Scale(mean, torch.where(deviation > 0, deviation, torch.ones_like(deviation)))

    def to(self, device: torch.device) -> "Scale":
        """Return the same on a device."""
        return Scale(self.mean.to(device), self.deviation.to(device))


def loss_of(task: str, outputs: Tensor, y: Tensor, scale: Scale | None) -> Tensor:
    """Return the mean loss of a batch.

        numbers     mean |ŷ − (y − mean)/deviation|
        labels      mean binary cross-entropy
        classes     mean cross-entropy, in nats; of nodes weighted by 1 − the class's share in the batch

    Shapes: (rows, outputs), y (rows) or (rows, outputs) -> ().
    Holds: exactly; nodes with the label −100 do not count, and the loss is 0 where no other is there.
    Source: the weights: Dwivedi et al. 2020, arXiv 2003.00982.
    """
    if scale is not None:
        return l1_loss(outputs, (y - scale.mean) / scale.deviation)
    if task == "multilabel":
        return binary_cross_entropy_with_logits(outputs, y.to(outputs.dtype))
    if task == "classification":
        return cross_entropy(outputs, y)
    count = y[y != IGNORED].bincount(minlength=outputs.shape[1])
    if not count.any():
        return 0 * outputs.sum()
    several = (count > 0).sum() > 1
    weights = torch.where(several, 1 - count / count.sum(), torch.ones_like(outputs[0]))
    return cross_entropy(outputs, y, weight=weights.to(outputs.dtype), ignore_index=IGNORED)


def score_of(task: str, outputs: Tensor, y: Tensor, scale: Scale | None) -> float:
    """Return the metric of a task over a whole part of the data.

        mae                 mean |mean + deviation · ŷ − y|
        accuracy            share of right classes; of nodes its mean over the classes that occur
        average_precision   mean over the labels that have both values

    Shapes: (rows, outputs), y (rows) or (rows, outputs) -> number.
    Holds: exactly; nan where no label has both values, no node has a class, or an output is not finite.
    """
    if not outputs.isfinite().all():
        return float("nan")
    if scale is not None:
        return (scale.mean + scale.deviation * outputs - y).abs().mean().item()
    if task == "multilabel":
        return _average_precision(outputs, y)
    right = outputs.argmax(1) == y
    if task == "classification":
        return right.double().mean().item()
    shares = [right[y == label].double().mean().item() for label in y[y != IGNORED].unique()]
    return sum(shares) / len(shares) if shares else float("nan")


def _average_precision(outputs: Tensor, y: Tensor) -> float:
    from sklearn.metrics import average_precision_score  # a second to import, so only where it is used

    columns = [column for column in range(y.shape[1]) if len(y[:, column].unique()) == 2]
    each = [average_precision_score(y[:, c].numpy(), outputs[:, c].numpy()) for c in columns]
    return sum(each) / len(each) if each else float("nan")


def constant_score(y: Tensor, target: Tensor, task: str) -> float:
    """Return the metric of the best constant prediction: the median, the commonest class, the labels' rates.

    Shapes: y and target as in `score_of`, of the training and the test part.
    """
    if METRICS[task] == "mae":
        return (target - y.median(0).values).abs().mean().item()
    if task == "multilabel":
        rates = [column.double().mean().item() for column in target.unbind(1) if len(column.unique()) == 2]
        return sum(rates) / len(rates) if rates else float("nan")
    commonest = y[y != IGNORED].bincount().argmax()
    outputs = torch.zeros(len(target), int(max(y.max(), target.max())) + 1)
    outputs[:, commonest] = 1
    return score_of(task, outputs, target, None)
