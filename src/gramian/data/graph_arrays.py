"""Graphs from plain arrays and back: .npz files laid end to end, or with the number of each node's graph."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gramian.data.archives import read_npz
from gramian.data.graph_splits import Split
from gramian.data.graphs import MOST_CLASSES, NODE_TASKS, TASKS, Graphs
from gramian.data.objectives import IGNORED
from gramian.errors import InputError
from gramian.files import atomic_file

Arrays = Mapping[str, np.ndarray]

COLLECTION = (
    "edge_index", "graph_indicator", "node_labels", "node_attributes", "edge_labels", "edge_attributes",
    "graph_labels", "graph_attributes",
)  # fmt: skip
"""Arrays of the layout with each node's graph and edges between nodes counted through all graphs."""

LAID_OUT = (
    "x", "node_types", "edge_index", "edge_attr", "edge_types", "node_ptr", "edge_ptr", "y", "task",
    "classes", "node_vocabulary", "edge_vocabulary", "train", "val", "validation", "test",
)  # fmt: skip
"""Arrays of the layout end to end; `x`, `edge_attr` and what follows `y` may be missing."""


def load_npz(path: Path, task: str | None = None) -> Graphs:
    """Read graphs from a .npz file of plain arrays.

    Laid end to end: `node_ptr`, `edge_ptr` (graphs + 1), `edge_index` (2, e) counted within each graph, `x`
    (n, d) or `node_types` (n), perhaps `edge_attr` or `edge_types`, `y`, a split `train`, `val`, `test`,
    numbers of types `node_vocabulary` and `edge_vocabulary`, and `classes`. As a collection:
    `graph_indicator` (n), sorted, `edge_index` (2, e) counted through all graphs, `graph_labels` or
    `graph_attributes`, and perhaps `node_labels`, `node_attributes`, `edge_labels` and `edge_attributes`.
    Other arrays are not looked at.

    Raises: InputError when the file is damaged, needs more memory than there is, or its arrays do not fit.
    Holds: exactly; loops and repeated edges are left out and counted.
    """
    return from_arrays(path.stem, read_npz(path, {*COLLECTION, *LAID_OUT})[0], task)


def save_npz(path: Path, graphs: Graphs) -> None:
    """Write graphs as a .npz file, laid end to end, that `load_npz` reads.

    Raises: InputError for more than one split.
    Holds: exactly: what is read is what was written, but for loops and repeated edges.
    """
    if len(graphs.splits) > 1:
        raise InputError(f"{graphs.name} has {len(graphs.splits)} splits; a file holds one at most")
    y = graphs.y.numpy()
    if graphs.classifies:
        numbers = np.array(graphs.classes)
        y = np.where(y == IGNORED, IGNORED, numbers[np.where(y == IGNORED, 0, y)])
    arrays = {
        "x" if graphs.x.is_floating_point() else "node_types": graphs.x.numpy(),
        "edge_index": graphs.edge_index.numpy(),
        "node_ptr": graphs.ptr.numpy(),
        "edge_ptr": graphs.edge_ptr.numpy(),
        "y": y,
        "task": np.array(graphs.task),
        "node_vocabulary": np.array(graphs.node_types, np.int64),
        "edge_vocabulary": np.array(graphs.edge_types, np.int64),
    }
    if graphs.edge_attr is not None:
        arrays["edge_attr" if graphs.edge_attr.is_floating_point() else "edge_types"] = (
            graphs.edge_attr.numpy()
        )
    if graphs.classes:
        arrays["classes"] = np.array(graphs.classes)
    for split in graphs.splits:
        arrays |= {name: part.numpy() for name, part in vars(split).items()}
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)


def from_arrays(name: str, arrays: Arrays, task: str | None = None) -> Graphs:
    """Make graphs of arrays in either layout; see `load_npz`.

    Numbers as targets make the task regression, whole numbers classification, several columns of 0 and 1
    multilabel; as many rows as nodes make it one of nodes. `task` says otherwise where that fits.
    """
    if task is not None and task not in TASKS:
        raise InputError(f"the task must be one of {', '.join(TASKS)}, not {task!r}")
    if "graph_indicator" in arrays:
        arrays = _laid_out(name, arrays, task)
    missing = [each for each in ("edge_index", "node_ptr", "edge_ptr", "y") if each not in arrays]
    if "x" not in arrays and "node_types" not in arrays:
        missing.append("x or node_types")
    if missing:
        raise InputError(
            f"{name} lacks {', '.join(missing)}; graphs need edge_index, y, x or node_types, and node_ptr "
            f"and edge_ptr, or graph_indicator"
        )
    ptr, edge_ptr = (torch.from_numpy(_whole(arrays[each], name, each)) for each in ("node_ptr", "edge_ptr"))
    x = _features(arrays["x" if "x" in arrays else "node_types"], name, "nodes")
    edges = next((arrays[each] for each in ("edge_attr", "edge_types") if each in arrays), None)
    graphs = max(len(ptr) - 1, 0)
    task, y, classes = _targets(name, arrays, task, len(x), graphs)
    return Graphs(
        name,
        task,
        x,
        _narrow(_whole(arrays["edge_index"], name, "edge_index", 2)),
        ptr,
        edge_ptr,
        y,
        None if edges is None else _features(edges, name, "edges"),
        _sizes(arrays, "node_vocabulary", name),
        _sizes(arrays, "edge_vocabulary", name),
        classes,
        _splits(arrays, name),
    ).simple()


