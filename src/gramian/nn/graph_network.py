"""Networks that filter graphs by distance: encoders, read-outs, heads, and groups for the optimiser."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.graph import Dense
from gramian.nn.init import initialise_
from gramian.nn.recurrence import LinearRecurrence
from gramian.nn.shells import SIZES, Shells, check_edges
from gramian.nn.transforms import under_transform

EMBEDDING_STD = 0.01
"""Standard deviation of embeddings of types at the start."""


class TypeEncoder(nn.Module):
    """Features of types: a sum of embeddings, one a column, and a linear map behind it.

        x = W gelu(Σ_j E_j[t_j]) + b,   E ~ N(0, 0.01²) at the start

    Not `projected`, x is the sum itself.

    Shapes: (any) or (any, columns) of integers -> (any, width).
    Raises: InputError for no column, a column without types, and, on a CPU, for types that are not there.
    Holds: exactly.
    Source: Ding et al. 2024, arXiv 2312.01538 (ZINC and Peptides; not projected: PATTERN and CLUSTER).
    """

    def __init__(self, sizes: Sequence[int], width: int, *, projected: bool = True) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1 or width < 1:
            raise InputError(
                f"an encoder of types needs columns of at least one type each and a positive width, got "
                f"{list(sizes)} and {width}"
            )
        self.sizes = tuple(sizes)
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        self.projection = nn.Sequential(nn.GELU("tanh"), Dense(width, width)) if projected else nn.Identity()
        self.initialise_(None)

    def initialise_(self, generator: torch.Generator | None) -> None:
        """Draw the embeddings."""
        for table in self.tables.parameters():
            nn.init.normal_(table, std=EMBEDDING_STD, generator=generator)

    def forward(self, types: Tensor) -> Tensor:
        """Look up, add and map."""
        columns = types[:, None] if types.ndim == 1 else types
        if columns.ndim != 2 or columns.shape[1] != len(self.sizes) or types.dtype not in SIZES:
            raise InputError(
                f"types are integers in {len(self.sizes)} columns, got {tuple(types.shape)} of {types.dtype}"
            )
        columns = columns.int() if types.dtype not in (torch.int64, torch.int32) else columns
        if types.device.type == "cpu" and not under_transform():
            self._check(columns)
        found = [table(column) for table, column in zip(self.tables, columns.unbind(1), strict=True)]
        return self.projection(torch.stack(found).sum(0))

    def _check(self, columns: Tensor) -> None:
        for place, (column, size) in enumerate(zip(columns.unbind(1), self.sizes, strict=True)):
            if column.numel() and not (int(column.min()) >= 0 and int(column.max()) < size):
                raise InputError(
                    f"types of column {place} lie in 0 … {size - 1}, got {int(column.min())} … "
                    f"{int(column.max())}"
                )


class FeatureEncoder(nn.Module):
    """Features of numbers: x = W₂ gelu(W₁ f + b₁) + b₂.

    Shapes: (any, features) of floats -> (any, width).
    Raises: InputError for sizes below 1, features of another number or type, and, on a CPU, for ones that
        are not finite.
    Holds: exactly.
    Source: Ding et al. 2024, arXiv 2312.01538 (super-pixels).
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        if features < 1 or width < 1:
            raise InputError(f"an encoder of features needs positive sizes, got {features} and {width}")
        self.features = features
        self.maps = nn.Sequential(Dense(features, width), nn.GELU("tanh"), Dense(width, width))

    def forward(self, features: Tensor) -> Tensor:
        """Map."""
        if features.ndim != 2 or features.shape[1] != self.features or not features.is_floating_point():
            raise InputError(
                f"features are floats in {self.features} columns, got {tuple(features.shape)} of "
                f"{features.dtype}"
            )
        if features.device.type == "cpu" and not under_transform() and not features.isfinite().all():
            raise InputError("features must be finite, got NaN or infinity")
        return self.maps(features)


def head(width: int, outputs: int, *, hidden: bool = True) -> nn.Module:
    """Return what reads features out: W₂ gelu(W₁ g + b₁) + b₂, or W g + b without a hidden layer.

    Shapes: (…, width) -> (…, outputs).
    Raises: InputError for sizes below 1.
    """
    if width < 1 or outputs < 1:
        raise InputError(f"a head needs positive sizes, got {width} and {outputs}")
    last = Dense(width, outputs)
    return nn.Sequential(Dense(width, width), nn.GELU("tanh"), last) if hidden else last


READOUTS = ("sum", "mean", "nodes")
"""What a network describes: graphs by the sum or the mean over their nodes, or every node."""


