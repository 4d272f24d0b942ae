"""Prescribed attention against the targets that it is to reach and against dense linear algebra."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from gramian.errors import InputError
from gramian.nn.prescribed import (
    CausalExponential,
    CausalUniform,
    Exponential,
    PrescribedMixing,
    Uniform,
    decay_rates,
    uniform_correlations,
)

KINDS = {
    "e-spa-causal": CausalExponential,
    "u-spa-causal": CausalUniform,
    "e-spa-masked": Exponential,
    "u-spa-masked": Uniform,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_causal = pytest.mark.parametrize("kind", ["e-spa-causal", "u-spa-causal"])


def schedule(kind: str, depth: int) -> list[float]:
    return decay_rates(depth) if kind.startswith("e-") else uniform_correlations(depth)


def mixing_of(kind: str, depth: int, layer: int) -> PrescribedMixing:
    values = schedule(kind, depth)
    return PrescribedMixing(KINDS[kind](values[layer], values[layer - 1]), kind.endswith("causal"))


def target(kind: str, value: float, tokens: int) -> Tensor:
    if kind.startswith("u-"):
        return torch.full((tokens, tokens), value, dtype=torch.float64).fill_diagonal_(1.0)
    if value == math.inf:
        return torch.eye(tokens, dtype=torch.float64)
    place = torch.arange(tokens, dtype=torch.float64)
    return torch.exp(-value * (place[:, None] - place).abs())


def root(kind: str, matrix: Tensor) -> Tensor:
    """The Cholesky factor or the symmetric root."""
    if kind.endswith("causal"):
        return torch.linalg.cholesky(matrix)
    return torch.from_numpy(sqrtm(matrix.numpy()).real)


def dense(kind: str, depth: int, layer: int, tokens: int) -> Tensor:
    """The layer's matrix by linear algebra."""
    values = schedule(kind, depth)
    after, before = (root(kind, target(kind, values[at], tokens)) for at in (layer, layer - 1))
    return torch.linalg.solve(before, after, left=False)


def drift(kind: str, depth: int, tokens: int, spoil: Any = lambda matrix: matrix) -> float:
    """The largest distance of Π_l Π_lᵀ from its target over the layers."""
    product, worst = torch.eye(tokens, dtype=torch.float64), 0.0
    for layer in range(1, depth + 1):
        product = spoil(mixing_of(kind, depth, layer).matrix(tokens)) @ product
        gap = product @ product.T - target(kind, schedule(kind, depth)[layer], tokens)
        worst = max(worst, gap.abs().max().item())
    return worst


@every_kind
@pytest.mark.parametrize(("depth", "tokens"), [(36, 256), (36, 65), (7, 30), (1, 5), (4, 1)])
def test_the_layers_reach_every_target(kind, depth, tokens) -> None:
    assert drift(kind, depth, tokens) < 1e-10


@every_kind
def test_without_the_row_sums_or_along_the_wrong_axis_they_do_not(kind) -> None:
    """Controls: A without D, and A divided by the row sums of its columns' tokens and multiplied back."""
    assert drift(kind, 12, 40, lambda a: a / a.sum(1, keepdim=True)) > 0.05
    wrong = drift(kind, 12, 40, lambda a: a / a.sum(1) * a.sum(1, keepdim=True))
    assert wrong > 0.01 or kind == "u-spa-masked"  # all its row sums are equal


def test_the_first_column_is_apart() -> None:
    """Control: pure decay, with one offset for all columns, misses the target by much."""

    def as_the_others(matrix: Tensor) -> Tensor:
        matrix = matrix.clone()
        matrix[2:, 0] = matrix[2:, 1] * matrix[3, 1] / matrix[2, 1]
        return matrix

    assert drift("e-spa-causal", 12, 40, as_the_others) > 0.01


