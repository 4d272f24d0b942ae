"""Shells on graphs of PyTorch Geometric are those of the edges, however graphs are loaded and kept."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gramian.errors import InputError, MissingExtraError
from gramian.interop import pyg_pairs
from gramian.nn.distances import distance_shells
from gramian.nn.shells import Shells, batch_shells
from graphs import edges, layer, normal, random_graph

pytest.importorskip("torch_geometric", reason="needs pip install 'gramian[graphs]'")

from gramian.interop.pyg_shells import (  # before the package, whose import warns
    AddDistanceShells,
    ShellLoader,
    add_distance_shells,
    shells_of,
)

from torch_geometric.data import Batch, Data, HeteroData, InMemoryDataset  # isort: skip
from torch_geometric.loader import DataLoader  # isort: skip

COUNT = 5
EDGES = [
    random_graph(7, 9, 0),  # loops, repeated and one-way edges
    edges(),  # one node
    edges((0, 1), (1, 0), (3, 4), (4, 3)),  # two parts, and nodes 2 and 5 alone
    random_graph(6, 12, 3),
]
SIZES = [7, 1, 6, 6]


def graphs(**options: Any) -> list[Data]:
    made = [
        Data(x=normal(size, 4, seed=number), edge_index=index)
        for number, (index, size) in enumerate(zip(EDGES, SIZES, strict=True))
    ]
    return add_distance_shells(made, COUNT, **options)


def ours(directed: bool = True, count: int = COUNT) -> list[Shells]:
    each = zip(EDGES, SIZES, strict=True)
    return [distance_shells(index, size, count, directed=directed) for index, size in each]


def assert_equal(one: Shells, other: Shells) -> None:
    assert (one.sizes, one.count) == (other.sizes, other.count)
    for name in ("members", "node", "hop", "starts", "rows", "graph", "ends"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def pairs_of(data: Any) -> list[list[int]]:
    return [*data.shell_index.tolist(), data.shell_hop.tolist(), data.shell_count.tolist()]


@pytest.mark.parametrize("directed", [True, False])
def test_shells_are_those_of_the_edges_along_them_or_both_ways(directed: bool) -> None:
    made = graphs(directed=directed)
    for data, expected in zip(made, ours(directed), strict=True):
        assert_equal(shells_of(data), expected)
    assert pairs_of(made[0]) != pairs_of(graphs(directed=not directed)[0])  # control: edges lead one way


@pytest.mark.parametrize("loader", [DataLoader, ShellLoader])
def test_a_loaded_batch_has_the_shells_of_its_graphs(loader: Callable[..., DataLoader]) -> None:
    batches = list(loader(graphs(), batch_size=3))
    assert [len(batch) for batch in batches] == [3, 1]
    for batch, parts in zip(batches, (ours()[:3], ours()[3:]), strict=True):
        assert_equal(shells_of(batch), batch_shells(parts))


def test_graphs_of_a_batch_come_out_as_they_went_in() -> None:
    for data, original in zip(Batch.from_data_list(graphs()).to_data_list(), graphs(), strict=True):
        assert pairs_of(data) == pairs_of(original)
        assert data.shell_index.dtype == torch.int32
        assert data.shell_hop.dtype == torch.uint8


def test_pairs_that_are_not_counted_on_are_other_shells() -> None:
    """Negative control: a name without `index` in it would keep every graph's own numbers of nodes."""
    made, filter = graphs(), layer()
    batch = Batch.from_data_list(made)
    right = filter(batch.x, shells_of(batch))
    batch.shell_index = torch.cat([data.shell_index for data in made], 1)
    assert (filter(batch.x, shells_of(batch)) - right).abs().max() > 1e-2


class Stored(InMemoryDataset):
    """A data set as users write one."""

    def __init__(self, root: Path, transform: Any = None, pre_transform: Any = None) -> None:
        super().__init__(str(root), transform, pre_transform)
        self.load(self.processed_paths[0])

    @property
    def processed_file_names(self) -> list[str]:
        return ["graphs.pt"]

    def process(self) -> None:
        made = [Data(x=normal(n, 4, seed=n), edge_index=e) for e, n in zip(EDGES, SIZES, strict=True)]
        self.save(
            [self.pre_transform(data) if self.pre_transform else data for data in made],
            self.processed_paths[0],
        )


