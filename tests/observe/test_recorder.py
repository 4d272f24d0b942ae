import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gramian.core.path_angles import update_angles
from gramian.core.trajectory import displacement_ratio, path_length, steps_of
from gramian.errors import DivergedError, InputError
from gramian.observe.parts import layer_of
from gramian.observe.recorder import SIZE, TrajectoryRecorder, groups, points, read_sketches
from gramian.observe.series import find_series
from gramian.observe.weight_files import metadata


class Model(nn.Module):
    """Four layers of which the last is small, a tied matrix, and one that is frozen."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.embedding = nn.Embedding(30, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 30, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)
        self.register_buffer("seen", torch.zeros(3))


def model(seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model()


def move(of: nn.Module, step: int, size: float = 0.05) -> None:
    draw = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in of.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=draw)


def vector(of: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(p for p in of.parameters() if p.requires_grad).detach().double()


def walk(recorder: TrajectoryRecorder, of: nn.Module, steps: range) -> Tensor:
    found = []
    for step in steps:
        recorder.record(step)
        found.append(vector(of))
        move(of, step)
    return torch.stack(found)


def content(path: Path) -> tuple[dict[str, str], dict[str, tuple[torch.dtype, list]]]:
    """All that a file says, in no order."""
    return metadata(path), {name: (value.dtype, value.tolist()) for name, value in load_file(path).items()}


def test_sketches_of_a_path_read_what_the_parameters_do(tmp_path: Path) -> None:
    net = model()
    recorder = TrajectoryRecorder(net, tmp_path, size=2048)
    recorder.start(0)
    exact = steps_of(walk(recorder, net, range(0, 120, 10)))
    assert recorder.latest == 110
    path = read_sketches(tmp_path)
    assert path.at == tuple(range(0, 120, 10))
    assert list(path.sketches) == ["embedding", "layers.0", "layers.1", "norm"]
    assert path.kept == {"norm"}
    for reading in (path_length, displacement_ratio, lambda steps: update_angles(steps).mean()):
        estimate, bar = path.estimate(reading)
        assert 0 < bar < 0.1 * reading(exact)
        assert abs(estimate - reading(exact)) < 3 * bar
        assert estimate == pytest.approx(reading(recorder.steps_gram()).item(), rel=1e-12)
    norm, none = path.estimate(path_length, "norm")
    assert none == 0
    assert norm == pytest.approx(path_length(path.steps("norm")).item(), rel=1e-12)
    with pytest.raises(InputError, match=r"no group 'layers\.7'; it has embedding, layers\.0"):
        path.steps("layers.7")


def test_a_group_that_fits_is_exact(tmp_path: Path) -> None:
    net = model()
    recorder = TrajectoryRecorder(net, tmp_path, size=8192)
    seen = walk(recorder, net, range(5))
    assert seen.shape[1] < 8192
    torch.testing.assert_close(recorder.steps_gram().cross, steps_of(seen).cross, rtol=1e-12, atol=1e-12)
    assert len(read_sketches(tmp_path).kept) == 4


def test_a_record_is_small_and_says_what_it_is(tmp_path: Path) -> None:
    path = TrajectoryRecorder(nn.Sequential(*[nn.Linear(100, 100) for _ in range(9)]), tmp_path).record(100)
    assert path == tmp_path / "step-00000100.safetensors"
    assert SIZE * 8 * 0.9 < path.stat().st_size < SIZE * 8 + 4096
    about = metadata(path)
    assert {key: about[key] for key in ("format", "mode", "seed", "step", "parameters", "size")} == {
        "format": "gramian-trajectory", "mode": "sketch", "seed": "0", "step": "100", "parameters": "90900",
        "size": "8192",
    }  # fmt: skip
    tensors = load_file(path)
    assert [layer_of(name) for name in sorted(tensors)] == [str(index) for index in range(9)]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float64}


def test_records_are_a_series_of_checkpoints(tmp_path: Path) -> None:
    for mode in ("sketch", "exact"):
        net = model()
        walk(TrajectoryRecorder(net, tmp_path / mode, mode), net, range(0, 30, 10))
        (series,) = find_series([tmp_path / mode])
        assert [checkpoint.step for checkpoint in series.checkpoints] == [0, 10, 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_points_are_the_parameters(tmp_path: Path, dtype: torch.dtype) -> None:
    net = model().to(dtype)
    recorder = TrajectoryRecorder(net, tmp_path, "exact")
    loaded = load_file(recorder.record(3))
    wanted = {name: value for name, value in net.named_parameters() if value.requires_grad}
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], value) for name, value in wanted.items())
    assert {value.dtype for value in loaded.values()} == {dtype}
    assert "head.weight" not in loaded
    with pytest.raises(InputError, match="gramian trajectory"):
        recorder.steps_gram()
    with pytest.raises(InputError, match="no sketch"):
        read_sketches(tmp_path)
    every = TrajectoryRecorder(net, tmp_path / "all", "exact", trainable_only=False)
    assert load_file(every.record(0)).keys() == wanted.keys() | {"frozen"}


def test_memory_that_is_shared_or_strided_is_written_once_and_in_order(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.arange(24.0)
            self.one, self.two = nn.Parameter(flat[:12].view(3, 4).T), nn.Parameter(flat[12:])
            self.same = nn.Parameter(flat[12:])

    loaded = load_file(TrajectoryRecorder(net := Views(), tmp_path, "exact").record(0))
    assert loaded.keys() == {"one", "two"}
    assert torch.equal(loaded["one"], net.one)
    assert torch.equal(loaded["two"], net.two)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, inside its compiler
@pytest.mark.parametrize("mode", ["sketch", "exact"])
def test_wrappers_leave_no_trace(tmp_path: Path, mode: str) -> None:
    plain = TrajectoryRecorder(net := model(), tmp_path / "plain", mode).record(0)
    for name, wrapped in {
        "compiled": torch.compile(net),
        "parallel": nn.DataParallel(net),
        "both": nn.DataParallel(torch.compile(net)),  # type: ignore[arg-type]
    }.items():
        recorder = TrajectoryRecorder(wrapped, tmp_path / name, mode)  # type: ignore[arg-type]
        assert content(recorder.record(0)) == content(plain)


def test_what_is_frozen_later_is_recorded_on(tmp_path: Path) -> None:
    net = model()
    recorder = TrajectoryRecorder(net, tmp_path, "exact")
    before = load_file(recorder.record(0)).keys()
    net.layers.requires_grad_(False)
    assert load_file(recorder.record(1)).keys() == before
    del net.norm
    with pytest.raises(InputError, match=r"lost the parameter norm\.weight"):
        recorder.record(2)


@pytest.mark.parametrize("mode", ["sketch", "exact"])
def test_a_resumed_record_is_that_of_an_uninterrupted_run(tmp_path: Path, mode: str) -> None:
    whole, cut = model(), model()
    walk(TrajectoryRecorder(whole, tmp_path / "whole", mode), whole, range(0, 60, 10))
    walk(TrajectoryRecorder(cut, tmp_path / "part", mode), cut, range(0, 40, 10))
    cut = model()
    for step in range(0, 20, 10):
        move(cut, step)
    again = TrajectoryRecorder(cut, tmp_path / "part", mode)
    again.start(20)
    assert again.latest == 10
    assert list(points(tmp_path / "part")) == [0, 10]
    walk(again, cut, range(20, 60, 10))
    for step, path in points(tmp_path / "whole").items():
        assert content(path) == content(points(tmp_path / "part")[step])
    move(cut, 999)
    assert content(again.record(50)) != content(points(tmp_path / "whole")[50])


def test_due_are_the_first_the_multiples_and_the_end(tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(model(), tmp_path)
    recorder.start(3)
    for step in range(3, 14):
        recorder.record_if_due(step, 4, end=step == 13)
    assert list(points(tmp_path)) == [3, 4, 8, 12, 13]


def test_a_folder_of_another_trajectory_is_refused_and_left_alone(tmp_path: Path) -> None:
    TrajectoryRecorder(model(), tmp_path).record(0)
    before = points(tmp_path)[0].read_bytes()
    for recorder, words in (
        (TrajectoryRecorder(model(), tmp_path, "exact"), "another mode .sketch, not exact"),
        (TrajectoryRecorder(model(), tmp_path, seed=1), "another seed .0, not 1"),
        (TrajectoryRecorder(model(), tmp_path, size=4096), "another size .8192, not 4096"),
        (TrajectoryRecorder(Model(32), tmp_path), "another "),
    ):
        with pytest.raises(InputError, match=words):
            recorder.start(0)
        assert points(tmp_path)[0].read_bytes() == before
    TrajectoryRecorder(model(1), tmp_path).start(0)
    assert points(tmp_path) == {}
    save_file({"x": torch.zeros(1)}, tmp_path / "step-7.safetensors")
    with pytest.raises(InputError, match=r"step-7\.safetensors is no point"):
        TrajectoryRecorder(model(), tmp_path).start(0)
    assert (tmp_path / "step-7.safetensors").exists()


@pytest.mark.parametrize("mode", ["sketch", "exact"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_not_written(
    tmp_path: Path, mode: str, value: float
) -> None:
    recorder = TrajectoryRecorder(net := model(), tmp_path, mode)
    recorder.record(0)
    with torch.no_grad():
        net.layers[1].weight[3, 4] = value
    with pytest.raises(DivergedError, match=r"layers\.1\.weight are not finite at step 8; .* up to step 0"):
        recorder.record(8)
    assert os.listdir(tmp_path) == ["step-00000000.safetensors"]


def test_parameters_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

    with pytest.raises(InputError, match="sharded by FSDP"):
        TrajectoryRecorder(nn.Sequential(FullyShardedDataParallel()), tmp_path)
    for name in ("ds_id", "device_mesh"):
        net = nn.Linear(2, 2)
        setattr(net.bias, name, 0)
        with pytest.raises(InputError, match="bias is sharded over processes"):
            TrajectoryRecorder(net, tmp_path)
    with pytest.raises(InputError, match="meta device"):
        TrajectoryRecorder(nn.Linear(2, 2, device="meta"), tmp_path)
    with pytest.raises(InputError, match="complex64"):
        TrajectoryRecorder(nn.Linear(2, 2, dtype=torch.complex64), tmp_path)
    whole = TrajectoryRecorder(net := nn.Linear(2, 2), tmp_path)
    net.weight.ds_id = 0  # type: ignore[assignment]
    with pytest.raises(InputError, match="weight is sharded over processes"):
        whole.record(0)


def test_groups_share_the_numbers_out() -> None:
    stack = {f"h.{layer}.{part}": 10_000 for layer in range(12) for part in ("a.weight", "b.weight")}
    numbers = {"wte.weight": 10**6, **stack, "ln.weight": 100, "ln.bias": 100}
    found = groups(numbers, 8192)
    assert list(found) == ["wte", *(f"h.{layer}" for layer in range(12)), "ln"]
    assert found["h.3"][0] == ["h.3.a.weight", "h.3.b.weight"]
    sizes = {group: size for group, (_, size) in found.items()}
    assert sizes["ln"] == 256
    assert {sizes[f"h.{layer}"] for layer in range(12)} <= {576, 640}
    assert 8192 - 64 < sum(sizes.values()) <= 8192
    assert all(size % 64 == 0 for size in sizes.values())


def test_more_layers_than_fit_are_a_group_a_stack_and_then_one() -> None:
    deep = {f"h.{layer}.weight": 10_000 for layer in range(200)} | {"wte.weight": 10_000}
    assert {group: size for group, (_, size) in groups(deep, 8192).items()} == {"h": 4096, "wte": 4096}
    wide = {f"part{index}.weight": 10 for index in range(200)}
    assert [(group, size) for group, (_, size) in groups(wide, 128).items()] == [("weights", 128)]
    assert sum(size for _, size in groups(wide, 64 * 200).values()) == 64 * 200


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown mode 'whole'"):
        TrajectoryRecorder(model(), tmp_path, "whole")
    with pytest.raises(InputError, match="at least 64 numbers, not 63"):
        TrajectoryRecorder(model(), tmp_path, size=63)
    with pytest.raises(InputError, match="no parameter to record"):
        TrajectoryRecorder(model().requires_grad_(False), tmp_path)
    with pytest.raises(InputError, match="negative"):
        TrajectoryRecorder(model(), tmp_path).record(-1)
    with pytest.raises(InputError, match="holds no point"):
        read_sketches(tmp_path)
    TrajectoryRecorder(model(), tmp_path).record(0)
    TrajectoryRecorder(model(), tmp_path, seed=2).record(1)
    with pytest.raises(InputError, match=r"step-00000001.* of another trajectory"):
        read_sketches(tmp_path)
    points(tmp_path)[1].write_bytes(b"cut")
    with pytest.raises(InputError, match="step-00000001"):
        read_sketches(tmp_path)


@pytest.mark.parametrize("spoil", ["missing", "shape", "groups"])
def test_points_without_the_sketches_that_they_announce(tmp_path: Path, spoil: str) -> None:
    recorder = TrajectoryRecorder(nn.Linear(8, 4), tmp_path, size=64)
    paths = [recorder.record(step) for step in range(2)]
    for path in paths if spoil == "groups" else paths[1:]:
        tensors, about = load_file(path), metadata(path)
        name = next(iter(tensors))
        if spoil == "missing":
            tensors["other"] = tensors.pop(name)
        elif spoil == "shape":
            tensors[name] = tensors[name][:-1].clone()
        else:
            about["groups"] = '["weights"]'
        save_file(tensors, path, about)
    with pytest.raises(InputError, match="sketches"):
        read_sketches(tmp_path)
