"""Positions against the definitions by dense matrices and against PyTorch Geometric's transforms."""

import pytest
import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn import positional_encodings as module
from gramian.nn.distances import distance_shells
from gramian.nn.graph import DistanceFilter
from gramian.nn.graph_network import GraphNetwork, TypeEncoder, head
from gramian.nn.init import initialise_
from gramian.nn.positional_encodings import PositionEncoder, flipped, laplacian_positions, walk_positions
from graphs import cycle, edges, random_graph

CLOSE = {"rtol": 0, "atol": 1e-10}
SIZES = [8, 40, 700]
"""Full, full, sparse."""


def adjacency(edge_index: Tensor, nodes: int) -> Tensor:
    a = torch.zeros(nodes, nodes, dtype=torch.float64)
    for u, v in edge_index.T.tolist():
        if u != v:
            a[u, v] = a[v, u] = 1
    return a


def laplacian(edge_index: Tensor, nodes: int) -> Tensor:
    a = adjacency(edge_index, nodes)
    scale = torch.where(a.sum(0) > 0, a.sum(0), torch.inf).rsqrt()
    return torch.eye(nodes, dtype=torch.float64) - scale[:, None] * a * scale


def spine(nodes: int, seed: int = 0) -> Tensor:
    """A connected graph with eigenvalues that differ: a path, a triangle, chords, loops, repetitions."""
    path = torch.stack((torch.arange(nodes - 1), torch.arange(1, nodes)))
    chords = torch.cat((random_graph(nodes, nodes // 8, seed), edges((0, min(2, nodes - 1)))), 1)
    return torch.cat((path, chords, path[:, :3], path[:1, :2].repeat(2, 1)), 1)


def laplacian_of(edge_index: Tensor, nodes: int, count: int) -> Tensor:
    return laplacian_positions(edge_index, nodes, count, dtype=torch.float64)


def walks_of(edge_index: Tensor, nodes: int, steps: int) -> Tensor:
    return walk_positions(edge_index, nodes, steps, dtype=torch.float64)


@pytest.mark.parametrize("nodes", SIZES)
def test_eigenvectors_are_those_of_the_smallest_eigenvalues_but_one(nodes: int) -> None:
    graph = spine(nodes)
    matrix, found = laplacian(graph, nodes), laplacian_of(graph, nodes, 5)
    values, vectors = torch.linalg.eigh(matrix)
    assert values[:7].diff().min() > 1e-7
    torch.testing.assert_close(matrix @ found, found * values[1:6], **CLOSE)
    torch.testing.assert_close((found.T @ vectors[:, 1:6]).abs(), torch.eye(5).double(), rtol=0, atol=1e-7)
    assert not torch.allclose(matrix @ found, found * values[:5], rtol=0, atol=1e-7)


@pytest.mark.parametrize("neighbours", [0, 1000])
def test_both_sparse_ways_equal_the_full_one(neighbours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = 120
    graph = spine(nodes)
    full = laplacian_of(graph, nodes, 4), walks_of(graph, nodes, 7)
    monkeypatch.setattr(module, "FEW_NEIGHBOURS", neighbours)
    for name in ("DENSE_NODES", "DENSE_NODES_OF_MANY_NEIGHBOURS"):
        monkeypatch.setattr(module, name, 0)
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", 7 * nodes)
    sparse = laplacian_of(graph, nodes, 4), walks_of(graph, nodes, 7)
    torch.testing.assert_close((full[0].T @ sparse[0]).abs(), torch.eye(4).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(sparse[1], full[1], **CLOSE)


@pytest.mark.parametrize("nodes", [2, *SIZES])
@pytest.mark.parametrize("steps", [1, 6])
def test_walks_return_as_often_as_powers_of_the_transition_matrix_say(nodes: int, steps: int) -> None:
    graph = spine(nodes)
    a = adjacency(graph, nodes)
    transition, power = a / a.sum(0), torch.eye(nodes, dtype=torch.float64)
    expected = []
    for _ in range(steps):
        power = transition @ power
        expected.append(power.diagonal())
    found = walks_of(graph, nodes, steps)
    torch.testing.assert_close(found, torch.stack(expected, 1), **CLOSE)
    assert found[:, 0].abs().max() == 0
    assert steps == 1 or found[:, 1].min() > 0


def test_a_triangle_and_a_square() -> None:
    """Closed forms: ((1)^k + 2 (−½)^k) / 3 and (1 + (−1)^k + 2·0^k) / 4."""
    graph = edges(*cycle(0, 1, 2), *cycle(3, 4, 5, 6))
    found = walks_of(graph, 7, 4)
    expected = torch.tensor([[(1 + 2 * (-0.5) ** k) / 3 for k in (1, 2, 3, 4)]] * 3 + [[0, 0.5, 0, 0.5]] * 4)
    torch.testing.assert_close(found, expected.double(), **CLOSE)


def test_positions_are_equivariant() -> None:
    nodes, generator = 14, torch.Generator().manual_seed(1)
    graph, order = spine(nodes), torch.randperm(nodes, generator=generator)
    moved = order[graph]
    plain, other = laplacian_of(graph, nodes, 5), laplacian_of(moved, nodes, 5)
    signs = (plain * other[order]).sum(0).sign()
    torch.testing.assert_close(other[order] * signs, plain, **CLOSE)
    assert not torch.allclose(other * signs, plain, rtol=0, atol=1e-3)
    torch.testing.assert_close(walks_of(moved, nodes, 5)[order], walks_of(graph, nodes, 5), **CLOSE)
    assert not torch.allclose(walks_of(moved, nodes, 5), walks_of(graph, nodes, 5), rtol=0, atol=1e-3)


def test_parts_are_told_apart_and_isolated_nodes_are_nowhere() -> None:
    """φ_1 of two parts is orthogonal to D^{1/2} 1 within the eigenvalue 0: constant over √degree in each."""
    graph, nodes = edges(*cycle(0, 1, 2), (4, 5), (5, 6)), 8
    found = laplacian_of(graph, nodes, 3)
    assert not found[[3, 7]].any()
    torch.testing.assert_close(found.T @ found, torch.eye(3).double(), **CLOSE)
    ratio = found[:, 0] / adjacency(graph, nodes).sum(0).sqrt()
    torch.testing.assert_close(ratio[[0, 1, 4, 5]], ratio[[1, 2, 5, 6]], **CLOSE)
    assert ratio[0] * ratio[4] < 0
    torch.testing.assert_close(laplacian(graph, nodes) @ found[:, 0], torch.zeros(8).double(), **CLOSE)
    assert not walks_of(graph, nodes, 4)[[3, 7]].any()


def test_columns_beyond_the_nodes_are_zero() -> None:
    path = edges((0, 1), (1, 2))
    found = laplacian_of(path, 3, 6)
    assert torch.linalg.matrix_rank(found) == 2
    assert not found[:, 2:].any()
    for nodes in (1, 4):
        assert torch.equal(laplacian_positions(edges(), nodes, 3), torch.zeros(nodes, 3))
        assert torch.equal(walk_positions(edges((0, 0)), nodes, 3), torch.zeros(nodes, 3))


def test_signs_flip_by_graph_and_column() -> None:
    sizes, generator = (9, 12), torch.Generator().manual_seed(0)
    graphs = [spine(size, seed) for seed, size in enumerate(sizes)]
    positions = torch.cat([laplacian_of(g, n, 4) for g, n in zip(graphs, sizes, strict=True)])
    owner = torch.arange(2, dtype=torch.int32).repeat_interleave(torch.tensor(sizes))
    draws = torch.stack([flipped(positions, owner, generator) / positions for _ in range(400)])
    signs = draws[:, [0, 9]]
    assert torch.equal(draws[:, :9], signs[:, :1].expand(-1, 9, -1))
    assert torch.equal(draws[:, 9:], signs[:, 1:].expand(-1, 12, -1))
    flat = signs.flatten(1)
    torch.testing.assert_close(flat.T @ flat / 400, torch.eye(8).double(), rtol=0, atol=0.25)
    assert flat.mean(0).abs().max() < 0.25
    once = flipped(positions, owner, generator)
    assert not torch.equal(once, positions)
    matrix = torch.block_diag(*(laplacian(g, n) for g, n in zip(graphs, sizes, strict=True)))
    for of_graph in (owner == 0, owner == 1):
        part, local = once[of_graph], matrix[of_graph][:, of_graph]
        values = torch.linalg.eigvalsh(local)[1:5]
        torch.testing.assert_close(local @ part, part * values, **CLOSE)
    mixed = positions * (1 - 2 * (torch.arange(21) % 2))[:, None]
    assert not torch.allclose(matrix[:9, :9] @ mixed[:9], mixed[:9] * values, rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # on import of the peer
@pytest.mark.parametrize("nodes", [12, 60, 130])
def test_pytorch_geometric_finds_the_same(nodes: int) -> None:
    """It wants undirected edges without loops and repetitions, and walks in float32."""
    transforms = pytest.importorskip("torch_geometric.transforms")
    data = pytest.importorskip("torch_geometric.data")
    graph = adjacency(spine(nodes), nodes).nonzero().T
    torch.manual_seed(0)  # its signs come from the global generator
    encode = transforms.AddLaplacianEigenvectorPE(4, is_undirected=True)
    theirs = encode(data.Data(edge_index=graph, num_nodes=nodes)).laplacian_eigenvector_pe
    ours = laplacian_positions(graph, nodes, 4)
    torch.testing.assert_close(ours * (ours * theirs).sum(0).sign(), theirs.float(), rtol=0, atol=1e-4)
    walked = transforms.AddRandomWalkPE(6)(data.Data(edge_index=graph, num_nodes=nodes)).random_walk_pe
    torch.testing.assert_close(walk_positions(graph, nodes, 6), walked, rtol=0, atol=1e-6)


def test_encoder_adds_what_a_linear_map_makes_of_positions() -> None:
    nodes = 10
    graph, x = spine(nodes), torch.arange(10) % 3
    positions = walk_positions(graph, nodes, 4)
    encoder = PositionEncoder(TypeEncoder([3], 6), 4, 6)
    initialise_(encoder, 0)
    with torch.no_grad():
        encoder.positions.bias.add_(0.5)
    expected = encoder.nodes(x) + positions @ encoder.positions.weight.T + 0.5
    torch.testing.assert_close(encoder((x, positions)), expected)
    torch.testing.assert_close(encoder((x, positions.double())), expected)
    network, shells = (
        GraphNetwork(encoder, [DistanceFilter(6, 5)], head(6, 2)),
        distance_shells(graph, nodes, 4),
    )
    out = network((x, positions), shells)
    assert not torch.allclose(out, network((x, torch.zeros_like(positions)), shells), rtol=1e-3)
    out.square().sum().backward()
    gradient = encoder.positions.weight.grad
    assert gradient is not None
    assert gradient[:, 1:].abs().min() > 0


PATH = edges((0, 1), (1, 2))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: laplacian_positions(PATH, 3, 0), "at least one column, got 0"),
        (lambda: walk_positions(PATH, 3, 0), "at least one step, got 0"),
        (lambda: laplacian_positions(PATH, 0, 2), "at least one node, got 0"),
        (lambda: walk_positions(PATH, 2, 2), "join nodes 0 … 1, got 0 … 2"),
        (lambda: walk_positions(PATH.double(), 3, 2), r"\(2, any\) tensor of integers"),
        (lambda: flipped(torch.ones(3, 2), torch.zeros(2).int()), "got 3 nodes and graphs"),
        (lambda: PositionEncoder(nn.Identity(), 0, 4), "positive sizes, got 0 and 4"),
        (
            lambda: PositionEncoder(nn.Identity(), 2, 4)((torch.ones(3, 4), torch.ones(3, 3))),
            r"floats in 2 columns, a row for each of 3 nodes, got \(3, 3\)",
        ),
        (
            lambda: PositionEncoder(nn.Identity(), 2, 4)((torch.ones(3, 4), torch.ones(2, 2))),
            r"a row for each of 3 nodes, got \(2, 2\)",
        ),
    ],
)
def test_what_is_given_wrongly_is_named(call, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()
