import math
from itertools import product

import pytest
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.theory.duals import dual
from gramian.theory.maps import (
    Activation,
    AveragePool,
    BatchNorm,
    Convolution,
    Dense,
    Flatten,
    Gated,
    GlobalPool,
    Map,
    Mixing,
    Norm,
    Residual,
    Scale,
    Serial,
    Signal,
    Sum,
    combined,
    pairwise,
    signal,
)

RELU, GELU = Activation(dual("relu")), Activation(dual("gelu"))


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixing(tokens: int, seed: int = 3) -> Mixing:
    return Mixing(draws(tokens, tokens, seed=seed).softmax(-1))


def arc_cosine(k: float, a: float, b: float) -> tuple[float, float]:
    """E[relu relu] and E[relu' relu'] by the angle, in plain numbers."""
    c = max(-1.0, min(1.0, k / math.sqrt(a * b)))
    angle = math.acos(c)
    slope = (math.pi - angle) / (2 * math.pi)
    return math.sqrt(a * b) * (math.sqrt(1 - c * c) + (math.pi - angle) * c) / (2 * math.pi), slope


def arc_sine(k: float, a: float, b: float) -> tuple[float, float]:
    """E[erf erf] and E[erf' erf']."""
    size = (1 + 2 * a) * (1 + 2 * b)
    return 2 / math.pi * math.asin(2 * k / math.sqrt(size)), 4 / math.pi / math.sqrt(size - 4 * k * k)


def by_hand(x: Tensor, y: Tensor, gains: list[float], weight: float, bias: float, expected) -> list[float]:
    """A residual network dense-(φ-dense)*-φ-dense on one pair of inputs, recursions written out."""
    triple = [weight**2 * float(u @ v) / len(x) + bias**2 for u, v in ((x, y), (x, x), (y, y))]  # k, a, b
    theta = triple[0]
    for gain in gains:
        k, a, b = triple
        value, slope = expected(k, a, b)
        branch = weight**2 * value + bias**2
        theta += gain**2 * (branch + weight**2 * slope * theta)
        triple = [
            old + gain**2 * (weight**2 * expected(*pair)[0] + bias**2)
            for old, pair in zip(triple, ((k, a, b), (a, a, a), (b, b, b)), strict=True)
        ]
    value, slope = expected(*triple)
    out = weight**2 * value + bias**2
    return [out, out + weight**2 * slope * theta]


@pytest.mark.parametrize(("name", "expected"), [("relu", arc_cosine), ("erf", arc_sine)])
def test_residual_network_equals_the_double_loop(name, expected):
    x, y, gains = draws(4, 6), draws(3, 6, seed=1), [0.3, 1.0, 0.7]
    dense, activation = Dense(1.3, 0.2), Activation(dual(name))
    blocks = [Residual(Serial(activation, dense), gain) for gain in gains]
    out = Serial(dense, *blocks, activation, dense)(signal(x, y))
    for i, j in product(range(4), range(3)):
        nngp, ntk = by_hand(x[i], y[j], gains, 1.3, 0.2, expected)
        assert out.activation.cross[i, j].item() == pytest.approx(nngp, rel=1e-11)
        assert out.tangent[i, j].item() == pytest.approx(ntk, rel=1e-11)
    wrong = by_hand(x[0], y[0], [0.3, 0.7, 1.0], 1.3, 0.2, expected)  # control: the order of gains counts
    assert abs(out.tangent[0, 0].item() - wrong[1]) > 1e-4


def test_skip_and_gain_of_a_linear_residual_network_are_geometric():
    x = draws(5, 4)
    out = Serial(*[Residual(Dense(0.8), gain=0.5, skip=0.9)] * 7)(signal(x))
    growth = 0.9**2 + 0.5**2 * 0.8**2
    torch.testing.assert_close(out.activation.cross, growth**7 * (x @ x.T) / 4)
    per_block = 7 * 0.5**2 * 0.8**2 * growth**6  # each block's parameters give one such term
    torch.testing.assert_close(out.tangent, per_block * (x @ x.T) / 4)


def test_sum_of_branches_is_the_residual_block():
    start = signal(draws(4, 5), draws(3, 5, seed=1))
    branch = Serial(RELU, Dense(1.1, 0.3))
    block = Residual(branch, gain=0.6, skip=0.8)(start)
    parts = Sum(Scale(0.8), Serial(branch, Scale(0.6)))(start)
    assert_same(block, parts, 1e-13)
    assert not torch.allclose(block.tangent, Sum(Serial(), branch)(start).tangent)  # control: gains count


