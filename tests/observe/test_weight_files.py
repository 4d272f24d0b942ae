import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.observe.weight_files import InFile, Stored, metadata, open_weights

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole(stored: Stored) -> Tensor:
    out = torch.empty(stored.numel, dtype=stored.dtype)
    stored.read(0, out)
    return out.reshape(stored.shape)


def written(path: Path, header: dict | bytes, data: bytes = b"") -> Path:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture
def safe(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    save_file({"a": drawn(7, 11), "b": drawn(5, seed=1, dtype=torch.bfloat16)}, path, {"step": "30"})
    return path


@pytest.fixture
def torch_file(tmp_path: Path) -> Path:
    path = tmp_path / "a.pt"
    torch.save({"a": drawn(7, 11), "t": drawn(4, 6, 5, seed=1).permute(2, 0, 1)}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool])
def test_every_dtype_is_read_bit_by_bit(tmp_path: Path, suffix: str, dtype: torch.dtype):
    saved = {
        "x": (drawn(3, 4) * 10).to(dtype),
        "scalar": drawn(1)[0].to(dtype),
        "empty": drawn(0, 3).to(dtype),
    }
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(saved, path)
    found = open_weights([path])
    assert {name: (one.shape, one.dtype, one.file) for name, one in found.items()} == {
        name: (tuple(value.shape), dtype, path) for name, value in saved.items()
    }
    for name, stored in found.items():
        assert whole(stored).reshape(-1).view(torch.uint8).equal(saved[name].reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("kind", ["safe", "torch_file"])
def test_any_slice_is_the_slice_of_the_flat_tensor(kind: str, request: pytest.FixtureRequest):
    for stored in open_weights([request.getfixturevalue(kind)]).values():
        flat = whole(stored).reshape(-1)
        for start in range(0, stored.numel, 3):
            for count in (0, 1, 7, stored.numel - start):
                if start + count <= stored.numel:
                    stored.prefetch(start, count)
                    out = torch.full((count,), torch.nan).to(stored.dtype)
                    stored.read(start, out)
                    assert out.equal(flat[start : start + count])


def test_a_tensor_that_was_saved_transposed_is_read_in_row_major_order(torch_file: Path):
    stored = open_weights([torch_file])["t"]
    assert whole(stored).equal(drawn(4, 6, 5, seed=1).permute(2, 0, 1))


def test_a_view_into_a_larger_memory(tmp_path: Path):
    path = tmp_path / "a.pt"
    torch.save(
        {"part": drawn(10, 4)[3:7], "columns": drawn(10, 4)[:, 1::2], "expanded": drawn(1, 3).expand(5, 3)},
        path,
    )
    found = open_weights([path])
    assert whole(found["part"]).equal(drawn(10, 4)[3:7])
    assert whole(found["columns"]).equal(drawn(10, 4)[:, 1::2])
    assert whole(found["expanded"]).equal(drawn(1, 3).expand(5, 3))


def test_reading_outside_or_as_another_dtype_is_refused(safe: Path, torch_file: Path):
    for path in (safe, torch_file):
        stored = open_weights([path])["a"]
        for start, out in (
            (-1, torch.empty(2)),
            (76, torch.empty(2)),
            (0, torch.empty(2, dtype=torch.float64)),
            (0, torch.empty(4)[::2]),
        ):
            with pytest.raises(ValueError, match="elements"):
                stored.read(start, out)


def test_reading_stays_in_its_memory(safe: Path):
    room = torch.full((10,), 5.0)
    open_weights([safe])["a"].read(2, room[3:6])
    assert room[3:6].equal(drawn(7, 11).reshape(-1)[2:5])
    assert room[:3].eq(5).all()
    assert room[6:].eq(5).all()


def test_no_descriptor_stays_open(safe: Path):
    before = len(os.listdir("/proc/self/fd"))
    kept = [open_weights([safe]) for _ in range(50)]
    for found in kept:
        whole(found["a"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_short_reads_are_continued(safe: Path, monkeypatch: pytest.MonkeyPatch):
    class Slow:
        """A file that gives at most five bytes at once."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, place: int):
            self.file.seek(place)

        def readinto(self, room: memoryview) -> int:
            return self.file.readinto(room[:5])

    stored = open_weights([safe])["a"]
    monkeypatch.setattr("builtins.open", lambda *given, _open=open, **options: Slow(_open(*given, **options)))
    assert whole(stored).equal(drawn(7, 11))


@pytest.mark.parametrize("kind", ["safe", "torch_file"])
def test_a_file_cut_while_it_is_read(kind: str, request: pytest.FixtureRequest):
    path = request.getfixturevalue(kind)
    stored = open_weights([path])["a"]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 3)
    with pytest.raises(InputError, match=rf"{path.name} was cut short while a was read"):
        whole(stored)
    path.unlink()
    with pytest.raises(InputError, match=path.name):
        whole(stored)
    stored.prefetch(0, 5)  # a hint never fails


def test_tensors_come_in_the_order_of_the_file(tmp_path: Path):
    data = b"".join(value.to_bytes(4, "little") for value in range(3))
    entries = {
        name: {"dtype": "I32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
        for i, name in enumerate("bca")
    }
    found = open_weights([written(tmp_path / "x.safetensors", dict(sorted(entries.items())), data)])
    assert [(name, whole(stored).item()) for name, stored in found.items()] == [("b", 0), ("c", 1), ("a", 2)]


def test_several_files_are_one_table(tmp_path: Path, safe: Path):
    other = tmp_path / "b.safetensors"
    save_file({"c": drawn(2)}, other)
    assert {name: stored.file for name, stored in open_weights([safe, other]).items()} == {
        "a": safe,
        "b": safe,
        "c": other,
    }
    save_file({"a": drawn(2)}, other)
    with pytest.raises(InputError, match=r"a\.safetensors and .*b\.safetensors both hold the tensor a"):
        open_weights([safe, other])


def test_metadata(safe: Path, tmp_path: Path):
    assert metadata(safe) == {"step": "30"}
    save_file({"a": drawn(2)}, tmp_path / "b.safetensors")
    assert metadata(tmp_path / "b.safetensors") == {}
    torch.save({"model": {"a": drawn(2)}, "global_step": 70, "loss": 0.5, "done": True}, tmp_path / "c.ckpt")
    assert metadata(tmp_path / "c.ckpt") == {"global_step": "70", "loss": "0.5"}


def test_every_cut_of_a_safetensors_file_is_noticed(safe: Path, tmp_path: Path):
    content = safe.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in [*range(0, len(content) - 1, 13), len(content) - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"cut\.safetensors is damaged or cut short"):
            open_weights([cut])
    cut.write_bytes(content)
    assert len(open_weights([cut])) == 2


@pytest.mark.parametrize(
    "offsets", [[0, 4000], [-4, 4], [4, 0], [2, 6], [0, 8], [2**63, 2**63 + 4], ["0", "4"], [0]]
)
def test_offsets_out_of_range(tmp_path: Path, offsets: list):
    entry = {"a": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}
    with pytest.raises(InputError, match=r"bad\.safetensors is damaged"):
        open_weights([written(tmp_path / "bad.safetensors", entry, bytes(4))])
    entry["a"]["data_offsets"] = [0, 4]
    assert whole(open_weights([written(tmp_path / "good.safetensors", entry, bytes(4))])["a"]).tolist() == [0]


@pytest.mark.parametrize("shape", [[2], [2**62, 8], [-1], [1.5], "1"])
def test_shapes_that_are_not_of_the_data(tmp_path: Path, shape: list | str):
    entry = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    with pytest.raises(InputError, match="is damaged"):
        open_weights([written(tmp_path / "bad.safetensors", entry, bytes(4))])


def test_a_header_that_claims_to_be_huge(tmp_path: Path):
    path = tmp_path / "huge.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match=r"huge\.safetensors is damaged or cut short"):
        open_weights([path])


def test_the_name_of_a_tensor_is_never_a_path(tmp_path: Path):
    names = ["../../secret", "/etc/passwd", "a\nb", "", "a\0b"]
    entries = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)
    }
    folder = tmp_path / "in"
    folder.mkdir()
    path = written(folder / "x.safetensors", entries, bytes(range(len(names))))
    found = open_weights([path])
    assert list(found) == names
    assert [whole(stored).item() for stored in found.values()] == list(range(len(names)))
    assert all(stored.file == path for stored in found.values())
    assert [each.name for each in tmp_path.rglob("*")] == ["in", "x.safetensors"]


def test_dtypes_that_torch_cannot_compute_with(tmp_path: Path):
    path = written(
        tmp_path / "x.safetensors", {"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1)
    )
    with pytest.raises(InputError, match="holds a as F4, which cannot be read as numbers: dequantise first"):
        open_weights([path])


@pytest.mark.parametrize(
    "place", ["", "state_dict", "model_state_dict", "model", "module", "params", "model.module"]
)
def test_where_weights_lie_in_a_torch_file(tmp_path: Path, place: str):
    saved: dict = dict(nn.Linear(2, 3).state_dict())
    for part in reversed(place.split(".") if place else []):
        saved = {"optimizer": {"state": {0: {"exp_avg": drawn(2)}}}, "rng": torch.tensor([1]), part: saved}
    torch.save(saved, tmp_path / "x.pt")
    found = open_weights([tmp_path / "x.pt"])
    assert list(found) == ["weight", "bias"]
    assert {stored.within for stored in found.values()} == {place}


@pytest.mark.parametrize(
    "saved", [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}, [torch.ones(2)], 5]
)
def test_a_torch_file_without_weights(tmp_path: Path, saved: object):
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(
        InputError, match=r"x\.pt holds no weights: .* state_dict, model_state_dict, model, module"
    ):
        open_weights([tmp_path / "x.pt"])


def test_one_memory_under_two_names(tmp_path: Path):
    head = drawn(6, 4)
    torch.save(
        {"embed": head, "row": head[0], "head": head, "copy": head.clone(), "turned": head.T},
        tmp_path / "x.pt",
    )
    shares = {name: stored.shares for name, stored in open_weights([tmp_path / "x.pt"]).items()}
    assert shares == {"embed": "", "row": "", "head": "embed", "copy": "", "turned": ""}


class Code:
    def __reduce__(self):
        return (os.system, ("touch ran",))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    torch.save({"a": drawn(2), "b": Code()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        InputError, match=r"x\.pt is damaged or .*; where you trust it, .*safetensors.torch.save_file"
    ):
        open_weights([path])
    assert not (tmp_path / "ran").exists()


def test_the_format_before_torch_1_6(tmp_path: Path):
    torch.save({"a": drawn(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"x\.bin is damaged or in the format of torch before 1\.6"):
        open_weights([tmp_path / "x.bin"])


def test_a_whole_module_is_not_opened(tmp_path: Path):
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(InputError, match="holds more than tensors and plain values"):
        open_weights([tmp_path / "x.pt"])


def test_tensors_that_are_not_plain(tmp_path: Path):
    torch.save({"a": drawn(2, 2).to_sparse()}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="holds a as no plain tensor"):
        open_weights([tmp_path / "x.pt"])
    torch.save({"a": nn.Parameter(drawn(2)), "b": torch.empty(2, device="meta")}, tmp_path / "y.pt")
    with pytest.raises(InputError, match="holds b as no plain tensor"):
        open_weights([tmp_path / "y.pt"])


def test_every_cut_of_a_torch_file_is_noticed(torch_file: Path, tmp_path: Path):
    content = torch_file.read_bytes()
    cut = tmp_path / "cut.pt"
    for length in range(0, len(content), 97):
        cut.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"cut\.pt"):
            open_weights([cut])


def test_other_files_and_missing_ones(tmp_path: Path):
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(InputError, match=r"x\.npz is no file of weights: accepted are \.safetensors, \.pt"):
        open_weights([tmp_path / "x.npz"])
    for name in ("none.safetensors", "none.pt"):
        with pytest.raises(InputError, match=name):
            open_weights([tmp_path / name])
    for name in ("folder.safetensors", "folder.pt"):
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match=name):
            open_weights([tmp_path / name])


def fails_well(content: bytes, suffix: str) -> bool:
    """Whether bytes are a table that can be read; anything but InputError is raised on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        path.write_bytes(content)
        try:
            found = open_weights([path])
            metadata(path)
        except InputError as error:
            if path.name not in str(error):
                raise
            return False
        for stored in found.values():
            whole(stored)
        return True


headers = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", "é"]),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "BF16", "F4", "F8_E8M0", "BOOL", "Z", 3]),
            "shape": st.lists(st.integers(-1, 4), max_size=3),
            "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3),
        },
    ),
    max_size=3,
)


