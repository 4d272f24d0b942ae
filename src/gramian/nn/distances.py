"""Shortest-path distances of a graph from its list of edges, by breadth-first search, as shells."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

from gramian.errors import InputError
from gramian.nn.shells import GIGABYTE, Shells, check_count, check_edges, shells_of_pairs

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
    sources, targets = edges.numpy().astype(np.int64)
    onto = csr_matrix((np.ones(len(sources), np.int8), (targets, sources)), shape=(nodes, nodes))
    found = list(_pairs(onto, nodes, math.inf if count is None else float(count - 1), directed, gigabytes))
    v, u, k = (torch.from_numpy(np.concatenate(part)) for part in zip(*found, strict=True))
    reached = int(k.max()) + 1 if k.numel() else 1
    return shells_of_pairs(v, u, k, [nodes], reached if count is None else count)


def _pairs(
    onto: csr_matrix, nodes: int, limit: float, directed: bool, gigabytes: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield pairs (v, u) and their distance, some nodes v at a time, spread over the graph."""
    chunks = -(-nodes * nodes // DISTANCES_AT_ONCE)
    done = entries = 0
    for chunk in range(chunks):
        some = np.arange(chunk, nodes, chunks)
        distances = dijkstra(onto, directed, some, unweighted=True, limit=limit)
        place, u = np.nonzero((distances > 0) & np.isfinite(distances))
        done, entries = done + len(some), entries + len(u)
        needed, sure = entries / done * nodes * PAIR_BYTES / GIGABYTE, entries * PAIR_BYTES / GIGABYTE
        if sure > gigabytes or needed > 2 * gigabytes:
            raise InputError(
                f"shells of a graph of {nodes} nodes need about {needed:.3g} GB where {gigabytes:g} GB are "
                "allowed; ask for fewer shells or allow more gigabytes"
            )
        yield some[place].astype(np.int32), u.astype(np.int32), distances[place, u].astype(np.int32)