@pytest.fixture(params=["pre_transform", "transform", "function"])
def stored(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> InMemoryDataset:
    add = AddDistanceShells(COUNT)
    if request.param == "function":
        return add_distance_shells(Stored(tmp_path), COUNT)
    return Stored(tmp_path, **{request.param: add})


def test_a_data_set_keeps_shells_and_loads_them(stored: InMemoryDataset) -> None:
    assert isinstance(stored, Stored)
    assert len(stored) == 4
    for data, expected in zip(stored, ours(), strict=True):
        assert_equal(shells_of(data), expected)
    batch = next(iter(DataLoader(stored[[3, 0]], batch_size=2)))
    assert_equal(shells_of(batch), batch_shells([ours()[3], ours()[0]]))


def test_a_data_set_is_given_as_it_selects_and_is_not_changed(tmp_path: Path) -> None:
    given = Stored(tmp_path)
    some = add_distance_shells(given[[2, 0]], COUNT)
    assert [data.num_nodes for data in some] == [6, 7]
    assert_equal(shells_of(some[1]), ours()[0])
    (one,) = add_distance_shells(given[[3]], COUNT)
    assert_equal(shells_of(one), ours()[3])
    assert "shell_index" not in given[0]
    listed = add_distance_shells(torch.utils.data.Subset(given, [1, 2]), COUNT)
    assert isinstance(listed, list)
    assert_equal(shells_of(listed[1]), ours()[2])
    assert "shell_index" not in given[1]
    data = given[0]
    assert isinstance(add_distance_shells(data, 3), Data)
    assert "shell_index" not in data


@pytest.mark.slow  # starts processes
def test_other_processes_and_the_cache_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [pairs_of(data) for data in graphs()]
    assert [pairs_of(data) for data in graphs(workers=2, cache=tmp_path)] == plain
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(pyg_pairs, "distance_shells", None)  # cannot be called
    assert [pairs_of(data) for data in graphs(cache=str(tmp_path))] == plain


def test_a_transform_searches_each_graph_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, transform = graphs(), AddDistanceShells(COUNT, cache=tmp_path)
    assert str(transform) == "AddDistanceShells(5, directed=True)"
    for _ in range(2):
        assert [pairs_of(transform(data)) for data in plain] == [pairs_of(data) for data in plain]
        assert len(list(tmp_path.iterdir())) == 4
        monkeypatch.setattr(pyg_pairs, "distance_shells", None)  # cannot be called again


UNGUARDED = """
import torch
from gramian.interop.pyg import add_distance_shells
from torch_geometric.data import Data
ring = torch.arange(6)
ring = Data(edge_index=torch.stack((ring, ring.roll(1))), num_nodes=6)
print(len(add_distance_shells([ring] * 4, 3, workers=2)[3].shell_hop))
"""


@pytest.mark.slow  # starts processes
def test_a_script_that_does_not_say_where_it_starts_still_ends(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "12\n"), done.stderr
    assert "__main__" in done.stderr


@pytest.mark.slow  # starts processes
def test_shells_come_from_the_workers_of_a_loader() -> None:
    options = {"batch_size": 3, "num_workers": 1, "multiprocessing_context": "spawn"}
    (batch, _) = list(ShellLoader(graphs(), **options))
    assert_equal(shells_of(batch), batch_shells(ours()[:3]))


def test_a_batch_takes_its_shells_along() -> None:
    batch = next(iter(ShellLoader(graphs(), batch_size=4)))
    moved = batch.clone().to("meta")
    assert {moved.shells.members.device.type, moved.shells.graph.device.type} == {"meta"}
    assert_equal(batch.cpu().shells, batch_shells(ours()))
    assert "shells=Shells(graphs=4, nodes=20, count=5)" in str(batch)
    assert "shell_index" not in batch
    assert torch.equal(batch.to_data_list()[2].x, graphs()[2].x)


ONE = Data(x=torch.ones(2, 4), edge_index=edges((0, 1)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AddDistanceShells(0), "at least 1, got 0"),
        (lambda: AddDistanceShells(2.5), "whole number, got 2.5"),
        (lambda: AddDistanceShells(3, gigabytes=0), "positive number of gigabytes"),
        (lambda: add_distance_shells(ONE, 3, workers=-1), "at least 0, got -1"),
        (lambda: add_distance_shells(7, 3), "not to int"),
        (lambda: add_distance_shells(HeteroData(), 3), "graph 0 is of type HeteroData"),
        (lambda: add_distance_shells([ONE, 7], 3), "graph 1 is of type int"),
        (lambda: add_distance_shells([ONE, Data(x=ONE.x)], 3), "graph 1 is of type Data without it"),
        (lambda: add_distance_shells(Data(edge_index=edges(), num_nodes=0), 3), "graph 0 has no nodes"),
        (lambda: add_distance_shells(Data(x=ONE.x, edge_index=torch.zeros(2, 1)), 3), "float32"),
        (lambda: add_distance_shells(Data(x=ONE.x, edge_index=torch.zeros(3, 1).long()), 3), r"\(3, 1\)"),
        (lambda: add_distance_shells(Data(x=ONE.x, edge_index=edges((0, 2))), 3), "0 … 1, got 0 … 2"),
        (lambda: shells_of(ONE), r"by AddDistanceShells\(count\)"),
        (
            lambda: shells_of(Batch.from_data_list([add_distance_shells(ONE, k) for k in (2, 3)])),
            r"one number of shells, got \[2, 3\]",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_a_graph_too_large_for_memory_is_refused() -> None:
    line = torch.arange(300)
    path = Data(edge_index=torch.stack((line[:-1], line[1:])), num_nodes=300)
    with pytest.raises(InputError, match=r"need about .* GB where 0.0001 GB are allowed"):
        add_distance_shells(path, 300, gigabytes=1e-4)
    far = add_distance_shells(path, 300)
    assert far.shell_hop.dtype == torch.int32
    assert int(far.shell_hop.max()) == 299
    assert_equal(shells_of(far), distance_shells(path.edge_index, 300, 300, directed=True))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric.data", None)
    with pytest.raises(MissingExtraError, match=r'pip install "gramian\[graphs\]"'):
        runpy.run_path(str(Path(__file__).parents[2] / "src" / "gramian" / "interop" / "pyg_shells.py"))