@given(
    st.one_of(st.binary(max_size=200), headers.map(lambda header: json.dumps(header).encode())), st.booleans()
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_bytes_break_the_reader_of_safetensors(content: bytes, framed: bool):
    fails_well(
        len(content).to_bytes(8, "little") + content + bytes(20) if framed else content, ".safetensors"
    )


@given(st.integers(0, 1000), st.binary(min_size=1, max_size=8), st.sampled_from([".pt", ".safetensors"]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_change_of_a_good_file_breaks_the_readers(place: int, change: bytes, suffix: str):
    good = good_bytes(suffix)
    place %= len(good)
    fails_well(good[:place] + change + good[place + len(change) :], suffix)


_good: dict[str, bytes] = {}


def good_bytes(suffix: str) -> bytes:
    if suffix not in _good:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"x{suffix}"
            (torch.save if suffix == ".pt" else save_file)({"a": drawn(3, 2), "b": drawn(4, seed=1)}, path)
            _good[suffix] = path.read_bytes()
    assert fails_well(_good[suffix], suffix)
    return _good[suffix]


def test_a_slice_of_a_large_file_takes_little_memory(tmp_path: Path):
    """A process that reads a file of 256 MiB in slices grows by far less."""
    path = tmp_path / "large.safetensors"
    size = 64 * 2**20
    text = json.dumps({"a": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * size)
    program = (
        "import resource, sys, torch\nfrom pathlib import Path\n"
        "from gramian.observe.weight_files import open_weights\n"
        "out = torch.ones(2**18)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "stored = open_weights([Path(sys.argv[1])])['a']\n"
        "for start in range(0, stored.numel, 2**18): stored.read(start, out)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 * 1024
    shutil.rmtree(tmp_path)


def test_what_is_stored_says_what_it_is(safe: Path):
    stored = open_weights([safe])["b"]
    assert isinstance(stored, InFile)
    assert (stored.name, stored.shape, stored.dtype, stored.numel) == ("b", (5,), torch.bfloat16, 5)


def repacked(path: Path, changed: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> Path:
    """Write the archive of torch.save again, with some of its records changed."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in records.items():
            archive.writestr(name, changed.get(name.partition("/")[2], content))
    return path


def test_archives_that_torch_has_not_written_are_refused(tmp_path: Path):
    path = tmp_path / "a.pt"
    torch.save({"a": drawn(64)}, path)
    with pytest.raises(InputError, match=r"an entry of .* is compressed"):
        open_weights([repacked(path, {}, zipfile.ZIP_DEFLATED)])
    torch.save({"a": drawn(64)}, path)
    with pytest.raises(InputError, match="at no multiple of its elements' size"):
        open_weights([repacked(path, {"byteorder": b"little"})])  # none of its records is aligned any more


def test_more_elements_than_the_file_holds_are_refused(tmp_path: Path):
    path = tmp_path / "a.pt"
    torch.save({"a": drawn(1).expand(10**12)}, path)
    with pytest.raises(InputError, match=r"announces 1,000,000,000,000 elements of a, more than it holds"):
        open_weights([path])
