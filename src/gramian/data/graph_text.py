"""Graph collections as text, in the format of the TU Dortmund: one file a kind of label."""

from pathlib import Path

import numpy as np

from gramian.data.graph_arrays import from_arrays
from gramian.data.graphs import Graphs
from gramian.errors import InputError
from gramian.reading import check_regular

FILES = (
    "graph_indicator", "node_labels", "node_attributes", "edge_labels", "edge_attributes",
    "graph_labels", "graph_attributes",
)  # fmt: skip
"""Files beside that of the edges, by the end of their names."""


def collection(folder: Path) -> Path | None:
    """Return the file of the edges of the collection in a folder, or in its folder `raw`, if there is one.

    Raises: InputError for more than one.
    """
    found = sorted(folder.glob("*_A.txt")) or sorted(folder.glob("raw/*_A.txt"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"the folder {folder} holds several collections ({names}); one is accepted")
    return found[0] if found else None


def load_text(edges: Path, task: str | None = None) -> Graphs:
    """Read a collection of graphs from text files, of which that of the edges is given.

    NAME_A.txt has the two nodes of each edge, counted from 1 through all graphs and parted by a comma;
    NAME_graph_indicator.txt the graph of each node, counted from 1 and sorted; NAME_graph_labels.txt or
    NAME_graph_attributes.txt what is to be predicted. Others may be there: labels of nodes become types, or
    columns of 0 and 1 beside attributes; edges alike. Nodes without either have the type 0.

    Raises: InputError when a file is missing or not text, when numbers or lengths do not fit.
    Holds: exactly; loops and repeated edges are left out and counted.
    Source: Morris et al. 2020, arXiv 2007.08663.
    """
    name = edges.name.removesuffix("_A.txt")
    paths = {each: edges.with_name(f"{name}_{each}.txt") for each in FILES}
    if not paths["graph_indicator"].exists():
        raise InputError(f"{paths['graph_indicator']} is missing; it tells the graph of each node")
    arrays = {each: _numbers(path) for each, path in paths.items() if path.exists()}
    for each in ("graph_indicator", "node_labels", "edge_labels", "graph_labels"):
        if each in arrays:
            arrays[each] = _whole(arrays[each], paths[each])
    arrays["graph_indicator"] = _column(arrays["graph_indicator"], paths["graph_indicator"]) - 1
    pairs = _whole(_numbers(edges), edges)
    if pairs.shape[1] != 2 and len(pairs):
        raise InputError(f"{edges} must have two nodes in each line, not {pairs.shape[1]}")
    arrays["edge_index"] = pairs.reshape(-1, 2).T - 1
    return from_arrays(name, arrays, task)


def _numbers(path: Path) -> np.ndarray:
    """Read lines of numbers parted by commas."""
    check_regular(path)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return np.loadtxt(lines, delimiter=",", comments=None, ndmin=2) if lines else np.zeros((0, 1))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must hold lines of numbers parted by commas: {error}") from error


def _whole(values: np.ndarray, path: Path) -> np.ndarray:
    if not ((np.abs(values) < 2**53) & (values == np.floor(values))).all():
        raise InputError(f"{path} must hold whole numbers")
    return values.astype(np.int64)


def _column(values: np.ndarray, path: Path) -> np.ndarray:
    if values.shape[1] != 1:
        raise InputError(f"{path} must have one number in each line, not {values.shape[1]}")
    return values[:, 0]
