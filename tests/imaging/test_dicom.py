"""Slices from DICOM: what is read and written, and what is refused, by one sentence each."""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gramian.errors import InputError
from gramian.imaging.arrays import read_array
from gramian.imaging.dicom import (
    AIR,
    CTSlice,
    attenuation,
    example_slice,
    hounsfield,
    read_slice,
    unwindowed,
    windowed,
    write_slice,
)

pydicom = pytest.importorskip("pydicom")
from pydicom.data import get_testdata_file  # noqa: E402

EXAMPLE = str(get_testdata_file("CT_small.dcm", download=False))
F64 = torch.float64


def dataset() -> Any:
    return pydicom.dcmread(EXAMPLE)


def test_the_example_is_read_as_it_says() -> None:
    found, expected = example_slice(), dataset()
    values = expected.pixel_array.astype(np.float32) * float(expected.RescaleSlope)
    np.testing.assert_array_equal(found.hounsfield.numpy(), values + float(expected.RescaleIntercept))
    assert found.hounsfield.shape == (128, 128)
    assert found.pixel_mm == 0.661468
    assert found.orientation == (1, 0, 0, 0, 1, 0)
    assert found.position == (-158.135803, -179.035797, -75.699997)
    assert found.thickness_mm == 5
    assert found.frame_of_reference == expected.FrameOfReferenceUID
    air, tissue = float(found.hounsfield[0, 0]), float(found.hounsfield.median())
    assert air < -700
    assert -200 < tissue < 200


def test_units_have_their_inverses() -> None:
    values = torch.tensor([-1000.0, 0.0, 1000.0], dtype=F64)
    torch.testing.assert_close(attenuation(values, 0.019), torch.tensor([0, 0.019, 0.038], dtype=F64))
    torch.testing.assert_close(hounsfield(attenuation(values, 0.019), 0.019), values)
    assert not torch.allclose(hounsfield(attenuation(values, 0.019), 0.02), values)  # control
    assert float(attenuation(torch.tensor(-3000.0))) == 0
    window = (-160.0, 240.0)
    torch.testing.assert_close(unwindowed(windowed(values, window), window), values.clamp(*window))
    assert windowed(values).tolist() == [0, 0.5, 1]


def test_what_is_written_is_read_exactly(tmp_path: Path) -> None:
    source, path = example_slice(), tmp_path / "result.dcm"
    seen = write_slice(path, source.hounsfield, source, "as it was")
    found = read_slice(path)
    assert torch.equal(found.hounsfield, source.hounsfield)  # whole numbers lose nothing
    assert torch.equal(seen.hounsfield, found.hounsfield)
    for name in ("pixel_mm", "orientation", "position", "thickness_mm", "frame_of_reference"):
        assert getattr(found, name) == getattr(source, name)
    rough = source.hounsfield + torch.rand(128, 128, generator=torch.Generator().manual_seed(0))
    seen = write_slice(path, rough, source, "with fractions")
    found = read_slice(path)
    assert torch.equal(seen.hounsfield, found.hounsfield)
    step = float(pydicom.dcmread(path).RescaleSlope)
    assert 0 < step <= 2**-4
    assert float((found.hounsfield - rough).abs().max()) <= step / 2 * (1 + 1e-4)
    assert not torch.equal(found.hounsfield, rough)  # control
    again = tmp_path / "again.dcm"
    write_slice(again, found.hounsfield, found, "the same")
    assert torch.equal(read_slice(again).hounsfield, found.hounsfield)


@pytest.mark.parametrize("values", [0.0, -1000.0, 12.375, 3e5])
def test_images_of_one_value_are_written(values: float, tmp_path: Path) -> None:
    like = CTSlice(torch.zeros(3, 3), 0.7)
    image = torch.full((3, 3), values)
    write_slice(tmp_path / "flat.dcm", image, like, "flat")
    found = read_slice(tmp_path / "flat.dcm")
    assert torch.equal(found.hounsfield, image)
    assert (found.orientation, found.position, found.thickness_mm) == (None, None, None)


def test_a_result_is_a_derived_secondary_capture_without_a_patient(tmp_path: Path) -> None:
    path, source = tmp_path / "result.dcm", dataset()
    write_slice(path, example_slice().hounsfield, example_slice(), "few views, total variation")
    written = pydicom.dcmread(path)
    assert written.file_meta.MediaStorageSOPClassUID == pydicom.uid.SecondaryCaptureImageStorage
    assert written.SOPClassUID == pydicom.uid.SecondaryCaptureImageStorage
    assert written.ImageType[0] == "DERIVED"
    assert written.DerivationDescription == "few views, total variation"
    assert written.RescaleType == "HU"
    for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        assert written[name].value != source[name].value
        assert pydicom.uid.UID(written[name].value).is_valid
    assert source.PatientName != ""
    for name in ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber"):
        assert written[name].value in ("", None)
    assert any(element.tag.is_private for element in source)
    assert not any(element.tag.is_private for element in written)
    assert b"CompressedSamples" not in path.read_bytes()
    assert [one.name for one in tmp_path.iterdir()] == ["result.dcm"]  # no temporary file


