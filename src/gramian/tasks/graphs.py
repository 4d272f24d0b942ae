"""Graphs in, a trained network out: filtered by distance, beside standard layers in the same loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from statistics import mean, stdev

import torch
from rich.console import Console
from rich.progress import Progress

from gramian.data.graph_splits import Split
from gramian.data.graphs import Graphs
from gramian.errors import DivergedError, InputError
from gramian.tasks.graph_data import Sampler, Source
from gramian.tasks.graph_models import GRED, Architecture, build_network, check_batches, check_models
from gramian.tasks.graph_scores import METRICS, better, constant_score
from gramian.tasks.graph_training import Outcome, Schedule, Trial, concluded, evaluations, prepare
from gramian.tasks.language import run_folder
from gramian.train.run import SETTINGS, Run, open_run
from gramian.train.side_by_side import train_side_by_side


@dataclass(frozen=True, kw_only=True)
class GraphsConfig:
    """Train a network on graphs, and standard ones beside it."""

    source: Source = field(default_factory=Source)
    model: str = GRED
    """gred, gcn, gine, gated_gcn or gps."""
    compare: tuple[str, ...] = ()
    """Networks that are trained beside it, in the same loop, within the same number of parameters."""
    architecture: Architecture = field(default_factory=Architecture)
    schedule: Schedule = field(default_factory=Schedule)
    seeds: tuple[int, ...] = (0,)
    """Seeds of weights and batches; every network is trained with each."""
    runs: Path = Path("runs")
    """Folder of run folders."""
    name: str = "graphs"
    """Name of the run folder."""

    @property
    def models(self) -> tuple[str, ...]:
        """All networks, the one asked for first."""
        return (self.model, *self.compare)

    def check(self) -> None:
        """Raise InputError (MissingExtraError) naming the first setting that cannot be used."""
        self.source.check()
        self.architecture.check()
        self.schedule.check()
        check_models(self.models)
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds are different numbers from 0 on, got {self.seeds}")

    def trial(self, model: str, learning_rate: float, seed: int) -> Trial:
        """Return what determines the run of one network with one learning rate and one seed."""
        return Trial(
            model=model,
            learning_rate=learning_rate,
            seed=seed,
            source=self.source,
            architecture=self.architecture,
            schedule=self.schedule,
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """What became of all networks on some graphs."""

    graphs: Graphs
    split: Split
    hops: int
    """How far filters look."""
    metric: str
    constant: float
    """The metric of the best constant prediction on the test part."""
    outcomes: Mapping[str, tuple[Outcome, ...]]
    """network -> outcomes by seed with the learning rate that was kept; those that diverged are not there."""
    tried: tuple[Outcome, ...]
    """Outcomes of the first seed with every learning rate."""
    folder: Path

    def evaluations(self, outcome: Outcome) -> list[dict[str, float]]:
        """Return the evaluations behind an outcome, an epoch each."""
        return evaluations(Run(trial_folder(self.folder, outcome.model, outcome.learning_rate, outcome.seed)))


def spread(values: list[float]) -> tuple[float, float]:
    """Return mean and standard deviation; nan for none, and the deviation of one."""
    return (mean(values) if values else nan), (stdev(values) if len(values) > 1 else nan)


def trial_folder(folder: Path, model: str, learning_rate: float, seed: int) -> Path:
    """Return the run folder of one network with one learning rate and one seed."""
    return folder / f"{model}-rate-{learning_rate:g}-seed-{seed}"


def train_graphs(
    config: GraphsConfig, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Comparison:
    """Train every network with every seed, and judge the weights that do best on the validation part.

    A network with a seed has a run folder of its own inside; what a stopped job has done is not done again.

    Raises: InputError for settings or graphs that cannot be used, before anything is trained; StoppedError
        after a signal, saved; DivergedError when the loss of every network becomes infinite.
    """
    console = console or Console()
    config.check()
    folder, settings = run_folder(config.runs, config.name), replace(config, runs=Path())
    if (folder / SETTINGS).exists() and (resume or not overwrite):
        open_run(folder, settings, resume=resume)  # another run is refused before anything is read
    sampler = _sampler(config, console)
    graphs, split = sampler.graphs, sampler.split
    for line in (graphs.text(), _sizes(split, sampler.hops)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    run = open_run(folder, settings, resume=resume, overwrite=overwrite)
    metric = METRICS[graphs.task]
    outcomes: dict[str, tuple[Outcome, ...]] = {}
    tried: list[Outcome] = []
    for model in config.models:
        outcomes[model], rates = _outcomes(config, model, metric, sampler, run.folder, console)
        tried += rates
    if not any(outcomes.values()):
        raise DivergedError("the training of every network diverged; try a lower learning rate")
    constant = constant_score(*sampler.targets(), graphs.task)
    return Comparison(graphs, split, sampler.hops, metric, constant, outcomes, tuple(tried), folder)


def _sampler(config: GraphsConfig, console: Console) -> Sampler:
    """Return the batches of the graphs, once it is sure that all networks can be built for them."""
    with console.status("reading the graphs"):
        graphs, split = config.source.load()
    filters = GRED in config.models
    check_batches(config.models, graphs, split, config.schedule.batch)
    for model in config.models:
        build_network(model, graphs, config.architecture, config.seeds[0])
    architecture = config.architecture if filters else replace(config.architecture, hops=0)
    with Progress(console=console, transient=True) as progress:
        sampler = Sampler(graphs, split, architecture, progress)
    if filters:  # what needs too much memory is refused before anything is written
        used = torch.cat((split.train, split.validation, split.test))
        sampler.sample(used[graphs.ptr.diff()[used].argmax()][None])
    return sampler


def _outcomes(
    config: GraphsConfig, model: str, metric: str, sampler: Sampler, folder: Path, console: Console
) -> tuple[tuple[Outcome, ...], list[Outcome]]:
    """Return the outcomes of a network by seed, and those of the first seed with every learning rate."""
    first, *others = config.seeds
    rates = [config.trial(model, rate, first) for rate in config.schedule.learning_rates]
    tried = [each for trial in rates if (each := _outcome(trial, sampler, folder, console)) is not None]
    if not tried:
        return (), []
    best = tried[0]
    for each in tried[1:]:
        best = each if better(metric, each.validation, best.validation) else best
    rest = [config.trial(model, best.learning_rate, seed) for seed in others]
    found = [each for trial in rest if (each := _outcome(trial, sampler, folder, console)) is not None]
    return (best, *found), tried


def _sizes(split: Split, hops: int) -> str:
    parts = f"{len(split.train):,} to learn from, {len(split.validation):,} to choose by"
    look = f"; filters look {hops} hops far" if hops else ""
    return f"{parts}, {len(split.test):,} to report on{look}"


def _outcome(trial: Trial, sampler: Sampler, folder: Path, console: Console) -> Outcome | None:
    """Train one network, or go on with it, or read what it found before; None where it diverged."""
    place = trial_folder(folder, trial.model, trial.learning_rate, trial.seed)
    known = Run(place).result()
    if known is not None:
        return None if "diverged" in known else Outcome(**known)
    trainer = prepare(trial, sampler, place)
    try:
        train_side_by_side(
            {f"{trial.model}, rate {trial.learning_rate:g}, seed {trial.seed}": trainer}, console
        )
    except DivergedError as error:
        console.print(str(error), highlight=False, markup=False)
        trainer.run.write_result({"diverged": str(error)})
        return None
    finally:
        trainer.close()
    return concluded(trial, trainer, sampler)
