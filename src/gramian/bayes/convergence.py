"""Have the chains met, and how many independent draws are they worth? Diagnostics of (chains, draws, …)."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gramian.errors import InputError

COLUMNS = 4096
"""Unknowns that are diagnosed at once."""


def r_hat(draws: Float[Tensor, "chains draws *size"]) -> Float[Tensor, "*size"]:
    """Return the rank-normalised split R̂: 1 when all halves of all chains have one location and one scale.

        R̂ = √(((n − 1)/n W + B/n)/W) of z = Φ⁻¹((rank − ⅜)/(S + ¼)),
        the larger of that of the draws and that of |draws − median|

    W is the mean variance within halves of n draws, B/n the variance of their means, S the number of draws.
    Above 1.01 the chains have not met. NaN where all draws are the same.

    Shapes: (chains, draws, …) -> (…).
    Raises: InputError for fewer than 4 draws of a chain, and draws that are not finite.
    Holds: exactly.
    Source: Vehtari et al. 2021, arXiv 1903.08008, Eq. 3–4, 14.
    """

    def worse(x: Tensor) -> Tensor:
        x = _halves(x)
        folded = (x - x.flatten(0, 1).quantile(0.5, dim=0)).abs()
        return torch.maximum(_r_hat(normalised(x)), _r_hat(normalised(folded)))

    return _by_columns(worse, draws)


def bulk_size(draws: Float[Tensor, "chains draws *size"]) -> Float[Tensor, "*size"]:
    """Return the effective sample size of the rank-normalised draws, which speaks for means and medians.

    Shapes: (chains, draws, …) -> (…).
    Raises: InputError as `r_hat`.
    Holds: empirically; NaN where all draws are the same.
    Source: Vehtari et al. 2021, arXiv 1903.08008, section 4.1.
    """
    return _by_columns(lambda x: _size(normalised(_halves(x))), draws)


def tail_size(draws: Float[Tensor, "chains draws *size"]) -> Float[Tensor, "*size"]:
    """Return the smaller effective sample size of the 5 % and 95 % quantiles, which speaks for intervals.

    Shapes: (chains, draws, …) -> (…).
    Raises: InputError as `r_hat`.
    Holds: empirically; NaN where all draws are the same.
    Source: Vehtari et al. 2021, arXiv 1903.08008, section 4.3.
    """

    def smaller(x: Tensor) -> Tensor:
        levels = torch.tensor([0.05, 0.95], dtype=x.dtype, device=x.device)
        low, high = torch.quantile(x.flatten(0, 1), levels, dim=0)
        return torch.fmin(_size(_halves((x <= low).to(x))), _size(_halves((x <= high).to(x))))

    return _by_columns(smaller, draws)


def effective_size(draws: Float[Tensor, "chains draws *size"]) -> Float[Tensor, "*size"]:
    """Return the effective sample size of the draws as they are, which speaks for their mean.

        N_eff = S/τ,  τ = −1 + 2 Σ_k P_k,  P_k = ρ_2k + ρ_2k+1,  Var(mean) = Var/N_eff

    ρ_t is the autocorrelation over all halves of chains together. The sum ends before the first P_k below 0,
    and P_k is made to fall. At most S log₁₀ S. Of x² it speaks for second moments.

    Shapes: (chains, draws, …) -> (…).
    Raises: InputError as `r_hat`.
    Holds: as draws → ∞; AR(1) with coefficient φ: N_eff/S → (1 − φ)/(1 + φ).
    Source: Vehtari et al. 2021, arXiv 1903.08008, Eq. 10–13; Geyer 1992.
    """
    return _by_columns(lambda x: _size(_halves(x)), draws)


def normalised(draws: Float[Tensor, "chains draws dim"]) -> Float[Tensor, "chains draws dim"]:
    """Return the normal scores Φ⁻¹((rank − ⅜)/(S + ¼)) of the draws over all chains, ties at their mean rank.

    Holds: exactly.
    """
    flat = draws.flatten(0, 1).mT.contiguous()
    ordered = flat.sort(-1).values
    below = torch.searchsorted(ordered, flat)
    rank = (below + torch.searchsorted(ordered, flat, right=True) + 1).to(flat) / 2
    return torch.special.ndtri((rank - 0.375) / (flat.shape[-1] + 0.25)).mT.view(draws.shape)


def _halves(x: Tensor) -> Tensor:
    """Split every chain in two, without the middle draw of an odd number."""
    half = x.shape[1] // 2
    return torch.cat((x[:, :half], x[:, x.shape[1] - half :]))


def _r_hat(x: Tensor) -> Tensor:
    within = x.var(1).mean(0)
    between = x.mean(1).var(0)
    return ((x.shape[1] - 1) / x.shape[1] + between / within).sqrt()


def _size(x: Tensor) -> Tensor:
    chains, n = x.shape[:2]
    covariance = _autocovariance(x).mean(0)
    within = covariance[0] * n / (n - 1)
    total = covariance[0] + (x.mean(1).var(0) if chains > 1 else 0)
    rho = 1 - (within - covariance) / total
    rho[0] = 1
    pairs = rho[: n - n % 2].unflatten(0, (-1, 2)).sum(1)
    kept = _before_negative(pairs)
    after = rho[: n - n % 2 : 2].gather(0, kept.sum(0, keepdim=True).clamp(max=len(pairs) - 1))[0]
    falling = torch.where(kept, pairs, 0).cummin(0).values
    tau = -1 + 2 * falling.sum(0) + after.clamp(min=0)
    count = chains * n
    size = count / tau.clamp(min=1 / math.log10(count))
    return torch.where(within + total > 0, size, torch.nan)


def _before_negative(pairs: Tensor) -> Bool[Tensor, "lags dim"]:
    return (pairs > 0).to(torch.int8).cumprod(0) > 0


def _autocovariance(x: Tensor) -> Float[Tensor, "chains draws dim"]:
    """Give 1/n Σ_s (x_s − x̄)(x_{s+t} − x̄) for every lag t."""
    n = x.shape[1]
    spectrum = torch.fft.rfft(x - x.mean(1, keepdim=True), 2 * n, dim=1)
    return torch.fft.irfft(spectrum.abs().square(), 2 * n, dim=1)[:, :n] / n


def _by_columns(reading: Callable[[Tensor], Tensor], draws: Tensor) -> Tensor:
    if draws.ndim < 2 or draws.shape[0] < 1 or draws.shape[1] < 4:
        raise InputError(
            f"draws have to be (chains, draws, …) with at least 4 draws, not {tuple(draws.shape)}"
        )
    if not draws.isfinite().all():
        raise InputError("draws have to be finite, but hold NaN or infinity")
    parts = [reading(part.double()) for part in draws.flatten(2).split(COLUMNS, -1)] if draws.ndim > 2 else []
    if draws.ndim == 2:
        return reading(draws.double()[..., None])[0]
    return torch.cat(parts).view(draws.shape[2:])
