"""Do predictions of classes know how wrong they are: doubt, scores, reliability and rejection.

Probabilities of a classifier are p (…, C); those of its members, from networks or draws, are (members, …, C),
and their mean over members is the predictive probability.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from gramian.core.moments import accumulator
from gramian.errors import InputError

Score = Callable[[Tensor], Tensor]
"""Doubt of a prediction from its probabilities, (…, C) -> (…)."""

Grouping = Callable[[Tensor, int], Tensor]
"""Bin of every confidence, (n) -> integers below the number of bins."""


def entropy(probabilities: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Return the entropy of class probabilities in nats: how unsure a prediction is, for whatever reason.

        H(p) = −Σ_c p_c ln p_c

    Range [0, ln C].

    Shapes: (*batch, C) -> (*batch).
    Raises: InputError for numbers that are no probabilities.
    Holds: exactly.
    """
    return torch.special.entr(_probabilities(probabilities)).sum(-1)


def least_confidence(probabilities: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Return the probability of an error if the model were right.

        1 − max_c p_c

    Range [0, 1 − 1/C].

    Shapes: (*batch, C) -> (*batch).
    Raises: InputError for numbers that are no probabilities.
    Holds: exactly.
    """
    return 1 - _probabilities(probabilities).amax(-1)


def mutual_information(members: Float[Tensor, "members *batch classes"]) -> Float[Tensor, "*batch"]:
    """Return how much members disagree, in nats: the part of the entropy that data would remove.

        I = H(mean_m p_m) − mean_m H(p_m)

    Range [0, min(ln C, ln M)]; 0 where all members agree.

    Shapes: (members, *batch, C) -> (*batch).
    Raises: InputError for numbers that are no probabilities, and no member.
    Holds: exactly.
    Source: Houlsby, Huszár, Ghahramani, Lengyel 2011, arXiv 1112.5745.
    """
    members = _probabilities(members)
    if members.ndim < 2 or len(members) == 0:
        raise InputError(f"members have to be (members, …, classes), not {tuple(members.shape)}")
    whole = torch.special.entr(members.mean(0)).sum(-1)
    return (whole - torch.special.entr(members).sum(-1).mean(0)).clamp(min=0)


def log_loss(probabilities: Float[Tensor, "n classes"], labels: Int[Tensor, "..."]) -> Float[Tensor, ""]:
    """Return the mean negative log probability of the true class, in nats.

        NLL = −1/n Σ_i ln p_i,label_i

    Infinite where a true class has probability 0.

    Shapes: probabilities (n, C), labels (n) -> ().
    Raises: InputError for numbers that are no probabilities, labels that do not fit, and no row.
    Holds: exactly.
    """
    return -_of_labels(probabilities, labels).log().mean()


def brier(probabilities: Float[Tensor, "n classes"], labels: Int[Tensor, "..."]) -> Float[Tensor, ""]:
    """Return the mean squared distance of the probabilities from the truth, over all classes.

        Brier = 1/n Σ_i Σ_c (p_ic − 1[c = label_i])²

    Range [0, 2]; 1 − 1/C for equal probabilities.

    Shapes: probabilities (n, C), labels (n) -> ().
    Raises: InputError as `log_loss`.
    Holds: exactly.
    Source: Brier 1950, doi 10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.
    """
    own = _of_labels(probabilities, labels)
    return (probabilities.square().sum(-1) - 2 * own + 1).mean()


def equal_width(confidence: Float[Tensor, " n"], bins: int) -> Int[Tensor, " n"]:
    """Return the bins of equal width on [0, 1]: bin k from above k/bins to (k + 1)/bins, 0 in the first.

    Shapes: (n) -> (n).
    Holds: exactly.
    """
    edges = torch.arange(1, bins).to(confidence) / bins
    return torch.bucketize(confidence.contiguous(), edges)


def equal_mass(confidence: Float[Tensor, " n"], bins: int) -> Int[Tensor, " n"]:
    """Return bins of n/bins rows each, by rank; equal confidences share the bin of the first of them.

        bin_i = ⌊bins · #{j: c_j < c_i} / n⌋

    Shapes: (n) -> (n).
    Holds: exactly; without ties the sizes differ by at most 1.
    """
    below = _below(confidence, confidence)
    return below * bins // max(len(confidence), 1)


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram: rows, mean confidence and accuracy of every bin; NaN if empty."""

    count: Int[Tensor, " bins"]
    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]


