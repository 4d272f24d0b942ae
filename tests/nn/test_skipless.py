"""Norm-free blocks at their start: what their signals do through depth, and what they are made of."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gramian.nn.blocks import BLOCKS, Block
from gramian.nn.init import initialise_
from gramian.nn.parts import Parts
from gramian.nn.residual import Residual
from gramian.nn.skipless import (
    decaying,
    e_spa,
    e_spa_attention_skip,
    e_spa_mlp_skip,
    e_spa_skips,
    orthogonal_attention,
    plain_skipless,
    u_spa,
    uniform,
    v_skipinit,
)
from gramian.nn.tailored import TailoredLeakyReLU

PARTS = Parts(width=64, heads=4, depth=36, layer=0, mlp_width=128)
NORM_FREE = (v_skipinit, u_spa, e_spa, e_spa_attention_skip, e_spa_mlp_skip, e_spa_skips)
both = pytest.mark.parametrize("causal", [True, False])


def orthogonal_tokens(tokens: int, width: int) -> Tensor:
    """Tokens with Σ_0 = I: (1, tokens, width)."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(width, tokens, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.T[None] * width**0.5


def cosine(x: Tensor) -> float:
    """The mean cosine of different tokens."""
    unit = x[0] / x[0].norm(dim=-1, keepdim=True)
    tokens = len(unit)
    return (((unit @ unit.T).sum() - tokens) / (tokens * (tokens - 1))).item()


def through_depth(build: Block, parts: Parts, x: Tensor) -> list[Tensor]:
    streams = []
    for layer in range(parts.depth):
        built = initialise_(build(replace(parts, layer=layer)).double(), layer)
        with torch.no_grad():
            x = built(x)
        streams.append(x)
    return streams


@both
@pytest.mark.parametrize("kind", [decaying, uniform])
def test_attentions_alone_reach_the_targets_exactly(kind, causal) -> None:
    """Orthogonal values and equal heads leave nothing to chance: Σ_l is the target in every layer."""

    def attention(parts: Parts) -> nn.Module:
        return orthogonal_attention(parts, kind(parts))

    tokens = 24
    streams = through_depth(attention, replace(PARTS, causal=causal), orthogonal_tokens(tokens, 64))
    apart = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs().double()
    amplitude = (1 - torch.tensor(-0.01, dtype=torch.float64).exp()).sqrt()
    for layer, stream in enumerate(streams, start=1):
        rate = -0.5 * torch.log1p(-(amplitude ** (2 * layer / 36)))
        rho = 1 - 0.2 ** (layer / 36)
        expected = (-rate * apart).exp() if kind is decaying else rho + (1 - rho) * (apart == 0).double()
        torch.testing.assert_close(stream[0] @ stream[0].T / 64, expected, rtol=0, atol=1e-9)


@both
def test_without_shaping_tokens_collapse_early(causal) -> None:
    x, parts = orthogonal_tokens(24, 64), replace(PARTS, causal=causal)
    shaped, plain = through_depth(e_spa, parts, x), through_depth(plain_skipless, parts, x)
    assert cosine(plain[5]) > 0.99 > 0.7 > cosine(shaped[5])
    assert 1 - cosine(plain[-1]) < 0.1 * (1 - cosine(shaped[-1]))
    for build in (v_skipinit, u_spa, e_spa_attention_skip, e_spa_mlp_skip, e_spa_skips):
        streams = through_depth(build, parts, x)
        assert cosine(streams[-1]) < 0.999
        assert 0.3 < streams[-1].square().mean().sqrt() < 8


@both
@pytest.mark.parametrize("build", NORM_FREE)
def test_no_norm_but_that_of_the_first_input(build, causal) -> None:
    for layer in (0, 3):
        built = build(replace(PARTS, layer=layer, causal=causal))
        norms = [m for m in built.modules() if "norm" in type(m).__name__.lower()]
        assert len(norms) == (layer == 0)
        assert all(not list(m.parameters()) for m in norms)
    assert BLOCKS[build.__name__] is build


@pytest.mark.parametrize("build", [u_spa, e_spa])
def test_keys_start_large_and_queries_at_zero(build) -> None:
    attention = initialise_(build(PARTS), 0)[1]
    queries, keys = attention.query_key.weight.split(64)
    assert (queries == 0).all()
    assert keys.std().item() == pytest.approx(64**-0.5, rel=0.1)
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    attention(x).square().sum().backward()
    assert attention.query_key.weight.grad[:64].abs().max() > 0  # zero queries learn
    free = initialise_(v_skipinit(PARTS), 0)[1]  # control: α = 1, β = 0 takes the place of zero queries
    assert (free.query_key.weight[:64] != 0).any()


def test_a_skip_keeps_the_mean_square_and_eases_the_activation() -> None:
    for build, places in ((e_spa_attention_skip, [1]), (e_spa_mlp_skip, [2]), (e_spa_skips, [1, 2])):
        built = build(PARTS)
        assert [i for i, part in enumerate(built) if isinstance(part, Residual)] == places
        for place in places:
            assert built[place].skip ** 2 + built[place].gain ** 2 == pytest.approx(1)
    slope = {build: activation_of(build(PARTS)).negative_slope for build in NORM_FREE}
    assert slope[e_spa] == slope[v_skipinit] == slope[e_spa_attention_skip] == pytest.approx(0.3511, abs=1e-4)
    assert slope[e_spa_mlp_skip] == slope[e_spa_skips] == 0
    assert activation_of(plain_skipless(PARTS)).negative_slope == 0


def activation_of(built: nn.Module) -> TailoredLeakyReLU:
    return next(m for m in built.modules() if isinstance(m, TailoredLeakyReLU))


def test_a_gated_mlp_starts_as_an_ungated_one() -> None:
    """Control inside: with a gate away from zero it does not."""
    gated = initialise_(e_spa(replace(PARTS, gated=True, mlp_width=256)).double(), 0)[2]
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    modulated, down = gated
    torch.testing.assert_close(gated(x), down(modulated.branch(x)), rtol=0, atol=0)
    assert down.in_features == 128
    modulated.gate.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    assert (gated(x) - down(modulated.branch(x))).abs().max() > 0.1
