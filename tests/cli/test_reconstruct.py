"""`gramian reconstruct` from arguments to exit code: what it prints and writes, how it stops and refuses."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gramian.cli.main import run
from gramian.imaging.geometry import ParallelBeam, evenly
from gramian.imaging.noise import GaussianNoise
from gramian.imaging.phantoms import shepp_logan, sinogram
from gramian.tasks import classical_choice
from gramian.tasks.scans import Source
from gramian.train.loop import Trainer

QUICK = ["--steps", "20", "--samples", "6", "--compare", "fbp", "--device", "cpu"]
SMALL = ["--size", "24", "--views", "20"]
IMAGES = ["image.npy", "image.png"]
DOUBT = ["lower.npy", "std.npy", "std.png", "upper.npy"]


@pytest.fixture(autouse=True)
def few_iterations_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classical_choice, "SEEK", 10)


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return ["--runs", str(tmp_path / "runs")]


def found(folder: Path) -> dict:
    """Return the numbers of a run without times."""
    numbers = json.loads((folder / "result.json").read_text())
    for method in numbers["methods"]:
        del method["seconds"]
    return {name: value for name, value in numbers.items() if name != "seconds"}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".npy", ".png", ".dcm"))


def measured(folder: Path) -> list[str]:
    """Write a sinogram with its angles and return them as arguments."""
    beam = ParallelBeam(evenly(20), 24, 34)
    exact = sinogram(shepp_logan(24.0), beam)
    noisy = GaussianNoise.at_snr(exact, 40).sample(exact, torch.Generator().manual_seed(0))
    np.save(folder / "y.npy", noisy.numpy())
    np.savetxt(folder / "angles.txt", beam.theta.rad2deg().numpy())
    return [str(folder / "y.npy"), "--angles", str(folder / "angles.txt"), "--size", "24"]


def test_it_prints_writes_and_keeps_what_is_there(runs, tmp_path: Path, capsys) -> None:
    arguments = ["reconstruct", *SMALL, *QUICK, *runs, "--name", "head"]
    assert run(arguments) == 0
    said, folder = capsys.readouterr().out, tmp_path / "runs" / "head"
    for words in (
        "PSNR", "SSIM", "unseen misfit", "field, dropout", "fbp",
        "Shepp–Logan phantom: 20 views of 34 detectors",
        "2 views that the image was not fitted to",
        "95 % intervals hold",
        "its margin is tuned on the truth",
        "Error bars are checked along rays only",
        f"image: {folder}/image.npy",
        f"standard deviation: {folder}/std.npy",
        f"report: {folder}/report.html",
    ):  # fmt: skip
        assert words in said
    assert files(folder) == sorted(IMAGES + DOUBT)
    image, lower, upper = (np.load(folder / f"{name}.npy") for name in ("image", "lower", "upper"))
    assert image.shape == (24, 24)
    assert ((lower <= image) & (image <= upper)).all()
    before = found(folder)
    assert before["methods"][0]["name"] == "field, dropout"
    assert run(arguments) == 1
    assert "already holds a run; pass --resume" in capsys.readouterr().err
    assert run([*arguments, "--resume", "--width", "32"]) == 1
    assert "resume with the same settings" in capsys.readouterr().err
    assert run([*arguments, "--resume"]) == 0
    assert "hash: step" not in capsys.readouterr().out  # nothing was fitted again
    assert found(folder) == before
    assert run([*arguments, "--overwrite", "--seed", "3", "--fit-seed", "5"]) == 0
    settings = json.loads((folder / "settings.json").read_text())["settings"]
    assert (settings["source"]["seed"], settings["fit"]["seed"]) == (3, 5)
    assert found(folder) != before


def test_a_measured_sinogram(runs, tmp_path: Path, capsys) -> None:
    assert run(["reconstruct", *measured(tmp_path), *QUICK, *runs]) == 0
    said, folder = capsys.readouterr().out, tmp_path / "runs" / "reconstruct"
    assert "PSNR" not in said
    assert "The truth is not known, so there are no scores of the image; unseen views alone judge it." in said
    assert "unseen misfit" in said
    assert files(folder) == sorted(IMAGES + DOUBT)
    numbers = found(folder)
    assert numbers["doubt"] is None
    assert numbers["unseen"]["chi_square"] > 0


def test_an_image_without_uncertainty(runs, tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "image.npy", np.pad(np.random.default_rng(0).random((16, 16)), 4))
    arguments = [str(tmp_path / "image.npy"), "--pixel-mm", "2", "--views", "20", "--uncertainty", "none"]
    assert run(["reconstruct", *arguments, *QUICK, *runs]) == 0
    said, folder = capsys.readouterr().out, tmp_path / "runs" / "reconstruct"
    assert "24 × 24 pixels of 2 mm" in said.replace("2.00", "2")
    assert "--uncertainty dropout gives error bars" in said
    assert "standard deviation:" not in said
    assert files(folder) == IMAGES


def test_a_slice_comes_back_as_dicom(runs, tmp_path: Path, capsys) -> None:
    pytest.importorskip("pydicom")
    from gramian.imaging.dicom import WATER, example_slice, hounsfield, read_slice

    arguments = ["example", "--size", "32", "--views", "20"]
    assert run(["reconstruct", *arguments, *QUICK, *runs]) == 0
    capsys.readouterr()
    folder = tmp_path / "runs" / "reconstruct"
    assert files(folder) == sorted([*IMAGES, *DOUBT, "image.dcm", "std.dcm"])
    image, std = read_slice(folder / "image.dcm"), read_slice(folder / "std.dcm")
    given = example_slice()
    assert image.pixel_mm == pytest.approx(4 * given.pixel_mm)
    assert image.orientation == given.orientation
    values = torch.from_numpy(np.load(folder / "image.npy"))
    torch.testing.assert_close(image.hounsfield, hounsfield(values), atol=0.1, rtol=0)
    deviations = torch.from_numpy(np.load(folder / "std.npy"))
    torch.testing.assert_close(std.hounsfield, 1000 * deviations / WATER, atol=0.1, rtol=0)
    assert found(folder)["scan"]["unit"] == "1/mm"


def test_chains_on_pixels(runs, tmp_path: Path, capsys) -> None:
    chains = ["--method", "pixels", "--uncertainty", "hmc", "--warmup", "5", "--max-depth", "2"]
    arguments = [*SMALL, *QUICK, *chains, "--samples", "8", "--thinning", "1"]
    assert run(["reconstruct", *arguments, *runs]) == 0
    said = capsys.readouterr().out
    assert "A grid of pixels of 576 parameters" in said
    assert "Chains: R̂ of pixels is" in said
    assert "pixels, hmc" in said
    assert found(tmp_path / "runs" / "reconstruct")["notes"]["acceptance"] > 0


def test_a_classical_method_alone(runs, tmp_path: Path, capsys) -> None:
    arguments = [*SMALL, "--method", "sirt", "--compare", "fbp", "sirt"]
    assert run(["reconstruct", *arguments, *runs]) == 0
    said, folder = capsys.readouterr().out, tmp_path / "runs" / "reconstruct"
    assert said.count("\n sirt") == 1
    assert (
        "Settings of classical methods were chosen by views that were left out, not by the truth: sirt"
        in said
    )
    assert files(folder) == IMAGES
    assert found(folder)["chosen"]["sirt"]["iterations"] > 1


def test_a_comparison_that_a_scan_does_not_allow_is_left_out(runs, tmp_path: Path, capsys) -> None:
    _, *rest = measured(tmp_path)
    np.savetxt(tmp_path / "angles.txt", np.linspace(0, 200, 20))
    fan = ["--beam", "fan", "--source-mm", "300", "--detector-mm", "0"]
    arguments = [str(tmp_path / "y.npy"), *rest, *fan, *QUICK]
    assert run(["reconstruct", *arguments, *runs]) == 0
    said = capsys.readouterr().out
    assert "note: fbp is left out: filtered back-projection of a fan beam needs angles" in said
    assert "field, dropout" in said


def test_a_stopped_run_goes_on_to_the_same_numbers(runs, tmp_path: Path, capsys, monkeypatch) -> None:
    arguments = ["reconstruct", *SMALL, *QUICK, *runs]
    assert run([*arguments, "--name", "whole"]) == 0
    capsys.readouterr()
    folder = tmp_path / "runs" / "stopped"
    advance = Trainer.advance
    for stage, step in ((20, 7), (10, 2)):  # of the fit, of its finish

        def stopping(trainer: Trainer, steps: int, stage: int = stage, step: int = step) -> None:
            advance(trainer, steps)
            if trainer.settings.steps == stage and trainer.step == step:
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "advance", stopping)
            assert run([*arguments, "--name", "stopped", "--resume"]) == 130
        said = capsys.readouterr()
        assert f"stopped by SIGINT and saved: hash at step {step}; go on with --resume" in said.err
        assert f"image so far: {folder}/image.npy" in said.out
        assert files(folder) == IMAGES
        assert not (folder / "result.json").exists()
    assert run([*arguments, "--name", "stopped", "--resume"]) == 0
    assert found(folder) == found(folder.parent / "whole")
    for name in ("image.npy", "std.npy", "lower.npy"):
        assert (folder / name).read_bytes() == (folder.parent / "whole" / name).read_bytes()


def test_a_signal_to_the_program_keeps_the_image(runs, tmp_path: Path) -> None:
    arguments = ["reconstruct", *SMALL, *runs, "--compare", "--steps", "100000", "--device", "cpu"]
    program = "import sys; from gramian.cli.main import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        folder = tmp_path / "runs" / "reconstruct"
        deadline = time.monotonic() + 60
        while not (folder / "fit" / "best.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by SIGINT and saved" in error
    assert "image so far" in out
    assert "Traceback" not in error
    assert files(folder) == IMAGES


def test_a_stop_while_reading_leaves_nothing(runs, tmp_path: Path, capsys, monkeypatch) -> None:
    def stop(_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Source, "load", stop)
    assert run(["reconstruct", *SMALL, *QUICK, *runs]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["reconstruct", "--help"])
    assert ended.value.code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for words in (
        "--method", "--compare", "--uncertainty", "--samples", "--views", "--noise-db", "--angles", "--seed",
        "--fit-seed", "--depth", "--max-depth", "--held-out", "--resume", "--overwrite",
    ):  # fmt: skip
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "there is no file nothing"),
        (["--method", "magic"], "unknown method 'magic'"),
        (["--compare", "magic"], "unknown method 'magic'"),
        (["--compare", "field"], "unknown method 'field'"),
        (["--compare", "fbp", "fbp"], "every method is compared once"),
        (["--uncertainty", "magic"], "knows no uncertainty 'magic'"),
        (["--method", "pixels"], "a grid of pixels knows no uncertainty 'dropout'"),
        (["--encoding", "magic"], "unknown encoding 'magic'"),
        (["--dropout", "0"], "an uncertainty by dropout needs a rate of dropout above 0"),
        (["--dropout", "1"], "dropout"),
        (["--samples", "1"], "samples must be at least 2"),
        (["--members", "1", "--uncertainty", "ensemble"], "members must be at least 2"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--variation", "-1"], "the weight of total variation has to be"),
        (["--held-out", "0.6"], "held_out is a share from 0 to below ½"),
        (["--tails", "2"], "more than 2 degrees of freedom, not 2"),
        (["--tails", "inf"], "a finite number of more than 2 degrees of freedom, not inf"),
        (["--views", "4"], "needs at least 5 views, not 4"),
        (["--views", "0"], "views has to be from 1"),
        (["--beam", "cone"], "unknown beam 'cone'"),
        (["--angles", "angles.txt"], "angles are for a sinogram in .npy, not for phantom"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--precision", "fp8"], "unknown precision 'fp8'"),
        (["--name", "../a"], "a run's name must be a plain folder name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_settings_are_one_sentence_and_leave_nothing(
    runs, tmp_path: Path, capsys, arguments, words
) -> None:
    assert run(["reconstruct", *SMALL, *QUICK, *runs, *arguments]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("gramian: ")
    assert words in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(runs, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "runs" / "reconstruct"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert run(["reconstruct", *SMALL, *QUICK, *runs, "--overwrite"]) == 1
    assert "holds files that are no run" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
