"""Random graphs as symmetric adjacency matrices: block models, ten families, rewired and connected."""

from collections.abc import Callable, Mapping
from math import isqrt

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

Adjacency = Bool[Tensor, "n n"]


def between(low: int, high: int, generator: torch.Generator) -> int:
    """Draw a whole number from low to high − 1."""
    return int(torch.randint(low, high, (), generator=generator))


def edges_of(adjacency: Adjacency) -> Int64[Tensor, "2 e"]:
    """Return the edges of an adjacency matrix, in both directions."""
    return adjacency.nonzero().T


def circle(nodes: int, *steps: int) -> Int64[Tensor, "2 e"]:
    """Return the edges of a circle whose nodes are linked to those so many steps on, in both directions."""
    here = torch.arange(nodes)
    one_way = torch.cat([torch.stack((here, (here + step) % nodes)) for step in steps], 1)
    return torch.cat((one_way, one_way.flip(0)), 1)


def communities(number: int, generator: torch.Generator) -> Int64[Tensor, " n"]:
    """Return the community of each node, 5 to 34 nodes each, one after another."""
    sizes = torch.randint(5, 35, (number,), generator=generator)
    return torch.arange(number).repeat_interleave(sizes)


def block_model(
    blocks: Int64[Tensor, " n"], inside: float, across: float, generator: torch.Generator
) -> Adjacency:
    """Draw a stochastic block model, in which two nodes are linked with a chance that their blocks decide.

    P(edge) = inside for two nodes of the same block, across for others
    """
    chance = torch.where(blocks[:, None] == blocks, inside, across)
    upper = (torch.rand(chance.shape, generator=generator) < chance).triu(1)
    return upper | upper.T


def binomial(nodes: int, generator: torch.Generator) -> Adjacency:
    """Draw a graph in which any two nodes are linked with the same chance, itself uniform between 0 and 1."""
    chance = float(torch.rand((), generator=generator))
    return block_model(torch.zeros(nodes, dtype=torch.long), chance, chance, generator)


def preferential(nodes: int, generator: torch.Generator, links: int | None = None) -> Adjacency:
    """Draw a graph that grows from a star, each new node linked to others in proportion to their degrees."""
    links = between(1, nodes, generator) if links is None else links
    adjacency = _linked(nodes, [(0, leaf) for leaf in range(1, links + 1)])
    for new in range(links + 1, nodes):
        degrees = adjacency[:new, :new].sum(1).double()
        chosen = torch.multinomial(degrees, links, generator=generator)
        adjacency[new, chosen] = adjacency[chosen, new] = True
    return adjacency


def tree(nodes: int, generator: torch.Generator) -> Adjacency:
    """Draw a tree with a power law of degrees: each new node hangs from one in proportion to its degree."""
    return preferential(nodes, generator, 1)


def grid(nodes: int, generator: torch.Generator) -> Adjacency:
    """Return a rectangular grid, as square as the number of nodes allows."""
    width = nodes // _height(nodes)
    right = [(node, node + 1) for node in range(nodes) if (node + 1) % width]
    return _linked(nodes, right + [(node, node + width) for node in range(nodes - width)])


def cliques(nodes: int, generator: torch.Generator) -> Adjacency:
    """Return complete graphs beside each other, about as many as each has nodes."""
    block = torch.arange(nodes) // (nodes // _height(nodes))
    return (block[:, None] == block) & ~torch.eye(nodes, dtype=torch.bool)


def ladder(nodes: int, generator: torch.Generator) -> Adjacency:
    """Return two rows of nodes with rungs between them, and a node at an end where their number is odd."""
    half = nodes // 2
    rows = [(node, node + 1) for node in range(2 * half - 1) if node + 1 != half]
    odd = [(0, nodes - 1)] if nodes % 2 else []
    return _linked(nodes, rows + [(node, node + half) for node in range(half)] + odd)


def line(nodes: int, generator: torch.Generator) -> Adjacency:
    """Return a path."""
    return _linked(nodes, [(node, node + 1) for node in range(nodes - 1)])


