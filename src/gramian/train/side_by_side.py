"""Several trainers in turn, so that they share the machine's moods, with live progress and a clean stop."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gramian.errors import DivergedError, StoppedError
from gramian.train.loop import Trainer
from gramian.train.signals import stop_requests


def train_side_by_side(trainers: Mapping[str, Trainer], console: Console) -> None:
    """Advance all trainers to their last step, a few steps of each in turn.

    Throughputs measured this way can be compared on a machine whose speed wanders. On SIGINT (Ctrl-C) or
    SIGTERM, on any of the processes, the step at hand is finished and every trainer saved.

    Raises: StoppedError after a signal; DivergedError, the other trainers saved, when a loss or gradient
        is not finite.
    """
    columns = (
        TextColumn("{task.description:>20}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[rate]}  left"),
        TimeRemainingColumn(),
    )
    with stop_requests() as requested, Progress(*columns, console=console, speed_estimate_period=300) as bar:
        tasks = {
            name: bar.add_task(name, total=trainer.settings.steps, completed=trainer.step, **_shown(trainer))
            for name, trainer in trainers.items()
        }
        while unfinished := {name: t for name, t in trainers.items() if not t.finished}:
            for name, trainer in unfinished.items():
                if signal := trainer.agreed(requested()):
                    _save(trainers.values())
                    steps = ", ".join(f"{name} at step {t.step}" for name, t in trainers.items())
                    raise StoppedError(f"stopped by {signal} and saved: {steps}; go on with --resume")
                before = trainer.step
                try:
                    trainer.advance(trainer.settings.log_every)
                except DivergedError as error:
                    _save(other for other in trainers.values() if other is not trainer)
                    raise DivergedError(f"{name}: {error}") from error
                shown = _shown(trainer)
                bar.update(tasks[name], completed=trainer.step, **shown)
                tenth = trainer.settings.steps / 10
                if not console.is_terminal and before // tenth < trainer.step // tenth:  # no live bar there
                    console.print("{}: step {}, loss {loss}, {rate}".format(name, trainer.step, **shown))


def _save(trainers: Iterable[Trainer]) -> None:
    for trainer in trainers:
        trainer.save()


def _shown(trainer: Trainer) -> dict[str, Any]:
    """Return a trainer's latest training loss and its throughput in words."""
    loss = trainer.latest.get("loss")
    rate = f"{trainer.tokens_per_second:,.0f} {trainer.unit}/s"
    return {"loss": "…" if loss is None else f"{loss:.3f}", "rate": rate}