@every_kind
@pytest.mark.parametrize(("depth", "layer"), [(36, 1), (36, 2), (36, 20), (36, 36), (5, 3)])
def test_a_layer_equals_dense_linear_algebra(kind, depth, layer) -> None:
    expected = dense(kind, depth, layer, 48)
    mixing = mixing_of(kind, depth, layer)
    got = mixing.matrix(48)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    other = mixing_of(kind, depth, layer - 1 if layer > 1 else 2).matrix(48)  # control
    assert (other - expected).abs().max() > 1e-6
    assert (got >= 0).all()
    assert (got.sum(1) >= 1 - 1e-12).all()
    if mixing.causal:
        assert (got.triu(1) == 0).all()


def test_diagonals_and_row_sums_of_the_deep_causal_network() -> None:
    matrices = [mixing_of("e-spa-causal", 36, layer).matrix(200) for layer in range(1, 37)]
    for matrix in matrices:
        assert matrix[0, 0].item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(
            matrix.diagonal()[1:], torch.full((199,), 0.93798, dtype=torch.float64), rtol=0, atol=1e-5
        )
    sums = torch.stack([matrix.sum(1) for matrix in matrices])
    assert sums.max().item() == pytest.approx(1.436, abs=1e-3)
    uniform = torch.stack([mixing_of("u-spa-causal", 36, layer).matrix(200).sum(1) for layer in range(1, 37)])
    assert uniform.max().item() == pytest.approx(3.24, abs=1e-2)
    lower = torch.stack([mixing_of("u-spa-causal", 36, layer).matrix(64) for layer in range(1, 37)])
    assert lower[lower > 0].min().item() == pytest.approx(4e-6, rel=0.2)
    assert (lower.tril()[:, torch.ones(64, 64).tril().bool()] > 0).all()


@every_causal
def test_a_causal_matrix_is_part_of_that_of_more_tokens(kind) -> None:
    mixing = mixing_of(kind, 12, 5)
    torch.testing.assert_close(mixing.matrix(90)[:40, :40], mixing.matrix(40), rtol=0, atol=1e-13)
    masked = mixing_of(kind.replace("causal", "masked"), 12, 5)  # control: an encoder's depends on the length
    assert (masked.matrix(90)[:40, :40] - masked.matrix(40)).abs().max() > 1e-4


def test_schedules() -> None:
    rates = decay_rates(36)
    assert (rates[0], rates[36]) == (math.inf, pytest.approx(0.005, rel=1e-12))
    assert rates[1] == pytest.approx(1.0593, abs=5e-5)
    amplitude = [math.sqrt(-math.expm1(-2 * rate)) for rate in rates]
    assert amplitude[36] == pytest.approx(0.0997505, abs=5e-8)
    assert [b / a for a, b in pairwise(amplitude)] == pytest.approx([0.93798] * 36, abs=1e-5)
    correlations = uniform_correlations(36)
    assert (correlations[0], correlations[36]) == (0, pytest.approx(0.8, rel=1e-12))
    kept = [(1 - b) / (1 - a) for a, b in pairwise(correlations)]
    assert kept == pytest.approx([0.2 ** (1 / 36)] * 36)
    deep = decay_rates(10_000, 1e-6)
    assert all(later < earlier for earlier, later in pairwise(deep))
    for function, words in ((decay_rates, "positive and finite"), (uniform_correlations, "between 0 and 1")):
        for wrong in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(InputError, match=words):
                function(4, wrong)
        with pytest.raises(InputError, match="at least 1, got 0"):
            function(0)


def heads_of(tokens: int, count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, tokens, 8, generator=generator, dtype=torch.float64).to(dtype)


@every_kind
def test_fused_attention_equals_the_matrix(kind) -> None:
    mixing, q, k, v = mixing_of(kind, 9, 4), heads_of(13, 4, 0), heads_of(13, 2, 1), heads_of(13, 2, 2)
    matrix = mixing.matrix(13)
    shared = v.repeat_interleave(2, 1)
    torch.testing.assert_close(mixing(0 * q, k, v), matrix @ shared, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixing.weights(0 * q, k), matrix.expand(2, 4, 13, 13), rtol=0, atol=1e-12)
    moved = matrix * (q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)).exp()
    moved = moved / moved.sum(-1, keepdim=True) * matrix.sum(1)[:, None]
    torch.testing.assert_close(mixing.weights(q, k), moved, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixing(q, k, v), moved @ shared, rtol=0, atol=1e-12)
    assert (moved - matrix).abs().max() > 0.01  # control: queries matter
    assert mixing.state_dict() == {}


