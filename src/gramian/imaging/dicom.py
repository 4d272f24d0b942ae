"""CT slices from DICOM files, in Hounsfield units or attenuation, and results written back as DICOM.

No patient is read or written: a result has new identifiers, empty patient fields and no private element.
What it keeps is geometry (pixel size, position, orientation, frame of reference) and the unit of its values.
"""

import io
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError, MissingExtraError
from gramian.files import atomic_file
from gramian.reading import check_regular

WATER = 0.02
"""Attenuation of water per mm at about 65 keV (as in Leuschner, Schmidt, Baguer, Maass 2021)."""
AIR = -1000.0
"""Hounsfield units of air; pixels that the scanner filled in are set to it."""
WINDOW = (-1000.0, 1000.0)
"""Hounsfield units shown as 0 and 1 unless others are asked for."""
UNREAL = 10**8
LARGEST_SIDE = 4096
LARGEST_FILE = 2**28
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
DEFLATED = "1.2.840.10008.1.2.1.99"
FINEST = 12
"""Values are written in steps of 2⁻¹² Hounsfield units or coarser ones."""


@dataclass(frozen=True, eq=False)
class CTSlice:
    """One square image of a CT scan and where it lies.

    Shapes: hounsfield (n, n), row by row downwards as stored.
    """

    hounsfield: Float[Tensor, "n n"]
    pixel_mm: float
    """Side of a pixel."""
    orientation: tuple[float, ...] | None = None
    """Direction cosines of a row and of a column in the patient's frame."""
    position: tuple[float, ...] | None = None
    """Place of the first pixel's centre in the patient's frame, in mm."""
    thickness_mm: float | None = None
    frame_of_reference: str | None = None
    """Identifier of the patient's frame, common to images that can be laid over each other."""


def attenuation(hounsfield: Float[Tensor, "*at"], water: float = WATER) -> Float[Tensor, "*at"]:
    """Return the linear attenuation per mm; nothing attenuates less than air.

        μ = μ_water (1 + HU/1000), at least 0

    Shapes: (*at) -> (*at).
    Raises: InputError for an attenuation of water that is not above 0.
    Holds: exactly.
    """
    return (_positive(water) * (1 + hounsfield / 1000)).clamp(min=0)


def hounsfield(attenuation: Float[Tensor, "*at"], water: float = WATER) -> Float[Tensor, "*at"]:
    """Return Hounsfield units of a linear attenuation per mm.

        HU = 1000 (μ/μ_water − 1)

    Shapes: (*at) -> (*at).
    Raises: InputError for an attenuation of water that is not above 0.
    Holds: exactly, the inverse of `attenuation` from −1000 upwards.
    """
    return 1000 * (attenuation / _positive(water) - 1)


def windowed(hounsfield: Float[Tensor, "*at"], window: tuple[float, float] = WINDOW) -> Float[Tensor, "*at"]:
    """Return an image in [0, 1]: 0 at the window's lower end and below, 1 at its upper end and above.

    Shapes: (*at) -> (*at).
    Raises: InputError for a window without width.
    Holds: exactly.
    """
    low, width = _width(window)
    return ((hounsfield - low) / width).clamp(0, 1)


def unwindowed(image: Float[Tensor, "*at"], window: tuple[float, float] = WINDOW) -> Float[Tensor, "*at"]:
    """Return the Hounsfield units of an image that `windowed` made.

    Shapes: (*at) -> (*at).
    Raises: InputError for a window without width.
    Holds: exactly, inside the window.
    """
    low, width = _width(window)
    return low + width * image


def example_slice() -> CTSlice:
    """Return the CT slice of 128 × 128 pixels that comes with pydicom.

    Raises: MissingExtraError without pydicom.
    """
    _pydicom()
    from pydicom.data import get_testdata_file

    return read_slice(Path(str(get_testdata_file("CT_small.dcm", download=False))))


