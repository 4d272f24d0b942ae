"""Matrices of scans on the disk, so that the next run need not build them."""

import hashlib
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gramian.files import atomic_file
from gramian.imaging.discretisation import MODELS, Model, matrix
from gramian.imaging.geometry import Beam
from gramian.reading import check_regular

if TYPE_CHECKING:
    from scipy.sparse import csr_array

FORMAT = 1
"""Changes when matrices on the disk are no longer those that would be built."""

PARTS = ("data", "indices", "indptr")


def kept_matrix(
    geometry: Beam, model: Model, dtype: torch.dtype, folder: str | Path | None = None
) -> "csr_array":
    """Return the matrix of a scan, from a folder where it is there and whole; else it is built and kept.

    A file is named by a digest of the geometry, the discretisation and the type, and holds a checksum.

    Raises: InputError as `matrix`.
    Holds: exactly: the matrix from the disk is the one that was built.
    """
    if folder is None:
        return matrix(geometry, model, dtype)
    name = f"{FORMAT} {MODELS[model].__name__} {dtype} {geometry!r}"
    key = hashlib.sha256(name.encode()).hexdigest()
    entry = Path(folder) / f"projector-{key}.safetensors"
    found = _load(entry, geometry)
    if found is None:
        found = matrix(geometry, model, dtype)
        _save(entry, found)
    return found


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    return " ".join(f"{name} {len(arrays[name])} {zlib.crc32(arrays[name].data):08x}" for name in PARTS)


def _save(entry: Path, held: "csr_array") -> None:
    """Keep a matrix; where that is not possible the next run only has to build it again."""
    arrays = {name: getattr(held, name) for name in PARTS}
    try:
        with atomic_file(entry) as temporary:
            save_file(arrays, temporary, {"checksum": _checksum(arrays)})
    except (OSError, SafetensorError) as error:
        warnings.warn(f"the projector could not be kept in {entry.parent}: {error}", stacklevel=4)


def _load(entry: Path, geometry: Beam) -> "csr_array | None":
    """Return the matrix kept, or None where there is none or it is damaged."""
    from scipy.sparse import csr_array

    rows, columns = geometry.shape
    shape = (len(geometry.theta) * geometry.detectors, rows * columns)
    try:
        check_regular(entry)
        with safe_open(entry, "np") as file:
            about = file.metadata() or {}
            arrays = {name: np.asarray(file.get_tensor(name)) for name in PARTS}
        if about.get("checksum") != _checksum(arrays):
            return None
        found = csr_array(tuple(arrays[name] for name in PARTS), shape=shape)
        found.check_format(full_check=True)
    except (OSError, SafetensorError, TypeError, ValueError):  # an InputError among them
        return None
    return found
