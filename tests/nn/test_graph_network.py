"""Networks that filter by distance: what they tell apart, their published sizes, their parts."""

import math

import pytest
import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn import shells as module
from gramian.nn.distances import distance_shells
from gramian.nn.graph import DistanceFilter
from gramian.nn.graph_network import FeatureEncoder, GraphNetwork, TypeEncoder, head, optimiser_groups
from gramian.nn.init import initialise_
from gramian.nn.recurrence import LinearRecurrence
from gramian.nn.shells import Shells, batch_shells
from graphs import cycle, edges, random_graph, randomised, three

CLOSE = {"rtol": 0, "atol": 1e-10}


def network(readout: str = "sum", **options) -> GraphNetwork:
    layers = [DistanceFilter(6, 5, **options) for _ in range(3)]
    encoders = {"edges": TypeEncoder([3], 6)} if readout == "nodes" else {}
    return randomised(GraphNetwork(TypeEncoder([4], 6), layers, head(6, 2), readout=readout, **encoders))


HEXAGON = edges(*cycle(0, 1, 2, 3, 4, 5))
TRIANGLES = edges(*cycle(0, 1, 2), *cycle(3, 4, 5))
DECALIN = edges(*cycle(0, 1, 2, 3, 4, 5), (0, 6), (6, 7), (7, 8), (8, 9), (9, 5))
BICYCLOPENTYL = edges(*cycle(0, 1, 2, 3, 4), *cycle(5, 6, 7, 8, 9), (0, 5))
SQUARES = [(a, b, c, d) for a in range(4) for b in range(4) for c in range(4) for d in range(4)]
ROOK = edges(*((4 * a + b, 4 * c + d) for a, b, c, d in SQUARES if (a == c) != (b == d)))
STEPS = {(0, 1), (0, 3), (1, 0), (3, 0), (1, 1), (3, 3)}
SHRIKHANDE = edges(*((4 * a + b, 4 * c + d) for a, b, c, d in SQUARES if ((c - a) % 4, (d - b) % 4) in STEPS))


@pytest.mark.parametrize(
    ("one", "other", "nodes", "told_from"),
    [
        pytest.param(HEXAGON, TRIANGLES, 6, 3, id="hexagon and two triangles"),
        pytest.param(DECALIN, BICYCLOPENTYL, 10, 4, id="decalin and bicyclopentyl"),
        pytest.param(ROOK, SHRIKHANDE, 16, math.inf, id="rook's graph and Shrikhande's"),
    ],
)
def test_what_is_told_apart_from_how_many_shells_on(
    one: Tensor, other: Tensor, nodes: int, told_from: float
) -> None:
    """With one hop not more than colour refinement does; never what has equal numbers at all distances."""
    model, x = network(), torch.zeros(nodes, dtype=torch.int64)
    for count in (1, 2, 3, 4, 5, 7):
        a, b = (model(x, distance_shells(graph, nodes, count)) for graph in (one, other))
        if count < told_from:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        else:
            assert ((a - b).abs() / a.abs().max()).max() > 1e-4


def test_rook_and_shrikhande_are_what_they_are_said_to_be() -> None:
    """Both are regular of degree 6 with two common neighbours of any two nodes; only one has 4-cliques."""
    cliques = []
    for graph in (ROOK, SHRIKHANDE):
        a = torch.zeros(16, 16)
        a[graph[0], graph[1]] = 1
        assert torch.equal(a, a.T)
        assert torch.equal(a @ a, 4 * torch.eye(16) + 2)
        neighbours = [set(row.nonzero().flatten().tolist()) for row in a]
        cliques.append(
            sum(
                len(neighbours[u] & neighbours[v] & neighbours[w]) > 0
                for u, v in graph.T.tolist()
                for w in neighbours[u] & neighbours[v]
            )
        )
    assert cliques[0] > 0
    assert cliques[1] == 0


PUBLISHED = [
    pytest.param(
        11, 72, 72, lambda d: TypeEncoder([28], d), lambda d: TypeEncoder([4], d), 1, 483_049, id="zinc"
    ),
    pytest.param(4, 128, 96, lambda d: FeatureEncoder(3, d), None, 10, 482_314, id="mnist"),
    pytest.param(8, 96, 64, lambda d: FeatureEncoder(5, d), None, 10, 510_058, id="cifar10"),
    pytest.param(10, 72, 64, lambda d: TypeEncoder([7], d, projected=False), None, 2, 400_010, id="pattern"),
    pytest.param(16, 64, 64, lambda d: TypeEncoder([7], d, projected=False), None, 6, 536_390, id="cluster"),
]


@pytest.mark.parametrize(("depth", "width", "state", "nodes", "bonds", "outputs", "number"), PUBLISHED)
def test_published_networks_have_their_numbers_of_parameters(
    depth: int, width: int, state: int, nodes, bonds, outputs: int, number: int
) -> None:
    layers = [DistanceFilter(width, state) for _ in range(depth)]
    last = head(width, outputs, hidden=bonds is not None)
    model = GraphNetwork(nodes(width), layers, last, edges=bonds(width) if bonds else None)
    assert sum(p.numel() for p in model.parameters()) == number


