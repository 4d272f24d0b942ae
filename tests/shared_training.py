"""Small trainings that one process and several can do: named, so that each side builds the same.

As a program: `python shared_training.py folder job…` does jobs on the processes of a launch, each a name, a
number of steps, ddp or fsdp, and perhaps resume, joined by dashes.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from gramian.data.objectives import IGNORED, HiddenTokens, NextToken
from gramian.errors import GramianError
from gramian.files import write_text
from gramian.nn.blocks import gains
from gramian.nn.transformer import TransformerConfig, build
from gramian.observe.probe import Probe
from gramian.ranks import processes, rank, ranks
from gramian.tasks.language import language_loss, predicted
from gramian.train import checkpoint
from gramian.train.loop import Trainer, Training
from gramian.train.processes import FSDP, open_run_once
from gramian.train.run import Run
from gramian.train.side_by_side import train_side_by_side

TOKENS, LENGTH, BATCH = 51, 9, 8

DEVICE = "cpu" if torch.cuda.is_available() else "auto"
"""What a user leaves as it is; two processes cannot share one GPU."""

SETTINGS = Training(
    steps=8, batch=BATCH, learning_rate=0.01, eps=1e-5, clip=0.5, log_every=3, evaluate_every=4,
    observe_every=3, checkpoint_every=4, keep=0, trajectory_every=4, trajectory="exact", device=DEVICE,
)  # fmt: skip
"""An eps far above rounding, which alone makes the gradient of the keys' biases: AdamW would follow it."""

SHAPES = {
    "decoder": {"block": "pre_norm"},
    "encoder": {"block": "post_norm", "causal": False},
    "scalars": {"block": "sas_p", "norm": "none", "tied": False, "positions": "rotary"},
    "uneven": {"block": "pre_norm", "causal": False},
    "careless": {"block": "pre_norm", "causal": False},
}

ODD = {"rows": 7, "different": BATCH, "stopped": BATCH, "full": BATCH}
"""Trainings that do not end well on two processes, and the rows of their batches."""


def settings_of(name: str) -> Training:
    clip = 0.1 if name == "scalars" else SETTINGS.clip
    return replace(SETTINGS, accumulation=2 if name in SHAPES and name != "decoder" else 1, clip=clip)


def batches_of(name: str) -> Callable[[int], Tensor]:
    """Uneven ones have three targets in every second row, so that one of two processes has them all."""

    def batch(step: int) -> Tensor:
        stream = torch.Generator().manual_seed(step + (rank() if name == "different" else 0))
        windows = torch.randint(1, TOKENS - 1, (ODD.get(name, BATCH), LENGTH), generator=stream)
        if name in ("decoder", "scalars", *ODD):
            return NextToken()(windows, step)
        planes = HiddenTokens(TOKENS - 1, 0.3, seed=0)(windows, step)
        if name in ("uneven", "careless"):
            planes[:, 1] = windows[:, :-1]
            planes[::2, 1, 3:] = IGNORED
        return planes

    return batch


def trainer(name: str, folder: Path, *, resume: bool = False, **changes) -> Trainer:
    shape = TransformerConfig(
        vocabulary=TOKENS, width=18, depth=2, heads=3, context=LENGTH - 1, **SHAPES.get(name, {})
    )
    model, settings, batches = build(shape, 0), replace(settings_of(name), **changes), batches_of(name)

    def evaluate(forward) -> dict:
        loss = language_loss(forward, batches(1000)).item()
        return {"validation_loss": loss, "gains": [gains(block) for block in model.blocks]}

    probe = Probe(model, "blocks.*", attentions="**.mixing", every=settings.observe_every)
    run = open_run_once(folder, settings_of(name), resume=resume)
    count = len if name == "careless" else predicted
    return Trainer(
        model, language_loss, batches, evaluate, probe, settings, run, tokens=64, resume=resume, count=count
    )


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a run's newest checkpoint."""
    return load_file(checkpoint.checkpoints(Run(folder).checkpoints)[-1].folder / checkpoint.MODEL)


def stopping(model: nn.Module, batch: Tensor) -> Tensor:
    """The last process is asked to stop."""
    if rank() == ranks() - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return language_loss(model, batch)


def full(rows: object) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


def do(folder: Path, job: str) -> None:
    name, steps, *how = job.split("-")
    os.environ[FSDP] = "true" if "fsdp" in how else "false"
    one = trainer(name, folder / job, resume="resume" in how)
    if name == "stopped":
        one._loss = stopping
        train_side_by_side({name: one}, Console(quiet=True))
    if name == "full":
        one._append = full
    one.advance(int(steps) - one.step)
    one.save()


def told(folder: Path, job: str) -> None:
    """Do a job and write down how this process says that it ended."""
    try:
        do(folder, job)
        said = ""
    except GramianError as error:
        said = f"{type(error).__name__}: {error}"
    except OSError as error:
        said = f"OSError: {error}"
    write_text(folder / f"{job}.{rank()}", said)


if __name__ == "__main__":
    with processes():
        for each in sys.argv[2:]:
            told(Path(sys.argv[1]), each)
