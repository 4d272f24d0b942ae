"""Images as graphs: patches of like pixels as nodes, linked to the nearest ones."""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gramian.data.graph_splits import Split, random_split
from gramian.data.graphs import Graph, Graphs, flat
from gramian.data.images import Labelled, read_images
from gramian.errors import InputError

CHUNK = 2**24
"""Most distances between pixels and patches held at a time."""

ROUNDS = 10
"""Rounds of k-means, after which patches hardly change."""


def digit_superpixels(
    path: Path | None = None,
    *,
    patches: int = 16,
    neighbours: int = 4,
    weight: float = 4.0,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
) -> Graphs:
    """Make a graph of each labelled image, of which the class is to be told.

    The images are those that `read_images` reads, scikit-learn's digits (8 × 8) without a path; see
    `superpixels`. A test set that comes with them stays the test set; elsewhere a share is.

    Raises: InputError as `read_images`, `superpixels` and `random_split`.
    Holds: exactly; equal seeds give equal splits, the graphs do not depend on it.
    """
    name, parts = read_images(path)
    known = superpixels(parts["train"], patches=patches, neighbours=neighbours, weight=weight)
    labels = parts["train"].labels
    if "test" not in parts:
        split = random_split(len(known), labels=labels, validation=validation, test=test, seed=seed)
        return flat(f"super-pixels of {name}", "classification", known, splits=(split,))
    tests = superpixels(parts["test"], patches=patches, neighbours=neighbours, weight=weight)
    split = random_split(len(known), labels=labels, validation=validation, test=0, seed=seed)
    split = Split(split.train, split.validation, torch.arange(len(tests)) + len(known))
    return flat(f"super-pixels of {name}", "classification", [*known, *tests], splits=(split,))


def superpixels(
    images: Labelled, *, patches: int = 16, neighbours: int = 4, weight: float = 4.0
) -> list[Graph]:
    """Cut images into patches by k-means on place and colour and link each to the nearest.

        d² = |place − place'|² / S² + (weight · |colour − colour'|)²,  S² = pixels / patches

    The rounds start at a regular grid, so that nothing is random; patches that lose all pixels are left out.
    A node's features are the mean colour, between 0 and 1, and the mean place as shares of height and width;
    an edge's is the distance between the places. Two patches are linked when one of them is among the nearest
    of the other. Unlike those of SLIC, with which the published graphs are made, patches are sought among all
    pixels and need not be connected.

    Shapes: images (n, channels, height, width) -> graphs with features (patches, channels + 2), edges (e, 1).
    Raises: InputError unless there are at least 2 patches, no more than pixels, and a neighbour.
    Holds: exactly.
    Source: Achanta et al. 2012, doi 10.1109/TPAMI.2012.120; Dwivedi et al. 2020, arXiv 2003.00982, with 75
        patches of 28 × 28 pixels and 8 neighbours.
    """
    height, width = images.images.shape[-2:]
    if not 2 <= patches <= height * width or neighbours < 1 or not 0 <= weight < float("inf"):
        raise InputError(
            f"images of {height} x {width} pixels have 2 to {height * width} patches, at least 1 neighbour "
            f"and a weight of at least 0, got {patches}, {neighbours} and {weight:g}"
        )
    scale = images.scale or float(images.images.amax())
    colours = images.images.flatten(2).transpose(1, 2) / (scale or 1)
    places = torch.cartesian_prod(torch.arange(height) + 0.5, torch.arange(width) + 0.5)
    starts = _grid(height, width, patches)
    step = max(1, CHUNK // (height * width * len(starts)))
    graphs = []
    for chunk, labels in zip(colours.split(step), images.labels.split(step), strict=True):
        patch = _patches(chunk, places, starts, weight, (height * width / len(starts)) ** 0.5)
        graphs += _graphs(
            chunk, places / torch.tensor([height, width]), patch, labels, neighbours, len(starts)
        )
    return graphs


def _grid(height: int, width: int, patches: int) -> Int64[Tensor, " patches"]:
    """Return the pixels at the centres of about as many equal rectangles, never more than asked."""
    rows = min(max(round((patches * height / width) ** 0.5), 1), height, patches)
    columns = min(max(patches // rows, 1), width)
    down = ((torch.arange(rows) + 0.5) * height / rows).long()
    across = ((torch.arange(columns) + 0.5) * width / columns).long()
    return (down[:, None] * width + across).flatten()


def _patches(
    colours: Float[Tensor, "n pixels channels"],
    places: Float[Tensor, "pixels 2"],
    starts: Int64[Tensor, " patches"],
    weight: float,
    side: float,
) -> Int64[Tensor, "n pixels"]:
    """Return the patch of each pixel."""
    where = (places / side).expand(len(colours), -1, -1)
    points = torch.cat((where, weight * colours), 2)
    centres = points[:, starts]
    patch = _nearest(points, centres)
    for _ in range(ROUNDS):
        means, count = _means(points, patch, len(starts))
        centres = torch.where(count > 0, means, centres)
        patch = _nearest(points, centres)
    return patch


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(2)


def _means(points: Tensor, patch: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean of the points of each patch and how many they are."""
    chosen = torch.nn.functional.one_hot(patch, count).to(points.dtype)
    numbers = chosen.sum(1)[..., None]
    return chosen.transpose(1, 2) @ points / numbers.clamp(min=1), numbers


def _graphs(
    colours: Tensor, places: Tensor, patch: Tensor, labels: Tensor, neighbours: int, count: int
) -> Iterator[Graph]:
    """Yield the graphs of several images."""
    points = torch.cat((colours, places.expand(len(colours), -1, -1)), 2)
    means, numbers = _means(points, patch, count)
    for nodes, there, label in zip(means, numbers[..., 0] > 0, labels, strict=True):
        x = nodes[there]
        apart = torch.cdist(x[:, -2:], x[:, -2:])
        nearest = apart.fill_diagonal_(float("inf")).topk(min(neighbours, len(x) - 1), largest=False).indices
        linked = torch.zeros(apart.shape, dtype=torch.bool).scatter(1, nearest, True)
        edges = (linked | linked.T).nonzero().T
        yield Graph(x, edges, label[None], apart[edges[0], edges[1]][:, None])
