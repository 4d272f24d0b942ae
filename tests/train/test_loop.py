import io
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from gramian.core.trajectory import displacement
from gramian.errors import DivergedError, InputError, MissingExtraError, StoppedError
from gramian.observe import recorder
from gramian.observe.probe import Probe
from gramian.train import checkpoint
from gramian.train.loop import Trainer, Training
from gramian.train.run import Run, open_run
from gramian.train.side_by_side import train_side_by_side

SETTINGS = Training(
    steps=24, batch=4, learning_rate=0.05, log_every=4, evaluate_every=8, observe_every=8, checkpoint_every=8
)


class Net(nn.Module):
    """A small regression with dropout, so that a resumed run must get the random stream right as well."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.dropout, self.gain = nn.Dropout(0.3), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.blocks(self.dropout(x)[:, None])[:, 0]


def batches(step: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.roll(1, -1)).square().mean()


def trainer(
    folder, settings: Training = SETTINGS, *, resume: bool = False, loss=loss, net=None, **more
) -> Trainer:
    model = net or Net()
    run = open_run(folder, settings, resume=resume)
    probe = Probe(model, "blocks.*", every=settings.observe_every)

    def evaluate(forward: nn.Module) -> dict[str, float]:
        assert not forward.training
        batch = batches(1000).to(next(forward.parameters()).device)
        return {"validation_loss": loss(forward, batch).item()}

    return Trainer(model, loss, batches, evaluate, probe, settings, run, tokens=24, resume=resume, **more)


def weights(of: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in of.model.parameters()])


def test_it_learns_and_writes_down_what_it_saw(tmp_path) -> None:
    one = trainer(tmp_path / "one")
    one.advance(100)
    rows = one.run.record.read()
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(24))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert [row["step"] for row in rows if row["kind"] == "evaluate"] == [0, 8, 16, 24]
    seen = [row for row in rows if row["kind"] == "observe"]
    assert [row["step"] for row in seen] == [0, 8, 16]
    assert set(seen[0]["sites"]) == {"blocks.0", "blocks.1", "blocks.1.output"}
    assert [saved.step for saved in checkpoint.checkpoints(one.run.checkpoints)] == [16, 24]
    assert one.finished
    assert one.tokens_per_second > 0


def test_observing_changes_nothing_that_is_learnt(tmp_path) -> None:
    often, never = (
        trainer(tmp_path / str(every), replace(SETTINGS, observe_every=every)) for every in (1, 1000)
    )
    often.advance(24)
    never.advance(24)
    assert torch.equal(weights(often), weights(never))


@pytest.mark.parametrize("stopped_at", [3, 8, 13])
def test_a_resumed_run_ends_in_the_same_weights(tmp_path, stopped_at) -> None:
    whole = trainer(tmp_path / "whole")
    whole.advance(24)
    part = trainer(tmp_path / "part")
    part.advance(stopped_at)
    part.save()
    part.advance(2)  # steps after the checkpoint are lost and taken again
    rest = trainer(tmp_path / "part", resume=True)
    assert rest.step == max(stopped_at, 8 * ((stopped_at + 2) // 8))
    rest.advance(100)
    assert torch.equal(weights(whole), weights(rest))

    def rows(of: Trainer) -> list:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in of.run.record.read()]

    def key(row) -> tuple:
        return row["step"], row["kind"]

    assert sorted(rows(whole), key=key) == sorted(rows(rest), key=key)


@pytest.mark.parametrize("mode", ["sketch", "exact"])
def test_a_resumed_run_has_the_trajectory_of_an_uninterrupted_one(tmp_path, mode) -> None:
    settings = replace(SETTINGS, trajectory_every=5, trajectory=mode)

    def points(name: str) -> dict[int, dict[str, Tensor]]:
        files = recorder.points(tmp_path / name / "trajectory")
        return {step: load_file(path) for step, path in files.items()}

    whole, plain = trainer(tmp_path / "whole", settings), trainer(tmp_path / "plain")
    assert list(points("whole")) == [0]
    start = weights(whole)
    whole.advance(24)
    plain.advance(24)
    assert torch.equal(weights(whole), weights(plain))
    assert not (tmp_path / "plain" / "trajectory").exists()
    part = trainer(tmp_path / "part", settings)
    part.advance(18)
    assert list(points("part")) == [0, 5, 10, 15]
    rest = trainer(tmp_path / "part", settings, resume=True)
    assert rest.step == 16
    rest.advance(100)
    assert trainer(tmp_path / "part", settings, resume=True).finished  # and changes nothing
    assert list(points("part")) == [0, 5, 10, 15, 20, 24]
    torch.testing.assert_close(points("part"), points("whole"), rtol=0, atol=0)
    if mode == "exact":
        names = [name for name, _ in whole.model.named_parameters()]
        for step, vector in ((0, start), (24, weights(whole))):
            assert torch.equal(torch.cat([points("whole")[step][name].flatten() for name in names]), vector)
    else:
        moved = recorder.read_sketches(tmp_path / "whole" / "trajectory").steps()
        torch.testing.assert_close(displacement(moved)[-1].float(), (weights(whole) - start).norm())


def test_a_changed_seed_is_noticed(tmp_path) -> None:
    """Control of the test above: dropout's stream matters."""
    one, other = (trainer(tmp_path / str(seed), replace(SETTINGS, seed=seed)) for seed in (0, 1))
    one.advance(24)
    other.advance(24)
    assert not torch.equal(weights(one), weights(other))


