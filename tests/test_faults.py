"""Jobs that are killed, disks that fill up or fail, damaged files: what was kept is whole, work goes on."""

import errno
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from faults import (
    KILLED,
    Nursery,
    can_mount,
    cut,
    failing,
    flip,
    jumping_clock,
    largest_file,
    make_unreadable,
    read_only,
    small_disk,
)
from gramian.cli.main import run
from gramian.errors import InputError
from gramian.files import atomic_folder, write_json, write_text
from gramian.observe.record import Record
from gramian.observe.recorder import TrajectoryRecorder, points
from gramian.report import Page, Section
from gramian.report.html import write
from gramian.train.checkpoint import MODEL, OPTIMISER, STATE, check, checkpoints, drop_surplus, newest, save
from intact import damaged, differences, final_files, leftovers

needs_mounts = pytest.mark.skipif(not can_mount(), reason="mounting a small disk needs root on Linux")
TINY = [
    *["--width", "16", "--depth", "1", "--heads", "1", "--context", "16", "--vocabulary", "270"],
    *["--steps", "8", "--checkpoint-every", "2", "--evaluate-every", "4", "--observe-every", "4"],
    *["--evaluation-batches", "1", "--log-every", "2", "--device", "cpu"],
]
LONG = 300.0
"""Seconds after which a child hangs."""
SIZE = 2048
"""Features of the layer whose checkpoints are saved: 96 KiB each, with AdamW's two moments."""


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(SIZE, 4)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, SIZE)).sum().backward()
    optimiser.step()
    return model, optimiser


def train(story: Path, runs: Path, *more: str) -> int:
    return run(["train", "--text", str(story), "--runs", str(runs), *TINY, *more])


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    found = Nursery(
        ["test_faults", "torch._dynamo"], {"GRAMIAN_CACHE": str(tmp_path_factory.mktemp("cache"))}
    )
    yield found
    found.close()


# What children do, several times over


def save_three(folder: str) -> None:
    """Save steps 1 to 3, of which one is kept, or go on with those that are there, as a run does."""
    model, optimiser = trained()
    last = newest(Path(folder))
    drop_surplus(Path(folder), keep=1)
    for step in range(1 if last is None else last.step + 1, 4):
        save(Path(folder), step, model, optimiser, {}, keep=1)


def record_rows(folder: str) -> None:
    """Append three rows, with the number of those before."""
    record = Record(Path(folder, "rows.jsonl"))
    for _ in range(3):
        record.append({"number": len(record.read())})
    record.keep_first(4)


def replace_folder(folder: str) -> None:
    """Replace a folder, of which the files agree, by one of the next number."""
    place = Path(folder, "result")
    number = int((place / "a.txt").read_text()) if place.exists() else 0
    with atomic_folder(place, replace=True) as temporary:
        for name in ("a.txt", "b.txt"):
            write_text(temporary / name, str(number + 1))


def record_points(folder: str) -> None:
    """Record a path of three points from its start."""
    model = nn.Linear(4, 4)
    recorder = TrajectoryRecorder(model, folder, mode="exact")
    recorder.start(0)
    for step in range(3):
        recorder.record(step)


def killed_everywhere(nursery: Nursery, work: str, folder: Path) -> Iterator[int]:
    """Kill a piece of work before each of its changes to files, in the folder that the last one left."""
    for number in count(1):
        fault = {"number": number, "below": str(folder)}
        child = nursery.start(f"test_faults:{work}", [str(folder)], folder.parent / "log", killed_at=fault)
        code = child.wait(LONG)
        if code == 0:
            return
        assert code == KILLED, (folder.parent / "log").read_text()
        assert not damaged(folder)
        yield number


@pytest.mark.slow
def test_a_checkpoint_is_whole_or_absent_wherever_its_writer_is_killed(nursery, tmp_path: Path) -> None:
    folder, reached = tmp_path / "saved", 0
    folder.mkdir()
    for _ in killed_everywhere(nursery, "save_three", folder):
        found = checkpoints(folder)
        for each in found:
            check(each)
        assert not found or found[-1].step >= reached
        reached = found[-1].step if found else 0
        if reached == 2:  # what follows is killed at all its changes too
            shutil.rmtree(folder)
            folder.mkdir()
            reached = 0
    assert [each.step for each in checkpoints(folder)] == [3]


