"""Tables to learn a number or a class from: CSV, TSV, Parquet or .npz; words become levels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.data.cells import Levels, Split, diabetes, listed, read_cells
from gramian.errors import InputError

Columns = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of features with the number or class to be predicted of each, and what was done to get them."""

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
    classes: tuple[str, ...] = ()
    """Names of the classes by number, where the target is one."""

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
            parts.append(f"left out as constant: {listed(self.dropped)}")
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
    classes: bool = False,
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
        header: whether the first line of a .csv or .tsv names the columns; when None, whether it holds words
            and none of them stands in its column again. Without a header the columns are "1", "2", ….
        classes: whether the target is a class: words, or whole numbers, which are counted anew from 0 in
            increasing order. There are at most 1000, and fewer than half of the rows.

    Raises: InputError naming column and row of a missing, infinite or unusable value, and a column of too
        many words; for a target or column that is not there, for a target that is no class where one is
        wanted, for fewer than two rows, for no feature that varies, and for a file that cannot be read;
        MissingExtraError for .parquet without pyarrow.
    """
    raw = diabetes() if path is None else read_cells(Path(path), header)
    target = raw.target if target is None else target
    if target is None:
        raise InputError(
            f"name the column of {raw.name} to predict as the target; it has {listed(raw.cells)}"
        )
    raw.check(target, *leave_out)
    if classes:
        names, y = raw.classes(target)
    else:
        names, y = (), torch.tensor(raw.numbers(target), dtype=torch.float64)
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
    return replace(_table(raw.name, columns, y, target, categories, raw.splits), classes=names)


def load_rows(path: Path, table: Table, *, header: bool | None = None) -> Float[Tensor, "n d"]:
    """Read new rows with the features of a table, encoded as its own; other columns are not looked at.

    Raises: InputError as `load_table`; for a column that is not there and a level that the table has not.
    """
    raw = read_cells(Path(path), header)
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
