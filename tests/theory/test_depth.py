import math
from collections.abc import Iterator

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

from gramian.core.gram import Gram
from gramian.errors import InputError
from gramian.theory import depth, limits
from gramian.theory.duals import DUALS
from gramian.theory.maps import (
    Activation,
    BatchNorm,
    Convolution,
    Dense,
    Flatten,
    GlobalPool,
    Map,
    Mixing,
    Norm,
    Residual,
    Serial,
    Signal,
    signal,
)

ROOT2 = math.sqrt(2)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Depth without run-time checks of shapes, which cost more than a layer; shallow tests keep them."""
    monkeypatch.setattr(jaxtyping, "jaxtyped", lambda **_: lambda function: function)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(name: str = "relu", weight_std: float = ROOT2, bias_std: float = 0.0) -> Map:
    return Serial(Activation(DUALS[name]), Dense(weight_std, bias_std))


def blocks(gains: Tensor, branch: Map) -> list[Map]:
    return [Residual(branch, gain) for gain in gains.tolist()]


def single(variance: float = 1.0) -> Signal:
    q = torch.tensor([variance], dtype=torch.float64)
    return Signal(Gram(q[None], q, q))


# Traces and gradients


def test_trace_holds_the_signal_after_every_map() -> None:
    maps = [Dense(1.2, 0.3), Activation(DUALS["erf"]), Dense(0.7)]
    signals = depth.trace(maps, signal(rows(4, 3)))
    assert len(signals) == 4
    last = Serial(*maps)(signals[0])
    assert last.tangent is not None
    assert signals[-1].tangent is not None
    torch.testing.assert_close(signals[-1].tangent, last.tangent, rtol=1e-14, atol=0)


@pytest.mark.parametrize("rule", ["none", "uniform", "decreasing"])
def test_gradients_of_residual_relu_networks_grow_by_their_slopes(rule: str) -> None:
    gains = limits.RULES[rule].gains(50)
    got = depth.gradient_profile(blocks(gains, dense(bias_std=0.4)), signal(rows(5, 3)))
    behind = [math.prod((1 + gain**2) for gain in gains.tolist()[layer:]) for layer in range(51)]
    assert got.tolist() == pytest.approx(behind, rel=1e-10)
    if rule == "none":
        assert got[0] > 1e15
    else:
        assert got[0] < math.exp(3.39)  # control: what grows is the unscaled one alone


def test_gradients_of_saturating_networks_use_the_slope_at_each_variance() -> None:
    maps = blocks(limits.uniform(6), dense("erf", 1.5, 0.2))
    q, slopes = 0.7, []
    for gain in limits.uniform(6).tolist():
        slopes.append(1 + gain**2 * 1.5**2 * (4 / math.pi) / math.sqrt(1 + 4 * q))  # E[φ'²] of erf
        q += gain**2 * (1.5**2 * (2 / math.pi) * math.asin(2 * q / (1 + 2 * q)) + 0.04)
    expected = [math.prod(slopes[layer:]) for layer in range(7)]
    assert depth.gradient_profile(maps, single(0.7)).tolist() == pytest.approx(expected, rel=1e-10)
    at_start = [slopes[0] ** (6 - layer) for layer in range(7)]
    assert at_start != pytest.approx(expected, rel=1e-3)  # control: the slope does change with depth


@pytest.mark.parametrize("depths", [1200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_gradients_of_very_deep_networks(depths: int, unchecked: None) -> None:
    stable = depth.gradient_profile(blocks(limits.uniform(depths), dense()), single())
    assert stable[0].item() == pytest.approx(math.e, rel=2 / depths)
    maps = blocks(limits.UNSCALED.gains(depths), dense(bias_std=0.1))
    unscaled = depth.gradient_profile(maps, single())
    assert unscaled[0] == math.inf
    assert not unscaled.isnan().any()
    assert unscaled[-1000:].tolist() == pytest.approx([2.0**power for power in range(999, -1, -1)], rel=1e-9)
    logarithm = depth.log_gradient_profile(maps, single())[0].item()
    assert logarithm == pytest.approx(depths * math.log(2), rel=1e-12)
    assert not depth.trace(maps, single())[-1].activation.left.isfinite().all()  # the forward pass overflows


def test_logarithms_of_gradients_do_not_overflow(unchecked: None) -> None:
    maps = [Dense(10.0)] * 400
    got = depth.log_gradient_profile(maps, single(1e-300))
    assert got[0].item() == pytest.approx(400 * math.log(100), rel=1e-12)
    vanishing = depth.log_gradient_profile([Dense(0.01)] * 400, single())
    assert vanishing[0].item() == pytest.approx(-400 * math.log(10_000), rel=1e-12)
    assert depth.gradient_profile([Dense(0.01)] * 400, single())[0] == 0


def test_an_overflow_before_a_map_that_feels_the_scale_reads_as_infinite() -> None:
    grown = [Dense(10.0)] * 40  # 1e80, where the norm's slope is still known
    known = depth.log_gradient_profile([*grown, Norm(), Dense(1.0)], single())
    assert known.tolist() == pytest.approx([-math.log(100) * n for n in range(41)] + [0, 0], rel=1e-9)
    lost = depth.log_gradient_profile([*[Dense(10.0)] * 80, Norm(), Dense(1.0)], single())
    assert (lost[:-2] == math.inf).all()
    assert lost[-2:].tolist() == [0, 0]
    assert depth.gradient_profile([Dense(0.0), Dense(1.0)], single()).tolist() == [0, 1, 1]


def adjoint_by_basis(step: Map, before: Signal, gradient: Tensor) -> Tensor:
    """The adjoint from its definition: <G, J E_ij> for every unit tangent E_ij."""
    zero = torch.zeros_like(before.activation.cross)
    rest = step(before.with_tangent(zero)).tangent
    assert rest is not None
    back = torch.zeros_like(zero)
    for index in np.ndindex(*zero.shape):
        unit = zero.clone()
        unit[index] = 1
        moved = step(before.with_tangent(unit)).tangent
        assert moved is not None
        back[index] = (gradient * (moved - rest)).sum()
    return back


def profile_by_basis(maps: list[Map], state: Signal) -> list[float]:
    signals = depth.trace(maps, state)
    cross = signals[-1].activation.cross
    gradient = torch.eye(cross.shape[-1], dtype=cross.dtype).expand_as(cross)
    gradient = gradient / signals[-1].activation.left.numel()
    profile = [gradient.diagonal(dim1=-2, dim2=-1).sum().item()]
    for step, before in zip(reversed(maps), reversed(signals[:-1]), strict=True):
        gradient = adjoint_by_basis(step, before, gradient)
        profile.append(gradient.diagonal(dim1=-2, dim2=-1).sum().item())
    return profile[::-1]


def mixed(seed: int) -> Map:
    return Mixing(torch.softmax(2 * rows(3, 3, seed=seed), -1))


@pytest.mark.parametrize(
    ("maps", "positions"),
    [
        ([Dense(1.1, 0.3), Residual(Serial(mixed(1), Dense(1.3)), 0.5), Activation(DUALS["relu"])], "all"),
        ([Convolution((3,), 1.2, 0.1), dense(), Convolution((3,), 1.1, 0.0, "zeros")], "all"),
        ([Convolution((3,), 1.2, 0.1), dense(), Convolution((3,), 1.1, 0.0, "zeros")], "same"),
        ([Dense(1.1), dense(), GlobalPool(), Dense(0.9)], "all"),
        ([Dense(1.1), dense("erf"), Flatten(), Dense(0.9)], "same"),
        ([Dense(1.0), Norm(), dense(), BatchNorm(), Dense(1.5)], "none"),
    ],
)
def test_gradients_of_any_map_are_its_adjoint(maps: list[Map], positions: str) -> None:
    x = rows(2, 3, 4) if positions != "none" else rows(4, 5)
    state = signal(x, positions=positions)  # pyright: ignore[reportArgumentType]
    got = depth.gradient_profile(maps, state)
    assert got.tolist() == pytest.approx(profile_by_basis(maps, state), rel=1e-10)
    assert got[-1].item() == pytest.approx(1, rel=1e-14)


def test_gradients_through_attention_alone() -> None:
    """y_l = A_l y_{l−1} W_l: the second moment of the gradient over positions goes G <- Aᵀ G A."""
    matrices = [torch.softmax(2 * rows(3, 3, seed=seed), -1) for seed in range(3)]
    got = depth.gradient_profile([Mixing(a) for a in matrices], signal(rows(2, 3, 4), positions="all"))
    product = torch.eye(3, dtype=torch.float64)
    expected = [1.0]
    for a in reversed(matrices):
        product = product @ a
        expected.append(product.square().sum().item() / 3)
    assert got.tolist() == pytest.approx(expected[::-1], rel=1e-12)
    forwards = product.mT.square().sum(-1)[0].item()
    assert got[0].item() != pytest.approx(forwards, rel=1e-3)  # control: not one row of the mixture


def test_pooling_gives_every_position_a_share() -> None:
    got = depth.gradient_profile([GlobalPool()], signal(rows(2, 5, 4), positions="all"))
    assert got.tolist() == pytest.approx([1 / 5, 1], rel=1e-12)


def test_gradients_of_batch_normalised_residual_networks() -> None:
    """κ = 1/(1 − 1/π) per unit of variance for independent inputs: polynomial growth, not exponential."""
    branch = Serial(Activation(DUALS["relu"]), Dense(1.0), BatchNorm())
    batch = signal(torch.eye(128, dtype=torch.float64) * math.sqrt(128))
    got = depth.gradient_profile(blocks(limits.UNSCALED.gains(10), branch), batch)[0].item()
    predicted = math.prod(1 + 1.467 / q for q in range(1, 11))
    assert got == pytest.approx(predicted, rel=0.1)
    assert predicted == pytest.approx(26.7, abs=0.1)
    assert got < 2**10 / 10  # control: without normalisation it doubles per block


def test_measured_gradients_follow_the_profile() -> None:
    """96 sampled networks of width 128, gradients by autograd against the prediction."""
    width, layers, networks = 128, 12, 96
    generator = torch.Generator().manual_seed(3)
    for gain, wrong in ((layers**-0.5, 1.0), (1.0, layers**-0.5)):
        x = torch.randn(networks, 1, width, generator=generator, dtype=torch.float64)
        stream = [x.requires_grad_()]
        for _ in range(layers):
            weight = torch.randn(networks, width, width, generator=generator, dtype=torch.float64)
            stream.append(stream[-1] + gain * stream[-1].relu() @ weight * math.sqrt(2 / width))
        outer = torch.randn(networks, 1, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
        gradients = torch.autograd.grad(stream[-1], stream, outer)
        measured = torch.stack([g.square().sum(-1).mean() for g in gradients])
        predicted = depth.gradient_profile(blocks(torch.full((layers,), gain), dense()), single())
        torch.testing.assert_close(measured, predicted, rtol=0.1, atol=0)
        control = depth.gradient_profile(blocks(torch.full((layers,), wrong), dense()), single())
        assert not torch.allclose(measured, control, rtol=0.5)


def test_a_profile_needs_one_set_of_inputs() -> None:
    with pytest.raises(InputError, match="one set of inputs"):
        depth.gradient_profile([Dense(1.0)], signal(rows(3, 4), rows(2, 4)))
    with pytest.raises(InputError, match="one set of inputs"):
        depth.gradient_profile([Dense(1.0)], signal(rows(3, 4), rows(3, 4, seed=1)))


# Fixed points


def plain(name: str, weight_std: float, bias_std: float, q: float, c: float, layers: int) -> list[Signal]:
    k = c * q
    variances = torch.tensor([q, q], dtype=torch.float64)
    kernel = torch.tensor([[q, k], [k, q]], dtype=torch.float64)
    return depth.trace(
        [dense(name, weight_std, bias_std)] * layers, Signal(Gram(kernel, variances, variances))
    )


@pytest.mark.parametrize(
    ("name", "weight_std", "bias_std", "phase"),
    [
        ("tanh", 1.1, 0.4, "ordered"),
        ("tanh", 2.0, 0.4, "chaotic"),
        ("erf", 1.8, 0.3, "chaotic"),
        ("relu", 1.1, 0.5, "ordered"),
        ("gelu", 1.2, 0.5, "ordered"),
        ("sin", 1.6, 0.2, "chaotic"),
    ],
)
def test_fixed_points_are_where_deep_networks_go(
    name: str, weight_std: float, bias_std: float, phase: str, unchecked: None
) -> None:
    point = depth.fixed_point(DUALS[name], weight_std, bias_std)
    signals = plain(name, weight_std, bias_std, 1.0, 0.2, 200)
    last = signals[-1].activation
    assert point.variance == pytest.approx(last.left[0].item(), rel=1e-9)
    assert point.correlation == pytest.approx((last.cross[0, 1] / last.left[0]).item(), abs=1e-6)
    assert point.phase == phase
    assert (point.correlation == 1) == (phase == "ordered")
    assert abs(point.variance_slope) < 1
    assert point.correlation_slope < 1
    assert (point.gradient_slope > 1) == (phase == "chaotic")


@pytest.mark.parametrize(("name", "weight_std", "bias_std"), [("tanh", 1.2, 0.3), ("erf", 2.0, 0.3)])
def test_depth_scales_are_the_decay_seen_along_depth(name: str, weight_std: float, bias_std: float) -> None:
    point = depth.fixed_point(DUALS[name], weight_std, bias_std)
    signals = plain(name, weight_std, bias_std, 1.2 * point.variance, 0.9, 40)
    gaps = [abs(s.activation.left[0].item() - point.variance) for s in signals]
    assert math.log(gaps[9] / gaps[10]) == pytest.approx(1 / point.variance_depth, rel=1e-2)
    # with the variance at rest, the correlation has a rate of its own
    signals = plain(name, weight_std, bias_std, point.variance, 0.9, 40)
    angles = [abs(s.activation.cross[0, 1].item() / point.variance - point.correlation) for s in signals]
    assert math.log(angles[25] / angles[26]) == pytest.approx(1 / point.correlation_depth, rel=1e-2)
    assert 1 / point.variance_depth != pytest.approx(1 / point.correlation_depth, rel=0.05)  # control


def test_gradients_at_a_fixed_point_change_by_its_slope() -> None:
    point = depth.fixed_point(DUALS["tanh"], 1.5, 0.3)
    got = depth.gradient_profile([dense("tanh", 1.5, 0.3)] * 20, single(point.variance))
    assert got[0].item() == pytest.approx(point.gradient_slope**20, rel=1e-8)
    assert point.gradient_depth == pytest.approx(1 / math.log(point.gradient_slope), rel=1e-12)


def test_closed_forms_of_fixed_points() -> None:
    relu = depth.fixed_point(DUALS["relu"], 1.0, 0.5)
    assert relu.variance == pytest.approx(0.25 / 0.5, rel=1e-12)
    assert (relu.correlation, relu.gradient_slope) == (1, pytest.approx(0.5, rel=1e-12))
    assert relu.variance_depth == pytest.approx(1 / math.log(2), rel=1e-9)
    he = depth.fixed_point(DUALS["relu"], ROOT2, start=3.0)
    assert (he.variance, he.phase, he.gradient_depth) == (pytest.approx(3, rel=1e-9), "edge", math.inf)
    dying = depth.fixed_point(DUALS["relu"], 1.0)
    assert (dying.variance, dying.correlation) == (0, 1)
    assert dying.gradient_slope == pytest.approx(0.5)
    vanishing = depth.fixed_point(DUALS["erf"], 0.5)
    assert vanishing.variance == 0
    assert vanishing.gradient_slope == pytest.approx(0.25 * 4 / math.pi, rel=1e-12)
    far = depth.fixed_point(DUALS["relu"], math.sqrt(2 - 2e-6), 1.0)
    assert far.variance == pytest.approx(1e6, rel=1e-8)


@pytest.mark.parametrize(("weight_std", "bias_std"), [(ROOT2, 0.1), (2.0, 0.0), (ROOT2, 1e-3), (1.5, 1.0)])
def test_a_variance_without_bound_has_no_fixed_point(weight_std: float, bias_std: float) -> None:
    with pytest.raises(InputError, match="without bound"):
        depth.fixed_point(DUALS["relu"], weight_std, bias_std)


def test_edges_of_chaos_that_are_known() -> None:
    assert depth.edge_of_chaos(DUALS["relu"]) == pytest.approx(ROOT2, rel=1e-12)
    assert depth.edge_of_chaos(DUALS["tanh"]) == pytest.approx(1, rel=1e-10)
    assert depth.edge_of_chaos(DUALS["erf"]) == pytest.approx(math.sqrt(math.pi) / 2, rel=1e-10)
    slope = 0.01
    assert depth.edge_of_chaos(DUALS["leaky_relu"]) == pytest.approx(math.sqrt(2 / (1 + slope**2)), rel=1e-10)
    assert depth.edge_of_chaos(DUALS["tanh"], math.sqrt(0.05)) ** 2 == pytest.approx(1.76, abs=0.005)


@pytest.mark.parametrize("name", ["tanh", "erf", "sin"])
def test_at_the_edge_the_slope_is_one(name: str) -> None:
    weight_std = depth.edge_of_chaos(DUALS[name], 0.3)
    low, at, high = (depth.fixed_point(DUALS[name], w * weight_std, 0.3) for w in (0.98, 1.0, 1.02))
    assert (low.phase, high.phase) == ("ordered", "chaotic")
    assert at.gradient_slope == pytest.approx(1, abs=1e-8)
    assert at.correlation == pytest.approx(1, abs=1e-3)
    assert abs(at.variance_slope) < 1


@pytest.mark.parametrize("bias_std", [0.0, 0.3])
@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_edges_where_the_variance_runs_away_are_refused(name: str, bias_std: float) -> None:
    with pytest.raises(InputError, match="not stable"):
        depth.edge_of_chaos(DUALS[name], bias_std)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "abs", "identity", "softplus"])
def test_homogeneous_activations_have_no_edge_with_a_bias(name: str) -> None:
    with pytest.raises(InputError, match=r"no edge of chaos with bias_std 0\.3"):
        depth.edge_of_chaos(DUALS[name], 0.3)


def test_bad_deviations_are_named() -> None:
    for weight_std, bias_std, start in (
        (0.0, 0.0, 1.0),
        (1.0, -1.0, 1.0),
        (math.nan, 0.0, 1.0),
        (1.0, 0.0, 0.0),
    ):
        with pytest.raises(InputError, match="weight_std > 0"):
            depth.fixed_point(DUALS["tanh"], weight_std, bias_std, start)
    with pytest.raises(InputError, match="bias_std of at least 0"):
        depth.edge_of_chaos(DUALS["tanh"], -0.1)
