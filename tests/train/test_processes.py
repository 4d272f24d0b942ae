"""Several processes train one model to where one process trains it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gramian.errors import InputError
from gramian.observe import recorder
from gramian.train import processes, settings, sharding
from gramian.train.run import Run
from launched import TESTS, launched
from shared_training import DEVICE, SETTINGS, SHAPES, settings_of, trainer, weights

CLOSE = 1e-5
PROGRAM = str(TESTS / "shared_training.py")
WAYS = ("ddp", "fsdp")


def apart(one: dict, other: dict) -> float:
    """The largest difference of any number in two sets of tensors."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def said(folder: Path, job: str) -> list[str]:
    """How each process says that a job ended."""
    return [(folder / f"{job}.{rank}").read_text(encoding="utf-8") for rank in (0, 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of one process by name, and of two by name and way: whole ones and ones that changed hands."""
    folder = tmp_path_factory.mktemp("processes")
    for name in SHAPES:
        trainer(name, folder / name).advance(8)
    for way in WAYS:
        trainer("scalars", folder / f"scalars-8-{way}-resume").advance(5)
    jobs = [f"{name}-8-{way}" for way in WAYS for name in SHAPES]
    jobs += [f"{job}-{way}" for way in WAYS for job in ("scalars-5", "stopped-8")]
    jobs += [f"scalars-8-{way}-resume" for way in WAYS]
    jobs += ["rows-8-ddp", "different-8-fsdp", "full-8-ddp"]
    found = launched([PROGRAM, str(folder), *jobs], 2)
    assert [code for code, _ in found] == [0, 0], found
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["decoder", "encoder", "scalars", "uneven"])
def test_two_processes_give_the_losses_and_weights_of_one(runs, name, way) -> None:
    one, two = Run(runs / name).record.read(), Run(runs / f"{name}-8-{way}").record.read()
    assert apart(weights(runs / name), weights(runs / f"{name}-8-{way}")) < CLOSE
    assert [(row["kind"], row["step"]) for row in one] == [(row["kind"], row["step"]) for row in two]
    for mine, theirs in zip(one, two, strict=True):
        for number in ("loss", "gradient_norm", "validation_loss"):
            assert mine.get(number, 0.0) == pytest.approx(theirs.get(number, 0.0), abs=CLOSE)
        for site, readings in mine.get("sites", {}).items():
            for reading in readings.keys() - {"attention_entropy", "sink_rate"}:
                assert theirs["sites"][site][reading] == pytest.approx(readings[reading], rel=1e-4), reading
    assert max(row.get("gradient_norm", 0.0) for row in two) > settings_of(name).clip  # so it mattered


def test_a_mean_of_means_is_noticed(runs) -> None:
    """Control: parts of a batch that do not weigh by what they are the mean of."""
    for way in WAYS:
        assert apart(weights(runs / "uneven"), weights(runs / f"careless-8-{way}")) > 100 * CLOSE


@pytest.mark.parametrize("way", WAYS)
def test_the_trajectory_is_that_of_one_process(runs, way) -> None:
    one, two = (recorder.points(runs / name / "trajectory") for name in ("scalars", f"scalars-8-{way}"))
    assert list(one) == list(two) == [0, 4, 8]
    assert apart(load_file(one[0]), load_file(two[0])) == 0
    assert apart(load_file(one[8]), load_file(two[8])) < CLOSE


@pytest.mark.parametrize("way", WAYS)
def test_one_process_goes_on_with_what_two_have_saved(runs, way) -> None:
    rest = trainer("scalars", runs / f"scalars-5-{way}", resume=True)
    assert rest.step == 5
    rest.advance(8)
    assert apart(weights(runs / "scalars"), weights(runs / f"scalars-5-{way}")) < CLOSE
    assert list(recorder.points(runs / f"scalars-5-{way}" / "trajectory")) == [0, 4, 8]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_go_on_with_what_one_has_saved(runs, way) -> None:
    job = f"scalars-8-{way}-resume"
    assert said(runs, job) == ["", ""]
    assert apart(weights(runs / "scalars"), weights(runs / job)) < CLOSE
    steps = [row["step"] for row in Run(runs / job).record.read() if row["kind"] == "train"]
    assert steps == list(range(8))


@pytest.mark.parametrize("way", WAYS)
def test_a_signal_to_one_process_stops_all_at_the_same_step(runs, way) -> None:
    job = f"stopped-8-{way}"
    one, other = said(runs, job)
    assert one == other
    assert one.startswith("StoppedError: stopped by SIGTERM and saved: stopped at step 3;")
    rest = trainer("stopped", runs / job, resume=True)
    assert rest.step == 3
    rest.advance(8)
    assert apart(weights(runs / "decoder"), weights(runs / job)) < CLOSE


def test_what_one_process_cannot_do_ends_all(runs) -> None:
    for job, kind, words in (
        ("rows-8-ddp", "InputError", "the 7 rows of a batch cannot be shared by 2 processes"),
        ("different-8-fsdp", "InputError", "the processes read different data"),
    ):
        one, other = said(runs, job)
        assert one == other
        assert one.startswith(f"{kind}: {words}")
    one, other = said(runs, "full-8-ddp")  # only the main process writes
    assert one == "OSError: [Errno 28] no space left on device"
    assert other == f"GramianError: process 0 failed: {one}"


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch) -> None:
    SETTINGS.check()
    monkeypatch.setattr(settings, "ranks", lambda: 3)
    with pytest.raises(
        InputError, match="a batch of 8 cannot be shared by 3 processes; take a multiple of 3"
    ):
        SETTINGS.check()
    with pytest.raises(InputError, match="3 processes of 2 micro-batches each; take a multiple of 6"):
        replace(SETTINGS, accumulation=2).check()
    replace(SETTINGS, batch=12, accumulation=2).check()


@pytest.mark.parametrize("optimiser", ["muon", "soap", "shampoo", "adafactor", "sgd"])
def test_optimisers_of_whole_matrices_refuse_parts_of_them(optimiser) -> None:
    with pytest.raises(InputError, match=f"{optimiser} cannot train parameters that FSDP cuts up"):
        sharding.check(optimiser)
    sharding.check("adamw")


def test_one_process_alone_is_the_smallest_case() -> None:
    assert processes.main_first(lambda: 3) == processes.on_all(lambda: 3) == 3
    with pytest.raises(RuntimeError, match="gloo"), processes.others():
        raise RuntimeError("gloo of another program")


@pytest.mark.slow
def test_the_command_line_trains_on_several_processes(tmp_path, story) -> None:
    def run(command: str, name: str, count: int, *more: str, **variables: str):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        given = ["--text", str(story), "--vocabulary", "300", "--width", "16", "--depth", "2", "--heads", "2"]
        given += ["--context", "16", "--steps", "6", "--evaluate-every", "3", "--checkpoint-every", "3"]
        given += ["--runs", str(tmp_path), "--name", name, "--device", DEVICE, "--eps", "1e-5", *more]
        line = [sys.executable, *(launch if count > 1 else []), "-m", "gramian", command, *given]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        return subprocess.run(line, env=variables, capture_output=True, text=True, timeout=240)

    for name, count, variables in (("one", 1, {}), ("two", 2, {}), ("cut", 2, {processes.FSDP: "true"})):
        done = run("train", name, count, **variables)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("validation loss") == 1
        assert apart(weights(tmp_path / "one"), weights(tmp_path / name)) < CLOSE
    compared = run("compare", "pair", 2, "--blocks", "pre_norm", "sas_p")
    assert compared.returncode == 0, compared.stderr
    assert compared.stdout.count("report:") == 1
    assert apart(weights(tmp_path / "one"), weights(tmp_path / "pair" / "pre_norm")) < CLOSE
    refused = run("train", "two", 2)
    assert refused.returncode != 0
    assert refused.stderr.count("already holds a run") == 1
    odd = run("train", "odd", 2, "--batch", "5")
    assert odd.stderr.count("a batch of 5 cannot be shared by 2 processes") == 1
    assert not (tmp_path / "odd").exists()
