"""How much memory there is, and refusal of what needs more, before any of it is allocated."""

import os
import re
import sys
from pathlib import Path

from gramian.errors import InputError

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")

LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""Where a cgroup of version 2, or the controllers of version 1, say what its processes may have together."""

CONTROL = Path("/sys/fs/cgroup")

ASKED = re.compile(r"(?:tried|unable) to allocate (\d+(?:\.\d+)?) ?(\w+)", re.IGNORECASE)
SHORT = re.compile(r"allocate memory|not enough memory|out of memory|unable to allocate", re.IGNORECASE)
BEYOND = re.compile(
    r"calculation overflow|multiplication overflow|too large to (?:convert|be)|int too (?:big|large)"
    r"|overflow when unpacking|out of int64 range|array is too big|maximum allowed dimension|cannot fit",
    re.IGNORECASE,
)
"""What libraries say of numbers beyond 64 bits, and of sizes whose product is."""


def check_memory(needed: float, what: str) -> None:
    """Refuse what cannot be held by this machine, however much of its memory is free.

    Args:
        needed: bytes that are needed at least, of host memory or of one GPU's.
        what: what needs them, with the numbers that a user can lower; the sentence begins with it.

    Raises: InputError with what is needed and what there is.
    """
    there = room()
    if needed > there:
        raise InputError(f"{what} would need about {size(needed)} of memory, and there are {size(there)}")


def room() -> int:
    """Return how many bytes there are: the machine's within all limits, or a GPU's where it has more."""
    host = min(_installed(), *_limits())
    return max(host, _largest_gpu())


def size(count: float) -> str:
    """Return a number of bytes in words, such as "3.2 TB"."""
    if count >= 1e21:
        return f"10^{len(str(int(count))) - 1} bytes"
    power = 0
    while count >= 999.5 and power < len(UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {UNITS[power]}"


def shortage(error: BaseException) -> str | None:
    """Return one sentence for an error that says that memory is short, or None for any other error."""
    said = str(error)
    asked = ASKED.search(said)
    if asked or SHORT.search(said) or isinstance(error, MemoryError):
        amount = f": {asked[1]} {asked[2]} were asked for at once" if asked else ""
        if asked and asked[2] == "bytes":
            amount = f": {size(float(asked[1]))} were asked for at once"
        return f"this takes more memory than there is{amount}, and there are {size(room())}; lower the sizes"
    if BEYOND.search(said):
        reason = said.strip().splitlines()[0].rstrip(".")
        return f"a number that was given is too large for what it is used for ({reason})"
    return None


def _installed() -> int:
    """Return the machine's memory; as good as no limit where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not of every system
        return sys.maxsize


def _limits() -> list[int]:
    """Return what a container and the shell allow a process to have; empty where nothing is said."""
    found = [_number(path) for path in (*_groups(), *(CONTROL / name for name in LIMITS))]
    try:
        import resource

        found += [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    except ImportError:  # not of every system
        pass
    return [limit for limit in found if limit is not None and limit > 0] or [sys.maxsize]


def _groups() -> list[Path]:
    """Return the files that limit this process' own cgroup of version 2, and those above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    own = [line[3:].strip("/") for line in lines if line.startswith("0::")]
    return [CONTROL / part / LIMITS[0] for group in own for part in (group, *map(str, Path(group).parents))]


def _number(path: Path) -> int | None:
    """Return the number in a file; None where there is none."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _largest_gpu() -> int:
    """Return the memory of the GPU that has most; 0 without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    return max(
        torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())
    )