class GraphNetwork(nn.Module):
    """A network on graphs: encoders of nodes and edges, layers that filter by distance, a read-out, a head.

        h_v = E(x_v) + mean_{(u,v)} F(e_{uv}),   h ← layer(h, shells),   y = head(Σ_v h_v)

    Edges are averaged over those into a node, once at the input; loops are left out. "mean" divides the sum
    by the number of nodes; "nodes" describes every node and has no sum. Layers are any modules of features
    and shells. Weights start as a function of the seed.

    Shapes: nodes (nodes, …) or a pair of them with their positions, shells, edges (2, any), their features
        (any, …) -> (graphs or nodes, outputs).
    Raises: InputError for no layer, an unknown read-out, edges without their features or the reverse.
    Holds: exactly; the read-out of graphs is invariant under a permutation of their nodes.
    Source: Ding et al. 2024, arXiv 2312.01538.
    """

    def __init__(
        self,
        nodes: nn.Module,
        layers: Sequence[nn.Module],
        head: nn.Module,
        *,
        readout: str = "sum",
        edges: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not layers:
            raise InputError("a network on graphs needs at least one layer")
        if readout not in READOUTS:
            raise InputError(f"unknown read-out {readout!r}; choose one of {', '.join(READOUTS)}")
        self.nodes, self.edges, self.head, self.readout = nodes, edges, head, readout
        self.layers = nn.ModuleList(layers)
        initialise_(self, seed)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        shells: Shells,
        edge_index: Tensor | None = None,
        edge_features: Tensor | None = None,
    ) -> Tensor:
        """Describe every graph, or every node."""
        h, _ = self.encoded(x, shells, edge_index, edge_features)
        shells = shells if under_transform() else shells.fastest(h.dtype)
        for layer in self.layers:
            h = layer(h, shells)
        return self.head(self.pooled(h, shells))

    def encoded(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        shells: Shells,
        edge_index: Tensor | None = None,
        edge_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode nodes with the mean of the edges into them, and edges: (nodes, width), (edges, width)."""
        h = self.nodes(x)
        if h.shape[0] != shells.nodes:
            raise InputError(f"the shells are those of {shells.nodes} nodes, got features of {h.shape[0]}")
        if (self.edges is None) != (edge_features is None) or (
            edge_features is not None and edge_index is None
        ):
            raise InputError("features of edges are given with the edges, to a network that encodes them")
        if self.edges is None:
            return h, None
        edges = self.edges(edge_features)
        return h + incoming_mean(edges, edge_index, h.shape[0]).to(h.dtype), edges

    def pooled(self, h: Tensor, shells: Shells) -> Tensor:
        """Read the nodes out: (nodes, width) -> (graphs, width), or as they are."""
        if self.readout == "nodes":
            return h
        total = h.new_zeros(len(shells.sizes), h.shape[1]).index_add(0, shells.graph, h)
        if self.readout == "sum":
            return total
        return total / total.new_zeros(len(total)).index_add(0, shells.graph, h.new_ones(len(h)))[:, None]


def incoming_mean(features: Tensor, edges: Any, nodes: int) -> Tensor:
    """Return the mean of edge features over the edges into every node, zero where there is none.

        m_v = mean_{(u,v), u ≠ v} f_{uv}

    Shapes: (edges, width), edges (2, edges) -> (nodes, width).
    Raises: InputError for edges of another number or shape, or to nodes that are not there.
    Holds: exactly.
    """
    check_edges(edges, nodes)
    if edges.shape[1] != len(features):
        raise InputError(
            f"every edge has its features, got {edges.shape[1]} edges and {len(features)} features"
        )
    sources, targets = edges.long()
    real = (sources != targets).to(features.dtype)
    total = features.new_zeros(nodes, features.shape[1]).index_add(0, targets, features * real[:, None])
    number = features.new_zeros(nodes).index_add(0, targets, real)
    return total / number.clamp(min=1)[:, None]


def optimiser_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, *, recurrence_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Split the trainable parameters as published: recurrence, what is not decayed, the rest.

    B, ν_log, θ_log and γ_log of every recurrence learn at a rate times the factor, without decay; embeddings,
    scales of norms and biases are not decayed; the rest is, C included. Adam is AdamW without decay, so that
    one AdamW takes all three.

    Raises: InputError for no trainable parameter, a rate or factor that is not positive, a negative decay.
    Source: Ding et al. 2024, the authors' code.
    """
    if not (0 < learning_rate * recurrence_factor < math.inf and weight_decay >= 0):
        raise InputError(
            f"groups need a positive rate and factor and a decay of at least 0, got {learning_rate:g}, "
            f"{recurrence_factor:g} and {weight_decay:g}"
        )
    recurrent, tables = set(), set()
    for module in model.modules():
        if isinstance(module, LinearRecurrence):
            recurrent |= {id(p) for name, p in module.named_parameters() if not name.startswith("c_")}
        if isinstance(module, nn.Embedding):
            tables.add(id(module.weight))
    groups: dict[str, list[nn.Parameter]] = {"recurrence": [], "still": [], "decayed": []}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        still = id(parameter) in tables or parameter.ndim < 2
        name = "recurrence" if id(parameter) in recurrent else "still" if still else "decayed"
        groups[name].append(parameter)
    if not any(groups.values()):
        raise InputError("the model has no trainable parameter")
    rates = {"recurrence": learning_rate * recurrence_factor}
    return [
        {
            "params": parameters,
            "lr": rates.get(name, learning_rate),
            "weight_decay": weight_decay if name == "decayed" else 0.0,
        }
        for name, parameters in groups.items()
    ]
