"""The linear recurrence against its loop in complex numbers, its start against the law it is drawn from."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from gramian.errors import InputError
from gramian.nn.init import initialise_
from gramian.nn.recurrence import LinearRecurrence, multiply, ring, scan, truncated_normal_
from reference import cases, load


def holding(array: str) -> list[Any]:
    """The reference cases that have an array."""
    return [case for case in cases("gred") if not case.values[0] or array in load(case.values[0]).arrays]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recurrence(width: int = 3, state: int = 5, seed: int = 0, **options) -> LinearRecurrence:
    """A recurrence whose gains are not those of the start."""
    module = LinearRecurrence(width, state, 4, **options).double()
    initialise_(module, seed)
    with torch.no_grad():
        module.gamma_log.add_(normal(state, seed=seed + 1))
    return module


def packed(z: Tensor) -> Tensor:
    return torch.cat((z.real, z.imag), -1)


def unpacked(pairs: Tensor) -> Tensor:
    return torch.complex(*pairs.chunk(2, -1))


def loop(module: LinearRecurrence, x: Tensor) -> tuple[Tensor, Tensor]:
    """Every state and output, one step after the other, in complex numbers."""
    phase = torch.zeros_like(module.nu_log) if module.theta_log is None else module.theta_log.exp()
    eigenvalues = torch.exp(torch.complex(-module.nu_log.exp(), phase))
    b = torch.complex(module.b_re, module.b_im) * module.gamma_log.exp()
    c = torch.complex(module.c_re, module.c_im)
    state, states, outputs = torch.zeros_like(eigenvalues), [], []
    for step in x:
        state = eigenvalues * state + step.to(b.dtype) @ b
        states.append(state)
        outputs.append((state @ c).real)
    return torch.stack(states), torch.stack(outputs)


def test_products_are_those_of_complex_numbers() -> None:
    a, b = (torch.complex(normal(4, 3, seed=s), normal(4, 3, seed=s + 1)) for s in (0, 2))
    torch.testing.assert_close(multiply(packed(a), packed(b)), packed(a * b), rtol=0, atol=1e-15)
    assert (multiply(packed(a), packed(b)) - packed(a * b.conj())).abs().max() > 0.1  # control


@pytest.mark.parametrize("phase", [6.28, 0.0])
@pytest.mark.parametrize("time", [1, 2, 3, 7, 8, 33])
def test_scan_and_closed_form_are_the_loop(time: int, phase: float) -> None:
    module, x = recurrence(max_phase=phase), normal(time, 3, seed=5)
    states, outputs = loop(module, x)
    inputs = torch.nn.functional.linear(x, module.input_map())
    found = scan(inputs, module.vandermonde(2)[1])
    torch.testing.assert_close(unpacked(found), states, rtol=0, atol=1e-12)
    torch.testing.assert_close(module(x), outputs, rtol=0, atol=1e-12)
    torch.testing.assert_close(module.last(x), outputs[-1], rtol=0, atol=1e-12)
    if time > 2:  # control: the closed form read the wrong way round
        assert (module.last(x.flip(0)) - outputs[-1]).abs().max() > 1e-3


def test_batches_and_gradients() -> None:
    module, x = recurrence(), normal(2, 6, 3).requires_grad_()
    torch.testing.assert_close(module.last(x), module(x)[:, -1], rtol=0, atol=1e-12)
    for function in (module, module.last):
        y = torch.stack([function(row) for row in x])
        torch.testing.assert_close(function(x), y, rtol=0, atol=1e-12)
    ours = torch.autograd.grad(module(x)[:, -1].sum(), [x, *module.parameters()])
    theirs = torch.autograd.grad(module.last(x).sum(), [x, *module.parameters()])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(module.last, (x,))


def test_powers_are_powers_and_never_grow() -> None:
    module = recurrence()
    powers = unpacked(module.vandermonde(41))
    torch.testing.assert_close(powers, powers[1] ** torch.arange(41)[:, None], rtol=0, atol=1e-12)
    torch.testing.assert_close(powers[1].abs(), module.magnitudes(), rtol=0, atol=1e-14)
    assert (powers.abs().diff(dim=0) < 0).all()
    rounded = module.bfloat16().vandermonde(41)
    assert rounded.dtype == torch.float32


def test_the_ring_is_uniform_in_area() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(2, 4000, generator=generator, dtype=torch.float64)
    low, high = 0.5, 0.9
    nu_log, theta_log, gamma_log = ring(*draws, low, high, 6.28)
    magnitude = torch.exp(-nu_log.exp())
    square = ((magnitude.square() - low**2) / (high**2 - low**2)).numpy()
    assert kstest(square, "uniform").pvalue > 0.01
    assert kstest(theta_log.exp().numpy() / 6.28, "uniform").pvalue > 0.01
    torch.testing.assert_close(gamma_log.exp().square(), 1 - magnitude.square(), rtol=0, atol=1e-12)
    wrong = ((magnitude - low) / (high - low)).numpy()
    assert kstest(wrong, "uniform").pvalue < 1e-6  # control: the radius itself is not


def test_the_gain_keeps_states_as_large_as_inputs() -> None:
    """White inputs give E|s_c|² = Σ_j |B_jc|²: sums of squares of the impulse responses."""
    module = LinearRecurrence(3, 6, r_min=0.3, r_max=0.97).double()
    initialise_(module, 3)

    def ratio() -> Tensor:
        states = unpacked(multiply(module.input_map().mT, module.vandermonde(3000)[:, None]))
        expected = module.b_re.square().sum(0) + module.b_im.square().sum(0)
        return states.abs().square().sum((0, 1)) / expected

    torch.testing.assert_close(ratio(), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-6)
    module.gamma_log.data.zero_()
    assert ratio().min() > 1.05  # control


def test_the_start_has_the_published_variances() -> None:
    module = LinearRecurrence(200, 300)
    initialise_(module, 0)
    for weight, variance in ((module.b_re, 0.5 / 200), (module.b_im, 0.5 / 200), (module.c_re, 1 / 300)):
        assert weight.var().item() == pytest.approx(variance, rel=0.02)
        assert weight.abs().max() <= 2 * math.sqrt(variance) / 0.8796
    again = LinearRecurrence(200, 300)
    initialise_(again, 0)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    initialise_(again, 1)
    assert not any(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_truncated_numbers_have_the_variance_asked_for() -> None:
    x = truncated_normal_(torch.empty(200_000), 4.0, torch.Generator().manual_seed(0))
    assert x.var().item() == pytest.approx(4.0, rel=0.01)
    assert x.abs().max() <= 2 * 2 / 0.8796


def test_extreme_draws_stay_finite() -> None:
    ends = torch.tensor([0.0, 1.0])
    for radii in ((0.0, 1.0), (0.0, 0.1), (0.5, 0.5), (0.9, 1.0)):
        assert all(part.isfinite().all() for part in ring(ends, ends, *radii, 6.28))


def test_a_real_recurrence_has_no_phase() -> None:
    module = recurrence(max_phase=0.0)
    assert module.theta_log is None
    assert "theta_log" not in module.state_dict()
    assert torch.equal(module.vandermonde(5)[:, 5:], torch.zeros(5, 5, dtype=torch.float64))
    assert recurrence().vandermonde(5)[1:, 5:].abs().min() > 0  # control


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: LinearRecurrence(0, 4), "positive sizes, got 0, 4 and 0"),
        (lambda: LinearRecurrence(3, 4, r_min=0.9, r_max=0.5), "r_min ≤ r_max"),
        (lambda: LinearRecurrence(3, 4, r_max=1.5), "r_max ≤ 1"),
        (lambda: LinearRecurrence(3, 4, r_min=1.0), "got 1 and 1"),
        (lambda: LinearRecurrence(3, 4, r_max=0.0), "got 0 and 0"),
        (lambda: LinearRecurrence(3, 4, r_min=math.nan), "got nan and 1"),
        (lambda: LinearRecurrence(3, 4, max_phase=-1.0), "not negative, got -1"),
        (lambda: LinearRecurrence(3, 4, max_phase=math.inf), "got inf"),
        (lambda: LinearRecurrence(3, 4).vandermonde(0), "at least one power"),
        (lambda: ring(torch.ones(2), torch.ones(2), 0.0, 1.0, 0.0), "finite and positive, got 0"),
    ],
)
def test_bad_settings_are_named(build, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build()


@pytest.mark.parity
@pytest.mark.parametrize("path", holding("u_magnitude"))
def test_the_start_equals_the_reference(path: Path) -> None:
    case = load(path)
    config, arrays = case.spec["config"], case.arrays
    draws = arrays["u_magnitude"], arrays["u_phase"]
    found = ring(*draws, config["r_min"], config["r_max"], config["max_phase"])
    for name, value in zip(("nu_log", "theta_log", "gamma_log"), found, strict=True):
        torch.testing.assert_close(value, arrays[name], rtol=1e-9, atol=1e-10)
    module = LinearRecurrence(1, len(draws[0])).double()
    with torch.no_grad():
        module.nu_log.copy_(found[0])
        module.theta_log.copy_(found[1])
    expected = torch.cat((arrays["lambda_re"], arrays["lambda_im"]))
    torch.testing.assert_close(module.vandermonde(2)[1], expected, rtol=1e-9, atol=1e-10)
