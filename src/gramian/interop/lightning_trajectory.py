"""The trajectory of any model that Lightning trains, recorded while it trains."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gramian.errors import InputError, MissingExtraError
from gramian.observe.recorder import SIZE, TrajectoryRecorder

if TYPE_CHECKING or find_spec("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
elif find_spec("pytorch_lightning"):
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    raise MissingExtraError(
        'recording trajectories in Lightning needs lightning: pip install "gramian[lightning]"'
    )

FOLDER = "trajectory"
"""The record's name in the log folder."""

SHARDED = ("FSDP", "DeepSpeed", "ModelParallel")
"""Strategies, by the beginning of their class's name, in which no process holds all parameters."""


class TrajectoryCallback(Callback):
    """Records the path of a model's parameters while Lightning trains it.

    A point is written before the first optimiser step, after every `every`-th and after the last, by a
    `TrajectoryRecorder`; the steps are those of `trainer.global_step`, which counts the steps of every
    optimiser. A resumed training goes on with the record and drops what lies after its checkpoint; a new one
    begins it anew. `gramian trajectory FOLDER` reads it.

    Of several processes only the main one records.

    Args:
        folder: where the points go; None for trajectory/ in the trainer's log folder.
        every: optimiser steps between two points.
        mode, size, seed, trainable_only: as `TrajectoryRecorder` takes them.

    Raises: InputError when training begins, as `TrajectoryRecorder` and its `start`, or under a strategy that
        shards the parameters; DivergedError at a point where a parameter is not finite.
    """

    def __init__(
        self,
        folder: Path | str | None = None,
        every: int = 50,
        mode: str = "sketch",
        size: int = SIZE,
        seed: int = 0,
        trainable_only: bool = True,
    ):
        if every < 1:
            raise InputError(f"the steps between two points must be at least 1, got {every}")
        self.folder, self.every = folder, every
        self._options = {"mode": mode, "size": size, "seed": seed, "trainable_only": trainable_only}
        self._recorder: TrajectoryRecorder | None = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the place in the record, and write the first point."""
        strategy = type(trainer.strategy).__name__
        if strategy.startswith(SHARDED):
            raise InputError(
                f"the parameters are sharded over processes by {strategy}, so their trajectory cannot be "
                "recorded while training; save checkpoints and run gramian trajectory on them"
            )
        around = trainer.log_dir or trainer.default_root_dir  # all processes must ask for log_dir
        self._recorder, self._step = None, trainer.global_step
        if trainer.is_global_zero:
            folder = Path(around) / FOLDER if self.folder is None else self.folder
            self._recorder = TrajectoryRecorder(pl_module, folder, **self._options)
            self._recorder.start(self._step)
            self._recorder.record_if_due(self._step, self.every)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a point if a step that is due was made."""
        before, self._step = self._step, trainer.global_step
        if self._recorder is not None:
            passed = self._step // self.every > before // self.every  # several optimisers may step at once
            self._recorder.record_if_due(self._step, self.every, end=passed)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last point."""
        if self._recorder is not None:
            self._recorder.record_if_due(trainer.global_step, self.every, end=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the model."""
        self._recorder = None