def test_micro_batches_add_up(tmp_path) -> None:
    class Still(Net):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.0)

    whole, parts = (
        trainer(tmp_path / str(n), replace(SETTINGS, accumulation=n), net=Still()) for n in (1, 4)
    )
    whole.advance(24)
    parts.advance(24)
    torch.testing.assert_close(weights(whole), weights(parts), rtol=1e-4, atol=1e-5)


def test_clipping_bounds_the_step_taken(tmp_path) -> None:
    """With a clip far below the gradient's norm, SGD-like invariance: scaling the loss changes nothing."""
    base = replace(SETTINGS, clip=1e-3, eps=1e-12)
    one = trainer(tmp_path / "one", base)
    scaled = trainer(tmp_path / "scaled", base, loss=lambda model, x: 64 * loss(model, x))
    free = trainer(tmp_path / "free", replace(base, clip=math.inf))
    for each in (one, scaled, free):
        each.advance(8)
    torch.testing.assert_close(weights(one), weights(scaled), rtol=1e-4, atol=1e-5)
    norms = [row["gradient_norm"] for row in free.run.record.read() if row["kind"] == "train"]
    assert min(norms) > 1e-3


@pytest.mark.parametrize("trajectory_every", [0, 1])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(
    tmp_path, where, trajectory_every
) -> None:
    def breaking(model: nn.Module, x: Tensor) -> Tensor:
        value = loss(model, x)
        if torch.equal(x, batches(13)):
            infinite = (value - value.detach()).sqrt()  # value 0, gradient infinite
            return value + infinite if where == "gradient" else value * math.nan
        return value

    settings = replace(SETTINGS, trajectory_every=trajectory_every)
    one = trainer(tmp_path / "one", settings, loss=breaking)
    with pytest.raises(DivergedError, match=rf"the {where} is not finite at step 13; .*step-00000008"):
        one.advance(24)
    saved = checkpoint.checkpoints(one.run.checkpoints)
    assert [each.step for each in saved] == [8]
    fresh = trainer(tmp_path / "one", settings, resume=True)
    assert torch.isfinite(weights(fresh)).all()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_all_and_resuming_gives_the_same_weights(tmp_path, number) -> None:
    def signalling(model: nn.Module, x: Tensor) -> Tensor:
        if torch.equal(x, batches(9)):
            os.kill(os.getpid(), number)
        return loss(model, x)

    whole = trainer(tmp_path / "whole")
    train_side_by_side({"whole": whole}, Console(quiet=True))
    pair = {name: trainer(tmp_path / name, loss=signalling) for name in ("a", "b")}
    handler = signal.getsignal(number)
    with pytest.raises(StoppedError, match=r"a at step 12, b at step 8; go on with --resume"):
        train_side_by_side(pair, Console(quiet=True))
    assert signal.getsignal(number) is handler
    again = {name: trainer(tmp_path / name, resume=True) for name in ("a", "b")}
    train_side_by_side(again, Console(quiet=True))
    for each in again.values():
        assert torch.equal(weights(each), weights(whole))


def evaluated(folder) -> list[int]:
    """Steps of the evaluations of a run."""
    return [row["step"] for row in Run(folder).record.read() if row["kind"] == "evaluate"]


def test_training_ends_early_when_an_evaluation_is_enough_and_stays_ended(tmp_path) -> None:
    def enough() -> bool:
        return evaluated(tmp_path / "early")[-1] >= 12

    settings = replace(SETTINGS, evaluate_every=4, checkpoint_every=24, trajectory_every=5)
    early, whole = trainer(tmp_path / "early", settings, enough=enough), trainer(tmp_path / "whole", settings)
    early.advance(100)
    assert early.step == 12
    assert early.finished
    early.advance(100)
    assert early.step == 12
    assert evaluated(tmp_path / "early") == [0, 4, 8, 12]
    assert [saved.step for saved in checkpoint.checkpoints(early.run.checkpoints)] == [
        12
    ]  # not due before 24
    assert list(recorder.points(tmp_path / "early" / "trajectory")) == [
        0,
        5,
        10,
        12,
    ]  # the end is a point of it
    whole.advance(12)
    assert torch.equal(weights(early), weights(whole))
    assert not whole.finished
    again = trainer(tmp_path / "early", settings, resume=True, enough=enough)
    assert again.step == 12
    assert again.finished
    train_side_by_side({"again": again}, Console(quiet=True))
    assert evaluated(tmp_path / "early") == [0, 4, 8, 12]
    assert torch.equal(weights(again), weights(early))
    longer = trainer(tmp_path / "early", settings, resume=True)  # control: who has not enough goes on
    assert not longer.finished
    longer.advance(100)
    whole.advance(100)
    assert longer.step == 24
    assert torch.equal(weights(longer), weights(whole))


