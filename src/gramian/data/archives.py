"""Plain arrays in .npz archives, of which nothing is allocated before it is known to be there."""

import zipfile
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from gramian.errors import InputError
from gramian.reading import check_regular, check_unpacked

PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""How entries may be compressed: LZMA allocates what a header asks for, up to 4 GB."""
EMPTY = 2**20
"""Product of the axes of an array without content, those of length 0 left out."""


def read_npz(path: Path, wanted: Collection[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read the wanted arrays of a .npz file that are there; return them and the names of all.

    Raises: InputError when the file is missing or damaged, when an array is one of objects or does not fill
        its entry, and when all would unpack to far more than the file's size or need more memory than there
        is.
    Holds: exactly.
    """
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            found = {name: entries[f"{name}.npy"] for name in wanted if f"{name}.npy" in entries}
            check_unpacked(path, sum(info.file_size for info in found.values()))
            for info in found.values():
                if info.compress_type not in PACKED:
                    raise ValueError(f"{info.filename} is compressed in a way that NumPy does not use")
                with archive.open(info) as stream:
                    _check_header(stream, info.file_size)
            arrays = {}
            for name, info in found.items():
                with archive.open(info) as stream:
                    arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
            return arrays, [name.removesuffix(".npy") for name in entries]
    except InputError:
        raise
    except Exception as error:  # zip, zlib and numpy fail each in its own way on a damaged file
        raise InputError(f"{path} cannot be read as .npz of plain arrays: {error}") from error


def _check_header(stream: IO[bytes], size: int) -> None:
    """Raise ValueError unless the array that a header describes is as long as its entry of the archive."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the format")
    shape, _, dtype = readers[version](stream)
    if dtype.hasobject or stream.tell() + prod(shape) * dtype.itemsize != size:
        raise ValueError(f"an array {shape} of {dtype} does not fill an entry of {size:,} bytes")
    if not size - stream.tell() and prod(max(axis, 1) for axis in shape) > EMPTY:
        raise ValueError(f"an array {shape} of {dtype} without content is too large")
