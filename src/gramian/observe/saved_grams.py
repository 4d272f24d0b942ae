"""What a stream of checkpoints has found so far, kept on disk so that a stopped one goes on."""

import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gramian.errors import InputError
from gramian.files import atomic_file, remove, write_json
from gramian.reading import check_regular, read_json

PLAN = "plan.json"
EVERY = 2.0
"""Seconds between two saves."""


class SavedGrams:
    """Grams by piece of work, in files that are complete or absent.

    Args:
        folder: where the files are.
        plan: what the work is; work that was saved under another plan is not mixed with it.
        rank: this process among those that share the folder.
        anew: drop work under another plan.

    Raises: InputError when the folder holds work under another plan, unless `anew`.
    """

    def __init__(self, folder: Path, plan: Any, rank: int = 0, anew: bool = False):
        self.folder, self._rank = folder, rank
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._unsaved: list[int] = []
        self._saved_at = time.monotonic()
        if anew and (folder / PLAN).exists() and not _is(folder / PLAN, plan):
            remove(folder)
        if (folder / PLAN).exists():
            if read_json(folder / PLAN) != plan:
                raise InputError(
                    f"{folder} holds the beginning of an analysis of other files or settings, or the files "
                    "have changed since; pass --overwrite to begin anew"
                )
        else:
            write_json(folder / PLAN, plan)
        for path in sorted(folder.glob("found-*.safetensors")):
            self._load(path)

    @property
    def done(self) -> set[int]:
        """The pieces of work that are done."""
        return set(self._kept)

    def add(self, unit: int, found: dict[str, Tensor]) -> None:
        """Keep what a piece of work gave; save when the last save is some seconds old."""
        self._kept[unit] = found
        self._unsaved.append(unit)
        if time.monotonic() - self._saved_at > EVERY:
            self.flush()

    def flush(self) -> None:
        """Save what is not saved yet."""
        if self._unsaved:
            tensors = {f"{unit}/{key}": t for unit in self._unsaved for key, t in self._kept[unit].items()}
            name = f"found-{self._rank}-{self._unsaved[0]:06d}-{self._unsaved[-1]:06d}.safetensors"
            with atomic_file(self.folder / name) as temporary:
                save_file(tensors, temporary, {"sha256": _sha256(tensors)})
            self._unsaved.clear()
        self._saved_at = time.monotonic()

    def totals(self) -> dict[str, Tensor]:
        """Return the sums over the pieces of work, added in their order whatever the order of their ends."""
        sums: dict[str, Tensor] = {}
        for unit in sorted(self._kept):
            for key, tensor in self._kept[unit].items():
                sums[key] = sums[key] + tensor if key in sums else tensor
        return sums

    def _load(self, path: Path) -> None:
        """Take a file of finished work; one that is damaged is done again."""
        try:
            check_regular(path)
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
                written = (file.metadata() or {}).get("sha256")
            units = [int(key.partition("/")[0]) for key in tensors]
        except (SafetensorError, OSError, ValueError):
            return
        if written != _sha256(tensors):
            return
        for unit, (key, tensor) in zip(units, tensors.items(), strict=True):
            self._kept.setdefault(unit, {})[key.partition("/")[2]] = tensor


def _sha256(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _is(path: Path, plan: Any) -> bool:
    try:
        return read_json(path) == plan
    except InputError:
        return False
