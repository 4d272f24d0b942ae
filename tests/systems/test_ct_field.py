"""Fields for computed tomography: what the check asks, on made-up results always, on a tiny run too."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gramian.cli.main import run as command
from gramian.errors import InputError
from gramian.imaging.quality import LEVELS, Calibration
from gramian.systems.ct_field import (
    DROPOUT,
    PIXELS,
    PLAIN,
    Config,
    Result,
    check,
    given,
    paper,
    quick,
    run,
    table,
)
from gramian.tasks import classical_choice
from gramian.tasks.field_fits import Fit, Network
from gramian.tasks.field_study import FieldStudy, Row
from gramian.tasks.image_doubt import Doubt
from gramian.tasks.reconstruction_scores import DoubtScores
from gramian.tasks.scans import Source

QUIET = Console(quiet=True)
ENSEMBLE = "5 fields"


def scores(error: float) -> DoubtScores:
    """Scores of samples that cover every level by so much too little."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    found = Calibration(levels, levels, levels, levels - error, levels)
    return DoubtScores(nll=0.0, crps=0.0, everywhere=found, inside=found, truth_tuned=error, width=0.1)


def row(
    name: str, scan: str, seed: int, psnr: float, raw: float | None = None, scaled: float | None = None
) -> Row:
    drawn = {} if raw is None or scaled is None else {"raw": scores(raw), "scaled": scores(scaled)}
    return Row(name, scan, seed, psnr, 0.9, 1.0, **drawn)


ROWS = [
    row(name, scan, seed, psnr, *errors)
    for scan in ("a", "b")
    for seed in (0, 1)
    for name, psnr, *errors in (
        ("fbp", 28.0),
        ("sirt", 33.0),
        ("fista_tv", 34.2),
        (PIXELS, 34.0),
        (PLAIN, 34.3),
        (ENSEMBLE, 34.3, 0.3, 0.1),
        (DROPOUT, 34.1 + seed / 10, 0.2, 0.03),
    )
    if seed == 0 or name not in ("fbp", "sirt", "fista_tv")
]
SOUND = Result(ROWS, quick())


def failing(result: Result) -> list[str]:
    return [finding.what for finding in check(result) if not finding.holds]


def spoiled(name: str, **changes: object) -> Result:
    return replace(SOUND, rows=[replace(r, **changes) if r.name == name else r for r in ROWS])  # type: ignore[arg-type]


def test_a_sound_result_holds() -> None:
    assert failing(SOUND) == []
    assert len(check(SOUND)) == 3 + 4


def test_spoiled_results_fail() -> None:
    assert failing(spoiled("fista_tv", psnr=36.0)) == ["PSNR of a field above fista_tv (dB)"]
    assert failing(spoiled(PIXELS, psnr=36.0)) == [f"PSNR of a field above {PIXELS} (dB)"]
    assert failing(spoiled(DROPOUT, psnr=32.0)) == ["PSNR with dropout above without (dB)"]
    assert failing(spoiled(DROPOUT, scaled=scores(0.2))) == [
        "coverage of 95 % intervals with dropout, spread"
    ]
    assert failing(spoiled(DROPOUT, raw=scores(0.4))) == [
        "error of coverage with dropout above the ensemble's, as drawn"
    ]
    sure = failing(spoiled(ENSEMBLE, raw=scores(0.0)))
    assert "coverage of an ensemble's 50 % intervals, as drawn" in sure


def test_the_table_has_a_row_for_every_method() -> None:
    found = {each["method"]: each for each in table(SOUND)}
    assert list(found) == ["fbp", "sirt", "fista_tv", PIXELS, PLAIN, ENSEMBLE, DROPOUT]
    assert found[DROPOUT]["PSNR (dB)"] == "34.15"
    assert found[DROPOUT]["error, spread"] == "0.030"
    assert found["fbp"]["error as drawn"] == ""


def test_a_tiny_run_ends_and_makes_no_fit_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(classical_choice, "SEEK", 6)
    monkeypatch.setattr(classical_choice, "FINAL", 6)
    study = FieldStudy(
        network=Network(width=8, depth=1, levels=3, features=2, entries=2**9),
        fit=Fit(steps=8, device="cpu"),
        doubt=Doubt(members=2, samples=6, descents=3),
        around=("last_layer", "variational"),
        classical=("fbp", "fista_tv"),
        seeds=(2, 5),
    )
    scans = tuple(Source(scan=name, size=16, views=20) for name in ("ellipses", "phantom"))
    config = Config(scans=scans, study=study, runs=tmp_path)
    result = run(config, QUIET)
    assert len(check(result)) == 3 + 4
    assert len({r.name for r in result.rows}) == 2 + 3 + 2 + 2
    fits = sorted(tmp_path.rglob("best.safetensors"))
    assert len(fits) == 2 * (1 + 2 * 2) * 2
    first = {"fbp", "fista_tv", PIXELS}
    for name in {r.name for r in result.rows}:
        assert [r.seed for r in result.of(name)] == 2 * ([2] if name in first else [2, 5])
    before = [path.stat().st_mtime_ns for path in fits]
    again = run(config, QUIET)
    assert [r.psnr for r in again.rows] == [r.psnr for r in result.rows]
    assert [path.stat().st_mtime_ns for path in fits] == before


def test_settings_as_asked(tmp_path: Path) -> None:
    slices = (tmp_path / "a.npy", tmp_path / "b.dcm")
    found = given(paper(), runs=tmp_path, scans=slices, steps=7, seeds=(3, 4))
    assert [source.scan for source in found.scans] == [str(path) for path in slices]
    assert {source.views for source in found.scans} == {120}
    assert found.study.fit.steps == 7
    assert found.study.seeds == (3, 4)
    assert given(quick(), runs=Path("runs"), scans=(), steps=None, seeds=()) == quick()
    with pytest.raises(InputError, match="unknown setting 'mnist'; choose quick or aapm"):
        paper("mnist")
    with pytest.raises(InputError, match="the published settings need slices"):
        given(paper(), runs=tmp_path, scans=(), steps=None, seeds=())
    with pytest.raises(InputError, match="more than 2 degrees of freedom, not 1"):
        FieldStudy(tails=1.0).check()
    with pytest.raises(InputError, match="need two of either"):
        given(paper(), runs=tmp_path, scans=slices[:1], steps=None, seeds=(0,))


def test_files_of_another_kind_are_refused(capsys) -> None:
    assert command(["verify", "ct_field", "--text", "novel.txt"]) == 1
    assert "ct_field reads scans, not text" in capsys.readouterr().err
    assert command(["verify", "shaped_transformer", "--scans", "a.npy"]) == 1
    assert "shaped_transformer reads no scans" in capsys.readouterr().err
