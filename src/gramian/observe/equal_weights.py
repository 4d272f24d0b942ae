"""Which tensors and which checkpoints are the same, bit by bit, read as little as that takes."""

import hashlib
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TypeVar

import torch

from gramian.observe.weight_files import Stored

FEW = 64
"""Tensors of which a first glance at a checkpoint reads a sample."""

WIDTH = 32
"""Neighbouring elements in a sample."""

CHUNK = 2**22
"""Bytes that are read at once to compare all of a tensor."""

TIED = 1024
"""Elements below which tensors may be equal by chance, as biases that are zero are."""

Told = Callable[[int], None]
Item = TypeVar("Item")


def identical(rows: Sequence[Sequence[Stored]], told: Told | None = None) -> list[list[int]]:
    """Return the groups of checkpoints of which all tensors agree bit by bit, by their numbers in order.

    Small samples set most checkpoints apart; only those that agree in them are read in full, and no two
    names of one file twice.

    Args:
        rows: the tensors, each in all checkpoints.
        told: told how many bytes more were compared.

    Raises: InputError naming a file that is cut while it is read.
    Holds: exactly, but for collisions of SHA-256.
    """
    spread = rows[:: -(-len(rows) // FEW)] if rows else ()
    groups = [list(range(len(rows[0])))] if rows else []
    groups = _split(groups, lambda index: tuple(sample(row[index], 1) for row in spread))
    groups = _split(groups, lambda index: tuple(sample(row[index], 4) for row in rows))
    digests: dict[tuple[Path, str], bytes] = {}
    for row in rows:
        groups = _split(groups, lambda index, row=row: _digest(row[index], digests, told))
    return groups


def tied(rows: Mapping[str, Sequence[Stored]]) -> dict[str, str]:
    """Return the tensors that repeat an earlier one in every checkpoint, and which they repeat.

    They are one memory in a torch file; or matrices of at least 1024 elements, of equal shape and not
    constant, that agree in full in the first and last checkpoint and in samples in all others.
    """
    groups = _split(
        [list(rows)], lambda name: tuple((one.file, one.shares or one.name) for one in rows[name])
    )
    found = {name: group[0] for group in groups for name in group[1:]}
    large = [
        name
        for name, stored in rows.items()
        if name not in found and len(stored[0].shape) > 1 and prod(stored[0].shape) >= TIED
    ]
    groups = _split([large], lambda name: (rows[name][0].shape, tuple(one.dtype for one in rows[name])))
    groups = _split(groups, lambda name: sample(rows[name][0], 4))
    groups = _split(groups, lambda name: tuple(sample(one, 4) for one in rows[name]))
    groups = [group for group in groups if not all(map(_constant, rows[group[0]]))]
    for place in (0, -1):
        groups = _split(groups, lambda name, place=place: _digest(rows[name][place], {}, None))
    return found | {name: group[0] for group in groups for name in group[1:]}


def sample(stored: Stored, places: int) -> bytes:
    """Return the bytes of a few runs of elements, whose places depend on the size alone."""
    count = min(WIDTH, stored.numel)
    out, found = torch.empty(count, dtype=stored.dtype), [str(stored.dtype).encode()]
    draw = random.Random(stored.numel)
    for _ in range(places if count else 0):
        stored.read(draw.randint(0, stored.numel - count), out)
        found.append(out.view(torch.uint8).numpy().tobytes())
    return b"".join(found)


def _constant(stored: Stored) -> bool:
    """Whether a sample has one value only."""
    values = sample(stored, 4)[len(str(stored.dtype)) :]
    size = stored.dtype.itemsize
    return values == values[:size] * (len(values) // size)


def _digest(stored: Stored, known: dict[tuple[Path, str], bytes], told: Told | None) -> bytes:
    """Return the SHA-256 of a tensor's bytes, from `known` where the file is only another name of one."""
    key = (stored.file.resolve(), stored.name)
    if key not in known:
        digest, step = hashlib.sha256(), max(CHUNK // stored.dtype.itemsize, 1)
        room = torch.empty(min(step, stored.numel), dtype=stored.dtype)
        for start in range(0, stored.numel, step):
            out = room[: stored.numel - start]
            stored.read(start, out)
            digest.update(out.view(torch.uint8).numpy().data)
        known[key] = digest.digest()
    if told:
        told(stored.numel * stored.dtype.itemsize)
    return known[key]


def _split(groups: Iterable[Sequence[Item]], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Divide each group by a key; what is left alone needs no more looking at."""
    found: list[list[Item]] = []
    for group in groups:
        by_key: dict[Hashable, list[Item]] = {}
        for item in group if len(group) > 1 else ():
            by_key.setdefault(key(item), []).append(item)
        found += [same for same in by_key.values() if len(same) > 1]
    return found
