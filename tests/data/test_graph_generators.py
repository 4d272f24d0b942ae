"""Graph tasks that are made: recipes are kept, answers are those of slow obvious oracles."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gramian.data.graph_distances import diameter, distance_count, distances, eccentricity, shortest_paths
from gramian.data.graph_generators import (
    GENERATORS,
    SKIPS,
    circular_skip_links,
    cluster,
    pattern,
    ring_transfer,
    tree_neighbours_match,
)
from gramian.data.graphs import IGNORED, Graph, Graphs
from gramian.data.random_graphs import (
    FAMILIES,
    block_model,
    circle,
    connected,
    preferential,
    rewired,
    thin_tree,
)
from gramian.errors import InputError

FEW = {"sizes": (6, 2, 2)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adjacency(graph: Graph) -> Tensor:
    matrix = torch.zeros(len(graph.x), len(graph.x), dtype=torch.bool)
    matrix[graph.edge_index[0], graph.edge_index[1]] = True
    return matrix


def frequency(matrix: Tensor, rows: Tensor, columns: Tensor) -> tuple[float, int]:
    """The share of linked pairs between two sets of nodes, and the number of pairs, each counted once."""
    pairs = (rows[:, None] & columns).logical_or(columns[:, None] & rows).triu(1)
    return matrix[pairs].sum().item(), int(pairs.sum())


def oracle(matrix: Tensor) -> list[list[float]]:
    """Distances by Floyd and Warshall."""
    count, infinity = len(matrix), float("inf")
    apart = [
        [0.0 if i == j else 1.0 if matrix[i, j] else infinity for j in range(count)] for i in range(count)
    ]
    for k in range(count):
        for i in range(count):
            for j in range(count):
                apart[i][j] = min(apart[i][j], apart[i][k] + apart[k][j])
    return apart


def same(first: Graphs, second: Graphs) -> bool:
    return all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("x", "edge_index", "ptr", "y")
    )


MADE: list[tuple[str, dict]] = [
    ("pattern", FEW),
    ("cluster", FEW),
    ("csl", {}),
    ("tree_neighbours_match", FEW),
    ("ring_transfer", FEW),
    ("eccentricity", FEW),
    ("diameter", FEW),
    ("shortest_paths", FEW),
    ("distance_count", FEW),
]


@pytest.mark.parametrize(("name", "settings"), MADE)
def test_equal_seeds_give_equal_graphs_and_state_is_left_alone(name: str, settings: dict) -> None:
    make = GENERATORS[name]
    state = torch.get_rng_state()
    first, again, other = make(seed=1, **settings), make(seed=1, **settings), make(seed=2, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, again)
    assert not same(first, other)
    assert not first.directed
    assert first.simple().dropped == 0
    for split in first.splits:
        assert torch.equal(torch.cat(list(vars(split).values())).sort().values, torch.arange(len(first)))
    if settings:
        assert [len(part) for part in vars(first.splits[0]).values()] == [6, 2, 2]
        with pytest.raises(InputError, match="sizes must be three numbers"):
            make(sizes=(5, 0, 5))


def test_every_generator_is_named() -> None:
    assert set(GENERATORS) == {name for name, _ in MADE} | {"superpixels"}


def within(found: tuple[float, int], chance: float) -> bool:
    """Whether a frequency is that of a chance, to four standard deviations."""
    linked, pairs = found
    return abs(linked / pairs - chance) < 4 * (chance * (1 - chance) / pairs) ** 0.5


def summed(
    graphs: Graphs, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]
) -> tuple[float, int]:
    found = [
        frequency(adjacency(graph), first(graph.y), second(graph.y))
        for graph in (graphs[number] for number in range(len(graphs)))
    ]
    return sum(each[0] for each in found), sum(each[1] for each in found)


def test_a_block_model_has_the_frequencies_of_its_blocks() -> None:
    blocks = torch.tensor([0, 1, 1, 2, 2, 2]).repeat(20)
    matrix = block_model(blocks, 0.55, 0.25, generator())
    assert torch.equal(matrix, matrix.T)
    assert not matrix.diagonal().any()
    inside = sum(torch.tensor(frequency(matrix, blocks == each, blocks == each)) for each in range(3))
    across = torch.tensor(frequency(matrix, blocks < 9, blocks < 9)) - inside
    assert within((inside[0].item(), int(inside[1])), 0.55)
    assert within((across[0].item(), int(across[1])), 0.25)
    assert not within((across[0].item(), int(across[1])), 0.3)  # control


def test_clusters() -> None:
    graphs = cluster((20, 5, 5))
    assert (graphs.task, graphs.outputs, graphs.node_types) == ("node", 6, (7,))
    for number in range(len(graphs)):
        graph = graphs[number]
        sizes = graph.y.bincount(minlength=6)
        assert sizes.min() >= 5
        assert sizes.max() <= 34
        told = graph.x > 0
        assert torch.equal(graph.x[told].sort().values, torch.arange(1, 7))
        assert torch.equal(graph.y[told], graph.x[told] - 1)
    inside = [summed(graphs, lambda y, r=r: y == r, lambda y, r=r: y == r) for r in range(6)]
    assert within((sum(each[0] for each in inside), sum(each[1] for each in inside)), 0.55)
    across = summed(graphs, lambda y: y < 2, lambda y: y > 2)
    assert within(across, 0.25)
    assert not within(across, 0.35)  # control


def test_patterns() -> None:
    graphs = pattern((20, 5, 5), patterns=2)
    assert (graphs.task, graphs.outputs, graphs.node_types) == ("node", 2, (3,))
    assert within(summed(graphs, lambda y: y == 1, lambda y: y == 0), 0.5)
    among_others = summed(graphs, lambda y: y == 0, lambda y: y == 0)
    assert 0.35 < among_others[0] / among_others[1] < 0.45  # 0.35 and some 0.5 within the five communities
    assert not within(among_others, 0.5)  # control

    def inner(graph: Graph) -> tuple[list[int], list[int]]:
        own = graph.y == 1
        return adjacency(graph)[own][:, own].sum(1).sort().values.tolist(), graph.x[
            own
        ].sort().values.tolist()

    assert inner(graphs[0]) == inner(graphs[2]) == inner(graphs[28])  # the same pattern again
    assert inner(graphs[0]) != inner(graphs[1])
    with pytest.raises(InputError, match="patterns must be at least 1"):
        pattern(patterns=0)


def isomorphic(first: Tensor, second: Tensor) -> bool:
    """Search a renumbering of the first graph's nodes that gives the second, by backtracking."""
    count = len(first)
    order = [0]
    for node in order:
        order += [each for each in first[node].nonzero()[:, 0].tolist() if each not in order]
    before = [[order.index(each) for each in first[node].nonzero()[:, 0].tolist()] for node in order]
    linked = [set(row.nonzero()[:, 0].tolist()) for row in second]

    def extend(images: list[int]) -> bool:
        place = len(images)
        if place == count:
            return True
        earlier = [images[each] for each in before[place] if each < place]
        candidates = set.intersection(*(linked[each] for each in earlier)) if earlier else set(range(count))
        return any(
            len(linked[each] & set(images)) == len(earlier) and extend([*images, each])
            for each in candidates - set(images)
        )

    return extend([])


