"""Image classifiers on a user's images: what to read, what to build, how to train and judge it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from gramian.data.images import Images, Labelled, load_images
from gramian.errors import InputError
from gramian.files import atomic_file
from gramian.nn.resnet import HE_STD, ResNet, cifar_resnet, gains
from gramian.tasks.language import print_facts, run_folder
from gramian.train.loop import Trainer, Training
from gramian.train.run import Run, open_run
from gramian.train.side_by_side import train_side_by_side

BEST = "best.safetensors"
"""Weights of the evaluation with the highest validation accuracy, the first of equal ones."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What is read."""

    path: Path | None = None
    """Folder or IDX file in MNIST's format, or .npz; scikit-learn's digits when none is given."""
    pool: int = 1
    """Side of the squares of pixels that are averaged to one."""
    count: int | None = None
    """Most images taken; all when not given."""
    split_seed: int = 0
    """Seed of the split into training, validation and test images."""

    def load(self) -> Images:
        """Read, split and standardise the images."""
        return load_images(self.path, pool=self.pool, count=self.count, seed=self.split_seed)


@dataclass(frozen=True, kw_only=True)
class Network:
    """What is built: a residual network of 6n + 2 layers."""

    depth: int = 32
    """Layers, 6n + 2."""
    widths: tuple[int, ...] = (8, 16, 32)
    """Channels of the three stages."""
    rule: str = "uniform"
    """Gains of the L = 3n blocks: none (1), uniform (1/√L) or decreasing (1/(√l log(l + 1)))."""
    norm: str = "none"
    """none, or batch for BatchNorm behind every convolution."""
    weight_std: float = HE_STD
    """σ_w: weights start with variance σ_w²/fan_in."""

    def build(self, images: Images, seed: int) -> ResNet:
        """Return the network for some images, with weights drawn from a seed.

        Raises: InputError for settings that cannot be used.
        """
        per_stage, rest = divmod(self.depth - 2, 6)
        if rest or per_stage < 1:
            raise InputError(f"the depth must be 6n + 2 (8, 14, 20, 26, 32, …), got {self.depth}")
        if len(self.widths) != 3:
            raise InputError(f"a network of 6n + 2 layers has three stages, got {len(self.widths)} widths")
        if self.norm not in ("none", "batch"):
            raise InputError(f"unknown norm {self.norm!r}; choose none or batch")
        return cifar_resnet(
            per_stage,
            self.widths,
            images.classes,
            gains(self.rule, 3 * per_stage),
            channels=images.train.images.shape[1],
            norm=nn.BatchNorm2d if self.norm == "batch" else None,
            weight_std=self.weight_std,
            seed=seed,
        )


def sgd(steps: int, evaluate_every: int, **changed: Any) -> Training:
    """Return how residual networks are trained as published: SGD with momentum, rate ÷ 10 twice on the way.

    Momentum 0.9, batches of 128, rate 0.1 until half of the steps and 0.001 from three quarters, weight decay
    1e-4, no warm-up, no clipping, unless changed.
    """
    published: dict[str, Any] = {
        "batch": 128,
        "optimiser": "sgd",
        "learning_rate": 0.1,
        "schedule": "step",
        "warmup": 0.0,
        "weight_decay": 1e-4,
        "clip": float("inf"),
        "checkpoint_every": evaluate_every,
        "keep": 1,
    }
    return Training(steps=steps, evaluate_every=evaluate_every, **{**published, **changed})


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Train one image classifier."""

    data: Pictures = field(default_factory=Pictures)
    network: Network = field(default_factory=Network)
    training: Training = field(default_factory=lambda: sgd(360, 18, batch=64))
    shift: int = 0
    """Pixels by which training images are moved at most, each way, over a border of zeros."""
    flip: bool = False
    """Whether half of the training images are mirrored."""
    runs: Path = Path("runs")
    """Folder of run folders."""
    name: str = "images"
    """Name of the run folder."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        self.training.check()
        if self.shift < 0:
            raise InputError(f"shift cannot be negative, got {self.shift}")
        if self.training.gradient_checkpointing:
            raise InputError("gradient_checkpointing is for transformers; image networks have none")


def training_batches(config: ImageConfig, images: Images) -> Callable[[int], Tensor]:
    """Return the batches by step: rows (image, rows down, columns right, mirrored), whole numbers.

    Every epoch takes the images in an order of its own; the last that fill no batch wait for another epoch.

    Raises: InputError when the training images fill no batch.
    """
    count, size, seed = len(images.train), config.training.batch, config.training.seed
    if count < size:
        raise InputError(f"{count} training images fill no batch of {size}")
    per_epoch = count // size

    def batch(step: int) -> Tensor:
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(count, generator=_stream(seed, 0, epoch))[place * size : (place + 1) * size]
        generator = _stream(seed, 1, step)
        moves = torch.randint(2 * config.shift + 1, (size, 2), generator=generator)
        mirrored = torch.randint(2, (size, 1), generator=generator) * config.flip
        return torch.cat([order[:, None], moves, mirrored], dim=1)

    return batch


def _stream(seed: int, purpose: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 2 + purpose) * 1_000_003 + number)


