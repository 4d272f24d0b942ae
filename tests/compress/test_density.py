import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from gramian.compress import density as densities
from gramian.compress.masks import add_masks, draw, keep, masks_of, set_mode
from gramian.compress.structures import Patterns, Rows
from gramian.core.divergence import bernoulli_kl_of_logits
from gramian.errors import InputError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chances(p: int, seed: int = 0) -> Tensor:
    return torch.rand(p, generator=seeded(seed), dtype=torch.float64)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).double()


def scores_of(model: nn.Module, levels: int = 1000) -> dict[str, Tensor]:
    return {
        name: torch.randint(levels, mask.kept.shape, generator=seeded(k)).double()
        for k, (name, mask) in enumerate(masks_of(model).items())
    }


def count(kept: dict[str, Tensor]) -> int:
    return sum(int(value.sum()) for value in kept.values())


@pytest.mark.parametrize("density", [1e-2, 0.05, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("levels", [1, 2, 1000])
def test_counts_are_exact_whatever_the_ties(density, levels):
    model = mlp()
    add_masks(model)
    scores = scores_of(model, levels)
    kept = densities.keep_highest(model, scores, density)
    assert count(kept) == round(density * 144)
    flat, chosen = (torch.cat([v.flatten() for v in d.values()]) for d in (scores, kept))
    if not chosen.all():
        assert flat[chosen].min() >= flat[~chosen].max()
    edge = flat[chosen].min()
    tied = chosen[flat == edge]
    assert torch.equal(tied, tied.sort(descending=True, stable=True).values)  # the first of equal ones
    keep(model, kept)
    assert densities.density_of(model) == round(density * 144) / 144


def test_a_threshold_by_value_would_lose_ties():
    scores = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0])
    kept = densities.highest({"": scores}, {"": 1}, 0.4)[""]
    assert kept.tolist() == [True, True, False, False, False]
    assert int((scores > scores.sort(descending=True).values[1]).sum()) == 1  # control: one short


def test_layers_compete_or_have_equal_densities():
    model = mlp()
    add_masks(model)
    scores = scores_of(model)
    scores["2"] += 2000
    assert densities.keep_highest(model, scores, 0.25)["0"].sum() == 0
    kept = densities.keep_highest(model, scores, 0.25, "layer")
    assert [int(kept[name].sum()) for name in ("0", "2")] == [24, 12]


def test_units_of_unequal_size_fit_the_budget():
    model = mlp()
    add_masks(model, structure=Rows())
    scores = {"0": torch.arange(12.0), "2": torch.tensor([20.0, 5.5, 21, 0])}
    kept = densities.keep_highest(model, scores, 0.3)  # 43 of 144 weights: two rows of 12 and two of 8
    assert kept["2"].tolist() == [True, False, True, False]
    assert kept["0"].nonzero().flatten().tolist() == [10, 11]
    assert densities.sizes_of(model) == {"0": 8, "2": 12}


def test_patterns_keep_n_of_every_m():
    model = mlp()
    add_masks(model, structure=Patterns(1, 4))
    kept = densities.keep_highest(model, scores_of(model, 2), 0.25)
    assert all((value.sum(-1) == 1).all() for value in kept.values())
    with pytest.raises(InputError, match=r"1 of every 4 .* out of reach, only 0\.25"):
        densities.keep_highest(model, scores_of(model), 0.5)
    with pytest.raises(InputError, match="out of reach"):
        densities.project_model(model, 0.5)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.001, math.nan])
def test_densities_out_of_range_are_refused(density):
    model = mlp()
    add_masks(model)
    for call in (
        lambda: densities.keep_highest(model, scores_of(model), density),
        lambda: densities.project(chances(5), density),
        lambda: densities.shift(chances(5), density),
        lambda: densities.project_model(model, density),
        lambda: densities.cubic(0, 0, 10, 1.0, density),
        lambda: densities.start_smoothly(model, scores_of(model), density),
    ):
        with pytest.raises(InputError, match="density"):
            call()


