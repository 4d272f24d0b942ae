"""Learn some classes of images and meet others: what ensembles know, and whether doubt rejects the rest."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from gramian.bayes.classification import Classifier
from gramian.bayes.ensemble import METHODS, EnsembleConfig, fit_classifier
from gramian.bayes.members import RECIPES, seed_of
from gramian.core.classification import (
    auroc,
    average_precision,
    brier,
    entropy,
    error_above,
    error_confidence_curve,
    expected_calibration_error,
    least_confidence,
    log_loss,
    mutual_information,
)
from gramian.data.images import Labelled, load_images
from gramian.errors import InputError
from gramian.files import write_json, write_text
from gramian.nn.activations import activation
from gramian.nn.mlp import mlp, prior_variances
from gramian.report.doubt import detection, error_by_confidence
from gramian.report.style import save
from gramian.train.run import open_run, read_json

LEFT_OUT = "left out"
"""Images of the classes left out, among the kinds of strange images."""

THRESHOLDS = [each / 50 for each in range(50)]
"""Confidences above which errors are counted."""

RATES = [each / 50 for each in range(51)]
"""Rates of false alarms at which detections are counted."""


@dataclass(frozen=True, kw_only=True)
class StrangeConfig:
    """Train classifiers on some classes and see whether they doubt on others."""

    images: Path | None = None
    """Folder or IDX file in MNIST's format, or .npz; scikit-learn's digits when none is given."""
    left_out: tuple[int, ...] = (7, 8, 9)
    """Classes that are kept from training."""
    pool: int = 1
    """Side of the squares of pixels that are averaged to one."""
    limit: int | None = None
    """Most training images; all when not given."""
    validation: float = 0.25
    """Share of the images that are not for testing, by which settings and temperatures are chosen."""
    test: float = 0.25
    """Share of the images kept for the report."""
    methods: tuple[str, ...] = ("deep_ensemble", "rp_param", "ntkgp_param")
    """Kinds of ensembles, by `METHODS`."""
    members: int = 10
    """Networks of an ensemble, at least 2."""
    tried: int = 4
    """Networks of an ensemble on trial, at least 2."""
    widths: tuple[int, ...] = (100, 100)
    """Features of the hidden layers."""
    activation: str = "relu"
    """Of the hidden layers (`gramian list`)."""
    weight_std: tuple[float, ...] = (0.5, 0.8)
    """σ_w on trial: weights start with variance σ_w²/fan_in."""
    bias_std: float = 0.05
    """σ_b: biases start with variance σ_b²."""
    noise: tuple[float, ...] = (0.001, 0.003, 0.01)
    """Noise variances σ² on trial; a deep ensemble has as many numbers of steps, halved each time."""
    steps: int = 1000
    """Steps of Adam, at most."""
    learning_rate: float = 3e-3
    """Its rate, which falls to 0 along a cosine."""
    batch: int = 128
    """Images of a step, at most."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each draws its own split, networks and noise."""
    folder: Path = Path("runs", "strange-images")
    """Where results go: one file for every method and seed, summary.md and figures."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        for name, least in {"members": 2, "tried": 2, "steps": 1, "batch": 1}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.limit is not None and self.limit < 2:
            raise InputError(f"limit must be at least 2 training images, got {self.limit}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be positive, got {self.learning_rate:g}")
        if not 0 <= self.bias_std < math.inf:
            raise InputError(f"bias_std must be at least 0, got {self.bias_std:g}")
        if min(self.widths, default=1) < 1:
            raise InputError(f"layers must be at least 1 wide, got widths {self.widths}")
        for name in ("weight_std", "noise"):
            values = getattr(self, name)
            if not values or not all(0 < each < math.inf for each in values):
                raise InputError(f"{name} must be one positive number or more, got {values}")
        if unknown := [method for method in self.methods if method not in METHODS]:
            raise InputError(f"unknown method {unknown[0]!r}; choose of {', '.join(METHODS)}")
        if not self.left_out or not self.methods or not self.seeds:
            raise InputError("the study needs at least one class left out, one method and one seed")
        activation(self.activation)


@dataclass(frozen=True, eq=False)
class Split:
    """Images of the kept classes, one a row, with labels from 0; and images that are none of theirs."""

    train: tuple[Float[Tensor, "n pixels"], Int[Tensor, " n"]]
    validation: tuple[Float[Tensor, "n pixels"], Int[Tensor, " n"]]
    test: tuple[Float[Tensor, "n pixels"], Int[Tensor, " n"]]
    strange: Mapping[str, Float[Tensor, "m pixels"]]
    classes: int


@dataclass(frozen=True)
class Setting:
    """What is chosen by validation images."""

    weight_std: float
    noise_variance: float
    steps: int


@dataclass(frozen=True)
class Outcome:
    """What one method did with one seed."""

    method: str
    seed: int
    chosen: dict[str, float]
    """The setting, and the temperature of the final classifier."""
    trials: list[dict[str, float]]
    """Settings on trial with their log loss (nats) on validation images."""
    scores: dict[str, float]
    """On test images of kept classes; and the area under the error of the k most confident among these and
    the images left out."""
    strange: dict[str, dict[str, dict[str, Any]]]
    """kind of strange images -> doubt -> how well it tells them from test images of kept classes: "AUROC",
    "average precision" with strange images as the positives, and "detected", the share of them at `RATES`."""
    errors: list[float | None]
    """Error among what has at least the confidence `THRESHOLDS`, images left out being errors; None where
    there is nothing."""


def study(config: StrangeConfig, console: Console | None = None) -> list[Outcome]:
    """Train every method with every seed, and judge it; what a stopped study has done is not done again.

    Members learn from training images of the kept classes. Settings and temperature are those of least log
    loss on validation images of the kept classes. Test images, strange ones among them, are only reported on.
    Methods have equal members, widths, most steps and numbers of settings on trial.

    Raises: InputError for settings or images that cannot be used, and a folder that holds another study;
        DivergedError when a loss is not finite.
    """
    config.check()
    outcomes = []
    with Progress(console=console or Console(quiet=True), transient=True) as progress:
        bar = progress.add_task("methods and seeds", total=len(config.seeds) * len(config.methods))
        for seed in config.seeds:
            split = load(config, seed)
            run = open_run(config.folder, replace(config, methods=(), seeds=(), folder=Path()), resume=True)
            for method in config.methods:
                path = run.folder / f"{method}-seed-{seed}.json"
                if not path.exists():
                    write_json(path, asdict(_outcome(config, method, seed, split, progress)))
                outcomes.append(Outcome(**read_json(path)))
                progress.advance(bar)
    write_text(config.folder / "summary.md", markdown(outcomes))
    for name, figure in figures(outcomes).items():
        save(figure, config.folder / f"{name}.png")
    return outcomes


def load(config: StrangeConfig, seed: int) -> Split:
    """Split the images by the seed, keep the classes that are learnt apart, and bring all to one norm.

        x ← (x − mean x)/rms(x − mean x) for every image, so that none is strange by its amount of ink

    Strange images are those of the test images' left-out classes, and test images of kept classes with noise
    of the training pixels' deviation, or after a quarter turn where they are square.

    Raises: InputError when images cannot be read, a class left out is not there, fewer than two are kept, or
        a kept class has no training image, or another part no image.
    Holds: images left out have no part in the others, but that they count in how several channels are scaled.
    """
    images = load_images(
        config.images, pool=config.pool, validation=config.validation, test=config.test, seed=seed
    )
    parts = (images.train, images.validation, images.test)
    known = torch.cat([part.labels for part in parts]).unique().tolist()
    if missing := sorted(set(config.left_out) - set(known)):
        raise InputError(f"{images.name} has no image of class {missing[0]}; its classes are {known}")
    kept = torch.tensor([each for each in known if each not in config.left_out])
    if len(kept) < 2:
        raise InputError(f"of the classes {known} at least two must be kept for training")
    train, validation, test = (part[torch.isin(part.labels, kept)] for part in parts)
    train = train[torch.arange(len(train))[: config.limit]]
    if lacking := sorted(set(kept.tolist()) - set(train.labels.tolist())):
        raise InputError(f"there is no training image of class {lacking[0]}; raise the limit")
    left_out = images.test[~torch.isin(images.test.labels, kept)].images
    for name, count in {"validation": len(validation), "test": len(test), LEFT_OUT: len(left_out)}.items():
        if not count:
            raise InputError(f"no {name} image remains; give more images")
    generator = torch.Generator().manual_seed(seed_of(seed, "strange"))
    noise = torch.randn(test.images.shape, generator=generator)
    strange = {LEFT_OUT: left_out, "noisy": test.images + noise}
    if test.images.shape[-1] == test.images.shape[-2]:
        strange["turned"] = test.images.rot90(1, (-2, -1))

    def numbered(part: Labelled) -> tuple[Tensor, Tensor]:
        return _levelled(part.images), torch.searchsorted(kept, part.labels)

    levelled = {name: _levelled(part) for name, part in strange.items()}
    return Split(numbered(train), numbered(validation), numbered(test), levelled, len(kept))


def _levelled(images: Tensor) -> Tensor:
    """Flatten images and give every one mean 0 and mean square 1; one without contrast becomes 0."""
    centred = images.flatten(1) - images.flatten(1).mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)


def settings(config: StrangeConfig, method: str) -> list[Setting]:
    """Return what is on trial: every σ_w with every noise variance, or with as many numbers of steps."""
    if RECIPES[method].anchor is None:
        pairs = [(config.noise[0], max(1, config.steps >> halved)) for halved in range(len(config.noise))]
    else:
        pairs = [(each, config.steps) for each in config.noise]
    return [Setting(weight_std, *pair) for weight_std in config.weight_std for pair in pairs]


def _outcome(config: StrangeConfig, method: str, seed: int, split: Split, progress: Progress) -> Outcome:
    """Choose a setting, train with it and judge."""
    trials = []
    for setting in (tried := settings(config, method)):
        small = replace(config, members=min(config.tried, config.members))
        found = _fit(small, method, seed, setting, split, progress)
        mean, _ = doubts(found, split.validation[0])
        trials.append({**asdict(setting), "log_loss": log_loss(mean, split.validation[1]).item()})
    best = min(range(len(tried)), key=lambda place: trials[place]["log_loss"])
    classifier = _fit(config, method, seed, tried[best], split, progress)
    chosen = {**asdict(tried[best]), "temperature": classifier.temperature}
    return Outcome(method, seed, chosen, trials, **judged(classifier, split))


def _fit(
    config: StrangeConfig, method: str, seed: int, setting: Setting, split: Split, progress: Progress
) -> Classifier:
    """Train a classifier, its temperature on validation images."""
    x, labels = split.train
    make = partial(
        mlp, x.shape[1], split.classes, widths=config.widths, activation=config.activation,
        weight_std=setting.weight_std, bias_std=config.bias_std,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        prior = prior_variances(make())
    asked = EnsembleConfig(
        method=method, members=config.members, noise_variance=setting.noise_variance, prior=prior,
        steps=setting.steps, learning_rate=config.learning_rate, batch=config.batch, seed=seed,
    )  # fmt: skip
    bar = progress.add_task(method, total=config.members if RECIPES[method].linear else setting.steps)
    found = fit_classifier(
        make, x, labels, asked, lambda step: progress.update(bar, completed=step), held_out=split.validation
    )
    progress.remove_task(bar)
    return found


def doubts(
    classifier: Classifier, x: Float[Tensor, "n pixels"]
) -> tuple[Float[Tensor, "n classes"], dict[str, Float[Tensor, " n"]]]:
    """Return the probabilities of classes, and four kinds of doubt by name.

        entropy, least confidence and mutual information of softmax(f̃_m/T);  variance Σ_k var_m f̃_mk

    Shapes: x (n, pixels) -> (n, K), (n) each.
    Holds: exactly; the variance is the epistemic one of the regression on classes, free of the temperature.
    """
    scores = classifier.ensemble.functions(x).double()
    members = (scores / classifier.temperature).softmax(-1)
    mean = members.mean(0)
    return mean, {
        "entropy": entropy(mean),
        "least confidence": least_confidence(mean),
        "mutual information": mutual_information(members),
        "variance": scores.var(0).sum(-1),
    }


def judged(classifier: Classifier, split: Split) -> dict[str, Any]:
    """Report on test images and strange ones: the fields of an `Outcome` behind its trials."""
    x, labels = split.test
    mean, known = doubts(classifier, x)
    found = {kind: doubts(classifier, images) for kind, images in split.strange.items()}
    strange = {
        kind: {
            name: {
                "AUROC": auroc(doubt, known[name]).item(),
                "average precision": average_precision(doubt, known[name]).item(),
                "detected": detected(doubt, known[name]),
            }
            for name, doubt in named.items()
        }
        for kind, (_, named) in found.items()
    }
    wrong, others = (mean.argmax(-1) != labels).double(), found[LEFT_OUT][0]
    confidence = torch.cat([mean.amax(-1), others.amax(-1)])
    error = torch.cat([wrong, torch.ones(len(others)).to(wrong)])
    above = error_above(confidence, error, confidence.new_tensor(THRESHOLDS)).tolist()
    scores = {
        "accuracy": 1 - wrong.mean().item(),
        "log loss": log_loss(mean, labels).item(),
        "Brier": brier(mean, labels).item(),
        "ECE": expected_calibration_error(mean, labels).item(),
        "error by rank": error_confidence_curve(confidence, error).mean().item(),
    }
    errors = [None if math.isnan(value) else value for value in above]
    return {"scores": scores, "strange": strange, "errors": errors}


def detected(positive: Float[Tensor, " n"], negative: Float[Tensor, " m"]) -> list[float]:
    """Return the share of positives above a threshold by that of negatives, at `RATES` (a ROC curve).

    Shapes: (n), (m) -> len(RATES) numbers.
    Holds: exactly at the rates that thresholds have, on straight lines between them.
    """
    thresholds = torch.cat([positive, negative]).unique().flip(0)
    alarms, hits = (
        np.append(0, (side[:, None] >= thresholds).double().mean(0)) for side in (negative, positive)
    )
    return np.interp(RATES, alarms, hits).tolist()


def readings(outcome: Outcome) -> dict[str, float]:
    """Return the numbers of an outcome by name."""
    told = {
        f"{measure}, {kind}, {name}": values[measure]
        for measure in ("AUROC", "average precision")
        for kind, named in outcome.strange.items()
        for name, values in named.items()
    }
    return {**outcome.scores, **told}


def summary(outcomes: Sequence[Outcome]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return mean and standard error over seeds by reading and method; no error of a single seed.

    se = √(Σ_s (r_s − mean)²/(S (S − 1)))
    """
    table: dict[str, dict[str, list[float]]] = {}
    for outcome in outcomes:
        for name, value in readings(outcome).items():
            table.setdefault(name, {}).setdefault(outcome.method, []).append(value)
    return {
        name: {method: _mean(torch.tensor(values, dtype=torch.float64)) for method, values in row.items()}
        for name, row in table.items()
    }


def _mean(values: Tensor) -> tuple[float, float]:
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Write the summary as a table, a column a method."""
    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    lines = [f"| | {' | '.join(methods)} |", "|---|" + "---|" * len(methods)]
    for name, row in summary(outcomes).items():
        cells = [
            f"{mean:.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")
            for mean, error in (row[method] for method in methods)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figures(outcomes: Sequence[Outcome], kind: str = LEFT_OUT, doubt: str = "entropy") -> dict[str, Figure]:
    """Draw errors by confidence, and how many strange images of a kind a doubt detects."""
    errors: dict[str, list[list[float | None]]] = {}
    shares: dict[str, list[list[float | None]]] = {}
    for outcome in outcomes:
        errors.setdefault(outcome.method, []).append(outcome.errors)
        shares.setdefault(outcome.method, []).append(outcome.strange[kind][doubt]["detected"])
    return {"errors": error_by_confidence(errors, THRESHOLDS), "detection": detection(shares, RATES)}
