"""`gramian compare`: several blocks side by side, with a report, or a study of many trials."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal

import tyro
from rich.console import Console

from gramian.errors import InputError
from gramian.ranks import on_main, ranks
from gramian.tasks import compare as task
from gramian.tasks import compare_page, five_axes_page
from gramian.tasks.five_axes import StudyConfig, five_axes
from gramian.tasks.language import Job


def compare(
    config: tyro.conf.OmitArgPrefixes[task.CompareConfig],
    study: Literal["five-axes"] | None = None,
    seeds: tuple[int, ...] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Train several blocks side by side on text, watch their insides, quantise them, write a report.

    Args:
        config: what to read, build, train and compare.
        study: five-axes searches for one block that wins on loss, parameters, speed, outliers and int8; it
            has settings of its own, which it prints, where none differ here from a comparison's defaults,
            and goes on where it was stopped.
        seeds: repetitions of a study's best trials; 0 1 2 when not given.
        resume: go on with the comparison of this name from its newest checkpoints.
        overwrite: replace the comparison of this name.
    """
    console = Console(markup=False)
    if study is not None:
        if overwrite:
            raise InputError(
                "a study goes on with what is there; give another --name in place of --overwrite"
            )
        if ranks() > 1:
            raise InputError("a study trains on one process; start it without a launcher")
        _study(config, seeds, console)
        return
    if seeds:
        raise InputError("seeds are for a study; a comparison has one, --seed")
    comparison = task.compare(config, resume=resume, overwrite=overwrite, console=console)
    on_main(lambda: _show(comparison, console))


def _show(comparison: task.Comparison | None, console: Console) -> None:
    """Print what was found and write the report."""
    assert comparison is not None
    console.print(compare_page.terminal_table(comparison))
    console.print(f"report: {compare_page.write_report(comparison)}", soft_wrap=True)


def _study(config: task.CompareConfig, seeds: tuple[int, ...], console: Console) -> None:
    """Run the five-axes study with what was changed from the defaults of a comparison."""
    default, base = task.CompareConfig(), StudyConfig()
    if config.blocks != default.blocks or config.calibration_batches != default.calibration_batches:
        raise InputError(
            "a study has blocks and calibration of its own; leave --blocks and --calibration-batches out"
        )
    name = base.name if config.name == default.name else config.name
    given = replace(base, job=_laid_over(base.job, config, default), name=name, seeds=seeds or base.seeds)
    found = five_axes(given, console=console)
    console.print(five_axes_page.terminal_table(found))
    console.print(five_axes_page.lead(found), highlight=False)
    console.print(f"report: {five_axes_page.write_report(found)}", soft_wrap=True)


def _laid_over(base: Any, given: Any, default: Any) -> Any:
    """Return the base with every setting of its own that is not given as it is by default."""
    changed = {}
    for field in fields(Job if isinstance(base, Job) else base):
        mine, theirs, usual = (getattr(each, field.name) for each in (base, given, default))
        changed[field.name] = _laid_over(mine, theirs, usual) if is_dataclass(mine) else mine
        if not is_dataclass(mine) and theirs != usual:
            changed[field.name] = theirs
    return replace(base, **changed)
