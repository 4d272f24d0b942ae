"""Examples to prune by: read as they are, a part held out by the seed, standardised by chosen ones alone."""

import gzip
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gramian.bayes.split import random_split
from gramian.data.tables import Standardiser
from gramian.errors import InputError
from gramian.tasks.pruning_data import Data, Examples, standardised, standardiser

REAL = Path(os.environ.get("GRAMIAN_DATA", Path(__file__).parents[3] / "shared" / "data"))
MNIST, WINE = REAL / "images" / "mnist_t10k.npz", REAL / "tables" / "wine-quality-red.npz"
NONE = torch.arange(0)


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels(count: int, number: int = 3) -> np.ndarray:
    return (np.arange(count) % number).astype(np.uint8)


def npz(folder: Path, name: str = "a.npz", **arrays) -> Path:
    np.savez(folder / name, **arrays)
    return folder / name


def idx(path: Path, array: np.ndarray) -> Path:
    data = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def flowers(folder: Path, header: str = "", count: int = 30) -> Path:
    """A table as of UCI: numbers, a column of words, and the class in words at the end."""
    rows = [
        f"{5 + row / 7:.3f},{row * row % 11},{'wet' if row % 5 else 'dry'},{('setosa', 'other')[row % 3 > 0]}"
        for row in range(count)
    ]
    path = folder / "flowers.csv"
    path.write_text("\n".join(header.split() + rows) + "\n")
    return path


def test_digits_are_raw_and_a_fifth_is_held_out() -> None:
    found = Data().load()
    assert (found.name, found.classes, found.scale, found.size) == (
        "scikit-learn digits",
        10,
        16.0,
        (1, 8, 8),
    )
    assert len(found) == len(found.x) == len(found.y) == 1797
    assert found.x.dtype == torch.float32
    assert found.x.unique().tolist() == list(range(17))
    assert len(found.held_out) == round(0.2 * 1797)
    assert torch.cat((found.held_out, found.known)).sort().values.tolist() == list(range(1797))
    assert found.held_out.diff().min() > 0
    assert torch.equal(found.held_out, Data().load().held_out)
    assert not torch.equal(found.held_out, Data(seed=1).load().held_out)
    other = Data(seed=1).load()
    assert torch.equal(other.x, found.x)  # without count the seed chooses no examples
    assert len(Data(test=0.5).load().held_out) == round(0.5 * 1797)


def test_every_format_of_images(tmp_path) -> None:
    images, numbers = pixels(30, 4, 6), labels(30)
    folder = tmp_path / "folder"
    folder.mkdir()
    idx(folder / "train-images-idx3-ubyte.gz", images)
    idx(folder / "train-labels-idx1-ubyte", numbers)
    idx(tmp_path / "pictures", images)
    settings = (
        Data(data=npz(tmp_path, images=images, labels=numbers, more=images)),
        Data(data=folder),
        Data(data=folder / "train-images-idx3-ubyte.gz"),
        Data(data=tmp_path / "pictures", labels=idx(tmp_path / "numbers", numbers)),
    )
    for each in settings:
        found = each.load()
        assert torch.equal(found.x, torch.from_numpy(images)[:, None].float())
        assert torch.equal(found.y, torch.from_numpy(numbers).long())
        assert (found.scale, found.classes, found.names) == (255.0, 3, ())
        assert torch.equal(found.held_out, settings[0].load().held_out)
    floats = npz(tmp_path, "b.npz", images=images / 255, labels=numbers)
    assert Data(data=floats).load().scale is None


def test_a_test_set_that_comes_with_images_is_held_out(tmp_path) -> None:
    images, tests = pixels(30, 4, 4), pixels(7, 4, 4, seed=1)
    arrays = {"images": images, "labels": labels(30), "test_images": tests, "test_labels": labels(7)}
    found = Data(data=npz(tmp_path, **arrays), test=0.9).load()
    assert found.held_out.tolist() == list(range(30, 37))
    assert torch.equal(found.x[found.held_out][:, 0], torch.from_numpy(tests).float())
    few = Data(data=npz(tmp_path, **arrays), count=5).load()
    assert (len(few), few.held_out.tolist()) == (10, [5, 6, 7, 8, 9])


def test_count_takes_some_by_the_seed_with_their_classes(tmp_path) -> None:
    named = np.arange(60, dtype=np.uint8)  # a pixel that tells which image it is
    path = npz(tmp_path, images=np.repeat(named, 4).reshape(60, 2, 2), labels=named % 4)
    found, again, other = (Data(data=path, count=20, seed=seed).load() for seed in (0, 0, 1))
    which = found.x[:, 0, 0, 0].long()
    assert len(which.unique()) == len(found) == 20
    assert torch.equal(found.y, which % 4)
    assert torch.equal(found.x, again.x)
    assert not torch.equal(found.x, other.x)
    assert len(Data(data=path, count=100).load()) == 60


