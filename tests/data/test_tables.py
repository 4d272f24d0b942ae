"""Tables: every format is read back as written, words become levels, and what cannot be used is named."""

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gramian.data.cells import CLASSES, LEVELS, MISSING, read_cells
from gramian.data.tables import Standardiser, Table, digits, load_rows, load_table, toy
from gramian.errors import InputError, MissingExtraError

REAL = Path(os.environ.get("GRAMIAN_DATA", Path(__file__).parents[3] / "shared" / "data")) / "tables"
F64 = torch.float64
PLAIN = "width,height,y\n1,2.5,10\n2,-3e1,20\n4,0,30\n"
WORDS = (
    "size,colour,shape,y\n1,red,round,1\n2,blue,square,2\n3,green,round,3\n4,red,square,4\n"
    "5,red,round,5\n6,blue,round,6\n"
)
X = torch.tensor([[1, 2.5], [2, -30], [4, 0]], dtype=F64)
Y = torch.tensor([10, 20, 30], dtype=F64)


def write(folder: Path, text: str | bytes, name: str = "a.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def table(folder: Path, text: str | bytes, target: str | None = "y", name: str = "a.csv", **options) -> Table:
    return load_table(write(folder, text, name), target, **options)


def first_column(folder: Path, text: str, header: bool | None) -> str:
    return next(iter(read_cells(write(folder, text), header).cells))


def npz(folder: Path, **arrays) -> Path:
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (PLAIN, "a.csv"),
        (PLAIN.replace(",", ";"), "a.CSV"),
        (PLAIN.replace(",", "\t"), "a.csv"),
        (PLAIN.replace(",", "\t"), "a.tsv"),
        (PLAIN.replace("\n", "\r\n"), "a.csv"),
        (PLAIN.strip(), "a.csv"),
        (b"\xef\xbb\xbf" + PLAIN.encode(), "a.csv"),
        ("\n\n" + PLAIN.replace(",", ";").replace("\n", "\n\n"), "a.csv"),
        (PLAIN.replace(",", " , "), "a.csv"),
        ('"' + PLAIN.replace(",", '","').replace("\n", '"\n"').removesuffix('"'), "a.csv"),
    ],
)
def test_delimited_files(tmp_path, text: str | bytes, name: str) -> None:
    found = table(tmp_path, text, name=name)
    assert torch.equal(found.x, X)
    assert torch.equal(found.y, Y)
    assert found.columns == ("width", "height")
    assert (found.name, found.target, len(found), found.duplicates) == (name, "y", 3, 0)
    assert (found.dropped, found.splits, dict(found.categories)) == ((), (), {})


def test_quoted_cells_do_not_part_the_line(tmp_path) -> None:
    found = table(tmp_path, '"wide, in m";"a ""b"" (c, d, e)";y\n1;2.5;10\n2;-30;20\n4;0;30\n')
    assert found.columns == ("wide, in m", 'a "b" (c, d, e)')
    assert torch.equal(found.x, X)


def test_without_a_header_columns_are_numbered(tmp_path) -> None:
    body = PLAIN.split("\n", 1)[1]
    found = table(tmp_path, body, "3")
    assert (found.columns, found.target) == (("1", "2"), "3")
    assert torch.equal(found.x, X)
    named = table(tmp_path, PLAIN, header=True)
    assert torch.equal(named.x, X)
    short = table(tmp_path, body, "10", header=True)  # the first row taken for names
    assert (short.columns, len(short)) == (("1", "2.5"), 2)
    words = table(tmp_path, "red,1\nblue,2\nred,3\nblue,4\n", "2", header=False)
    assert words.columns == ("1=red",)
    assert torch.equal(words.x[:, 0], torch.tensor([1, 0, 1, 0], dtype=F64))
    unnamed = table(tmp_path, "a,,y\n1,2,3\n2,3,4\n")
    assert unnamed.columns == ("a", "column 2")


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("5.1,3.5,red\n4.9,3.0,red\n7.0,3.2,blue\n", "1"),  # no header, the classes are words
        ("x,o,won\no,x,lost\nx,x,won\n", "1"),  # no header, words alone
        ("0,1,name\n5.1,3.5,red\n4.9,3.0,red\n", "0"),  # numbers name most columns
        ("width,height,y\n1,2,3\n4,5,6\n", "width"),
        ("size,note,y\n1,note a,3\n2,size,4\n", "size"),  # in another column, or in part
    ],
)
def test_a_first_line_whose_words_stand_below_again_is_no_header(tmp_path, text: str, first: str) -> None:
    assert first_column(tmp_path, text, None) == first
    assert first_column(tmp_path, text, True) == text.split(",")[0]
    assert first_column(tmp_path, text, False) == "1"


