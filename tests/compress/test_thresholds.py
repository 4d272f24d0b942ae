import pytest
import torch
from torch import Tensor, nn

from gramian.compress.linear_masks import LinearMasks
from gramian.compress.masks import add_masks, draw, keep, masks_of, set_mode
from gramian.compress.structures import Patterns
from gramian.compress.thresholds import best_of, most_probable, probable
from gramian.errors import InputError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def problem() -> tuple[nn.Module, LinearMasks]:
    layer = nn.Linear(6, 1, bias=False).double()
    layer.weight.data.copy_(rows(1, 6, seed=4))
    linear = LinearMasks(rows(30, 6), rows(30, seed=1), layer.weight.detach()[0])
    mask = add_masks(layer, dtype=torch.float64)[""]
    with torch.no_grad():
        mask.logits.copy_(rows(1, 6, seed=7))
    return layer, linear


def test_probable_units_are_those_above_one_half():
    layer, _ = problem()
    assert torch.equal(probable(layer)[""], masks_of(layer)[""].probabilities > 0.5)
    with torch.no_grad():
        masks_of(layer)[""].logits.zero_()
    assert not probable(layer)[""].any()  # exactly ½ is not above


@pytest.mark.parametrize("count", [1, 3, 6])
def test_most_probable_units_have_an_exact_count(count):
    layer, _ = problem()
    kept = most_probable(layer, count / 6)[""]
    logits = masks_of(layer)[""].logits.detach()
    assert int(kept.sum()) == count
    assert torch.equal(kept, logits >= logits.flatten().sort(descending=True).values[count - 1])
    with torch.no_grad():
        logits.fill_(40.0)  # λ is 1 in floating point, and all are equal
    assert most_probable(layer, count / 6)[""].flatten().nonzero().flatten().tolist() == list(range(count))


def test_patterns_keep_their_most_probable_ones():
    layer = nn.Linear(4, 2)
    mask = add_masks(layer, structure=Patterns(2, 4))[""]
    with torch.no_grad():
        mask.logits.copy_(torch.randn(mask.logits.shape, generator=seeded()))
    best = probable(layer)[""]
    assert (best.sum(-1) == 2).all()
    table = mask.structure.table(mask.logits)
    assert torch.equal(best[0, 0].float(), table[mask.logits[0, 0].argmax()])
    assert (most_probable(layer, 0.5)[""].sum(-1) == 2).all()


def test_the_best_draw_is_at_least_as_good_as_every_draw_and_the_probable_mask():
    layer, linear = problem()
    y = linear.y[:, None]

    def loss(model: nn.Module) -> Tensor:
        return (model(linear.x) - y).square().mean()

    set_mode(layer, "mean")
    before = layer.weight.detach().clone()
    found = best_of(layer, loss, 20, seeded())
    assert torch.equal(layer.weight, before)  # the mode is as it was
    value = float(linear.loss(found[""].double())[0])
    assert value <= float(linear.loss(probable(layer)[""].double())[0])
    set_mode(layer, "sample")
    generator, lowest = seeded(), float("inf")
    for _ in range(20):
        draw(layer, generator)
        lowest = min(lowest, float(loss(layer)))
    assert value == pytest.approx(min(lowest, float(linear.loss(probable(layer)[""].double())[0])))
    worst = best_of(layer, lambda model: -loss(model), 20, seeded())
    assert float(linear.loss(worst[""].double())[0]) > value  # control
    keep(layer, found)
    assert float(loss(layer)) == pytest.approx(value)


def test_refusals():
    layer, _ = problem()
    with pytest.raises(InputError, match="at least one draw"):
        best_of(layer, lambda model: 0.0, 0, seeded())
    with pytest.raises(InputError, match="no mask has a loss"):
        best_of(layer, lambda model: float("nan"), 2, seeded())
    with pytest.raises(InputError, match="density"):
        most_probable(layer, 0.0)
