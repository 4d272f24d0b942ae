"""Graphs from files and folders of any format that is known, and the parts of a data set put together."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gramian.data.graph_arrays import load_npz
from gramian.data.graph_splits import Split
from gramian.data.graph_tensors import load_tensors
from gramian.data.graph_text import collection, load_text
from gramian.data.graphs import IGNORED, Graphs
from gramian.data.molecules import load_molecules
from gramian.errors import InputError

PARTS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
"""Parts of a data set by the end of the names of their files."""

READERS = {".npz": load_npz, ".pt": load_tensors}
MOLECULES = (".smi", ".txt", ".csv", ".gz")


def load_graphs(
    path: Path,
    *,
    task: str | None = None,
    target: str | Sequence[str] | None = None,
    splits: Path | None = None,
) -> Graphs:
    """Read graphs from a file or folder.

    A folder holds a collection as text (NAME_A.txt and others; see `load_text`), or a .npz or .pt file for
    each part of a data set (names that end in train, val and test), or a single one; its folders `raw` and
    `processed` are looked into, so that a folder of PyTorch Geometric will do. A file is .npz (`load_npz`),
    .pt (`load_tensors`), or molecules as SMILES: .smi, .txt or .csv, gzipped or not (`load_molecules`).

    Args:
        path: what is read.
        task: what is predicted, one of `TASKS`; by the targets when None.
        target: columns, or a property that RDKit computes, to be predicted of molecules.
        splits: .npz of row numbers `train`, `val`, `test`, of molecules; found by its name when None.

    Raises: InputError when there is nothing that can be read, and as the readers; MissingExtraError for
        molecules without rdkit.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no file or folder {path}")
    if path.is_dir():
        return _load_folder(path, task)
    suffix = path.suffix.lower()
    if suffix in READERS:
        return READERS[suffix](path, task)
    if suffix in MOLECULES:
        return load_molecules(path, target, task=task, splits=splits)
    raise InputError(f"{path} must be a folder or end in .npz, .pt, .smi, .txt, .csv or .gz")


def _load_folder(folder: Path, task: str | None) -> Graphs:
    if edges := collection(folder):
        return load_text(edges, task)
    files = [
        path
        for place in (folder, folder / "processed")
        for path in sorted(place.glob("*"))
        if path.suffix.lower() in READERS and not path.name.startswith("pre_")
    ]
    parts = {part: [each for each in files if _ends(each, ends)] for part, ends in PARTS.items()}
    if all(len(found) == 1 for found in parts.values()):
        read = {part: READERS[found[0].suffix.lower()](found[0], task) for part, found in parts.items()}
        return joined(folder.name, read)
    if len(files) == 1:
        return READERS[files[0].suffix.lower()](files[0], task)
    names = ", ".join(path.name for path in files[:5]) or "no such file"
    raise InputError(
        f"the folder {folder} must hold NAME_A.txt, one .npz or .pt file, or one for each of train, val and "
        f"test; it holds {names}"
    )


def _ends(path: Path, ends: Sequence[str]) -> bool:
    return path.stem.lower().replace("-", "_").split("_")[-1] in ends


def joined(name: str, parts: Mapping[str, Graphs]) -> Graphs:
    """Put the parts `train`, `validation` and `test` of a data set together, with the split that they are.

    Types and classes are those that occur in any part.

    Raises: InputError when a part is missing, or tasks, features or targets are not alike.
    Holds: exactly: the split's parts are the graphs of the parts.
    """
    if lost := [part for part in PARTS if part not in parts]:
        raise InputError(f"{name} has no part {lost[0]!r}; train, validation and test are needed")
    every = [parts[part] for part in PARTS]
    if len({_kind(each) for each in every}) > 1:
        kinds = "; ".join(f"{part}: {_kind(parts[part])}" for part in PARTS)
        raise InputError(f"{name}: the parts must have tasks, features and targets alike, got {kinds}")
    classes = tuple(sorted({number for each in every for number in each.classes}))
    sizes = torch.tensor([len(each) for each in every])
    numbers = torch.arange(int(sizes.sum())).split(sizes.tolist())
    attributes = [each.edge_attr for each in every if each.edge_attr is not None]
    return Graphs(
        name,
        every[0].task,
        torch.cat([each.x for each in every]),
        torch.cat([each.edge_index for each in every], 1),
        _after([each.ptr for each in every]),
        _after([each.edge_ptr for each in every]),
        torch.cat([_renumbered(each, classes) for each in every]),
        torch.cat(attributes) if attributes else None,
        _most([each.node_types for each in every]),
        _most([each.edge_types for each in every]),
        classes,
        (Split(*numbers),),
        sum(each.dropped for each in every),
    )


def _kind(graphs: Graphs) -> tuple[object, ...]:
    """Return what has to be alike in all parts of a data set."""
    edges = graphs.edge_attr
    shapes = [
        None if part is None else (part.is_floating_point(), *part.shape[1:]) for part in (graphs.x, edges)
    ]
    return graphs.task, *shapes, None if graphs.classifies else graphs.y.shape[1]


def _renumbered(graphs: Graphs, classes: tuple[int, ...]) -> Tensor:
    if not graphs.classifies:
        return graphs.y
    places = torch.tensor([classes.index(number) for number in graphs.classes])
    return torch.where(graphs.y == IGNORED, IGNORED, places[graphs.y.long().clamp(min=0)])


def _after(pointers: Sequence[Tensor]) -> Tensor:
    """Return where the parts start when all are laid end to end."""
    sizes = torch.cat([ptr.diff() for ptr in pointers])
    return torch.cat((torch.zeros(1, dtype=torch.long), sizes.cumsum(0)))


def _most(types: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(max(column) for column in zip(*types, strict=True))
