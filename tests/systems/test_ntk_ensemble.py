"""Bayesian deep ensembles: what the check asks, on made-up results always, on a tiny run too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gramian.cli.main import run as command
from gramian.errors import InputError
from gramian.systems.ntk_ensemble import (
    BASE,
    OURS,
    PRIORS,
    PUBLISHED,
    Config,
    Result,
    check,
    given,
    paper,
    quick,
    run,
    table,
)
from gramian.tasks.regression_fit import RegressConfig
from gramian.tasks.regression_scores import Scores
from gramian.tasks.strange_images import LEFT_OUT, StrangeConfig
from gramian.tasks.strange_images import Outcome as Judged
from gramian.tasks.table_study import BEYOND, INSIDE, Outcome, TableStudy
from gramian.tasks.toy_ensembles import GRID, Toy, ToyConfig

QUIET = Console(quiet=True)


def rows(**values: float) -> dict[str, list[float]]:
    return {name: [value] * len(GRID) for name, value in values.items()}


DEVIATION = rows(**{BASE: 0.5, PRIORS: 0.6, OURS: 2.2, PUBLISHED: 2.9})
LIMIT = rows(**{BASE: 0.1, PRIORS: 0.5, OURS: 2.0, PUBLISHED: 2.7})
TOY = Toy([0.0], [0.0], DEVIATION, DEVIATION, LIMIT, LIMIT, {PRIORS: -1e-15, BASE: -1e-13})


def outcome(kind: str, number: int, method: str, nll: float) -> Outcome:
    return Outcome("wine", kind, number, method, Scores(1.0, nll, 0.5, 0.9, 3.0, 0.03), 2.0)


TABLES = [
    outcome(kind, number, method, nll + number / 10)
    for kind in (INSIDE, BEYOND)
    for number in range(3)
    for method, nll in ((BASE, 1.0), (OURS, 0.9))
]


def judged(method: str, seed: int, accuracy: float, area: float) -> Judged:
    found = {LEFT_OUT: {"entropy": {"AUROC": area}}}
    return Judged(method, seed, {}, [], {"accuracy": accuracy}, found, [])


IMAGES = [
    judged(method, seed, accuracy, area)
    for seed in range(3)
    for method, accuracy, area in ((BASE, 0.97, 0.95), (OURS, 0.97, 0.96))
]
SOUND = Result(TOY, TABLES, IMAGES)


def failing(result: Result) -> list[str]:
    return [finding.what for finding in check(result) if not finding.holds]


def test_a_sound_result_holds() -> None:
    assert failing(SOUND) == []
    assert len(check(SOUND)) == 2 + 4 + 2 + 2


@pytest.mark.parametrize(
    ("toy", "words"),
    [
        ({"order": {PRIORS: -0.1}}, "least eigenvalue"),
        ({"deviation": {**DEVIATION, **rows(**{OURS: 5.0})}}, "over its law's"),
        ({"deviation": {**DEVIATION, **rows(**{BASE: 2.0})}}, f"over {BASE}'s"),
        ({"deviation": {**DEVIATION, **rows(**{PRIORS: 2.0})}}, f"over {PRIORS}'s"),
        ({"limit": {**LIMIT, **rows(**{PUBLISHED: 2.0})}}, "published NTKGP-fn"),
    ],
)
def test_spoiled_toys_fail(toy: dict[str, Any], words: str) -> None:
    failed = failing(replace(SOUND, toy=replace(TOY, **toy)))
    assert len(failed) == 1
    assert words in failed[0]


def test_worse_predictions_fail() -> None:
    worse = [
        replace(each, scores=replace(each.scores, nll=each.scores.nll + 0.3))
        if (each.kind, each.method) == (BEYOND, OURS)
        else each
        for each in TABLES
    ]
    assert failing(replace(SOUND, tables=worse)) == [f"NLL of NTKGP above {BASE}s on wine, beyond (nats)"]
    blind = [judged(e.method, e.seed, 0.97, 0.5) if e.method == OURS else e for e in IMAGES]
    assert failing(replace(SOUND, images=blind)) == [f"AUROC lost by NTKGP above {BASE}s on images"]
    wrong = [judged(e.method, e.seed, 0.9, 0.96) if e.method == OURS else e for e in IMAGES]
    assert failing(replace(SOUND, images=wrong)) == [f"error of NTKGP above {BASE}s on images"]


def test_the_table_has_a_row_for_every_method() -> None:
    found = table(SOUND)
    assert [(row["test rows"], row["method"]) for row in found] == [
        (kind, method) for kind in (INSIDE, BEYOND) for method in (BASE, OURS)
    ]
    assert found[0]["NLL"] == "1.1 ± 0.058"


def test_a_tiny_run_ends_and_is_read_again(tmp_path: Path) -> None:
    fitting = RegressConfig(widths=(4,), steps=3, members=2, noise=(0.01,))
    config = Config(
        toy=ToyConfig(width=4, members=2, steps=3),
        tables=TableStudy(methods=(BASE, OURS), splits=2, regions=2, fitting=fitting),
        images=StrangeConfig(
            members=2, tried=2, widths=(4,), steps=2, noise=(0.01,), weight_std=(0.5,), seeds=(0, 1)
        ),
        runs=tmp_path,
    )
    result = run(config, QUIET)
    assert len(check(result)) == 2 + 4 + 2 + 2
    assert run(config, QUIET) == result
    assert (tmp_path / "ntk_ensemble" / "toy" / "toy.svg").exists()


def test_settings_as_asked(tmp_path: Path) -> None:
    files = tmp_path / "a.npz", tmp_path / "b.npz"
    found = given(paper(), runs=tmp_path, tables=files, images=files[0], steps=7, seeds=(3, 4))
    assert found.tables.tables == files
    assert found.images.images == files[0]
    assert (found.toy.steps, found.tables.fitting.steps, found.images.steps) == (7, 7, 7)
    assert found.tables.large_steps == 7
    assert found.images.seeds == (3, 4)
    assert given(quick(), runs=Path("runs"), tables=(), images=None, steps=None, seeds=()) == quick()
    with pytest.raises(InputError, match="unknown setting 'cifar'; choose quick or tables"):
        paper("cifar")


def test_files_of_another_kind_are_refused(capsys) -> None:
    assert command(["verify", "ntk_ensemble", "--text", "novel.txt"]) == 1
    assert "ntk_ensemble reads tables and images, not text" in capsys.readouterr().err
    assert command(["verify", "shaped_transformer", "--tables", "a.npz"]) == 1
    assert "shaped_transformer reads no tables" in capsys.readouterr().err
