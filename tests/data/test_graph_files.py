"""Graphs from files: every format gives the same graphs, damage is named, nothing in a file is run."""

import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from gramian.data.graph_arrays import from_arrays, load_npz, load_split, save_npz
from gramian.data.graph_files import joined, load_graphs
from gramian.data.graph_generators import circular_skip_links, cluster, ring_transfer
from gramian.data.graphs import IGNORED, Graphs
from gramian.errors import InputError

REAL = Path(os.environ.get("GRAMIAN_DATA", Path(__file__).parents[3] / "shared" / "data"))
COLLECTIONS = REAL / "graphs"
MOLECULES = REAL / "molecules"
no_collections = pytest.mark.skipif(not COLLECTIONS.exists(), reason="no graphs under $GRAMIAN_DATA")
no_molecules = pytest.mark.skipif(not MOLECULES.exists(), reason="no molecules under $GRAMIAN_DATA")

COLLECTION = {
    "edge_index": np.array([[0, 1, 1, 2, 4, 5], [1, 0, 2, 1, 5, 4]]),
    "graph_indicator": np.array([0, 0, 0, 1, 2, 2]),
    "node_labels": np.array([3, 5, 3, 9, 5, 5]),
    "edge_labels": np.array([1, 1, 4, 4, 1, 1]),
    "graph_labels": np.array([1, -1, 1]),
}
"""A path of three nodes, an isolated node and a pair."""

LAID_OUT = {
    "node_types": np.array([0, 1, 0, 2, 1, 1], np.int8),
    "edge_index": np.array([[0, 1, 1, 2, 0, 1], [1, 0, 2, 1, 1, 0]], np.int16),
    "edge_types": np.array([0, 0, 1, 1, 0, 0], np.uint8),
    "node_ptr": np.array([0, 3, 4, 6], np.int32),
    "edge_ptr": np.array([0, 4, 4, 6], np.int32),
    "y": np.array([1, -1, 1]),
}
"""The same graphs laid end to end, types counted from 0."""


def same(first: Graphs, second: Graphs, *but: str) -> bool:
    """Whether everything is equal but the name, whatever the width of whole numbers."""
    for name, part in vars(first).items():
        other = vars(second)[name]
        if name in ("name", "splits", *but):
            continue
        if isinstance(part, torch.Tensor) and isinstance(other, torch.Tensor):
            if part.is_floating_point() != other.is_floating_point() or not torch.equal(
                part.double(), other.double()
            ):
                return False
        elif not isinstance(part, torch.Tensor) and part != other:
            return False
    pairs = zip(first.splits, second.splits, strict=True)
    return all(torch.equal(vars(a)[part], vars(b)[part]) for a, b in pairs for part in vars(a))


def write(folder: Path, arrays: dict, name: str = "a.npz") -> Path:
    np.savez(folder / name, **arrays)
    return folder / name


