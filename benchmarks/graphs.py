"""Layers that filter by distance against dense masks with a scan and against PyTorch Geometric's GPS.

Graphs are molecules of ZINC and peptides where their files are found (--data or $GRAMIAN_DATA, with rdkit),
else trees of like sizes, and PATTERN's by its recipe. Time is that of forward and backward by turns. Memory
is the resident peak of one step in a process of its own, less what it held before there were graphs: it
includes masks or shells, activations and gradients.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import scipy
import torch
import torch_geometric
from graphs_peer import (
    DenseScan,
    GCNNetwork,
    GPSNetwork,
    Graph,
    batch_masks,
    each_distances,
    each_masks,
    gps_layer,
    joined,
    molecules,
    of_size,
)
from side_by_side import ratio, timed, write_results
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gramian.data.graph_generators import pattern
from gramian.data.random_graphs import edges_of, thin_tree
from gramian.nn.distances import distance_shells
from gramian.nn.graph import DistanceFilter
from gramian.nn.graph_network import GraphNetwork, TypeEncoder, head
from gramian.nn.shells import DenseShells, Shells, batch_shells

FILES = {"zinc": "zinc_jtnn_valid.smi.txt", "peptides": "peptides_functional.csv.gz"}

SCAN, GPS = "dense masks and scan", "GPSConv, 4 heads"
OURS = {"ours": "ours, sparse", "dense": "ours, dense"}


@dataclass(frozen=True)
class Case:
    """A batch of graphs and a layer on it."""

    source: str
    width: int
    state: int
    count: int | None = None
    """Shells; as many as there are when None."""
    graphs: int = 32
    nodes: int = 0
    """Of every tree; drawn when 0."""
    data: str = ""

    def drawn(self) -> list[Graph]:
        """Return the graphs."""
        generator = torch.Generator().manual_seed(0)
        path = Path(self.data) / "molecules" / FILES.get(self.source, "")
        if self.source == "pattern":
            made = pattern((self.graphs, 1, 1))
            return [(made[place].edge_index, len(made[place].x)) for place in range(self.graphs)]
        if self.nodes == 0 and self.data and path.is_file():
            return molecules(path, self.graphs, generator)
        sizes, window = self._sizes(generator)
        return [(edges_of(thin_tree(size, window, generator)), size) for size in sizes]

    def _sizes(self, generator: torch.Generator) -> tuple[list[int], int]:
        if self.nodes:
            return [self.nodes] * self.graphs, 4
        if self.source == "zinc":
            return torch.randint(12, 36, (self.graphs,), generator=generator).tolist(), 3
        logarithms = torch.randn(self.graphs, generator=generator) * 0.5 + 4.88  # mean about 150
        return logarithms.exp().int().clamp(10, 444).tolist(), 4

    def edge_features(self) -> bool:
        return self.source != "pattern"


def layer_of(case: Case) -> DistanceFilter:
    """Return a layer whose biases are not zero, in which case empty shells would not count."""
    torch.manual_seed(0)
    layer = DistanceFilter(case.width, case.state, r_min=0.9)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return layer


def shells_of(graphs: list[Graph], count: int | None) -> Shells:
    if count is None:
        count = max(distance_shells(*graph).count for graph in graphs)
    return batch_shells([distance_shells(*graph, count) for graph in graphs])


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def features(case: Case, graphs: list[Graph]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(nodes for _, nodes in graphs), case.width, generator=generator)


Way = tuple[nn.Module, Callable[[Tensor], Tensor], int]
"""A module, its output for the features of all nodes, and the bytes of what it keeps of the graphs."""


def way_of(name: str, case: Case, graphs: list[Graph]) -> Way:
    """Return one way of running a layer on a batch."""
    if name == GPS:
        torch.manual_seed(0)
        edges, batch = joined(graphs)
        gps = gps_layer(case.width, case.edge_features())
        more = {"edge_attr": torch.ones(edges.shape[1], case.width)} if case.edge_features() else {}
        return gps, lambda h: gps(h, edges, batch, **more), bytes_of(edges, batch, *more.values())
    layer = layer_of(case)
    if name == SCAN:
        count = case.count or shells_of(graphs, None).count
        sizes = [nodes for _, nodes in graphs]
        masks = batch_masks(each_masks(graphs, count), max(sizes))
        scan, real = DenseScan(layer), torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
        return scan, lambda h: scan(pad_sequence(list(h.split(sizes)), True), masks)[real], bytes_of(masks)
    shells = shells_of(graphs, case.count)
    shells = shells.dense() if name == OURS["dense"] else shells
    held = bytes_of(*(part for part in vars(shells).values() if isinstance(part, Tensor)))
    return layer, lambda h: layer(h, shells), held


def step(way: Way, h: Tensor) -> None:
    """Run forward and backward."""
    module, run, _ = way
    module.zero_grad()
    run(h.detach().requires_grad_()).square().mean().backward()


def assert_equal(ways: dict[str, Way], h: Tensor) -> float:
    """Return by how much outputs and gradients of the same layer differ, relative to the largest."""
    found = []
    for name, way in ways.items():
        if name == GPS:
            continue
        module, run, _ = way
        given = h.clone().requires_grad_()
        out = run(given)
        gradients = torch.autograd.grad(out.square().sum(), [given, *module.parameters()])
        found.append([out.detach(), *gradients])
    difference = max(
        float((a - b).abs().max() / b.abs().max())
        for one in found
        for a, b in zip(one, found[0], strict=True)
    )
    assert difference < 1e-3, f"the ways differ by {difference:.1e}"
    return difference


def peak(case: Case, name: str) -> float:
    """Return the MiB that a batch and one step on it add to a process of its own."""
    given = json.dumps({"case": asdict(case), "way": name, "threads": torch.get_num_threads()})
    done = subprocess.run([sys.executable, __file__, "--peak", given], capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else float("nan")


Peak = Callable[[Case, str], float]


def few_peaks(case: Case, name: str) -> float:
    """Return the peak of one way on molecules alone, for a quick run."""
    return peak(case, name) if (case.source, name) == ("zinc", OURS["ours"]) else float("nan")


def print_peak(given: str) -> None:
    asked = json.loads(given)
    torch.set_num_threads(asked["threads"])
    case, name = Case(**asked["case"]), asked["way"]
    small = [(torch.tensor([[0, 1], [1, 0]]), 2)] * 2
    step(way_of(name, case, small), features(case, small))  # what the first call of any size loads
    graphs = case.drawn()
    settle()
    before = kib("VmRSS")
    h, way = features(case, graphs), way_of(name, case, graphs)
    settle()
    step(way, h)
    print((kib("VmHWM") - before) / 2**10)


def settle() -> None:
    """Give freed memory back and let the peak start again from here (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def kib(name: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name))
    return int(line.split()[1])


