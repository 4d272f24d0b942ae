import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gramian.compress.interception import Point
from gramian.compress.quantise import Grid, quantise
from gramian.compress.recipe import Recipe
from gramian.compress.simulate import Simulation, sensitivity
from gramian.errors import InputError
from gramian.interop.huggingface_cache import CACHE
from gramian.nn.blocks import BLOCKS
from quantised_models import (
    DEPTH,
    TOKENS,
    VOCABULARY,
    WIDTH,
    bert,
    gpt2,
    llama,
    logits,
    made,
    opt,
    ours,
    tokens,
)


def error(model: nn.Module, recipe: Recipe, batches: list[Tensor], x: Tensor) -> float:
    exact = logits(model, x)
    return float((logits(Simulation(model, recipe).calibrate(batches), x) - exact).norm() / exact.norm())


EXPECTED: dict[Any, dict[str, int]] = {
    gpt2: {
        "embedding": 2, "sum": 5, "gain": 5, "norm": 5, "weight": 9, "linear": 7, "activation": 2,
        "scores": 2, "probabilities": 2, "context": 2,
    },
    opt: {
        "embedding": 2, "sum": 5, "gain": 5, "norm": 5, "weight": 13, "linear": 11, "activation": 2,
        "scores": 2, "probabilities": 2, "context": 2,
    },
    bert: {
        "embedding": 3, "sum": 6, "gain": 6, "norm": 6, "weight": 14, "linear": 11, "activation": 3,
        "scores": 2, "probabilities": 2, "context": 2,
    },
    llama: {
        "embedding": 1, "sum": 8, "gain": 5, "norm": 5, "weight": 15, "linear": 13, "activation": 2,
        "scores": 2, "probabilities": 2, "context": 2, "input": 2,
    },
    ours: {
        "embedding": 2, "sum": 5, "gain": 5, "norm": 5, "weight": 11, "linear": 9, "activation": 2,
        "scores": 2, "probabilities": 2, "context": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("make", EXPECTED)
def test_every_kind_of_point_is_there_as_often_as_in_the_model(make: Any) -> None:
    assert Simulation(made(make), Recipe()).calibrate([tokens(0)]).kinds() == EXPECTED[make]


def test_points_have_the_names_of_the_published_quantisers() -> None:
    points = {str(point) for point in Simulation(made(opt), Recipe()).calibrate([tokens(0)]).points}
    layer = "model.decoder.layers.1"
    parts = ("q_proj:linear", "out_proj:linear", "k_proj:weight", ":scores", ":probabilities", ":context")
    wanted = {f"{layer}.self_attn{'' if part[0] == ':' else '.'}{part}" for part in parts}
    wanted |= {f"{layer}:sum", f"{layer}:sum[1]", f"{layer}.activation_fn:activation", f"{layer}.fc2:linear"}
    wanted |= {"model.decoder:sum", "model.decoder.embed_positions:embedding", "lm_head:linear"}
    assert wanted <= points
    assert f"{layer}.fc1:linear" not in points  # quantised behind its activation function


@pytest.mark.parametrize("make", [gpt2, bert])
@pytest.mark.parametrize("padded", [False, True])
def test_eager_attention_equals_fused_and_masks_do_not_reach_the_scores(make: Any, padded: bool) -> None:
    fused, eager = made(make), made(make, attn_implementation="eager")
    mask = torch.ones(3, TOKENS, dtype=torch.int64)
    if padded:
        mask[0, 4:] = 0
    batch = {"input_ids": tokens(5), "attention_mask": mask}
    results = []
    for model in (fused, eager):
        simulation = Simulation(model, Recipe()).calibrate([batch])
        results.append(simulation(**batch).logits[mask > 0])
        grids = [grid for point, grid in simulation.points.items() if point.kind == "scores"]
        assert len(grids) == DEPTH
        assert all(isinstance(grid, Grid) and 0 < grid.scale < 1 for grid in grids)  # a mask gives over 1e36
        assert simulation.kinds() == EXPECTED[make]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


class Recording(Simulation):
    """Keeps what every activation was and became."""

    def _apply(self, point: Point, values: Tensor, rows: Any) -> Tensor:
        out = super()._apply(point, values, rows)
        self.seen = [*getattr(self, "seen", []), (point, values, out)]
        return out


@pytest.mark.parametrize("make", [opt, llama])
def test_error_is_half_a_step_inside_the_range_at_every_point(make: Any) -> None:
    batch = tokens(2)
    simulation = Recording(made(make), Recipe()).calibrate([batch])
    simulation(batch)
    assert {point for point, _, _ in simulation.seen} == set(simulation.points)
    for point, x, out in simulation.seen:
        grid = simulation.points[point]
        assert isinstance(grid, Grid)
        assert (out - x).abs().max() <= grid.scale * (0.5 + 1e-9) + 1e-12, point
        assert grid(torch.zeros(1)) == 0
        assert out.unique().numel() <= 256
    activations = [
        float((out - x).abs().max()) for point, x, out in simulation.seen if point.kind == "linear"
    ]
    assert min(activations) > 0


def test_grids_are_frozen_after_calibration() -> None:
    model, batch = made(gpt2), tokens(0)
    simulation = Simulation(model, Recipe()).calibrate([batch])
    before, first = dict(simulation.points), logits(simulation, batch)
    other = 20 * torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    simulation(inputs_embeds=other)
    assert simulation.points == before
    assert torch.equal(logits(simulation, batch), first)
    assert simulation.calibrate([tokens(1)]).points != before  # control: another calibration


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("make", EXPECTED)
def test_the_model_is_untouched_outside(make: Any) -> None:
    model, batch = made(make), tokens(0)
    model.train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    simulation = Simulation(model, Recipe()).calibrate([batch, tokens(1)])
    with pytest.raises(KeyError), simulation:
        assert not any(module.training for module in model.modules())
        raise KeyError
    with pytest.raises(Exception, match=r".+"), simulation:
        model(torch.full((1, 99), VOCABULARY + 7))  # fails deep inside
    assert [module.training for module in model.modules()] == modes
    assert hooks(model) == 0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.eval()
    fresh = copy.deepcopy(model)
    quantised = logits(simulation, batch)
    assert torch.equal(logits(model, batch), logits(fresh, batch))
    assert not torch.equal(quantised, logits(model, batch))
    assert torch.equal(quantised, logits(simulation, batch))  # the failures left nothing behind


@pytest.mark.parametrize("make", [gpt2, llama, ours])
def test_error_halves_with_every_bit_until_the_model_is_exact(make: Any) -> None:
    model, batch = made(make), tokens(0)
    bits = [6, 8, 10, 12, 14, 16]
    errors = [error(model, Recipe(weight_bits=b, activation_bits=b), [batch], batch) for b in bits]
    slopes = [math.log2(a / b) / 2 for a, b in pairwise(errors)]
    assert sum(slopes) / len(slopes) == pytest.approx(1, abs=0.12)
    assert error(model, Recipe(weight_bits=24, activation_bits=24), [batch], batch) < 1e-5
    assert errors[1] > 1e-3
    weights = [error(model, Recipe(weight_bits=b, activations="none"), [batch], batch) for b in bits]
    assert all(w < e for w, e in zip(weights, errors, strict=True))


def test_one_large_channel_breaks_a_scale_a_tensor_and_spares_a_scale_a_row() -> None:
    model, batch = made(opt), tokens(0)
    plain, exact = copy.deepcopy(model), logits(model, batch)
    for layer in model.model.decoder.layers:  # q·k stays what it was
        for part in (layer.self_attn.q_proj.weight, layer.self_attn.q_proj.bias):
            part[[3, 11]] *= 1000
        for part in (layer.self_attn.k_proj.weight, layer.self_attn.k_proj.bias):
            part[[3, 11]] /= 1000
    torch.testing.assert_close(logits(model, batch), exact, rtol=1e-9, atol=1e-9)
    weights, rows = Recipe(activations="none"), Recipe(activations="none", weights_per_row=True)
    before = [error(plain, recipe, [batch], batch) for recipe in (weights, Recipe(), rows)]
    after = [error(model, recipe, [batch], batch) for recipe in (weights, Recipe(), rows)]
    assert max(before) < 0.05
    assert after[0] > 5 * before[0]
    assert after[1] > 3 * before[1]
    assert after[2] == pytest.approx(before[2], rel=1e-6)


def test_one_large_token_breaks_static_ranges_and_spares_a_range_a_token() -> None:
    model, batch = made(opt), tokens(0)
    batch[batch == 7] = 8
    batch[:, -1] = 7
    exact = logits(model, batch)[:, :-1]
    model.model.decoder.embed_tokens.weight = nn.Parameter(
        model.model.decoder.embed_tokens.weight.clone(), False
    )
    model.model.decoder.embed_tokens.weight[7] *= 300  # the tokens before it do not see it
    torch.testing.assert_close(logits(model, batch)[:, :-1], exact, rtol=1e-9, atol=1e-9)

    def lost(recipe: Recipe) -> float:
        got = logits(Simulation(model, recipe).calibrate([batch]), batch)[:, :-1]
        return float((got - exact).norm() / exact.norm())

    assert lost(Recipe(weights_per_row=True)) > 0.3
    assert lost(Recipe(weights_per_row=True, activations="dynamic_token")) < 0.05


def test_linear_only_equals_quantised_layers() -> None:
    model, batches = made(ours), [tokens(0), tokens(1)]
    simulation = Simulation(model, Recipe(linear_only=True, exact=("head",), momentum=0.0)).calibrate(
        batches[:1]
    )
    expected = quantise(model, batches[:1], momentum=0.0)
    assert set(simulation.kinds()) == {"weight", "input"}
    assert simulation.kinds()["weight"] == 5 * DEPTH
    # ranges come from exact inputs there and from quantised ones here, so within a fraction of a step
    difference = (logits(simulation, batches[1]) - expected(batches[1])).norm()
    lost = (expected(batches[1]) - model(batches[1])).norm()
    assert difference < lost
    whole = logits(Simulation(model, Recipe(exact=("head",))).calibrate(batches[:1]), batches[1])
    assert (whole - model(batches[1])).norm() > lost  # linear-only is milder


@pytest.mark.parametrize("name", ["lm_head", "transformer.h.1", "attn"])
def test_exact_modules_have_no_points(name: str) -> None:
    model, batch = made(gpt2), tokens(0)
    simulation = Simulation(model, Recipe(exact=(name,))).calibrate([batch])
    assert not [p for p in simulation.points if name in (p.module, *p.module.split(".")) or name in p.module]
    assert any(point.kind == "embedding" for point in simulation.points)
    head = logits(Simulation(model, Recipe()).calibrate([batch]), batch)
    assert not torch.equal(logits(simulation, batch), head)
    if name == "lm_head":  # tied: the table is quantised where it is read, and exact in the head
        assert logits(simulation, batch).unique().numel() > 256 > 0
        assert head.unique().numel() <= 256


@pytest.mark.parametrize("make", EXPECTED)
def test_variants_are_finite_and_ordered(make: Any) -> None:
    model, batch = made(make), tokens(0)
    eight = error(model, Recipe(), [batch], batch)
    assert error(model, Recipe(number="fp8_e4m3"), [batch], batch) > eight / 4
    assert error(model, Recipe(number="fp8_e4m3", activations="dynamic_token"), [batch], batch) < 0.5
    assert error(model, Recipe(activations="dynamic_token"), [batch], batch) < 1.2 * eight
    assert error(model, Recipe(activations="none"), [batch], batch) < eight
    assert error(model, Recipe(weight_bits=4), [batch], batch) > 2 * eight


def test_sensitivity_is_the_loss_with_one_layer_quantised() -> None:
    model, batch = made(gpt2), tokens(0)

    def loss() -> float:
        return float(F.cross_entropy(logits(model, batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()))

    layers = ["transformer.h.0", "transformer.h.1", "transformer.h.1.mlp", "lm_head"]
    recipe = Recipe(weight_bits=4, activation_bits=4)
    got = sensitivity(model, recipe, [batch], loss, layers)
    exact = loss()
    for layer in layers[:2]:
        simulation = Simulation(model, recipe).calibrate([batch])
        simulation.points = {
            point: q if point.module.startswith(layer) else (lambda x: x)
            for point, q in simulation.points.items()
        }
        with simulation:
            assert got[layer] == pytest.approx(loss() - exact, abs=1e-12)
    assert len(set(got.values())) == 4
    assert all(value != 0 for value in got.values())
    with pytest.raises(InputError, match=r"nothing in 'transformer\.h\.7'"):
        sensitivity(model, recipe, [batch], loss, ["transformer.h.7"])
    assert hooks(model) == 0


def test_generation_with_a_cache_runs() -> None:
    model, batch = made(gpt2), tokens(0)
    simulation = Simulation(model, Recipe()).calibrate([batch])
    with simulation:
        whole = model(batch).logits
        cache = model(batch[:, :5], use_cache=True)
        rest = model(batch[:, 5:], **{CACHE: getattr(cache, CACHE)}).logits
    torch.testing.assert_close(rest, whole[:, 5:], rtol=1e-9, atol=1e-9)


def broken(make: Any, name: str, value: float) -> nn.Module:
    model = made(make)
    model.get_parameter(name)[..., 0] = value
    return model


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: Simulation(made(gpt2)).calibrate([]), "at least one calibration batch"),
        (lambda: Simulation(made(gpt2))(tokens(0)), r"call calibrate\(batches\) first"),
        (lambda: Simulation(made(gpt2), Recipe(exact=("head",))), "no module is named 'head'"),
        (
            lambda: Simulation(broken(gpt2, "transformer.h.1.mlp.c_fc.weight", math.nan)).calibrate(
                [tokens(0)]
            ),
            r"weight values of module 'transformer\.h\.1\.mlp\.c_fc' are not finite",
        ),
        (
            lambda: Simulation(broken(opt, "model.decoder.layers.0.fc2.bias", math.inf)).calibrate(
                [tokens(0)]
            ),
            r"linear values of module 'model\.decoder\.layers\.0\.fc2' are not finite",
        ),
        (lambda: Simulation(nn.Identity()).calibrate([torch.ones(2, 2)]), "nothing to quantise"),
        (lambda: Simulation(nn.LSTM(3, 3)).calibrate([torch.ones(2, 2, 3)]), "'' computes by lstm"),
    ],
)
def test_bad_input_is_named(use: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        use()


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) if len(x) > 2 else self.a(x)


def test_a_point_that_calibration_missed_is_named() -> None:
    simulation = Simulation(Sometimes()).calibrate([torch.ones(2, 4).double()])
    with pytest.raises(InputError, match="calibration never reached b:input"):
        simulation(torch.ones(3, 4).double())
    with pytest.raises(InputError, match="under way"), simulation:
        simulation(torch.ones(2, 4).double())
    assert simulation(torch.ones(2, 4).double()).shape == (2, 4)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_of_ours_stays_close(block: str) -> None:
    model, batch = made(ours, block=block, gated=block == "sas_p"), tokens(0)
    simulation = Simulation(model, Recipe()).calibrate([batch])
    exact = model(batch)
    assert 1e-4 < (simulation(batch) - exact).norm() / exact.norm() < 0.15
    kinds = simulation.kinds()
    assert kinds["scores"] == kinds["probabilities"] == kinds["context"] == DEPTH
    assert min(kinds[kind] for kind in ("sum", "linear", "weight", "embedding")) > 0
