"""`gramian verify`: a published system's claim, tested on this machine."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Column, Table

from gramian.errors import GramianError, InputError

SYSTEMS = (
    "simplified_block",
    "outlier_features",
    "shortcut_free",
    "scaled_resnet",
    "shaped_transformer",
    "ntk_ensemble",
    "trajectory_geometry",
    "pac_pruning",
    "distance_filtering",
    "ct_field",
)

TABLES = ("start_table", "path_table", "table")
"""Functions of a system that make rows of its result, in the order in which they are shown."""


class RefutedError(GramianError):
    """A claim did not hold."""


def verify(
    system: Annotated[str, tyro.conf.Positional],
    setting: str = "quick",
    text: tuple[Path, ...] = (),
    images: Path | None = None,
    tables: tuple[Path, ...] = (),
    series: tuple[Path, ...] = (),
    graphs: Path | None = None,
    scans: tuple[Path, ...] = (),
    runs: Path = Path("runs"),
    steps: int | None = None,
    seeds: tuple[int, ...] = (),
) -> None:
    """Test the claim of a published system, and at the quick size that spoiled versions of it fail.

    A run that was stopped goes on where it was.

    Args:
        system: simplified_block, outlier_features, shortcut_free, scaled_resnet, shaped_transformer,
            ntk_ensemble, trajectory_geometry, pac_pruning, distance_filtering or ct_field.
        setting: quick takes minutes to an hour or two on two cores; decoder and encoder (simplified_block),
            codeparrot and opt (outlier_features), wikitext (shortcut_free), cifar10, cifar100 and tiny
            (scaled_resnet), encoder (shaped_transformer), tables (ntk_ensemble), pythia
            (trajectory_geometry), zinc, peptides, pattern and cluster (distance_filtering) and aapm
            (ct_field) are the published settings, mnist (pac_pruning) a longer one.
        text: text to train on; the Python standard library when none is given.
        images: images to train on, .npz or MNIST's format (scaled_resnet, ntk_ensemble,
            trajectory_geometry, pac_pruning); scikit-learn's digits when not given.
        tables: tables to learn from, .npz with X, y and perhaps splits (ntk_ensemble); diabetes when none is
            given.
        series: folders of checkpoints, one for each model of a family (trajectory_geometry, pythia).
        graphs: a file or folder of graphs, as `gramian graphs` reads them (distance_filtering; zinc and
            peptides need it).
        scans: images to project, .npy or .dcm (ct_field; aapm needs them).
        runs: folder of run folders.
        steps: optimiser steps; a few minutes' worth when not given.
        seeds: repetitions; three when not given.
    """
    if system not in SYSTEMS:
        raise InputError(f"unknown system {system!r}; choose {', '.join(SYSTEMS)}")
    module = importlib.import_module(f"gramian.systems.{system}")
    config = module.quick() if setting == "quick" else module.paper(setting)
    files = {
        "text": text,
        "images": images,
        "tables": tables,
        "series": series,
        "graphs": graphs,
        "scans": scans,
    }
    if hasattr(config, "job"):
        for kind in ("tables", "series", "graphs", "scans"):
            if files[kind]:
                raise InputError(f"{system} reads no {kind}")
        job = replace(config.job, runs=runs, data=_data(system, config.job.data, text, images))
        if steps is not None:
            job = replace(job, training=replace(job.training, steps=steps))
        config = replace(config, job=job, seeds=seeds or config.seeds)
    else:
        read = [kind for kind in inspect.signature(module.given).parameters if kind in files]
        if unread := [kind for kind, value in files.items() if value and kind not in read]:
            raise InputError(f"{system} reads {_listed(read)}, not {unread[0]}")
        wanted = {kind: files[kind] for kind in read}
        config = module.given(config, runs=runs, steps=steps, seeds=seeds, **wanted)
    console = Console(markup=False)
    console.print(" ".join(module.CLAIM.split()), highlight=False)
    result = module.run(config, console=console)
    for name in TABLES:
        if hasattr(module, name) and (rows := getattr(module, name)(result)):
            console.print(_table(rows))
    findings = module.check(result)
    for finding in findings:
        word, side = ("holds" if finding.holds else "FAILS"), ("≤" if finding.below else "≥")
        error = f" ± {finding.error:.3f}" if finding.error else ""
        console.print(
            f"{word} {finding.what}: {finding.value:.3f}{error}, to be {side} {finding.bound:g}",
            highlight=False,
        )
    failed = [finding.what for finding in findings if not finding.holds]
    if failed:
        raise RefutedError(f"the claim does not hold here: {failed[0]}")


def _listed(kinds: Sequence[str]) -> str:
    """Return words as a list for a sentence."""
    return " and ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))


def _data(system: str, data: Any, text: tuple[Path, ...], images: Path | None) -> Any:
    """Return what a system reads, with the files given.

    Raises: InputError for files of a kind that the system does not read.
    """
    reads_text = hasattr(data, "text")
    if (images is not None and reads_text) or (text and not reads_text):
        kind = "text, not images" if reads_text else "images, not text"
        raise InputError(f"{system} reads {kind}")
    return replace(data, text=text) if reads_text else replace(data, path=images)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(*(Column(name, overflow="fold") for name in rows[0]))
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.3f}" for value in row.values()))
    return table
