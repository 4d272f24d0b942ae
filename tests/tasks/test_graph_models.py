"""Networks on graphs by name: as wide as a number of parameters allows, and the same for the same seed."""

import math
import sys
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor, nn

from gramian.data.graph_generators import circular_skip_links, ring_transfer
from gramian.data.graph_splits import consecutive
from gramian.data.graphs import Graph, Graphs, flat
from gramian.errors import InputError, MissingExtraError
from gramian.nn.graph import DistanceFilter
from gramian.tasks.graph_data import Sampler
from gramian.tasks.graph_models import (
    GRED,
    MODELS,
    WIDEST,
    WIDTHS,
    Architecture,
    build_network,
    check_batches,
    check_models,
    parameters,
    widest,
)

pytest.importorskip("torch_geometric", reason="the graphs extra is not installed")

EDGES = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])


def numbers(
    features: int = 3, *, edge: int | None = None, outputs: int = 2, task: str = "regression"
) -> Graphs:
    """Six paths of three nodes, with features drawn."""
    generator = torch.Generator().manual_seed(0)
    rows = 3 if task == "node_regression" else 1
    graphs = [
        Graph(
            torch.randn(3, features, generator=generator),
            EDGES,
            torch.randn(rows, outputs, generator=generator),
            None if edge is None else torch.randn(4, edge, generator=generator),
        )
        for _ in range(6)
    ]
    return flat("numbers", task, graphs, splits=(consecutive((4, 1, 1)),))


def types() -> Graphs:
    """Six paths whose nodes have types in two columns and whose edges have three types."""
    x, kinds = torch.tensor([[0, 4], [1, 0], [0, 2]]), torch.tensor([0, 2, 1, 1])
    graphs = [Graph(x, EDGES, torch.tensor([number % 3]), kinds) for number in range(6)]
    return flat("types", "classification", graphs, splits=(consecutive((4, 1, 1)),))


def linear(width: int, into: int | None = None) -> int:
    return width * (into or width) + (into or width)


LAYER_PARAMETERS = {  # by width, whether edges have features; from the equations
    "gred": lambda d, e: 2 * d + 2 * linear(d) + 2 * d + 3 * d + 4 * d * d + linear(d, 2 * d),
    "gcn": lambda d, e: linear(d) + 2 * d,
    "gine": lambda d, e: 2 * linear(d) + 2 * d,
    "gated_gcn": lambda d, e: 3 * linear(2 * d if e else d, d) + d * d + d + 2 * d,
    "gps": lambda d, e: 2 * linear(d) + 4 * linear(d) + 3 * 2 * d + linear(d, 2 * d) + linear(2 * d, d),
}


def counted(
    model: str, width: int, layers: int, features: int, edge: int | None, outputs: int, size: int
) -> int:
    """Parameters of a network for features of numbers."""
    encoder = linear(features, width) + linear(width)
    edges = 0 if edge is None else linear(edge, width) + linear(width)
    positions = linear(size, width) if size else 0
    head = linear(width) + linear(width, outputs)
    each = LAYER_PARAMETERS[model](width, edge is not None)
    return encoder + edges + positions + layers * each + head


@pytest.mark.parametrize("edge", [None, 5])
@pytest.mark.parametrize("model", MODELS)
def test_networks_are_as_wide_as_the_parameters_allow(model: str, edge: int | None) -> None:
    graphs = numbers(edge=edge)
    for most, layers, size in ((2_000, 1, 0), (20_000, 3, 0), (20_000, 2, 6)):
        architecture = Architecture(
            parameters=most,
            layers=layers,
            encoding="random_walk" if size else "none",
            encoding_size=size or 1,
        )
        network = build_network(model, graphs, architecture, 0)
        each = (counted(model, width, layers, 3, edge, 2, size) for width in count(WIDTHS, WIDTHS))
        fitting = 0
        for number in each:
            if number > most:
                break
            fitting = number
        assert parameters(network) == fitting  # the next width would be too wide
        assert len(network.layers) == layers


@pytest.mark.parametrize(
    "build", [lambda w: nn.Linear(w, w), lambda w: nn.Linear(w, 3), lambda w: nn.Embedding(7, w)]
)
def test_the_widest_is_that_of_trying_all(build) -> None:
    for most in (100, 101, 480, 481, 1_999, 30_000):
        fitting = [width for width in range(WIDTHS, 400, WIDTHS) if parameters(build(width)) <= most]
        if fitting and fitting[-1] < 396:
            assert widest(build, most) == fitting[-1]
    assert widest(lambda w: nn.Linear(w, 1), 10**9) == WIDEST
    assert widest(lambda w: nn.Linear(w, 1), WIDEST + 1) == WIDEST
    assert widest(lambda w: nn.Linear(w, 1), WIDEST) == WIDEST - WIDTHS
    assert widest(lambda w: nn.Linear(w, 1), WIDTHS + 1) == WIDTHS
    with pytest.raises(InputError, match="a network of width 4 has 5 parameters, more than 4"):
        widest(lambda w: nn.Linear(w, 1), 4)


