"""Standard layers in our networks: what their package gives, graph by graph, and no farther than L hops."""

import sys

import pytest
import torch
from torch import Tensor, nn

from gramian.errors import InputError, MissingExtraError
from gramian.interop.message_passing import (
    HEADS,
    LAYERS,
    AttentionLayer,
    ConvolutionLayer,
    MessagePassingNetwork,
    message_passing_layers,
)
from gramian.nn.graph_network import FeatureEncoder, head
from gramian.nn.shells import Shells, shells_of_pairs

pytest.importorskip("torch_geometric", reason="the graphs extra is not installed")

WIDTH = 8
EDGES = torch.tensor([[0, 1, 1, 2, 3, 4, 4, 3, 3, 5], [1, 0, 2, 1, 4, 3, 5, 5, 3, 4]])
SIZES = [3, 4, 1]
"""A path, four nodes of which one is isolated and one has a loop, and a node alone."""
BOTH = [False, True]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def graphs_of(sizes: list[int]) -> Shells:
    none = torch.empty(0, dtype=torch.long)
    return shells_of_pairs(none, none, none, sizes, 1)


def network(name: str, edges: bool, *, layers: int = 2, readout: str = "nodes", seed: int = 0):
    """In float64, norms moved away from their start."""
    made = MessagePassingNetwork(
        FeatureEncoder(3, WIDTH),
        message_passing_layers(name, layers, WIDTH, 0.5, edges),
        head(WIDTH, 2),
        readout=readout,
        edges=FeatureEncoder(2, WIDTH) if edges else None,
        seed=seed,
    ).double()
    for place, module in enumerate(made.modules()):
        if hasattr(module, "running_mean") and module.running_mean is not None:
            size = len(module.running_mean)
            module.running_mean.copy_(drawn(size, seed=place))
            module.running_var.copy_(drawn(size, seed=place + 1).exp())
    return made.eval()


def incoming(features: Tensor, edges: Tensor, nodes: int) -> Tensor:
    """The mean over edges into a node, loops left out."""
    found = torch.zeros(nodes, features.shape[1], dtype=features.dtype)
    for node in range(nodes):
        into = [e for e, (u, v) in enumerate(edges.T.tolist()) if v == node and u != node]
        if into:
            found[node] = features[into].mean(0)
    return found


