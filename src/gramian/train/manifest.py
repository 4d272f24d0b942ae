"""What the files of a folder were when they were written: sizes and SHA-256, to know damage from content."""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gramian.errors import InputError
from gramian.files import write_json
from gramian.reading import read_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Put down sizes and SHA-256 of the files in a folder that holds all that it is to hold."""
    files = {path.name: _described(path) for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"files": files})


def check_manifest(folder: Path, names: Sequence[str]) -> bool:
    """Return whether a folder has a manifest, after checking files by it.

    Raises: InputError saying which of the files is damaged, or that the manifest is; PermissionError when
        one may not be read.
    Holds: every byte is read from the disk, where the system lets go of what it keeps in memory.
    """
    path = folder / MANIFEST
    if not path.exists():
        return False
    found = read_json(path)
    files = found.get("files") if isinstance(found, dict) else None
    for name in names:
        written = files.get(name) if isinstance(files, dict) else None
        if not isinstance(written, dict) or written.keys() != {"bytes", "sha256"}:
            raise InputError(f"{path} cannot be read: it does not describe {name}")
        _check(folder / name, written["bytes"], written["sha256"])
    return True


def _check(path: Path, size: object, digest: object) -> None:
    try:
        there = _described(path)
    except PermissionError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path} cannot be read: it is missing") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if there["bytes"] != size:
        raise InputError(f"{path} cannot be read: it has {there['bytes']} bytes, and was written with {size}")
    if there["sha256"] != digest:
        raise InputError(f"{path} cannot be read: it is not what was written, by its SHA-256")


def _described(path: Path) -> dict[str, int | str]:
    with path.open("rb", buffering=0) as file:
        with suppress(AttributeError, OSError):  # systems and file systems that take no such advice
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return {
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