def test_circular_skip_links() -> None:
    graphs = circular_skip_links()
    assert (len(graphs), graphs.outputs, graphs.node_types) == (150, 10, (1,))
    assert torch.equal(graphs.y.bincount(), torch.full((10,), 15))
    assert torch.equal(graphs.ptr.diff(), torch.full((150,), 41))
    matrices = [adjacency(graphs[number]) for number in range(150)]
    assert all((matrix.sum(0) == 4).all() for matrix in matrices)
    for label in range(10):
        here = matrices[15 * label]
        assert all(isomorphic(here, matrices[15 * label + copy]) for copy in (1, 14))
        assert all(not isomorphic(here, matrices[15 * other]) for other in range(label))
    assert graphs.classes == SKIPS
    assert [len(part) for part in vars(graphs.splits[0]).values()] == [90, 30, 30]
    assert len(graphs.splits) == 5
    assert torch.equal(graphs.y[graphs.splits[3].test].bincount(), torch.full((10,), 3))
    with pytest.raises(InputError, match="at least 5 copies"):
        circular_skip_links(copies=4)


def test_the_search_for_a_renumbering_finds_and_refuses() -> None:
    """A hexagon and two triangles have the same degrees, a renumbered hexagon is one."""
    hexagon, triangles = torch.zeros(2, 6, 6, dtype=torch.bool)
    hexagon[tuple(circle(6, 1))] = True
    triangles[tuple(torch.cat((circle(3, 1), circle(3, 1) + 3), 1))] = True
    order = torch.randperm(6, generator=generator())
    assert isomorphic(hexagon, hexagon[order][:, order])
    assert not isomorphic(hexagon, triangles)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_trees_whose_root_asks_for_a_leaf(depth: int) -> None:
    graphs = tree_neighbours_match((2, 1, 1), depth=depth)
    leaves = 2**depth
    assert graphs.node_types == (leaves + 1, leaves + 1)
    assert graphs.outputs == leaves
    for number in range(len(graphs)):
        graph = graphs[number]
        matrix = adjacency(graph)
        assert len(matrix) == 2 * leaves - 1
        assert matrix.sum() == 2 * (len(matrix) - 1)
        ends = [node for node in range(len(matrix)) if matrix[node].sum() == 1 and node]
        assert {distances(matrix)[0, node].item() for node in ends} == {depth}
        assert graph.x[ends, 0].tolist() == list(range(1, leaves + 1))
        assert sorted(graph.x[ends, 1].tolist()) == list(range(1, leaves + 1))
        middle = [node for node in range(1, len(matrix)) if node not in ends]
        assert not graph.x[middle].any()
        asked = [node for node in ends if graph.x[node, 0] == graph.x[0, 0]]
        assert graphs.classes[graph.y[0]] == graph.x[asked[0], 1]
        assert (graph.y[1:] == IGNORED).all()
    told = {tuple(graphs[number].x.flatten().tolist()) for number in range(len(graphs))}
    assert len(told) == len(graphs)  # no two are the same


