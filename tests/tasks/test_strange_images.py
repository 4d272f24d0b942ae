import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from gramian.bayes.ensemble import EnsembleConfig, fit_classifier
from gramian.core.classification import auroc
from gramian.data.images import load_images
from gramian.errors import InputError
from gramian.nn.mlp import mlp
from gramian.tasks.strange_images import (
    LEFT_OUT,
    RATES,
    THRESHOLDS,
    Outcome,
    StrangeConfig,
    detected,
    doubts,
    figures,
    judged,
    load,
    markdown,
    settings,
    study,
    summary,
)

KINDS = {LEFT_OUT, "noisy", "turned"}
DOUBTS = {"entropy", "least confidence", "mutual information", "variance"}


def write(path: Path, *, shuffled: bool = False, test_seed: int | None = None, seed: int = 0) -> Path:
    """Five patterns of 5 × 5 pixels under noise, 80 images of each; perhaps a test set of its own."""
    generator = np.random.default_rng(seed)
    patterns = np.random.default_rng(7).normal(size=(5, 5, 5))
    labels = np.tile(np.arange(5), 80)
    images = patterns[labels] + generator.normal(size=(400, 5, 5))
    arrays = {"images": images, "labels": generator.permutation(labels) if shuffled else labels}
    if test_seed is not None:
        others = np.random.default_rng(test_seed)
        arrays |= {
            "test_images": 3 * others.normal(size=(100, 5, 5)),
            "test_labels": np.tile(np.arange(5), 20),
        }
    np.savez(path, **arrays)
    return path


@pytest.fixture
def config(tmp_path) -> StrangeConfig:
    return StrangeConfig(
        images=write(tmp_path / "images.npz"), left_out=(1, 3), members=3, tried=2, widths=(12,),
        noise=(0.01, 0.1), weight_std=(0.7,), steps=60, learning_rate=0.01, batch=64, seeds=(0, 1),
        folder=tmp_path / "study",
    )  # fmt: skip


def test_kept_and_strange_images_are_disjoint_and_of_one_norm(config) -> None:
    split = load(config, 0)
    images = load_images(config.images, validation=0.25, test=0.25, seed=0)
    kept = [0, 2, 4]

    def level(pixels: torch.Tensor) -> torch.Tensor:
        flat = pixels.flatten(1)
        return (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True, correction=0)

    for (x, labels), part in zip(
        (split.train, split.validation, split.test),
        (images.train, images.validation, images.test),
        strict=True,
    ):
        chosen = [place for place, label in enumerate(part.labels.tolist()) if label in kept]
        torch.testing.assert_close(x, level(part.images[chosen]))
        assert [kept[label] for label in labels.tolist()] == part.labels[chosen].tolist()
        assert set(labels.tolist()) == {0, 1, 2}
    left = [place for place, label in enumerate(images.test.labels.tolist()) if label not in kept]
    torch.testing.assert_close(split.strange[LEFT_OUT], level(images.test.images[left]))
    assert set(split.strange) == KINDS
    own = {tuple(row) for x, _ in (split.train, split.validation, split.test) for row in x.tolist()}
    assert own.isdisjoint(tuple(row) for row in split.strange[LEFT_OUT].tolist())
    everything = torch.cat([split.train[0], split.validation[0], split.test[0], *split.strange.values()])
    torch.testing.assert_close(everything.mean(1), torch.zeros(len(everything)), rtol=0, atol=1e-6)
    torch.testing.assert_close(everything.square().mean(1), torch.ones(len(everything)))
    assert len(load(replace(config, limit=50), 0).train[0]) == 50
    assert not torch.equal(load(config, 1).train[0], split.train[0])
    turned = split.test[0].view(-1, 5, 5).transpose(1, 2).flip(1).flatten(1)
    torch.testing.assert_close(split.strange["turned"], turned)