def test_words_become_levels(tmp_path) -> None:
    found = table(tmp_path, WORDS)
    assert found.columns == ("size", "colour=blue", "colour=green", "colour=red", "shape=square")
    assert dict(found.categories) == {"colour": ("blue", "green", "red"), "shape": ("round", "square")}
    expected = [
        [1, 0, 0, 1, 0],
        [2, 1, 0, 0, 1],
        [3, 0, 1, 0, 0],
        [4, 0, 0, 1, 1],
        [5, 0, 0, 1, 0],
        [6, 1, 0, 0, 0],
    ]
    assert torch.equal(found.x, torch.tensor(expected, dtype=F64))


def test_a_number_with_an_underscore_is_a_word(tmp_path) -> None:
    found = table(tmp_path, "code,y\n1_0,1\n1_1,2\n1_0,3\n1_1,4\n")
    assert found.columns == ("code=1_1",)


def test_two_columns_cannot_make_one_feature(tmp_path) -> None:
    text = "colour,colour=red,y\nblue,1,1\nred,2,2\nblue,3,3\nred,4,4\n"
    with pytest.raises(InputError, match="two columns make the feature 'colour=red'"):
        table(tmp_path, text)
    assert table(tmp_path, text, leave_out=("colour",)).columns == ("colour=red",)


def test_too_many_words_are_refused(tmp_path) -> None:
    def text(levels: int, rows: int) -> str:
        return "name,n,y\n" + "".join(f"w{row % levels},{row},{row}\n" for row in range(rows))

    assert len(table(tmp_path, text(LEVELS, 2 * LEVELS)).columns) == LEVELS + 1
    for levels, rows in ((LEVELS + 1, 100), (6, 10)):
        with pytest.raises(InputError, match=f"'name' holds {levels} different words in {rows} rows"):
            table(tmp_path, text(levels, rows))
    assert table(tmp_path, text(31, 100), leave_out=("name",)).columns == ("n",)


@pytest.mark.parametrize("cell", ["tall", "1,5", "1.5 m", "0x10", "1_0"])
def test_a_column_of_numbers_and_words_is_refused(tmp_path, cell: str) -> None:
    with pytest.raises(InputError, match=f"'height' must hold finite numbers, got '{cell}' in line 3"):
        table(tmp_path, PLAIN.replace(",", ";").replace("-3e1", cell))


@pytest.mark.parametrize("cell", ["inf", "-Infinity", "1e999", "-nan"])
def test_infinite_numbers_are_refused(tmp_path, cell: str) -> None:
    with pytest.raises(InputError, match=f"'height' must hold finite numbers, got '{cell}' in line 3"):
        table(tmp_path, PLAIN.replace("-3e1", cell))


@pytest.mark.parametrize("cell", sorted(MISSING))
@pytest.mark.parametrize("spelt", [str.lower, str.upper, " {} ".format])
def test_missing_values_are_refused(tmp_path, cell: str, spelt) -> None:
    for before, column, line in (("-3e1", "height", 3), ("30\n", "y", 4)):
        text = PLAIN.replace(before, spelt(cell) + "\n" * before.endswith("\n"))
        with pytest.raises(InputError, match=f"column '{column}' has no value in line {line}; fill it in"):
            table(tmp_path, text)
    with pytest.raises(InputError, match="column 'colour' has no value in line 4"):
        table(tmp_path, WORDS.replace("green", spelt(cell)))
    assert table(tmp_path, PLAIN.replace("-3e1", cell), leave_out=("height",)).columns == ("width",)