def inputs(shells: Shells, graphs: list[Tensor], seed: int = 0) -> tuple[Tensor, Shells, Tensor, Tensor]:
    """Types of nodes, shells, edges of the batch and their types."""
    generator = torch.Generator().manual_seed(seed)
    offsets = [sum(shells.sizes[:place]) for place in range(len(graphs))]
    index = torch.cat([g + o for g, o in zip(graphs, offsets, strict=True)], 1)
    types = torch.randint(4, (shells.nodes,), generator=generator)
    return types, shells, index, torch.randint(3, (index.shape[1],), generator=generator)


@pytest.mark.parametrize("readout", ["sum", "mean"])
def test_graphs_of_a_batch_are_as_alone(readout: str) -> None:
    model = network(readout)
    graphs, shells = three(5)
    x = inputs(shells, graphs)[0]
    parts = zip(graphs, x.split(list(shells.sizes)), strict=True)
    alone = [model(types, distance_shells(g, len(types), 5)) for g, types in parts]
    torch.testing.assert_close(model(x, shells), torch.cat(alone), **CLOSE)
    assert (alone[0] - alone[2]).abs().max() > 1e-2  # control


def test_a_read_out_forgets_the_order_of_nodes() -> None:
    graph, order = random_graph(9, 12, 1), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    x = torch.arange(9) % 4
    plain, moved = distance_shells(graph, 9, 5), distance_shells(order.argsort()[graph], 9, 5)
    for readout in ("sum", "mean"):
        model = network(readout)
        torch.testing.assert_close(model(x[order], moved), model(x, plain), **CLOSE)
        assert (model(x[order], plain) - model(x, plain)).abs().max() > 1e-3  # control
    model = network("nodes")
    types = torch.arange(12) % 3
    found = model(x[order], moved, order.argsort()[graph], types)
    torch.testing.assert_close(found, model(x, plain, graph, types)[order], **CLOSE)


def test_edges_are_averaged_over_those_into_a_node() -> None:
    model = network("nodes")
    graphs, shells = three(5)
    x, _, index, types = inputs(shells, graphs)
    encoded, start = model.edges(types), model.nodes(x)
    for v in range(shells.nodes):
        into = [e for e, (u, w) in enumerate(index.T.tolist()) if w == v and u != v]
        if into:
            start[v] = start[v] + torch.stack([encoded[e] for e in into]).mean(0)
    for layer in model.layers:
        start = layer(start, shells)
    assert (index[0] == index[1]).any()  # there are loops to leave out
    torch.testing.assert_close(model(x, shells, index, types), model.head(start), **CLOSE)
    other = model(x, shells, index.flip(0), types)
    assert (other - model.head(start)).abs().max() > 1e-3  # control: an edge leads to its target


def test_the_back_end_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CELLS_PER_ENTRY, "cpu", 4)
    complete = edges(*((u, v) for u in range(7) for v in range(u)))
    shells = batch_shells([distance_shells(complete, 7, 3)] * 2)
    assert shells.fastest() is not shells
    model, x = network(), torch.arange(14) % 4
    h = model.nodes(x)
    for layer in model.layers:
        h = layer(h, shells)
    pooled = torch.stack((h[:7].sum(0), h[7:].sum(0)))
    torch.testing.assert_close(model(x, shells), model.head(pooled), **CLOSE)


def test_columns_of_types_are_added() -> None:
    encoder = randomised(TypeEncoder([3, 5], 4))
    types = torch.tensor([[0, 4], [2, 1]])
    expected = encoder.tables[0].weight[[0, 2]] + encoder.tables[1].weight[[4, 1]]
    torch.testing.assert_close(encoder(types), encoder.projection(expected), **CLOSE)
    torch.testing.assert_close(encoder(types.to(torch.uint8)), encoder(types), **CLOSE)
    plain = randomised(TypeEncoder([3], 4, projected=False))
    assert torch.equal(plain(torch.tensor([2, 0])), plain.tables[0].weight[[2, 0]])


def test_the_start_is_a_function_of_the_seed() -> None:
    def build(seed: int) -> GraphNetwork:
        return GraphNetwork(TypeEncoder([100], 64), [DistanceFilter(64, 5)], head(64, 2), seed=seed)

    one, other, third = build(0), build(0), build(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.nodes.tables[0].weight, third.nodes.tables[0].weight)
    assert one.nodes.tables[0].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert one.head[0].weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert one.layers[0].recurrence.magnitudes().max() < 1


