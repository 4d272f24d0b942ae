"""Standard layers of PyTorch Geometric in our graph networks: what a distance filter is compared with."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.errors import InputError, MissingExtraError
from gramian.nn.graph import Dense
from gramian.nn.graph_network import GraphNetwork
from gramian.nn.shells import Shells, check_edges

HEADS = 4
"""Attention heads of a GPS layer; its width is a multiple of them."""


class ConvolutionLayer(nn.Module):
    """A convolution between neighbours with what usually stands around it.

        h'_v = h_v + drop(ReLU(BN(conv(h, edges)_v)))

    Shapes: (nodes, width), edges (2, any), their features (any, width) or None, graph (nodes) -> (nodes,
        width).
    Holds: exactly.
    Source: Dwivedi et al. 2020, arXiv 2003.00982.
    """

    def __init__(self, conv: nn.Module, width: int, dropout: float, *, takes_edges: bool) -> None:
        super().__init__()
        self.conv, self.norm = conv, nn.BatchNorm1d(width)
        self.dropout, self.takes_edges = nn.Dropout(dropout), takes_edges

    def initialise_(self, generator: torch.Generator) -> None:
        """Draw the weights as the package does."""
        _reset(self.conv, generator)

    def forward(self, h: Tensor, edge_index: Tensor, edges: Tensor | None, graph: Tensor) -> Tensor:
        """Convolve and add."""
        found = self.conv(h, edge_index, edges) if self.takes_edges else self.conv(h, edge_index)
        return h + self.dropout(self.norm(found).relu())


class AttentionLayer(nn.Module):
    """A GPS layer: a convolution between neighbours beside attention between all nodes of a graph.

    Shapes: as `ConvolutionLayer`.
    Source: Rampášek et al. 2022, arXiv 2205.12454.
    """

    def __init__(self, layer: nn.Module, *, takes_edges: bool) -> None:
        super().__init__()
        self.layer, self.takes_edges = layer, takes_edges

    def initialise_(self, generator: torch.Generator) -> None:
        """Draw the weights as the package does."""
        _reset(self.layer, generator)

    def forward(self, h: Tensor, edge_index: Tensor, edges: Tensor | None, graph: Tensor) -> Tensor:
        """Convolve, attend and add."""
        more = {"edge_attr": edges} if self.takes_edges else {}
        return self.layer(h, edge_index, graph, **more)


def _reset(module: Any, generator: torch.Generator) -> None:
    """Let a module of the package draw its weights from a generator; torch's own stream is put back."""
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module.reset_parameters()


def _gcn(width: int, dropout: float, edges: bool) -> nn.Module:
    return ConvolutionLayer(_package().GCNConv(width, width), width, dropout, takes_edges=False)


def _gine(width: int, dropout: float, edges: bool) -> nn.Module:
    return ConvolutionLayer(_isomorphism(width, edges), width, dropout, takes_edges=edges)


def _gated_gcn(width: int, dropout: float, edges: bool) -> nn.Module:
    conv = _package().ResGatedGraphConv(width, width, edge_dim=width if edges else None)
    return ConvolutionLayer(conv, width, dropout, takes_edges=edges)


def _gps(width: int, dropout: float, edges: bool) -> nn.Module:
    local = _isomorphism(width, edges)
    layer = _package().GPSConv(width, local, heads=HEADS, dropout=dropout, attn_kwargs={"dropout": dropout})
    return AttentionLayer(layer, takes_edges=edges)


def _isomorphism(width: int, edges: bool) -> nn.Module:
    """Return GIN's convolution, GINE's where edges have features."""
    maps = nn.Sequential(Dense(width, width), nn.ReLU(), Dense(width, width))
    return (_package().GINEConv if edges else _package().GINConv)(maps)


LAYERS: dict[str, Callable[[int, float, bool], nn.Module]] = {
    "gcn": _gcn,
    "gine": _gine,
    "gated_gcn": _gated_gcn,
    "gps": _gps,
}
"""Layers by name; each is a factory `width, dropout, whether edges have features -> module`."""


class MessagePassingNetwork(GraphNetwork):
    """A `GraphNetwork` whose layers look along edges instead of at shells.

    Encoders, read-out and head are those of `GraphNetwork`; features of edges are added at the input in the
    same way, and are given to every layer that takes them.

    Shapes: nodes (nodes, …), shells, edges (2, any), their features (any, …) -> (graphs or nodes, outputs);
        the shells only say which node is of which graph.
    Raises: InputError as `GraphNetwork`.
    Holds: exactly.
    """

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        shells: Shells,
        edge_index: Tensor | None = None,
        edge_features: Tensor | None = None,
    ) -> Tensor:
        """Describe every graph, or every node."""
        if edge_index is None:
            raise InputError("a network whose layers look along edges is given the edges")
        h, edges = self.encoded(x, shells, edge_index, edge_features)
        check_edges(edge_index, h.shape[0])
        for layer in self.layers:
            h = layer(h, edge_index, edges, shells.graph.long())
        return self.head(self.pooled(h, shells))


def message_passing_layers(
    name: str, layers: int, width: int, dropout: float, edges: bool
) -> Sequence[nn.Module]:
    """Return some standard layers of a name.

    Raises: InputError for an unknown name or a width that the heads do not divide; MissingExtraError without
        torch_geometric.
    """
    if name not in LAYERS:
        raise InputError(f"unknown layer {name!r}; choose one of {', '.join(LAYERS)}")
    if name == "gps" and width % HEADS:
        raise InputError(f"the width of a GPS layer is a multiple of its {HEADS} heads, got {width}")
    return [LAYERS[name](width, dropout, edges) for _ in range(layers)]


def _package() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.script, which the package calls
            from torch_geometric import nn as layers
    except ImportError as error:
        raise MissingExtraError(
            'standard graph layers need torch_geometric: pip install "gramian[graphs]"'
        ) from error
    return layers