class ImageLoss:
    """The mean loss of the training images that a batch names, moved and mirrored as it says, in nats.

    The images stay on the device of the first batch.
    """

    def __init__(self, data: Labelled, shift: int) -> None:
        self._data = Labelled(pad(data.images, (shift,) * 4), data.labels)
        self._size = data.images.shape[-2:]

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return the loss; batch (batch, 4) -> ()."""
        if self._data.labels.device != batch.device:
            self._data = self._data.to(batch.device)
        chosen, down, right, mirrored = batch.unbind(1)
        return cross_entropy(model(self.pictures(chosen, down, right, mirrored)), self._data.labels[chosen])

    def pictures(self, chosen: Tensor, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
        """Cut the images out of their frames: (batch,) each -> (batch, channels, height, width)."""
        height, width = self._size
        columns = torch.arange(width, device=chosen.device)
        columns = torch.where(mirrored[:, None] > 0, columns.flip(0), columns) + right[:, None]
        rows = torch.arange(height, device=chosen.device) + down[:, None]
        cut = self._data.images[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return cut.permute(0, 3, 1, 2)


def judge(model: nn.Module, data: Labelled, batch: int = 512) -> dict[str, float]:
    """Return loss (nats) and accuracy of a classifier that is in evaluation mode."""
    device = next(model.parameters()).device
    loss, right = 0.0, 0
    with torch.no_grad():
        for images, labels in zip(data.images.split(batch), data.labels.split(batch), strict=True):
            logits, labels = model(images.to(device)).float(), labels.to(device)
            loss += cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
    return {"loss": loss / len(data), "accuracy": right / len(data)}


def prepare(
    config: ImageConfig, images: Images, folder: Path, *, resume: bool, overwrite: bool = False
) -> Trainer:
    """Make or open the run folder of one network and return its trainer.

    Every evaluation judges the whole validation set; the weights of the best are kept beside the checkpoints.

    Raises: InputError for settings that do not fit, before anything is written.
    """
    config.check()
    model = config.network.build(images, config.training.seed)
    batches = training_batches(config, images)
    run = open_run(folder, config, resume=resume, overwrite=overwrite)

    def evaluate(forward: nn.Module) -> dict[str, float]:
        numbers = {f"validation_{name}": value for name, value in judge(forward, images.validation).items()}
        before = [row["validation_accuracy"] for row in evaluations(run)]
        if numbers["validation_accuracy"] > max(before, default=-1.0):
            with atomic_file(folder / BEST) as temporary:
                save_model(model, str(temporary))
        return numbers

    loss = ImageLoss(images.train, config.shift)
    training = config.training
    return Trainer(model, loss, batches, evaluate, None, training, run, tokens=training.batch, resume=resume)


def evaluations(run: Run) -> list[dict[str, Any]]:
    """Return a run's evaluations, in order."""
    return [row for row in run.record.read() if row["kind"] == "evaluate"]


def found(run: Run) -> dict[str, float]:
    """Return what training showed: the best evaluation, the last, and the gradient's norm.

    Raises: InputError when the run was never evaluated.
    """
    judged = evaluations(run)
    if not judged:
        raise InputError(f"the run {run.folder} has no evaluation")
    best = max(judged, key=lambda row: row["validation_accuracy"])
    steps = [row for row in run.record.read() if row["kind"] == "train"]
    norms = [row["gradient_norm"] for row in steps if isfinite(row["gradient_norm"])]
    return {
        "best_step": best["step"],
        "validation_accuracy": best["validation_accuracy"],
        "validation_loss": best["validation_loss"],
        "last_validation_accuracy": judged[-1]["validation_accuracy"],
        "first_gradient_norm": norms[0] if norms else float("nan"),
        "median_gradient_norm": median(norms) if norms else float("nan"),
        "seconds": judged[-1]["seconds"],
    }


def judge_test(config: ImageConfig, images: Images, run: Run) -> dict[str, float]:
    """Return loss and accuracy of a run's best weights on the test images.

    Raises: InputError when the run has no best weights or those of another network.
    """
    model = config.network.build(images, config.training.seed)
    try:
        load_model(model, run.folder / BEST)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{run.folder / BEST} holds no weights of this network: {error}") from error
    return {f"test_{name}": value for name, value in judge(model.eval(), images.test).items()}


def image_facts(images: Images, batch: int) -> dict[str, str]:
    """Say what was read."""
    channels, height, width = images.train.images.shape[1:]
    sizes = (
        f"{len(images.train):,} training, {len(images.validation):,} validation, {len(images.test):,} test"
    )
    return {
        "images": f"{images.name}, {height} x {width}, channels {channels}, classes {images.classes}",
        "split": f"{sizes}; {len(images.train) // batch:,} steps an epoch",
    }


def train_images(
    config: ImageConfig, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Run:
    """Train one image classifier in a run folder, and judge its best weights on the test images.

    Raises: InputError for settings or images that cannot be used; StoppedError after a signal, saved;
    DivergedError when the loss is not finite, with the last good checkpoint kept.
    """
    console = console or Console()
    config.check()
    folder = run_folder(config.runs, config.name)
    with console.status("reading the images"):
        images = config.data.load()
    trainer = prepare(config, images, folder, resume=resume, overwrite=overwrite)
    print_facts(console, image_facts(images, config.training.batch))
    train_side_by_side({config.name: trainer}, console)
    trainer.close()
    trainer.run.write_result({**found(trainer.run), **judge_test(config, images, trainer.run)})
    return trainer.run
