"""Activations tailored for a depth: the modules, their choice, and what they do to sampled networks."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gramian.core.maximal import plain, residual
from gramian.core.shaping import Shaping, leaky_relu_map, local_maps
from gramian.errors import InputError
from gramian.nn.activations import ACTIVATIONS
from gramian.nn.tailored import Tailored, TailoredLeakyReLU, deep_kernel_shaped, tailored

SMOOTH = sorted(ACTIVATIONS.keys() - {"relu", "leaky_relu", "abs", "identity"})


def test_modules_equal_their_formulas() -> None:
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    module = Tailored(nn.Tanh(), Shaping(0.5, 0.3, -0.2, 2.5))
    expected = [2.5 * (math.tanh(0.5 * point + 0.3) - 0.2) for point in x.tolist()]
    torch.testing.assert_close(module(x).tolist(), expected, rtol=1e-14, atol=1e-15)
    scale = math.sqrt(2 / (1 + 0.3**2))
    expected = [scale * (point if point > 0 else 0.3 * point) for point in x.tolist()]
    torch.testing.assert_close(TailoredLeakyReLU(0.3)(x).tolist(), expected, rtol=1e-14, atol=0)


def test_constants_are_of_the_architecture() -> None:
    for module in (tailored(nn.GELU, 24), tailored(nn.ReLU, 24)):
        assert not module.state_dict()
        assert not list(module.parameters())
        x = torch.randn(7, generator=torch.Generator().manual_seed(0))
        assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert "input_scale=" in repr(tailored(nn.GELU, 24))
    assert "negative_slope=0.2" in repr(tailored(nn.ReLU, 24))


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("depth", [1, 36])
def test_smooth_activations_have_unit_slopes_and_small_curvature(name: str, depth: int) -> None:
    maps = local_maps(tailored(ACTIVATIONS[name], depth))
    assert (maps.q, maps.q_slope, maps.c_slope) == pytest.approx((1, 1, 1), abs=1e-10)
    assert maps.c_curvature * depth == pytest.approx(0.3, rel=1e-8)
    before = local_maps(ACTIVATIONS[name]().double())  # control: as it comes, it has none of this
    assert abs(before.q - 1) > 0.05
    assert abs(before.q_slope - 1) > 0.1


@pytest.mark.parametrize("name", SMOOTH)
def test_deep_kernel_shaping_keeps_orthogonal_inputs_orthogonal(name: str) -> None:
    maps = local_maps(deep_kernel_shaped(ACTIVATIONS[name], 36))
    expected = (1, 1, 0, 1.5 ** (1 / 36))
    assert (maps.q, maps.q_slope, maps.c_zero, maps.c_slope) == pytest.approx(expected, abs=1e-10)


def test_deep_kernel_shaping_of_rectifiers() -> None:
    z = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    weights = (-z.square() / 2).exp()
    weights /= weights.sum()
    for activation in (nn.ReLU, nn.LeakyReLU):
        y = deep_kernel_shaped(activation, 36)(z)
        assert (y @ weights).item() == pytest.approx(0, abs=1e-5)
        assert (y.square() @ weights).item() == pytest.approx(1, abs=1e-5)
    with pytest.raises(InputError, match="a slope of at most"):
        deep_kernel_shaped(nn.LeakyReLU, 1)


def test_rectifiers_become_one_leaky_relu() -> None:
    expected = 0.3511212597983496
    for activation in (nn.ReLU, nn.LeakyReLU, partial(nn.LeakyReLU, 0.2)):
        module = tailored(activation, 36)
        assert isinstance(module, TailoredLeakyReLU)
        assert module.negative_slope == pytest.approx(expected, abs=1e-12)


def test_a_network_too_shallow_for_the_target_takes_relu() -> None:
    shallow, deep = tailored(nn.ReLU, 12), tailored(nn.ReLU, 13)
    assert shallow.negative_slope == 0.0 < deep.negative_slope
    assert plain(12)(leaky_relu_map(0.0), 0.0) < 0.9 <= plain(13)(leaky_relu_map(0.0), 0.0)
    assert tailored(nn.ReLU, 40, lambda depth: residual(depth, 0.98)).negative_slope == 0.0


def test_a_skip_leaves_more_of_the_activation() -> None:
    chain = tailored(nn.GELU, 36)
    skipped = tailored(nn.GELU, 36, lambda depth: residual(depth, 0.8))
    assert local_maps(skipped).c_curvature == pytest.approx(0.3 / 36 / 0.36, rel=1e-8)
    assert skipped.shaping.input_scale > 1.5 * chain.shaping.input_scale


def test_what_cannot_or_need_not_be_tailored() -> None:
    assert isinstance(tailored(nn.Identity, 36), nn.Identity)
    with pytest.raises(InputError, match="has a kink"):
        tailored(ACTIVATIONS["abs"], 36)
    for rule in (tailored, deep_kernel_shaped):
        with pytest.raises(InputError, match="the number of nonlinear layers must be at least 1, not 0"):
            rule(nn.GELU, 0)


class Counted(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.calls += 1
        return torch.tanh(x)


def test_a_model_of_many_blocks_solves_once() -> None:
    first = tailored(Counted, 36)
    used = Counted.calls
    assert used > 0
    others = [tailored(Counted, 36) for _ in range(35)]
    assert Counted.calls == used
    assert len({id(module.inner) for module in (first, *others)}) == 36  # modules are not shared
    assert all(module.shaping == first.shaping for module in others)
    tailored(Counted, 35)
    assert Counted.calls > used


def test_models_can_be_built_on_the_meta_device() -> None:
    class Fresh(nn.Tanh):  # no other test has solved for it
        pass

    with torch.device("meta"), torch.inference_mode():
        module = tailored(Fresh, 21)
    assert module.shaping.output_scale == pytest.approx(tailored(nn.Tanh, 21).shaping.output_scale, rel=1e-9)


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
def test_half_precision_rounds_only_once_or_twice(activation: type[nn.Module]) -> None:
    module = tailored(activation, 100)
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).bfloat16()
    y, exact = module(x), module(x.double())
    assert y.dtype == torch.bfloat16
    error = (y.double() - exact).abs() / exact.abs().clamp(min=1)
    assert error.max() <= 2**-7
    if activation is nn.GELU:  # control: every step in bfloat16 loses most digits
        rough = module.shaping(module.inner, x)
        assert ((rough.double() - exact).abs() / exact.abs().clamp(min=1)).max() > 8 * error.max()


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
def test_compiled_and_differentiated(activation: type[nn.Module]) -> None:
    module = tailored(activation, 36)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x.detach()[[0, 2, 7]].requires_grad_(),))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)


def matrix(width: int, orthogonal: bool, generator: torch.Generator) -> Tensor:
    gaussian = torch.randn(width, width, dtype=torch.float64, generator=generator)
    if not orthogonal:
        return gaussian / math.sqrt(width)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def sampled_cosines(
    module: nn.Module, cosine: float, width: int, depth: int, orthogonal: bool, generator: torch.Generator
) -> Tensor:
    """Cosines of six inputs, all pairs at the same cosine, behind `depth` layers φ̂(x W)."""
    gram = torch.full((6, 6), cosine, dtype=torch.float64).fill_diagonal_(1)
    basis = matrix(width, True, generator)[:6]
    x = math.sqrt(width) * torch.linalg.cholesky(gram) @ basis
    for _ in range(depth):
        x = module(x @ matrix(width, orthogonal, generator))
    x = nn.functional.normalize(x, dim=-1)
    return (x @ x.T)[*torch.triu_indices(6, 6, 1)]


def hermite_map(module: nn.Module, c: float) -> float:
    """C(c) = Σ_k h_k² c^k / Σ_k h_k² from the Hermite coefficients of φ̂ (numpy)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    values = module(torch.tensor(nodes)).numpy() * weights / weights.sum()
    terms = [
        float(values @ np.polynomial.hermite_e.hermeval(nodes, [0] * k + [1])) ** 2 / math.factorial(k)
        for k in range(12)
    ]
    return sum(term * c**k for k, term in enumerate(terms)) / sum(terms)


