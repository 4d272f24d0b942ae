import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gramian.data.text import LEFT_OUT, Document, read, sample, split, standard_library
from gramian.errors import InputError, MissingExtraError

named = st.dictionaries(st.text(min_size=1, max_size=5), st.text(min_size=1, max_size=30), min_size=1)


def documents(texts: dict[str, str]) -> list[Document]:
    return [Document(name, text) for name, text in texts.items()]


def texts_of(*paths: Path, column: str = "text", pattern: str = "**/*") -> dict[str, str]:
    return {document.name: document.text for document in read(paths, column, pattern)}


@given(texts=named, max_bytes=st.integers(1, 200), shuffle=st.randoms())
@settings(max_examples=50, deadline=None)
def test_sample_is_the_same_in_any_order_and_fits(texts: dict[str, str], max_bytes: int, shuffle) -> None:
    given_order = [document for document in documents(texts) if document.text.strip()]
    if not given_order:
        return
    taken = sample(given_order, max_bytes)
    other = list(given_order)
    shuffle.shuffle(other)
    assert sample(other, max_bytes) == taken
    assert sum(document.size for document in taken.documents) <= max_bytes
    assert len(taken.documents) + taken.left_out == len(given_order)
    for document in taken.documents[:-1]:
        assert document.text == texts[document.name]
    assert texts[taken.documents[-1].name].startswith(taken.documents[-1].text)
    everything = sum(document.size for document in given_order)
    assert (taken.left_out == 0 and sum(d.size for d in taken.documents) == everything) == (
        everything <= max_bytes
    )


def test_sample_grows_with_its_size_and_is_not_the_alphabet() -> None:
    given_order = documents({f"{number:03}": "x" * 10 for number in range(100)})
    few, many = (sample(given_order, size).documents for size in (100, 300))
    assert len(few) == 10
    assert many[:10] == few
    assert [document.name for document in few] != sorted(document.name for document in few)


def test_the_last_document_of_a_sample_ends_with_a_line() -> None:
    assert sample([Document("a", "one\ntwo\nthree\n")], 10).documents[0].text == "one\ntwo\n"
    assert sample([Document("a", "ééé")], 3).documents[0].text == "é"


@pytest.mark.parametrize(
    ("given_order", "max_bytes"), [([], 10), (documents({"a": " \n"}), 10), (documents({"a": "b"}), 0)]
)
def test_no_text_or_no_room_is_an_error(given_order: list[Document], max_bytes: int) -> None:
    with pytest.raises(InputError):
        sample(given_order, max_bytes)


@given(named)
@settings(max_examples=50, deadline=None)
def test_split_puts_every_document_on_one_side(texts: dict[str, str]) -> None:
    given_order = documents(texts)
    train, validation = split(given_order)
    if len(given_order) > 1:
        assert train
        assert validation
        assert sorted(d.name for d in train + validation) == sorted(texts)
    else:
        assert train[0].text + validation[0].text == given_order[0].text


def test_split_takes_a_tenth_and_keeps_each_documents_side() -> None:
    given_order = documents({f"{number}.py": "x" for number in range(2000)})
    _, validation = split(given_order)
    assert 150 < len(validation) < 250  # 200 ± 13 by the binomial law
    half = set(given_order[:1000])
    assert {d for d in split(given_order[:1000])[1]} == half & set(validation)
    kept = sample(given_order, 300).documents  # the sample's order and the split's are drawn apart
    assert 10 < len(split(kept)[1]) < 60


def test_a_single_document_is_cut_before_its_last_tenth_at_a_line() -> None:
    text = "".join(f"line {number}\n" for number in range(1000))
    (train,), (validation,) = split([Document("a", text)])
    assert train.text + validation.text == text
    assert train.text.endswith("\n")
    assert 0.09 * len(text) < len(validation.text) < 0.11 * len(text)
    (train,), (validation,) = split([Document("a", "header\n" + "x" * 1000)])  # no line ends near the tenth
    assert len(validation.text) == 101