def test_no_network_much_too_wide_is_built() -> None:
    built: list[int] = []

    def build(width: int) -> nn.Module:
        built.append(width)
        return nn.Linear(width, 1)

    assert widest(build, 41) == 40
    assert max(built) <= 2 * 40


def test_frozen_parameters_do_not_count() -> None:
    model = nn.Linear(3, 2)
    assert parameters(model) == 8
    model.bias.requires_grad_(False)
    assert parameters(model) == 6


@pytest.mark.parametrize(
    "graphs", [types(), numbers(edge=2), numbers(task="node_regression")], ids=lambda g: g.task
)
@pytest.mark.parametrize("model", MODELS)
def test_every_network_takes_what_the_graphs_have(model: str, graphs: Graphs) -> None:
    architecture = Architecture(parameters=3_000, layers=2, hops=2, encoding="laplacian", encoding_size=2)
    sampler = Sampler(graphs, graphs.splits[0], architecture)
    network = build_network(model, graphs, architecture, 0).eval()
    sample = sampler.sample(torch.tensor([0, 3]), shells=model == GRED)
    outputs = sample.through(network)
    assert outputs.shape == (6 if graphs.task == "node_regression" else 2, graphs.outputs)
    assert outputs.isfinite().all()

    def moved(**changed) -> float:
        other = replace(sample, **changed).through(network)
        return (other - outputs).abs().max().item()

    assert sample.positions is not None
    assert moved(positions=sample.positions + 1) > 1e-4
    if sample.batch.edge_attr is not None:
        attributes = sample.batch.edge_attr.roll(1, 0)
        assert moved(batch=replace(sample.batch, edge_attr=attributes)) > 1e-6


@pytest.mark.parametrize("model", MODELS)
def test_equal_seeds_give_equal_weights_whatever_the_stream_of_torch(model: str) -> None:
    graphs, architecture = numbers(), Architecture(parameters=2_000, layers=2)
    torch.manual_seed(5)
    one = dict(build_network(model, graphs, architecture, 1).named_parameters())
    torch.manual_seed(99)
    two = dict(build_network(model, graphs, architecture, 1).named_parameters())
    other = dict(build_network(model, graphs, architecture, 2).named_parameters())
    assert all(torch.equal(one[name], two[name]) for name in one)
    drawn = [name for name, value in one.items() if value.ndim > 1]
    assert all(not torch.equal(one[name], other[name]) for name in drawn)
    assert any("layers" in name for name in drawn)


def test_the_sum_of_a_graph_starts_at_the_size_of_a_mean_and_tells_numbers_of_nodes_apart() -> None:
    alone = torch.zeros(2, 0, dtype=torch.long)
    same = [Graph(torch.ones(size, 1), alone, torch.zeros(1, 1)) for size in (2, 6, 4)]
    graphs = flat("equal", "regression", same)
    sampler = Sampler(graphs, consecutive((1, 1, 1)), Architecture(hops=1))
    sample = sampler.sample(torch.arange(3))
    read: dict[str, Tensor] = {}
    for readout in ("mean", "sum"):
        network = build_network(
            GRED, graphs, Architecture(parameters=2_000, layers=1, readout=readout), 0
        ).eval()
        if readout == "sum":
            network.head[-1].register_forward_pre_hook(lambda _, given: read.update(sum=given[0]))
        else:
            network.head.register_forward_pre_hook(lambda _, given: read.update(mean=given[0]))
        sample.through(network)
    for row, share in enumerate((2 / 4, 6 / 4, 4 / 4)):  # nodes of the graph over those of a mean one
        torch.testing.assert_close(read["sum"][row], share * read["mean"][row])


def test_dropout_and_the_smallest_modulus_reach_the_filters() -> None:
    graphs = numbers()
    for r_min, dropout in ((0.9, 0.3), (0.0, 0.0)):
        network = build_network(GRED, graphs, Architecture(parameters=9_000, r_min=r_min, dropout=dropout), 0)
        filters = [module for module in network.modules() if isinstance(module, DistanceFilter)]
        assert len(filters) == 4
        moduli = torch.cat([torch.exp(-each.recurrence.nu_log.exp()) for each in filters])
        assert moduli.min() >= r_min
        assert (moduli.min() < 0.9) == (r_min == 0)
        assert {each.dropout.p for each in filters} == {dropout}
    for model in set(MODELS) - {GRED}:
        network = build_network(model, graphs, Architecture(parameters=9_000, dropout=0.3), 0)
        rates = [module.p for module in network.modules() if isinstance(module, nn.Dropout)]
        assert rates
        assert set(rates) == {0.3}
        attention = [module for module in network.modules() if isinstance(module, nn.MultiheadAttention)]
        assert len(attention) == (4 if model == "gps" else 0)
        assert all(module.dropout == 0.3 and module.num_heads == 4 for module in attention)


