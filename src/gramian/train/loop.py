"""One training loop on Accelerate: it advances, reads, saves, stops and resumes."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gramian.errors import DivergedError, InputError, MissingExtraError
from gramian.observe.probe import Probe
from gramian.observe.recorder import MODES, TrajectoryRecorder
from gramian.train import checkpoint, optimisers
from gramian.train.run import Run
from gramian.train.schedule import multiplier


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained."""

    steps: int = 800
    """Optimiser steps."""
    batch: int = 4
    """Sequences an optimiser step sees, over all devices."""
    accumulation: int = 1
    """Micro-batches that a step's sequences are split into, to save memory."""
    optimiser: str = "adamw"
    """adamw, adafactor, soap, shampoo or muon; AdamW trains embeddings and vectors beside the last three."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    vector_learning_rate: float | None = None
    """Peak learning rate of what AdamW trains beside soap, shampoo or muon; the same when not given."""
    schedule: str = "linear"
    """How the learning rate falls after the warm-up: linear, cosine or constant."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; gains, norms and biases have none."""
    betas: tuple[float, float] | None = None
    """Decay rates of the two moments; each optimiser's own when not given, 0.9 and 0.99 for adamw."""
    eps: float = 1e-8
    """The term that AdamW and SOAP add to the root of the second moment."""
    clip: float = 1.0
    """Largest gradient norm; inf for no clipping."""
    precision: str = "fp32"
    """Arithmetic of the forward pass: fp32, or bf16 for autocast."""
    gradient_checkpointing: bool = False
    """Whether blocks are computed again in the backward pass, to save memory."""
    compile: bool = False
    """Compile the model with torch.compile (steps that are observed run uncompiled)."""
    device: str = "auto"
    """auto takes a GPU when there is one; cpu never does."""
    seed: int = 0
    """Seed of weights and batches."""
    evaluate_every: int = 100
    """Steps between two evaluations."""
    observe_every: int = 50
    """Steps between two observations of the insides."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints kept, newest first; 0 keeps all."""
    log_every: int = 10
    """Steps between two looks at the loss (each one waits for the device)."""
    trajectory_every: int = 0
    """Steps between two points of the recorded trajectory, of which the last step is one; 0 for none."""
    trajectory: str = "sketch"
    """What a point of the trajectory keeps: sketch, 64 KiB for any model, or exact, all weights."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run folder."""

    def check(self) -> None:
        """Raise InputError (MissingExtraError) naming the first setting that cannot be used."""
        counts = ("steps", "batch", "accumulation", "evaluate_every", "observe_every", "checkpoint_every")
        for name in (*counts, "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch % self.accumulation:
            raise InputError(f"batch {self.batch} is not divisible by accumulation {self.accumulation}")
        for name in ("keep", "trajectory_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} cannot be negative, got {getattr(self, name)}")
        if self.trajectory not in MODES:
            raise InputError(f"unknown trajectory {self.trajectory!r}; choose sketch or exact")
        if not self.clip > 0:
            raise InputError(f"clip must be positive (inf for none), got {self.clip:g}")
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"unknown precision {self.precision!r}; choose fp32 or bf16")
        if self.device not in ("auto", "cpu"):
            raise InputError(f"unknown device {self.device!r}; choose auto or cpu")
        if self.tensorboard and find_spec("tensorboard") is None:
            raise MissingExtraError(
                'writing TensorBoard files needs tensorboard: pip install "gramian[tensorboard]"'
            )
        if self.seed < 0:
            raise InputError(f"seed cannot be negative, got {self.seed}")
        multiplier(0, self.steps, self.warmup, self.schedule)
        optimisers.check(self.optimiser, self.rates)

    @property
    def rates(self) -> optimisers.Settings:
        """What the optimiser is told."""
        return optimisers.Settings(
            self.learning_rate, self.weight_decay, self.betas, self.eps, self.vector_learning_rate
        )