def test_groups_are_the_published_ones() -> None:
    model = network("nodes")
    groups = optimiser_groups(model, 1e-3, 0.1, recurrence_factor=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [{names[id(p)].split(".", 1)[1] for p in group["params"]} for group in groups]
    recurrent = {"b_re", "b_im", "nu_log", "theta_log", "gamma_log"}
    assert {name.rsplit(".", 1)[1] for name in found[0]} == recurrent
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert len({id(p) for group in groups for p in group["params"]}) == len(names)
    assert all(p.ndim < 2 or "table" in names[id(p)] for p in groups[1]["params"])
    assert {names[id(p)] for p in groups[1]["params"]} > {"nodes.tables.0.weight", "layers.0.norm.weight"}
    assert {"layers.0.recurrence.c_re", "head.0.weight"} < {names[id(p)] for p in groups[2]["params"]}
    assert [group["weight_decay"] for group in groups] == [0.0, 0.0, 0.1]
    assert [group["lr"] for group in groups] == [5e-4, 1e-3, 1e-3]
    torch.optim.AdamW(groups)
    for part in model.modules():
        if isinstance(part, LinearRecurrence):
            part.requires_grad_(False)
    frozen = optimiser_groups(model, 1e-3, 0.1)
    assert frozen[0]["params"] == []


def test_a_network_learns_what_lies_five_edges_away() -> None:
    """On a path with marked nodes: does the node at distance 5 ahead carry the mark? Two shells cannot."""
    path = edges(*((u, u + 1) for u in range(39)))
    marks = torch.randint(2, (40,), generator=torch.Generator().manual_seed(0))
    target = torch.zeros(40, dtype=torch.float64)
    for v in range(40):
        target[v] = sum(int(marks[u]) for u in (v - 5, v + 5) if 0 <= u < 40)

    def error(count: int) -> float:
        layers = [DistanceFilter(16, 16, r_min=0.8)]
        model = GraphNetwork(TypeEncoder([2], 16), layers, head(16, 1), readout="nodes", seed=1).double()
        shells = distance_shells(path, 40, count)
        optimiser = torch.optim.AdamW(optimiser_groups(model, 1e-2, 0.0))
        for _ in range(150):
            optimiser.zero_grad()
            loss = (model(marks, shells)[:, 0] - target).square().mean()
            loss.backward()
            optimiser.step()
        return loss.item()

    assert error(6) < 0.05
    assert error(2) > 0.2


def plain(**options) -> GraphNetwork:
    return GraphNetwork(TypeEncoder([4], 6), [DistanceFilter(6, 5)], head(6, 2), **options)


def alone(count: int = 2) -> Shells:
    return distance_shells(edges((0, 1)), 2, count)


TYPES = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TypeEncoder([], 4), "at least one type each"),
        (lambda: TypeEncoder([3, 0], 4), r"got \[3, 0\] and 4"),
        (lambda: TypeEncoder([3], 4)(torch.tensor([0, 3])), "types of column 0 lie in 0 … 2, got 0 … 3"),
        (lambda: TypeEncoder([3], 4)(torch.tensor([-1, 0])), "got -1 … 0"),
        (lambda: TypeEncoder([3], 4)(torch.tensor([0.0, 1.0])), "integers in 1 columns, got .*float32"),
        (lambda: TypeEncoder([3, 3], 4)(TYPES), r"2 columns, got \(2,\)"),
        (lambda: FeatureEncoder(0, 4), "positive sizes, got 0 and 4"),
        (lambda: FeatureEncoder(2, 4)(torch.ones(3, 5)), r"2 columns, got \(3, 5\)"),
        (
            lambda: FeatureEncoder(2, 4)(torch.ones(3, 2, dtype=torch.int64)),
            "floats in 2 columns, got .*int64",
        ),
        (lambda: FeatureEncoder(2, 4)(torch.tensor([[0.0, math.nan]])), "finite, got NaN"),
        (lambda: FeatureEncoder(2, 4)(torch.tensor([[0.0, math.inf]])), "or infinity"),
        (lambda: head(4, 0), "positive sizes, got 4 and 0"),
        (lambda: GraphNetwork(nn.Identity(), [], nn.Identity()), "at least one layer"),
        (lambda: plain(readout="max"), "unknown read-out 'max'; choose one of sum, mean, nodes"),
        (lambda: plain()(torch.tensor([0, 1, 1]), alone()), "those of 2 nodes, got features of 3"),
        (lambda: plain()(TYPES, alone(), edges((0, 1)), TYPES[:1]), "to a network that encodes them"),
        (
            lambda: plain(edges=TypeEncoder([3], 6))(TYPES, alone()),
            "features of edges are given with the edges",
        ),
        (
            lambda: plain(edges=TypeEncoder([3], 6))(TYPES, alone(), edges((0, 1)), TYPES),
            "got 1 edges and 2 features",
        ),
        (
            lambda: plain(edges=TypeEncoder([3], 6))(TYPES, alone(), edges((0, 2)), TYPES[:1]),
            "join nodes 0 … 1, got 0 … 2",
        ),
        (lambda: optimiser_groups(nn.Identity(), 1e-3, 0.0), "no trainable parameter"),
        (lambda: optimiser_groups(plain(), 0.0, 0.0), "positive rate and factor"),
        (lambda: optimiser_groups(plain(), 1e-3, -1.0), "at least 0, got 0.001, 1 and -1"),
    ],
)
def test_bad_input_is_named(build, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build()


def test_initialise_reaches_every_part() -> None:
    model = plain()
    initialise_(model, 5)
    assert torch.equal(next(model.parameters()), next(plain(seed=5).parameters()))
