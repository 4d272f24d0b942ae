"""Distance shells of a batch of graphs, and the sums of node features over them by two back-ends."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise, starmap
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn.functional import embedding_bag

from gramian.errors import InputError
from gramian.nn.transforms import under_transform

GIGABYTE = 1e9

CELLS_PER_ENTRY = {"cpu": 0}
"""Dense masks are chosen up to this many cells a pair of nodes, by device type: on a CPU the gathering sums
were faster in every measured case, complete graphs included."""

CELLS_PER_ENTRY_ELSEWHERE = 4
"""The same on other devices: an estimate from arithmetic and bandwidth, not measured."""

MEMBERS_SUMMED_AGAIN = 8
"""Shells of more members than that on average are summed once, for it takes longer than it saves memory."""

SIZES = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
"""Types of what counts or numbers something."""


class _SegmentSum(torch.autograd.Function):
    """Sum rows of h over segments of indices; the derivative sums over the segments of the transpose.

    x_r = Σ_{e ∈ segment r} h_{index e},   ∂h_u = Σ_{e ∈ transposed segment u} ∂x_{row e}

    A transpose that is not given is made when a derivative asks for it.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, index: Tensor, starts: Tensor, rows: Tensor | None, ends: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(index, starts, rows, ends)
        ctx.nodes = h.shape[0]
        return embedding_bag(index, h, starts, mode="sum", include_last_offset=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        index, starts, rows, ends = ctx.saved_tensors
        if rows is None:
            rows, ends = _transpose(index, starts, ctx.nodes)
        return _SegmentSum.apply(grads[0].contiguous(), rows, ends, index, starts), None, None, None, None


def _transpose(index: Tensor, starts: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Return in which segments every node is, and where those of a node start."""
    rows = _segments(starts, index.shape[0])[_order(index, nodes)].int()
    return rows, _offsets(index.bincount(minlength=nodes))


@dataclass(frozen=True)
class Block:
    """Some rows of shells with what they are summed from: members of h, or the sums themselves."""

    source: Tensor
    node: Int32[Tensor, " some"]
    hop: Int32[Tensor, " some"]
    members: Int32[Tensor, " entries"] | None = None
    starts: Int32[Tensor, " some+1"] | None = None

    def sums(self) -> Tensor:
        """Sum node features over every shell of the block."""
        if self.members is None or self.starts is None:
            return self.source
        return _SegmentSum.apply(self.source, self.members, self.starts - self.starts[0], None, None)


@dataclass(frozen=True)
class Shells:
    """Who lies at which distance from whom in a batch of graphs, without the shells that are empty.

        shell k of v = {u : d(u, v) = k},   0 < k < count

    Shell 0 is the node itself and is not stored. A row is one shell that is not empty; rows are sorted by
    distance, then by node. Members of row r are `members[starts[r] : starts[r + 1]]`. The transpose is kept
    for the derivative: node u is a member of the rows `rows[ends[u] : ends[u + 1]]`. Graphs follow each
    other in the numbering of nodes, `sizes` nodes each; `graph` is the graph of a node. Every ordered pair
    of nodes is in one shell at most, so that memory is 8 bytes a pair and 12 a row.
    """

    members: Int32[Tensor, " entries"]
    node: Int32[Tensor, " shells"]
    hop: Int32[Tensor, " shells"]
    starts: Int32[Tensor, " shells+1"]
    rows: Int32[Tensor, " entries"]
    graph: Int32[Tensor, " nodes"]
    ends: Int32[Tensor, " nodes+1"]
    sizes: tuple[int, ...]
    count: int

    @property
    def nodes(self) -> int:
        """Number of nodes of all graphs."""
        return self.graph.shape[0]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Shells":
        """Return the shells with every tensor changed."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def to(self, device: torch.device | str) -> "Shells":
        """Return the shells on a device."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Shells":
        """Return the shells in memory from which a GPU copies fast; data loaders call it."""
        return self.mapped(Tensor.pin_memory)

    def sums(self, h: Float[Tensor, "nodes width"]) -> Float[Tensor, "shells width"]:
        """Sum node features over every shell that is not empty.

            x_{v,k} = Σ_{u : d(u,v) = k} h_u

        Holds: exactly; the pairs are never gathered into memory, except in float64 and under transforms.
        """
        if not under_transform():
            return _SegmentSum.apply(h, self.members, self.starts, self.rows, self.ends)
        row = _segments(self.starts, self.members.shape[0])
        return h.new_zeros(self.node.shape[0], h.shape[1]).index_add(0, row, h.index_select(0, self.members))

    def blocks(self, h: Float[Tensor, "nodes width"], size: int) -> Iterator[Block]:
        """Yield the rows `size` at a time; where shells are small on average, they are not yet summed."""
        if self.members.shape[0] > MEMBERS_SUMMED_AGAIN * self.node.shape[0]:
            yield from self._summed_blocks(h, size)
            return
        cuts = [*self.starts[:-1:size].tolist(), self.members.shape[0]]
        for block, (first, last) in enumerate(pairwise(cuts)):
            rows = slice(block * size, (block + 1) * size)
            starts = self.starts[rows.start : rows.stop + 1]
            yield Block(h, self.node[rows], self.hop[rows], self.members[first:last], starts)

    def _summed_blocks(self, h: Tensor, size: int) -> Iterator[Block]:
        parts = (self.sums(h).split(size), self.node.split(size), self.hop.split(size))
        return starmap(Block, zip(*parts, strict=True))

    def with_count(self, count: int) -> "Shells":
        """Return the same shells up to another number of them, the node itself included.

        Shells beyond the old number are empty, which is right where the old ones hold every node that can
        be reached.

        Raises: InputError for a number below 1.
        """
        check_count(count)
        if count >= self.count or not len(self.hop) or int(self.hop[-1]) < count:
            return replace(self, count=count)
        kept = int(torch.searchsorted(self.hop, count))
        starts = self.starts[: kept + 1]
        inside = self.rows < kept
        before = torch.nn.functional.pad(inside.cumsum(0), (1, 0))
        return Shells(
            members=self.members[: int(starts[-1])],
            node=self.node[:kept],
            hop=self.hop[:kept],
            starts=starts,
            rows=self.rows[inside],
            ends=before[self.ends.long()].int(),
            graph=self.graph,
            sizes=self.sizes,
            count=count,
        )

    def cells(self) -> int:
        """Return the number of entries of the dense masks, graphs · (count − 1) · largest²."""
        return len(self.sizes) * (self.count - 1) * max(self.sizes) ** 2

    def dense(self, dtype: torch.dtype = torch.float32, gigabytes: float = 4.0) -> "DenseShells":
        """Return the same shells with masks beside them, by which they are summed.

        Raises: InputError, before anything is allocated, when the masks need more than `gigabytes`.
        """
        needed = self.cells() * dtype.itemsize / GIGABYTE
        if needed > gigabytes:
            raise InputError(
                f"dense masks of {len(self.sizes)} graphs of up to {max(self.sizes)} nodes with {self.count} "
                f"shells need {needed:.3g} GB where {gigabytes:g} GB are allowed; use sparse shells"
            )
        sizes = torch.tensor(self.sizes, device=self.graph.device)
        largest, graph, node = max(self.sizes), self.graph.long(), self.node.long()
        local = torch.arange(self.nodes, device=graph.device) - (sizes.cumsum(0) - sizes)[graph]
        cells = (graph[node] * (self.count - 1) + self.hop - 1) * largest + local[node]
        masks = torch.zeros(
            len(sizes) * (self.count - 1) * largest, largest, dtype=dtype, device=graph.device
        )
        masks[cells[_segments(self.starts, self.members.shape[0])], local[self.members.long()]] = 1
        return DenseShells(
            **{field.name: getattr(self, field.name) for field in fields(Shells)},
            masks=masks.unflatten(0, (len(sizes), -1)),
            places=graph * largest + local,
            cells_of=cells,
        )

    def fastest(self, dtype: torch.dtype = torch.float32, gigabytes: float = 1.0) -> "Shells":
        """Return the faster back-end: dense masks where they are full and small enough, else these."""
        most = CELLS_PER_ENTRY.get(self.graph.device.type, CELLS_PER_ENTRY_ELSEWHERE) * self.members.shape[0]
        small = self.cells() * dtype.itemsize <= gigabytes * GIGABYTE
        return self.dense(dtype, gigabytes) if small and 0 < self.cells() <= most else self


@dataclass(frozen=True)
class DenseShells(Shells):
    """Shells with a mask for every graph and distance, multiplied where the sparse ones gather.

        x_{v,k} = Σ_u M_{k,v,u} h_u,   M_{k,v,u} = 1 when d(u, v) = k

    Graphs are padded to the largest; `places` are nodes among the padded ones, `cells_of` the rows of the
    product that are not empty.
    """

    masks: Float[Tensor, "graphs height largest"]
    places: Tensor
    cells_of: Tensor

    def sums(self, h: Float[Tensor, "nodes width"]) -> Float[Tensor, "shells width"]:
        """Sum node features over every shell that is not empty, by one product a graph."""
        graphs, _, largest = self.masks.shape
        padded = h.new_zeros(graphs * largest, h.shape[1]).index_copy(0, self.places, h)
        products = self.masks.to(h.dtype) @ padded.unflatten(0, (graphs, largest))
        return products.flatten(0, 1).index_select(0, self.cells_of)

    def blocks(self, h: Float[Tensor, "nodes width"], size: int) -> Iterator[Block]:
        """Yield the rows `size` at a time, summed."""
        return self._summed_blocks(h, size)


def shells_of_pairs(
    targets: Tensor, sources: Tensor, hops: Tensor, sizes: Sequence[int], count: int
) -> Shells:
    """Return the shells of the pairs (v, u) with d(u, v) = k, in any order, of one graph or of several.

    Shapes: targets v, sources u and hops k, each (pairs); `sizes` are the numbers of nodes of the graphs.
    Raises: InputError for no graph, an empty graph, lengths that differ, numbers that are not integers, a
        node that is not there, a distance outside 1 … count − 1, a count below 1.
    Holds: exactly.
    """
    check_count(count)
    nodes = _check_pairs(targets, sources, hops, sizes, count)
    order = _order(targets, nodes)
    order = order[_order(hops[order], count)]
    node, members, hop = (tensor[order].int() for tensor in (targets, sources, hops))
    first = torch.ones(len(order), dtype=torch.bool, device=order.device)
    first[1:] = (hop.diff() != 0) | (node.diff() != 0)
    row, begins = first.cumsum(0, dtype=torch.int32) - 1, first.nonzero()[:, 0]
    graph = torch.repeat_interleave(torch.tensor(tuple(sizes), device=order.device))
    return Shells(
        members=members,
        node=node[begins],
        hop=hop[begins],
        starts=torch.nn.functional.pad(begins, (0, 1), value=len(order)).int(),
        rows=row[_order(members, nodes)],
        ends=_offsets(members.bincount(minlength=nodes)),
        graph=graph.int(),
        sizes=tuple(sizes),
        count=count,
    )


def shells_of_distances(distances: Tensor, count: int | None = None) -> Shells:
    """Return the shells of one graph from all its distances; a negative distance is no path.

    Without a count, shells reach the largest distance.

    Shapes: (nodes, nodes), distances[v, u] = d(u, v).
    Raises: InputError unless the matrix is square, of integers, with zeros on the diagonal alone.
    Holds: exactly.
    """
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1] or distances.dtype not in SIZES:
        raise InputError(
            f"distances are a square matrix of integers, got {tuple(distances.shape)} of {distances.dtype}"
        )
    if not torch.equal(distances == 0, torch.eye(len(distances), dtype=torch.bool, device=distances.device)):
        raise InputError("a node is at distance 0 from itself and from no other")
    count = int(distances.max()) + 1 if count is None and len(distances) else count
    targets, sources = torch.nonzero((distances > 0) & (distances < (count or 1)), as_tuple=True)
    return shells_of_pairs(targets, sources, distances[targets, sources], [len(distances)], count or 1)


def batch_shells(graphs: Sequence[Shells]) -> Shells:
    """Return the shells of several graphs as those of one batch, its nodes numbered one graph after another.

    Raises: InputError for no graph, and when the numbers of shells differ.
    Holds: exactly; a layer gives every graph what it gives it alone.
    """
    if len({shells.count for shells in graphs}) != 1:
        counts = sorted({shells.count for shells in graphs})
        raise InputError(
            f"a batch needs graphs with one number of shells (see with_count), got {counts or 'none'}"
        )
    nodes = _before([shells.nodes for shells in graphs])
    rows = _before([shells.node.shape[0] for shells in graphs])
    entries = _before([shells.members.shape[0] for shells in graphs])
    hop = torch.cat([shells.hop for shells in graphs])
    order = torch.argsort(
        hop, stable=True
    )  # graphs follow each other, so nodes stay sorted within a distance
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    lengths = torch.cat([shells.starts.diff() for shells in graphs])[order].long()
    first = torch.cat([s.starts[:-1].long() + e for s, e in zip(graphs, entries, strict=True)])[order]
    starts = _offsets(lengths)
    total = sum(shells.members.shape[0] for shells in graphs)
    shift = torch.repeat_interleave(first - starts[:-1], lengths, output_size=total)
    members = torch.cat([s.members + n for s, n in zip(graphs, nodes, strict=True)])
    owners = torch.cat([s.rows.long() + r for s, r in zip(graphs, rows, strict=True)])
    ends = [s.ends[:-1] + e for s, e in zip(graphs, entries, strict=True)]
    before = _before([len(shells.sizes) for shells in graphs])
    return Shells(
        members=members[shift + torch.arange(total, device=order.device)],
        node=torch.cat([s.node + n for s, n in zip(graphs, nodes, strict=True)])[order],
        hop=hop[order],
        starts=starts,
        rows=place[owners].int(),
        ends=torch.cat([*ends, starts[-1:]]),
        graph=torch.cat([s.graph + b for s, b in zip(graphs, before, strict=True)]),
        sizes=tuple(size for shells in graphs for size in shells.sizes),
        count=graphs[0].count,
    )


def check_count(count: int) -> None:
    """Raise InputError unless a number of shells is at least 1."""
    if count < 1:
        raise InputError(f"the number of shells, the node itself included, is at least 1, got {count}")


def check_edges(edges: Tensor, nodes: int) -> None:
    """Raise InputError unless edges are two rows of integers and, looked at on a CPU alone, join nodes."""
    if edges.ndim != 2 or edges.shape[0] != 2 or edges.dtype not in SIZES:
        raise InputError(
            f"edges are a (2, any) tensor of integers, sources above targets, got {tuple(edges.shape)} of "
            f"{edges.dtype}"
        )
    if edges.device.type != "cpu" or under_transform() or not edges.numel():
        return
    low, high = int(edges.min()), int(edges.max())
    if low < 0 or high >= nodes:
        raise InputError(f"edges of {nodes} nodes join nodes 0 … {nodes - 1}, got {low} … {high}")


def _order(numbers: Tensor, below: int) -> Tensor:
    """Return the stable order of numbers from 0 on; those of 16 bits are sorted by radix on a CPU."""
    if numbers.device.type != "cpu" or below > 2**16:
        return torch.argsort(numbers, stable=True)
    return torch.from_numpy(np.argsort(numbers.numpy().astype(np.uint16), kind="stable"))


def _before(numbers: Sequence[int]) -> list[int]:
    """Return the sum of what comes before every number."""
    return [sum(numbers[:place]) for place in range(len(numbers))]


def _offsets(lengths: Tensor) -> Tensor:
    """Return where segments of these lengths start, and where the last one ends."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def _segments(starts: Tensor, entries: int) -> Tensor:
    """Return the segment of every entry."""
    return torch.repeat_interleave(starts.diff().long(), output_size=entries)


def _check_pairs(targets: Tensor, sources: Tensor, hops: Tensor, sizes: Sequence[int], count: int) -> int:
    """Return the number of nodes of pairs that are right."""
    if not sizes or min(sizes) < 1:
        raise InputError(f"shells need graphs of at least one node each, got sizes {list(sizes)}")
    named = {"targets": targets, "sources": sources, "hops": hops}
    if len({tensor.shape for tensor in named.values()}) != 1 or targets.ndim != 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        raise InputError(f"pairs are three vectors of one length, got {shapes}")
    limits = {"targets": (0, sum(sizes)), "sources": (0, sum(sizes)), "hops": (1, count)}
    for name, tensor in named.items():
        low, high = limits[name]
        if tensor.dtype not in SIZES:
            raise InputError(f"{name} of pairs are integers, got {tensor.dtype}")
        if tensor.numel() and not (low <= int(tensor.min()) and int(tensor.max()) < high):
            raise InputError(
                f"{name} of pairs lie in {low} … {high - 1}, got {int(tensor.min())} … {int(tensor.max())}"
            )
    return sum(sizes)