def test_nothing_is_enough_before_the_first_step(tmp_path) -> None:
    one = trainer(tmp_path / "one", enough=lambda: True)
    assert not one.finished
    one.advance(100)
    assert one.step == 8  # the first evaluation behind a step


def test_of_several_trainers_one_may_end_early(tmp_path) -> None:
    def enough() -> bool:
        return len(evaluated(tmp_path / "short")) > 2

    pair = {"short": trainer(tmp_path / "short", enough=enough), "long": trainer(tmp_path / "long")}
    train_side_by_side(pair, Console(quiet=True))
    assert {name: each.step for name, each in pair.items()} == {"short": 16, "long": 24}


def test_groups_and_the_unit_reach_the_optimiser_and_the_console(tmp_path) -> None:
    asked: list[float] = []

    def groups(model: nn.Module, decay: float) -> list[dict]:
        asked.append(decay)
        return [
            {"params": [model.gain], "lr": 1e-9, "weight_decay": 0.0},
            {"params": list(model.blocks.parameters()), "weight_decay": decay},
        ]

    settings = replace(SETTINGS, weight_decay=0.3)
    one, plain = (
        trainer(tmp_path / "one", settings, groups=groups, unit="graphs"),
        trainer(tmp_path / "two", settings),
    )
    assert asked == [0.3]
    start = one.model.gain.item()
    out = io.StringIO()
    train_side_by_side({"one": one, "plain": plain}, Console(file=out, width=200))
    assert abs(one.model.gain.item() - start) < 1e-6
    assert abs(plain.model.gain.item() - start) > 1e-3  # control
    assert not torch.equal(one.model.blocks[0].weight, Net().blocks[0].weight)
    lines = [line for line in out.getvalue().splitlines() if "step" in line]
    assert lines
    for line in lines:
        assert line.endswith("graphs/s" if line.startswith("one") else "tokens/s")


def test_when_one_diverges_the_others_are_saved(tmp_path) -> None:
    def breaking(model: nn.Module, x: Tensor) -> Tensor:
        return loss(model, x) * (math.inf if torch.equal(x, batches(5)) else 1)

    pair = {"calm": trainer(tmp_path / "calm"), "wild": trainer(tmp_path / "wild", loss=breaking)}
    with pytest.raises(DivergedError, match="wild: the loss is not finite at step 5; nothing was saved yet"):
        train_side_by_side(pair, Console(quiet=True))
    assert [saved.step for saved in checkpoint.checkpoints(pair["calm"].run.checkpoints)] == [8]
    assert checkpoint.checkpoints(pair["wild"].run.checkpoints) == []


def test_tensorboard_files_are_written_on_request(tmp_path) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    one = trainer(tmp_path / "one", replace(SETTINGS, tensorboard=True, steps=8))
    one.advance(8)
    one.close()
    assert list(one.run.folder.rglob("events.out.tfevents*"))


def test_a_missing_extra_is_named(monkeypatch) -> None:
    monkeypatch.setattr("gramian.train.settings.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "gramian\[tensorboard\]"'):
        replace(SETTINGS, tensorboard=True).check()
    SETTINGS.check()


def test_bfloat16_stays_close_to_float32(tmp_path) -> None:
    plain, low = (
        trainer(tmp_path / precision, replace(SETTINGS, precision=precision))
        for precision in ("fp32", "bf16")
    )
    plain.advance(24)
    low.advance(24)
    assert not torch.equal(weights(plain), weights(low))
    torch.testing.assert_close(weights(plain), weights(low), rtol=0.2, atol=0.2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, inside its compiler
def test_a_compiled_run_stays_close_and_is_observed(tmp_path) -> None:
    class Still(Net):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.0)

    plain, compiled = (
        trainer(tmp_path / str(how), replace(SETTINGS, compile=how), net=Still()) for how in (False, True)
    )
    plain.advance(24)
    compiled.advance(24)
    torch.testing.assert_close(weights(plain), weights(compiled), rtol=1e-4, atol=1e-5)
    assert sum(row["kind"] == "observe" for row in compiled.run.record.read()) == 3


def test_bad_settings_are_named() -> None:
    for change, words in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch": 5, "accumulation": 2}, "not divisible by accumulation"),
        ({"keep": -1}, "keep"),
        ({"trajectory_every": -1}, "trajectory_every cannot be negative"),
        ({"trajectory": "all"}, "unknown trajectory 'all'"),
        ({"clip": 0.0}, "clip"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"schedule": "staircase"}, "unknown schedule"),
        ({"warmup": 2.0}, "warm-up"),
    ):
        with pytest.raises(InputError, match=words):
            replace(SETTINGS, **change).check()