def test_trees_with_edges_to_the_root_alone() -> None:
    graph = tree_neighbours_match((1, 1, 1), depth=3, directed=True)[0]
    child, parent = graph.edge_index
    assert torch.equal(child.sort().values, torch.arange(1, 15))
    assert (parent < child).all()
    assert torch.equal(parent.bincount(), torch.full((7,), 2))


def test_more_trees_than_there_are() -> None:
    assert len(tree_neighbours_match((94, 1, 1), depth=2)) == 4 * 24
    with pytest.raises(InputError, match="there are 96 trees of depth 2, fewer than 97"):
        tree_neighbours_match((95, 1, 1), depth=2)
    with pytest.raises(InputError, match="depth of the trees must be 1 to 9"):
        tree_neighbours_match(depth=0)


@pytest.mark.parametrize("distance", [2, 7, 40])
def test_rings_hold_the_class_on_the_other_side(distance: int) -> None:
    graphs = ring_transfer((10, 6, 5), distance=distance, classes=4)
    assert graphs.outputs == 4
    for number in range(len(graphs)):
        graph = graphs[number]
        apart = distances(adjacency(graph))[0]
        assert len(graph.x) == 2 * distance
        assert apart[distance] == apart.max() == distance
        assert graph.x[distance].tolist() == [float(label == graph.y[0]) for label in range(4)]
        assert not graph.x[0].any()
        assert (graph.x.sum(1) == 4).sum() == 2 * distance - 2
        assert (graph.y[1:] == IGNORED).all()
    for part in vars(graphs.splits[0]).values():
        counts = torch.stack([graphs[int(number)].y[0] for number in part]).bincount(minlength=4)
        assert counts.max() - counts.min() <= 1
    for wrong in ({"distance": 1}, {"classes": 1}):
        with pytest.raises(InputError, match="rings need a distance and classes of at least 2"):
            ring_transfer(**wrong)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("nodes", [4, 12, 17])
