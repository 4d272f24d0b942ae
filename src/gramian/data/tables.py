"""Tables to learn a number from: CSV, TSV, Parquet or .npz; words become levels, scales are kept."""

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gramian.errors import InputError, MissingExtraError

LEVELS = 30
"""Most levels that a column of words may have."""

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
"""Cells that hold no value, in lower case."""

ARRAYS = ("X", "y", "train_index", "test_index")
"""What is read of a .npz file."""

Split = tuple[Int64[Tensor, " train"], Int64[Tensor, " test"]]
Columns = Mapping[str, Tensor]
Levels = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of features with the number to be predicted of each, and what was done to get them."""

    name: str
    x: Float[Tensor, "n d"]
    y: Tensor
    """The target (n), in its own unit; whole numbers where it is a class."""
    columns: tuple[str, ...]
    """Names of the features; `colour=red` is the level `red` of the column `colour`."""
    target: str
    categories: Levels = field(default_factory=lambda: MappingProxyType({}))
    """The levels of each column of words."""
    dropped: tuple[str, ...] = ()
    """Columns left out since they are constant."""
    splits: tuple[Split, ...] = ()
    """Published splits into rows to learn from and rows to report on, where the file holds them."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.y)

    @property
    def duplicates(self) -> int:
        """How many rows have the features of an earlier one."""
        return len(self) - len(torch.unique(self.x, dim=0))

    def text(self) -> str:
        """Say in one sentence what the table is and what was done to it."""
        features = f"{len(self.columns)} feature{'s' * (len(self.columns) != 1)}"
        parts = [f"{self.name}: {len(self):,} rows, {features}, target {self.target!r}"]
        if self.categories:
            levels = (f"{name!r} ({len(words)} levels)" for name, words in self.categories.items())
            parts.append(f"words as levels: {', '.join(levels)}")
        if self.dropped:
            parts.append(f"left out as constant: {_listed(self.dropped)}")
        if repeated := self.duplicates:
            parts.append(f"{repeated:,} row{'s' * (repeated != 1)} with the features of an earlier one")
        return "; ".join(parts)


