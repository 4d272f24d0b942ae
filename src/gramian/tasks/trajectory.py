"""The path that training took through parameter space, read off checkpoints layer by layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text
from torch import Tensor

from gramian.core.gram import Gram
from gramian.core.trajectory import sum_of
from gramian.errors import InputError, StoppedError
from gramian.observe.alignment import Aligned, Checks, align
from gramian.observe.checkpoints import PartGram, Streamed, begin, stream
from gramian.observe.hallmarks import CURVES, SCALARS, hallmarks, time_weighted
from gramian.observe.parts import ORDER
from gramian.observe.phase import Phase, phase
from gramian.observe.recorder import ENDING, SketchedPath, groups_of, read_sketches
from gramian.observe.series import Checkpoint, Series, find_series
from gramian.ranks import is_main, on_main, rank, ranks
from gramian.tasks.digits_series import record_digits
from gramian.tasks.predict_page import UNFINISHED, check_free
from gramian.train.processes import main_first, on_all
from gramian.train.run import read_json
from gramian.train.signals import stop_requests

TRAJECTORY = "trajectory.json"
"""The file by which a folder is known as that of an analysis."""


@dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """Read the path that training took off a series of checkpoints."""

    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folder of a run or of checkpoints; several are compared. Or the checkpoints themselves, one by one. A
    small network is trained on scikit-learn's digits when none is given."""
    checks: Checks = field(default_factory=Checks)
    first: int | None = None
    """Leave out checkpoints before this step."""
    last: int | None = None
    """Leave out checkpoints after this step."""
    every: int = 1
    """Take each so-manyth of the checkpoints left."""
    workers: int | None = None
    """Threads that read and multiply; as many as there are cores, up to eight, when not given."""
    output: Path | None = None
    """Folder for trajectory.json, report.html, the figures and the Gram matrices; trajectories/<name> by
    default."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        if self.output is not None:
            return self.output
        path = self.checkpoints[0].expanduser().resolve() if self.checkpoints else Path("digits")
        return Path("trajectories", path.name or "checkpoints")

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        self.checks.check()
        if self.every < 1:
            raise InputError(f"every must be at least 1, got {self.every}")
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers must be at least 1, got {self.workers}")


@dataclass(frozen=True, eq=False)
class Group:
    """The path of some of the parameters."""

    layer: str
    """Empty for all layers."""
    kind: str
    """Empty for all kinds."""
    parameters: int
    steps: Gram
    noise: Tensor
    """Squared length that rounding to the stored precision adds to each update (T)."""
    numbers: Mapping[str, float]
    """Its hallmarks (`observe.hallmarks.SCALARS`)."""
    errors: Mapping[str, float]
    """Standard errors of the hallmarks; empty where the path is known exactly."""
    bands: Mapping[str, Tensor]
    """Standard errors of the curves (`observe.hallmarks.CURVES`); empty likewise."""


@dataclass(frozen=True, eq=False)
class Course:
    """A series of checkpoints and what was read of it."""

    name: str
    times: tuple[int, ...]
    """Steps of the checkpoints."""
    whole: Group
    layers: tuple[Group, ...]
    kinds: tuple[Group, ...]
    cells: tuple[Group, ...]
    """Each kind in each layer."""
    parts: tuple[PartGram, ...]
    """The Gram of each part of each tensor, of which all others are sums."""
    phase: Phase
    by_time: Mapping[str, float]
    """Similarities in which every stretch of time counts alike."""
    remarks: tuple[str, ...]
    facts: Mapping[str, str]


def trajectory(
    config: TrajectoryConfig, *, overwrite: bool = False, console: Console | None = None
) -> tuple[Course, ...]:
    """Read the paths of one or several series; `trajectory_files.write_report` writes them down.

    Every checkpoint is read once, piece by piece. What was found so far is in the folder of the results, and
    the same call goes on from it after a stop. Processes of `gramian.ranks` share the pieces by files in that
    folder; the main one reads no piece again that it finds there, and returns the courses, others none.

    Raises: InputError for checkpoints or settings that cannot be used, and a folder that is taken;
        StoppedError after a signal, saved.
    Source: Singh, He, Hofmann, Schölkopf 2024, arXiv 2403.07379.
    """
    console = console or Console()
    config.check()
    on_main(lambda: check_output(config.folder, overwrite))
    paths = config.checkpoints or (main_first(lambda: record_digits(config.folder, console)),)
    found = find_series(paths)
    courses = [
        _read(series, config, config.folder / UNFINISHED / str(index), overwrite, console)
        for index, series in enumerate(found)
    ]
    return tuple(course for course in courses if course is not None)


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise InputError unless results may go into a folder, in which an analysis may have been begun."""
    check_free(folder, overwrite, TRAJECTORY, begun=True)