def write_text(folder: Path, arrays: dict, name: str = "SOME") -> Path:
    """Write a collection as the text format has it, nodes and graphs counted from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {**arrays, "A": arrays["edge_index"].T + 1, "graph_indicator": arrays["graph_indicator"] + 1}
    for key, array in arrays.items():
        if key != "edge_index":
            rows = array[:, None] if array.ndim == 1 else array
            lines = [", ".join(map(repr, row)) for row in rows.tolist()]
            (folder / f"{name}_{key}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_every_format_gives_the_same_graphs(tmp_path: Path) -> None:
    expected = load_graphs(write(tmp_path, LAID_OUT))
    assert (len(expected), expected.node_types, expected.edge_types) == (3, (3,), (2,))
    assert (expected.task, expected.classes, expected.y.tolist()) == ("classification", (-1, 1), [1, 0, 1])
    assert expected[0].edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert expected[1].edge_index.shape == (2, 0)
    record = {"x": "node_types", "edge_index": "edge_index", "edge_attr": "edge_types", "y": "y"}
    data = {name: torch.from_numpy(LAID_OUT[key]) for name, key in record.items()}
    nodes, edges = (torch.from_numpy(LAID_OUT[key]) for key in ("node_ptr", "edge_ptr"))
    slices = {"x": nodes, "edge_index": edges, "edge_attr": edges, "y": torch.arange(4)}
    torch.save((data, slices), tmp_path / "a.pt")
    write_text(tmp_path / "text", COLLECTION)
    write_text(tmp_path / "pyg" / "raw", COLLECTION)
    found = {
        "collection": load_graphs(write(tmp_path, COLLECTION, "b.NPZ.npz")),
        "text": load_graphs(tmp_path / "text"),
        "raw text": load_graphs(tmp_path / "pyg"),
        "tensors": load_graphs(tmp_path / "a.pt"),
    }
    assert {name: same(each, expected) for name, each in found.items()} == dict.fromkeys(found, True)
    other = {**LAID_OUT, "node_types": np.array([0, 1, 0, 2, 1, 0])}
    assert not same(load_graphs(write(tmp_path, other)), expected)  # control


def test_attributes_stand_beside_labels_as_columns(tmp_path: Path) -> None:
    attributes = np.array([[0.5], [1.5], [2.5], [3.5], [4.5], [5.5]])
    both = load_graphs(write_text(tmp_path, {**COLLECTION, "node_attributes": attributes}))
    assert both.x.tolist()[:2] == [[0.5, 1, 0, 0], [1.5, 0, 1, 0]]
    assert both.node_types == ()
    alone = {key: array for key, array in COLLECTION.items() if key not in ("node_labels", "edge_labels")}
    bare = from_arrays("bare", alone)
    assert (bare.node_types, bare.x.tolist(), bare.edge_attr) == ((1,), [0] * 6, None)
    featured = from_arrays("a", {**alone, "node_attributes": attributes, "edge_attributes": np.arange(6) / 4})
    assert featured.edge_attr is not None
    assert (featured.x.shape, featured.edge_attr.flatten().tolist()) == (
        (6, 1),
        [0, 0.25, 0.5, 0.75, 1, 1.25],
    )
    two = from_arrays(
        "two", {**COLLECTION, "node_labels": np.array([[3, 0], [5, 0], [3, 1], [9, 0], [5, 0], [5, 0]])}
    )
    assert (two.node_types, two.x.tolist()[2]) == ((3, 2), [0, 1])


def test_edges_in_any_order_are_sorted_with_their_features() -> None:
    order = np.array([5, 0, 3, 4, 2, 1])
    mixed = {**COLLECTION, "edge_labels": COLLECTION["edge_labels"][order]}
    mixed["edge_index"] = COLLECTION["edge_index"][:, order]
    assert same(from_arrays("mixed", mixed), from_arrays("sorted", COLLECTION))


def test_loops_and_repeated_edges_are_left_out_and_counted(tmp_path: Path) -> None:
    more = np.concatenate((COLLECTION["edge_index"], [[0, 3, 2], [1, 3, 1]]), 1)
    odd = {**COLLECTION, "edge_index": more, "edge_labels": np.append(COLLECTION["edge_labels"], [7, 7, 4])}
    found = load_graphs(write_text(tmp_path, odd))
    assert found.dropped == 3
    assert torch.equal(found.edge_index, from_arrays("plain", COLLECTION).edge_index)
    assert "3 edges left out" in found.text()


@pytest.mark.parametrize(
    ("y", "task", "expected"),
    [
        (np.array([0.5, 1, 2]), None, "regression"),
        (np.array([[0.5], [1], [2]]), None, "regression"),
        (np.array([[0, 1], [1, 1], [0, 0]]), None, "multilabel"),
        (np.array([[0, 1.0], [1, 1], [0, 0]]), None, "multilabel"),
        (np.array([[True, False], [True, True], [True, False]]), None, "multilabel"),
        (np.array([[0, 2], [1, 1], [0, 0]]), None, "regression"),
        (np.array([7, 3, 7]), None, "classification"),
        (np.array([7, 3, 7]), "regression", "regression"),
        (np.array([7.0, 3, 7]), "classification", "classification"),
        (np.array([1, 2, 1, 1, 2, IGNORED]), None, "node"),
        (np.array([1, 2, 1, 1, 2, 0.5]), None, "node_regression"),
        (np.array([1, 2, 1, 1, 2, 2]), "node_regression", "node_regression"),
    ],
)
def test_the_targets_tell_the_task(y: np.ndarray, task: str | None, expected: str) -> None:
    graphs = from_arrays("some", {**LAID_OUT, "y": y}, task)
    assert graphs.task == expected
    if graphs.classifies:
        known = [graphs.classes[number] if number >= 0 else IGNORED for number in graphs.y.tolist()]
        assert known == y.flatten().tolist()
    else:
        assert graphs.y.flatten().tolist() == y.flatten().tolist()


@pytest.mark.parametrize(
    ("y", "task", "message"),
    [
        (np.array([1, 2]), None, "targets of 3 graphs or 6 nodes"),
        (np.array(1), None, "targets of 3 graphs or 6 nodes"),
        (np.array([1, 2, 1]), "node", "the task node needs 6 targets, got 3"),
        (np.array([1, 2, 1]), "guess", "the task must be one of regression"),
        (np.array([1.5, 2, 1]), "classification", "classes must be whole numbers"),
        (np.array([1, np.nan, 1]), None, "targets must be finite"),
        (np.array([1, 1e39, 1]), None, "targets must be finite"),
        (np.array([1, 1, 1]), None, "needs 2 to 1,000 classes, .* got 1"),
        (np.array(["a", "b", "a"]), None, "targets must be numbers, got <U1"),
        (np.array([1j, 2, 3]), None, "targets must be numbers"),
        (np.array([[0, 2], [1, 1], [0, 0]]), "multilabel", "must be 0 or 1"),
        (np.zeros((3, 0)), None, "needs targets"),
    ],
)
def test_targets_that_do_not_fit(y: np.ndarray, task: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_arrays("some", {**LAID_OUT, "y": y}, task)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"node_ptr": None}, "lacks node_ptr"),
        ({"node_types": None, "y": None}, "lacks y, x or node_types"),
        ({"node_ptr": np.array([0, 3, 3, 6])}, "graph 1 has no nodes"),
        ({"node_ptr": np.array([0, 4, 3, 6])}, "graph 1 has no nodes"),
        ({"node_ptr": np.array([0.0, 3, 4, 6])}, "node_ptr must be whole numbers"),
        ({"node_ptr": np.array([], int)}, "targets of 0 graphs"),
        ({"edge_ptr": np.array([0, 4, 6])}, "edges .* must rise"),
        ({"edge_index": LAID_OUT["edge_index"].astype(float)}, "edge_index must be whole numbers"),
        ({"edge_index": LAID_OUT["edge_index"].T}, "edges"),
        ({"edge_index": LAID_OUT["edge_index"] + 1}, "leads to node"),
        (
            {"edge_index": LAID_OUT["edge_index"].astype(np.uint64) + np.uint64(2**63)},
            "must be whole numbers",
        ),
        ({"node_types": np.array([0, 1, 0, 2, 1, 10**9])}, "types of nodes must count from 0"),
        ({"node_types": np.array([0, 1, 0, -2, 1, 1])}, "types of nodes must count from 0"),
        ({"node_types": np.array(["C", "O"] * 3)}, "types of nodes must be whole numbers"),
        ({"x": np.full((6, 2), np.inf)}, "features of node 0 are not finite"),
        ({"edge_types": np.array([0, 0, 1])}, "6 edges but features of 3"),
        ({"node_vocabulary": np.array([2])}, "more than"),
        ({"classes": np.array([1, -1])}, "increasing order"),
        ({"classes": np.array([0, 1])}, "needs 2 to 1,000 classes"),
        ({"train": np.array([0])}, "has no val"),
        ({"train": np.array([0]), "val": np.array([1]), "test": np.array([1])}, "none in common"),
        ({"train": np.array([0]), "val": np.array([1]), "test": np.array([3])}, "count the 3 examples"),
        (
            {"train": np.array([0.5]), "val": np.array([1]), "test": np.array([2])},
            "train must be whole numbers",
        ),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, changes: dict, message: str) -> None:
    arrays = {name: array for name, array in {**LAID_OUT, **changes}.items() if array is not None}
    with pytest.raises(InputError, match=message):
        load_graphs(write(tmp_path, arrays))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph_indicator": None}, "graph_indicator.txt is missing"),
        ({"graph_indicator": "1\n1\n1\n3\n2\n2\n"}, "must be sorted"),
        ({"graph_indicator": "1\n1\n1\n2\n4\n4\n"}, "among the 3 that have labels"),
        ({"graph_indicator": "0\n1\n1\n2\n3\n3\n"}, "must be sorted and among the 3"),
        ({"graph_indicator": "1\n1\n1\n3\n3\n3\n"}, "graph 1 has no nodes"),
        ({"graph_indicator": "1\n1\n1\n2\n3\n"}, "from and to the 5 nodes"),
        ({"graph_indicator": "1,1\n1,1\n"}, "one number in each line, not 2"),
        ({"graph_indicator": ""}, "must be sorted and among"),
        ({"graph_labels": None}, "lacks edge_index, graph_labels or graph_attributes"),
        ({"graph_labels": "1\n-1\n"}, "among the 2 that have labels"),
        ({"graph_labels": "1\n1\n1\n"}, "needs 2 to 1,000 classes"),
        ({"graph_labels": "1\n1.5\n2\n"}, "graph_labels.txt must hold whole numbers"),
        ({"graph_labels": "1\nnan\n2\n"}, "graph_labels.txt must hold whole numbers"),
        ({"graph_labels": "1\none\n2\n"}, "graph_labels.txt must hold lines of numbers"),
        ({"node_labels": "3\n5\n3\n"}, "6 nodes but labels or attributes"),
        ({"node_labels": "3\n5\n3\n1e300\n5\n5"}, "node_labels.txt must hold whole numbers"),
        ({"node_attributes": "3\n5\n3\nnan\n5\n5"}, "features of node 3 are not finite"),
        ({"node_attributes": "3\n5\n3,4\n2\n5\n5"}, "node_attributes.txt must hold lines of numbers"),
        ({"edge_labels": "1\n1\n"}, "6 edges but labels or attributes"),
        ({"A": "1, 2\n2, 1\n1, 7\n"}, "lead from and to the 6 nodes"),
        ({"A": "0, 1\n1, 2\n"}, "lead from and to the 6 nodes"),
        ({"A": "1, 2\n2, 4\n"}, "edge 1 leads from one graph to another"),
        ({"A": "1, 2, 3\n2, 3, 4\n"}, "two nodes in each line, not 3"),
        ({"A": "1, 2\n2"}, "_A.txt must hold lines of numbers"),
        ({"A": "1; 2\n"}, "_A.txt must hold lines of numbers"),
        ({"A": "1, 2\n2, 99999999999999999999\n"}, "must hold whole numbers"),
        ({"B_A": "1, 2\n"}, "holds several collections"),
        ({"node_labels": b"\xff\xfe\x00"}, "node_labels.txt must hold lines of numbers"),
    ],
)
def test_text_that_does_not_fit(tmp_path: Path, changes: dict, message: str) -> None:
    folder = write_text(tmp_path / "some", COLLECTION)
    if "edge_labels" not in changes and "A" in changes:
        (folder / "SOME_edge_labels.txt").unlink()
    for name, text in changes.items():
        path = folder / (f"{name}.txt" if name == "B_A" else f"SOME_{name}.txt")
        if text is None:
            path.unlink()
        else:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_graphs(folder)
    assert "\n" not in str(caught.value)


def test_graphs_without_any_edges(tmp_path: Path) -> None:
    arrays = {name: array for name, array in COLLECTION.items() if name != "edge_labels"}
    folder = write_text(tmp_path, {**arrays, "edge_index": np.zeros((2, 0), int)})
    (folder / "SOME_A.txt").write_text("\n \n")
    found = load_graphs(folder)
    assert found.edge_index.shape == (2, 0)
    assert found.batch(torch.arange(3)).edge_index.shape == (2, 0)
    assert not found.directed


def made() -> Sequence[Graphs]:
    """Data sets of every kind of features, targets and splits."""
    columns = np.array([[0, 3], [1, 0], [0, 0], [2, 1], [1, 1], [1, 0]])
    parts = {"train": np.array([2]), "val": np.array([0]), "test": np.array([1])}
    labels = {"y": np.array([[0, 1], [1, 1], [0, 0]]), "node_types": columns, **parts}
    numbers = {
        "y": np.arange(12).reshape(6, 2) / 7,
        "x": np.arange(6) / 3,
        "edge_attr": np.arange(12).reshape(6, 2) / 9,
    }
    return [
        cluster((3, 2, 1)),
        ring_transfer((4, 2, 2), distance=3),
        replace(circular_skip_links(), splits=()),
        from_arrays("labels", {**LAID_OUT, **labels}),
        from_arrays("numbers", {**LAID_OUT, **numbers}),
    ]


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    for graphs in made():
        save_npz(tmp_path / "a.npz", graphs)
        found = load_npz(tmp_path / "a.npz")
        assert same(found, graphs.simple(), "dropped")
        assert len(found.splits) == len(graphs.splits)
    wider = made()[0].with_types((12,))
    save_npz(tmp_path / "a.npz", wider)
    assert load_npz(tmp_path / "a.npz").node_types == (12,)
    with pytest.raises(InputError, match="has 5 splits; a file holds one"):
        save_npz(tmp_path / "b.npz", circular_skip_links())
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_parts_of_a_data_set_are_put_together(tmp_path: Path) -> None:
    labels = {"train": [1, -1, 1], "val": [1, 1, 4], "test": [4, 4, -1]}
    for part, y in labels.items():
        write(
            tmp_path,
            {**LAID_OUT, "y": np.array(y), "node_types": LAID_OUT["node_types"] * (1 + (part == "val"))},
            f"some_{part}.npz",
        )
    (tmp_path / "notes.md").write_text("not read")
    found = load_graphs(tmp_path)
    assert (len(found), found.classes, found.node_types) == (9, (-1, 1, 4), (5,))
    assert [found.classes[number] for number in found.y] == [1, -1, 1, 1, 1, 4, 4, 4, -1]
    assert [part.tolist() for part in vars(found.splits[0]).values()] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert found[7].edge_index.shape == (2, 0)
    assert torch.equal(found[6].edge_index, found[0].edge_index)
    (tmp_path / "some_val.npz").unlink()
    with pytest.raises(
        InputError, match=r"one for each of train, val and test; it holds some_test\.npz, some_train\.npz"
    ):
        load_graphs(tmp_path)
    (tmp_path / "some_test.npz").unlink()
    assert len(load_graphs(tmp_path)) == 3  # a single file is what the folder holds


def test_parts_that_are_not_alike() -> None:
    part = from_arrays("a", LAID_OUT)
    numbers = from_arrays("a", {**LAID_OUT, "y": np.array([0.5, 1, 2])})
    featured = from_arrays("a", {**LAID_OUT, "x": np.ones((6, 2))})
    for other in (numbers, featured):
        with pytest.raises(InputError, match="alike"):
            joined("all", {"train": part, "validation": part, "test": other})
    with pytest.raises(InputError, match="no part 'validation'"):
        joined("all", {"train": part, "test": part})
    assert len(joined("all", {"train": part, "validation": part, "test": part})) == 9


def test_what_cannot_be_graphs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file or folder"):
        load_graphs(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"must hold NAME_A\.txt.* it holds no such file"):
        load_graphs(tmp_path / "empty")
    (tmp_path / "a.png").touch()
    with pytest.raises(InputError, match=r"must be a folder or end in \.npz, \.pt, \.smi"):
        load_graphs(tmp_path / "a.png")
    (tmp_path / "some_A.txt").touch()
    with pytest.raises(InputError, match=r"graph_indicator\.txt is missing"):
        load_graphs(tmp_path)


class Bomb:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_in_an_npz_is_run(tmp_path: Path) -> None:
    objects = np.empty(3, object)
    objects[:] = Bomb(tmp_path / "exploded")
    for name in ("y", "node_types", "task"):
        with pytest.raises(InputError, match=r"cannot be read as \.npz of plain arrays"):
            load_graphs(write(tmp_path, {**LAID_OUT, name: objects}))
    assert len(load_graphs(write(tmp_path, {**LAID_OUT, "note": objects}))) == 3  # nobody reads this one
    assert not (tmp_path / "exploded").exists()
    np.load(tmp_path / "a.npz", allow_pickle=True)["note"]  # control: the bomb is live
    assert (tmp_path / "exploded").exists()


def test_nothing_in_a_pt_file_is_run(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content in (Bomb(tmp_path / "exploded"), ({"x": Bomb(tmp_path / "exploded")}, {})):
        torch.save(content, path)
        with pytest.raises(InputError, match="holds more than tensors and numbers"):
            load_graphs(path)
    assert not (tmp_path / "exploded").exists()
    torch.load(path, weights_only=False)  # control: the bomb is live
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(3),
        [],
        (),
        {},
        {"x": torch.ones(2, 1)},
        ({"x": torch.ones(2, 1)}, {"x": torch.tensor([0, 2])}),
        ({"edge_index": torch.ones(2, 1), "y": torch.ones(1)}, {"edge_index": torch.tensor([0, 1])}),
        [{"x": torch.ones(2, 1), "edge_index": torch.ones(2, 1), "y": 3}],
        [3, 4],
        {"x": "no tensor", "edge_index": torch.ones(2, 1)},
    ],
)
def test_tensors_that_are_no_graphs(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"holds no graphs|lacks y"):
        load_graphs(tmp_path / "a.pt")


def test_an_array_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    """The claim of 8 TB is refused by its header; numpy itself would first ask for the memory."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    path = write(tmp_path, {name: array for name, array in LAID_OUT.items() if name != "y"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y.npy", header.getvalue() + bytes(24))
    with pytest.raises(InputError, match="does not fill an entry of"):
        load_graphs(path)


