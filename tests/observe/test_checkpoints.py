"""The streamed Gram of a series equals that of all parameters at once, however the work was interrupted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gramian.core.gram import Gram
from gramian.core.trajectory import steps_of, sum_of
from gramian.errors import InputError
from gramian.observe import checkpoints, increments
from gramian.observe.alignment import Aligned, Checks, align
from gramian.observe.checkpoints import Streamed, stream
from gramian.observe.increments import rounding_variance
from gramian.observe.series import find_series

SHAPES = {
    "embed.weight": (300, 64),
    "h.0.attn.c_attn.weight": (64, 192),
    "h.0.attn.c_attn.bias": (192,),
    "h.0.mlp.up.weight": (256, 64),
    "h.0.norm.weight": (64,),
    "scale": (),
}
HALF = {torch.bfloat16, torch.float16}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide even small tensors, so that every seam is crossed."""
    monkeypatch.setattr(checkpoints, "UNIT", (3_001, 5_000))
    monkeypatch.setattr(checkpoints, "BUFFER", 8 * 4096 * 8)
    monkeypatch.setattr(increments, "CACHE", 7 * 1024)


def series(
    folder: Path, n: int = 7, dtype: torch.dtype = torch.float64, step: float = 0.1, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Write a random walk of weights and return it as it is stored."""
    generator = torch.Generator().manual_seed(seed)
    value = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()
    }
    written = []
    for t in range(n):
        stored = {name: tensor.to(dtype) for name, tensor in value.items()}
        place = folder / f"step-{100 * t}"
        place.mkdir(parents=True)
        save_file(stored, place / "model.safetensors")
        written.append(stored)
        for name, shape in SHAPES.items():
            value[name] = value[name] + step * torch.randn(shape, generator=generator, dtype=torch.float64)
    return written


def aligned(folder: Path, **checks: object) -> tuple[Aligned, ...]:
    return align(find_series([folder])[0], Checks(**checks)).tensors  # type: ignore[arg-type]


def whole(found: Streamed | None) -> Gram:
    assert found is not None
    return sum_of([part.steps for part in found.parts])


def dense(written: list[dict[str, Tensor]]) -> Gram:
    """Take the Gram of all parameters at once, in float64."""
    return steps_of(
        torch.stack([torch.cat([t.double().flatten() for t in each.values()]) for each in written])
    )


def error(found: Gram, expected: Gram) -> float:
    """Return the largest error by the product of the rows' norms."""
    norms = expected.left.sqrt()
    return float(((found.cross - expected.cross).abs() / (norms[:, None] * norms)).max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_streamed_equals_dense(tmp_path: Path, dtype: torch.dtype) -> None:
    written = series(tmp_path / "a", dtype=dtype)
    found = whole(stream(aligned(tmp_path / "a"), tmp_path / "found"))
    assert error(found, dense(written)) < (3e-7 if dtype in HALF else 1e-14)
    assert torch.equal(found.cross, found.cross.T)
    assert torch.allclose(found.left, found.cross.diagonal(), rtol=1e-15)


@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float64, 1e-13), (torch.float32, 1e-13), (torch.bfloat16, 1e-6)]
)
def test_small_late_updates_keep_their_digits(tmp_path: Path, dtype: torch.dtype, within: float) -> None:
    step = {torch.float64: 1e-9, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    written = series(tmp_path / "a", dtype=dtype, step=step)
    found, expected = whole(stream(aligned(tmp_path / "a"), tmp_path / "found")), dense(written)
    assert error(found, expected) < within
    flat = torch.stack([torch.cat([t.double().flatten() for t in each.values()]) for each in written])
    direct = flat @ flat.T  # what a user would write: the differences drown
    second = direct.diff(dim=0).diff(dim=1)
    if dtype is torch.float64:
        assert ((second.diagonal() / expected.left[1:] - 1).abs() > 1e-3).any()
        assert torch.allclose(found.left[1:], expected.left[1:], rtol=1e-12)


def test_parts_are_those_of_the_tensors(tmp_path: Path) -> None:
    written = series(tmp_path / "a")
    found = stream(aligned(tmp_path / "a"), tmp_path / "found")
    assert found is not None
    parts = {(part.name, part.kind): part for part in found.parts}
    fused = torch.stack([each["h.0.attn.c_attn.weight"] for each in written])
    for index, kind in enumerate(("query", "key", "value")):
        expected = steps_of(fused[:, :, 64 * index : 64 * (index + 1)].flatten(1))
        part = parts["h.0.attn.c_attn.weight", kind]
        assert error(part.steps, expected) < 1e-14
        assert part.parameters == 64 * 64
        assert part.layer == "h.0"
    assert (
        error(
            parts["h.0.norm.weight", "norm"].steps,
            steps_of(torch.stack([w["h.0.norm.weight"] for w in written])),
        )
        < 1e-14
    )
    assert sum(part.parameters for part in found.parts) == sum(t.numel() for t in written[0].values())


def test_the_same_bits_with_any_number_of_threads(tmp_path: Path) -> None:
    series(tmp_path / "a", dtype=torch.bfloat16)
    tensors = aligned(tmp_path / "a")
    found = [whole(stream(tensors, tmp_path / str(n), workers=n)).cross for n in (1, 2, 5)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_same_bits_with_several_processes(tmp_path: Path) -> None:
    series(tmp_path / "a")
    tensors = aligned(tmp_path / "a")
    alone = whole(stream(tensors, tmp_path / "alone")).cross
    assert stream(tensors, tmp_path / "shared", share=(2, 3)) is None
    assert stream(tensors, tmp_path / "shared", share=(0, 3)) is None
    stream(tensors, tmp_path / "shared", share=(1, 3))
    told = []
    together = whole(stream(tensors, tmp_path / "shared", advanced=told.append))
    assert torch.equal(alone, together.cross)
    assert sum(told) == sum(t.numel * 8 * 7 for t in tensors)  # gathered, not read again


def test_stopped_anywhere_it_goes_on(tmp_path: Path) -> None:
    series(tmp_path / "a")
    tensors = aligned(tmp_path / "a")
    expected = whole(stream(tensors, tmp_path / "whole")).cross
    for after in range(1, 14, 3):
        asked = iter([False] * after)
        done: list[int] = []
        while stream(tensors, tmp_path / str(after), workers=1, advanced=done.append,
                     stopped=lambda asked=asked: next(asked, True)) is None:  # fmt: skip
            asked = iter([False] * after)
            assert len(done) < 1000
        assert torch.equal(whole(stream(tensors, tmp_path / str(after))).cross, expected)


KILLED = """
import sys
from pathlib import Path
import time
from gramian.observe import checkpoints, increments, saved_grams
from gramian.observe.alignment import align
from gramian.observe.series import find_series
saved_grams.EVERY = 0.0
checkpoints.UNIT = (3_001, 5_000)
increments.CACHE = 7 * 1024
tensors = align(find_series([Path(sys.argv[1])])[0]).tensors
print("begun", flush=True)
checkpoints.stream(tensors, Path(sys.argv[2]), workers=2, advanced=lambda done: time.sleep(0.02))
print("ended", flush=True)
"""


def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    series(tmp_path / "a")
    found = tmp_path / "killed"
    ended, seen = False, []
    for turn in range(40):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "a"), str(found)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        time.sleep(0.05 + 0.03 * turn)
        os.kill(child.pid, signal.SIGKILL)
        ended = "ended" in child.stdout.read()
        child.wait()
        child.stdout.close()
        seen.append(len(list(found.glob("found-*.safetensors"))))
        if ended or turn > 3:
            break
    assert seen[-1] > seen[0] or ended  # it went on, it did not begin again
    tensors = aligned(tmp_path / "a")
    assert torch.equal(whole(stream(tensors, found)).cross, whole(stream(tensors, tmp_path / "whole")).cross)


def test_a_damaged_save_is_done_again(tmp_path: Path) -> None:
    series(tmp_path / "a")
    tensors = aligned(tmp_path / "a")
    expected = whole(stream(tensors, tmp_path / "found")).cross
    for path in (tmp_path / "found").glob("found-*.safetensors"):
        path.write_bytes(path.read_bytes()[:-10])
    assert torch.equal(whole(stream(tensors, tmp_path / "found")).cross, expected)
    for path in (tmp_path / "found").glob("found-*.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 64]) + content[-1:])
    assert torch.equal(whole(stream(tensors, tmp_path / "found")).cross, expected)


def test_work_on_other_files_is_not_mixed(tmp_path: Path) -> None:
    series(tmp_path / "a")
    series(tmp_path / "b", seed=1)
    stream(aligned(tmp_path / "a"), tmp_path / "found")
    with pytest.raises(InputError, match="other files or settings, or the files have changed"):
        stream(aligned(tmp_path / "b"), tmp_path / "found")
    found = whole(stream(aligned(tmp_path / "b"), tmp_path / "found", anew=True))
    assert torch.equal(found.cross, whole(stream(aligned(tmp_path / "b"), tmp_path / "b2")).cross)


def test_work_divided_otherwise_is_not_mixed(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "a").mkdir()
    for t in range(3):
        fused = torch.randn(24, 8, generator=generator)
        save_file({"h.0.query_key_value.weight": fused}, tmp_path / "a" / f"step-{t}.safetensors")
    tensors = aligned(tmp_path / "a")
    stream(tensors, tmp_path / "found")
    with pytest.raises(InputError, match="other files or settings"):
        stream(tensors, tmp_path / "found", config={"model_type": "gpt_neox", "num_attention_heads": 2})


def test_a_checkpoint_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    series(tmp_path / "a")
    path = tmp_path / "a" / "step-300" / "model.safetensors"
    with pytest.raises(InputError, match="changed while it was read"):
        stream(aligned(tmp_path / "a"), tmp_path / "found", advanced=lambda done: os.utime(path, (1, 1)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_or_left_out(tmp_path: Path, bad: float) -> None:
    written = series(tmp_path / "a")
    written[3]["h.0.mlp.up.weight"][200, 3] = bad
    save_file(written[3], tmp_path / "a" / "step-300" / "model.safetensors")
    tensors = aligned(tmp_path / "a")
    with pytest.raises(InputError, match=r"h\.0\.mlp\.up\.weight in .*step-300.* holds NaN or infinities"):
        stream(tensors, tmp_path / "found")
    found = stream(tensors, tmp_path / "found", leave_out=True)
    assert found is not None
    assert {name: path.parent.name for name, path in found.broken.items()} == {
        "h.0.mlp.up.weight": "step-300"
    }
    with pytest.raises(InputError, match=r"h\.0\.mlp\.up\.weight in .*step-300"):
        stream(tensors, tmp_path / "found")  # which holds what was left out
    rest = [
        {name: tensor for name, tensor in each.items() if name != "h.0.mlp.up.weight"} for each in written
    ]
    assert error(whole(found), dense(rest)) < 1e-14


def test_halves_too_large_for_their_squares(tmp_path: Path) -> None:
    written = series(tmp_path / "a", dtype=torch.bfloat16)
    for t, each in enumerate(written):
        each["embed.weight"][0, 0] = 1e30 * (t + 1)
        save_file(each, tmp_path / "a" / f"step-{100 * t}" / "model.safetensors")
    found = whole(stream(aligned(tmp_path / "a"), tmp_path / "found"))
    assert error(found, dense(written)) < 3e-7


def test_mixed_precisions(tmp_path: Path) -> None:
    written = series(tmp_path / "a", dtype=torch.float32)
    written[-1] = {name: tensor.bfloat16() for name, tensor in written[-1].items()}
    save_file(written[-1], tmp_path / "a" / "step-600" / "model.safetensors")
    found = stream(aligned(tmp_path / "a", mixed_dtypes=True), tmp_path / "found")
    assert error(whole(found), dense(written)) < 1e-14
    assert found is not None
    first, last = (sum(part.rounding[end] for part in found.parts) for end in (0, 1))
    assert last > 1e8 * first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_variance_is_that_of_rounding(dtype: torch.dtype) -> None:
    x = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rounded = x.to(dtype)
    expected = (rounded.double() - x).square().sum()
    assert float(rounding_variance(rounded) / expected) == pytest.approx(
        1, abs=0.05
    )  # 8192 of them are looked at
    assert rounding_variance(torch.zeros(5, dtype=dtype)) == 0
    narrower = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}[dtype] - 1
    assert rounding_variance(rounded) < 0.3 * (x.abs() * 2.0**-narrower).square().sum() / 12


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series(tmp_path / "a")
    read: list[int] = []
    original = checkpoints._rows

    def noted(tensor: Aligned, start: int, stop: int) -> Tensor | list[Tensor]:
        rows = original(tensor, start, stop)
        read.append(sum(row.nbytes for row in rows))
        return rows

    monkeypatch.setattr(checkpoints, "_rows", noted)
    stream(aligned(tmp_path / "a"), tmp_path / "found")
    assert max(read) <= checkpoints.BUFFER
    assert sum(read) == sum(t.numel * 8 * 7 for t in aligned(tmp_path / "a"))
