"""Programs started as several processes that know of each other, as a launcher would start them."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

TESTS = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        return at.getsockname()[1]


def launched(arguments: Sequence[str], count: int, timeout: float = 240) -> list[tuple[int, str]]:
    """Run `python arguments` so many times, one thread each; return exit code and errors of each.

    None of them outlives this call.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), **address}
    with ExitStack() as stack:
        processes = []
        for rank in range(count):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
            process = subprocess.Popen(
                [sys.executable, *arguments], env=shared | place, stderr=subprocess.PIPE, text=True
            )
            stack.callback(process.kill)
            processes.append(process)
        said = [process.communicate(timeout=timeout)[1] for process in processes]
    return [(process.returncode, each) for process, each in zip(processes, said, strict=True)]
