import math
from collections.abc import Iterator

import jaxtyping
import numpy as np
import pytest
import torch
from scipy import integrate, optimize
from torch import Tensor

from gramian.core.gram import Gram
from gramian.errors import InputError
from gramian.theory import limits
from gramian.theory.duals import DUALS
from gramian.theory.maps import Activation, Convolution, Dense, Map, Residual, Serial, Signal, signal

ROOT2 = math.sqrt(2)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Depth without run-time checks of shapes, which cost more than a layer; shallow tests keep them."""
    monkeypatch.setattr(jaxtyping, "jaxtyped", lambda **_: lambda function: function)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def dense(name: str = "relu", weight_std: float = ROOT2, bias_std: float = 0.0) -> Map:
    return Serial(Activation(DUALS[name]), Dense(weight_std, bias_std))


def start(kernel: Tensor | list[list[float]]) -> Signal:
    """The signal behind a first dense layer: Θ_0 = Q_0."""
    kernel = torch.as_tensor(kernel, dtype=torch.float64)
    norms = kernel.diagonal(dim1=-2, dim2=-1)
    return Signal(Gram(kernel, norms, norms), kernel)


def pair(c: float, q: float = 1.0, q2: float = 1.0) -> Signal:
    k = c * math.sqrt(q * q2)
    return start([[q, k], [k, q2]])


def fold(branch: Map, gains: Tensor, state: Signal) -> Signal:
    for gain in gains.tolist():
        state = Residual(branch, gain)(state)
    return state


def correlation(state: Signal) -> float:
    g = state.activation
    return (g.cross[0, 1] / (g.left[0] * g.left[1]).sqrt()).item()


def tangent_correlation(state: Signal) -> float:
    assert state.tangent is not None
    norms = state.tangent.diagonal()
    return (state.tangent[0, 1] / (norms[0] * norms[1]).sqrt()).item()


def relu_by_hand(c0: float, gains: list[float], s: float = 1.0) -> tuple[float, float, float]:
    """The recursion of a ReLU network without bias, q_0 = 1, in its angle: Q, Θ off the diagonal and q."""
    q, k, theta = 1.0, c0, c0
    for gain in gains:
        angle = math.acos(max(-1.0, min(1.0, k / q)))
        value = s * q * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / math.pi
        slope = s * (math.pi - angle) / math.pi
        theta += gain**2 * (value + slope * theta)
        k, q = k + gain**2 * value, q * (1 + gain**2 * s)
    return k, theta, q


# Rules


def test_gains_follow_their_formulas_and_their_time() -> None:
    for depth in (1, 7, 100):
        torch.testing.assert_close(limits.uniform(depth).square().sum().item(), 1.0)
    decreasing = [1 / (math.sqrt(layer) * math.log(layer + 1)) for layer in range(1, 51)]
    assert limits.decreasing(50).tolist() == pytest.approx(decreasing, rel=1e-14)
    assert limits.UNSCALED.gains(4).tolist() == [1, 1, 1, 1]
    assert limits.UNSCALED.time == limits.power(0.25).time == math.inf
    assert limits.power(1.0).time == pytest.approx(math.pi**2 / 6, rel=1e-14)
    times = limits.partial_times([0.5, 2.0])
    assert times.tolist() == [0, 0.25, 4.25]
    for bad in (limits.uniform, limits.decreasing, limits.power(1.0).gains, limits.profile(torch.sin).gains):
        with pytest.raises(InputError, match="at least 1, got 0"):
            bad(0)


def test_decreasing_gains_last_a_time_of_3_38774() -> None:
    """Oracle: 200 000 terms, the tail's integral by scipy and half of the first term left out."""
    last = 200_000
    m = np.arange(2, last, dtype=np.float64)
    head = math.fsum((1 / ((m - 1) * np.log(m) ** 2)).tolist())
    tail, _ = integrate.quad(lambda v: 1 / (1 - math.exp(-1 / v)), 0, 1 / math.log(last), epsabs=1e-14)
    half = 0.5 / ((last - 1) * math.log(last) ** 2)
    assert limits.DECREASING.time == pytest.approx(head + tail + half, abs=1e-11)
    assert limits.DECREASING.time == pytest.approx(3.38774, abs=5e-6)
    short = limits.partial_times(limits.decreasing(10_000))[-1].item()
    assert (limits.DECREASING.time - short) * math.log(10_000) == pytest.approx(1, abs=0.05)  # trap: 1/ln L


