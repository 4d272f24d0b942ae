"""Readings of a stream of activations from sums that merge: no activation is kept, no n×n matrix is made.

X holds all tokens of all sequences as rows, n tokens of width d; s_j = mean_a X_aj².
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from gramian.core import readings
from gramian.core.gram import Gram
from gramian.errors import InputError

ROWS = 512
"""Tokens taken at once: bounds the float64 copies, which are faster when they stay in the cache."""


def accumulator(device: torch.device) -> torch.dtype:
    """Widest floating type of a device: float64, or float32 where there is no float64 (mps)."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over tokens from which all outlier and collapse readings follow; `+` merges two streams.

    Merging is commutative and associative up to rounding, so any split of the tokens over batches or
    processes gives the same readings. Without tokens every reading is NaN, with one token the
    statistics over pairs of tokens are, and a NaN among the tokens gives NaN.

    Holds: exactly.
    Source: He, Noci, Paliotta, Schlag, Hofmann 2024, arXiv 2405.19279, Eqs. 1-2, in streaming form.
    """

    count: Float[Tensor, ""]
    """Number of tokens n."""
    products: Float[Tensor, "d d"]
    """XᵀX; its diagonal is n s and its trace Σ_a |x_a|²."""
    total: Float[Tensor, " d"]
    """Σ_a x_a."""
    fourth_norms: Float[Tensor, ""]
    """Σ_a |x_a|⁴."""
    cubes: Float[Tensor, ""]
    """Σ_aj X_aj³."""
    fourths: Float[Tensor, ""]
    """Σ_aj X_aj⁴."""
    peak: Float[Tensor, ""]
    """max_aj |X_aj|, 0 without tokens; the one field merged by a maximum."""
    ratios: Float[Tensor, "2"]
    """Sum of max/median over the tokens whose median magnitude is not 0, and the number of those."""
    excesses: Float[Tensor, "2"]
    """Sum of max(kurtosis − 3, 0) over the tokens that are not constant, and the number of those."""

    @classmethod
    def of(
        cls, x: Shaped[Tensor, "*tokens d"], mask: Tensor | None = None, centre: bool = False
    ) -> "Moments":
        """Take the sums of one tensor, in float64 whatever its precision (float32 on mps).

        `mask` keeps the tokens where it is 1 or true; the others, NaN included, count nowhere. With
        `centre` every token's mean over its width is subtracted first.

        Shapes: x (*tokens, d), mask (*tokens).
        Raises: InputError for an x that is not floating point or has no width, and for a mask of another
            shape or with other values than 0 and 1.
        """
        if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] == 0:
            raise InputError(f"moments need floating-point tokens (..., d), not {x.dtype} {tuple(x.shape)}")
        rows = x.detach().reshape(-1, x.shape[-1])
        if mask is not None:
            rows = rows[_kept(mask, x.shape[:-1]).to(x.device)]
        first, *others = (cls._of_rows(part, centre) for part in rows.split(ROWS))
        return sum(others, first)

    @classmethod
    def _of_rows(cls, x: Tensor, centre: bool) -> "Moments":
        d = x.shape[-1]
        wide = x.to(accumulator(x.device))
        # Powers are summed about each token's own mean and then moved to 0: a large mean cancels nothing.
        mean = wide.mean(-1)
        deviation = wide - mean[:, None]
        if centre:
            x = wide = deviation
            mean = torch.zeros_like(mean)
        square = deviation.square()
        second, mean2 = square.sum(-1), mean.square()
        third = torch.linalg.vecdot(square, deviation)
        fourth = torch.linalg.vecdot(square, square)

        magnitude = x.abs()
        largest = magnitude.amax(-1).to(wide.dtype)
        middle = _lower_median(magnitude).to(wide.dtype)
        return cls(
            count=wide.new_tensor(len(wide)),
            products=wide.T @ wide,
            total=wide.sum(0),
            fourth_norms=(second + d * mean2).square().sum(),
            cubes=third.sum() + 3 * mean.dot(second) + d * mean.dot(mean2),
            fourths=fourth.sum() + 4 * mean.dot(third) + 6 * mean2.dot(second) + d * mean2.dot(mean2),
            peak=largest.amax() if len(largest) else largest.sum(),
            ratios=_defined(largest / middle, middle != 0),
            excesses=_defined((d * fourth / second.square() - 3).relu(), second != 0),
        )

    def __add__(self, other: "Moments") -> "Moments":
        if self.total.shape != other.total.shape:
            raise InputError(f"moments of widths {len(self.total)} and {len(other.total)} cannot be merged")
        merged = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in fields(self)
            if field.name != "peak"
        }
        return Moments(peak=torch.maximum(self.peak, other.peak), **merged)

    def features(self) -> Gram:
        """Gram matrix over neurons: XᵀX, un-normalised, with the d diagonal entries n s_j."""
        squares = self.products.diagonal()
        return Gram(self.products, squares, squares)

    def neuron_kurtosis(self) -> Float[Tensor, ""]:
        """Kurtosis over neurons of their RMS: `readings.neuron_kurtosis`, in [1, d], about 1 at first."""
        return readings.neuron_kurtosis(self.features())

    def elementwise_kurtosis(self) -> Float[Tensor, ""]:
        """Pearson kurtosis of all n·d entries as one sample, in [1, ∞); 3 for Gaussian entries.

        E(X − μ)⁴ / (E(X − μ)²)²

        Source: Bondarenko, Nagel, Blankevoort 2023, arXiv 2306.12929 (there a mean over sequences).
        """
        entries = self.count * len(self.total)
        mean, second = self.total.sum() / entries, self._trace() / entries
        third, fourth = self.cubes / entries, self.fourths / entries
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        return central / (second - mean**2).square()

    def token_excess_kurtosis(self) -> Float[Tensor, ""]:
        """Mean over tokens of their excess kurtosis across the width, with negative values as 0.

        mean_a max(E_j(X_aj − μ_a)⁴ / (E_j(X_aj − μ_a)²)² − 3, 0)

        Range [0, d); near 0 at initialisation. Constant tokens have no kurtosis and are left out.

        Source: Park et al. 2025, arXiv 2506.19697 (evaluation script).
        """
        return self.excesses[0] / self.excesses[1]

    def max_median_ratio(self) -> Float[Tensor, ""]:
        """Mean over tokens of the largest magnitude against the median one.

        MMR = mean_a (max_j |X_aj| / median_j |X_aj|)

        Range [1, ∞); 5.01 for Gaussian entries at d = 768. The median is the lower middle value for even d.
        Tokens whose median is 0 have no ratio and are left out; NaN when all are.

        Source: He et al. 2024, arXiv 2405.19279, Eq. 2.
        """
        return self.ratios[0] / self.ratios[1]

    def max_abs(self) -> Float[Tensor, ""]:
        """Largest magnitude max_aj |X_aj|."""
        return torch.where(self.count > 0, self.peak, torch.nan)

    def rms(self) -> Float[Tensor, ""]:
        """Root mean square of all entries, √(mean X²)."""
        return (self._trace() / (self.count * len(self.total))).sqrt()

    def feature_correlation_rms(self) -> Float[Tensor, ""]:
        """RMS off-diagonal of XᵀX/n at mean X² = 1, in [0, 1]; 1/√n at initialisation, NaN for d = 1."""
        return readings.correlation_rms(self.features())

    def token_correlation_mean(self) -> Float[Tensor, ""]:
        """Mean off-diagonal of XXᵀ/d at mean X² = 1, in [−1/(n−1), 1]; 1 when all tokens are one.

        (|Σ_a x_a|² − Σ_a |x_a|²) / (n (n−1)) / (Σ_a |x_a|² / n)
        """
        return self._over_pairs(self.total.square().sum() - self._trace())

    def token_correlation_rms(self) -> Float[Tensor, ""]:
        """RMS off-diagonal of XXᵀ/d at mean X² = 1, in [0, 1]; 1/√d at initialisation.

        √((‖XᵀX‖²_F − Σ_a |x_a|⁴) / (n (n−1))) / (Σ_a |x_a|² / n)
        """
        pairs = self.products.square().sum() - self.fourth_norms
        return (self._over_pairs(pairs.clamp(min=0)) / self._trace() * self.count).sqrt()

    def effective_rank(self) -> Float[Tensor, ""]:
        """Effective rank of the tokens' Gram XXᵀ, in [1, min(n, d)], by the eigenvalues it shares with XᵀX.

        Costs an eigenvalue problem of size d, O(d³); `participation_ratio` is free.
        """
        return readings.effective_rank(self.features())

    def participation_ratio(self) -> Float[Tensor, ""]:
        """Participation ratio of the tokens' Gram XXᵀ, in [1, min(n, d)]; at first nd/(n + d)."""
        return readings.participation_ratio(self.features())

    def _trace(self) -> Tensor:
        return self.products.diagonal().sum()

    def _over_pairs(self, pair_sum: Tensor) -> Tensor:
        """Mean over ordered pairs of two tokens in units of the mean |x_a|²; NaN below two tokens."""
        mean = pair_sum / (self.count * (self.count - 1)) / (self._trace() / self.count)
        return torch.where(self.count > 1, mean, torch.nan)


def _kept(mask: Tensor, tokens: torch.Size) -> Tensor:
    if mask.shape != tokens:
        raise InputError(f"a mask of shape {tuple(mask.shape)} does not fit tokens of shape {tuple(tokens)}")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise InputError("a mask may hold only 0 and 1, or booleans")
    return mask.reshape(-1).bool()


def _lower_median(magnitude: Tensor) -> Tensor:
    """Median of every row, the lower of two middle values; it may reorder the rows' entries.

    On one core numpy selects about eight times as fast as `torch.median`, which elsewhere refuses to
    run where only deterministic algorithms may. A NaN need not be found: the maximum is NaN then.
    """
    middle = (magnitude.shape[-1] - 1) // 2
    if magnitude.device.type != "cpu":
        return magnitude.sort(-1).values[:, middle]
    if magnitude.itemsize < 4:
        magnitude = magnitude.float()
    magnitude.numpy().partition(middle)
    return magnitude[:, middle]


def _defined(ratios: Tensor, defined: Tensor) -> Tensor:
    """Sum of the ratios that are defined, and their number; a defined NaN stays."""
    return torch.stack([torch.where(defined, ratios, 0).sum(), defined.sum().to(ratios.dtype)])