def test_families(family: str, nodes: int) -> None:
    make, _ = FAMILIES[family]
    for seed in range(4):
        matrix = make(nodes, generator(seed))
        assert matrix.shape == (nodes, nodes)
        assert torch.equal(matrix, matrix.T)
        assert not matrix.diagonal().any()
        edges, parts = int(matrix.sum()) // 2, number_of_parts(matrix)
        if family in ("tree", "line", "star", "caterpillar", "lobster"):
            assert (edges, parts) == (nodes - 1, 1)
        if family in ("grid", "ladder", "preferential"):
            assert parts == 1


def number_of_parts(matrix: Tensor) -> int:
    return len({tuple(row.isfinite().tolist()) for row in distances(matrix)})


def test_families_by_hand() -> None:
    made = {name: FAMILIES[name][0](12, generator()) for name in FAMILIES}
    assert int(made["grid"].sum()) // 2 == 3 * 3 + 2 * 4  # 3 x 4
    assert distances(made["grid"]).max() == 5
    assert number_of_parts(made["cliques"]) == 3
    assert (made["cliques"].sum(0) == 3).all()
    assert int(made["ladder"].sum()) // 2 == 2 * 5 + 6
    assert distances(made["ladder"]).max() == 6
    assert distances(made["line"]).max() == 11
    assert made["star"].sum(0).tolist() == [11] + [1] * 11
    legs = made["caterpillar"].sum(0) == 1
    assert is_a_line(made["caterpillar"][~legs][:, ~legs])
    inner = made["lobster"].sum(0) > 1
    bare = made["lobster"][inner][:, inner]
    bare = bare[bare.sum(0) > 1][:, bare.sum(0) > 1]
    assert is_a_line(bare)
    degrees = preferential(400, generator(), 1).sum(0)
    assert degrees.max() > 12  # a tree whose nodes are all alike has hardly any with more
    assert sum(share for _, share in FAMILIES.values()) == pytest.approx(1)


def is_a_line(matrix: Tensor) -> bool:
    return len(matrix) < 2 or (number_of_parts(matrix) == 1 and sorted(matrix.sum(0).tolist())[:2] == [1, 1])


@pytest.mark.parametrize("chance", [0.1, 0.4, 0.8])
def test_rewiring_keeps_the_expected_number_of_edges(chance: float) -> None:
    before = block_model(torch.zeros(20, dtype=torch.long), chance, chance, generator(3))
    draws = torch.stack([rewired(before, 0.3, generator(seed)) for seed in range(400)])
    assert torch.equal(draws, draws.transpose(1, 2))
    assert not draws.diagonal(dim1=1, dim2=2).any()
    counts = draws.sum((1, 2)) / 2
    edges = before.sum() / 2
    assert abs(counts.mean() - edges) < 4 * counts.std() / 20
    kept = draws[:, before].float().mean()
    others = 190 - edges
    assert kept.item() == pytest.approx(1 - 0.3 * min(1, (others / edges).item()), abs=0.02)
    assert torch.equal(rewired(before, 0, generator()), before)


def test_parts_are_connected_by_as_few_edges_as_can_be() -> None:
    cliques = FAMILIES["cliques"][0](16, generator())
    whole = connected(cliques, generator())
    assert number_of_parts(cliques) == 4
    assert number_of_parts(whole) == 1
    assert (whole & cliques).equal(cliques)
    assert int(whole.sum() - cliques.sum()) // 2 == 3
    assert connected(whole, generator()).equal(whole)


