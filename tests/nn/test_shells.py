"""Shells against distances found by relaxation and sums found by loops; what is given wrongly is named."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.nn import distances as search
from gramian.nn import shells as module
from gramian.nn.distances import distance_shells
from gramian.nn.shells import Shells, batch_shells, shells_of_distances, shells_of_pairs


def edges(*pairs: tuple[int, int]) -> Tensor:
    return torch.tensor(pairs).reshape(-1, 2).T


def random_graph(nodes: int, number: int, seed: int) -> Tensor:
    """Edges with loops and duplicates among them."""
    return torch.randint(nodes, (2, number), generator=torch.Generator().manual_seed(seed))


def features(nodes: int, width: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(nodes, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relaxed(edge_index: Tensor, nodes: int, directed: bool = False) -> list[list[float]]:
    """d(u, v) at [v][u], relaxed edge by edge until nothing changes."""
    found = [[0.0 if u == v else math.inf for u in range(nodes)] for v in range(nodes)]
    walks = edge_index.T.tolist()
    walks = walks if directed else walks + [[v, u] for u, v in walks]
    for _ in range(nodes):
        for source in range(nodes):
            for u, v in walks:
                found[v][source] = min(found[v][source], found[u][source] + 1)
    return found


def listed(shells: Shells) -> set[tuple[int, int, int]]:
    """Every (v, k, u) by the rows, after a check that the transpose lists the same and rows are sorted."""
    rows = list(zip(shells.node.tolist(), shells.hop.tolist(), strict=True))
    assert [(k, v) for v, k in rows] == sorted({(k, v) for v, k in rows})
    starts, members, found = shells.starts.tolist(), shells.members.tolist(), []
    for (v, k), (start, stop) in zip(rows, pairwise(starts), strict=True):
        assert start < stop
        found += [(v, k, u) for u in members[start:stop]]
    transposed, ends = [], shells.ends.tolist()
    for u, (start, stop) in enumerate(pairwise(ends)):
        transposed += [(*rows[row], u) for row in shells.rows[start:stop].tolist()]
    assert sorted(found) == sorted(transposed)
    assert len(found) == len(set(found)) == len(members)
    return set(found)


def expected(table: list[list[float]], count: int, offset: int = 0) -> set[tuple[int, int, int]]:
    return {
        (v + offset, int(k), u + offset)
        for v, row in enumerate(table)
        for u, k in enumerate(row)
        if 0 < k < count
    }


@pytest.mark.parametrize("by_bits", [0, 512])
@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("count", [None, 1, 2, 4, 50])
def test_shells_are_those_of_the_distances(
    count: int | None, directed: bool, by_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse graphs: some have isolated nodes or several components; both searches."""
    monkeypatch.setattr(search, "NODES_BY_BITS", by_bits)
    disconnected = 0
    for seed in range(6):
        graph = random_graph(9, 9, seed)
        table = relaxed(graph, 9, directed)
        shells = distance_shells(graph, 9, count, directed=directed)
        farthest = max(int(k) for row in table for k in row if k < math.inf)
        assert shells.count == (farthest + 1 if count is None else count)
        assert listed(shells) == expected(table, shells.count)
        assert (shells.sizes, shells.graph.tolist()) == ((9,), [0] * 9)
        disconnected += any(k == math.inf for row in table for k in row)
        other = relaxed(graph, 9, not directed)
        if count is None:
            assert listed(shells) != expected(other, shells.count)  # control
    assert disconnected > 2


def test_an_edge_leads_from_its_source_to_its_target() -> None:
    shells = distance_shells(edges((0, 1), (1, 2)), 3, directed=True)
    assert listed(shells) == {(1, 1, 0), (2, 1, 1), (2, 2, 0)}


def test_loops_and_duplicates_change_nothing() -> None:
    plain = distance_shells(edges((0, 1), (1, 2)), 4)
    noisy = distance_shells(edges((1, 0), (0, 1), (1, 1), (1, 2), (1, 2), (3, 3)), 4)
    assert listed(plain) == listed(noisy) == expected(relaxed(edges((0, 1), (1, 2)), 4), 3)
    assert noisy.count == plain.count == 3


@pytest.mark.parametrize("count", [None, 3])
def test_a_graph_without_edges_has_nodes_alone(count: int | None) -> None:
    shells = distance_shells(torch.empty(2, 0, dtype=torch.int64), 4, count)
    assert listed(shells) == set()
    assert (shells.nodes, shells.count) == (4, count or 1)
    assert shells.sums(features(4)).shape == (0, 3)
    assert distance_shells(torch.empty(2, 0, dtype=torch.int64), 1).nodes == 1


def test_a_search_in_pieces_is_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = random_graph(40, 50, 1)
    whole = distance_shells(graph, 40)
    monkeypatch.setattr(search, "NODES_BY_BITS", 0)
    monkeypatch.setattr(search, "DISTANCES_AT_ONCE", 130)
    pieces = distance_shells(graph, 40)
    assert listed(whole) == listed(pieces)
    assert torch.equal(whole.node, pieces.node)


