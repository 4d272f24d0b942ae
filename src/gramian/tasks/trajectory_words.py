"""What the path of training tells its reader in words and in a terminal."""

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import takewhile

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from gramian.core.trajectory import subpath, update_lengths
from gramian.observe.hallmarks import SCALARS, hallmarks
from gramian.observe.phase import ROUNDING
from gramian.report import number
from gramian.tasks.trajectory import Course, Group

COLUMNS = {
    "mds": "ω",
    "mds_relative": "ω\nrelative",
    "relative_displacement": "moved /\nnorm",
    "displacement_ratio": "straight",
    "mean_update_angle": "update\nangle °",
    "participation_ratio": "compo-\nnents",
}
"""Hallmarks of the table, in order."""

LAYERS = 14
"""Layers that a terminal shows; the first and the last ones of more."""

COMMON = 4
"""Checkpoints that series must share to be compared at those alone."""


def sentences(courses: Sequence[Course]) -> list[str]:
    """Say in plain words what was seen, from the numbers alone."""
    several = len(courses) > 1
    said = [
        (f"{course.name}: " if several else "") + sentence
        for course in courses
        for sentence in (course.phase.sentence, _similarity(course), _rounding(course))
        if sentence
    ]
    if several:
        times, _ = common(courses)
        said.append(
            f"The series are compared at the {len(times)} steps that all have."
            if times
            else "The series share too few steps to be compared: similarities and angles depend on the "
            "spacing of checkpoints."
        )
    return said


def _similarity(course: Course) -> str:
    numbers, n = course.whole.numbers, len(course.times)
    walk = SCALARS["mds_relative"].walk(n)
    assert walk is not None
    line = (
        f"Seen from the start, checkpoints are similar by {value('mds_relative', course.whole)} (mean "
        f"cosine, each with itself included; a random walk has {float(walk):.3f}, a straight line 1)"
    )
    if numbers["relative_displacement"] < 0.1 and numbers["mds"] > 0.99:
        line += f"; from the origin by {numbers['mds']:.3f}, which the weights at the start alone bring about"
    return line + "."


def _rounding(course: Course) -> str:
    lengths = update_lengths(course.whole.steps)
    share = float(course.whole.noise.sum() / lengths.square().sum())
    if not share > ROUNDING / 10:
        return ""
    return (
        f"Up to {100 * min(share, 1):.0f} % of the squared update lengths can be rounding to the stored "
        "precision, which turns angles towards 120°."
    )


def common(courses: Sequence[Course]) -> tuple[tuple[int, ...], dict[str, dict[str, float]]]:
    """Return the steps that all series have and each one's hallmarks there; nothing where too few."""
    times = tuple(sorted(reduce(set.intersection, (set(course.times) for course in courses))))
    if len(times) < COMMON:
        return (), {}
    found = {}
    for course in courses:
        rows = [course.times.index(time) for time in times]
        found[course.name] = hallmarks(subpath(course.whole.steps, rows))
    return times, found


def terminal_tables(courses: Sequence[Course]) -> Iterator[TerminalTable]:
    """Yield for each series one row a layer, below the whole model and a random walk of as many points."""
    for course in courses:
        table = TerminalTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        table.title = (
            f"{course.name}: {len(course.times)} checkpoints, step {course.times[0]} to {course.times[-1]}"
        )
        table.add_column("layer", overflow="fold")
        table.add_column("size", justify="right")
        for heading in COLUMNS.values():
            table.add_column(heading, justify="right")
        shared = _shared_prefix([group.layer for group in course.layers])
        if shared:
            table.caption = f"layers: {shared}…"
        if course.whole.errors:
            table.caption = "estimated from sketches; standard errors are in the report"
        table.add_row("random walk", "", *_walk(len(course.times)), style="dim")
        for group in (course.whole, *_some(course.layers)):
            if group is None:
                table.add_row("…")
                continue
            cells = [number(group.numbers[name], 3) for name in COLUMNS]
            table.add_row(group.layer.removeprefix(shared) or "whole model", _count(group.parameters), *cells)
        yield table
    if len(courses) > 1:
        _, numbers = common(courses)
        table = TerminalTable(
            box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, title="at the common steps"
        )
        table.add_column("series", overflow="fold")
        for heading in COLUMNS.values():
            table.add_column(heading, justify="right")
        for name, found in numbers.items():
            table.add_row(name, *(number(found[each], 3) for each in COLUMNS))
        if numbers:
            yield table


def _shared_prefix(layers: Sequence[str]) -> str:
    """Return the modules that all layers are in, with the last point."""
    segments = zip(*(layer.split(".")[:-1] for layer in layers), strict=False)
    shared = [each[0] for each in takewhile(lambda each: len(set(each)) == 1, segments)]
    return ".".join([*shared, ""]) if shared else ""


def _some(layers: Sequence[Group]) -> list[Group | None]:
    if len(layers) <= LAYERS:
        return list(layers)
    return [*layers[: LAYERS - 4], None, *layers[-3:]]


def _walk(n: int) -> list[str]:
    values = [SCALARS[name].walk(n) for name in COLUMNS]
    return ["" if value is None else number(float(value), 3) for value in values]


def value(name: str, group: Group) -> str:
    """Return a hallmark, with its standard error where it is estimated."""
    shown = number(group.numbers[name], 3)
    return f"{shown}±{number(group.errors[name], 1)}" if group.errors.get(name) else shown


def _count(parameters: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g} {letter}"
    return str(parameters)
