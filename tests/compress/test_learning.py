from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from gramian.compress.density import cubic, density_of, keep_highest, shift, start_from, start_smoothly
from gramian.compress.learning import BINS, LARGEST_LOGIT, Learning, fix_hard_concrete, learn
from gramian.compress.linear_masks import LinearMasks
from gramian.compress.mask_gradients import all_masks, hard_concrete_kept, hard_concrete_mean
from gramian.compress.masks import add_masks, export_state, keep, masks_of, originals_of
from gramian.compress.prior import divergence, prior_of
from gramian.compress.scores import magnitude
from gramian.compress.structures import Columns, Patterns, Rows, Weights
from gramian.compress.thresholds import most_probable
from gramian.errors import InputError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def laboratory(seed: int, p: int = 6) -> LinearMasks:
    """Return a linear model some of whose weights are right and some wrong."""
    x = rows(40, p, seed=seed)
    truth = torch.rand(p, generator=seeded(seed + 100), dtype=torch.float64) + 0.5
    wrong = torch.arange(p) % 3 == seed
    return LinearMasks(x, x @ truth + 0.1 * rows(40, seed=seed + 300), torch.where(wrong, -truth, truth))


def network_of(problem: LinearMasks) -> nn.Linear:
    """Return the linear model of a laboratory as a masked layer, every λ at a half."""
    layer = nn.Linear(len(problem.weight), 1, bias=False).double()
    layer.weight.data.copy_(problem.weight)
    add_masks(layer, probability=0.5, dtype=torch.float64)
    return layer


def learn_linear(problem: LinearMasks, settings: Learning, **options) -> tuple[nn.Linear, Tensor]:
    """Return the masked layer and the λ it learns on all data in every step."""
    layer = network_of(problem)
    data = problem.x, problem.y[:, None]
    learn(layer, lambda step: data, mse_loss, settings, generator=seeded(), **options)
    return layer, masks_of(layer)[""].probabilities.detach()[0]


def classes() -> tuple[Tensor, Tensor]:
    x = rows(120, 8, seed=7)
    return x, (x[:, :3] + 0.2 * rows(120, 3, seed=8)).argmax(-1)


def sample(step: int) -> tuple[Tensor, Tensor]:
    x, y = classes()
    chosen = torch.randint(len(x), (32,), generator=seeded(step))
    return x[chosen], y[chosen]


def network(**options) -> nn.Module:
    """Return a masked network with normalisation, in training."""
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4, bias=True))
    for k, value in enumerate(model.double().parameters()):
        nn.init.normal_(value, std=0.5, generator=seeded(k))
    add_masks(model, **{"dtype": torch.float64, "probability": 0.7, **options})
    return model


