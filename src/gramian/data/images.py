"""Labelled images: scikit-learn's digits, IDX files in MNIST's format, or .npz; split and standardised."""

import zlib
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gramian.data.archives import read_npz
from gramian.errors import InputError
from gramian.reading import check_regular, unpacked

UNSIGNED_BYTES = 0x08
"""The only type of entries that IDX files of images have."""

AXES = 32
"""Most axes of an array."""

ARRAYS = ("images", "labels", "test_images", "test_labels")
"""What is read of a .npz file."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images and the number of each one's class."""

    images: Float[Tensor, "n channels height width"]
    labels: Int64[Tensor, " n"]
    scale: float | None = None
    """Largest pixel there can be by the kind of the file, 255 for bytes; None where it says nothing."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Labelled":
        """Return the images of an index."""
        return Labelled(self.images[index], self.labels[index], self.scale)

    def to(self, device: torch.device) -> "Labelled":
        """Return the same images on a device."""
        return Labelled(self.images.to(device), self.labels.to(device), self.scale)


@dataclass(frozen=True, eq=False)
class Images:
    """Images to learn from, to choose by, and to report on."""

    name: str
    classes: int
    train: Labelled
    validation: Labelled
    test: Labelled


def load_images(
    path: Path | None = None,
    labels: Path | None = None,
    *,
    pool: int = 1,
    count: int | None = None,
    validation: float = 0.15,
    test: float = 0.2,
    seed: int = 0,
) -> Images:
    """Read labelled images, split them by the seed and standardise every channel.

        x ← (x − mean_train) / sd_train

    A folder holds MNIST's four files (or only one pair) under their usual names, gzipped or not; a single
    IDX file is one of images, beside which the labels are found by name unless given. A .npz file holds
    `images` (n, height, width), (n, channels, height, width) or (n, height, width, channels) with 1 or 3
    channels, `labels` (n,), and perhaps `test_images` and `test_labels`. Where a test set comes with the data
    it is the test set; elsewhere a share of the images is.

    Args:
        path: what is read; scikit-learn's digits (1797 of 8 × 8) when none is given.
        labels: the labels of an IDX file of images, when its name does not tell.
        pool: side of the squares that are averaged to one pixel.
        count: most images taken before the split (and of a test set that comes with the data); all when None.
        validation: share of the images that are not for testing, kept for validation.
        test: share of the images kept for testing, where no test set comes with them.
        seed: seed of the split.

    Raises: InputError when a file is missing, damaged or of another format, when counts of images and labels
        differ, when there are no labels or fewer than two classes, when entries are not finite, and for
        settings that cannot be used.
    Holds: equal seeds give equal splits; the three sets share no image.
    """
    _check(pool, count, validation, test)
    name, given = read_images(path, labels)
    generator = torch.Generator().manual_seed(seed)
    known = _shuffled(given["train"], count, generator)
    if "test" in given:
        held_out = _shuffled(given["test"], count, generator)
    else:
        held_out, known = _cut(known, test)
    chosen_by, train = _cut(known, validation)
    parts = [_pooled(part, pool) for part in (train, chosen_by, held_out)]
    classes = 1 + max(int(part.labels.max()) for part in parts)
    if classes < 2:
        raise InputError(f"{name} has a single class; at least two are needed")
    return Images(name, classes, *_standardised(parts, name))


def _check(pool: int, count: int | None, validation: float, test: float) -> None:
    if pool < 1:
        raise InputError(f"pool must be at least 1 pixel, got {pool}")
    if count is not None and count < 3:
        raise InputError(f"count must be at least 3, one image for each of the three sets, got {count}")
    for name, share in (("validation", validation), ("test", test)):
        if not 0 < share < 1:
            raise InputError(f"the share for {name} must lie between 0 and 1, got {share:g}")


def read_images(path: Path | None = None, labels: Path | None = None) -> tuple[str, dict[str, Labelled]]:
    """Return the name of labelled images and what is read, raw pixels as they are in the file, by part.

    The formats are those of `load_images`. The part "train" is always there, "test" where it comes with the
    data. Without a path they are scikit-learn's digits.

    Raises: InputError as `load_images`, except for what concerns the split.
    """
    if path is None:
        return "scikit-learn digits", {"train": _digits()}
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no file or folder {path}")
    if path.is_dir():
        return path.name, _read_folder(path)
    if path.suffix.lower() == ".npz":
        return path.name, _read_npz(path)
    labels = _labels_beside(path) if labels is None else labels
    return path.name, {"train": _labelled(read_idx(path), read_idx(labels), str(path))}


def _digits() -> Labelled:
    from sklearn.datasets import load_digits  # a second to import, so only where it is used

    images, labels = load_digits(return_X_y=True)
    return replace(_labelled(images.reshape(-1, 8, 8), labels, "digits"), scale=16.0)


def _read_folder(folder: Path) -> dict[str, Labelled]:
    found = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = sorted(folder.glob(f"{prefix}-images*ubyte*"))
        if images:
            found[part] = _labelled(read_idx(images[0]), read_idx(_labels_beside(images[0])), str(images[0]))
    if not found:
        raise InputError(
            f"the folder {folder} holds neither train-images-idx3-ubyte nor t10k-images-idx3-ubyte"
        )
    return found if "train" in found else {"train": found["test"]}


def _labels_beside(images: Path) -> Path:
    """Return the labels that belong to a file of images by MNIST's names, gzipped or not."""
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for candidate in (images.with_name(name), images.with_name(name + ".gz")):
        if candidate.exists() and candidate != images:
            return candidate
    raise InputError(f"there are no labels for {images}: expected {name} beside it")


