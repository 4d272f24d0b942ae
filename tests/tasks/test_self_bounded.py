"""Self-bounded learning: the posterior descends its own bound, and certificates say what their terms say."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import beta
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramian.bayes.bounds import BOUNDS, CATONI_CONSTANTS, finite_union, kl_bound
from gramian.bayes.certificate import Certificate
from gramian.bayes.risk import clipped_cross_entropy
from gramian.bayes.split import Split, fingerprint, random_split
from gramian.compress.draws import draw_outputs
from gramian.compress.learning import Learning
from gramian.compress.masks import add_masks, keep, masks_of, originals_of, set_mode
from gramian.compress.prior import Prior, divergence, law_of, prior_of, set_law
from gramian.compress.thresholds import most_probable
from gramian.errors import InputError
from gramian.tasks.pruning_result import Guarantee
from gramian.tasks.self_bounded import Bounding, guarantee, learn_posterior

CLASSES, COUNT = 3, 240
QUICK = Bounding(learning=Learning(steps=50, rate=0.05, weight_rate=0.01), draws=64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(count: int = COUNT) -> tuple[Tensor, Tensor]:
    """Three classes around three points of five dimensions."""
    y = torch.arange(count) % CLASSES
    centres = torch.randn(CLASSES, 5, generator=seeded(1))
    return centres[y] + 0.4 * torch.randn(count, 5, generator=seeded(2)), y


def network(hidden: int = 12, inputs: int = 5, classes: int = CLASSES) -> nn.Sequential:
    """A network with a norm, whose statistics and parameters belong to no law."""
    model = nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )
    for value in model.parameters():
        nn.init.normal_(value, std=0.5, generator=seeded(3))
    return model.eval()


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int = 100) -> nn.Module:
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        cross_entropy(model(x), y).backward()
        optimiser.step()
    return model


class Bench:
    """A masked network made from the prior set of the blobs, and all that a certificate needs."""

    def __init__(self, weights: str = "trainable", learn: str = "masks", **settings) -> None:
        self.x, self.y = blobs()
        self.split = random_split(COUNT, 0.4, seed=0)
        self.settings = replace(QUICK, learning=replace(QUICK.learning, learn=learn), **settings)
        prior = self.split.prior
        self.model = trained(network(), self.x[prior], self.y[prior])
        add_masks(self.model, weights=weights, probability=0.8, std=0.05)
        self.fixed = most_probable(self.model, 0.5)

    def sample(self, step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(COUNT, generator=seeded(step))[:64]
        return self.x[chosen], self.y[chosen]

    def learn(self, stopped: bool = False) -> Prior:
        n, stream = self.split.n, seeded()
        prior, _ = learn_posterior(self.model, self.sample, n, self.settings, stream, stopped=lambda: stopped)
        return prior

    def guarantee(self, prior: Prior, seen: Tensor | str | None = None, seed: int = 5) -> Guarantee:
        seen = self.split.prior if seen is None else seen
        return guarantee(
            self.model, prior, self.fixed, self.x, self.y, self.split, seen, self.settings, seeded(seed)
        )

    def objective(self, prior: Prior) -> float:
        """The bound of the clipped cross-entropy on the bound set, by draws that are always the same."""
        x, y = self.x[self.split.bound], self.y[self.split.bound]
        losses = clipped_cross_entropy(draw_outputs(self.model, x, 300, seeded(9)), y, self.settings.p_min)
        bound, kl = BOUNDS[self.settings.bound], distance(self.model, prior)
        return float(bound(losses.mean().double(), kl, self.split.n, self.settings.delta))


def distance(model: nn.Module, prior: Prior) -> float:
    return float(divergence(model, prior).detach())


def kl_by_hand(own: Prior, other: Prior) -> float:
    """Σ_j kl(λ_j ‖ λ0_j) with plain logarithms."""
    total = 0.0
    for name, law in own.items():
        q, p = (1 / (1 + np.exp(-each.logits.numpy())) for each in (law, other[name]))
        total += float((q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))).sum())
    return total


def inverse_by_hand(q: float, c: float) -> float:
    """sup {p: kl(q‖p) ≤ c} by bracketing."""

    def excess(p: float) -> float:
        kept = q * math.log(q / p) if q else 0.0
        return kept + (1 - q) * math.log((1 - q) / (1 - p)) - c

    return brentq(excess, q, 1 - 1e-16, xtol=1e-15)


def risk_by_hand(c: Certificate, sampling: str, delta: float) -> float:
    """Bound of the risk on the bound set from the terms of a certificate."""
    m = c.draws
    assert m is not None
    if sampling == "smaller":
        return min(risk_by_hand(c, each, delta / 2) for each in ("kl", "bernstein"))
    if sampling == "kl":
        return inverse_by_hand(c.empirical_risk, math.log(1 / delta) / m)
    nats = math.log(2 / delta)
    assert c.variance is not None
    return c.empirical_risk + math.sqrt(2 * c.variance * nats / m) + 7 * nats / (3 * (m - 1))


def values_by_hand(c: Certificate) -> dict[str, float]:
    """Every bound from the terms of a certificate alone."""
    paid = math.exp(-c.union)
    risk = risk_by_hand(c, str(c.sampling), c.delta_sampling * paid)
    cost = (c.kl + math.log(2 * math.sqrt(c.n) / (c.delta * paid))) / c.n
    of_catoni = (c.kl + math.log(len(CATONI_CONSTANTS) / (c.delta * paid))) / c.n
    lambdas = np.linspace(1e-4, 1.9999, 200_001)
    return {
        "kl": inverse_by_hand(risk, cost),
        "quadratic": (math.sqrt(risk + cost / 2) + math.sqrt(cost / 2)) ** 2,
        "classic": risk + math.sqrt(cost / 2),
        "lambda": float((risk / (1 - lambdas / 2) + cost / (lambdas * (1 - lambdas / 2))).min()),
        "catoni": min((1 - math.exp(-k * risk - of_catoni)) / (1 - math.exp(-k)) for k in CATONI_CONSTANTS),
    }


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_posterior_starts_at_the_prior_and_descends_its_bound(bound: str) -> None:
    bench = Bench(bound=bound)
    prior = bench.learn(stopped=True)
    start = bench.objective(prior)
    assert distance(bench.model, prior) < 1e-9
    bench.learn()
    assert distance(bench.model, prior) > 0.1
    assert bench.objective(prior) < start - 0.001
    wrong = Bench(bound=bound)  # control: learnt on other classes, the bound on these goes up
    wrong.sample = lambda step: (bench.sample(step)[0], (bench.sample(step)[1] + 1) % CLASSES)
    assert wrong.objective(wrong.learn()) > start + 0.005


def test_the_prior_is_the_law_before_clamped() -> None:
    bench = Bench(clamp=0.3)
    before = law_of(bench.model)
    prior = bench.learn(stopped=True)
    for name, law in prior.items():
        torch.testing.assert_close(law.logits, before[name].logits.clamp(max=math.log(0.7 / 0.3)))
        assert torch.equal(law.weight, before[name].weight)
        torch.testing.assert_close(masks_of(bench.model)[name].probabilities, law.logits.sigmoid().float())
        assert (before[name].logits > law.logits).all()  # λ was 0.8


@pytest.mark.parametrize(
    ("weights", "learn", "moved"),
    [
        ("trainable", "masks", {"logits"}),
        ("frozen", "masks", {"logits"}),
        ("gaussian", "masks", {"logits"}),
        ("gaussian", "weights", {"original", "log_std"}),
        ("gaussian", "both", {"logits", "original", "log_std"}),
    ],
)
def test_what_is_no_part_of_the_law_stays_bit_for_bit(weights: str, learn: str, moved: set[str]) -> None:
    bench = Bench(weights=weights, learn=learn)
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    trainable = {name: value.requires_grad for name, value in bench.model.named_parameters()}
    prior = bench.learn()
    after = bench.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.rsplit(".", 1)[-1] in moved}
    assert {name: value.requires_grad for name, value in bench.model.named_parameters()} == trainable
    assert 0.01 < distance(bench.model, prior) < math.inf


def test_a_deterministic_weight_that_moved_certifies_nothing() -> None:
    bench = Bench()
    prior = bench.learn()
    whole = bench.guarantee(prior)
    with torch.no_grad():
        originals_of(bench.model)["0"][0, 0] += 1e-3
    found = bench.guarantee(prior)
    assert not whole.posterior.vacuous
    assert found.posterior.kl == math.inf
    assert found.posterior.vacuous
    assert set(found.bounds.values()) == {1.0}
    assert found.posterior.sentence.startswith("Nothing is certified")
    assert found.prior.value == pytest.approx(whole.prior.value, abs=0.1)  # its weights are as they were
    with pytest.raises(InputError, match="the posterior moves weights, which those of '0' may not"):
        Bench(learn="both").learn()


@pytest.mark.parametrize("sampling", ["kl", "bernstein", "smaller"])
@pytest.mark.parametrize("union", [0.0, finite_union(4)])
def test_certificates_follow_from_their_own_terms(sampling: str, union: float) -> None:
    bench = Bench(sampling=sampling, union=union)
    prior = bench.learn()
    found = bench.guarantee(prior)
    own = found.posterior
    assert own.kl == pytest.approx(kl_by_hand(law_of(bench.model), prior), rel=1e-9)
    for certificate in (own, found.prior):
        expected = values_by_hand(certificate)
        assert certificate.value == pytest.approx(expected["kl"], abs=1e-9)
        spoiled = values_by_hand(replace(certificate, delta=2 * certificate.delta))
        assert abs(certificate.value - spoiled["kl"]) > 1e-4
    for name, value in values_by_hand(own).items():
        assert found.bounds[name] == pytest.approx(value, abs=1e-9)
    assert own.value == found.bounds["kl"]
    assert (own.n, own.draws, own.delta, own.delta_sampling, own.union) == (144, 64, 0.025, 0.01, union)
    assert own.confidence == pytest.approx(1 - 0.025 - 0.01)
    assert (found.prior.kl, found.prior.bound) == (0.0, "kl")
    assert found.held_out is None
    test = found.fixed
    assert test is not None
    assert test.fixed
    errors = round(test.empirical_risk * test.n)
    level = 1 - test.delta * math.exp(-union)
    assert test.value == pytest.approx(beta.ppf(level, errors + 1, test.n - errors), abs=1e-9)
    set_law(bench.model, prior)
    keep(bench.model, bench.fixed)
    x, y = bench.x[bench.split.bound], bench.y[bench.split.bound]
    assert errors == int((bench.model(x).argmax(-1) != y).sum())


def test_a_union_of_four_is_a_fourth_of_both_confidences() -> None:
    bench = Bench()
    prior = bench.learn()
    plain = bench.guarantee(prior)
    bench.settings = replace(bench.settings, union=finite_union(4))
    paid = bench.guarantee(prior)
    bench.settings = replace(bench.settings, union=0.0, delta=0.025 / 4, delta_sampling=0.01 / 4)
    fourth = bench.guarantee(prior)
    for name in ("posterior", "prior", "fixed"):
        each = [getattr(found, name) for found in (plain, paid, fourth)]
        assert each[1].value == pytest.approx(each[2].value, abs=1e-12)
        assert each[0].value < each[1].value
        assert each[1].union == math.log(4)


def test_risks_are_those_of_posterior_and_prior() -> None:
    """Six weights have 64 masks: the risk of every law is a sum over them."""
    x = torch.randn(40, 3, generator=seeded(1))
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    nn.init.normal_(model[0].weight, generator=seeded(2))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([0.1, 0.0]))
        y = model(x).argmax(-1)
    add_masks(model, probability=0.3)
    split, mask = Split(torch.arange(0), torch.arange(40)), masks_of(model)["0"]
    prior = prior_of(model)
    with torch.no_grad():
        mask.logits.copy_(2 + torch.randn(2, 3, generator=seeded(3)))

    def exact() -> float:
        chance, weight, total = mask.probabilities.detach().double(), originals_of(model)["0"], 0.0
        for bits in product((False, True), repeat=6):
            kept = torch.tensor(bits).view(2, 3)
            scores = x @ (kept * weight).T + model[0].bias
            wrong = scores[torch.arange(40), y] <= scores[torch.arange(40), 1 - y]
            total += float(torch.where(kept, chance, 1 - chance).prod() * wrong.double().mean())
        return total

    settings = replace(QUICK, draws=10_000)
    found = guarantee(model, prior, None, x, y, split, torch.arange(0), settings, seeded(4))
    own = exact()
    set_law(model, prior)
    of_prior, error = exact(), 4 * 0.5 / math.sqrt(10_000)
    assert found.posterior.empirical_risk == pytest.approx(own, abs=error)
    assert found.prior.empirical_risk == pytest.approx(of_prior, abs=error)
    assert abs(own - of_prior) > 4 * error
    assert found.fixed is None


@pytest.mark.parametrize("weights", ["trainable", "gaussian"])
def test_the_model_is_left_as_it_was(weights: str) -> None:
    bench = Bench(weights=weights, learn="both" if weights == "gaussian" else "masks")
    prior = bench.learn()
    other = {name: ~unit for name, unit in bench.fixed.items()}
    keep(bench.model, other)
    stream = seeded()
    set_mode(bench.model, "moments", generator=stream)
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    bench.guarantee(prior)
    after = bench.model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert {(mask.mode, mask.generator) for mask in masks_of(bench.model).values()} == {("moments", stream)}


def test_a_prior_that_saw_the_bound_set_is_refused() -> None:
    bench = Bench()
    prior, split = bench.learn(), bench.split
    before = law_of(bench.model)
    one_too_many = torch.cat((split.prior, split.bound[3:4]))
    with pytest.raises(InputError, match="1 of the 144 examples of the bound set were seen before") as error:
        bench.guarantee(prior, one_too_many)
    assert f"number {int(split.bound[3])}" in str(error.value)
    assert "\n" not in str(error.value)
    assert ". " not in str(error.value)
    with pytest.raises(InputError, match="so the bound set may be among them"):
        bench.guarantee(prior, fingerprint(one_too_many))
    assert all(torch.equal(law.logits, before[name].logits) for name, law in law_of(bench.model).items())
    honest = bench.guarantee(prior)
    for seen in (fingerprint(split.prior), fingerprint([]), split.prior[:5]):
        assert bench.guarantee(prior, seen).posterior.value == honest.posterior.value
    for made in (honest.posterior, honest.prior, honest.fixed):
        assert made is not None
        assert (made.seen, made.bound_set) == (fingerprint(split.prior), fingerprint(split.bound))


def on_random_labels(seed: int, cheating: bool) -> tuple[nn.Module, Prior, Tensor, Tensor, Split]:
    """Classes that nothing tells, so that the risk is always 0.9; the prior learns by heart what it sees."""
    x = torch.randn(300, 30, generator=seeded(seed))
    y = torch.randint(10, (300,), generator=seeded(seed + 1))
    split = random_split(300, 0.5, seed)
    seen = split.bound if cheating else split.prior
    model = trained(network(64, 30, 10), x[seen], y[seen])
    add_masks(model, probability=0.995)
    settings = replace(QUICK, learning=replace(QUICK.learning, steps=60))
    prior, _ = learn_posterior(model, lambda step: (x, y), split.n, settings, seeded(seed))
    return model, prior, x, y, split


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_random_labels_certify_at_least_chance_unless_somebody_lies(seed: int) -> None:
    """The true risk is 0.9 whatever is learnt; a certificate below it is violated."""
    honest = on_random_labels(seed, cheating=False)
    found = guarantee(*honest[:2], None, *honest[2:], honest[-1].prior, QUICK, seeded(seed))
    for certificate in (found.posterior, found.prior):
        assert certificate.value >= 0.9
    cheating = on_random_labels(seed, cheating=True)
    split = cheating[-1]
    with pytest.raises(InputError, match="150 of the 150 examples of the bound set were seen before"):
        guarantee(*cheating[:2], None, *cheating[2:], split.bound, QUICK, seeded(seed))
    lie = guarantee(*cheating[:2], None, *cheating[2:], split.prior, QUICK, seeded(seed))
    assert lie.posterior.empirical_risk < 0.1
    assert lie.posterior.value < 0.5  # violated: the check is what keeps certificates true


def test_a_held_out_estimate_stands_beside_the_bounds() -> None:
    bench = Bench()
    prior = bench.learn()
    held_out = blobs(90)
    found = guarantee(
        bench.model,
        prior,
        None,
        bench.x,
        bench.y,
        bench.split,
        bench.split.prior,
        bench.settings,
        seeded(),
        held_out,
    )
    by_draws = (draw_outputs(bench.model, held_out[0], 64, seeded(8)).argmax(-1) != held_out[1]).float()
    assert found.held_out == pytest.approx(float(by_draws.mean()), abs=0.05)
    assert found.held_out < found.posterior.value


def test_a_model_in_training_is_refused() -> None:
    bench = Bench()
    bench.model.train()
    with pytest.raises(InputError, match=r"call model.eval\(\) first"):
        bench.learn()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bound": "chernov"}, "there is no bound 'chernov'; take one of kl, quadratic"),
        ({"delta": 0.0}, "δ and δ' have to be above 0 with a sum below 1, not 0.0 and 0.01"),
        ({"delta": 0.6, "delta_sampling": 0.4}, "with a sum below 1, not 0.6 and 0.4"),
        ({"delta": math.nan}, "δ and δ' have to be above 0"),
        ({"sampling": "hoeffding"}, "there is no sampling 'hoeffding'"),
        ({"draws": 1}, "at least two draws, got 1"),
        ({"p_min": 1.0}, "p_min has to be above 0 and below 1"),
        ({"clamp": 0.5}, "more than 0 and less than ½, got 0.5"),
        ({"learning": Learning(mode="hard_concrete")}, "hard concrete masks are no Bernoulli masks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_cannot_be_used(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Bounding(**settings).check()
    assert Bounding().check() is None
    assert float(kl_bound(0.02, 500.0, 30_000, 0.025)) == pytest.approx(0.057311, abs=1e-6)