def test_growth_is_bounded_for_stable_rules_alone() -> None:
    def total(rule: limits.Rule, depth: int) -> float:
        return limits.log_growth(rule.gains(depth), 1.0)[-1].item()

    assert total(limits.UNSCALED, 10_000) == pytest.approx(
        10_000 * math.log(2), rel=1e-12
    )  # e^6931: no overflow
    assert total(limits.UNIFORM, 10_000) == pytest.approx(1, abs=1e-4)
    assert total(limits.DECREASING, 10_000) < limits.DECREASING.time
    quarter = [total(limits.power(0.25), depth) for depth in (100, 1000, 10_000)]
    assert quarter[2] > 2 * quarter[1] > 4 * quarter[0]  # control: Σ λ² diverges, so does the growth
    profile = limits.log_growth([0.5, 1.0], 2.0)
    assert profile.exp().tolist() == pytest.approx([1, 1.5, 4.5], rel=1e-14)
    with pytest.raises(InputError, match="at least 0, got -1"):
        limits.log_growth([1.0], -1.0)


# The uniform limit


@pytest.mark.parametrize(
    ("c0", "c1"),
    [
        (-0.9, -0.2563503442),
        (0.0, 0.2538591013),
        (0.3, 0.4516895302),
        (0.9, 0.9088950465),
        (0.99, 0.9902936249),
    ],
)
def test_uniform_limit_of_correlations(c0: float, c1: float, unchecked: None) -> None:
    assert correlation(limits.infinite_depth(limits.UNIFORM, dense(), pair(c0))) == pytest.approx(
        c1, abs=1e-10
    )


@pytest.mark.parametrize(("c0", "s"), [(0.3, 1.0), (-0.5, 0.5), (0.95, 3.0)])
def test_uniform_limit_against_its_quadrature(c0: float, s: float, unchecked: None) -> None:
    """σ_b = 0: θ_1 solves ∫ from θ_1 to θ_0 of dθ/(1 − θ cot θ) = s/π."""
    angle = math.acos(c0)

    def excess(end: float) -> float:
        area, _ = integrate.quad(lambda t: 1 / (1 - t / math.tan(t)), end, angle, epsabs=1e-13, epsrel=1e-13)
        return area - s / math.pi

    expected = math.cos(optimize.brentq(excess, 0.05 * angle, angle, xtol=1e-14))
    got = limits.flow(dense(weight_std=math.sqrt(2 * s)), pair(c0))
    assert correlation(got) == pytest.approx(expected, abs=1e-9)
    assert got.activation.left[0].item() == pytest.approx(math.exp(s), rel=1e-9)
    shorter = limits.flow(dense(weight_std=math.sqrt(2 * s)), pair(c0), time=0.9)
    assert correlation(shorter) != pytest.approx(expected, abs=1e-4)  # control: the time counts


def test_uniform_limit_of_the_tangent(unchecked: None) -> None:
    got = limits.infinite_depth(limits.UNIFORM, dense(), pair(0.3))
    assert got.tangent is not None
    assert got.activation.left.tolist() == pytest.approx([math.e, math.e], rel=1e-10)
    assert got.tangent[0, 1].item() == pytest.approx(1.7782686631, abs=1e-9)
    assert (got.tangent.diagonal() / got.activation.left).tolist() == pytest.approx([2, 2], rel=1e-10)
    assert tangent_correlation(got) == pytest.approx(0.3270942410, abs=1e-10)


def test_uniform_limit_with_bias_and_unequal_norms(unchecked: None) -> None:
    bias = 0.3
    got = limits.infinite_depth(limits.UNIFORM, dense(bias_std=math.sqrt(bias)), pair(0.3, 1.0, 2.0))
    assert got.tangent is not None
    assert got.activation.left.tolist() == pytest.approx([3.2337663770, 5.9520482055], abs=1e-9)
    assert correlation(got) == pytest.approx(0.5099279894, abs=1e-9)
    assert got.tangent[0, 0].item() == pytest.approx(6.2520482055, abs=1e-9)
    q0 = torch.tensor([1.0, 2.0], dtype=torch.float64)  # closed forms, s = t = 1
    torch.testing.assert_close(got.activation.left, (q0 + bias) * math.e - bias, rtol=1e-10, atol=0)
    torch.testing.assert_close(got.tangent.diagonal(), math.e * (2 * q0 + bias), rtol=1e-10, atol=0)
    assert correlation(limits.flow(dense(), pair(0.3, 1.0, 2.0))) == pytest.approx(0.4516895302, abs=1e-9)


