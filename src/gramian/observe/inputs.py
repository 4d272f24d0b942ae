"""Gram over inputs: tokens that become alike with depth, the collapse of rank."""

import torch

from gramian.core.moments import Moments


def token_readings(moments: Moments) -> dict[str, float]:
    """Read how alike the tokens are, from XᵀX alone.

    token_correlation_mean in [−1/(n−1), 1] and token_correlation_rms in [0, 1] are 1 when all tokens
    are one, and 0 and 1/√d at initialisation; participation_ratio in [1, min(n, d)] counts the
    directions that the tokens use, by second moments.

    Holds: exactly; each equation stands at the method of `Moments` of the same name.
    Source: He, Noci, Paliotta, Schlag, Hofmann 2024, arXiv 2405.19279.
    """
    names = ("token_correlation_mean", "token_correlation_rms", "participation_ratio")
    values = torch.stack([getattr(moments, name)() for name in names])
    return dict(zip(names, values.tolist(), strict=True))


def spectral_readings(moments: Moments) -> dict[str, float]:
    """Read what needs eigenvalues of XᵀX, an O(d³) problem at every site.

    effective_rank in [1, min(n, d)] counts the directions that the tokens use, by entropy.

    Holds: exactly.
    Source: Roy, Vetterli 2007, EUSIPCO, "The effective rank".
    """
    return {"effective_rank": moments.effective_rank().item()}
