import math

import pytest
import torch
from torch import Tensor

from gramian.compress.quantise import Grid, Range
from gramian.compress.recipe import Float8, Recipe
from gramian.errors import InputError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EIGHT = sorted(
    {
        sign * (math.ldexp(8 + fraction, exponent - 10) if exponent else math.ldexp(fraction, -9))
        for sign in (1, -1)
        for exponent in range(16)
        for fraction in range(8)
        if (exponent, fraction) != (15, 7)
    }
)
"""All numbers of E4M3 from the bits of its definition: sign, exponent with bias 7, three bits of mantissa."""


def nearest(x: float) -> float:
    """The number of E4M3 next to x; of two equally near the one with an even mantissa."""
    x = min(448.0, max(-448.0, x))
    best = min(abs(x - e) for e in EIGHT)
    found = [e for e in EIGHT if abs(x - e) == best]
    bits = torch.tensor(found).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    return found[0] if len(found) == 1 else found[bits[1] % 2 == 0]


def test_float8_takes_the_nearest_number_of_the_definition() -> None:
    assert (len(EIGHT), EIGHT[-1], min(e for e in EIGHT if e > 0)) == (253, 448.0, 2.0**-9)
    x = torch.cat([normal(300), 500 * normal(100, seed=1), 1e-3 * normal(100, seed=2), torch.tensor(EIGHT)])
    x = torch.cat([x.double(), (torch.tensor(EIGHT[1:]) + torch.tensor(EIGHT[:-1])).double() / 2])
    scale = 0.5
    expected = [scale * nearest(v / scale) for v in x.tolist()]
    assert Float8(scale)(x).tolist() == expected
    assert Float8(2 * scale)(x).tolist() != expected  # control: another scale


def test_float8_error_is_relative_and_the_largest_entry_is_exact() -> None:
    x = normal(2000) * 10
    eight = Float8.of(x)
    error, size, scale = (eight(x) - x).abs(), x.abs(), float(eight.scale)
    usual = size >= scale / 64
    assert (error[usual] / size[usual]).max() <= 1 / 16
    assert (error[usual] / size[usual]).max() > 1 / 20  # the bound is sharp
    assert error[~usual].max() <= scale / 1024 if (~usual).any() else True
    assert eight(x)[size.argmax()] == pytest.approx(x[size.argmax()])
    assert Float8(1.0)(torch.tensor([1e9, -1e9, 0.0])).tolist() == [448.0, -448.0, 0.0]
    assert Float8(1.0)(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_grid_a_row_equals_the_rows_one_by_one() -> None:
    weight = normal(6, 10) * torch.logspace(-3, 3, 6)[:, None]
    for rows, matrix in (((-1,), weight), ((-2,), weight.T)):
        expected = torch.stack([Grid.symmetric(row)(row) for row in weight])
        got = Grid.symmetric(matrix, 8, rows)(matrix)
        torch.testing.assert_close(got if rows == (-1,) else got.T, expected, rtol=1e-12, atol=0)
    assert not torch.allclose(Grid.symmetric(weight)(weight), expected, rtol=0.1)
    tokens = torch.stack([Grid.asymmetric(Range.of(row))(row) for row in weight])
    torch.testing.assert_close(Grid.per_token(weight)(weight), tokens, rtol=1e-12, atol=1e-300)
    assert torch.equal(Grid.per_token(torch.zeros(2, 3))(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16, 24])
def test_a_grid_of_b_bits_has_its_number_of_values(bits: int) -> None:
    weight, x = normal(50, 40), normal(50, 40, seed=1)
    grid, steps = Grid.symmetric(weight, bits), 2 ** (bits - 1) - 1
    assert grid.scale == float(weight.abs().max()) / steps
    assert grid.integers(torch.tensor([-1e9, 1e9])).tolist() == [-steps - 1, steps]
    seen = Range.of(x)
    grid = Grid.asymmetric(seen, bits)
    assert grid.scale == pytest.approx((seen.high - seen.low) / (2**bits - 1), rel=1e-14)
    inside = x[(x > seen.low + grid.scale) & (x < seen.high - grid.scale)]
    assert inside.numel() == 0 or (grid(inside) - inside).abs().max() <= grid.scale / 2 * (1 + 1e-9)


def test_least_squares_is_the_best_of_a_hundred_shares() -> None:
    weight = normal(30, 20)
    weight[0, 0] = 12  # one far entry, which the best range cuts off
    for rows, parts in ((None, [weight]), ((-1,), list(weight))):
        recipe = Recipe(weight_range="mse", weights_per_row=rows is not None, weight_bits=4)
        chosen = recipe.weight(weight, (-1,))
        assert isinstance(chosen, Grid)
        scales = torch.as_tensor(chosen.scale).flatten().tolist()
        for part, scale in zip(parts, scales, strict=True):
            top = float(part.abs().max()) / 7

            def error(s: float, part: Tensor = part) -> float:
                return float(((part / s).round().clamp(-8, 7) * s - part).square().sum())

            errors = [error(top * share / 100) for share in range(1, 101)]
            assert error(scale) == pytest.approx(min(errors), rel=1e-9)
    assert max(scales) > min(scales)
    whole = Recipe(weight_range="mse", weight_bits=4).weight(weight, None)
    widest = Recipe(weight_bits=4).weight(weight, None)
    assert (whole(weight) - weight).norm() < 0.8 * (widest(weight) - weight).norm()


def test_recipe_chooses_the_quantiser() -> None:
    weight = normal(4, 5)
    assert Recipe().weight(weight, (-1,)) == Grid.symmetric(weight)
    assert Recipe(weight_bits=4).weight(weight, None) == Grid.symmetric(weight, 4)
    per_row = Recipe(weights_per_row=True).weight(weight, (-1,))
    assert torch.equal(per_row(weight), Grid.symmetric(weight, 8, (-1,))(weight))
    assert Recipe(activation_bits=6).activation(Range(-1.0, 2.0)) == Grid.asymmetric(Range(-1.0, 2.0), 6)
    fp8 = Recipe(number="fp8_e4m3")
    assert fp8.weight(weight, (-1,)) == Float8(float(weight.abs().max()) / 448)
    assert fp8.activation(Range(-3.0, 2.0)) == Float8(3 / 448)
    rows = torch.stack([Float8.of(row)(row) for row in weight])
    torch.testing.assert_close(fp8.token(weight), rows, rtol=1e-12, atol=0)
    assert torch.equal(fp8.activation(Range(0.0, 0.0))(torch.zeros(2)), torch.zeros(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 1}, "weight_bits must be from 2 to 24, got 1"),
        ({"activation_bits": 25}, "activation_bits must be from 2 to 24"),
        ({"momentum": 1.0}, "momentum"),
        ({"percentile": 50.0}, "percentile"),
        ({"exact": "head"}, "collection of module names, got the one name 'head'"),
        ({"number": "fp4"}, "unknown number 'fp4'; choose one of int, fp8_e4m3"),
        ({"activations": "dynamic"}, "choose one of static, dynamic_token, none"),
        ({"weight_range": "l1"}, "choose one of max, mse"),
        ({"number": "fp8_e4m3", "weight_bits": 4}, "fp8_e4m3 has 8 bits"),
        ({"number": "fp8_e4m3", "weight_range": "mse"}, "largest entry"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(**settings)
