from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from gramian.compress.density import density_of
from gramian.compress.masks import (
    add_masks,
    draw,
    export_state,
    keep,
    key_of,
    masked,
    masks_of,
    originals_of,
    remove_masks,
    set_mode,
)
from gramian.compress.structures import Columns, Patterns, Rows, Weights
from gramian.errors import InputError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def initialised(model: nn.Module) -> nn.Module:
    for k, value in enumerate(model.double().parameters()):
        nn.init.normal_(value, generator=seeded(k))
    return model


def mlp() -> nn.Module:
    return initialised(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)))


def convolutions() -> nn.Module:
    return initialised(
        nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 2),
            nn.Flatten(),
            nn.Linear(4 * 36, 3),
        )
    )


STRUCTURES = [Weights(), Rows(), Rows(4), Columns(), Columns(4), Patterns(2, 4), Patterns(1, 4)]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("make", [mlp, convolutions])
def test_masks_act_on_the_weight_and_come_off_again(structure, make):
    model = make().eval()
    x = rows(3, 8) if make is mlp else rows(3, 4, 5, 5)
    before, state, names = model(x), deepcopy(model.state_dict()), list(model.state_dict())
    parameters = list(model.parameters())
    layers = ["0", "2"] if make is mlp else ["0", "3"]
    masks = add_masks(model, layers=layers, structure=structure, dtype=torch.float64, probability=0.5)
    assert masks.keys() == masks_of(model).keys() == set(layers)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)  # everything is kept at first
    set_mode(model, "sample")
    draw(model, seeded())
    drawn = model(x)
    assert not torch.allclose(drawn, before)
    for name, weight in originals_of(model).items():
        layer = model.get_submodule(name)
        mask = masks[name].spread(masks[name].current(), weight)
        assert torch.equal(layer.weight, mask * weight)
    with torch.no_grad():
        plain = make().eval()
        plain.load_state_dict(export_state(model))
        torch.testing.assert_close(plain(x), drawn, rtol=1e-12, atol=1e-12)
    remove_masks(model)
    assert list(model.state_dict()) == names
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert [id(value) for value in model.parameters()] == [id(value) for value in parameters]
    assert all(value.requires_grad for value in model.parameters())
    assert type(model[0]) in (nn.Linear, nn.Conv2d)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(x), before)
    with pytest.raises(InputError, match="no masks"):
        masks_of(model)


def test_zeros_that_leave_a_model_have_no_sign():
    """One zero alone, so that a compressed file is small."""
    model = mlp()
    add_masks(model, layers="0", probability=0.5)
    set_mode(model, "sample")
    draw(model, seeded())
    inside = model[0].weight.detach()
    exported = export_state(model)["0.weight"]
    assert torch.equal(exported, inside)
    remove_masks(model, apply=True)
    for weight in (exported, model[0].weight):
        assert not weight[weight == 0].signbit().any()
    assert inside[inside == 0].signbit().any()  # control


def test_a_transposed_convolution_has_its_output_channels_masked():
    model = nn.ConvTranspose2d(3, 5, 2, bias=False).double()
    masks = add_masks(model, structure=Rows())
    units = torch.tensor([True, False, True, True, False])
    keep(model, {"": units})
    y = model(rows(2, 3, 4, 4))
    assert torch.equal((y != 0).any(0).flatten(1).any(1), units)
    assert masks[""].kept.shape == (5,)


def test_removing_with_apply_leaves_zeros():
    model = mlp()
    add_masks(model)
    keep(
        model,
        {name: torch.rand(m.kept.shape, generator=seeded()) < 0.3 for name, m in masks_of(model).items()},
    )
    kept, y = density_of(model), model(rows(3, 8))
    remove_masks(model, apply=True)
    assert torch.equal(model(rows(3, 8)), y)
    weights = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()])
    assert float((weights != 0).double().mean()) == pytest.approx(kept)


def test_a_column_of_heads_takes_a_head_out_of_attention():
    attention = nn.MultiheadAttention(8, 4, batch_first=True).double().eval()
    x = rows(2, 3, 8)
    add_masks(attention, layers="out_proj", structure=Columns(2))
    keep(attention, {"out_proj": torch.tensor([True, False, True, True])})
    with torch.no_grad():
        y = attention(x, x, x)[0]
        attention.in_proj_weight[16 + 2 : 16 + 4] += 5  # the values of the masked head
        assert torch.equal(attention(x, x, x)[0], y)
        attention.in_proj_weight[16:18] += 5  # control: those of another head
        assert not torch.allclose(attention(x, x, x)[0], y)


