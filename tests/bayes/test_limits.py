"""Closed forms against members that are trained: each is solved for by least squares in its parameters."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gramian.bayes import limits
from gramian.bayes.limits import METHODS, Kernel, draw, predictive, trained
from gramian.errors import InputError
from reference import cases, load

F64 = torch.float64
NOISE = 0.05
TRAIN, TEST = 8, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@dataclass(frozen=True)
class Linear:
    """A network of fixed Jacobian J = (J^{≤L}, J^{L+1}) on all inputs, with f₀ = J^{L+1} θ₀^{L+1}."""

    jacobian: Tensor
    readout: int
    y: Tensor

    @property
    def inner(self) -> Tensor:
        """J with the columns of the last layer set to 0."""
        return torch.cat(
            (self.jacobian[:, : -self.readout], torch.zeros(len(self.jacobian), self.readout)), 1
        )

    @property
    def last(self) -> Tensor:
        return self.jacobian - self.inner

    @property
    def nngp(self) -> Kernel:
        return Kernel.of(self.last @ self.last.T, TRAIN)

    @property
    def ntk(self) -> Kernel:
        return Kernel.of(self.jacobian @ self.jacobian.T, TRAIN)

    @property
    def drift(self) -> Kernel:
        """V = Cov J^{≤L} θ₀^{≤L}."""
        return Kernel.of(self.inner @ self.inner.T, TRAIN)


def linear(features: int = 30, readout: int = 12) -> Linear:
    jacobian = normal(TRAIN + TEST, features) / features**0.5
    return Linear(jacobian, readout, normal(TRAIN, seed=1))


Offset = Callable[[Linear, Tensor, Tensor], Tensor]
OFFSETS: dict[str, tuple[Offset, str]] = {
    "deep_ensemble": (lambda net, start, other: torch.zeros_like(net.jacobian @ start), "none"),
    "rp_param": (lambda net, start, other: torch.zeros_like(net.jacobian @ start), "start"),
    "rp_fn": (lambda net, start, other: net.last @ other, "zero"),
    "rp_fn_exact": (lambda net, start, other: net.last @ other + net.inner @ start, "zero"),
    "ntkgp_param": (lambda net, start, other: net.inner @ other, "start"),
    "ntkgp_fn": (lambda net, start, other: (2**0.5 * net.inner + net.last) @ other, "zero"),
    "ntkgp_fn_exact": (lambda net, start, other: net.jacobian @ other + net.inner @ start, "zero"),
    "ntkgp_lin": (lambda net, start, other: torch.zeros_like(net.jacobian @ start), "linear"),
}
"""δ and anchor of every method; "linear" has the model J θ, start and anchor θ₀."""


def members(
    net: Linear, method: str, start: Tensor, other: Tensor, noise: Tensor, anchor: str = ""
) -> Tensor:
    """Predictions at the test inputs of members trained by least squares, one a column of θ₀, θ̃ and ε."""
    offset, known = OFFSETS[method]
    anchor = anchor or known
    delta = offset(net, start, other)
    model_at_zero = (0 if known == "linear" else net.last @ start - net.jacobian @ start) + delta
    target = net.y[:, None] + noise - model_at_zero[:TRAIN]
    rows = net.jacobian[:TRAIN]
    if anchor == "none":  # the solution nearest to the start
        step = torch.linalg.lstsq(rows, net.y[:, None] - model_at_zero[:TRAIN] - rows @ start, driver="gelsd")
        theta = start + step.solution
    else:
        pull = torch.zeros_like(start) if anchor == "zero" else start
        stacked = torch.cat((rows, NOISE**0.5 * torch.eye(rows.shape[1], dtype=F64)))
        theta = torch.linalg.lstsq(stacked, torch.cat((target, NOISE**0.5 * pull))).solution
    return (model_at_zero + net.jacobian @ theta)[TRAIN:]


def exact_law(net: Linear, method: str, anchor: str = "") -> tuple[Tensor, Tensor]:
    """Mean and covariance over members: prediction is affine in the draws, so unit draws give it all."""
    p = net.jacobian.shape[1]
    units = torch.eye(2 * p + TRAIN, dtype=F64)
    draws = torch.cat((torch.zeros(len(units), 1, dtype=F64), units), 1).split((p, p, TRAIN))
    found = members(net, method, draws[0], draws[1], NOISE**0.5 * draws[2], anchor)
    effects = found[:, 1:] - found[:, :1]
    return found[:, 0], effects @ effects.T


def law(net: Linear, method: str, jitter: float = 0.0) -> tuple[Tensor, Tensor]:
    return METHODS[method](net.nngp, net.ntk, net.y, NOISE, jitter)


def smallest(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[0])


@pytest.mark.parametrize(
    "method", ["deep_ensemble", "rp_param", "rp_fn_exact", "ntkgp_param", "ntkgp_fn_exact", "ntkgp_lin"]
)
def test_the_law_of_trained_members(method: str) -> None:
    net = linear()
    mean, covariance = law(net, method)
    expected_mean, expected = exact_law(net, method)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(covariance, expected, rtol=1e-9, atol=1e-11)
    others = {"deep_ensemble": "rp_param", "rp_param": "ntkgp_param", "rp_fn_exact": "ntkgp_param"}
    _, wrong = law(net, others.get(method, "rp_param"))
    assert not torch.allclose(covariance, wrong, rtol=1e-2)  # control: methods differ


@pytest.mark.parametrize("method", ["rp_fn", "ntkgp_fn"])
def test_published_function_space_methods_keep_or_forget_their_start(method: str) -> None:
    net = linear()
    mean, covariance = law(net, method)
    kept_mean, kept = exact_law(net, method, anchor="start")
    torch.testing.assert_close(mean, kept_mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(covariance, kept, rtol=1e-9, atol=1e-11)
    start = net.nngp + net.drift if method == "rp_fn" else 2.0 * (net.ntk - net.nngp) + net.nngp + net.drift
    _, forgotten = trained(net.ntk, start, net.y, NOISE, NOISE, 0.0)
    torch.testing.assert_close(forgotten, exact_law(net, method)[1], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(forgotten, covariance, rtol=1e-2)  # control: the two differ


def test_published_ntkgp_fn_disperses_too_much_and_the_exact_one_does_not() -> None:
    net = linear()
    _, posterior = law(net, "ntkgp_param")
    for anchor in ("start", "zero"):
        assert smallest(exact_law(net, "ntkgp_fn", anchor)[1] - posterior) > 1e-2
    assert smallest(exact_law(net, "ntkgp_fn_exact")[1] - posterior) > -1e-10
    assert smallest(posterior - exact_law(net, "ntkgp_fn_exact")[1]) > -1e-10


def test_gradient_flow_keeps_the_start_where_no_data_pull() -> None:
    net, decay = linear(), 1e-5
    rows, p = net.jacobian[:TRAIN], net.jacobian.shape[1]
    units = torch.eye(2 * p, dtype=F64)
    start, other = units.split(p)
    at_zero = net.last @ start - net.jacobian @ start + OFFSETS["ntkgp_fn"][0](net, start, other)
    hessian = rows.T @ rows + decay * torch.eye(p, dtype=F64)
    end = torch.linalg.solve(hessian, -rows.T @ at_zero[:TRAIN])
    values, vectors = torch.linalg.eigh(hessian)
    spreads = {}
    for time in (1e3, 1e8):  # n/σ² is 8e5; the data need less than 1e3
        flow = (vectors * (-time * values / TRAIN).exp()) @ vectors.T
        effects = (at_zero + net.jacobian @ (end + flow @ (start - end)))[TRAIN:]
        spreads[time] = effects @ effects.T
    _, kept = trained(net.ntk, 2.0 * net.ntk, net.y, decay, 0.0, 0.0)
    torch.testing.assert_close(spreads[1e3], kept, rtol=0.02, atol=0.005)
    forgotten = 2.0 * (net.ntk - net.nngp) + net.nngp + net.drift
    _, expected = trained(net.ntk, forgotten, net.y, decay, 0.0, 0.0)
    torch.testing.assert_close(spreads[1e8], expected, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(spreads[1e3], expected, rtol=0.05, atol=0.02)  # control


def test_drawn_members_have_the_law_within_monte_carlo_error() -> None:
    net, count = linear(), 20_000
    p = net.jacobian.shape[1]
    found = members(
        net,
        "ntkgp_lin",
        normal(p, count, seed=4),
        normal(p, count, seed=5),
        NOISE**0.5 * normal(TRAIN, count),
    )
    mean, covariance = law(net, "ntkgp_lin")
    std = covariance.diagonal().sqrt()
    assert bool(((found.mean(1) - mean).abs() < 4 * std / count**0.5).all())
    error = std[:, None] * std * math.sqrt(2 / count)
    assert bool(((found.cov() - covariance).abs() < 5 * error).all())
    shared = members(
        net, "ntkgp_lin", normal(p, count, seed=4), normal(p, count, seed=5), torch.zeros(TRAIN, 1)
    )
    short = covariance.diagonal() - shared.cov().diagonal()
    assert bool((short > 0).all())  # control: without own noise members spread too little
    assert float((short / std.square()).max()) > 0.02


def test_the_order_of_the_methods() -> None:
    net = linear()
    laws = {method: law(net, method)[1] for method in METHODS}
    assert smallest(laws["ntkgp_param"] - laws["rp_param"]) > 1e-3
    assert smallest(laws["ntkgp_param"] - laws["deep_ensemble"]) > 1e-3
    assert smallest(net.ntk.test - laws["ntkgp_param"]) > 0
    assert smallest(net.nngp.test - laws["nngp"]) > 0
    gap = laws["ntkgp_param"] - laws["rp_param"]
    _, inner = trained(net.ntk, net.ntk - net.nngp, net.y, NOISE, 0.0, 0.0)
    torch.testing.assert_close(gap, inner, rtol=1e-9, atol=1e-11)  # E Θ^{≤L} Eᵀ
    # Controls: the order is strict, and no order holds between a randomised prior and the NNGP.
    assert smallest(laws["rp_param"] - laws["ntkgp_param"]) < -1e-3
    assert smallest(laws["rp_param"] - laws["deep_ensemble"]) < 0


def test_variances_alone_and_several_targets() -> None:
    net = linear()
    nngp, ntk = (Kernel(k.train, k.cross, k.test.diagonal()) for k in (net.nngp, net.ntk))
    targets = torch.stack((net.y, 2 * net.y + 1), 1)
    for method, function in METHODS.items():
        mean, covariance = law(net, method)
        both, variance = function(nngp, ntk, targets, NOISE, 0.0)
        torch.testing.assert_close(variance, covariance.diagonal(), rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(both[:, 0], mean, rtol=1e-10, atol=1e-12)
        for kernels in ((nngp, ntk), (net.nngp, net.ntk)):
            prediction = predictive(method, *kernels, targets, NOISE, 0.0)
            torch.testing.assert_close(prediction.mean, both, rtol=1e-10, atol=1e-12)
            expected = covariance.diagonal()[:, None].expand(-1, 2)
            torch.testing.assert_close(prediction.variance, expected, rtol=1e-10, atol=1e-13)
            assert bool((prediction.aleatoric == NOISE).all())


def test_duplicates_without_noise_rest_on_the_jitter() -> None:
    net = linear()
    rows = [0, 0, 1, 2, *range(TRAIN, TRAIN + TEST)]  # scaled so that the second pivot is exactly 0

    def doubled(joint: Tensor) -> Kernel:
        return Kernel.of((joint / joint[0, 0])[rows][:, rows], 4)

    nngp, ntk = doubled(net.last @ net.last.T), doubled(net.jacobian @ net.jacobian.T)
    y = torch.tensor([1.0, 1.0, -1.0, 0.5], dtype=F64)
    single = [0, 2, 3]
    for method in METHODS:
        mean, covariance = METHODS[method](nngp, ntk, y, 0.0)
        less = [Kernel(k.train[single][:, single], k.cross[:, single], k.test) for k in (nngp, ntk)]
        once = METHODS[method](*less, y[single], 0.0)
        torch.testing.assert_close(mean, once[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(covariance, once[1], rtol=1e-5, atol=1e-6)
        with pytest.raises(InputError, match="raise the noise or the jitter"):
            METHODS[method](nngp, ntk, y, 0.0, jitter=0.0)


def test_draws_have_their_covariance() -> None:
    mean, covariance = law(linear(), "ntkgp_param")
    draws = draw(mean, covariance, 20_000, torch.Generator().manual_seed(0))
    std = covariance.diagonal().sqrt()
    assert bool(((draws.T.cov() - covariance).abs() < 5 * std[:, None] * std * 0.01).all())
    assert not bool(
        (draws.T.cov() - torch.diag(std**2)).abs().max() < 0.01
    )  # control: entries are correlated
    columns = draw(torch.stack((mean, -mean), 1), covariance, 3, torch.Generator().manual_seed(0))
    assert columns.shape == (3, TEST, 2)
    sure = draw(mean, torch.zeros_like(covariance), 2, torch.Generator())
    torch.testing.assert_close(sure, mean.expand(2, -1), rtol=0, atol=0)


def test_float32_kernels_are_computed_in_double() -> None:
    net = linear()
    nngp, ntk = (Kernel(k.train.float(), k.cross.float(), k.test.float()) for k in (net.nngp, net.ntk))
    for method in METHODS:
        mean, covariance = METHODS[method](nngp, ntk, net.y.float(), NOISE)
        assert mean.dtype == covariance.dtype == F64
        torch.testing.assert_close(covariance, law(net, method)[1], rtol=1e-3, atol=1e-4)


def test_bad_input_is_named() -> None:
    net = linear()
    nngp, ntk, y = net.nngp, net.ntk, net.y
    with pytest.raises(InputError, match=r"a kernel has to be \(n, n\)"):
        Kernel(nngp.train, nngp.cross.T, nngp.test)
    for spoiled in (math.nan, math.inf):
        with pytest.raises(InputError, match="cross kernel has to be finite"):
            Kernel(nngp.train, nngp.cross * spoiled, nngp.test)
    with pytest.raises(InputError, match="20 training inputs of 13"):
        Kernel.of(torch.eye(13), 20)
    small = Kernel(ntk.train[:4, :4], ntk.cross[:, :4], ntk.test)
    with pytest.raises(InputError, match=r"in train they are \(4, 4\), \(8, 8\)"):
        limits.randomised_prior(nngp, small, y[:4], NOISE)
    with pytest.raises(InputError, match="no method 'mc_dropout'; it has to be one of nngp, deep_ensemble"):
        predictive("mc_dropout", nngp, ntk, y, NOISE)
    nothing = Kernel(torch.zeros(0, 0), torch.zeros(TEST, 0), ntk.test)
    for function in METHODS.values():
        with pytest.raises(InputError, match="at least 1 training row"):
            function(nothing, nothing, y[:0], NOISE)
    indefinite = Kernel(nngp.train - torch.eye(TRAIN), nngp.cross, nngp.test)
    for method, function in METHODS.items():
        with pytest.raises(InputError, match="targets have to be"):
            function(nngp, ntk, y[:3], NOISE)
        with pytest.raises(InputError, match="targets has to be finite"):
            function(nngp, ntk, y * torch.nan, NOISE)
        for noise in (-0.1, math.nan, math.inf):
            with pytest.raises(InputError, match="noise variance has to be a finite number of at least 0"):
                function(nngp, ntk, y, noise)
        if not method.startswith("ntkgp"):
            with pytest.raises(InputError, match=r"positive (semi)?definite"):
                function(indefinite, ntk, y, NOISE)
        if method != "nngp":
            with pytest.raises(InputError, match=r"positive (semi)?definite"):
                function(nngp, indefinite, y, NOISE)
    with pytest.raises(InputError, match=r"covariance has to be \(5, 5\)"):
        draw(y[:5], torch.eye(4, dtype=F64), 1, torch.Generator())
    with pytest.raises(InputError, match="covariance has to be finite"):
        draw(y[:5], torch.eye(5, dtype=F64) * torch.nan, 1, torch.Generator())


def erf_kernels(x: Tensor, depth: int, weight: float, bias: float) -> tuple[Tensor, Tensor]:
    """NNGP and NTK of an erf network on scalar inputs, by the recursion written out."""
    k = weight**2 * x[:, None] * x + bias**2
    ntk = k
    for _ in range(depth):
        scale = 1 + 2 * k.diagonal()
        outer = (scale[:, None] * scale).sqrt()
        slope = 4 / math.pi / (outer.square() - 4 * k.square()).sqrt()
        k = weight**2 * 2 / math.pi * (2 * k / outer).asin() + bias**2
        ntk = k + weight**2 * slope * ntk
    return k, ntk


KNOWN = {
    "ntkgp_param": (
        [0.095485, 0.904289, 1.858390, 1.732241, 1.581546],
        [0.231520, 0.048875, 0.412777, 1.149548, 1.831464],
    ),
    "rp_param": (None, [0.135565, 0.045214, 0.245910, 0.479026, 0.606317]),
    "nngp": (
        [0.794133, 1.074261, 1.179860, 1.134854, 1.101306],
        [0.124044, 0.039162, 0.104692, 0.172355, 0.215575],
    ),
    "ntkgp_fn": (None, [0.322349, 0.052468, 0.530403, 1.555892, 2.521377]),
}
"""Means and standard deviations without noise at 0, 1, 3, 4.5, 6 of the problem below."""


@pytest.mark.parametrize("method", list(KNOWN))
def test_known_numbers_of_a_toy_problem(method: str) -> None:
    x = torch.cat((torch.linspace(-2, -2 / 3, 10, dtype=F64), torch.linspace(2 / 3, 2, 10, dtype=F64)))
    new = torch.tensor([0, 1, 3, 4.5, 6], dtype=F64)
    nngp, ntk = (Kernel.of(part, 20) for part in erf_kernels(torch.cat((x, new)), 2, 1.5, 0.05))
    prediction = predictive(method, nngp, ntk, x * x.sin(), 0.01)
    mean, std = KNOWN[method]
    torch.testing.assert_close(prediction.variance.sqrt(), torch.tensor(std, dtype=F64), rtol=0, atol=1e-6)
    if mean is not None:
        torch.testing.assert_close(prediction.mean, torch.tensor(mean, dtype=F64), rtol=0, atol=1e-6)
    wrong = predictive(method, nngp, ntk, x * x.sin(), 0.0101).variance.sqrt()
    assert not torch.allclose(wrong, torch.tensor(std, dtype=F64), rtol=0, atol=1e-6)  # control


POSTERIORS = [case for case in cases("ntk") if case.id == "absent" or case.id.startswith("gp_posterior")]


@pytest.mark.parity
@pytest.mark.parametrize("path", POSTERIORS)
def test_posteriors_equal_reference(path: Path) -> None:
    case = load(path)
    arrays, noise = case.arrays, case.spec["config"]["noise_variance"]
    tolerance = case.spec["suggested_test_tolerance"]["float64"]
    nngp, ntk = (
        Kernel(*(arrays[f"{name}_{part}"] for part in ("train_train", "test_train", "test_test_diag")))
        for name in ("nngp", "ntk")
    )
    y = arrays["y_train"].squeeze(-1)
    for method, name in (("nngp", "nngp"), ("ntkgp_param", "ntkgp"), ("ntkgp_fn_exact", "ntkgp")):
        prediction = predictive(method, nngp, ntk, y, noise)
        torch.testing.assert_close(prediction.mean, arrays[f"{name}_mean"], **tolerance)
        torch.testing.assert_close(prediction.std, arrays[f"{name}_std"], **tolerance)
        # The posterior as a special case of trained members, whose covariance is put together otherwise.
        kernel = nngp if name == "nngp" else ntk
        mean, variance = trained(kernel, kernel, y, noise, noise)
        torch.testing.assert_close(mean, arrays[f"{name}_mean"], **tolerance)
        torch.testing.assert_close((variance + noise).sqrt(), arrays[f"{name}_std"], **tolerance)
    wrong = predictive("rp_param", nngp, ntk, y, noise)
    assert not torch.allclose(wrong.std, arrays["ntkgp_std"], **tolerance)  # control