def others(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of everything but logits."""
    return {name: value.clone() for name, value in model.state_dict().items() if "logits" not in name}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    now = others(model)
    return {name for name, value in before.items() if not torch.equal(value, now[name])}


def logits_of(model: nn.Module) -> Tensor:
    return torch.cat([mask.logits.detach().flatten() for mask in masks_of(model).values()])


SHORT = partial(Learning, steps=20, record_every=5)
VERTICES = {
    "moments": Learning(steps=600, rate=1.0),
    "relaxed": Learning(steps=1500, rate=1.0, mode="relaxed", temperature=(0.2, 0.02)),
    "score_function": Learning(steps=600, rate=1.0, mode="score_function"),
    "disarm": Learning(steps=600, rate=1.0, mode="disarm", draws=4),
}


@pytest.mark.parametrize("mode", VERTICES)
@pytest.mark.parametrize("seed", [0, 1])
def test_learning_ends_at_the_best_of_all_masks(mode, seed):
    problem = laboratory(seed)
    best = problem.loss(all_masks(6, problem.weight)).min()
    layer, chance = learn_linear(problem, VERTICES[mode])
    mask = (chance > 0.5).double()
    assert problem.expected_loss(chance) - best < 1e-3
    assert torch.equal(mask, problem.coordinate_descent(torch.full((6,), 0.5).double()))
    assert torch.equal(layer.weight.detach()[0], mask * problem.weight)  # the mode is "threshold" now
    assert problem.expected_loss(torch.full((6,), 0.5).double()) - best > 0.1  # there was something to learn


def test_control_a_shuffled_gradient_and_other_labels_do_not_find_it():
    problem = laboratory(0)
    best = problem.loss(all_masks(6, problem.weight)).min()
    layer = network_of(problem)
    masks_of(layer)[""].logits.register_hook(lambda gradient: gradient.roll(1, -1))
    data = problem.x, problem.y[:, None]
    learn(layer, lambda step: data, mse_loss, VERTICES["moments"], generator=seeded())
    assert problem.expected_loss(masks_of(layer)[""].probabilities.detach()[0]) - best > 0.1
    wrong = LinearMasks(problem.x, problem.y[torch.randperm(40, generator=seeded(1))], problem.weight)
    chance = learn_linear(wrong, VERTICES["moments"])[1]
    assert problem.expected_loss(chance) - best > 0.1


def test_a_held_density_keeps_the_largest_gains():
    """Of orthogonal columns the best k weights are those of largest alignment, which is known."""
    x = torch.linalg.qr(rows(40, 8)).Q * 40**0.5
    weight = torch.tensor([0.2, 0.25, 0.3, 0.35, 1.0, 1.2, 1.4, 1.6]).double()
    problem = LinearMasks(x, x @ weight, weight)
    gains = problem.alignment()
    assert (gains > 0).all()
    top = gains.argsort(descending=True)[:4].sort().values
    layer, _ = learn_linear(problem, Learning(steps=400), density=0.5)
    assert torch.equal(most_probable(layer, 0.5)[""][0].nonzero()[:, 0], top)
    blind = network_of(problem)  # control: a scale for every unit hides which gain is large
    masks_of(blind)[""].logits.register_hook(lambda gradient: gradient / gains)
    data = x, problem.y[:, None]
    learn(blind, lambda step: data, mse_loss, Learning(steps=400), density=0.5, generator=seeded())
    assert not torch.equal(most_probable(blind, 0.5)[""][0].nonzero()[:, 0], top)


def first_step(model: nn.Module, slopes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return how one step moves the logits when ∂F/∂λ of every unit is as given."""
    masks = masks_of(model)
    before = {name: mask.logits.detach().clone() for name, mask in masks.items()}

    def objective(loss: Tensor) -> Tensor:
        return sum(((slopes[name] * mask.probabilities).sum() for name, mask in masks.items()), 0 * loss)

    settings = Learning(steps=1, mode="relaxed", rate=0.1)
    learn(model, sample, cross_entropy, settings, objective=objective, generator=seeded())
    return {name: mask.logits.detach() - before[name] for name, mask in masks.items()}


@pytest.mark.parametrize(("structure", "sizes"), [(Weights(), (1, 1)), (Rows(2), (16, 24))])
def test_a_step_is_along_the_slope_by_probability_and_weight_in_one_scale(structure, sizes):
    model = network(structure=structure)
    start_smoothly(model, magnitude(model), 0.5)  # λ differ, and their variance does not count
    slopes = {name: rows(*mask.kept.shape, seed=9) for name, mask in masks_of(model).items()}
    steps = first_step(model, slopes)
    gains = {name: slopes[name] / size for name, size in zip(slopes, sizes, strict=True)}
    scale = torch.cat([gain.flatten() for gain in gains.values()]).square().mean().sqrt()
    for name, gain in gains.items():
        certain = masks_of(model)[name].probabilities.detach().sub(0.5).abs() > 0.45
        torch.testing.assert_close(steps[name][~certain], -0.1 * (gain / scale)[~certain], rtol=0.02, atol=0)


def test_of_patterns_the_step_is_along_the_slope_of_the_categories():
    model = network(structure=Patterns(2, 4))
    for mask in masks_of(model).values():  # unequal, and none so rare that its probability does not count
        mask.logits.data.copy_(rows(*mask.logits.shape, seed=8).clamp(-1, 1))
    slopes = {name: rows(*mask.kept.shape, seed=9) for name, mask in masks_of(model).items()}
    steps = first_step(model, slopes)
    table = Patterns(2, 4).table(slopes["0"])
    gains = {name: slope @ table.mT - slope.sum(-1, keepdim=True) / 2 for name, slope in slopes.items()}
    scale = torch.cat([gain.flatten() for gain in gains.values()]).square().mean().sqrt()
    for name, gain in gains.items():
        torch.testing.assert_close(steps[name], -0.1 * gain / scale, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["moments", "relaxed", "straight_through", "hard_concrete", "disarm"])
def test_masks_alone_leave_everything_else_as_it_is(mode):
    model = network()
    before, trainable = others(model), [value.requires_grad for value in model.parameters()]
    logits = logits_of(model)
    learn(model, sample, cross_entropy, SHORT(mode=mode), generator=seeded())
    assert moved(before, model) <= {f"{k}.parametrizations.weight.0.noise" for k in (0, 3)}
    assert not torch.equal(logits_of(model), logits)
    assert [value.requires_grad for value in model.parameters()] == trainable
    assert all(value.grad is None for value in model.parameters())
    assert all(module.training for module in model.modules())
    expected = "hard_concrete" if mode == "hard_concrete" else "threshold"
    assert {mask.mode for mask in masks_of(model).values()} == {expected}


def test_both_moves_weights_and_statistics_too():
    model = network(weights="trainable")
    before, logits = others(model), logits_of(model)
    dict(model.named_parameters())["3.bias"].requires_grad_(False)  # what is frozen by its owner stays
    learn(model, sample, cross_entropy, SHORT(learn="both"), generator=seeded())
    parts = {"0.parametrizations.weight.original", "3.parametrizations.weight.original", "0.bias"}
    assert {*parts, "1.weight", "1.running_mean"} <= moved(before, model)
    assert "3.bias" not in moved(before, model)
    assert not torch.equal(logits_of(model), logits)


def test_weights_alone_are_learnt_under_the_random_mask():
    model = network()  # frozen weights learn for the time of training
    before, logits = others(model), logits_of(model)
    learn(model, sample, cross_entropy, SHORT(learn="weights"), generator=seeded())
    assert "0.parametrizations.weight.original" in moved(before, model)
    assert torch.equal(logits_of(model), logits)
    assert not originals_of(model)["0"].requires_grad


@pytest.mark.parametrize("mode", ["moments", "relaxed"])
def test_of_gaussian_weights_only_what_has_a_law_moves(mode):
    model = network(weights="gaussian")
    before = others(model)
    learn(model.eval(), sample, cross_entropy, SHORT(mode=mode, learn="both"), generator=seeded())
    changed = {name for name in moved(before, model) if "noise" not in name}
    assert changed == {f"{k}.parametrizations.weight.{v}" for k in (0, 3) for v in ("original", "0.log_std")}


def test_a_kept_mask_is_fine_tuned_and_what_is_outside_does_not_move():
    model = network()
    keep(model, keep_highest(model, magnitude(model), 0.3))
    before = {name: weight.detach().clone() for name, weight in originals_of(model).items()}
    settings = SHORT(steps=60, mode="kept", learn="weights")
    history = learn(model, sample, cross_entropy, settings, generator=seeded())
    for name, mask in masks_of(model).items():
        same = originals_of(model)[name] == before[name]
        assert same[~mask.kept].all()
        assert not same[mask.kept].all()  # control: what is kept learns
        assert mask.mode == "kept"
    assert history[-1].loss < history[0].loss - 0.1
    assert history[-1].density == pytest.approx(density_of(model))


@pytest.mark.parametrize("structure", [Weights(), Rows(2), Columns(2)])
@pytest.mark.parametrize("mode", ["relaxed", "hard_concrete", "score_function"])
def test_the_density_is_held_at_every_record(structure, mode):
    model = network(structure=structure, probability=0.9)
    settings = Learning(steps=20, mode=mode, record_every=1, rate=0.3)
    history = learn(
        model, sample, cross_entropy, settings, density=0.3, first_density=0.8, generator=seeded()
    )
    aims = [cubic(moment.step, 0, 10, 0.8, 0.3) for moment in history]
    assert all(moment.density <= aim + 1e-4 for moment, aim in zip(history, aims, strict=True))
    assert history[-1].density > 0.25  # it is held, not thrown away
    free = network(structure=structure, probability=0.9)
    history = learn(free, sample, cross_entropy, settings, generator=seeded())
    assert history[-1].density > 0.5  # control: nobody holds it


@pytest.mark.parametrize("edge", [0.0, 3.0, 11.0])
@pytest.mark.parametrize("density", [0.02, 0.3, 0.49])
def test_the_density_is_reached_by_the_shift_of_least_divergence(edge, density):
    layer = nn.Linear(10, 30, bias=False).double()
    mask = add_masks(layer, dtype=torch.float64)[""]
    start = rows(30, 10) + edge * torch.tensor([-1.0, 1.0]).double().repeat(5)
    mask.logits.data.copy_(start)
    data = rows(4, 10, seed=1), rows(4, 30, seed=2)
    still = Learning(steps=1, rate=1e-12)
    learn(layer, lambda step: data, mse_loss, still, density=density, generator=seeded())
    start = start.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    expected = shift(start.flatten(), density).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    torch.testing.assert_close(mask.logits.detach().flatten(), expected, rtol=1e-4, atol=1e-4)


def test_patterns_are_learnt_and_keep_their_density():
    model = network(structure=Patterns(2, 4))
    logits = logits_of(model)
    settings = SHORT(steps=100, mode="relaxed")
    history = learn(model, sample, cross_entropy, settings, density=0.5, generator=seeded())
    assert all(moment.density == pytest.approx(0.5) for moment in history)
    assert history[-1].loss < history[0].loss - 0.2
    assert not torch.equal(logits_of(model), logits)
    with pytest.raises(InputError, match="keeps 2 of every 4"):
        learn(model, sample, cross_entropy, settings, density=0.3, generator=seeded())


def test_hard_concrete_masks_reach_the_density_and_become_a_plain_network():
    model = network(probability=0.9).eval()
    settings = Learning(steps=100, mode="hard_concrete", rate=0.3)
    history = learn(
        model, sample, cross_entropy, settings, density=0.3, first_density=1.0, generator=seeded()
    )
    masks, weights = masks_of(model), originals_of(model)
    chance = hard_concrete_kept(logits_of(model)).mean()
    assert history[-1].density == pytest.approx(float(chance)) == pytest.approx(0.3, abs=0.01)
    factors = {name: hard_concrete_mean(mask.logits.detach()) for name, mask in masks.items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    units = fix_hard_concrete(model, 0.3)
    for name in masks:
        expected = torch.where(units[name], factors[name] * before[name], 0.0)
        assert torch.equal(export_state(model)[f"{name}.weight"], expected)
        assert factors[name][units[name]].min() >= factors[name][~units[name]].max()
    assert density_of(model) == pytest.approx(0.3, abs=0.01)
    assert not all(torch.equal(weights[name], before[name]) for name in masks)  # control: ẑ scales


def test_the_history_counts_every_unit():
    model = network(probability=0.5)
    history = learn(model, sample, cross_entropy, SHORT(record_every=6), generator=seeded())
    assert [moment.step for moment in history] == [1, 6, 12, 18, 20]
    for moment in history:
        assert {name: sum(counts) for name, counts in moment.histograms.items()} == {"0": 96, "3": 48}
        assert all(len(counts) == BINS for counts in moment.histograms.values())
    for name, mask in masks_of(model).items():
        edges = (mask.probabilities.detach() * BINS).floor().long().flatten()
        assert history[-1].histograms[name] == tuple(edges.bincount(minlength=BINS).tolist())
    chance = torch.cat([mask.probabilities.detach().flatten() for mask in masks_of(model).values()])
    assert history[-1].density == pytest.approx(float(chance.mean()))
    assert history[0].histograms != history[-1].histograms  # control: they say something


def test_a_record_is_the_mean_since_the_last_one():
    def loss(outputs: Tensor, step: Tensor) -> Tensor:
        return 0 * outputs.sum() + step

    def numbered(step: int) -> tuple[Tensor, Tensor]:
        return sample(step)[0], torch.tensor(float(step))

    history = learn(network(), numbered, loss, SHORT(), objective=lambda loss: 2 * loss, generator=seeded())
    assert [moment.loss for moment in history] == [0, 2.5, 7, 12, 17]
    assert [moment.objective for moment in history] == [0, 5, 14, 24, 34]


@pytest.mark.parametrize("mode", ["moments", "relaxed", "hard_concrete", "score_function", "disarm"])
def test_the_generator_decides_all(mode):
    runs = []
    for seed in (3, 3, 4):
        model = network()
        learn(model, sample, cross_entropy, SHORT(mode=mode), density=0.4, generator=seeded(seed))
        runs.append(logits_of(model))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("mode", ["moments", "disarm"])
def test_the_objective_is_what_is_minimised(mode):
    problem = laboratory(0)
    chances, penalties = {}, {}
    for weight in (0.0, 1e6):
        layer = network_of(problem)
        prior, data = prior_of(layer), (problem.x, problem.y[:, None])
        chance = masks_of(layer)[""].probabilities.detach()
        history = learn(
            layer,
            lambda step, data=data: data,
            mse_loss,
            SHORT(steps=300, mode=mode),
            objective=lambda loss, layer=layer, prior=prior, w=weight: loss + w * divergence(layer, prior),
            generator=seeded(),
        )
        chances[weight] = (masks_of(layer)[""].probabilities.detach() - chance).abs().max()
        penalties[weight] = [moment.objective - moment.loss for moment in history]
    assert chances[1e6] < 1e-2
    assert chances[0.0] > 0.4  # control: without the penalty λ leaves the prior
    assert max(penalties[0.0]) == 0 < max(penalties[1e6])


def test_an_objective_that_turns_the_loss_round_turns_learning_round():
    problem = laboratory(0)
    losses = problem.loss(all_masks(6, problem.weight))
    for mode in ("moments", "disarm"):
        _, chance = learn_linear(problem, VERTICES[mode], objective=lambda loss: -loss)
        assert problem.expected_loss(chance) > losses.max() - 0.1 * (losses.max() - losses.min())


@pytest.mark.parametrize("mode", ["score_function", "disarm"])
def test_the_black_box_learns_by_errors_alone(mode):
    x, y = classes()
    model = network(probability=0.5).eval()

    def error(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(-1) != targets).double().mean()

    history = learn(
        model, lambda step: (x, y), error, SHORT(steps=200, mode=mode, rate=0.3), generator=seeded()
    )
    assert history[-1].loss < history[0].loss - 0.15
    other = y[torch.randperm(len(y), generator=seeded())]
    blank = network(probability=0.5).eval()
    history = learn(
        blank, lambda step: (x, other), error, SHORT(steps=200, mode=mode, rate=0.3), generator=seeded()
    )
    now = float(error(blank(x).detach(), y))
    assert now > float(error(model(x).detach(), y)) + 0.1  # control: shuffled labels teach nothing


def test_the_temperature_falls_and_the_caller_sees_and_stops_the_run():
    model, seen = network(), []
    temperatures = []

    def advanced(step: int) -> None:
        seen.append(step)
        temperatures.append(masks_of(model)["0"].temperature)

    settings = SHORT(mode="relaxed", temperature=(1.0, 0.01))
    learn(model, sample, cross_entropy, settings, generator=seeded(), advanced=advanced)
    ratios = torch.tensor(temperatures)[1:] / torch.tensor(temperatures)[:-1]
    torch.testing.assert_close(ratios, torch.full((19,), 0.01 ** (1 / 19)))
    assert (temperatures[0], temperatures[-1]) == (1.0, pytest.approx(0.01))
    assert seen == list(range(1, 21))
    seen.clear()
    history = learn(
        model,
        sample,
        cross_entropy,
        SHORT(),
        generator=seeded(),
        advanced=advanced,
        stopped=lambda: len(seen) > 6,
    )
    assert seen == list(range(1, 8))
    assert [moment.step for moment in history] == [1, 5]
    assert model(sample(0)[0]).isfinite().all()


def test_a_loss_that_is_no_number_is_told_and_the_model_is_left_in_order():
    model = network()
    trainable = [value.requires_grad for value in model.parameters()]
    with pytest.raises(InputError, match="not a number by step 1"):
        learn(model, sample, lambda o, y: o.sum() * torch.nan, SHORT(), generator=seeded())
    assert [value.requires_grad for value in model.parameters()] == trainable
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        (dict(mode="dropout"), {}, "unknown mode 'dropout'"),
        (dict(learn="biases"), {}, "unknown learn 'biases'"),
        (dict(steps=-1), {}, "steps must be at least 0"),
        (dict(record_every=0), {}, "record_every must be at least 1"),
        (dict(mode="score_function", draws=1), {}, "draws must be at least 2"),
        (dict(rate=0.0), {}, "rate must be a positive number"),
        (dict(weight_rate=float("nan")), {}, "weight_rate must be a positive number"),
        (dict(temperature=(1.0, 0.0)), {}, "both temperatures must be positive"),
        (dict(mode="kept"), {}, "fixed mask; learn weights, not masks"),
        (dict(mode="kept", learn="both"), {}, "fixed mask; learn weights, not both"),
        (dict(mode="disarm", learn="both"), {}, "disarm has no gradient by weights"),
        ({}, dict(density=0.0), "density must be more than 0"),
        ({}, dict(density=1e-6), "keeps no unit"),
        ({}, dict(first_density=0.5), "give density too"),
        ({}, dict(density=0.5, first_density=0.4), "first_density must be from the density of 0.5 to 1"),
        (dict(learn="weights"), dict(density=0.5), "held where masks are learnt"),
    ],
)
def test_what_cannot_be_learnt_is_refused_before_anything_changes(settings, options, said):
    model = network()
    before, logits = deepcopy(others(model)), logits_of(model)
    with pytest.raises(InputError, match=said):
        learn(model, sample, cross_entropy, Learning(**settings), generator=seeded(), **options)
    assert not moved(before, model)
    assert torch.equal(logits_of(model), logits)