def test_modes():
    model = nn.Linear(4, 3, bias=False).double()
    mask = add_masks(model, dtype=torch.float64, weights="trainable")[""]
    with torch.no_grad():
        mask.logits.copy_(rows(3, 4, seed=5))
    w, chance = originals_of(model)[""], mask.probabilities
    draw(model, seeded())
    hard = mask.structure.hard(mask.logits, mask.noise)
    expected = {
        "sample": hard,
        "straight_through": hard,
        "mean": chance,
        "moments": chance,
        "threshold": chance > 0.5,
        "kept": torch.ones_like(chance),
        "relaxed": ((mask.logits - mask.noise.double().logit()) / 0.3).sigmoid(),
    }
    differentiable = {"straight_through", "mean", "moments", "relaxed"}
    for mode, units in expected.items():
        set_mode(model, mode, temperature=0.3)
        torch.testing.assert_close(model.weight, units * w, rtol=1e-6, atol=1e-9)
        found = torch.autograd.grad(model.weight.sum(), (mask.logits, w), allow_unused=True)
        assert (found[0] is not None) == (mode in differentiable), mode
        assert found[1] is not None
    set_mode(model, "straight_through")
    (slope,) = torch.autograd.grad(model.weight.sum(), mask.logits)
    torch.testing.assert_close(slope, w * chance * (1 - chance))
    set_mode(model, "hard_concrete")
    assert ((model.weight / w >= 0) & (model.weight / w <= 1)).all()


def test_one_draw_is_one_hypothesis_for_every_pass_until_the_next():
    model = mlp()
    add_masks(model)
    set_mode(model, "sample")
    with pytest.raises(InputError, match="no mask has been drawn"):
        model(rows(3, 8))
    draw(model, seeded())
    x = rows(6, 8)
    torch.testing.assert_close(torch.cat([model(x[:2]), model(x[2:])]), model(x), rtol=1e-12, atol=1e-12)
    again = checkpoint(model, x.requires_grad_(), use_reentrant=False)
    assert torch.equal(again, model(x))
    first = model(x)
    draw(model, seeded(1))
    assert not torch.allclose(model(x), first)
    draw(model, seeded())
    assert torch.equal(model(x), first)


