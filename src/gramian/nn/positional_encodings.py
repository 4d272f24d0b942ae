"""Where nodes are in their graph, as features: Laplacian eigenvectors and returns of a random walk."""

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import eigh
from scipy.sparse import csc_array, csr_array, eye_array
from scipy.sparse.linalg import LinearOperator, eigsh, splu
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.graph import Dense
from gramian.nn.shells import check_edges

FEW_NEIGHBOURS = 8
"""Mean number of neighbours up to which matrices stay sparse when they are multiplied or factorised."""

DENSE_NODES, DENSE_NODES_OF_MANY_NEIGHBOURS = 150, 600
"""Largest graphs whose matrices are full ones: where the sparse ways took over on a CPU."""

SHIFT = 1e-6
"""What is added to the eigenvalues so that a Laplacian has an inverse."""

NUMBERS_AT_ONCE = 4_000_000
"""Pairs of nodes between which walks are followed in one go: 64 MB a matrix at most."""


def laplacian_positions(
    edges: Tensor, nodes: int, count: int, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "nodes count"]:
    """Return the smoothest eigenvectors of the normalised Laplacian, without the trivial one, a column each.

        L φ_j = λ_j φ_j,   L = I − D^{−1/2} A D^{−1/2},   φ_0 ∝ D^{1/2} 1,   0 = λ_0 ≤ λ_1 ≤ …

    Columns are φ_1, φ_2, …, of unit length, and zero where the nodes are too few. Edges are walked both ways;
    loops and repetitions do not count. Of a graph in c parts φ_0 alone is left out, as published, so that
    c − 1 columns of eigenvalue 0 tell the parts apart. Isolated nodes are nowhere: they have zeros. Signs
    are arbitrary (see `flipped`), and so is the basis where eigenvalues are equal.

    Shapes: edges (2, any) -> (nodes, count).
    Raises: InputError for edges of another shape or type, a node that is not there, no node, no column.
    Holds: exactly, to rounding; of large graphs by Lanczos iterations.
    Source: Dwivedi et al. 2020, arXiv 2003.00982.
    """
    if count < 1:
        raise InputError(f"positions need at least one column, got {count}")
    similarity, root = _normalised(edges, nodes)
    placed = np.flatnonzero(root)
    wanted = min(count, len(placed) - 1)
    found = np.zeros((nodes, count))
    if wanted > 0:
        trivial = root[placed] / np.linalg.norm(root)
        found[placed, :wanted] = _leading(similarity[placed][:, placed], trivial, wanted)
    return torch.from_numpy(found).to(dtype)


def flipped(
    positions: Float[Tensor, "nodes count"], graph: Tensor, generator: torch.Generator | None = None
) -> Float[Tensor, "nodes count"]:
    """Return Laplacian positions with a random sign for every graph and column, for training.

        p_{v,j} ← σ_{graph(v),j} p_{v,j},   P(σ = 1) = P(σ = −1) = ½

    Shapes: (nodes, count), graphs of the nodes (nodes), counted from 0 -> (nodes, count).
    Raises: InputError unless there is a graph for every node.
    Holds: exactly; eigenvectors stay eigenvectors.
    Source: Dwivedi et al. 2020, arXiv 2003.00982.
    """
    if graph.shape != positions.shape[:1]:
        raise InputError(
            f"every node has a graph, got {len(positions)} nodes and graphs {tuple(graph.shape)}"
        )
    shape = int(graph.max()) + 1 if len(graph) else 0, positions.shape[1]
    device = positions.device if generator is None else generator.device
    signs = 2 * torch.randint(2, shape, generator=generator, device=device) - 1
    return positions * signs.to(positions)[graph.long()]


