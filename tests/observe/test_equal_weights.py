from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gramian.observe import equal_weights
from gramian.observe.equal_weights import identical, tied
from gramian.observe.weight_files import open_weights
from saved_series import aligned, drawn, model, refused, remarks, saved, steps


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_copied_checkpoint(tmp_path: Path, suffix: str):
    models = [model(0), model(1), model(0), model(2), model(0), model(1)]
    refused(
        r"step 0, step 2 and step 4 hold identical weights bit by bit \(.*step0.* and .*step2.*\), and 1 "
        "more groups of checkpoints do; pass --duplicates keep_one",
        tmp_path,
        models,
        suffix,
    )
    found = aligned(tmp_path, models, suffix, duplicates="keep_one")
    assert steps(found) == [3, 4, 5]
    assert all(len(tensor.stored) == 3 for tensor in found.tensors)
    assert [stored.file.stem for stored in found.tensors[0].stored] == ["step3", "step4", "step5"]
    kinds = [remark.kind for remark in found.remarks]
    assert kinds == ["duplicates", "duplicates"]


@pytest.mark.parametrize("place", [0, 1, 777, 4095, 4096, 9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_makes_a_difference(tmp_path: Path, place: int, dtype: torch.dtype):
    one = drawn(10_000, dtype=dtype)
    other = one.clone()
    other.view(torch.uint8)[place * dtype.itemsize] ^= 1
    assert steps(aligned(tmp_path, [{"a": one}, {"a": other}])) == [0, 1]
    refused("hold identical weights", tmp_path, [{"a": one}, {"a": one}, {"a": other}])


def test_samples_that_agree_do_not_make_checkpoints_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(equal_weights, "sample", lambda stored, places: b"all the same")
    assert steps(aligned(tmp_path, [model(0), model(1), model(2)])) == [0, 1, 2]
    refused("step 0 and step 2 hold identical", tmp_path, [model(0), model(1), model(0)])


def test_all_of_a_large_tensor_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(equal_weights, "CHUNK", 64)
    monkeypatch.setattr(equal_weights, "sample", lambda stored, places: b"")
    for place in range(0, 100, 7):
        other = drawn(100)
        other[place] += 1
        assert len(aligned(tmp_path, [{"a": drawn(100)}, {"a": other}]).checkpoints) == 2


def test_frozen_tensors_are_no_duplicates(tmp_path: Path):
    frozen = {name: value for name, value in model(0).items() if name != "norm.bias"}
    models = [model(step) | frozen for step in range(3)]
    assert len(aligned(tmp_path, models).tensors) == 4
    assert len(aligned(tmp_path, models, only=("layers.*",)).tensors) == 2


def test_all_checkpoints_alike(tmp_path: Path):
    refused(
        r"all checkpoints have the same weights as .*step0\.safetensors, so nothing moved",
        tmp_path,
        [model(0)] * 3,
        duplicates="keep_one",
    )


def test_few_bytes_are_read_when_checkpoints_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = 0
    original = equal_weights.sample

    def counting(stored, places: int) -> bytes:
        nonlocal read
        found = original(stored, places)
        read += len(found)
        return found

    monkeypatch.setattr(equal_weights, "sample", counting)
    monkeypatch.setattr(equal_weights, "_digest", None)  # would fail if it were called
    large = [{f"layers.{i}": drawn(4000, seed=1000 * step + i) for i in range(300)} for step in range(3)]
    assert len(aligned(tmp_path, large).tensors) == 300
    assert 0 < read <= 3 * 64 * 2**10


def test_a_blob_with_two_names_is_read_once(tmp_path: Path):
    paths = saved(tmp_path / "in", [model(0), model(1)])
    linked = [paths[0], paths[1], tmp_path / "step2.safetensors"]
    linked[2].symlink_to(paths[0])
    tables = [open_weights([path]) for path in linked]
    rows = [tuple(table[name] for table in tables) for name in tables[0]]
    digests: dict = {}
    told: list[int] = []
    assert identical(rows, told.append) == [[0, 2]]
    assert sum(told) == 2 * sum(value.nbytes for value in model(0).values())
    for row in rows:
        equal_weights._digest(row[0], digests, None)
        equal_weights._digest(row[2], digests, None)
    assert len(digests) == len(rows)


@given(st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=3), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_identical_equals_comparing_all_pairs(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[list[int]]
):
    folder = tmp_path_factory.mktemp("pairs")
    models = [{f"t{i}": drawn(70, seed=seed) for i, seed in enumerate(kind)} for kind in kinds]
    tables = [open_weights([path]) for path in saved(folder, models)]
    found = identical([tuple(table[name] for table in tables) for name in tables[0]])
    slow = {i: [j for j, other in enumerate(kinds) if other == kind] for i, kind in enumerate(kinds)}
    assert sorted(found) == sorted(
        {tuple(group): group for group in slow.values() if len(group) > 1}.values()
    )


def tying(step: int, *, tie: bool = True) -> dict[str, Tensor]:
    embed = drawn(40, 40, seed=step)
    return model(step, wte=embed, head=embed.clone() if tie else drawn(40, 40, seed=step + 50))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_tied_tensors_count_once(tmp_path: Path, suffix: str):
    found = aligned(tmp_path, [tying(step) for step in range(3)], suffix)
    assert len(found.tensors) == 5
    assert remarks(found) == {"tied": ("wte",)}
    (remark,) = found.remarks
    assert remark.sentence == "counted once, since they are tied in every checkpoint: 1 tensor, wte to head"


@pytest.mark.parametrize("untied", [0, 1, 2])
def test_tied_in_some_checkpoints_only(tmp_path: Path, untied: int):
    found = aligned(tmp_path, [tying(step, tie=step != untied) for step in range(3)])
    assert len(found.tensors) == 6


@pytest.mark.parametrize("place", [0, 800, 1599])
@pytest.mark.parametrize("last", [False, True])
def test_tied_but_for_one_element(tmp_path: Path, place: int, last: bool):
    models = [tying(step) for step in range(3)]
    models[2 if last else 0]["head"].view(-1)[place] += 1
    assert len(aligned(tmp_path, models).tensors) == 6


def test_what_may_be_equal_by_chance_is_not_tied(tmp_path: Path):
    models = [
        model(
            step,
            a=torch.zeros(40, 40),
            b=torch.zeros(40, 40),
            c=drawn(2000, seed=step),
            d=drawn(2000, seed=step),
        )
        for step in range(3)
    ]
    small = [one | {"e": drawn(30, 30, seed=9), "f": drawn(30, 30, seed=9)} for one in models]
    assert len(aligned(tmp_path, small).tensors) == 10


def test_equal_at_the_start_only(tmp_path: Path):
    """As the zero matrices that adapters start from."""
    models = [
        model(step, a=step * drawn(40, 40, seed=1), b=step * drawn(40, 40, seed=2)) for step in range(3)
    ]
    assert len(aligned(tmp_path, models).tensors) == 6


def test_one_memory_in_torch_files(tmp_path: Path):
    def shared(step: int) -> dict[str, Tensor]:
        bias = drawn(4, seed=step)
        return model(step) | {"one": bias, "two": bias}

    found = aligned(tmp_path, [shared(step) for step in range(3)], ".pt")
    assert remarks(found) == {"tied": ("two",)}
    apart = [shared(0), shared(1), {name: value.clone() for name, value in shared(2).items()}]
    assert len(aligned(tmp_path, apart, ".pt").tensors) == 6


def test_three_tied_tensors(tmp_path: Path):
    models = [tying(step) for step in range(2)]
    found = aligned(tmp_path, [one | {"third": one["wte"].clone()} for one in models])
    assert remarks(found) == {"tied": ("third", "wte")}


def test_ties_after_duplicates_are_dropped(tmp_path: Path):
    models = [tying(0), tying(1), tying(0)]
    found = aligned(tmp_path, models, duplicates="keep_one")
    assert (steps(found), len(found.tensors)) == ([1, 2], 5)


def test_tied_needs_equal_shapes(tmp_path: Path):
    (path,) = saved(tmp_path, [{"a": drawn(32, 64), "b": drawn(64, 32), "c": drawn(32, 64)}])
    rows = {name: (stored,) for name, stored in open_weights([path]).items()}
    assert tied(rows) == {"c": "a"}
