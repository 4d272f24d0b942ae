import os

import pytest

from gramian.files import atomic_file, atomic_folder, write_json, write_text


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
