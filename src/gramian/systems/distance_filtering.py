"""Graphs filtered by distance: far information is learnt, more is told apart, and what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil, inf, nan
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from gramian.errors import InputError
from gramian.files import write_json
from gramian.report import save
from gramian.report.long_range import skill_by_distance
from gramian.systems.claims import Finding, averaged, paired
from gramian.tasks.graph_data import Source
from gramian.tasks.graph_models import GRED, Architecture
from gramian.tasks.graph_scores import LOWER
from gramian.tasks.graph_training import Schedule
from gramian.tasks.graphs import GraphsConfig, train_graphs
from gramian.tasks.language import run_folder
from gramian.tasks.layer_costs import GPS, PAIRS, Cost, CostStudy, ratios, run_costs
from gramian.tasks.long_range import ONE_HOP, LongRangeStudy, Sight, by_network, run_long_range
from gramian.tasks.told_apart import CIRCLES, MOST, SAME_DISTANCES, ApartStudy, Told, run_apart

CLAIM = """A network on graphs that filters what lies around a node by distance, with a linear recurrence over
shells, harnesses information that is far away, tells more graphs apart than message passing between
neighbours, and on graphs that are not small costs less than graph transformers with features of pairs (Ding
et al. 2024, arXiv 2312.01538)."""

LEARNT, NOTHING = 0.5, 0.1
"""Skill from which on a task counts as learnt, and up to which as not."""

NEAR = 0.3
"""Skill that standard networks must have of what is within their reach."""

DIFFERENT, ROUNDING = 1e-4, 1e-9
"""Relative differences of outputs in float64 from which on graphs are told apart, and up to which not."""

LARGE = 200
"""Nodes from which on costs are compared."""

LOST = (nan, nan)
"""What is said of a network too few of whose trainings ended; no finding holds for it."""

PUBLISHED: Mapping[str, tuple[str, float]] = {
    "zinc": ("mae", 0.077),
    "peptides": ("average_precision", 0.7085),
    "pattern": ("accuracy", 0.86759),
    "cluster": ("accuracy", 0.78495),
}
"""Setting -> the metric and its published value on the test part."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained and measured to see whether the claim holds; a part that is None is left out."""

    counts: LongRangeStudy | None = field(default_factory=lambda: LongRangeStudy(tasks=("distance_count",)))
    """Marked nodes at one distance, counted in trees."""
    rings: LongRangeStudy | None = field(
        default_factory=lambda: LongRangeStudy(
            tasks=("ring_transfer",),
            sizes=(20, 5, 5),
            schedule=replace(LongRangeStudy().schedule, epochs=16),
        )
    )
    """What the node on the other side of a ring holds; the five rings of each distance are in every part."""
    apart: ApartStudy | None = field(default_factory=ApartStudy)
    """Graphs that are to be told apart."""
    costs: CostStudy | None = field(default_factory=CostStudy)
    """Layers on growing graphs."""
    graphs: GraphsConfig | None = None
    """A data set, with standard networks beside."""
    setting: str = ""
    """Name of the published setting that `graphs` is."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Repetitions; at least two give a standard error."""
    runs: Path = Path("runs")
    """Folder of run folders."""
    name: str = "distance_filtering"
    """Name of the run folder."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"a standard error needs two different seeds or more, got {list(self.seeds)}")
        for part in (self.counts, self.rings, self.apart, self.costs, self.graphs):
            if part is not None:
                part.check()


@dataclass(frozen=True)
class Trained:
    """What one network with one seed came to on a data set."""

    setting: str
    network: str
    seed: int
    metric: str
    test: float
    validation: float
    constant: float
    parameters: int


@dataclass(frozen=True)
class Result:
    """What was measured."""

    sights: list[Sight] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)


def quick() -> Config:
    """Return settings of a quarter of an hour on one quiet core: graphs that are made, networks of 10,000."""
    return Config()


def paper(which: str = "zinc") -> Config:
    """Return the published settings for zinc, peptides (func), pattern or cluster.

    Depth, hops, λ, dropout, decay, epochs and batches are as published, and so are widths but for PATTERN (68
    for 72); GINE and GPS of as many layers and parameters are trained beside. What differs: states are as
    wide as features; PATTERN and CLUSTER have the encoder, the head and the warm-up of the others, and 3 hops
    where published filters look as far as each file does; only peptides stop early. zinc and peptides need
    files; PATTERN and CLUSTER are made by their recipes when none is given.

    Raises: InputError for another name.
    Source: Ding et al. 2024, arXiv 2312.01538, and the authors' code.
    """
    settings = {
        "zinc": (Architecture(parameters=483_049, layers=11, hops=4, r_min=0.9), 0.1, 2000, "zinc"),
        "peptides": (Architecture(parameters=535_226, layers=8, hops=39, r_min=0.95), 0.2, 200, "peptides"),
        "pattern": (Architecture(parameters=400_010, layers=10, hops=3, r_min=0.5), 0.1, 100, "pattern"),
        "cluster": (Architecture(parameters=544_710, layers=16, hops=3, r_min=0.9), 0.2, 100, "cluster"),
    }
    if which not in settings:
        raise InputError(f"unknown setting {which!r}; choose quick, {', '.join(settings)}")
    architecture, decay, epochs, data = settings[which]
    made = {"pattern": (10_000, 2000, 2000), "cluster": (10_000, 1000, 1000)}
    graphs = GraphsConfig(
        source=Source(data=data, sizes=made.get(which)),
        compare=("gine", "gps"),
        architecture=replace(architecture, dropout=0.2, readout="sum"),
        schedule=Schedule(epochs=epochs, patience=50 if which == "peptides" else None, weight_decay=decay),
        name=which,
    )
    name = f"distance_filtering_{which}"
    return Config(counts=None, rings=None, apart=None, costs=None, graphs=graphs, setting=which, name=name)


def given(
    config: Config, *, runs: Path, graphs: Path | None, steps: int | None, seeds: Sequence[int]
) -> Config:
    """Return the settings with graphs, numbers of steps and repetitions as asked.

    Steps are rounded up to whole epochs where graphs are made; on a data set, one epoch takes as many graphs
    as the steps need.

    Raises: InputError for graphs where none are read, and for zinc and peptides without.
    """
    seeds = tuple(seeds) or config.seeds
    config = replace(config, runs=runs, seeds=seeds)
    for name in ("counts", "rings"):
        if (study := getattr(config, name)) is not None:
            epochs = study.schedule.epochs
            if steps is not None:
                epochs = ceil(steps / max(study.sizes[0] // study.schedule.batch, 1))
            study = replace(study, seeds=seeds, schedule=replace(study.schedule, epochs=epochs))
            config = replace(config, **{name: study})
    if config.apart is not None and steps is not None:
        schedule = replace(config.apart.schedule, epochs=ceil(steps / (90 // config.apart.schedule.batch)))
        config = replace(config, apart=replace(config.apart, schedule=schedule))
    if config.graphs is None:
        if graphs is not None:
            raise InputError(f"the quick size makes its graphs; --graphs is for {', '.join(PUBLISHED)}")
        return config
    source = config.graphs.source
    if graphs is not None:
        source = replace(source, data=str(graphs), sizes=None)
    elif source.sizes is None:
        raise InputError(f"the setting {config.setting} needs --graphs: a file or folder of graphs")
    job = replace(config.graphs, source=source, seeds=seeds)
    if steps is not None:
        source = replace(source, count=steps * job.schedule.batch)
        job = replace(job, source=source, schedule=replace(job.schedule, epochs=1))
    return replace(config, graphs=job)


def run(config: Config, console: Console | None = None) -> Result:
    """Train and measure; what a stopped run has done is not done again.

    Raises: InputError for settings or graphs that cannot be used; DivergedError when nothing was learnt.
    """
    console = console or Console()
    config.check()
    folder = run_folder(config.runs, config.name)
    apart, costs, graphs = config.apart, config.costs, config.graphs
    told = [] if apart is None else run_apart(apart, config.seeds, folder / "apart", console)
    measured = [] if costs is None else run_costs(costs, folder / "costs", console)
    seen: list[Sight] = []
    for name, study in {"counts": config.counts, "rings": config.rings}.items():
        if study is not None:
            seen += run_long_range(study, folder / name, console)
    trained = [] if graphs is None else _trained(config.setting, replace(graphs, runs=folder), console)
    result = Result(seen, told, measured, trained)
    write_json(folder / "result.json", asdict(result))
    if seen:
        save(figure_of(seen), folder / "long_range.svg")
    return result


def _trained(setting: str, job: GraphsConfig, console: Console) -> list[Trained]:
    found = train_graphs(job, resume=True, console=console)
    return [
        Trained(setting, o.model, o.seed, found.metric, o.test, o.validation, found.constant, o.parameters)
        for outcomes in found.outcomes.values()
        for o in outcomes
    ]


def figure_of(sights: Sequence[Sight]) -> Figure:
    """Return skill by distance, a panel a task, with a mark where the shortest sight ends."""
    panels: dict[str, dict[str, dict[int, list[float]]]] = {}
    for sight in sights:
        lines = panels.setdefault(sight.task.replace("_", " "), {}).setdefault(sight.network, {})
        lines.setdefault(sight.distance, []).append(sight.skill)
    return skill_by_distance(panels, min(each.reach for each in sights))


def check(result: Result) -> list[Finding]:
    """Return what the claim stands or falls with; networks that cannot see so far must fail."""
    return [
        *_sight_findings(result.sights),
        *_apart_findings(result.told),
        *_cost_findings(result.costs),
        *_trained_findings(result.trained),
    ]


def _sight_findings(sights: Sequence[Sight]) -> list[Finding]:
    """Ask that GRED learns at every distance, and that networks learn nothing of what is twice too far.

    Between its reach and twice that, a network may still learn from what leads there. Standard networks must
    learn what is within their reach, or else their failing beyond it says nothing.
    """
    findings = []
    for (task, distance), networks in by_network(sights).items():
        skills = {name: [each.skill for each in group] for name, group in networks.items()}
        for name, group in networks.items():
            at, value = f"{name}, {task} at {distance}", _average(skills[name])
            if name == GRED:
                findings.append(Finding(f"skill of {at}", *value, LEARNT, below=False))
            elif distance >= 2 * group[0].reach:
                findings.append(Finding(f"skill of {at} (out of its reach)", *value, NOTHING, below=True))
            elif distance > group[0].reach and len(skills.get(GRED, [])) == len(group) > 1:
                ahead = paired(skills[GRED], skills[name])
                findings.append(Finding(f"skill that {GRED} is ahead of {at}", *ahead, 0.2, below=False))
            elif distance <= group[0].reach < inf and name != ONE_HOP:
                findings.append(Finding(f"skill of {at} (within reach)", *value, NEAR, below=False))
    return findings


def _apart_findings(told: Sequence[Told]) -> list[Finding]:
    """Ask that pairs are told unless their distances are the same, and all circles but two classes."""
    findings = []
    for each in told:
        what = f"{each.graphs} by {each.network}"
        if each.graphs == CIRCLES:
            value = _average(each.apart)
            filters = each.network == GRED
            bound = MOST - 0.01 if filters else 0.2
            findings.append(Finding(f"accuracy on {what}", *value, bound, below=not filters))
        elif each.network == GRED and each.graphs not in SAME_DISTANCES:
            findings.append(
                Finding(f"least difference of {what}", min(each.apart), 0.0, DIFFERENT, below=False)
            )
        else:
            findings.append(Finding(f"difference of {what}", max(each.apart), 0.0, ROUNDING, below=True))
    return findings


def _cost_findings(costs: Sequence[Cost]) -> list[Finding]:
    """Ask that a filter is cheaper than features of pairs; times are shown, not judged.

    Against attention between nodes alone it is asked for where shells are few and graphs are largest.
    """
    findings = []
    readings = {"operations": lambda cost: cost.flops, "memory": lambda cost: cost.peak}
    for what, reading in readings.items():
        for (family, nodes), ratio in ratios(costs, PAIRS, reading).items():
            if nodes >= LARGE:
                text = f"{what} of {GRED} over features of pairs, {family} of {nodes} nodes"
                findings.append(Finding(text, ratio, 0.0, 1.0, below=True))
        few = {cell: ratio for cell, ratio in ratios(costs, GPS, reading).items() if cell[0] == "blocks"}
        if few:
            largest = max(few, key=lambda cell: cell[1])
            text = f"{what} of {GRED} over {GPS}, blocks of {largest[1]} nodes"
            findings.append(Finding(text, few[largest], 0.0, 1.0, below=True))
    return findings


def _trained_findings(trained: Sequence[Trained]) -> list[Finding]:
    """Ask for the published metric to within a tenth of the error, and to be ahead of standard networks."""
    groups: dict[str, list[Trained]] = {}
    for each in trained:
        groups.setdefault(each.network, []).append(each)
    if GRED not in groups:
        return []
    ours = groups[GRED]
    metric, published = PUBLISHED[ours[0].setting]
    lower = metric in LOWER
    value = _average([each.test for each in ours])
    bound = published * 1.1 if lower else published - 0.1 * (1 - published)
    at = f"{metric} on {ours[0].setting}"
    findings = [Finding(f"{at} (published {published:g})", *value, bound, below=lower)]
    for name, group in groups.items():
        if name == GRED:
            continue
        ends = [each.test for each in group], [each.test for each in ours]
        ahead = paired(*(ends if lower else ends[::-1])) if len(group) == len(ours) > 1 else LOST
        findings.append(Finding(f"{at} that {GRED} is ahead of {name}", *ahead, 0.0, below=False))
    return findings


def _average(values: Sequence[float]) -> tuple[float, float]:
    return averaged(values) if len(values) > 1 else LOST


def table(result: Result) -> list[Mapping[str, Any]]:
    """Return one row a task and distance, skills by network; or one row a network on a data set."""
    if result.trained:
        return _trained_table(result.trained)
    cells = by_network(result.sights)
    names = list(dict.fromkeys(each.network for each in result.sights))
    return [
        {"task": task.replace("_", " "), "distance": str(distance)}
        | {name: _written([each.skill for each in networks.get(name, [])]) for name in names}
        for (task, distance), networks in cells.items()
    ]


def _trained_table(trained: Sequence[Trained]) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for network in dict.fromkeys(each.network for each in trained):
        group = [each for each in trained if each.network == network]
        rows.append(
            {
                "network": network,
                "parameters": f"{group[0].parameters:,}",
                f"test {group[0].metric}": _written([each.test for each in group]),
                "validation": _written([each.validation for each in group]),
                "best constant": f"{group[0].constant:.3f}",
                "published": f"{PUBLISHED[group[0].setting][1]:g}" if network == GRED else "",
            }
        )
    return rows


def start_table(result: Result) -> list[Mapping[str, Any]]:
    """Return one row a network: differences of pairs, untrained, and accuracy on circles."""
    rows: dict[str, dict[str, str]] = {}
    for each in result.told:
        row = rows.setdefault(each.network, {"network": each.network})
        circles = each.graphs == CIRCLES
        row[each.graphs] = _written(each.apart) if circles else f"{min(each.apart):.1g}"
    return list(rows.values())


def path_table(result: Result) -> list[Mapping[str, Any]]:
    """Return one row a graph and layer: operations, memory and time, forward and backward."""
    return [
        {
            "graph": f"{each.family}, {each.nodes} nodes",
            "layer": each.layer,
            "parameters": f"{each.parameters:,}",
            "rows of shells": f"{each.shells:,}" if each.layer == GRED else "",
            "operations, 10⁶": f"{each.flops / 1e6:,.0f}",
            "memory, MB": f"{each.peak / 1e6:,.2f}",
            "milliseconds": f"{1e3 * each.seconds:,.1f}",
        }
        for each in result.costs
    ]


def _written(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "—"
    return "{:.3f} ± {:.3f}".format(*averaged(values))
