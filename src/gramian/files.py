"""Writing files so that a reader sees either the old content or the new one, never a part."""

import ctypes
import errno
import glob
import json
import os
import platform
import re
import secrets
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gramian.errors import GramianError

_WRITTEN: set[str] = set()
"""Temporary names that this process is writing under."""

_TEMPORARY = re.compile(r"\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)\.[0-9a-f]{8}\.part$")


def _usual_mode() -> int:
    """Return the permissions of new files, which some libraries withhold from theirs."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


def sync(path: Path) -> None:
    """Ask the operating system to put a file's content, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems that sync no folders
            raise naming(error, path) from error
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a hidden name beside `path`, of which nothing stays; errors name `path` instead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = f"{_machine():08x}-{os.getpid()}.{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.{owner}.part")
    _WRITTEN.add(temporary.name)
    try:
        yield temporary
    except Exception as error:
        if (named := _named(error, temporary, path)) is None:
            raise
        raise named from error
    finally:
        _WRITTEN.discard(temporary.name)
        with suppress(OSError):
            _delete(temporary)


def _named(error: Exception, temporary: Path, path: Path) -> OSError | None:
    """Return a failure to write as an OSError that names `path`; None for any other error.

    What is written in Rust fails with errors of other kinds, which hold the number in their text.
    """
    if isinstance(error, OSError):
        own = error.filename is None or str(error.filename).startswith(str(temporary))
        return naming(error, path) if own else None
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found is None or isinstance(error, GramianError):
        return None
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path))


def naming(error: OSError, path: Path) -> OSError:
    """Return the same failure to write, with the name of the file; arrays fail without a number."""
    if error.errno is None:
        return OSError(errno.EIO, f"only a part could be written ({error})", str(path))
    return OSError(error.errno, error.strerror, str(path))


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, renamed to it when the block ends without an error.

    On an error the temporary file is removed and whatever stood at `path` is untouched.

    Raises: OSError naming `path` when it cannot be written.
    """
    path = Path(path)
    with _beside(path) as temporary:
        yield temporary
        temporary.chmod(_usual_mode())
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, renamed to it when the block ends without an error.

    `path` must not exist, unless it is to be replaced. On an error the temporary folder is removed and
    whatever stood at `path` is untouched.

    Raises: OSError naming `path` when it cannot be written.
    """
    path = Path(path)
    remove_leftovers(path.parent, f"{glob.escape(path.name)}.*")
    with _beside(path) as temporary:
        temporary.mkdir()
        yield temporary
        for place, _, names in os.walk(temporary, topdown=False):
            for name in names:
                Path(place, name).chmod(_usual_mode())
                sync(Path(place, name))
            sync(Path(place))
        with _beside(path) as old:
            if replace and os.path.lexists(path):
                if not _exchanged(temporary, path):
                    os.rename(path, old)
                    os.rename(temporary, path)
            else:
                os.rename(temporary, path)
            sync(path.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Give each of two names what the other had, in one step, where the system can (Linux)."""
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "renameat2"):
        return False
    here, exchange = -100, 2
    return library.renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there, so that a reader sees all of it or nothing."""
    if os.path.lexists(path):
        with _beside(path) as hidden:
            os.rename(path, hidden)
            sync(path.parent)


def remove_leftovers(folder: Path, name: str = "*", *, alone: bool = False) -> None:
    """Remove from a folder what killed processes left half written or half removed, of one name or all.

    What a living process of this machine writes stays; what other machines write, too, unless the caller is
    known to be `alone`.
    """
    for path in folder.glob(f".{name}.part"):
        if _is_left(path.name, alone):
            with suppress(OSError):
                _delete(path)


def _is_left(name: str, alone: bool) -> bool:
    """Whether nobody writes under a temporary name any more."""
    if name in _WRITTEN:
        return False
    found = _TEMPORARY.search(name)
    if found is None or int(found["machine"], 16) != _machine():
        return alone
    process = int(found["process"])
    return process == os.getpid() or not alive(process)


def _machine() -> int:
    """Return a number by which this machine tells its processes from those of others that share a disk."""
    return zlib.crc32(platform.node().encode())


def alive(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` by UTF-8 `text`, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace the content of `path` by `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