def test_rows_are_whole_wherever_their_writer_is_killed(nursery, tmp_path: Path) -> None:
    folder, before = tmp_path / "rows", 0
    folder.mkdir()
    for _ in killed_everywhere(nursery, "record_rows", folder):
        rows = Record(folder / "rows.jsonl").read()
        assert [row["number"] for row in rows] == list(range(len(rows)))
        assert len(rows) >= min(before, 4)
        before = len(rows)
    assert len(Record(folder / "rows.jsonl").read()) == 4


def test_a_folder_is_replaced_as_a_whole_wherever_that_is_killed(nursery, tmp_path: Path) -> None:
    folder, before = tmp_path / "folder", 0
    folder.mkdir()
    for _ in killed_everywhere(nursery, "replace_folder", folder):
        place = folder / "result"
        if place.exists() or before:
            first, second = ((place / name).read_text() for name in ("a.txt", "b.txt"))
            assert first == second
            assert int(first) >= before
            before = int(first)
    assert not leftovers(folder)


def test_a_point_of_a_path_is_whole_or_absent_wherever_its_recorder_is_killed(
    nursery, tmp_path: Path
) -> None:
    folder = tmp_path / "path"
    folder.mkdir()
    for _ in killed_everywhere(nursery, "record_points", folder):
        assert list(points(folder)) == list(range(len(points(folder))))
    assert list(points(folder)) == [0, 1, 2]


def test_a_writer_that_is_not_atomic_is_caught(nursery, tmp_path: Path) -> None:
    """The negative control: the kit sees the half file of one that writes under the final name."""
    folder = tmp_path / "bare"
    folder.mkdir()
    fault = {"number": 2, "below": str(folder)}
    child = nursery.start("test_faults:write_barely", [str(folder)], tmp_path / "log", killed_at=fault)
    assert child.wait(LONG) == KILLED
    assert [what.split(":")[0] for what in damaged(folder)] == ["numbers.json"]


def write_barely(folder: str) -> None:
    with Path(folder, "numbers.json").open("w") as file:
        file.write('{"one": 1,')
        file.flush()
        Path(folder, "other").mkdir()
        file.write('"two": 2}')


def test_a_child_that_is_killed_by_time_tells_so(nursery, tmp_path: Path) -> None:
    child = nursery.start("time:sleep", [60], tmp_path / "log")
    assert child.wait(0.05) is None
    assert child.kill() == KILLED
    assert nursery.start("time:sleep", [0], tmp_path / "log").wait(LONG) == 0


# Disks that are full


@needs_mounts
def test_a_disk_that_is_full_leaves_the_checkpoints_before(tmp_path: Path) -> None:
    model, optimiser = trained()
    with small_disk(tmp_path / "disk", 360 * 1024) as disk:
        with pytest.raises(OSError, match="No space left on device") as told:
            for step in count(1):
                save(disk / "checkpoints", step, model, optimiser, {})
        assert "step-" in str(told.value.filename)
        found = checkpoints(disk / "checkpoints")
        assert [each.step for each in found] == list(range(1, step))
        assert len(found) >= 2
        for each in found:
            check(each)
        assert not leftovers(disk)
        shutil.rmtree(found[0].folder)
        save(disk / "checkpoints", step, model, optimiser, {})  # there is room again


@pytest.mark.parametrize("size", [0, 1000, 20_000, 50_000])
def test_a_quota_leaves_the_checkpoint_before(tmp_path: Path, size: int) -> None:
    """The limit falls into the manifest, the state, the weights or the moments."""
    model, optimiser = trained()
    save(tmp_path, 1, model, optimiser, {}, keep=1)
    with largest_file(size), pytest.raises(OSError, match="File too large"):
        save(tmp_path, 2, model, optimiser, {}, keep=1)
    assert [each.step for each in checkpoints(tmp_path)] == [1]
    check(checkpoints(tmp_path)[0])
    assert not leftovers(tmp_path)


