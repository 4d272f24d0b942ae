"""README's commands and examples run, one after the other in one folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
# Each command runs as written, but for sizes that make it take seconds.
SMALLER = (
    "--steps 4 --evaluation-batches 1 --max-bytes 200000 --vocabulary 300 --width 16 --depth 2 --context 16"
)


def command(line: str) -> list[str]:
    """Return what to run for a line of README."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        return ["make", "--dry-run", "-C", str(ROOT), *arguments]  # the target and its recipe exist
    assert program == "gramian", line
    smaller = {
        "train": f"{SMALLER} --checkpoint-every 1",
        "compare": SMALLER,
        "verify": "--steps 2 --seeds 0 1",
        "regress": "--steps 10 --members 2 --widths 8",
        "graphs": "--sizes 12 6 6 --epochs 1 --parameters 3000 --layers 1",
        "reconstruct": "--steps 6 --size 32 --samples 4 --compare fbp",
        "prune": "--steps 4 --posterior-steps 2 --train-steps 4 --widths 8 --draws 50 --count 200",
    }.get(arguments[0], "")
    return [sys.executable, "-m", "gramian", *arguments, *shlex.split(smaller)]


def test_commands_and_programs(tmp_path: Path) -> None:
    (tmp_path / "my_code").mkdir()
    for number in range(4):
        (tmp_path / "my_code" / f"{number}.py").write_text(
            f"def f{number}(x):\n    return x + {number}\n" * 40
        )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = {"sh": 0, "python": 0}
    for kind, body in BLOCKS:
        if kind not in ran:
            continue
        programs = [[sys.executable, "-W", "ignore", "-c", body]]
        if kind == "sh":
            programs = [command(line) for line in body.splitlines() if line.strip()]
        for program in programs:
            done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
            # with two steps a claim need not hold; that it was tested is what counts here
            tested = "verify" in program and "the claim does not hold here" in done.stderr
            assert done.returncode == 0 or tested, f"{program}\n{done.stdout}\n{done.stderr}"
            ran[kind] += 1
    assert ran["sh"] >= 5
    assert ran["python"] >= 2


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