def test_a_mode_that_a_layer_lacks_and_a_model_without_masks_are_refused():
    patterns = network(structure=Patterns(2, 4))
    for mode in ("moments", "hard_concrete"):
        with pytest.raises(InputError, match="use another mode"):
            learn(patterns, sample, cross_entropy, SHORT(mode=mode), generator=seeded())
    with pytest.raises(InputError, match="use the mode relaxed"):
        learn(patterns, sample, cross_entropy, SHORT(mode="disarm"), generator=seeded())
    with pytest.raises(InputError, match="no masks"):
        learn(nn.Linear(2, 2), sample, cross_entropy, SHORT(), generator=seeded())


def test_learning_improves_on_the_mask_that_it_started_from():
    x, y = classes()
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 4)).double()
    for k, value in enumerate(model.parameters()):
        nn.init.normal_(value, std=0.3, generator=seeded(k))
    adam = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(200):
        adam.zero_grad()
        cross_entropy(model(x), y).backward()
        adam.step()
    add_masks(model, dtype=torch.float64)
    start = keep_highest(model, magnitude(model), 0.15)
    keep(model, start)
    untouched = cross_entropy(model(x), y)
    start_from(model, start)
    learn(
        model, sample, cross_entropy, Learning(steps=300), density=0.15, first_density=1.0, generator=seeded()
    )
    keep(model, most_probable(model, 0.15))
    assert cross_entropy(model(x), y) < untouched - 0.1
