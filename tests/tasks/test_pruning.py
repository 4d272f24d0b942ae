"""Pruning of anyone's classifier: exact counts, fixed masks that load, certificates, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramian.bayes.split import Split, fingerprint, random_split
from gramian.compress.learning import Learning
from gramian.compress.masks import export_state, masks_of, originals_of, remove_masks
from gramian.errors import InputError
from gramian.tasks import pruning
from gramian.tasks.evidence import Evidence
from gramian.tasks.pruning import Plan, Start, batches, prune
from gramian.tasks.pruning_data import Data, standardised
from gramian.tasks.pruning_networks import Network, build, train_dense
from gramian.tasks.pruning_result import Pruned
from gramian.tasks.self_bounded import Bounding
from gramian.train.batches import batch_of

CLASSES, COUNT = 4, 240
PRIOR, BOUND, HELD_OUT = torch.arange(120), torch.arange(120, 180), torch.arange(180, COUNT)
WEIGHTS = 16 * 24 + 24 * 24 + 24 * CLASSES
SHORT = Learning(steps=12, rate=0.1, record_every=5)
QUICK = Plan(density=0.2, learning=replace(SHORT, learn="both"), batch=32)
CERTIFIED = replace(QUICK, bounding=Bounding(learning=replace(SHORT, rate=0.02), draws=20))


class Own(nn.Module):
    """Somebody's classifier: no chain, a norm over the batch, and its last layer comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.more = nn.Linear(24, CLASSES), nn.Linear(16, 24), nn.Linear(24, 24)
        self.norm = nn.BatchNorm1d(24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.body(x)).relu()
        return self.head(h + self.more(h).relu())


