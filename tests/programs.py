"""Programs and commands as a user runs them, in children of a process that has imported everything."""

import os
import runpy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from faults import Nursery
from gramian.cli.main import run

IMPORTED = ("programs", "gramian.interop.huggingface", "gramian.interop.sklearn", "torch._dynamo")
LONG = 300.0
"""Seconds after which a child hangs."""


def obey(folder: str, said: str, what: Sequence[str], warned: str) -> int:
    """Run a command's words, or a program's text or path, in a folder; what it prints goes to a file."""
    os.chdir(folder)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 1)
    warnings.resetwarnings()
    warnings.simplefilter(warned)  # type: ignore[arg-type]
    kind, *words = what
    if kind == "command":
        return run(words)
    if kind == "text":
        exec(compile(words[0], "program", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")
    return 0


@dataclass(frozen=True)
class Done:
    """What became of a program."""

    code: int | None
    """None: it had not ended in time."""
    stdout: str
    stderr: str


class Programs:
    """Runs one program after the other."""

    def __init__(self, folder: Path) -> None:
        self._nursery, self._folder = Nursery(IMPORTED, {"HF_HUB_OFFLINE": "1"}), folder

    def run(self, folder: Path, kind: str, *words: str, warned: str = "default") -> Done:
        """Run a "command" by its words, a "text" or a "file", with Python's own filter of all warnings."""
        said, log = self._folder / "stdout", self._folder / "stderr"
        log.unlink(missing_ok=True)
        arguments = [str(folder), str(said), [kind, *words], warned]
        child = self._nursery.start("programs:obey", arguments, log)
        code = child.wait(LONG)
        if code is None:
            child.kill()
        return Done(code, said.read_text(encoding="utf-8"), log.read_text(encoding="utf-8"))

    def close(self) -> None:
        """End the process."""
        self._nursery.close()
