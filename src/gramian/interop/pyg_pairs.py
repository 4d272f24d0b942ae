"""Pairs of nodes by distance, of many graphs: searched by several processes, kept in one file."""

import hashlib
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import current_process, get_context
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gramian.errors import InputError
from gramian.files import atomic_file
from gramian.nn.distances import distance_shells
from gramian.nn.shells import check_count

VERSION = b"pairs 1"
"""Part of every key: what an older layout wrote is searched again."""

Edges = tuple[np.ndarray, int]
"""Edges (2, any), sources above targets, and the number of nodes."""

Pairs = tuple[np.ndarray, np.ndarray]
"""Pairs (2, entries), sources above targets, and the distance of each (entries)."""


@dataclass(frozen=True)
class Search:
    """What is searched for in a graph: its pairs of nodes from distance 1 to count − 1.

    Pairs are sorted by distance, then by target, then by source. Distances take one byte up to 256 shells.

    Raises: InputError, at construction, for a count below 1 or gigabytes that are not positive; when called,
        as `distance_shells`.
    Holds: exactly.
    """

    count: int
    directed: bool
    gigabytes: float

    def __post_init__(self) -> None:
        if not isinstance(self.count, int | np.integer):
            raise InputError(f"the number of shells is a whole number, got {self.count!r}")
        check_count(self.count)
        if not self.gigabytes > 0:
            raise InputError(f"shells need a positive number of gigabytes, got {self.gigabytes:g}")

    def __call__(self, graph: Edges) -> Pairs:
        """Search one graph."""
        edges, nodes = graph
        shells = distance_shells(
            torch.from_numpy(edges), nodes, self.count, directed=self.directed, gigabytes=self.gigabytes
        )
        row = np.repeat(np.arange(len(shells.node)), shells.starts.diff().numpy())
        index = np.stack((shells.members.numpy(), shells.node.numpy()[row]))
        return index, shells.hop.numpy()[row].astype(self.hop_type)

    @property
    def hop_type(self) -> type[np.generic]:
        """The type of distances."""
        return np.uint8 if self.count <= 256 else np.int32

    def key(self, graphs: Sequence[Edges]) -> str:
        """Return a hash of graphs and of what is searched for in them."""
        digest = hashlib.sha256(VERSION)
        digest.update(np.array([self.count, self.directed], "<i8").tobytes())
        for edges, nodes in graphs:
            digest.update(np.array([nodes, edges.shape[1]], "<i8").tobytes())
            digest.update(np.ascontiguousarray(edges, "<i8").tobytes())
        return digest.hexdigest()


def find_pairs(
    graphs: Sequence[Edges], search: Search, *, workers: int = 0, cache: Path | None = None
) -> list[Pairs]:
    """Search graphs by several processes, or read what was found before from a file of the folder `cache`.

    The file is named by a hash of the graphs and the search; one that is damaged is written anew. Where no
    process can be started the search is done in this one, with a warning.

    Raises: InputError for a negative number of workers, a folder that cannot be written, and as `Search`.
    Holds: exactly, whatever the number of workers.
    """
    if workers < 0:
        raise InputError(f"the number of workers is at least 0, got {workers}")
    if cache is None or not graphs:
        return _searched(graphs, search, workers)
    path = Path(cache) / f"{search.key(graphs)}.safetensors"
    found = _read(path, graphs, search)
    if found is None:
        found = _searched(graphs, search, workers)
        _write(path, found)
    return found


def _searched(graphs: Sequence[Edges], search: Search, workers: int) -> list[Pairs]:
    workers = min(workers, len(graphs))
    if not workers or current_process().daemon:  # a worker of a data loader cannot start others
        return [search(graph) for graph in graphs]
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        with pool:
            return list(pool.map(search, graphs, chunksize=-(-len(graphs) // (8 * workers))))
    except (BrokenProcessPool, OSError) as error:
        warnings.warn(
            f"shells are searched in this process, since others ended at once ({error}); in a script, call "
            'for workers under `if __name__ == "__main__":`',
            RuntimeWarning,
            stacklevel=5,
        )
        return [search(graph) for graph in graphs]


def _read(path: Path, graphs: Sequence[Edges], search: Search) -> list[Pairs] | None:
    """Return what a file holds, nothing where it is missing or damaged."""
    try:
        arrays = load_file(path)
        index, hop, ptr = (arrays[name] for name in ("index", "hop", "ptr"))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    shapes = index.shape == (2, len(hop)) and hop.ndim == 1 and ptr.shape == (len(graphs) + 1,)
    types = index.dtype == np.int32 and hop.dtype == search.hop_type and ptr.dtype == np.int64
    if not shapes or not types or ptr[0] != 0 or ptr[-1] != len(hop) or (np.diff(ptr) < 0).any():
        return None
    nodes = np.repeat([nodes for _, nodes in graphs], np.diff(ptr))
    if not ((index >= 0) & (index < nodes)).all() or not ((hop > 0) & (hop < search.count)).all():
        return None
    return list(zip(np.split(index, ptr[1:-1], 1), np.split(hop, ptr[1:-1]), strict=True))


def _write(path: Path, found: Sequence[Pairs]) -> None:
    arrays = {
        "index": np.concatenate([index for index, _ in found], 1),
        "hop": np.concatenate([hop for _, hop in found]),
        "ptr": np.cumsum([0, *(len(hop) for _, hop in found)], dtype=np.int64),
    }
    try:
        with atomic_file(path) as temporary:
            save_file(arrays, temporary)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"shells cannot be kept in {path.parent} ({error}); name a folder that can be written to"
        ) from error
