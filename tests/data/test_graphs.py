"""Graphs laid end to end: they come out as they went in, batches keep them apart, splits are apart."""

from dataclasses import replace

import pytest
import torch

from gramian.data.graph_splits import Split, consecutive, folds, random_split
from gramian.data.graphs import IGNORED, TASKS, Batch, Graph, Graphs, collate, flat
from gramian.errors import InputError


def some_graphs(
    task: str = "classification", count: int = 6, *, types: bool = True, seed: int = 0
) -> list[Graph]:
    """Random graphs, among them one without edges and one with a loop, a repeated edge and isolated nodes."""
    generator = torch.Generator().manual_seed(seed)
    graphs = []
    for number in range(count):
        nodes = 1 + number if number < 3 else int(torch.randint(2, 9, (), generator=generator))
        edges = torch.randint(nodes, (2, 0 if number == 1 else 2 * nodes), generator=generator)
        if number == 2:
            edges = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 1]])
        x = torch.randint(4, (nodes,), generator=generator)
        rows = nodes if task.startswith("node") else 1
        if task in ("classification", "node"):
            y = torch.arange(rows) % 2 if task == "node" else torch.tensor([number % 2])
        else:
            y = torch.randint(2, (rows, 3), generator=generator).float()
        graphs.append(
            Graph(
                x if types else torch.rand(nodes, 3, generator=generator),
                edges,
                y,
                torch.rand(edges.shape[1], 2, generator=generator),
            )
        )
    return graphs


def same(first: Graph | Batch, second: Graph | Batch) -> bool:
    return all(
        (one is None and other is None) or (one.dtype == other.dtype and torch.equal(one, other))
        for one, other in zip(vars(first).values(), vars(second).values(), strict=True)
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("types", [True, False])
def test_collate_and_back(task: str, types: bool) -> None:
    graphs = some_graphs(task, types=types)
    batch = collate(graphs)
    back = batch.graphs()
    assert len(batch) == len(back) == 6
    assert all(same(one, other) for one, other in zip(graphs, back, strict=True))
    shifted = replace(batch, edge_index=batch.edge_index.flip(0))
    assert not all(same(one, other) for one, other in zip(graphs, shifted.graphs(), strict=True))
    assert torch.equal(
        batch.batch[batch.edge_index[0]], batch.batch[batch.edge_index[1]]
    )  # none leads across
    assert torch.equal(batch.batch.bincount(), batch.ptr.diff())
    assert same(batch.to("cpu"), batch)


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_by_index_is_what_collate_makes(task: str) -> None:
    graphs = some_graphs(task)
    laid = flat("some", task, graphs)
    assert len(laid) == 6
    assert all(same(laid[number], graph) for number, graph in enumerate(graphs))
    assert same(laid[-1], graphs[-1])
    for index in ([0], [1], [5, 0, 3], [2, 2, 1], [0, 1, 2, 3, 4, 5]):
        expected = collate([graphs[number] for number in index])
        assert same(laid.batch(torch.tensor(index)), expected)
    assert not same(laid.batch(torch.tensor([3, 0])), collate([graphs[0], graphs[3]]))
    with pytest.raises(IndexError):
        laid[6]


def test_narrow_numbers_come_out_wide() -> None:
    laid = flat("some", "classification", some_graphs())
    narrow = replace(laid, x=laid.x.to(torch.int8), edge_index=laid.edge_index.to(torch.int16))
    assert all(same(narrow[number], laid[number]) for number in range(6))
    assert same(narrow.batch(torch.tensor([4, 1])), laid.batch(torch.tensor([4, 1])))


def test_graphs_without_edge_features() -> None:
    graphs = [replace(graph, edge_attr=None) for graph in some_graphs()]
    assert flat("some", "classification", graphs).batch(torch.tensor([0, 5])).edge_attr is None
    assert all(same(one, other) for one, other in zip(graphs, collate(graphs).graphs(), strict=True))
    with pytest.raises(InputError, match="all or none"):
        collate([*graphs, some_graphs()[0]])
    with pytest.raises(InputError, match="at least one"):
        collate([])


def small(**changes: object) -> Graphs:
    """Two graphs: a path of three nodes and an isolated node."""
    fields = {
        "name": "small",
        "task": "classification",
        "x": torch.tensor([0, 1, 0, 2]),
        "edge_index": torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]),
        "ptr": torch.tensor([0, 3, 4]),
        "edge_ptr": torch.tensor([0, 4, 4]),
        "y": torch.tensor([0, 1]),
    }
    return Graphs(**(fields | changes))  # type: ignore[arg-type]


