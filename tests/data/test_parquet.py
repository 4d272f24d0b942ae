from pathlib import Path
from typing import Any

import pytest

from gramian.data.parquet import check_parquet
from gramian.data.tables import load_table
from gramian.errors import InputError

pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COLUMNS = {
    "x": [number / 7 for number in range(3000)],
    "w": ["red", "blue", "green"] * 1000,
    "none": [None] * 3000,
    "lists": [[1, 2, 3], []] * 1500,
    "records": [{"a": 1, "b": "x"}] * 3000,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zstd"},
        {"compression": "none", "data_page_version": "2.0"},
        {"use_dictionary": False, "data_page_size": 500},
        {"row_group_size": 70, "write_page_index": True},
        {"version": "1.0", "write_statistics": False},
        {"write_page_checksum": True},
    ],
)
def test_whatever_pyarrow_writes_is_accepted(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pyarrow.table(COLUMNS), path, **options)
    check_parquet(path)


def test_pages_that_announce_more_than_the_footer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pyarrow.table({"x": [1.0, 2, 3, 5], "y": [1, 2, 3, 4]}), path, compression="none")
    whole = path.read_bytes()
    assert whole[4:6] == b"\x15\x04"  # field 1, a dictionary
    count = whole.index(b"\x15\x08", 6)  # the number of its values, 4
    for number in (b"\xfe\xff\xff\xff\x0f", b"\xff\xff\xff\xff\x0f", b"\x0a"):
        path.write_bytes(whole[: count + 1] + number + whole[count + 2 :])
        with pytest.raises(InputError, match="cannot be read as parquet: it is damaged"):
            load_table(path, "y")
    path.write_bytes(whole)
    assert len(load_table(path, "y")) == 4


def test_few_bytes_of_a_great_many_nulls_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pyarrow.table({"x": pyarrow.nulls(3 * 10**6), "y": pyarrow.nulls(3 * 10**6)}), path)
    with pytest.raises(InputError, match=r"would unpack to 48 MB or more from"):
        load_table(path, "y")
