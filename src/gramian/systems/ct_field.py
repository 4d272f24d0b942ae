"""Fields for computed tomography: as near the truth as classical methods, and aware of how near."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from gramian.errors import InputError
from gramian.systems.claims import Finding, averaged, paired
from gramian.tasks.field_fits import Fit, Network
from gramian.tasks.field_study import FieldStudy, Row, study
from gramian.tasks.image_doubt import Doubt
from gramian.tasks.language import run_folder
from gramian.tasks.reconstruction_scores import LEVEL, DoubtScores
from gramian.tasks.scans import Source

CLAIM = """A network of coordinates that is fitted to few views end to end reconstructs a slice about as well
as total variation and a grid of pixels do; images under Monte-Carlo dropout have error bars that hold what
they say, while a deep ensemble without dropout is too sure of itself (Vasconcelos, He, Singh, Teh 2023, arXiv
2202.10847)."""

DROPOUT, PLAIN, PIXELS = "field, dropout", "field", "pixels + TV"
AS_NEAR, COSTS = -0.75, -1.5
"""PSNR in dB above others down to which a field counts as about as good, and of dropout above none."""
HOLD = 0.9
"""Coverage of 95 % intervals above which error bars are said to hold what they say; wider ones do too."""
HALF, TOO_SURE = 0.5, 0.25
"""Level of intervals, and coverage of them below which samples are called too sure of themselves: of five
samples without any spread a 95 % interval by ranks still holds 85 %."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is reconstructed to see whether the claim holds."""

    scans: tuple[Source, ...]
    study: FieldStudy = field(default_factory=FieldStudy)
    runs: Path = Path("runs")
    """Folder of run folders."""
    name: str = "ct_field"
    """Name of the run folder."""


@dataclass(frozen=True)
class Result:
    """What was measured."""

    rows: list[Row]
    config: Config

    def of(self, name: str) -> list[Row]:
        """Return the rows of one method, scan by scan and seed by seed."""
        return [row for row in self.rows if row.name == name]

    @property
    def ensemble(self) -> str:
        """The rows' name of fields without dropout."""
        return f"{self.config.study.doubt.members} fields"


def quick() -> Config:
    """Return settings of some minutes on two cores: pydicom's slice at 64 pixels from 60 and 30 views."""
    return Config(
        scans=(Source(scan="example", size=64), Source(scan="example", size=64, views=30)),
        study=FieldStudy(fit=Fit(steps=500), doubt=Doubt(members=5), seeds=(0, 1)),
    )


def paper(which: str = "aapm") -> Config:
    """Return the published network of 120 views: fixed waves, width 280, depth 5, dropout 0.2, 15 000 steps.

    Give the slices, images of 512 × 512 in [0, 1]. It takes a day on a GPU and weeks on CPUs. Its λ = 0.008
    is a weight of 0.96 here; coarse steps and unseen views are ours.

    Raises: InputError for another name.
    """
    if which != "aapm":
        raise InputError(f"unknown setting {which!r}; choose quick or aapm")
    network = Network(encoding="fourier", width=280, depth=5, dropout=0.2, omega=40.0)
    fitting = Fit(steps=15_000, learning_rate=3e-4, variation=0.96, coarse=0.0, chunk=2**15)
    return Config(scans=(), study=FieldStudy(network=network, fit=fitting), name="ct_field_aapm")


def given(
    config: Config, *, runs: Path, scans: Sequence[Path], steps: int | None, seeds: Sequence[int]
) -> Config:
    """Return the settings with slices to project, the number of steps and the repetitions as asked.

    Raises: InputError for published settings without slices, and fewer than two reconstructions.
    """
    if not scans and not config.scans:
        raise InputError("the published settings need slices: give images in .npy or .dcm by --scans")
    views = 60 if config.scans else 120
    chosen = tuple(Source(scan=str(path), views=views) for path in scans) or config.scans
    fitting = config.study.fit if steps is None else replace(config.study.fit, steps=steps)
    repeated = tuple(seeds) or config.study.seeds
    if len(chosen) * len(repeated) < 2:
        raise InputError(
            "means over scans and seeds need two of either at least: give more --scans or --seeds"
        )
    return replace(config, scans=chosen, study=replace(config.study, fit=fitting, seeds=repeated), runs=runs)


def run(config: Config, console: Console | None = None) -> Result:
    """Reconstruct all scans by all methods; no fit of a stopped run is made again.

    Raises: InputError for settings and scans that cannot be used.
    """
    folder = run_folder(config.runs, config.name)
    scans = [source.load() for source in config.scans]
    return Result(study(scans, config.study, folder, console or Console()), config)


def check(result: Result) -> list[Finding]:
    """Set what was measured against the claim; the ensemble is the control, whose error bars have to fail."""
    dropout, ensemble = result.of(DROPOUT), result.of(result.ensemble)
    plain = result.of(PLAIN)
    near = [
        Finding(f"PSNR of a field above {name} (dB)", *_above(plain, result.of(name)), AS_NEAR, False)
        for name in (PIXELS, *result.config.study.classical)
        if name != "sirt"
    ]
    held = [_covered(row.scaled, LEVEL) for row in dropout if row.scaled]
    sure = [_covered(row.raw, HALF) for row in ensemble if row.raw]
    raw = [[row.raw.error for row in rows if row.raw] for rows in (dropout, ensemble)]
    return [
        *near,
        Finding("PSNR with dropout above without (dB)", *_above(dropout, plain), COSTS, False),
        Finding("coverage of 95 % intervals with dropout, spread", *averaged(held), HOLD, False),
        Finding("coverage of an ensemble's 50 % intervals, as drawn", *averaged(sure), TOO_SURE, True),
        Finding("error of coverage with dropout above the ensemble's, as drawn", *paired(*raw), 0.0, True),
    ]


def _covered(scores: DoubtScores, level: float) -> float:
    """Return the share of pixels inside intervals of a level, by ranks."""
    return float(scores.inside.randomised[(scores.inside.levels - level).abs().argmin()])


def _above(rows: Sequence[Row], base: Sequence[Row]) -> tuple[float, float]:
    """Return the mean PSNR above another method's; classical ones are run with the first seed alone."""
    known = {row.scan: row.psnr for row in base} | {(row.scan, row.seed): row.psnr for row in base}
    return paired([row.psnr for row in rows], [known.get((r.scan, r.seed), known[r.scan]) for r in rows])


def table(result: Result) -> list[dict[str, Any]]:
    """Return a row for every method: means over scans and seeds."""
    rows = []
    for name in dict.fromkeys(row.name for row in result.rows):
        own = result.of(name)
        raw, scaled = [r.raw for r in own if r.raw], [r.scaled for r in own if r.scaled]
        covered = [_covered(scores, LEVEL) for scores in scaled]
        rows.append(
            {
                "method": name,
                "PSNR (dB)": f"{mean(r.psnr for r in own):.2f}",
                "error as drawn": f"{mean(s.error for s in raw):.3f}" if raw else "",
                "error, spread": f"{mean(s.error for s in scaled):.3f}" if scaled else "",
                "95 % hold": f"{mean(covered):.2f}" if covered else "",
                "seconds": f"{mean(r.seconds for r in own):.0f}",
            }
        )
    return rows