def _laid_out(name: str, arrays: Arrays, task: str | None) -> Arrays:
    """Return the arrays of a collection laid end to end."""
    labels = (
        "graph_labels" if task == "classification" or "graph_attributes" not in arrays else "graph_attributes"
    )
    if labels not in arrays or "edge_index" not in arrays:
        raise InputError(f"{name} lacks edge_index, graph_labels or graph_attributes")
    graph = _whole(arrays["graph_indicator"], name, "graph_indicator")
    edges, count = _whole(arrays["edge_index"], name, "edge_index", 2), len(np.atleast_1d(arrays[labels]))
    if (np.diff(graph) < 0).any() or not len(graph) or graph[0] < 0 or graph[-1] >= count:
        raise InputError(
            f"{name}: the graphs of the nodes must be sorted and among the {count:,} that have labels"
        )
    if len(edges) != 2 or (edges.size and not 0 <= edges.min() <= edges.max() < len(graph)):
        raise InputError(f"{name}: edges (2, e) must lead from and to the {len(graph):,} nodes")
    if (across := graph[edges[0]] != graph[edges[1]]).any():
        raise InputError(f"{name}: edge {int(across.argmax())} leads from one graph to another")
    order = np.argsort(graph[edges[0]], kind="stable")
    ptr = np.searchsorted(graph, np.arange(count + 1))
    edges, of_edge = edges[:, order], graph[edges[0]][order]
    made = {
        "x": _labelled(arrays, "node", len(graph), name),
        "edge_index": edges - ptr[of_edge],
        "node_ptr": ptr,
        "edge_ptr": np.searchsorted(of_edge, np.arange(count + 1)),
        "y": arrays[labels],
    }
    if "edge_labels" in arrays or "edge_attributes" in arrays:
        made["edge_attr"] = _labelled(arrays, "edge", len(order), name)[order]
    return made


def _labelled(arrays: Arrays, what: str, count: int, name: str) -> np.ndarray:
    """Return the types of nodes or edges, or their attributes beside labels as columns of 0 and 1."""
    labels, attributes = (arrays.get(f"{what}_{each}") for each in ("labels", "attributes"))
    for each in (labels, attributes):
        if each is not None and (each.ndim not in (1, 2) or len(each) != count or 0 in each.shape[1:]):
            raise InputError(f"{name}: there are {count:,} {what}s but labels or attributes {each.shape}")
    if labels is None:
        return np.zeros(count, np.int16) if attributes is None else _columns(attributes)
    columns = _columns(_whole(labels, name, f"{what}_labels", labels.ndim)).T
    types = np.stack([np.unique(column, return_inverse=True)[1] for column in columns], 1)
    if attributes is None:
        return types
    sizes = (types.max(0, initial=0) + 1).tolist()
    if sum(sizes) > MOST_CLASSES:
        raise InputError(
            f"{name}: beside attributes {what}s may have {MOST_CLASSES:,} labels, not {sum(sizes):,}"
        )
    hot = [np.eye(size, dtype=np.float32)[column] for size, column in zip(sizes, types.T, strict=True)]
    return np.concatenate([_numbers(_columns(attributes), name, f"{what}_attributes"), *hot], 1)