def test_gated_unit_by_its_definition():
    start = Dense(1.2, 0.4)(signal(draws(3, 5), draws(4, 5, seed=1)))
    g, theta = start.activation, start.tangent
    out = Gated(dual("gelu"))(start)
    left, right = g.left[:, None], g.right[None, :]
    values, slopes = dual("gelu").both(g.cross, left, right)
    torch.testing.assert_close(out.activation.cross, values * g.cross)
    torch.testing.assert_close(out.tangent, slopes * theta * g.cross + values * theta)
    torch.testing.assert_close(out.activation.left, dual("gelu").variance(g.left) * g.left)
    generator = torch.Generator().manual_seed(0)  # sampled pairs of the first two inputs
    covariance = torch.tensor([[g.left[0], g.cross[0, 0]], [g.cross[0, 0], g.right[0]]])
    root = torch.linalg.cholesky(covariance)
    u, v = (torch.randn(400_000, 2, generator=generator, dtype=torch.float64) @ root.T for _ in range(2))
    gated = torch.nn.functional.gelu(u) * v
    assert gated.prod(1).mean().item() == pytest.approx(out.activation.cross[0, 0].item(), abs=0.02)


def networks() -> list[tuple[str, Map]]:
    """Name of the layout and a network for it; together they hold every map."""
    dense, convolution = Dense(1.2, 0.3), Convolution((3, 2), 1.1, 0.2, "zeros", 2)
    return [
        ("none", Serial(dense, RELU, Norm(0.1), dense, Gated(dual("erf")), Scale(0.7))),
        ("none", Serial(dense, BatchNorm(), GELU, Residual(Serial(RELU, dense), 0.4), Sum(dense, GELU))),
        ("same", Serial(convolution, GELU, dense, Norm(), RELU, Flatten(), dense)),
        ("all", Serial(Convolution((3, 3), 1.1), GELU, AveragePool((2, 1)), dense, Flatten(), RELU)),
        ("all", Serial(convolution, RELU, Norm(), Residual(Serial(GELU, dense)), GlobalPool(), dense)),
    ]


def start(positions: str, **options) -> Signal:
    x = draws(5, 4) if positions == "none" else draws(3, 4, 6, 2)
    return signal(x, positions=positions, **options)


@pytest.mark.parametrize(("positions", "network"), networks())
def test_every_map_is_affine_in_the_tangent(positions, network):
    """network(K, Θ).tangent = J Θ + own, and the moments do not see Θ."""
    first = start(positions)
    one, two = draws(*first.tangent.shape, seed=1), draws(*first.tangent.shape, seed=2)
    at = {
        key: network(first.with_tangent(t))
        for key, t in {"0": 0 * one, "1": one, "2": two, "sum": 2 * one - 3 * two}.items()
    }
    own = at["0"].tangent
    combination = 2 * (at["1"].tangent - own) - 3 * (at["2"].tangent - own)
    torch.testing.assert_close(at["sum"].tangent - own, combination, rtol=1e-11, atol=1e-11)
    assert (at["1"].tangent - own).abs().max() > 1e-3  # J is not zero
    torch.testing.assert_close(at["1"].activation.cross, at["0"].activation.cross, rtol=0, atol=0)
    bent = at["1"].tangent.square() - own.square()  # control: a square is not affine
    assert not torch.allclose(at["sum"].tangent.square() - own.square(), 2 * bent, rtol=1e-3)


