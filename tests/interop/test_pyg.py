"""The layer and the network for PyTorch Geometric are ours, on batches, in its modules, and as data go."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.data.graph_distances import distance_count, eccentricity
from gramian.data.graph_generators import ring_transfer
from gramian.errors import InputError
from gramian.nn.distances import distance_shells
from gramian.nn.graph_network import FeatureEncoder, GraphNetwork, TypeEncoder, head
from gramian.nn.shells import Shells, batch_shells
from graphs import edges, layer, normal, random_graph, randomised

pytest.importorskip("torch_geometric", reason="needs pip install 'gramian[graphs]'")

from gramian.interop.pyg import (  # before the package, whose import warns
    AddDistanceShells,
    DistanceFilter,
    DistanceFilterNet,
    ShellLoader,
    add_distance_shells,
    from_pyg,
    shells_of,
    to_pyg,
)

from torch_geometric.data import Data  # isort: skip
from torch_geometric.loader import DataLoader  # isort: skip
from torch_geometric.nn import GCNConv, GPSConv, Sequential, global_add_pool  # isort: skip
from torch_geometric.transforms import AddLaplacianEigenvectorPE, AddRandomWalkPE, Compose  # isort: skip

CLOSE = {"rtol": 0, "atol": 1e-10}
COUNT = 5
EDGES = [
    random_graph(7, 9, 0),  # loops, repeated and one-way edges
    edges(),  # one node
    edges((0, 1), (1, 0), (3, 4), (4, 3)),  # two parts, and nodes 2 and 5 alone
    random_graph(6, 12, 3),
]
SIZES = [7, 1, 6, 6]


def graphs() -> list[Data]:
    """Graphs with features in float64, edge features and shells."""
    made = [
        Data(
            x=normal(size, 4, seed=number),
            edge_index=index,
            edge_attr=normal(index.shape[1], 3, seed=9 + number),
            y=normal(1, 2, seed=20 + number),
        )
        for number, (index, size) in enumerate(zip(EDGES, SIZES, strict=True))
    ]
    return add_distance_shells(made, COUNT)


def ours() -> Shells:
    each = zip(EDGES, SIZES, strict=True)
    return batch_shells([distance_shells(index, size, COUNT, directed=True) for index, size in each])


def same_layer(**options: Any) -> tuple[DistanceFilter, nn.Module]:
    ours = layer(**options)
    theirs = DistanceFilter(4, 5, **options).double()
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


@pytest.mark.parametrize(
    "options", [{}, {"gate": "none", "neutral_empty": True}], ids=["plain", "other parts"]
)
def test_the_layer_is_ours_on_a_batch_and_on_its_graphs(options: dict[str, Any]) -> None:
    made = graphs()
    batch = next(iter(DataLoader(made, batch_size=4)))
    theirs, ours_ = same_layer(**options)
    expected = ours_(batch.x, ours())
    torch.testing.assert_close(theirs(batch.x, shells_of(batch)), expected, **CLOSE)
    found = theirs(batch.x, batch.shell_index, batch.shell_hop, batch.shell_count)
    torch.testing.assert_close(found, expected, **CLOSE)
    alone = [theirs(data.x, data.shell_index, data.shell_hop, COUNT) for data in made]
    torch.testing.assert_close(torch.cat(alone), expected, **CLOSE)
    single = theirs.float()(batch.x.float(), shells_of(batch)).double()
    torch.testing.assert_close(single, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_starts_anew_and_names_itself() -> None:
    filter = DistanceFilter(6, dropout=0.1)
    assert str(filter) == "DistanceFilter(6, state=6)"
    randomised(filter).float()
    start = copy.deepcopy(filter.state_dict())
    torch.manual_seed(3)
    filter.reset_parameters()
    again = copy.deepcopy(filter.state_dict())
    assert all(not torch.equal(start[name], again[name]) for name in start)
    torch.manual_seed(3)
    filter.reset_parameters()
    assert all(torch.equal(again[name], value) for name, value in filter.state_dict().items())
    assert torch.equal(filter.norm.weight, torch.ones(6))
    assert not filter.mlp.up.bias.any()


@pytest.mark.parametrize("readout", ["sum", "mean", "nodes"])
def test_the_network_is_ours(readout: str) -> None:
    parts = [DistanceFilter(6, 5) for _ in range(2)]
    expected = randomised(
        GraphNetwork(FeatureEncoder(4, 6), parts, head(6, 2), readout=readout, edges=FeatureEncoder(3, 6))
    )
    found = DistanceFilterNet(4, 6, 2, 2, state=5, readout=readout, edges=3).double()
    names = {name: re.sub(r"^(?!nodes)", "network.", name) for name in expected.state_dict()}
    names = {name: new.replace("nodes.", "encoder.") for name, new in names.items()}
    found.load_state_dict({names[name]: value for name, value in expected.state_dict().items()})
    made = graphs()
    batch = next(iter(DataLoader(made, batch_size=4)))
    torch.testing.assert_close(
        found(batch), expected(batch.x, ours(), batch.edge_index, batch.edge_attr), **CLOSE
    )
    torch.testing.assert_close(found(batch), torch.cat([found(data) for data in made]), **CLOSE)
    torch.testing.assert_close(found(next(iter(ShellLoader(made, batch_size=4)))), found(batch), **CLOSE)
    batch.shell_hop = batch.shell_hop.flip(0)
    assert (found(batch) - torch.cat([found(data) for data in made])).abs().max() > 1e-2  # control


def test_types_of_nodes_and_edges_are_looked_up() -> None:
    made = graphs()
    for data in made:
        data.x = torch.arange(data.num_nodes)[:, None] % 3
        data.edge_attr = torch.arange(data.num_edges) % 2
    batch = next(iter(DataLoader(made, batch_size=4)))
    model = randomised(DistanceFilterNet([3], 6, 2, 2, edges=[2]))
    assert isinstance(model.encoder, TypeEncoder)
    torch.testing.assert_close(model(batch), torch.cat([model(data) for data in made]), **CLOSE)
    found = model(batch)
    batch.edge_attr = 1 - batch.edge_attr
    assert (model(batch) - found).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (AddLaplacianEigenvectorPE(2, is_undirected=True), "laplacian_eigenvector_pe"),
        (AddRandomWalkPE(2), "random_walk_pe"),
    ],
    ids=["laplacian", "random walk"],
)
def test_positional_encodings_are_added(transform: Any, name: str) -> None:
    torch.manual_seed(0)
    add = Compose([transform, AddDistanceShells(COUNT)])
    made = [add(to_pyg(eccentricity((2, 1, 1), seed=seed))[0]) for seed in range(3)]
    batch = next(iter(DataLoader(made, batch_size=3)))
    model = randomised(DistanceFilterNet(1, 6, 2, 2, encodings={name: 2})).float()
    torch.testing.assert_close(model(batch), torch.cat([model(data) for data in made]), rtol=1e-4, atol=1e-4)
    plain = DistanceFilterNet(1, 6, 2, 2).requires_grad_(False)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert (plain(batch) - model(batch)).abs().max() > 1e-3
    with torch.no_grad():
        model.encodings[name].weight.zero_()
        model.encodings[name].bias.zero_()
    torch.testing.assert_close(plain(batch), model(batch))
    batch[name] = batch[name][:, :1]
    with pytest.raises(InputError, match=rf"{name} is \({batch.num_nodes}, 2\) .* \({batch.num_nodes}, 1\)"):
        model(batch)
    del batch[name]
    with pytest.raises(InputError, match=f"lack {name}"):
        model(batch)


def test_a_network_starts_from_torchs_generator() -> None:
    torch.manual_seed(1)
    one, other = DistanceFilterNet(4, 6, 1, 2), DistanceFilterNet(4, 6, 1, 2)
    torch.manual_seed(1)
    again = DistanceFilterNet(4, 6, 1, 2)
    weights = [model.network.head[0].weight for model in (one, other, again)]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])
    before = weights[1].clone()
    other.reset_parameters()
    assert not torch.equal(before, weights[1])


class Mixed(nn.Module):
    """A convolution and a distance filter in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = GCNConv(5, 16)
        self.filter = DistanceFilter(16, dropout=0.1)
        self.last = GCNConv(16, 5)

    def forward(self, batch: Any) -> Tensor:
        h = self.first(batch.x, batch.edge_index).relu()
        return self.last(self.filter(h, shells_of(batch)), batch.edge_index)


