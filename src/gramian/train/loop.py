"""One training loop on Accelerate: it advances, reads, saves, stops and resumes."""

import math
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gramian.errors import DivergedError, InputError
from gramian.observe.probe import Probe
from gramian.train import checkpoint, optimisers
from gramian.train.points import Points
from gramian.train.processes import Processes, main_first, others
from gramian.train.run import Run
from gramian.train.schedule import multiplier
from gramian.train.settings import Training
from gramian.train.sharding import whole


class Trainer:
    """A model on its way through a run.

    Everything at a step is a function of the settings and the step alone (batch, learning rate, random
    stream), and the rest is in the checkpoint; so a run that was stopped and resumed ends in the very same
    weights. All processes of a launch train the model together (`Processes`): to the same weights, up to
    rounding, as one process does, but for dropout, whose stream each has for itself.

    Args:
        model: what is trained.
        loss: (model, batch) -> scalar mean loss of a batch, or of a part of its rows.
        batches: step -> batch, a pure function; the first axis is split over micro-batches and processes.
        evaluate: model -> numbers, called on every process, in evaluation mode without gradients.
        probe: what is read from the insides every `settings.observe_every` steps, or None.
        settings: how to train.
        run: where readings and checkpoints go.
        tokens: what one step trains on, for the throughput.
        resume: whether to go on from the newest checkpoint.
        unit: what `tokens` counts, in words.
        groups: (model, weight decay) -> the optimiser's groups; by default vectors are not decayed.
        enough: whether training has ended before its last step, asked after every evaluation.
        count: how many things the mean loss of a batch is of, its rows by default; parts of a batch weigh by
            it.
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
        count: Callable[[Tensor], int] = len,
    ) -> None:
        self._processes = Processes(settings.device == "cpu", run.folder, tensorboard=settings.tensorboard)
        settings.check()
        self._processes.check(settings.optimiser)
        self.model, self.settings, self.run, self.probe = model, settings, run, probe
        self._loss, self._batches, self._evaluate, self._tokens = loss, batches, evaluate, tokens
        self.unit, self._enough, self._ended, self._count = unit, enough, False, count
        self._processes.place(model)
        self._optimiser = optimisers.build_optimiser(settings.optimiser, model, settings.rates, groups)
        self._record, self._rows = run.record, 0
        self.step, self.seconds = 0, 0.0
        self.latest: dict[str, float] = {}
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._group_start, self._group_observed = 0.0, False
        self._rates: list[float] = []
        if settings.tensorboard:
            self._processes.accelerator.init_trackers("tensorboard")
        if resume:
            main_first(self._restore)
            self._processes.check_same(torch.tensor([self.step, int(self._ended)]))
        if self._processes.count > 1:
            self._processes.check_same(batches(self.step))
        self._forward = self._processes.share(model, self._optimiser)
        self._compiled: Any = torch.compile(self._forward) if settings.compile else self._forward
        self._points = self._start_trajectory()
        if self.step == 0:
            self._processes.on_main(lambda: self._record.keep_first(0))
            self._write_evaluation()

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken, or enough of them."""
        return self.step >= self.settings.steps or self._ended

    @property
    def device(self) -> torch.device:
        """Where the model is trained."""
        return self._processes.device

    @property
    def tokens_per_second(self) -> float:
        """Median training throughput over groups of steps without observation; the mean before the first."""
        if self._rates:
            return statistics.median(self._rates)
        return self._tokens * self.step / self.seconds if self.seconds else 0.0

    @others()
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

    @others()
    def save(self) -> None:
        """Write a checkpoint of this step, unless there is nothing new."""
        if self.step == 0:
            return
        state = {"seconds": self.seconds, "rates": self._rates, "rows": self._rows}
        main = self._processes.is_main
        kept = checkpoint.optimiser_state(self.model, self._optimiser, keep=main)
        model = whole(self.model, keep=main)

        def save() -> None:
            self._record.sync()
            folder, most = self.run.checkpoints, self.settings.keep
            checkpoint.save(folder, self.step, model, kept, state, most)

        self._processes.on_main(save)

    def agreed(self, requested: str | None) -> str | None:
        """Return the signal that asked any of the processes to stop, or None."""
        number = self._processes.largest(signal.Signals[requested] if requested else 0)
        return signal.Signals(number).name if number else None

    def close(self) -> None:
        """End the trackers."""
        if self.settings.tensorboard:
            self._processes.accelerator.end_training()

    def _restore(self) -> None:
        saved = checkpoint.newest(self.run.checkpoints)
        if saved is None:
            return
        state = checkpoint.load(saved, self.model, self._optimiser)
        try:
            self.seconds, self._rates, self._rows = state["seconds"], state["rates"], state["rows"]
        except KeyError as error:
            raise InputError(f"the checkpoint {saved.folder} lacks {error} in its state.json") from error
        self.step = saved.step
        main = self._processes.is_main
        if main:  # a process that was killed may have had no time to
            checkpoint.drop_surplus(self.run.checkpoints, self.settings.keep)
        rows = self._record.keep_first(self._rows) if main else self._record.read()
        if main and len(rows) < self._rows:
            warnings.warn(f"{self._record.path} lacks readings before step {self.step}", stacklevel=4)
            self._rows = len(rows)
        for row in rows:
            self._remember(row)
        self._ended = self._enough()

    def _start_trajectory(self) -> Points | None:
        """Begin the trajectory, or go on with it: later points of a run that was cut off are dropped."""
        every, mode = self.settings.trajectory_every, self.settings.trajectory
        if not every:
            return None
        points = Points(self.model, self.run, mode, every, self.step, self._processes)
        if points.due(self.step, self.finished):
            points.record(self.step)
        return points

    def _record_trajectory(self) -> None:
        """Record a point if it is due; the time that this takes is no training time."""
        if self._points is None or not self._points.due(self.step, self.finished):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the steps before are training time
        began = time.perf_counter()
        try:
            self._points.record(self.step)
        except DivergedError:
            self._flush()  # which names the step whose loss or gradient was at fault
            raise
        self._group_start += time.perf_counter() - began

    def _remember(self, row: dict[str, Any]) -> None:
        """Keep the latest of every number but the step."""
        self.latest.update({key: value for key, value in row.items() if isinstance(value, float)})

    def _take_step(self) -> None:
        settings, processes = self.settings, self._processes
        share = multiplier(self.step, settings.steps, settings.warmup, settings.schedule)
        for group in self._optimiser.param_groups:
            group["lr"] = share * group["initial_lr"]
        observed = self.probe is not None and self.probe.due(self.step)
        forward = self._forward if observed else self._compiled
        batch = self._batches(self.step)
        parts, total = processes.rows(batch, settings.accumulation), torch.zeros((), device=self.device)
        shares = [processes.count * self._count(part) / self._count(batch) for part in parts]
        with self._random_stream(), self._sampling() as sample:
            for index, (part, weight) in enumerate(zip(parts, shares, strict=True)):
                with processes.adding_up(self._forward, last=index == len(parts) - 1):
                    with self._arithmetic():
                        loss = self._loss(forward, part.to(self.device)) * weight
                    processes.accelerator.backward(loss)
                total += loss.detach()
            norm = processes.clip(self.model, settings.clip)
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._pending.append((total, norm.detach()))
        if sample is not None:
            self._group_observed = True
            processes.merge_(sample)
            self._write({"kind": "observe", "step": self.step, "sites": sample.readings()})
        self.step += 1

    @contextmanager
    def _random_stream(self) -> Iterator[None]:
        """Seed what the model draws (dropout) by seed, step and process; torch's own stream is put back."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.settings.seed * 1_000_003 + self.step + (self._processes.index << 40))
            yield

    def _arithmetic(self) -> torch.autocast:
        """Return the autocast of the forward pass."""
        low = self.settings.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low)

    def _sampling(self) -> Any:
        return nullcontext() if self.probe is None else self.probe.sample(self.step)

    def _flush(self) -> None:
        """Look at the steps since the last look: check that they are finite and write them down."""
        if not self._pending:
            return
        values = self._processes.mean(torch.stack([torch.stack(pair) for pair in self._pending]))
        losses, norms = values.T.tolist()
        elapsed = time.perf_counter() - self._group_start
        first = self.step - len(losses)
        for index, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._diverged(first + index, "loss" if not math.isfinite(loss) else "gradient")
        if not self._group_observed and len(losses) == self.settings.log_every:
            self._rates.append(self._tokens * len(losses) / elapsed)
        self.seconds += elapsed
        began, each = self.seconds - elapsed, elapsed / len(losses)
        self._write(
            *(
                {"kind": "train", "step": first + index, "loss": loss, "gradient_norm": norm}
                | {"seconds": began + each * (index + 1)}
                for index, (loss, norm) in enumerate(zip(losses, norms, strict=True))
            )
        )
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

        def judge() -> None:
            self._ended = self.step > 0 and self._enough()

        self._processes.on_main(judge)
        self._ended = self._processes.largest(int(self._ended)) > 0

    def _write(self, *rows: dict[str, Any]) -> None:
        for row in rows:
            self._remember(row)
        self._processes.on_main(lambda: self._append(rows))

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            self._record.append(row)
            self._rows += 1
            if self.settings.tensorboard:
                scalars = {f"{row['kind']}/{key}": value for key, value in _scalars(row)}
                self._processes.accelerator.log(scalars, step=row["step"])


def _scalars(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Flatten a row's numbers, nested keys joined by slashes."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, float):
            yield prefix + key, value