def described(case: Case, graphs: list[Graph], count: int) -> str:
    sizes = [nodes for _, nodes in graphs]
    return (
        f"{case.source}: {len(sizes)} graphs, nodes mean {statistics.mean(sizes):.0f}, largest {max(sizes)}; "
        f"K {count}, width {case.width}, state {case.state}"
    )


def of_layers(cases: list[Case], rounds: int, measured: Peak) -> list[str]:
    lines = [
        "## One layer, forward and backward",
        "",
        "Medians by turns; ratios are medians of those within a round, over our faster back-end. Dense masks "
        "are float32, made in advance and padded to the largest graph of the batch. Outputs and gradients of "
        "the same parameters are compared first.",
        "",
        "| batch | way | ms | time / ours | MiB | memory / ours | of which masks, shells or edges (MiB) |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        graphs = case.drawn()
        h, names = features(case, graphs), (*OURS.values(), SCAN, GPS)
        ways = {name: way_of(name, case, graphs) for name in names}
        difference = assert_equal(ways, h)
        shells = shells_of(graphs, case.count)
        fastest = OURS["dense" if isinstance(shells.fastest(), DenseShells) else "ours"]
        seconds = timed({name: partial(step, way, h) for name, way in ways.items()}, rounds, 1)
        held = {name: way[2] / 2**20 for name, way in ways.items()}
        ways.clear()
        peaks = {name: measured(case, name) for name in names}
        for name in names:
            chosen = " (chosen by `fastest`)" if name == fastest else ""
            lines.append(
                f"| {described(case, graphs, shells.count)} | {name}{chosen} "
                f"| {1000 * statistics.median(seconds[name]):.1f} | {ratio(seconds, name, fastest):.2f} "
                f"| {peaks[name]:.1f} | {peaks[name] / peaks[fastest]:.1f} | {held[name]:.2f} |"
            )
        lines.append(f"| | largest relative difference | {difference:.0e} | | | | |")
    return lines


def each_shells(graphs: list[Graph], count: int) -> list[Shells]:
    return [distance_shells(*graph, count) for graph in graphs]


def of_preprocessing(cases: list[Case], rounds: int) -> list[str]:
    lines = [
        "",
        "## From edges to shells, once a graph",
        "",
        "Masks are boolean (K, N, N). To batch is to join shells, or to pad masks to float32.",
        "",
        "| batch | ours (ms a graph) | Floyd–Warshall and masks | time / ours | Floyd–Warshall alone "
        "| ours to batch (ms a batch) | masks to batch | time / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours, theirs, alone = "ours", "Floyd–Warshall and masks", "Floyd–Warshall"
    for case in cases:
        graphs = case.drawn()
        count = case.count or shells_of(graphs, None).count
        to_shells, to_masks = partial(each_shells, graphs, count), partial(each_masks, graphs, count)
        seconds = timed(
            {ours: to_shells, theirs: to_masks, alone: partial(each_distances, graphs)}, rounds, 1
        )
        shells, masks, largest = to_shells(), to_masks(), max(nodes for _, nodes in graphs)
        joining = {ours: partial(batch_shells, shells), theirs: partial(batch_masks, masks, largest)}
        batched = timed(joining, rounds, 1)
        once = {name: 1000 * statistics.median(s) / len(graphs) for name, s in seconds.items()}
        joint = {name: 1000 * statistics.median(s) for name, s in batched.items()}
        lines.append(
            f"| {described(case, graphs, count)} | {once[ours]:.2f} | {once[theirs]:.2f} "
            f"| {ratio(seconds, theirs, ours):.2f} | {once[alone]:.2f} | {joint[ours]:.1f} "
            f"| {joint[theirs]:.1f} | {ratio(batched, theirs, ours):.1f} |"
        )
    return lines


def of_growth(base: Case, sizes: list[int], counts: list[int], rounds: int, measured: Peak) -> list[str]:
    cases = [replace(base, nodes=nodes, count=40) for nodes in sizes]
    cases += [replace(base, nodes=150, count=count) for count in counts]
    lines = [
        "",
        "## Growth",
        "",
        f"{base.graphs} trees of N nodes, about 2N/5 steps long; one layer of width {base.width}, forward "
        "and backward.",
        "",
        f"| N | K | pairs in shells | rows | ours (ms) | {SCAN} (ms) | time / ours | ours (MiB) "
        f"| {SCAN} (MiB) | memory / ours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        graphs, ours = case.drawn(), OURS["ours"]
        h, shells = features(case, graphs), shells_of(graphs, case.count)
        ways = {name: way_of(name, case, graphs) for name in (ours, SCAN)}
        seconds = timed({name: partial(step, way, h) for name, way in ways.items()}, rounds, 1)
        took = {name: 1000 * statistics.median(each) for name, each in seconds.items()}
        ways.clear()
        held = {name: measured(case, name) for name in (ours, SCAN)}
        lines.append(
            f"| {case.nodes} | {case.count} | {len(shells.members):,} | {len(shells.node):,} "
            f"| {took[ours]:.1f} | {took[SCAN]:.1f} | {ratio(seconds, SCAN, ours):.2f} | {held[ours]:.1f} "
            f"| {held[SCAN]:.1f} | {held[SCAN] / held[ours]:.1f} |"
        )
    return lines


def train(network: nn.Module, inputs: tuple, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    network(*inputs).square().mean().backward()
    optimiser.step()


def of_networks(cases: list[Case], parameters: int, rounds: int) -> list[str]:
    lines = [
        "",
        "## One training step of a whole network",
        "",
        f"Four layers, at most {parameters:,} parameters, one output a graph, AdamW; GPS with GIN, without "
        "features of edges.",
        "",
        "| batch | network | parameters | ms | time / ours |",
        "|---|---|---|---|---|",
    ]

    def filtering(width: int) -> nn.Module:
        layers = [DistanceFilter(width, width, r_min=0.9) for _ in range(4)]
        return GraphNetwork(TypeEncoder([28], width), layers, head(width, 1))

    for case in cases:
        graphs = case.drawn()
        shells, (edges, batch) = shells_of(graphs, case.count), joined(graphs)
        x = torch.randint(28, batch.shape, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        makers = {"ours": filtering, "GPS": GPSNetwork, "GCN": GCNNetwork}
        networks = {name: of_size(make, parameters) for name, make in makers.items()}
        inputs = {"ours": (x, shells), "GPS": (x, edges, batch), "GCN": (x, edges, batch)}
        optimisers = {n: torch.optim.AdamW(m.parameters(), fused=True) for n, m in networks.items()}

        steps = {n: partial(train, networks[n], inputs[n], optimisers[n]) for n in networks}
        seconds = timed(steps, rounds, 1)
        lines += [
            f"| {described(case, graphs, shells.count).split(', width')[0]} | {name} "
            f"| {sum(p.numel() for p in network.parameters()):,} "
            f"| {1000 * statistics.median(seconds[name]):.1f} | {ratio(seconds, name, 'ours'):.2f} |"
            for name, network in networks.items()
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak")
    parser.add_argument("--data", default=os.environ.get("GRAMIAN_DATA", ""))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small batches, printed and not written")
    chosen = parser.parse_args()
    if chosen.peak:
        print_peak(chosen.peak)
        return
    graphs, rounds = (4, 1) if chosen.quick else (32, chosen.rounds)
    cases = [
        Case("zinc", 72, 72, 5, graphs, data=chosen.data),
        Case("pattern", 72, 64, None, graphs),
        Case("peptides", 88, 88, 40, graphs, data=chosen.data),
    ]
    measured = few_peaks if chosen.quick else peak
    sizes, counts = ([50], [5]) if chosen.quick else ([50, 100, 200, 400], [5, 10, 20, 40, 80])
    lines = [
        *of_layers(cases[:1] if chosen.quick else cases, rounds, measured),
        *of_preprocessing(cases, rounds),
        *of_growth(Case("trees", 88, 88, graphs=min(graphs, 8)), sizes, counts, min(rounds, 3), measured),
        *of_networks(cases[:1] if chosen.quick else [cases[0], cases[2]], 100_000, rounds),
    ]
    if chosen.quick:
        print("\n".join(lines))
        return
    more = {"scipy": scipy.__version__, "torch_geometric": torch_geometric.__version__}
    real = [name for name, file in FILES.items() if (Path(chosen.data) / "molecules" / file).is_file()]
    source = f"Real molecules: {', '.join(real) if chosen.data and real else 'none, trees of like sizes'}."
    write_results("graphs", [source, "", *lines], more)


if __name__ == "__main__":
    main()
