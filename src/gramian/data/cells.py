"""The cells of a file by column, as they stand in it: CSV, TSV, Parquet or .npz, for tables to be made of."""

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from gramian.data.archives import read_npz
from gramian.data.parquet import check_parquet
from gramian.errors import InputError, MissingExtraError

LEVELS = 30
"""Most levels that a column of words may have."""

CLASSES = 1000
"""Most classes that a target may have."""

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
"""Cells that hold no value, in lower case."""

ARRAYS = ("X", "y", "train_index", "test_index")
"""What is read of a .npz file."""

Split = tuple[Int64[Tensor, " train"], Int64[Tensor, " test"]]
Levels = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of a file by column, as they stand there, and where each row is."""

    name: str
    cells: Mapping[str, Sequence[Any]]
    where: Sequence[str]
    target: str | None = None
    splits: tuple[Split, ...] = ()

    def check(self, *names: str) -> None:
        """Raise InputError naming the first column that is not there, and without rows."""
        if not self.where:
            raise InputError(f"{self.name} has no rows")
        if lost := [name for name in names if name not in self.cells]:
            raise InputError(f"{self.name} has no column {lost[0]!r}; it has {listed(self.cells)}")

    def present(self, name: str) -> Sequence[Any]:
        """Return a column in which no value is missing."""
        for where, cell in zip(self.where, self.cells[name], strict=True):
            if cell is None or cell != cell or (isinstance(cell, str) and cell.strip().lower() in MISSING):
                what = f"{self.name}: column {name!r} has no value in {where}"
                raise InputError(f"{what}; fill it in, or leave out the row or the column")
        return self.cells[name]

    def holds_words(self, name: str) -> bool:
        """Whether no cell of a column is a number."""
        return all(_number(cell) is None for cell in self.present(name))

    def numbers(self, name: str) -> list[float]:
        """Return a column of finite numbers."""
        found = []
        for where, cell in zip(self.where, self.present(name), strict=True):
            value = _number(cell)
            if value is None or not math.isfinite(value):
                what = f"got {str(cell)[:40]!r} in {where}"
                raise InputError(f"{self.name}: column {name!r} must hold finite numbers, {what}")
            found.append(value)
        return found

    def words(self, name: str) -> Sequence[str]:
        """Return a column of words."""
        words = self.present(name)
        if wrong := [word for word in words if not isinstance(word, str)]:
            kind = type(wrong[0]).__name__
            raise InputError(f"{self.name}: column {name!r} holds {kind} values; give numbers or words")
        return words

    def whole_numbers(self, name: str) -> list[int]:
        """Return a column of whole numbers that are to be classes."""
        found = []
        for where, cell in zip(self.where, self.present(name), strict=True):
            value = _number(cell)
            if value is None or not value.is_integer():
                what = f"column {name!r} holds {str(cell)[:40]!r} in {where}"
                wanted = "classes are words alone or whole numbers alone"
                raise InputError(f"{self.name}: {what}; {wanted}, other numbers are to be regressed on")
            found.append(int(value))
        return found

    def levels(self, name: str) -> tuple[str, ...]:
        """Return the different words of a column, in order."""
        words = self.words(name)
        levels, most = tuple(sorted(set(words))), min(LEVELS, max(2, len(words) // 2))
        if len(levels) > most:
            raise InputError(
                f"{self.name}: column {name!r} holds {len(levels):,} different words in {len(words):,} rows, "
                f"too many for levels (at most {most}); leave it out (leave_out) or make numbers of it"
            )
        return levels

    def classes(self, name: str) -> tuple[tuple[str, ...], Int64[Tensor, " n"]]:
        """Return the names of the classes of a column, in order, and the number of each row's."""
        read = self.words if self.holds_words(name) else self.whole_numbers
        values: Sequence[Any] = read(name)
        found = sorted(set(values))
        if len(found) < 2:
            raise InputError(f"{self.name}: column {name!r} holds a single class; at least two are needed")
        if len(found) > CLASSES or 2 * len(found) >= len(values):
            raise InputError(
                f"{self.name}: column {name!r} holds {len(found):,} different values in {len(values):,} rows "
                "like a number to regress on or a name; classes are fewer than half of the rows and at "
                f"most {CLASSES:,}"
            )
        numbers = {value: number for number, value in enumerate(found)}
        return tuple(map(str, found)), torch.tensor([numbers[value] for value in values])

    def features(self, name: str, categories: Levels) -> dict[str, Tensor]:
        """Return a column of numbers, or of 0 and 1 for each level, the last alone where there are two."""
        if name not in categories:
            return {name: torch.tensor(self.numbers(name), dtype=torch.float64)}
        words, levels = self.present(name), categories[name]
        for where, word in zip(self.where, words, strict=True):
            if word not in levels:
                what = f"column {name!r} holds {str(word)[:40]!r} in {where}"
                raise InputError(f"{self.name}: {what}; the levels learnt from are {listed(levels)}")
        shown = levels[1:] if len(levels) == 2 else levels
        marks = {level: [float(word == level) for word in words] for level in shown}
        return {f"{name}={level}": torch.tensor(mark).double() for level, mark in marks.items()}


def _number(cell: Any) -> float | None:
    """Return the number that a cell holds, if it is one; 1_000 is a word here."""
    try:
        return None if isinstance(cell, str) and "_" in cell else float(cell)
    except (TypeError, ValueError):
        return None