class Broken(Own):
    """One whose outputs are not numbers for some inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (x[:, :1] > -1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def examples() -> tuple[Tensor, Tensor]:
    y = torch.arange(COUNT) % CLASSES
    centres = torch.randn(CLASSES, 16, generator=seeded(1))
    return centres[y] + torch.randn(COUNT, 16, generator=seeded(2)), y


def evidence(**changes: Any) -> Evidence:
    x, y = examples()
    return replace(Evidence(x, y, PRIOR, HELD_OUT), **changes)


def split_evidence(**changes: Any) -> Evidence:
    return evidence(split=Split(PRIOR, BOUND), **changes)


BREAKING = int((examples()[0][HELD_OUT, 0] <= -1).sum())
"""Held-out examples that `Broken` breaks on."""


def own(kind: type[Own] = Own) -> Own:
    """The classifier trained on the prior examples, by full batches."""
    x, y = examples()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        optimiser.zero_grad()
        cross_entropy(Own.forward(model, x[PRIOR]), y[PRIOR]).backward()
        optimiser.step()
    return model


def pruned(model: nn.Module, given: Evidence, plan: Plan) -> Pruned:
    found = prune(model, given, plan)
    assert found is not None
    return found


def error_of(model: nn.Module, given: Evidence) -> float:
    with torch.no_grad():
        wrong = model(given.x[given.held_out]).argmax(-1) != given.y[given.held_out]
    return float(wrong.double().mean())


def by_magnitude(model: Own, density: float) -> Own:
    """The model whose weights of least magnitude are zero, by a threshold over all three layers."""
    weights = [model.head.weight, model.body.weight, model.more.weight]
    count = round(density * WEIGHTS)
    least = torch.cat([weight.detach().abs().flatten() for weight in weights]).sort().values[-count]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(weight.abs() >= least)
    return model.eval()


def test_a_module_of_ones_own() -> None:
    model, given = own(), evidence()
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    found = pruned(model, given, QUICK)
    assert not model.training
    assert found.density == 0.2
    assert found.kept == round(0.2 * WEIGHTS) / WEIGHTS
    assert [(layer.name, layer.weights) for layer in found.layers] == [
        ("head", 24 * CLASSES),
        ("body", 16 * 24),
        ("more", 24 * 24),
    ]
    assert sum(layer.kept for layer in found.layers) == round(0.2 * WEIGHTS)
    chances = torch.cat([mask.probabilities.detach().flatten() for mask in masks_of(model).values()])
    assert found.expected == pytest.approx(float(chances.double().mean()), abs=1e-9)
    assert found.expected == pytest.approx(0.2, abs=0.05)  # λ, not the fixed mask, whose share is exact
    assert found.expected != found.kept
    assert found.baseline == error_of(by_magnitude(own(), 0.2), given)
    assert found.fixed == error_of(model, given)
    assert found.guarantee is None
    assert [moment.step for moment in found.history] == [1, 5, 10, 12]
    assert {mask.mode for mask in masks_of(model).values()} == {"kept"}
    for name, value in statistics.items():
        assert torch.equal(dict(model.named_buffers())[name], value)
    assert any(
        not torch.equal(value, weights[f"{name}.weight"]) for name, value in originals_of(model).items()
    )

    outputs, state = model(given.x), export_state(model)
    kept = {f"{layer.name}.weight": layer.kept for layer in found.layers}
    assert {name: int((state[name] != 0).sum()) for name in kept} == kept
    plain = Own().eval()
    plain.load_state_dict(state, strict=True)
    assert torch.equal(plain(given.x), outputs)
    assert not torch.equal(own().eval()(given.x), outputs)
    remove_masks(model, apply=True)
    assert torch.equal(model(given.x), outputs)
    assert set(model.state_dict()) == set(plain.state_dict())


def test_the_random_predictor_is_judged_by_draws() -> None:
    model, given = own(), evidence()
    found = pruned(model, given, replace(QUICK, learning=replace(SHORT, steps=0), high=0.5, low=0.1))
    assert found.history == ()
    assert found.fixed == found.baseline  # nothing was learnt
    assert found.expected == pytest.approx(0.2 * 0.5 + 0.8 * 0.1, abs=1e-3)
    errors, stream = [], seeded(3)
    weights = {name: value.detach().clone() for name, value in originals_of(model).items()}
    for _ in range(100):
        with torch.no_grad():
            for name, mask in masks_of(model).items():
                mask.kept = torch.ones_like(mask.kept)
                drawn = torch.rand(mask.kept.shape, generator=stream) < mask.probabilities
                originals_of(model)[name].copy_(drawn * weights[name])
        errors.append(error_of(model, given))
    assert found.random == pytest.approx(sum(errors) / 100, abs=0.05)
    assert abs(found.random - found.fixed) > 0.1  # control: it is another predictor


@pytest.mark.parametrize("start", get_args(Start))
def test_every_start_keeps_the_exact_count(start: Start) -> None:
    model = own()
    plan = replace(QUICK, start=start, density=0.13, learning=replace(SHORT, learn="both", steps=3))
    found = pruned(model, evidence(), plan)
    assert sum(layer.kept for layer in found.layers) == round(0.13 * WEIGHTS)
    masks = {start: torch.cat([mask.kept.flatten() for mask in masks_of(model).values()])}
    other: Start = "random" if start == "magnitude" else "magnitude"
    model = own()
    pruned(model, evidence(), replace(plan, start=other))
    masks[other] = torch.cat([mask.kept.flatten() for mask in masks_of(model).values()])
    assert not torch.equal(masks[start], masks[other])  # the score counts


@pytest.mark.parametrize("mode", ["kept", "moments"])
def test_weights_alone_are_learnt_under_the_starting_mask(mode: Any) -> None:
    model, start = own(), own()
    found = pruned(model, evidence(), replace(QUICK, learning=replace(SHORT, mode=mode, learn="weights")))
    pruned(start, evidence(), replace(QUICK, learning=replace(SHORT, steps=0)))
    for name, mask in masks_of(model).items():
        assert torch.equal(mask.kept, masks_of(start)[name].kept)
        moved = originals_of(model)[name] != originals_of(start)[name]
        assert moved[mask.kept].any()
        assert moved[~mask.kept].any() == (mode == "moments")  # under random masks all weights count
    assert len(found.history) == 4


def test_all_can_be_kept() -> None:
    found = pruned(own(), evidence(), replace(QUICK, density=1.0))
    assert found.kept == 1.0


def test_neurons_are_whole_rows_of_all_layers_but_the_one_that_is_called_last() -> None:
    model, given = own(), evidence()
    found = pruned(model, given, replace(QUICK, structure="neurons", density=0.5))
    assert [layer.name for layer in found.layers] == ["body", "more"]
    kept = {name: mask.kept for name, mask in masks_of(model).items()}
    assert all(units.shape == (24,) for units in kept.values())
    weights = 16 * int(kept["body"].sum()) + 24 * int(kept["more"].sum())
    assert found.kept == weights / (24 * 40)
    assert 0.45 < found.kept <= 0.5
    state = export_state(model)
    for name, units in kept.items():
        rows = state[f"{name}.weight"] != 0
        assert torch.equal(rows.any(1), units)
        assert torch.equal(rows.all(1), units)
    assert (state["head.weight"] != 0).all()
    plain = Own().eval()
    plain.load_state_dict(state)
    assert torch.equal(plain(given.x), model(given.x))


@pytest.mark.parametrize("plan", [QUICK, CERTIFIED], ids=["plain", "certified"])
def test_two_of_four(plan: Plan) -> None:
    model, given = own(), split_evidence()
    found = pruned(model, given, replace(plan, structure="2:4", density=0.5))
    assert found.kept == 0.5
    assert found.expected == pytest.approx(0.5, abs=1e-6)
    for name, weight in export_state(model).items():
        if name in ("head.weight", "body.weight", "more.weight"):
            assert ((weight != 0).view(-1, 4).sum(1) == 2).all()
    assert (found.guarantee is None) == (plan is QUICK)
    if found.guarantee is not None:
        assert 0 < found.guarantee.posterior.kl < 1e4
    with pytest.raises(InputError, match=r"2:4 keeps .* a density of 0.2 is out of its reach"):
        prune(own(), given, replace(plan, structure="2:4"))


@pytest.mark.parametrize("learn", ["masks", "weights", "both"])
def test_what_is_certified(learn: Any) -> None:
    model, given = own(), split_evidence(prior=PRIOR[:90], seen=torch.arange(80, 110))
    bounding = replace(CERTIFIED.bounding, learning=replace(SHORT, learn=learn))
    found = pruned(model, given, replace(CERTIFIED, bounding=bounding))
    made = found.guarantee
    assert made is not None
    assert (made.posterior.n, made.posterior.draws, made.posterior.prior_examples) == (60, 20, 120)
    assert made.posterior.bound_set == fingerprint(BOUND)
    assert made.posterior.seen == fingerprint(PRIOR[:110])  # the network's examples and the mask's
    assert 0 < made.posterior.kl < 1e4
    assert made.prior.kl == 0
    assert made.fixed is not None
    assert made.held_out == pytest.approx(found.random, abs=0.1)
    assert (masks_of(model)["body"].log_std is not None) == (learn != "masks")
    assert sum(layer.kept for layer in found.layers) == round(0.2 * WEIGHTS)


def test_the_bound_set_has_no_influence_on_the_prior(monkeypatch) -> None:
    """Start by gradients, learning and the fixed mask of the prior see the prior set alone."""
    x, y = examples()
    monkeypatch.setattr(pruning, "guarantee", lambda model, prior, fixed, *rest: (prior, fixed))

    def prior_with(x: Tensor, y: Tensor) -> Tensor:
        found = pruned(own(), split_evidence(x=x, y=y), replace(CERTIFIED, start="snip"))
        prior, fixed = found.guarantee  # type: ignore[misc]
        parts = [part.flatten() for law in prior.values() for part in (law.logits, law.weight)]
        return torch.cat([*parts, *(units.flatten().double() for units in fixed.values())])

    before = prior_with(x, y)
    changed, classes = x.clone(), y.clone()
    changed[BOUND], classes[BOUND] = 50.0, 0
    assert torch.equal(prior_with(changed, classes), before)
    classes = y.clone()
    classes[PRIOR[:40]] = 0  # control
    assert not torch.equal(prior_with(x, classes), before)


@pytest.mark.parametrize("plan", [QUICK, CERTIFIED, replace(QUICK, start="snip")])
def test_a_seed_makes_the_same_again(plan: Plan) -> None:
    models = [own(), own(), own()]
    found = [
        pruned(model, split_evidence(), replace(plan, seed=seed))
        for model, seed in zip(models, (4, 4, 5), strict=True)
    ]
    assert found[0] == found[1]
    assert found[0] != found[2]
    states = [export_state(model) for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("part", "step"),
    [("learning the masks", 0), ("learning the masks", 4), ("learning on the bound", 4)],
)
def test_stopped_means_nothing(part: str, step: int) -> None:
    seen: list[tuple[str, int, int]] = []

    def stopped() -> bool:
        done = [each[1] for each in seen if each[0] == part]
        return max(done, default=0) >= step and (bool(done) or not step)

    def watch(*what: Any) -> None:
        seen.append(what)

    assert prune(own(), split_evidence(), CERTIFIED, watch=watch, stopped=stopped) is None
    assert sum(each[0] == part for each in seen) == step
    assert not any(each[0] == "drawing masks" for each in seen)
    seen.clear()
    assert prune(own(), split_evidence(), CERTIFIED, watch=watch) is not None
    steps = list(range(1, 13))
    assert [each for each in seen if each[0] == "learning the masks"] == [
        ("learning the masks", step, 12) for step in steps
    ]
    assert [done for what, done, _ in seen if what == "learning on the bound"] == steps
    assert ("drawing masks", 20, 20) in seen


def test_batches_are_made_from_seed_and_step() -> None:
    x, y = examples()
    sample, index = batches(x, y, PRIOR, 50, seed=1), {float(row[0]): k for k, row in enumerate(x)}
    seen = [[index[float(row[0])] for row in sample(step)[0]] for step in range(4)]
    assert torch.equal(sample(3)[0], x[seen[3]])
    assert torch.equal(sample(3)[1], y[seen[3]])
    assert all(len(set(seen[k] + seen[k + 1])) == 100 for k in (0, 2))  # an epoch takes none twice
    assert {each for part in seen for each in part} <= set(PRIOR.tolist())
    assert seen[:2] != seen[2:]
    assert len(batches(x, y, PRIOR[:3], 50, seed=1)(0)[1]) == 3
    assert not torch.equal(batches(x, y, PRIOR, 50, seed=2)(0)[0], sample(0)[0])
    assert torch.equal(sample(5)[1], y[PRIOR[batch_of(len(PRIOR), 50, 1, 5)]])
    firsts = {tuple(batch_of(100, 50, seed, step).tolist()) for seed in range(5) for step in range(10)}
    assert len(firsts) == 50  # seeds and epochs have orders of their own


NONE = torch.arange(0)
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "density 0": (evidence, {"density": 0.0}, "more than 0 and at most 1, got 0.0"),
    "density above 1": (evidence, {"density": 1.5}, "more than 0 and at most 1, got 1.5"),
    "density of no number": (evidence, {"density": float("nan")}, "at most 1, got nan"),
    "density of no weight": (evidence, {"density": 1e-6}, "keeps no unit of the model"),
    "pattern": (evidence, {"structure": "2:4"}, "2:4 keeps 0.5 of the weights; a density of 0.2"),
    "pattern that does not divide": (
        evidence,
        {"structure": "1:5", "density": 0.2},
        "the 24 input features of 'head' are not a multiple of the 5 of 1:5",
    ),
    "pattern step by step": (
        evidence,
        {"structure": "2:4", "density": 0.5, "start": "iterative_magnitude"},
        "iterative_magnitude prunes step by step, which patterns do not",
    ),
    "pattern of nothing": (evidence, {"structure": "0:4"}, "needs 1 ≤ n < m, got 0:4"),
    "structure": (evidence, {"structure": "rows"}, "unknown structure 'rows'; choose weights, neurons"),
    "start": (evidence, {"start": "luck"}, "unknown start 'luck'; choose one of magnitude"),
    "chances": (evidence, {"high": 1.0}, "λ has to start at 0 < low ≤ high < 1, got 0.1 and 1"),
    "batch": (evidence, {"batch": 0}, "a batch needs at least one example, got 0"),
    "layers": (evidence, {"layers": ("tail",)}, "no linear or convolutional layer matches 'tail'"),
    "gates": (evidence, {"learning": Learning(mode="hard_concrete")}, "are no Bernoulli masks"),
    "labels too high": (
        lambda: evidence(y=examples()[1] + 1),
        {},
        "labels go from 1 to 4, but the model has 4 outputs, for classes from 0 to 3",
    ),
    "labels below 0": (
        lambda: evidence(y=examples()[1] - 1),
        {},
        "labels go from -1 to 2, but the model has 4",
    ),
    "labels of fractions": (lambda: evidence(y=examples()[1] / 2), {}, "needs one class, a whole number"),
    "labels of few": (lambda: evidence(y=examples()[1][:9]), {}, "every input needs one class"),
    "nothing held out": (lambda: evidence(held_out=NONE), {}, "held-out examples are needed"),
    "held-out among prior": (
        lambda: evidence(held_out=PRIOR[-1:]),
        {},
        "must not be among those that are learnt from",
    ),
    "held-out among bound": (
        lambda: split_evidence(held_out=BOUND),
        {},
        "must not be among those that are learnt from",
    ),
    "held-out among seen": (
        lambda: evidence(seen=HELD_OUT[:2]),
        {},
        "must not be among those that are learnt from",
    ),
    "counted from the end": (
        lambda: split_evidence(prior=torch.tensor([-70])),
        {},
        "named by numbers from 0 to 239",
    ),
    "beyond the end": (
        lambda: evidence(prior=torch.tensor([240])),
        {},
        "examples are named by numbers from 0 to 239",
    ),
    "no split": (evidence, {"bounding": Bounding()}, "needs a prior and a bound set"),
    "bound among prior": (
        lambda: split_evidence(prior=torch.arange(121)),
        {"bounding": Bounding()},
        "1 of the 60 examples of the bound set were seen before, such as number 120",
    ),
    "bound among seen": (
        lambda: split_evidence(seen=torch.arange(125)),
        {"bounding": Bounding()},
        "5 of the 60 examples of the bound set were seen before",
    ),
    "seen by fingerprint": (
        lambda: split_evidence(seen=fingerprint(torch.arange(180))),
        {"bounding": Bounding()},
        "so the bound set may be among them",
    ),
    "confidence": (split_evidence, {"bounding": Bounding(delta=1.0)}, "with a sum below 1, not 1.0 and 0.01"),
    "snip without examples": (
        lambda: evidence(prior=NONE),
        {"start": "snip"},
        "the score snip needs prior examples; without any take magnitude",
    ),
    "iterative magnitude without examples": (
        lambda: evidence(prior=NONE),
        {"start": "iterative_magnitude"},
        "the score iterative_magnitude needs prior examples",
    ),
}


def one_sentence(error: BaseException) -> bool:
    return "\n" not in str(error) and ". " not in str(error) and not str(error).endswith(".")


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_sentence_and_leave_the_model_as_it_was(case: str) -> None:
    given, settings, words = REFUSED[case]
    model = own()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        prune(model, given(), replace(QUICK, **settings))
    assert words in str(error.value)
    assert one_sentence(error.value)
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in own().named_modules()
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert prune(model, evidence(), QUICK) is not None  # and it can still be pruned


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16)), "the module has nothing to prune"),
        (lambda: nn.Sequential(own(), nn.Flatten(0)), "has to return one row of scores for each example"),
        (lambda: own(Broken), f"the model's outputs are not finite for {BREAKING} of 60 held-out examples"),
    ],
    ids=["nothing to prune", "no scores", "not finite"],
)
def test_modules_that_are_no_classifiers(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(InputError) as error:
        prune(make(), evidence(), QUICK)
    assert words in str(error.value)
    assert one_sentence(error.value)


def test_without_prior_examples_nothing_is_learnt_before_the_bound() -> None:
    model, given = own(), split_evidence(prior=NONE)
    found = pruned(model, given, replace(CERTIFIED, start="random"))
    assert found.history == ()
    assert found.guarantee is not None
    assert found.guarantee.fixed is None
    assert found.guarantee.posterior.kl > 0


class Digits:
    """A network of digits, trained on 1438 of them."""

    def __init__(self, seed: int) -> None:
        data = Data(seed=seed).load()
        known = data.known
        self.evidence = Evidence(standardised(data, known), data.y, known, data.held_out)
        network = Network("mlp", data.size, data.classes, (48,))
        self.build = lambda: build(network, seed)
        model = self.build()
        x, y = self.evidence.x[known], self.evidence.y[known]
        train_dense(model, x, y, steps=150, batch=128, rate=3e-3, seed=seed)
        self.state = model.state_dict()

    def pruned(self, plan: Plan) -> Pruned:
        model = self.build()
        model.load_state_dict(self.state)
        return pruned(model, self.evidence, plan)


def shuffled(monkeypatch, seed: int) -> None:
    """Give the gradient of every layer's logits to its units in random order."""
    learn, stream = pruning.learn, seeded(seed)

    def shuffle(gradient: Tensor) -> Tensor:
        return gradient.flatten()[torch.randperm(gradient.numel(), generator=stream)].view_as(gradient)

    def spoiled(model: nn.Module, *args: Any, **options: Any) -> Any:
        for mask in masks_of(model).values():
            mask.logits.register_hook(shuffle)
        return learn(model, *args, **options)

    monkeypatch.setattr(pruning, "learn", spoiled)


