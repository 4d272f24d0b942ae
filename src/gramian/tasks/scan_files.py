"""What the files of a scan hold: images to be projected, measured sinograms, and angles of their views."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.arrays import MARK, read_array
from gramian.imaging.dicom import LARGEST_FILE, LARGEST_SIDE, CTSlice, example_slice, read_slice
from gramian.imaging.geometry import LARGEST

T = TypeVar("T")

MADE = ("phantom", "ellipses")
"""Scans of objects whose sinograms are known in closed form."""
EXAMPLE = "example"
UNITS = ("auto", "degrees", "radians")
SMALLEST = 8
"""Pixels a side of the smallest image."""
MOST = 20_000
"""Views, and detectors, of the largest scan."""
TURNS = 10
"""Whole turns to either side that angles in degrees may reach."""
LARGEST_TEXT = 2**20
"""Bytes of the largest text file of angles."""
NARROWEST = math.pi / 2
"""Angles over a smaller arc are hardly ever radians."""
ROUND = 0.05
"""Angles in radians are hardly ever all multiples of this."""
MAGNITUDES = (1e-12, 1e12)
"""Between which the greatest value of an image or a sinogram may lie."""
SIGMAS, SHARE = 6.0, 0.01
"""Negative values beyond so many standard deviations and this share of the greatest value are no noise."""
ROUNDED = 1e-3
"""Share of an image's greatest value below which a negative one counts as 0."""
LOW_QUARTER = 0.3186393639643752
"""Φ⁻¹(5/8): a quarter of all standard normal numbers are nearer to 0."""
QUESTION = "are these degrees or radians? say --angle-unit degrees or --angle-unit radians"


def kind_of(scan: str) -> str:
    """Tell what a scan is: phantom, ellipses, example, dicom or array, by its name, ending or first bytes.

    Raises: InputError for what is none of them, and a file that cannot be opened.
    """
    if scan in (*MADE, EXAMPLE):
        return scan
    path = located(scan)
    names = ", ".join((*MADE, EXAMPLE))
    start = _start(path, f"a scan is one of {names}, a .dcm file or a .npy file; there is no file {scan}")
    if start.startswith(MARK) or path.suffix.lower() == ".npy":
        return "array"
    if start[128:132] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom", ".ima"):
        return "dicom"
    raise InputError(
        f"{scan} is neither DICOM nor .npy; a scan is one of {names}, a .dcm file or a .npy file"
    )


