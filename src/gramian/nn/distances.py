"""Shortest-path distances of a graph from its list of edges, by breadth-first search, as shells."""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

from gramian.errors import InputError
from gramian.nn.shells import GIGABYTE, Shells, check_count, check_edges, shells_of_pairs

NODES_BY_BITS = 512
"""Largest graph that is searched from all nodes at once; of larger ones, long paths take longer that way."""

DISTANCES_AT_ONCE = 4_000_000
"""Distances that are searched in one go: 32 MB."""

PAIR_BYTES = 80
"""Memory that one pair of nodes takes while shells are sorted; kept are 8."""


def distance_shells(
    edges: Tensor,
    nodes: int,
    count: int | None = None,
    *,
    directed: bool = False,
    gigabytes: float = 4.0,
) -> Shells:
    """Return the shells of a graph: for every node, which nodes lie at which distance.

        shell k of v = {u : d(u, v) = k},   0 ≤ k < count

    Distances count edges; of parallel edges one counts and loops never do. An edge (u, v) is walked both
    ways, in a directed graph from u to v, so that a shell of v holds those who reach v. Who does not reach v
    is in no shell of it. Without a count, shells go as far as the farthest pair that is connected.

    Shapes: edges (2, any), sources above targets.
    Raises: InputError for edges of another shape or type, a node that is not there, no node, a count below 1,
        and, before it is allocated, for shells that need more than `gigabytes`.
    Holds: exactly.
    """
    if nodes < 1:
        raise InputError(f"a graph needs at least one node, got {nodes}")
    edges = edges.cpu()
    check_edges(edges, nodes)
    if count is not None:
        check_count(count)
    if not gigabytes > 0:
        raise InputError(f"shells need a positive number of gigabytes, got {gigabytes:g}")
    ends = edges.numpy().astype(np.int64, copy=False)
    limit = nodes - 1 if count is None else min(count, nodes) - 1
    if nodes <= NODES_BY_BITS:
        return _shells(_all_distances(ends, nodes, limit, directed), count, gigabytes)
    onto = csr_matrix((np.ones(ends.shape[1], np.int8), ends[::-1]), shape=(nodes, nodes))
    found = list(_pairs(onto, nodes, limit, directed, gigabytes))
    v, u, k = (torch.from_numpy(np.concatenate(part)) for part in zip(*found, strict=True))
    reached = int(k.max()) + 1 if k.numel() else 1
    return shells_of_pairs(v, u, k, [nodes], reached if count is None else count)


def _all_distances(edges: np.ndarray, nodes: int, limit: int, directed: bool) -> np.ndarray:
    """Return d(u, v) at [v, u], and the largest number of its type where that is above the limit.

    Who reaches v within k steps is a set of bits, R_k(v) = ∪ {R_{k−1}(w) : w = v or an edge (w, v)}, so that
    d(u, v) is the number of k < limit with u ∉ R_k(v). Columns are padded to a multiple of 64.
    """
    sources, targets = edges
    width = -(-nodes // 64) * 64
    near = np.eye(nodes, width, dtype=bool)
    reached = np.packbits(near, 1, "little").view("<u8").T.copy()
    near[targets, sources] = True
    if not directed:
        near[sources, targets] = True
    onto, neighbours = np.nonzero(near)
    starts = np.searchsorted(onto, np.arange(nodes))
    distances = np.zeros((width // 64, nodes, 64), np.uint8 if limit < 255 else np.uint16)
    for _ in range(limit):
        distances += _bits(~reached)
        further = np.bitwise_or.reduceat(reached.take(neighbours, 1), starts, 1)
        if (further == reached).all():
            break
        reached = further
    distances[_bits(~reached).view(bool)] = np.iinfo(distances.dtype).max
    return distances.transpose(1, 0, 2).reshape(nodes, width)


def _bits(words: np.ndarray) -> np.ndarray:
    """Return the bits of words (rows, columns) as zeros and ones (rows, columns, 64)."""
    octets = words.astype("<u8", copy=False).view(np.uint8)
    return np.unpackbits(octets, 1, bitorder="little").reshape(*words.shape, 64)


def _shells(distances: np.ndarray, count: int | None, gigabytes: float) -> Shells:
    """Return the shells of all distances, which one sort puts in order of distance, node and member."""
    (nodes, width), flat = distances.shape, distances.ravel()
    entries = np.count_nonzero(flat != np.iinfo(flat.dtype).max) - nodes
    _check_memory(entries * PAIR_BYTES / GIGABYTE, nodes, gigabytes)
    order = np.argsort(flat, kind="stable")[nodes : nodes + entries].astype(np.int32)
    hop, node = flat[order], order // width
    members = order - node * width
    first = np.ones(entries + 1, bool)
    first[1:-1] = (node[1:] != node[:-1]) | (hop[1:] != hop[:-1])
    starts = np.flatnonzero(first).astype(np.int32)
    row = np.repeat(np.arange(len(starts) - 1, dtype=np.int32), np.diff(starts))
    ends = np.zeros(nodes + 1, np.int32)
    np.cumsum(np.bincount(members, minlength=nodes), out=ends[1:])
    by_member = np.argsort(members.astype(np.uint8 if nodes <= 256 else np.uint16), kind="stable")
    parts = (members, node[starts[:-1]], hop[starts[:-1]].astype(np.int32), starts, row[by_member])
    return Shells(
        *(torch.from_numpy(part) for part in parts),
        graph=torch.zeros(nodes, dtype=torch.int32),
        ends=torch.from_numpy(ends),
        sizes=(nodes,),
        count=(int(hop[-1]) + 1 if entries else 1) if count is None else count,
    )


def _check_memory(needed: float, nodes: int, gigabytes: float) -> None:
    if needed > gigabytes:
        raise InputError(
            f"shells of a graph of {nodes} nodes need about {needed:.3g} GB where {gigabytes:g} GB are "
            "allowed; ask for fewer shells or allow more gigabytes"
        )


def _pairs(
    onto: csr_matrix, nodes: int, limit: int, directed: bool, gigabytes: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield pairs (v, u) and their distance, some nodes v at a time, spread over the graph."""
    chunks = -(-nodes * nodes // DISTANCES_AT_ONCE)
    done = entries = 0
    for chunk in range(chunks):
        some = np.arange(chunk, nodes, chunks)
        distances = dijkstra(onto, directed, some, unweighted=True, limit=limit)
        place, u = np.nonzero((distances > 0) & np.isfinite(distances))
        done, entries = done + len(some), entries + len(u)
        sure = entries * PAIR_BYTES / GIGABYTE
        expected = sure / done * nodes
        if sure > gigabytes or expected > 2 * gigabytes:
            _check_memory(expected, nodes, gigabytes)
        yield some[place].astype(np.int32), u.astype(np.int32), distances[place, u].astype(np.int32)
