"""Append-only readings on disk: one JSON object a line, whole after a crash."""

import json
from pathlib import Path
from typing import Any

from gramian.errors import InputError
from gramian.files import naming, sync, write_text
from gramian.reading import check_regular


class Record:
    """A file of JSON lines that only grows, except when a resumed run drops what it will write again.

    A write that a crash has torn damages at most the last line: reading leaves that line out, and the
    next `append` removes it first. NaN and infinities are kept.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._whole = False

    def append(self, row: dict[str, Any]) -> None:
        """Write one line and hand it to the operating system.

        Raises: InputError for a row that JSON cannot hold; OSError naming the file that cannot be written.
        """
        try:
            line = json.dumps(row) + "\n"
        except (TypeError, ValueError) as error:
            raise InputError(f"a row of {self.path} may hold only JSON values: {error}") from error
        if not self._whole:
            self._mend()
        self._whole = False  # stays so if the write fails half-way
        try:
            with self.path.open("ab") as file:
                file.write(line.encode())
        except OSError as error:
            raise naming(error, self.path) from error
        self._whole = True

    def read(self) -> list[dict[str, Any]]:
        """Read all rows, without a damaged last line; no file is an empty record.

        Raises: InputError for damage anywhere else, naming file and line.
        """
        lines = self._lines()
        rows = [_parsed(line) for line in lines]
        if rows and rows[-1] is None:
            rows.pop()
        if None in rows:
            raise InputError(
                f"{self.path}, line {rows.index(None) + 1}, is damaged: it is not a JSON object; put the "
                "line right, or begin anew with --overwrite"
            )
        return [row for row in rows if row is not None]

    def sync(self) -> None:
        """Put all rows on the disk, where a loss of power does not reach them."""
        if self.path.exists():
            sync(self.path)

    def keep_first(self, rows: int) -> list[dict[str, Any]]:
        """Drop all but the first rows, atomically, and return these.

        Raises: InputError as `read`.
        """
        kept = self.read()[:rows]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        return kept

    def _lines(self) -> list[bytes]:
        """Lines with their ends."""
        if not self.path.exists():
            return []
        check_regular(self.path)
        try:
            return self.path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise OSError(
                error.errno, error.strerror, str(self.path)
            ) from error  # a failed read names no file

    def _mend(self) -> None:
        """Remove a damaged last line, or end a whole one that lacks its end."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._lines()
        if not lines:
            return
        if _parsed(lines[-1]) is None:
            with self.path.open("r+b") as file:
                file.truncate(sum(map(len, lines[:-1])))
        elif not lines[-1].endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
