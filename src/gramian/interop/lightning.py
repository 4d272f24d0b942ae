"""Observations of any model that Lightning trains."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from gramian.errors import MissingExtraError
from gramian.observe.record import Record
from gramian.observe.watch import Watch, summary

if TYPE_CHECKING or find_spec("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
elif find_spec("pytorch_lightning"):
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    raise MissingExtraError('observing in Lightning needs lightning: pip install "gramian[lightning]"')

FILE = "observations.jsonl"
"""The record's name in the log folder."""


class ObserveCallback(Callback):
    """Records the readings of a model's insides while Lightning trains it.

    Every `every` optimiser steps it reads the streams entering the model's layers, over all micro-batches
    of the step, without the tokens that attention_mask hides, and appends a row to a `Record`. The step of a
    row is the number of updates made before. A resumed training continues the record; a new one begins it
    anew.

    A summary over the sites goes to the trainer's loggers, under observe/neuron_kurtosis_max and the like.

    Of several processes only the main one reads, and only its share of the batch.

    Args:
        path: file of the record; None for observations.jsonl in the trainer's log folder.
        every: optimiser steps between two observations.
        streams: which modules to read, as `Probe` takes them; None finds the layers (`watch.layers`).
        mask: the model's argument that says which tokens count, or None for all.
        options: more options of `Probe`, as `attentions="calls"` to read the attention of any model.

    Raises: InputError when training begins, as `Watch`; at the first step that is read, when it calls none
        of the streams' modules.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        every: int = 50,
        streams: str | Sequence[str] | type[nn.Module] | None = None,
        mask: str | None = "attention_mask",
        **options: Any,
    ):
        self.path = path
        self._options = {"every": every, "streams": streams, "mask": mask, **options}
        self._watch: Watch | None = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the streams and the place in the record."""
        folder = trainer.log_dir or trainer.default_root_dir  # all processes must ask for log_dir
        if trainer.is_global_zero:
            path = Path(folder) / FILE if self.path is None else self.path
            self._watch = Watch(pl_module, Record(path), **self._options)
            self._watch.start(trainer.global_step)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read this micro-batch, if the step is due."""
        self._step = trainer.global_step
        if self._watch is not None:
            self._watch.attach(self._step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the row and log its summary, if the optimiser has made its step."""
        if self._watch is None:
            return
        self._watch.detach()
        if trainer.global_step == self._step:
            return
        readings = self._watch.finish()
        if readings is not None:
            for logger in trainer.loggers:
                logger.log_metrics(summary(readings), step=self._step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