def test_standard_library_is_python_source_without_what_is_left_out() -> None:
    found = list(standard_library())
    assert {"argparse.py", "json/decoder.py"} <= {document.name for document in found}
    assert not any(LEFT_OUT & set(Path(document.name).parts) for document in found)
    assert sum(document.size for document in found) > 3e6
    assert [document.name for document in found] == sorted(
        (document.name for document in found), key=lambda name: Path(name)
    )


def test_folder_takes_matching_text_and_skips_the_rest(tmp_path: Path) -> None:
    for name, content in {
        "a.txt": b"first",
        "b.py": b"second",
        "deep/c.txt": "drïtte".encode(),
        "image.png": b"\x89PNG\0\0",
        "latin.txt": "é".encode("latin-1"),
        "empty.txt": b"",
        ".hidden": b"no",
        ".git/config": b"no",
        "mark.txt": b"\xef\xbb\xbfmarked\r\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert texts_of(tmp_path) == {
        "a.txt": "first", "b.py": "second", "deep/c.txt": "drïtte", "mark.txt": "marked\r\n",
        "image.png": "", "latin.txt": "", "empty.txt": "",
    }  # fmt: skip
    assert sample(read([tmp_path], "text", "**/*"), 1000).skipped == 3
    assert texts_of(tmp_path, pattern="*.py") == {"b.py": "second"}
    assert texts_of(tmp_path / "b.py", tmp_path / "deep") == {"b.py": "second", "c.txt": "drïtte"}
    with pytest.raises(InputError, match=r"no UTF-8 text in files that match '\*.png'"):
        texts_of(tmp_path, pattern="*.png")
    for pattern in ("", "/etc/*"):
        with pytest.raises(InputError, match="not a pattern of relative paths"):
            texts_of(tmp_path, pattern=pattern)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\0b", "is not UTF-8 text"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"", "holds no text"),
        (b" \n\t\n", "holds no text"),
        (None, "is not a file or folder that exists"),
    ],
)
def test_a_named_file_must_be_text(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"input.txt {message}"):
        texts_of(path)


def test_jsonl_rows_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one", "n": 1}\n\n{"text": null}\n{"text": "dr\\u00efi", "n": 3}\n')
    assert texts_of(path) == {
        "rows.jsonl:line 1": "one",
        "rows.jsonl:line 3": "",
        "rows.jsonl:line 4": "drïi",
    }
    assert texts_of(tmp_path) == texts_of(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"a": "x", "b": "y"}', "line 2 has no column 'text'; it has 'a', 'b'"),
        ("{}", "line 2 has no column 'text'; it has none"),
        ('{"text": 0}', "line 2: column 'text' must hold Unicode text or null"),
        ('{"text": "\\ud800"}', "line 2: column 'text' must hold Unicode text or null"),
    ],
)
def test_malformed_jsonl_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(InputError, match=f"rows.jsonl {message}"):
        texts_of(path)


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "table.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", None, "drei"], "n": [1, 2, 3]}), path)
    expected = {"table.parquet:row 1": "one", "table.parquet:row 2": "", "table.parquet:row 3": "drei"}
    assert texts_of(path, column="body") == expected
    with pytest.raises(InputError, match="no column 'text'; it has 'body', 'n'"):
        texts_of(path)
    with pytest.raises(InputError, match="row 1: column 'n' must hold Unicode text"):
        texts_of(path, column="n")
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole.replace(b"body", b"b\xffdy")):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read as parquet"):
            texts_of(path, column="body")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "table.parquet"
    path.write_bytes(b"")
    with pytest.raises(MissingExtraError, match=r"gramian\[parquet\]"):
        texts_of(path)


def test_a_column_of_choice(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"content": "x"}))
    assert texts_of(path, column="content") == {"rows.jsonl:line 1": "x"}
