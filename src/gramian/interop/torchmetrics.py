"""Readings as torchmetrics: streamed over batches, and synchronised over processes."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from gramian.core.moments import Moments
from gramian.errors import InputError, MissingExtraError
from gramian.observe.attention import AttentionMoments

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    raise MissingExtraError(
        'readings as metrics need torchmetrics: pip install "gramian[torchmetrics]"'
    ) from error

READINGS = (
    "neuron_kurtosis",
    "elementwise_kurtosis",
    "token_excess_kurtosis",
    "max_median_ratio",
    "max_abs",
    "rms",
    "feature_correlation_rms",
    "token_correlation_mean",
    "token_correlation_rms",
    "participation_ratio",
    "effective_rank",
)
"""The readings of a stream; each equation stands at the method of `Moments` of the same name."""


class _Sums(Metric):
    """A metric whose states are the sums of one kind of moments.

    The states have their shapes from the start, so that a process without data can be synchronised. A
    MetricCollection sums once for all metrics whose states agree; `prefix` keeps apart, by their names, those
    that only happen to agree.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, empty: Moments | AttentionMoments, prefix: str = "", **kwargs: Any):
        super().__init__(**kwargs)
        self._kind, self._prefix = type(empty), prefix
        for field in fields(empty):
            reduction = "max" if field.name == "peak" else "sum"
            self.add_state(prefix + field.name, getattr(empty, field.name), dist_reduce_fx=reduction)

    def _sums(self) -> Any:
        names = (field.name for field in fields(self._kind))
        return self._kind(**{name: getattr(self, self._prefix + name) for name in names})

    def _add(self, batch: Moments | AttentionMoments) -> None:
        merged = self._sums() + batch
        for field in fields(self._kind):
            setattr(self, self._prefix + field.name, getattr(merged, field.name))


class Reading(_Sums):
    """One of `READINGS` of all tokens that were given to `update`, over all batches and processes.

    Args:
        name: which reading.
        width: width d of the activations.
        centre: whether every token's mean over its width is subtracted first.
        kwargs: what torchmetrics.Metric takes.

    Raises: InputError for an unknown name or a width below 1.
    Holds: exactly: the value is that of all batches in one.
    """

    def __init__(self, name: str, width: int, centre: bool = False, **kwargs: Any):
        if name not in READINGS:
            raise InputError(f"unknown reading {name!r}; choose one of {', '.join(READINGS)}")
        if width < 1:
            raise InputError(f"width must be at least 1, not {width}")
        super().__init__(Moments.of(torch.zeros(0, width)), "centred_" if centre else "", **kwargs)
        self.name, self.width, self.centre = name, width, centre

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add activations; `mask` keeps the tokens where it is 1 or true.

        Shapes: x (*tokens, d), mask (*tokens).
        Raises: InputError for an x of another width, and as `Moments.of`.
        """
        self._add(Moments.of(x, mask, self.centre))

    def compute(self) -> Tensor:
        """Return the reading of all that was added, in float64; NaN where it is not defined.

        Shapes: ().
        """
        return getattr(self._sums(), self.name)()


class NeuronKurtosis(Reading):
    """Kurtosis over neurons of their RMS, in [1, d], about 1 at initialisation: outlier features."""

    def __init__(self, width: int, **kwargs: Any):
        super().__init__("neuron_kurtosis", width, **kwargs)


class MaxMedianRatio(Reading):
    """Mean over tokens of the largest magnitude against the median one, in [1, ∞): outlier features."""

    def __init__(self, width: int, **kwargs: Any):
        super().__init__("max_median_ratio", width, **kwargs)


class TokenCorrelation(Reading):
    """Mean inner product of two tokens at unit mean square, in [−1/(n−1), 1]: 1 when all tokens are one."""

    def __init__(self, width: int, **kwargs: Any):
        super().__init__("token_correlation_mean", width, **kwargs)


class EffectiveRank(Reading):
    """Number of directions that the tokens use, by entropy, in [1, min(n, d)]."""

    def __init__(self, width: int, **kwargs: Any):
        super().__init__("effective_rank", width, **kwargs)


class _Attention(_Sums):
    """Sums of softmax weights."""

    def __init__(self, heads: int, **kwargs: Any):
        if heads < 1:
            raise InputError(f"heads must be at least 1, not {heads}")
        super().__init__(AttentionMoments.of(torch.zeros(0, heads, 1, 1)), **kwargs)
        self.heads = heads

    def update(self, weights: Tensor, mask: Tensor | None = None) -> None:
        """Add softmax weights; `mask` keeps the queries where it is 1 or true.

        The first token of a sequence is the first that the mask keeps, where queries and keys are as many.

        Shapes: weights (batch, heads, queries, keys), mask (batch, queries).
        Raises: InputError for weights of another shape, and for such a mask.
        """
        if weights.ndim != 4 or weights.shape[1] != self.heads:
            raise InputError(
                f"weights must be (batch, {self.heads} heads, queries, keys), not {tuple(weights.shape)}"
            )
        self._add(AttentionMoments.of(weights, mask))


class AttentionEntropy(_Attention):
    """Entropy in nats of softmax weights, averaged over heads and queries, in [0, log T].

    Args:
        heads: number of heads.
        kwargs: what torchmetrics.Metric takes.

    Raises: InputError for heads below 1.
    Holds: exactly, as `observe.attention.attention_entropy` of all batches in one.
    """

    def compute(self) -> Tensor:
        """Return the entropy over all that was added; NaN without queries.

        Shapes: ().
        """
        return self._sums().attention_entropy()


class SinkRate(_Attention):
    """Fraction of heads whose mean attention to the first token exceeds a threshold, in [0, 1].

    Args:
        heads: number of heads.
        threshold: mean attention above which a head rests on the first token.
        kwargs: what torchmetrics.Metric takes.

    Raises: InputError for heads below 1.
    Holds: exactly, as `observe.attention.sink_rate` of all batches in one.
    """

    def __init__(self, heads: int, threshold: float = 0.3, **kwargs: Any):
        super().__init__(heads, **kwargs)
        self.threshold = threshold

    def compute(self) -> Tensor:
        """Return the rate over all that was added; NaN without queries.

        Shapes: ().
        """
        return self._sums().sink_rate(self.threshold)
