"""What `graphs.py` compares with, dense masks and a scan and PyTorch Geometric's layers, and molecules."""

import csv
import gzip
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import floyd_warshall
from torch import Tensor, nn

from gramian.nn.graph import DistanceFilter

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
    from torch_geometric.nn import GCNConv, GINConv, GINEConv, GPSConv, global_add_pool

Graph = tuple[Tensor, int]
"""Edges in both directions, and the number of nodes."""


def molecules(path: Path, count: int, generator: torch.Generator) -> list[Graph]:
    """Return the bonds of molecules drawn from a file of SMILES."""
    from rdkit import Chem, rdBase

    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            smiles = [row["smiles"] for row in csv.DictReader(lines)]
    else:
        smiles = path.read_text(encoding="utf-8").split()
    drawn = []
    with rdBase.BlockLogs():
        for place in torch.randperm(len(smiles), generator=generator)[:count].tolist():
            molecule = Chem.MolFromSmiles(smiles[place])
            pairs = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in molecule.GetBonds()]
            edges = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
            drawn.append((torch.cat((edges, edges.flip(0)), 1), molecule.GetNumAtoms()))
    return drawn


def joined(graphs: list[Graph]) -> tuple[Tensor, Tensor]:
    """Return the edges of a batch and the graph of every node."""
    sizes = torch.tensor([nodes for _, nodes in graphs])
    edges = torch.cat([e + n for (e, _), n in zip(graphs, sizes.cumsum(0) - sizes, strict=True)], 1)
    return edges, torch.arange(len(graphs)).repeat_interleave(sizes)


def distances_by_floyd_warshall(graph: Graph) -> np.ndarray:
    """All distances of a graph; no path is infinity."""
    edges, nodes = graph
    u, v = edges.numpy()
    adjacency = coo_array((np.ones(len(u)), (u, v)), shape=(nodes, nodes)).tocsr()
    return floyd_warshall(adjacency, directed=False, unweighted=True)


def masks_of(distances: np.ndarray, count: int) -> Tensor:
    """Boolean masks (count, nodes, nodes) of one graph; entry k, v, u says whether d(u, v) = k."""
    return torch.from_numpy(distances[None] == np.arange(count)[:, None, None])


def each_distances(graphs: Sequence[Graph]) -> list[np.ndarray]:
    return [distances_by_floyd_warshall(graph) for graph in graphs]


def each_masks(graphs: list[Graph], count: int) -> list[Tensor]:
    return [masks_of(distances, count) for distances in each_distances(graphs)]


def batch_masks(graphs: Sequence[Tensor], largest: int) -> Tensor:
    """Pad the masks of graphs to the largest, as numbers (graphs, count, largest, largest)."""
    padded = torch.zeros(len(graphs), len(graphs[0]), largest, largest)
    for place, masks in enumerate(graphs):
        padded[place, :, : masks.shape[1], : masks.shape[1]] = masks
    return padded


class DenseScan(nn.Module):
    """A layer's parameters in the formulation by its equations: all shells of all padded nodes, and a scan.

    x = M h,   u = LN(ShellMLP(x)) (B ⊙ e^γ),   s ← λ ⊙ s + u_k from the farthest shell to the node itself
    """

    def __init__(self, layer: DistanceFilter) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: Tensor, masks: Tensor) -> Tensor:
        """Filter the features of padded nodes (graphs, largest, width)."""
        layer, recurrence = self.layer, self.layer.recurrence
        _, count, largest, _ = masks.shape
        x = layer.mlp((masks.flatten(1, 2) @ h).unflatten(1, (count, largest)))
        pairs = layer.norm(x) @ recurrence.input_map().mT
        inputs = torch.complex(*pairs.chunk(2, -1))
        assert recurrence.theta_log is not None
        eigenvalues = torch.polar(torch.exp(-recurrence.nu_log.exp()), recurrence.theta_log.exp())
        state = torch.zeros_like(inputs[:, 0])
        for k in reversed(range(count)):
            state = eigenvalues * state + inputs[:, k]
        z = (state @ torch.complex(recurrence.c_re, recurrence.c_im)).real
        z = layer.gate(layer.dropout(layer.activation(z)))
        return x[:, 0] + layer.dropout(z)


def gps_layer(width: int, edge_features: bool) -> GPSConv:
    """GPS with four heads; its local half is GINE where edges have features and GIN elsewhere."""
    mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    return GPSConv(width, GINEConv(mlp) if edge_features else GINConv(mlp), heads=4)


class GPSNetwork(nn.Module):
    """Embedding, four GPS layers, the sum over nodes, a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.types, self.head = nn.Embedding(28, width), nn.Linear(width, 1)
        self.layers = nn.ModuleList(gps_layer(width, False) for _ in range(4))

    def forward(self, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        """Describe every graph."""
        h = self.types(x)
        for layer in self.layers:
            h = layer(h, edges, batch)
        return self.head(global_add_pool(h, batch))


class GCNNetwork(nn.Module):
    """Embedding, four convolutions with a skip and a norm, the sum over nodes, a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.types, self.head = nn.Embedding(28, width), nn.Linear(width, 1)
        self.layers = nn.ModuleList(GCNConv(width, width) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(4))

    def forward(self, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        """Describe every graph."""
        h = self.types(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = h + norm(layer(h, edges)).relu()
        return self.head(global_add_pool(h, batch))


def of_size(make: Callable[[int], nn.Module], parameters: int) -> nn.Module:
    """Return the widest network, in steps of four, that has no more parameters than that."""
    best = make(4)
    for width in range(8, 1000, 4):
        made = make(width)
        if sum(p.numel() for p in made.parameters()) > parameters:
            return best
        best = made
    return best
