"""Graphs laid end to end, with what is to be predicted of them; batches are joined by offsets, not padded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from gramian.data.graph_splits import Split, folds, random_split
from gramian.data.objectives import IGNORED
from gramian.errors import InputError

GRAPH_TASKS = ("regression", "classification", "multilabel")
NODE_TASKS = ("node", "node_regression")
TASKS = (*GRAPH_TASKS, *NODE_TASKS)
"""What is predicted: numbers, a class or yes-or-no labels of each graph; a class or numbers of each node."""

MOST_CLASSES = 1000
"""Most classes that a graph or node may have."""

MOST_TYPES = 100_000
"""Most types that nodes or edges may have in one column; a table of vectors by type is as long."""


@dataclass(frozen=True, eq=False)
class Graph:
    """One graph: nodes and edges with features or types, and what is to be predicted."""

    x: Tensor
    """Features (n, d), floating, or types (n) or (n, columns), whole numbers."""
    edge_index: Int64[Tensor, "2 e"]
    """The nodes that each edge leads from and to; an undirected edge is there in both directions."""
    y: Tensor
    """Of a graph: classes (1), or numbers or labels (1, t). Of its nodes: classes (n), or numbers (n, t)."""
    edge_attr: Tensor | None = None
    """Features (e, d) or types (e) or (e, columns) of the edges."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Several graphs as one that is not connected; names are those of PyTorch Geometric."""

    x: Tensor
    edge_index: Int64[Tensor, "2 e"]
    y: Tensor
    batch: Int64[Tensor, " n"]
    """The graph of each node."""
    ptr: Int64[Tensor, " graphs_and_one"]
    """Where the nodes of each graph start."""
    edge_attr: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of graphs."""
        return len(self.ptr) - 1

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on a device."""
        moved = {name: part.to(device) for name, part in vars(self).items() if part is not None}
        return Batch(**moved)

    def graphs(self) -> list[Graph]:
        """Return the graphs one by one.

        Holds: exactly: the inverse of `collate`.
        """
        sizes, edges = self.ptr.diff().tolist(), self.batch[self.edge_index[0]].bincount(minlength=len(self))
        rows = sizes if len(self.y) == len(self.x) else [1] * len(self)
        index = self.edge_index - self.ptr[self.batch[self.edge_index[0]]]
        counts = edges.tolist()
        attributes = [None] * len(self) if self.edge_attr is None else self.edge_attr.split(counts)
        parts = zip(self.x.split(sizes), index.split(counts, 1), self.y.split(rows), attributes, strict=True)
        return [Graph(*part) for part in parts]


def collate(graphs: Sequence[Graph]) -> Batch:
    """Join graphs to one batch, the nodes of each counted on from those before.

    Shapes: graphs of n_i nodes and e_i edges -> Σ n_i nodes and Σ e_i edges.
    Raises: InputError for no graphs, or some with and some without edge features.
    Holds: exactly: `collate(graphs).graphs()` are the graphs.
    """
    if not graphs:
        raise InputError("there are no graphs to join; at least one is needed")
    sizes = torch.tensor([len(graph.x) for graph in graphs])
    edges = torch.tensor([graph.edge_index.shape[1] for graph in graphs])
    ptr = _starts(sizes)
    attributes = [graph.edge_attr for graph in graphs if graph.edge_attr is not None]
    if attributes and len(attributes) < len(graphs):
        raise InputError("some graphs have features of edges and some have none; all or none must have them")
    return Batch(
        torch.cat([graph.x for graph in graphs]),
        torch.cat([graph.edge_index for graph in graphs], 1) + ptr[:-1].repeat_interleave(edges),
        torch.cat([graph.y for graph in graphs]),
        torch.arange(len(graphs)).repeat_interleave(sizes),
        ptr,
        torch.cat(attributes) if attributes else None,
    )