def listed(names: Iterable[str]) -> str:
    """Return names for a message, the first twenty of them."""
    names = list(names)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(map(repr, names[:20])) or "none") + more


def diabetes() -> Cells:
    """Give scikit-learn's diabetes: ten numbers of 442 patients and the disease's progression."""
    from sklearn.datasets import load_diabetes  # a second to import, so only where it is used

    found: Any = load_diabetes(scaled=False)
    columns = dict(zip(found["feature_names"], found["data"].T.tolist(), strict=True))
    columns["progression"] = found["target"].tolist()
    return Cells("scikit-learn diabetes", columns, _rows(found["target"]), "progression")


def read_cells(path: Path, header: bool | None) -> Cells:
    """Return the cells of a file; `header` is as `load_table` takes it.

    Raises: InputError for a file that is missing, damaged, of another format or without rows of equal length;
        MissingExtraError for .parquet without pyarrow.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _delimited(path, header)
    if suffix in (".parquet", ".npz"):
        return _parquet(path) if suffix == ".parquet" else _npz(path)
    raise InputError(f"{path.name} is no table known here; .csv, .tsv, .parquet and .npz are")


def _rows(rows: Iterable[Any]) -> list[str]:
    return [f"row {number}" for number, _ in enumerate(rows, 1)]


def _delimited(path: Path, header: bool | None) -> Cells:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            first = next((line for line in stream if line.strip()), "")
            stream.seek(0)
            marks = "\t" if path.suffix.lower() == ".tsv" else ",;\t"
            delimiter = max(marks, key=re.sub('"[^"]*"', "", first).count)
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            rows = ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
            lines = [(f"line {number}", cells) for number, cells in rows if any(cells)]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a table in UTF-8: {error}") from error
    if not lines:
        raise InputError(f"{path.name} is empty; a line for each row is needed")
    cells = lines[0][1]
    if header is None:
        header = _names_columns([row for _, row in lines])
    names = [(header and cell) or f"{'column ' * header}{i}" for i, cell in enumerate(cells, 1)]
    rows = lines[1:] if header else lines
    for where, row in rows:
        if len(row) != len(names):
            raise InputError(f"{path.name}: {where} has {len(row)} cells, but there are {len(names)} columns")
    columns = [[row[index] for _, row in rows] for index in range(len(names))]
    return _named(path.name, names, columns, [where for where, _ in rows])


def _names_columns(rows: Sequence[Sequence[str]]) -> bool:
    """Tell whether the first line has words none of which stands in its own column again."""
    words = {
        index: cell
        for index, cell in enumerate(rows[0])
        if _number(cell) is None and cell.lower() not in MISSING
    }
    again = any(row[index] == word for row in rows[1:] for index, word in words.items() if index < len(row))
    return bool(words) and not again


def _named(name: str, names: Sequence[str], cells: Iterable[Sequence[Any]], where: Sequence[str]) -> Cells:
    counts = Counter(names)
    if repeated := [each for each in counts if counts[each] > 1]:
        raise InputError(f"{name} has more than one column {repeated[0]!r}; names must differ")
    return Cells(name, dict(zip(names, cells, strict=True)), where)


def _parquet(path: Path) -> Cells:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError('reading .parquet needs pyarrow: pip install "gramian[parquet]"') from error
    check_parquet(path)
    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        cells = [column.to_pylist() for column in table.columns]
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path} cannot be read as parquet: {error}") from error
    return _named(path.name, table.column_names, cells, _rows(range(table.num_rows)))


def _npz(path: Path) -> Cells:
    arrays, names = read_npz(path, ARRAYS)
    x, y = arrays.get("X"), arrays.get("y")
    if x is None or x.ndim != 2 or x.dtype.kind not in "biuf":
        raise InputError(f"{path.name} needs numbers X (rows, features); it holds {listed(names)}")
    columns = {f"x{number}": column.tolist() for number, column in enumerate(x.T, 1)}
    if not len(x):
        raise InputError(f"{path.name} has no rows")
    if y is None:
        return Cells(path.name, columns, _rows(x))
    if y.shape != x.shape[:1] or y.dtype.kind not in "biufU":
        raise InputError(
            f"{path.name} needs numbers or words y, one for each of {len(x)} rows, got shape {y.shape}"
        )
    return Cells(path.name, columns | {"y": y.tolist()}, _rows(x), "y", _splits(path, arrays, len(x)))


def _splits(path: Path, arrays: Mapping[str, np.ndarray], count: int) -> tuple[Split, ...]:
    """Return the pairs of rows to learn from and to report on."""
    parts = [arrays[name] for name in ARRAYS[2:] if name in arrays]
    if parts and (
        any(part.dtype.kind not in "iu" or part.ndim != 2 or not part.size for part in parts)
        or any(part.min() < 0 or part.max() >= count for part in parts)
        or [len(part) for part in parts] != 2 * [len(parts[0])]
        or any(np.intersect1d(*pair).size for pair in zip(*parts, strict=True))
    ):
        what = "train_index and test_index (k, …) that count its rows from 0 and have none in common"
        raise InputError(f"{path.name} needs {what}, or neither of them")
    return tuple((torch.tensor(a).long(), torch.tensor(b).long()) for a, b in zip(*parts, strict=True))
