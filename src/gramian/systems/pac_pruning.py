"""Stochastic pruning masks: what learning them gains on their start, and what is certain of the result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import nan
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from gramian.compress.learning import Learning
from gramian.errors import InputError
from gramian.files import write_json
from gramian.report import save
from gramian.report.pruning import PriorPath, prior_fractions
from gramian.report.tuned_masks import tuned_masks
from gramian.systems.claims import Finding, averaged, paired
from gramian.tasks import certificate_study as certificates
from gramian.tasks.certificate_study import CertificateStudy, Certified, run_certificates
from gramian.tasks.language import run_folder
from gramian.tasks.pruning_data import Data
from gramian.tasks.pruning_study import (
    AGAIN,
    AGAIN_BOTH,
    BOTH,
    DENSE,
    GATES,
    MASKS,
    SHUFFLED,
    STRAIGHT,
    UNTOUCHED,
    PruningStudy,
    Tuned,
    run_study,
)
from gramian.tasks.self_bounded import Bounding

CLAIM = """Pruning masks drawn weight by weight, whose probabilities are learnt on the expected loss, improve
the test error of the magnitude, SNIP and random masks that they start from, also after thresholding, and
learnt on a PAC-Bayes bound they certify their own risk (Hayou, He, Dziugaite 2021, arXiv 2110.11804)."""


LEAST = 0.01
"""Error, in percent, that the axis of the figure begins at."""
SPARSE = 0.1
"""Density up to which learnt masks are asked to be ahead of other ways to go on."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained to see whether the claim holds."""

    tuning: PruningStudy = field(default_factory=PruningStudy)
    """A perceptron, pruned."""
    convolutions: PruningStudy = field(
        default_factory=lambda: PruningStudy(network="cnn", starts=("magnitude",), densities=(0.2, 0.1))
    )
    """A small convolutional network, pruned."""
    certificates: CertificateStudy = field(default_factory=CertificateStudy)
    """Certificates by the share of examples that make the prior."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Repetitions, each with its own split and network; at least two give a standard error."""
    runs: Path = Path("runs")
    """Folder of run folders."""
    name: str = "pac_pruning"
    """Name of the run folder."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"a standard error needs two different seeds or more, got {list(self.seeds)}")
        self.tuning.check()
        self.convolutions.check()
        self.certificates.check()


@dataclass(frozen=True)
class Result:
    """What was measured."""

    tuning: list[Tuned]
    convolutions: list[Tuned]
    certificates: list[Certified]


def quick() -> Config:
    """Return settings of a quarter of an hour on one quiet core, on scikit-learn's digits."""
    learning = Learning(steps=600)
    return Config(
        tuning=PruningStudy(learning=learning),
        convolutions=PruningStudy(
            network="cnn", starts=("magnitude",), densities=(0.1,), learning=replace(learning, steps=300)
        ),
        certificates=CertificateStudy(
            learning=replace(learning, learn="both"),
            bounding=Bounding(learning=replace(learning, weight_rate=3e-3), draws=2000, p_min=0.03),
        ),
    )


def paper(which: str = "mnist") -> Config:
    """Return settings of an hour on one core for images of MNIST's format, given as a file.

    The paper's own networks and data are not known beyond its abstract: these are ours.

    Raises: InputError for another name.
    """
    if which != "mnist":
        raise InputError(f"unknown setting {which!r}; choose quick or mnist")
    config = quick()
    short = replace(config.convolutions.learning, steps=200)
    return replace(
        config,
        tuning=replace(config.tuning, starts=("magnitude",), densities=(0.1,)),
        convolutions=replace(config.convolutions, train_steps=400, learning=short),
        certificates=replace(
            config.certificates,
            fractions=(0.0, 0.25, 0.5),
            bounding=replace(config.certificates.bounding, draws=4000),
        ),
        name="pac_pruning_mnist",
    )


