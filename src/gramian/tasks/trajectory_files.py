"""What an analysis of a trajectory leaves in its folder: numbers, Gram matrices, a page, figures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from gramian.observe.hallmarks import CURVES, MAPS
from gramian.tasks.predict_page import plain, write_folder
from gramian.tasks.trajectory import TRAJECTORY, Course, Group, TrajectoryConfig, check_output
from gramian.tasks.trajectory_page import report_page
from gramian.train.run import versions

GRAMS = "grams.safetensors"
"""The Gram matrix of every part of every tensor."""


def numbers(course: Course) -> dict[str, Any]:
    """Return everything that was read of a series as JSON holds it."""

    def about(group: Group) -> dict[str, Any]:
        found: dict[str, Any] = {"layer": group.layer, "kind": group.kind, "parameters": group.parameters}
        return {
            **found,
            "hallmarks": group.numbers,
            **({"standard_errors": group.errors} if group.errors else {}),
        }

    steps = course.whole.steps
    return {
        "name": course.name,
        "steps": course.times,
        "facts": course.facts,
        "remarks": course.remarks,
        "phase": asdict(course.phase),
        "by_time": course.by_time,
        "whole": about(course.whole),
        "curves": {name: each.function(steps).tolist() for name, each in CURVES.items()},
        "curve_errors": {name: band.tolist() for name, band in course.whole.bands.items()},
        "maps": {name: each.function(steps).tolist() for name, each in MAPS.items()},
        "rounding": course.whole.noise.tolist(),
        "groups": [about(group) for group in (*course.layers, *course.kinds, *course.cells)],
    }


def grams(courses: Sequence[Course]) -> Mapping[str, Tensor]:
    """Return the Gram of every part by "series/tensor/kind"."""
    return {f"{c.name}/{p.name}/{p.kind}": p.steps.cross.contiguous() for c in courses for p in c.parts}


def write_report(courses: Sequence[Course], config: TrajectoryConfig, *, overwrite: bool = False) -> Path:
    """Write trajectory.json, grams.safetensors, report.html and the figures; return the page's path.

    The folder is there whole or not at all.

    Raises: InputError when the folder is taken.
    """
    check_output(config.folder, overwrite)
    found = {"settings": plain(_settings(config)), "series": [plain(numbers(course)) for course in courses]}
    write_folder(
        config.folder, found, report_page(courses), TRAJECTORY, binaries={GRAMS: save(dict(grams(courses)))}
    )
    return config.folder / "report.html"


def _settings(config: TrajectoryConfig) -> dict[str, Any]:
    values = asdict(config)
    values["checkpoints"] = [str(path) for path in config.checkpoints]
    values["output"] = str(config.folder)
    return {**values, "versions": versions()}
