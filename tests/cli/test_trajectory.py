"""`gramian trajectory` from the command line: what it prints and keeps, how it stops, what it refuses."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gramian.cli.main import run
from gramian.observe import checkpoints


def series(folder: Path, n: int = 10, size: int = 400) -> Path:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(size, size, generator=generator)
    for t in range(n):
        place = folder / f"step-{t}"
        place.mkdir(parents=True)
        save_file(
            {"blocks.0.q.weight": value, "blocks.1.k.weight": value.T.contiguous()},
            place / "model.safetensors",
        )
        value = value + 0.1 * torch.randn(size, size, generator=generator)
    return folder


def test_it_prints_writes_and_keeps_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["trajectory", str(series(tmp_path / "run")), "--output", str(tmp_path / "out")]
    assert run(arguments) == 0
    said = capsys.readouterr().out
    for words in ("whole model", "random walk", "layers: blocks.", "Exploring", "report: "):
        assert words in said
    assert run(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run([*arguments, "--overwrite"]) == 0


SLOW = """
import sys, time
from gramian.observe import checkpoints, saved_grams
from gramian.cli.main import run
saved_grams.EVERY = 0.0
checkpoints.UNIT = (2**14, 2**14)
read = checkpoints._rows
def slowly(*arguments):
    print("reading", flush=True)
    time.sleep(0.02)
    return read(*arguments)
checkpoints._rows = slowly
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("name", "code"), [("SIGINT", 130), pytest.param("SIGTERM", 130, marks=pytest.mark.slow)]
)
def test_stopped_it_saves_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    monkeypatch.setattr(checkpoints, "UNIT", (2**14, 2**14))
    arguments = ["trajectory", str(series(tmp_path / "run")), "--output", str(tmp_path / "out")]
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    for _ in range(4):
        child.stdout.readline()
    child.send_signal(getattr(signal, name))
    _, errors = child.communicate()
    assert child.returncode == code
    assert "stopped by" in errors
    assert "the same command goes on" in errors
    assert not (tmp_path / "out" / "trajectory.json").exists()
    assert list((tmp_path / "out" / "unfinished").glob("*/found-*.safetensors"))
    assert run(arguments) == 0
    whole = ["trajectory", str(tmp_path / "run"), "--output", str(tmp_path / "whole")]
    assert run(whole) == 0
    first, second = (load_file(tmp_path / name / "grams.safetensors") for name in ("out", "whole"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def truncated(folder: Path) -> Path:
    path = series(folder) / "step-3" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def other_architecture(folder: Path) -> Path:
    save_file({"conv.weight": torch.ones(3, 3)}, series(folder) / "step-4" / "model.safetensors")
    return folder


def reshaped(folder: Path) -> Path:
    series(folder)
    save_file(
        {"blocks.0.q.weight": torch.randn(400, 400), "blocks.1.k.weight": torch.randn(400, 399)},
        folder / "step-4" / "model.safetensors",
    )
    return folder


def twice_the_step(folder: Path) -> Path:
    (series(folder) / "step-3").rename(folder / "step-004")
    return folder


def copied(folder: Path) -> Path:
    path = series(folder) / "step-5" / "model.safetensors"
    path.write_bytes((folder / "step-9" / "model.safetensors").read_bytes())
    return folder


def one(folder: Path) -> Path:
    return series(folder, n=1)


def empty(folder: Path) -> Path:
    (folder / "notes").mkdir(parents=True)
    return folder


def unsafe(folder: Path) -> Path:
    folder.mkdir()
    for step in range(3):
        torch.save({"weights": print}, folder / f"step-{step}.pt")
    return folder


def absent(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncated, ("step-3", "model.safetensors")),
        (other_architecture, ("step-0 and", "step-4", "different architectures")),
        (reshaped, ("blocks.1.k.weight", "step-4", "leave_out")),
        (twice_the_step, ("step-004", "step-4")),
        (copied, ("step 5 and step 9", "--duplicates keep_one")),
        (one, ("one checkpoint",)),
        (empty, ("no checkpoints",)),
        (unsafe, ("step-0.pt",)),
        (absent, ("does not exist",)),
    ],
)
def test_bad_series_are_one_sentence_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], Path], words: tuple[str, ...]
) -> None:
    assert run(["trajectory", str(spoil(tmp_path / "run")), "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("gramian: ")
    assert "\n" not in said
    for word in words:
        assert word in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--every", "0", "every must be at least 1"),
        ("--workers", "0", "workers must be at least 1"),
        ("--mismatch", "ignore", "refuse and leave_out"),
        ("--rename", "nothing", "OLD=NEW"),
        ("--only", "absent.*", "absent.*"),
        ("--first", "9", "at least two are needed"),
    ],
)
def test_bad_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, words: str
) -> None:
    arguments = [
        "trajectory",
        str(series(tmp_path / "run")),
        "--output",
        str(tmp_path / "out"),
        option,
        value,
    ]
    assert run(arguments) == 1
    said = capsys.readouterr().err.strip()
    assert words in said
    assert not (tmp_path / "out").exists()