def given(
    config: Config, *, runs: Path, images: Path | None, steps: int | None, seeds: Sequence[int]
) -> Config:
    """Return the settings with images, numbers of steps and repetitions as asked.

    Raises: InputError for the setting mnist without images.
    """
    if images is None and config.name.endswith("mnist"):
        raise InputError("the setting mnist needs --images: a folder or file in MNIST's format, or .npz")
    data = Data(data=images)

    def shorter(study: PruningStudy) -> PruningStudy:
        learning = study.learning if steps is None else replace(study.learning, steps=steps)
        return replace(study, data=data, learning=learning)

    study = replace(config.certificates, data=data)
    if steps is not None:
        moved = replace(study.bounding.learning, steps=steps)
        bounding = replace(study.bounding, learning=moved)
        study = replace(study, learning=replace(study.learning, steps=steps), bounding=bounding)
    return replace(
        config,
        runs=runs,
        tuning=shorter(config.tuning),
        convolutions=shorter(config.convolutions),
        certificates=study,
        seeds=tuple(seeds) or config.seeds,
    )


def run(config: Config, console: Console | None = None) -> Result:
    """Prune, fine-tune and certify; what a stopped run has done is not done again.

    Raises: InputError for settings that cannot be used; DivergedError when a loss is not finite.
    """
    console = console or Console()
    config.check()
    folder = run_folder(config.runs, config.name)
    console.print("learning masks of a perceptron")
    tuning = run_study(config.tuning, config.seeds, folder / "tuning", console)
    console.print("learning masks of a convolutional network")
    convolutions = run_study(config.convolutions, config.seeds, folder / "convolutions", console)
    console.print("certificates")
    certified = run_certificates(config.certificates, config.seeds, folder / "certificates", console)
    result = Result(tuning, convolutions, certified)
    write_json(folder / "result.json", asdict(result))
    for name, figure in figures(result).items():
        save(figure, folder / name)
    return result


def figures(result: Result) -> Mapping[str, Figure]:
    """Return held-out errors by density and way, and certificates by the share that makes the prior."""
    shown = {
        "untouched": UNTOUCHED,
        "fine-tuned": STRAIGHT,
        "hard concrete": GATES,
        "λ learnt": MASKS,
        "λ and w learnt": BOTH,
        "fine-tuned, then λ and w": AGAIN_BOTH,
    }
    panels: dict[str, dict[str, dict[float, list[float]]]] = {}
    for start in dict.fromkeys(each.start for each in result.tuning):
        panels[start] = {name: {} for name in shown}
        for name, way in shown.items():
            for each in result.tuning:
                if (each.start, each.way) == (start, way):
                    panels[start][name].setdefault(each.density, []).append(max(100 * each.fixed, LEAST))
    dense = mean(100 * each.fixed for each in result.tuning if each.way == DENSE)

    def path(way: str) -> PriorPath:
        groups = certificates.by_fraction(result.certificates, way)
        seeds = range(min(map(len, groups.values())))

        def rows(reading: Callable[[Certified], float]) -> list[list[float]]:
            return [[reading(group[seed]) for group in groups.values()] for seed in seeds]

        return PriorPath(
            fractions=list(groups),
            certificate=rows(lambda each: each.certificate),
            error=rows(lambda each: each.held_out),
            prior=rows(lambda each: each.prior),
            test_set=rows(lambda each: nan if each.test_set is None else each.test_set),
            kl=rows(lambda each: each.kl / each.n),
        )

    ways = dict.fromkeys(each.way for each in result.certificates)
    return {
        "errors.svg": tuned_masks(panels, max(dense, LEAST)),
        "certificates.svg": prior_fractions({way: path(way) for way in ways}),
    }


def check(result: Result) -> list[Finding]:
    """Return what the claim was found to stand for, and what its controls must show."""
    return [
        *_tuning("mlp", result.tuning),
        *_tuning("cnn", result.convolutions),
        *_certificates(result.certificates),
    ]


