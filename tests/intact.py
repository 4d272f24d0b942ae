"""What a killed process has left: damaged files, and whether two results are the same but for times."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from safetensors.torch import load_file

from gramian.observe.record import Record
from gramian.train.manifest import MANIFEST, check_manifest

TIMES = re.compile(r"seconds|rates|tokens_per_second|took|versions|^time$|_ms$|speed")
"""Names of numbers that differ from run to run."""

TEMPORARY = re.compile(r"^\..*\.part$")
"""Names that files have before they are whole."""


def final_files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder under names that are not temporary."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.name.startswith("."):
            yield from final_files(path) if path.is_dir() else [path]


def leftovers(folder: Path) -> list[Path]:
    """Return what is under a temporary name below a folder."""
    return [path for path in sorted(folder.rglob("*")) if TEMPORARY.match(path.name)]


def damaged(folder: Path) -> list[str]:
    """Return the files below a folder that are not whole or not what was written, each with what is wrong."""
    found = []
    for path in final_files(folder):
        try:
            READERS[path.suffix](path)
            if path.name == MANIFEST:
                check_manifest(path.parent, [name.name for name in final_files(path.parent) if name != path])
        except Exception as error:
            found.append(f"{path.relative_to(folder)}: {type(error).__name__} {error}")
    return found


def differences(one: Path, other: Path) -> list[str]:
    """Return the files that two folders do not share, or that differ by more than times."""
    here, there = (
        {path.relative_to(folder): path for path in final_files(folder)} for folder in (one, other)
    )
    found = [f"{name}: in one only" for name in sorted(here.keys() ^ there.keys())]
    for name in sorted(here.keys() & there.keys()):
        read = CONTENTS.get(name.suffix)
        if read is not None and name.name != MANIFEST and not _equal(read(here[name]), read(there[name])):
            found.append(f"{name}: differs")
    return found


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are the same bit for bit, but for numbers under the names of times."""
    if isinstance(one, dict) and isinstance(other, dict):
        kept = [{key for key in each if not TIMES.search(key)} for each in (one, other)]
        return kept[0] == kept[1] and all(_equal(one[key], other[key]) for key in kept[0])
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)
    return one == other or (one != one and other != other)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _array(path: Path) -> Any:
    array = np.load(path, allow_pickle=False)
    return [array.dtype.str, array.shape, array.tobytes()]


def _rows(path: Path) -> list[list[str]]:
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    if len({len(row) for row in rows}) != 1 or not path.read_bytes().endswith(b"\n"):
        raise ValueError("the last row is cut off")
    return rows


def _page(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    HTMLParser().feed(text)
    if not text.rstrip().endswith("</html>"):
        raise ValueError("the page is cut off")


def _picture(path: Path) -> None:
    if not path.read_bytes().endswith(b"IEND\xaeB\x60\x82"):
        raise ValueError("the picture is cut off")


CONTENTS: dict[str, Callable[[Path], Any]] = {
    ".json": _json,
    ".jsonl": lambda path: Record(path).read(),
    ".safetensors": load_file,
    ".npy": _array,
    ".csv": _rows,
    ".txt": Path.read_bytes,
}
"""What is compared of a file, by its ending; pages and figures show times."""

READERS: dict[str, Callable[[Path], Any]] = {
    **CONTENTS,
    ".html": _page,
    ".svg": ElementTree.parse,
    ".png": _picture,
}
