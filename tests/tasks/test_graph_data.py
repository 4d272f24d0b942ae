"""Batches of graphs for training: what is read, who is in which shell, what is kept, whose sign flips."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gramian.data.graph_arrays import save_npz
from gramian.data.graph_generators import GENERATORS, cluster, ring_transfer
from gramian.data.graph_splits import Split, consecutive
from gramian.data.graphs import IGNORED, Graph, Graphs, flat
from gramian.errors import InputError
from gramian.tasks import graph_data
from gramian.tasks.graph_data import Sample, Sampler, Source
from gramian.tasks.graph_models import Architecture

ONE_HOP = Architecture(hops=1)


def path(nodes: int, *, both: bool = True) -> Tensor:
    """The edges 0 → 1 → 2 …, and back."""
    there = torch.stack((torch.arange(nodes - 1), torch.arange(1, nodes)))
    return torch.cat((there, there.flip(0)), 1) if both else there


def several(*edges_and_nodes: tuple[Tensor, int], task: str = "regression") -> Graphs:
    """Graphs with the number of a node as its feature and the number of the graph as its target."""
    graphs = [
        Graph(torch.arange(nodes)[:, None].float(), edges, torch.tensor([[float(number)]]))
        for number, (edges, nodes) in enumerate(edges_and_nodes)
    ]
    return flat("several", task, graphs)


def thirds(graphs: Graphs) -> Split:
    return consecutive((len(graphs) - 2, 1, 1))


def searched(edges: Tensor, nodes: int, directed: bool) -> dict[tuple[int, int], int]:
    """Distance by (reached, from), breadth first, one node at a time."""
    onward: dict[int, set[int]] = {node: set() for node in range(nodes)}
    for u, v in edges.T.tolist():
        onward[u].add(v)
        if not directed:
            onward[v].add(u)
    found = {}
    for start in range(nodes):
        known, rim, distance = {start}, {start}, 0
        while rim:
            distance += 1
            rim = {v for u in rim for v in onward[u]} - known
            known |= rim
            found |= {(v, start): distance for v in rim}
    return found


def pairs(sample: Sample) -> dict[tuple[int, int], int]:
    """Distance by (node, member) as the shells of a batch have it."""
    shells = sample.shells
    rows = zip(shells.node.tolist(), shells.hop.tolist(), strict=True)
    return {
        (node, member): hop
        for row, (node, hop) in enumerate(rows)
        for member in shells.members[shells.starts[row] : shells.starts[row + 1]].tolist()
    }


def expected(graphs: Graphs, numbers: Sequence[int], directed: bool, most: int) -> dict[tuple[int, int], int]:
    found, before = {}, 0
    for number in numbers:
        graph = graphs[number]
        here = searched(graph.edge_index, len(graph.x), directed)
        found |= {(v + before, u + before): d for (v, u), d in here.items() if d <= most}
        before += len(graph.x)
    return found


NONE = torch.zeros(2, 0, dtype=torch.long)
ODD = several(
    (path(6), 6),  # a path
    (NONE, 1),  # one node
    (NONE, 3),  # no edges
    (torch.tensor([[0, 1, 3, 4], [1, 0, 4, 3]]), 6),  # two parts and two isolated nodes
    (path(4), 4),
    (path(3), 3),
)
ONE_WAY = several(
    (path(5, both=False), 5), (torch.tensor([[0, 1, 2], [1, 2, 0]]), 4), (path(3), 3), (NONE, 2)
)


@pytest.mark.parametrize("graphs", [ODD, ONE_WAY], ids=["odd", "one way"])
@pytest.mark.parametrize("hops", [0, 1, 2, 9])
def test_shells_of_a_batch_are_those_that_a_search_finds(graphs: Graphs, hops: int) -> None:
    directed = graphs is ONE_WAY
    sampler = Sampler(graphs, thirds(graphs), Architecture(hops=hops))
    numbers = torch.tensor([3, 0, 2, 1])
    sample = sampler.sample(numbers)
    assert pairs(sample) == expected(graphs, numbers.tolist(), directed, hops)
    assert sample.shells.count == hops + 1
    assert sample.shells.sizes == tuple(len(graphs[n].x) for n in numbers.tolist())
    assert torch.equal(sample.shells.graph.long(), sample.batch.batch)
    assert sample.positions is None
    if hops > 1:  # control: the other directions are other shells
        assert pairs(sample) != expected(graphs, numbers.tolist(), not directed, hops) or not directed


def test_without_shells_only_the_graphs_of_nodes_are_known() -> None:
    sampler = Sampler(ODD, thirds(ODD), Architecture(hops=3))
    bare, full = (sampler.sample(torch.tensor([3, 1, 0]), shells=shells) for shells in (False, True))
    assert pairs(bare) == {}
    assert pairs(full)
    assert torch.equal(bare.shells.graph, full.shells.graph)
    assert bare.shells.sizes == full.shells.sizes == (6, 1, 6)
    assert torch.equal(bare.batch.x, full.batch.x)


def test_filters_look_as_far_as_the_training_graphs_reach() -> None:
    graphs = several((path(4), 4), (path(3), 3), (path(10), 10), (path(2), 2))
    split = consecutive((2, 1, 1))
    sampler = Sampler(graphs, split, Architecture())
    assert sampler.hops == 3
    assert max(pairs(sampler.sample(split.validation)).values()) == 3  # though it reaches 9
    assert Sampler(graphs, split, Architecture(hops=7)).hops == 7
    other = Split(torch.tensor([2]), torch.tensor([0]), torch.tensor([1]))
    assert Sampler(graphs, other, Architecture()).hops == 9  # control: of other graphs farther
    apart = several((NONE, 1), (NONE, 3), (path(3), 3), (path(3), 3))
    none = Sampler(apart, split, Architecture())
    assert none.hops == 0
    assert pairs(none.sample(split.validation)) == {}


def test_filters_look_40_hops_far_at_most() -> None:
    graphs = several((path(60), 60), (path(2), 2), (path(2), 2))
    sampler = Sampler(graphs, consecutive((1, 1, 1)), Architecture())
    assert sampler.hops == 40
    assert max(pairs(sampler.sample(torch.tensor([0]))).values()) == 40
    farther = Sampler(graphs, consecutive((1, 1, 1)), Architecture(hops=50))
    assert max(pairs(farther.sample(torch.tensor([0]))).values()) == 50


def test_shells_are_kept_up_to_the_memory_allowed_and_are_the_same_beyond_it(monkeypatch) -> None:
    searches: list[int] = []
    search = graph_data.distance_shells

    def counted(edges: Tensor, nodes: int, *rest, **more):
        searches.append(nodes)
        return search(edges, nodes, *rest, **more)

    monkeypatch.setattr(graph_data, "distance_shells", counted)
    numbers, samples, made = torch.tensor([0, 3, 4]), {}, {}
    whole = sum(value.nbytes for value in vars(search(path(6), 6, 4)).values() if isinstance(value, Tensor))
    for gigabytes in (0.0, whole / 1e9, 1.0):
        searches.clear()
        sampler = Sampler(ODD, thirds(ODD), Architecture(hops=3), gigabytes=gigabytes)
        samples[gigabytes] = [sampler.sample(numbers) for _ in range(2)]
        made[gigabytes] = list(searches)
    assert list(made.values()) == [[6, 6, 4] * 2, [6, 6, 4, 6, 4], [6, 6, 4]]
    reference = samples[1.0][0].shells
    for each in (sample.shells for two in samples.values() for sample in two):
        for name, value in vars(reference).items():
            other = getattr(each, name)
            assert torch.equal(other, value) if isinstance(value, Tensor) else other == value


def test_the_search_for_the_reach_is_not_repeated(monkeypatch) -> None:
    searches: list[int] = []
    search = graph_data.distance_shells
    monkeypatch.setattr(
        graph_data, "distance_shells", lambda e, n, *r, **m: searches.append(n) or search(e, n, *r, **m)
    )
    sampler = Sampler(ODD, thirds(ODD), Architecture())
    assert searches == [6, 1, 3, 6]
    sampler.sample(torch.arange(4))
    assert len(searches) == 4
    sampler.sample(torch.tensor([5]))
    assert len(searches) == 5


def test_signs_of_laplacian_positions_depend_on_the_seed_alone_and_are_flipped_only_when_asked() -> None:
    sampler = Sampler(ODD, thirds(ODD), Architecture(hops=1, encoding="laplacian", encoding_size=3))
    numbers = torch.tensor([0, 4, 5, 3])
    plain = sampler.sample(numbers).positions
    assert plain is not None
    assert plain.shape == (19, 3)
    assert torch.equal(plain, sampler.sample(numbers, shells=False).positions)
    flips = [sampler.sample(numbers, flips=seed).positions for seed in (1, 1, 2, 3, 4)]
    assert torch.equal(flips[0], flips[1])
    assert any(not torch.equal(flips[0], other) for other in flips[2:])
    assert any(not torch.equal(plain, other) for other in flips)
    for other in flips:
        for part, own in zip(other.split([6, 4, 3, 6]), plain.split([6, 4, 3, 6]), strict=True):
            for column, was in zip(part.T, own.T, strict=True):
                assert torch.equal(column, was) or torch.equal(column, -was)
    laplacian = torch.eye(6)  # oracle: an eigenvector of I − D^{−1/2} A D^{−1/2}
    root = torch.tensor([1.0, 2, 2, 2, 2, 1]).sqrt()
    for u, v in path(6).T.tolist():
        laplacian[u, v] -= 1 / (root[u] * root[v])
    first = plain[:6, 0]
    value = first @ laplacian @ first
    torch.testing.assert_close(laplacian @ first, value * first, rtol=0, atol=1e-5)
    torch.testing.assert_close(value, torch.linalg.eigvalsh(laplacian)[1], rtol=0, atol=1e-5)


def test_positions_of_walks_are_never_flipped() -> None:
    sampler = Sampler(ODD, thirds(ODD), Architecture(hops=1, encoding="random_walk", encoding_size=4))
    numbers = torch.tensor([4, 1])
    plain = sampler.sample(numbers).positions
    assert plain is not None
    for seed in range(5):
        assert torch.equal(plain, sampler.sample(numbers, flips=seed).positions)
    # of a path of four nodes the ends come back after two steps with 1/2, the middle with 1/2 + 1/4
    two = torch.tensor([0.5, 0.75, 0.75, 0.5])
    torch.testing.assert_close(plain[:4], torch.stack((0 * two, two, 0 * two, plain[:4, 3]), 1))
    assert not plain[4].any()  # a node alone is nowhere


def test_a_network_is_given_what_the_sample_has() -> None:
    seen: list[tuple] = []

    class Network(torch.nn.Module):
        def forward(self, *given):
            seen.append(given)

    for encoding in ("none", "random_walk"):
        sampler = Sampler(ODD, thirds(ODD), replace(ONE_HOP, encoding=encoding))
        sample = sampler.sample(torch.tensor([0, 1])).to("cpu")
        sample.through(Network())
        x, shells, edge_index, edge_attr = seen[-1]
        assert (x[1] is sample.positions) if isinstance(x, tuple) else (x is sample.batch.x)
        assert isinstance(x, tuple) == (encoding != "none")
        assert torch.equal(edge_index, sample.batch.edge_index)
        assert shells.nodes == 7
        assert edge_attr is None


def test_targets_are_those_of_the_training_and_the_test_part() -> None:
    split = Split(torch.tensor([4, 0, 2]), torch.tensor([1]), torch.tensor([5, 3]))
    train, test = Sampler(ODD, split, ONE_HOP).targets()
    assert train[:, 0].tolist() == [0, 2, 4]
    assert test[:, 0].tolist() == [3, 5]
    rings = ring_transfer((2, 1, 1), distance=3)
    train, test = Sampler(rings, rings.splits[0], ONE_HOP).targets()
    assert (len(train), len(test)) == (12, 6)
    assert train.dtype == torch.int64
    assert (train != IGNORED).nonzero()[:, 0].tolist() == [0, 6]


def test_numbers_alone_are_standardised() -> None:
    scale = Sampler(ODD, thirds(ODD), ONE_HOP).scale  # targets to learn from: 0, 1, 2, 3
    assert scale is not None
    assert scale.mean.item() == 1.5
    assert scale.deviation.item() == pytest.approx(1.25**0.5)
    rings = ring_transfer((2, 1, 1), distance=3)
    assert Sampler(rings, rings.splits[0], ONE_HOP).scale is None


def test_a_source_is_read_cut_and_cleaned(tmp_path, monkeypatch) -> None:
    graphs, split = Source(data="csl", fold=2, count=20, held_out=7).load()
    published = GENERATORS["csl"]().splits
    assert (len(split.train), len(split.validation), len(split.test)) == (20, 7, 7)
    assert set(split.train.tolist()) < set(published[2].train.tolist())
    assert set(split.test.tolist()) < set(published[2].test.tolist())
    more = Source(data="csl", fold=2, count=40).load()[1]
    assert torch.equal(more.train[:20], split.train)  # fewer graphs are the first of more
    assert len(graphs.y[split.train].unique()) > 5  # and not those of the first classes
    far, _ = Source(data="ring_transfer", distance=4, sizes=(3, 2, 1)).load()
    assert int(far.ptr.diff().max()) == 8
    deep, _ = Source(data="tree_neighbours_match", distance=2, sizes=(3, 2, 1)).load()
    assert int(deep.ptr.diff().max()) == 7
    loops = torch.tensor([[0, 0, 1, 0, 1], [0, 1, 0, 1, 1]])
    looped = several(*[(loops, 2)] * 30)
    monkeypatch.setitem(GENERATORS, "looped", lambda: looped)
    clean, parts = Source(data="looped").load()
    assert clean[0].edge_index.tolist() == [[0, 1], [1, 0]]
    assert clean.dropped == 90
    assert sorted(torch.cat(list(vars(parts).values())).tolist()) == list(range(30))
    again, other = (Source(data="looped", fold=fold).load()[1] for fold in (0, 1))
    assert torch.equal(again.test, parts.test)
    assert not torch.equal(other.test, parts.test)
    save_npz(tmp_path / "some.npz", cluster((4, 2, 2)))
    assert Source(data=str(tmp_path / "some.npz"), task="node").load()[0].task == "node"


def unlabelled(graphs: Graphs, part: Tensor) -> Graphs:
    y = graphs.y.clone()
    for number in part.tolist():
        y[graphs.ptr[number] : graphs.ptr[number + 1]] = IGNORED
    return replace(graphs, y=y)


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch) -> None:
    rings = ring_transfer((4, 3, 3), distance=3)
    part = rings.splits[0]
    labels = torch.tensor([[0.0, 1], [1, 1], [0, 1], [0, 1], [1, 0]])
    nodes = torch.zeros(5, dtype=torch.long)
    marked = [Graph(nodes, NONE, row[None]) for row in labels]
    multilabel = flat("labels", "multilabel", marked, splits=(consecutive((2, 2, 1)),))
    alone = replace(several((NONE, 1), (NONE, 1)), splits=(Split(*torch.arange(2).split([1, 1, 0])),))
    for name, made in {
        "no_train": unlabelled(rings, part.train),
        "no_val": unlabelled(rings, part.validation),
        "labels": multilabel,
        "untested": alone,
    }.items():
        monkeypatch.setitem(GENERATORS, name, lambda made=made: made)
    file = tmp_path / "some.npz"
    save_npz(file, cluster((4, 2, 2)))
    for changed, words in (
        ({"task": "ranking"}, "unknown task 'ranking'; choose one of regression"),
        ({"fold": -1}, "fold cannot be negative, got -1"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"held_out": 0}, "held_out must be at least 1, got 0"),
        ({"data": "csl", "fold": 5}, "CSL has splits 0 to 4.* 5"),
        ({"data": "csl", "sizes": (1, 1, 1)}, "number of graphs of csl is fixed"),
        ({"data": "pattern", "distance": 3}, "pattern is not made for a distance"),
        ({"target": ("y",)}, "target is for files of molecules"),
        ({"splits": file}, "splits is for files of molecules"),
        ({"task": "node", "sizes": (1, 1, 1)}, "the task of eccentricity is node_regression, not node"),
        ({"data": "nowhere"}, "no file or folder nowhere; graphs that can be made: .*csl"),
        ({"data": str(file), "distance": 3}, "for graphs that are made, not for files"),
        ({"data": str(file), "sizes": (1, 1, 1)}, "for graphs that are made, not for files"),
        ({"data": "no_train"}, "no node of the train part has a class"),
        ({"data": "no_val"}, "no node of the validation part has a class"),
        ({"data": "labels"}, "no label has both values in the validation part"),
        ({"data": "untested"}, "to choose by and to report on are needed"),
    ):
        with pytest.raises(InputError, match=words):
            Source(**changed).load()
    assert len(Source(data="ring_transfer", sizes=(4, 3, 3), distance=3).load()[0]) == 10  # control