def test_settings_that_cannot_be_used_are_named() -> None:
    for changed, words in (
        ({"parameters": 0}, "parameters must be at least 1"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"encoding_size": 0}, "encoding_size must be at least 1"),
        ({"hops": -1}, "hops cannot be negative, got -1"),
        ({"dropout": 1.0}, "rate of dropout must be at least 0 and below 1, got 1"),
        ({"dropout": math.nan}, "rate of dropout"),
        ({"r_min": 1.0}, "r_min must be at least 0 and below 1, got 1"),
        ({"readout": "max"}, "unknown read-out 'max'"),
        ({"encoding": "sine"}, "unknown encoding 'sine'; choose one of none, laplacian, random_walk"),
    ):
        with pytest.raises(InputError, match=words):
            build_network(GRED, numbers(), Architecture(**changed), 0)
    Architecture(hops=0).check()
    for names, words in (
        (("gred", "gat"), "unknown model 'gat'; choose one of gred, gcn, gine, gated_gcn, gps"),
        (("gred", "gcn", "gcn"), "every model is trained once, got gred, gcn, gcn"),
    ):
        with pytest.raises(InputError, match=words):
            check_models(names)
    check_models(MODELS)
    with pytest.raises(InputError, match=r"a network of width 4 has .* parameters, more than 100"):
        build_network("gcn", numbers(), Architecture(parameters=100), 0)


def test_a_missing_package_is_named_where_it_is_needed(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    with pytest.raises(MissingExtraError, match=r'pip install "gramian\[graphs\]"'):
        check_models(("gred", "gcn"))
    with pytest.raises(MissingExtraError, match=r"gramian\[graphs\]"):
        build_network("gps", numbers(), Architecture(), 0)
    check_models(("gred",))
    assert build_network(GRED, numbers(), Architecture(parameters=2_000), 0)


def test_standard_layers_do_not_learn_from_single_nodes() -> None:
    alone = torch.zeros(2, 0, dtype=torch.long)
    small = [Graph(torch.ones(size, 1), alone, torch.zeros(1, 1)) for size in (1, 2, 1, 1)]
    graphs = flat("small", "regression", small)
    with pytest.raises(InputError, match="choose a batch of 2 graphs or more"):
        check_batches(("gred", "gcn"), graphs, consecutive((2, 1, 1)), 1)
    with pytest.raises(InputError, match="a single node"):
        check_batches(("gps",), graphs, consecutive((1, 2, 1)), 8)  # only one graph to learn from
    check_batches(("gred",), graphs, consecutive((2, 1, 1)), 1)
    check_batches(("gcn",), graphs, consecutive((2, 1, 1)), 2)
    check_batches(("gcn",), ring_transfer((2, 1, 1), distance=2), consecutive((2, 1, 1)), 1)


def test_filters_tell_skip_links_apart_by_the_sizes_of_shells_and_one_hop_does_not() -> None:
    """All nodes are alike, so that a graph is what the sizes of its shells say; untrained, in float64."""
    graphs = circular_skip_links(copies=5)
    architecture = Architecture(parameters=5_000, layers=2, hops=10)
    sample = Sampler(graphs, graphs.splits[0], architecture).sample(
        torch.arange(0, 50, 5)
    )  # one of each class
    sizes = [tuple(value for _, value in sorted(shell_sizes(41, skip).items())) for skip in graphs.classes]
    same = {(i, j) for i in range(10) for j in range(i) if sizes[i] == sizes[j]}
    assert {(graphs.classes[i], graphs.classes[j]) for i, j in same} == {(16, 6)}  # the limit of all filters
    for model in MODELS:
        network = build_network(model, graphs, architecture, 0).double().eval()
        with torch.no_grad():
            outputs = sample.through(network)
        apart = torch.cdist(outputs, outputs, compute_mode="donot_use_mm_for_euclid_dist")
        for i in range(10):
            for j in range(i):
                seen = model == GRED and (i, j) not in same
                assert (apart[i, j].item() > 1e-6) if seen else (apart[i, j].item() < 1e-12), (model, i, j)


def shell_sizes(nodes: int, skip: int) -> dict[int, int]:
    """Number of nodes by distance from node 0 of a circle with links of one more length."""
    distance, rim = {0: 0}, [0]
    for node in rim:  # grows while it is walked
        for step in (1, -1, skip, -skip):
            if (found := (node + step) % nodes) not in distance:
                distance[found] = distance[node] + 1
                rim.append(found)
    return {k: list(distance.values()).count(k) for k in set(distance.values())}
