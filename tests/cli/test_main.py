import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gramian
from gramian.cli.main import run

SMALL = ["--width", "32", "--depth", "2", "--heads", "2", "--context", "16", "--vocabulary", "300"]


def small(command: str, folder: Path, text: Path, *more: str) -> list[str]:
    steps = ["--steps", "40", "--checkpoint-every", "10", "--evaluation-batches", "2"]
    return [command, "--text", str(text), "--runs", str(folder / "runs"), *SMALL, *steps, *more]


def test_train_and_list(tmp_path, story, capsys) -> None:
    assert run(small("train", tmp_path, story, "--block", "sas_p", "--name", "one")) == 0
    assert "validation loss" in capsys.readouterr().out
    assert run(["list"]) == 0
    listed = capsys.readouterr().out
    for name in ("pre_norm", "outlier_protected", "sas_p_no_norm", "rmsnorm", "cosine"):
        assert name in listed


def test_compare(tmp_path, story, capsys) -> None:
    assert run(small("compare", tmp_path, story, "--blocks", "pre_norm", "sas")) == 0
    out = capsys.readouterr().out
    assert "int8 gap" in out
    assert (tmp_path / "runs" / "compare" / "report.html").exists()


def test_version(capsys) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["gramian", gramian.__version__]


def test_help_names_units_and_defaults(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["compare", "--help"])
    assert ended.value.code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for words in ("--steps INT Optimiser steps.", "--text", "--resume", "(default: 0.1)"):
        assert words in text
    assert "--data." not in text  # flat names
    assert "--no-resume" not in text
    assert "--no-tied" in text


def failure(arguments: list[str], capsys) -> str:
    """Run what must fail and return what it says, checked to be one sentence on standard error."""
    assert run(arguments) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("gramian: ")
    assert "\n" not in said
    assert "Traceback" not in said
    return said


def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, story, capsys) -> None:
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    for command in ("train", "compare"):
        for text, words in (
            (tmp_path / "missing", "missing"),
            (tmp_path / "empty.txt", "empty.txt"),
            (tmp_path / "binary.txt", "binary.txt"),
            (tmp_path / "short.txt", "context 16 needs 17"),
        ):
            assert words in failure(small(command, tmp_path, text), capsys)
        for option, value, words in (
            ("--depth", "0", "depth must be at least 1"),
            ("--heads", "5", "width 32 is not divisible by heads 5"),
            ("--block" if command == "train" else "--blocks", "resnet", "unknown block 'resnet'; choose one"),
            ("--steps", "0", "steps must be at least 1"),
            ("--learning-rate", "0", "learning rate must be positive"),
        ):
            assert words in failure([*small(command, tmp_path, story), option, value], capsys)
        assert not (tmp_path / "runs").exists()


def test_a_runs_folder_that_cannot_be_is_one_sentence(tmp_path, story, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    said = failure([*small("train", tmp_path, story), "--runs", str(tmp_path / "file")], capsys)
    assert "Not a directory" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path, story, capsys) -> None:
    arguments = small("train", tmp_path, story, "--name", "one")
    assert run(arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    assert "already holds a run" in failure(arguments, capsys)
    assert "has block = 'pre_norm'" in failure([*arguments, "--resume", "--block", "sas"], capsys)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")} == before
    assert run([*arguments, "--overwrite"]) == 0


def test_unreadable_checkpoints_are_named_and_the_one_before_is_used(tmp_path, story, capsys) -> None:
    arguments = small("train", tmp_path, story, "--name", "one")
    assert run(arguments) == 0
    place = tmp_path / "runs" / "one" / "checkpoints"
    *_, before, last = sorted(place.rglob("model.safetensors"))
    whole = last.read_bytes()
    last.write_bytes(whole[:-10])
    capsys.readouterr()
    assert run([*arguments, "--resume"]) == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "cannot be read" in line]
    assert note.startswith(f"gramian: note: {last} cannot be read")
    assert f"{before.parent.name.lstrip('step-0')} is used" in note
    assert last.read_bytes() == whole  # the step was taken again
    for each in place.rglob("step-*/model.safetensors"):
        each.write_bytes(b"")
    said = failure([*arguments, "--resume"], capsys)
    assert str(last) in said
    assert "no checkpoint in" in said


def test_divergence_says_the_step_and_keeps_the_last_good_checkpoint(tmp_path, story, capsys) -> None:
    wild = ["--learning-rate", "1e18", "--warmup", "0.9", "--clip", "inf", "--checkpoint-every", "1"]
    said = failure(small("train", tmp_path, story, "--name", "one", "--log-every", "1", *wild), capsys)
    step = re.search(r"not finite at step (\d+); the last good checkpoint is (\S+)", said)
    assert step
    kept = load_file(Path(step[2]) / "model.safetensors")
    assert all(value.isfinite().all() for value in kept.values())


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_stopped_process_resumes_to_bit_identical_weights(tmp_path, story, number) -> None:
    def arguments(name: str, *more: str) -> list[str]:
        return small("train", tmp_path, story, "--name", name, "--steps", "400", *more)

    record = tmp_path / "runs" / "part" / "readings.jsonl"
    deadline = time.monotonic() + 120
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        [sys.executable, "-m", "gramian", *arguments("part")],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as part:  # fmt: skip
        while not (record.exists() and record.read_text().count('"train"') > 50):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        part.send_signal(number)
        said = part.communicate(timeout=60)[1]
    assert part.returncode == 130
    assert f"stopped by {number.name} and saved" in said
    assert "Traceback" not in said
    steps = int(re.search(r"pre_norm at step (\d+)", said)[1])
    assert 50 <= steps < 400
    assert run(arguments("part", "--resume")) == 0
    assert run(arguments("whole")) == 0
    one, two = (
        load_file(tmp_path / "runs" / name / "checkpoints" / "step-00000400" / "model.safetensors")
        for name in ("whole", "part")
    )
    assert one.keys() == two.keys()
    assert all((one[name] == two[name]).all() for name in one)
