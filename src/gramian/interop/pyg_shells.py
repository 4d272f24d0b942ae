"""Distance shells on graphs of PyTorch Geometric: a transform, data loading, and back to our own shells."""

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gramian.errors import InputError, MissingExtraError
from gramian.interop.pyg_pairs import Edges, Search, find_pairs
from gramian.nn.shells import Shells, shells_of_pairs

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.script, which the package calls
        from torch_geometric.data import Data, HeteroData, InMemoryDataset
        from torch_geometric.loader import DataLoader
        from torch_geometric.transforms import BaseTransform
except ImportError as error:
    raise MissingExtraError(
        'graphs of PyTorch Geometric need torch_geometric: pip install "gramian[graphs]"'
    ) from error

Function = TypeVar("Function", bound=Callable[..., Any])


class AddDistanceShells(BaseTransform):
    """Say on every graph which pairs of nodes lie at which distance, as a transform or a pre_transform.

        {(u, v) : d(u, v) = k},   0 < k < count

    `shell_index` (2, entries) holds the pairs, sources above targets as in `edge_index`, `shell_hop`
    (entries) their distances, `shell_count` (1) the number of shells, the node itself included. Plain data
    loaders and data sets join, part, move and save them, by the rules for their names: numbers of nodes
    count on from graph to graph. Memory is 9 bytes a pair, 12 from 257 shells on.

    Edges are walked as they lead, so that a shell of v holds those who reach v; an undirected graph has both
    directions in `edge_index`. Add shells last: what later changes nodes or edges does not change them.

    Args:
        count: number of shells; the farthest is at distance count − 1.
        directed: whether edges are walked as they lead; if not, both ways.
        cache: folder that keeps what was found, one safetensors file a call.
        gigabytes: most memory that the search of one graph may take.

    Raises: InputError for a count below 1, other than a `Data` with `edge_index` and a number of nodes, edges
        to nodes that are not there, more than `gigabytes`, a folder that cannot be written.
    Holds: exactly.
    """

    def __init__(
        self,
        count: int,
        *,
        directed: bool = True,
        cache: str | Path | None = None,
        gigabytes: float = 4.0,
    ) -> None:
        self.search = Search(count, directed, gigabytes)
        self.cache = None if cache is None else Path(cache)

    def forward(self, data: Any) -> Any:
        """Add the shells of one graph; PyTorch Geometric passes a copy."""
        return self.add([data])[0]

    def add(self, graphs: Sequence[Any], workers: int = 0) -> list[Any]:
        """Add the shells of several graphs in place, searched by so many other processes."""
        found = find_pairs(
            [_edges(data, number) for number, data in enumerate(graphs)],
            self.search,
            workers=workers,
            cache=self.cache,
        )
        for data, (index, hop) in zip(graphs, found, strict=True):
            device = data.edge_index.device
            data.shell_index = torch.from_numpy(index).to(device)
            data.shell_hop = torch.from_numpy(hop).to(device)
            data.shell_count = torch.tensor([self.search.count], device=device)
        return list(graphs)

    def __repr__(self) -> str:
        """Name the transform and the number of shells."""
        return f"{type(self).__name__}({self.search.count}, directed={self.search.directed})"


def add_distance_shells(
    data_or_dataset: Any,
    count: int,
    *,
    directed: bool = True,
    workers: int = 0,
    cache: str | Path | None = None,
    gigabytes: float = 4.0,
) -> Any:
    """Return a graph, graphs or a data set with their distance shells; see `AddDistanceShells`.

    A `Data` gives a `Data` and an `InMemoryDataset` one of its kind, with the graphs it selects as they are
    before its transform; anything else that yields graphs, other data sets included, gives a list. What was
    given is not changed.

    Args:
        data_or_dataset: what gets shells.
        count: number of shells, the node itself included.
        directed: whether edges are walked as they lead; if not, both ways.
        workers: number of other processes that search; each takes seconds to start.
        cache: folder that keeps what was found, one safetensors file for all graphs of a call.
        gigabytes: most memory that the search of one graph may take.

    Raises: InputError as `AddDistanceShells`, and for a negative number of workers.
    Holds: exactly, whatever the number of workers.
    """
    transform = AddDistanceShells(count, directed=directed, cache=cache, gigabytes=gigabytes)
    given = data_or_dataset
    if isinstance(given, Data | HeteroData):
        return transform.add([copy.copy(given)], workers)[0]
    if isinstance(given, InMemoryDataset):
        made = copy.copy(given)
        graphs = transform.add([copy.copy(given.get(place)) for place in given.indices()], workers)
        made._indices = made._data_list = None
        made._data, made.slices = made.collate(graphs)
        return made
    if not isinstance(given, Iterable) and not hasattr(given, "__getitem__"):
        raise InputError(f"shells are added to a Data, several or a data set, not to {type(given).__name__}")
    return transform.add([copy.copy(data) for data in given], workers)


