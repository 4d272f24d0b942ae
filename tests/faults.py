"""Faults for tests: processes killed at any moment, disks that are full or fail, damaged files, wild clocks.

`Nursery` is a process that has imported everything once and forks a child for each job, so that a hundred
kills cost little. Faults are context managers; a child enters those that it is told of by name, and never
leaves them.
"""

import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

KILLED = -signal.SIGKILL
NEVER_READABLE = Path("/proc/self/mem")
"""Linux answers EIO to a read of its start."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
KINDS = {
    "os.rename": "rename",
    "os.remove": "remove",
    "os.rmdir": "remove",
    "os.mkdir": "mkdir",
    "os.truncate": "write",
    "os.chmod": "chmod",
    "fsync": "fsync",
}
"""What a fault can happen at, beside open: "read" or "write"."""

_watchers: list[Any] = []
_hooked = False


@dataclass(frozen=True)
class Event:
    """A call to the operating system about a file."""

    kind: str
    path: str


def _told(name: str, arguments: tuple[Any, ...]) -> None:
    """Pass a call on to whoever watches; what a watcher raises is raised by the call."""
    if not _watchers or not (name == "open" or name in KINDS):
        return
    path = arguments[0]
    if not isinstance(path, (str, bytes, os.PathLike)):
        return
    if name == "open":
        mode, flags = arguments[1], arguments[2] or 0
        writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else flags & WRITING
        kind = "write" if writes else "read"
    else:
        kind = KINDS[name]
    for watcher in list(_watchers):
        watcher(Event(kind, os.fsdecode(path)))


def _hook() -> None:
    """Hear of every call: by Python's audit events, which never end, and of fsync in its own name."""
    global _hooked
    if _hooked:
        return
    _hooked, plain = True, os.fsync

    def fsync(descriptor: int) -> None:
        _told("fsync", (os.readlink(f"/proc/self/fd/{descriptor}"),))
        plain(descriptor)

    os.fsync = fsync
    sys.addaudithook(_told)


@contextmanager
def watched(watcher: Any) -> Iterator[None]:
    """Tell a function of every `Event` of this process."""
    _hook()
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextmanager
def killed_at(number: int, below: str) -> Iterator[None]:
    """Kill this process just before the so-manyth change to files below a folder, counted from 1."""
    left = number

    def count(event: Event) -> None:
        nonlocal left
        if _changes(event, below):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    with watched(count):
        yield


@contextmanager
def counted(below: str, into: str) -> Iterator[None]:
    """Add a byte to a file at every change to files below a folder."""
    file = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    with watched(lambda event: _changes(event, below) and os.write(file, b".")):
        yield


def _changes(event: Event, below: str) -> bool:
    return event.kind != "read" and event.path.startswith(below)


@contextmanager
def failing(kind: str, error: int, below: Path | str, skip: int = 0, name: str = "") -> Iterator[None]:
    """Let calls of a kind about files below a folder, with some word in their names, fail after the first."""
    left = skip

    def fail(event: Event) -> None:
        nonlocal left
        if event.kind == kind and event.path.startswith(str(below)) and name in event.path:
            left -= 1
            if left < 0:
                raise OSError(error, os.strerror(error), event.path)

    with watched(fail):
        yield


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes, as a quota does: EFBIG, of any library's writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def can_mount() -> bool:
    """Whether this process may mount file systems: root, on Linux, unless a container forbids it."""
    return sys.platform == "linux" and os.geteuid() == 0 and _mount("none", "/proc/self", "none", 0, "") != 1


