"""Series of checkpoints of several models, read from their folders, compared at the steps that all have."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from gramian.core.gram import Gram
from gramian.core.trajectory import subpath, sum_of
from gramian.errors import InputError
from gramian.files import remove, write_json
from gramian.observe.alignment import Checks, align
from gramian.observe.checkpoints import stream
from gramian.observe.hallmarks import hallmarks, time_weighted
from gramian.observe.series import find_series
from gramian.tasks.trajectory_study import random_walk_of
from gramian.train.run import open_run, read_json

LEAST = 4
"""Checkpoints that the models must have in common."""


@dataclass(frozen=True, kw_only=True)
class SeriesStudy:
    """Which models are compared."""

    folders: tuple[Path, ...] = ()
    """A folder of checkpoints for each model."""
    checks: Checks = field(default_factory=Checks)
    """What to do about series that are not as they should be."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        self.checks.check()
        names = [folder.name for folder in self.folders]
        if len(set(names)) < max(len(names), 2):
            given = ", ".join(map(str, self.folders)) or "none"
            raise InputError(
                f"two folders of checkpoints or more, of different names, are needed, got {given}"
            )


@dataclass(frozen=True)
class ModelPath:
    """The path of one model through the steps that all models have."""

    name: str
    parameters: int
    steps: tuple[int, ...]
    whole: dict[str, float]
    """The hallmarks, and similarities weighted by time."""
    walk: dict[str, float]
    """The hallmarks of the random walk with the same start and lengths."""


def run_series(study: SeriesStudy, folder: Path, console: Console) -> list[ModelPath]:
    """Read every series and return the paths by size; what a stopped study has read is not read again.

    Raises: InputError for a folder that holds no trustworthy series, or series with fewer than `LEAST` steps
        in common.
    """
    study.check()
    run = open_run(folder, study, resume=True)
    read = {place.name: series_readings(place, study.checks, run.folder, console) for place in study.folders}
    steps = sorted(reduce(set[int].intersection, (set(each["steps"]) for each in read.values())))
    if len(steps) < LEAST:
        raise InputError(
            f"paths are only compared at the same steps, and these models have {len(steps)} in common; at "
            f"least {LEAST} are needed"
        )
    paths = [_path(name, each, steps) for name, each in read.items()]
    return sorted(paths, key=lambda path: path.parameters)


def _path(name: str, read: dict[str, Any], steps: Sequence[int]) -> ModelPath:
    cross = torch.tensor(read["gram"], dtype=torch.float64)
    gram = subpath(
        Gram(cross, cross.diagonal(), cross.diagonal()), [read["steps"].index(step) for step in steps]
    )
    found = hallmarks(gram) | time_weighted(gram, steps)
    return ModelPath(name, read["parameters"], tuple(steps), found, hallmarks(random_walk_of(gram)))


def series_readings(place: Path, checks: Checks, folder: Path, console: Console) -> dict[str, Any]:
    """Return the steps, the number of parameters and the Gram of the series in a folder.

    What is read is kept in folder/name.json; reading goes on where it was stopped.

    Raises: InputError as `find_series`, `align` and `stream`.
    """
    saved = folder / f"{place.name}.json"
    if saved.exists():
        return read_json(saved)
    (found,) = find_series([place])
    aligned = align(found, checks)
    for remark in aligned.remarks:
        console.print(f"{place.name}: {remark.sentence}", markup=False, highlight=False)
    work = folder / "work" / place.name
    total = sum(stored.numel * stored.dtype.itemsize for each in aligned.tensors for stored in each.stored)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(place.name, total=total)
        read = stream(aligned.tensors, work, advanced=lambda done: progress.advance(bar, done))
    assert read is not None
    result = {
        "steps": [checkpoint.step for checkpoint in aligned.checkpoints],
        "parameters": sum(part.parameters for part in read.parts),
        "gram": sum_of([part.steps for part in read.parts]).cross.tolist(),
    }
    write_json(saved, result)
    remove(work)
    return result
