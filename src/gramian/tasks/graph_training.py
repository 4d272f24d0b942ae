"""One network on graphs trained in a run folder: its batches, its loss, its best weights, and its test."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.files import atomic_file
from gramian.nn.graph_network import optimiser_groups
from gramian.tasks.graph_data import Sampler, Source
from gramian.tasks.graph_models import GRED, Architecture, build_network, parameters
from gramian.tasks.graph_scores import METRICS, Scale, better, loss_of, score_of, worst
from gramian.train.batches import batch_of
from gramian.train.loop import Trainer, Training
from gramian.train.run import Run, open_run

BEST = "best.safetensors"
"""Weights of the evaluation with the best validation metric, the first of equal ones."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How every network is trained."""

    epochs: int = 20
    """Times that the training graphs are gone through, at most."""
    patience: int | None = None
    """Epochs without a better validation metric after which training ends; none when not given."""
    batch: int = 32
    """Graphs that an optimiser step sees."""
    learning_rates: tuple[float, ...] = (1e-3,)
    """Peak learning rates tried with the first seed, of which the best on the validation part is kept; rates
    rise over the first 5 % of the steps and fall by a cosine."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; embeddings, norms, biases and the recurrence have none."""
    precision: str = "fp32"
    """Arithmetic of the forward pass: fp32, or bf16 for autocast."""
    device: str = "auto"
    """auto takes a GPU when there is one; cpu never does."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if self.epochs < 1:
            raise InputError(f"epochs must be at least 1, got {self.epochs}")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience must be at least 1 epoch, got {self.patience}")
        if not self.learning_rates or len(set(self.learning_rates)) < len(self.learning_rates):
            raise InputError(f"learning_rates are one or several different ones, got {self.learning_rates}")
        for rate in self.learning_rates:
            self.training(rate, 1, 0).check()

    def training(self, rate: float, epoch: int, seed: int) -> Training:
        """Return the settings of the training loop for a learning rate and some steps an epoch."""
        return Training(
            steps=self.epochs * epoch,
            batch=self.batch,
            learning_rate=rate,
            schedule="cosine",
            weight_decay=self.weight_decay,
            betas=(0.9, 0.999),
            precision=self.precision,
            device=self.device,
            seed=seed,
            evaluate_every=epoch,
            checkpoint_every=epoch,
            keep=1,
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One network with one learning rate and one seed: everything that determines its run."""

    model: str = GRED
    learning_rate: float = 1e-3
    seed: int = 0
    source: Source = field(default_factory=Source)
    architecture: Architecture = field(default_factory=Architecture)
    schedule: Schedule = field(default_factory=Schedule)


@dataclass(frozen=True)
class Outcome:
    """What became of one network."""

    model: str
    learning_rate: float
    seed: int
    parameters: int
    validation: float
    """Best validation metric."""
    test: float
    """Test metric of the same weights."""
    epoch: int
    """Of the best weights."""
    epochs: int
    """Trained."""
    seconds: float
    """Of training, without evaluations."""


