"""Bayesian deep ensembles: members that are draws of a posterior, on a toy problem, tables and images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from gramian.errors import InputError
from gramian.systems.claims import Finding, averaged, paired
from gramian.tasks.language import run_folder
from gramian.tasks.regression_fit import RegressConfig
from gramian.tasks.strange_images import LEFT_OUT, StrangeConfig, study
from gramian.tasks.strange_images import Outcome as Judged
from gramian.tasks.table_study import BEYOND, INSIDE, Outcome, TableStudy, run_study
from gramian.tasks.toy_ensembles import Toy, ToyConfig, far_ratio, toy_ensembles

CLAIM = """An ensemble whose members train with a fixed random function added, built from the Jacobian at the
start, noisy targets and the start as anchor draws from the posterior of the Gaussian process with the neural
tangent kernel as the prior's covariance; its variance far from the data exceeds that of deep ensembles and
of randomised priors, and its predictions are at least as good there (He, Lakshminarayanan, Teh 2020, arXiv
2007.05864)."""

OURS, BASE, PRIORS, PUBLISHED = "ntkgp_param", "deep_ensemble", "rp_param", "ntkgp_fn"

NEAR = math.log(1.5)
"""Logarithm of the factor up to which a finite ensemble has its law's deviations."""

WIDER = 1.5
"""Factor by which deviations far from the data must exceed others."""

ROUNDING = -1e-9
"""Smallest eigenvalue, as a share of the largest, down to which a difference is positive semidefinite."""

AS_GOOD = 0.02
"""What a mean negative log-likelihood (nats) or an area under a curve may fall behind and count as equal."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained to see whether the claim holds."""

    toy: ToyConfig = field(default_factory=ToyConfig)
    tables: TableStudy = field(default_factory=TableStudy)
    images: StrangeConfig = field(default_factory=StrangeConfig)
    runs: Path = Path("runs")
    """Folder of run folders."""
    name: str = "ntk_ensemble"
    """Name of the run folder."""


@dataclass(frozen=True)
class Result:
    """What was measured."""

    toy: Toy
    tables: list[Outcome]
    images: list[Judged]

    def nll(self, table: str, kind: str, method: str) -> list[float]:
        """Return the negative log-likelihoods of a method on a table, by split (nats, target's unit)."""
        return [each.scores.nll for each in of(self.tables, table, kind, method)]


def quick() -> Config:
    """Return settings of a quarter of an hour on two cores: the toy problem, diabetes, digits."""
    fitting = RegressConfig(widths=(50, 50), steps=800, batch=128, noise=(1e-2, 0.3))
    return Config(
        toy=ToyConfig(width=128),
        tables=TableStudy(methods=(BASE, PRIORS, OURS, "ntkgp_lin"), splits=5, regions=5, fitting=fitting),
        images=StrangeConfig(seeds=(0, 1, 2)),
    )


def paper(which: str = "tables") -> Config:
    """Return the settings on published tables: 20 splits, all methods, two layers of 50.

    Give the tables, .npz with `X`, `y` and the splits; and images in MNIST's format. The published
    experiments' own networks and ensemble sizes for tables could not be read; the toy problem's are theirs.

    Raises: InputError for another name.
    """
    if which != "tables":
        raise InputError(f"unknown setting {which!r}; choose quick or tables")
    fitting = RegressConfig(widths=(50, 50), steps=800, batch=128, noise=(1e-4, 1e-2))
    return Config(
        toy=ToyConfig(width=512),
        tables=TableStudy(fitting=fitting),
        images=StrangeConfig(limit=2000, pool=2, seeds=(0, 1, 2)),
        name="ntk_ensemble_tables",
    )


def given(
    config: Config,
    *,
    runs: Path,
    tables: Sequence[Path],
    images: Path | None,
    steps: int | None,
    seeds: Sequence[int],
) -> Config:
    """Return the settings with files, the number of steps and the images' repetitions as asked."""
    fitting = config.tables.fitting
    steps_of = {} if steps is None else {"steps": steps}
    repeated = {"seeds": tuple(seeds)} if seeds else {}
    return replace(
        config,
        runs=runs,
        toy=replace(config.toy, **steps_of),
        tables=replace(
            config.tables,
            tables=tuple(tables) or config.tables.tables,
            fitting=replace(fitting, **steps_of),
            large_steps=config.tables.large_steps if steps is None else steps,
        ),
        images=replace(config.images, images=images, **steps_of, **repeated),
    )


