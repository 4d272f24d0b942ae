"""Documents: the text of files, folders and tables, sampled to a size and split for validation."""

import hashlib
import heapq
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gramian.data.parquet import check_parquet
from gramian.errors import InputError, MissingExtraError
from gramian.reading import check_inside

LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib", "lib2to3"}
    | {"encodings", "pydoc_data"}
)
"""Folders of the standard library that are left out: installed packages; tests, IDLE and lib2to3, which many
distributions ship apart or not at all; tables of character sets and help texts, which are no programs."""

VALIDATION = 0.1
"""The share of the documents, or of a single document's length, kept for validation."""


class NotTextError(InputError):
    """A file holds something other than UTF-8 text; the message names it."""


@dataclass(frozen=True)
class Document:
    """A text with a name that says where it came from; the name alone decides sample and split."""

    name: str
    text: str

    @cached_property
    def size(self) -> int:
        """Number of bytes in UTF-8."""
        return len(self.text.encode())

    def rank(self, purpose: str) -> int:
        """Return a fixed whole number below 2⁶⁴, as if drawn at random for this name and purpose."""
        return int.from_bytes(hashlib.sha256(f"{purpose}:{self.name}".encode()).digest()[:8])


@dataclass(frozen=True)
class Sample:
    """The documents taken, and how many were not."""

    documents: tuple[Document, ...]
    skipped: int
    """Files and rows that are empty, white space, or (in a folder) not UTF-8 text."""
    left_out: int
    """Documents beyond the size asked."""


def sample(documents: Iterable[Document], max_bytes: int) -> Sample:
    """Take documents in an order drawn from their names until their sizes reach max_bytes.

    The document that crosses the limit is cut, at the end of a line where it has one. Whatever the number
    of documents, no more than this sample and one document are held in memory.

    Raises: InputError when max_bytes is less than 1 or no document has text.
    Holds: exactly: the sample does not depend on the order in which the documents come.
    """
    if max_bytes < 1:
        raise InputError(f"max_bytes must be at least 1, got {max_bytes}")
    heap: list[tuple[int, str, int, Document]] = []  # the last of the order is on top
    size = skipped = left_out = 0
    for number, document in enumerate(documents):
        if not document.text.strip():
            skipped += 1
            continue
        heapq.heappush(heap, (-document.rank("order"), document.name, number, document))
        size += document.size
        while size - heap[0][-1].size >= max_bytes:
            size -= heapq.heappop(heap)[-1].size
            left_out += 1
    if not heap:
        raise InputError("there is no text in what was given")
    kept = [entry[-1] for entry in sorted(heap, reverse=True)]
    if size > max_bytes:
        last = kept[-1]
        head = last.text.encode()[: last.size - (size - max_bytes)].decode(errors="ignore")
        kept[-1] = Document(last.name, head[: head.rfind("\n") + 1] or head)
    return Sample(tuple(kept), skipped, left_out)


def split(documents: Sequence[Document]) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Return the training and the validation documents, drawn from their names, at least one of each.

    A single document is cut at the end of a line before its last tenth.

    Holds: exactly: a document's side does not depend on the others, unless one side would be empty.
    """
    if len(documents) == 1:
        name, text = documents[0].name, documents[0].text
        tenth = int((1 - VALIDATION) * len(text))
        cut = text.rfind("\n", len(text) // 2, tenth) + 1 or tenth
        return (Document(name, text[:cut]),), (Document(name, text[cut:]),)
    below = sum(document.rank("split") < VALIDATION * 2**64 for document in documents)
    count = min(max(below, 1), len(documents) - 1)
    order = sorted(range(len(documents)), key=lambda number: documents[number].rank("split"))
    validation, train = sorted(order[:count]), sorted(order[count:])
    return tuple(documents[number] for number in train), tuple(documents[number] for number in validation)


def standard_library() -> Iterator[Document]:
    """Yield the Python source of the running interpreter's standard library, without `LEFT_OUT`."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for root, folders, files in os.walk(folder):
        folders[:] = set(folders) - LEFT_OUT
        paths += [Path(root, file) for file in files if file.endswith(".py")]
    # What _sysconfigdata holds is the paths of the machine that built the interpreter.
    return _inside(folder, [path for path in sorted(paths) if not path.name.startswith("_sysconfigdata")])


