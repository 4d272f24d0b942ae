"""The layer and whole networks against an independent reference implementation, with all its gradients.

The reference pads graphs; here padding is a node that nothing reaches, or is left out. It stores weights in
× out and the two maps of a gate apart.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.nn.distances import distance_shells
from gramian.nn.graph import DistanceFilter
from gramian.nn.graph_network import FeatureEncoder, GraphNetwork, TypeEncoder, head
from gramian.nn.shells import Shells, batch_shells, shells_of_distances, shells_of_pairs
from reference import Case, cases, load

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
GATES = {"full-glu": "full", "half-glu": "half", "none": "none"}

Places = dict[str, tuple[nn.Parameter, Callable[[Tensor], Tensor]]]
"""Where an array of the reference is found: a parameter, and the view of it, or of its gradient."""


def holding(*arrays: str) -> list[Any]:
    """The reference cases that have some arrays."""
    return [
        case
        for case in cases("gred")
        if not case.values[0] or set(arrays) <= set(load(case.values[0]).arrays)
    ]


def whole(parameter: Tensor) -> Tensor:
    return parameter


def linear(name: str, module: Any, part: slice = slice(None)) -> Places:
    return {
        f"{name}_weight": (module.weight, lambda w: w[part].T),
        f"{name}_bias": (module.bias, lambda b: b[part]),
    }


def norm(name: str, module: Any) -> Places:
    return {f"{name}_scale": (module.weight, whole), f"{name}_bias": (module.bias, whole)}


def recurrent(filter: DistanceFilter) -> Places:
    places = norm("norm", filter.norm)
    places |= {name: (parameter, whole) for name, parameter in filter.recurrence.named_parameters()}
    if hasattr(filter.gate, "both"):
        width = filter.recurrence.width
        places |= linear("glu_value", filter.gate.both, slice(width))
        places |= linear("glu_gate", filter.gate.both, slice(width, None))
    elif hasattr(filter.gate, "gate"):
        places |= linear("glu_gate", filter.gate.gate)
    return places


def layered(filter: DistanceFilter) -> Places:
    mlp = norm("norm", filter.mlp.norm) | linear("in", filter.mlp.up) | linear("out", filter.mlp.down)
    named = {f"mlp.{name}": place for name, place in mlp.items()}
    return named | {f"lru.{name}": place for name, place in recurrent(filter).items()}


def fill(places: Places, case: Case, ignored: set[str]) -> None:
    """Copy the arrays; all that are no parameter, input or result have to be asked for."""
    with torch.no_grad():
        for name, (parameter, view) in places.items():
            view(parameter).copy_(case.arrays[name])
    asked = {name for name in case.arrays if not name.startswith("grad_")} - {"cotangent", "output"}
    assert set(places) == asked - ignored


def compare(places: Places, case: Case, output: Tensor, inputs: dict[str, Tensor]) -> None:
    """The output, and the gradient of every parameter and input that the reference gives one of."""
    torch.testing.assert_close(output, case.arrays["output"], **CLOSE)
    (output * case.arrays["cotangent"]).sum().backward()
    for name, expected in case.arrays.items():
        known = name.removeprefix("grad_")
        if known == name:
            continue
        if known in inputs:
            torch.testing.assert_close(inputs[known].grad, expected, **CLOSE)
        else:
            parameter, view = places[known]
            torch.testing.assert_close(view(parameter.grad), expected, **CLOSE)


def filter_of(config: dict[str, Any]) -> DistanceFilter:
    sizes = config["dim_h"], config["dim_v"]
    filter = DistanceFilter(*sizes, expand=config["expand"], gate=GATES[config["act"]])
    for part in (filter.norm, filter.mlp.norm):
        assert part.eps == config["layernorm_eps"]
    return filter.double()


def distances_of(masks: Tensor) -> Tensor:
    """(K, N, N) masks to (N, N) distances, −1 where there is none."""
    hops = torch.arange(len(masks))[:, None, None]
    return torch.where(masks.bool().any(0), (masks * hops).sum(0), -1)


def shells_of(case: Case, real: bool) -> Shells:
    """The shells of all graphs, with the nodes of padding or without."""
    masks, graphs = case.arrays["dist_masks"], []
    sizes = case.arrays["node_mask"].sum(1).tolist() if real else [masks.shape[-1]] * len(masks)
    for one, size in zip(masks, sizes, strict=True):
        graphs.append(shells_of_distances(distances_of(one)[:size, :size], masks.shape[1]))
    return batch_shells(graphs)


def equal(one: Shells, other: Shells) -> bool:
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("node", "hop", "starts", "members"))


@pytest.mark.parity
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("path", holding("mlp.in_weight", "distances"))
def test_layer_equals_reference(path: Path, dense: bool) -> None:
    case = load(path)
    arrays = case.arrays
    filter, shells = filter_of(case.spec["config"]), shells_of(case, real=False)
    places = layered(filter)
    fill(places, case, {"inputs", "dist_masks", "distances", "adjacency", "node_mask"})
    x = arrays["inputs"].clone().requires_grad_()
    shells = shells.dense(torch.float64) if dense else shells
    compare(places, case, filter(x.flatten(0, 1), shells).unflatten(0, x.shape[:2]), {"inputs": x})
    filter.recurrence.nu_log.data[0] += 1e-6  # control
    with pytest.raises(AssertionError):
        torch.testing.assert_close(filter(x.flatten(0, 1), shells), arrays["output"].flatten(0, 1), **CLOSE)


@pytest.mark.parity
@pytest.mark.parametrize("path", holding("mlp.in_weight", "distances"))
def test_shells_equal_the_reference(path: Path) -> None:
    case = load(path)
    count, nodes = case.arrays["dist_masks"].shape[1:3]
    found = []
    for bonds in case.arrays["adjacency"]:
        v, u = torch.nonzero(bonds, as_tuple=True)
        found.append(distance_shells(torch.stack((u, v)), nodes, count))
    assert equal(batch_shells(found), shells_of(case, real=False))
    tables = [shells_of_distances(table.long(), count) for table in case.arrays["distances"]]
    assert equal(batch_shells(tables), batch_shells(found))
    fewer = [shells.with_count(count - 1) for shells in found]
    assert not equal(batch_shells(fewer), batch_shells(found))  # control


@pytest.mark.parity
@pytest.mark.parametrize("path", holding("nu_log", "inputs"))
def test_recurrent_part_equals_reference(path: Path) -> None:
    """Every node has one node at each distance, whose features are what the reference sums up before."""
    case = load(path)
    filter = filter_of(case.spec["config"])
    filter.mlp = nn.Identity()
    places = recurrent(filter)
    fill(places, case, {"inputs"})
    x = case.arrays["inputs"].clone().requires_grad_()
    count, roots = len(x), x[0, ..., 0].numel()
    hops = torch.arange(1, count).repeat_interleave(roots)
    targets = torch.arange(roots).repeat(count - 1)
    shells = shells_of_pairs(targets, hops * roots + targets, hops, [roots * count], count)
    output = filter(x.flatten(0, -2), shells)[:roots].unflatten(0, x.shape[1:-1])
    compare(places, case, output, {"inputs": x})


def layers_of(config: dict[str, Any]) -> list[DistanceFilter]:
    return [filter_of(config) for _ in range(config["n_layers"])]


def layer_places(network: GraphNetwork) -> Places:
    return {
        f"layer_{index}.{name}": place
        for index, filter in enumerate(network.layers)
        for name, place in layered(filter).items()
    }


@pytest.mark.parity
@pytest.mark.parametrize("path", holding("node_embedding", "edge_embedding"))
def test_network_of_molecules_equals_reference(path: Path) -> None:
    case = load(path)
    config, arrays = case.spec["config"], case.arrays
    width = config["dim_h"]
    nodes = TypeEncoder([config["n_node_types"]], width)
    bonds = TypeEncoder([config["n_edge_types"]], width)
    network = GraphNetwork(nodes, layers_of(config), head(width, config["out_dim"]), edges=bonds).double()
    places: Places = {
        "node_embedding": (nodes.tables[0].weight, whole),
        **linear("node", nodes.projection[1]),
        "edge_embedding": (bonds.tables[0].weight, whole),
        **linear("edge", bonds.projection[1]),
        **layer_places(network),
        **linear("head_in", network.head[0]),
        **linear("head_out", network.head[2]),
    }
    fill(places, case, {"node_type", "edge_type", "dist_masks", "node_mask"})
    real = arrays["node_mask"].bool()
    number = torch.cumsum(real.flatten(), 0).reshape(real.shape) - 1
    graph, v, u = torch.nonzero(arrays["dist_masks"][:, 1], as_tuple=True)
    edges = torch.stack((number[graph, u], number[graph, v]))
    types = arrays["node_type"][real], arrays["edge_type"][graph, v, u]
    output = network(types[0], shells_of(case, real=True), edges, types[1])
    compare(places, case, output, {})
    padded = arrays["node_type"].flatten(), shells_of(case, real=False)  # control: padding that is pooled
    places = torch.arange(real.numel()).reshape(real.shape)
    edges = torch.stack((places[graph, u], places[graph, v]))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(network(*padded, edges, types[1]), arrays["output"], **CLOSE)


@pytest.mark.parity
@pytest.mark.parametrize("path", holding("node_features", "in2_weight"))
def test_network_of_super_pixels_equals_reference(path: Path) -> None:
    case = load(path)
    config = case.spec["config"]
    width = config["dim_h"]
    nodes = FeatureEncoder(config["in_features"], width)
    last = head(width, config["n_classes"], hidden=False)
    network = GraphNetwork(nodes, layers_of(config), last, readout="mean").double()
    places: Places = {
        **linear("in", nodes.maps[0]),
        **linear("in2", nodes.maps[2]),
        **layer_places(network),
        **linear("head", network.head),
    }
    fill(places, case, {"node_features", "dist_masks", "node_mask"})
    x = case.arrays["node_features"].clone().requires_grad_()
    shells = shells_of(case, real=True)
    output = network(x[case.arrays["node_mask"].bool()], shells)
    compare(places, case, output, {"node_features": x})
    network.readout = "sum"  # control
    with pytest.raises(AssertionError):
        other = network(x[case.arrays["node_mask"].bool()], shells)
        torch.testing.assert_close(other, case.arrays["output"], **CLOSE)
