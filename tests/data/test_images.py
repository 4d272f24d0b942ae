"""Images: every format is read back as written, splits are apart, damage is named."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from gramian.data.images import Images, load_images, read_idx, read_images
from gramian.errors import InputError

REAL = Path(os.environ.get("GRAMIAN_DATA", Path(__file__).parents[3] / "shared" / "data"))
MNIST = REAL / "images" / "mnist_t10k.npz"


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def classes(count: int, number: int = 3) -> np.ndarray:
    return (np.arange(count) % number).astype(np.uint8)


def write_idx(path: Path, array: np.ndarray) -> Path:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def everything(images: Images) -> torch.Tensor:
    parts = (images.train, images.validation, images.test)
    return torch.cat([torch.cat([part.images.flatten(1), part.labels[:, None]], 1) for part in parts])


def test_digits_are_split_and_standardised() -> None:
    images = load_images()
    sizes = [len(part) for part in (images.train, images.validation, images.test)]
    assert sum(sizes) == 1797
    assert sizes[2] == round(0.2 * 1797)
    assert sizes[1] == round(0.15 * (1797 - sizes[2]))
    assert images.train.images.shape[1:] == (1, 8, 8)
    assert images.classes == 10
    assert images.train.images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.train.images.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert images.validation.images.mean().abs().item() > 1e-4  # the training statistics, not its own
    assert torch.equal(images.train.labels.unique(), torch.arange(10))


def test_the_split_is_a_partition_drawn_from_the_seed(tmp_path) -> None:
    named = np.arange(60, dtype=np.uint8)  # a pixel that tells which image it is
    images = np.stack([named, 255 - named, named * 0, named * 3], 1).reshape(60, 2, 2)
    np.savez(tmp_path / "a.npz", images=images, labels=classes(60))
    one, again, other = (load_images(tmp_path / "a.npz", seed=seed) for seed in (0, 0, 1))
    rows = everything(one)
    assert len(rows) == len(rows.unique(dim=0)) == 60
    assert torch.equal(rows, everything(again))
    assert not torch.equal(rows, everything(other))
    order = rows[:, 0].argsort()
    assert torch.equal(rows[order, -1], torch.from_numpy(classes(60)).float())  # labels go with their images


def test_every_format_holds_the_same_images(tmp_path) -> None:
    images, labels = pixels(30, 4, 6), classes(30)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    np.savez(tmp_path / "b.npz", images=images[:, None].astype(np.float64), labels=labels.astype(np.int32))
    np.savez(tmp_path / "c.npz", images=images[..., None], labels=labels)
    (tmp_path / "folder").mkdir()
    write_idx(tmp_path / "folder" / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "folder" / "train-labels-idx1-ubyte", labels)
    write_idx(tmp_path / "pictures", images)
    write_idx(tmp_path / "numbers", labels)
    expected = everything(load_images(tmp_path / "a.npz"))
    for found in (
        load_images(tmp_path / "b.npz"),
        load_images(tmp_path / "c.npz"),
        load_images(tmp_path / "folder"),
        load_images(tmp_path / "folder" / "train-images-idx3-ubyte.gz"),
        load_images(tmp_path / "pictures", tmp_path / "numbers"),
    ):
        assert torch.equal(everything(found), expected)
    assert not torch.equal(everything(load_images(tmp_path / "a.npz", seed=3)), expected)


def test_colours_are_channels_wherever_they_stand(tmp_path) -> None:
    images = pixels(20, 4, 5, 3)
    np.savez(tmp_path / "last.npz", images=images, labels=classes(20))
    np.savez(tmp_path / "first.npz", images=images.transpose(0, 3, 1, 2), labels=classes(20))
    last, first = load_images(tmp_path / "last.npz"), load_images(tmp_path / "first.npz")
    assert last.train.images.shape[1:] == (3, 4, 5)
    assert torch.equal(everything(last), everything(first))
    means = last.train.images.mean((0, 2, 3))
    torch.testing.assert_close(means, torch.zeros(3), atol=1e-5, rtol=0)


def test_a_test_set_that_comes_with_the_data_stays_the_test_set(tmp_path) -> None:
    images, labels, tests = pixels(30, 4, 4), classes(30), pixels(7, 4, 4, seed=1)
    np.savez(tmp_path / "a.npz", images=images, labels=labels, test_images=tests, test_labels=classes(7))
    for part, array, numbers in (("train", images, labels), ("t10k", tests, classes(7))):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", array)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", numbers)
    for found in (load_images(tmp_path / "a.npz"), load_images(tmp_path)):
        assert len(found.test) == 7
        assert len(found.train) + len(found.validation) == 30
        assert torch.equal(found.test.labels.sort().values, torch.from_numpy(classes(7)).long().sort().values)
    alone = tmp_path / "alone"
    alone.mkdir()
    write_idx(alone / "t10k-images-idx3-ubyte", images)
    write_idx(alone / "t10k-labels-idx1-ubyte", labels)
    assert len(load_images(alone).test) == 6  # a lone test set is split like any other


def test_raw_images_are_as_in_the_file(tmp_path) -> None:
    images, tests = pixels(12, 4, 6), pixels(5, 4, 6, seed=1)
    arrays = {"labels": classes(12), "test_images": tests / 255, "test_labels": classes(5)}
    np.savez(tmp_path / "a.NPZ.npz", images=images, **arrays)
    (tmp_path / "a.NPZ.npz").rename(tmp_path / "a.NPZ")
    name, found = read_images(tmp_path / "a.NPZ")
    assert (name, list(found)) == ("a.NPZ", ["train", "test"])
    assert torch.equal(found["train"].images, torch.from_numpy(images)[:, None].float())
    assert torch.equal(found["test"].images, torch.from_numpy(tests / 255)[:, None].float())
    assert torch.equal(found["train"].labels, torch.from_numpy(classes(12)).long())
    assert (found["train"].scale, found["test"].scale) == (255.0, None)
    assert found["train"][torch.arange(3)].to(torch.device("cpu")).scale == 255.0
    name, found = read_images()
    assert (name, list(found), found["train"].scale) == ("scikit-learn digits", ["train"], 16.0)
    assert found["train"].images.amax() == 16
    assert load_images(tmp_path / "a.NPZ").train.scale is None  # standardised ones are not in that range


def test_pool_and_count(tmp_path) -> None:
    images = pixels(40, 6, 7)
    np.savez(tmp_path / "a.npz", images=images, labels=classes(40))
    small, large = load_images(tmp_path / "a.npz", pool=3), load_images(tmp_path / "a.npz")
    assert small.train.images.shape[1:] == (1, 2, 2)
    averaged = avg_pool2d(large.train.images, 3)
    torch.testing.assert_close(small.train.images, (averaged - averaged.mean()) / averaged.std(correction=0))
    few = load_images(tmp_path / "a.npz", count=10)
    assert sum(len(part) for part in (few.train, few.validation, few.test)) == 10


def test_damaged_idx_files_are_named(tmp_path) -> None:
    path = write_idx(tmp_path / "images", pixels(5, 3, 3))
    assert np.array_equal(read_idx(path), pixels(5, 3, 3))
    whole = path.read_bytes()
    for content, words in (
        (b"", "no IDX file of unsigned bytes: it starts with nothing"),
        (b"\x00\x00\x0d" + whole[3:], "no IDX file of unsigned bytes"),
        (b"PK\x03\x04" + whole, "no IDX file"),
        (whole[:-1], "damaged: 60 bytes do not hold the 5x3x3"),
        (whole + b"\x00", "damaged: 62 bytes"),
        (whole[:10], "damaged"),
        (whole[:3] + b"\x00", "damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=words):
            read_idx(path)
    packed = tmp_path / "images.gz"
    packed.write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        read_idx(packed)
    packed.write_bytes(whole)
    with pytest.raises(InputError, match="cannot be read"):
        read_idx(packed)


def test_what_cannot_be_used_is_named(tmp_path) -> None:
    def saved(**arrays) -> Path:
        np.savez(tmp_path / "a.npz", **arrays)
        return tmp_path / "a.npz"

    good, labels = pixels(20, 4, 4), classes(20)
    holed = good.astype(np.float32)
    holed[3, 1, 1] = np.nan
    for arrays, words in (
        ({"images": good}, "needs the arrays images and labels; it holds images"),
        ({"images": good, "labels": labels, "test_images": good}, "test_images and test_labels"),
        ({"images": good, "labels": labels[:-1]}, "20 images but 19 labels"),
        ({"images": good, "labels": labels.astype(float)}, "labels whole numbers"),
        ({"images": good, "labels": labels.astype(int) - 1}, "count classes from 0, got -1"),
        ({"images": good, "labels": labels * 0}, "a single class"),
        ({"images": good.reshape(20, 16), "labels": labels}, r"images must be \(n, height, width\)"),
        ({"images": holed, "labels": labels}, "not finite"),
        ({"images": good * 0, "labels": labels}, "the same everywhere"),
        ({"images": good, "labels": np.array([{}] * 20)}, "plain arrays"),
    ):
        with pytest.raises(InputError, match=words):
            load_images(saved(**arrays))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "empty").mkdir()
    write_idx(tmp_path / "lone-images-idx3-ubyte", good)
    for path, words in (
        (tmp_path / "broken.npz", "plain arrays"),
        (tmp_path / "nowhere", "there is no file or folder"),
        (tmp_path / "empty", "holds neither train-images"),
        (tmp_path / "lone-images-idx3-ubyte", "no labels for"),
    ):
        with pytest.raises(InputError, match=words):
            load_images(path)
    for settings, words in (
        ({"pool": 0}, "pool"),
        ({"pool": 5}, "cannot be averaged over 5 x 5"),
        ({"count": 2}, "count"),
        ({"test": 1.0}, "share for test"),
        ({"validation": 0.0}, "share for validation"),
    ):
        with pytest.raises(InputError, match=words):
            load_images(saved(images=good, labels=labels), **settings)


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.exists(), reason="no MNIST file under $GRAMIAN_DATA")
def test_real_mnist() -> None:
    images = load_images(MNIST, pool=2)
    assert images.classes == 10
    assert images.train.images.shape == (6800, 1, 14, 14)
    ones = images.train.images[images.train.labels == 1].mean()
    zeros = images.train.images[images.train.labels == 0].mean()
    assert ones < zeros - 0.2  # a one has less ink than a zero
