"""Networks on graphs by name, as wide as a number of parameters allows: ours and the standard ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor, nn

from gramian.data.graph_splits import Split
from gramian.data.graphs import NODE_TASKS, Graphs
from gramian.errors import InputError, MissingExtraError
from gramian.interop.message_passing import LAYERS, MessagePassingNetwork, message_passing_layers
from gramian.memory import check_memory
from gramian.nn.graph import DistanceFilter
from gramian.nn.graph_network import FeatureEncoder, GraphNetwork, TypeEncoder, head
from gramian.nn.positional_encodings import PositionEncoder

GRED = "gred"
"""The network that filters by distance."""

MODELS = (GRED, *LAYERS)

WIDTHS = 4
"""Widths are multiples of it, so that attention heads divide them."""

WIDEST = 2048


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What is built, whichever layers it has."""

    parameters: int = 100_000
    """Most trainable parameters; the width is the largest that stays below."""
    layers: int = 4
    """Layers between encoder and head."""
    hops: int | None = None
    """Farthest distance that a filter looks at; as far as the training graphs reach, 40 at most, if None."""
    dropout: float = 0.1
    """Dropout rate of the layers."""
    r_min: float = 0.5
    """Smallest modulus of λ at the start of a filter; larger ones look farther."""
    readout: str = "mean"
    """How the nodes of a graph are put together: mean, or sum (divided by the mean number of nodes)."""
    encoding: str = "none"
    """Positions of nodes that all networks are given: none, laplacian or random_walk."""
    encoding_size: int = 8
    """Eigenvectors, or steps of the walk."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        for name, least in {"parameters": 1, "layers": 1, "encoding_size": 1}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.hops is not None and self.hops < 0:
            raise InputError(f"hops cannot be negative, got {self.hops}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"the rate of dropout must be at least 0 and below 1, got {self.dropout:g}")
        if not 0 <= self.r_min < 1:
            raise InputError(f"r_min must be at least 0 and below 1, got {self.r_min:g}")
        if self.readout not in ("mean", "sum"):
            raise InputError(f"unknown read-out {self.readout!r}; choose mean or sum")
        if self.encoding not in ENCODINGS:
            raise InputError(f"unknown encoding {self.encoding!r}; choose one of {', '.join(ENCODINGS)}")
        largest = min(self.parameters // 4, self.layers * WIDEST**2)  # steps of widths leave no larger part
        what = f"training {self.layers:,} layers within {self.parameters:,} parameters"
        check_memory(16 * largest, what)
        counted = {"layers": self.layers, "encoding_size": self.encoding_size * (self.encoding != "none")}
        for name, count in counted.items():
            if count * WIDTHS > self.parameters:
                raise InputError(
                    f"{name} = {count:,} alone makes {count * WIDTHS:,} parameters or more, and at most "
                    f"{self.parameters:,} are allowed"
                )


ENCODINGS = ("none", "laplacian", "random_walk")


def check_models(names: Sequence[str]) -> None:
    """Raise InputError for an unknown or repeated name, MissingExtraError where a package is missing."""
    for name in names:
        if name not in MODELS:
            raise InputError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
    if len(set(names)) < len(names):
        raise InputError(f"every model is trained once, got {', '.join(names)}")
    if set(names) - {GRED} and find_spec("torch_geometric") is None:
        raise MissingExtraError('standard graph layers need torch_geometric: pip install "gramian[graphs]"')


def check_batches(names: Sequence[str], graphs: Graphs, split: Split, batch: int) -> None:
    """Raise InputError where standard layers, which are normalised over a batch, would see a single node."""
    alone = min(batch, len(split.train)) == 1 and int(graphs.ptr.diff()[split.train].min()) == 1
    if alone and set(names) - {GRED}:
        raise InputError(
            "standard layers are normalised over the nodes of a batch and cannot learn from a single node; "
            "choose a batch of 2 graphs or more"
        )


def build_network(name: str, graphs: Graphs, architecture: Architecture, seed: int) -> GraphNetwork:
    """Return the widest network of a name for some graphs within the number of parameters.

    Raises: InputError for an unknown name, or when the narrowest network has more parameters.
    """
    architecture.check()
    check_models([name])
    width = widest(lambda width: _network(name, graphs, architecture, width, seed), architecture.parameters)
    return _network(name, graphs, architecture, width, seed)


def widest(build: Callable[[int], nn.Module], most: int) -> int:
    """Return the largest width whose network has at most so many parameters.

    The width is doubled while it fits, then bisected, so that no network much too large is ever built.

    Raises: InputError when the narrowest has more.
    """

    def count(steps: int) -> int:
        return parameters(build(steps * WIDTHS))

    if (least := count(1)) > most:
        raise InputError(f"a network of width {WIDTHS} has {least:,} parameters, more than {most:,}")
    low, high, limit = 1, 2, WIDEST // WIDTHS
    while high <= limit and count(high) <= most:
        low, high = high, 2 * high
    high = min(high - 1, limit)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(middle) <= most else (low, middle - 1)
    return low * WIDTHS


def parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class Divided(nn.Module):
    """Features divided by a fixed number, so that sums over graphs start at the size of means.

    Shapes: (…) -> (…).
    Holds: exactly.
    """

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        """Divide."""
        return x / self.by


def _network(name: str, graphs: Graphs, architecture: Architecture, width: int, seed: int) -> GraphNetwork:
    nodes = _encoder(graphs.x.shape, graphs.node_types, width)
    if architecture.encoding != "none":
        nodes = PositionEncoder(nodes, architecture.encoding_size, width)
    attributes = graphs.edge_attr
    edges = None if attributes is None else _encoder(attributes.shape, graphs.edge_types, width)
    readout = "nodes" if graphs.task in NODE_TASKS else architecture.readout
    parts = {"readout": readout, "edges": edges, "seed": seed}
    reads = head(width, graphs.outputs)
    if readout == "sum":
        reads = nn.Sequential(Divided(len(graphs.x) / len(graphs)), reads)
    if name == GRED:
        layers = [
            DistanceFilter(width, width, dropout=architecture.dropout, r_min=architecture.r_min)
            for _ in range(architecture.layers)
        ]
        return GraphNetwork(nodes, layers, reads, **parts)
    layers = message_passing_layers(name, architecture.layers, width, architecture.dropout, edges is not None)
    return MessagePassingNetwork(nodes, layers, reads, **parts)


def _encoder(shape: Sequence[int], types: tuple[int, ...], width: int) -> nn.Module:
    return TypeEncoder(types, width) if types else FeatureEncoder(shape[1], width)
