"""Checkpoints of a model, its optimiser and the place in a run: safetensors and JSON, complete or absent."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from gramian.errors import DivergedError, InputError
from gramian.files import atomic_folder, remove, write_json
from gramian.reading import check_regular, read_json
from gramian.train.manifest import check_manifest, write_manifest
from gramian.train.optimisers import parts
from gramian.train.sharding import gathered

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


def newest(folder: Path, *, set_aside: bool = True) -> Checkpoint | None:
    """Return the newest checkpoint below a folder that is as it was written; None when there is none at all.

    Newer ones that are damaged are called damaged-step-… from then on (unless not `set_aside`), with a
    warning for each; of several processes one does this, and before the others look.

    Raises: InputError when all are damaged; OSError when one may not be read.
    """
    damaged: list[tuple[Checkpoint, InputError]] = []
    for saved in reversed(checkpoints(folder)):
        try:
            check(saved)
        except InputError as error:
            damaged.append((saved, error))
            continue
        for each, error in damaged:
            name = _set_aside(each) if set_aside else each.folder.name
            warnings.warn(f"{error}; it is left as {name} and step {saved.step} is used", stacklevel=2)
        return saved
    if damaged:
        raise InputError(
            f"no checkpoint in {folder} is whole: {damaged[0][1]}; restore one, or begin anew with "
            "--overwrite"
        )
    return None


def check(checkpoint: Checkpoint) -> None:
    """Raise InputError naming the file when a checkpoint is not as it was written.

    Holds: of checkpoints with a manifest every byte is checked; of those of earlier versions, which have
        none, the sizes that the tensor files promise, and the JSON.
    """
    folder = checkpoint.folder
    for name in (MODEL, OPTIMISER, STATE):
        check_regular(folder / name)
    try:
        if check_manifest(folder, (MODEL, OPTIMISER, STATE)):
            return
        for name in (MODEL, OPTIMISER):
            with safe_open(folder / name, "pt"):
                pass
        read_json(folder / STATE)
    except (PermissionError, InputError):
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"the checkpoint {folder} cannot be read: {_first_line(error)}") from error


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimiser: "torch.optim.Optimizer | OptimiserState",
    state: dict[str, Any],
    keep: int = 0,
) -> Checkpoint:
    """Write one checkpoint below `folder`, then drop all but the newest `keep` (0 keeps all).

    The parameters have to be whole; of an optimiser whose state is cut up over processes, give what
    `optimiser_state` has gathered. Older ones are dropped when what was written has been read again and is
    right.

    Raises: DivergedError when a weight is not finite: such a checkpoint would hide the last good one;
        InputError when what was written cannot be read again; OSError when it cannot be written.
    """
    broken = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        kept = checkpoints(folder)
        last = f"the last good checkpoint is {kept[-1].folder}" if kept else "nothing was saved yet"
        raise DivergedError(f"the weights of {broken[0]} are not finite at step {step}; {last}")
    target = folder / f"step-{step:08d}"
    if target.exists():  # the same step of the same run: nothing new to say
        return Checkpoint(target, step)
    kept = optimiser if isinstance(optimiser, OptimiserState) else optimiser_state(model, optimiser)
    with atomic_folder(target) as temporary:
        save_model(model, str(temporary / MODEL))
        save_file(kept.tensors, temporary / OPTIMISER)
        about = {"step": step, "optimiser": kept.rest, "optimiser_steps": kept.steps}
        write_json(temporary / STATE, {**state, **about})
        write_manifest(temporary)
    saved = Checkpoint(target, step)
    if keep and len(checkpoints(folder)) > keep:
        check(saved)
        drop_surplus(folder, keep)
    return saved


def drop_surplus(folder: Path, keep: int) -> None:
    """Remove all checkpoints below a folder but the newest `keep` (0 keeps all)."""
    for old in checkpoints(folder)[:-keep] if keep else []:
        remove(old.folder)


def load(checkpoint: Checkpoint, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore a model and its optimiser in place; return the saved state.

    Raises: InputError naming the file when the checkpoint is damaged or of another model.
    """
    check(checkpoint)
    _load_weights(checkpoint.folder, model)
    try:
        tensors = load_file(checkpoint.folder / OPTIMISER)
        state = read_json(checkpoint.folder / STATE)
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
    check_manifest(folder, (MODEL,))
    _load_weights(folder, model)


def _load_weights(folder: Path, model: nn.Module) -> None:
    path = folder / MODEL
    try:
        load_model(model, str(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"the weights {path} cannot be read: {_first_line(error)}") from error
    except RuntimeError as error:
        raise InputError(f"the weights {path} are of another model: {_first_line(error)}") from error


def _set_aside(checkpoint: Checkpoint) -> str:
    """Give a damaged checkpoint another name, so that it is no longer gone on from, and return the name."""
    name = f"damaged-{checkpoint.folder.name}"
    number = 1
    while (path := checkpoint.folder.with_name(f"{name}-{number}" if number > 1 else name)).exists():
        number += 1
    os.rename(checkpoint.folder, path)
    return path.name


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@dataclass(frozen=True)
class OptimiserState:
    """What an optimiser keeps, apart from its parameters."""

    tensors: dict[str, Tensor]
    """By parameter and place in what is kept about it."""
    rest: dict[str, Any]
    """What is kept about each parameter, with None in place of tensors."""
    steps: list[int | None]
    """Steps that each of its groups has counted, if it counts them."""


def optimiser_state(
    model: nn.Module, optimiser: torch.optim.Optimizer, *, keep: bool = True
) -> OptimiserState:
    """Take an optimiser's state apart; what is cut up over processes is gathered, and all have to ask.

    Without `keep` the process only helps the others to gather.
    """
    known = {parameter: state for part in parts(optimiser) for parameter, state in part.state.items()}
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if parameter in known:
            held: dict[str, Tensor] = {}
            rest[name] = _without_tensors(known[parameter], name, held)
            tensors |= held if keep else {}
    return OptimiserState(tensors, rest, [group.get("step") for group in _groups(optimiser)])


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a nested value with None in place of its tensors, which are put down by their paths."""
    if isinstance(value, Tensor):
        tensors[path] = gathered(value).contiguous()
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
    """Put back what `optimiser_state` took apart, and the steps that groups have counted, if any has."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for part in parts(optimiser):
        ordered = [names[parameter] for group in part.param_groups for parameter in group["params"]]
        state = {
            i: _with_tensors(rest[name], name, tensors) for i, name in enumerate(ordered) if name in rest
        }
        part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
    optimiser.param_groups = _groups(optimiser)
    if any(step is not None for step in steps):
        for group, step in zip(optimiser.param_groups, steps, strict=True):
            if step is not None:
                group["step"] = step


def _groups(optimiser: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [group for part in parts(optimiser) for group in part.param_groups]
