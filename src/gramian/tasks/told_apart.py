"""Which graphs a network tells apart: pairs that neighbours alone do not, and circles with skip links."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from gramian.data.graph_generators import NODES
from gramian.data.random_graphs import circle
from gramian.errors import InputError
from gramian.files import write_json
from gramian.interop.message_passing import MessagePassingNetwork, message_passing_layers
from gramian.nn.distances import distance_shells
from gramian.nn.graph import DistanceFilter
from gramian.nn.graph_network import GraphNetwork, TypeEncoder, head
from gramian.tasks.graph_data import Source
from gramian.tasks.graph_models import GRED, Architecture
from gramian.tasks.graph_training import Schedule
from gramian.tasks.graphs import GraphsConfig, train_graphs
from gramian.train.run import open_run, read_json

WIDTH, DEPTH, HOPS = 6, 3, 6
"""Of the untrained networks that pairs are shown to."""


def _edges(*rings: Sequence[int], links: Sequence[tuple[int, int]] = ()) -> Tensor:
    pairs = [*links, *(pair for ring in rings for pair in [*pairwise(ring), (ring[-1], ring[0])])]
    one_way = torch.tensor(pairs).T
    return torch.cat((one_way, one_way.flip(0)), 1)


def _torus(steps: set[tuple[int, int]]) -> Tensor:
    """Return the 4 × 4 grid on a torus whose nodes are linked to those some steps away."""
    places = [(a, b) for a in range(4) for b in range(4)]
    pairs = [
        (4 * a + b, 4 * c + d) for a, b in places for c, d in places if ((c - a) % 4, (d - b) % 4) in steps
    ]
    return torch.tensor(pairs).T


ROOK = {(step, 0) for step in (1, 2, 3)} | {(0, step) for step in (1, 2, 3)}
SHRIKHANDE = {(0, 1), (0, 3), (1, 0), (3, 0), (1, 1), (3, 3)}

PAIRS: Mapping[str, tuple[Tensor, Tensor]] = {
    "hexagon, two triangles": (circle(6, 1), _edges(range(3), range(3, 6))),
    "decalin, bicyclopentyl": (
        _edges(range(6), links=((0, 6), (6, 7), (7, 8), (8, 9), (9, 5))),
        _edges(range(5), range(5, 10), links=((0, 5),)),
    ),
    "rook, Shrikhande": (_torus(ROOK), _torus(SHRIKHANDE)),
    "circles with skips 6, 16": (circle(NODES, 1, 6), circle(NODES, 1, 16)),
}
"""Pairs of graphs that colour refinement (1-WL) does not tell apart, by name."""

SAME_DISTANCES = ("rook, Shrikhande", "circles with skips 6, 16")
"""Pairs whose nodes all have equally many others at every distance: no filter by distance tells them."""

MOST = 0.9
"""The best accuracy on circles with skip links of what sees equal nodes and distances alone: of the ten
classes two, skips 6 and 16, have 4, 8, 12, 10 and 6 nodes at the distances 1 to 5 from every node."""


@dataclass(frozen=True, kw_only=True)
class ApartStudy:
    """Which circles with skip links are learnt by which networks."""

    networks: tuple[str, ...] = (GRED, "gine")
    folds: tuple[int, ...] = (0, 1, 2)
    """Of the five; each trains a network anew."""
    architecture: Architecture = field(
        default_factory=lambda: Architecture(parameters=10_000, layers=2, dropout=0.0)
    )
    schedule: Schedule = field(
        default_factory=lambda: Schedule(
            epochs=60, batch=16, learning_rates=(5e-3,), weight_decay=0.01, device="cpu"
        )
    )

    def check(self) -> None:
        """Raise InputError (MissingExtraError) naming the first setting that cannot be used."""
        if len(set(self.folds)) < max(2, len(self.folds)) or not set(self.folds) <= set(range(5)):
            raise InputError(f"folds are two or more different ones of 0 to 4, got {list(self.folds)}")
        if not self.networks:
            raise InputError("which graphs are told apart is asked of at least one network")
        self.job(self.folds[0]).check()

    def job(self, fold: int) -> GraphsConfig:
        """Return what is trained on one fold."""
        return GraphsConfig(
            source=Source(data="csl", fold=fold),
            model=self.networks[0],
            compare=self.networks[1:],
            architecture=self.architecture,
            schedule=self.schedule,
            seeds=(fold,),
            name=f"fold-{fold}",
        )


@dataclass(frozen=True)
class Told:
    """How a network tells some graphs apart."""

    graphs: str
    network: str
    apart: tuple[float, ...]
    """Of a pair: the largest difference of untrained networks' outputs over the largest output, by seed. Of
    circles: test accuracy by fold."""


CIRCLES = "circles with skip links"


def run_apart(
    study: ApartStudy, seeds: Sequence[int], folder: Path, console: Console | None = None
) -> list[Told]:
    """Show pairs to untrained networks and train on circles; what was trained is not trained again.

    Raises: InputError for settings that cannot be used, and for a folder of another study.
    """
    console = console or Console()
    study.check()
    run = open_run(folder, study, resume=True)
    found = [
        Told(name, network, tuple(difference(network, *pair, seed) for seed in seeds))
        for name, pair in PAIRS.items()
        for network in study.networks
    ]
    accuracies: dict[str, list[float]] = {network: [] for network in study.networks}
    for fold in study.folds:
        place = run.folder / f"fold-{fold}.json"
        if not place.exists():
            outcomes = train_graphs(
                replace(study.job(fold), runs=folder), resume=True, console=console
            ).outcomes
            write_json(place, {name: asdict(each[0]) for name, each in outcomes.items() if each})
        for name, outcome in read_json(place).items():
            accuracies[name].append(outcome["test"])
    return found + [Told(CIRCLES, name, tuple(values)) for name, values in accuracies.items()]


def difference(network: str, one: Tensor, other: Tensor, seed: int) -> float:
    """Return how far an untrained network's outputs for two graphs differ: max |y − y'| / max |y|.

    Networks have three layers, a sum over the nodes, 6 hops where they filter, random numbers in every
    parameter (biases that are zero would hide what biases do), and float64.

    Raises: InputError for an unknown network.
    Holds: exactly, to rounding.
    """
    model = _untrained(network, seed)
    nodes = int(one.max()) + 1
    types = torch.zeros(nodes, dtype=torch.long)
    with torch.no_grad():
        a, b = (model(types, distance_shells(edges, nodes, HOPS + 1), edges) for edges in (one, other))
    return ((a - b).abs().max() / a.abs().max()).item()


def _untrained(network: str, seed: int) -> GraphNetwork:
    filters = network == GRED
    layers = (
        [DistanceFilter(WIDTH, WIDTH) for _ in range(DEPTH)]
        if filters
        else message_passing_layers(network, DEPTH, 4 * WIDTH, 0.0, False)
    )
    width = WIDTH if filters else 4 * WIDTH
    kind: Callable[..., GraphNetwork] = GraphNetwork if filters else MessagePassingNetwork
    model = kind(TypeEncoder([1], width), layers, head(width, 4), readout="sum", seed=seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    return model