def run(config: Config, console: Console | None = None) -> Result:
    """Train the three studies; what a stopped one has done is not done again.

    Raises: InputError for settings that cannot be used.
    """
    console = console or Console()
    folder = run_folder(config.runs, config.name)
    config.toy.check()
    config.tables.check()
    images = replace(config.images, folder=folder / "images")
    images.check()
    console.print("toy problem")
    toy = toy_ensembles(config.toy, folder / "toy", console)
    console.print("tables")
    tables = run_study(config.tables, folder / "tables", console)
    console.print("images")
    return Result(toy, tables, study(images, console))


def of(outcomes: Sequence[Outcome], table: str, kind: str, method: str) -> list[Outcome]:
    """Return the outcomes of a method on the splits of one kind of a table."""
    return [each for each in outcomes if (each.table, each.kind, each.method) == (table, kind, method)]


def check(result: Result) -> list[Finding]:
    """Set what was measured against the claim.

    The order of the laws is exact. Far from the data trained members have their law's deviations, wider than
    those of the base and of randomised priors; the published function-space variant is the control, whose
    law is wider than the posterior it is named after. On tables and images they are no worse than the base.
    """
    findings = [
        Finding(f"least eigenvalue of the NTKGP's covariance less {name}'s, by its largest", value, 0.0,
                ROUNDING, below=False)
        for name, value in result.toy.order.items()
    ]  # fmt: skip
    return [*findings, *_far(result.toy), *_tables(result), *_images(result)]


def _far(toy: Toy) -> list[Finding]:
    """Compare deviations far from the data; one of M members is known to a factor 1 ± 1/√(2(M − 1))."""
    ours, law = toy.deviation[OURS], toy.limit[OURS]
    apart = abs(math.log(far_ratio(ours, law)))
    found = [Finding("logarithm of NTKGP members' deviation over its law's, far out", apart, 0.0, NEAR, True)]
    for name in (BASE, PRIORS):
        ratio = far_ratio(ours, toy.deviation[name])
        found.append(Finding(f"NTKGP members' deviation over {name}'s, far out", ratio, 0.0, WIDER, False))
    control = far_ratio(toy.limit[PUBLISHED], law)
    return [
        *found,
        Finding("law of published NTKGP-fn over the posterior, far out", control, 0.0, 1.2, False),
    ]


def _tables(result: Result) -> list[Finding]:
    found = []
    for table in dict.fromkeys(each.table for each in result.tables):
        for kind in (INSIDE, BEYOND):
            ours, base = (result.nll(table, kind, method) for method in (OURS, BASE))
            if len(ours) > 1:
                what = f"NLL of NTKGP above {BASE}s on {table}, {kind} (nats)"
                found.append(Finding(what, *paired(ours, base), AS_GOOD, below=True))
    return found


def _images(result: Result) -> list[Finding]:
    readings: Mapping[str, Callable[[Judged], float]] = {
        "error of": lambda each: 1 - each.scores["accuracy"],
        "AUROC lost by": lambda each: 1 - each.strange[LEFT_OUT]["entropy"]["AUROC"],
    }
    found = []
    for name, reading in readings.items():
        ours, base = ([reading(e) for e in result.images if e.method == method] for method in (OURS, BASE))
        if len(ours) > 1:
            what = f"{name} NTKGP above {BASE}s on images"
            found.append(Finding(what, *paired(ours, base), AS_GOOD, below=True))
    return found


def table(result: Result) -> list[dict[str, Any]]:
    """Return a row for every table, kind of split and method: means over splits with standard errors."""
    rows = []
    for name, kind, method in dict.fromkeys((e.table, e.kind, e.method) for e in result.tables):
        outcomes = of(result.tables, name, kind, method)
        if len(outcomes) < 2:
            continue
        readings = {
            "RMSE": [each.scores.rmse for each in outcomes],
            "NLL": [each.scores.nll for each in outcomes],
            "coverage": [each.scores.coverage for each in outcomes],
            "calibration error": [each.scores.calibration_error for each in outcomes],
            "seconds": [each.seconds for each in outcomes],
        }
        cells = {heading: "{:.4g} ± {:.2g}".format(*averaged(values)) for heading, values in readings.items()}
        rows.append({"table": name, "test rows": kind, "method": method, **cells})
    return rows
