"""Examples to prune by: images or tables with a class, raw, a part held out, standardised by chosen ones."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gramian.data.archives import read_npz
from gramian.data.cells import CLASSES
from gramian.data.images import Labelled, read_images
from gramian.data.tables import Standardiser, load_table
from gramian.errors import InputError


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and classes of a data set, as they are in the file."""

    name: str
    x: Float[Tensor, "n ..."]
    """Pixels (n, channels, height, width), float32, or features (n, d), float64."""
    y: Int64[Tensor, " n"]
    classes: int
    scale: float | None
    """Known before the data are seen, it maps inputs into [0, 1]: 255 for bytes, 16 for scikit-learn's
    digits; None where there is none."""
    held_out: Int64[Tensor, " test"]
    """Indices that neither training nor certificates see, in increasing order."""
    names: tuple[str, ...] = ()
    """Names of the classes by number, of a table."""

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.y)

    @property
    def size(self) -> tuple[int, ...]:
        """Size of one input: (channels, height, width), or (d,)."""
        return tuple(self.x.shape[1:])

    @property
    def known(self) -> Int64[Tensor, " known"]:
        """Indices of the examples that are not held out, in increasing order."""
        among = torch.ones(len(self), dtype=torch.bool)
        among[self.held_out] = False
        return among.nonzero()[:, 0]


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read, and which share is held out."""

    data: Path | None = None
    """Images (folder or IDX file in MNIST's format, .npz with `images` and `labels`) or a table (.csv, .tsv,
    .parquet, .npz with `X` and `y`); scikit-learn's digits when none is given."""
    labels: Path | None = None
    """Labels of an IDX file of images, when its name does not tell."""
    target: str | None = None
    """Column of a table that holds the class, words or whole numbers."""
    leave_out: tuple[str, ...] = ()
    """Columns of a table that are not to be used."""
    header: bool | None = None
    """Whether the first line of a .csv or .tsv names the columns; seen in the file when not given."""
    count: int | None = None
    """Most examples taken (and of a test set that comes with the data); all when not given."""
    test: float = 0.2
    """Share held out before anything else; a test set that comes with the data is held out instead."""
    seed: int = 0
    """Seed of what is taken and held out."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if self.count is not None and self.count < 2:
            raise InputError(f"count must be at least 2 examples, got {self.count}")
        if not 0 < self.test < 1:
            raise InputError(f"the share that is held out must lie between 0 and 1, got {self.test:g}")

    def load(self) -> Examples:
        """Read all examples and choose those that are held out, by the seed.

        What a table's columns are, their words and the classes are read off the whole file, as something that
        would be known without it; no number is.

        Raises: InputError for settings that cannot be used, and for data that are missing, damaged, no images
            or tables with at least two classes, or too few.
        """
        self.check()
        generator = torch.Generator().manual_seed(self.seed)
        return (self._table if _is_table(self.data) else self._images)(generator)

    def _table(self, generator: torch.Generator) -> Examples:
        if self.labels is not None:
            raise InputError(
                f"{self.labels} would be labels of images, but {self.data} is a table; use target"
            )
        table = load_table(self.data, self.target, leave_out=self.leave_out, header=self.header, classes=True)
        taken = _taken(len(table), self.count, generator)
        held_out = _held_out(len(taken), self.test, generator)
        y, count = table.y[taken], len(table.classes)
        return Examples(table.name, table.x[taken], y, count, None, held_out, table.classes)

    def _images(self, generator: torch.Generator) -> Examples:
        if self.target is not None or self.leave_out or self.header is not None:
            raise InputError("target, leave_out and header are for tables; images come with their labels")
        if self.data is None and self.labels is not None:
            raise InputError(f"the labels {self.labels} need the images they belong to; give data")
        name, given = read_images(self.data, self.labels)
        parts = {part: each[_taken(len(each), self.count, generator)] for part, each in given.items()}
        _check_alike(name, list(parts.values()))
        x = torch.cat([part.images for part in parts.values()])
        y = torch.cat([part.labels for part in parts.values()])
        classes = _classes(name, y)
        if "test" in parts:
            held_out = torch.arange(len(parts["train"]), len(y))
        else:
            held_out = _held_out(len(y), self.test, generator)
        return Examples(name, x, y, classes, parts["train"].scale, held_out)


def standardised(examples: Examples, seen: Int64[Tensor, " seen"]) -> Float[Tensor, "n ..."]:
    """Return all inputs standardised by some of them alone, every channel or feature on its own.

        x ← (x − mean_seen) / sd_seen;   without any: x ← x / scale

    Shapes: seen (k) -> (n, …), float32.
    Raises: InputError as `standardiser`; for an input that is too far from those seen for float32.
    Holds: exactly: an example that is not seen changes no other.
    """
    x = standardiser(examples, seen)(examples.x).float()
    if not x.isfinite().all():
        number = int(x.isfinite().flatten(1).all(1).logical_not().nonzero()[0, 0])
        raise InputError(f"{examples.name}: example {number} is too far from the others to be standardised")
    return x


def standardiser(examples: Examples, seen: Int64[Tensor, " seen"]) -> Standardiser:
    """Return the means and scales by which `standardised` maps inputs, shaped to broadcast with one of them.

    Raises: InputError when no example is seen and no scale is known.
    """
    if len(seen):
        return _of_images(examples.x[seen]) if examples.x.ndim == 4 else Standardiser.of(examples.x[seen])
    if examples.scale is None:
        raise InputError(
            f"the scale of {examples.name} is not known before its numbers are seen, which a prior without "
            "examples may not; give the prior a fraction of them"
        )
    return Standardiser(torch.zeros(()), torch.tensor(examples.scale))


def _of_images(images: Float[Tensor, "k c h w"]) -> Standardiser:
    """Take mean and standard deviation of every channel, in float64 without a copy in it."""
    axes = (0, 2, 3)
    mean = images.mean(axes, keepdim=True, dtype=torch.float64).float()
    away = images - mean
    size = away.abs().amax(axes, keepdim=True)  # its square may be too small or too large for a number
    constant = images.amax(axes, keepdim=True) == images.amin(axes, keepdim=True)
    scale = size * (away / size).square().mean(axes, keepdim=True, dtype=torch.float64).sqrt().float()
    return Standardiser(mean[0], torch.where(constant, torch.ones_like(scale), scale)[0])


def _is_table(path: Path | None) -> bool:
    """Tell whether a file is a table by its name, and a .npz by what it holds."""
    suffix = "" if path is None else Path(path).suffix.lower()
    if path is None or suffix != ".npz" or not Path(path).is_file():
        return suffix in (".csv", ".tsv", ".parquet")
    _, held = read_npz(Path(path), ())
    if not {"X", "images"} & set(held):
        what = ", ".join(sorted(held)) or "nothing"
        raise InputError(f"{path} needs the arrays images and labels, or X and y; it holds {what}")
    return "images" not in held


def _taken(count: int, most: int | None, generator: torch.Generator) -> Int64[Tensor, " taken"]:
    """Return the indices of the examples taken, in increasing order."""
    return torch.randperm(count, generator=generator)[:most].sort().values


def _held_out(count: int, share: float, generator: torch.Generator) -> Int64[Tensor, " test"]:
    """Return the indices of a share of the examples, at least one and not all."""
    most = min(max(round(share * count), 1), count - 1)
    return torch.randperm(count, generator=generator)[:most].sort().values


def _check_alike(name: str, parts: list[Labelled]) -> None:
    kinds = {(tuple(part.images.shape[1:]), part.scale) for part in parts}
    if len(kinds) > 1:
        raise InputError(
            f"{name}: the images of the test set must have the size and the type of numbers of the others"
        )


def _classes(name: str, labels: Int64[Tensor, " n"]) -> int:
    """Return how many classes labels count from 0."""
    classes = 1 + int(labels.max())
    if classes > CLASSES:
        raise InputError(f"{name}: labels count at most {CLASSES:,} classes from 0, got {classes - 1}")
    if len(labels.unique()) < 2:
        raise InputError(f"{name} has a single class; at least two are needed")
    return classes