def test_frozen_trainable_and_gaussian_weights():
    frozen, trainable, gaussian = mlp(), mlp(), mlp()
    add_masks(frozen, weights="frozen")
    add_masks(trainable, weights="trainable")
    masks = add_masks(gaussian, weights="gaussian", std=0.2, probability=0.6)
    assert not any(w.requires_grad for w in originals_of(frozen).values())
    assert all(w.requires_grad for w in originals_of(trainable).values())
    assert all(mask.log_std.requires_grad for mask in masks.values())
    remove_masks(frozen)
    assert all(value.requires_grad for value in frozen.parameters())
    weight = originals_of(gaussian)["0"].detach()
    drawn = masks["0"].draws(weight, 40_000, seeded()).detach()
    zero = drawn == 0
    assert float(zero.double().mean()) == pytest.approx(0.4, abs=2e-3)
    slab = (drawn - weight) / 0.2
    assert float(slab[~zero].mean()) == pytest.approx(0, abs=5e-3)
    assert float(slab[~zero].std()) == pytest.approx(1, abs=5e-3)
    set_mode(gaussian, "sample")
    draw(gaussian, seeded())
    one = gaussian[0].weight.detach()
    assert 0 < int((one == 0).sum()) < one.numel()
    assert not torch.isclose(one, weight).any()
    set_mode(gaussian, "mean")
    torch.testing.assert_close(gaussian[0].weight, 0.6 * weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("structure", [Weights(), Rows(), Rows(4)])
@pytest.mark.parametrize("kind", ["linear", "tokens", "convolution", "unbatched"])
def test_matched_moments_are_those_of_the_draws(kind, structure, gaussian):
    layer = nn.Linear(6, 8) if kind != "convolution" else nn.Conv2d(3, 8, 2, stride=2, padding=1)
    shape = {"linear": (2, 6), "tokens": (2, 3, 6), "convolution": (2, 3, 3, 3), "unbatched": (6,)}[kind]
    layer, x = initialised(layer), rows(*shape, seed=9)
    options = {"weights": "gaussian", "std": 0.3} if gaussian else {}
    mask = add_masks(layer, structure=structure, dtype=torch.float64, **options)[""]
    with torch.no_grad():
        mask.logits.copy_(rows(*mask.logits.shape, seed=3))
        drawn = mask.draws(originals_of(layer)[""], 6000, seeded())
        exact = vmap(lambda w: functional_call(layer, {key_of("", "0.given"): w}, (x,)))(drawn)
        set_mode(layer, "moments", generator=seeded())
        found = torch.stack([layer(x) for _ in range(1200)])
        set_mode(layer, "mean")
        mean, scale = layer(x), exact.std(0).clamp(min=1e-9)
    assert ((found.mean(0) - exact.mean(0)) / scale).abs().max() < 0.15
    assert (found.std(0) / scale - 1).abs().max() < 0.15
    assert ((mean - exact.mean(0)) / scale).abs().max() < 0.06
    assert scale.max() > 0.1  # control: there is something to match


def test_rows_share_their_noise_over_positions_as_masks_do():
    layer = nn.Linear(6, 8, bias=False).double()
    add_masks(layer, structure=Rows(2))
    set_mode(layer, "moments", generator=seeded())
    x = rows(2, 3, 6)
    factor = (layer(x) - 0.9 * x @ originals_of(layer)[""].mT) / (x @ originals_of(layer)[""].mT)
    torch.testing.assert_close(factor, factor[:, :1, ::2].repeat_interleave(2, -1).expand(2, 3, 8))
    assert (factor[0, 0] - factor[1, 0]).abs().min() > 1e-3  # control: examples differ


def test_the_linear_layer_of_gpt2_is_masked_as_any_other():
    transposed, plain = Conv1D(8, 6).double(), nn.Linear(6, 8).double()
    transposed.weight.data.copy_(rows(6, 8))
    plain.weight.data.copy_(transposed.weight.mT)
    plain.bias.data.copy_(transposed.bias)
    x = rows(3, 6, seed=1)
    for structure in (Rows(2), Columns(2), Patterns(1, 2), Weights()):
        found = []
        for layer in (transposed, plain):
            mask = add_masks(layer, structure=structure, probability=0.5)[""]
            set_mode(layer, "sample")
            draw(layer, seeded())
            assert mask.kept.shape == structure.units((8, 6))
            found.append(layer(x))
            if isinstance(structure, Rows) and not isinstance(structure, Columns):
                set_mode(layer, "moments", generator=seeded())
                found[-1] = torch.cat([found[-1], layer(x)])
            remove_masks(layer)
        torch.testing.assert_close(found[0], found[1])


def test_copies_are_independent_and_states_travel():
    model = mlp()
    add_masks(model, dtype=torch.float64)
    set_mode(model, "moments", generator=seeded())
    draw(model, seeded())
    copy = deepcopy(model)
    x = rows(3, 8)
    assert torch.equal(model(x), copy(x))  # generators in the same state
    set_mode(model, "sample")
    set_mode(copy, "sample")
    assert torch.equal(model(x), copy(x))
    with torch.no_grad():
        masks_of(copy)["0"].logits -= 3
    assert not torch.equal(masks_of(model)["0"].logits, masks_of(copy)["0"].logits)
    assert not torch.allclose(model(x), copy(x))
    masks_of(copy)["0"].kept.zero_()
    other = mlp()
    add_masks(other, dtype=torch.float64)
    other.load_state_dict(copy.state_dict())
    assert torch.equal(masks_of(other)["0"].logits, masks_of(copy)["0"].logits)
    assert not masks_of(other)["0"].kept.any()
    assert key_of("0", "original") in copy.state_dict()
    assert key_of("0", "0.logits") in copy.state_dict()
    before = model(x)
    remove_masks(copy)  # torch keeps the property `weight` in a class that copies share
    assert torch.equal(model(x), before)
    assert type(copy[0]) is nn.Linear
    remove_masks(model)
    assert torch.equal(model(x), copy(x))


def test_functional_calls_cannot_switch_the_mask_off():
    model = mlp()
    add_masks(model)
    set_mode(model, "threshold")
    x, weight = rows(3, 8), originals_of(model)["0"].detach()
    with pytest.raises(RuntimeError, match="right_inverse"):
        functional_call(model, {"0.weight": weight}, (x,))
    before = model(x)
    minus = functional_call(model, {key_of("0", "0.logits"): torch.full((12, 8), -5.0)}, (x,))
    assert torch.equal(minus, model[2](model[1](model[0].bias.expand(3, 12))))
    assert not torch.allclose(minus, before)
    doubled = functional_call(model, {key_of("0", "original"): 2 * weight}, (x,))
    assert not torch.allclose(doubled, before)
    assert torch.equal(model(x), before)


def test_vmap_over_draws_needs_different_randomness_only_for_moments():
    model = mlp()
    add_masks(model, probability=0.5)
    x, logits = rows(3, 8), masks_of(model)["0"].logits.detach()
    key = key_of("0", "0.noise")
    noise = torch.rand(6, *logits.shape, generator=seeded())
    set_mode(model, "sample")
    draw(model, seeded())
    mapped = vmap(lambda u: functional_call(model, {key: u}, (x,)))(noise)
    for k in range(6):
        torch.testing.assert_close(mapped[k], functional_call(model, {key: noise[k]}, (x,)))
    assert not torch.allclose(mapped[0], mapped[1])
    set_mode(model, "moments", generator=seeded())

    def with_logits(s: Tensor) -> Tensor:
        return functional_call(model, {key_of("0", "0.logits"): s}, (x,))

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(with_logits)(logits.expand(2, -1, -1))
    found = vmap(with_logits, randomness="different")(logits.expand(2, -1, -1))
    assert not torch.allclose(found[0], found[1])


def test_masked_takes_masks_off_after_a_failure():
    model = mlp()
    with pytest.raises(ZeroDivisionError), masked(model, layers="0") as masks:
        assert masks.keys() == {"0"}
        raise ZeroDivisionError
    assert type(model[0]) is nn.Linear


def test_shared_and_excluded_layers_stay_as_they_are():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.hidden, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)
            self.head.weight = self.embedding.weight

    model = Tied()
    assert add_masks(model).keys() == {"hidden"}
    with pytest.raises(InputError, match="nothing to prune"):
        add_masks(Tied(), layers="head")
    model = mlp()
    assert add_masks(model, exclude=["2"]).keys() == {"0"}
    assert add_masks(model, layers="2", structure=Rows()).keys() == {"2"}
    assert [type(mask.structure) for mask in masks_of(model).values()] == [Weights, Rows]


