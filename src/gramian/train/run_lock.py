"""One writer a run folder: a lock that the operating system frees when its owner dies."""

import errno
import json
import os
import platform
import weakref
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from gramian.errors import InputError
from gramian.files import alive

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

LOCK, OWNER = ".lock", ".owner"
WITHOUT = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems without locks answer."""

TRIES = 100


class RunLock:
    """The right to write one run folder, for as long as this object lives.

    Where the file system has no locks, the file `.owner` names the process that writes; that of a process
    of this machine which has ended is taken over.

    Raises: InputError naming the process that has the right; OSError when the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self._file, self._descriptor = folder / LOCK, _locked(folder / LOCK)
        if self._descriptor is None:
            self._file = folder / OWNER
            _own(self._file)
        self._identity = _identity(self._file)
        self._end = weakref.finalize(self, _release, self._file, self._descriptor, self._identity)

    @property
    def held(self) -> bool:
        """Whether the file of the lock is still there, and the one that was made."""
        return self._end.alive and _identity(self._file) == self._identity

    def forget(self) -> None:
        """Leave the lock to the process that this one was forked from."""
        if self._end.detach() and self._descriptor is not None:
            os.close(self._descriptor)


_held: weakref.WeakValueDictionary[Path, RunLock] = weakref.WeakValueDictionary()


def lock_run(folder: Path) -> RunLock:
    """Return this process' right to write a run folder, which it may ask for more than once.

    Raises: as `RunLock`.
    """
    place = folder.resolve()
    found = _held.get(place)
    if found is None or not found.held:
        found = _held[place] = RunLock(place)
    return found


def _forget() -> None:
    for lock in list(_held.values()):
        lock.forget()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _locked(path: Path) -> int | None:
    """Lock a file and return it, open; None where the file system has no locks."""
    for _ in range(TRIES):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            break
        except OSError as error:
            os.close(descriptor)
            if error.errno not in WITHOUT:
                raise OSError(error.errno, error.strerror, str(path)) from error
            path.unlink(missing_ok=True)
            return None
        if _identity(path) == _number(os.fstat(descriptor)):
            _describe(descriptor)
            return descriptor
        os.close(descriptor)  # of the owner before, who has just removed it
    raise InputError(
        f"the run {path.parent} is being written by {_owner(path)[0]}; wait for its end or choose "
        "another name"
    )


def _own(path: Path) -> None:
    """Make the file that stands for a lock."""
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            told, ended = _owner(path)
            if not ended:
                raise InputError(
                    f"the run {path.parent} is being written by {told}, says {path.name} there (the file "
                    "system has no locks); wait for its end, or remove that file if it has ended"
                ) from None
            path.unlink(missing_ok=True)
        else:
            _describe(descriptor)
            os.close(descriptor)
            return


def _describe(descriptor: int) -> None:
    """Write who has the lock; on a full disk it is held all the same."""
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    about = {"process": os.getpid(), "host": platform.node(), "since": now}
    with suppress(OSError):
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps(about).encode())


def _owner(path: Path) -> tuple[str, bool]:
    """Return who has a lock, in words, and whether that process is known to have ended."""
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        process, host, since = int(about["process"]), about["host"], about["since"]
    except (OSError, ValueError, TypeError, KeyError):
        return "another process", False
    ended = host == platform.node() and (process == os.getpid() or not alive(process))
    return f"process {process} on {host} since {since}", ended


def _number(state: os.stat_result) -> tuple[int, int]:
    return state.st_dev, state.st_ino


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from another of the same name."""
    try:
        return _number(path.stat())
    except OSError:
        return None


def _release(path: Path, descriptor: int | None, identity: tuple[int, int] | None) -> None:
    with suppress(OSError):
        if _identity(path) == identity:
            path.unlink()
    if descriptor is not None:
        os.close(descriptor)