@pytest.mark.parametrize("seed", [0, 1])
def test_learning_masks_improves_on_the_mask_it_starts_from(seed: int, monkeypatch) -> None:
    """Weights untouched: what is gained comes from which weights are kept."""
    digits, starts = Digits(seed), ("random", "magnitude")
    plan = Plan(density=0.1, learning=Learning(steps=200, rate=0.1, learn="masks"), seed=seed)
    learnt = {start: digits.pruned(replace(plan, start=start)) for start in starts}
    shuffled(monkeypatch, seed)
    control = {start: digits.pruned(replace(plan, start=start)) for start in starts}
    for start in starts:
        assert learnt[start].fixed < learnt[start].baseline - 0.2
        assert learnt[start].random < learnt[start].baseline
        assert control[start].baseline == learnt[start].baseline
        assert control[start].fixed > learnt[start].fixed + 0.1


def test_an_overlap_hidden_by_another_split_is_found() -> None:
    """The network was trained on a part that a second split puts into the bound set."""
    first, second = (random_split(180, 0.5, seed) for seed in (0, 1))
    given = evidence(prior=second.prior, split=second, seen=first.prior)
    shared = int(torch.isin(second.bound, first.prior).sum())
    with pytest.raises(InputError, match=f"{shared} of the 90 examples of the bound set were seen before"):
        prune(own(), given, CERTIFIED)
    assert prune(own(), replace(given, seen=second.prior[:9]), CERTIFIED) is not None
