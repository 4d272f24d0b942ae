import pytest
import torch
from torch import Tensor, nn

from gramian.compress import chains
from gramian.compress.chains import Chain, sparse, steps_of
from gramian.compress.draws import draw_outputs
from gramian.compress.masks import add_masks, masks_of, originals_of
from gramian.compress.structures import Columns, Patterns, Rows, Weights

EXAMPLES = 600
"""Enough for sums over few weights, and no multiple of a block."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(count: int = EXAMPLES) -> Tensor:
    return torch.randn(count, 16, generator=seeded(7))


def network() -> nn.Module:
    """A chain that begins without masks and works in place on its inputs."""
    layers = [nn.LeakyReLU(0.5, inplace=True), nn.Linear(16, 16), nn.Tanh()]
    layers += [nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24, bias=False), nn.GELU(), nn.Linear(24, 5)]
    model = nn.Sequential(*layers)
    for k, value in enumerate(model.parameters()):
        nn.init.normal_(value, std=0.5, generator=seeded(k))
    return model.eval()


def masked(structure: Weights, low: float = 0.03, **options) -> nn.Module:
    """Return it with λ of `low` and, for every 13th unit, of 0.7."""
    model = network()
    for mask in add_masks(model, exclude="1", structure=structure, **options).values():
        chosen = (torch.arange(mask.kept.numel()) % 13 == 3).view(mask.kept.shape)
        mask.logits.data = structure.start(torch.where(chosen, 0.7, low).to(mask.logits.dtype))
    return model


def ready(model: nn.Module, x: Tensor) -> Chain:
    steps = steps_of(model, x)
    assert steps is not None
    return Chain(model, steps, x)


def one_by_one(model: nn.Module, x: Tensor, count: int) -> Tensor:
    """Return the outputs of the same draws in double precision, from whole weights put into a plain model."""
    masks, weights, generator = masks_of(model), originals_of(model), seeded()
    drawn = {name: mask.draws(weights[name], count, generator) for name, mask in masks.items()}
    plain, found = network().double(), []
    with torch.no_grad():
        for k in range(count):
            for name, weight in drawn.items():
                plain.get_submodule(name).weight.copy_(weight[k])
            found.append(plain(x.double()))
    return torch.stack(found)


@pytest.mark.parametrize("structure", [Weights(), Rows(), Columns(2), Patterns(1, 8)])
@pytest.mark.parametrize("low", [0.03, 0.97])
def test_sums_over_few_weights_are_the_products(structure, low):
    model, x = masked(structure, low), inputs()
    few = [layer.is_sparse for layer in ready(model, x).layers.values()]
    assert few == [
        True,
        low < 0.5 or isinstance(structure, Patterns),
        low < 0.5 or isinstance(structure, Patterns),
    ]
    found = draw_outputs(model, x, 6, seeded())
    expected = one_by_one(model, x, 6)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert (expected[1:] - expected[:1]).abs().amax((1, 2)).median() > 0.1  # the draws differ
    with torch.no_grad():
        originals_of(model)["7"] *= 1.01
    assert not torch.allclose(draw_outputs(model, x, 6, seeded()).double(), expected, rtol=1e-4, atol=1e-4)


def test_where_sums_over_few_weights_are_not_taken():
    few = masked(Weights())
    dense = [
        ready(few, inputs(chains.SPARSE_EXAMPLES)),
        ready(masked(Weights()).double(), inputs().double()),
        ready(masked(Weights(), weights="gaussian"), inputs()),
        ready(masked(Weights(), low=0.4), inputs()),
    ]
    for chain in dense:
        assert not any(layer.is_sparse or layer.has_common for layer in chain.layers.values())
        assert {len(block) for block in chain.blocks} == {16}
    few_blocks = ready(few, inputs()).blocks
    assert {len(block) for block in few_blocks} == {16 + 24}  # what is in common is below the inputs
    assert all(layer.is_sparse for layer in ready(few, inputs()).layers.values())
    for count in (chains.SPARSE_EXAMPLES, EXAMPLES):  # both ways give the same
        x = inputs(count)
        found = draw_outputs(few, x, 4, seeded()).double()
        torch.testing.assert_close(found, one_by_one(few, x, 4), rtol=1e-4, atol=1e-4)


def test_inputs_and_examples_stay_apart():
    model, x = masked(Weights()), inputs()
    before = x.clone()
    whole = draw_outputs(model, x, 5, seeded())
    assert torch.equal(x, before)
    order = torch.randperm(EXAMPLES, generator=seeded(5))
    torch.testing.assert_close(
        draw_outputs(model, x[order], 5, seeded()), whole[:, order], rtol=1e-5, atol=1e-5
    )
    blocks = ready(model, x).blocks
    assert [block.shape[1] for block in blocks] == [192, 192, 192, 24]
    assert torch.equal(
        draw_outputs(model, x, 5, seeded(), elements=1)[0], draw_outputs(model, x, 1, seeded())[0]
    )


def test_products_with_lists_of_entries():
    weight = torch.randn(3, 4, generator=seeded(1))
    kept = torch.rand(5, 3, 4, generator=seeded(2)) < 0.4
    kept[1], kept[2, 1], kept[4, 2] = False, False, True  # an empty matrix, an empty and a full row
    shared, own = torch.randn(4, 7, generator=seeded(3)), torch.randn(5, 4, 7, generator=seeded(4))
    places = torch.tensor([0, 1, 2, 3]).expand(3, 4)
    for columns, rows in ((shared, 0), (own, 4)):
        product = sparse(kept, weight, places, rows) @ columns
        torch.testing.assert_close(product, (kept * weight) @ columns, rtol=1e-6, atol=1e-6)
    moved = sparse(kept, weight, places.flip(1)) @ shared
    torch.testing.assert_close(moved, (kept * weight) @ shared.flip(0), rtol=1e-6, atol=1e-6)
    assert not sparse(kept[1:2], weight, places).values.numel()
    torch.testing.assert_close(sparse(kept[1:2], weight, places) @ shared, torch.zeros(1, 3, 7))
