"""Which graphs are learnt from, and batches of them with their shells and the positions of their nodes."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from gramian.data.graph_files import MOLECULES, load_graphs
from gramian.data.graph_generators import GENERATORS
from gramian.data.graph_splits import Split
from gramian.data.graphs import NODE_TASKS, TASKS, Batch, Graph, Graphs
from gramian.data.objectives import IGNORED
from gramian.errors import InputError
from gramian.nn.distances import distance_shells
from gramian.nn.positional_encodings import flipped, laplacian_positions, walk_positions
from gramian.nn.shells import GIGABYTE, Shells, batch_shells, shells_of_pairs
from gramian.tasks.graph_models import Architecture
from gramian.tasks.graph_scores import Scale

FARTHEST = 40
"""Most hops that filters look at when none are asked for."""

MARKS = ("distance", "depth")
"""Settings of generators that say how far the information is away."""


MOST_MADE, FARTHEST_MADE, MOST_PRODUCT = 100_000, 1000, 5_000_000
"""Most graphs that are made, the farthest information in them, and most of one times the other."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is read or made."""

    data: str = "eccentricity"
    """A file or folder of graphs, or the name of graphs that are made (`gramian list` has them)."""
    task: str | None = None
    """What is predicted: regression, classification, multilabel, node or node_regression; by the targets when
    not given."""
    target: tuple[str, ...] = ()
    """Columns of a file of molecules, or one property that RDKit computes, that are predicted."""
    splits: Path | None = None
    """.npz of row numbers train, val and test of molecules; the published ones, or a random one, if None."""
    fold: int = 0
    """Which of the splits of the data, or the seed of a random one."""
    count: int | None = None
    """Most graphs learnt from; all of the training part when not given."""
    held_out: int | None = None
    """Most graphs to choose by, and to report on; all when not given."""
    distance: int | None = None
    """How far the information is away, in graphs that are made for a distance."""
    sizes: tuple[int, int, int] | None = None
    """Graphs that are made to learn from, to choose by and to report on."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if self.task is not None and self.task not in TASKS:
            raise InputError(f"unknown task {self.task!r}; choose one of {', '.join(TASKS)}")
        if self.fold < 0:
            raise InputError(f"fold cannot be negative, got {self.fold}")
        for name in ("count", "held_out"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        count, distance = sum(self.sizes or ()), self.distance or 0
        if count > MOST_MADE or distance > FARTHEST_MADE or count * distance > MOST_PRODUCT:
            raise InputError(
                f"at most {MOST_MADE:,} graphs are made, for distances up to {FARTHEST_MADE:,} and for "
                f"{MOST_PRODUCT:,} when multiplied; got {count:,} and {distance:,}"
            )

    def load(self) -> tuple[Graphs, Split]:
        """Return the graphs, without loops and repeated edges, and the parts of a split.

        Raises: InputError for what is neither a name nor can be read, settings that do not fit it, and parts
            that have nothing to learn from or to choose by.
        """
        self.check()
        graphs = (self._make() if self.data in GENERATORS else self._read()).simple()
        if graphs.splits and self.fold >= len(graphs.splits):
            there = f"splits 0 to {len(graphs.splits) - 1}" if len(graphs.splits) > 1 else "one split, 0"
            raise InputError(f"{graphs.name} has {there}; there is no fold {self.fold}")
        whole = graphs.splits[self.fold] if graphs.splits else graphs.split(seed=self.fold)
        if not len(whole.validation) or not len(whole.test):
            raise InputError(f"{graphs.name}: graphs to choose by and to report on are needed")
        order = torch.randperm(len(whole.train), generator=torch.Generator().manual_seed(0))
        split = Split(
            whole.train[order][: self.count],
            whole.validation[: self.held_out],
            whole.test[: self.held_out],
        )
        _check_targets(graphs, split)
        return graphs, split

    def _make(self) -> Graphs:
        generator = GENERATORS[self.data]
        known = inspect.signature(generator).parameters
        given: dict[str, object] = {}
        if self.sizes is not None:
            if "sizes" not in known:
                raise InputError(f"the number of graphs of {self.data} is fixed; leave out sizes")
            given["sizes"] = self.sizes
        if self.distance is not None:
            marks = [name for name in MARKS if name in known]
            if not marks:
                raise InputError(f"{self.data} is not made for a distance; leave it out")
            given[marks[0]] = self.distance
        for name in ("target", "splits"):
            if getattr(self, name):
                raise InputError(f"{name} is for files of molecules, not for {self.data}")
        graphs = generator(**given)
        if self.task not in (None, graphs.task):
            raise InputError(f"the task of {self.data} is {graphs.task}, not {self.task}")
        return graphs

    def _read(self) -> Graphs:
        path = Path(self.data).expanduser()
        if not path.exists():
            names = ", ".join(sorted(GENERATORS))
            raise InputError(f"there is no file or folder {self.data}; graphs that can be made: {names}")
        if self.distance is not None or self.sizes is not None:
            raise InputError("distance and sizes are for graphs that are made, not for files")
        if not path.name.lower().endswith(MOLECULES):
            for name in ("target", "splits"):
                if getattr(self, name):
                    raise InputError(f"{name} is for files of molecules, not for {self.data}")
        return load_graphs(path, task=self.task, target=self.target or None, splits=self.splits)


def _check_targets(graphs: Graphs, split: Split) -> None:
    """Raise InputError for a part of which nothing is to be predicted, or nothing that can be judged."""
    for name, part in vars(split).items():
        y = graphs.batch(part).y
        if graphs.task == "node" and not (y != IGNORED).any():
            raise InputError(f"{graphs.name}: no node of the {name} part has a class")
        if graphs.task == "multilabel" and name != "train" and not (y != y[0]).any():
            raise InputError(
                f"{graphs.name}: no label has both values in the {name} part, so that there is no average "
                "precision; take more graphs or another fold"
            )


@dataclass(frozen=True)
class Sample:
    """A batch of graphs as a network takes it."""

    batch: Batch
    shells: Shells
    positions: Tensor | None

    def to(self, device: torch.device | str) -> "Sample":
        """Return the same on a device."""
        positions = None if self.positions is None else self.positions.to(device)
        return Sample(self.batch.to(device), self.shells.to(device), positions)

    def through(self, network: torch.nn.Module) -> Tensor:
        """Return what a network makes of it: (graphs or nodes, outputs)."""
        batch = self.batch
        x = batch.x if self.positions is None else (batch.x, self.positions)
        return network(x, self.shells, batch.edge_index, batch.edge_attr)


class Sampler:
    """Batches of a data set, with what networks need to know of its graphs.

    Shells are found when a graph is first asked for; they are kept until `gigabytes` are used up, and found
    anew each time beyond that.
    """

    def __init__(
        self,
        graphs: Graphs,
        split: Split,
        architecture: Architecture,
        progress: Progress | None = None,
        gigabytes: float = 2.0,
    ) -> None:
        self.graphs, self.split = graphs, split
        self._kept: dict[int, Shells] = {}
        self._room = gigabytes * GIGABYTE
        self._size, self._kind = architecture.encoding_size, architecture.encoding
        self._positions: dict[int, Tensor] = {}
        self.hops = FARTHEST if architecture.hops is None else architecture.hops
        if architecture.hops is None:
            self.hops = self._reach(progress or Progress(disable=True))
        self.scale = Scale.of(self.targets()[0], graphs.task)

    def _reach(self, progress: Progress) -> int:
        """Return how far the training graphs reach."""
        bar = progress.add_task("distances", total=len(self.split.train))
        farthest = 0
        for number in self.split.train.tolist():
            hop = self._shells(number).hop
            farthest = max(farthest, int(hop[-1]) if len(hop) else 0)
            progress.advance(bar)
        progress.remove_task(bar)
        return farthest

    def targets(self) -> tuple[Tensor, Tensor]:
        """Return what is to be predicted in the training and in the test part, graphs or nodes in order."""
        rows = torch.arange(len(self.graphs))
        if self.graphs.task in NODE_TASKS:
            rows = rows.repeat_interleave(self.graphs.ptr.diff())
        train, test = (torch.isin(rows, part) for part in (self.split.train, self.split.test))
        y = self.graphs.y if self.graphs.y.is_floating_point() else self.graphs.y.long()
        return y[train], y[test]

    def sample(self, numbers: Tensor, *, shells: bool = True, flips: int | None = None) -> Sample:
        """Return the graphs of some numbers as one batch; equal numbers give equal batches.

        Args:
            numbers: places of the graphs.
            shells: whether shells are wanted; without them, it is only known which node is of which graph.
            flips: seed of the signs that Laplacian positions are given in training, None for none.
        """
        batch, chosen = self.graphs.batch(numbers), numbers.tolist()
        if shells:
            found = batch_shells([self._shells(number).with_count(self.hops + 1) for number in chosen])
        else:
            none = torch.empty(0, dtype=torch.long)
            found = shells_of_pairs(none, none, none, batch.ptr.diff().tolist(), 1)
        return Sample(batch, found, self._positions_of(chosen, batch, flips))

    def _shells(self, number: int) -> Shells:
        if number in self._kept:
            return self._kept[number]
        graph = self.graphs[number]
        shells = distance_shells(graph.edge_index, len(graph.x), self.hops + 1, directed=self.graphs.directed)
        needed = sum(value.nbytes for value in vars(shells).values() if isinstance(value, Tensor))
        if needed <= self._room:
            self._kept[number], self._room = shells, self._room - needed
        return shells

    def _positions_of(self, numbers: list[int], batch: Batch, flips: int | None) -> Tensor | None:
        if self._kind == "none":
            return None
        for number in numbers:
            if number not in self._positions:
                self._positions[number] = self._encoded(self.graphs[number])
        positions = torch.cat([self._positions[number] for number in numbers])
        if flips is None or self._kind != "laplacian":
            return positions
        return flipped(positions, batch.batch, torch.Generator().manual_seed(flips))

    def _encoded(self, graph: Graph) -> Tensor:
        encode = laplacian_positions if self._kind == "laplacian" else walk_positions
        return encode(graph.edge_index, len(graph.x), self._size).float()