def reliability(
    confidence: Float[Tensor, " n"],
    correct: Shaped[Tensor, "..."],
    bins: int = 15,
    grouping: Grouping = equal_width,
) -> Reliability:
    """Compare confidence with the share of right answers, bin by bin.

    Shapes: confidence (n) in [0, 1], correct (n), 0 or 1 or true -> (bins).
    Raises: InputError for confidences that are no probabilities, shapes that do not fit, no row or no bin.
    Holds: exactly.
    Source: DeGroot, Fienberg 1983, doi 10.2307/2987588.
    """
    if bins < 1:
        raise InputError(f"reliability needs at least 1 bin, not {bins}")
    _rows(confidence, correct)
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise InputError("confidences have to be probabilities from 0 to 1")
    place = grouping(confidence, bins)
    count = torch.bincount(place, minlength=bins)
    sums = [torch.bincount(place, weights=_wide(part), minlength=bins) for part in (confidence, correct)]
    return Reliability(count, sums[0] / count, sums[1] / count)


def expected_calibration_error(
    probabilities: Float[Tensor, "n classes"],
    labels: Int[Tensor, "..."],
    bins: int = 15,
    grouping: Grouping = equal_width,
) -> Float[Tensor, ""]:
    """Return the mean distance of confidence from accuracy over bins, weighted by their rows.

        ECE = Σ_b n_b/n |accuracy_b − confidence_b|,  confidence = max_c p_c

    Range [0, 1]. A calibrated classifier has more than 0 on finitely many rows, the more so the more bins.

    Shapes: probabilities (n, C), labels (n) -> ().
    Raises: InputError as `log_loss` and `reliability`.
    Holds: exactly.
    Source: Guo, Pleiss, Sun, Weinberger 2017, arXiv 1706.04599; equal mass: Nguyen, O'Connor 2015,
        arXiv 1508.05154.
    """
    _of_labels(probabilities, labels)
    confidence, answer = probabilities.max(-1)
    found = reliability(confidence.clamp(max=1), answer == labels, bins, grouping)
    gaps = (found.accuracy - found.confidence).abs().nan_to_num()
    return (gaps * found.count).sum() / len(labels)