@pytest.mark.parametrize("orthogonal", [False, True], ids=["gaussian", "orthogonal"])
@pytest.mark.parametrize("name", ["leaky", "tanh"])
def test_sampled_networks_approach_the_map_with_width(name: str, orthogonal: bool) -> None:
    depth, start = 3, 0.2
    module = TailoredLeakyReLU(0.2) if name == "leaky" else tailored(nn.Tanh, depth)
    expected = start
    for _ in range(depth):
        expected = leaky_relu_map(0.2)(expected) if name == "leaky" else hermite_map(module, expected)
    generator = torch.Generator().manual_seed(0)
    widths = (16, 32, 64, 128)
    errors, from_start = [], []
    for width in widths:
        samples = torch.stack(
            [sampled_cosines(module, start, width, depth, orthogonal, generator) for _ in range(100)]
        )
        errors.append((samples - expected).square().mean().sqrt().item())
        from_start.append((samples - start).square().mean().sqrt().item())
    rate, control = (np.polyfit(np.log(widths), np.log(values), 1)[0] for values in (errors, from_start))
    assert rate == pytest.approx(-0.5, abs=0.1)
    if name == "leaky":  # control: they do not approach the cosine that they began with
        assert control > -0.2
    assert errors[-1] < 0.16


def test_a_deep_chain_keeps_inputs_apart_where_plain_relu_does_not() -> None:
    depth, generator = 36, torch.Generator().manual_seed(1)
    kept, collapsed = (
        torch.cat([sampled_cosines(module, 0.0, 160, depth, True, generator) for _ in range(6)]).mean().item()
        for module in (tailored(nn.ReLU, depth), TailoredLeakyReLU(0.0))
    )
    assert kept == pytest.approx(0.9, abs=0.03)
    assert collapsed == pytest.approx(plain(depth)(leaky_relu_map(0.0), 0.0), abs=0.01)
    assert collapsed > 0.96