def star(nodes: int, generator: torch.Generator) -> Adjacency:
    """Return a star."""
    return _linked(nodes, [(0, leaf) for leaf in range(1, nodes)])


def caterpillar(nodes: int, generator: torch.Generator) -> Adjacency:
    """Draw a path of a random length from whose nodes the others hang at random."""
    return _hanging(nodes, between(1, nodes, generator), nodes, generator)


def lobster(nodes: int, generator: torch.Generator) -> Adjacency:
    """Draw a caterpillar from whose legs further nodes hang at random."""
    spine = between(1, nodes, generator)
    return _hanging(nodes, spine, between(spine + 1, nodes + 1, generator), generator)


FAMILIES: Mapping[str, tuple[Callable[[int, torch.Generator], Adjacency], float]] = {
    "binomial": (binomial, 0.2),
    "preferential": (preferential, 0.2),
    "grid": (grid, 0.05),
    "cliques": (cliques, 0.05),
    "tree": (tree, 0.15),
    "ladder": (ladder, 0.05),
    "line": (line, 0.05),
    "star": (star, 0.05),
    "caterpillar": (caterpillar, 0.1),
    "lobster": (lobster, 0.1),
}
"""Families of graphs with the shares that they have in the published mixture."""


def rewired(adjacency: Adjacency, share: float, generator: torch.Generator) -> Adjacency:
    """Remove edges and add others at random; the expected number stays.

        P(kept) = 1 − s, P(added) = s e/r  for e ≤ r;  P(kept) = 1 − s r/e, P(added) = s  otherwise

    with e pairs that are linked, r that are not, and the share s.

    Source: Corso et al. 2020, arXiv 2004.05718, with a share of 0.1.
    """
    count = len(adjacency)
    edges = int(adjacency.sum()) // 2
    others = count * (count - 1) // 2 - edges
    removed = share * min(1.0, others / max(edges, 1))
    added = share * min(1.0, edges / max(others, 1))
    chance = torch.where(adjacency, 1 - removed, added)
    upper = (torch.rand(count, count, generator=generator) < chance).triu(1)
    return upper | upper.T


def connected(adjacency: Adjacency, generator: torch.Generator) -> Adjacency:
    """Link parts that are not connected, each by one edge from a random node to one of those before."""
    from scipy.sparse.csgraph import connected_components  # a second to import, so only where it is used

    number, of_node = connected_components(adjacency.numpy(), directed=False)
    part, adjacency = torch.from_numpy(of_node), adjacency.clone()
    for each in range(1, number):
        here, before = (part == each).nonzero()[:, 0], (part < each).nonzero()[:, 0]
        first, second = (group[between(0, len(group), generator)] for group in (here, before))
        adjacency[first, second] = adjacency[second, first] = True
    return adjacency


def thin_tree(nodes: int, window: int, generator: torch.Generator) -> Adjacency:
    """Draw a tree, about 2 n/(window + 1) steps long, whose nodes hang from one of the last before them."""
    parents = [between(max(0, node - window), node, generator) for node in range(1, nodes)]
    return _linked(nodes, list(enumerate(parents, 1)))


def _height(nodes: int) -> int:
    """Return the largest divisor up to the root."""
    return next(number for number in range(isqrt(nodes), 0, -1) if nodes % number == 0)


def _hanging(nodes: int, spine: int, legs: int, generator: torch.Generator) -> Adjacency:
    """Return a path of `spine` nodes; those up to `legs` hang from it, the others from these."""
    pairs = [(node, node + 1) for node in range(spine - 1)]
    pairs += [(node, between(0, spine, generator)) for node in range(spine, legs)]
    return _linked(nodes, pairs + [(node, between(spine, legs, generator)) for node in range(legs, nodes)])


def _linked(nodes: int, pairs: list[tuple[int, int]]) -> Adjacency:
    adjacency = torch.zeros(nodes, nodes, dtype=torch.bool)
    if pairs:
        first, second = torch.tensor(pairs).T
        adjacency[first, second] = adjacency[second, first] = True
    return adjacency