def test_a_failed_write_leaves_what_stood_there(tmp_path: Path) -> None:
    path, source = tmp_path / "result.dcm", example_slice()
    write_slice(path, source.hounsfield, source, "first")
    before = path.read_bytes()
    with pytest.raises(InputError, match="NaN"):
        write_slice(path, source.hounsfield * float("nan"), source, "second")
    assert path.read_bytes() == before


def test_padding_is_air(tmp_path: Path) -> None:
    given = dataset()
    given.PixelPaddingValue = int(given.pixel_array[64, 64])
    given.save_as(tmp_path / "padded.dcm")
    found = read_slice(tmp_path / "padded.dcm").hounsfield
    assert float(found[64, 64]) == AIR
    assert float(example_slice().hounsfield[64, 64]) != AIR  # control


def test_run_length_is_read(tmp_path: Path) -> None:
    packed = dataset()
    packed.compress(pydicom.uid.RLELossless)
    packed.save_as(tmp_path / "packed.dcm")
    assert torch.equal(read_slice(tmp_path / "packed.dcm").hounsfield, example_slice().hounsfield)


def erase(name: str) -> Callable[[Any], None]:
    return lambda d: delattr(d, name)


def put(**values: object) -> Callable[[Any], None]:
    def change(d: Any) -> None:
        for name, value in values.items():
            setattr(d, name, value)

    return change


def compressed(d: Any) -> None:
    d.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    d.PixelData = pydicom.encaps.encapsulate([d.PixelData])
    d["PixelData"].is_undefined_length = True


def deflated(d: Any) -> None:
    d.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "no spacing": (erase("PixelSpacing"), "PixelSpacing"),
    "spacing of 0": (put(PixelSpacing=[0, 0]), "PixelSpacing"),
    "oblong pixels": (put(PixelSpacing=[0.5, 0.6]), "0.5x0.6 mm"),
    "several frames": (put(NumberOfFrames=2), "2 frames"),
    "not square": (put(Rows=64, Columns=256), "64x256"),
    "no rows": (erase("Rows"), "0x128"),
    "huge": (put(Rows=65535, Columns=65535), "at most 4096"),
    "more than there is": (put(Rows=4096, Columns=4096), "cannot be read as a DICOM image"),
    "another modality": (put(Modality="MR"), "modality is MR"),
    "no modality": (erase("Modality"), "not stated"),
    "dark is bright": (put(PhotometricInterpretation="MONOCHROME1"), "MONOCHROME1"),
    "colour": (put(PhotometricInterpretation="RGB", SamplesPerPixel=3), "RGB of 3 samples"),
    "no slope": (erase("RescaleSlope"), "rescale slope"),
    "slope of 0": (put(RescaleSlope=0), "rescale slope"),
    "slope beyond reason": (put(RescaleSlope="1e300"), "no Hounsfield units"),
    "another unit": (put(RescaleType="OD"), "the unit HU"),
    "no pixels": (erase("PixelData"), "has no pixels"),
    "odd bits": (put(BitsAllocated=12), "8, 16 or 32 bits"),
    "a film": (compressed, "no decoder"),
    "deflated": (deflated, "deflated"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_what_cannot_be_used_is_refused_by_a_sentence(name: str, tmp_path: Path) -> None:
    change, said = REFUSED[name]
    given = dataset()
    change(given)
    path = tmp_path / "given.dcm"
    given.save_as(path, enforce_file_format=False)
    with pytest.raises(InputError, match=said) as caught:
        read_slice(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 100, 132, 200, 1000, 20_000, 39_000])
