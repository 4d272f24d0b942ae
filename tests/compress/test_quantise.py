import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gramian.compress.quantise import Grid, QuantisedLinear, Range, quantise
from gramian.errors import InputError


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 4)).to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + number))
    return model


def grid_of(low: float, high: float) -> Grid:
    return Grid.asymmetric(Range(low, high))


def oracle(values: list[float], low: float, high: float) -> list[float]:
    """The asymmetric quantiser entry by entry, in Python integers and exact fractions of s."""
    low, high = min(low, 0.0), max(high, 0.0)
    zero, scale = round(-low / ((high - low) / 255)), Fraction((high - low) / 255)
    return [float((min(255, max(0, round(Fraction(x) / scale) + zero)) - zero) * scale) for x in values]


ends = st.floats(0.01, 100)


@given(below=ends, above=ends, seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_error_is_at_most_half_a_step_inside_the_range(below: float, above: float, seed: int) -> None:
    grid = grid_of(-below, above)
    x = torch.rand(500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.cat([x * (below + above) - below, torch.tensor([-below, above], dtype=torch.float64)])
    error = (grid(x) - x).abs().max()
    assert error <= grid.scale / 2 * (1 + 1e-9)
    assert error > grid.scale / 8  # a finer grid than the one stated would pass the bound alone
    assert (grid(x + 2 * grid.scale) - x - 2 * grid.scale).abs().max() > grid.scale  # control: outside


@given(low=st.floats(-100, 50), width=ends)
@settings(max_examples=50, deadline=None)
def test_zero_is_exact(low: float, width: float) -> None:
    assert grid_of(low, low + width)(torch.zeros(1)) == 0


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 2.0), (-2.0, 0.0), (0.5, 2.0), (-2.0, -0.5)])
def test_outside_the_range_the_nearest_end_is_taken(low: float, high: float) -> None:
    grid = grid_of(low, high)
    far = grid(torch.tensor([-1e6, 1e6], dtype=torch.float64)).tolist()
    assert far == [(0 - grid.zero) * grid.scale, (255 - grid.zero) * grid.scale]
    assert far == pytest.approx([min(low, 0), max(high, 0)], abs=grid.scale / 2)
    assert grid.integers(torch.tensor([math.inf])) == 255


