"""README's commands and examples run, one after the other in one folder."""

import re
import shlex
import subprocess
from pathlib import Path

from programs import Programs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
# Each command runs as written, but for sizes that make it take seconds.
SMALLER = (
    "--steps 4 --evaluation-batches 1 --max-bytes 200000 --vocabulary 300 --width 16 --depth 2 --context 16"
)


def command(line: str) -> list[str]:
    """Return the words of the command in a line of README."""
    program, *arguments = shlex.split(line, comments=True)
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
    return [*arguments, *shlex.split(smaller)]


def test_commands_and_programs(tmp_path: Path, programs: Programs) -> None:
    (tmp_path / "my_code").mkdir()
    for number in range(4):
        (tmp_path / "my_code" / f"{number}.py").write_text(
            f"def f{number}(x):\n    return x + {number}\n" * 40
        )
    ran = {"sh": 0, "python": 0}
    for kind, body in BLOCKS:
        if kind not in ran:
            continue
        runs = [["text", body]]
        if kind == "sh":
            lines = [line for line in body.splitlines() if line and not line.startswith("make ")]
            runs = [["command", *command(line)] for line in lines]
        for words in runs:
            done = programs.run(tmp_path, *words, warned="ignore")
            # with two steps a claim need not hold; that it was tested is what counts here
            tested = "verify" in words and "the claim does not hold here" in done.stderr
            assert done.code == 0 or tested, f"{words}\n{done.stdout}\n{done.stderr}"
            ran[kind] += 1
    assert ran["sh"] >= 5
    assert ran["python"] >= 2


def test_targets_of_make_have_recipes() -> None:
    lines = "".join(body for kind, body in BLOCKS if kind == "sh").splitlines()
    targets = [line.split()[1] for line in lines if line.startswith("make ")]
    assert {"demo", "test"} <= set(targets)
    subprocess.run(["make", "--dry-run", "-C", str(ROOT), *targets], check=True, capture_output=True)


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