def test_a_model_with_convolutions_learns_what_is_far_away() -> None:
    torch.manual_seed(0)
    rings = add_distance_shells(to_pyg(ring_transfer((20, 5, 5), distance=6)), 7)
    loader, model = ShellLoader(rings, batch_size=10, shuffle=True), Mixed()
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(25):
        for batch in loader:
            loss = nn.functional.cross_entropy(model(batch), batch.y, ignore_index=-100)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[0] > 1.2
    assert losses[-1] < 0.3


def test_the_layer_stands_in_other_modules_of_the_package() -> None:
    torch.manual_seed(0)
    made = graphs()
    batch = next(iter(DataLoader(made, batch_size=4)))
    filter = same_layer()[0].eval()
    block = GPSConv(4, filter, heads=2, norm="layer_norm").double().eval()
    found = block(batch.x, shells_of(batch), batch.batch)
    alone = [block(data.x, shells_of(data), torch.zeros(len(data.x)).long()) for data in made]
    torch.testing.assert_close(found, torch.cat(alone), **CLOSE)
    named = {"shell_hop": batch.shell_hop, "shell_count": batch.shell_count}
    torch.testing.assert_close(block(batch.x, batch.shell_index, batch.batch, **named), found, **CLOSE)
    without = GPSConv(4, None, heads=2, norm="layer_norm").double().eval()
    without.load_state_dict(block.state_dict(), strict=False)
    assert (without(batch.x, batch.edge_index, batch.batch) - found).abs().max() > 1e-2  # control
    chain = Sequential("x, shells, batch", [(filter, "x, shells -> x"), (global_add_pool, "x, batch -> x")])
    pooled = chain(batch.x, shells_of(batch), batch.batch)
    expected = [same_layer()[1](data.x, shells_of(data)).sum(0) for data in made]
    torch.testing.assert_close(pooled, torch.stack(expected), **CLOSE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same() -> None:
    made = graphs()
    model = randomised(DistanceFilterNet(4, 6, 2, 2, edges=3))
    expected = model(next(iter(DataLoader(made, batch_size=4))))
    model.cuda()
    for loader in (DataLoader(made, batch_size=4), ShellLoader(made, batch_size=4, pin_memory=True)):
        found = model(next(iter(loader)).to("cuda"))
        assert found.device.type == "cuda"
        torch.testing.assert_close(found.cpu(), expected, **CLOSE)


def test_half_precision_is_near() -> None:
    batch = next(iter(DataLoader(graphs(), batch_size=4)))
    batch.x, batch.edge_attr = batch.x.float(), batch.edge_attr.float()
    model = randomised(DistanceFilterNet(4, 6, 2, 2, edges=3)).float()
    expected = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch)
        found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


