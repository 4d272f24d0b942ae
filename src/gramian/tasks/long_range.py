"""How far networks on graphs see: what they learn of information that lies some edges away."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path

from rich.console import Console

from gramian.errors import DivergedError, InputError
from gramian.files import write_json
from gramian.tasks.graph_data import Source
from gramian.tasks.graph_models import GRED, Architecture
from gramian.tasks.graph_scores import LOWER
from gramian.tasks.graph_training import Schedule
from gramian.tasks.graphs import GraphsConfig, train_graphs
from gramian.train.run import open_run, read_json

ONE_HOP = "gred, 1 hop"
"""The control: the same network, of which every layer sees neighbours alone."""

EVERYWHERE = ("gps",)
"""Networks whose layers connect all nodes of a graph, at whatever distance."""

TASKS = ("distance_count", "ring_transfer")
"""Tasks of which the answer lies at one distance."""


@dataclass(frozen=True, kw_only=True)
class LongRangeStudy:
    """Which networks learn which tasks at which distances; all have equal depth, size and training."""

    tasks: tuple[str, ...] = TASKS
    distances: tuple[int, ...] = (2, 5, 10, 20, 40)
    """Edges between a node and what it must know; 2 is within reach of four layers of one hop each."""
    networks: tuple[str, ...] = (GRED, ONE_HOP, "gcn", "gine", "gps")
    sizes: tuple[int, int, int] = (48, 8, 24)
    """Graphs to learn from, to choose by and to report on, the same for all networks and seeds."""
    architecture: Architecture = field(
        default_factory=lambda: Architecture(parameters=10_000, layers=4, dropout=0.0, r_min=0.95)
    )
    schedule: Schedule = field(
        default_factory=lambda: Schedule(
            epochs=12, batch=2, learning_rates=(4e-3,), weight_decay=0.01, device="cpu"
        )
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and batches."""

    def check(self) -> None:
        """Raise InputError (MissingExtraError) naming the first setting that cannot be used."""
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise InputError(f"unknown task {unknown[0]!r}; choose {' or '.join(TASKS)}")
        for name in ("tasks", "distances", "networks"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} must be one or more different values, got {list(values)}")
        if min(self.distances) < 2:
            raise InputError(f"distances must be at least 2, got {min(self.distances)}")
        if min(self.sizes) < 1:
            raise InputError(f"sizes must be at least 1, got {self.sizes}")
        for control in (False, True):
            if (job := self.job(self.tasks[0], self.distances[0], control=control)) is not None:
                job.check()

    def job(self, task: str, distance: int, *, control: bool) -> GraphsConfig | None:
        """Return what is trained on one task at one distance: the networks, or the control; None for none."""
        models = tuple(name for name in self.networks if name != ONE_HOP)
        if control:
            models = (GRED,) * (ONE_HOP in self.networks)
        if not models:
            return None
        hops = 1 if control else self.architecture.hops
        return GraphsConfig(
            source=Source(data=task, distance=distance, sizes=self.sizes),
            model=models[0],
            compare=models[1:],
            architecture=replace(self.architecture, hops=hops),
            schedule=self.schedule,
            seeds=self.seeds,
            name=f"{task}-{distance}" + "-one-hop" * control,
        )


@dataclass(frozen=True)
class Sight:
    """What one network with one seed learnt of what lies at one distance."""

    task: str
    distance: int
    network: str
    seed: int
    metric: str
    score: float
    """Test metric of the weights that do best on the validation part."""
    constant: float
    """The metric of the best constant prediction."""
    reach: float
    """Edges between a node and the farthest that can change its output."""
    parameters: int
    epoch: int
    """Of the weights that were judged."""
    seconds: float
    """Of training."""

    @property
    def skill(self) -> float:
        """The share of the best constant's error that is gone: 1 when nothing is wrong, 0 for the constant.

        1 − e/e_constant,  e the mean absolute error, or the share of wrong classes
        """
        error, base = self.score, self.constant
        if self.metric not in LOWER:
            error, base = 1 - error, 1 - base
        return 1 - error / base


def reach(network: str, layers: int, hops: int) -> float:
    """Return how many edges away a node can change another's output: L, or L times the hops of a filter.

    Holds: exactly, at most; ∞ for attention between all nodes of a graph.
    """
    if network in EVERYWHERE:
        return inf
    return layers * hops if network == GRED else layers


def run_long_range(study: LongRangeStudy, folder: Path, console: Console | None = None) -> list[Sight]:
    """Train every network on every task at every distance; what a stopped study has done is not done again.

    A network that diverges has no row. Rows are kept in a file a task and distance, beside the run folders.

    Raises: InputError for settings that cannot be used, before anything is trained, and for a folder of
        another study; StoppedError after a signal, saved.
    """
    console = console or Console()
    study.check()
    run = open_run(folder, study, resume=True)
    found = []
    for task in study.tasks:
        for distance in study.distances:
            place = run.folder / f"{task}-{distance}.json"
            if not place.exists():
                console.print(f"{task} at distance {distance}", highlight=False)
                write_json(
                    place, [asdict(sight) for sight in _sights(study, task, distance, folder, console)]
                )
            found += [Sight(**row) for row in read_json(place)]
    return found


def _sights(study: LongRangeStudy, task: str, distance: int, folder: Path, console: Console) -> list[Sight]:
    sights: list[Sight] = []
    for control in (False, True):
        job = study.job(task, distance, control=control)
        if job is None:
            continue
        try:
            found = train_graphs(replace(job, runs=folder), resume=True, console=console)
        except DivergedError as error:
            console.print(str(error), highlight=False, markup=False)
            continue
        for outcome in (each for outcomes in found.outcomes.values() for each in outcomes):
            sights.append(
                Sight(
                    task=task,
                    distance=distance,
                    network=ONE_HOP if control else outcome.model,
                    seed=outcome.seed,
                    metric=found.metric,
                    score=outcome.test,
                    constant=found.constant,
                    reach=reach(outcome.model, study.architecture.layers, found.hops),
                    parameters=outcome.parameters,
                    epoch=outcome.epoch,
                    seconds=outcome.seconds,
                )
            )
    return sights


def by_network(sights: Sequence[Sight]) -> Mapping[tuple[str, int], Mapping[str, list[Sight]]]:
    """Return task, distance -> network -> what each seed came to, in order."""
    cells: dict[tuple[str, int], dict[str, list[Sight]]] = {}
    for sight in sights:
        cells.setdefault((sight.task, sight.distance), {}).setdefault(sight.network, []).append(sight)
    return cells