@pytest.mark.parametrize("header", ["", "length,width,soil,kind"])
def test_a_table_of_uci(tmp_path, header: str) -> None:
    target = "kind" if header else "4"
    found = Data(data=flowers(tmp_path, header), target=target).load()
    assert len(found) == 30
    assert found.size == (3,)
    assert found.names == ("other", "setosa")
    assert found.y.tolist() == [int(row % 3 == 0) for row in range(30)]
    assert found.x[:, 1].tolist() == [row * row % 11 for row in range(30)]
    assert found.x[:, 2].tolist() == [float(row % 5 > 0) for row in range(30)]
    assert (found.scale, len(found.held_out)) == (None, 6)
    assert torch.equal(found.held_out, Data(data=tmp_path / "flowers.csv", target=target).load().held_out)
    less = Data(data=tmp_path / "flowers.csv", target=target, leave_out=("soil" if header else "3",)).load()
    assert less.size == (2,)
    few = Data(data=tmp_path / "flowers.csv", target=target, count=12).load()
    assert len(few) == len(few.y) == 12


def test_a_table_in_arrays(tmp_path) -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    found = Data(data=npz(tmp_path, X=x, y=3 + np.arange(20) % 2)).load()
    assert torch.equal(found.x, torch.from_numpy(x))
    assert found.names == ("3", "4")
    assert found.y.tolist() == [row % 2 for row in range(20)]
    both = npz(tmp_path, X=x, y=np.arange(20) % 2, images=pixels(20, 2, 2), labels=labels(20))
    assert Data(data=both).load().size == (1, 2, 2)


def test_inputs_are_standardised_by_those_seen() -> None:
    found = Data(count=300).load()
    seen = found.known[:100]
    x = standardised(found, seen)
    assert x.dtype == torch.float32
    assert x[seen].mean().item() == pytest.approx(0, abs=1e-5)
    assert x[seen].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert x.mean().abs().item() > 1e-4  # not by all
    assert torch.equal(standardised(found, NONE), found.x / 16)
    assert torch.equal(standardiser(found, seen)(found.x), x)


def test_colours_have_their_own_scales(tmp_path) -> None:
    images = pixels(40, 3, 4, 5).astype(np.float64) * np.array([1, 10, 0])[:, None, None] + 7
    found = Data(data=npz(tmp_path, images=images, labels=labels(40))).load()
    x = standardised(found, torch.arange(25))
    seen = images[:25].transpose(1, 0, 2, 3).reshape(3, -1)
    mean, deviation = seen.mean(1), np.where(seen.std(1) > 0, seen.std(1), 1)
    expected = (images - mean[:, None, None]) / deviation[:, None, None]
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-5)
    assert not x[:, 2].any()  # the channel that is the same everywhere


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_scales_of_any_size(tmp_path, size: float) -> None:
    images = pixels(20, 2, 2).astype(np.float32)
    plain, scaled = (
        standardised(Data(data=npz(tmp_path, images=each, labels=labels(20))).load(), torch.arange(9))
        for each in (images, images * np.float32(size))
    )
    torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=1e-5)


def changed(found: Examples, which: int) -> Examples:
    x = found.x.clone()
    x[which] = 100 - 3 * x[which]
    return replace(found, x=x)


def standardised_by_all(found: Examples, seen: torch.Tensor) -> torch.Tensor:
    """What would void a certificate."""
    return standardised(found, torch.arange(len(found)))


@pytest.mark.parametrize("kind", ["images", "table"])
def test_what_is_not_seen_changes_no_other_example(tmp_path, kind: str) -> None:
    table = Data(data=flowers(tmp_path), target="4")
    found = (Data(count=60) if kind == "images" else table).load()
    split = random_split(len(found.known), 0.5, 0)
    seen, unseen = found.known[split.prior], int(found.known[split.bound][2])
    others = torch.arange(len(found)) != unseen
    before, after = (standardised(each, seen) for each in (found, changed(found, unseen)))
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[unseen], after[unseen])
    spoiled = [standardised_by_all(each, seen) for each in (found, changed(found, unseen))]
    assert not torch.equal(spoiled[0][others], spoiled[1][others])
    other_seen = changed(found, int(seen[0]))
    assert not torch.equal(standardised(other_seen, seen)[others], before[others])


def test_large_numbers_of_tables_keep_their_digits(tmp_path) -> None:
    rows = "".join(f"{1_700_000_000 + row},{row % 2}\n" for row in range(20))
    (tmp_path / "times.csv").write_text("seconds,late\n" + rows)
    found = Data(data=tmp_path / "times.csv", target="late").load()
    x = standardised(found, torch.arange(20))
    expected = Standardiser.of(torch.arange(20).double())(torch.arange(20).double())
    torch.testing.assert_close(x[:, 0], expected.float(), rtol=0, atol=1e-6)
    spoiled = replace(found, x=found.x.float().double())  # control: float32 cannot tell the seconds apart
    assert (standardised(spoiled, torch.arange(20))[:, 0] - expected).abs().max() > 0.1


def test_what_cannot_be_standardised(tmp_path) -> None:
    table = Data(data=flowers(tmp_path), target="4").load()
    with pytest.raises(InputError, match=r"flowers\.csv is not known before .* a fraction of them"):
        standardised(table, NONE)
    x = table.x.clone()
    x[7, 0] = 1e300
    with pytest.raises(InputError, match="example 7 is too far from the others"):
        standardised(replace(table, x=x), torch.arange(5))


