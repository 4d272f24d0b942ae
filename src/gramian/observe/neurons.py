"""Gram over neurons: outlier features, in every published convention under its own name."""

import torch

from gramian.core.moments import Moments


def neuron_readings(moments: Moments) -> dict[str, float]:
    """Read what outlier neurons change; the three kurtoses differ by orders of magnitude, so none is bare.

    neuron_kurtosis in [1, d], about 1 at initialisation; elementwise_kurtosis 3 and
    token_excess_kurtosis near 0 for Gaussian entries, max_median_ratio about 5 there;
    feature_correlation_rms about 1/√n; max_abs and rms in the units of the stream.

    Holds: exactly; each equation stands at the method of `Moments` of the same name.
    Source: He, Noci, Paliotta, Schlag, Hofmann 2024, arXiv 2405.19279.
    """
    names = (
        "neuron_kurtosis",
        "elementwise_kurtosis",
        "token_excess_kurtosis",
        "max_median_ratio",
        "max_abs",
        "rms",
        "feature_correlation_rms",
    )
    values = torch.stack([getattr(moments, name)() for name in names])
    return dict(zip(names, values.tolist(), strict=True))


def outlier_neurons(moments: Moments, k: int) -> list[tuple[int, float]]:
    """List the k neurons of largest mean square, each with s_j / mean_j s_j, the largest first.

    s_j = mean_a X_aj²;  about 1 for every neuron at initialisation, d for a single active one.

    Holds: exactly.
    """
    squares = moments.features().left
    shares, neurons = (squares / squares.mean()).topk(min(k, len(squares)))
    return list(zip(neurons.tolist(), shares.tolist(), strict=True))