def test_a_file_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, LAID_OUT)
    monkeypatch.setattr(os, "sysconf", lambda name: 8)
    with pytest.raises(InputError, match=r"a\.npz holds would need .* and there are 64 bytes"):
        load_graphs(path)
    monkeypatch.undo()
    assert len(load_graphs(path)) == 3


def test_splits_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path, {"train": np.array([2]), "validation": np.array([0]), "test": np.array([1, 3])})
    assert load_split(path).test.tolist() == [1, 3]
    with pytest.raises(InputError, match="has no test"):
        load_split(write(tmp_path, {"train": np.array([2]), "val": np.array([0])}))


PYG = """
import sys, torch
from pathlib import Path
from torch_geometric.data import Data, InMemoryDataset
folder = Path(sys.argv[1])
edges = [torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), torch.zeros(2, 0).long(), torch.tensor([[0, 1], [1, 0]])]
types, bonds = ([0, 1, 0], [2], [1, 1]), ([0, 0, 1, 1], [], [0, 0])
graphs = [
    Data(torch.tensor(x)[:, None], each, torch.tensor(bond).long(), torch.tensor([y]))
    for x, each, bond, y in zip(types, edges, bonds, (1, -1, 1))
]
bare = [Data(edge_index=graph.edge_index, y=graph.y, num_nodes=graph.num_nodes) for graph in graphs]
for name, data in (("full", graphs), ("bare", bare)):
    InMemoryDataset.save(data, folder / f"{name}_new.pt")
    torch.save(InMemoryDataset.collate(data), folder / f"{name}_old.pt")
    torch.save(data, folder / f"{name}_list.pt")
"""


