"""The files of a reconstruction: units, pictures, DICOM, and the image that is kept when a fit is stopped."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from gramian.core.predictive import Predictive
from gramian.errors import StoppedError
from gramian.imaging.dicom import WATER, CTSlice, hounsfield, read_slice
from gramian.imaging.geometry import ParallelBeam, evenly, padded
from gramian.tasks import reconstruct
from gramian.tasks.field_fits import Fit, best_members
from gramian.tasks.observed_views import observe
from gramian.tasks.reconstruct import ReconstructConfig
from gramian.tasks.reconstruction_files import white, write_doubt, write_image
from gramian.tasks.scans import Scan, Source
from gramian.train.loop import Trainer

SIDE, PEAK = 16, 0.05


def scanned(*, dicom: bool = False, truth: bool = False) -> Scan:
    """Return a scan of attenuation, with what its files are made of alone."""
    image = torch.linspace(0, 0.03, SIDE * SIDE).reshape(SIDE, SIDE)
    there = CTSlice(hounsfield(image), 1.5, (1.0, 0, 0, 0, 1, 0), (-3.0, 4.0, 5.0), 2.0, "1.2.3")
    beam = ParallelBeam(evenly(6), SIDE, padded(SIDE), pixel_mm=1.5, spacing_mm=1.5)
    return Scan(
        "slice", beam, torch.ones(6, padded(SIDE)), 0.1, "Gaussian", PEAK, "1/mm",
        image if truth else None, there if dicom else None, (),
    )  # fmt: skip


def image(top: float = 1.0) -> torch.Tensor:
    return top * torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., 0]


def test_arrays_are_in_the_unit_of_the_scan_and_pictures_grey(tmp_path: Path) -> None:
    values = image(0.8)
    write_image(tmp_path, scanned(), values, "by hand")
    saved = np.load(tmp_path / "image.npy", allow_pickle=False)
    assert saved.dtype == np.float32
    np.testing.assert_allclose(saved, PEAK * values.numpy(), rtol=1e-6)
    top = white(scanned(), values)
    assert top == pytest.approx(PEAK * float(values.max()))
    np.testing.assert_allclose(pixels(tmp_path / "image.png"), saved / top, atol=0.501 / 255)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.npy", "image.png"]


def test_white_is_the_largest_value_of_the_truth() -> None:
    assert white(scanned(truth=True), image()) == pytest.approx(0.03)
    assert white(scanned(), torch.zeros(SIDE, SIDE)) == PEAK  # nothing there: any scale, but not an empty one


def test_doubt_is_deviations_and_the_interval(tmp_path: Path) -> None:
    samples = torch.stack([image() + 0.01 * k for k in range(40)])
    law = Predictive.from_samples(samples)
    write_doubt(tmp_path, scanned(), law, "by hand")
    std, lower, upper = (np.load(tmp_path / f"{name}.npy") for name in ("std", "lower", "upper"))
    np.testing.assert_allclose(std, PEAK * samples.std(0).numpy(), rtol=1e-5)
    low, high = law.interval(0.95)
    np.testing.assert_allclose([lower, upper], PEAK * torch.stack([low, high]).numpy(), rtol=1e-6)
    assert float(pixels(tmp_path / "std.png").max()) == 1
    assert not (tmp_path / "std.dcm").exists()


def test_dicom_is_in_hounsfield_units_with_the_geometry_of_the_input(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    scan, samples = scanned(dicom=True), torch.stack([image() for _ in range(2)])
    samples[1] += 0.1
    write_image(tmp_path, scan, samples[0], "by hand")
    write_doubt(tmp_path, scan, Predictive.from_samples(samples), "by hand")
    read = read_slice(tmp_path / "image.dcm")
    step = 2.0**-4
    torch.testing.assert_close(read.hounsfield, hounsfield(samples[0] * PEAK), atol=step, rtol=0)
    assert (read.pixel_mm, read.position, read.frame_of_reference) == (1.5, (-3.0, 4.0, 5.0), "1.2.3")
    deviation = 1000 * 0.1 / 2**0.5 * PEAK / WATER  # without the −1000 of a value
    spread = read_slice(tmp_path / "std.dcm").hounsfield
    torch.testing.assert_close(spread, torch.full_like(spread, deviation), atol=step, rtol=0)
    said = pydicom.dcmread(tmp_path / "std.dcm").DerivationDescription
    assert said == "standard deviation of a CT image reconstructed from 6 views, by hand"
    assert pydicom.dcmread(tmp_path / "image.dcm").SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"


CONFIG = ReconstructConfig(
    source=Source(size=16, views=12), compare=(), fit=Fit(steps=20, finish=0.5, device="cpu")
)


@pytest.mark.parametrize(("stage", "step"), [(20, 6), (10, 3)], ids=["fit", "finish"])
def test_a_stop_keeps_the_best_image_so_far(tmp_path: Path, monkeypatch, stage: int, step: int) -> None:
    advance = Trainer.advance

    def stopping(trainer: Trainer, steps: int) -> None:
        advance(trainer, steps)
        if trainer.settings.steps == stage and trainer.step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "advance", stopping)
    observed = observe(CONFIG.source.load(), held_out=0.2)
    console = Console(quiet=True)
    with pytest.raises(StoppedError, match="stopped by SIGINT"):
        reconstruct.reconstructed(CONFIG, observed, tmp_path, console)
    part = tmp_path / ("fit" if stage == 20 else "finish")
    with torch.no_grad():
        best = best_members(CONFIG.job, observed, part)(1).mean(0)
    np.testing.assert_allclose(np.load(tmp_path / "image.npy"), best.numpy(), rtol=1e-6)
    assert (tmp_path / "image.png").exists()
    assert not (tmp_path / "result.json").exists()


def test_a_stop_before_anything_was_found_keeps_nothing(tmp_path: Path, monkeypatch) -> None:
    def stopped(*_) -> None:
        raise StoppedError("stopped")

    monkeypatch.setattr(reconstruct, "fit", stopped)
    observed = observe(CONFIG.source.load(), held_out=0.2)
    with pytest.raises(StoppedError):
        reconstruct.reconstructed(CONFIG, observed, tmp_path, Console(quiet=True))
    assert list(tmp_path.iterdir()) == []
