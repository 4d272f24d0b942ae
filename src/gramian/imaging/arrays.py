"""Images and sinograms from NumPy files."""

import warnings
from pathlib import Path
from typing import IO

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.reading import check_regular

MARK = b"\x93NUMPY"
KINDS = "biuf"
LONGEST = 2**16
"""Bytes of the longest header; memory for all that it announces is asked for at once."""


def read_array(path: Path, axes: int | None = None) -> Float[Tensor, "..."]:
    """Read an array of real numbers from a `.npy` file, in float32, or float64 where that is stored.

    Nothing is allocated before the size that the header announces is found to be in the file.

    Shapes: -> as stored.
    Raises: InputError for a file that is missing, damaged, truncated, empty, of another number of axes, or
        of anything but finite real numbers.
    Holds: exactly for floats; whole numbers beyond 2²⁴ are rounded.
    """
    path = Path(path)
    check_regular(path)
    try:
        with path.open("rb") as stream:
            if stream.read(len(MARK)) != MARK:
                raise InputError(f"{path} is no .npy file: it does not begin with the mark of one array")
            _check_header(stream)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        if values.dtype.kind not in KINDS or (axes is not None and values.ndim != axes) or not values.size:
            wanted, kind = "" if axes is None else f" of {axes} axes", str(values.dtype)[:40]
            raise InputError(f"{path} has to be an array of real numbers{wanted}, not {kind} {values.shape}")
        found = torch.from_numpy(values.astype(np.float64 if values.dtype == np.float64 else np.float32))
    except InputError:
        raise
    except Exception as error:  # numpy fails on a damaged header in many ways
        said = " ".join(str(error).split()).split(". ")[0][:150] or type(error).__name__
        raise InputError(f"{path} cannot be read as .npy of plain numbers: {said}") from error
    if not found.isfinite().all():
        raise InputError(f"{path} has to hold finite numbers, but some are NaN or infinite")
    return found


def _check_header(stream: IO[bytes]) -> None:
    """Raise ValueError for what NumPy crashes on, or asks for all its memory at once, before it looks."""
    start = stream.read(6)
    if start[0] > 1 and int.from_bytes(start[2:], "little") > LONGEST:
        raise ValueError("its header is too long")
    stream.seek(0)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the format")
    shape, _, dtype = readers[version](stream)
    if min(shape, default=0) < 0 or not dtype.itemsize:
        raise ValueError(f"an array {shape} of {dtype}")
