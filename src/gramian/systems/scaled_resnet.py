"""Stable ResNets: branches that shrink with depth keep signals, gradients and kernels, and so train deep."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import log, nan, sqrt
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from gramian.core.gram import Gram
from gramian.core.readings import cosine_mean
from gramian.data.images import Images
from gramian.errors import DivergedError, InputError
from gramian.files import write_json
from gramian.nn.resnet import DEFAULT_STD, HE_STD, RULES, dense_resnet, gains, profile
from gramian.systems.claims import Finding, averaged, paired
from gramian.tasks.images import (
    ImageConfig,
    Network,
    Pictures,
    found,
    image_facts,
    judge_test,
    prepare,
    sgd,
)
from gramian.tasks.language import print_facts, run_folder
from gramian.theory.duals import dual
from gramian.theory.limits import log_growth, rescaled
from gramian.theory.maps import Activation, Dense, Serial, Signal
from gramian.train.run import open_run
from gramian.train.side_by_side import train_side_by_side

CLAIM = """Residual networks whose branches are scaled by 1/sqrt(L), or by 1/(sqrt(l) log(l+1)), keep signals,
gradients and kernels bounded at every depth, and train at depths where the unscaled network fails or loses
accuracy (Hayou et al. 2021, arXiv 2010.12859)."""

SPOILED, STABLE = "none", ("uniform", "decreasing")

NOTICEABLE = 0.01
"""Accuracy by which two networks must differ to count as different."""

LEARNT = 0.5
"""Validation accuracy above which a network counts as trained."""

APART = 0.3
"""Cosine of every pair of inputs of which the start is measured."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured and trained to see whether the claim holds."""

    job: ImageConfig = field(default_factory=ImageConfig)
    """Images and training; depth, rule, norm, learning rate and seed are those of each network."""
    depths: tuple[int, ...] = (32, 50, 104)
    """Layers of the image networks, 6n + 2."""
    norms: tuple[str, ...] = ("none", "batch")
    """Without BatchNorm, with it."""
    rules: tuple[str, ...] = (SPOILED, *STABLE)
    """Depth rules; none is the spoiled control."""
    rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    """Learning rates tried by every network; the best on the validation images is kept."""
    selection_seed: int = 1000
    """Seed with which the learning rate is chosen."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Repetitions at the chosen rate; at least two give a standard error."""
    start_depths: tuple[int, ...] = (8, 32, 128, 512)
    """Blocks of the dense networks that are measured untrained."""
    start_width: int = 64
    """Their width."""
    name: str = "scaled_resnet"
    """Name of the run folder."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        self.job.check()
        if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"a standard error needs two different seeds or more, got {list(self.seeds)}")
        if self.selection_seed in self.seeds:
            raise InputError(f"the selection seed {self.selection_seed} must not be one of the repetitions'")
        for name in ("depths", "norms", "rules", "rates", "start_depths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} must be one or more different values, got {list(values)}")
        if unknown := set(self.rules) - set(RULES):
            raise InputError(f"unknown depth rule {min(unknown)!r}; choose {', '.join(RULES)}")


def quick() -> Config:
    """Return settings of about an hour on one core: digits of 8 × 8 pixels, three depths, 20 epochs."""
    training = sgd(360, 18, batch=64, checkpoint_every=180)
    return Config(job=ImageConfig(network=Network(widths=(8, 16, 32)), training=training))


def paper(which: str = "cifar10") -> Config:
    """Return the published settings for cifar10, cifar100 or tiny (TinyImageNet).

    Set `job.data.path` to a .npz of the data with its test set. What differs from the published protocol:
    the learning rate and the epoch are chosen on validation images, a share of those for training, and the
    accuracy is that on the test images at that epoch; the published code takes the best of all epochs and
    rates on the test images, and goes on with one random stream where seeds are ours. Weights start as the
    published code effectively starts them, with σ_w² = 1/3.

    Raises: InputError for another name.
    Source: Hayou et al. 2021, arXiv 2010.12859, and its code.
    """
    epochs = {"cifar10": (160, 42_500), "cifar100": (160, 42_500), "tiny": (250, 85_000)}
    if which not in epochs:
        raise InputError(f"unknown setting {which!r}; choose quick, {', '.join(epochs)}")
    number, images = epochs[which]
    per_epoch = images // 128
    training = sgd(number * per_epoch, per_epoch, log_every=50)
    network = Network(widths=(32, 64, 128), weight_std=DEFAULT_STD)
    job = ImageConfig(data=Pictures(), network=network, training=training, shift=4, flip=True)
    return Config(job=job, rates=(0.01, 0.1), name=f"scaled_resnet_{which}")


@dataclass(frozen=True)
class Start:
    """How far apart both ends of an untrained dense network of one rule and depth are; ± standard error."""

    rule: str
    depth: int
    forward: tuple[float, float]
    """ln(E y_L² / E y_0²)."""
    backward: tuple[float, float]
    """ln of the squared gradient at y_0 over that at y_L."""
    growth: float
    """What the theory says of both: Σ ln(1 + λ² σ_w²/2)."""
    cosine: tuple[float, float]
    """Mean cosine of inputs after the last block; it is `APART` at the input."""
    limit: float
    """What the theory of infinite width says of it."""


@dataclass(frozen=True)
class Cell:
    """What training one network showed; numbers by seed."""

    depth: int
    norm: str
    rule: str
    tried: dict[str, float | None]
    """Learning rate -> validation accuracy with the selection seed; None where training diverged."""
    rate: float
    """The learning rate chosen."""
    accuracy: list[float]
    """Share of the test images that are classed rightly, at the best epoch of validation; a network that
    diverged guesses the most frequent class."""
    loss: list[float]
    """Their loss in nats; NaN where training diverged."""
    gradient: list[float]
    """Gradient norm of the first step."""
    diverged: int
    """Seeds whose training diverged."""

    @property
    def trainable(self) -> float:
        """Share of the learning rates at which the network learns."""
        return sum(value is not None and value > LEARNT for value in self.tried.values()) / len(self.tried)


@dataclass(frozen=True)
class Result:
    """What was measured: untrained networks, and trained ones."""

    start: list[Start]
    cells: list[Cell]

    def cell(self, depth: int, norm: str, rule: str) -> Cell:
        """Return what one network showed."""
        return next(c for c in self.cells if (c.depth, c.norm, c.rule) == (depth, norm, rule))


def run(config: Config, console: Console | None = None) -> Result:
    """Measure untrained networks, then train every network with every seed; what was done is not done again.

    Networks may be spread over processes: each runs some of the depths, norms or rules in the same folder,
    and a last one with all of them collects what the others found.

    Raises: InputError for settings that cannot be used; StoppedError after a signal, saved.
    """
    console = console or Console()
    config.check()
    with console.status("reading the images"):
        images = config.job.data.load()
    print_facts(console, image_facts(images, config.job.training.batch))
    with console.status("measuring untrained networks"):
        start = [at_start(config, rule, depth) for rule in config.rules for depth in config.start_depths]
    cells = [
        _cell(config, Network(**{**asdict(config.job.network), **cell}), images, console)
        for depth in config.depths
        for norm in config.norms
        for rule in config.rules
        for cell in [{"depth": depth, "norm": norm, "rule": rule}]
    ]
    result = Result(start, cells)
    write_json(run_folder(config.job.runs, config.name) / "result.json", asdict(result))
    return result


def at_start(config: Config, rule: str, depth: int) -> Start:
    """Measure untrained dense networks of He's weights, and fold the theory's maps to the same depth."""
    lambdas = torch.tensor(gains(rule, depth), dtype=torch.float64)
    cosine = torch.tensor([[1, APART], [APART, 1]], dtype=torch.float64)
    branch = Serial(Activation(dual("relu")), Dense(HE_STD))
    ones = cosine.diagonal()
    limit, _ = rescaled(branch, lambdas, Signal(Gram(cosine, ones, ones)))
    measured = [_measured(config.start_width, lambdas.tolist(), seed) for seed in config.seeds]
    forward, backward, after = (averaged(values) for values in zip(*measured, strict=True))
    growth = log_growth(lambdas, HE_STD**2 / 2)[-1].item()
    return Start(rule, depth, forward, backward, growth, after, cosine_mean(limit.activation).item())


def _measured(width: int, lambdas: list[float], seed: int) -> tuple[float, float, float]:
    """Return logarithms of forward and backward growth and the last cosine of one network."""
    n = 32
    x = torch.cat([torch.full((n, 1), sqrt(APART)), sqrt(1 - APART) * torch.eye(n)], dim=1).double()
    model = dense_resnet(n + 1, width, 1, nn.ReLU, lambdas, seed=seed).double()
    seen = profile(model, x, seed)
    forward, backward = seen.forward[-1] / seen.forward[0], seen.backward[0] / seen.backward[-1]
    return forward.log().item(), backward.log().item(), seen.cosine[-1].item()


def _cell(config: Config, network: Network, images: Images, console: Console) -> Cell:
    """Choose a learning rate for one network on validation images, then repeat with every seed."""
    place = run_folder(config.job.runs, config.name) / f"{network.depth}-{network.norm}-{network.rule}"
    console.print(f"{network.depth} layers, norm {network.norm}, rule {network.rule}", highlight=False)

    def trained(rate: float, seed: int) -> dict[str, Any]:
        training = replace(config.job.training, learning_rate=rate, seed=seed)
        name = f"rate-{rate:g}-seed-{seed}"
        job = replace(config.job, network=network, training=training, name=name)
        return _trained(job, images, place / name, console, test=seed != config.selection_seed)

    chosen = {rate: trained(rate, config.selection_seed) for rate in config.rates}
    rate = max(chosen, key=lambda rate: (_quality(chosen[rate]), -rate))
    outcomes = [trained(rate, seed) for seed in config.seeds]
    guess = images.test.labels.bincount().max().item() / len(images.test)
    return Cell(
        depth=network.depth,
        norm=network.norm,
        rule=network.rule,
        tried={f"{rate:g}": outcome.get("validation_accuracy") for rate, outcome in chosen.items()},
        rate=rate,
        accuracy=[outcome.get("test_accuracy", guess) for outcome in outcomes],
        loss=[outcome.get("test_loss", nan) for outcome in outcomes],
        gradient=[outcome.get("first_gradient_norm", nan) for outcome in outcomes],
        diverged=sum("diverged" in outcome for outcome in outcomes),
    )


def _quality(outcome: Mapping[str, Any]) -> tuple[float, float]:
    """Return what a run is chosen by: validation accuracy, then the lower loss."""
    return outcome.get("validation_accuracy", -1.0), -outcome.get("validation_loss", 0.0)


def _trained(
    job: ImageConfig, images: Images, place: Path, console: Console, *, test: bool
) -> dict[str, Any]:
    """Train one network, or go on with it, or read what it found before."""
    run = open_run(place, job, resume=True)
    known = run.result()
    if known is not None:
        return known
    trainer = prepare(job, images, place, resume=True)
    try:
        train_side_by_side({place.name: trainer}, console)
        result = {**found(run), **(judge_test(job, images, run) if test else {})}
    except DivergedError as error:
        console.print(str(error), highlight=False, markup=False)
        result = {"diverged": str(error)}
    finally:
        trainer.close()
    run.write_result(result)
    return result


def check(result: Result) -> list[Finding]:
    """Return what the claim stands or falls with; the unscaled network must show what the others are spared.

    Without BatchNorm a stable network must be noticeably better than the unscaled one at every depth; with
    it, where unscaled gradients grow by a power of the depth only, it must not be shown to be worse.
    """
    return [*_start_findings(result.start), *_training_findings(result)]


def _start_findings(start: list[Start]) -> list[Finding]:
    findings = []
    deepest = max(row.depth for row in start)
    for row in (row for row in start if row.depth == deepest):
        where = f"of {row.rule} at {deepest} blocks, untrained"
        for side in ("forward", "backward"):
            (mean, error), least = getattr(row, side), 0.9 * log(2) * deepest
            what = f"ln of the {side} growth {where}"
            if row.rule == SPOILED:
                findings.append(Finding(what, mean, error, least, below=False))
            else:
                findings.append(Finding(what, mean, error, row.growth + 0.5, below=True))
        what = f"cosine of inputs {where} (theory {row.limit:.3f}; {APART} at the input)"
        spoiled = row.rule == SPOILED
        findings.append(Finding(what, *row.cosine, 0.95 if spoiled else 0.65, below=not spoiled))
    return findings


def _training_findings(result: Result) -> list[Finding]:
    findings = []
    for cell in (cell for cell in result.cells if cell.rule != SPOILED):
        spoiled = [c for c in result.cells if (c.depth, c.norm, c.rule) == (cell.depth, cell.norm, SPOILED)]
        if not spoiled:
            continue
        ahead = paired(cell.accuracy, spoiled[0].accuracy)
        where = f"{cell.depth} layers, norm {cell.norm}"
        if cell.norm == "none":
            what = f"test accuracy of {cell.rule} above {SPOILED}, {where}"
            findings.append(Finding(what, *ahead, NOTICEABLE, below=False))
        else:
            what = f"test accuracy of {SPOILED} above {cell.rule}, {where}"
            findings.append(Finding(what, -ahead[0], ahead[1], NOTICEABLE, below=True))
    return findings


def table(result: Result) -> list[Mapping[str, Any]]:
    """Return one row a network: mean and standard error over the seeds."""
    return [
        {
            "layers": str(cell.depth),
            "norm": cell.norm,
            "rule": cell.rule,
            "test accuracy": _written(cell.accuracy),
            "rate": f"{cell.rate:g}",
            "rates that train": f"{cell.trainable:.0%}",
            "first gradient norm": _written(cell.gradient),
            "diverged": f"{cell.diverged} of {len(cell.accuracy)}",
        }
        for cell in result.cells
    ]


def start_table(result: Result) -> list[Mapping[str, Any]]:
    """Return one row for every rule and depth of the untrained networks, the theory beside the measured."""
    return [
        {
            "rule": row.rule,
            "blocks": str(row.depth),
            "ln forward growth": "{:.3f} ± {:.2g}".format(*row.forward),
            "ln backward growth": "{:.3f} ± {:.2g}".format(*row.backward),
            "theory": f"{row.growth:.3f}",
            "cosine": "{:.3f} ± {:.2g}".format(*row.cosine),
            "theory (width → ∞)": f"{row.limit:.3f}",
        }
        for row in result.start
    ]


def _written(values: list[float]) -> str:
    mean, error = averaged(values)
    return "—" if mean != mean else f"{mean:.4g} ± {error:.2g}"
