"""Optimisation trajectories: what makes directions explore, what size does to them, what late steps need."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from gramian.errors import InputError
from gramian.files import write_json
from gramian.systems.claims import Finding, averaged, paired
from gramian.tasks.images import ImageConfig, Pictures, sgd
from gramian.tasks.language import Job, Text, run_folder
from gramian.tasks.late_freezing import (
    FULL,
    READOUT,
    SCALARS,
    STATISTICS,
    STOPPED,
    FreezeStudy,
    Frozen,
    run_freezing,
)
from gramian.tasks.model_series import ModelPath, SeriesStudy, run_series
from gramian.tasks.trajectory_cases import (
    BETA,
    BOTH,
    DECAY,
    FALLING,
    FAST_DECAY,
    FREE,
    GRID,
    MOMENTUM,
    NEITHER,
    RATE,
    SLOW_BOTH,
    STRONG,
    grid,
    sizes,
)
from gramian.tasks.trajectory_study import Case, Lessons, PathStudy, Travelled, run_paths
from gramian.train.loop import Training

CLAIM = """Momentum and weight decay together make an optimiser explore directions (the mean directional
similarity of its checkpoints falls), scale makes its direction more regular, and late in training more than
99 % of the parameters can be frozen at no loss (Singh, He, Hofmann, Schölkopf 2024, arXiv 2403.07379)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained, or read, to see whether the claim holds."""

    explore: PathStudy = field(default_factory=PathStudy)
    """Momentum and weight decay."""
    scale: PathStudy = field(default_factory=PathStudy)
    """Sizes."""
    late: FreezeStudy = field(default_factory=FreezeStudy)
    """Freezing."""
    image_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Repetitions on images; at least two give a standard error."""
    text_seeds: tuple[int, ...] = (0, 1, 2)
    """Repetitions on text."""
    series: SeriesStudy | None = None
    """Models whose checkpoints are read, instead of training any."""
    runs: Path = Path("runs")
    """Folder of run folders."""
    name: str = "trajectory_geometry"
    """Name of the run folder."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        for seeds in (self.image_seeds, self.text_seeds):
            if len(seeds) < 2 or len(set(seeds)) < len(seeds):
                raise InputError(f"a standard error needs two different seeds or more, got {list(seeds)}")
        if self.series is not None:
            self.series.check()
        self.explore.check()
        self.scale.check()
        self.late.check()

    @property
    def seeds(self) -> Mapping[str, tuple[int, ...]]:
        """The repetitions by network."""
        return {"mlp": self.image_seeds, "resnet": self.image_seeds, "decoder": self.text_seeds}


@dataclass(frozen=True)
class Result:
    """What was measured."""

    explore: list[Travelled]
    scale: list[Travelled]
    late: list[Frozen]
    series: list[ModelPath] = field(default_factory=list)


def quick() -> Config:
    """Return settings of twenty minutes on one core: digits of 8 × 8 pixels and the standard library's text.

    Forty epochs of digits at a constant rate for paths, twenty with moved images and two drops of the rate
    for freezing; 320 steps of 512 tokens.
    """
    plain = sgd(
        760, 760, batch=64, learning_rate=RATE, schedule="constant", weight_decay=0.0, betas=(0.0, 0.0)
    )
    usual = replace(plain, betas=(BETA, 0.0), weight_decay=5e-4)
    dropped = sgd(380, 380, batch=64, learning_rate=0.3)
    text = Job(training=Training(steps=320), evaluation_batches=16)
    return Config(
        explore=PathStudy(lessons=Lessons(images=ImageConfig(training=plain)), cases=grid()),
        scale=PathStudy(lessons=Lessons(images=ImageConfig(training=usual), text=text), cases=sizes()),
        late=FreezeStudy(
            lessons=Lessons(images=ImageConfig(training=dropped, shift=1), text=text),
            cases=(
                Case(name="resnet", network="resnet", width=16, depth=1),
                Case(name="decoder", network="decoder", width=64, depth=4),
            ),
            shares={"resnet": (0.25, 0.5, 0.75), "decoder": (0.5, 0.75, 0.9)},
        ),
    )


def paper(which: str = "pythia") -> Config:
    """Return the published comparison of sizes, on checkpoints of models that others trained.

    Give a folder of step revisions for each model of the family. Their paths are compared at the steps that
    all have. What the published figures weigh is not known: all checkpoints alike is the first number shown,
    and by the time between them the second, since Pythia's first ones are crowded.

    Raises: InputError for another name.
    Source: Singh et al. 2024, arXiv 2403.07379; Biderman et al. 2023, arXiv 2304.01373.
    """
    if which != "pythia":
        raise InputError(f"unknown setting {which!r}; choose quick or pythia")
    return Config(series=SeriesStudy(), name="trajectory_geometry_pythia")


def given(
    config: Config,
    *,
    runs: Path,
    text: Sequence[Path],
    images: Path | None,
    series: Sequence[Path],
    steps: int | None,
    seeds: Sequence[int],
) -> Config:
    """Return the settings with files, numbers of steps and repetitions as asked.

    Raises: InputError for what a setting has no use for.
    """
    if config.series is not None:
        if text or images is not None or steps is not None or seeds:
            raise InputError(
                "this setting trains nothing: it reads series, and takes no text, images or steps"
            )
        return replace(config, runs=runs, series=replace(config.series, folders=tuple(series)))
    if series:
        raise InputError(
            "series of checkpoints are read by --setting pythia; quick trains networks of its own"
        )

    def taught(lessons: Lessons) -> Lessons:
        changed = {} if steps is None else {"steps": steps}
        pictures, job = lessons.images, lessons.text
        return Lessons(
            images=replace(
                pictures, data=Pictures(path=images), training=replace(pictures.training, **changed)
            ),
            text=replace(job, data=Text(text=tuple(text)), training=replace(job.training, **changed)),
        )

    repeated = {"image_seeds": tuple(seeds), "text_seeds": tuple(seeds)} if seeds else {}
    studies = {
        name: replace(study, lessons=taught(study.lessons))
        for name, study in (("explore", config.explore), ("scale", config.scale), ("late", config.late))
    }
    return replace(config, runs=runs, **studies, **repeated)


def run(config: Config, console: Console | None = None) -> Result:
    """Train the three studies, or read the series; what a stopped one has done is not done again.

    Raises: InputError for settings that cannot be used; DivergedError when a loss is not finite.
    """
    console = console or Console()
    config.check()
    folder = run_folder(config.runs, config.name)
    if config.series is not None:
        result = Result([], [], [], run_series(config.series, folder, console))
    else:
        console.print("momentum and weight decay")
        explore = run_paths(config.explore, config.seeds, folder / "explore", console)
        console.print("size")
        scale = run_paths(config.scale, config.seeds, folder / "scale", console)
        console.print("late freezing")
        result = Result(explore, scale, run_freezing(config.late, config.seeds, folder / "late", console))
    write_json(folder / "result.json", asdict(result))
    return result


def check(result: Result) -> list[Finding]:
    """Return what the claim was found to stand for at the quick size, and what its controls must show.

    Joint exploration holds, and the controls show that momentum acts by rate/(1 − momentum). Size makes
    weights keep their direction, since they move less for their norm: random walks with the same lengths do
    so too. Of the motion itself it holds on images without weight decay; the findings that say "against the
    claim" are the opposite of it. Freezing holds on images, and on text it is worth little more than an end.
    """
    return [
        *(each for network in ("mlp", "resnet") for each in _exploration(result.explore, network)),
        *_scale(result.scale),
        *_late(result.late),
        *_published(result.series),
    ]


def _exploration(paths: Sequence[Travelled], network: str) -> list[Finding]:
    runs = {cell: [path for path in paths if path.name == f"{network} {cell}"] for cell in GRID}
    if not all(runs.values()):
        return []

    def less(cell: str, other: str, reading: str = "mds") -> tuple[float, float]:
        return paired(*([path.whole[reading] for path in runs[each]] for each in (cell, other)))

    def joint(reading: str) -> tuple[float, float]:
        alone, none, both = ([p.whole[reading] for p in runs[each]] for each in (MOMENTUM, NEITHER, BOTH))
        decay = [path.whole[reading] for path in runs[DECAY]]
        return averaged([m + d - n - b for m, d, n, b in zip(alone, decay, none, both, strict=True)])

    main = (NEITHER, MOMENTUM, DECAY, BOTH)
    least = min(path.judged["accuracy"] for cell in main for path in runs[cell])
    return [
        Finding(f"{network}: accuracy, the least at the plain rate", least, 0.0, 0.85, below=False),
        Finding(f"{network}: ω lost to momentum and decay", *less(NEITHER, BOTH), 0.03, below=False),
        Finding(f"{network}: of that, beyond the sum of each alone", *joint("mds"), 0.03, below=False),
        Finding(
            f"{network}: ω_rel lost beyond the sum of each alone", *joint("mds_relative"), 0.03, below=False
        ),
        Finding(
            f"{network}: ω lost to decay at ten times the rate, no momentum",
            *less(NEITHER, FAST_DECAY), 0.03, below=False,
        ),
        Finding(
            f"{network}: ω that momentum adds to decay at equal rate/(1 − momentum)",
            *less(SLOW_BOTH, DECAY), -0.005, below=False,
        ),
        Finding(
            f"{network}: ω_rel that ten times the decay alone keeps above both",
            *less(STRONG, BOTH, "mds_relative"), 0.02, below=False,
        ),
    ]  # fmt: skip


SIZES = (
    ("mlp", "whole", "mds", 1, 0.01, "ω"),
    ("mlp", "walk", "mds", 1, 0.005, "ω of random walks with the same lengths"),
    ("resnet", "whole", "mds", 1, 0.001, "ω"),
    ("resnet", "walk", "mds", 1, 0.0005, "ω of random walks with the same lengths"),
    (f"mlp {FREE}", "whole", "mds_relative", 1, 0.01, "ω_rel"),
    (f"resnet {FREE}", "whole", "mds_relative", 1, 0.005, "ω_rel"),
    ("mlp", "whole", "mean_update_angle", -1, 10.0, "update angle (°)"),
    ("resnet", "whole", "mean_update_angle", -1, 10.0, "update angle (°)"),
    (FALLING, "whole", "mds", 1, 0.01, "ω"),
    (FALLING, "walk", "mds", 1, 0.003, "ω of random walks with the same lengths"),
    ("resnet", "whole", "mds_relative", -1, 0.01, "ω_rel, against the claim"),
    ("decoder", "blocks", "mds", -1, 0.002, "ω of the blocks, against the claim"),
    ("decoder", "whole", "mds_relative", -1, 0.02, "ω_rel, against the claim"),
    ("decoder", "whole", "mean_update_angle", 1, 3.0, "update angle (°), against the claim"),
    (FALLING, "whole", "mds_relative", -1, 0.02, "ω_rel, against the claim"),
)
"""What becomes of a reading from the smallest network of a family to the largest: family, part, reading, its
sign, and by how much at least."""


def _scale(paths: Sequence[Travelled]) -> list[Finding]:
    findings = []
    for name, part, reading, sign, bound, words in SIZES:
        family = sorted((path for path in paths if path.name == name), key=lambda path: path.parameters)
        if not family or family[0].parameters == family[-1].parameters:
            continue
        small, large = (
            [sign * getattr(path, part)[reading] for path in family if path.parameters == size]
            for size in (family[0].parameters, family[-1].parameters)
        )
        change = "rise" if sign > 0 else "fall"
        what = f"{name}: {change} with size of {words}"
        findings.append(Finding(what, *paired(large, small), bound, below=False))
    return findings


def _late(outcomes: Sequence[Frozen]) -> list[Finding]:
    def ended(name: str, reading: str, way: str, share: float = 0.5) -> list[float]:
        return [o.judged[reading] for o in outcomes if (o.name, o.way, o.share) == (name, way, share)]

    findings = []
    full = ended("resnet", "accuracy", FULL, 1.0)
    if full:
        trained = max(each.trained / each.parameters for each in outcomes if each.way == SCALARS)
        findings.append(Finding("share that norms' scalars are of a network", trained, 0.0, 0.01, below=True))
        for what, way, share, sign, bound in (
            ("norms' scalars alone, from half of the steps, above all", SCALARS, 0.5, 1, -0.01),
            ("the read-out alone, from half of the steps, above all (a control)", READOUT, 0.5, 1, -0.02),
            ("all above running statistics alone, from half of the steps", STATISTICS, 0.5, -1, 0.005),
            ("all above an end at half of the steps", STOPPED, 0.5, -1, 0.005),
            ("all above norms' scalars alone, from the start", SCALARS, 0.0, -1, 0.1),
        ):
            mean, error = paired(ended("resnet", "accuracy", way, share), full)
            findings.append(Finding(f"resnet: accuracy of {what}", sign * mean, error, bound, below=False))
    full = ended("decoder", "loss", FULL, 1.0)
    if full:
        norms, stopped = (ended("decoder", "loss", way) for way in (SCALARS, STOPPED))
        kept = averaged([(s - n) / (s - f) for s, n, f in zip(stopped, norms, full, strict=True)])
        what = "decoder: loss of norms' scalars alone, from half of the steps, above all (against the claim)"
        findings.append(Finding(what, *paired(norms, full), 0.1, below=False))
        what = "decoder: share of what the second half learns that norms' scalars do not learn"
        findings.append(Finding(what, 1 - kept[0], kept[1], 0.8, below=False))
    return findings


def _published(paths: Sequence[ModelPath]) -> list[Finding]:
    """Ask that ω grows from the smallest model to the largest, and between most of those next in size."""
    if not paths:
        return []
    values = [path.whole["mds"] for path in paths]
    steps = [later > earlier for earlier, later in pairwise(values)]
    return [
        Finding("rise of ω from the smallest model to the largest", values[-1] - values[0], 0.0, 0.0, False),
        Finding("share of the steps in size at which ω rises", sum(steps) / len(steps), 0.0, 0.5, False),
    ]


COLUMNS = {
    "ω": "mds",
    "ω off diagonal": "mds_off",
    "ω_rel": "mds_relative",
    "update angle": "mean_update_angle",
    "straightness": "displacement_ratio",
}
"""Hallmarks in the table of paths, by heading; result.json has all of them."""


def path_table(result: Result) -> list[Mapping[str, Any]]:
    """Return one row a case, means and standard errors over the seeds, or one a published model.

    The random walk beside ω has the same start and lengths.
    """
    rows: list[Mapping[str, Any]] = []
    for paths in (result.explore, result.scale):
        for key in dict.fromkeys((path.name, path.parameters) for path in paths):
            group = [path for path in paths if (path.name, path.parameters) == key]
            cells = {heading: _written([p.whole[name] for p in group]) for heading, name in COLUMNS.items()}
            walk = _written([path.walk["mds"] for path in group])
            rows.append({"case": f"{key[0]} ({key[1]:,})", **cells, "ω of a walk": walk})
    for path in result.series:
        cells = {heading: f"{path.whole[name]:.4g}" for heading, name in COLUMNS.items()}
        by_time, walk = f"{path.whole['mds_by_time']:.4g}", f"{path.walk['mds']:.4g}"
        name = f"{path.name} ({path.parameters:,})"
        rows.append({"case": name, **cells, "ω by time": by_time, "ω of a walk": walk})
    return rows


def table(result: Result) -> list[Mapping[str, Any]]:
    """Return one row a way to freeze: mean and standard error over the seeds."""
    rows = []
    for key in dict.fromkeys((o.name, o.share, o.way, o.trained, o.parameters) for o in result.late):
        group = [o.judged for o in result.late if (o.name, o.share, o.way, o.trained, o.parameters) == key]
        name, share, way, trained, parameters = key
        rows.append(
            {
                "network": name,
                "from": "never" if way == FULL else f"{share:.0%} of the steps",
                "goes on": way,
                "trained": f"{trained / parameters:.2%}",
                "accuracy": _written([each["accuracy"] for each in group]) if "accuracy" in group[0] else "",
                "loss": _written([each["loss"] for each in group]),
            }
        )
    return rows


def _written(values: list[float]) -> str:
    mean, error = averaged(values)
    return f"{mean:.4g} ± {error:.1g}"