@dataclass(frozen=True, eq=False)
class Graphs:
    """Graphs laid end to end; whole numbers may be stored narrow and come out as int64.

    Raises: InputError, at construction, unless everything fits together: each graph has nodes, edges lead to
        nodes of their own graph, numbers are finite, types and classes count from 0.
    Holds: exactly; isolated nodes, graphs without edges, loops, repeated and one-way edges are kept.
    """

    name: str
    task: str
    x: Tensor
    """Features (n, d), floating, or types (n) or (n, columns), whole numbers, of all nodes."""
    edge_index: Int[Tensor, "2 e"]
    """Ends of all edges, counted within each graph."""
    ptr: Int64[Tensor, " graphs_and_one"]
    """Where the nodes of each graph start, and their number at the end."""
    edge_ptr: Int64[Tensor, " graphs_and_one"]
    """Where the edges of each graph start, and their number at the end."""
    y: Tensor
    """Classes (graphs) or (n), -100 where a node is not to be classified; targets (graphs, t) or (n, t)."""
    edge_attr: Tensor | None = None
    node_types: tuple[int, ...] = ()
    """How many types there are in each column of `x`; none for features. Those that occur unless given."""
    edge_types: tuple[int, ...] = ()
    classes: tuple[int, ...] = ()
    """The classes as the file numbers them, in increasing order; 0, 1, … unless given."""
    splits: tuple[Split, ...] = ()
    """Published splits, or those of the recipe."""
    dropped: int = 0
    """Edges of the file that were left out as loops or repeated."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"the task must be one of {', '.join(TASKS)}, not {self.task!r}")
        for part in (self.x, self.edge_index, self.ptr, self.edge_ptr, self.y, self.edge_attr):
            if part is not None and not part.ndim:
                raise InputError(f"{self.name}: a single number stands where there must be one for each row")
        self._check_pointers()
        object.__setattr__(self, "node_types", _check_features(self.x, self.node_types, self.name, "node"))
        self._check_edges()
        self._check_targets()
        for each in self.splits:
            each.check(len(self), self.name)

    def _check_pointers(self) -> None:
        if len(self.ptr) < 2:
            raise InputError(f"{self.name} has no graphs; at least one is needed")
        empty = (self.ptr.diff() < 1).nonzero()
        if len(empty):
            raise InputError(
                f"{self.name}: graph {int(empty[0])} has no nodes; every graph needs at least one"
            )
        for what, ptr, part in (("nodes", self.ptr, self.x), ("edges", self.edge_ptr, self.edge_index.T)):
            right = (
                len(ptr) == len(self.ptr) and ptr[0] == 0 and ptr[-1] == len(part) and (ptr.diff() >= 0).all()
            )
            if not right:
                raise InputError(
                    f"{self.name}: where the {what} of the {len(self.ptr) - 1:,} graphs start must rise from "
                    f"0 to their number {len(part):,}"
                )

    def _check_edges(self) -> None:
        if len(self.edge_index) != 2 or self.edge_index.is_floating_point():
            raise InputError(
                f"{self.name}: edges must be whole numbers (2, e), got {_shape(self.edge_index)}"
            )
        largest = self.ptr.diff().repeat_interleave(self.edge_ptr.diff())
        outside = ((self.edge_index < 0) | (self.edge_index >= largest)).any(0).nonzero()
        if len(outside):
            edge = int(outside[0])
            raise InputError(
                f"{self.name}: edge {edge} leads to node {self.edge_index[:, edge].tolist()} of a graph with "
                f"{int(largest[edge])} nodes; nodes are counted from 0 in each graph"
            )
        if self.edge_attr is not None:
            if len(self.edge_attr) != self.edge_index.shape[1]:
                raise InputError(
                    f"{self.name}: there are {self.edge_index.shape[1]:,} edges but features of "
                    f"{len(self.edge_attr):,}"
                )
            types = _check_features(self.edge_attr, self.edge_types, self.name, "edge")
            object.__setattr__(self, "edge_types", types)

    def _check_targets(self) -> None:
        rows = len(self.x) if self.task in NODE_TASKS else len(self)
        if len(self.y) != rows or self.y.ndim != (1 if self.classifies else 2) or 0 in self.y.shape:
            raise InputError(
                f"{self.name}: the task {self.task} needs {'classes' if self.classifies else 'targets'} "
                f"({rows:,}{'' if self.classifies else ', t'}), got {_shape(self.y)}"
            )
        if not self.classifies:
            if not self.y.is_floating_point() or not self.y.isfinite().all():
                raise InputError(f"{self.name}: the targets must be finite numbers")
            if self.task == "multilabel" and not ((self.y == 0) | (self.y == 1)).all():
                raise InputError(f"{self.name}: the labels of a multilabel task must be 0 or 1")
            return
        known = self.y[self.y != IGNORED] if self.task == "node" else self.y
        if self.y.is_floating_point() or not len(known) or known.min() < 0 or known.max() >= MOST_CLASSES:
            raise InputError(f"{self.name}: classes must be whole numbers from 0 to {MOST_CLASSES - 1:,}")
        classes = self.classes or tuple(range(int(known.max()) + 1))
        if len(classes) < 2 or int(known.max()) >= len(classes):
            raise InputError(
                f"{self.name}: a task of classes needs at least two and none above {len(classes) - 1}, "
                f"got {int(known.max())}"
            )
        object.__setattr__(self, "classes", classes)

    @property
    def classifies(self) -> bool:
        """Whether one class is to be predicted, of a graph or of a node."""
        return self.task in ("classification", "node")

    @property
    def outputs(self) -> int:
        """How many numbers a model is to give: one for each class, label or target."""
        return len(self.classes) if self.classifies else self.y.shape[1]

    @cached_property
    def directed(self) -> bool:
        """Whether some edge is there in one direction only."""
        keys = self._edge_keys(self.edge_index)
        return not torch.equal(keys.unique(), self._edge_keys(self.edge_index.flip(0)).unique())

    def _edge_keys(self, edge_index: Tensor) -> Tensor:
        first, second = edge_index.long() + self.ptr[:-1].repeat_interleave(self.edge_ptr.diff())
        return first * len(self.x) + second

    def __len__(self) -> int:
        """Return the number of graphs."""
        return len(self.ptr) - 1

    def __getitem__(self, number: int) -> Graph:
        """Return one graph."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.name} has {len(self):,} graphs, no graph {number}")
        number %= len(self)
        nodes, edges = (slice(*ptr[number : number + 2].tolist()) for ptr in (self.ptr, self.edge_ptr))
        y = self.y[nodes] if self.task in NODE_TASKS else self.y[number : number + 1]
        attributes = None if self.edge_attr is None else _wide(self.edge_attr[edges])
        return Graph(_wide(self.x[nodes]), self.edge_index[:, edges].long(), _wide(y), attributes)

    def batch(self, index: Int64[Tensor, " graphs"]) -> Batch:
        """Join the graphs of an index to one batch.

        Holds: exactly what `collate` makes of them; without a loop over graphs.
        """
        nodes, ptr = _stretches(self.ptr, index)
        edges, edge_ptr = _stretches(self.edge_ptr, index)
        return Batch(
            _wide(self.x[nodes]),
            self.edge_index[:, edges].long() + ptr[:-1].repeat_interleave(edge_ptr.diff()),
            _wide(self.y[nodes if self.task in NODE_TASKS else index]),
            torch.arange(len(index)).repeat_interleave(ptr.diff()),
            ptr,
            None if self.edge_attr is None else _wide(self.edge_attr[edges]),
        )

    def simple(self) -> "Graphs":
        """Return the same graphs without loops and repeated edges, the others sorted by their ends.

        Holds: exactly: of repeated edges the first is kept, with its features.
        """
        keys = self._edge_keys(self.edge_index)
        order = keys.argsort(stable=True)
        again = keys[order].diff(prepend=keys.new_full((1,), -1)) == 0
        loops = self.edge_index[0] == self.edge_index[1]
        kept = order[~(again | loops[order])]
        graph = torch.arange(len(self)).repeat_interleave(self.edge_ptr.diff())[kept]
        return replace(
            self,
            edge_index=self.edge_index[:, kept],
            edge_ptr=_starts(graph.bincount(minlength=len(self))),
            edge_attr=None if self.edge_attr is None else self.edge_attr[kept],
            dropped=self.dropped + len(keys) - len(kept),
        )

    def split(self, validation: float = 0.1, test: float = 0.1, seed: int = 0) -> Split:
        """Split the graphs at random, classes of graphs in equal shares; see `random_split`."""
        return random_split(len(self), labels=self._labels(), validation=validation, test=test, seed=seed)

    def folds(self, number: int = 10, seed: int = 0) -> tuple[Split, ...]:
        """Return the splits of a cross-validation, classes of graphs in equal shares; see `folds`."""
        return folds(len(self), labels=self._labels(), number=number, seed=seed)

    def _labels(self) -> Tensor | None:
        return self.y.long() if self.task == "classification" else None

    def with_types(self, nodes: tuple[int, ...] = (), edges: tuple[int, ...] = ()) -> "Graphs":
        """Return the same graphs with numbers of types that a whole data set has, of which these are a part.

        Raises: InputError when there are more types than that.
        """
        return replace(self, node_types=nodes or self.node_types, edge_types=edges or self.edge_types)

    def text(self) -> str:
        """Say in one sentence what the graphs are."""
        nodes, edges = len(self.x), self.edge_index.shape[1]
        what = f"{self.outputs} classes" if self.classifies else f"{self.outputs} targets"
        parts = [
            f"{self.name}: {len(self):,} graphs with {nodes:,} nodes (mean {nodes / len(self):.1f}, largest "
            f"{int(self.ptr.diff().max()):,}) and {edges:,} {'one-way ' * self.directed}edges, "
            f"task {self.task} with {what}"
        ]
        if self.dropped:
            parts.append(f"{self.dropped:,} edges left out as loops or repeated")
        return "; ".join(parts)


