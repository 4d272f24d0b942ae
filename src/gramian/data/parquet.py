"""What Parquet files announce, in the footer and before each page, checked before pyarrow allocates it."""

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gramian.errors import InputError
from gramian.reading import check_regular, check_unpacked

ROWS, GROUPS, CHUNKS, ABOUT = 3, 4, 1, 3
"""Fields of a file, of a group of rows (its columns) and of a column in it (its description)."""

VALUES, UNPACKED, PACKED, DATA, DICTIONARY = 5, 6, 7, 9, 11
"""Fields of such a description: counts of values and bytes, and where its first pages lie."""

UNCOMPRESSED, COMPRESSED, PAGES = 2, 3, (5, 7, 8)
"""Fields of a page's header: its sizes, and the structures whose first field is the number of its values."""

BINARY, LISTS, STRUCTURE = 8, (9, 10), 12
"""Types of fields in Thrift's compact protocol; those below `BINARY` are numbers."""


def check_parquet(path: Path) -> None:
    """Refuse a file whose footer announces more than it can honestly hold, or whose pages more than that.

    Raises: InputError naming the file.
    Source: the format's specification, parquet.thrift, structures `FileMetaData` and `PageHeader`.
    """
    check_regular(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
            if content[-4:] != b"PAR1" or footer < 4:
                raise ValueError("no footer")
            described, _ = _structure(content, footer)
            groups = [group[CHUNKS] for group in described.get(GROUPS, ())]
            chunks = [chunk[ABOUT] for group in groups for chunk in group]
            cells = described[ROWS] * max(map(len, groups), default=1)
            values = max(cells, sum(chunk[VALUES] for chunk in chunks))
            check_unpacked(path, max(8 * values, sum(chunk[UNPACKED] for chunk in chunks)))
            if not all(_fits(page, chunk) for chunk in chunks for page in _pages(content, chunk)):
                raise ValueError("a page announces more than its column")
    except InputError:
        raise
    except (OSError, LookupError, RecursionError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} cannot be read as parquet: it is damaged ({error})") from error


def _fits(page: Mapping[int, Any], chunk: Mapping[int, Any]) -> bool:
    counts = [page[name][1] for name in PAGES if isinstance(page.get(name), dict) and 1 in page[name]]
    return page[UNCOMPRESSED] <= chunk[UNPACKED] and all(0 <= count <= chunk[VALUES] for count in counts)


def _pages(content: mmap.mmap, chunk: Mapping[int, Any]) -> Iterator[dict[int, Any]]:
    """Yield the headers of the pages of a column in a group of rows."""
    at = min(chunk[DATA], chunk.get(DICTIONARY) or chunk[DATA])
    end = at + chunk[PACKED]
    while at < end:
        page, at = _structure(content, at)
        if min(page[COMPRESSED], page[UNCOMPRESSED]) < 0:
            raise ValueError("a page of negative size")
        yield page
        at += page[COMPRESSED]


def _structure(content: mmap.mmap, at: int) -> tuple[dict[int, Any], int]:
    """Return the numbers, structures and lists of a structure by their fields, and where it ends."""
    found: dict[int, Any] = {}
    field = 0
    while head := content[at]:
        at += 1
        field += head >> 4
        if not head >> 4:
            number, at = _varint(content, at)
            field = number >> 1 ^ -(number & 1)
        found[field], at = _value(content, at, head & 15)
    return found, at + 1


def _value(content: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true and false, which take no room
        return kind == 1, at
    if kind in (4, 5, 6):
        number, at = _varint(content, at)
        return number >> 1 ^ -(number & 1), at
    if kind == BINARY:
        length, at = _varint(content, at)
        return None, at + length
    if kind == STRUCTURE:
        return _structure(content, at)
    if kind in LISTS:
        head, at = content[at], at + 1
        count = head >> 4
        if count == 15:
            count, at = _varint(content, at)
        values = []
        kind = max(head & 15, 3)  # in lists, true and false take a byte
        for _ in range(count):
            value, at = _value(content, at, kind)
            values.append(value)
        return values, at
    if kind == 3:
        return content[at], at + 1
    if kind == 7:
        return None, at + 8
    raise ValueError(f"unknown type {kind}")


def _varint(content: mmap.mmap, at: int) -> tuple[int, int]:
    number = shift = 0
    while shift < 70:
        byte, at = content[at], at + 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, at
    raise ValueError("a number of more than 64 bits")
