import errno
import math
from pathlib import Path

import pytest

from gramian.errors import InputError
from gramian.observe.record import Record

ROWS = [{"step": 0, "loss": 2.5}, {"step": 10, "sites": {"blocks.0": {"rms": 0.1 + 0.2}}}, {"note": "é\n"}]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    record = Record(tmp_path / "run" / "readings.jsonl")
    for row in ROWS:
        record.append(row)
    return record


def test_reads_what_was_appended(record: Record):
    assert record.read() == ROWS
    assert Record(str(record.path)).read() == ROWS
    assert len(record.path.read_bytes().splitlines()) == len(ROWS)


def test_every_append_is_on_disk_at_once(record: Record):
    record.append({"step": 20})
    assert record.path.read_text().endswith('{"step": 20}\n')


def test_nan_and_infinity_round_trip(record: Record):
    record.append({"values": [math.nan, math.inf, -math.inf]})
    nan, *infinities = record.read()[-1]["values"]
    assert math.isnan(nan)
    assert infinities == [math.inf, -math.inf]


def test_no_file_is_an_empty_record(tmp_path: Path):
    record = Record(tmp_path / "none.jsonl")
    assert record.read() == []
    assert not record.path.exists()


def test_a_write_torn_anywhere_costs_only_its_own_row(record: Record):
    whole = record.path.read_bytes()
    start = len(whole) - len(whole.splitlines(keepends=True)[-1])
    for end in range(start, len(whole) + 1):
        record.path.write_bytes(whole[:end])
        survives = ROWS if end >= len(whole) - 1 else ROWS[:2]
        again = Record(record.path)
        assert again.read() == survives
        assert record.path.read_bytes() == whole[:end]  # reading repairs nothing
        again.append({"step": 99})
        assert again.read() == [*survives, {"step": 99}]


@pytest.mark.parametrize("tail", [b"\0\0\0\0", b"\xff\xfe{", b"12\n", b'{"step": \n', b"\n", b"[" * 100_000])
def test_other_damage_at_the_end(record: Record, tail: bytes):
    with record.path.open("ab") as file:
        file.write(tail)
    assert Record(record.path).read() == ROWS
    Record(record.path).append({"step": 99})
    assert Record(record.path).read() == [*ROWS, {"step": 99}]


def test_a_failed_write_is_mended_by_the_next(record: Record, monkeypatch: pytest.MonkeyPatch):
    real = Path.open

    def full(path: Path, mode: str):
        if mode == "ab":
            with real(path, mode) as file:
                file.write(b'{"step": 2')
            raise OSError("no space left on device")
        return real(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match="no space") as caught:
            record.append({"step": 20})
        assert caught.value.filename == str(record.path)
    record.append({"step": 30})
    assert record.read() == [*ROWS, {"step": 30}]


def test_damage_elsewhere_is_named(record: Record):
    lines = record.path.read_bytes().splitlines(keepends=True)
    record.path.write_bytes(lines[0] + lines[1][:9] + b"\n" + lines[2])
    with pytest.raises(InputError, match=r"readings\.jsonl, line 2, is damaged.*--overwrite"):
        record.read()
    with pytest.raises(InputError, match="line 2"):
        record.keep_first(5)


def test_truncation_keeps_the_first_rows(record: Record):
    record.append({"step": 20})
    assert record.keep_first(10) == [*ROWS, {"step": 20}]
    assert record.read() == [*ROWS, {"step": 20}]
    assert record.keep_first(2) == ROWS[:2]
    assert record.read() == ROWS[:2]
    record.append({"step": 11})
    assert record.read() == [*ROWS[:2], {"step": 11}]
    record.keep_first(0)
    assert record.read() == []
    assert [path.name for path in record.path.parent.iterdir()] == ["readings.jsonl"]


def test_truncation_heals_a_torn_end(record: Record):
    with record.path.open("ab") as file:
        file.write(b'{"step": 1')
    record.keep_first(10)
    assert record.read() == ROWS
    record.append({"step": 20})
    assert record.read() == [*ROWS, {"step": 20}]


def test_a_disk_that_does_not_take_the_rows_is_told(record: Record, monkeypatch: pytest.MonkeyPatch):
    Record(record.path.with_name("none.jsonl")).sync()
    record.sync()

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        record.sync()
    assert caught.value.filename == str(record.path)


def test_refuses_what_json_cannot_hold(record: Record):
    with pytest.raises(InputError, match=r"readings\.jsonl may hold only JSON values: .*complex"):
        record.append({"value": 1j})
    assert record.read() == ROWS