def test_refusals():
    with pytest.raises(InputError, match="nothing to prune"):
        add_masks(nn.Sequential(nn.LayerNorm(4), nn.Embedding(3, 4)))
    with pytest.raises(InputError, match="'7'; there are 0, 2"):
        add_masks(mlp(), layers="7")
    for options, message in [
        ({"probability": 1.0}, "probability"),
        ({"weights": "other"}, "unknown weights"),
        ({"weights": "gaussian", "std": 0.0}, "standard deviation"),
        ({"dtype": torch.float16}, "float32 or float64"),
        ({"structure": Rows(5)}, "not a multiple of the group of 5"),
        ({"structure": Patterns(2, 5)}, "not a multiple of the 5"),
    ]:
        with pytest.raises(InputError, match=message):
            add_masks(mlp(), **options)
    model = mlp()
    add_masks(model)
    with pytest.raises(InputError, match="parametrised already"):
        add_masks(model)
    with pytest.raises(InputError, match="unknown mode"):
        set_mode(model, "off")
    with pytest.raises(InputError, match="temperature"):
        set_mode(model, "relaxed", temperature=0.0)
    with pytest.raises(InputError, match="must have the shape"):
        keep(model, {"0": torch.ones(12, 8)})
    with pytest.raises(InputError, match="no masks"):
        remove_masks(mlp())
    grouped = nn.Conv2d(4, 8, 3, groups=2)
    with pytest.raises(InputError, match="grouped"):
        add_masks(grouped, structure=Columns())
    with pytest.raises(InputError, match="not initialised"):
        add_masks(nn.LazyLinear(3))
    attention = nn.MultiheadAttention(4, 2)
    add_masks(attention)
    with pytest.raises(InputError, match="moments"):
        set_mode(attention, "moments")
    patterns = mlp()
    add_masks(patterns, structure=Patterns(2, 4))
    with pytest.raises(InputError, match="moments"):
        set_mode(patterns, "moments")
    with pytest.raises(InputError, match="hard concrete"):
        set_mode(patterns, "hard_concrete")
