"""Residual networks: the obvious loop as oracle, and the laws of their growth at the start."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from gramian.errors import InputError
from gramian.nn.residual import Residual
from gramian.nn.resnet import (
    DEFAULT_STD,
    HE_STD,
    RULES,
    Transition,
    cifar_resnet,
    conv_resnet,
    dense_resnet,
    gains,
    initialise_by_fan_in_,
    profile,
)


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def growth(rule: str, depth: int, slope: float = 1.0) -> float:
    """Π(1 + λ² s), by logarithms."""
    return sum(math.log1p(gain * gain * slope) for gain in gains(rule, depth))


def test_gains_by_hand() -> None:
    assert gains("none", 3) == [1, 1, 1]
    assert gains("uniform", 4) == [0.5] * 4
    expected = [1 / math.log(2), 1 / (2**0.5 * math.log(3)), 1 / (3**0.5 * math.log(4))]
    assert gains("decreasing", 3) == pytest.approx(expected)
    assert gains("decreasing", 9)[:3] == gains("decreasing", 3)  # needs no depth
    sums = {rule: sum(gain**2 for gain in gains(rule, 5000)) for rule in RULES}
    assert sums["none"] == 5000
    assert sums["uniform"] == pytest.approx(1)
    assert 3.2 < sums["decreasing"] < 3.38774
    with pytest.raises(InputError, match="choose none, uniform, decreasing"):
        gains("fixup", 3)
    with pytest.raises(InputError, match="at least one block"):
        gains("none", 0)


def test_a_dense_network_is_the_obvious_loop() -> None:
    lambdas = [0.5, 2.0, 0.25]
    model = dense_resnet(3, 5, 2, nn.Tanh, lambdas, bias_std=0.3, seed=4)
    x = normal(7, 3)
    parameters = list(model.parameters())
    (w0, b0), *layers, (w, b) = zip(parameters[::2], parameters[1::2], strict=True)
    y = x @ w0.T + b0
    for gain, (weight, bias) in zip(lambdas, layers, strict=True):
        y = y + gain * (torch.tanh(y) @ weight.T + bias)
    torch.testing.assert_close(model(x), y @ w.T + b)
    assert (model(x) - dense_resnet(3, 5, 2, nn.Tanh, [0.5] * 3, bias_std=0.3, seed=4)(x)).abs().max() > 1e-2


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("padding", ["circular", "zeros"])
def test_a_convolutional_network_is_the_obvious_loop(dimensions: int, padding: str) -> None:
    lambdas = [0.5, 2.0]
    model = conv_resnet(
        2, 3, 4, nn.ReLU, lambdas, dimensions=dimensions, padding=padding, bias_std=0.3, seed=1
    )
    x = normal(2, 2, *(5, 4)[:dimensions])

    def convolved(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight, bias = layer.parameters()
        total = torch.zeros(len(x), len(weight), *x.shape[2:])
        size = x.shape[2:]
        for place in torch.cartesian_prod(*map(torch.arange, size)).view(-1, dimensions).tolist():
            for tap in torch.cartesian_prod(*[torch.arange(3)] * dimensions).view(-1, dimensions).tolist():
                seen = [p + t - 1 for p, t in zip(place, tap, strict=True)]
                if padding == "zeros" and any(not 0 <= s < n for s, n in zip(seen, size, strict=True)):
                    continue
                seen = [s % n for s, n in zip(seen, size, strict=True)]
                total[(..., *place)] += x[(..., *seen)] @ weight[(..., *tap)].T
        return total + bias.view(-1, *[1] * dimensions)

    y = convolved(model.stem, x)
    for gain, block in zip(lambdas, model.blocks, strict=True):
        y = y + gain * convolved(block.branch[1], y.clamp(min=0))
    pooled = y.flatten(2).mean(2)
    torch.testing.assert_close(model(x), model.readout[2](pooled))


def test_an_image_network_is_the_obvious_loop() -> None:
    lambdas = [0.5, 2.0, 0.25, 0.75, 1.5, 0.1]
    model = cifar_resnet(2, (2, 3, 4), 5, lambdas, channels=1, seed=3)
    weights = iter(list(model.parameters()))
    x = normal(2, 1, 8, 8)
    convolve = nn.functional.conv2d
    y = convolve(x, next(weights), padding=1).clamp(min=0)
    for index, gain in enumerate(lambdas):
        stride = 2 if index in (2, 4) else 1
        skip = convolve(y, next(weights), stride=stride) if stride == 2 else y
        inside = convolve(y, next(weights), padding=1, stride=stride).clamp(min=0)
        y = (skip + gain * convolve(inside, next(weights), padding=1)).clamp(min=0)
        assert y.shape[1:] == [(2, 8, 8), (3, 4, 4), (4, 2, 2)][index // 2]
    w, b = weights
    torch.testing.assert_close(model(x), y.mean((2, 3)) @ w.T + b)


@pytest.mark.parametrize(("depth", "blocks"), [(32, 15), (50, 24), (104, 51)])
def test_depth_and_parts_of_image_networks(depth: int, blocks: int) -> None:
    per_stage = (depth - 2) // 6
    for norm, layers in ((None, 0), (nn.BatchNorm2d, depth + 1)):  # a norm behind each convolution
        model = cifar_resnet(per_stage, (2, 3, 4), 10, gains("uniform", blocks), norm=norm)
        assert len(model.blocks) == blocks
        kinds = [type(module) for module in model.modules()]
        assert kinds.count(nn.Conv2d) == depth - 1 + 2  # two shortcuts
        assert kinds.count(nn.BatchNorm2d) == layers
        assert kinds.count(Transition) == 2
        inner = [module.gain for module in model.modules() if isinstance(module, (Residual, Transition))]
        assert inner == gains("uniform", blocks)


@pytest.mark.parametrize("std", [HE_STD, DEFAULT_STD])
def test_weights_start_with_the_variance_that_is_said(std: float) -> None:
    model = nn.Sequential(nn.Linear(80, 90), nn.Conv1d(20, 90, 5), nn.Conv2d(10, 90, 3))
    initialise_by_fan_in_(model, 0, std, bias_std=0.7)
    for layer in model:
        fan_in = layer.weight[0].numel()
        assert layer.weight.var().item() * fan_in == pytest.approx(std**2, rel=0.06)
        assert layer.bias.std().item() == pytest.approx(0.7, rel=0.25)
    default = nn.Linear(80, 90).weight.var().item() * 80
    assert default == pytest.approx(DEFAULT_STD**2, rel=0.06)  # what PyTorch draws, for comparison


def test_weights_are_a_function_of_the_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = dense_resnet(3, 8, 1, nn.ReLU, [1.0, 1.0], seed=seed)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    torch.manual_seed(0)
    first = weights(5)
    torch.manual_seed(1)
    assert torch.equal(first, weights(5))
    assert not torch.equal(first, weights(6))


def averaged(rule: str, depth: int, width: int, seeds: int, norm=None) -> tuple[float, float, float]:
    """Mean logarithm of forward and backward growth, and the last cosine, over seeds."""
    found = []
    for seed in range(seeds):
        x = normal(32 if norm is None else 128, 16, seed=seed)
        model = dense_resnet(16, width, 1, nn.ReLU, gains(rule, depth), norm=norm, seed=seed)
        seen = profile(model, x, seed)
        forward, backward = seen.forward[-1] / seen.forward[0], seen.backward[0] / seen.backward[-1]
        found.append([forward.log().item(), backward.log().item(), seen.cosine[-1].item()])
    return tuple(torch.tensor(found).mean(0).tolist())


@pytest.mark.parametrize("rule", RULES)
def test_growth_is_the_product_of_the_theory(rule: str) -> None:
    forward, backward, _ = averaged(rule, 16, width=256, seeds=4)
    expected = growth(rule, 16)
    assert forward == pytest.approx(expected, abs=0.25)
    assert backward == pytest.approx(expected, abs=0.25)
    for other in set(RULES) - {rule}:  # control: the rules are told apart
        assert abs(forward - growth(other, 16)) > 0.5


def test_at_512_blocks_stable_rules_are_bounded_and_the_unscaled_one_explodes() -> None:
    for rule in ("uniform", "decreasing"):
        forward, backward, cosine = averaged(rule, 512, width=64, seeds=1)
        assert forward == pytest.approx(growth(rule, 512), abs=0.6)
        assert backward == pytest.approx(growth(rule, 512), abs=0.6)
        assert cosine < 0.65
    forward, backward, cosine = averaged("none", 512, width=64, seeds=1)
    per_block = math.log(2)
    assert forward / 512 == pytest.approx(per_block, rel=0.08)
    assert backward / 512 == pytest.approx(per_block, rel=0.08)
    assert cosine > 0.99


def test_gains_whose_squares_do_not_sum_are_seen_to_grow() -> None:
    lambdas = [l**-0.25 for l in range(1, 129)]  # noqa: E741
    x = normal(32, 16)
    seen = profile(dense_resnet(16, 128, 1, nn.ReLU, lambdas), x)
    grown = (seen.forward[[16, 32, 64, 128]] / seen.forward[0]).log()
    assert all(later > earlier + 1 for earlier, later in pairwise(grown.tolist()))


def test_with_batch_norm_growth_is_polynomial() -> None:
    """Π(1 + λ² κ / q_{l−1}), κ = 1/(1 − 1/π): L^κ, since q grows by λ² a block."""
    kappa = 1 / (1 - 1 / math.pi)
    measured = {}
    for depth in (10, 40, 160):
        expected, q = 0.0, 2.0  # weights of variance 2/fan_in and inputs of variance 1
        for gain in gains("none", depth):
            expected += math.log1p(gain**2 * kappa / q)
            q += gain**2
        forward, measured[depth], _ = averaged("none", depth, width=128, seeds=2, norm=nn.BatchNorm1d)
        assert measured[depth] == pytest.approx(expected, abs=0.25)
        assert forward == pytest.approx(math.log(q / 2), abs=0.15)
    slope = (measured[160] - measured[40]) / math.log(4)
    assert slope == pytest.approx(kappa, abs=0.2)
    assert measured[160] < 0.1 * growth("none", 160)  # control: without the norm it is exponential


def test_circular_convolutions_grow_as_linear_layers_do() -> None:
    x = normal(16, 3, 6, 6)
    build = partial(conv_resnet, 3, 96, 1, nn.ReLU, gains("uniform", 24))
    seen = profile(build(padding="circular"), x)
    assert (seen.forward[-1] / seen.forward[0]).log().item() == pytest.approx(growth("uniform", 24), abs=0.2)
    assert (seen.backward[0] / seen.backward[-1]).log().item() == pytest.approx(1, abs=0.2)
    border = profile(build(padding="zeros"), x)  # terms are missing at the border
    assert (border.forward[-1] / border.forward[0]).log() < (seen.forward[-1] / seen.forward[0]).log() - 0.1


def test_pytorchs_own_weights_hide_the_explosion() -> None:
    x = normal(8, 1, 8, 8).abs()

    def grown(std: float) -> float:
        model = cifar_resnet(8, (8, 8, 8), 10, gains("none", 24), channels=1, weight_std=std)
        seen = profile(model, x)
        return (seen.backward[0] / seen.backward[-1]).log().item()

    assert grown(HE_STD) > 8
    assert grown(DEFAULT_STD) < 2


def test_a_profile_is_what_finite_differences_and_pairs_say() -> None:
    model = dense_resnet(4, 6, 1, nn.Tanh, [0.5, 1.0], seed=2)
    x = normal(3, 4, seed=9)
    seen = profile(model, x, seed=7)
    y = [model.stem(x)]
    y += [model.blocks[0](y[0])]
    y += [model.blocks[1](y[1])]
    u = torch.randn(3, 6, generator=torch.Generator().manual_seed(7))
    step, gradient = 1e-6, torch.zeros(3, 6)
    for place in range(6):
        moved = y[0].clone()
        moved[:, place] += step
        gradient[:, place] = ((model.blocks(moved) - y[2]) * u).sum(1) / step
    assert seen.backward[0].item() == pytest.approx(gradient.square().sum(1).mean().item(), rel=1e-4)
    assert seen.backward[2].item() == pytest.approx(u.square().sum(1).mean().item())
    for stream, forward, cosine in zip(y, seen.forward, seen.cosine, strict=True):
        assert forward.item() == pytest.approx(stream.square().mean().item())
        pairs = [torch.cosine_similarity(stream[i], stream[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert cosine.item() == pytest.approx(sum(pairs).item() / 3)
    with pytest.raises(InputError, match="two inputs"):
        profile(model, x[:1])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: dense_resnet(0, 4, 1, nn.ReLU, [1.0]), "inputs must be at least 1, got 0"),
        (lambda: dense_resnet(2, 4, 1, nn.ReLU, []), "at least one block"),
        (lambda: dense_resnet(2, 4, 1, nn.ReLU, [1.0], weight_std=-1.0), "weight_std"),
        (lambda: dense_resnet(2, 4, 1, nn.ReLU, [1.0], bias_std=math.nan), "bias_std"),
        (lambda: conv_resnet(2, 4, 1, nn.ReLU, [1.0], kernel=2), "odd"),
        (lambda: conv_resnet(2, 4, 1, nn.ReLU, [1.0], dimensions=3), "1 or 2 dimensions"),
        (lambda: conv_resnet(2, 4, 1, nn.ReLU, [1.0], padding="same"), "circular or zeros"),
        (lambda: cifar_resnet(2, (2, 3, 4), 5, [1.0]), "3 stages of 2 blocks need 6 gains, got 1"),
        (lambda: cifar_resnet(2, (), 5, [1.0]), "widths must be at least 1"),
    ],
)
def test_bad_settings_are_named(build, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build()