def read_slice(path: Path) -> CTSlice:
    """Read a CT slice.

        HU = slope · stored + intercept

    Shapes: -> hounsfield (n, n), float32.
    Raises: MissingExtraError without pydicom; InputError for a file that is missing, too large, damaged or no
        DICOM, not computed tomography, compressed in a way that cannot be read here, of several frames, not
        square, without the size of its pixels, or of values that are no Hounsfield units.
    """
    pydicom = _pydicom()
    content = _content(Path(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values against the standard; those that matter are checked
            return _slice(pydicom, content, path)
    except InputError:
        raise
    except Exception as error:  # a damaged file fails anywhere in pydicom, each time in another way
        said = _word(str(error).split(". ")[0], 150) or type(error).__name__
        raise InputError(f"{path} cannot be read as a DICOM image: {said}") from error


def write_slice(path: Path, values: Float[Tensor, "n n"], like: CTSlice, description: str) -> CTSlice:
    """Write an image in Hounsfield units as DICOM secondary capture and return what a reader will see.

    Stored are 16 bits: value = intercept + 2⁻ᵏ · stored, with the finest step 2⁻ᵏ that spans the image.
    Geometry comes from `like`, all identifiers but its frame of reference are new.

    Shapes: values (n, n).
    Raises: MissingExtraError without pydicom; InputError for an image that is not square or not finite, or
        whose size is not that of `like`.
    Holds: exactly for whole multiples of the step, as whole Hounsfield units are for images that span fewer
        than 2¹⁶ of them; within half a step for others.
    """
    pydicom = _pydicom()
    if values.shape != like.hounsfield.shape or not values.isfinite().all():
        raise InputError(
            f"the image has to be {tuple(like.hounsfield.shape)} of finite numbers, not {tuple(values.shape)}"
            + ("" if values.isfinite().all() else " with NaN or infinity")
        )
    stored, slope, intercept = _stored(values.detach().double().cpu().numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = _dataset(pydicom, stored, slope, intercept, like, description)
        with atomic_file(Path(path)) as temporary:
            dataset.save_as(temporary, enforce_file_format=True)
    seen = torch.from_numpy((slope * stored + intercept).astype(np.float32))
    return replace(like, hounsfield=seen)


def _slice(pydicom: Any, content: bytes, path: Path) -> CTSlice:
    if content[128:132] != b"DICM":
        raise InputError(f"{path} is no DICOM file: it lacks the mark DICM after its first 128 bytes")
    meta = pydicom.filereader.read_dataset(
        io.BytesIO(content[132:]), False, True, stop_when=lambda tag, *_: tag.group != 2
    )
    syntax = meta.get("TransferSyntaxUID")
    if syntax == DEFLATED:
        raise InputError(f"{path} is deflated as a whole; store it uncompressed or with compressed pixels")
    dataset = pydicom.dcmread(io.BytesIO(content))
    if dataset.get("Modality") != "CT":
        modality = _word(dataset.get("Modality")) or "not stated"
        raise InputError(f"{path} is no computed tomography: its modality is {modality}")
    _shaped(dataset, path)
    if (syntax := pydicom.uid.UID(str(syntax))).is_compressed and not _decodable(pydicom, syntax):
        raise InputError(
            f"the pixels of {path} are compressed ({_word(syntax.name)}) and no decoder for it is installed; "
            "decompress them, or install pylibjpeg with its plugins"
        )
    stored = dataset.pixel_array
    if stored.shape != (dataset.Rows, dataset.Columns):
        raise InputError(f"{path} announces {dataset.Rows} rows but its pixels are {stored.shape}")
    slope, intercept = _rescale(dataset, path)
    values = torch.from_numpy(stored.astype(np.float64) * slope + intercept)
    if not (values.abs() < UNREAL).all():
        raise InputError(f"{path} holds no Hounsfield units: its rescaled values go beyond ±{UNREAL:,}")
    values[torch.from_numpy(_filled(dataset, stored))] = AIR
    return CTSlice(
        values.float(),
        _spacing(dataset, path),
        _numbers(dataset, "ImageOrientationPatient", 6),
        _numbers(dataset, "ImagePositionPatient", 3),
        (_numbers(dataset, "SliceThickness", 1) or (None,))[0],
        str(dataset.get("FrameOfReferenceUID") or "") or None,
    )


def _shaped(dataset: Any, path: Path) -> None:
    """Refuse before anything is allocated what is not one square grey image of a sane size."""
    frames, samples = (int(dataset.get(name) or 1) for name in ("NumberOfFrames", "SamplesPerPixel"))
    rows, columns = (int(dataset.get(name) or 0) for name in ("Rows", "Columns"))
    photometric = dataset.get("PhotometricInterpretation")
    if frames != 1:
        raise InputError(f"{path} holds {frames} frames; a single slice is accepted")
    if samples != 1 or photometric != "MONOCHROME2":
        raise InputError(
            f"{path} is not grey with high values bright: its photometric interpretation is "
            f"{_word(photometric) or 'missing'} of {samples} samples a pixel; accepted is MONOCHROME2 of 1"
        )
    if rows != columns or rows < 1:
        raise InputError(f"{path} is {rows}x{columns} pixels; square images are accepted")
    if rows > LARGEST_SIDE:
        raise InputError(f"{path} announces {rows} pixels a side; at most {LARGEST_SIDE} are accepted")
    if dataset.get("BitsAllocated") not in (8, 16, 32) or "PixelData" not in dataset:
        raise InputError(f"{path} has no pixels of 8, 16 or 32 bits")


def _decodable(pydicom: Any, syntax: Any) -> bool:
    try:
        return pydicom.pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def _rescale(dataset: Any, path: Path) -> tuple[float, float]:
    slope, intercept = (_numbers(dataset, f"Rescale{name}", 1) for name in ("Slope", "Intercept"))
    unit = dataset.get("RescaleType") or "HU"
    if slope is None or intercept is None or slope[0] == 0 or unit != "HU":
        raise InputError(
            f"{path} does not say how its pixels become Hounsfield units: rescale slope, intercept and the "
            "unit HU are needed"
        )
    return slope[0], intercept[0]


def _spacing(dataset: Any, path: Path) -> float:
    spacing = _numbers(dataset, "PixelSpacing", 2)
    if spacing is None or min(spacing) <= 0:
        raise InputError(f"{path} does not say how large its pixels are: PixelSpacing in mm is needed")
    if not math.isclose(*spacing, rel_tol=1e-3):
        raise InputError(f"the pixels of {path} are {spacing[0]}x{spacing[1]} mm; square pixels are accepted")
    return spacing[0]


def _filled(dataset: Any, stored: np.ndarray) -> np.ndarray:
    """Tell which pixels the scanner filled in where it measured nothing."""
    padding = _numbers(dataset, "PixelPaddingValue", 1)
    if padding is None:
        return np.zeros(stored.shape, bool)
    other = _numbers(dataset, "PixelPaddingRangeLimit", 1) or padding
    low, high = sorted((padding[0], other[0]))
    return (stored >= low) & (stored <= high)


def _numbers(dataset: Any, name: str, count: int) -> tuple[float, ...] | None:
    """Return finite numbers of an element, or None where it is missing, empty or something else."""
    value = dataset.get(name)
    if value is None or value == "":
        return None
    values = tuple(
        map(float, value if isinstance(value, list | tuple) or hasattr(value, "append") else [value])
    )
    return values if len(values) == count and all(map(math.isfinite, values)) else None


def _stored(values: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Return 16-bit numbers with the step and the smallest value that they are counted from."""
    low, high = float(values.min()), float(values.max())
    if not max(abs(low), abs(high)) < UNREAL:
        raise InputError(
            f"values from {low:g} to {high:g} are no Hounsfield units, which lie within ±{UNREAL:,}"
        )
    exponent = math.ceil(math.log2(max((high - low) / (2**16 - 2), 2.0**-FINEST)))
    slope = 2.0**exponent
    intercept = math.floor(low / slope) * slope
    return np.rint((values - intercept) / slope).astype(np.uint16), slope, intercept


def _dataset(
    pydicom: Any, stored: np.ndarray, slope: float, intercept: float, like: CTSlice, description: str
) -> Any:
    new = pydicom.uid.generate_uid
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    elements: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["DERIVED", "SECONDARY"],
        "SOPClassUID": SECONDARY_CAPTURE,
        "SOPInstanceUID": new(),
        "StudyInstanceUID": new(),
        "SeriesInstanceUID": new(),
        "FrameOfReferenceUID": like.frame_of_reference or new(),
        "PositionReferenceIndicator": "",
        "Modality": "CT",
        "ConversionType": "WSD",
        "Manufacturer": "gramian",
        "DerivationDescription": description[:1024],
        **dict.fromkeys(("PatientName", "PatientID", "PatientBirthDate", "PatientSex"), ""),
        **dict.fromkeys(("StudyDate", "StudyTime", "StudyID", "AccessionNumber"), ""),
        "ReferringPhysicianName": "",
        "SeriesNumber": 1,
        "InstanceNumber": 1,
        "SliceThickness": None if like.thickness_mm is None else _decimal(like.thickness_mm),
        "ImagePositionPatient": like.position and [_decimal(x) for x in like.position],
        "ImageOrientationPatient": like.orientation and [_decimal(x) for x in like.orientation],
        "PixelSpacing": [_decimal(like.pixel_mm)] * 2,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
        "RescaleSlope": _decimal(slope),
        "RescaleIntercept": _decimal(intercept),
        "RescaleType": "HU",
        "PixelData": stored.astype("<u2").tobytes(),
    }
    for name, value in elements.items():
        if value is not None:
            setattr(dataset, name, value)
    dataset["PixelData"].VR = "OW"
    return dataset


def _word(value: object, longest: int = 40) -> str:
    """Return what a file says, fit for one line."""
    return "".join(c if c.isprintable() else " " for c in str(value or ""))[:longest].strip()


def _decimal(value: float) -> str:
    """Return a decimal string of at most 16 characters, as exact as fits."""
    for digits in range(17, 0, -1):
        if len(text := f"{value:.{digits}g}") <= 16:
            return text
    raise InputError(f"{value} does not fit a DICOM decimal string")


def _content(path: Path) -> bytes:
    check_regular(path)
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise InputError(f"{path} is {size:,} bytes; at most {LARGEST_FILE:,} are accepted for one slice")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.filereader
        import pydicom.pixels
        import pydicom.uid
    except ImportError as error:
        raise MissingExtraError('reading DICOM needs pydicom: pip install "gramian[ct]"') from error
    return pydicom


def _positive(water: float) -> float:
    if not 0 < water < math.inf:
        raise InputError(f"the attenuation of water has to be above 0 per mm, not {water}")
    return water


def _width(window: tuple[float, float]) -> tuple[float, float]:
    low, high = window
    if not 0 < high - low < math.inf:
        raise InputError(
            f"a window has to go from a smaller to a larger number of Hounsfield units, not {window}"
        )
    return low, high - low