@pytest.mark.skipif(not find_spec("torch_geometric"), reason="needs pip install 'gramian[graphs]'")
@pytest.mark.slow  # imports PyTorch Geometric, in a process of its own
def test_what_pytorch_geometric_writes_is_read_without_it(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", PYG, str(tmp_path)], check=True, timeout=300)
    full = from_arrays("full", LAID_OUT)
    bare = from_arrays(
        "bare",
        {name: array for name, array in LAID_OUT.items() if name != "edge_types"}
        | {"node_types": np.zeros(6, int)},
    )
    for way in ("new", "old", "list"):
        assert same(load_graphs(tmp_path / f"full_{way}.pt"), full)
        assert same(load_graphs(tmp_path / f"bare_{way}.pt"), bare)
    assert not same(full, bare)


FACTS = [
    ("MUTAG", 188, 3371, 7442, 28, 7, {-1: 63, 1: 125}),
    ("PROTEINS", 1113, 43471, 162088, 620, 3, {1: 663, 2: 450}),
    ("NCI1", 4110, 122747, 265506, 111, 37, {0: 2053, 1: 2057}),
    ("NCI109", 4127, 122494, 265208, 111, 38, {0: 2048, 1: 2079}),
    ("ENZYMES", 600, 19580, 74564, 126, 3, dict.fromkeys(range(1, 7), 100)),
]
ISOLATED = {"MUTAG": 0, "PROTEINS": 5, "NCI1": 428, "NCI109": 474, "ENZYMES": 106}


@no_collections
@pytest.mark.parametrize(("name", "graphs", "nodes", "edges", "largest", "labels", "classes"), FACTS)
def test_collections(
    name: str, graphs: int, nodes: int, edges: int, largest: int, labels: int, classes: dict
) -> None:
    found = load_graphs(COLLECTIONS / f"{name}.npz")
    assert (found.task, found.name) == ("classification", name)
    assert (len(found), len(found.x), found.edge_index.shape[1]) == (graphs, nodes, edges)
    assert found.ptr.diff().max() == largest
    assert dict(zip(found.classes, found.y.bincount().tolist(), strict=True)) == classes
    assert (found.dropped, found.directed) == (0, False)
    linked = (found.edge_index + found.ptr[:-1].repeat_interleave(found.edge_ptr.diff()))[0].unique()
    assert nodes - len(linked) == ISOLATED[name]
    extra = {"PROTEINS": 1, "ENZYMES": 18}.get(name)
    assert (found.x.shape[1] == extra + labels) if extra else (found.node_types == (labels,))


@no_collections
def test_a_real_collection_as_text(tmp_path: Path) -> None:
    with np.load(COLLECTIONS / "MUTAG.npz") as file:
        write_text(tmp_path, {name: file[name] for name in file.files}, "MUTAG")
    assert same(load_graphs(tmp_path), load_graphs(COLLECTIONS / "MUTAG.npz"))


@no_molecules
@pytest.mark.parametrize(
    ("part", "nodes", "edges", "largest", "mean", "deviation", "constant"),
    [("val", 23083, 49692, 36, 0.0315, 1.985, 1.44), ("test", 23117, 49720, 37, 0.0124, 2.017, 1.55)],
)
def test_zinc(
    part: str, nodes: int, edges: int, largest: int, mean: float, deviation: float, constant: float
) -> None:
    found = load_graphs(MOLECULES / f"zinc12k_{part}.npz").with_types((28,), (4,))
    assert (found.task, found.outputs, len(found)) == ("regression", 1, 1000)
    assert (len(found.x), found.edge_index.shape[1], found.ptr.diff().max()) == (nodes, edges, largest)
    assert found.y.mean().item() == pytest.approx(mean, abs=1e-4)
    assert found.y.std(correction=0).item() == pytest.approx(deviation, abs=1e-3)
    assert (found.y - found.y.median()).abs().mean().item() == pytest.approx(constant, abs=5e-3)
    assert set(found.edge_attr.unique().tolist()) == {1, 2, 3}
    assert (found.dropped, found.directed) == (0, False)
