"""Reading files that anyone may have made: regular ones only, no larger than they claim or than is sane."""

import gzip
import json
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gramian.errors import InputError
from gramian.memory import check_memory, size

FREE = 16 * 2**20
"""Bytes that any file may unpack to."""

RATIO = 100
"""Times its own size that a file may unpack to, beyond that."""


def check_regular(path: Path) -> None:
    """Refuse what would never end or never answer: a pipe, a device, a folder.

    Raises: InputError naming what is not a file, is missing or cannot be reached.
    """
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(kind):
        raise InputError(f"{path} cannot be read: it is no regular file")


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a link in a folder that leads out of it: who made the folder does not choose what else is read.

    Links of a snapshot in a hub's cache lead to the files of the same model beside it, and may.

    Raises: InputError naming the link and where it leads.
    """
    real, home = path.resolve(), folder.resolve()
    if home.parent.name == "snapshots":
        home = home.parents[1]
    if not real.is_relative_to(home):
        raise InputError(f"{path} is a link to {real}, out of the folder {folder}; put the file itself there")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises: InputError naming the file when it is missing, no regular file or damaged.
    """
    check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error


def check_stored(path: Path) -> None:
    """Refuse an archive that torch.save has not written: an entry that is compressed or longer than the file.

    Raises: InputError naming the file.
    """
    length = path.stat().st_size
    with explained(f"{path} is damaged"), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > length:
                raise ValueError(f"an entry of {info.file_size:,} bytes is compressed or not in it")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever a package raises on a damaged file, panics of Rust among it, into an InputError.

    Raises: InputError, `what` and the first line of the reason; those of the block itself as they are.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"{what}: {reason}") from error


def unpacked(path: Path, free: int = FREE) -> bytes:
    """Return what a gzip file holds.

    Raises: InputError as `check_unpacked`; OSError, EOFError or zlib.error for a damaged one.
    """
    most = max(free, RATIO * path.stat().st_size)
    with gzip.open(path) as stream:
        content = stream.read(most + 1)
    check_unpacked(path, len(content), free)
    return content


def check_unpacked(path: Path, needed: int, free: int = FREE) -> None:
    """Refuse a file that announces far more than it can honestly hold, before anything is allocated.

    Args:
        path: the file.
        needed: bytes that its content takes once it is unpacked.
        free: bytes that any file may unpack to; beyond them it may to a hundred times its own size.

    Raises: InputError with both sizes, or with the memory that is needed and what there is.
    """
    packed = path.stat().st_size
    if needed > max(free, RATIO * packed):
        raise InputError(
            f"{path} would unpack to {size(needed)} or more from {size(packed)}; beyond {size(free)} at most "
            f"{RATIO} times its own size is accepted"
        )
    check_memory(needed, f"what {path} holds")
