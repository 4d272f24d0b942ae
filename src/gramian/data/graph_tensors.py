"""Data sets that PyTorch Geometric has processed, read as plain tensors: nothing in the file is run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gramian.data.graph_arrays import from_arrays
from gramian.data.graphs import Graphs
from gramian.errors import InputError
from gramian.reading import check_regular, check_stored, check_unpacked

FIELDS = ("x", "edge_index", "edge_attr", "y")


class _Record:
    """Takes the place of PyTorch Geometric's classes in a file: fields, and nothing that could be run."""


STAND_INS: list[Any] = [
    (_Record, f"torch_geometric.data.{name}")
    for name in ("Data", "data.Data", "storage.GlobalStorage", "data.DataEdgeAttr", "data.DataTensorAttr")
]


def load_tensors(path: Path, task: str | None = None) -> Graphs:
    """Read graphs from a .pt file that PyTorch Geometric's InMemoryDataset has written, or a list of `Data`.

    Of each graph `x`, `edge_index`, `edge_attr` and `y` are read; nodes without `x` have the type 0.

    Raises: InputError when the file holds anything but tensors and numbers in such records, is of torch
        before 1.6, announces far more than it holds, and when they do not fit.
    Holds: exactly; loops and repeated edges are left out and counted.
    """
    check_regular(path)
    try:
        check_stored(path)
        with torch.serialization.safe_globals(STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file fails in many ways
        raise InputError(
            f"{path} is damaged or holds more than tensors and numbers, which is not read since code could "
            f"hide in it; save the graphs as .npz"
        ) from error
    try:
        arrays = _arrays(content, path)
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path} holds no graphs as PyTorch Geometric saves them: a record with slices, or records"
        ) from error
    return from_arrays(path.stem, arrays, task)


def _arrays(content: Any, path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a processed data set laid end to end."""
    if isinstance(content, tuple) and len(content) > 1 and isinstance(content[1], Mapping):
        fields = _fields(content[0])
        _check_held([fields], path)
        return _sliced(fields, content[1], path)
    if isinstance(content, tuple) and content:
        content = content[0]  # a single graph has no slices
    records = [_fields(each) for each in (content if isinstance(content, list) else [content])]
    _check_held(records, path)
    together = {name: [each[name] for each in records] for name in FIELDS if name in records[0]}
    sizes = torch.tensor([_size(each) for each in records])
    counts = torch.tensor([each.shape[1] for each in together["edge_index"]])
    joined = {name: torch.cat(parts, 1 if name == "edge_index" else 0) for name, parts in together.items()}
    return _named(joined, _starts(sizes), _starts(counts), path)


def _check_held(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Refuse tensors that repeat what the file holds once, or that torch may not read where they lie."""
    tensors = [each[name] for each in records for name in FIELDS if name in each]
    if any(each.data_ptr() % each.element_size() for each in tensors):
        raise ValueError("not aligned")
    check_unpacked(path, sum(each.numel() * each.element_size() for each in tensors))


def _sliced(fields: Mapping[str, Any], slices: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    edge_ptr = torch.as_tensor(slices["edge_index"])
    ptr = torch.as_tensor(slices["x"]) if "x" in fields else _starts(torch.as_tensor(fields["_num_nodes"]))
    return _named({name: fields[name] for name in FIELDS if name in fields}, ptr, edge_ptr, path)


def _named(fields: Mapping[str, Tensor], ptr: Tensor, edge_ptr: Tensor, path: Path) -> dict[str, np.ndarray]:
    arrays = {name: value.numpy() for name, value in fields.items()}
    if "x" not in arrays:
        check_unpacked(path, 2 * int(ptr[-1]))
        arrays["x"] = np.zeros(int(ptr[-1]), np.int16)
    return arrays | {"node_ptr": ptr.numpy(), "edge_ptr": edge_ptr.numpy()}


def _fields(record: Any) -> dict[str, Any]:
    """Return what a record holds, in whatever way its version kept it."""
    if not isinstance(record, Mapping):
        record = vars(record)
        if "_store" in record:
            store = vars(record["_store"])
            record = store["_mapping"] | {"_num_nodes": store.get("_num_nodes")}
    return {name: value for name, value in record.items() if value is not None}


def _size(fields: Mapping[str, Any]) -> int:
    return len(fields["x"]) if "x" in fields else int(fields["num_nodes"])


def _starts(sizes: Tensor) -> Tensor:
    return torch.cat((torch.zeros(1, dtype=torch.long), sizes.long().cumsum(0)))
