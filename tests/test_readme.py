"""README's commands and examples run: `sh` blocks line by line, `python` blocks whole."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
LINES = [line for kind, body in BLOCKS if kind == "sh" for line in body.splitlines() if line.strip()]
PROGRAMS = [body for kind, body in BLOCKS if kind == "python"]
# Each command runs as written, but for sizes that make it take seconds.
SMALLER = (
    "--steps 4 --evaluation-batches 1 --max-bytes 200000 --vocabulary 300 --width 16 --depth 2 --context 16"
)


def test_there_is_something_to_run() -> None:
    assert len(LINES) >= 5
    assert PROGRAMS


def command(line: str) -> list[str]:
    """Return what to run for a line of README."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        return ["make", "--dry-run", "-C", str(ROOT), *arguments]  # the target and its recipe exist
    assert program == "gramian", line
    smaller = shlex.split(SMALLER) if arguments[0] in ("train", "compare") else []
    return [sys.executable, "-m", "gramian", *arguments, *smaller]


@pytest.mark.parametrize("line", LINES)
def test_command(line: str, tmp_path: Path) -> None:
    (tmp_path / "my_code").mkdir()
    for number in range(4):
        (tmp_path / "my_code" / f"{number}.py").write_text(
            f"def f{number}(x):\n    return x + {number}\n" * 40
        )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(line), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_python_block(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_links_and_pictures_exist() -> None:
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_table_of_systems_names_files_that_exist() -> None:
    rows = [line for line in README.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 11))
    for row in rows:
        for path in re.findall(r"`((?:src|tests)/[^`]+)`", row):
            assert (ROOT / path).exists(), path