@pytest.mark.parametrize(("positions", "network"), networks())
def test_second_moments_alone_are_the_same(positions, network):
    alone, both = network(start(positions, tangent=False)), network(start(positions))
    assert alone.tangent is None
    torch.testing.assert_close(alone.activation.cross, both.activation.cross, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(alone.activation.left, both.activation.left, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("positions", "network"), networks())
def test_laws_of_both_kernels(positions, network):
    """K, Θ and Θ − K of a network that ends in its own weights are positive; K's diagonal is the variance."""
    out = Serial(network, Dense(1.0, 0.1))(start(positions))
    moments, tangent = out.activation.cross, out.tangent
    torch.testing.assert_close(moments.diagonal(), out.activation.left, rtol=1e-10, atol=1e-12)
    for kernel in (moments, tangent, tangent - moments):
        torch.testing.assert_close(kernel, kernel.mT, rtol=1e-10, atol=1e-12)
        assert torch.linalg.eigvalsh(kernel).min() > -1e-10
    assert torch.linalg.eigvalsh(moments - tangent).min() < -1e-6  # control: not the other way round


@pytest.mark.parametrize(("positions", "network"), networks())
def test_precision_is_kept(positions, network):
    single, double = network(start(positions, dtype=torch.float32)), network(start(positions))
    for mine, exact in ((single.activation.cross, double.activation.cross), (single.tangent, double.tangent)):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("positions", "network"), [networks()[0], networks()[2], networks()[4]])
def test_gradients_of_both_kernels(positions, network):
    x = draws(2, 3) if positions == "none" else draws(2, 3, 4, 1)

    def outcome(x: Tensor) -> tuple[Tensor, Tensor]:
        out = network(signal(x, x.flip(0) + 0.5, positions=positions))
        return out.activation.cross, out.tangent

    assert torch.autograd.gradcheck(outcome, (x.requires_grad_(),), atol=1e-6)


def test_batches_of_grams_are_independent():
    x, network = draws(3, 4, 5), networks()[0][1]
    batched = network(signal(x))
    for index in range(3):
        single = network(signal(x[index]))
        torch.testing.assert_close(batched.activation.cross[index], single.activation.cross)
        torch.testing.assert_close(batched.tangent[index], single.tangent)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "abs", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exploding_network_ends_in_infinity(name, dtype):
    network = Serial(*[Residual(Serial(Activation(dual(name)), Dense(1e4, 0.1)))] * 50)
    out = network(signal(draws(3, 8), dtype=dtype))
    assert out.activation.cross.isposinf().all()
    assert out.activation.left.isposinf().all()
    assert out.tangent.isposinf().all()
    shallow = Serial(*network.maps[:3])(signal(draws(3, 8), dtype=dtype))  # control
    assert shallow.tangent.isfinite().all()


@pytest.mark.slow
def test_an_unscaled_network_of_3000_blocks_ends_in_infinity():
    network = Serial(*[Residual(Serial(RELU, Dense(math.sqrt(2))))] * 3000)
    out = network(signal(draws(2, 8)))
    assert out.activation.cross.isposinf().all()
    assert out.tangent.isposinf().all()


def test_tiles_are_told_by_the_maps():
    assert pairwise(Serial(Dense(1.0), Residual(Sum(RELU, Norm())), Flatten(), GlobalPool(), mixing(2)))
    assert not pairwise(Serial(Dense(1.0), Residual(Sum(RELU, BatchNorm()))))
    assert not pairwise(lambda state: state)


def test_bad_input_is_named():
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="deviation"):
            Dense(bad)
        with pytest.raises(InputError, match="deviation"):
            Convolution((3,), 1.0, bad)
    with pytest.raises(InputError, match="padding"):
        Convolution((3,), 1.0, padding="mirror")
    with pytest.raises(InputError, match="positive"):
        Convolution((0,), 1.0)
    with pytest.raises(InputError, match="positive"):
        Convolution((3,), 1.0, stride=0)
    with pytest.raises(InputError, match="branch"):
        Sum()
    with pytest.raises(InputError, match="same positions"):
        Residual(Convolution((3, 3), 1.0, stride=2))(signal(draws(2, 4, 4, 1), positions="all"))


def assert_same(a: Signal, b: Signal, tolerance: float) -> None:
    for mine, other in (
        (a.activation.cross, b.activation.cross),
        (a.activation.left, b.activation.left),
        (a.activation.right, b.activation.right),
        (a.tangent, b.tangent),
    ):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_combined_signals_keep_the_sides():
    rectangle = signal(draws(3, 4, 1), draws(2, 4, 1, seed=1), positions="all")
    total = combined((2.0, rectangle), (1.0, rectangle))
    torch.testing.assert_close(total.activation.cross, 5 * rectangle.activation.cross)
    assert total.within is not None
    torch.testing.assert_close(total.within[1], 5 * rectangle.within[1])
    assert not total.symmetric
    square = signal(draws(3, 4))
    assert combined((1.0, square), (0.5, square)).symmetric
