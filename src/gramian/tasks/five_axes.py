"""The search for one block that wins on five axes at once: loss, size, speed, outliers and int8."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import nan
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from gramian.errors import InputError
from gramian.files import write_json
from gramian.nn.blocks import BLOCKS
from gramian.nn.candidates import CANDIDATES
from gramian.nn.transformer import TransformerConfig, build
from gramian.tasks.language import Job, language_loss, print_facts, run_folder, text_facts
from gramian.tasks.trials import Outcomes, Trial, provoking, run_trials
from gramian.train.optimisers import build_optimiser
from gramian.train.run import read_json

BASE = "pre_norm"
"""The block that all others are set against."""

LEAST_SPEED, MOST_PARAMETERS, MOST_KURTOSIS, MOST_INT8 = 1.15, 0.85, 2.0, 0.005


def _muon(block: str) -> Trial:
    return Trial(f"{block}_muon", block, {"optimiser": "muon"})


TRIALS: tuple[Trial, ...] = (
    Trial(BASE, BASE),
    Trial("outlier_protected", "outlier_protected"),
    Trial("sas", "sas"),
    Trial("sas_p", "sas_p"),
    Trial("sas_p_no_norm", "sas_p_no_norm"),
    *(Trial(name, name) for name in CANDIDATES),
    Trial("sas_p_no_final_norm", "sas_p", shape={"final_norm": False}),
    Trial("sas_p_single_scale", "sas_p", shape={"norm": "single_scale_rmsnorm"}),
    Trial("sas_p_dynamic_tanh", "sas_p", shape={"norm": "dynamic_tanh"}),
    _muon(BASE),
    _muon("sas_p"),
    _muon("sas_p_no_norm"),
    Trial("sas_p_soap", "sas_p", {"optimiser": "soap"}),
    *(
        Trial(name, name)
        for name in ("pre_norm_gated", "pre_norm_softmax1", "pre_norm_sink", "pre_norm_qk_norm", "peri_norm")
    ),
)
"""What is tried: parts of the published blocks exchanged for one another, other optimisers, and the remedies
of peers, which keep all parameters and so cannot win, for comparison."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is searched, and how each trial is trained and timed."""

    job: Job = field(default_factory=provoking)
    """Text, shape and training; by default a setting in which pre_norm grows outliers."""
    trials: tuple[Trial, ...] = TRIALS
    seeds: tuple[int, ...] = (0, 1, 2)
    """Repetitions of the finalists; every trial runs with the first."""
    finalists: int = 5
    """Trials that are repeated with all seeds, beside the base."""
    speed_width: int = 768
    """Width at which training speed is measured: at small widths it says little."""
    speed_depth: int = 12
    """Layers at which training speed is measured."""
    speed_rounds: int = 6
    """Rounds, in turn with the base, of which the median counts; 0 measures no speed."""
    name: str = "five_axes"
    """Name of the run folder."""


@dataclass(frozen=True)
class Axes:
    """Where one trial stands against the base; means over its seeds."""

    trial: str
    seeds: int
    loss: float
    """Nats a token."""
    loss_excess: float
    """Loss above the base's with the same seeds, in nats a token."""
    loss_error: float
    """Its standard error; NaN for one seed."""
    parameters: float
    """Numbers learnt in the blocks, × the base."""
    speed: float
    """Training throughput, × the base."""
    kurtosis: float
    """Largest neuron kurtosis of any layer; the worst seed's."""
    int8: float
    """Loss added by int8, as a share of the loss; the worst seed's."""

    def met(self) -> dict[str, bool]:
        """Say which of the five axes are won; a number that is missing wins nothing."""
        return {
            "loss": self.loss_excess <= 0,
            "parameters": self.parameters <= MOST_PARAMETERS,
            "speed": self.speed >= LEAST_SPEED,
            "kurtosis": self.kurtosis < MOST_KURTOSIS,
            "int8": self.int8 < MOST_INT8,
        }


@dataclass(frozen=True)
class Study:
    """What the search found; trials best first: by axes won, then by loss."""

    folder: Path
    axes: tuple[Axes, ...]
    facts: dict[str, str]

    @property
    def winners(self) -> list[str]:
        """The trials that win on all five axes with every seed."""
        most = max(each.seeds for each in self.axes)
        return [each.trial for each in self.axes if all(each.met().values()) and each.seeds == most]


