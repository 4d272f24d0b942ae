"""Gram over inputs: tokens that become alike with depth, the collapse of rank."""

import torch

from gramian.core.moments import Moments


def token_readings(moments: Moments) -> dict[str, float]:
    """Read how alike the tokens are, from XᵀX alone.

    token_correlation_mean in [−1/(n−1), 1] and token_correlation_rms in [0, 1] are 1 when all tokens
    are one, and 0 and 1/√d at initialisation; effective_rank (by entropy) and participation_ratio (by
    second moments) in [1, min(n, d)] count the directions that the tokens use.

    Holds: exactly; each equation stands at the method of `Moments` of the same name.
    Source: He, Noci, Paliotta, Schlag, Hofmann 2024, arXiv 2405.19279.
    """
    names = ("token_correlation_mean", "token_correlation_rms", "effective_rank", "participation_ratio")
    values = torch.stack([getattr(moments, name)() for name in names])
    return dict(zip(names, values.tolist(), strict=True))
