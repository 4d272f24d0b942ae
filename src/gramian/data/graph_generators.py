"""Graph tasks made by published recipes: block models, skip links, tree neighbours, rings; no download."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from gramian.data.graph_distances import diameter, distance_count, eccentricity, shortest_paths
from gramian.data.graph_splits import consecutive, folds
from gramian.data.graphs import IGNORED, Graph, Graphs, flat
from gramian.data.random_graphs import between, block_model, circle, communities, edges_of
from gramian.data.superpixels import digit_superpixels
from gramian.errors import InputError

Sizes = tuple[int, int, int]

NODES = 41
SKIPS = (2, 3, 4, 5, 6, 9, 11, 12, 13, 16)
"""Lengths of the links in the ten classes of circles with 41 nodes, no two of which are the same graph."""


def pattern(sizes: Sizes = (1000, 200, 200), *, patterns: int = 100, seed: int = 0) -> Graphs:
    """Make PATTERN, where the nodes of a pattern are to be found among those of communities.

        P(edge) = 0.5 within a community, 0.35 between two, 0.5 within the pattern and from it to all others

    Five communities and the pattern have 5 to 34 nodes each. The patterns are drawn first, with their edges
    and types, and put into graphs in turn; nodes have one of three types at random.

    Shapes: types (n), 3; y (n) in {0, 1}.
    Raises: InputError unless sizes and patterns are at least 1.
    Holds: exactly; equal seeds give equal graphs.
    Source: Dwivedi et al. 2020, arXiv 2003.00982, with 10,000, 2,000 and 2,000 graphs of 100 patterns.
    """
    split, generator = consecutive(sizes), torch.Generator().manual_seed(seed)
    if patterns < 1:
        raise InputError(f"patterns must be at least 1, got {patterns}")
    made = []
    for _ in range(patterns):
        size = between(5, 35, generator)
        inside = block_model(torch.zeros(size, dtype=torch.long), 0.5, 0.5, generator)
        made.append((inside, torch.randint(3, (size,), generator=generator)))
    graphs = [_with_pattern(made[number % patterns], generator) for number in range(sum(sizes))]
    return flat("PATTERN", "node", graphs, node_types=(3,), classes=(0, 1), splits=(split,))


def _with_pattern(made: tuple[Tensor, Tensor], generator: torch.Generator) -> Graph:
    inside, types = made
    community = communities(5, generator)
    others, size = len(community), len(inside)
    adjacency = torch.zeros(others + size, others + size, dtype=torch.bool)
    adjacency[:others, :others] = block_model(community, 0.5, 0.35, generator)
    adjacency[others:, others:] = inside
    across = torch.rand(size, others, generator=generator) < 0.5
    adjacency[others:, :others], adjacency[:others, others:] = across, across.T
    x = torch.cat((torch.randint(3, (others,), generator=generator), types))
    y = (torch.arange(others + size) >= others).long()
    order = torch.randperm(others + size, generator=generator)
    return Graph(x[order], edges_of(adjacency[order][:, order]), y[order])


def cluster(sizes: Sizes = (1000, 200, 200), *, seed: int = 0) -> Graphs:
    """Make CLUSTER, where each node's community is to be told, given one labelled node of each.

        P(edge) = 0.55 within a community, 0.25 between two

    Six communities have 5 to 34 nodes each. The type of one node in each, drawn at random, is 1 + the number
    of its community; the others have the type 0.

    Shapes: types (n), 7; y (n) in {0, …, 5}.
    Raises: InputError unless sizes are at least 1.
    Holds: exactly; equal seeds give equal graphs.
    Source: Dwivedi et al. 2020, arXiv 2003.00982, with 10,000, 1,000 and 1,000 graphs.
    """
    split, generator = consecutive(sizes), torch.Generator().manual_seed(seed)
    graphs = [_clusters(generator) for _ in range(sum(sizes))]
    return flat("CLUSTER", "node", graphs, node_types=(7,), classes=tuple(range(6)), splits=(split,))


def _clusters(generator: torch.Generator) -> Graph:
    community = communities(6, generator)
    community = community[torch.randperm(len(community), generator=generator)]
    x = torch.zeros_like(community)
    for number in range(6):
        members = (community == number).nonzero()[:, 0]
        x[members[between(0, len(members), generator)]] = number + 1
    return Graph(x, edges_of(block_model(community, 0.55, 0.25, generator)), community)


def circular_skip_links(*, copies: int = 15, seed: int = 0) -> Graphs:
    """Make CSL, circles whose nodes have one more link each, the length of which is to be told.

        edges {i, i + 1} and {i, i + r} mod 41,  r in `SKIPS`, a class each

    All nodes have four neighbours and the type 0, so that the 1-WL test tells no two classes apart. Nodes are
    numbered at random. The splits are five folds.

    Shapes: 41 nodes; types (n), 1; y (1) in {0, …, 9}.
    Raises: InputError for fewer than 5 copies of each class.
    Holds: exactly; equal seeds give equal graphs.
    Source: Murphy et al. 2019, arXiv 1903.02541; folds: Dwivedi et al. 2020, arXiv 2003.00982.
    """
    if copies < 5:
        raise InputError(f"five folds need at least 5 copies of each class, got {copies}")
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(len(SKIPS)).repeat_interleave(copies)
    graphs = [
        Graph(
            torch.zeros(NODES, dtype=torch.long),
            torch.randperm(NODES, generator=generator)[circle(NODES, 1, SKIPS[label])],
            torch.tensor([label]),
        )
        for label in y.tolist()
    ]
    splits = folds(len(y), labels=y, number=5, seed=seed)
    return flat("CSL", "classification", graphs, classes=SKIPS, splits=splits)


def tree_neighbours_match(
    sizes: Sizes = (1000, 200, 200), *, depth: int = 3, directed: bool = False, seed: int = 0
) -> Graphs:
    """Make the trees whose root asks for the value of one leaf, at a distance of the tree's depth.

    In a full binary tree each leaf has a key, 1 to 2^depth from left to right, and a value, a permutation of
    1 to 2^depth; the root has a key. Its class is the value of the leaf with that key. Nodes have two types,
    key and value, 0 for none; only the root is to be classified.

    Args:
        sizes: graphs to learn from, to choose by and to report on.
        depth: steps from the root to a leaf.
        directed: whether edges lead to the root alone, as published, or in both directions.
        seed: seed of keys and values.

    Shapes: 2^(depth + 1) − 1 nodes; types (n, 2), 2^depth + 1 each; y (n), −100 but for node 0.
    Raises: InputError when there are not as many trees.
    Holds: exactly; no two trees are the same, equal seeds give equal trees.
    Source: Alon and Yahav 2021, arXiv 2006.05205.
    """
    split, generator = consecutive(sizes), torch.Generator().manual_seed(seed)
    if not 1 <= depth <= 9:
        raise InputError(f"the depth of the trees must be 1 to 9, got {depth}")
    leaves, count = 2**depth, sum(sizes)
    there = leaves * math.factorial(leaves)
    if count > there:
        raise InputError(
            f"there are {there:,} trees of depth {depth}, fewer than {count:,}; give less or deeper"
        )
    nodes = 2 * leaves - 1
    child = torch.arange(1, nodes)
    edges = torch.stack((child, (child - 1) // 2))
    edges = edges if directed else torch.cat((edges, edges.flip(0)), 1)
    graphs = []
    for asked, *values in _distinct(count, leaves, generator):
        x = torch.zeros(nodes, 2, dtype=torch.long)
        x[0, 0] = asked + 1
        x[leaves - 1 :, 0] = torch.arange(1, leaves + 1)
        x[leaves - 1 :, 1] = torch.tensor(values) + 1
        graphs.append(Graph(x, edges, _only_first(nodes, values[asked])))
    types, name = (leaves + 1, leaves + 1), f"tree neighbours match, depth {depth}"
    classes = tuple(range(1, leaves + 1))
    return flat(name, "node", graphs, node_types=types, classes=classes, splits=(split,))


def _distinct(count: int, leaves: int, generator: torch.Generator) -> Iterator[tuple[int, ...]]:
    """Yield keys with permutations of values, no two of which are the same."""
    seen: set[tuple[int, ...]] = set()
    while len(seen) < count:
        asked = between(0, leaves, generator)
        drawn = (asked, *torch.randperm(leaves, generator=generator).tolist())
        if drawn not in seen:
            seen.add(drawn)
            yield drawn


def ring_transfer(
    sizes: Sizes = (1000, 200, 200), *, distance: int = 5, classes: int = 5, seed: int = 0
) -> Graphs:
    """Make the rings in which one node is to tell what the node on the other side holds.

        x_0 = 0,  x_distance = e_y,  all others 1;  the class of node 0 is y

    Only node 0 is to be classified. There is one ring of each class: what is asked is whether the way is
    bridged, not whether a model does well on others.

    Shapes: 2 · distance nodes; features (n, classes); y (n), −100 but for node 0.
    Raises: InputError unless there are 2 classes and a distance of at least 2.
    Holds: exactly; classes are equally frequent to within 1 in each part.
    Source: Bodnar et al. 2021, arXiv 2106.12575, with 5 classes and 5,000 and 500 rings.
    """
    split, generator = consecutive(sizes), torch.Generator().manual_seed(seed)
    if distance < 2 or classes < 2:
        raise InputError(f"rings need a distance and classes of at least 2, got {distance} and {classes}")
    nodes, edges = 2 * distance, circle(2 * distance, 1)
    graphs = []
    for size in sizes:
        for number in torch.randperm(size, generator=generator).tolist():
            x = torch.ones(nodes, classes)
            x[0], x[distance] = 0, 0
            x[distance, number % classes] = 1
            graphs.append(Graph(x, edges, _only_first(nodes, number % classes)))
    name = f"ring transfer, distance {distance}"
    return flat(name, "node", graphs, classes=tuple(range(classes)), splits=(split,))


def _only_first(nodes: int, label: int) -> Tensor:
    y = torch.full((nodes,), IGNORED)
    y[0] = label
    return y


GENERATORS: Mapping[str, Callable[..., Graphs]] = {
    "pattern": pattern,
    "cluster": cluster,
    "csl": circular_skip_links,
    "tree_neighbours_match": tree_neighbours_match,
    "ring_transfer": ring_transfer,
    "eccentricity": eccentricity,
    "diameter": diameter,
    "shortest_paths": shortest_paths,
    "distance_count": distance_count,
    "superpixels": digit_superpixels,
}
"""Tasks by name; every one takes a seed, those of random graphs `sizes` as well."""