def test_small_angles_shrink_as_their_expansion_says(unchecked: None) -> None:
    angle = math.acos(0.999)
    predicted = math.cos(angle / (1 + angle / (3 * math.pi)))
    assert correlation(limits.flow(dense(), pair(0.999))) == pytest.approx(predicted, abs=1e-7)


def test_deep_uniform_networks_approach_the_limit_as_one_over_depth(unchecked: None) -> None:
    limit = correlation(limits.infinite_depth(limits.UNIFORM, dense(), pair(0.3)))
    depths, golden = (10, 100, 1000), (0.44216129, 0.45067710, 0.45158765)
    errors = []
    for depth, expected in zip(depths, golden, strict=True):
        got = fold(dense(), limits.uniform(depth), pair(0.3))
        k, theta, q = relu_by_hand(0.3, limits.uniform(depth).tolist())
        assert got.tangent is not None
        assert correlation(got) == pytest.approx(expected, abs=5e-9)
        assert got.activation.cross[0, 1].item() == pytest.approx(k, rel=1e-12)
        assert got.activation.left[0].item() == pytest.approx(q, rel=1e-12)
        assert got.tangent[0, 1].item() == pytest.approx(theta, rel=1e-12)
        errors.append(abs(correlation(got) - limit))
    slope = np.polyfit(np.log(depths), np.log(errors), 1)[0]
    assert -1.1 <= slope <= -0.9
    wrong = np.polyfit(np.log(depths), np.log([abs(e + 0.01) for e in errors]), 1)[0]
    assert wrong > -0.5  # control: against another limit there is no such rate


@pytest.mark.slow
def test_ten_thousand_uniform_blocks(unchecked: None) -> None:
    got = fold(dense(), limits.uniform(10_000), pair(0.3))
    assert correlation(got) == pytest.approx(0.45167934, abs=5e-9)
    assert tangent_correlation(got) == pytest.approx(0.32709400, abs=5e-9)


@pytest.mark.parametrize("name", ["erf", "gelu", "tanh"])
def test_other_activations_with_bias_approach_their_limit(name: str, unchecked: None) -> None:
    branch, state = dense(name, 1.3, 0.4), pair(0.3, 1.0, 2.0)
    limit = limits.infinite_depth(limits.UNIFORM, branch, state)
    assert limit.tangent is not None
    errors = []
    for depth in (25, 50, 100):
        got = fold(branch, limits.uniform(depth), state)
        assert got.tangent is not None
        differences = got.activation.cross - limit.activation.cross, got.tangent - limit.tangent
        errors.append([difference.norm().item() for difference in differences])
    slopes = np.polyfit(np.log([25, 50, 100]), np.log(errors), 1)[0]
    assert np.all((slopes >= -1.1) & (slopes <= -0.9))


# Other rules


def test_decreasing_limit_and_the_way_there(unchecked: None) -> None:
    depths, golden = (10, 100, 1000), (0.512600, 0.532977, 0.539969)
    for depth, expected in zip(depths, golden, strict=True):
        got = fold(dense(), limits.decreasing(depth), pair(0.3))
        assert correlation(got) == pytest.approx(expected, abs=1e-6)
    limit = limits.infinite_depth(limits.DECREASING, dense(), pair(0.3))
    assert limit.tangent is not None
    assert correlation(limit) == pytest.approx(0.553547, abs=1e-6)
    assert limit.activation.left[0].item() == pytest.approx(10.39788, abs=2e-5)
    assert tangent_correlation(limit) == pytest.approx(0.337446, abs=1e-6)
    assert (limit.tangent[0, 0] / limit.activation.left[0]).item() == pytest.approx(2.81727, abs=1e-5)
    early = limits.infinite_depth(limits.DECREASING, dense(), pair(0.3), layers=200)
    assert correlation(early) == pytest.approx(correlation(limit), abs=2e-6)
    flowed = limits.flow(dense(), pair(0.3), limits.DECREASING.time)
    assert correlation(flowed) != pytest.approx(
        correlation(limit), abs=1e-3
    )  # control: the head is not small


