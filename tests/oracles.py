"""Slow, obvious versions of what the library computes fast: they follow the definitions line by line."""

import math

import torch
from torch import Tensor


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def unit_rms(x: Tensor) -> Tensor:
    return x / x.square().mean().sqrt()


def off_diagonal(square: Tensor) -> Tensor:
    return square[~torch.eye(len(square), dtype=torch.bool)]


def moment_readings(x: Tensor) -> dict[str, float]:
    """Every reading of `Moments` for rows x (n, d), with the n×n matrix and loops over tokens."""
    x = x.double()
    n, d = x.shape
    y = unit_rms(x)
    tokens, features = y @ y.T / d, y.T @ y / n
    mean_squares = y.square().mean(0)
    eigenvalues = torch.linalg.eigvalsh(tokens).clamp(min=0)
    shares = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    entries = x.flatten() - x.mean()
    excesses, ratios = [], []
    for token in x:
        if token.abs().sort().values[(d - 1) // 2] > 0:
            ratios.append(token.abs().max() / token.abs().sort().values[(d - 1) // 2])
        if token.std() > 0:
            deviation = token - token.mean()
            kurtosis = deviation.pow(4).mean() / deviation.pow(2).mean() ** 2
            excesses.append(max(float(kurtosis) - 3, 0))
    return {
        "neuron_kurtosis": float(mean_squares.square().mean() / mean_squares.mean() ** 2),
        "elementwise_kurtosis": float(entries.pow(4).mean() / entries.pow(2).mean() ** 2),
        "token_excess_kurtosis": math.fsum(excesses) / len(excesses),
        "max_median_ratio": math.fsum(map(float, ratios)) / len(ratios),
        "max_abs": float(x.abs().max()),
        "rms": float(x.square().mean().sqrt()),
        "feature_correlation_rms": float(off_diagonal(features).square().mean().sqrt()),
        "token_correlation_mean": float(off_diagonal(tokens).mean()),
        "token_correlation_rms": float(off_diagonal(tokens).square().mean().sqrt()),
        "participation_ratio": float(eigenvalues.sum() ** 2 / eigenvalues.square().sum()),
        "effective_rank": float(torch.exp(-(shares * shares.log()).sum())),
    }


def attention_entropy(weights: Tensor) -> float:
    total, rows = 0.0, weights.reshape(-1, weights.shape[-1]).tolist()
    for row in rows:
        total -= math.fsum(a * math.log(a) for a in row if a > 0)
    return total / len(rows)


def sink_rate(weights: Tensor, threshold: float) -> float:
    heads = [weights[:, h, :, 0].mean() > threshold for h in range(weights.shape[1])]
    return sum(map(bool, heads)) / len(heads)