def test_shells_of_a_matrix_of_distances() -> None:
    graph = random_graph(8, 8, 2)
    table = torch.tensor(relaxed(graph, 8))
    matrix = torch.where(table.isfinite(), table, -1).to(torch.int16)
    for count in (None, 1, 2, 3, 9):
        one, other = shells_of_distances(matrix, count), distance_shells(graph, 8, count)
        assert (listed(one), one.count) == (listed(other), other.count)


def test_pairs_come_in_any_order_and_nodes_in_any_number() -> None:
    for nodes in (9, 70_000):
        far = nodes - 1
        pairs = [(far, 2, 0), (1, 1, 0), (0, 1, far), (0, 1, 3), (far, 2, 1), (far, 1, 0)]
        v, k, u = torch.tensor(pairs).T
        shells = shells_of_pairs(v, u, k, [nodes], 4)
        assert listed(shells) == set(pairs)
        assert shells.hop.tolist() == [1, 1, 1, 2]
        assert shells.starts.tolist() == [0, 2, 3, 4, 6]


def three(count: int = 4) -> tuple[list[Tensor], list[int], list[Shells]]:
    sizes = [7, 1, 5]
    graphs = [random_graph(size, size, seed) for seed, size in enumerate(sizes)]
    return graphs, sizes, [distance_shells(g, n, count) for g, n in zip(graphs, sizes, strict=True)]