def test_refusals():
    model = mlp()
    add_masks(model, structure=Rows())
    with pytest.raises(InputError, match=r"0\.02 keeps no unit of the model: of 144 weights it allows 3"):
        densities.keep_highest(model, scores_of(model), 0.02)
    with pytest.raises(InputError, match="keeps no unit of '2'"):
        densities.keep_highest(model, scores_of(model), 0.2, "layer")
    with pytest.raises(InputError, match="score for each"):
        densities.keep_highest(model, {"0": torch.ones(12)}, 0.5)
    with pytest.raises(InputError, match="unknown scope"):
        densities.keep_highest(model, scores_of(model), 0.5, "net")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not a number"):
        densities.highest({"": torch.tensor([1.0, math.nan])}, {"": 1}, 0.5)
    with pytest.raises(InputError, match="low ≤ high"):
        densities.start_from(model, scores_of(model), 0.2, 0.8)
    with pytest.raises(InputError, match="cannot have the mean"):
        densities.start_smoothly(model, scores_of(model), 0.005)
    with pytest.raises(InputError, match="infinite logits"):
        densities.shift(chances(3), 1.0)
    with pytest.raises(InputError, match="begin before"):
        densities.cubic(0, 5, 5, 1.0, 0.5)


def test_starts():
    model = mlp()
    masks, scores = add_masks(model, dtype=torch.float64), scores_of(model)
    kept = densities.keep_highest(model, scores, 0.1)
    densities.start_from(model, kept)
    for name, mask in masks.items():
        expected = torch.where(kept[name], 0.9, 0.1).double()
        torch.testing.assert_close(mask.probabilities, expected, rtol=1e-6, atol=0)
    densities.start_smoothly(model, scores, 0.2)
    set_mode(model, "mean")
    assert densities.density_of(model) == pytest.approx(0.2, abs=1e-12)
    flat, chance = (
        torch.cat([v.detach().flatten() for v in d])
        for d in (scores.values(), [m.probabilities for m in masks.values()])
    )
    order = flat.argsort(stable=True)
    assert (chance[order].diff() >= -1e-12)[flat[order].diff() > 0].all()
    assert chance.min() >= 0.01 - 1e-12
    assert chance.max() <= 0.99 + 1e-12


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_projection_is_the_nearest_point_of_that_density(density):
    chance, sizes = chances(40), 1 + 5 * chances(40, 1)
    found = densities.project(chance, density, sizes)
    share = sizes / sizes.sum()
    assert float(found @ share) == pytest.approx(density, abs=1e-12)

    def distance(values: Tensor) -> float:
        return float((sizes * (values - chance).square()).sum())

    for seed in range(200):  # other points of the same density are farther
        other = (found + 0.02 * (chances(40, seed) - 0.5)).clamp(0, 1)
        other = densities.project(other, density, sizes)
        if float(other @ share) > density - 1e-12:
            assert distance(other) >= distance(found)
    below = densities.project(chance * 0.01, density, sizes)
    assert torch.equal(below, chance * 0.01)  # nothing to do
    scaled = chance * density / float(chance @ share)
    assert distance(scaled) > distance(found)  # control: scaling down is no projection


def test_shifted_logits_have_the_density_and_the_least_divergence():
    logits = 4 * chances(40) - 2
    found = densities.shift(logits, 0.2)
    assert float(found.sigmoid().mean()) == pytest.approx(0.2, abs=1e-12)
    least = bernoulli_kl_of_logits(found, logits).sum()
    other = densities.project(logits.sigmoid(), 0.2).logit()
    assert least < bernoulli_kl_of_logits(other, logits).sum()


def test_a_model_is_projected_over_all_layers():
    model = mlp()
    masks = add_masks(model, dtype=torch.float64, structure=Rows())
    with torch.no_grad():
        for k, mask in enumerate(masks.values()):
            mask.logits.copy_(torch.randn(mask.logits.shape, generator=seeded(k)))
    densities.project_model(model, 0.3, clamp=1e-12)
    set_mode(model, "mean")
    assert densities.density_of(model) == pytest.approx(0.3, abs=1e-9)
    set_mode(model, "sample")
    draws = []
    generator = seeded()
    for _ in range(2000):
        draw(model, generator)
        draws.append(densities.density_of(model))
    assert sum(draws) / len(draws) == pytest.approx(0.3, abs=0.01)


def test_cubic_schedule():
    values = [densities.cubic(step, 10, 30, 1.0, 0.1) for step in range(40)]
    assert values[:11] == [1.0] * 11
    assert values[30:] == [0.1] * 10
    assert values[20] == pytest.approx(0.1 + 0.9 / 8)
    assert all(a >= b for a, b in pairwise(values))