COMPILED = """
import torch
from torch._dynamo.utils import counters
from gramian.data.graph_distances import eccentricity
from gramian.interop.pyg import DistanceFilterNet, ShellLoader, add_distance_shells, to_pyg
from torch_geometric.loader import DataLoader
graphs = add_distance_shells(to_pyg(eccentricity((6, 1, 1))), 6)
model = DistanceFilterNet(1, 8, 2, 1, readout="nodes").double()
for graph in graphs:
    graph.x = graph.x.double()
for loader in (DataLoader, ShellLoader):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=loader is ShellLoader)
    for batch in loader(graphs, batch_size=4):
        torch.testing.assert_close(compiled(batch), model(batch), rtol=0, atol=1e-10)
        found = [torch.autograd.grad(f(batch).sum(), model.encoder.parameters()) for f in (compiled, model)]
        torch.testing.assert_close(*found, rtol=0, atol=1e-9)
    print(len(counters["graph_break"]))
"""


@pytest.mark.slow
def test_a_compiled_network_breaks_once_where_shells_are_made_and_not_where_they_are_there() -> None:
    """In a process without the annotation checks of the tests."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "1\n0\n"), done.stderr


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (lambda: distance_count((5, 1, 1)), "node_regression"),
        (lambda: eccentricity((5, 1, 1)), "node_regression"),
        (lambda: ring_transfer((6, 1, 1)), "node"),
        (lambda: from_pyg(graphs(), "regression"), "regression"),
    ],
    ids=["types", "features", "classes", "edge features"],
)
def test_data_go_both_ways(make: Callable[[], Any], task: str) -> None:
    start = make()
    back = from_pyg(to_pyg(start), task, name=start.name)
    for name in ("name", "task", "node_types", "edge_types", "classes"):
        assert getattr(back, name) == getattr(start, name)
    for name in ("x", "edge_index", "ptr", "edge_ptr", "y", "edge_attr"):
        one, other = getattr(back, name), getattr(start, name)
        assert one is other is None or torch.equal(one, other)


def test_data_of_the_package_in_its_usual_forms() -> None:
    index = edges((0, 1), (1, 0))
    mixed = [Data(edge_index=index, num_nodes=2, y=torch.tensor([k])) for k in (0, 1)]
    classes = from_pyg(mixed, "classification")
    assert (classes.task, classes.node_types, classes.y.tolist()) == ("classification", (1,), [0, 1])
    numbers = from_pyg([Data(torch.ones(2, 3), index, y=1.5)], "regression")
    assert numbers.y.tolist() == [[1.5]]
    whole = from_pyg([Data(torch.ones(2, 3), index, y=torch.tensor([1, 0]))], "multilabel")
    assert whole.y.tolist() == [[1.0, 0.0]]
    with pytest.raises(InputError, match="lack y"):
        from_pyg([Data(torch.ones(2, 3), index)], "regression")


ONE = Data(x=torch.ones(2, 4), edge_index=edges((0, 1)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DistanceFilter(4)(ONE.x, ONE.edge_index), r"by AddDistanceShells\(count\)"),
        (lambda: DistanceFilter(4)(ONE.x, torch.ones(4), torch.ones(4), 3), r"\(2, entries\), got \(4,\)"),
        (lambda: DistanceFilterNet(4, 4, 1, 1, encodings={"pe": 0}), "got 0 of pe"),
        (lambda: DistanceFilterNet(4, 4, 1, 1, edges=2)(add_distance_shells(ONE, 3)), "lack edge_attr"),
        (lambda: DistanceFilterNet(4, 4, 1, 1)(Data(edge_index=ONE.edge_index, num_nodes=2)), "lack x"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
