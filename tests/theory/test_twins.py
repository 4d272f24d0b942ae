"""Modules and their limits: what is read, what is refused, and that wide modules do what the limit says."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.core.gram import gram
from gramian.errors import InputError
from gramian.nn.attention import Attention
from gramian.nn.blocks import BLOCKS, Parts
from gramian.nn.init import fan_in_std, initialise_
from gramian.nn.mixing import SoftmaxMixing
from gramian.nn.norms import NORMS
from gramian.nn.residual import Chain, Residual, Sum, through
from gramian.nn.resnet import cifar_resnet, conv_resnet, dense_resnet, gains
from gramian.theory.duals import DUALS
from gramian.theory.maps import (
    Activation,
    BatchNorm,
    Convolution,
    Dense,
    GlobalPool,
    Norm,
    Serial,
    signal,
)
from gramian.theory.maps import Residual as ResidualMap
from gramian.theory.twins import limit


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nominal(module: nn.Module) -> tuple[float, float]:
    return 1.3, 0.2


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one.activation.cross, other.activation.cross, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.tangent, other.tangent, rtol=1e-12, atol=1e-12)


def test_a_dense_network_is_the_fold_of_its_layers() -> None:
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    by_hand = Serial(Dense(1.3, 0.2), Activation(DUALS["relu"]), Dense(1.3, 0.2))
    start = signal(normal(5, 6))
    same(limit(layers, nominal)(start), by_hand(start))


def test_spreads_are_read_off_the_weights() -> None:
    layer = nn.Linear(50, 400)
    nn.init.normal_(layer.weight, std=1.7 / 50**0.5, generator=torch.Generator().manual_seed(0))
    nn.init.constant_(layer.bias, 0.3)
    read: Any = limit(layer)
    assert read.weight_std == pytest.approx(1.7, rel=0.02)
    assert read.bias_std == pytest.approx(0.3)


@pytest.mark.parametrize("rule", ["none", "uniform", "decreasing"])
def test_resnets_and_theory_come_from_one_definition(rule) -> None:
    scales = gains(rule, 3)
    block = Serial(Activation(DUALS["relu"]), Dense(1.3, 0.2))
    by_hand = [Dense(1.3, 0.2), *(ResidualMap(block, gain) for gain in scales), Dense(1.3, 0.2)]
    built = dense_resnet(6, 8, 2, nn.ReLU, scales, bias_std=0.2)
    start = signal(normal(4, 6))
    same(limit(built, nominal)(start), Serial(*by_hand)(start))
    convolution = Convolution((3, 3), 1.3, 0.2)
    block = Serial(Activation(DUALS["relu"]), convolution)
    trunk = [convolution, *(ResidualMap(block, gain) for gain in scales)]
    built = conv_resnet(2, 4, 3, nn.ReLU, scales, bias_std=0.2)
    start = signal(normal(3, 4, 4, 2), positions="all")
    same(limit(built, nominal)(start), Serial(*trunk, GlobalPool(), Dense(1.3, 0.2))(start))


def test_norms_and_batch_norms() -> None:
    start = signal(normal(5, 6))
    linear, relu = Dense(1.3, 0.2), Activation(DUALS["relu"])
    for module, norm in ((nn.LayerNorm(8), Norm()), (nn.BatchNorm1d(8), BatchNorm())):
        layers = nn.Sequential(nn.Linear(6, 8), module, nn.ReLU())
        same(limit(layers, nominal)(start), Serial(linear, norm, relu)(start))
    with pytest.raises(InputError, match=r"layer 1, a LayerNorm.*centred"):
        limit(nn.Sequential(nn.ReLU(), nn.LayerNorm(8)))


WIDTH, TOKENS = 256, 6
PARTS = Parts(width=WIDTH, heads=4, depth=14, layer=2, mlp_width=2 * WIDTH)


@cache
def rotated(seed: int) -> Tensor:
    return torch.linalg.qr(normal(WIDTH, WIDTH, seed=seed)).Q


def wide_gram(name: str, parts: Parts, x: Tensor, networks: int) -> Tensor:
    """The tokens' Gram behind a block, averaged over networks whose input is rotated at random."""
    total = torch.zeros(TOKENS, TOKENS, dtype=x.dtype)
    for seed in range(networks):
        built = initialise_(BLOCKS[name](parts), seed, fan_in_std(parts.width)).double()
        rotation = rotated(seed)
        y = through(built, (x @ rotation)[None], None)[0].detach()
        total += gram(y).cross / WIDTH / networks
    return total


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_wide_blocks_do_what_their_limit_says(name, causal) -> None:
    parts = replace(PARTS, causal=causal)
    common = normal(1, WIDTH, seed=8)
    x = 0.7 * common + 0.7 * normal(TOKENS, WIDTH, seed=9)
    start = signal(x[None], positions="all")
    block = initialise_(BLOCKS[name](parts), 0, fan_in_std(WIDTH))
    predicted = limit(block)(start).activation.cross
    measured = wide_gram(name, parts, x, networks=8)
    scale = predicted.diagonal().mean()
    assert (measured - predicted).abs().max() / scale < 0.12
    away = limit(Chain(block, nn.Linear(WIDTH, WIDTH)))(start).activation.cross  # control
    assert (measured - away).abs().max() / scale > 0.2


def test_attention_of_several_heads_averages_over_them() -> None:
    """Heads with matrices of their own: here one head looks at itself, the other at all tokens alike."""

    class TwoKinds(SoftmaxMixing):
        def forward(self, q, k, v, real=None, total=None):
            mixed = super().forward(q, k, v, real, total)
            return torch.stack((v[:, 0], mixed[:, 1]), 1)

    attention = Attention(8, 2, TwoKinds(causal=False), value=nn.Identity(), projection=nn.Identity())
    start = signal(normal(1, 4, 8), positions="all")
    k = start.activation.cross
    uniform = torch.full((4, 4), 0.25, dtype=k.dtype)
    after = limit(attention)(start)
    torch.testing.assert_close(after.activation.cross, (k + uniform @ k @ uniform.T) / 2)
    with pytest.raises(InputError, match="along one axis"):
        limit(attention)(signal(normal(4, 8)))


class Unknown(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Unknown(), r"the module, a Unknown, .*supported are"),
        (nn.Sequential(nn.Linear(4, 4), Unknown()), "layer 1, a Unknown"),
        (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.ReLU())), r"layer 1\.1, a ReLU.*another"),
        (nn.Conv1d(2, 2, 4), "odd kernel"),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), "no groups"),
        (nn.Sequential(Residual(nn.ReLU())), "layer 0, a Residual.*end in a linear map"),
        (nn.Sequential(Residual(nn.Identity())), "layer 0, a Residual.*end in a linear map"),
        (Sum(nn.Identity(), nn.ReLU()), "all branches of a sum but one"),
        (nn.AvgPool2d(3, stride=2), "side by side"),
        (nn.AdaptiveAvgPool2d(2), "one position"),
        (cifar_resnet(1, (4, 8), 3, [1.0, 1.0]), r"layer blocks\.0\.0, a Residual|layer blocks\.0"),
    ],
)
def test_what_has_no_limit_is_named(module, words) -> None:
    with pytest.raises(InputError, match=words):
        limit(module)


def test_norms_that_have_moved_are_refused() -> None:
    norm = NORMS["layernorm"](4)
    nn.init.ones_(norm.get_parameter("bias"))
    with pytest.raises(InputError, match="bias has moved"):
        limit(nn.Sequential(nn.Linear(4, 4), norm))