def test_only_the_time_of_a_profile_is_felt(unchecked: None) -> None:
    rising = limits.profile(lambda u: 2 * u)
    assert rising.time == pytest.approx(4 / 3, abs=1e-8)
    limit = correlation(limits.infinite_depth(rising, dense(), pair(0.3)))
    mirrored = limits.profile(lambda u: 2 * (1 - u))
    assert correlation(limits.infinite_depth(mirrored, dense(), pair(0.3))) == pytest.approx(limit, abs=1e-8)
    depths = (20, 40, 80, 160)
    errors = [abs(correlation(fold(dense(), rising.gains(n), pair(0.3))) - limit) for n in depths]
    assert -1.1 <= np.polyfit(np.log(depths), np.log(errors), 1)[0] <= -0.9
    other = limits.infinite_depth(limits.profile(lambda u: u), dense(), pair(0.3))
    assert correlation(other) != pytest.approx(limit, abs=1e-2)  # control: another time, another limit


@pytest.mark.parametrize(
    ("depth", "closing", "tangent"),
    [(10, None, 0.3404), (100, 0.700, 0.2844), (1000, 0.956, 0.2550), (10_000, 0.9948, 0.2506)],
)
def test_unscaled_kernels_collapse_to_a_constant_and_a_nugget(
    depth: int, closing: float | None, tangent: float, unchecked: None
) -> None:
    got, scale = limits.rescaled(dense(), limits.UNSCALED.gains(depth), pair(0.3))
    assert got.tangent is not None
    assert scale == pytest.approx(depth * math.log(2), rel=1e-12)
    assert tangent_correlation(got) == pytest.approx(tangent, abs=6e-5)
    ratio = got.tangent[0, 0] / got.activation.left[0]
    assert ratio.item() == pytest.approx(1 + depth / 2, rel=1e-9)
    if closing is not None:  # 1 − c ~ 9π²/(2a²l²), a = s/(1 + s)
        gap = 1 - correlation(got)
        assert gap * depth**2 * 2 * 0.25 / (9 * math.pi**2) == pytest.approx(closing, abs=6e-4)


def test_rescaling_changes_no_ratio_and_plain_folding_overflows(unchecked: None) -> None:
    gains = limits.UNSCALED.gains(60)
    plain = fold(dense(), gains, pair(0.3, 1.0, 2.0))
    got, scale = limits.rescaled(dense(), gains, pair(0.3, 1.0, 2.0))
    assert plain.tangent is not None
    assert got.tangent is not None
    assert got.activation.right.max().item() == pytest.approx(1, rel=1e-14)
    torch.testing.assert_close(
        got.activation.cross * math.exp(scale), plain.activation.cross, rtol=1e-10, atol=0
    )
    torch.testing.assert_close(got.tangent * math.exp(scale), plain.tangent, rtol=1e-10, atol=0)
    deep = fold(dense(), limits.UNSCALED.gains(1200), pair(0.3))
    assert not deep.activation.left.isfinite().any()  # control: 2^1200


@pytest.mark.parametrize("branch", [dense(bias_std=0.01), dense("tanh"), dense("gelu")])
def test_rescaling_refuses_what_is_not_homogeneous(branch: Map) -> None:
    with pytest.raises(InputError, match="without bias"):
        limits.rescaled(branch, [1.0], pair(0.3))


# Flows in general


def test_shapes_are_checked_along_a_short_flow() -> None:
    got = limits.flow(dense(), pair(0.3), tolerance=1e-5)
    assert correlation(got) == pytest.approx(0.4516895302, abs=1e-5)
    assert correlation(got) != pytest.approx(0.4516895302, abs=1e-10)  # control: the tolerance is used


