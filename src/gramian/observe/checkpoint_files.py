"""Which files hold the weights of one checkpoint, among all that training loops put beside them."""

import re
from pathlib import Path

from gramian.errors import InputError
from gramian.observe.weight_files import SAFE, TORCH
from gramian.reading import read_json

INDEX = ".index.json"
"""Ending of the list that says which shard holds which weight."""

STANDARD = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
"""Names of the weights in a folder, the first that is there counts; each may be in shards with an index."""

STATES = re.compile(
    r"(^|[^a-z])(optim(i[sz]er)?|sched(uler)?|rng|random_state|training_args|scaler)s?(?![a-z])",
    re.IGNORECASE,
)
"""Names of what is saved to go on with training: states of optimisers and the like are no weights."""

SHARD = re.compile(r"-[0-9]+-of-[0-9]+$|^consolidated\.[0-9]+$|(^|_)rank_?[0-9]+")
"""Stems of files that hold a part of the weights of one checkpoint."""

UNFINISHED = re.compile(r"^[.~]|^tmp[-_]|\.part(ial)?$|\.te?mp$|\.incomplete$", re.IGNORECASE)
"""Names of what is hidden, or was being written."""

LOOKED_FOR = f"{', '.join(STANDARD)}, their shards with an index, or a single file of weights"


def weights_of(path: Path) -> tuple[Path, ...]:
    """Return the files with the weights of the checkpoint at a path; none where there is no checkpoint.

    Raises: InputError naming a shard that is missing, or shards without their index.
    """
    if path.name.endswith(INDEX) and path.is_file():
        return _shards(path)
    if path.is_file():
        return (path,) if is_weights(path) else ()
    if not path.is_dir():
        return ()
    for name in STANDARD:
        if (path / name).is_file():
            return (path / name,)
        if (path / f"{name}{INDEX}").is_file():
            return _shards(path / f"{name}{INDEX}")
    others = [file for file in path.iterdir() if is_weights(file)]
    safe = [file for file in others if file.suffix == SAFE] or others
    if len(safe) > 1 and all(is_shard(file) for file in safe):
        raise InputError(
            f"{path} holds {min(safe).name}, a shard of its weights, without the index of shards"
        )
    return tuple(safe) if len(safe) == 1 else ()


def is_weights(path: Path) -> bool:
    """Whether a path is a complete file of weights by its name, and not the state of an optimiser."""
    named = (
        path.suffix in (SAFE, *TORCH) and not STATES.search(path.name) and not UNFINISHED.search(path.name)
    )
    return named and path.is_file()


def is_shard(path: Path) -> bool:
    """Whether a file's name says that it is a part of the weights."""
    return bool(SHARD.search(path.stem))


def _shards(index: Path) -> tuple[Path, ...]:
    """Return the shards that an index names, all of which lie beside it."""
    found = read_json(index)
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(at, str) for at in places.values()):
        raise InputError(f"{index} has no weight_map of names and files")
    shards = sorted(set(places.values()))
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or Path(shard).suffix not in (SAFE, *TORCH):
            raise InputError(f"{index} names {shard!r}, which is no file of weights beside it")
        if not (index.parent / shard).is_file():
            raise InputError(f"{index.parent} lacks {shard}, one of the {len(shards)} shards of its weights")
    return tuple(index.parent / shard for shard in shards)