def test_what_graphs_tell() -> None:
    graphs = small()
    assert (graphs.node_types, graphs.edge_types, graphs.outputs, graphs.classes) == ((3,), (), 2, (0, 1))
    assert not graphs.directed
    assert graphs.text() == (
        "small: 2 graphs with 4 nodes (mean 2.0, largest 3) and 4 edges, task classification with 2 classes"
    )
    one_way = small(edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 0]]))
    assert one_way.directed
    assert "4 one-way edges" in one_way.text()
    assert small(task="regression", y=torch.rand(2, 5)).outputs == 5
    assert small(x=torch.rand(4, 2)).node_types == ()
    assert small(x=torch.tensor([[0, 3], [1, 0], [0, 0], [0, 0]])).node_types == (2, 4)
    assert small(edge_attr=torch.tensor([1, 1, 3, 3])).edge_types == (4,)
    assert small().with_types((28,)).node_types == (28,)
    with pytest.raises(InputError, match="more than"):
        small().with_types((2,))


NAN = torch.tensor([[0.0], [1.0], [float("nan")], [0.0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "guess"}, "the task must be one of regression"),
        ({"ptr": torch.tensor([0])}, "has no graphs"),
        ({"ptr": torch.tensor([0, 0, 4])}, "graph 0 has no nodes"),
        ({"ptr": torch.tensor([0, 3, 5])}, "nodes .* must rise from 0 to their number 4"),
        ({"ptr": torch.tensor([1, 3, 4])}, "must rise from 0"),
        ({"edge_ptr": torch.tensor([0, 3, 3])}, "edges .* must rise from 0 to their number 4"),
        ({"edge_ptr": torch.tensor([0, 5, 4])}, "must rise from 0"),
        ({"edge_ptr": torch.tensor([0, 4])}, "must rise from 0"),
        ({"edge_ptr": torch.tensor([0, 3, 4])}, "edge 3 leads to node .* of a graph with 1 nodes"),
        (
            {"edge_index": torch.tensor([[0, 1, 1, 3], [1, 0, 2, 1]])},
            "edge 3 leads to node .3, 1. of a graph with 3",
        ),
        ({"edge_index": torch.tensor([[0, 1, 1, 2], [1, 0, -1, 1]])}, "edge 2 leads to node"),
        ({"edge_index": torch.rand(2, 4)}, "edges must be whole numbers"),
        ({"edge_index": torch.zeros(3, 4, dtype=torch.long)}, "edges must be whole numbers"),
        ({"x": NAN}, "features of node 2 are not finite"),
        ({"x": torch.rand(4)}, "features of nodes must be"),
        ({"x": torch.tensor(1.0)}, "a single number stands where"),
        ({"edge_attr": torch.tensor(1)}, "a single number stands where"),
        ({"x": torch.rand(4, 0)}, "features of nodes must be"),
        ({"x": torch.tensor([0, 1, -1, 0])}, "types of nodes must count from 0"),
        ({"x": torch.tensor([0, 1, 10**6, 0])}, "types of nodes must count from 0"),
        ({"x": torch.tensor([0, 1, 2**63 - 1, 0])}, "types of nodes must count from 0"),
        ({"x": torch.tensor([True, False, True, True])}, "types of nodes must be whole numbers"),
        ({"edge_attr": torch.rand(3, 2)}, "4 edges but features of 3"),
        ({"edge_attr": NAN}, "features of edge 2 are not finite"),
        ({"y": torch.tensor([0, 1, 1])}, "needs classes .2., got int64 .3,"),
        ({"y": torch.tensor([[0], [1]])}, "needs classes"),
        ({"y": torch.tensor([0, -1])}, "classes must be whole numbers from 0"),
        ({"y": torch.tensor([0, 10**12])}, "classes must be whole numbers from 0"),
        ({"y": torch.tensor([0.0, 1.0])}, "classes must be whole numbers from 0"),
        ({"y": torch.tensor([0, 0])}, "at least two"),
        ({"y": torch.tensor([0, 2]), "classes": (0, 1)}, "none above 1, got 2"),
        ({"task": "node", "y": torch.full((4,), IGNORED)}, "classes must be whole numbers from 0"),
        ({"task": "node"}, "needs classes .4."),
        ({"task": "regression"}, "needs targets .2, t."),
        ({"task": "regression", "y": NAN[1:3]}, "targets must be finite"),
        ({"task": "regression", "y": torch.zeros(2, 0)}, "needs targets"),
        ({"task": "multilabel", "y": torch.tensor([[0.0, 1.0], [0.5, 0.0]])}, "must be 0 or 1"),
        ({"splits": (Split(torch.tensor([0]), torch.tensor([0]), torch.tensor([1])),)}, "none in common"),
        (
            {"splits": (Split(torch.tensor([0]), torch.tensor([2]), torch.tensor([1])),)},
            "count the 2 examples",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        small(**changes)
    assert str(caught.value).count("\n") == 0


def test_what_is_odd_but_sound_is_kept() -> None:
    """A loop, a repeated edge, a node that is not to be classified: the control to the refusals."""
    odd = small(edge_index=torch.tensor([[0, 0, 0, 2], [0, 1, 1, 1]]))
    assert odd[0].edge_index.tolist() == [[0, 0, 0, 2], [0, 1, 1, 1]]
    assert small(task="node", y=torch.tensor([0, IGNORED, 1, IGNORED])).outputs == 2
    assert (
        len(small(splits=(Split(torch.tensor([0]), torch.tensor([]).long(), torch.tensor([1])),)).splits) == 1
    )


def test_simple_graphs() -> None:
    attr = torch.tensor([[5.0], [1.0], [2.0], [3.0]])
    odd = small(edge_index=torch.tensor([[2, 0, 0, 0], [2, 1, 1, 2]]), edge_attr=attr)
    plain = odd.simple()
    assert plain.edge_index.tolist() == [[0, 0], [1, 2]]
    assert plain.edge_attr is not None
    assert plain.edge_attr.flatten().tolist() == [1.0, 3.0]  # the first of the repeated ones
    assert plain.edge_ptr.tolist() == [0, 2, 2]
    assert plain.dropped == 2
    assert "2 edges left out as loops or repeated" in plain.text()
    graphs = flat("some", "classification", some_graphs(count=8))
    simple = graphs.simple()
    for number in range(8):
        before = {tuple(edge) for edge in graphs[number].edge_index.T.tolist() if edge[0] != edge[1]}
        after = [tuple(edge) for edge in simple[number].edge_index.T.tolist()]
        assert after == sorted(before)
    assert simple.dropped == graphs.edge_index.shape[1] - simple.edge_index.shape[1] > 0
    assert small().simple().dropped == 0


def labels_with_a_rare_class(count: int = 200) -> torch.Tensor:
    return (torch.arange(count) % 20 == 0).long() + (torch.arange(count) % 3 == 0).long()


def worst(split: Split, labels: torch.Tensor, validation: float, test: float) -> float:
    """How far the number of examples of a class in a part is from its share."""
    shares = ((split.validation, validation), (split.test, test), (split.train, 1 - validation - test))
    counts = labels.bincount()
    return max(
        (labels[part].bincount(minlength=len(counts)) - share * counts).abs().max().item()
        for part, share in shares
    )


def test_random_splits_are_partitions_with_equal_shares_of_classes() -> None:
    labels = labels_with_a_rare_class()
    loose = 0.0
    for seed in range(10):
        split = random_split(200, labels=labels, validation=0.15, test=0.25, seed=seed)
        assert torch.equal(torch.cat(list(vars(split).values())).sort().values, torch.arange(200))
        assert (len(split.validation), len(split.test)) == (30, 50)
        assert worst(split, labels, 0.15, 0.25) <= 2
        loose = max(
            loose, worst(random_split(200, validation=0.15, test=0.25, seed=seed), labels, 0.15, 0.25)
        )
    assert loose > 2  # control: without the labels the shares are not kept
    again = random_split(200, labels=labels, validation=0.15, test=0.25, seed=9)
    assert torch.equal(again.test, split.test)
    assert not torch.equal(random_split(200, labels=labels, test=0.25, seed=8).test, split.test)


@pytest.mark.parametrize(("validation", "test"), [(0, 0), (0.3, 0), (0, 0.3), (0.01, 0.01), (0.5, 0.4)])
def test_parts_that_are_asked_for_are_not_empty(validation: float, test: float) -> None:
    split = random_split(20, validation=validation, test=test)
    assert (len(split.validation) > 0) == (validation > 0)
    assert (len(split.test) > 0) == (test > 0)
    assert sum(len(part) for part in vars(split).values()) == 20


def test_splits_that_cannot_be() -> None:
    for validation, test in ((-0.1, 0.1), (0.5, 0.5), (1, 0), (float("nan"), 0.1)):
        with pytest.raises(InputError, match="less than 1 together"):
            random_split(10, validation=validation, test=test)
    with pytest.raises(InputError, match="cannot be split"):
        random_split(2)
    assert len(random_split(3).train) == 1
    with pytest.raises(InputError, match="3 to 4 folds"):
        folds(4, number=5)
    for sizes in ((1, 0, 1), (1, 1), (1, 1, 1, 1)):
        with pytest.raises(InputError, match="three numbers"):
            consecutive(sizes)  # type: ignore[arg-type]


def test_folds_hold_every_example_once_and_classes_alike() -> None:
    labels = labels_with_a_rare_class()
    splits = folds(200, labels=labels, number=7, seed=3)
    tests = [split.test for split in splits]
    assert torch.equal(torch.cat(tests).sort().values, torch.arange(200))
    assert torch.equal(torch.cat([split.validation for split in splits]).sort().values, torch.arange(200))
    for split in splits:
        split.check(200, "folds")
        assert len(split.train) + len(split.validation) + len(split.test) == 200
    counts = torch.stack([labels[part].bincount(minlength=3) for part in tests])
    assert (counts.amax(0) - counts.amin(0)).max() <= 1
    loose = torch.stack([labels[split.test].bincount(minlength=3) for split in folds(200, number=7, seed=3)])
    assert (loose.amax(0) - loose.amin(0)).max() > 1  # control
    assert torch.equal(folds(200, labels=labels, number=7, seed=3)[2].test, tests[2])
    assert not torch.equal(folds(200, labels=labels, number=7, seed=4)[2].test, tests[2])


def test_graphs_split_by_their_classes() -> None:
    graphs = flat("some", "classification", some_graphs(count=40))
    split = graphs.split(0.25, 0.25, seed=1)
    assert graphs.y[split.test].sum() == 5  # half of ten
    assert [len(each.test) for each in graphs.folds(8)] == [5] * 8
    nodes = flat("some", "node", some_graphs("node", count=40))
    assert len(nodes.split(0.25, 0.25).test) == 10  # classes of nodes do not matter