def auroc(positive: Float[Tensor, " n"], negative: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """Return the probability that a positive scores higher than a negative, ties counted half.

        AUROC = 1/(nm) Σ_ij (1[s_i > t_j] + ½ 1[s_i = t_j])

    Range [0, 1]; ½ for a score that tells nothing.

    Shapes: (n), (m) -> ().
    Raises: InputError for NaN, and an empty side.
    Holds: exactly, in O((n + m) log m).
    Source: Mann, Whitney 1947, doi 10.1214/aoms/1177730491.
    """
    _scores(positive, negative)
    beaten = _below(negative, positive) + _below(negative, positive, ties=True)
    return _wide(beaten).mean() / (2 * len(negative))


def average_precision(positive: Float[Tensor, " n"], negative: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """Return the area under the precision-recall curve, as a sum of steps.

        AP = 1/n Σ_i #{positives ≥ s_i} / #{all ≥ s_i}

    Range (0, 1]; about n/(n + m) for a score that tells nothing.

    Shapes: (n), (m) -> ().
    Raises: InputError for NaN, and an empty side.
    Holds: exactly.
    """
    _scores(positive, negative)
    hits = len(positive) - _below(positive, positive)
    alarms = len(negative) - _below(negative, positive)
    return (_wide(hits) / (hits + alarms)).mean()


def out_of_distribution_auroc(
    inside: Float[Tensor, "n classes"], outside: Float[Tensor, "m classes"], score: Score = entropy
) -> Float[Tensor, ""]:
    """Return how well the doubt of a classifier tells strange inputs from known ones; 1 is perfect, ½ chance.

        AUROC of score(p) with `outside` as the positives; score is `entropy` or `least_confidence`

    Shapes: inside (n, C), outside (m, C) -> ().
    Raises: InputError for numbers that are no probabilities, and an empty side.
    Holds: exactly.
    Source: Hendrycks, Gimpel 2017, arXiv 1610.02136.
    """
    return auroc(score(outside), score(inside))


def error_confidence_curve(
    confidence: Float[Tensor, " n"], error: Shaped[Tensor, "..."]
) -> Float[Tensor, " n"]:
    """Return the mean error among the k most confident rows, for k = 1 … n; its mean is the area under it.

        curve_k = 1/k Σ_{i: rank of confidence ≤ k} error_i

    Rows of equal confidence count with the mean error among them, as over random orders. The last number
    is the mean error of all. Errors are 0 and 1 or anything else, such as squares; for a regression
    confidence is the negative standard deviation.

    Shapes: confidence (n), error (n) -> (n).
    Raises: InputError for NaN, shapes that do not fit, and no row.
    Holds: exactly.
    Source: Geifman, El-Yaniv 2017, arXiv 1705.08500.
    """
    _rows(confidence, error)
    _, group, count = confidence.neg().unique(return_inverse=True, return_counts=True)
    means = torch.bincount(group, weights=_wide(error)) / count
    ranks = torch.arange(1, len(confidence) + 1, device=confidence.device)
    return means.repeat_interleave(count).cumsum(0) / ranks


def error_above(
    confidence: Float[Tensor, " n"],
    error: Shaped[Tensor, "..."],
    thresholds: Float[Tensor, " thresholds"],
) -> Float[Tensor, " thresholds"]:
    """Return the mean error of the rows whose confidence is at least a threshold; NaN where there is none.

        error(τ) = mean {error_i: confidence_i ≥ τ}

    Shapes: confidence (n), error (n), thresholds (t) -> (t).
    Raises: InputError for NaN, shapes that do not fit, and no row.
    Holds: exactly.
    Source: Lakshminarayanan, Pritzel, Blundell 2017, arXiv 1612.01474.
    """
    _rows(confidence, error)
    sums = _wide(error)[confidence.argsort(descending=True)].cumsum(0)
    kept = len(confidence) - _below(confidence, thresholds.to(confidence))
    return torch.where(kept > 0, sums[(kept - 1).clamp(min=0)] / kept, torch.nan)


def _below(values: Tensor, than: Tensor, ties: bool = False) -> Tensor:
    """Count the values below every number, or up to it with ties."""
    return torch.searchsorted(values.sort().values, than.contiguous(), right=ties)


def _wide(values: Tensor) -> Tensor:
    return values.to(accumulator(values.device))


def _probabilities(values: Tensor) -> Tensor:
    rounding = 1e-2 if values.dtype in (torch.float16, torch.bfloat16) else 1e-4
    whole = values.ndim > 0 and ((values.sum(-1) - 1).abs() <= rounding).all()
    if not whole or not (values >= 0).all():
        raise InputError("class probabilities have to be at least 0 and to sum to 1 over the last axis")
    return values


def _of_labels(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Give the probability of the true class of every row."""
    n, classes = _probabilities(probabilities).shape
    if n == 0:
        raise InputError("there is no prediction to judge; give at least one")
    if labels.shape != (n,) or not ((labels >= 0) & (labels < classes)).all():
        raise InputError(f"labels have to be a class from 0 to {classes - 1} for each of {n} rows")
    return probabilities.gather(-1, labels.long()[:, None])[:, 0]


def _rows(confidence: Tensor, other: Tensor) -> None:
    if confidence.shape != other.shape or confidence.ndim != 1 or len(confidence) == 0:
        raise InputError(
            f"confidence and error have to be (n) with n at least 1, not {tuple(confidence.shape)} "
            f"and {tuple(other.shape)}"
        )
    if confidence.isnan().any() or other.isnan().any():
        raise InputError("confidence and error have to be numbers, but hold NaN")


def _scores(positive: Tensor, negative: Tensor) -> None:
    if positive.numel() == 0 or negative.numel() == 0:
        raise InputError(f"both sides need scores, but there are {len(positive)} and {len(negative)}")
    if positive.isnan().any() or negative.isnan().any():
        raise InputError("scores have to be numbers, but hold NaN")
