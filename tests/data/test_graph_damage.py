"""Damaged graph files: whatever the bytes, they are read or refused by a sentence."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gramian.data.graph_files import load_graphs
from gramian.data.graphs import Graphs
from gramian.errors import InputError

LAID_OUT = {
    "x": np.array([[0.5], [1], [2], [3], [4], [5]]),
    "edge_index": np.array([[0, 1, 1, 2, 0, 1], [1, 0, 2, 1, 1, 0]], np.int16),
    "edge_types": np.array([0, 0, 1, 1, 0, 0], np.uint8),
    "node_ptr": np.array([0, 3, 4, 6], np.int32),
    "edge_ptr": np.array([0, 4, 4, 6], np.int32),
    "y": np.array([1, -1, 1]),
    "train": np.array([0]),
    "val": np.array([1]),
    "test": np.array([2]),
}
COLLECTION = {
    "edge_index": np.array([[0, 1, 1, 2, 4, 5], [1, 0, 2, 1, 5, 4]]),
    "graph_indicator": np.array([0, 0, 0, 1, 2, 2]),
    "node_labels": np.array([3, 5, 3, 9, 5, 5]),
    "graph_attributes": np.array([1.5, -1, 1]),
}
TEXT = {
    "A": "1, 2\n2, 1\n2, 3\n3, 2\n5, 6\n6, 5\n",
    "graph_indicator": "1\n1\n1\n2\n3\n3\n",
    "graph_labels": "1\n-1\n1\n",
    "node_labels": "3, 0\n5, 1\n3, 1\n9, 0\n5, 0\n5, 0\n",
    "node_attributes": "0.5\n1e3\n-2\n3\n4\n5\n",
}
FUZZ = settings(max_examples=40, deadline=None, derandomize=True, database=None)


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


def misprinted(text: str) -> st.SearchStrategy[str]:
    """Text with some of its numbers, commas and ends of lines exchanged for others."""
    signs = st.sampled_from(["", "-", "0", "7", "99999", "1e400", "nan", ",", "\n", " ", ".", "x", "\u2028"])
    edits = st.lists(st.tuples(st.integers(0, len(text)), st.integers(0, 2), signs), min_size=1, max_size=3)

    def apply(parts: list[tuple[int, int, str]]) -> str:
        content = text
        for at, over, new in parts:
            content = content[:at] + new + content[at + over :]
        return content

    return edits.map(apply)


def read_or_refused(path: Path) -> Graphs | None:
    """Return sound graphs, or None where a sentence says why there are none."""
    try:
        found = load_graphs(path, target="y" if path.suffix == ".csv" else None)
    except InputError:
        return None
    assert found.x.isfinite().all()
    batch = found.batch(torch.arange(len(found)))
    assert batch.edge_index.shape[1] == 0 or batch.edge_index.max() < len(batch.x)
    assert torch.equal(batch.batch[batch.edge_index[0]], batch.batch[batch.edge_index[1]])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def packed(folder: Path, arrays: dict, compressed: bool) -> bytes:
    save = np.savez_compressed if compressed else np.savez
    save(folder / "whole.npz", **arrays)
    return (folder / "whole.npz").read_bytes()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("arrays", [LAID_OUT, COLLECTION], ids=["laid out", "collection"])
@given(data=st.data())
@FUZZ
def test_damaged_npz(folder: Path, arrays: dict, compressed: bool, data: st.DataObject) -> None:
    path = folder / "a.npz"
    path.write_bytes(data.draw(damaged(packed(folder, arrays, compressed))))
    read_or_refused(path)


NUMBERS = st.sampled_from([-(2**63), -100, -1, 0, 1, 2, 3, 4, 6, 10**6, 2**31, 2**63 - 1])
REALS = st.sampled_from([0.0, 0.5, 1.0, 3.0, 1e39, float("nan"), float("inf")])


@pytest.mark.parametrize("arrays", [LAID_OUT, COLLECTION], ids=["laid out", "collection"])
@given(data=st.data())
@FUZZ
def test_arrays_of_wrong_numbers_lengths_and_kinds(folder: Path, arrays: dict, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(arrays)))
    shape = data.draw(
        st.sampled_from([arrays[name].shape, (), (0,), (1,), (3,), (7,), (2, 3), (3, 0), (2, 2, 2)])
    )
    count = int(np.prod(shape))
    values = data.draw(
        st.one_of(*(st.lists(kind, min_size=count, max_size=count) for kind in (NUMBERS, REALS)))
    )
    kind = data.draw(st.sampled_from([np.int64, np.float64, np.uint64, np.bool_, np.complex64, np.str_]))
    with np.errstate(all="ignore"):
        wrong = (
            np.array(values, object).astype(kind, casting="unsafe") if kind is np.str_ else cast(values, kind)
        )
    np.savez(folder / "a.npz", **{**arrays, name: wrong.reshape(shape)})
    read_or_refused(folder / "a.npz")


def cast(values: list, kind: type) -> np.ndarray:
    whole = np.array([float(value) for value in values])
    if kind in (np.int64, np.uint64):
        whole = np.nan_to_num(whole, nan=0, posinf=2**62, neginf=-(2**62)).clip(-(2**62), 2**62)
        whole = np.abs(whole) if kind is np.uint64 else whole
    return whole.astype(kind)


@pytest.mark.parametrize("name", TEXT)
@given(data=st.data())
@FUZZ
def test_damaged_text(folder: Path, name: str, data: st.DataObject) -> None:
    place = folder / "text"
    place.mkdir(exist_ok=True)
    for each, text in TEXT.items():
        (place / f"SOME_{each}.txt").write_text(text)
    wrong = data.draw(st.one_of(misprinted(TEXT[name]).map(str.encode), damaged(TEXT[name].encode())))
    (place / f"SOME_{name}.txt").write_bytes(wrong)
    read_or_refused(place)


def saved(folder: Path) -> bytes:
    fields = {"x": "x", "edge_index": "edge_index", "edge_attr": "edge_types", "y": "y"}
    nodes, edges = torch.tensor([0, 3, 4, 6]), torch.tensor([0, 4, 4, 6])
    slices = {"x": nodes, "edge_index": edges, "edge_attr": edges, "y": torch.arange(4)}
    data = {
        name: torch.from_numpy(LAID_OUT[key].astype(float if key == "x" else int))
        for name, key in fields.items()
    }
    torch.save((data, slices), folder / "whole.pt")
    return (folder / "whole.pt").read_bytes()


@given(data=st.data())
@FUZZ
def test_damaged_tensors(folder: Path, data: st.DataObject) -> None:
    (folder / "a.pt").write_bytes(data.draw(damaged(saved(folder))))
    read_or_refused(folder / "a.pt")


@pytest.mark.skipif(not find_spec("rdkit"), reason='needs pip install "gramian[molecules]"')
@given(data=st.data())
@FUZZ
def test_damaged_molecules(folder: Path, data: st.DataObject) -> None:
    text = 'name,smiles,y\na,CC(=O)[O-],1.5\nb,c1ccccc1,-2\nc,"N[C@@H](C)O",0\n'
    content = data.draw(st.one_of(misprinted(text).map(str.encode), damaged(text.encode())))
    (folder / "a.csv").write_bytes(content)
    read_or_refused(folder / "a.csv")


def test_the_fuzz_reaches_both_ends(folder: Path) -> None:
    """Undamaged files are read; so a refusal of the damaged ones means something."""
    (folder / "a.npz").write_bytes(packed(folder, LAID_OUT, True))
    first = read_or_refused(folder / "a.npz")
    (folder / "a.pt").write_bytes(saved(folder))
    second = read_or_refused(folder / "a.pt")
    assert first is not None
    assert second is not None
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.edge_index.long(), second.edge_index.long())
    spoiled = packed(folder, LAID_OUT, False)
    middle = spoiled.index(b"NUMPY")
    (folder / "a.npz").write_bytes(spoiled[:middle] + b"DUMPY" + spoiled[middle + 5 :])
    assert read_or_refused(folder / "a.npz") is None
