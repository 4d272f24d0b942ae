import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from gramian.compress import draws
from gramian.compress.chains import steps_of
from gramian.compress.draws import MaskedLoss, draw_outputs, error_reader, skip_draws
from gramian.compress.masks import add_masks, masks_of, originals_of, set_mode
from gramian.compress.scores import grasp, snip
from gramian.compress.structures import Columns, Patterns, Rows, Weights
from gramian.errors import InputError
from gramian.nn.transformer import TransformerConfig, build


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def initialised(model: nn.Module) -> nn.Module:
    for k, value in enumerate(model.double().parameters()):
        nn.init.normal_(value, std=0.5, generator=seeded(k))
    return model.eval()


def mlp() -> nn.Module:
    act = nn.ReLU()
    return initialised(
        nn.Sequential(
            nn.Flatten(),
            nn.Sequential(nn.Linear(8, 12), act, nn.Dropout(0.3)),
            nn.Linear(12, 12, bias=False),
            act,
            nn.GELU(),
            nn.Linear(12, 4),
        )
    )


def cnn() -> nn.Module:
    return initialised(
        nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return initialised(nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)))


def language_model() -> nn.Module:
    return build(TransformerConfig(vocabulary=11, width=16, heads=2, depth=2, context=8), 0).eval()


def looped(model: nn.Module, x: Tensor, drawn: dict[str, Tensor], count: int) -> Tensor:
    """Return the outputs under each draw, by writing the weights into the layers of a plain model."""
    found = []
    weights = originals_of(model)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    set_mode(model, "kept")
    with torch.no_grad():
        for k in range(count):
            for name, weight in weights.items():
                weight.copy_(drawn[name][k])
            found.append(model(x))
        for name, weight in weights.items():
            weight.copy_(before[name])
    return torch.stack(found)


MODELS = {
    "mlp": (mlp, (5, 2, 4)),
    "flat": (mlp, (5, 8)),
    "cnn": (cnn, (5, 2, 2, 2)),
    "transformer": (transformer, (5, 3, 8)),
}


@pytest.mark.parametrize("structure", [Weights(), Rows(), Columns(2), Patterns(1, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_draws_at_once_are_draws_one_by_one(name, structure):
    make, shape = MODELS[name]
    model, x = make(), rows(*shape)
    masks = add_masks(model, probability=0.5, structure=structure)
    weights = originals_of(model)
    generator = seeded()
    drawn = {name: mask.draws(weights[name], 7, generator) for name, mask in masks.items()}
    found = draw_outputs(model, x, 7, seeded())
    torch.testing.assert_close(found, looped(model, x, drawn, 7), rtol=1e-10, atol=1e-10)
    assert (found[1:] - found[:1]).abs().flatten(1).amax(1).median() > 1e-3  # the draws differ
    assert (steps_of(model, x) is not None) == (make is mlp)


def test_blocks_readers_and_the_law_of_the_draws():
    model, x = mlp(), rows(6, 8)
    masks = add_masks(model, probability=0.5)
    with torch.no_grad():
        masks["5"].logits.copy_(rows(4, 12, seed=8))
    small = draw_outputs(model, x, 9, seeded(), elements=1)
    assert small.shape == (9, 6, 4)
    assert not torch.equal(small[0], small[1])
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    whole = draw_outputs(model, x, 200, seeded())
    errors = draw_outputs(model, x, 200, seeded(), read=error_reader(y))
    assert torch.equal(errors, (whole.argmax(-1) != y).double())
    read = draw_outputs(model, x, 9, seeded(), read=lambda outputs: outputs.mean((1, 2)), elements=1)
    torch.testing.assert_close(read, small.mean((1, 2)))
    last = nn.Sequential(model[5]).eval()  # the outputs of one masked layer have a known mean
    h = rows(6, 12, seed=9)
    mean = h @ (masks["5"].probabilities * originals_of(model)["5"]).mT + model[5].bias
    found = draw_outputs(last, h, 20_000, seeded())
    error = (found.mean(0) - mean) / (found.std(0) / 20_000**0.5)
    assert error.abs().max() < 4.5


def test_a_language_model_is_drawn_scored_and_differentiated():
    model, x = language_model(), torch.arange(24).reshape(3, 8) % 11
    masks = add_masks(model, probability=0.5)
    assert len(masks) == 10  # attention and MLP; the head is the embedding
    weights, generator = originals_of(model), seeded()
    drawn = {name: mask.draws(weights[name], 4, generator) for name, mask in masks.items()}
    found = draw_outputs(model, x, 4, seeded())
    torch.testing.assert_close(found, looped(model, x, drawn, 4), rtol=1e-4, atol=1e-4)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs.flatten(0, 1), targets.flatten())

    masked_loss = MaskedLoss(model, x, x.roll(-1, 1), loss)
    p = len(draws.flat_logits(model))
    assert masked_loss(torch.zeros(2, p)).diff().item() == 0
    assert masked_loss(torch.stack([torch.zeros(p), torch.ones(p)])).diff().abs().item() > 1e-4
    value = masked_loss.moments(draws.flat_logits(model), seeded())
    assert value.isfinite()
    for score in (snip(model, [(x, x)], loss), grasp(model, [(x, x)], loss)):
        assert all(s.isfinite().all() and s.abs().max() > 0 for s in score.values())


def test_gaussian_weights_are_drawn_too():
    model, x = mlp(), rows(6, 8)
    add_masks(model, weights="gaussian", std=0.1, probability=0.999)
    found = draw_outputs(model, x, 50, seeded())
    assert found.std(0).min() > 1e-3
    plain = mlp()
    add_masks(plain, probability=0.999)
    assert draw_outputs(plain, x, 50, seeded()).std(0).median() < found.std(0).median()


def test_other_chains_are_not_taken_for_plain_ones():
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(8, 4), nn.ReLU()).double().eval()
    x = rows(3, 8)
    add_masks(model, probability=1 - 1e-9)
    torch.testing.assert_close(draw_outputs(model, x, 1, seeded())[0], model(x))
    hooked = mlp()
    add_masks(hooked, probability=1 - 1e-9)
    hooked[3].register_forward_hook(lambda module, args, output: 3 * output)
    torch.testing.assert_close(draw_outputs(hooked, x, 1, seeded())[0], hooked(x))
    tokens = nn.Sequential(nn.Linear(8, 4), nn.ReLU()).double().eval()
    add_masks(tokens, probability=1 - 1e-9)
    x = rows(3, 5, 8)
    torch.testing.assert_close(draw_outputs(tokens, x, 1, seeded())[0], tokens(x))


def test_what_works_in_place_leaves_the_inputs_to_the_next_block():
    model = nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(8, 4)).double().eval()
    add_masks(model, probability=1 - 1e-9)
    x = rows(8, 3).mT  # its transpose is contiguous already
    before = x.clone()
    found = draw_outputs(model, x, 3, seeded(), elements=1)
    assert torch.equal(x, before)
    torch.testing.assert_close(found, model(x.clone()).expand(3, -1, -1), rtol=1e-10, atol=1e-10)


