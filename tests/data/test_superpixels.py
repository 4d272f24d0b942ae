"""Images as graphs: patches are those of like pixels, links those of an obvious search, nothing is random."""

import os
from pathlib import Path

import pytest
import torch

from gramian.data.graph_generators import GENERATORS
from gramian.data.images import Labelled, read_images
from gramian.data.superpixels import digit_superpixels, superpixels
from gramian.errors import InputError

MNIST = (
    Path(os.environ.get("GRAMIAN_DATA", Path(__file__).parents[3] / "shared" / "data"))
    / "images"
    / "mnist_t10k.npz"
)


def halves() -> Labelled:
    """Two images of 6 x 8 pixels: dark on the left and bright on the right, and the other way round."""
    images = torch.zeros(2, 1, 6, 8)
    images[0, :, :, 4:] = 8
    images[1, :, :, :4] = 16
    return Labelled(images, torch.tensor([0, 1]), 16.0)


def test_two_halves_are_two_patches() -> None:
    first, second = superpixels(halves(), patches=2, neighbours=1)
    torch.testing.assert_close(first.x, torch.tensor([[0, 0.5, 0.25], [0.5, 0.5, 0.75]]))
    torch.testing.assert_close(second.x, torch.tensor([[1, 0.5, 0.25], [0, 0.5, 0.75]]))
    assert first.edge_index.tolist() == [[0, 1], [1, 0]]
    assert first.edge_attr is not None
    torch.testing.assert_close(first.edge_attr, torch.full((2, 1), 0.5))
    assert (first.y.tolist(), second.y.tolist()) == ([0], [1])


def test_patches_follow_the_picture() -> None:
    """A step that is not where the grid's is: with a weight the patches find it, without one they cannot."""
    images = torch.zeros(1, 1, 8, 8)
    images[..., 3:] = 1
    step = Labelled(images, torch.tensor([0]))

    def mixed(weight: float) -> int:
        (graph,) = superpixels(step, patches=4, weight=weight)
        return int(((graph.x[:, 0] > 0.01) & (graph.x[:, 0] < 0.99)).sum())

    assert mixed(4.0) == 0
    assert mixed(0.0) > 0


def test_links_are_those_of_the_nearest() -> None:
    images = read_images()[1]["train"]
    graphs = superpixels(images[torch.arange(10)], patches=16, neighbours=3)
    for graph in graphs:
        places = graph.x[:, 1:].tolist()
        apart = [[((a - c) ** 2 + (b - d) ** 2) ** 0.5 for c, d in places] for a, b in places]
        linked = {tuple(edge) for edge in graph.edge_index.T.tolist()}
        assert all((second, first) in linked for first, second in linked)
        for node, row in enumerate(apart):
            others = sorted(distance for other, distance in enumerate(row) if other != node)
            near = {
                other for other, distance in enumerate(row) if distance < others[2] - 1e-6 and other != node
            }
            assert near <= {second for first, second in linked if first == node}
            assert sum(first == node for first, _ in linked) >= 3
        for (first, second), length in zip(graph.edge_index.T.tolist(), graph.edge_attr, strict=True):
            assert length.item() == pytest.approx(apart[first][second], abs=1e-6)
        assert len(linked) < len(places) * (len(places) - 1)  # control: not everything is linked


def test_patches_keep_the_mean_of_the_picture_between_its_ends() -> None:
    images = read_images()[1]["train"][torch.arange(50)]
    for graph, pixels in zip(superpixels(images), images.images, strict=True):
        assert 2 <= len(graph.x) <= 16
        assert pixels.min() / 16 - 1e-6 <= graph.x[:, 0].min()
        assert graph.x[:, 0].max() <= pixels.max() / 16 + 1e-6
        assert graph.x[:, 1:].min() > 0
        assert graph.x[:, 1:].max() < 1


def test_digits_by_name() -> None:
    graphs = GENERATORS["superpixels"](seed=1)
    assert (graphs.task, graphs.outputs, len(graphs)) == ("classification", 10, 1797)
    (split,) = graphs.splits
    assert (len(split.test), len(split.validation)) == (180, 180)
    other = digit_superpixels(seed=2)
    assert torch.equal(other.x, graphs.x)  # the seed is that of the split
    assert not torch.equal(other.splits[0].test, split.test)
    assert torch.equal(graphs.y, read_images()[1]["train"].labels)


def test_a_test_set_that_comes_with_the_images_stays_it(tmp_path: Path) -> None:
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 256, (14, 3, 5, 5), dtype=np.uint8)
    labels = np.arange(14) % 2
    path = tmp_path / "a.npz"
    np.savez(path, images=pixels[:10], labels=labels[:10], test_images=pixels[10:], test_labels=labels[10:])
    graphs = digit_superpixels(path, patches=4)
    assert graphs.splits[0].test.tolist() == [10, 11, 12, 13]
    assert graphs.x.shape[1] == 5  # three colours and a place
    assert sorted(torch.cat((graphs.splits[0].train, graphs.splits[0].validation)).tolist()) == list(
        range(10)
    )


@pytest.mark.parametrize(
    "settings",
    [{"patches": 1}, {"patches": 49}, {"neighbours": 0}, {"weight": -1.0}, {"weight": float("nan")}],
)
def test_settings_that_cannot_be(settings: dict) -> None:
    with pytest.raises(InputError, match="6 x 8 pixels have 2 to 48 patches"):
        superpixels(halves(), **settings)


def test_a_dark_picture_is_one() -> None:
    dark = Labelled(torch.zeros(1, 1, 4, 4), torch.tensor([0]))
    (graph,) = superpixels(dark, patches=16, neighbours=50)
    assert len(graph.x) == 16
    assert not graph.x[:, 0].any()
    assert graph.edge_index.shape[1] == 16 * 15


@pytest.mark.skipif(not MNIST.exists(), reason="no MNIST file under $GRAMIAN_DATA")
def test_mnist_in_patches() -> None:
    images = read_images(MNIST)[1]["train"][torch.arange(20)]
    graphs = superpixels(images, patches=75, neighbours=8)
    assert all(40 <= len(graph.x) <= 75 for graph in graphs)
    assert torch.equal(torch.cat([graph.y for graph in graphs]), images.labels)
