"""The trajectory of any model that Hugging Face's Trainer trains, recorded while it trains."""

from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gramian.errors import InputError
from gramian.observe.recorder import SIZE, TrajectoryRecorder

FOLDER = "trajectory"
"""The record's name in the output folder."""

SHARDED = {"DEEPSPEED": "DeepSpeed", "FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM"}
"""Ways of training in which no process need hold all parameters: as Accelerate calls them, and by name."""


class TrajectoryCallback(TrainerCallback):
    """Records the path of a model's parameters while Hugging Face's Trainer trains it.

    A point is written before the first optimiser step, after every `every`-th and after the last, by a
    `TrajectoryRecorder`. A resumed training goes on with the record and drops what lies after its checkpoint;
    a new one begins it anew. `gramian trajectory FOLDER` reads it.

    Of several processes only the main one records.

    With load_best_model_at_end a training that stops early between two points has its last point at the
    earlier one, as the last weights are gone by then.

    Args:
        folder: where the points go; None for trajectory/ in the trainer's output folder.
        every: optimiser steps between two points.
        mode, size, seed, trainable_only: as `TrajectoryRecorder` takes them.

    Raises: InputError when training begins, as `TrajectoryRecorder` and its `start`, or under DeepSpeed and
        FSDP, which shard the parameters; DivergedError at a point where a parameter is not finite.
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

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Find the place in the record, and write the first point."""
        self._recorder = None
        _check_whole(args)
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".") / FOLDER if self.folder is None else self.folder
            self._recorder = TrajectoryRecorder(model, folder, **self._options)
            self._recorder.start(state.global_step)
            self._recorder.record_if_due(state.global_step, self.every)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write a point if one is due."""
        if self._recorder is not None:
            end = control.should_training_stop or state.global_step >= state.max_steps
            self._recorder.record_if_due(state.global_step, self.every, end)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the last point, unless other weights were loaded since, and forget the model."""
        if self._recorder is not None and not args.load_best_model_at_end:
            self._recorder.record_if_due(state.global_step, self.every, end=True)
        self._recorder = None


def _check_whole(args: TrainingArguments) -> None:
    """Raise InputError where the parameters may be sharded over processes."""
    way = AcceleratorState().distributed_type.value
    way = "DEEPSPEED" if args.deepspeed else "FSDP" if args.fsdp else way
    if way in SHARDED:
        raise InputError(
            f"the parameters are sharded over processes by {SHARDED[way]}, so their trajectory cannot be "
            "recorded while training; save checkpoints and run gramian trajectory on them"
        )