def by_hand(made: MessagePassingNetwork, x: Tensor, edges: Tensor, attributes: Tensor | None, graph: Tensor):
    """The network in evaluation mode, its convolutions called as their package has it."""
    h, takes = made.nodes(x), attributes is not None
    features = made.edges(attributes) if takes else None
    if features is not None:
        h = h + incoming(features, edges, len(x))
    for layer in made.layers:
        if isinstance(layer, AttentionLayer):
            h = layer.layer(h, edges, graph, **({"edge_attr": features} if takes else {}))
            continue
        conv, norm = layer.conv, layer.norm
        given = takes and type(conv).__name__ != "GCNConv"
        found = conv(h, edges, features) if given else conv(h, edges)
        standard = (found - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
        h = h + (standard * norm.weight + norm.bias).clamp(min=0)
    return made.head(h)


@pytest.mark.parametrize("edges", BOTH)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_those_of_the_package(name: str, edges: bool) -> None:
    made, shells = network(name, edges), graphs_of(SIZES)
    x, attributes = drawn(8, 3), drawn(10, 2) if edges else None
    wanted = by_hand(made, x, EDGES, attributes, shells.graph.long())
    torch.testing.assert_close(made(x, shells, EDGES, attributes), wanted, rtol=0, atol=1e-10)
    named = {"gcn": "GCNConv", "gine": "GINEConv" if edges else "GINConv", "gated_gcn": "ResGatedGraphConv"}
    for layer in made.layers:
        inner = layer.layer if name == "gps" else layer.conv
        assert type(inner).__name__ == named.get(name, "GPSConv")
        assert type(inner).__module__.startswith("torch_geometric")
    if attributes is not None:  # control: features of edges matter, those of loops at the input do not
        assert not torch.allclose(made(x, shells, EDGES, attributes.roll(1, 0)), wanted, atol=1e-4)
        bare = attributes.clone()
        bare[8] += 1
        assert torch.allclose(made(x, shells, EDGES, bare), wanted) == (name == "gcn")


@pytest.mark.parametrize("readout", ["sum", "mean", "nodes"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_is_its_graphs_one_by_one(name: str, readout: str) -> None:
    made = network(name, True, readout=readout)
    x, attributes = drawn(8, 3), drawn(10, 2)
    together = made(x, graphs_of(SIZES), EDGES, attributes)
    parts, before = [], 0
    for size in SIZES:
        inside = torch.isin(EDGES[0], torch.arange(before, before + size))
        given = x[before : before + size], graphs_of([size]), EDGES[:, inside] - before, attributes[inside]
        parts.append(made(*given))
        before += size
    torch.testing.assert_close(together, torch.cat(parts), rtol=0, atol=1e-10)
    if name == "gps":  # control: attention would see the other graphs of one large graph
        assert not torch.allclose(made(x, graphs_of([8]), EDGES, attributes)[:1], together[:1], atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_nodes_may_be_numbered_otherwise(name: str) -> None:
    made, shells = network(name, True), graphs_of([7, 1])
    x, attributes = drawn(8, 3), drawn(10, 2)
    order = torch.cat((torch.randperm(7, generator=torch.Generator().manual_seed(3)), torch.tensor([7])))
    wanted = made(x, shells, EDGES, attributes)[order]
    renumbered = order.argsort()[EDGES]
    shuffled = torch.randperm(10, generator=torch.Generator().manual_seed(4))
    found = made(x[order], shells, renumbered[:, shuffled], attributes[shuffled])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    wrong = made(x[order], shells, EDGES, attributes)  # control: edges that stay where they were
    assert not torch.allclose(wrong, wanted, atol=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_see_no_farther_than_their_number_but_for_attention(name: str, layers: int) -> None:
    path = torch.stack((torch.arange(7), torch.arange(1, 8)))
    edges, shells = torch.cat((path, path.flip(0)), 1), graphs_of([8])
    made, x = network(name, False, layers=layers), drawn(8, 3)
    moved = x.clone()
    moved[0] += 1
    change = (made(moved, shells, edges) - made(x, shells, edges)).abs().amax(1)
    assert (change[: layers + 1] > 1e-7).all()
    if name == "gps":
        assert (change > 1e-9).all()
    else:
        assert torch.equal(change[layers + 1 :], torch.zeros(7 - layers, dtype=torch.float64))


@pytest.mark.parametrize("edges", BOTH)
@pytest.mark.parametrize("name", LAYERS)
def test_seeds_give_weights_and_the_stream_of_torch_goes_on(name: str, edges: bool) -> None:
    torch.manual_seed(0)
    one = network(name, edges, seed=1)
    torch.manual_seed(7)
    two, other = network(name, edges, seed=1), network(name, edges, seed=2)
    weights = dict(one.named_parameters())
    for key, value in two.named_parameters():
        assert torch.equal(value, weights[key]), key
    matrices = [key for key, value in weights.items() if value.ndim > 1]
    assert all(not torch.equal(dict(other.named_parameters())[key], weights[key]) for key in matrices)
    first, second = (layer for layer in one.layers)
    for (key, value), again in zip(first.named_parameters(), second.parameters(), strict=True):
        assert value.ndim < 2 or not torch.equal(value, again), key
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    for layer in one.layers:
        layer.initialise_(torch.Generator().manual_seed(5))
    assert torch.equal(torch.rand(2), wanted)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_and_norms_are_those_of_training(name: str) -> None:
    made, shells, x = network(name, False).float(), graphs_of(SIZES), drawn(8, 3).float()
    still = made(x, shells, EDGES)
    assert torch.equal(still, made(x, shells, EDGES))
    before = {key: value.clone() for key, value in made.state_dict().items() if "running" in key}
    made.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one, two = made(x, shells, EDGES), made(x, shells, EDGES)
    assert not torch.allclose(one, two, atol=1e-4)
    assert before
    assert all(
        not torch.equal(value, before[key]) for key, value in made.state_dict().items() if key in before
    )
    one.sum().backward()
    unused = [key for key, value in made.named_parameters() if value.grad is None]
    assert unused == []


def test_without_edges_a_convolution_still_has_the_node_itself() -> None:
    none = torch.zeros(2, 0, dtype=torch.long)
    for name in LAYERS:
        for edges in BOTH:
            given = drawn(3, 3), graphs_of([1, 1, 1]), none, drawn(0, 2) if edges else None
            found = network(name, edges)(*given)
            assert found.shape == (3, 2)
            assert found.isfinite().all()
            assert not torch.allclose(found[0], found[1])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match="unknown layer 'gat'; choose one of gcn, gine, gated_gcn, gps"):
        message_passing_layers("gat", 2, WIDTH, 0.0, False)
    with pytest.raises(InputError, match="multiple of its 4 heads, got 6"):
        message_passing_layers("gps", 2, 6, 0.0, False)
    assert WIDTH % HEADS == 0
    x, shells = drawn(8, 3), graphs_of(SIZES)
    with pytest.raises(InputError, match="whose layers look along edges is given the edges"):
        network("gcn", False)(x, shells)
    for edges, given in ((False, (EDGES, drawn(10, 2))), (True, (EDGES,))):
        with pytest.raises(InputError, match="given with the edges, to a network that encodes them"):
            network("gcn", edges)(x, shells, *given)
    with pytest.raises(InputError, match="shells are those of 7 nodes, got features of 8"):
        network("gcn", False)(x, graphs_of([7]), EDGES)
    with pytest.raises(InputError, match="edges of 8 nodes join nodes 0 … 7"):
        network("gcn", False)(x, shells, EDGES + 3)


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    for name in LAYERS:
        with pytest.raises(MissingExtraError, match=r'pip install "gramian\[graphs\]"'):
            message_passing_layers(name, 1, WIDTH, 0.0, True)
    monkeypatch.undo()
    assert isinstance(message_passing_layers("gcn", 1, WIDTH, 0.0, False)[0], ConvolutionLayer)
    assert isinstance(message_passing_layers("gps", 1, WIDTH, 0.0, False)[0], nn.Module)
