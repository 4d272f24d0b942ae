"""Graphs filtered by distance with PyTorch Geometric: layer, network, transform, and data both ways."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.data.graphs import NODE_TASKS, Graph, Graphs, flat
from gramian.errors import InputError
from gramian.interop.pyg_shells import (
    AddDistanceShells,
    Data,
    ShellLoader,
    add_distance_shells,
    shells_of,
    shells_of_tensors,
)
from gramian.nn import graph
from gramian.nn.graph import Dense
from gramian.nn.graph_network import FeatureEncoder, GraphNetwork, TypeEncoder, head
from gramian.nn.init import initialise_
from gramian.nn.shells import Shells

__all__ = [
    "AddDistanceShells",
    "DistanceFilter",
    "DistanceFilterNet",
    "ShellLoader",
    "add_distance_shells",
    "from_pyg",
    "shells_of",
    "to_pyg",
]


class DistanceFilter(graph.DistanceFilter):
    """The layer `gramian.nn.graph.DistanceFilter`, called like a convolution of PyTorch Geometric.

        h' = layer(h, shells),   h' = layer(h, shell_index, shell_hop, shell_count)

    Several layers share the shells that `shells_of(batch)` gives; from the tensors of a batch each layer
    makes its own. It stands where a convolution stands, in `GPSConv` too, whose `edge_index` are then the
    shells.

    Args:
        channels: size of the features, those in and those out.
        state: number of complex states of the recurrence; as many as channels when None.
        settings: what the layer takes: dropout, expand, gate, r_min and so on.

    Shapes: x (nodes, channels) -> (nodes, channels).
    Raises: InputError as the layer, and for tensors without distances or the number of shells.
    Holds: exactly: equal to the layer.
    Source: Ding et al. 2024, arXiv 2312.01538.
    """

    def __init__(self, channels: int, state: int | None = None, **settings: Any) -> None:
        super().__init__(channels, channels if state is None else state, **settings)
        self.channels, self.state = channels, self.recurrence.state

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        shells: Shells | Tensor,
        shell_hop: Tensor | None = None,
        shell_count: Tensor | int | None = None,
    ) -> Tensor:
        """Filter the features of all nodes."""
        if not isinstance(shells, Shells):
            shells = shells_of_tensors(shells, shell_hop, shell_count, [len(x)])
        return super().forward(x, shells)

    def reset_parameters(self) -> None:
        """Start anew, from torch's global generator."""
        _start_anew(self)

    def __repr__(self) -> str:
        """Name the layer and its sizes."""
        return f"{type(self).__name__}({self.channels}, state={self.state})"


class DistanceFilterNet(nn.Module):
    """A network that filters the graphs of a batch by distance: `GraphNetwork`, called with the batch.

        h_v = E(x_v) + Σ_p W_p p_v + mean_{(u,v)} F(e_{uv}),   h ← layer(h, shells),   y = head(Σ_v h_v)

    Positional encodings p are attributes of the nodes, by name, that a transform has added, such as
    `laplacian_eigenvector_pe` and `random_walk_pe`.

    Args:
        in_channels: number of features of a node, or how many types there are in each column of `x`.
        hidden_channels: width of the layers.
        num_layers: number of layers.
        out_channels: numbers that describe a graph or a node.
        state: number of complex states of every recurrence; as many as hidden channels when None.
        readout: "sum" or "mean" over the nodes of a graph, or "nodes", which describes every node.
        edges: number of features of an edge, or how many types there are in each column of `edge_attr`;
            without it `edge_attr` is not looked at.
        encodings: size of every positional encoding, by its attribute.
        settings: what every layer takes: dropout, expand, gate, r_min and so on.

    Shapes: a batch or a graph with shells -> (graphs or nodes, out_channels).
    Raises: InputError for sizes below 1, an unknown read-out, a batch without the shells, features or
        encodings that the network was told of, or with others.
    Holds: exactly: equal to `GraphNetwork`.
    Source: Ding et al. 2024, arXiv 2312.01538.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        hidden_channels: int,
        num_layers: int,
        out_channels: int,
        *,
        state: int | None = None,
        readout: str = "sum",
        edges: int | Sequence[int] | None = None,
        encodings: Mapping[str, int] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        for name, size in (encodings or {}).items():
            if size < 1:
                raise InputError(f"an encoding has a positive size, got {size} of {name}")
        self.encoder = _encoder(in_channels, hidden_channels)
        self.encodings = nn.ModuleDict(
            {name: Dense(size, hidden_channels) for name, size in (encodings or {}).items()}
        )
        self.network = GraphNetwork(
            nn.Identity(),
            [DistanceFilter(hidden_channels, state, **settings) for _ in range(num_layers)],
            head(hidden_channels, out_channels),
            readout=readout,
            edges=None if edges is None else _encoder(edges, hidden_channels),
        )
        self.reset_parameters()

    def forward(self, data: Any) -> Tensor:
        """Describe every graph of a batch, or every node."""
        h = self.encoder(_attribute(data, "x"))
        for name, layer in self.encodings.items():
            encoding = _attribute(data, name)
            if encoding.shape != (len(h), layer.in_features):
                raise InputError(
                    f"{name} is ({len(h)}, {layer.in_features}) for this network, got {tuple(encoding.shape)}"
                )
            h = h + layer(encoding.to(layer.weight.dtype))
        with_edges = self.network.edges is not None
        edges = (data.edge_index, _attribute(data, "edge_attr")) if with_edges else ()
        return self.network(h, shells_of(data), *edges)

    def reset_parameters(self) -> None:
        """Start anew, from torch's global generator."""
        _start_anew(self)


def to_pyg(graphs: Graphs) -> list[Data]:
    """Return graphs as those of PyTorch Geometric, with `x`, `edge_index`, `edge_attr` and `y`.

    Holds: exactly.
    """
    each = (graphs[number] for number in range(len(graphs)))
    return [Data(x=g.x, edge_index=g.edge_index, edge_attr=g.edge_attr, y=g.y) for g in each]


def from_pyg(dataset: Iterable[Any], task: str, *, name: str = "graphs") -> Graphs:
    """Return graphs of PyTorch Geometric as ours; nodes without `x` have the type 0.

    Raises: InputError for graphs without `edge_index` or `y`, and as `Graphs`.
    Holds: exactly: the inverse of `to_pyg`, but for numbers of types that do not occur and splits.
    """
    return flat(name, task, [_graph(data, task) for data in dataset])


def _graph(data: Any, task: str) -> Graph:
    edge_index, y = _attribute(data, "edge_index"), torch.as_tensor(_attribute(data, "y"))
    nodes = data.num_nodes
    x = torch.zeros(nodes, dtype=torch.long) if data.x is None else data.x
    rows = nodes if task in NODE_TASKS else 1
    if task in ("classification", "node"):
        y = y.reshape(-1) if y.is_floating_point() else y.reshape(-1).long()
    else:
        y = y.reshape(rows, -1).to(torch.get_default_dtype() if not y.is_floating_point() else y.dtype)
    return Graph(x, edge_index, y, data.edge_attr)


def _encoder(sizes: int | Sequence[int], width: int) -> nn.Module:
    return FeatureEncoder(sizes, width) if isinstance(sizes, int) else TypeEncoder(sizes, width)


def _attribute(data: Any, name: str) -> Any:
    """Return an attribute that a batch must have."""
    value = getattr(data, name, None)
    if value is None:
        raise InputError(f"graphs lack {name}, which is asked for here")
    return value


def _start_anew(module: nn.Module) -> None:
    """Draw all parameters from torch's global generator."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
    initialise_(module, int(torch.randint(2**31, ())))
