"""Maps that normalise: every input by itself, or a batch as a whole."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gramian.core.gram import Gram
from gramian.errors import InputError
from gramian.theory.signal import Signal


@dataclass(frozen=True)
class Norm:
    """RMSNorm without gains, and LayerNorm of a stream whose features have mean zero.

        K' = K / √((q_x + ε)(q_y + ε)),   Θ' = Θ / √((q_x + ε)(q_y + ε)),   q the variance of an input

    A variance of zero with ε = 0 gives NaN, as the layer does.

    Raises: InputError for a negative ε.
    Holds: as width → ∞, error O(width^-1/2).
    Source: Yang 2019, arXiv 1902.04760.
    """

    eps: float = 0.0
    pairwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise InputError(f"the epsilon of a norm must not be negative, got {self.eps:g}")

    def __call__(self, signal: Signal) -> Signal:
        """Normalise every input by itself."""
        g = signal.activation

        def factor(a: Tensor, b: Tensor) -> Tensor:
            return (a + self.eps).rsqrt() * (b + self.eps).rsqrt()

        scale = factor(g.left[..., :, None], g.right[..., None, :])
        out = signal.elementwise(lambda k, a, b: k * factor(a, b), g.cross * scale)
        return out if signal.tangent is None else out.with_tangent(signal.tangent * scale)


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalisation, without gains, in training, over a batch that is large in every direction.

        K' = H K H / s,   Θ' = H Θ H / s,   H = I − 11ᵀ/n,   s = tr(H K H)/n

    Positions count as samples, so all pairs of them are needed.

    Raises: InputError unless the signal is that of one batch with itself, of at least two samples.
    Holds: as width and the effective rank of the batch's Gram → ∞; with few directions the variance of a
    feature over the batch fluctuates.
    Source: derived; compare Yang et al. 2019, arXiv 1902.08129.
    """

    pairwise: ClassVar[bool] = False

    def __call__(self, signal: Signal) -> Signal:
        """Centre and scale by the batch."""
        if not signal.symmetric or (signal.space and not signal.all_pairs):
            raise InputError(
                "BatchNorm needs the signal of one batch with itself and all pairs of its positions; make it "
                'by signal(x) or signal(x, positions="all")'
            )
        if signal.activation.cross.shape[-1] < 2:
            raise InputError("BatchNorm needs at least two samples")
        cross = _centred(signal.activation.cross)
        diagonal = cross.diagonal(dim1=-2, dim2=-1)
        scale = diagonal.mean(-1, keepdim=True)
        norms = diagonal / scale
        moments = Gram(cross / scale[..., None], norms, norms)
        tangent = None if signal.tangent is None else _centred(signal.tangent) / scale[..., None]
        return Signal(moments, tangent, signal.space)


def _centred(k: Tensor) -> Tensor:
    rows, columns = k.mean(-1, keepdim=True), k.mean(-2, keepdim=True)
    return k - rows - columns + rows.mean(-2, keepdim=True)