def _mount(source: str, target: str, kind: str, flags: int, options: str) -> int:
    """Mount, and return 0 or the error; 1 is that it is not permitted."""
    library = ctypes.CDLL(None, use_errno=True)
    done = library.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode())
    return ctypes.get_errno() if done else 0


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """Mount a disk of so many bytes in memory at a new folder; ENOSPC when it is full. Needs `can_mount`."""
    place.mkdir()
    if error := _mount("none", str(place), "tmpfs", 0, f"size={size}"):
        raise OSError(error, os.strerror(error), str(place))
    try:
        yield place
    finally:
        ctypes.CDLL(None).umount2(str(place).encode(), 2)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Forbid changes below a folder, to root too where it can mount; permissions do it for others."""
    bind, remount_read_only = 4096, 4096 | 32 | 1
    if os.geteuid():
        folder.chmod(0o500)
    elif error := _mount(str(folder), str(folder), "none", bind, "") or _mount(
        "none", str(folder), "none", remount_read_only, ""
    ):
        raise OSError(error, os.strerror(error), str(folder))
    try:
        yield
    finally:
        if os.geteuid():
            folder.chmod(0o700)
        else:
            ctypes.CDLL(None).umount2(str(folder).encode(), 2)


@contextmanager
def jumping_clock(shifts: Sequence[float]) -> Iterator[None]:
    """Let the time of day be wrong by so many seconds at one call after the other, again and again."""
    plain, plain_ns, calls = time.time, time.time_ns, 0

    def shift() -> float:
        nonlocal calls
        calls += 1
        return shifts[calls % len(shifts)]

    time.time = lambda: plain() + shift()
    time.time_ns = lambda: plain_ns() + int(1e9 * shift())
    try:
        yield
    finally:
        time.time, time.time_ns = plain, plain_ns


def cut(path: Path, size: int) -> None:
    """Cut a file to so many bytes; counted from its end if negative."""
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file, counted from its start, or its end if negative."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def make_unreadable(path: Path) -> None:
    """Put something in a file's place that opens, and answers every read with EIO."""
    path.unlink(missing_ok=True)
    path.symlink_to(NEVER_READABLE)


FAULTS = {
    "killed_at": killed_at,
    "counted": counted,
    "failing": failing,
    "largest_file": largest_file,
    "jumping_clock": jumping_clock,
}
"""What a child can be told to suffer, by name."""


class Nursery:
    """A process that has imported some modules and forks a child for each job.

    It has one thread when it forks: torch is told to use no more, and has computed nothing yet.
    """

    def __init__(self, modules: Sequence[str], environment: dict[str, str]) -> None:
        paths = [str(Path(__file__).parent), *sys.path]
        self._server = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                **environment,
            },
        )
        self._hear(None)

    def start(self, function: str, arguments: Sequence[Any], log: Path, **faults: dict[str, Any]) -> "Child":
        """Call module:function in a child with JSON arguments; what it prints goes to the end of a file."""
        order = {"function": function, "arguments": list(arguments), "log": str(log), "faults": faults}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order).encode() + b"\n")
        self._server.stdin.flush()
        return Child(self._hear(None), self)

    def close(self) -> None:
        """End the process; children have to have ended."""
        self._server.communicate()

    def _hear(self, seconds: float | None) -> Any:
        """Return the next word of the process, None if there is none in that time."""
        stream = self._server.stdout
        assert stream is not None
        if seconds is not None and not select.select([stream], [], [], max(seconds, 0))[0]:
            return None
        line = b""
        while not line.endswith(b"\n"):  # unbuffered, or select would not see what was read ahead
            letter = os.read(stream.fileno(), 1)
            if not letter:
                raise RuntimeError(f"the nursery has ended, exit code {self._server.wait()}")
            line += letter
        return json.loads(line)


@dataclass(frozen=True)
class Child:
    """A job on its way."""

    process: int
    nursery: Nursery

    def wait(self, seconds: float | None = None) -> int | None:
        """Return the exit code, minus the signal of one that was killed; None if it still runs by then."""
        return self.nursery._hear(seconds)

    def kill(self) -> int:
        """Kill it, unless it has ended by itself, and return how it ended."""
        with suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)
        code = self.wait()
        assert code is not None
        return code


def _serve(modules: Sequence[str]) -> None:
    import torch

    torch.set_num_threads(1)
    for module in modules:
        import_module(module)
    tell = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    tell.write("true\n")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _obey(json.loads(line))
        tell.write(f"{child}\n")
        tell.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")


def _obey(order: dict[str, Any]) -> NoReturn:
    """Do a job as a process of its own would."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        module, _, name = order["function"].partition(":")
        function = getattr(import_module(module), name)
        entered = [FAULTS[fault](**settings) for fault, settings in order["faults"].items()]
        for fault in entered:
            fault.__enter__()
        code = function(*order["arguments"]) or 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1:])
