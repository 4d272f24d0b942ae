"""Outlier features: what grows them, the block and the optimisers that do not, and what int8 then costs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf, isnan, nan
from typing import Any

from rich.console import Console
from torch import nn

from gramian.errors import InputError
from gramian.files import write_json
from gramian.nn.attention import Attention
from gramian.nn.blocks import BLOCKS, Parts, outlier_protected
from gramian.nn.residual import Residual
from gramian.nn.transformer import Shape
from gramian.systems.claims import Finding, averaged, paired
from gramian.tasks.language import Job, Text, run_folder
from gramian.tasks.trials import Outcomes, Trial, provoking, run_trials
from gramian.train.loop import Training

CLAIM = """The Outlier Protected block trains without outlier neurons at no loss, a non-diagonal
preconditioner spares the pre-norm block most of them, and int8 then costs less (He et al. 2024, arXiv
2405.19279)."""

BASE, PROTECTED, SPOILED = "pre_norm", "outlier_protected", "unprotected"
PRECONDITIONED = ("pre_norm_soap", "pre_norm_muon")
SMALLER_RATE, LARGER_EPS = "pre_norm_third_rate", "pre_norm_eps_1e-4"

NOTICEABLE = 0.005
"""Share of its loss that int8 must cost the base before there is something to be spared."""


def unprotected(parts: Parts) -> nn.Module:
    """Compose the Outlier Protected block without its protection: full branches, no norm on q and k."""
    block = outlier_protected(parts)
    for module in block.modules():
        if isinstance(module, Residual):
            module.gain = 1.0
        elif isinstance(module, Attention):
            module.query_norm, module.key_norm = nn.Identity(), nn.Identity()
    return block


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained to see whether the claim holds."""

    job: Job = field(default_factory=Job)
    """Text, shape and training; the seed is that of each repetition."""
    trials: tuple[Trial, ...] = ()
    """What is trained; the first trial is what the others are set against."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Repetitions; at least two give a standard error."""
    name: str = "outlier_features"
    """Name of the run folder."""


def quick() -> Config:
    """Return settings that provoke outliers in a small pre-norm model within minutes."""
    trials = (
        Trial(BASE, BASE),
        Trial(PROTECTED, PROTECTED),
        Trial("pre_norm_soap", BASE, {"optimiser": "soap"}),
        Trial("pre_norm_muon", BASE, {"optimiser": "muon"}),
        Trial("outlier_protected_soap", PROTECTED, {"optimiser": "soap"}),
        Trial(SMALLER_RATE, BASE, {"learning_rate": 1e-3}),
        Trial(LARGER_EPS, BASE, {"eps": 1e-4}),
        Trial(SPOILED, SPOILED),
    )
    return Config(job=provoking(), trials=trials)


def paper(which: str = "codeparrot") -> Config:
    """Return the published settings: the CodeParrot decoder, or OPT-125m with and without protection.

    Set `job.data.text` to the corpus (CodeParrot's Python files; BookCorpus and wiki40b). What differs from
    the published runs: the vocabulary is learnt from the text given, there is no dropout, gains of norms are
    not decayed, and bf16 takes the place of fp16.

    Raises: InputError for another name.
    Source: He et al. 2024, arXiv 2405.19279, appendix; Bondarenko et al. 2023, arXiv 2306.12929.
    """
    both = [
        Trial(f"{block}_{optimiser}", block, {"optimiser": optimiser})
        for block in (BASE, PROTECTED)
        for optimiser in ("adamw", "soap")
    ]
    shared: dict[str, Any] = {"width": 768, "heads": 12}
    if which == "codeparrot":
        job = Job(
            data=Text(vocabulary=50_000, max_bytes=20_000_000_000),
            shape=Shape(depth=18, context=128, positions="sinusoidal", init_std=0.02, **shared),
            training=Training(
                steps=43_000,
                batch=128,
                accumulation=4,
                learning_rate=1e-3,
                precision="bf16",
                evaluate_every=1000,
                observe_every=100,
                checkpoint_every=1000,
            ),
        )
        return Config(job=job, trials=tuple(both), seeds=(0, 1), name="outlier_features_codeparrot")
    if which == "opt":
        job = Job(
            data=Text(vocabulary=50_272, max_bytes=20_000_000_000),
            shape=Shape(depth=12, context=512, norm="layernorm", init_std=0.006, **shared),
            training=Training(
                steps=125_000,
                batch=192,
                accumulation=4,
                learning_rate=4e-4,
                warmup=2000 / 125_000,
                precision="bf16",
                evaluate_every=5000,
                observe_every=500,
                checkpoint_every=5000,
            ),
        )
        return Config(job=job, trials=tuple(both), seeds=(0, 1), name="outlier_features_opt")
    raise InputError(f"unknown setting {which!r}; choose quick, codeparrot or opt")


