"""Every block against its equation written out slowly, with all parameters away from their start."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import block_oracles
from gramian.nn.blocks import BLOCKS, Parts
from gramian.nn.norms import NORMS

PARTS = Parts(width=12, heads=3, depth=4, layer=0, mlp_width=20)


GROUPED = Parts(width=12, heads=6, depth=4, layer=1, mlp_width=20, key_heads=2, gated=True)


def random_block(name: str, parts: Parts) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    built = BLOCKS[name](parts).double()
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return built


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "none"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_its_equation(name, layer, norm, causal) -> None:
    equals_its_equation(name, replace(PARTS, layer=layer, norm=NORMS[norm], causal=causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_grouped_queries_and_a_gated_mlp(name, causal) -> None:
    equals_its_equation(name, replace(GROUPED, causal=causal))


def equals_its_equation(name: str, parts: Parts) -> None:
    built = random_block(name, parts)
    x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = built(ours)
    expected = torch.stack([block_oracles.block(name, built, sequence) for sequence in theirs])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (got * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_the_oracle_tells_blocks_apart() -> None:
    """Control: the equation without the attention's skip does not fit pre_norm."""
    built: Any = random_block("pre_norm", PARTS)
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    built[0].skip = 0.0
    without_skip = block_oracles.block("pre_norm", built, x)
    built[0].skip = 1.0
    assert (built(x[None])[0] - without_skip).abs().max() > 0.1