def test_a_batch_is_the_union_of_its_graphs() -> None:
    graphs, _, alone = three()
    batch = batch_shells(alone)
    offsets = [0, 7, 8]
    union = torch.cat([g + o for g, o in zip(graphs, offsets, strict=True)], 1)
    assert listed(batch) == listed(distance_shells(union, 13, 4))
    assert batch.sizes == (7, 1, 5)
    assert batch.graph.tolist() == [0] * 7 + [1] + [2] * 5
    nested = batch_shells([batch_shells(alone[:2]), alone[2]])
    for name in ("members", "node", "hop", "starts", "rows", "ends", "graph"):
        assert torch.equal(getattr(nested, name), getattr(batch, name))
    moved = batch_shells([alone[1], alone[0], alone[2]])
    assert listed(moved) != listed(batch)  # control


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_the_number_of_shells_can_be_changed(count: int) -> None:
    graphs, sizes, _ = three()
    full = batch_shells([distance_shells(g, n, 8) for g, n in zip(graphs, sizes, strict=True)])
    wanted = batch_shells([distance_shells(g, n, count) for g, n in zip(graphs, sizes, strict=True)])
    changed = full.with_count(count)
    assert (listed(changed), changed.count) == (listed(wanted), count)
    assert listed(wanted.with_count(9)) == listed(wanted)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_both_back_ends_are_the_loop(count: int) -> None:
    batch = batch_shells(three(count)[2])
    h = features(batch.nodes).requires_grad_()
    loop = torch.zeros(len(batch.node), 3, dtype=torch.float64)
    rows = {row: place for place, row in enumerate(zip(batch.node.tolist(), batch.hop.tolist(), strict=True))}
    for v, k, u in listed(batch):
        loop[rows[v, k]] += h[u].detach()
    weights = features(len(loop), seed=1)
    dense = batch.dense(torch.float64)
    gradients = []
    for shells in (batch, dense):
        torch.testing.assert_close(shells.sums(h), loop, rtol=0, atol=1e-12)
        gradients.append(torch.autograd.grad((shells.sums(h) * weights).sum(), h)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    if count > 1:
        assert dense.masks.sum() == len(batch.members)
        assert torch.autograd.gradcheck(batch.sums, (h,))
        assert torch.autograd.gradgradcheck(batch.sums, (h,))


@pytest.mark.parametrize("size", [1, 4, 9, 100])
@pytest.mark.parametrize("most", [0, 8])
def test_sums_of_blocks_are_those_of_the_whole(size: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMBERS_SUMMED_AGAIN", most)
    batch = batch_shells(three()[2])
    h, weights = features(batch.nodes).requires_grad_(), features(len(batch.node), seed=1)
    slopes = torch.autograd.grad((batch.sums(h) * weights).sum(), h)[0]
    for shells in (batch, batch.dense(torch.float64)):
        blocks = list(shells.blocks(h, size))
        assert [len(block.node) for block in blocks[:-1]] == [size] * (len(blocks) - 1)
        assert torch.equal(torch.cat([block.node for block in blocks]), batch.node)
        assert torch.equal(torch.cat([block.hop for block in blocks]), batch.hop)
        sums = torch.cat([block.sums() for block in blocks])
        torch.testing.assert_close(sums, batch.sums(h), rtol=0, atol=1e-12)
        found = torch.autograd.grad((sums * weights).sum(), h)[0]
        torch.testing.assert_close(found, slopes, rtol=0, atol=1e-12)
    first = next(batch.blocks(h, size))
    assert (first.members is None) == (most == 0)
    if most == 0:
        return
    assert torch.autograd.gradgradcheck(lambda x: replace(first, source=x).sums(), (h,))
    alone = distance_shells(torch.empty(2, 0, dtype=torch.int64), 3)
    assert list(alone.blocks(h[:3], size)) == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, on first use
def test_transforms_see_the_same_sums() -> None:
    batch, h = batch_shells(three()[2]), features(13)
    value, tangent = torch.func.jvp(batch.sums, (h,), (h + 1,))
    torch.testing.assert_close(value, batch.sums(h), rtol=0, atol=1e-12)
    torch.testing.assert_close(tangent, batch.sums(h + 1), rtol=0, atol=1e-12)
    several = torch.func.vmap(batch.sums)(torch.stack((h, h + 1)))
    torch.testing.assert_close(several[1], batch.sums(h + 1), rtol=0, atol=1e-12)


def test_the_fuller_masks_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where masks are worth it at all, which on a CPU they are not."""
    complete = edges(*((u, v) for u in range(12) for v in range(u)))
    full = batch_shells([distance_shells(complete, 12)] * 3)
    path = distance_shells(edges(*((u, u + 1) for u in range(59))), 60)
    assert full.fastest() is full
    monkeypatch.setitem(module.CELLS_PER_ENTRY, "cpu", 4)
    assert hasattr(full.fastest(), "masks")
    assert not hasattr(full.fastest(gigabytes=1e-7), "masks")
    assert not hasattr(path.fastest(), "masks")
    assert not hasattr(distance_shells(complete, 12, 1).fastest(), "masks")


def test_shells_move_between_devices() -> None:
    batch = batch_shells(three()[2])
    there = batch.dense().to("meta")
    assert there.masks.device.type == there.members.device.type == "meta"
    assert there.sizes == batch.sizes
    assert batch.members.device.type == "cpu"


def test_what_is_too_large_says_how_much_it_needs() -> None:
    star = edges(*((0, leaf) for leaf in range(1, 400)))
    with pytest.raises(InputError, match=r"400 nodes need about 0\.0\d+ GB where 0\.001 GB"):
        distance_shells(star, 400, gigabytes=1e-3)
    kept = distance_shells(star, 400, 2, gigabytes=1e-3)  # control: fewer shells fit
    assert len(kept.members) == 2 * 399
    with pytest.raises(InputError, match=r"1 graphs of up to 400 nodes with 2 shells need 0\.00064 GB"):
        kept.dense(gigabytes=1e-4)


NONE = torch.empty(0, dtype=torch.int64)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: distance_shells(edges((0, 1)), 0), "at least one node, got 0"),
        (lambda: distance_shells(edges((0, 1)), 2, 0), "at least 1, got 0"),
        (lambda: distance_shells(edges((0, 2)), 2), "join nodes 0 … 1, got 0 … 2"),
        (lambda: distance_shells(edges((0, -1)), 2), "got -1 … 0"),
        (
            lambda: distance_shells(edges((0, 1)).double(), 2),
            "integers, sources above targets, got .*float64",
        ),
        (lambda: distance_shells(edges((0, 1)).bool(), 2), "got .*bool"),
        (lambda: distance_shells(edges((0, 1), (0, 1), (1, 0)).T, 2), r"got \(3, 2\)"),
        (lambda: distance_shells(edges((0, 1)), 2, gigabytes=0.0), "positive number of gigabytes"),
        (lambda: shells_of_distances(torch.zeros(2, 3, dtype=torch.int64)), r"square .* got \(2, 3\)"),
        (lambda: shells_of_distances(torch.eye(2)), "integers, got .*float32"),
        (lambda: shells_of_distances(torch.ones(2, 2, dtype=torch.int64)), "distance 0 from itself"),
        (lambda: shells_of_distances(torch.zeros(2, 2, dtype=torch.int64)), "and from no other"),
        (lambda: shells_of_distances(torch.zeros(0, 0, dtype=torch.int64)), "at least one node each"),
        (lambda: shells_of_pairs(NONE, NONE, NONE, [], 2), "at least one node each"),
        (lambda: shells_of_pairs(NONE, NONE, NONE, [3, 0], 2), r"sizes \[3, 0\]"),
        (lambda: shells_of_pairs(NONE, NONE, edges((0, 1))[0], [3], 2), "one length"),
        (lambda: shells_of_pairs(NONE, NONE, NONE.float(), [3], 2), "hops of pairs are integers"),
        (lambda: shells_of_pairs(*torch.tensor([[0], [3], [1]]), [3], 2), "sources of pairs lie in 0 … 2"),
        (lambda: shells_of_pairs(*torch.tensor([[0], [1], [1]]), [3], 1), "hops of pairs lie in 1 … 0"),
        (lambda: batch_shells([]), "got none"),
        (lambda: batch_shells([distance_shells(edges((0, 1)), 2, k) for k in (2, 3)]), r"got \[2, 3\]"),
        (lambda: distance_shells(edges((0, 1)), 2).with_count(0), "at least 1, got 0"),
    ],
)
def test_bad_input_is_named(build, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build()