class GraphLoss:
    """The mean loss of the graphs that a batch names, by columns of numbers and of the seed of signs."""

    def __init__(self, sampler: Sampler, scale: Scale | None, *, shells: bool) -> None:
        self._sampler, self._scale, self._shells = sampler, scale, shells

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return the loss; batch (graphs, 2) -> ()."""
        numbers, flips = batch[:, 0].cpu(), int(batch[0, 1])
        sample = self._sampler.sample(numbers, shells=self._shells, flips=flips).to(batch.device)
        scale = None if self._scale is None else self._scale.to(batch.device)
        return loss_of(self._sampler.graphs.task, sample.through(model).float(), sample.batch.y, scale)


def training_batches(train: Tensor, size: int, seed: int) -> Callable[[int], Tensor]:
    """Return the batches by step: rows (number of a graph, seed of signs).

    Every epoch takes the graphs in an order of its own; the last that fill no batch wait for another epoch.
    """

    def batch(step: int) -> Tensor:
        numbers = train[batch_of(len(train), size, seed, step)]
        return torch.stack((numbers, torch.full_like(numbers, seed * 1_000_003 + step)), 1)

    return batch


def predictions(
    model: nn.Module, sampler: Sampler, numbers: Tensor, *, shells: bool, batch: int = 64
) -> tuple[Tensor, Tensor]:
    """Return a network's outputs for some graphs, and what they were to be; on the CPU.

    Shapes: (graphs or nodes, outputs), (graphs or nodes) or (graphs or nodes, outputs).
    """
    device = next(model.parameters()).device
    outputs, targets = [], []
    with torch.no_grad():
        for part in numbers.split(batch):
            sample = sampler.sample(part, shells=shells)
            targets.append(sample.batch.y)
            outputs.append(sample.to(device).through(model).float().cpu())
    return torch.cat(outputs), torch.cat(targets)


def prepare(trial: Trial, sampler: Sampler, folder: Path) -> Trainer:
    """Make or open the run folder of one network and return its trainer.

    Every epoch judges the whole validation part; the weights of the best are kept beside the checkpoints.

    Raises: InputError for settings that do not fit, before anything is written.
    """
    trial.schedule.check()
    graphs, split = sampler.graphs, sampler.split
    size = min(trial.schedule.batch, len(split.train))
    epoch = len(split.train) // size
    model = build_network(trial.model, graphs, trial.architecture, trial.seed)
    scale, shells = sampler.scale, trial.model == GRED
    run = open_run(folder, trial, resume=True)
    metric = METRICS[graphs.task]

    def evaluate(forward: nn.Module) -> dict[str, float]:
        outputs, y = predictions(forward, sampler, split.validation, shells=shells)
        loss = loss_of(graphs.task, outputs, y, scale).item()
        value = score_of(graphs.task, outputs, y, scale)
        if better(metric, value, _best(run, metric)[0]):
            with atomic_file(folder / BEST) as temporary:
                save_model(forward, str(temporary))
        return {"validation_loss": loss, f"validation_{metric}": value}

    def enough() -> bool:
        best, last = _best(run, metric)[1], max((row["step"] for row in evaluations(run)), default=0)
        patience = trial.schedule.patience
        return patience is not None and last - best >= patience * epoch

    loss = GraphLoss(sampler, scale, shells=shells)
    batches = training_batches(split.train, size, trial.seed)
    return Trainer(
        model,
        loss,
        batches,
        evaluate,
        None,
        trial.schedule.training(trial.learning_rate, epoch, trial.seed),
        run,
        tokens=size,
        resume=True,
        unit="graphs",
        groups=lambda model, decay: optimiser_groups(model, trial.learning_rate, decay),
        enough=enough,
    )


def evaluations(run: Run) -> list[dict[str, Any]]:
    """Return a run's evaluations, in order."""
    return [row for row in run.record.read() if row["kind"] == "evaluate"]


def _best(run: Run, metric: str) -> tuple[float, int]:
    """Return the best validation metric so far, the first of equal ones, and its step."""
    best, step = worst(metric), 0
    for row in evaluations(run):
        if better(metric, row[f"validation_{metric}"], best):
            best, step = row[f"validation_{metric}"], row["step"]
    return best, step


def concluded(trial: Trial, trainer: Trainer, sampler: Sampler) -> Outcome:
    """Judge the best weights of a run on the test part and write what was found.

    Raises: InputError when the run has no best weights or those of another network.
    """
    graphs, run = sampler.graphs, trainer.run
    metric = METRICS[graphs.task]
    model = best_network(trial, sampler, run).to(trainer.device)
    outputs, y = predictions(model, sampler, sampler.split.test, shells=trial.model == GRED)
    best, step = _best(run, metric)
    epoch = trainer.settings.evaluate_every
    outcome = Outcome(
        trial.model,
        trial.learning_rate,
        trial.seed,
        parameters(model),
        best,
        score_of(graphs.task, outputs, y, sampler.scale),
        step // epoch,
        trainer.step // epoch,
        trainer.seconds,
    )
    run.write_result(vars(outcome))
    return outcome


def best_network(trial: Trial, sampler: Sampler, run: Run) -> nn.Module:
    """Return the network of a run with its best weights, in evaluation mode.

    Raises: InputError when the run has none, or those of another network.
    """
    model = build_network(trial.model, sampler.graphs, trial.architecture, trial.seed)
    try:
        load_model(model, run.folder / BEST)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{run.folder / BEST} holds no weights of this network: {error}") from error
    return model.eval()
