"""The report page of a trajectory: maps, lengths and angles, components, layers, and series side by side."""

from collections.abc import Iterable, Sequence

import torch

from gramian.core.gram import Gram
from gramian.core.path_subspaces import principal_scores
from gramian.core.reference_paths import random_walk
from gramian.core.trajectory import update_lengths
from gramian.observe.hallmarks import CURVES, MAPS, SCALARS
from gramian.report import Column, Page, Plot, Section, Table, palette
from gramian.report.trajectory import path_plane, similarity_map
from gramian.report.trajectory_curves import Trace, component_shares, layer_profile, traces, update_angles
from gramian.report.trajectory_curves import update_lengths as length_figure
from gramian.tasks.trajectory import Course
from gramian.tasks.trajectory_words import COLUMNS, common, sentences, value
from gramian.train.run import versions


def report_page(courses: Sequence[Course]) -> Page:
    """Return the page: maps, lengths and angles, components, layers, and what was noticed of each series."""
    sections = [_comparison(courses)] if len(courses) > 1 else []
    for course in courses:
        sections += _sections(course, f"{course.name}: " if len(courses) > 1 else "")
    facts = {"software": ", ".join(f"{name} {versions()[name]}" for name in ("gramian", "torch"))}
    for course in courses:
        of = f" of {course.name}" if len(courses) > 1 else ""
        facts[f"checkpoints{of}"] = f"{len(course.times)}, step {course.times[0]} to {course.times[-1]}"
        facts |= {f"{name}{of}": text for name, text in course.facts.items()}
    return Page(
        title="Trajectory: " + ", ".join(course.name for course in courses),
        lead=" ".join(sentences(courses)),
        facts=facts,
        sections=sections,
    )


def _comparison(courses: Sequence[Course]) -> Section:
    colours = palette(course.name for course in courses)
    _, numbers = common(courses)
    blocks: list[Plot | Table] = [
        Plot(
            update_angles({course.name: _angles(course) for course in courses}, colours=colours),
            "Angle between consecutive updates. 0°: straight on; 90°: unrelated; 120°: jitter about a point.",
            "Update angles of all series over steps",
            "Update angles of all",
        ),
        Plot(
            length_figure({course.name: _lengths(course) for course in courses}, colours=colours),
            "Length of the way between neighbouring checkpoints, by steps between them.",
            "Update lengths of all series over steps",
            "Update lengths of all",
        ),
    ]
    if numbers:
        headings = [Column("series"), *(_column(name) for name in SCALARS)]
        rows = [[name, *(found[each] for each in SCALARS)] for name, found in numbers.items()]
        blocks.append(Table(headings, rows, colours=colours, notes=tuple(_meanings(SCALARS))))
    return Section("Side by side", "", blocks)


def _column(name: str) -> Column:
    return Column(name.replace("_", " ").replace("mds", "ω"), SCALARS[name].unit.replace("weight", ""))


def _meanings(names: Iterable[str]) -> list[str]:
    return [f"{_column(name).heading}: {SCALARS[name].meaning}." for name in names]


def _sections(course: Course, of: str) -> list[Section]:
    """Return what is shown of one series."""
    steps, times = course.whole.steps, course.times
    title = of.replace(": ", " ")
    absolute, relative, updates = (
        _map(name, steps) for name in ("trajectory_map", "relative_map", "update_map")
    )
    walk = random_walk(len(times))
    maps: list[Plot | Table] = [
        Plot(
            similarity_map(absolute, times),
            "Cosines between checkpoints, seen from the origin of parameter space. Near 1 throughout if the "
            "weights move little compared with their norm, whatever the motion.",
            "Map of cosines between checkpoints",
            f"{title}Trajectory map",
        ),
        Plot(
            similarity_map(relative, times),
            "The same of the displacements from the first checkpoint: what the motion alone does. In a "
            "random walk the cosine of points i < j is √(i/j).",
            "Map of cosines between displacements from the first checkpoint",
            f"{title}Relative map",
        ),
        Plot(
            similarity_map(updates, times[1:]),
            "Cosines between updates, each named by the step where it ends. Blocks of colour are stretches "
            "of one direction; −1/2 beside the diagonal is jitter about a point.",
            "Map of cosines between updates",
            f"{title}Update map",
        ),
        Plot(
            path_plane(
                principal_scores(steps).tolist(),
                times,
                shares=CURVES["explained_variance"].function(steps)[:2].tolist(),
                walk=principal_scores(walk).tolist(),
            ),
            "The path in its first two principal components. A random walk looks as smooth (dashed): a "
            "curve here is no evidence of structure.",
            "The path in its principal plane",
            f"{title}Principal plane",
        ),
    ]  # fmt: skip
    motion: list[Plot | Table] = [
        Plot(
            update_angles({course.name: _angles(course)}),
            "Angle between consecutive updates. 0°: straight on; 90°: unrelated; 120°: jitter about a point.",
            "Update angle over steps",
            f"{title}Update angles",
        ),
        Plot(
            length_figure({course.name: _lengths(course)}),
            "Length of the way between neighbouring checkpoints, by steps between them; shaded: what "
            "rounding to the stored precision alone can make of it.",
            "Update length over steps",
            f"{title}Update lengths",
        ),
        Plot(
            traces(
                {
                    "seen from the start": _trace(course, "apex_angles_at_start"),
                    "seen from the origin": _trace(course, "apex_angles_at_origin"),
                },
                y="angle under which an update is seen, degrees",
            ),
            "Apex angles: how far an update turns the line of sight from the first checkpoint, and from the "
            "origin of parameter space.",
            "Apex angles over steps",
            f"{title}Apex angles",
        ),
        Plot(
            traces(
                {
                    "norm": _trace(course, "norms"),
                    "from the start": _trace(course, "displacements"),
                },
                y="length",
            ),
            "Norm of the weights, and distance from the first checkpoint.",
            "Norm and distance from the start over steps",
            f"{title}Norm and distance",
        ),
        Plot(
            component_shares(
                {course.name: CURVES["explained_variance"].function(steps).tolist()},
                walk=CURVES["explained_variance"].function(walk).tolist(),
            ),
            "Shares of the principal components in the variance of the points, beside a random walk's.",
            "Shares of principal components",
            f"{title}Components",
        ),
    ]
    found = [
        Section(f"{of}Maps", "", maps),
        Section(f"{of}Lengths and angles", "", motion),
        Section(f"{of}Layers", "", [*_profiles(course, title), _table(course)]),
    ]
    if course.remarks:
        found.append(Section(f"{of}What was noticed", "\n\n".join(course.remarks)))
    return found


