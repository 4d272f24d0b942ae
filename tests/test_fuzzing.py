"""Hostile files: every loader reads them or refuses them by one sentence; `make fuzz` gives it 10⁵."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fuzzed_loaders import CONTROLS, LOADERS
from fuzzing import Tally, available, cases, draw, fuzz, verdict

HERE = Path(__file__).parent
REAL = [name for name, loader in LOADERS.items() if not loader.control]
HEAVY = {"hugging-face-config": 40, "hugging-face-tokenizer": 40, "hugging-face-model": 10}
"""Inputs of loaders that take long."""
COUNT = 100
NEVER_REFUSES = {"text-plain", "kept-projector"}
"""A folder's files that are no text are passed over; what is kept is made again."""

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")


def _few(name: str, count: int, folder: Path, seed: int) -> Tally:
    if not available(LOADERS[name]):
        pytest.skip("needs an optional package")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fuzz(name, LOADERS[name], range(count), folder, seed)


@pytest.mark.parametrize("name", REAL)
def test_hostile_files_are_read_or_refused_by_a_sentence(name: str, tmp_path: Path) -> None:
    tally = _few(name, HEAVY.get(name, COUNT), tmp_path, seed=11)
    assert tally.findings == {}, tally.first
    assert tally.accepted > 0
    assert tally.refused > 0 or name in NEVER_REFUSES


def test_inputs_are_a_function_of_seed_loader_and_number(tmp_path: Path) -> None:
    seen = []
    for turn in "ab":
        (tmp_path / turn).mkdir()
        (case,) = cases(LOADERS["weights-safetensors"], tmp_path / turn)
        whole = (case.folder / "a.safetensors").read_bytes()
        found = []
        for number in range(40):
            spoilt = case.spoil(draw(3, "x", number))
            path = case.folder / spoilt
            found.append(path.read_bytes() if path.is_file() and not path.is_symlink() else None)
            case.restore(spoilt)
            assert path.read_bytes() == whole
        seen.append(found)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 30


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("good", "refused"),
        ("trace", "KeyError"),
        ("silent", "no sentence"),
        ("swallowed", "MemoryError"),
        ("code", "code"),
    ],
)
def test_what_is_planted_is_found(name: str, words: str, tmp_path: Path) -> None:
    assert words in verdict(lambda folder: CONTROLS[name](), tmp_path)


@linux
@pytest.mark.slow
def test_what_ends_a_process_is_found(tmp_path: Path) -> None:
    report = tmp_path / "found.json"
    wanted = {
        "large": "MemoryError",
        "slow": "took too long",
        "waiting": "waited too long",
        "crash": "process ended by -11",
        "program": "started os.system",
    }
    command = [
        sys.executable,
        str(HERE / "fuzzing.py"),
        "--count",
        "3",
        "--seconds",
        "0.5",
        "--json",
        str(report),
    ]
    named = ",".join(f"planted-{name}" for name in wanted)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--loaders", named], check=True, capture_output=True, env=environment)
    found = json.loads(report.read_text())
    for name, words in wanted.items():
        tally = found[f"planted-{name}"]
        assert tally["inputs"] == 3
        assert sum(count for said, count in tally["findings"].items() if words in said) == 3, tally


@linux
@pytest.mark.slow
def test_many_hostile_files(tmp_path: Path) -> None:
    report = tmp_path / "found.json"
    command = [
        sys.executable,
        str(HERE / "fuzzing.py"),
        "--count",
        "2000",
        "--seed",
        "5",
        "--json",
        str(report),
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for name, tally in json.loads(report.read_text()).items():
        assert tally["findings"] == {}, (name, tally["first"])
        assert tally["inputs"] == 2000
        assert tally["memory"] < 2 * 2**30
