"""Damaged scans: whatever the bytes, a scan is loaded or refused by a sentence."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gramian.errors import InputError, MissingExtraError
from gramian.imaging.geometry import ParallelBeam, evenly
from gramian.imaging.phantoms import shepp_logan, sinogram
from gramian.tasks.scans import Scan, Source

VIEWS = 8
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)
fuzz = settings(deadline=None, max_examples=300, derandomize=True, database=None, suppress_health_check=SLOW)

changes = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "flip", "put", "put", "insert", "remove", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=8),
    ),
    max_size=3,
)


def damaged(whole: bytes, damage: list[tuple[str, float, bytes]]) -> bytes:
    """Change bytes at places that are shares of the length."""
    content = bytearray(whole)
    for kind, share, new in damage:
        at = int(share * len(content))
        if kind == "flip" and content:
            content[at] ^= new[0]
        elif kind == "put":
            content[at : at + len(new)] = new
        elif kind == "insert":
            content[at:at] = new
        elif kind == "remove":
            del content[at : at + len(new)]
        else:
            del content[at:]
    return bytes(content)


@dataclass
class Tally:
    """What became of the examples; a test that only ever sees one of both tests nothing."""

    folder: Path
    loaded: int = 0
    refused: int = 0
    said: set[str] = field(default_factory=set)

    def load(self, **given: Any) -> None:
        scan, said = None, ""
        try:
            scan = Source(**given).load()
        except (InputError, MissingExtraError) as error:
            said = str(error)
        if scan is None:
            self.refused += 1
            self.said.add(said.replace(str(self.folder), "")[:20])
            assert 0 < len(said) < 700
            assert "\n" not in said
        else:
            self.loaded += 1
            assert whole(scan)


def whole(scan: Scan) -> bool:
    """Tell whether a scan has all that a reconstruction needs, in numbers that it can work with."""
    std = torch.as_tensor(scan.noise_std)
    return (
        scan.sinogram.shape == (len(scan.geometry.angles), scan.geometry.detectors)
        and scan.sinogram.dtype == torch.float32
        and bool(scan.sinogram.isfinite().all())
        and bool((std > 0).all() and std.isfinite().all())
        and 0 < scan.peak < float("inf")
        and (scan.truth is None or bool((scan.truth > -1e-6).all()))
    )


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def measured() -> np.ndarray:
    exact = sinogram(shepp_logan(8.0), ParallelBeam(evenly(VIEWS), 8, 12)).numpy()
    return exact + 0.05 * np.random.default_rng(0).standard_normal(exact.shape)


SINOGRAM, ANGLES = npy(measured()), npy(np.array(evenly(VIEWS)))
DEGREES = "\n".join(f"{180 * v / VIEWS:g}" for v in range(VIEWS)).encode()
IMAGE = npy(np.random.default_rng(0).random((8, 8)))


def both(tally: Tally) -> None:
    assert tally.loaded > 10
    assert tally.refused > 10
    assert len(tally.said) > 1


def test_damaged_sinograms(tmp_path_factory: pytest.TempPathFactory) -> None:
    tally = Tally(tmp_path_factory.mktemp("sinograms"))
    path, angles = tally.folder / "y.npy", tally.folder / "angles.npy"
    angles.write_bytes(ANGLES)

    @fuzz
    @given(changes)
    def run(damage: list[tuple[str, float, bytes]]) -> None:
        path.write_bytes(damaged(SINOGRAM, damage))
        tally.load(scan=str(path), angles=angles)

    run()
    both(tally)


def test_damaged_images(tmp_path_factory: pytest.TempPathFactory) -> None:
    tally = Tally(tmp_path_factory.mktemp("images"))
    path = tally.folder / "x.npy"

    @fuzz
    @given(changes, st.sampled_from([None, 1e4]))
    def run(damage: list[tuple[str, float, bytes]], photons: float | None) -> None:
        path.write_bytes(damaged(IMAGE, damage))
        tally.load(scan=str(path), photons=photons, views=4)

    run()
    both(tally)


def test_damaged_dicom(tmp_path_factory: pytest.TempPathFactory) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    tally = Tally(tmp_path_factory.mktemp("dicom"))
    path = tally.folder / "slice.dcm"
    small = pydicom.dcmread(str(get_testdata_file("CT_small.dcm", download=False)))
    small.PixelData = small.pixel_array[40:56, 40:56].tobytes()
    small.Rows = small.Columns = 16
    small.save_as(path)
    content = path.read_bytes()
    once = Source(scan=str(path), size=8).load()
    assert whole(once)

    @fuzz
    @given(changes, st.sampled_from([None, 8]))
    def run(damage: list[tuple[str, float, bytes]], size: int | None) -> None:
        path.write_bytes(damaged(content, damage))
        tally.load(scan=str(path), views=4, size=size)

    run()
    both(tally)


@pytest.mark.parametrize("original", [ANGLES, DEGREES], ids=["array", "text"])
def test_damaged_angles(original: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    tally = Tally(tmp_path_factory.mktemp("angles"))
    path, angles = tally.folder / "y.npy", tally.folder / "angles"
    path.write_bytes(SINOGRAM)

    @fuzz
    @given(changes, st.sampled_from(["auto", "degrees", "radians"]))
    def run(damage: list[tuple[str, float, bytes]], unit: str) -> None:
        angles.write_bytes(damaged(original, damage))
        tally.load(scan=str(path), angles=angles, angle_unit=unit)

    run()
    both(tally)


words = st.text("0123456789.,;-+eEnaif#_ \t\n\r\0٣", max_size=30)


def test_texts_of_angles(tmp_path_factory: pytest.TempPathFactory) -> None:
    tally = Tally(tmp_path_factory.mktemp("texts"))
    path, angles = tally.folder / "y.npy", tally.folder / "angles.txt"
    path.write_bytes(SINOGRAM)

    @fuzz
    @given(words)
    def run(text: str) -> None:
        angles.write_text(text, encoding="utf-8", newline="")
        tally.load(scan=str(path), angles=angles)

    run()
    assert tally.refused > 100


settings_of_a_scan = st.fixed_dictionaries(
    {
        "scan": st.sampled_from(["phantom", "ellipses"]),
        "size": st.integers(1, 40),
        "views": st.integers(0, 40),
    },
    optional={
        "beam": st.sampled_from(["parallel", "fan"]),
        "detectors": st.integers(0, 60),
        "pixel_mm": st.floats(),
        "spacing_mm": st.floats(0.01, 100),
        "offset_mm": st.floats(-100, 100),
        "source_mm": st.floats(0, 1000),
        "detector_mm": st.floats(0, 1000),
        "curved": st.booleans(),
        "noise_db": st.floats(-30, 130),
        "photons": st.floats(0, 1e13),
    },
)


def test_settings(tmp_path_factory: pytest.TempPathFactory) -> None:
    tally = Tally(tmp_path_factory.mktemp("settings"))

    @fuzz
    @given(settings_of_a_scan)
    def run(given: dict[str, Any]) -> None:
        tally.load(**given)

    run()
    both(tally)


settings_of_a_sinogram = st.fixed_dictionaries(
    {},
    optional={
        "beam": st.sampled_from(["parallel", "fan"]),
        "size": st.integers(8, 40),
        "pixel_mm": st.floats(1e-2, 10),
        "spacing_mm": st.floats(1e-2, 10),
        "offset_mm": st.floats(-10, 10),
        "source_mm": st.floats(0, 100),
        "detector_mm": st.floats(0, 100),
        "curved": st.booleans(),
        "noise_std": st.floats(0, 1),
        "angle_unit": st.sampled_from(["auto", "degrees", "radians"]),
    },
)


def test_settings_of_a_sinogram(tmp_path_factory: pytest.TempPathFactory) -> None:
    tally = Tally(tmp_path_factory.mktemp("settings"))
    path, angles = tally.folder / "y.npy", tally.folder / "angles.npy"
    path.write_bytes(SINOGRAM)
    angles.write_bytes(ANGLES)

    @fuzz
    @given(settings_of_a_sinogram)
    def run(given: dict[str, Any]) -> None:
        tally.load(scan=str(path), angles=angles, **given)

    run()
    both(tally)
