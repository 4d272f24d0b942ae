"""What is refused of a file before it is read: pipes, devices, bombs, archives not as torch writes them."""

import gzip
import os
import zipfile
from pathlib import Path

import pytest
import torch

from gramian.errors import InputError
from gramian.reading import (
    FREE,
    RATIO,
    check_regular,
    check_stored,
    check_unpacked,
    explained,
    read_json,
    unpacked,
)


def test_regular_files_alone_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "link").symlink_to("a")
    for name in ("a", "link"):
        check_regular(tmp_path / name)
        assert read_json(tmp_path / name) == 1
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "device", "loop", ".", "absent", "a/b", "\0", "x" * 300):
        with pytest.raises(InputError, match="cannot be read"):
            check_regular(tmp_path / name)
        with pytest.raises(InputError, match="cannot be read"):
            read_json(tmp_path / name)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "\ud800", "9" * 5000]
)
def test_json_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=r"a\.json cannot be read as JSON"):
        read_json(tmp_path / "a.json")


def test_a_file_may_unpack_to_a_hundred_times_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    check_unpacked(path, FREE)
    check_unpacked(path, RATIO * 1000, free=10)
    with pytest.raises(
        InputError, match=r"would unpack to 100 kB or more from 1 kB; beyond 10 bytes at most 100"
    ):
        check_unpacked(path, RATIO * 1000 + 1, free=10)
    with pytest.raises(InputError, match=r"would unpack to 10\^30 bytes"):
        check_unpacked(path, 10**30)


def test_gzip_is_unpacked_no_further_than_that(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"abc" * 10**5))
    assert unpacked(path) == b"abc" * 10**5
    with pytest.raises(InputError, match="would unpack to"):
        unpacked(path, free=2000)
    path.write_bytes(gzip.compress(bytes(FREE + 1)))
    with pytest.raises(InputError, match="would unpack to"):
        unpacked(path)


def test_archives_that_torch_saved_are_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(3)}, path)
    check_stored(path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, each in content.items():
            archive.writestr(name, each)
    with pytest.raises(InputError, match="is damaged: an entry of"):
        check_stored(path)
    path.write_bytes(b"PK\3\4")
    with pytest.raises(InputError, match="is damaged"):
        check_stored(path)


class PanicException(BaseException):
    """Stands for a panic of Rust, which is no Exception."""


def test_whatever_a_package_raises_is_explained() -> None:
    for error in (
        PanicException("range end index\nmore"),
        KeyError("a"),
        RecursionError(),
        Exception("x.\ny"),
    ):
        with pytest.raises(InputError, match=r"^it is damaged: [^\n]+$"), explained("it is damaged"):
            raise error
    own = InputError("as it is")
    with pytest.raises(InputError) as caught, explained("it is damaged"):
        raise own
    assert caught.value is own
    with pytest.raises(KeyboardInterrupt), explained("it is damaged"):
        raise KeyboardInterrupt
