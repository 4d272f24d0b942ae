import errno
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gramian.errors import InputError
from gramian.train import run_lock
from gramian.train.run import REPLACED, Run, open_run
from gramian.train.run_lock import LOCK, OWNER, lock_run


@dataclass(frozen=True)
class Config:
    steps: int = 3
    text: tuple[Path, ...] = (Path("a.txt"),)


def test_a_folder_holds_one_run(tmp_path) -> None:
    folder = tmp_path / "one"
    run = open_run(folder, Config())
    assert run.settings == {"steps": 3, "text": ["a.txt"]}
    assert set(run.versions) >= {"python", "torch", "gramian"}
    assert run.result() is None
    run.write_result({"loss": 1.0})
    assert run.result() == {"loss": 1.0}
    with pytest.raises(InputError, match="already holds a run"):
        open_run(folder, Config())
    assert open_run(folder, Config(), resume=True) == Run(folder)
    with pytest.raises(InputError, match=r"has steps = 3 .*not 4"):
        open_run(folder, Config(steps=4), resume=True)
    assert run.result() == {"loss": 1.0}  # nothing was lost by asking
    assert open_run(folder, Config(steps=4), overwrite=True).result() is None


def test_folders_that_are_no_run_are_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="files that are no run"):
        open_run(tmp_path, Config(), overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    with pytest.raises(InputError, match="is a file"):
        open_run(tmp_path / "thesis.tex", Config())


def test_a_damaged_configuration_is_named(tmp_path) -> None:
    run = open_run(tmp_path / "one", Config())
    (run.folder / "settings.json").write_text('{"settings": ')
    with pytest.raises(InputError, match=r"settings\.json cannot be read as JSON"):
        open_run(run.folder, Config(), resume=True)


HOLDER = """
import fcntl, json, os, platform, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
os.write(descriptor, json.dumps({"process": os.getpid(), "host": platform.node(), "since": "noon"}).encode())
print("held", flush=True)
input()
"""


def held_by_another(path: Path) -> subprocess.Popen[str]:
    """Start a process that locks a file, on another way than the code's own, until it is killed."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def ended(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def can_be_locked(path: Path) -> bool:
    found = subprocess.run(
        [sys.executable, "-c", HOLDER, str(path)], input="\n", text=True, capture_output=True
    )
    return found.returncode == 0


@pytest.fixture
def living() -> Iterator[int]:
    """The number of a process that lives as long as the test."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.communicate(b"\n")


def test_one_process_at_a_time_writes_a_run(tmp_path) -> None:
    folder = tmp_path / "one"
    run = open_run(folder, Config())
    assert not can_be_locked(folder / LOCK)
    again = open_run(folder, Config(), resume=True)  # the same process, as a notebook does
    del run
    gc.collect()
    assert not can_be_locked(folder / LOCK)
    del again
    gc.collect()
    assert {path.name for path in folder.iterdir()} == {"settings.json"}
    other = held_by_another(folder / LOCK)
    who = rf"is being written by process {other.pid} on {platform.node()} since noon"
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match=who):
            open_run(folder, Config(), **how)
    assert Run(folder).settings["steps"] == 3  # reading asks for no lock
    ended(other)
    assert (folder / LOCK).exists()
    run = open_run(folder, Config(), resume=True)  # the dead leave their file, and no lock
    about = json.loads((run.folder / LOCK).read_text())
    assert (about["process"], about["host"]) == (os.getpid(), platform.node())


def test_a_lock_lasts_through_overwriting_and_notices_that_its_folder_is_gone(tmp_path) -> None:
    first = open_run(tmp_path / "one", Config())
    second = open_run(tmp_path / "one", Config(steps=4), overwrite=True)
    assert first.lock is second.lock
    assert not can_be_locked(tmp_path / "one" / LOCK)
    (tmp_path / "one").rename(tmp_path / "two")
    third = open_run(tmp_path / "one", Config())
    assert third.lock is not first.lock
    assert not can_be_locked(tmp_path / "one" / LOCK)
    assert not can_be_locked(tmp_path / "two" / LOCK)
    del first, second
    gc.collect()
    assert not can_be_locked(tmp_path / "one" / LOCK)
    assert can_be_locked(tmp_path / "two" / LOCK)


