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
from gramian.train.optimisers import parts

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
    tensors, rest = _optimiser_state(model, optimiser)
    with atomic_folder(target) as temporary:
        save_model(model, str(temporary / MODEL))
        save_file(tensors, temporary / OPTIMISER)
        steps = [group.get("step") for group in _groups(optimiser)]
        about = {"step": step, "optimiser": rest, "optimiser_steps": steps}
        write_json(temporary / STATE, {**state, **about})
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
        _restore(model, optimiser, tensors, state.pop("optimiser"), state.pop("optimiser_steps"))
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
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split the optimiser's state, keyed by parameter name, into tensors by path and the rest around them."""
    known = {parameter: state for part in parts(optimiser) for parameter, state in part.state.items()}
    tensors: dict[str, Tensor] = {}
    rest = {
        name: _without_tensors(known[parameter], name, tensors)
        for name, parameter in model.named_parameters()
        if parameter in known
    }
    return tensors, rest


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a nested value with None in place of its tensors, which are put down by their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value.contiguous()
        return None
    if isinstance(value, dict):
        return {key: _without_tensors(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _with_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a nested value with its tensors again."""
    if isinstance(value, dict):
        return {key: _with_tensors(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    return tensors.get(path, value)


def _restore(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    rest: dict[str, Any],
    steps: list[int | None],
) -> None:
    """Put back what `_optimiser_state` split, and the steps that groups have counted."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for part in parts(optimiser):
        ordered = [names[parameter] for group in part.param_groups for parameter in group["params"]]
        state = {
            i: _with_tensors(rest[name], name, tensors) for i, name in enumerate(ordered) if name in rest
        }
        part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
    optimiser.param_groups = _groups(optimiser)
    for group, step in zip(optimiser.param_groups, steps, strict=True):
        if step is not None:
            group["step"] = step


def _groups(optimiser: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [group for part in parts(optimiser) for group in part.param_groups]