def test_settings_that_cannot_be_used(tmp_path) -> None:
    table = flowers(tmp_path)
    for settings, words in (
        ({"count": 1}, "count must be at least 2 examples, got 1"),
        ({"test": 0.0}, "held out must lie between 0 and 1, got 0"),
        ({"test": 1.0}, "held out must lie between 0 and 1"),
        ({"test": float("nan")}, "held out must lie between 0 and 1"),
        ({"target": "y"}, "target, leave_out and header are for tables"),
        ({"leave_out": ("y",)}, "target, leave_out and header are for tables"),
        ({"header": True}, "target, leave_out and header are for tables"),
        ({"labels": table}, "need the images they belong to"),
        ({"data": table, "target": "4", "labels": table}, "would be labels of images, but .* is a table"),
        ({"data": table}, "name the column of flowers.csv to predict"),
        ({"data": table, "target": "kind"}, "no column 'kind'"),
        ({"data": table, "target": "1"}, r"'1' holds '5\.143' in line 2; classes are words alone or whole"),
        ({"data": tmp_path / "none.csv"}, "there is no file"),
        ({"data": tmp_path / "none.npz"}, "there is no file or folder"),
        ({"data": tmp_path}, "holds neither train-images"),
    ):
        with pytest.raises(InputError, match=words):
            Data(**settings).load()


def test_data_that_cannot_be_used(tmp_path) -> None:
    good, numbers = pixels(20, 4, 4), labels(20)
    tests = {"test_images": good, "test_labels": numbers}
    holed = np.where(np.arange(20)[:, None, None] == 3, np.nan, good)
    for arrays, words in (
        ({"images": good, "labels": numbers * 0 + 4}, "a single class; at least two"),
        ({"images": good, "labels": numbers.astype(int) - 1}, "labels count classes from 0, got -1"),
        ({"images": good, "labels": numbers.astype(int) * 1000}, "at most 1,000 classes from 0, got 2000"),
        ({"images": good, "labels": numbers / 2}, "labels whole numbers"),
        ({"images": holed, "labels": numbers}, "not finite"),
        ({"images": good, "labels": numbers[:-1]}, "20 images but 19 labels"),
        ({"images": good[:1], "labels": numbers[:1]}, "a single class"),
        ({"images": good[:, 1:], "labels": numbers, **tests}, "must have the size and the type"),
        ({"images": good / 255, "labels": numbers, **tests}, "must have the size and the type"),
        ({"pictures": good}, "needs the arrays images and labels, or X and y; it holds pictures"),
        ({}, "it holds nothing"),
        ({"X": good[:, 0], "y": np.linspace(0, 1, 20)}, "are to be regressed on"),
        ({"X": good[:, 0], "y": np.full(20, np.nan)}, "'y' has no value in row 1"),
        ({"X": good[:, 0] * np.nan, "y": numbers}, "'x1' has no value in row 1"),
    ):
        with pytest.raises(InputError, match=words):
            Data(data=npz(tmp_path, **arrays)).load()
    whole = npz(tmp_path, images=good, labels=numbers).read_bytes()
    for content in (b"", b"PK\x03\x04", whole[: len(whole) // 2], whole[:-1]):
        (tmp_path / "b.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be read as \.npz"):
            Data(data=tmp_path / "b.npz").load()


def test_a_spoiled_byte_of_an_npz_is_refused_or_harmless(tmp_path) -> None:
    path = npz(tmp_path, images=pixels(8, 1, 1), labels=labels(8))
    whole, refused = path.read_bytes(), 0
    expected = Data(data=path).load()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            found = Data(data=path).load()
        except InputError:
            refused += 1
            continue
        assert torch.equal(found.x, expected.x)
        assert torch.equal(found.y, expected.y)
    assert refused > len(whole) / 12


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.exists(), reason="no MNIST file under $GRAMIAN_DATA")
def test_real_mnist() -> None:
    found = Data(data=MNIST).load()
    assert (len(found), found.classes, found.scale, found.size) == (10_000, 10, 255.0, (1, 28, 28))
    assert len(found.held_out) == 2000
    x = standardised(found, found.known[:4000])
    assert x[found.known[:4000]].double().std(correction=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.skipif(not WINE.exists(), reason="no tables under $GRAMIAN_DATA")
def test_real_table_as_arrays_and_as_csv(tmp_path) -> None:
    found = Data(data=WINE).load()
    assert (len(found), found.size, found.names) == (1599, (11,), ("3", "4", "5", "6", "7", "8"))
    with np.load(WINE, allow_pickle=False) as file:
        rows = np.column_stack((file["X"], file["y"]))
    np.savetxt(tmp_path / "wine.csv", rows, delimiter=";", fmt="%.17g")
    again = Data(data=tmp_path / "wine.csv", target="12").load()
    assert torch.equal(again.x, found.x)
    assert torch.equal(again.y, found.y)
    assert torch.equal(again.held_out, found.held_out)
    with pytest.raises(InputError, match="are to be regressed on"):
        Data(data=REAL / "tables" / "yacht.npz").load()