def test_constant_columns_are_left_out(tmp_path) -> None:
    text = "a,b,c,d,y\n1,7,x,0.1,1\n2,7,x,0.1,2\n2,7,x,0.1,4\n"
    found = table(tmp_path, text)
    assert (found.columns, found.dropped) == (("a",), ("b", "c", "d"))
    assert dict(found.categories) == {}
    with pytest.raises(InputError, match="no column that varies beside the target 'y'"):
        table(tmp_path, text, leave_out=("a",))


def test_text_says_what_was_done(tmp_path) -> None:
    assert table(tmp_path, PLAIN).text() == "a.csv: 3 rows, 2 features, target 'y'"
    found = table(tmp_path, "a,k,c,y\n1,7,x,1\n2,7,z,2\n1,7,x,3\n2,7,z,4\n", leave_out=("k",))
    assert found.text() == (
        "a.csv: 4 rows, 2 features, target 'y'; words as levels: 'c' (2 levels); "
        "2 rows with the features of an earlier one"
    )
    single = table(tmp_path, "a,k,y\n1,7,1\n2,7,2\n1,7,3\n").text()
    assert single == (
        "a.csv: 3 rows, 1 feature, target 'y'; left out as constant: 'k'; "
        "1 row with the features of an earlier one"
    )


@pytest.mark.parametrize(
    ("text", "target", "words"),
    [
        ("", "y", "is empty"),
        ("\n \n,,\n", "y", "has no value|is empty"),
        ("a,y\n", "y", "has no rows"),
        ("a,y\n1,2\n", "y", "has one row"),
        (PLAIN, None, "name the column of a.csv to predict .* 'width', 'height', 'y'"),
        (PLAIN, "z", "no column 'z'; it has 'width', 'height', 'y'"),
        (WORDS, "colour", "'colour' must hold finite numbers, got 'red' in line 2"),
        ("a,y\n1,2\n3\n", "y", "line 3 has 1 cells, but there are 2 columns"),
        ("a,y\n1,2,3\n", "y", "line 2 has 3 cells"),
        ("a,a,y\n1,2,3\n4,5,6\n", "y", "more than one column 'a'"),
        ("a,column 1,y\n1,2,3\n4,5,6\n".replace("a,", ",", 1), "y", "more than one column 'column 1'"),
        ('a,y\n1,"2\n3,4\n', "y", "cannot be read as a table"),
        ('a,y\n"1"2,3\n', "y", "cannot be read as a table"),
        ("a,y\n" + "1" * 200_000 + ",2\n", "y", "cannot be read as a table"),
        (bytes(range(256)), "y", "cannot be read as a table in UTF-8"),
        (PLAIN.encode("utf-16"), "y", "cannot be read as a table in UTF-8"),
        ("größe,y\n1,2\n".encode("latin-1"), "y", "cannot be read as a table in UTF-8"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, text: str | bytes, target: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        table(tmp_path, text, target)


def test_paths_and_names_that_are_not_there(tmp_path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        load_table(tmp_path / "none.csv", "y")
    with pytest.raises(InputError, match="there is no file"):
        load_table(tmp_path, "y")
    with pytest.raises(InputError, match=r"a\.xlsx is no table known here"):
        table(tmp_path, PLAIN, name="a.xlsx")
    with pytest.raises(InputError, match="no column 'depth'"):
        table(tmp_path, PLAIN, leave_out=("depth",))
    wide = ",".join(f"c{number}" for number in range(30))
    with pytest.raises(InputError, match="'c19' and 10 more"):
        table(tmp_path, f"{wide}\n" + ",".join("1" * 30) + "\n")


def test_npz(tmp_path) -> None:
    train, test = np.array([[0, 1], [2, 0]], np.int32), np.array([[2], [1]], np.uint8)
    path = npz(tmp_path, X=X.numpy(), y=Y.numpy(), train_index=train, test_index=test, more=np.ones(3))
    found = load_table(path)
    assert torch.equal(found.x, X)
    assert torch.equal(found.y, Y)
    assert (found.columns, found.target) == (("x1", "x2"), "y")
    assert [[part.tolist() for part in split] for split in found.splits] == [[[0, 1], [2]], [[2, 0], [1]]]
    assert all(part.dtype == torch.int64 for split in found.splits for part in split)
    whole = load_table(npz(tmp_path, X=X.numpy().astype(np.int16), y=np.array([True, False, True])))
    assert torch.equal(whole.x, X.trunc())
    assert whole.y.tolist() == [1, 0, 1]
    assert whole.splits == ()
    other = load_table(npz(tmp_path, X=X.numpy(), y=Y.numpy()), "x1")
    assert other.columns == ("x2", "y")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"Z": X.numpy()}, "needs numbers X .* it holds 'Z'"),
        ({}, "it holds none"),
        ({"X": Y.numpy(), "y": Y.numpy()}, "needs numbers X"),
        ({"X": X.numpy().astype(str), "y": Y.numpy()}, "needs numbers X"),
        ({"X": X.numpy().astype(complex), "y": Y.numpy()}, "needs numbers X"),
        ({"X": X.numpy()}, "name the column of a.npz"),
        ({"X": X.numpy(), "y": Y.numpy()[:, None]}, r"one for each of 3 rows, got shape \(3, 1\)"),
        ({"X": X.numpy(), "y": Y.numpy()[:2]}, "one for each of 3 rows"),
        ({"X": X.numpy()[:0], "y": Y.numpy()[:0]}, "has no rows"),
        ({"X": X.numpy()[:1], "y": Y.numpy()[:1]}, "has one row"),
        ({"X": X.numpy()[:, :0], "y": Y.numpy()}, "no column that varies"),
        ({"X": X.numpy() * math.nan, "y": Y.numpy()}, "'x1' has no value in row 1"),
        ({"X": X.numpy(), "y": np.array([1, 1, math.inf])}, "'y' must hold finite .* in row 3"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path, arrays: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_table(npz(tmp_path, **arrays))


def test_words_and_whole_numbers_become_classes(tmp_path) -> None:
    words = table(tmp_path, "a,y\n1,red\n2,blue\n3,red\n4,green\n5,red\n6,blue\n7,red\n", classes=True)
    assert words.classes == ("blue", "green", "red")
    assert words.y.tolist() == [2, 0, 2, 1, 2, 0, 2]
    assert words.y.dtype == torch.int64
    numbers = table(tmp_path, "a,y\n1,10\n2,-1\n3,9.0\n4,1e1\n5,9\n6,-1\n7,9\n", classes=True)
    assert numbers.classes == ("-1", "9", "10")  # in the order of numbers, not of words
    assert numbers.y.tolist() == [2, 0, 1, 2, 1, 0, 1]
    assert table(tmp_path, PLAIN).classes == ()
    for y in (np.array([5.0, 3.0, 3.0, 5.0, 5.0]), np.array(["b", "a", "a", "b", "b"]), np.eye(5)[0] < 1):
        found = load_table(npz(tmp_path, X=np.arange(10.0).reshape(5, 2), y=y), classes=True)
        assert found.y.tolist() == np.unique(y, return_inverse=True)[1].tolist()
    with pytest.raises(InputError, match="'y' must hold finite numbers, got 'b' in row 1"):
        load_table(npz(tmp_path, X=np.arange(10.0).reshape(5, 2), y=np.array(list("baabb"))))


@pytest.mark.parametrize(
    ("y", "words"),
    [
        ("1 2 1.5 1 2 2", r"'y' holds '1\.5' in line 4; classes are words alone or whole numbers alone"),
        ("1 2 red 1 2 2", "'y' holds 'red' in line 4; classes are"),
        ("1 2 inf 1 2 2", "'y' holds 'inf' in line 4; classes are"),
        ("1 2 NaN 1 2 2", "'y' has no value in line 4"),
        ("4 4 4 4 4 4", "'y' holds a single class; at least two"),
        ("no no no no no no", "'y' holds a single class"),
        ("1 2 3 1 2 2", "'y' holds 3 different values in 6 rows like a number to regress on or a name"),
        ("al bo cy al bo bo", "'y' holds 3 different values in 6 rows"),
    ],
)
def test_targets_that_are_no_classes(tmp_path, y: str, words: str) -> None:
    rows = "".join(f"{number},{cell}\n" for number, cell in enumerate(y.split()))
    with pytest.raises(InputError, match=words):
        table(tmp_path, "a,y\n" + rows, classes=True)


def test_most_classes(tmp_path) -> None:
    def text(classes: int) -> str:
        return "a,y\n" + "".join(f"{row},{row % classes}\n" for row in range(3 * CLASSES))

    assert len(table(tmp_path, text(CLASSES), classes=True).classes) == CLASSES
    with pytest.raises(InputError, match=r"holds 1,001 different values .* at most 1,000"):
        table(tmp_path, text(CLASSES + 1), classes=True)


def test_parquet(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "year=2020"  # which pyarrow would make a column of
    folder.mkdir()
    path = folder / "a.parquet"

    def write_columns(**columns) -> Path:
        parquet.write_table(pyarrow.table(columns), path)
        return path

    data = {"a": [1, 2, 3, 4], "b": ["p", "q", "p", "q"], "c": [True, False, True, True], "y": [0.5, 1, 2, 3]}
    found = load_table(write_columns(**data), "y")
    assert found.columns == ("a", "b=q", "c")
    assert found.x.tolist() == [[1, 0, 1], [2, 1, 0], [3, 0, 1], [4, 1, 1]]
    assert found.y.tolist() == [0.5, 1, 2, 3]
    assert load_rows(path, found).tolist() == found.x.tolist()
    for cell in (None, math.nan):
        with pytest.raises(InputError, match="'a' has no value in row 2"):
            load_table(write_columns(**{**data, "a": [1.0, cell, 3.0, 4.0]}), "y")
    with pytest.raises(InputError, match="'b' has no value in row 1"):
        load_table(write_columns(**{**data, "b": [" NA ", "q", "p", "q"]}), "y")
    with pytest.raises(InputError, match="'a' holds list values; give numbers or words"):
        load_table(write_columns(**{**data, "a": [[1], [2], [3], [4]]}), "y")
    with pytest.raises(InputError, match="'y' holds list values; give numbers or words"):
        load_table(write_columns(**{**data, "y": [[1], [2], [1], [2]]}), "y", classes=True)
    nanoseconds = pyarrow.array([1, 2, 3, 2**60], pyarrow.timestamp("ns"))
    with pytest.raises(InputError, match=r"cannot be read as parquet|datetime values|Timestamp values"):
        load_table(write_columns(**{**data, "a": nanoseconds}), "y")
    doubled = pyarrow.table([[1, 2], [3, 4], [5, 6]], names=["a", "a", "y"])
    parquet.write_table(doubled, path)
    with pytest.raises(InputError, match="more than one column 'a'"):
        load_table(path, "y")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="cannot be read as parquet"):
        load_table(path, "y")


def test_parquet_without_pyarrow(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"gramian\[parquet\]"):
        table(tmp_path, b"", name="a.parquet")


def test_new_rows_are_encoded_as_the_table(tmp_path) -> None:
    learnt = table(tmp_path, WORDS)
    assert torch.equal(load_rows(write(tmp_path, WORDS), learnt), learnt.x)
    other = "shape,note,size,colour\nsquare,,7,red\n"  # reordered, no target, one row, a column beside
    assert load_rows(write(tmp_path, other), learnt).tolist() == [[7, 0, 0, 1, 1]]
    for text, words in (
        (
            "size,colour,shape\n7,pink,round\n",
            "'colour' holds 'pink' in line 2; the levels learnt from are 'blue'",
        ),
        ("size,colour,shape\n7,red,oval\n", "'shape' holds 'oval' in line 2"),
        ("size,shape\n7,round\n", "no column 'colour'"),
        ("size,colour,shape\nbig,red,round\n", "'size' must hold finite numbers, got 'big'"),
        ("size,colour,shape\n7,?,round\n", "'colour' has no value in line 2"),
        ("size,colour,shape\n", "has no rows"),
        ("", "is empty"),
    ):
        with pytest.raises(InputError, match=words):
            load_rows(write(tmp_path, text), learnt)
    constant = table(tmp_path, "a,k,y\n1,7,1\n2,7,2\n")
    assert load_rows(write(tmp_path, "a\n5\n"), constant).tolist() == [[5]]
    bare = table(tmp_path, "1,2,10\n3,4,20\n", "3")
    assert load_rows(write(tmp_path, "5,6\n"), bare).tolist() == [[5, 6]]
    arrays = load_table(npz(tmp_path, X=X.numpy(), y=Y.numpy()))
    assert torch.equal(load_rows(npz(tmp_path, X=X.numpy() + 1), arrays), X + 1)


def test_toy() -> None:
    even = toy(seed=None)
    ends = [-2, -2 / 3, 2 / 3, 2]
    torch.testing.assert_close(even.x[[0, 9, 10, 19], 0], torch.tensor(ends, dtype=F64), rtol=0, atol=1e-12)
    steps = even.x[:, 0].diff()
    torch.testing.assert_close(steps[:9], torch.full((9,), 4 / 27, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(steps[10:], steps[:9], rtol=0, atol=1e-12)
    assert even.y[-1].item() == pytest.approx(2 * math.sin(2), abs=1e-12)
    torch.testing.assert_close(even.y, even.y.flip(0), rtol=0, atol=1e-12)
    drawn = toy(5, noise=0.5, seed=3)
    assert torch.equal(drawn.x, toy(5, noise=0.0, seed=3).x)
    assert (drawn.x[:2] < 0).all()
    assert (drawn.x[2:] > 0).all()
    assert (drawn.x.abs() >= 2 / 3).all()
    assert (drawn.x.abs() <= 2).all()
    many = toy(4000, noise=0.5, seed=1)
    error = many.y - many.x[:, 0] * many.x[:, 0].sin()
    assert error.std().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(8000))
    assert not torch.equal(toy(seed=1).y, toy(seed=2).y)
    for count, noise in ((3, 0.1), (20, -0.1), (20, math.nan), (20, math.inf)):
        with pytest.raises(InputError, match="the toy problem needs 4 points and a noise of at least 0"):
            toy(count, noise=noise)


def test_digits_and_diabetes() -> None:
    found = digits()
    assert found.x.shape == (1797, 61)
    assert found.dropped == ("pixel 0", "pixel 32", "pixel 39")
    assert found.y.dtype == torch.int64
    assert found.y.unique().tolist() == list(range(10))
    default = load_table()
    assert default.x.shape == (442, 10)
    assert default.target == "progression"
    assert default.y.amax().item() == 346
    assert load_table(target="bmi").columns[-1] == "progression"


@pytest.mark.skipif(not REAL.is_dir(), reason="no tables beside the checkout")
def test_published_tables() -> None:
    naval = load_table(REAL / "naval-propulsion-plant.npz")
    assert (naval.x.shape, naval.dropped, len(naval.splits)) == ((11934, 14), ("x9", "x12"), 20)
    train, test = naval.splits[0]
    assert len(torch.cat((train, test)).unique()) == 11934
    assert load_table(REAL / "wine-quality-red.npz").duplicates == 240


def test_standardiser() -> None:
    rows = torch.tensor([[1, 5, 0.1], [2, 5, 0.1], [6, 5, 0.1]], dtype=F64)
    scales = Standardiser.of(rows)
    expected = np.array([-2, -1, 3]) / math.sqrt(14 / 3)
    torch.testing.assert_close(scales(rows)[:, 0], torch.tensor(expected), rtol=1e-14, atol=0)
    assert scales.scale[1:].tolist() == [1, 1]  # constant, however its mean is rounded
    assert scales(rows)[:, 1:].abs().amax() < 1e-15
    other = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(scales.back(scales(other)), other, rtol=1e-14, atol=1e-14)
    assert scales(other).mean().abs() > 0.1  # the training rows' scale, not their own
    flat = Standardiser.of(rows[:, 0])
    assert torch.equal(flat(rows[:, 0]), scales(rows)[:, 0])


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1.0, 1e170, 1e300])
def test_scales_of_any_size(size: float) -> None:
    rows = size * torch.tensor([1, 2, 6], dtype=F64)
    torch.testing.assert_close(
        Standardiser.of(rows)(rows), Standardiser.of(rows / size)(rows / size), rtol=1e-12, atol=0
    )