def test_flow_of_a_convolutional_branch_is_the_limit_of_its_networks(unchecked: None) -> None:
    x = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    branch = Serial(Activation(DUALS["relu"]), Convolution((3,), 1.3, 0.2))
    state = Convolution((3,), 1.2)(signal(x, positions="same"))
    limit = limits.flow(branch, state)
    assert limit.tangent is not None
    assert limit.space == (6,)
    errors = []
    for depth in (20, 40, 80):
        got = fold(branch, limits.uniform(depth), state)
        assert got.tangent is not None
        errors.append((got.tangent - limit.tangent).norm().item())
    assert -1.1 <= np.polyfit(np.log([20, 40, 80]), np.log(errors), 1)[0] <= -0.9


def test_flow_of_two_sets_of_inputs_is_a_block_of_the_flow_of_both(unchecked: None) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (3, 4))
    whole = limits.flow(dense(bias_std=0.3), signal(torch.cat([x, y])))
    part = limits.flow(dense(bias_std=0.3), signal(x, y))
    assert whole.tangent is not None
    assert part.tangent is not None
    torch.testing.assert_close(part.activation.cross, whole.activation.cross[:3, 3:], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(part.activation.right, whole.activation.left[3:], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(part.tangent, whole.tangent[:3, 3:], rtol=1e-9, atol=1e-10)
    alone = limits.flow(dense(bias_std=0.3), signal(x, y, tangent=False))
    assert alone.tangent is None
    torch.testing.assert_close(alone.activation.cross, part.activation.cross, rtol=1e-9, atol=1e-10)


def test_laws_of_the_limit(unchecked: None) -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    first = Dense(1.0)

    def limit(x: Tensor) -> Signal:
        return limits.flow(dense(), first(signal(x)))

    got = limit(x)
    assert got.tangent is not None
    for kernel in (got.activation.cross, got.tangent, got.tangent - got.activation.cross):
        assert torch.linalg.eigvalsh(kernel)[0] > 0
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    torch.testing.assert_close(limit(x[order]).tangent, got.tangent[order][:, order], rtol=1e-9, atol=1e-12)
    stretch = torch.tensor([1.0, 2, 3, 0.5, 1, 7], dtype=torch.float64)
    scaled = limit(x * stretch[:, None])
    torch.testing.assert_close(scaled.tangent, got.tangent * stretch.outer(stretch), rtol=1e-7, atol=1e-9)
    assert limits.flow(dense(), got, time=0.0).activation.cross.equal(got.activation.cross)
    biased = limits.flow(dense(bias_std=0.5), first(signal(x * stretch[:, None]))).activation.cross
    unscaled = limits.flow(dense(bias_std=0.5), first(signal(x))).activation.cross
    assert not torch.allclose(
        biased, unscaled * stretch.outer(stretch), rtol=1e-2
    )  # control: a bias spoils it


def test_flow_of_a_batch_of_grams(unchecked: None) -> None:
    kernels = torch.stack([pair(0.3).activation.cross, pair(-0.4, 1.0, 3.0).activation.cross])
    batch = limits.flow(dense(bias_std=0.2), start(kernels))
    assert batch.tangent is not None
    for kernel, got in zip(kernels, batch.tangent, strict=True):
        torch.testing.assert_close(
            got, limits.flow(dense(bias_std=0.2), start(kernel)).tangent, rtol=1e-9, atol=0
        )


def test_flow_in_single_precision_settles(unchecked: None) -> None:
    state = pair(0.3)
    assert state.tangent is not None
    single = start(state.activation.cross)
    single = Signal(
        Gram(
            single.activation.cross.float(), single.activation.left.float(), single.activation.right.float()
        ),
        state.tangent.float(),
    )
    got = limits.flow(dense(), single)
    assert got.activation.cross.dtype == torch.float32
    assert correlation(got) == pytest.approx(0.4516895302, abs=2e-6)


def test_bad_input_is_named(unchecked: None) -> None:
    for time in (-1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="finite time"):
            limits.flow(dense(), pair(0.3), time)
    with pytest.raises(InputError, match="no finite sum"):
        limits.infinite_depth(limits.UNSCALED, dense(), pair(0.3))
    with pytest.raises(InputError, match="overflows before time 2000"):
        limits.flow(dense(), pair(0.3), 2000.0)
    with pytest.raises(InputError, match="positive, finite variance"):
        limits.rescaled(dense(), [1.0], start([[0.0, 0.0], [0.0, 0.0]]))