def in_child(job: Callable[[], bool]) -> int:
    """Do a job in a fork of this process and return its number; its exit code is 0 for true."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which the child does not need
        child = os.fork()
    if child == 0:
        os._exit(0 if job() else 1)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_has_no_part_in_its_parents_lock(tmp_path) -> None:
    run = open_run(tmp_path / "one", Config())
    assert run.lock is not None

    def refused() -> bool:
        try:
            lock_run(tmp_path / "one")
        except InputError:
            return True
        return False

    assert os.waitpid(in_child(refused), 0)[1] == 0
    assert run.lock.held
    child = in_child(lambda: bool(signal.pause()))
    del run
    gc.collect()
    try:
        assert can_be_locked(tmp_path / "one" / LOCK)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


class NoLocks:
    """fcntl of a file system without locks."""

    LOCK_EX = LOCK_NB = 0

    @staticmethod
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("how", [NoLocks, None])
def test_without_locks_a_file_names_the_writer(tmp_path, monkeypatch, living, how) -> None:
    monkeypatch.setattr(run_lock, "fcntl", how)
    folder = tmp_path / "one"
    run = open_run(folder, Config())
    again = open_run(folder, Config(), resume=True)
    assert {path.name for path in folder.iterdir()} == {"settings.json", OWNER}
    del run, again
    gc.collect()
    assert {path.name for path in folder.iterdir()} == {"settings.json"}

    def owned(process: int, host: str) -> None:
        about = {"process": process, "host": host, "since": "noon"}
        (folder / OWNER).write_text(json.dumps(about))

    owned(living, platform.node())
    with pytest.raises(InputError, match=rf"by process {living} on .* since noon, says \.owner .*no locks"):
        open_run(folder, Config(), resume=True)
    owned(1, "elsewhere")
    with pytest.raises(InputError, match="process 1 on elsewhere"):
        open_run(folder, Config(), resume=True)
    (folder / OWNER).write_text("{")
    with pytest.raises(InputError, match="another process, says"):
        open_run(folder, Config(), resume=True)
    owned(os.getpid(), platform.node())  # of a process of this number before: it has ended
    run = open_run(folder, Config(), resume=True)
    assert run.lock is not None
    assert run.lock.held


def test_a_lock_that_fails_otherwise_names_its_file(tmp_path, monkeypatch) -> None:
    def broken(descriptor: int, how: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        open_run(tmp_path / "one", Config())
    assert caught.value.filename == str(tmp_path / "one" / LOCK)


def test_a_start_that_was_killed_does_not_block_the_next(tmp_path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / LOCK).write_text("")
    (folder / ".settings.json.00000000-1.01234567.part").write_text('{"sett')
    run = open_run(folder, Config())
    assert run.settings["steps"] == 3
    assert {path.name for path in folder.iterdir()} == {"settings.json", LOCK}


@pytest.mark.parametrize("moment", range(1, 4))
@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_overwriting_that_was_killed_is_finished_by_the_next_start(
    tmp_path, monkeypatch, moment, how
) -> None:
    run = open_run(tmp_path / "one", Config())
    run.write_result({"loss": 1.0})
    run.record.append({"kind": "train"})
    calls = 0

    def killed(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KeyboardInterrupt
        path.unlink()

    monkeypatch.setattr("gramian.train.run.remove", killed)
    if moment < 3:
        with pytest.raises(KeyboardInterrupt):
            open_run(run.folder, Config(steps=4), overwrite=True)
        assert (run.folder / REPLACED).exists()
    monkeypatch.undo()
    if moment == 3:  # all of the old run is gone, and the new one is not there yet
        for path in run.folder.iterdir():
            if path.name != LOCK:
                path.unlink()
    new = open_run(run.folder, Config(steps=5), **how)
    assert new.settings["steps"] == 5
    assert {path.name for path in run.folder.iterdir()} == {"settings.json", LOCK}


def test_opening_removes_leftovers_but_not_those_of_runs_inside(tmp_path) -> None:
    run = open_run(tmp_path / "one", Config())
    inner = open_run(tmp_path / "one" / "inner", Config())
    left = ".x.00000000-1.01234567.part"
    for place in (run.folder, run.checkpoints, inner.folder, inner.checkpoints):
        place.mkdir(exist_ok=True)
        (place / left).mkdir()
        (place / left / "half").write_text("x")
    open_run(run.folder, Config(), resume=True)
    there = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(left)}
    assert there == {"one/inner", "one/inner/checkpoints"}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": 3}', '{"settings": {}', "\x00\xff"])
def test_damaged_settings_and_results_are_named_with_what_to_do(tmp_path, content) -> None:
    run = open_run(tmp_path / "one", Config())
    (run.folder / "settings.json").write_text(content)
    with pytest.raises(
        InputError, match=r"settings\.json .*; restore it, or begin anew with --overwrite"
    ) as caught:
        open_run(run.folder, Config(), resume=True)
    assert "\n" not in str(caught.value)
    assert open_run(run.folder, Config(), overwrite=True).settings["steps"] == 3
    if not content.startswith("{}") and content != '{"settings": 3}':
        (run.folder / "result.json").write_text(content)
        with pytest.raises(InputError, match=r"result\.json .*; remove it and go on with --resume"):
            run.result()


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch) -> None:
    plain = os.open

    def refuse(path, flags: int, *rest: int, **named: int) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path, flags, *rest, **named)

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(PermissionError) as caught:
        open_run(tmp_path / "one", Config())
    assert caught.value.filename == str(tmp_path / "one" / LOCK)
