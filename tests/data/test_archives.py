import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gramian.data.archives import EMPTY, read_npz
from gramian.errors import InputError


def entry(shape: str, descr: str = "<f8", content: bytes = b"", version: bytes = b"\1\0") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + content


def archive(path: Path, *entries: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in entries:
            made.writestr(name, content)
    return path


def test_wanted_arrays_come_back_bit_by_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    arrays = {
        "a": np.arange(12.0).reshape(3, 4),
        "b": np.array(["x", "yz"]),
        "empty": np.zeros((0, 5), np.int8),
    }
    for save in (np.savez, np.savez_compressed):
        save(path, other=np.array([object()]), **arrays)
        found, names = read_npz(path, [*arrays, "absent"])
        assert set(names) == {*arrays, "other"}
        assert set(found) == set(arrays)
        for name, each in arrays.items():
            np.testing.assert_array_equal(found[name], each)
            assert found[name].dtype == each.dtype


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (entry("(1000000000000000000,)", content=bytes(80)), r"does not fill an entry of \d+ bytes"),
        (entry("(3,)", content=bytes(23)), "does not fill"),
        (entry("(3,)", content=bytes(25)), "does not fill"),
        (entry("(1,)", "|O", bytes(8)), "does not fill"),
        (entry(f"(0, {EMPTY + 1})"), "without content is too large"),
        (entry(f"({EMPTY + 1},)", "|V0"), "without content is too large"),
        (entry("(1,)", content=bytes(8), version=b"\3\0"), "version"),
        (entry("(1,)" + " " * 20_000, content=bytes(8)), "Header info length"),
        (b"", "reading magic string"),
        (b"no array", "the magic string is not correct"),
    ],
)
def test_headers_that_promise_what_is_not_there(tmp_path: Path, content: bytes, words: str) -> None:
    path = archive(tmp_path / "a.npz", ("x.npy", content))
    with pytest.raises(InputError, match=rf"a\.npz cannot be read as \.npz of plain arrays: .*{words}"):
        read_npz(path, ["x"])
    assert read_npz(path, ["y"]) == ({}, ["x"])


def test_bombs_are_refused_before_they_go_off(tmp_path: Path) -> None:
    zeros = 20 * 2**20
    path = archive(tmp_path / "a.npz", ("x.npy", entry(f"({zeros},)", "|u1", bytes(zeros))))
    with pytest.raises(InputError, match=r"would unpack to 21 MB or more from 20\.\d kB"):
        read_npz(path, ["x"])


def test_entries_that_numpy_does_not_pack_are_refused(tmp_path: Path) -> None:
    """A header of LZMA may ask for 4 GB before a byte is unpacked."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression=zipfile.ZIP_LZMA) as file:
        file.writestr("x.npy", entry("(1,)", "|u1", b"1"))
    with pytest.raises(InputError, match=r"x\.npy is compressed in a way that NumPy does not use"):
        read_npz(tmp_path / "a.npz", ["x"])
    assert read_npz(tmp_path / "a.npz", ()) == ({}, ["x"])


def test_names_out_of_the_folder_and_repeated_ones(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([1, 2]))
    first = [(name, b"first") for name in ("/etc/passwd", "../../x.npy", "x.npy/", "a\0b", "x.npy")]
    with pytest.warns(UserWarning, match="Duplicate name: 'x.npy'"):
        path = archive(tmp_path / "a.npz", *first, ("x.npy", stream.getvalue()))
    found, _ = read_npz(path, ["x"])
    assert found["x"].tolist() == [1, 2]
    assert list(tmp_path.iterdir()) == [path]
