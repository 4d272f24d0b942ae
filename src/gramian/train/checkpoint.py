"""Checkpoints of a model, its optimiser and the place in a run: safetensors and JSON, complete or absent."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from gramian.errors import DivergedError, InputError
from gramian.files import atomic_folder, write_json

MODEL, OPTIMISER, STATE = "model.safetensors", "optimiser.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint lies and how many optimiser steps it has seen."""

    folder: Path
    step: int


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the complete checkpoints below a folder, oldest first."""
    found = [
        Checkpoint(path, int(path.name.removeprefix("step-")))
        for path in folder.glob("step-*")
        if path.name.removeprefix("step-").isdigit()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int = 0,
) -> Checkpoint:
    """Write one checkpoint below `folder`, then drop all but the newest `keep` (0 keeps all).

    Raises: DivergedError when a weight is not finite: such a checkpoint would hide the last good one.
    """
    broken = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        kept = checkpoints(folder)
        last = f"the last good checkpoint is {kept[-1].folder}" if kept else "nothing was saved yet"
        raise DivergedError(f"the weights of {broken[0]} are not finite at step {step}; {last}")
    target = folder / f"step-{step:08d}"
    if target.exists():  # the same step of the same run: nothing new to say
        return Checkpoint(target, step)
    tensors, scalars = _optimiser_state(model, optimiser)
    with atomic_folder(target) as temporary:
        save_model(model, str(temporary / MODEL))
        save_file(tensors, temporary / OPTIMISER)
        write_json(temporary / STATE, {**state, "step": step, "optimiser": scalars})
    if keep:
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old.folder)
    return Checkpoint(target, step)


def load(checkpoint: Checkpoint, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore a model and its optimiser in place; return the saved state.

    Raises: InputError naming the file when the checkpoint is damaged or of another model.
    """
    load_weights(checkpoint.folder, model)
    try:
        tensors = load_file(checkpoint.folder / OPTIMISER)
        state = json.loads((checkpoint.folder / STATE).read_text(encoding="utf-8"))
        entries: dict[str, dict[str, Any]] = state.pop("optimiser")
        for key, value in tensors.items():
            name, _, entry = key.rpartition("/")
            entries.setdefault(name, {})[entry] = value
        names = {parameter: name for name, parameter in model.named_parameters()}
        ordered = [names[parameter] for group in optimiser.param_groups for parameter in group["params"]]
        found = {index: entries[name] for index, name in enumerate(ordered) if name in entries}
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": found, "param_groups": groups})
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the checkpoint {checkpoint.folder} cannot be read: {_first_line(error)}"
        ) from error
    return state


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fill a model with the weights of a checkpoint folder.

    Raises: InputError naming the file when it is missing, damaged or of another model.
    """
    path = folder / MODEL
    try:
        load_model(model, str(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"the weights {path} cannot be read: {_first_line(error)}") from error
    except RuntimeError as error:
        raise InputError(f"the weights {path} are of another model: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _optimiser_state(
    model: nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Split the optimiser's state, keyed by parameter name, into tensors and plain numbers."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.contiguous()
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars
