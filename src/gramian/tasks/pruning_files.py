"""Exports of a pruned classifier: weights with zeros, a physically smaller network, and what both save."""

import gzip
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gramian.compress.masks import export_state, masks_of
from gramian.compress.shrink import shrink
from gramian.data.tables import Standardiser
from gramian.errors import InputError
from gramian.files import atomic_file, write_json
from gramian.reading import check_regular
from gramian.tasks.pruning_networks import Network, skeleton
from gramian.train.run import read_json

ABOUT, PRUNED, SMALL = "network.json", "pruned.safetensors", "small.safetensors"
"""How the networks are built, and their weights."""

FIXED = ("kept", "threshold", "sample")
"""Modes in which masks are one mask of zeros and ones."""

TIMED = 256
"""Examples of a timed pass at most."""

NOTHING_REMOVED = (
    "no neuron or channel is without weights, so that none can be taken out: single zeros save storage, "
    "once the file is compressed, but no time"
)


@dataclass(frozen=True)
class Speed:
    """Medians of a forward pass, measured in turns in one process."""

    examples: int
    """Of one pass."""
    threads: int
    dense: float
    """Seconds of the network before it was pruned."""
    small: float
    """Seconds of the smaller one."""
    ratio: float
    """dense / small."""


@dataclass(frozen=True)
class Exported:
    """What was written, and what it saves."""

    parameters: int
    """Numbers of the network, biases included."""
    nonzero_before: int
    nonzero: int
    """Those that are not zero after pruning."""
    bytes: int
    """Size of the file with zeros, which is that of the dense network's."""
    compressed_before: int
    """Size of the dense network's file under gzip."""
    compressed: int
    """Size of the file with zeros under gzip."""
    small: Network | None = None
    """The smaller network; None when nothing can be taken out."""
    small_parameters: int | None = None
    small_bytes: int | None = None
    speed: Speed | None = None
    reason: str | None = None
    """Why there is no smaller network."""


def write_pruned(
    folder: Path,
    model: nn.Sequential,
    network: Network,
    dense: nn.Sequential,
    x: Float[Tensor, "n ..."] | None = None,
    *,
    scaling: Standardiser | None = None,
    names: Sequence[str] = (),
) -> Exported:
    """Write a masked classifier into a folder: with zeros, and smaller where the zeros allow it.

    `load_pruned` opens both. A reader of the folder finds all of it or no network.json.

    Args:
        folder: where to write; other files in it stay.
        model: the classifier with its masks in a mode of zeros and ones: kept, threshold or sample.
        network: how the classifier was built.
        dense: the classifier before it was pruned.
        x: inputs to time the dense and the smaller network on; nothing is timed without.
        scaling: how inputs were standardised, kept for those who use the network.
        names: names of the classes by number, kept too.

    Raises: InputError for a model that is not the network, and for masks in another mode.
    Holds: exactly: the file with zeros gives the masked model's outputs; the smaller one to rounding.
    """
    folder = Path(folder)
    if modes := {mask.mode for mask in masks_of(model).values()} - set(FIXED):
        raise InputError(
            f"masks in the mode {modes.pop()!r} are no mask of zeros and ones; set the mode to one of "
            f"{', '.join(FIXED)} before exporting"
        )
    state, original = _plain(export_state(model)), _plain(dense.state_dict())
    for each in (state, original):
        _filled(network, each, "the model")
    smaller = shrink(deepcopy(model).eval())
    small = _network_of(smaller, network)
    (folder / ABOUT).unlink(missing_ok=True)
    (folder / SMALL).unlink(missing_ok=True)
    found = Exported(
        parameters=sum(value.numel() for value in state.values()),
        nonzero_before=_nonzero(original),
        nonzero=_nonzero(state),
        bytes=_write(folder / PRUNED, state),
        compressed_before=_compressed(original),
        compressed=_compressed(state),
        reason=NOTHING_REMOVED,
    )
    if small is not None:
        found = _with_small(found, folder, smaller, small)
    if small is not None and x is not None:
        found = replace(found, speed=measure_speed(deepcopy(dense).eval(), smaller, x[:TIMED]))
    write_json(
        folder / ABOUT,
        {
            "full": asdict(network),
            "small": None if small is None else asdict(small),
            "reason": found.reason,
            "mean": None if scaling is None else scaling.mean.tolist(),
            "scale": None if scaling is None else scaling.scale.tolist(),
            "classes": list(names),
        },
    )
    return found


def load_pruned(folder: Path, small: bool = False) -> nn.Sequential:
    """Return the classifier in a folder, with zeros or, if `small`, the smaller one, in evaluation.

    Raises: InputError for a folder that is no export, is damaged, or has no smaller network.
    Holds: exactly: the outputs are those of the network that was written.
    """
    about, part = _about(folder), "small" if small else "full"
    if small and about["small"] is None:
        raise InputError(f"{folder} has no smaller network: {about['reason']}")
    path = Path(folder) / (SMALL if small else PRUNED)
    try:
        network = Network(**about[part])
    except (TypeError, InputError) as error:
        raise InputError(f"{Path(folder) / ABOUT} does not describe a network: {error}") from error
    check_regular(path)
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {_first_line(error)}") from error
    return _filled(network, state, str(path))


def load_scaling(folder: Path) -> Standardiser | None:
    """Return how the inputs of an exported classifier are standardised, if that was written.

    Raises: InputError for a folder that is no export or is damaged.
    """
    about = _about(folder)
    if about["mean"] is None:
        return None
    try:
        dtype = torch.float32 if len(about["full"]["size"]) == 3 else torch.float64  # images, tables
        mean, scale = (torch.tensor(about[name], dtype=dtype) for name in ("mean", "scale"))
        return Standardiser(*torch.broadcast_tensors(mean, scale))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{Path(folder) / ABOUT} does not say how inputs are standardised: {_first_line(error)}"
        ) from error


@torch.no_grad()
def measure_speed(
    dense: nn.Module, small: nn.Module, x: Float[Tensor, "n ..."], *, rounds: int = 20, warm_up: int = 3
) -> Speed:
    """Time forward passes of two networks in turns, and compare their medians.

    Raises: InputError for fewer than one round and for no example.
    Holds: empirically, on this machine under its load.
    """
    if rounds < 1 or not len(x):
        raise InputError(f"timing needs a round and an example, got {rounds} rounds and {len(x)} examples")
    seconds: dict[str, list[float]] = {"dense": [], "small": []}
    for turn in range(warm_up + rounds):
        for name, model in (("dense", dense), ("small", small))[:: 1 if turn % 2 else -1]:
            taken = _timed(model, x)
            if turn >= warm_up:
                seconds[name].append(taken)
    before, after = (median(each) for each in seconds.values())
    return Speed(len(x), torch.get_num_threads(), before, after, before / after)


def _timed(model: nn.Module, x: Tensor) -> float:
    _synchronise(x)
    start = time.perf_counter()
    model(x)
    _synchronise(x)
    return time.perf_counter() - start


def _synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _with_small(found: Exported, folder: Path, smaller: nn.Sequential, small: Network) -> Exported:
    """Write the smaller network and add what is to be said of it."""
    state = _plain(smaller.state_dict())
    _filled(small, state, "the smaller network")
    return replace(
        found,
        small=small,
        small_parameters=sum(value.numel() for value in state.values()),
        small_bytes=_write(folder / SMALL, state),
        reason=None,
    )


def _network_of(smaller: nn.Sequential, network: Network) -> Network | None:
    """Return how a shrunk network is built, or None when it is as large as before."""
    layers = [module for module in smaller if isinstance(module, nn.Linear | nn.Conv2d)]
    widths = tuple(len(layer.weight) for layer in layers[:-1])
    if widths == network.widths:
        return None
    return Network(network.name, network.size, network.classes, widths)


def _filled(network: Network, state: Mapping[str, Tensor], where: str) -> nn.Sequential:
    """Return the network with the values of a state, if it is the network's."""
    try:
        model = skeleton(network)
        model.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, TypeError) as error:  # a size may be beyond 64 bits
        what = f"{network.name} {'-'.join(map(str, network.widths))}"
        raise InputError(f"{where} is not the network described, {what}: {_first_line(error)}") from error
    for name, value in state.items():
        if value.dtype != torch.float32 or not value.isfinite().all():
            raise InputError(f"{where}: {name!r} must hold finite numbers in float32, got {value.dtype}")
    return model.eval()


def _about(folder: Path) -> dict[str, Any]:
    """Return the description of an export, with all its entries."""
    path = Path(folder) / ABOUT
    if not path.is_file():
        raise InputError(f"{folder} is no export of gramian prune: it has no {ABOUT}")
    about = read_json(path)
    wanted = {"full", "small", "reason", "mean", "scale", "classes"}
    if not isinstance(about, dict) or set(about) != wanted:
        raise InputError(
            f"{path} does not describe a network; its entries must be {', '.join(sorted(wanted))}"
        )
    return about


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _write(path: Path, state: dict[str, Tensor]) -> int:
    """Write tensors and return the size of the file."""
    content = save(state)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
    return len(content)


def _compressed(state: dict[str, Tensor]) -> int:
    return len(gzip.compress(save(state), mtime=0))


def _nonzero(state: Mapping[str, Tensor]) -> int:
    return sum(int(value.count_nonzero()) for value in state.values())


def _first_line(error: Exception) -> str:
    """Return what went wrong in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in") else (lines or [repr(error)])[0]