def test_a_study_is_resumed_and_repeats(config, monkeypatch) -> None:
    whole = study(config, Console(quiet=True))
    assert [(each.method, each.seed) for each in whole] == [
        (method, seed) for seed in config.seeds for method in config.methods
    ]
    assert {path.name for path in config.folder.iterdir()} == {
        "settings.json", "summary.md", "errors.png", "detection.png",
        *(f"{each.method}-seed-{each.seed}.json" for each in whole),
    }  # fmt: skip
    (config.folder / "ntkgp_param-seed-1.json").unlink()
    asked = []

    def counted(*arguments, **more):
        asked.append(arguments[3].method)
        return fit_classifier(*arguments, **more)

    monkeypatch.setattr("gramian.tasks.strange_images.fit_classifier", counted)
    assert study(config) == whole
    assert asked == ["ntkgp_param"] * 3
    afresh = study(replace(config, folder=config.folder.with_name("afresh"), seeds=(1,)))
    assert afresh == [each for each in whole if each.seed == 1]
    assert len({each.scores["log loss"] for each in whole}) == 6
    with pytest.raises(InputError, match=r"has steps = 60 not 61 as asked"):
        study(replace(config, steps=61))
    json.loads((config.folder / "ntkgp_param-seed-1.json").read_text(), parse_constant=pytest.fail)


def test_choices_are_those_of_least_validation_loss_and_see_no_test_image(config, tmp_path) -> None:
    found = {}
    for name, more in {
        "a": {"test_seed": 1},
        "b": {"test_seed": 2},
        "c": {"test_seed": 1, "seed": 1},
    }.items():
        changed = replace(
            config, images=write(tmp_path / f"{name}.npz", **more), methods=("deep_ensemble", "ntkgp_param"),
            seeds=(0,), folder=tmp_path / name,
        )  # fmt: skip
        found[name] = study(changed)
    for a, b, c in zip(*found.values(), strict=True):
        assert (a.trials, a.chosen) == (b.trials, b.chosen)
        assert a.scores != b.scores
        assert a.trials != c.trials  # the validation images, on the other hand, count
        best = min(a.trials, key=lambda trial: trial["log_loss"])
        assert {**best, **a.chosen} == {**a.chosen, "log_loss": best["log_loss"]}
        assert len({trial["log_loss"] for trial in a.trials}) == len(a.trials)


def test_methods_have_equally_many_settings(config) -> None:
    wide = replace(config, noise=(0.001, 0.01, 0.1), weight_std=(0.5, 1.0))
    tried = {method: settings(wide, method) for method in ("deep_ensemble", "rp_param", "ntkgp_lin")}
    assert {len(set(each)) for each in tried.values()} == {6}
    assert {each.steps for each in tried["deep_ensemble"]} == {60, 30, 15}
    assert {each.steps for each in tried["rp_param"]} == {60}


def test_doubt_tells_strange_images_where_there_is_something_to_tell(config, tmp_path) -> None:
    config = replace(config, methods=("deep_ensemble", "ntkgp_param"))
    real = study(config)
    control = study(
        replace(config, images=write(tmp_path / "control.npz", shuffled=True), folder=tmp_path / "control")
    )
    for outcome in real:
        assert outcome.scores["accuracy"] > 0.8
        assert outcome.strange[LEFT_OUT]["entropy"]["AUROC"] > 0.7
    shuffled = summary(control)
    for doubt in DOUBTS:
        for mean, _ in shuffled[f"AUROC, {LEFT_OUT}, {doubt}"].values():
            assert mean == pytest.approx(0.5, abs=0.12)
    assert all(mean < 0.5 for mean, _ in shuffled["accuracy"].values())


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    config = StrangeConfig(images=write(tmp_path_factory.mktemp("images") / "images.npz"), left_out=(1, 3))
    split = load(config, 0)
    asked = EnsembleConfig(members=3, steps=30, noise_variance=0.01)
    classifier = fit_classifier(
        lambda: mlp(25, 3, widths=(12,), weight_std=0.7), *split.train, asked, held_out=split.validation
    )
    return classifier, split


def test_doubts_are_those_of_the_classifier(fitted) -> None:
    classifier, split = fitted
    x = split.test[0]
    mean, found = doubts(classifier, x)
    torch.testing.assert_close(mean.float(), classifier.predict_probabilities(x))
    assert set(found) == DOUBTS
    variance = classifier.ensemble.predict(x).variance
    torch.testing.assert_close(found["variance"].float(), variance.sum(-1))
    members = classifier.member_probabilities(x).double()
    expected = -(mean * mean.log()).sum(-1) + (members * members.log()).sum(-1).mean(0)
    torch.testing.assert_close(found["mutual information"], expected, rtol=0, atol=1e-5)


