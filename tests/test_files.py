import errno
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gramian import files
from gramian.errors import InputError
from gramian.files import (
    alive,
    atomic_file,
    atomic_folder,
    remove,
    remove_leftovers,
    write_json,
    write_text,
)

HERE = f"{zlib.crc32(platform.node().encode()):08x}"


@pytest.fixture(scope="module")
def living() -> Iterator[int]:
    """The number of a process that lives as long as these tests."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.communicate(b"\n")


@pytest.fixture(scope="module")
def dead() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_content_is_the_old_or_the_new_and_nothing_else_stays(tmp_path) -> None:
    path = tmp_path / "deep" / "note.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    write_text(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é"
    assert [each.name for each in path.parent.iterdir()] == ["note.txt"]
    write_json(path, {"a": [1]})
    assert path.read_text() == '{\n "a": [\n  1\n ]\n}\n'


def test_a_folder_is_complete_or_absent(tmp_path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "step") as temporary:
        (temporary / "one").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "step") as temporary:
        (temporary / "one").write_text("1")
        assert not (tmp_path / "step").exists()
    assert (tmp_path / "step" / "one").read_text() == "1"
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "step") as temporary:
        (temporary / "two").write_text("2")
    assert [each.name for each in (tmp_path / "step").iterdir()] == ["one"]
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_written_may_be_read_by_those_the_user_lets_read(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "note.txt", "x")
        with atomic_folder(tmp_path / "step") as temporary:
            (temporary / "one").write_text("1")
        assert os.umask(0o027) == 0o027  # left as it was
    finally:
        os.umask(before)
    assert (tmp_path / "note.txt").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "step").stat().st_mode & 0o777 == 0o750


def test_files_deep_in_a_folder_are_put_on_the_disk_too(tmp_path, monkeypatch) -> None:
    synced = []
    plain = files.sync
    monkeypatch.setattr(files, "sync", lambda path: (synced.append(Path(path).name), plain(path)))
    with atomic_folder(tmp_path / "report") as temporary:
        (temporary / "figures" / "small").mkdir(parents=True)
        (temporary / "figures" / "small" / "one.svg").write_text("1")
    assert synced[:3] == ["one.svg", "small", "figures"]
    assert synced[-1] == tmp_path.name
    assert (tmp_path / "report" / "figures" / "small" / "one.svg").read_text() == "1"


def test_a_folder_is_replaced_whole(tmp_path, monkeypatch) -> None:
    for number in "12":
        with atomic_folder(tmp_path / "report", replace=True) as temporary:
            (temporary / number).write_text(number)
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["2"]
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "report", replace=True) as temporary:
        (temporary / "3").write_text("3")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["2"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_reader_sees_a_removed_folder_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    (tmp_path / "step" / "deep").mkdir(parents=True)
    (tmp_path / "step" / "deep" / "one").write_text("1")
    remove(tmp_path / "missing")

    def killed(path) -> None:
        assert not (tmp_path / "step").exists()
        assert (path / "deep" / "one").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path / "step")
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    assert left.match(".step.*.part")
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_the_dead_go_and_the_work_of_the_living_stays(tmp_path, living, dead) -> None:
    assert alive(living)
    assert alive(os.getpid())
    assert not alive(dead)
    stays = [f".note.txt.{HERE}-{living}.01234567.part", ".note.txt.00000000-1.01234567.part", "a.part", ".b"]
    goes = [f".note.txt.{HERE}-{dead}.01234567.part", f".note.txt.{HERE}-{os.getpid()}.01234567.part"]
    for name in stays + goes:
        (tmp_path / name).write_text("half")
    with atomic_file(tmp_path / "own") as temporary:
        temporary.write_text("own")
        remove_leftovers(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {*stays, temporary.name}
    remove_leftovers(tmp_path, alone=True)  # of other machines and of other versions, too
    assert {path.name for path in tmp_path.iterdir()} == {stays[0], *stays[2:], "own"}


def test_writing_a_folder_removes_what_was_left_of_its_name(tmp_path, dead, living) -> None:
    for name in (f".report.{HERE}-{dead}", f".report.{HERE}-{living}", f".other.{HERE}-{dead}"):
        (tmp_path / f"{name}.01234567.part").mkdir()
        (tmp_path / f"{name}.01234567.part" / "half").write_text("x")
    with atomic_folder(tmp_path / "report"):
        pass
    kept = {f".report.{HERE}-{living}.01234567.part", f".other.{HERE}-{dead}.01234567.part", "report"}
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_failures_name_the_file_and_the_cause(tmp_path, atomic, error) -> None:
    with pytest.raises(OSError, match="No space left on device") as caught, atomic(tmp_path / "there"):
        raise error
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "there")
    assert list(tmp_path.iterdir()) == []


def test_libraries_that_meet_a_full_file_name_it(tmp_path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with (
            pytest.raises(OSError, match="File too large") as caught,
            atomic_file(tmp_path / "x") as temporary,
        ):
            save_file({"x": torch.zeros(10_000)}, temporary)
        assert caught.value.filename == str(tmp_path / "x")
        partly = pytest.raises(OSError, match="only a part could be written")
        with partly as caught, atomic_file(tmp_path / "x") as temporary, temporary.open("wb") as stream:
            np.save(stream, np.zeros(10_000), allow_pickle=False)
        assert caught.value.filename == str(tmp_path / "x")
        with pytest.raises(OSError, match="File too large") as caught:
            write_text(tmp_path / "x", "x" * 20_000)
        assert caught.value.filename == str(tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_as_they_are(tmp_path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_file(tmp_path / "copy") as temporary:
        temporary.write_bytes((tmp_path / "source").read_bytes())
    assert caught.value.filename == str(tmp_path / "source")
    with pytest.raises(InputError, match="mine"), atomic_file(tmp_path / "copy"):
        raise InputError("mine (os error 28)")
    with pytest.raises(ValueError, match="wrong"), atomic_file(tmp_path / "copy"):
        raise ValueError("wrong")


def test_folders_that_a_file_system_cannot_sync_do_no_harm(tmp_path, monkeypatch) -> None:
    def unable(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("os.fsync", unable)
    write_text(tmp_path / "note", "x")
    assert (tmp_path / "note").read_text() == "x"

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_text(tmp_path / "note", "y")
    assert caught.value.filename == str(tmp_path / "note")
    assert (tmp_path / "note").read_text() == "x"
