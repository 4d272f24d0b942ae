import pytest
import torch
from torch import Tensor, nn

from gramian.compress.density import start_from
from gramian.compress.masks import add_masks, masks_of, originals_of
from gramian.compress.prior import divergence, prior_of, set_law
from gramian.compress.structures import Patterns, Rows, Weights
from gramian.errors import InputError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(**options: object) -> nn.Module:
    made = nn.Linear(4, 3, bias=False).double()
    made.weight.data.copy_(torch.randn(3, 4, generator=seeded(), dtype=torch.float64))
    add_masks(made, dtype=torch.float64, **options)  # type: ignore[arg-type]
    return made


@torch.no_grad()
def move(model: nn.Module, weights: bool = False) -> None:
    for mask in masks_of(model).values():
        mask.logits += torch.randn(mask.logits.shape, generator=seeded(5), dtype=torch.float64)
        if mask.log_std is not None:
            mask.log_std += 0.2 * torch.randn(mask.log_std.shape, generator=seeded(6), dtype=torch.float64)
    if weights:
        for weight in originals_of(model).values():
            weight += 0.3 * torch.randn(weight.shape, generator=seeded(7), dtype=torch.float64)


def test_the_divergence_of_masks_in_nats():
    model = layer()
    start_from(model, {"": torch.ones(3, 4, dtype=torch.bool)})
    prior = prior_of(model)
    assert divergence(model, prior).item() == pytest.approx(0, abs=1e-6)
    for probability, nats in [(0.1, 1.7578), (0.5, 0.5108), (0.99, 0.0713)]:
        with torch.no_grad():
            masks_of(model)[""].logits.fill_(torch.tensor(probability, dtype=torch.float64).logit())
        assert divergence(model, prior).item() == pytest.approx(12 * nats, abs=12e-4)
    with torch.no_grad():
        masks_of(model)[""].logits.fill_(-torch.inf)
    assert divergence(model, prior).item() == pytest.approx(12 * 2.3026, abs=12e-4)


@pytest.mark.parametrize("structure", [Weights(), Rows(), Patterns(1, 2)])
@pytest.mark.parametrize("weights", ["frozen", "gaussian"])
def test_the_divergence_is_the_mean_log_ratio_of_draws(structure, weights):
    model = layer(structure=structure, weights=weights, std=0.5, probability=0.6)
    prior = prior_of(model)
    move(model, weights == "gaussian")
    mask, w = masks_of(model)[""], originals_of(model)[""].detach()
    own, count = prior[""], 200_000
    noise = torch.rand(count, *mask.logits.shape, generator=seeded())
    units = mask.structure.hard(mask.logits.detach(), noise).double()

    def log_mass(logits: Tensor) -> Tensor:
        if isinstance(structure, Patterns):
            index = (units.unsqueeze(-2) == structure.table(logits)).all(-1).double()
            return (index * logits.log_softmax(-1)).flatten(1).sum(1)
        return torch.distributions.Bernoulli(logits=logits).log_prob(units).flatten(1).sum(1)

    ratio = log_mass(mask.logits.detach()) - log_mass(own.logits)
    if mask.log_std is not None:
        assert own.std is not None
        std = mask.log_std.exp().detach()
        value = w + std * torch.randn(count, 3, 4, generator=seeded(1), dtype=torch.float64)
        slabs = torch.distributions.Normal(w, std).log_prob(value)
        slabs = slabs - torch.distributions.Normal(own.weight, own.std).log_prob(value)
        ratio = ratio + (mask.spread(units, w) * slabs).flatten(1).sum(1)
    error = (ratio.mean() - divergence(model, prior)) / (ratio.std() / count**0.5)
    assert abs(float(error.detach())) < 4
    assert divergence(model, prior).item() > 0.05


def test_a_deterministic_weight_that_moved_costs_everything():
    model = layer(weights="trainable")
    prior = prior_of(model)
    assert divergence(model, prior).isfinite()
    originals_of(model)[""].data[0, 0] += 1e-12
    assert divergence(model, prior).item() == float("inf")


def test_priors_are_clamped_frozen_and_given_back():
    model = layer(weights="gaussian")
    with torch.no_grad():
        masks_of(model)[""].logits.fill_(50.0)
    prior = prior_of(model, clamp=0.05)
    assert float(prior[""].logits.sigmoid().max()) == pytest.approx(0.95)
    assert divergence(model, prior).item() == pytest.approx(-12 * torch.tensor(0.95).log().item())
    set_law(model, prior)
    assert divergence(model, prior).item() == pytest.approx(0, abs=1e-12)
    move(model, True)
    assert divergence(model, prior).item() > 1
    divergence(model, prior).backward()
    assert all(value.grad is not None for value in model.parameters())
    set_law(model, prior)
    assert divergence(model, prior).item() == pytest.approx(0, abs=1e-12)


def test_refusals():
    with pytest.raises(InputError, match="clamp"):
        prior_of(layer(), clamp=0.5)
    with pytest.raises(InputError, match="no law for"):
        divergence(layer(), {})
    with pytest.raises(InputError, match="Gaussian in one"):
        divergence(layer(), prior_of(layer(weights="gaussian")))