def walk_positions(
    edges: Tensor, nodes: int, steps: int, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "nodes steps"]:
    """Return how likely a random walk is back at its start after 1, 2, … steps, a column each.

        p_{v,k} = ((A D^{−1})^k)_{vv} = (S^k)_{vv},   S = D^{−1/2} A D^{−1/2}

    As S is symmetric, (S^{i+j})_{vv} = Σ_u (S^i)_{uv} (S^j)_{uv} halves the products. Edges are walked both
    ways; loops and repetitions do not count. Isolated nodes have zeros. Computed in float64.

    Shapes: edges (2, any) -> (nodes, steps).
    Raises: InputError for edges of another shape or type, a node that is not there, no node, no step.
    Holds: exactly; equivariant under a permutation of the nodes.
    Source: Dwivedi et al. 2022, arXiv 2110.07875.
    """
    if steps < 1:
        raise InputError(f"a random walk needs at least one step, got {steps}")
    similarity, _ = _normalised(edges, nodes)
    identity = csc_array(eye_array(nodes))
    if _full(similarity, nodes):
        similarity, identity = similarity.toarray(), np.eye(nodes)
    found, size = np.empty((nodes, steps)), max(1, NUMBERS_AT_ONCE // nodes)
    for start in range(0, nodes, size):
        at = identity[:, start : start + size]
        for step in range(0, steps, 2):
            further = similarity @ at
            found[start : start + size, step] = (further * at).sum(0)
            found[start : start + size, step + 1 : step + 2] = (further * further).sum(0)[:, None]
            at = further
    return torch.from_numpy(found).to(dtype)


class PositionEncoder(nn.Module):
    """Positions added to what another encoder makes of the nodes, so that nodes are a pair (x, p).

        h = E(x) + W p + b

    Shapes: (x, (nodes, size)) -> (nodes, width).
    Raises: InputError for sizes below 1, and for positions of another number or type.
    Holds: exactly.
    Source: Dwivedi et al. 2020, arXiv 2003.00982.
    """

    def __init__(self, nodes: nn.Module, size: int, width: int) -> None:
        super().__init__()
        if size < 1 or width < 1:
            raise InputError(f"an encoder of positions needs positive sizes, got {size} and {width}")
        self.nodes, self.positions = nodes, Dense(size, width)

    def forward(self, x: tuple[Tensor, Tensor]) -> Float[Tensor, "nodes width"]:
        """Encode both and add."""
        features, positions = x
        size = self.positions.in_features
        right = positions.ndim == 2 and positions.shape[1] == size and positions.is_floating_point()
        if not right or len(positions) != len(features):
            raise InputError(
                f"positions are floats in {size} columns, a row for each of {len(features)} nodes, got "
                f"{tuple(positions.shape)} of {positions.dtype}"
            )
        return self.nodes(features) + self.positions(positions.to(self.positions.weight.dtype))


def _normalised(edges: Tensor, nodes: int) -> tuple[csr_array, np.ndarray]:
    """Return D^{−1/2} A D^{−1/2} of the graph without directions, loops and repetitions, and D^{1/2} 1."""
    if nodes < 1:
        raise InputError(f"a graph needs at least one node, got {nodes}")
    edges = edges.cpu()
    check_edges(edges, nodes)
    one, other = edges.numpy().astype(np.int64)
    keys = np.concatenate((one * nodes + other, other * nodes + one))
    u, v = np.divmod(np.unique(keys[keys % (nodes + 1) != 0]), nodes)
    root = np.sqrt(np.bincount(u, minlength=nodes))
    return csr_array((1 / (root[u] * root[v]), (u, v)), shape=(nodes, nodes)), root


def _full(similarity: csr_array, nodes: int) -> bool:
    """Whether a matrix is small enough to be kept in full."""
    few = similarity.nnz <= FEW_NEIGHBOURS * nodes
    return nodes <= (DENSE_NODES if few else DENSE_NODES_OF_MANY_NEIGHBOURS)


def _leading(similarity: csr_array, trivial: np.ndarray, wanted: int) -> np.ndarray:
    """Return the eigenvectors of the largest eigenvalues below a trivial one of 1, largest first."""
    nodes = len(trivial)
    if _full(similarity, nodes) or nodes <= 4 * wanted:
        lowered = similarity.toarray() - 3 * np.outer(trivial, trivial)  # −2, where none is below −1
        return eigh(lowered, subset_by_index=[nodes - wanted, nodes - 1])[1][:, ::-1]
    if similarity.nnz <= FEW_NEIGHBOURS * nodes:
        shifted = ((1 + SHIFT) * eye_array(nodes) - similarity).tocsc()
        apply = splu(shifted, "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}).solve
    else:
        apply = similarity.__matmul__

    def others(x: np.ndarray) -> np.ndarray:
        y = apply(x - trivial * (trivial @ x))
        return y - trivial * (trivial @ y)

    start = np.random.default_rng(0).normal(size=nodes)
    shape, ravelled = (nodes, nodes), lambda x: others(x.ravel())
    operator = LinearOperator(shape, matvec=ravelled, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    values, vectors = eigsh(operator, wanted, which="LA", v0=start)
    return vectors[:, values.argsort()[::-1]]