def flat(
    name: str,
    task: str,
    graphs: Sequence[Graph],
    *,
    node_types: tuple[int, ...] = (),
    edge_types: tuple[int, ...] = (),
    classes: tuple[int, ...] = (),
    splits: tuple[Split, ...] = (),
) -> Graphs:
    """Lay graphs end to end.

    Raises: InputError for no graphs and as `Graphs`.
    Holds: exactly: the graphs come out as they are.
    """
    joined = collate(graphs)
    edges = _starts(torch.tensor([graph.edge_index.shape[1] for graph in graphs]))
    index = torch.cat([graph.edge_index for graph in graphs], 1)
    return Graphs(
        name, task, joined.x, index, joined.ptr, edges, joined.y, joined.edge_attr,
        node_types, edge_types, classes, splits,
    )  # fmt: skip


def _starts(sizes: Tensor) -> Tensor:
    return torch.cat((torch.zeros(1, dtype=torch.long), sizes.cumsum(0)))


def _stretches(ptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of the rows of chosen graphs, and where each one's start among them."""
    sizes = ptr.diff()[index]
    starts = _starts(sizes)
    shift = (ptr[:-1][index] - starts[:-1]).repeat_interleave(sizes)
    return torch.arange(int(starts[-1])) + shift, starts


def _wide(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.long()


def _shape(values: Tensor) -> str:
    return f"{values.dtype} {tuple(values.shape)}".removeprefix("torch.")


def _check_features(x: Tensor, sizes: tuple[int, ...], name: str, what: str) -> tuple[int, ...]:
    """Return how many types there are in each column, none for features; raise InputError for wrong ones."""
    if x.is_floating_point():
        if x.ndim != 2 or not x.shape[1]:
            raise InputError(f"{name}: the features of {what}s must be (n, d), got {_shape(x)}")
        if not x.isfinite().all():
            row = int((~x.isfinite()).any(1).nonzero()[0])
            raise InputError(f"{name}: the features of {what} {row} are not finite")
        return ()
    if x.ndim not in (1, 2) or (x.ndim == 2 and not x.shape[1]) or x.dtype == torch.bool or x.is_complex():
        raise InputError(
            f"{name}: the types of {what}s must be whole numbers (n) or (n, columns), got {_shape(x)}"
        )
    columns = x[:, None] if x.ndim == 1 else x
    largest = columns.amax(0).tolist() if len(x) else [0] * columns.shape[1]
    found = tuple(number + 1 for number in largest)
    sizes = sizes or found
    if (len(x) and columns.min() < 0) or len(sizes) != len(found) or max(sizes) > MOST_TYPES:
        raise InputError(
            f"{name}: the types of {what}s must count from 0, {MOST_TYPES:,} at most, got {list(largest)}"
        )
    if any(size < most for size, most in zip(sizes, found, strict=True)):
        raise InputError(f"{name}: {what}s have up to {found} types, more than {sizes}")
    return sizes