@every_causal
def test_the_last_rows_after_a_cache(kind) -> None:
    mixing, k = mixing_of(kind, 9, 4), heads_of(11, 2, 1)
    whole = mixing.matrix(11)
    got = mixing.weights(0 * k[:, :, 8:], k)
    torch.testing.assert_close(got, whole[8:].expand(2, 2, 3, 11), rtol=0, atol=1e-12)
    torch.testing.assert_close(mixing(0 * k[:, :, 8:], k, k), whole[8:] @ k, rtol=0, atol=1e-12)
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, [0, 1, 4]] = False  # padding on the left and between: rows count real tokens
    got = mixing.weights(0 * k[:, :, 8:], k, real)
    torch.testing.assert_close(got[0, 0], whole[8:], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        got[1][:, :, real[1]], mixing.matrix(8)[5:].expand(2, 3, 8), rtol=0, atol=1e-12
    )
    assert (got[1][:, :, ~real[1]] == 0).all()
    assert (got[1][:, :, real[1]] - whole[8:, 3:]).abs().max() > 1e-4  # control: places are not columns


@pytest.mark.parametrize("kind", ["e-spa-masked", "u-spa-masked"])
def test_an_encoders_matrix_is_that_of_the_real_tokens(kind) -> None:
    mixing, k = mixing_of(kind, 9, 4), heads_of(9, 2, 1)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, [0, 3, 8]] = False
    got = mixing.weights(0 * k, k, real)
    torch.testing.assert_close(got[0, 0], mixing.matrix(9), rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1, 0][real[1]][:, real[1]], mixing.matrix(6), rtol=0, atol=1e-12)
    assert (got[1, 0][real[1]][:, ~real[1]] == 0).all()
    assert mixing(k, k, k, torch.zeros(2, 9, dtype=torch.bool)).isfinite().all()


@every_kind
@pytest.mark.parametrize("layer", [1, 2, 36])
def test_long_sequences_are_finite_in_low_precision(kind, layer) -> None:
    mixing, tokens = mixing_of(kind, 36, layer), 384 if kind == "e-spa-masked" else 2048
    bias, sums = mixing._prescribed(tokens, tokens, None, torch.device("cpu"))
    seen = torch.ones(tokens, tokens).tril().bool() if mixing.causal else torch.ones(tokens, tokens).bool()
    for dtype in (torch.float32, torch.bfloat16):
        assert bias.to(dtype)[0, 0][seen].isfinite().all()
        assert sums.to(dtype).isfinite().all()
    assert (sums >= 1 - 1e-12).all()
    v = torch.randn(1, 1, tokens, 4, generator=torch.Generator().manual_seed(0))
    low = mixing(torch.zeros_like(v).bfloat16(), v.bfloat16(), v)
    exact = (bias.softmax(-1) * sums) @ v.double()
    assert low.dtype == torch.bfloat16
    assert (low.double() - exact).norm() / exact.norm() < 0.02


def test_roots_are_kept_for_one_length_alone() -> None:
    mixing, v = mixing_of("e-spa-masked", 6, 3), heads_of(12, 2, 0)
    first = mixing(v, v, v)
    kept = mixing._kept
    assert torch.equal(mixing(v, v, v), first)
    assert mixing._kept is kept
    mixing(v[:, :, :7], v[:, :, :7], v[:, :, :7])
    assert mixing._kept[0][0] == 7
    torch.testing.assert_close(mixing(v, v, v), first, rtol=0, atol=0)
    causal = mixing_of("e-spa-causal", 6, 3)
    causal(v, v, v)
    assert causal._kept is None