@dataclass(frozen=True, eq=False)
class Standardiser:
    """Means and scales of the training rows alone, by which all rows are standardised.

        z = (x − mean) / scale

    A column that is constant among the training rows keeps the scale 1.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Standardiser":
        """Take mean and standard deviation of rows (n, …) along their first axis."""
        mean, constant = rows.mean(0), rows.amax(0) == rows.amin(0)
        away = rows - mean
        size = away.abs().amax(0)  # its square may be too small or too large for a number
        scale = size * (away / size).square().mean(0).sqrt()
        return cls(mean, torch.where(constant, torch.ones_like(scale), scale))

    def __call__(self, rows: Tensor) -> Tensor:
        """Standardise rows."""
        return (rows - self.mean) / self.scale

    def back(self, rows: Tensor) -> Tensor:
        """Return standardised rows in their own unit."""
        return rows * self.scale + self.mean


def load_table(
    path: Path | None = None,
    target: str | None = None,
    *,
    leave_out: Sequence[str] = (),
    header: bool | None = None,
) -> Table:
    """Read a table, make numbers of its columns and part the target from the features.

    A file .csv or .tsv has one row a line, those of empty cells passed over; what parts the cells (comma,
    semicolon or tab) is seen in the first line. .parquet needs the extra of that name. .npz holds `X` (n, d),
    `y` (n) and perhaps published splits, `train_index` and `test_index` (k, …). A column of words becomes a
    column of 0 and 1 for each level, a single one for two levels. Columns that are constant are left out.

    Args:
        path: what is read; scikit-learn's diabetes when None is given.
        target: column to be predicted; needed for all but .npz and the default.
        leave_out: columns that are not to be used.
        header: whether the first line of a .csv or .tsv names the columns; when None, whether it holds a cell
            that is no number. Without a header the columns are "1", "2", ….

    Raises: InputError naming column and row of a missing, infinite or unusable value, and a column of too
        many words; for a target or column that is not there, for fewer than two rows, for no feature that
        varies, and for a file that cannot be read; MissingExtraError for .parquet without pyarrow.
    """
    raw = _diabetes() if path is None else _raw(Path(path), header)
    target = raw.target if target is None else target
    if target is None:
        raise InputError(
            f"name the column of {raw.name} to predict as the target; it has {_listed(raw.cells)}"
        )
    raw.check(target, *leave_out)
    y = torch.tensor(raw.numbers(target), dtype=torch.float64)
    columns: dict[str, Tensor] = {}
    categories: dict[str, tuple[str, ...]] = {}
    for name in raw.cells:
        if name in (target, *leave_out):
            continue
        if raw.holds_words(name):
            categories[name] = raw.levels(name)
        made = raw.features(name, categories)
        if shared := [each for each in made if each in columns]:
            raise InputError(f"{raw.name}: two columns make the feature {shared[0]!r}; rename one of them")
        columns |= made
    return _table(raw.name, columns, y, target, categories, raw.splits)


def load_rows(path: Path, table: Table, *, header: bool | None = None) -> Float[Tensor, "n d"]:
    """Read new rows with the features of a table, encoded as its own; other columns are not looked at.

    Raises: InputError as `load_table`; for a column that is not there and a level that the table has not.
    """
    raw = _raw(Path(path), header)
    names = dict.fromkeys(_origin(each, table.categories) for each in table.columns)
    raw.check(*names)
    parts = [raw.features(name, table.categories) for name in names]
    columns = {name: column for part in parts for name, column in part.items()}
    return torch.stack([columns[name] for name in table.columns], 1)


def toy(count: int = 20, *, noise: float = 0.1, seed: int | None = 0) -> Table:
    """Give the toy problem of two intervals with a gap between them.

        y = x sin x + ε,  ε ~ N(0, noise²),  half of the x in (−2, −2/3), half in (2/3, 2)

    With seed None the x are equidistant, ends included, and there is no noise.

    Raises: InputError for fewer than four points or a negative noise.
    Source: He, Lakshminarayanan, Teh 2020, arXiv 2007.05864.
    """
    if count < 4 or not 0 <= noise < math.inf:
        raise InputError(f"the toy problem needs 4 points and a noise of at least 0, got {count}, {noise:g}")
    left = count // 2
    generator = torch.Generator().manual_seed(seed or 0)
    places = torch.rand(count, generator=generator, dtype=torch.float64)
    errors = noise * torch.randn(count, generator=generator, dtype=torch.float64)
    if seed is None:
        right = torch.linspace(0, 1, count - left, dtype=torch.float64)
        places, errors = torch.cat((torch.linspace(1, 0, left, dtype=torch.float64), right)), 0 * errors
    x = 2 / 3 + 4 / 3 * places
    x[:left] *= -1
    return Table("toy problem", x[:, None], x * x.sin() + errors, ("x",), "y")


def digits() -> Table:
    """Give scikit-learn's digits: 64 pixels, of which the constant ones are left out, and the class."""
    from sklearn.datasets import load_digits  # a second to import, so only where it is used

    x, y = load_digits(return_X_y=True)
    columns = {f"pixel {index}": torch.tensor(column) for index, column in enumerate(x.T)}
    return _table("scikit-learn digits", columns, torch.from_numpy(y).long(), "digit", {})