def located(name: str | Path) -> Path:
    """Return the path that a name means; ~ is the user's home.

    Raises: InputError for the home of an unknown user.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{str(name)[:80]!r} is in the home of nobody known here") from error


def read_dicom(scan: str) -> CTSlice:
    """Return the slice of a DICOM file, or the example; as large as images may be.

    Raises: MissingExtraError without pydicom; InputError as `read_slice`, and for too few pixels.
    """
    found = example_slice() if scan == EXAMPLE else read_slice(located(scan))
    _sided(scan, len(found.hounsfield))
    return found


def read_image(path: Path) -> Float[Tensor, "n n"]:
    """Return a square image to be projected, at least 0, in float64.

    Negative values nearer to 0 than a thousandth of the greatest one are taken for rounding, and set to 0.

    Raises: InputError as `read_array`, and for another shape, negative values, values of 0 alone, and
        magnitudes that float32 cannot project.
    """
    values = _array(path)
    rows, columns = values.shape
    if rows != columns:
        raise InputError(
            f"{path} is {rows} × {columns}: a square is projected as an image; a sinogram (views, detectors) "
            "is read with --angles and a file of its angles"
        )
    _sided(str(path), rows)
    _magnitude(path, values)
    allowed = ROUNDED * float(values.max())
    if float(values.min()) < -allowed:
        raise InputError(
            f"{path} holds {int((values < 0).sum())} negative values, the least {float(values.min()):g}; an "
            "image that is projected is an attenuation, at least 0 (Hounsfield units are read from DICOM)"
        )
    return values.clamp(min=0)


def read_sinogram(
    path: Path, angles: Float[Tensor, " views"], noise_std: float | None
) -> tuple[Float[Tensor, "views detectors"], float]:
    """Return a measured sinogram and the standard deviation of its noise.

    Values down to −max(6σ, 1 % of the greatest value) are taken for noise of line integrals and kept.

    Shapes: -> (views, detectors), float64.
    Raises: InputError as `read_array`, for another number of views than angles, less than 8 detectors, values
        of 0 alone, negative values beyond the rule, and magnitudes that float32 cannot project.
    """
    values = _array(path)
    views, detectors = values.shape
    if views != len(angles):
        transposed = "; its transpose has as many views" if detectors == len(angles) else ""
        raise InputError(
            f"{path} is a sinogram of {views} views (rows) × {detectors} detectors (columns) and there are "
            f"{len(angles)} angles, one a view is needed{transposed}"
        )
    if not SMALLEST <= detectors <= MOST:
        raise InputError(f"{path} has {detectors} detectors; {SMALLEST} to {MOST:,} are accepted")
    _magnitude(path, values)
    std = estimated_noise(values) if noise_std is None else noise_std
    allowed = max(SIGMAS * std, SHARE * float(values.max()))
    if float(values.min()) < -allowed:
        raise InputError(
            f"{path} holds {int((values < -allowed).sum())} values below {-allowed:.4g}, the least "
            f"{float(values.min()):g}; a sinogram holds line integrals −ln(I/I₀), which noise alone makes "
            f"negative (accepted down to {SIGMAS:g} σ, or {SHARE:.0%} of the greatest value)"
        )
    return values, std


def estimated_noise(sinogram: Float[Tensor, "views detectors"]) -> float:
    """Return the standard deviation of the noise of a sinogram, seen in third differences along detectors.

        σ = Q_{1/4}(|d|)/(√20 Φ⁻¹(5/8)),  d_k = y_{k+3} − 3 y_{k+2} + 3 y_{k+1} − y_k

    Differences of exactly 0 are left out, as detectors that were filled in have them. Edges and other detail
    are in the larger differences, of which the lower quartile Q knows little.

    Shapes: (views, detectors) -> number; 0 where there is no difference but 0.
    Raises: InputError for less than 4 detectors.
    Holds: as detectors → ∞ for objects of fixed size, and independent noise of one level. It is too high
        where objects have detail of a few detectors: by up to a quarter at 40 dB with 128 pixels a side,
        twofold with 32, and more as noise falls. It is too low for noise that detectors share or that was
        smoothed; of a Poisson scan it is about the root mean square of all levels.
    Source: differences against polynomials: Hall, Kay, Titterington 1990, doi 10.1093/biomet/77.3.521.
    """
    if sinogram.shape[-1] < 4:
        raise InputError(f"noise is estimated from at least 4 detectors, not {sinogram.shape[-1]}")
    size = sinogram.double().diff(n=3, dim=-1).abs()
    size = size[size > 0]
    if not len(size):
        return 0.0
    quartile = size.kthvalue(math.ceil(len(size) / 4)).values
    return float(quartile) / (math.sqrt(20) * LOW_QUARTER)


def read_angles(path: Path) -> Float[Tensor, " views"]:
    """Return the numbers of a .npy file, or of a text in which white space, commas or semicolons part them.

    In a text what follows # in a line is left out.

    Shapes: -> (views), float64.
    Raises: InputError for a file that is missing, empty, too large or no list of finite numbers, and more
        than 20,000 of them.
    """
    path = located(path)
    start = _start(path, f"there is no file of angles {path}")
    found = _angles_in_array(path) if start.startswith(MARK) else _angles_in_text(path)
    if not 0 < len(found) <= MOST:
        raise InputError(f"{path} holds {len(found):,} angles; 1 to {MOST:,} are accepted")
    return found


def in_radians(angles: Float[Tensor, " views"], unit: str = "auto") -> Float[Tensor, " views"]:
    """Return angles in radians, whatever they are in; where that cannot be told, ask.

        degrees  where one is beyond 2π (and 1 % more)
        radians  else, if max − min ≤ 2π, (max − min)·V/(V − 1) ≥ π/2, and not all are multiples of 1/20

    Shapes: (views) -> (views).
    Raises: InputError with a question for what is neither, for radians beyond a turn, and for degrees beyond
        ten turns.
    Holds: exactly, for a stated unit. By itself it takes degrees for radians where all lie within 6.3 of 0,
        over an arc of more than 1.57, in steps that are no multiples of .05: less than 7° of a turn.
    """
    if unit not in UNITS:
        raise InputError(f"unknown unit of angles {unit!r}; choose one of {', '.join(UNITS)}")
    largest = float(angles.abs().max())
    turns = largest > LARGEST
    if unit == "radians" and turns:
        raise InputError(f"an angle of {largest:g} is beyond a full turn of 2π radians; {QUESTION}")
    if unit == "auto" and not turns and not _like_radians(angles):
        low, high = float(angles.min()), float(angles.max())
        raise InputError(f"{len(angles)} angles from {low:g} to {high:g}: {QUESTION}")
    if unit == "radians" or (unit == "auto" and not turns):
        return angles
    if largest > TURNS * 360:
        raise InputError(f"an angle of {largest:g}° is beyond {TURNS} turns: it is none, or in another unit")
    return torch.fmod(angles, 360.0).deg2rad()


def _like_radians(angles: Tensor) -> bool:
    if not angles.any():
        return True
    steps = angles / ROUND
    span = float(angles.max() - angles.min())
    wide = span <= LARGEST and span * len(angles) / max(len(angles) - 1, 1) >= NARROWEST * (1 - 1e-6)
    return wide and bool(((steps - steps.round()).abs() > 1e-4).any())


def _angles_in_array(path: Path) -> Tensor:
    values = _sized(path, LARGEST_FILE, read_array).double()
    if values.numel() != max(values.shape, default=1):
        shape = " × ".join(map(str, values.shape))
        raise InputError(f"angles are one number a view in one row, {path} is {shape}")
    return values.flatten()


def _angles_in_text(path: Path) -> Tensor:
    try:
        text = _sized(path, LARGEST_TEXT, Path.read_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is neither .npy nor a text of angles") from error
    found: list[float] = []
    for number, line in enumerate(text.splitlines(), 1):
        for word in re.split(r"[\s,;]+", line.partition("#")[0]):
            if word:
                found.append(_number(word, f"line {number} of {path}"))
    return torch.tensor(found, dtype=torch.float64)


def _number(word: str, place: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        shown = "".join(c if c.isprintable() else " " for c in word[:30])
        raise InputError(f"{place} holds {shown!r}, which is no angle: finite numbers are accepted")
    return value


def _array(path: Path) -> Float[Tensor, "rows columns"]:
    return _sized(path, LARGEST_FILE, lambda file: read_array(file, 2)).double()


def _sized(path: Path, most: int, read: Callable[[Path], T]) -> T:
    """Read a file unless it is too large."""
    size = path.stat().st_size
    if size > most:
        raise InputError(f"{path} is {size:,} bytes; at most {most:,} are accepted")
    return read(path)


def _start(path: Path, absent: str) -> bytes:
    """Return the first bytes of a file."""
    try:
        if not path.exists():
            raise InputError(absent)
        if not path.is_file():
            raise InputError(f"{path} is no file")
        with path.open("rb") as stream:
            return stream.read(132)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)[:80]!r} cannot be read: {error}") from error


def _sided(name: str, side: int) -> None:
    if not SMALLEST <= side <= LARGEST_SIDE:
        raise InputError(
            f"{name} is {side} × {side} pixels; {SMALLEST} to {LARGEST_SIDE} a side are accepted"
        )


def _magnitude(path: Path, values: Tensor) -> None:
    low, high = MAGNITUDES
    largest = float(values.abs().max())
    if largest == 0:
        raise InputError(f"{path} is 0 everywhere: there is nothing to reconstruct")
    if not low <= largest <= high:
        raise InputError(
            f"values of {path} reach {largest:g}; the greatest has to lie between {low:g} and {high:g}"
        )