def _map(name: str, steps: Gram) -> list[list[float]]:
    """Return a map with an empty row for the start where it has none."""
    cells = MAPS[name].function(steps)
    if MAPS[name].along == "later checkpoint":
        cells = torch.nn.functional.pad(cells, (1, 0, 1, 0), value=torch.nan)
    return cells.tolist()


def _ends(course: Course, name: str) -> tuple[int, ...]:
    """Return the steps that the entries of a curve belong to: an update to its end, a turn to its place."""
    return {"checkpoint": course.times, "update": course.times[1:], "turn": course.times[1:-1]}[
        CURVES[name].along
    ]


def _trace(course: Course, name: str) -> Trace:
    values = CURVES[name].function(course.whole.steps)
    band = course.whole.bands.get(name)
    if band is None:
        return Trace(_ends(course, name), values.tolist())
    return Trace(
        _ends(course, name), values.tolist(), (values - 2 * band).tolist(), (values + 2 * band).tolist()
    )


def _angles(course: Course) -> Trace:
    return _trace(course, "update_angles")


def _lengths(course: Course) -> Trace:
    """Return the update lengths by steps, with what rounding makes."""
    gaps = torch.tensor(course.times).diff().double()
    values = update_lengths(course.whole.steps) / gaps
    band = course.whole.bands.get("update_lengths")
    low, high = (
        ((), ())
        if band is None
        else ((values - 2 * band / gaps).tolist(), (values + 2 * band / gaps).tolist())
    )
    floor = (course.whole.noise.sqrt() / gaps).tolist() if course.whole.noise.any() else ()
    return Trace(course.times[1:], values.tolist(), low, high, floor)


def _profiles(course: Course, title: str) -> list[Plot | Table]:
    """Return hallmarks by layer and kind."""
    layers = [group.layer for group in course.layers]
    cells = course.cells or course.layers
    kinds = list(dict.fromkeys(group.kind for group in course.kinds)) or [""]
    place = {(group.layer, group.kind): group for group in cells}
    shown = {
        "mds_relative": "ω relative to the start; a random walk has 2/3",
        "mean_update_angle": "mean angle between consecutive updates, degrees",
        "relative_displacement": "distance from the start by the norm there",
    }
    plots: list[Plot | Table] = []
    for name, label in shown.items():
        values = {
            kind or "all": [
                place[layer, kind].numbers[name] if (layer, kind) in place else torch.nan for layer in layers
            ]
            for kind in kinds
        }
        plots.append(
            Plot(
                layer_profile(values, layers, y=label),
                f"{SCALARS[name].meaning[0].upper()}{SCALARS[name].meaning[1:]}, by layer and kind.",
                f"{SCALARS[name].meaning} by layer and kind",
                f"{title}{name.replace('_', ' ')} by layer",
            )
        )
    return plots


def _table(course: Course) -> Table:
    headings = [Column("layer"), Column("kind"), Column("parameters"), *(_column(name) for name in COLUMNS)]
    walk = [
        "a random walk",
        "",
        None,
        *(None if (v := SCALARS[n].walk(len(course.times))) is None else float(v) for n in COLUMNS),
    ]
    rows = [walk]
    for group in (course.whole, *course.kinds, *course.layers, *course.cells):
        numbers = [value(name, group) if group.errors else group.numbers[name] for name in COLUMNS]
        rows.append(
            [
                group.layer or ("all" if group.kind else "whole model"),
                group.kind or "all",
                group.parameters,
                *numbers,
            ]
        )
    return Table(headings, rows, notes=tuple(_meanings(COLUMNS)))