def five_axes(config: StudyConfig, *, console: Console | None = None) -> Study:
    """Train, examine and time every trial; the best are repeated with more seeds; all is recorded.

    A study that was stopped goes on where it was.

    Raises: InputError for settings that cannot be used; StoppedError after a signal.
    """
    console = console or Console()
    for name, block in CANDIDATES.items():
        BLOCKS.setdefault(name, block)
    if not config.trials or config.trials[0].name != BASE:
        raise InputError(f"the first trial of a study must be {BASE}, which the others are set against")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise InputError(f"a study needs one seed or more, each once, got {list(config.seeds)}")
    config.job.check()
    folder = run_folder(config.job.runs, config.name)
    with console.status("reading and tokenising the text"):
        corpus = config.job.data.load()
    facts = {**text_facts(corpus), **_settings(config)}
    print_facts(console, facts)
    first = run_trials(config.job, config.trials, config.seeds[:1], corpus, folder, console)
    speeds = _speeds(config, corpus.vocabulary, folder / "speeds.json", console)
    ranked = ranking(first, speeds)
    best = {each.trial for each in ranked[: config.finalists]} | {BASE}
    finalists = [trial for trial in config.trials if trial.name in best]
    repeated = run_trials(config.job, finalists, config.seeds[1:], corpus, folder, console)
    outcomes = {name: found + repeated.get(name, []) for name, found in first.items()}
    axes = ranking(outcomes, speeds)
    write_json(folder / "result.json", {"facts": facts, "axes": [asdict(each) for each in axes]})
    return Study(folder, tuple(axes), facts)


def _settings(config: StudyConfig) -> dict[str, str]:
    """Say how trials are trained, where they do not say it themselves, and timed."""
    training, shape = config.job.training, config.job.shape
    return {
        "model": f"{shape.depth} layers, width {shape.width}, context {shape.context}",
        "training": f"{training.steps:,} steps of {training.batch} sequences, {training.optimiser}, learning "
        f"rate {training.learning_rate:g} {training.schedule}, weight decay {training.weight_decay:g}",
        "seeds": ", ".join(map(str, config.seeds)),
        "speed": f"training steps at width {config.speed_width}, {config.speed_depth} layers, "
        f"{shape.context} tokens",
    }


def ranking(outcomes: Outcomes, speeds: Mapping[str, float]) -> list[Axes]:
    """Return where every trial stands, best first: by the number of axes won, then by loss."""
    found = [_axes(name, outcomes, speeds.get(name, nan)) for name in outcomes]
    return sorted(found, key=lambda each: (-sum(each.met().values()), _last(each.loss_excess)))


def _last(value: float) -> float:
    """Let what is not a number come last."""
    return value if value == value else float("inf")


def _axes(name: str, outcomes: Outcomes, speed: float) -> Axes:
    pairs = list(zip(outcomes[name], outcomes[BASE], strict=False))
    results = [one for one, _ in pairs if one is not None]
    if len(results) < len(pairs) or any(base is None for _, base in pairs):
        return Axes(name, len(pairs), nan, nan, nan, nan, speed, nan, nan)
    gaps = [one.validation_loss - base.validation_loss for one, base in pairs if one and base]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else nan
    base = outcomes[BASE][0]
    assert base is not None
    return Axes(
        trial=name,
        seeds=len(pairs),
        loss=statistics.mean(one.validation_loss for one in results),
        loss_excess=statistics.mean(gaps),
        loss_error=error,
        parameters=results[0].block_parameters / base.block_parameters,
        speed=speed,
        kurtosis=max(one.max_neuron_kurtosis for one in results),
        int8=max(one.int8_gap / one.validation_loss for one in results),
    )


def _speeds(config: StudyConfig, vocabulary: int, path: Path, console: Console) -> dict[str, float]:
    """Return the training speed of every trial against the base's, timed in turn; once measured, it is read.

    SOAP works in bursts, every tenth step, which a few steps would miss: its speed is not measured.
    """
    if config.speed_rounds < 1:
        return {}
    known: dict[str, Any] = read_json(path) if path.exists() else {}
    base = _step(config.trials[0], config, vocabulary)
    for trial in track(config.trials, "timing", console=console, transient=True):
        if trial.name in known or trial.training.get("optimiser") == "soap":
            continue
        seconds = _in_turn(base, _step(trial, config, vocabulary), config.speed_rounds)
        known[trial.name] = {"ratio": statistics.median(b / a for b, a in seconds), "seconds": seconds}
        write_json(path, known)
    return {name: found["ratio"] for name, found in known.items()}


def _in_turn(base: Callable[[], None], step: Callable[[], None], rounds: int) -> list[tuple[float, float]]:
    """Return the seconds of both steps by round, after one round to warm up."""
    seconds: list[tuple[float, float]] = []
    for _ in range(1 + rounds):
        times = [time.perf_counter()]
        for each in (base, step):
            each()
            times.append(time.perf_counter())
        seconds.append((times[1] - times[0], times[2] - times[1]))
    return seconds[1:]


def _step(trial: Trial, config: StudyConfig, vocabulary: int) -> Callable[[], None]:
    """Return one training step of a trial at the width of the speed measurement."""
    job = trial.job(config.job, 0)
    shape: dict[str, Any] = asdict(job.shape)
    shape |= {"width": config.speed_width, "depth": config.speed_depth, "heads": config.speed_width // 64}
    shape |= {"mlp_width": None, "key_heads": None}
    model = build(TransformerConfig(vocabulary=vocabulary, block=trial.block, **shape), 0)
    optimiser = build_optimiser(job.training.optimiser, model, job.training.rates)
    random = torch.Generator().manual_seed(0)
    batch = torch.randint(vocabulary, (4, 2, job.shape.context), generator=random)

    def step() -> None:
        language_loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step