class Trainer:
    """A model on its way through a run.

    Everything at a step is a function of the settings and the step alone (batch, learning rate, random
    stream), and the rest is in the checkpoint; so a run that was stopped and resumed ends in the very same
    weights.

    Args:
        model: what is trained.
        loss: (model, batch) -> scalar mean loss of a batch.
        batches: step -> batch, a pure function; the first axis is split over micro-batches and devices.
        evaluate: model -> numbers, called in evaluation mode without gradients.
        probe: what is read from the insides every `settings.observe_every` steps, or None.
        settings: how to train.
        run: where readings and checkpoints go.
        tokens: what one step trains on, for the throughput.
        resume: whether to go on from the newest checkpoint.
        unit: what `tokens` counts, in words.
        groups: (model, weight decay) -> the optimiser's groups; by default vectors are not decayed.
        enough: whether training has ended before its last step, asked after every evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Tensor], Tensor],
        batches: Callable[[int], Tensor],
        evaluate: Callable[[nn.Module], dict[str, Any]],
        probe: Probe | None,
        settings: Training,
        run: Run,
        *,
        tokens: int,
        resume: bool = False,
        unit: str = "tokens",
        groups: Callable[[nn.Module, float], optimisers.Groups] = optimisers.parameter_groups,
        enough: Callable[[], bool] = lambda: False,
    ) -> None:
        settings.check()
        self.model, self.settings, self.run, self.probe = model, settings, run, probe
        self._loss, self._batches, self._evaluate, self._tokens = loss, batches, evaluate, tokens
        self._accelerator = Accelerator(
            cpu=settings.device == "cpu",
            log_with="tensorboard" if settings.tensorboard else None,
            project_dir=run.folder,
        )
        self.unit, self._enough, self._ended = unit, enough, False
        optimiser = optimisers.build_optimiser(settings.optimiser, model, settings.rates, groups)
        self._forward, self._optimiser = self._accelerator.prepare(model, optimiser)
        self._compiled: Any = torch.compile(self._forward) if settings.compile else self._forward
        self._record, self._rows = run.record, 0
        self.step, self.seconds = 0, 0.0
        self.latest: dict[str, float] = {}
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._group_start, self._group_observed = 0.0, False
        self._rates: list[float] = []
        if settings.tensorboard:
            self._accelerator.init_trackers("tensorboard")
        if resume:
            self._restore()
        self._recorder = self._start_trajectory()
        if self.step == 0:
            self._record.keep_first(0)
            self._write_evaluation()

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken, or enough of them."""
        return self.step >= self.settings.steps or self._ended

    @property
    def device(self) -> torch.device:
        """Where the model is trained."""
        return self._accelerator.device

    @property
    def tokens_per_second(self) -> float:
        """Median training throughput over groups of steps without observation; the mean before the first."""
        if self._rates:
            return statistics.median(self._rates)
        return self._tokens * self.step / self.seconds if self.seconds else 0.0

    def advance(self, steps: int) -> None:
        """Take up to `steps` optimiser steps, with the readings and checkpoints that fall due.

        Raises: DivergedError at the first step whose loss or gradient is not finite, or when a weight is not
            finite at a checkpoint or a point of the trajectory; what was saved stays.
        """
        self.model.train()
        self._group_start, self._group_observed = time.perf_counter(), False
        for _ in range(min(steps, self.settings.steps - self.step)):
            if self._ended:
                break
            self._take_step()
            self._record_trajectory()
            due = {
                name: self.step % every == 0 or self.finished
                for name, every in (
                    ("log", self.settings.log_every),
                    ("evaluate", self.settings.evaluate_every),
                    ("checkpoint", self.settings.checkpoint_every),
                )
            }
            if not any(due.values()):
                continue
            self._flush()
            if due["evaluate"]:
                self._write_evaluation()
            if self._ended:
                self._record_trajectory()
            if due["checkpoint"] or self._ended:
                self.save()
            self._group_start = time.perf_counter()
        self._flush()

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is nothing new."""
        if self.step == 0 or not self._accelerator.is_main_process:
            return
        state = {"seconds": self.seconds, "rates": self._rates, "rows": self._rows}
        model = self._accelerator.unwrap_model(self._forward)
        optimiser = self._optimiser.optimizer
        checkpoint.save(self.run.checkpoints, self.step, model, optimiser, state, self.settings.keep)

    def close(self) -> None:
        """End the trackers."""
        if self.settings.tensorboard:
            self._accelerator.end_training()

    def _restore(self) -> None:
        saved = checkpoint.checkpoints(self.run.checkpoints)
        if not saved:
            return
        model = self._accelerator.unwrap_model(self._forward)
        state = checkpoint.load(saved[-1], model, self._optimiser.optimizer)
        try:
            self.seconds, self._rates, self._rows = state["seconds"], state["rates"], state["rows"]
        except KeyError as error:
            raise InputError(f"the checkpoint {saved[-1].folder} lacks {error} in its state.json") from error
        self.step = saved[-1].step
        self._record.keep_first(self._rows)
        for row in self._record.read():
            self._remember(row)
        self._ended = self._enough()

    def _start_trajectory(self) -> TrajectoryRecorder | None:
        """Begin the trajectory, or go on with it: later points of a run that was cut off are dropped."""
        settings = self.settings
        if not (settings.trajectory_every and self._accelerator.is_main_process):
            return None
        model = self._accelerator.unwrap_model(self._forward)
        recorder = TrajectoryRecorder(model, self.run.folder / "trajectory", settings.trajectory)
        recorder.start(self.step)
        recorder.record_if_due(self.step, settings.trajectory_every, self.finished)
        return recorder

    def _record_trajectory(self) -> None:
        """Record a point if it is due; the time that this takes is no training time."""
        recorder, every = self._recorder, self.settings.trajectory_every
        if recorder is None or not recorder.due(self.step, every, self.finished):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the steps before are training time
        began = time.perf_counter()
        try:
            recorder.record(self.step)
        except DivergedError:
            self._flush()  # which names the step whose loss or gradient was at fault
            raise
        self._group_start += time.perf_counter() - began

    def _remember(self, row: dict[str, Any]) -> None:
        """Keep the latest of every number but the step."""
        self.latest.update({key: value for key, value in row.items() if isinstance(value, float)})

    def _take_step(self) -> None:
        settings, accelerator = self.settings, self._accelerator
        share = multiplier(self.step, settings.steps, settings.warmup, settings.schedule)
        for group in self._optimiser.param_groups:
            group["lr"] = share * group["initial_lr"]
        observed = self.probe is not None and self.probe.due(self.step)
        forward = self._forward if observed else self._compiled
        batch = self._batches(self.step)[accelerator.process_index :: accelerator.num_processes]
        parts = batch.to(accelerator.device).chunk(settings.accumulation)
        total = torch.zeros((), device=accelerator.device)
        with self._random_stream(), self._sampling() as sample:
            for index, part in enumerate(parts):
                last = index == len(parts) - 1
                with _nothing() if last else accelerator.no_sync(self._forward):
                    with self._arithmetic():
                        loss = self._loss(forward, part) / len(parts)
                    accelerator.backward(loss)
                total += loss.detach()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), settings.clip)
        assert norm is not None
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._pending.append((total, norm.detach()))
        if sample is not None:
            self._group_observed = True
            self._write({"kind": "observe", "step": self.step, "sites": sample.readings()})
        self.step += 1

    @contextmanager
    def _random_stream(self) -> Iterator[None]:
        """Seed what the model draws (dropout) by the seed and the step; torch's own stream is put back."""
        device = self._accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
            yield

    def _arithmetic(self) -> torch.autocast:
        """Return the autocast of the forward pass."""
        low = self.settings.precision == "bf16"
        return torch.autocast(self._accelerator.device.type, torch.bfloat16, enabled=low)

    def _sampling(self) -> Any:
        return _nothing() if self.probe is None else self.probe.sample(self.step)

    def _flush(self) -> None:
        """Look at the steps since the last look: check that they are finite and write them down."""
        if not self._pending:
            return
        losses, norms = (torch.stack(values).tolist() for values in zip(*self._pending, strict=True))
        elapsed = time.perf_counter() - self._group_start
        first = self.step - len(losses)
        for index, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._diverged(first + index, "loss" if not math.isfinite(loss) else "gradient")
        if not self._group_observed and len(losses) == self.settings.log_every:
            self._rates.append(self._tokens * len(losses) / elapsed)
        self.seconds += elapsed
        for index, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            row = {"kind": "train", "step": first + index, "loss": loss, "gradient_norm": norm}
            self._write({**row, "seconds": self.seconds - elapsed * (1 - (index + 1) / len(losses))})
        self._pending.clear()
        self._group_start, self._group_observed = time.perf_counter(), False

    def _diverged(self, step: int, what: str) -> DivergedError:
        saved = checkpoint.checkpoints(self.run.checkpoints)
        kept = f"the last good checkpoint is {saved[-1].folder}" if saved else "nothing was saved yet"
        return DivergedError(
            f"the {what} is not finite at step {step}; {kept} (try a lower learning rate or more warm-up)"
        )

    def _write_evaluation(self) -> None:
        self.model.eval()
        with torch.no_grad(), self._arithmetic():
            numbers = self._evaluate(self._forward)
        self.model.train()
        self._write({"kind": "evaluate", "step": self.step, "seconds": self.seconds, **numbers})
        self._ended = self.step > 0 and self._enough()

    def _write(self, row: dict[str, Any]) -> None:
        self._remember(row)
        if not self._accelerator.is_main_process:
            return
        self._record.append(row)
        self._rows += 1
        if self.settings.tensorboard:
            scalars = {f"{row['kind']}/{key}": value for key, value in _scalars(row)}
            self._accelerator.log(scalars, step=row["step"])


def _scalars(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Flatten a row's numbers, nested keys joined by slashes."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, float):
            yield prefix + key, value


@contextmanager
def _nothing() -> Iterator[None]:
    yield None
