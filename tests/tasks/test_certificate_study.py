"""The study of priors: every way gives its certificate, and a free prior is no example's doing."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from gramian.compress.learning import Learning
from gramian.compress.masks import masks_of
from gramian.compress.prior import Prior
from gramian.errors import InputError
from gramian.tasks import certificate_study, pruning
from gramian.tasks.certificate_study import (
    ALL,
    BOTH,
    MASKS,
    WEIGHTS,
    CertificateStudy,
    Certified,
    by_fraction,
    certify_one,
    run_certificates,
    split_evidence,
)
from gramian.tasks.pruning_data import Data, Examples
from gramian.tasks.pruning_networks import Network, build
from gramian.tasks.self_bounded import Bounding

WAYS = (MASKS, WEIGHTS, BOTH)
SHORT = Learning(steps=4, rate=0.05, record_every=2)
STUDY = CertificateStudy(
    data=Data(count=250),
    widths=(24,),
    train_steps=150,
    fractions=(0.0, 0.5),
    learning=replace(SHORT, steps=30, rate=0.1, learn="both"),
    bounding=Bounding(learning=SHORT, draws=10),
)


def run(study: CertificateStudy, folder: Path, seeds: tuple[int, ...] = (0,)) -> list[Certified]:
    return run_certificates(study, seeds, folder, Console(quiet=True))


def test_every_prior_and_way_is_certified(tmp_path: Path) -> None:
    found = run(STUDY, tmp_path / "study")
    assert [(each.fraction, each.way) for each in found] == [
        (fraction, way) for fraction in (0.0, 0.5) for way in WAYS
    ]
    for each in found:
        assert each.n == (200 if each.fraction == 0 else 100)
        assert 0 < each.kl < 1e5
        assert each.empirical < each.certificate <= 1
        assert each.certificate == each.bounds["kl"] == min(each.bounds[name] for name in ("kl", "quadratic"))
        assert (each.test_set is None) == (each.fraction == 0)
        assert each.prior <= 1
    for way in WAYS:
        learnt = by_fraction(found, way)
        assert list(learnt) == [0.0, 0.5]
        assert learnt[0.5][0].held_out < learnt[0.0][0].held_out - 0.1  # examples made a better prior
        assert learnt[0.5][0].certificate < 1
    shares = {(each.fraction, each.way): each.expected for each in found}
    assert shares[0.0, WEIGHTS] == shares[0.5, WEIGHTS] == pytest.approx(ALL, abs=1e-6)
    assert shares[0.0, MASKS] == pytest.approx(0.5, abs=0.05)
    assert shares[0.5, MASKS] == pytest.approx(0.2, abs=0.05)


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch) -> None:
    study = replace(STUDY, fractions=(0.5,), ways=(MASKS, WEIGHTS))
    first = run(study, tmp_path / "study")
    path = tmp_path / "study" / "seed-0" / "0.5-Gaussian-weights.json"
    saved = json.loads(path.read_text())
    assert Certified(**saved) == first[1]
    path.write_text(json.dumps({**saved, "certificate": 0.123}))
    with monkeypatch.context() as patch:
        patch.setattr(certificate_study, "certify_one", lambda *given: pytest.fail("done again"))
        again = run(study, tmp_path / "study")
    assert again[0] == first[0]
    assert again[1].certificate == 0.123
    path.unlink()
    assert run(study, tmp_path / "study") == first  # bit for bit
    both = run(study, tmp_path / "study", seeds=(0, 1))
    assert both[:2] == first
    assert [each.seed for each in both] == [0, 0, 1, 1]
    assert both[2].certificate != both[0].certificate
    with pytest.raises(InputError, match="resume with the same settings"):
        run(replace(study, density=0.3), tmp_path / "study")


class Spy:
    """Takes the prior, and the law at its start, of each posterior that is learnt."""

    def __init__(self, monkeypatch) -> None:
        self.priors: list[Prior] = []
        learn = pruning.learn_posterior

        def learn_posterior(model: nn.Module, *given, **options):
            prior, history = learn(model, *given, **options)
            self.priors.append(prior)
            self.gaussian = next(iter(masks_of(model).values())).log_std is not None
            return prior, history

        monkeypatch.setattr(pruning, "learn_posterior", learn_posterior)


def values(prior: Prior) -> Tensor:
    parts = [part for law in prior.values() for part in (law.logits, law.weight, law.std) if part is not None]
    return torch.cat([part.flatten() for part in parts])


def with_other(examples: Examples, chosen: Tensor) -> Examples:
    """The same examples but for some, of which pixels and classes are others."""
    x, y = examples.x.clone(), examples.y.clone()
    x[chosen], y[chosen] = 16 - x[chosen], (y[chosen] + 3) % 10
    return replace(examples, x=x, y=y)


@pytest.mark.parametrize("way", WAYS)
def test_a_free_prior_is_no_examples_doing(way: str, monkeypatch) -> None:
    spy, examples = Spy(monkeypatch), STUDY.data.load()
    found = [
        certify_one(STUDY, given, 0.0, way, seed=0)
        for given in (examples, with_other(examples, torch.arange(len(examples))))
    ]
    first, second = spy.priors
    assert torch.equal(values(first), values(second))
    assert found[0].empirical != found[1].empirical
    weights = dict(build(Network("mlp", (1, 8, 8), 10, (24,)), 0).named_parameters())
    chance = ALL if way == WEIGHTS else 0.5
    for name, law in first.items():
        torch.testing.assert_close(
            law.logits.sigmoid(), torch.full_like(law.logits, chance), atol=1e-6, rtol=0
        )
        scale = 1.0 if way == WEIGHTS else math.sqrt(2)  # so that half of the weights keep the variance
        torch.testing.assert_close(law.weight, scale * weights[f"{name}.weight"].detach().double())
        assert (law.std is None) == (way == MASKS)
        if law.std is not None:
            torch.testing.assert_close(law.std, torch.full_like(law.std, STUDY.free_std))


@pytest.mark.parametrize("way", WAYS)
def test_a_learnt_prior_is_the_prior_sets_doing_alone(way: str, monkeypatch) -> None:
    spy, examples = Spy(monkeypatch), STUDY.data.load()
    split = split_evidence(examples, 0.5, seed=0).split
    assert split is not None
    for given in (
        examples,
        with_other(examples, torch.cat((split.bound, examples.held_out))),
        with_other(examples, split.prior[:5]),
    ):
        certify_one(STUDY, given, 0.5, way, seed=0)
    own, same, other = map(values, spy.priors)
    assert torch.equal(own, same)
    assert not torch.equal(own, other)  # control
    assert spy.gaussian == (way != MASKS)
    if way != MASKS:
        assert all(law.std is not None for law in spy.priors[0].values())
    if way == WEIGHTS:
        assert (spy.priors[0]["1"].logits > 13).all()


def test_plans() -> None:
    for way, learn in ((MASKS, "masks"), (WEIGHTS, "weights"), (BOTH, "both")):
        for free in (True, False):
            plan = STUDY.plan(way, free, 7)
            assert plan.seed == 7
            assert plan.start == ("random" if free else "magnitude")
            assert plan.std == (STUDY.free_std if free else STUDY.std)
            assert plan.bounding is not None
            assert plan.bounding.learning == replace(SHORT, learn=learn)
            assert plan.gaussian == (way != MASKS)
            assert plan.learning.steps == (0 if free or way == WEIGHTS else 30)
            assert plan.bounding.clamp == pytest.approx(1e-6 if way == WEIGHTS else 1e-3)
            assert plan.density == (1.0 if way == WEIGHTS else 0.5 if free else 0.2)
            if way == WEIGHTS or free:
                assert plan.high == (ALL if way == WEIGHTS else 0.5)
                assert plan.low == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fractions": ()}, "prior fractions from 0 to below 1, got ()"),
        ({"fractions": (1.0,)}, "prior fractions from 0 to below 1, got (1.0,)"),
        ({"ways": ("magic",)}, "unknown way 'magic'; choose masks, Gaussian weights or both"),
        ({"density": 0.0}, "the density must be more than 0 and at most 1, got 0.0"),
        ({"bounding": Bounding(draws=1)}, "at least two draws, got 1"),
    ],
    ids=str,
)
def test_studies_that_cannot_be_made_leave_nothing(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(InputError) as error:
        run(replace(STUDY, **changes), tmp_path / "study")
    assert words in str(error.value)
    assert not (tmp_path / "study").exists()