def read_idx(path: Path) -> np.ndarray:
    """Read an array of unsigned bytes from an IDX file, gzipped when its name ends in .gz.

    Two zero bytes, the type 0x08, the number of axes, each axis' length in four bytes (big-endian), entries.

    Raises: InputError when the file is missing, is no such file, is truncated or has bytes too many.
    """
    check_regular(path)
    try:
        data = unpacked(path) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if len(data) < 4 or data[:3] != bytes((0, 0, UNSIGNED_BYTES)):
        raise InputError(
            f"{path} is no IDX file of unsigned bytes: it starts with {data[:4].hex() or 'nothing'}"
        )
    axes = data[3]
    start = 4 + 4 * axes
    shape = tuple(int.from_bytes(data[i : i + 4]) for i in range(4, min(start, len(data)), 4))
    if len(data) != start + prod(shape) or not 0 < axes <= AXES:
        what = "x".join(map(str, shape))
        raise InputError(
            f"{path} is damaged: {len(data):,} bytes do not hold the {what} entries that it announces"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _read_npz(path: Path) -> dict[str, Labelled]:
    arrays, names = read_npz(path, ARRAYS)
    have = ", ".join(names) or "nothing"
    found = {}
    for part, prefix in (("train", ""), ("test", "test_")):
        images, labels = (arrays.get(prefix + name) for name in ("images", "labels"))
        if (images is None) != (labels is None) or (images is None and part == "train"):
            raise InputError(f"{path} needs the arrays {prefix}images and {prefix}labels; it holds {have}")
        if images is not None and labels is not None:
            found[part] = _labelled(images, labels, str(path))
    return found


def _labelled(images: np.ndarray, labels: np.ndarray, where: str) -> Labelled:
    """Check two arrays and make tensors of them, channels first."""
    if images.dtype.kind not in "uif" or labels.dtype.kind not in "ui":
        raise InputError(
            f"{where}: images must be numbers and labels whole numbers, got {images.dtype} and {labels.dtype}"
        )
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or labels.ndim != 1 or 0 in images.shape:
        raise InputError(
            f"{where}: images must be (n, height, width), with or without channels, and labels (n,), "
            f"got {images.shape} and {labels.shape}"
        )
    if len(images) != len(labels):
        raise InputError(f"{where}: there are {len(images):,} images but {len(labels):,} labels")
    pixels = torch.from_numpy(images.astype(np.float32))
    if not torch.isfinite(pixels).all():
        raise InputError(f"{where}: the images hold numbers that are not finite")
    numbers = torch.from_numpy(labels.astype(np.int64))
    if numbers.min() < 0:
        raise InputError(f"{where}: labels count classes from 0, got {int(numbers.min())}")
    return Labelled(pixels, numbers, 255.0 if images.dtype == np.uint8 else None)


def _shuffled(data: Labelled, count: int | None, generator: torch.Generator) -> Labelled:
    return data[torch.randperm(len(data), generator=generator)[:count]]


def _cut(data: Labelled, share: float) -> tuple[Labelled, Labelled]:
    """Return the first share of the images and the rest, at least one image each."""
    if len(data) < 2:
        raise InputError(f"{len(data)} image cannot be split; more are needed")
    at = min(max(round(share * len(data)), 1), len(data) - 1)
    return data[torch.arange(at)], data[torch.arange(at, len(data))]


def _pooled(data: Labelled, pool: int) -> Labelled:
    height, width = data.images.shape[-2:]
    if min(height, width) < pool:
        raise InputError(f"images of {height} x {width} cannot be averaged over {pool} x {pool} pixels")
    return replace(data, images=torch.nn.functional.avg_pool2d(data.images, pool))


def _standardised(parts: list[Labelled], name: str) -> list[Labelled]:
    """Standardise every channel by the mean and deviation of the first part."""
    axes = (0, 2, 3)
    mean = parts[0].images.mean(axes, keepdim=True, dtype=torch.float64)
    deviation = (parts[0].images.double() - mean).square().mean(axes, keepdim=True).sqrt()
    if (deviation == 0).any():
        raise InputError(f"{name} has a channel that is the same everywhere in the training images")
    return [Labelled(((part.images - mean) / deviation).float(), part.labels) for part in parts]