def test_truncated_files_are_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "short.dcm"
    path.write_bytes(Path(EXAMPLE).read_bytes()[:length])
    with pytest.raises(InputError, match=r"short\.dcm"):
        read_slice(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.dcm", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_slice(path)
    with pytest.raises(InputError, match="Hounsfield"):
        write_slice(tmp_path / "x.dcm", torch.full((2, 2), 1e12), CTSlice(torch.zeros(2, 2), 1.0), "x")
    with pytest.raises(InputError, match="has to be"):
        write_slice(tmp_path / "x.dcm", torch.zeros(3, 3), CTSlice(torch.zeros(2, 2), 1.0), "x")
    with pytest.raises(InputError, match="window"):
        windowed(torch.zeros(1), (1.0, 1.0))
    with pytest.raises(InputError, match="attenuation of water"):
        attenuation(torch.zeros(1), 0.0)


def damaged(whole: bytes, rng: np.random.Generator, header: int) -> bytes:
    """Overwrite, insert, remove or cut, mostly in the header."""
    content = bytearray(whole)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(0, min(header, len(content)) if rng.random() < 0.9 else len(content)))
        kind = rng.integers(0, 4)
        if kind == 0:
            content[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            content[at : at + 4] = rng.bytes(4)
        elif kind == 2:
            content[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            del content[at : at + int(rng.integers(1, 9))]
    return bytes(content[: int(rng.integers(1, len(content)))] if rng.random() < 0.15 else content)


def outcome(read: Callable[[], torch.Tensor]) -> bool:
    """Tell whether a file was read; anything but a tensor or a sentence is an error of the test."""
    said, values = None, torch.zeros(1)
    try:
        values = read()
    except InputError as error:
        said = str(error)
    if said is not None:
        assert "\n" not in said
        assert len(said) < 600
        return False
    assert values.isfinite().all()
    return True


def small(tmp_path: Path) -> bytes:
    """A slice of few pixels with sequences and private elements, so that damage meets structure."""
    given = dataset()
    given.Rows = given.Columns = 8
    given.PixelData = given.PixelData[:128]
    given.save_as(tmp_path / "small.dcm")
    return (tmp_path / "small.dcm").read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_damaged_dicom_is_read_or_refused(seed: int, tmp_path: Path) -> None:
    rng, path, whole = np.random.default_rng(seed), tmp_path / "damaged.dcm", small(tmp_path)
    plain = write_slice(path, torch.ones(8, 8), CTSlice(torch.zeros(8, 8), 1.0), "x") and path.read_bytes()
    outcomes = []
    for turn in range(100):
        path.write_bytes(damaged(whole if turn % 2 else plain, rng, 1500))
        outcomes.append(outcome(lambda: read_slice(path).hounsfield))
    assert not all(outcomes)
    assert any(outcomes)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_numpy_files_are_read_or_refused(seed: int, tmp_path: Path) -> None:
    rng, path, stream = np.random.default_rng(seed), tmp_path / "damaged.npy", io.BytesIO()
    np.save(stream, np.arange(24.0).reshape(4, 6))
    outcomes = []
    for _ in range(150):
        path.write_bytes(damaged(stream.getvalue(), rng, 320))
        outcomes.append(outcome(lambda: read_array(path, 2)))
    assert not all(outcomes)
    assert any(outcomes)


def header(text: str, data: bytes = b"") -> bytes:
    line = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(line)) + line + data


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (100000, 1000000)}"), "cannot be read"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 2)}", bytes(31)), "cannot be read"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (2,)}", bytes(64)), "damaged"),
        (header("{'descr': '<c8', 'fortran_order': False, 'shape': (2, 1)}", bytes(16)), "real numbers"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}", bytes(16)), "of 2 axes"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (1, 1)}", b"\xff" * 8), "finite"),
        (header("__import__('os').abort()"), "cannot be read"),
        (header("(" * 100), "cannot be read"),
        (b"PK\x03\x04", "no .npy file"),
        (b"", "no .npy file"),
        (b"not an array", "no .npy file"),
    ],
)
def test_numpy_files_that_cannot_be_used(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.npy"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_array(path, 2)


def test_numpy_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    for dtype, kept in (
        ("f8", torch.float64),
        ("f4", torch.float32),
        ("u1", torch.float32),
        (">i2", torch.float32),
    ):
        values = np.arange(6).reshape(2, 3).astype(dtype)
        np.save(path, np.asfortranarray(values) if dtype == "f4" else values)
        found = read_array(path, 2)
        assert found.dtype == kept
        assert torch.equal(found.double(), torch.arange(6.0, dtype=F64).view(2, 3))
    with pytest.raises(InputError, match=r"absent\.npy"):
        read_array(tmp_path / "absent.npy")
    np.savez(tmp_path / "many.npz", values)
    with pytest.raises(InputError, match="mark of one array"):
        read_array(tmp_path / "many.npz")


def test_an_array_whose_header_would_not_fit_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for version in (2, 3):
        path.write_bytes(b"\x93NUMPY" + bytes((version, 0)) + b"\xff\xff\xff\xff{'descr': '<f8'}")
        with pytest.raises(InputError, match="its header is too long"):
            read_array(path)


def test_an_array_that_numpy_crashes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for shape, kind in (("(-1,)", "|V0"), ("(-1,)", "<f8"), ("(3,)", "|S0")):
        header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(24))
        with pytest.raises(InputError, match="an array"):
            read_array(path)
