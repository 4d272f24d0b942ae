import json
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gramian.bayes.bounds import (
    BOUNDS,
    bernstein_risk_bound,
    binomial_bound,
    chernoff_bound,
    finite_union,
    kl_bound,
    sampled_risk_bound,
)
from gramian.bayes.certificate import Certificate, certify, certify_fixed
from gramian.bayes.risk import SampledRisk, clipped_cross_entropy, sampled_errors, zero_one_error
from gramian.bayes.split import Split, fingerprint, random_split
from gramian.core.divergence import kl_inverse_upper
from gramian.errors import InputError

EXAMPLES, HYPOTHESES, TEMPERATURE, DELTA = 30, 500, 200, 0.05


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_split(n: int = 100, prior: int = 50) -> Split:
    return Split(torch.arange(prior), torch.arange(prior, prior + n))


class Problems:
    """Finite hypothesis sets with known risks, U(.1, .6) or others, and their errors on a bound set."""

    def __init__(self, repetitions: int, seed: int, low: float = 0.1):
        generator = seeded(seed)
        shape = (repetitions, HYPOTHESES)
        self.risks = low + (0.6 - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
        counts = torch.full(shape, EXAMPLES, dtype=torch.float64)
        self.errors = torch.binomial(counts, self.risks, generator=generator) / EXAMPLES
        self.posterior = (-TEMPERATURE * self.errors).softmax(-1)  # from a uniform prior
        self.kl = (self.posterior * (self.posterior * HYPOTHESES).clamp(min=1e-300).log()).sum(-1)
        self.empirical = (self.posterior * self.errors).sum(-1)
        self.risk = (self.posterior * self.risks).sum(-1)


def violated(bound: Tensor, risk: Tensor) -> float:
    return float((bound < risk).double().mean())


def test_bounds_are_violated_as_rarely_as_said_and_cheating_is_not():
    problems, hard = Problems(3000, 0), Problems(3000, 0, low=0.4)
    for name, bound in BOUNDS.items():
        for p in (problems, hard):
            assert violated(bound(p.empirical, p.kl, EXAMPLES, DELTA), p.risk) <= DELTA, name
    # controls: the KL term left out of the same bound, and the bound of a fixed predictor taken instead
    assert violated(kl_bound(hard.empirical, 0.0, EXAMPLES, DELTA), hard.risk) > 2 * DELTA
    assert violated(chernoff_bound(problems.empirical, EXAMPLES, DELTA), problems.risk) > 0.6
    # control: the best of many priors by the bound set, which is then its own posterior; ln K mends it
    best = problems.errors.argmin(-1, keepdim=True)
    error, risk = problems.errors.gather(1, best)[:, 0], problems.risks.gather(1, best)[:, 0]
    assert violated(chernoff_bound(error, EXAMPLES, DELTA), risk) > 0.6
    paid = DELTA * math.exp(-finite_union(HYPOTHESES))
    assert violated(chernoff_bound(error, EXAMPLES, paid), risk) <= DELTA


def test_certificates_are_violated_as_rarely_as_said():
    """The whole way with sampled hypotheses, against the sampled risk taken for exact."""
    problems, split = Problems(500, 1), a_split(EXAMPLES, 0)
    generator, draws = seeded(2), 40
    wrong = empirical = naive = 0
    for k in range(500):
        picks = problems.posterior[k].multinomial(draws, replacement=True, generator=generator)
        sample = SampledRisk(problems.errors[k][picks], EXAMPLES)
        made = certify(split, [], sample, problems.kl[k], delta=0.05, delta_sampling=0.05)
        wrong += made.value < problems.risk[k]
        empirical += made.empirical_bound < problems.empirical[k]
        naive += sample.mean < problems.empirical[k] - 1e-12
    assert wrong <= 0.1 * 500
    assert empirical <= 0.05 * 500
    assert naive > 0.2 * 500  # control: a mean of draws is no bound of what it estimates


def test_how_the_draws_are_bounded():
    split, draws, union = a_split(30_000), 10_000, 0.5
    steady = SampledRisk(0.02 + 1e-3 * torch.randn(draws, generator=seeded(8)).double(), 30_000)
    perfect = SampledRisk(torch.zeros(draws, dtype=torch.float64), 30_000)

    def made(sample: SampledRisk, sampling: str) -> Certificate:
        return certify(split, [], sample, 500.0, delta_sampling=0.02, sampling=sampling, union=union)

    share = 0.02 * math.exp(-union)
    above = {
        "kl": sampled_risk_bound(steady.mean, draws, share).item(),
        "bernstein": bernstein_risk_bound(steady.mean, steady.variance, draws, share).item(),
        "smaller": bernstein_risk_bound(steady.mean, steady.variance, draws, share / 2).item(),
    }
    for sampling, value in above.items():
        got = made(steady, sampling)
        assert got.empirical_bound == pytest.approx(value, rel=1e-12)
        assert got.value == kl_bound(got.empirical_bound, 500.0, 30_000, 0.025 * math.exp(-union)).item()
        assert got.confidence == pytest.approx(0.955)
        assert got.sampling == sampling
        assert got.variance == (None if sampling == "kl" else pytest.approx(1e-6, rel=0.1))
        assert Certificate(**json.loads(json.dumps(asdict(got)))) == got
    assert above["bernstein"] < above["smaller"] < above["kl"]  # control: the choice is paid for
    paid = sampled_risk_bound(0.0, draws, share / 2).item()
    assert made(perfect, "smaller").empirical_bound == pytest.approx(paid, rel=1e-12)
    assert made(perfect, "smaller").empirical_bound > made(perfect, "kl").empirical_bound
    said = {sampling: made(steady, sampling).sentence for sampling in above}
    assert " % by their mean;" in said["kl"]
    assert "by their mean and variance" in said["bernstein"]
    assert "the smaller of two bounds at δ'/2 each" in said["smaller"]
    exact = certify(split, [], 0.02, 500.0, sampling="bernstein")
    assert (exact.sampling, exact.variance, exact.empirical_bound) == (None, None, 0.02)


def test_a_learnt_prior_certifies_only_what_it_did_not_see():
    """A prior that is the best of many on some examples: on those it breaks its bound, on others not."""
    generator, wrong, honest = seeded(3), 0, 0
    for seed in range(500):
        risks = 0.1 + 0.5 * torch.rand(HYPOTHESES, 1, generator=generator, dtype=torch.float64)
        errors = torch.rand(HYPOTHESES, 2 * EXAMPLES, generator=generator, dtype=torch.float64) < risks
        split = random_split(2 * EXAMPLES, 0.5, seed)
        for seen, fair in ((split.prior, True), (split.bound, False)):
            best = errors[:, seen].double().mean(1).argmin()
            losses = errors[best, split.bound]
            if fair:
                honest += certify_fixed(split, seen, losses, delta=DELTA).value < risks[best]
            else:
                with pytest.raises(InputError, match="30 of the 30 examples of the bound set were seen"):
                    certify_fixed(split, seen, losses, delta=DELTA)
                wrong += chernoff_bound(losses.double().mean(), EXAMPLES, DELTA) < risks[best]
    assert honest <= DELTA * 500
    assert wrong > 0.3 * 500  # control: what the refusal prevents


def test_terms_of_a_certificate():
    split = a_split(30_000)
    risks = torch.full((1000,), 0.02, dtype=torch.float64)
    made = certify(split, split.prior, SampledRisk(risks, 30_000), 500.0, sides=2)
    assert made.value == pytest.approx(0.08389, abs=5e-6)
    assert (made.bound, made.draws, made.n, made.kl) == ("kl", 1000, 30_000, 500)
    assert (made.delta, made.delta_sampling, made.confidence) == (0.025, 0.01, pytest.approx(0.965))
    assert made.empirical_risk == pytest.approx(0.02)
    assert made.empirical_bound == pytest.approx(0.0379, abs=5e-5)
    assert made.kl_per_example == pytest.approx(1 / 60)
    assert made.prior_examples == 50
    assert (made.seen, made.bound_set) == (fingerprint(split.prior), fingerprint(split.bound))
    assert Certificate(**json.loads(json.dumps(asdict(made)))) == made
    with pytest.raises(FrozenInstanceError):
        made.value = 0.0  # pyright: ignore[reportAttributeAccessIssue]


def test_an_exact_risk_needs_no_draws():
    made = certify(a_split(30_000), [], 0.02, torch.tensor(500.0), delta_sampling=0.01)
    assert made.value == pytest.approx(0.057311, abs=5e-7)
    assert made.draws is None
    assert made.confidence == pytest.approx(0.975)
    assert made.empirical_bound == made.empirical_risk == 0.02


@pytest.mark.parametrize("bound", BOUNDS)
def test_every_bound_can_be_certified(bound: str):
    made = certify(a_split(30_000), [], 0.02, 500.0, bound=bound)
    assert made.value == pytest.approx(BOUNDS[bound](0.02, 500.0, 30_000, 0.025).item(), rel=1e-14)
    assert made.weight == (pytest.approx(0.70629, abs=5e-6) if bound == "lambda" else None)


def test_both_confidences_count():
    risks = SampledRisk(torch.full((1000,), 0.02, dtype=torch.float64), 30_000)
    terms: dict[str, Any] = {"delta": 0.025, "delta_sampling": 0.01}
    value = certify(a_split(30_000), [], risks, 500.0, **terms).value
    assert certify(a_split(30_000), [], risks, 500.0, **terms | {"delta": 1e-9}).value > value
    assert certify(a_split(30_000), [], risks, 500.0, **terms | {"delta_sampling": 1e-9}).value > value

    def spoiled(delta: float, delta_sampling: float) -> float:
        """The sampling confidence used twice: δ is reported and does not count."""
        above = sampled_risk_bound(0.02, 1000, delta_sampling)
        return kl_bound(above, 500.0, 30_000, delta_sampling).item()

    assert spoiled(0.025, 0.01) == spoiled(1e-9, 0.01)  # control
    assert spoiled(1e-9, 0.01) < certify(a_split(30_000), [], risks, 500.0, delta=1e-9).value


def test_a_union_is_paid_in_both_confidences():
    risks = SampledRisk(torch.full((1000,), 0.02, dtype=torch.float64), 30_000)
    made = certify(a_split(30_000), [], risks, 500.0, union=finite_union(20))
    above = kl_inverse_upper(0.02, math.log(20 / 0.01) / 1000)
    assert made.value == pytest.approx(kl_bound(above, 500.0, 30_000, 0.025 / 20).item(), rel=1e-12)
    assert made.confidence == pytest.approx(0.965)
    losses = torch.arange(30_000) < 600
    fixed = certify_fixed(a_split(30_000), [], losses, union=finite_union(20), bound="binomial")
    assert fixed.value == pytest.approx(binomial_bound(600, 30_000, 0.025 / 20), rel=1e-12)


def test_fixed_predictors():
    losses = torch.arange(30_000) < 600
    values = {b: certify_fixed(a_split(30_000), [], losses, bound=b) for b in ("chernoff", "binomial")}
    assert values["chernoff"].value == pytest.approx(0.022275, abs=5e-7)
    assert values["binomial"].value == pytest.approx(0.021648, abs=5e-7)
    assert values["binomial"].confidence == pytest.approx(0.975)
    half = certify_fixed(a_split(30_000), [], 0.5 * losses.double())
    assert half.value == pytest.approx(chernoff_bound(0.01, 30_000, 0.025).item(), rel=1e-12)


def test_sentences():
    split = a_split(30_000)
    risks = SampledRisk(torch.full((1000,), 0.02, dtype=torch.float64), 30_000)
    made = certify(split, split.prior, risks, 500.0, sides=2, union=math.log(3))
    said = made.sentence
    for part in ("at least 96.5 %", "0-1 error", "random predictor", "1000 draws", "KL 500 nats", "30000"):
        assert part in said
    assert "δ = 0.025, δ' = 0.01" in said
    assert "1.1 nats" in said
    assert "not about a thresholded" in said
    assert "at most 5.74 %" in replace(made, value=0.0573001).sentence  # rounded up
    fixed = certify_fixed(split, [], torch.arange(30_000) < 600).sentence
    assert "fixed predictor is at most 2.23 %" in fixed
    assert "KL" not in fixed
    vacuous = certify(a_split(10), [], 0.5, 1e6)
    assert vacuous.vacuous
    assert vacuous.sentence.startswith("Nothing is certified")
    assert vacuous.value == 1


def test_the_flag_and_the_words_of_a_certificate_agree():
    made = certify(a_split(100), [], 0.1, 1.0)
    for value in (0.5, 0.9998, 0.9999, 0.99991, 0.999999, 1.0):
        one = replace(made, value=value)
        written = "at most 100 %" in one.sentence or "is 100 %" in one.sentence
        assert one.vacuous == written == one.sentence.startswith("Nothing is certified") == (value > 0.9999)


def test_random_split():
    split = random_split(100, 0.6, 7)
    assert (len(split.prior), split.n, split.seed) == (60, 40, 7)
    assert sorted((*split.prior.tolist(), *split.bound.tolist())) == list(range(100))
    assert split.bound.tolist() == random_split(100, 0.6, 7).bound.tolist()
    assert split.bound.tolist() != random_split(100, 0.6, 8).bound.tolist()
    assert len(random_split(100, 0.0, 7).prior) == 0
    # an even chance of every example to be in the prior set
    counts = sum(torch.isin(torch.arange(20), random_split(20, 0.5, seed).prior).int() for seed in range(400))
    assert ((torch.as_tensor(counts) - 200).abs() < 4.5 * 10).all()


def test_fingerprints_are_of_sets():
    assert fingerprint([3, 1, 2]) == fingerprint(torch.tensor([1, 2, 3])) == fingerprint([1, 2, 3, 3])
    assert fingerprint([1, 2]) != fingerprint([1, 2, 3])
    assert fingerprint([]) == fingerprint(torch.arange(0))


def test_a_prior_that_saw_the_bound_set_is_refused():
    split = a_split(100)
    for seen in (split.prior, split.prior[:10], [], fingerprint(split.prior), fingerprint([]), [3, 700]):
        assert certify(split, seen, 0.1, 1.0).n == 100
    with pytest.raises(InputError, match=r"1 of the 100 examples .* such as number 70; make the prior"):
        certify(split, [0, 1, 70], 0.1, 1.0)
    with pytest.raises(InputError, match="100 of the 100 examples"):
        certify(split, torch.arange(150), 0.1, 1.0)
    with pytest.raises(InputError, match="give their indices"):
        certify(split, fingerprint([0, 1, 70]), 0.1, 1.0)


def test_sampled_errors_score_each_hypothesis_on_all_examples():
    table = torch.rand(12, 30, generator=seeded(4), dtype=torch.float64).float()
    seen: list[int] = []

    def draw(count: int, generator: torch.Generator) -> Tensor:
        return table[torch.randint(12, (count,), generator=generator)]

    whole = sampled_errors(draw, 100, seeded(5), batch=100, progress=seen.append)
    assert (whole.draws, whole.n, seen) == (100, 30, [100])
    picks = torch.randint(12, (100,), generator=seeded(5))
    torch.testing.assert_close(whole.risks, table.double().mean(1)[picks], rtol=1e-7, atol=0)
    assert whole.mean == pytest.approx(whole.risks.mean().item(), rel=1e-14)
    flags = sampled_errors(lambda k, g: draw(k, g) < 0.3, 50, seeded(5))
    assert flags.mean == pytest.approx((table < 0.3).double().mean(1)[picks[:50]].mean().item(), rel=1e-12)


def test_a_smaller_last_batch_counts_by_its_rows():
    order = iter(range(100))

    def draw(count: int, generator: torch.Generator) -> Tensor:
        return torch.tensor([[next(order) / 100] * 9 for _ in range(count)], dtype=torch.float64)

    sample = sampled_errors(draw, 100, seeded(0), batch=30)
    assert sample.mean == pytest.approx(0.495, rel=1e-12)
    batches = [part.mean().item() for part in sample.risks.split(30)]
    assert sum(batches) / 4 != pytest.approx(0.495, rel=1e-2)  # control: a mean of means
    assert sum(batches) / 3 > 4 / 3 * 0.495  # control: divided by the batches less one


def test_clipped_cross_entropy():
    logits = torch.randn(3, 20, 5, generator=seeded(6), dtype=torch.float64) * 8
    labels = torch.randint(5, (20,), generator=seeded(7))
    got = clipped_cross_entropy(logits, labels, 1e-3)
    probability = logits.softmax(-1)[:, torch.arange(20), labels]
    torch.testing.assert_close(
        got, -probability.clamp(min=1e-3).log() / math.log(1e3), rtol=1e-10, atol=1e-15
    )
    assert got.max() == 1
    assert clipped_cross_entropy(torch.tensor([[60.0, -60]]), torch.tensor([0])).item() == 0
    assert clipped_cross_entropy(torch.tensor([[0.0, 0]]), torch.tensor([0])).item() == pytest.approx(
        math.log(2) / math.log(1e5)
    )
    errors = zero_one_error(logits, labels)
    assert errors.shape == (3, 20)
    assert (errors == (logits.argmax(-1) != labels)).all()


def rates(n: int = 100) -> SampledRisk:
    return SampledRisk(torch.zeros(10, dtype=torch.float64), n)


def one_draw() -> SampledRisk:
    return SampledRisk(torch.zeros(1, dtype=torch.float64), 100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: a_split(7), "8 examples or more, not 7"),
        (lambda: random_split(20, 0.9, 0), "8 examples or more, not 2"),
        (lambda: random_split(20, 1.0, 0), "below 1, not 1.0"),
        (lambda: Split(torch.arange(5), torch.arange(4, 20)), "disjoint"),
        (lambda: Split(torch.arange(0), torch.zeros(9, dtype=torch.long)), "each named once"),
        (lambda: fingerprint(torch.tensor([0.5])), "whole numbers"),
        (lambda: certify(a_split(), torch.ones(150, dtype=torch.bool), 0.1, 1.0), "whole numbers"),
        (lambda: certify(a_split(), [], rates(99), 1.0), "99 examples where the bound set has 100"),
        (lambda: certify(a_split(), [], 1.5, 1.0), "from 0 to 1"),
        (lambda: certify(a_split(), [], 0.1, -1.0), "at least 0"),
        (lambda: certify(a_split(), [], 0.1, 1.0, bound="hoeffding"), "kl, quadratic"),
        (lambda: certify(a_split(), [], rates(), 1.0, sampling="best"), "kl, bernstein, smaller"),
        (lambda: certify(a_split(), [], one_draw(), 1.0, sampling="bernstein"), "2 draws or more, not 1"),
        (lambda: certify(a_split(), [], one_draw(), 1.0, sampling="smaller"), "2 draws or more, not 1"),
        (lambda: certify(a_split(), [], rates(), 1.0, delta=0.5, delta_sampling=0.5), "sum below 1"),
        (lambda: certify(a_split(), [], rates(), 1.0, delta_sampling=0.0), "above 0"),
        (lambda: certify(a_split(), [], 0.1, 1.0, union=-1.0), "nats"),
        (lambda: certify_fixed(a_split(), [], torch.zeros(99)), "one an example"),
        (lambda: certify_fixed(a_split(), [], torch.full((100,), 2.3)), "clipped_cross_entropy"),
        (lambda: certify_fixed(a_split(), [], torch.full((100,), 0.3), bound="binomial"), "0 and 1"),
        (lambda: certify_fixed(a_split(), [], torch.zeros(100), bound="kl"), "chernoff or binomial"),
        (lambda: sampled_errors(lambda k, g: torch.zeros(k, 9), 0, seeded(0)), "1 draw"),
        (lambda: sampled_errors(lambda k, g: torch.zeros(9), 5, seeded(0)), r"\(5, 9\)"),
        (lambda: sampled_errors(lambda k, g: torch.zeros(k + 1, 9), 5, seeded(0)), r"not \(6, 9\)"),
        (lambda: sampled_errors(lambda k, g: torch.zeros(k, 0), 5, seeded(0)), r"not \(5, 0\)"),
        (lambda: sampled_errors(lambda k, g: torch.full((k, 9), 2.3), 5, seeded(0)), "clipped_cross_entropy"),
        (lambda: sampled_errors(lambda k, g: torch.full((k, 9), math.nan), 5, seeded(0)), r"\[0, 1\]"),
        (lambda: clipped_cross_entropy(torch.zeros(3, 2), torch.tensor([0, 1, 2])), "from 0 to 1"),
        (lambda: clipped_cross_entropy(torch.zeros(3, 2), torch.tensor([0, 1])), "do not fit"),
        (lambda: clipped_cross_entropy(torch.zeros(3, 2), torch.tensor([0, 1, 1]), 1.0), "p_min"),
        (lambda: zero_one_error(torch.zeros(3, 2), torch.tensor([0, 1, -1])), "from 0 to 1"),
    ],
)
def test_refusals(call: Callable[[], object], message: str):
    with pytest.raises(InputError, match=message):
        call()
