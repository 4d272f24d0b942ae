"""What one layer on graphs costs, forward and backward, as graphs grow: operations, memory, time."""

import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gramian.data.random_graphs import block_model, edges_of, thin_tree
from gramian.errors import InputError
from gramian.files import write_json
from gramian.interop.message_passing import message_passing_layers
from gramian.nn.distances import distance_shells
from gramian.nn.graph import DistanceFilter
from gramian.nn.init import initialise_
from gramian.tasks.graph_models import GRED, parameters
from gramian.train.run import open_run, read_json

GPS, PAIRS = "gps", "pairs"
"""Attention between the nodes beside a convolution; attention with features of every pair of nodes."""

Step = Callable[[], None]


class PairAttention(nn.Module):
    """A layer of a graph transformer that keeps features e_ij of every pair of nodes, in its plainest form.

        ê_ij = relu((Q h_i + K h_j) ⊙ W e_ij + W' e_ij),   α_ij = softmax_j(a · ê_ij)
        h'_i = h_i + O Σ_j α_ij (V h_j + V' ê_ij),   e'_ij = e_ij + O' ê_ij

    The published layer has norms, an MLP and degree scalers as well, and a signed root before the relu: what
    is left out here makes it dearer. V' is taken after the sum over j, as its authors do.

    Shapes: (n, width), (n, n, width) -> (n, width), (n, n, width); one graph.
    Holds: exactly.
    Source: Ma et al. 2023, arXiv 2305.17589, eq. 2.
    """

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise InputError(f"the width is a multiple of the heads, got {width} and {heads}")
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.scale, self.shift, self.pair_out = (nn.Linear(width, width) for _ in range(3))
        self.score = nn.Parameter(torch.empty(heads, width // heads).normal_())
        self.pair_value = nn.Parameter(torch.empty(heads, width // heads, width // heads).normal_())

    def forward(self, h: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Attend."""
        both = self.query(h)[:, None] + self.key(h)[None]
        hidden = (both * self.scale(pairs) + self.shift(pairs)).relu()
        parts = hidden.unflatten(-1, (self.heads, -1))
        weights = (parts * self.score).sum(-1).softmax(1)
        values = torch.einsum("ijh,jhc->ihc", weights, self.value(h).unflatten(-1, (self.heads, -1)))
        of_pairs = torch.einsum("ijh,ijhc->ihc", weights, parts)
        values = values + torch.einsum("ihc,hcd->ihd", of_pairs, self.pair_value)
        return h + self.out(values.flatten(1)), pairs + self.pair_out(hidden)


@dataclass(frozen=True, kw_only=True)
class CostStudy:
    """Which layers are measured on which graphs."""

    layers: tuple[str, ...] = (GRED, GPS, PAIRS)
    families: tuple[str, ...] = ("tree", "blocks")
    """Long thin trees, as peptides are; dense communities, as PATTERN's are."""
    nodes: tuple[int, ...] = (25, 50, 100, 200, 400, 800)
    """Nodes of the one graph that passes through."""
    pair_nodes: int = 200
    """Most nodes that features of pairs are made for."""
    width: int = 64
    hops: int = 40
    """Farthest distance that a filter looks at."""
    dropout: float = 0.1
    """Rate with which layers are trained; attention keeps its weights for it."""
    repeats: int = 3
    """Times of which the middle is taken."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        for name, known in {"layers": (GRED, GPS, PAIRS), "families": tuple(FAMILIES)}.items():
            values = getattr(self, name)
            if not values or not set(values) <= set(known):
                raise InputError(f"{name} are one or several of {', '.join(known)}, got {', '.join(values)}")
        if not self.nodes or min(self.nodes) < 12 or self.repeats < 1 or self.hops < 1:
            raise InputError("costs need graphs of at least 12 nodes, a hop and a repetition")


@dataclass(frozen=True)
class Cost:
    """What one layer costs on one graph, forward and backward."""

    family: str
    nodes: int
    layer: str
    shells: int
    """Shells of the graph that are not empty, the nodes themselves included: what a filter's MLP maps."""
    parameters: int
    flops: int
    """Operations of matrix products, two a multiplication with its addition, and additions of sums over
    shells; elementwise maps are not counted for any layer."""
    peak: int
    """Most bytes that tensors hold at a time, parameters and the graph left out."""
    seconds: float
    """Of one thread as it is set; a machine in use makes it longer."""


class LiveBytes(TorchDispatchMode):
    """A context that notes the most bytes that tensors made inside it hold at a time.

    Workspace inside an operation is not seen.

    Holds: exactly, on any device.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the storages that are new."""
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if size and place not in self._held:
            self._held.add(place)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self._held.discard(place)
        self.now -= size


def run_costs(study: CostStudy, folder: Path, console: Console | None = None) -> list[Cost]:
    """Measure every layer on every graph; what was measured is not measured again.

    Raises: InputError for settings that cannot be used, and for a folder of another study.
    """
    console = console or Console()
    study.check()
    run = open_run(folder, study, resume=True)
    found = []
    for family in study.families:
        for nodes in study.nodes:
            for layer in study.layers:
                if layer == PAIRS and nodes > study.pair_nodes:
                    continue
                place = run.folder / f"{family}-{nodes}-{layer}.json"
                if not place.exists():
                    with console.status(f"{layer} on a graph of {nodes} nodes ({family})"):
                        write_json(place, asdict(cost_of(study, family, nodes, layer)))
                found.append(Cost(**read_json(place)))
    return found


def ratios(
    costs: Sequence[Cost], other: str, reading: Callable[[Cost], float]
) -> Mapping[tuple[str, int], float]:
    """Return family, nodes -> the cost of a filter over that of another layer."""
    table = {(each.family, each.nodes, each.layer): reading(each) for each in costs}
    cells = dict.fromkeys((each.family, each.nodes) for each in costs if each.layer == other)
    return {cell: table[*cell, GRED] / table[*cell, other] for cell in cells if (*cell, GRED) in table}


def cost_of(study: CostStudy, family: str, nodes: int, layer: str) -> Cost:
    """Measure one layer on one graph."""
    generator = torch.Generator().manual_seed(0)
    edges = FAMILIES[family](nodes, generator)
    shells = distance_shells(edges, nodes, study.hops + 1)
    graph = torch.zeros(nodes, dtype=torch.long)
    h = torch.randn(nodes, study.width, generator=generator, requires_grad=True)
    known = [h, edges, graph, *(value for value in vars(shells).values() if isinstance(value, Tensor))]
    if layer == GRED:
        model: nn.Module = DistanceFilter(study.width, study.width, dropout=study.dropout)
        given: tuple[Any, ...] = (shells,)
    elif layer == GPS:
        model = message_passing_layers(GPS, 1, study.width, study.dropout, False)[0]
        given = edges, None, graph
    else:
        model = PairAttention(study.width)
        given = (torch.randn(nodes, nodes, study.width, generator=generator, requires_grad=True),)
        known += given
    initialise_(model, 0)

    def step() -> None:
        torch.stack([part.sum() for part in tree_leaves(model(h, *given))]).sum().backward()

    return Cost(
        family,
        nodes,
        layer,
        nodes + len(shells.node),
        parameters(model),
        _flops(step),
        _peak(step, [*known, *model.parameters()]),
        median(_seconds(step) for _ in range(study.repeats)),
    )


def _flops(step: Step) -> int:
    def additions(table: Any, index: Any, *_: Any, **__: Any) -> int:
        return index[0] * table[1]

    sums = (torch.ops.aten._embedding_bag, torch.ops.aten._embedding_bag_forward_only)
    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(sums, additions))
    with sdpa_kernel(SDPBackend.MATH), counter:  # the fused kernel of CPUs is not counted
        step()
    return counter.get_total_flops()


def _peak(step: Step, known: list[Tensor]) -> int:
    with LiveBytes(known) as live:
        step()
    return live.peak


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _tree(nodes: int, generator: torch.Generator) -> Tensor:
    return edges_of(thin_tree(nodes, 3, generator))


def _blocks(nodes: int, generator: torch.Generator) -> Tensor:
    return edges_of(block_model(torch.arange(nodes) * 5 // nodes, 0.5, 0.35, generator))


FAMILIES: dict[str, Callable[[int, torch.Generator], Tensor]] = {"tree": _tree, "blocks": _blocks}
"""Graphs of any number of nodes by name."""