def test_errors_are_counted_against_the_predictor():
    outputs = torch.tensor([[[1.0, 2.0], [2.0, 2.0], [torch.nan, 0.0], [0.0, torch.nan], [3.0, 1.0]]])
    read = error_reader(torch.tensor([1, 0, 0, 0, 0]))
    assert read(outputs).tolist() == [[0, 1, 1, 1, 0]]
    far = torch.tensor(
        [[[0.0, torch.inf], [-torch.inf, 0.0], [torch.inf, 0.0], [0.0, -torch.inf], [1e30, 0]]]
    )
    assert read(far).tolist() == [[1, 1, 1, 0, 0]]  # what overflowed counts as an error
    with pytest.raises(InputError, match="from 0 to 1"):
        error_reader(torch.tensor([0, 0, 0, 0, 2]))(outputs)


def test_masked_loss_is_the_loss_of_the_model_under_the_mask():
    model, x = mlp(), rows(6, 8)
    masks = add_masks(model, structure=Rows())
    y = rows(6, 4, seed=2)
    loss = MaskedLoss(model, x, y, mse_loss)
    flat = (torch.rand(3, 28, generator=seeded()) < 0.5).double()
    found = loss(flat)
    set_mode(model, "kept")
    for k in range(3):
        for (_, mask), part in zip(masks.items(), flat[k].split([12, 12, 4]), strict=True):
            mask.kept = part > 0
        assert found[k].item() == pytest.approx(mse_loss(model(x), y).item(), rel=1e-10)
    with pytest.raises(InputError, match="no independent masks"):
        patterned = mlp()
        add_masks(patterned, structure=Patterns(1, 2))
        MaskedLoss(patterned, x, y, mse_loss)


def test_refusals():
    model = mlp()
    with pytest.raises(InputError, match="no masks"):
        draw_outputs(model, rows(2, 8), 3, seeded())
    add_masks(model)
    with pytest.raises(InputError, match="at least one draw"):
        draw_outputs(model, rows(2, 8), 0, seeded())
    with pytest.raises(InputError, match="evaluation"):
        draw_outputs(model.train(), rows(2, 8), 3, seeded())
    assert masks_of(model)


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("structure", [Weights(), Rows(), Patterns(1, 2)])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_skipped_draws_leave_the_stream_where_draws_do(make, structure, gaussian) -> None:
    model, x = make(), rows(5, 8) if make is mlp else rows(5, 2, 2, 2)
    add_masks(model, structure=structure, weights="gaussian" if gaussian else "frozen", probability=0.6)
    one, other = seeded(3), seeded(3)
    draw_outputs(model, x, 7, one, elements=300)
    skip_draws(model, x, 7, other, elements=300)
    assert torch.equal(one.get_state(), other.get_state())
    skip_draws(model, x, 7, other, elements=300)  # control: it does move
    assert not torch.equal(one.get_state(), other.get_state())
