"""Tasks about distances in random graphs, with exact answers; no download."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.data.graph_splits import consecutive
from gramian.data.graphs import Graph, Graphs, flat
from gramian.data.random_graphs import FAMILIES, Adjacency, between, connected, edges_of, rewired, thin_tree
from gramian.errors import InputError

Sizes = tuple[int, int, int]
Answer = Callable[[Adjacency, torch.Generator], tuple[Tensor, Tensor]]


def distances(adjacency: Adjacency) -> Float[Tensor, "n n"]:
    """Return the number of edges on a shortest path between any two nodes, ∞ where there is none.

    Holds: exactly.
    """
    from scipy.sparse import csr_matrix  # a second to import, so only where it is used
    from scipy.sparse.csgraph import shortest_path

    return torch.from_numpy(shortest_path(csr_matrix(adjacency.numpy()), directed=False, unweighted=True))


def eccentricity(
    sizes: Sizes = (1000, 200, 200),
    *,
    nodes: tuple[int, int] = (15, 25),
    families: Sequence[str] = tuple(FAMILIES),
    rewiring: float = 0.1,
    seed: int = 0,
) -> Graphs:
    """Make graphs of which each node is to tell how far away the farthest one is.

        y_v = max_u d(u, v)

    A family is drawn for each graph in the published shares, a share of its edges is rewired, and parts that
    are not connected are linked by an edge, so that every distance is finite (the published graphs may stay
    in parts, of which the distances between them are left out). The only feature is a random number.

    Args:
        sizes: graphs to learn from, to choose by and to report on.
        nodes: least number of nodes, and one more than the most.
        families: names in `FAMILIES`.
        rewiring: share of the edges that are removed and of as many that are added.
        seed: seed of everything.

    Shapes: features (n, 1) in [0, 1); y (n, 1), in edges.
    Raises: InputError for unknown families, fewer than 4 nodes and a share outside 0 to 1.
    Holds: exactly; equal seeds give equal graphs.
    Source: Corso et al. 2020, arXiv 2004.05718, with 5,120, 640 and 1,280 graphs and targets divided by the
        largest; they are in edges here.
    """
    settings = (sizes, nodes, families, rewiring, seed)
    return _task("eccentricity", "node_regression", _eccentricity, *settings)


def diameter(
    sizes: Sizes = (1000, 200, 200),
    *,
    nodes: tuple[int, int] = (15, 25),
    families: Sequence[str] = tuple(FAMILIES),
    rewiring: float = 0.1,
    seed: int = 0,
) -> Graphs:
    """Make graphs of which the longest distance is to be told: y = max_uv d(u, v).

    The graphs are those of `eccentricity`, and so are the arguments.

    Shapes: features (n, 1) in [0, 1); y (1, 1), in edges.
    Raises: InputError as `eccentricity`.
    Holds: exactly; equal seeds give equal graphs.
    Source: Corso et al. 2020, arXiv 2004.05718.
    """
    return _task("diameter", "regression", _diameter, sizes, nodes, families, rewiring, seed)


def shortest_paths(
    sizes: Sizes = (1000, 200, 200),
    *,
    nodes: tuple[int, int] = (15, 25),
    families: Sequence[str] = tuple(FAMILIES),
    rewiring: float = 0.1,
    seed: int = 0,
) -> Graphs:
    """Make graphs of which each node is to tell how far it is from one that is marked: y_v = d(source, v).

    The graphs are those of `eccentricity`, and so are the arguments. The first feature marks the source.

    Shapes: features (n, 2), {0, 1} and [0, 1); y (n, 1), in edges.
    Raises: InputError as `eccentricity`.
    Holds: exactly; equal seeds give equal graphs.
    Source: Corso et al. 2020, arXiv 2004.05718.
    """
    settings = (sizes, nodes, families, rewiring, seed)
    return _task("shortest paths", "node_regression", _from_source, *settings)


def distance_count(
    sizes: Sizes = (1000, 200, 200),
    *,
    distance: int = 5,
    nodes: int | None = None,
    window: int = 3,
    seed: int = 0,
) -> Graphs:
    """Make trees of which each node is to count the marked ones at one distance.

        y_v = |{u : d(u, v) = distance, x_u = 1}|,  P(x_u = 1) = 1/2

    The trees are long and thin: each node hangs from one of the `window` nodes before it. Nodes are numbered
    at random.

    Args:
        sizes: graphs to learn from, to choose by and to report on.
        distance: where is counted, in edges.
        nodes: nodes of each tree; 4 · distance + 4 when None.
        window: how many nodes before it a node may hang from.
        seed: seed of everything.

    Shapes: types (n), 2; y (n, 1).
    Raises: InputError unless distance and window are at least 1 and there are more nodes than the distance.
    Holds: exactly; equal seeds give equal trees.
    """
    split = consecutive(sizes)
    nodes = 4 * distance + 4 if nodes is None else nodes
    if distance < 1 or window < 1 or nodes <= distance:
        raise InputError(
            f"distance and window must be at least 1 and nodes more than the distance, got {distance}, "
            f"{window} and {nodes}"
        )
    generator = torch.Generator().manual_seed(seed)
    graphs = []
    for _ in range(sum(sizes)):
        adjacency = _shuffled(thin_tree(nodes, window, generator), generator)
        marked = torch.randint(2, (nodes,), generator=generator)
        at_distance = (distances(adjacency) == distance).float()
        graphs.append(Graph(marked, edges_of(adjacency), at_distance @ marked.float()[:, None]))
    name = f"marked nodes at distance {distance}"
    return flat(name, "node_regression", graphs, node_types=(2,), splits=(split,))


def _task(
    name: str,
    task: str,
    answer: Answer,
    sizes: Sizes,
    nodes: tuple[int, int],
    families: Sequence[str],
    rewiring: float,
    seed: int,
) -> Graphs:
    split = consecutive(sizes)
    unknown = [each for each in families if each not in FAMILIES]
    if unknown or not families:
        raise InputError(f"families of graphs are {', '.join(FAMILIES)}; got {', '.join(unknown) or 'none'}")
    if not 4 <= nodes[0] < nodes[1] or not 0 <= rewiring <= 1:
        raise InputError(
            f"nodes must be from at least 4 to less than a larger number and rewiring between 0 and 1, got "
            f"{nodes[0]}, {nodes[1]} and {rewiring:g}"
        )
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([FAMILIES[each][1] for each in families], dtype=torch.float64)
    graphs = []
    for _ in range(sum(sizes)):
        family, _ = FAMILIES[families[int(torch.multinomial(shares, 1, generator=generator))]]
        drawn = _shuffled(family(between(*nodes, generator), generator), generator)
        adjacency = connected(rewired(drawn, rewiring, generator), generator)
        values, y = answer(adjacency, generator)
        x = torch.cat((values, torch.rand(len(adjacency), 1, generator=generator)), 1)
        graphs.append(Graph(x, edges_of(adjacency), y.float()))
    return flat(name, task, graphs, splits=(split,))


def _eccentricity(adjacency: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(adjacency), 0), distances(adjacency).amax(1, keepdim=True)


def _diameter(adjacency: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(adjacency), 0), distances(adjacency).amax().reshape(1, 1)


def _from_source(adjacency: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    source = between(0, len(adjacency), generator)
    mark = torch.zeros(len(adjacency), 1)
    mark[source] = 1
    return mark, distances(adjacency)[source][:, None]


def _shuffled(adjacency: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(adjacency), generator=generator)
    return adjacency[order][:, order]
