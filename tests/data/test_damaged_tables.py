"""Damaged tables: whatever the bytes, a file is read or refused by a sentence."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gramian.data.tables import Table, load_rows, load_table
from gramian.errors import InputError

F64 = torch.float64
WORDS = (
    "size,colour,shape,y\n1,red,round,1\n2,blue,square,2\n3,green,round,3\n4,red,square,4\n"
    "5,red,round,5\n6,blue,round,6\n"
)
X = torch.tensor([[1, 2.5], [2, -30], [4, 0]], dtype=F64)
Y = torch.tensor([10, 20, 30], dtype=F64)


def npz(folder: Path, **arrays) -> Path:
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz"


class Bomb:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["X", "y", "train_index"])
def test_arrays_of_objects_are_refused_and_never_unpickled(tmp_path, name: str) -> None:
    index = {"train_index": np.array([[0]]), "test_index": np.array([[1]])}
    arrays = {"X": X.numpy(), "y": Y.numpy(), **index}
    objects = np.empty((3, 2), object)
    objects[:] = Bomb(tmp_path / "exploded")
    with pytest.raises(InputError, match=r"cannot be read as \.npz of plain arrays"):
        load_table(npz(tmp_path, **{**arrays, name: objects}))
    kept = load_table(npz(tmp_path, **arrays, note=objects))  # nobody reads this one
    assert len(kept) == 3
    assert not (tmp_path / "exploded").exists()
    np.load(tmp_path / "a.npz", allow_pickle=True)["note"]  # control: the bomb is live
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ([[0, 1]], None),
        (None, [[0, 1]]),
        ([0, 1], [2]),
        ([[0, 1], [1, 2]], [[2]]),
        ([[0, 3]], [[1]]),
        ([[0, 1]], [[-1]]),
        ([[0.0, 1.0]], [[2.0]]),
        ([[], []], [[1], [2]]),
        ([[0, 1]], [[1, 2]]),
        (np.zeros((0, 2), int), np.zeros((0, 1), int)),
    ],
)
def test_wrong_splits_are_refused(tmp_path, train, test) -> None:
    parts = {"train_index": train, "test_index": test}
    arrays = {name: np.array(part) for name, part in parts.items() if part is not None}
    with pytest.raises(InputError, match="count its rows from 0 and have none in common"):
        load_table(npz(tmp_path, X=X.numpy(), y=Y.numpy(), **arrays))


def test_damaged_npz(tmp_path) -> None:
    path, whole = tmp_path / "b.npz", packed(tmp_path, False)
    for count in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:count])
        with pytest.raises(InputError, match=r"cannot be read as \.npz"):
            load_table(path)
    with path.open("wb") as stream:
        np.save(stream, X.numpy())
    with pytest.raises(InputError, match=r"cannot be read as \.npz"):
        load_table(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X", "no array")
    with pytest.raises(InputError, match="needs numbers X"):
        load_table(path)


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with some overwritten, inserted or cut off."""
    places = st.integers(0, len(whole))
    edits = st.lists(st.tuples(places, st.integers(0, 8), st.binary(max_size=4)), max_size=4)

    def apply(parts: tuple[list[tuple[int, int, bytes]], int]) -> bytes:
        content = whole
        for at, over, new in parts[0]:
            content = content[:at] + new + content[at + over :]
        return content[: parts[1]]

    return st.tuples(edits, st.one_of(st.just(10**6), places)).map(apply)


def check_damaged(path: Path, content: bytes, learnt: Table) -> None:
    path.write_bytes(content)
    for read in (lambda: load_table(path, "y"), lambda: load_rows(path, learnt)):
        try:
            found = read()
        except InputError:
            continue
        x = found.x if isinstance(found, Table) else found
        assert x.isfinite().all()


FUZZ = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@given(content=damaged(WORDS.encode()) | st.binary(max_size=60))
@FUZZ
def test_damaged_csv_is_refused_or_read(folder: Path, content: bytes) -> None:
    whole = folder / "whole.csv"
    whole.write_text(WORDS)
    check_damaged(folder / "a.csv", content, load_table(whole, "y"))


def packed(folder: Path, compressed: bool) -> bytes:
    save = np.savez_compressed if compressed else np.savez
    index = {"train_index": np.array([[0, 1]]), "test_index": np.array([[2]])}
    save(folder / "b.npz", X=X.numpy(), y=Y.numpy(), **index)
    return (folder / "b.npz").read_bytes()


@pytest.mark.parametrize("compressed", [False, True])
@given(data=st.data())
@FUZZ
def test_damaged_npz_is_refused_or_read(folder: Path, compressed: bool, data: st.DataObject) -> None:
    whole = packed(folder, compressed)
    learnt = load_table(folder / "b.npz")
    check_damaged(folder / "a.npz", data.draw(damaged(whole)), learnt)


def test_the_fuzz_reaches_both_ends(folder: Path) -> None:
    """Undamaged bytes are read; so a refusal of the damaged ones means something."""
    whole = packed(folder, False)
    learnt = load_table(folder / "b.npz")
    check_damaged(folder / "a.npz", whole, learnt)
    assert torch.equal(load_table(folder / "a.npz").x, learnt.x)
    middle = whole.index(b"NUMPY")
    spoiled = whole[:middle] + b"DUMPY" + whole[middle + 5 :]
    (folder / "a.npz").write_bytes(spoiled)
    with pytest.raises(InputError, match=r"\.npz"):
        load_table(folder / "a.npz")


def test_a_spoiled_byte_anywhere_in_an_npz_is_refused_or_harmless(tmp_path) -> None:
    path = npz(tmp_path, X=X.numpy(), y=Y.numpy())
    whole, harmless = path.read_bytes(), 0
    for place, byte in enumerate(whole):
        path.write_bytes(whole[:place] + bytes([byte ^ 0xFF]) + whole[place + 1 :])
        try:
            found = load_table(path)
        except InputError:
            continue
        harmless += 1  # dates and permissions, which zip checks no sum of
        assert torch.equal(found.x, X)
        assert torch.equal(found.y, Y)
    assert 0 < harmless < len(whole) / 2