@dataclass(frozen=True, eq=False)
class _Raw:
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
            raise InputError(f"{self.name} has no column {lost[0]!r}; it has {_listed(self.cells)}")

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

    def levels(self, name: str) -> tuple[str, ...]:
        """Return the different words of a column, in order."""
        words = self.present(name)
        if wrong := [word for word in words if not isinstance(word, str)]:
            kind = type(wrong[0]).__name__
            raise InputError(f"{self.name}: column {name!r} holds {kind} values; give numbers or words")
        levels, most = tuple(sorted(set(words))), min(LEVELS, max(2, len(words) // 2))
        if len(levels) > most:
            raise InputError(
                f"{self.name}: column {name!r} holds {len(levels):,} different words in {len(words):,} rows, "
                f"too many for levels (at most {most}); leave it out (leave_out) or make numbers of it"
            )
        return levels

    def features(self, name: str, categories: Levels) -> dict[str, Tensor]:
        """Return a column of numbers, or of 0 and 1 for each level, the last alone where there are two."""
        if name not in categories:
            return {name: torch.tensor(self.numbers(name), dtype=torch.float64)}
        words, levels = self.present(name), categories[name]
        for where, word in zip(self.where, words, strict=True):
            if word not in levels:
                what = f"column {name!r} holds {str(word)[:40]!r} in {where}"
                raise InputError(f"{self.name}: {what}; the levels learnt from are {_listed(levels)}")
        shown = levels[1:] if len(levels) == 2 else levels
        marks = {level: [float(word == level) for word in words] for level in shown}
        return {f"{name}={level}": torch.tensor(mark).double() for level, mark in marks.items()}


def _number(cell: Any) -> float | None:
    """Return the number that a cell holds, if it is one; 1_000 is a word here."""
    try:
        return None if isinstance(cell, str) and "_" in cell else float(cell)
    except (TypeError, ValueError):
        return None


def _listed(names: Iterable[str]) -> str:
    """Return names for a message, the first twenty of them."""
    names = list(names)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(map(repr, names[:20])) or "none") + more


def _origin(column: str, categories: Levels) -> str:
    """Return the column of the file that a feature was made of."""
    made = {f"{name}={word}": name for name, words in categories.items() for word in words}
    return made.get(column, column)


def _table(
    name: str, columns: Columns, y: Tensor, target: str, categories: Levels, splits: Sequence[Split] = ()
) -> Table:
    """Make a table of the columns that are not constant."""
    if len(y) < 2:
        raise InputError(f"{name} has one row; at least two are needed to learn from")
    varying = {each: values for each, values in columns.items() if values.amin() < values.amax()}
    if not varying:
        raise InputError(f"{name} has no column that varies beside the target {target!r}; one is needed")
    kept = {each: words for each, words in categories.items() if len(words) > 1}
    constant = [_origin(each, categories) for each in columns if each not in varying]
    x = torch.stack(list(varying.values()), 1)
    return Table(name, x, y, tuple(varying), target, MappingProxyType(kept), tuple(constant), tuple(splits))


def _diabetes() -> _Raw:
    from sklearn.datasets import load_diabetes  # a second to import, so only where it is used

    found: Any = load_diabetes(scaled=False)
    columns = dict(zip(found["feature_names"], found["data"].T.tolist(), strict=True))
    columns["progression"] = found["target"].tolist()
    return _Raw("scikit-learn diabetes", columns, _rows(found["target"]), "progression")


def _raw(path: Path, header: bool | None) -> _Raw:
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


def _delimited(path: Path, header: bool | None) -> _Raw:
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
        header = any(_number(cell) is None and cell.lower() not in MISSING for cell in cells)
    names = [(header and cell) or f"{'column ' * header}{i}" for i, cell in enumerate(cells, 1)]
    rows = lines[1:] if header else lines
    for where, row in rows:
        if len(row) != len(names):
            raise InputError(f"{path.name}: {where} has {len(row)} cells, but there are {len(names)} columns")
    columns = [[row[index] for _, row in rows] for index in range(len(names))]
    return _named(path.name, names, columns, [where for where, _ in rows])


def _named(name: str, names: Sequence[str], cells: Iterable[Sequence[Any]], where: Sequence[str]) -> _Raw:
    if repeated := [each for each in names if names.count(each) > 1]:
        raise InputError(f"{name} has more than one column {repeated[0]!r}; names must differ")
    return _Raw(name, dict(zip(names, cells, strict=True)), where)


def _parquet(path: Path) -> _Raw:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError('reading .parquet needs pyarrow: pip install "gramian[parquet]"') from error
    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        cells = [column.to_pylist() for column in table.columns]
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path} cannot be read as parquet: {error}") from error
    return _named(path.name, table.column_names, cells, _rows(range(table.num_rows)))


def _npz(path: Path) -> _Raw:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in ARRAYS if name in file}
    except Exception as error:  # zip, zlib, numpy and memory fail each in its own way on a damaged file
        raise InputError(f"{path} cannot be read as .npz of plain arrays: {error}") from error
    x, y = arrays.get("X"), arrays.get("y")
    if x is None or x.ndim != 2 or x.dtype.kind not in "biuf":
        raise InputError(f"{path.name} needs numbers X (rows, features); it holds {_listed(file.files)}")
    columns = {f"x{number}": column.tolist() for number, column in enumerate(x.T, 1)}
    if y is None:
        return _Raw(path.name, columns, _rows(x))
    if y.shape != x.shape[:1] or y.dtype.kind not in "biuf":
        raise InputError(f"{path.name} needs numbers y, one for each of {len(x)} rows, got shape {y.shape}")
    return _Raw(path.name, columns | {"y": y.tolist()}, _rows(x), "y", _splits(path, arrays, len(x)))


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