@dataclass(frozen=True)
class Result:
    """What was measured: trial -> what was found, by seed."""

    outcomes: Outcomes

    def values(self, trial: str, reading: str) -> list[float]:
        """Return one number of a trial by seed; NaN where training diverged."""
        return [nan if found is None else getattr(found, reading) for found in self.outcomes[trial]]

    def gap(self, trial: str, reading: str, base: str) -> tuple[float, float]:
        """Return a trial's mean difference to another in one number, and its standard error."""
        return paired(self.values(trial, reading), self.values(base, reading))


def run(config: Config, console: Console | None = None) -> Result:
    """Train every trial with every seed; a run that was stopped goes on where it was.

    Adds the spoiled block to the registry, so that configurations can name it.

    Raises: InputError for settings that cannot be used; StoppedError after a signal.
    """
    console = console or Console()
    BLOCKS.setdefault(SPOILED, unprotected)
    if len(config.seeds) < 2 or len(set(config.seeds)) < len(config.seeds):
        raise InputError(f"a standard error needs two different seeds or more, got {list(config.seeds)}")
    config.job.check()
    with console.status("reading and tokenising the text"):
        corpus = config.job.data.load()
    folder = run_folder(config.job.runs, config.name)
    outcomes = run_trials(config.job, config.trials, config.seeds, corpus, folder, console)
    plain = {
        name: [None if found is None else asdict(found) for found in by_seed]
        for name, by_seed in outcomes.items()
    }
    write_json(folder / "result.json", plain)
    return Result(outcomes)


def check(result: Result) -> list[Finding]:
    """Return what the claim stands or falls with; the unprotected block must have its outliers back.

    What int8 costs is compared only where it costs the base `NOTICEABLE` of its loss: below, as in models of
    a few million parameters, nothing is there to be spared.
    """
    kurtosis = {name: result.values(name, "max_neuron_kurtosis") for name in result.outcomes}
    loss = {name: result.values(name, "validation_loss") for name in (BASE, PROTECTED)}
    gap = {name: result.values(name, "int8_gap") for name in (BASE, PROTECTED)}
    excess = [p / b - 1 for p, b in zip(loss[PROTECTED], loss[BASE], strict=True)]
    least = nan if None in result.outcomes[BASE] else min(kurtosis[BASE])
    largest = nan if None in result.outcomes[PROTECTED] else max(kurtosis[PROTECTED])
    findings = [
        Finding(f"final max kurtosis of {BASE}, the least of any seed", least, 0.0, 10, below=False),
        Finding(f"final max kurtosis of {PROTECTED}, the largest of any seed", largest, 0.0, 3, below=True),
        Finding(f"loss of {PROTECTED} above {BASE} (share)", *averaged(excess), 0.01, below=True),
    ]
    if sum(gap[BASE]) >= NOTICEABLE * sum(loss[BASE]):
        what = f"int8 gap of {BASE} less 5 x that of {PROTECTED} (nats)"
        findings.append(Finding(what, *paired(gap[BASE], [5 * p for p in gap[PROTECTED]]), 0, below=False))
    found = [name for name in PRECONDITIONED if name in kurtosis]
    if found:
        best = min(found, key=lambda name: averaged(kurtosis[name])[0])
        three = [3 * value for value in kurtosis[best]]
        what = f"kurtosis of {BASE} less 3 x that of {best}"
        findings.append(Finding(what, *paired(kurtosis[BASE], three), 0, below=False))
    for name in (SMALLER_RATE, LARGER_EPS):
        if name in kurtosis:
            what = f"kurtosis of {BASE} less that of {name}"
            findings.append(Finding(what, *paired(kurtosis[BASE], kurtosis[name]), 0, below=False))
    if SPOILED in kurtosis:
        what = f"kurtosis of {SPOILED} above {PROTECTED} (it must have outliers; inf where it diverges)"
        broken = None in result.outcomes[SPOILED]
        above = (inf, 0.0) if broken else paired(kurtosis[SPOILED], kurtosis[PROTECTED])
        findings.append(Finding(what, *above, 0, below=False))
    return findings


READINGS = {
    "loss (nats/token)": "validation_loss",
    "max neuron kurtosis": "max_neuron_kurtosis",
    "max / median": "max_median_ratio",
    "int8 gap (nats/token)": "int8_gap",
}
"""What a table says of every trial, kurtosis and int8 gap always together: neither predicts the other."""


def table(result: Result) -> list[Mapping[str, Any]]:
    """Return one row a trial: mean and standard error over the seeds."""
    rows = []
    for name in result.outcomes:
        row: dict[str, Any] = {"trial": name}
        for heading, reading in READINGS.items():
            mean, error = averaged(result.values(name, reading))
            row[heading] = "diverged" if isnan(mean) else f"{mean:.4g} ± {error:.2g}"
        rows.append(row)
    return rows