def _targets(
    name: str, arrays: Arrays, task: str | None, nodes: int, graphs: int
) -> tuple[str, Tensor, tuple[int, ...]]:
    """Return the task, the targets as it needs them, and the numbers of the classes."""
    values = arrays["y"]
    if values.ndim not in (1, 2) or len(values) not in (nodes, graphs):
        raise InputError(
            f"{name}: there must be targets of {graphs:,} graphs or {nodes:,} nodes, got {values.shape}"
        )
    task = task or str(arrays.get("task", "")) or _task(_columns(values), len(values) == graphs)
    rows = nodes if task in NODE_TASKS else graphs
    if len(values) != rows:
        raise InputError(f"{name}: the task {task} needs {rows:,} targets, got {len(values):,}")
    if task not in ("classification", "node"):
        return task, torch.from_numpy(_numbers(_columns(values), name, "targets")), ()
    if values.dtype.kind == "f" and (np.abs(values) < 2**53).all() and (values == np.floor(values)).all():
        values = values.astype(np.int64)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    values = _whole(values, name, "classes")
    known = values[values != IGNORED] if task == "node" else values
    classes = _whole(arrays["classes"], name, "classes") if "classes" in arrays else np.unique(known)
    if (
        not 1 < len(classes) <= MOST_CLASSES
        or not np.isin(known, classes).all()
        or (np.diff(classes) < 1).any()
    ):
        raise InputError(
            f"{name}: the task {task} needs 2 to {MOST_CLASSES:,} classes, in increasing order where listed, "
            f"got {len(classes):,}"
        )
    y = np.where((values == IGNORED) & (task == "node"), IGNORED, np.searchsorted(classes, values))
    return task, torch.from_numpy(y), tuple(classes.tolist())


def _task(values: np.ndarray, of_graphs: bool) -> str:
    """Return the task that targets (rows, columns) are for."""
    if of_graphs and values.shape[1] > 1 and ((values == 0) | (values == 1)).all():
        return "multilabel"
    if values.dtype.kind in "iu" and values.shape[1] == 1:
        return "classification" if of_graphs else "node"
    return "regression" if of_graphs else "node_regression"


def _features(values: np.ndarray, name: str, what: str) -> Tensor:
    """Return features as float32 or types as whole numbers, one column of which is no axis."""
    if values.ndim not in (1, 2):
        raise InputError(f"{name}: {what} must have one row each, (n) or (n, columns), got {values.shape}")
    if values.dtype.kind == "f":
        return torch.from_numpy(_numbers(_columns(values), name, f"features of {what}"))
    types = _narrow(_whole(values, name, f"types of {what}", values.ndim))
    return types[:, 0] if types.ndim == 2 and types.shape[1] == 1 else types


def _columns(values: np.ndarray) -> np.ndarray:
    return values[:, None] if values.ndim == 1 else values


def _numbers(values: np.ndarray, name: str, what: str) -> np.ndarray:
    if values.dtype.kind not in "fiub":
        raise InputError(f"{name}: {what} must be numbers, got {values.dtype}")
    with np.errstate(over="ignore"):  # what is too large for float32 is refused as not finite
        return values.astype(np.float32)


def _whole(values: np.ndarray, name: str, what: str, axes: int = 1) -> np.ndarray:
    """Return whole numbers as int64."""
    if values.dtype.kind not in "iu" or values.ndim != axes or values.max(initial=0) >= 2**63:
        raise InputError(
            f"{name}: {what} must be whole numbers with {axes} axes, got {values.dtype} {values.shape}"
        )
    return values.astype(np.int64)


def _narrow(values: np.ndarray) -> Tensor:
    """Return whole numbers in the narrowest type that holds them."""
    least, most = values.min(initial=0), values.max(initial=0)
    for kind in (np.int16, np.int32):
        if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max:
            return torch.from_numpy(values.astype(kind))
    return torch.from_numpy(values)


def _sizes(arrays: Arrays, key: str, name: str) -> tuple[int, ...]:
    return tuple(_whole(arrays[key], name, key).tolist()) if key in arrays else ()


def _splits(arrays: Arrays, name: str) -> tuple[Split, ...]:
    return () if "train" not in arrays else (split_of(arrays, name),)


def split_of(arrays: Arrays, name: str) -> Split:
    """Return the split that arrays `train`, `val` (or `validation`) and `test` of numbers tell.

    Raises: InputError when one is missing or holds other than whole numbers.
    """
    keys = ("train", "validation" if "validation" in arrays else "val", "test")
    if lost := [key for key in keys if key not in arrays]:
        raise InputError(f"{name} has no {lost[0]}; a split needs train, val and test")
    return Split(*(torch.from_numpy(_whole(arrays[key], name, key)) for key in keys))


def load_split(path: Path) -> Split:
    """Read a split from a .npz file with `train`, `val` and `test`, numbers of examples from 0.

    Raises: InputError when the file cannot be read or lacks one of them.
    """
    return split_of(read_npz(path, {"train", "val", "validation", "test"})[0], path.name)
