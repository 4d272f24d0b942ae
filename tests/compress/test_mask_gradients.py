from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from gramian.compress import mask_gradients as estimators
from gramian.compress.draws import MaskedLoss, flat_logits, set_gradients
from gramian.compress.linear_masks import LinearMasks
from gramian.compress.masks import add_masks, hard_concrete, masks_of
from gramian.errors import InputError


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(p: int = 5) -> tuple[LinearMasks, Tensor]:
    x = rows(20, p)
    return LinearMasks(x, x.sum(1) / 2 + rows(20, seed=1), rows(p, seed=2)), rows(p, seed=3)


def network() -> tuple[MaskedLoss, Tensor]:
    """Return the loss of a 2-3-1 network with 9 masked weights on 30 examples, and logits."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    for k, value in enumerate(model.parameters()):
        nn.init.normal_(value, generator=torch.Generator().manual_seed(k))
    add_masks(model, dtype=torch.float64)
    x = rows(30, 2, seed=4)
    return MaskedLoss(model, x, x[:, :1] * x[:, 1:] + 1, mse_loss), rows(9, seed=6)


def errors(estimator, loss, logits: Tensor, exact: Tensor, calls: int = 300) -> Tensor:
    """Return the distance of the mean of many calls from the exact gradient, in standard errors."""
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([estimator(loss, logits, generator) for _ in range(calls)])
    return (found.mean(0) - exact) / (found.std(0) / calls**0.5).clamp(min=1e-12)


def cosine_and_bias(found: Tensor, exact: Tensor) -> tuple[float, float]:
    cosine = torch.cosine_similarity(found, exact, 0)
    return float(cosine), float((found - exact).norm() / exact.norm())


UNBIASED = {
    "score_function": partial(estimators.score_function, draws=32),
    "arm": partial(estimators.arm, draws=32),
    "disarm": partial(estimators.disarm, draws=32),
}


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("make", [linear, network])
def test_unbiased_estimators_agree_with_enumeration(name, make):
    loss, logits = make()
    loss = loss.loss if isinstance(loss, LinearMasks) else loss
    exact = estimators.enumeration(loss, logits)
    assert errors(UNBIASED[name], loss, logits, exact).abs().max() < 4
    assert errors(UNBIASED[name], loss, logits, -exact).abs().max() > 4  # control: another gradient is told


def test_enumeration_is_the_gradient_of_the_closed_form():
    model, logits = linear()
    chance = logits.sigmoid()
    exact = chance * (1 - chance) * model.gradient(chance)
    torch.testing.assert_close(estimators.enumeration(model.loss, logits), exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        estimators.mirror(exact, logits), model.gradient(chance), rtol=1e-10, atol=1e-10
    )


def test_expected_loss_is_linear_in_each_probability():
    loss, logits = network()
    chance = logits.sigmoid().requires_grad_()
    masks = estimators.all_masks(9, logits)
    losses = loss(masks).detach()
    expected = partial(estimators.expected_loss, lambda _: losses)
    curvature = torch.autograd.functional.hessian(expected, chance)
    torch.testing.assert_close(curvature.diagonal(), torch.zeros(9).double(), rtol=0, atol=1e-12)
    assert curvature.abs().max() > 1e-2  # control: pairs do interact
    (slopes,) = torch.autograd.grad(expected(chance), chance)
    for j in range(9):
        ends = [chance.detach().clone().index_fill_(0, torch.tensor(j), float(end)) for end in (0, 1)]
        rise = float(expected(ends[1]) - expected(ends[0]))
        assert rise == pytest.approx(float(slopes[j]), rel=1e-9, abs=1e-12)


def test_straight_through_misses_exactly_its_bias_on_a_linear_model():
    model, logits = linear()
    chance = logits.sigmoid()
    exact, factor = estimators.enumeration(model.loss, logits), chance * (1 - chance)
    bias = factor * model.straight_through_bias(chance)
    estimator = partial(estimators.straight_through, draws=32)
    assert errors(estimator, model.loss, logits, exact - bias).abs().max() < 4
    assert errors(estimator, model.loss, logits, exact).abs().max() > 20  # control: it is biased
    wrong = exact + bias
    assert errors(estimator, model.loss, logits, wrong).abs().max() > 20  # control: with the other sign
    half = estimators.straight_through_half
    assert errors(half, model.loss, logits, exact, 3000).abs().max() < 4


def test_straight_through_at_one_half_is_biased_where_the_loss_is_not_quadratic():
    model, logits = linear()

    def quartic(masks: Tensor) -> Tensor:
        return (model.y - (masks * model.weight) @ model.x.mT).pow(4).mean(-1)

    exact = estimators.enumeration(quartic, logits)
    assert errors(estimators.straight_through_half, quartic, logits, exact, 3000).abs().max() > 4


def test_relaxed_masks_are_biased_less_and_vary_more_when_cold():
    loss, logits = network()
    exact = estimators.enumeration(loss, logits)
    biases, spreads = [], []
    for temperature in (1.0, 0.5, 0.1):
        generator = torch.Generator().manual_seed(0)
        one = partial(estimators.relaxed, temperature=temperature, draws=1)
        spreads.append(float(torch.stack([one(loss, logits, generator) for _ in range(100)]).std(0).mean()))
        mean = estimators.relaxed(loss, logits, generator, temperature=temperature, draws=50_000)
        biases.append(cosine_and_bias(mean, exact)[1])
    assert biases[0] > biases[1] > 2 * biases[2]
    assert biases[2] < 0.2
    assert spreads[0] < spreads[1] < spreads[2]
    generator = torch.Generator().manual_seed(0)
    cosine, bias = cosine_and_bias(estimators.straight_through(loss, logits, generator, draws=50_000), exact)
    assert bias > biases[1]
    cosine_cold, _ = cosine_and_bias(
        estimators.relaxed(loss, logits, generator, temperature=0.1, draws=50_000), exact
    )
    assert cosine < 0.95 < cosine_cold


def test_moment_matching_is_exact_for_a_linear_layer_and_close_for_a_network():
    model = nn.Linear(5, 1, dtype=torch.float64)
    add_masks(model, dtype=torch.float64)
    x = rows(400, 5)
    loss, logits = MaskedLoss(model, x, x.sum(1, keepdim=True), mse_loss), rows(5, seed=3)
    exact = estimators.enumeration(loss, logits)
    assert errors(estimators.moment_matching, loss, logits, exact, 800).abs().max() < 4
    loss, logits = network()
    generator = torch.Generator().manual_seed(0)
    exact = estimators.enumeration(loss, logits)
    found = [estimators.moment_matching(loss, logits, generator) for _ in range(1000)]
    cosine, bias = cosine_and_bias(torch.stack(found).mean(0), exact)
    assert cosine > 0.98
    assert bias < 0.25
    values = torch.stack([loss.moments(logits, generator) for _ in range(1000)]).mean()
    expected = estimators.expected_loss(loss, logits.sigmoid())
    assert values.item() == pytest.approx(expected.item(), rel=0.05)
    assert loss(logits.sigmoid()[None]).item() < 0.95 * expected.item()  # control: the mean weights do not do


def test_variances_have_the_order_that_the_theory_gives():
    model, logits = linear()

    def spread(estimator) -> float:
        generator = torch.Generator().manual_seed(0)
        found = torch.stack([estimator(model.loss, logits, generator) for _ in range(2000)])
        return float(found.var(0).sum())

    arm, disarm = spread(estimators.arm), spread(estimators.disarm)
    assert disarm < arm
    few, many = (spread(partial(estimators.score_function, draws=draws)) for draws in (16, 64))
    assert few / many == pytest.approx(4, rel=0.15)


def test_hard_concrete_is_the_gradient_of_its_own_objective():
    model, logits = linear()
    quantiles = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
    for s in logits:
        z = hard_concrete(s, quantiles)
        kept = float((z > 0).double().mean())
        assert kept == pytest.approx(float(estimators.hard_concrete_kept(s)), abs=1e-5)
        assert float((z == 1).double().mean()) > 0
    mean = torch.stack([hard_concrete(s, quantiles).mean() for s in logits])
    raw = torch.stack([hard_concrete(s, quantiles).var() for s in logits])
    s = logits.clone().requires_grad_()
    numbers = quantiles[::1000]
    moments = [hard_concrete(each, numbers) for each in s]
    first, second = torch.stack([m.mean() for m in moments]), torch.stack([m.var() for m in moments])
    objective = model.loss(first[None])[0] + (model.scale * second * model.weight.square()).sum()
    exact = torch.autograd.grad(objective, s)[0]
    estimator = partial(estimators.hard_concrete, draws=32)
    assert errors(estimator, model.loss, logits, exact).abs().max() < 4
    bernoulli = estimators.enumeration(model.loss, logits)
    assert (
        errors(estimator, model.loss, logits, bernoulli).abs().max() > 10
    )  # control: it is no Bernoulli mask
    assert torch.allclose(first.detach(), mean, atol=1e-3)
    assert torch.allclose(second.detach(), raw, atol=1e-3)
    ends = estimators.hard_concrete_mean(torch.tensor([-9.0, 0.0, 9.0]))
    assert ends.tolist() == pytest.approx([0, 0.5, 1])


def test_every_estimator_has_one_signature():
    loss, logits = network()
    for name, estimator in estimators.ESTIMATORS.items():
        gradient = estimator(loss, logits, torch.Generator().manual_seed(0))
        again = estimator(loss, logits, torch.Generator().manual_seed(0))
        assert gradient.shape == logits.shape, name
        assert torch.equal(gradient, again), name
        other = estimator(loss, logits, torch.Generator().manual_seed(1))
        assert torch.equal(gradient, other) == (name == "enumeration"), name
        certain = estimator(loss, torch.full_like(logits, 60.0), torch.Generator().manual_seed(0))
        assert certain.isfinite().all(), name


def test_mirror_descent_does_not_stall_at_certain_masks():
    model, _ = linear()
    logits = torch.full((5,), 30.0, dtype=torch.float64)
    gradient = estimators.enumeration(model.loss, logits)
    assert gradient.abs().max() < 1e-9
    assert estimators.mirror(gradient, logits).abs().max() > 0.1
    assert torch.equal(estimators.mirror(gradient, logits + torch.inf), torch.zeros_like(logits))


def test_gradients_go_to_the_logits_of_the_model():
    loss, logits = network()
    gradient = estimators.enumeration(loss, logits)
    set_gradients(loss.model, gradient)
    masks = masks_of(loss.model)
    assert torch.equal(torch.cat([mask.logits.grad.flatten() for mask in masks.values()]), gradient)
    assert flat_logits(loss.model).shape == gradient.shape


def test_refusals():
    model, logits = linear()
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(InputError, match="2 draws"):
        estimators.score_function(model.loss, logits, generator, draws=1)
    with pytest.raises(InputError, match="at least one draw"):
        estimators.arm(model.loss, logits, generator, draws=0)
    with pytest.raises(InputError, match="temperature"):
        estimators.relaxed(model.loss, logits, generator, temperature=0)
    with pytest.raises(InputError, match="enumerated"):
        estimators.enumeration(model.loss, torch.zeros(17))
    with pytest.raises(InputError, match="knows the layers"):
        estimators.moment_matching(model.loss, logits, generator)