def standard_library_name() -> str:
    """Return the name of the default text with the interpreter's version, on which its content depends."""
    return f"Python {platform.python_version()} standard library"


def read(paths: Sequence[Path], column: str, pattern: str) -> Iterator[Document]:
    """Yield the documents of files, folders (files matching the pattern), .jsonl and .parquet tables.

    A file is one document, and so is a row of a table. Hidden files of a folder are passed over, and its
    files that are not UTF-8 text become empty documents.

    Raises: InputError, naming the file (and line), when a path is missing, a named file is not UTF-8 text or
    has none, a folder has none, or a table is malformed or lacks the column; MissingExtraError for a .parquet
    file without pyarrow.
    """
    for path in paths:
        if path.is_dir():
            documents, wanted = _folder(path, column, pattern), f"UTF-8 text in files that match {pattern!r}"
        elif path.is_file():
            documents, wanted = _file(path, path.name, column), "text"
        else:
            raise InputError(f"{path} is not a file or folder that exists")
        found = False
        for document in documents:
            found = found or bool(document.text.strip())
            yield document
        if not found:
            raise InputError(f"{path} holds no {wanted}, only what is empty or white space")


def _folder(folder: Path, column: str, pattern: str) -> Iterator[Document]:
    """Yield the documents of the folder's files that match and are not hidden."""
    try:
        paths = sorted(folder.glob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"{pattern!r} is not a pattern of relative paths such as '**/*.txt'") from error
    shown = [path for path in paths if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    files = [path for path in shown if path.is_file()]
    for path in files:
        check_inside(path, folder)
    return _inside(folder, files, column)


def _inside(folder: Path, paths: Iterable[Path], column: str = "") -> Iterator[Document]:
    """Yield the documents of a folder's files; a file that is not UTF-8 text is one empty document."""
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            yield from _file(path, name, column)
        except NotTextError:
            yield Document(name, "")


def _file(path: Path, name: str, column: str) -> Iterator[Document]:
    """Yield one document, or one a row of a table."""
    if rows := TABLES.get(path.suffix.lower()):
        for where, row in rows(path, column):
            yield Document(f"{name}:{where}", _cell(f"{path} {where}", row, column))
    else:
        yield Document(name, _text(path))


def _text(path: Path) -> str:
    """Return the content of a UTF-8 file, without a byte-order mark."""
    try:
        content = path.read_bytes()
        if b"\0" not in content:
            return content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        pass
    raise NotTextError(f"{path} is not UTF-8 text; give text files, .jsonl or .parquet tables, or folders")


def _cell(where: str, row: dict[str, Any], column: str) -> str:
    """Return the text of a row, empty when it is null."""
    if column not in row:
        raise _missing_column(where, row, column)
    value = "" if row[column] is None else row[column]
    try:
        str.encode(value)
    except (TypeError, UnicodeEncodeError) as error:
        raise InputError(f"{where}: column {column!r} must hold Unicode text or null") from error
    return value


def _missing_column(where: object, columns: Iterable[str], column: str) -> InputError:
    return InputError(f"{where} has no column {column!r}; it has {', '.join(map(repr, columns)) or 'none'}")


def _jsonl(path: Path, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file with one a line; blank lines are passed over."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path} line {number} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise InputError(f"{path} line {number} is not a JSON object such as {{{column!r}: '…'}}")
                yield f"line {number}", row
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _parquet(path: Path, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a table, of which only the one column is read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError('reading .parquet needs pyarrow: pip install "gramian[parquet]"') from error
    check_parquet(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if column not in table.schema_arrow.names:
                raise _missing_column(path, table.schema_arrow.names, column)
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(column).to_pylist():
                    number += 1
                    yield f"row {number}", {column: value}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as parquet: {error}") from error


TABLES: dict[str, Callable[[Path, str], Iterator[tuple[str, dict[str, Any]]]]] = {
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
"""Readers of tables by the ending of the file's name."""