def _read(
    series: Series, config: TrajectoryConfig, folder: Path, anew: bool, console: Console
) -> Course | None:
    """Read one series; None on all processes but the main one."""
    series = _between(series, config)
    with console.status(Text(f"comparing the checkpoints of {series.name}")):
        alignment = align(series, config.checks)
    times = tuple(checkpoint.step for checkpoint in alignment.checkpoints)
    remarks = [remark.sentence for remark in alignment.remarks]
    about = alignment.checkpoints[0]
    sketched = about.metadata.get("mode") == "sketch"
    stored = sum(each.dtype.itemsize * tensor.numel for tensor in alignment.tensors for each in tensor.stored)
    with (
        stop_requests() as requested,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as bar,
    ):
        task = bar.add_task(series.name, total=stored // ranks())

        def read(share: tuple[int, int]) -> Streamed | None:
            streamed = stream(
                alignment.tensors,
                folder,
                config=_configuration(about),
                workers=config.workers,
                leave_out=config.checks.mismatch == "leave_out",
                share=share,
                anew=anew,
                advanced=lambda done: bar.advance(task, done),
                stopped=lambda: requested() is not None,
            )
            if streamed is None and (requested() or share == (0, 1)):
                raise StoppedError(
                    f"stopped by {requested()} and saved in {folder.parent}; the same command goes on from "
                    "there"
                )
            return streamed

        if ranks() > 1:
            on_main(lambda: begin(alignment.tensors, folder, config=_configuration(about), anew=anew))
            on_all(lambda: read((rank(), ranks())))
        if not is_main():
            return None
        bar.reset(task, total=stored)
        streamed = read((0, 1))
    assert streamed is not None
    remarks += [f"{name} is left out: it is not finite in {file}." for name, file in streamed.broken.items()]
    if not streamed.parts:
        raise InputError(f"no tensor of {series.name} is finite in all checkpoints")
    found = _sketches(series, times) if sketched else None
    groups = groups_of(about.metadata, about.path)
    held = {f"{name}{ENDING}": count for name, count in groups.items()}
    facts = _facts(alignment.tensors, about, stored)
    return _path(series.name, times, streamed.parts, found, held, remarks, facts)


def _between(series: Series, config: TrajectoryConfig) -> Series:
    """Leave out the checkpoints that are not asked for."""
    low, high = config.first, config.last
    kept = [
        checkpoint
        for checkpoint in series.checkpoints
        if (low is None or checkpoint.step >= low) and (high is None or checkpoint.step <= high)
    ][:: config.every]
    if len(kept) < 2:
        steps = f"{series.checkpoints[0].step} to {series.checkpoints[-1].step}"
        raise InputError(
            f"{len(kept)} of the {len(series.checkpoints)} checkpoints of {series.name} (steps {steps}) are "
            "left by first, last and every; at least two are needed"
        )
    return Series(series.name, tuple(kept), series.remarks)


def _configuration(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the config.json beside the weights, which says how a fused matrix divides; empty without one."""
    path = checkpoint.files[0].parent / "config.json"
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _sketches(series: Series, times: Sequence[int]) -> SketchedPath:
    """Return the sketches of a recorded path at the times that are read."""
    path = read_sketches(series.checkpoints[0].path.parent)
    rows = [path.at.index(time) for time in times]
    taken = {group: points[rows] for group, points in path.sketches.items()}
    return SketchedPath(tuple(times), taken, path.kept)


def _path(
    name: str,
    times: tuple[int, ...],
    parts: tuple[PartGram, ...],
    sketches: SketchedPath | None,
    held: Mapping[str, int],
    remarks: Sequence[str],
    facts: Mapping[str, str],
) -> Course:
    """Add the parts up in every way that is shown, and read each sum; `held` are parameters of sketches."""

    def groups(key: Callable[[PartGram], tuple[str, str]]) -> tuple[Group, ...]:
        members: dict[tuple[str, str], list[PartGram]] = {}
        for part in parts:
            members.setdefault(key(part), []).append(part)
        ordered = sorted(members.items(), key=lambda item: _rank(*item))
        return tuple(_group(*key, of, sketches, held) for key, of in ordered)

    whole = groups(lambda part: ("", ""))[0]
    return Course(
        name=name,
        times=times,
        whole=whole,
        layers=groups(lambda part: (part.layer, "")),
        kinds=() if sketches else groups(lambda part: ("", part.kind)),
        cells=() if sketches else groups(lambda part: (part.layer, part.kind)),
        parts=parts,
        phase=phase(whole.steps, times, whole.noise),
        by_time=time_weighted(whole.steps, times),
        remarks=(*remarks, *_still(parts)),
        facts=facts,
    )


def _rank(key: tuple[str, str], members: Sequence[PartGram]) -> tuple[Any, ...]:
    """Order layers as a signal meets them, embeddings first and heads last, and kinds as in `ORDER`."""
    layer, kind = key
    kinds = {part.kind for part in members}
    first = -1 if kinds <= {"embedding"} else 1 if kinds <= {"head", "norm"} and "." not in layer else 0
    numbers = [int(word) if word.isdigit() else -1 for word in layer.split(".")]
    places = [number for number in numbers if number >= 0]
    return (
        first if layer else 0,
        places or [10**9 * (first + 1) if layer else 0],
        layer,
        ORDER.index(kind) if kind in ORDER else len(ORDER),
        kind,
    )


def _group(
    layer: str, kind: str, members: Sequence[PartGram], sketches: SketchedPath | None, held: Mapping[str, int]
) -> Group:
    steps = sum_of([part.steps for part in members])
    ends = torch.tensor([part.rounding for part in members]).double().sum(0)
    n = len(steps.left)
    rounding = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, n, dtype=torch.float64))
    errors: dict[str, float] = {}
    bands: dict[str, Tensor] = {}
    if sketches is not None:
        name = members[0].name.removesuffix(ENDING) if layer else None
        scalars = sketches.estimate(
            lambda gram: torch.stack([each.function(gram) for each in SCALARS.values()]), name
        )[1]
        errors = dict(zip(SCALARS, scalars.tolist(), strict=True))
        if not layer:
            bands = {each: sketches.estimate(CURVES[each].function)[1] for each in CURVES}
    return Group(
        layer=layer,
        kind=kind,
        parameters=sum(held.get(part.name, part.parameters) for part in members),
        steps=steps,
        noise=torch.zeros(n - 1) if sketches else rounding[1:] + rounding[:-1],
        numbers=hallmarks(steps),
        errors=errors,
        bands=bands,
    )


def _still(parts: Iterable[PartGram]) -> list[str]:
    """Say which tensors never move: frozen layers."""
    still = sorted({part.name for part in parts if not part.steps.left[1:].any()})
    if not still:
        return []
    shown = ", ".join(still[:3]) + (f" and {len(still) - 3} more" if len(still) > 3 else "")
    return [f"{len(still)} tensors are the same bit by bit in all checkpoints: {shown}."]


def _facts(tensors: Sequence[Aligned], checkpoint: Checkpoint, stored: int) -> dict[str, str]:
    dtypes = sorted({str(each.dtype).removeprefix("torch.") for tensor in tensors for each in tensor.stored})
    numbers = sum(tensor.numel for tensor in tensors)
    facts = {"parameters": f"{numbers:,} in {len(tensors)} tensors, {', '.join(dtypes)}"}
    if checkpoint.metadata.get("mode") == "sketch":
        facts["parameters"] = f"{int(checkpoint.metadata['parameters']):,}, sketched by {numbers:,} numbers"
    return {**facts, "read": f"{stored / 1e9:.3g} GB"}