def shells_of(data: Any) -> Shells:
    """Return the shells of a batch, or of one graph, to which `AddDistanceShells` has given them.

    A batch of a `ShellLoader` has them at hand; else the pairs are sorted, on the device they are on. A layer
    takes both, but several layers share one result.

    Raises: InputError for a batch without shells, with several numbers of them, or with pairs of nodes that
        are not there.
    Holds: exactly: equal to the shells of the graphs, joined.
    """
    if isinstance(ready := getattr(data, "shells", None), Shells):
        return ready
    index, hop, count = (getattr(data, f"shell_{name}", None) for name in ("index", "hop", "count"))
    ptr = getattr(data, "ptr", None)
    return shells_of_tensors(index, hop, count, [data.num_nodes] if ptr is None else ptr.diff())


def _untraced(function: Function) -> Function:
    """Keep a function out of compiled graphs, where it would be cut at every number that it reads."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


@_untraced
def shells_of_tensors(
    shell_index: Tensor | None,
    shell_hop: Tensor | None,
    shell_count: Tensor | int | None,
    sizes: Tensor | Sequence[int],
) -> Shells:
    """Return the shells of pairs and their distances, of graphs of so many nodes.

    Raises: InputError as `shells_of`.
    Holds: exactly.
    """
    if shell_index is None or shell_hop is None or shell_count is None:
        raise InputError(
            "graphs lack shell_index, shell_hop or shell_count; transform them by AddDistanceShells(count)"
        )
    counts = torch.as_tensor(shell_count).unique().tolist()
    if len(counts) != 1:
        raise InputError(f"all graphs of a batch need one number of shells, got {counts}")
    if shell_index.ndim != 2 or len(shell_index) != 2:
        raise InputError(f"shell_index is (2, entries), got {tuple(shell_index.shape)}")
    targets, sources = shell_index[1], shell_index[0]
    return shells_of_pairs(targets, sources, shell_hop, torch.as_tensor(sizes).tolist(), int(counts[0]))


class ShellLoader(DataLoader):
    """PyTorch Geometric's data loader, which makes the `Shells` of every batch where it joins the graphs.

    `batch.shells` takes the place of `shell_index` and `shell_hop`; it is made in the loader's workers, and
    pinned and moved with the batch, so that neither the training process nor a GPU sorts pairs. Everything
    else is as in the plain loader, which works as well.

    Args:
        dataset: graphs to which `AddDistanceShells` has given shells.
        batch_size: graphs in a batch.
        shuffle: whether graphs come in another order each time.
        options: what the plain loader takes.

    Holds: exactly: `shells_of` gives the same for a batch of either loader.
    """

    def __init__(self, dataset: Any, batch_size: int = 1, shuffle: bool = False, **options: Any) -> None:
        super().__init__(dataset, batch_size, shuffle, **options)
        self.collate_fn = _WithShells(self.collate_fn)


@dataclass(frozen=True)
class _WithShells:
    """Join graphs, then make their shells."""

    join: Callable[[list[Any]], Any]

    def __call__(self, graphs: list[Any]) -> Any:
        batch = self.join(graphs)
        batch.shells = _BatchShells(**vars(shells_of(batch)))
        del batch.shell_index, batch.shell_hop
        return batch


@dataclass(frozen=True, repr=False)
class _BatchShells(Shells):
    """Shells that a batch moves as it moves its tensors."""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Shells:
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def cpu(self) -> Shells:
        return self.to("cpu", non_blocking=False)

    def cuda(self, device: Any = None, non_blocking: bool = True) -> Shells:
        return self.mapped(lambda tensor: tensor.cuda(device, non_blocking=non_blocking))

    def __repr__(self) -> str:
        return f"Shells(graphs={len(self.sizes)}, nodes={self.nodes}, count={self.count})"


def _edges(data: Any, number: int) -> Edges:
    """Return the edges and the number of nodes of a graph."""
    if not isinstance(data, Data) or not isinstance(data.edge_index, Tensor):
        raise InputError(
            f"shells are those of a Data with edge_index; graph {number} is of type {type(data).__name__}"
            + " without it" * isinstance(data, Data)
        )
    if not (nodes := data.num_nodes):
        raise InputError(f"graph {number} has no nodes, or does not say how many; set num_nodes")
    edges = data.edge_index
    if edges.ndim != 2 or len(edges) != 2 or edges.is_floating_point():
        raise InputError(
            f"edge_index is (2, edges) of whole numbers, got {edges.dtype} {tuple(edges.shape)} of graph "
            f"{number}"
        )
    return edges.cpu().numpy(), int(nodes)
