"""Pairs by distance: the same from several processes and from files, damaged ones written anew."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from gramian.errors import InputError
from gramian.interop import pyg_pairs
from gramian.interop.pyg_pairs import Edges, Pairs, Search, find_pairs
from gramian.nn.distances import distance_shells
from gramian.nn.shells import Shells
from graphs import edges, random_graph, relaxed

COUNT = 5
SEARCH = Search(COUNT, False, 1.0)
SIZES = [7, 1, 6, 5]
GRAPHS: list[Edges] = [
    (index.numpy(), size)
    for index, size in zip(
        [random_graph(7, 9, 0), edges(), edges((0, 1), (3, 4)), random_graph(5, 9, 3)], SIZES, strict=True
    )
]


def listed(found: list[Pairs]) -> list[list[Any]]:
    return [[index.tolist(), hop.tolist(), hop.dtype.str] for index, hop in found]


PLAIN = listed(find_pairs(GRAPHS, SEARCH))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of nodes of the graphs that are searched."""
    found: list[int] = []

    def search(index: Tensor, nodes: int, *options: Any, **named: Any) -> Shells:
        found.append(nodes)
        return distance_shells(index, nodes, *options, **named)

    monkeypatch.setattr(pyg_pairs, "distance_shells", search)
    return found


def test_pairs_are_those_of_relaxed_edges_in_order() -> None:
    for (index, size), (pairs, hop) in zip(GRAPHS, find_pairs(GRAPHS, SEARCH), strict=True):
        table = relaxed(torch.from_numpy(index), size)
        expected = sorted(
            (table[v][u], v, u) for v in range(size) for u in range(size) if 0 < table[v][u] < COUNT
        )
        assert [(k, v, u) for (u, v), k in zip(pairs.T.tolist(), hop.tolist(), strict=True)] == expected


@pytest.mark.parametrize("error", [BrokenProcessPool("gone"), OSError("no memory")])
def test_without_other_processes_the_search_is_done_here(
    monkeypatch: pytest.MonkeyPatch, error: Exception, calls: list[int]
) -> None:
    def pool(workers: int, *context: Any, **options: Any) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(pyg_pairs, "ProcessPoolExecutor", pool)
    assert listed(find_pairs(GRAPHS, SEARCH, workers=3)) == PLAIN
    assert sorted(calls) == sorted(SIZES)

    def broken(self: Any, *given: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(ThreadPoolExecutor, "map", broken)
    with pytest.warns(RuntimeWarning, match=f"{error}.*__main__"):
        assert listed(find_pairs(GRAPHS, SEARCH, workers=3)) == PLAIN
    monkeypatch.setattr(pyg_pairs, "current_process", lambda: SimpleNamespace(daemon=True))
    assert listed(find_pairs(GRAPHS, SEARCH, workers=3)) == PLAIN  # in a loader's worker: no warning


def test_what_is_kept_is_not_searched_again(tmp_path: Path, calls: list[int]) -> None:
    for _ in range(2):
        assert listed(find_pairs(GRAPHS, SEARCH, cache=tmp_path)) == PLAIN
        assert calls == SIZES
    index, size = GRAPHS[3]
    for number, (graphs, search) in enumerate(
        [
            (GRAPHS, Search(COUNT + 1, False, 1.0)),
            (GRAPHS, Search(COUNT, True, 1.0)),
            (GRAPHS[1:], SEARCH),
            (GRAPHS[::-1], SEARCH),
            ([*GRAPHS[:3], (index, size + 1)], SEARCH),
            ([*GRAPHS[:3], (index[::-1].copy(), size)], SEARCH),
        ]
    ):
        calls.clear()
        find_pairs(graphs, search, cache=tmp_path)
        assert len(calls) == len(graphs)
        assert len(list(tmp_path.iterdir())) == number + 2
    calls.clear()
    find_pairs([(each.astype(np.int32), size) for each, size in GRAPHS], SEARCH, cache=tmp_path)
    assert not calls  # the same graphs in another type


def spoiled(path: Path, **changes: Callable[[np.ndarray], np.ndarray]) -> None:
    arrays = load_file(path)
    save_file({name: changes.get(name, lambda a: a)(array) for name, array in arrays.items()}, path)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no tensors"),
    "other arrays": lambda path: save_file({"index": np.zeros(2)}, path),
    "a node that is not there": lambda path: spoiled(path, index=lambda index: index + 5),
    "a distance that is not asked for": lambda path: spoiled(path, hop=lambda hop: hop + np.uint8(COUNT)),
    "another type": lambda path: spoiled(path, hop=lambda hop: hop.astype(np.int64)),
    "other lengths": lambda path: spoiled(path, ptr=lambda ptr: ptr[:-1]),
    "starts that fall": lambda path: spoiled(path, ptr=lambda ptr: ptr[[0, 3, 2, 1, 4]]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_written_anew(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    find_pairs(GRAPHS, SEARCH, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damage(path)
    assert path.read_bytes() != whole
    assert listed(find_pairs(GRAPHS, SEARCH, cache=tmp_path)) == PLAIN
    assert path.read_bytes() == whole


def test_what_cannot_be_done_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be kept in .*folder"):
        find_pairs(GRAPHS, SEARCH, cache=tmp_path / "file" / "folder")
    with pytest.raises(InputError, match="at least 0, got -1"):
        find_pairs(GRAPHS, SEARCH, workers=-1)
    with pytest.raises(InputError, match="allow more gigabytes"):
        find_pairs(GRAPHS, Search(COUNT, False, 1e-9), cache=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert find_pairs([], SEARCH, workers=2, cache=tmp_path) == []