@needs_mounts
def test_a_disk_that_is_full_leaves_the_rows_before(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 * 1024) as disk:
        record = Record(disk / "readings.jsonl")
        with pytest.raises(OSError, match="No space left on device"):
            for number in count():
                record.append({"number": number, "more": "x" * 1000})
        rows = record.read()
        assert [row["number"] for row in rows] == list(range(number))
        assert number > 20
        with pytest.raises(OSError, match="No space left on device"):
            record.keep_first(number - 1)
        assert record.read() == rows
        os.truncate(record.path, record.path.stat().st_size // 2)  # as if some had been dropped
        record.append({"number": -1})  # after the torn row was removed
        assert record.read()[-1] == {"number": -1}


@needs_mounts
def test_a_disk_that_is_full_leaves_the_page_before(tmp_path: Path) -> None:
    def page(words: str) -> Page:
        return Page("A page", words, {}, [Section("A section", "", ())])

    with small_disk(tmp_path / "disk", 128 * 1024) as disk:
        path = disk / "report.html"
        write(page("short"), path)
        before = path.read_bytes()
        with pytest.raises(OSError, match="No space left on device") as told:
            write(page("long " * 40_000), path)
        assert told.value.filename == str(path)
        assert path.read_bytes() == before
        assert not leftovers(disk)


@needs_mounts
def test_training_on_a_full_disk_tells_so_and_goes_on_when_there_is_room(
    story: Path, tmp_path: Path, capsys
) -> None:
    assert train(story, tmp_path / "roomy", "--keep", "0") == 0
    size = sum(path.stat().st_size for path in (tmp_path / "roomy").rglob("*") if path.is_file())
    capsys.readouterr()
    with small_disk(tmp_path / "disk", 3 * size) as disk:
        (disk / "ballast").write_bytes(bytes(3 * size - size // 2))
        assert train(story, disk / "runs", "--keep", "0") == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "No space left on device" in said
        assert str(disk) in said
        assert "Traceback" not in said
        kept = checkpoints(disk / "runs" / "train" / "checkpoints")
        assert kept
        for each in kept:
            check(each)
        assert not damaged(disk / "runs")
        (disk / "ballast").unlink()
        assert train(story, disk / "runs", "--keep", "0", "--resume") == 0
        shutil.copytree(disk / "runs", tmp_path / "again")
    found = differences(tmp_path / "roomy", tmp_path / "again")
    assert found == ["train/settings.json: differs"]  # which says where it is


@needs_mounts
def test_a_disk_that_may_only_be_read(story: Path, tmp_path: Path, capsys) -> None:
    assert train(story, tmp_path) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with read_only(tmp_path):
        for more in (["--resume"], ["--overwrite"], ["--name", "other"]):
            assert train(story, tmp_path, *more) == 1
            said = capsys.readouterr().err
            assert "Read-only file system" in said or "Permission denied" in said
            assert "Traceback" not in said
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


# Calls that fail


def failure_of_save(folder: Path, fault: AbstractContextManager[None]) -> OSError | None:
    """Save step 2, of which one is kept, and return how it failed."""
    with fault:
        try:
            save(folder, 2, *trained(), {}, keep=1)
        except OSError as told:
            return told
    return None


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("kind", ["write", "rename", "fsync", "mkdir"])
def test_whatever_call_fails_the_checkpoint_before_is_kept(tmp_path: Path, kind: str, error: int) -> None:
    model, optimiser = trained()
    save(tmp_path, 1, model, optimiser, {})
    failed = 0
    for skip in count():
        if (told := failure_of_save(tmp_path, failing(kind, error, tmp_path, skip=skip))) is None:
            break
        failed += 1
        assert told.errno == error
        assert told.filename
        found = checkpoints(tmp_path)
        check(found[-1])
        if found[-1].step == 2:  # it failed in what comes after: the removal of the first
            shutil.rmtree(found[-1].folder)
        if not (tmp_path / "step-00000001").exists():
            save(tmp_path, 1, model, optimiser, {})
    assert failed
    assert [each.step for each in checkpoints(tmp_path)] == [2]


def test_an_error_while_reading_is_told_in_a_sentence(story: Path, tmp_path: Path, capsys) -> None:
    assert train(story, tmp_path) == 0
    capsys.readouterr()
    for name in ("settings.json", "readings.jsonl"):
        path = tmp_path / "train" / name
        kept = path.read_bytes()
        make_unreadable(path)
        assert train(story, tmp_path, "--resume") == 1
        said = capsys.readouterr().err
        assert name in " ".join(said.split())
        assert "Traceback" not in said
        path.unlink()
        path.write_bytes(kept)
    assert train(story, tmp_path, "--resume") == 0


# Damaged files


def damage(path: Path, how: str) -> None:
    size = path.stat().st_size
    match how:
        case "empty":
            cut(path, 0)
        case "cut":
            cut(path, -2)
        case "half":
            cut(path, size // 2)
        case "first bit":
            flip(path, 0)
        case "middle bit":
            flip(path, 8 * (size // 2) + 3)
        case "last bit":
            flip(path, 8 * size - 1)
        case "unreadable":
            make_unreadable(path)
        case "missing":
            path.unlink()


DAMAGES = ["empty", "cut", "half", "first bit", "middle bit", "last bit", "unreadable", "missing"]


@pytest.mark.parametrize("name", [MODEL, OPTIMISER, STATE, "manifest.json"])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_left_for_the_one_before(tmp_path: Path, name: str, how: str) -> None:
    model, optimiser = trained()
    for step in (1, 2):
        save(tmp_path, step, model, optimiser, {})
    damage(tmp_path / "step-00000002" / name, how)
    if (name, how) == ("manifest.json", "missing"):  # as earlier versions saved them
        found = newest(tmp_path)
        assert found is not None
        assert found.step == 2
        return
    with pytest.warns(UserWarning, match="step-00000002") as told:
        found = newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert [each.step for each in checkpoints(tmp_path)] == [1]
    damage(tmp_path / "step-00000001" / name, how)
    with pytest.raises(InputError, match="is whole"):
        newest(tmp_path)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(story: Path, tmp_path: Path, capsys) -> None:
    assert train(story, tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    folder = tmp_path / "damaged" / "train"
    flip(folder / "checkpoints" / "step-00000008" / MODEL, -5)
    settings = (
        (folder / "settings.json").read_text().replace(str(tmp_path / "whole"), str(tmp_path / "damaged"))
    )
    write_text(folder / "settings.json", settings)
    assert train(story, tmp_path / "damaged", "--resume") == 0
    assert "step 6 is used" in " ".join(capsys.readouterr().err.split())
    left = [what for what in differences(tmp_path / "whole", tmp_path / "damaged") if "damaged-" not in what]
    assert left == ["train/settings.json: differs"]


def test_damage_and_differences_are_seen(tmp_path: Path) -> None:
    """The negative controls of what the kill tests look with."""
    for name in ("one", "other"):
        folder = tmp_path / name
        write_json(folder / "result.json", {"seconds": time.time(), "loss": 1.5, "nan": float("nan")})
        Record(folder / "readings.jsonl").append({"step": 1})
        Record(folder / "readings.jsonl").append({"step": 2})
        save_file({"weight": torch.arange(4.0)}, folder / "model.safetensors")
        np.save(folder / "image.npy", np.arange(4.0))
        write_text(folder / "predictions.csv", "a,b\n1,2\n")
        write_text(folder / "report.html", "<html><body>x</body></html>\n")
        write_text(folder / "figure.svg", "<svg></svg>\n")
        (folder / "image.png").write_bytes(b"\x89PNG IEND\xaeB`\x82")
    one, other = tmp_path / "one", tmp_path / "other"
    assert damaged(one) == differences(one, other) == []
    for name in ("result.json", "model.safetensors", "image.npy", "predictions.csv"):
        content = (one / name).read_bytes()
        flip(one / name, 8 * (len(content) - 4) if name != "result.json" else 8 * content.index(b"1.5"))
        assert differences(one, other) == [f"{name}: differs"]
        (one / name).write_bytes(content)
    for path in sorted(one.iterdir()):
        content = path.read_bytes()
        cut(path, len(content) - 5)
        if path.name != "readings.jsonl":  # of which a torn last line is left out, and written again
            assert [what.split(":")[0] for what in damaged(one)] == [path.name]
        path.write_bytes(content)
    (one / "more.json").write_text("{}")
    (one / ".result.json.1.part").write_text("{")
    assert differences(one, other) == ["more.json: in one only"]
    assert [path.name for path in leftovers(one)] == [".result.json.1.part"]


# Clocks


def test_clocks_that_jump_change_nothing(story: Path, tmp_path: Path) -> None:
    assert train(story, tmp_path / "even") == 0
    with jumping_clock([0, 86_400, -86_400, 1e9, -1e9]):
        assert train(story, tmp_path / "jumping", "--steps", "8") == 0
    found = differences(tmp_path / "even", tmp_path / "jumping")
    assert found == ["train/settings.json: differs"]
    rows = Record(tmp_path / "jumping" / "train" / "readings.jsonl").read()
    assert all(0 <= row["seconds"] < 3600 for row in rows if "seconds" in row)


def test_what_a_killed_process_had_no_time_to_drop_is_dropped_on_resume(story: Path, tmp_path: Path) -> None:
    assert train(story, tmp_path, "--keep", "1") == 0
    folder = tmp_path / "train" / "checkpoints"
    shutil.copytree(folder / "step-00000008", folder / "step-00000006")
    assert train(story, tmp_path, "--keep", "1", "--resume") == 0
    assert [each.step for each in checkpoints(folder)] == [8]


def test_the_newest_checkpoint_is_so_by_its_step_whatever_the_clock_said(tmp_path: Path) -> None:
    model, optimiser = trained()
    for step in (1, 2, 3):
        save(tmp_path, step, model, optimiser, {})
        os.utime(tmp_path / f"step-{step:08d}", (1e9 - step, 1e9 - step))
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 3
    save(tmp_path, 4, model, optimiser, {}, keep=2)
    assert [each.step for each in checkpoints(tmp_path)] == [3, 4]


# Whole jobs, killed or without room

NAMES = ("train", "compare", "recorder", "trajectory", "reconstruct", "regress")


@pytest.fixture
def crashes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The benchmark that kills jobs, with what they read beside the folder of their results."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1] / "benchmarks")])
    with warnings.catch_warnings():
        import crashes
    crashes.prepared(tmp_path)
    return crashes


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_job_keeps_what_it_had_whenever_it_is_killed(name: str, tmp_path: Path, crashes) -> None:
    (job,) = (job for job in crashes.JOBS if job.name == name)
    counts = crashes.killed(job, tmp_path, seed=1, times=6).counts
    assert sum(counts.kills.values()) == 6
    assert counts.results >= 1
    assert not counts.failures


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize("name", NAMES)
def test_a_job_on_a_full_disk_tells_so_and_goes_on_when_there_is_room(
    name: str, tmp_path: Path, crashes, capsys
) -> None:
    (job,) = (job for job in crashes.JOBS if job.name == name)
    place, roomy = tmp_path / "disk", tmp_path / "roomy"
    assert run(job.arguments(place)) == 0
    size = sum(path.stat().st_size for path in final_files(place))
    place.rename(roomy)
    for share in (0.02, 0.3, 0.6, 0.9):
        with small_disk(place, 4 * size) as disk:
            (disk / ".ballast").write_bytes(bytes(int((4 - share) * size)))
            capsys.readouterr()
            assert run(job.arguments(disk)) == 1
            said = " ".join(capsys.readouterr().err.split())
            assert "No space left on device" in said
            assert "Traceback" not in said
            assert not damaged(disk)
            (disk / ".ballast").unlink()
            assert run(job.arguments(disk)) == 0
            assert not leftovers(disk)
            assert not differences(roomy, disk)
        place.rmdir()
