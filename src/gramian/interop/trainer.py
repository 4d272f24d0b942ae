"""Observations of any model that Hugging Face's Trainer trains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gramian.errors import InputError
from gramian.observe.record import Record
from gramian.observe.watch import Watch, summary

FILE = "observations.jsonl"
"""The record's name in the output folder."""


class ObserveCallback(TrainerCallback):
    """Records the readings of a model's insides while Hugging Face's Trainer trains it.

    Every `every` optimiser steps it reads the streams entering the model's layers, over all micro-batches
    of the step, without the tokens that attention_mask hides, and appends a row to a `Record`. Of each
    micro-batch the first forward pass in training mode counts. The step of a row is the number of updates
    made before. A resumed training continues the record; a new one begins it anew.

    A summary over the sites goes into the log history, under observe/neuron_kurtosis_max and the like; the
    trackers (TensorBoard, W&B) see it too when the callback was given to the trainer by `add_to`.

    Of several processes only the main one reads, and only its share of the batch.

    Args:
        path: file of the record; None for observations.jsonl in the trainer's output folder.
        every: optimiser steps between two observations.
        streams: which modules to read, as `Probe` takes them; None finds the layers (`watch.layers`).
        mask: the model's argument that says which tokens count, or None for all.
        options: more options of `Probe`, as `attentions="calls"` to read the attention of any model.

    Raises: InputError when training begins, as `Watch`, or on several GPUs in one process; at the first
        step that is read, when it calls none of the streams' modules.
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
        self._trainer: Trainer | None = None

    def add_to(self, trainer: Trainer) -> "ObserveCallback":
        """Add this callback to a trainer, which then also sends the summary to its trackers."""
        trainer.add_callback(self)
        self._trainer = trainer
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Find the streams and the place in the record."""
        self.on_train_end(args, state, control)
        if args.n_gpu > 1:
            raise InputError(
                f"{args.n_gpu} GPUs in one process (DataParallel) cannot be observed; start one process a "
                "GPU with torchrun or accelerate launch, or show one GPU with CUDA_VISIBLE_DEVICES"
            )
        if state.is_world_process_zero:
            path = Path(args.output_dir or ".") / FILE if self.path is None else self.path
            self._watch = Watch(model, Record(path), **self._options)
            self._watch.start(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the step's first micro-batch, if the step is due."""
        if self._watch is not None:
            self._watch.next_pass(state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the next micro-batch too."""
        self.on_step_begin(args, state, control)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the step's row, and log its summary."""
        readings = None if self._watch is None else self._watch.finish()
        if readings is None:
            return
        if self._trainer is not None:
            self._trainer.log(summary(readings))
        else:
            state.log_history.append({**summary(readings), "epoch": state.epoch, "step": state.global_step})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