def test_distances_are_those_of_the_oracle() -> None:
    matrix = block_model(torch.zeros(14, dtype=torch.long), 0.12, 0.12, generator(2))
    assert distances(matrix).tolist() == oracle(matrix)
    assert distances(matrix).isinf().any()  # in parts
    spoiled = matrix.clone()
    first, second = matrix.nonzero()[0]
    spoiled[first, second] = spoiled[second, first] = False
    assert distances(spoiled).tolist() != oracle(matrix)


@pytest.mark.parametrize("make", [eccentricity, diameter, shortest_paths])
def test_tasks_about_distances_have_exact_answers(make: Callable[..., Graphs]) -> None:
    graphs = make((12, 2, 2), seed=4)
    wrong = 0
    for number in range(len(graphs)):
        graph = graphs[number]
        matrix = adjacency(graph)
        assert 15 <= len(matrix) < 25
        apart = oracle(matrix)
        farthest = [max(row) for row in apart]
        if make is eccentricity:
            expected = [[each] for each in farthest]
        elif make is diameter:
            expected = [[max(farthest)]]
        else:
            assert graph.x[:, 0].sum() == 1
            expected = [[each] for each in apart[int(graph.x[:, 0].argmax())]]
        assert graph.y.tolist() == expected
        wrong += graph.y.tolist() != [[each] for each in apart[0]]
        assert graph.x.shape[1] == (2 if make is shortest_paths else 1)
        assert 0 <= graph.x[:, -1].min() <= graph.x[:, -1].max() < 1
    assert wrong > 0  # control: distances from another node are another answer


@pytest.mark.parametrize("distance", [1, 3, 10])
def test_marked_nodes_at_one_distance_are_counted(distance: int) -> None:
    graphs = distance_count((4, 1, 1), distance=distance, seed=1)
    for number in range(len(graphs)):
        graph = graphs[number]
        apart = oracle(adjacency(graph))

        def counted(at: int, graph: Graph = graph, apart: list[list[float]] = apart) -> list[list[float]]:
            rows = range(len(graph.x))
            return [[float(sum(apart[v][u] == at and bool(graph.x[u]) for u in rows))] for v in rows]

        assert len(graph.x) == 4 * distance + 4
        assert graph.y.tolist() == counted(distance)
        assert graph.y.tolist() != counted(distance + 1)
        assert graph.y.max() > 0


def test_thin_trees_are_long() -> None:
    for window, steps in ((1, 1.0), (3, 0.5), (7, 0.25)):
        matrix = thin_tree(400, window, generator())
        assert int(matrix.sum()) == 2 * 399
        assert number_of_parts(matrix) == 1
        assert (distances(matrix)[0, 200:] / torch.arange(200, 400)).mean() == pytest.approx(steps, rel=0.15)
        assert all(first < second <= first + window for first, second in matrix.triu().nonzero().tolist())


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (eccentricity, {"families": ("bush",)}, "got bush"),
        (diameter, {"families": ()}, "got none"),
        (diameter, {"nodes": (3, 9)}, "nodes must be from at least 4"),
        (shortest_paths, {"nodes": (9, 9)}, "nodes must be from at least 4"),
        (shortest_paths, {"rewiring": 1.5}, "rewiring between 0 and 1"),
        (shortest_paths, {"rewiring": float("nan")}, "rewiring between 0 and 1"),
        (distance_count, {"distance": 0}, "must be at least 1"),
        (distance_count, {"window": 0}, "must be at least 1"),
        (distance_count, {"distance": 5, "nodes": 5}, "more than the distance"),
    ],
)
def test_settings_that_cannot_be(make: Callable[..., Graphs], settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**settings)


def test_long_lines_have_long_distances() -> None:
    graphs = diameter((3, 1, 1), nodes=(60, 61), families=("line",), rewiring=0)
    assert (graphs.y == 59).all()
