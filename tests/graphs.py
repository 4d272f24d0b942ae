"""Small graphs, and the layer that filters by distance computed by loops over nodes, shells and members."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from gramian.nn.distances import distance_shells
from gramian.nn.graph import DistanceFilter, FullGate, HalfGate
from gramian.nn.init import initialise_
from gramian.nn.shells import Shells, batch_shells


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def edges(*pairs: tuple[int, int]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T


def cycle(*nodes: int) -> list[tuple[int, int]]:
    return [*pairwise(nodes), (nodes[-1], nodes[0])]


def random_graph(nodes: int, number: int, seed: int) -> Tensor:
    return torch.randint(nodes, (2, number), generator=torch.Generator().manual_seed(seed))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter moved away from its start, where biases are zero; in float64."""
    generator = torch.Generator().manual_seed(seed)
    initialise_(module, seed).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    return module


def layer(width: int = 4, state: int = 5, seed: int = 0, **options) -> DistanceFilter:
    return randomised(DistanceFilter(width, state, **options), seed)


def relaxed(edge_index: Tensor, nodes: int) -> list[list[float]]:
    """d(u, v) at [v][u], relaxed edge by edge until nothing changes."""
    found = [[0.0 if u == v else math.inf for u in range(nodes)] for v in range(nodes)]
    for _ in range(nodes):
        for u, v in edge_index.T.tolist():
            for source in range(nodes):
                shorter = min(found[u][source], found[v][source])
                found[u][source] = min(found[u][source], shorter + 1)
                found[v][source] = min(found[v][source], shorter + 1)
    return found


def three(count: int, sizes: tuple[int, ...] = (7, 1, 6)) -> tuple[list[Tensor], Shells]:
    """Three graphs with loops, duplicates, isolated nodes and several components, and their shells."""
    graphs = [random_graph(size, size, seed) for seed, size in enumerate(sizes)]
    return graphs, batch_shells([distance_shells(g, n, count) for g, n in zip(graphs, sizes, strict=True)])


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt() * norm.weight + norm.bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def shell_mlp(x: Tensor, filter: DistanceFilter) -> Tensor:
    mlp = filter.mlp
    hidden = gelu(mlp.up.weight @ layer_norm(x, mlp.norm) + mlp.up.bias)
    return x + mlp.down.weight @ hidden + mlp.down.bias


def slow_layer(
    filter: DistanceFilter, h: Tensor, table: list[list[float]], count: int, skip_empty: bool = False
) -> Tensor:
    """Node by node, from the farthest shell inwards, in complex numbers."""
    r = filter.recurrence
    eigenvalues = torch.exp(torch.complex(-r.nu_log.exp(), r.theta_log.exp()))
    b = torch.complex(r.b_re, r.b_im) * r.gamma_log.exp()
    c = torch.complex(r.c_re, r.c_im)
    rows = []
    for distances in table:
        state = torch.zeros_like(eigenvalues)
        for k in reversed(range(count)):
            x, members = torch.zeros_like(h[0]), [u for u, d in enumerate(distances) if d == k]
            for u in members:
                x = x + h[u]
            mapped = shell_mlp(x, filter)
            state = eigenvalues * state
            if members or not skip_empty:
                state = state + layer_norm(mapped, filter.norm).to(b.dtype) @ b
        z = gelu((state @ c).real)
        if isinstance(filter.gate, FullGate):
            value, gate = (filter.gate.both.weight @ z + filter.gate.both.bias).chunk(2)
            z = value * gate.sigmoid()
        elif isinstance(filter.gate, HalfGate):
            z = z * (filter.gate.gate.weight @ z + filter.gate.gate.bias).sigmoid()
        rows.append(mapped + z)
    return torch.stack(rows)