@given(below=ends, above=ends, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_asymmetric_grid_equals_exact_fractions(below: float, above: float, seed: int) -> None:
    x = 1.5 * max(below, above) * normal(200, seed=seed)
    expected = torch.tensor(oracle(x.tolist(), -below, above), dtype=torch.float64)
    torch.testing.assert_close(grid_of(-below, above)(x), expected, rtol=1e-12, atol=0)


def test_symmetric_grid_equals_exact_fractions_and_uses_both_signs() -> None:
    weight = normal(20, 30)
    scale = Fraction(float(weight.abs().max()) / 127)
    expected = [[float(round(Fraction(w) / scale) * scale) for w in row] for row in weight.tolist()]
    grid = Grid.symmetric(weight)
    torch.testing.assert_close(grid(weight), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert grid.integers(weight).abs().max() == 127
    assert grid.integers(torch.tensor([-1e9, 1e9])).tolist() == [-128, 127]


@pytest.mark.parametrize("grid", [Grid.symmetric(torch.zeros(3)), grid_of(0.0, 0.0)])
def test_zeros_have_a_grid(grid: Grid) -> None:
    assert torch.equal(grid(torch.zeros(3)), torch.zeros(3))


def test_low_precision_is_rounded_once() -> None:
    x = normal(1000).to(torch.bfloat16)
    grid = grid_of(-3.0, 5.0)
    assert grid(x).dtype == torch.bfloat16
    assert torch.equal(grid(x), grid(x.float()).to(torch.bfloat16))


def test_range_follows_batches_with_momentum() -> None:
    batches = [normal(50, seed=seed) for seed in range(4)]
    seen = Range.of(batches[0])
    for batch in batches[1:]:
        seen = seen.moved(Range.of(batch), 0.9)
    weights = [0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1]
    assert seen.low == pytest.approx(sum(w * float(b.min()) for w, b in zip(weights, batches, strict=True)))
    assert seen.high == pytest.approx(sum(w * float(b.max()) for w, b in zip(weights, batches, strict=True)))


def test_percentile_drops_the_tails() -> None:
    x = torch.arange(1001.0).reshape(7, 143)[
        :, torch.randperm(143, generator=torch.Generator().manual_seed(0))
    ]
    assert Range.of(x, 99.0) == Range(10.0, 990.0)
    assert Range.of(x.to(torch.bfloat16), 100.0) == Range(0.0, 1000.0)
    assert Range.of(x) == Range(0.0, 1000.0)


def quantised_network(**settings: float) -> tuple[nn.Sequential, nn.Module, list[Tensor]]:
    model, batches = network(), [normal(32, 8, seed=10 + seed) for seed in range(3)]
    return model, quantise(model, batches, **settings), batches


def test_network_equals_per_element_oracle() -> None:
    model, quantised, batches = quantised_network()
    model.eval().requires_grad_(False)
    hidden: dict[int, list[Tensor]] = {0: batches, 3: [model[1](model[0](batch)) for batch in batches]}
    x = normal(32, 8, seed=99)
    expected = x
    for place, inputs in hidden.items():
        low, high = float(inputs[0].min()), float(inputs[0].max())
        for batch in inputs[1:]:
            low, high = 0.9 * low + 0.1 * float(batch.min()), 0.9 * high + 0.1 * float(batch.max())
        weight = model[place].weight.detach()
        scale = Fraction(float(weight.abs().max()) / 127)
        rounded = [[float(round(Fraction(w) / scale) * scale) for w in row] for row in weight.tolist()]
        rows = [oracle(row, low, high) for row in expected.tolist()]
        bias = model[place].bias.tolist()
        expected = torch.tensor(
            [
                [
                    math.fsum(a * w for a, w in zip(row, out, strict=True)) + b
                    for out, b in zip(rounded, bias, strict=True)
                ]
                for row in rows
            ],
            dtype=torch.float64,
        )
        expected = nn.functional.gelu(expected) if place == 0 else expected
    torch.testing.assert_close(quantised(x), expected, rtol=1e-10, atol=1e-10)
    difference = (quantised(x) - model(x)).norm() / model(x).norm()
    assert 1e-3 < difference < 0.1  # it quantises, and does not break this network


def integer_output(layer: QuantisedLinear, x: Tensor) -> Tensor:
    """s_x s_w (Σ q_x q_w − z_x Σ q_w) + b with 32-bit accumulators, as int8 hardware computes it."""
    q_x = layer.inputs.integers(x).to(torch.uint8).to(torch.int32)
    q_w = layer.weights.integers(layer.weight).to(torch.int8).to(torch.int32)
    sums = q_x @ q_w.T - layer.inputs.zero * q_w.sum(1, dtype=torch.int32)
    assert sums.dtype == torch.int32
    return layer.inputs.scale * layer.weights.scale * sums + layer.bias


def test_simulation_equals_integer_arithmetic() -> None:
    model, batches = network(dtype=torch.float32), [normal(64, 8, dtype=torch.float32) + 1]
    layer = quantise(model, batches).get_submodule("0")
    assert isinstance(layer, QuantisedLinear)
    assert layer.inputs.zero not in (0, 128)
    x = 2 * normal(64, 8, seed=5, dtype=torch.float32)
    torch.testing.assert_close(layer(x), integer_output(layer, x), rtol=1e-5, atol=1e-5)
    wrong = copy.deepcopy(layer)  # control: without its zero point the sum is another one
    wrong.inputs = Grid(layer.inputs.scale, 0, 0, 255)
    assert (integer_output(wrong, x) - layer(x)).abs().max() > 0.1


def per_row(weight: Tensor) -> Tensor:
    """The oracle that published recipes do not use: one scale for each row of the weight."""
    return torch.stack([Grid.symmetric(row)(row) for row in weight])


def test_one_large_channel_breaks_per_tensor_and_spares_per_row() -> None:
    x = normal(256, 64, seed=1)

    def errors(weight: Tensor) -> tuple[float, float]:
        """Median relative error over output channels: per tensor, per row."""
        layer = nn.Linear(64, 64, bias=False, dtype=torch.float64)
        layer.weight.data = weight
        exact, inputs = x @ weight.T, Grid.asymmetric(Range.of(x))(x)
        candidates = (quantise(layer, [x])(x), inputs @ per_row(weight).T)
        return tuple(float(((y - exact).norm(dim=0) / exact.norm(dim=0)).median()) for y in candidates)  # type: ignore[return-value]

    weight = normal(64, 64, seed=2)
    plain, plain_rows = errors(weight)
    assert plain < 0.03
    assert plain_rows < 0.03
    weight[7] *= 1000
    per_tensor, rows = errors(weight)
    assert per_tensor > 0.5
    assert rows == pytest.approx(plain_rows, rel=0.01)


def test_grids_are_frozen_after_calibration() -> None:
    _, quantised, batches = quantised_network()
    layer = quantised.get_submodule("0")
    before, inputs = quantised(batches[0]), layer.inputs
    quantised(1000 * batches[0])
    assert layer.inputs == inputs
    assert torch.equal(quantised(batches[0]), before)
    recalibrated = quantise(network(), [1000 * batches[0]])  # control: other batches give other grids
    assert recalibrated.get_submodule("0").inputs != inputs


def test_momentum_and_percentile_reach_the_grids() -> None:
    model, batches = network(), [normal(32, 8), 10 * normal(32, 8)]
    scales = [
        quantise(model, batches, momentum=m, percentile=p).get_submodule("0").inputs.scale
        for m, p in ((0.0, 100.0), (0.9, 100.0), (0.9, 95.0))
    ]
    assert scales[0] == pytest.approx(scales[1] * 10 / 1.9)
    assert scales[2] < scales[1]
    assert scales[1] == pytest.approx(1.9 * float(batches[0].max() - batches[0].min()) / 255)


def test_original_is_untouched() -> None:
    model = network().train()
    kept = copy.deepcopy(model.state_dict())
    quantised = quantise(model, [normal(32, 8)])
    assert model.training
    assert not any(module.training for module in quantised.modules())
    assert isinstance(model[0], nn.Linear)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.nn.init.zeros_(model[0].bias)
    assert quantised.get_submodule("0").bias.any()


class Tied(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(10, 6), nn.Linear(6, 6)
        output = nn.Linear(6, 10, bias=False)
        output.weight = self.embedding.weight
        self.add_module(name, output)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(self.mix(self.embedding(x)))


def test_tied_head_is_skipped_and_a_tied_quantised_layer_has_its_own_weight() -> None:
    x = torch.arange(10)
    head = quantise(Tied("head"), [x])
    assert type(head.head) is nn.Linear
    assert head.head.weight is head.embedding.weight
    assert isinstance(head.mix, QuantisedLinear)
    model = Tied("output")
    output = quantise(model, [x])
    assert torch.equal(output.embedding.weight, model.embedding.weight)
    assert not torch.equal(output.output.weight, model.embedding.weight)
    assert torch.equal(output.output.weight, Grid.symmetric(model.embedding.weight)(model.embedding.weight))


def test_skip_takes_full_names_and_last_parts() -> None:
    model = nn.ModuleDict({"a": network(), "b": network()})
    model.forward = lambda x: model["a"](x) + model["b"](x)  # type: ignore[method-assign]
    kept = {
        skip: [name for name, m in copied.named_modules() if type(m) is nn.Linear]
        for skip in ("a.0", "0", "head")
        for copied in [calibrated(model, skip)]
    }
    assert kept == {"a.0": ["a.0"], "0": ["a.0", "b.0"], "head": []}


class Pair(nn.Module):
    def __init__(self, a: nn.Module, b: nn.Module):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def calibrated(model: nn.Module, skip: str) -> nn.Module:
    return quantise(Pair(model["a"], model["b"]), [normal(32, 8)], skip=(skip,))


def test_a_layer_used_twice_is_quantised_once_for_both_places() -> None:
    shared = network()
    quantised = quantise(Pair(shared, shared), [normal(32, 8)])
    assert isinstance(quantised.a[0], QuantisedLinear)
    assert quantised.a[0] is quantised.b[0]
    single = nn.Linear(8, 8).double()
    both = quantise(nn.Sequential(single, single), [normal(32, 8)])
    assert isinstance(both[0], QuantisedLinear)
    assert both[0] is both[1]


def test_subclasses_and_keyword_calls_are_quantised() -> None:
    class Named(nn.Linear):
        pass

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Named(8, 8, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(input=x)

    quantised = quantise(Caller(), [normal(4, 8)])
    assert isinstance(quantised.inner, QuantisedLinear)
    assert quantised(normal(4, 8)).shape == (4, 8)


def test_fused_encoder_layer_still_quantises_its_inputs() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    x = normal(2, 5, 8)
    quantised = quantise(layer, [x], skip=("out_proj",))
    with torch.no_grad():
        fused = quantised(x)
    torch.testing.assert_close(fused, quantised(x).detach(), rtol=1e-10, atol=1e-10)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def spoiled(value: float) -> nn.Module:
    model = network()
    model[3].weight.data[0, 0] = value
    return model


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.never = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    ("model", "batches", "settings", "message"),
    [
        (nn.Sequential(nn.ReLU()), [normal(2, 8)], {}, "no linear layer"),
        (network(), [], {}, "at least one calibration batch"),
        (spoiled(math.nan), [normal(2, 8)], {}, "'3' has a weight that is not finite"),
        (spoiled(math.inf), [normal(2, 8)], {}, "'3' has a weight that is not finite"),
        (network(), [normal(2, 8), normal(2, 8) * math.nan], {}, "input of layer '0' is not finite"),
        (Unreached(), [normal(2, 8)], {}, "never called 'never'"),
        (nn.Sequential(Scaled(8, 8).double()), [normal(2, 8)], {}, "'0' .Scaled. changes how"),
        (network(), [normal(2, 8)], {"momentum": 1.0}, "momentum"),
        (network(), [normal(2, 8)], {"percentile": 50.0}, "percentile"),
        (network(), [normal(2, 8)], {"skip": "head"}, "collection of layer names"),
    ],
)
def test_bad_input_is_named(model: nn.Module, batches: list[Tensor], settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantise(model, batches, **settings)


def test_percentile_matches_numpy_on_a_network() -> None:
    model, batch = network(), normal(32, 8)
    low, high = np.percentile(batch.numpy(), (1, 99))
    layer = quantise(model, [batch], percentile=99.0).get_submodule("0")
    assert layer.inputs.scale == (high - low) / 255


def test_empty_batches_of_a_layer_do_not_move_its_range() -> None:
    model = nn.Linear(8, 8).double()
    batch = normal(4, 8)
    assert quantise(model, [batch, batch[:0]]).inputs == Grid.asymmetric(Range.of(batch))