def test_what_is_reported_is_as_counted_by_hand(fitted) -> None:
    classifier, split = fitted
    report = judged(classifier, split)
    (x, labels), others = split.test, split.strange[LEFT_OUT]
    answers = classifier.predict(x).tolist()
    right = [a == b for a, b in zip(answers, labels.tolist(), strict=True)]
    assert report["scores"]["accuracy"] == pytest.approx(sum(right) / len(right))
    pairs = [
        (confidence, not correct)
        for confidence, correct in zip(doubts(classifier, x)[0].amax(1).tolist(), right, strict=True)
    ] + [(confidence, True) for confidence in doubts(classifier, others)[0].amax(1).tolist()]
    for threshold, error in zip(THRESHOLDS, report["errors"], strict=True):
        above = [wrong for confidence, wrong in pairs if confidence >= threshold]
        assert error == (pytest.approx(sum(above) / len(above)) if above else None)
    assert report["errors"][0] == pytest.approx((len(right) - sum(right) + len(others)) / len(pairs))
    assert set(report["strange"]) == KINDS
    inside, outside = (doubts(classifier, each)[1]["variance"] for each in (x, others))
    beaten = sum(float(a > b) for a in outside.tolist() for b in inside.tolist()) / (
        len(inside) * len(outside)
    )
    assert report["strange"][LEFT_OUT]["variance"]["AUROC"] == pytest.approx(beaten)


def test_detections_are_a_roc_curve() -> None:
    generator = torch.Generator().manual_seed(0)
    negative = torch.randn(50, generator=generator).double()
    positive = torch.randn(300, generator=generator).double() + 1
    curve = detected(positive, negative)
    assert sum(curve[:-1]) / 50 == pytest.approx(float(auroc(positive, negative)))  # of 50, a step a rate
    assert curve[-1] == 1
    assert curve == sorted(curve)
    fifth = negative.sort().values[-6]  # five of fifty are above it
    assert curve[RATES.index(0.1)] == pytest.approx(float((positive > fifth).double().mean()))
    nothing = detected(torch.randn(5000, generator=generator), torch.randn(5000, generator=generator))
    assert nothing == pytest.approx(RATES, abs=0.05)
    assert detected(torch.ones(4), torch.ones(7)) == pytest.approx(RATES)  # ties: a straight line


def outcome(method: str, seed: int, accuracy: float) -> Outcome:
    told = {LEFT_OUT: {"entropy": {"AUROC": 0.9, "average precision": 0.8, "detected": RATES}}}
    return Outcome(method, seed, {}, [], {"accuracy": accuracy}, told, [0.5] * len(THRESHOLDS))


def test_the_summary_has_means_and_standard_errors() -> None:
    found = [outcome("one", 0, 0.5), outcome("one", 1, 0.7), outcome("two", 0, 0.4)]
    mean, error = summary(found)["accuracy"]["one"]
    assert mean == pytest.approx(0.6, rel=1e-14)
    assert error == pytest.approx(0.1)
    assert math.isnan(summary(found)["accuracy"]["two"][1])
    lines = markdown(found).splitlines()
    assert lines[0] == "| | one | two |"
    assert lines[2] == "| accuracy | 0.6000 ± 0.1000 | 0.4000 |"
    assert f"| AUROC, {LEFT_OUT}, entropy | 0.9000 ± 0.0000 | 0.9000 |" in lines
    assert set(figures(found)) == {"errors", "detection"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"left_out": (1, 8)}, "no image of class 8"),
        ({"left_out": (0, 1, 2, 3)}, "at least two must be kept"),
        ({"left_out": ()}, "at least one class left out"),
        ({"limit": 2}, "no training image of class"),
        ({"limit": 1}, "limit must be at least 2"),
        ({"methods": ("ntkgp",)}, "unknown method 'ntkgp'"),
        ({"members": 1}, "members must be at least 2"),
        ({"noise": (0.0,)}, "noise must be one positive number or more"),
        ({"weight_std": ()}, "weight_std must be one positive number or more"),
        ({"activation": "step"}, "unknown activation"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"bias_std": -0.1}, "bias_std must be at least 0"),
        ({"widths": (8, 0)}, "layers must be at least 1 wide"),
        ({"images": Path("nowhere.npz")}, "no file or folder"),
        ({"seeds": ()}, "one seed"),
        ({"test": 0.001, "left_out": (0, 1, 2)}, "no (test|left out) image remains"),
    ],
)
def test_what_cannot_be_studied_is_said_before_anything_is_written(config, changed, words) -> None:
    with pytest.raises(InputError, match=words):
        study(replace(config, **changed))
    assert not config.folder.exists()