def _tuning(network: str, found: Sequence[Tuned]) -> list[Finding]:
    """Ask what learning gains on each start at each density, errors in percent, paired over seeds."""

    def errors(start: str, density: float, way: str, random: bool = False) -> list[float]:
        chosen = [each for each in found if (each.start, each.density, each.way) == (start, density, way)]
        return [100 * (each.random if random and each.random is not None else each.fixed) for each in chosen]

    findings = []
    cells = list(dict.fromkeys((each.start, each.density) for each in found))
    for start, density in cells:
        base, at = errors(start, density, UNTOUCHED), f"{network}, {start} at {density:g}"
        for what, random in (("the random mask", True), ("the thresholded one", False)):
            gain = paired(base, errors(start, density, BOTH, random))
            findings.append(Finding(f"{at}: points of error that {what} gains", *gain, 0.0, below=False))

    def over(densities: Sequence[float], way: str, other: str) -> tuple[float, float]:
        """Return how much less a way errs than another, mean over cells and its error over seeds."""
        gaps = [
            [b - a for a, b in zip(errors(*cell, way), errors(*cell, other), strict=True)]
            for cell in cells
            if cell[1] in densities
        ]
        return averaged([mean(each) for each in zip(*gaps, strict=True)])

    densities = sorted({density for _, density in cells})
    sparse = [density for density in densities if density <= SPARSE]
    for what, among, way, other in (
        ("λ alone gain on λ by shuffled gradients (a control)", densities, MASKS, SHUFFLED),
        (f"λ and weights gain on hard concrete gates, densities ≤ {SPARSE:g}", sparse, BOTH, GATES),
        (f"λ and weights gain on plain fine-tuning, densities ≤ {SPARSE:g}", sparse, BOTH, STRAIGHT),
    ):
        if among:
            gain = over(among, way, other)
            findings.append(Finding(f"{network}: points of error that {what}", *gain, 0.0, below=False))
    return findings


def _certificates(found: Sequence[Certified]) -> list[Finding]:
    findings = []
    for way in dict.fromkeys(each.way for each in found):
        for fraction, group in certificates.by_fraction(found, way).items():
            at = f"{way}, prior from {fraction:.0%}"
            if not fraction:
                value = averaged([each.certificate for each in group])
                findings.append(
                    Finding(f"{at}: certificate without data in the prior", *value, 0.9, below=True)
                )
            gain = paired([each.prior for each in group], [each.certificate for each in group])
            least = -0.01 if fraction else 0.1  # a good prior leaves nothing to gain, and little may be lost
            findings.append(
                Finding(f"{at}: certificate gained on the prior's own", *gain, least, below=False)
            )
    return findings


def table(result: Result) -> list[Mapping[str, Any]]:
    """Return one row a network, start and density: held-out errors in percent by way, means over seeds."""
    rows = []
    for network, found in (("mlp", result.tuning), ("cnn", result.convolutions)):
        for start, density in dict.fromkeys((each.start, each.density) for each in found):
            group = [each for each in found if (each.start, each.density) == (start, density)]

            def cell(way: str, random: bool = False, group: Sequence[Tuned] = group) -> str:
                values = [
                    100 * (each.random if random and each.random is not None else each.fixed)
                    for each in group
                    if each.way == way
                ]
                return _written(values)

            rows.append(
                {
                    "mask": f"{network} {start} {density:g}",
                    "untouched": cell(UNTOUCHED),
                    "λ": cell(MASKS),
                    "λ and w": cell(BOTH),
                    "the same, random": cell(BOTH, True),
                    "hard concrete": cell(GATES),
                    "fine-tuned": cell(STRAIGHT),
                    "twice": cell(AGAIN),
                    "then λ and w": cell(AGAIN_BOTH),
                }
            )
    return rows


def start_table(result: Result) -> list[Mapping[str, Any]]:
    """Return one row a way and a share of prior examples: errors and certificates in percent, KL a sample."""
    rows: list[Mapping[str, Any]] = []
    for way in dict.fromkeys(each.way for each in result.certificates):
        for fraction, group in certificates.by_fraction(result.certificates, way).items():
            tests = [100 * each.test_set for each in group if each.test_set is not None]
            rows.append(
                {
                    "posterior moves": way,
                    "prior from": f"{fraction:.0%}",
                    "bound set": f"{group[0].n:,}",
                    "certificate": _written([100 * each.certificate for each in group]),
                    "held-out error": _written([100 * each.held_out for each in group]),
                    "KL / n": f"{mean(each.kl / each.n for each in group):.2g}",
                    "prior's own": _written([100 * each.prior for each in group]),
                    "test-set bound": _written(tests) if tests else "",
                }
            )
    return rows


def _written(values: Sequence[float]) -> str:
    value, error = averaged(values)
    return f"{value:.1f}±{error:.1f}"
