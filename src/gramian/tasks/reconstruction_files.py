"""The files of a reconstruction: arrays in the scan's unit, grey pictures, and DICOM like the input's."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from gramian.core.predictive import Predictive
from gramian.files import atomic_file
from gramian.imaging.dicom import WATER, write_slice
from gramian.report.slices import write_grey
from gramian.tasks.reconstruction_scores import LEVEL
from gramian.tasks.scans import Scan

IMAGE, STD, LOWER, UPPER = "image.npy", "std.npy", "lower.npy", "upper.npy"
"""Arrays of a run folder; pictures and DICOM have the same names with other endings."""


def white(scan: Scan, image: Float[Tensor, "n n"]) -> float:
    """Return the value that pictures show white, in the scan's unit; 0 is black.

    It is the largest of the truth, or of the image where the truth is not known.
    """
    largest = float(image.max()) * scan.peak if scan.truth is None else float(scan.truth.max())
    return largest if largest > 0 else scan.peak


def write_image(folder: Path, scan: Scan, image: Float[Tensor, "n n"], how: str) -> None:
    """Write an image in units of the scan's peak as image.npy, image.png and, of a DICOM scan, image.dcm.

        image.npy: value · peak, in the scan's unit;   image.dcm: 1000 (μ/μ_water − 1) Hounsfield units

    Args:
        folder: the run folder.
        scan: what was reconstructed.
        image: the image.
        how: how it was made, for the description in image.dcm.

    Raises: MissingExtraError for a DICOM scan without pydicom.
    """
    values = image.detach().cpu() * scan.peak
    _write(folder / IMAGE, values, white(scan, image))
    if scan.slice is not None and (units := scan.to_hounsfield(values)) is not None:
        said = f"CT image reconstructed from {len(scan.sinogram)} views, {how}"
        write_slice(folder / _named(IMAGE, "dcm"), units, scan.slice, said)


def write_doubt(folder: Path, scan: Scan, prediction: Predictive, how: str) -> None:
    """Write standard deviation and central 95 % interval of an image's samples as arrays, and std as picture.

        std.npy: σ · peak, in the scan's unit;   std.dcm: 1000 σ peak/μ_water Hounsfield units

    Raises: MissingExtraError for a DICOM scan without pydicom.
    """
    std = prediction.std.detach().cpu() * scan.peak
    _write(folder / STD, std, float(std.max()) or scan.peak)
    for name, end in zip((LOWER, UPPER), prediction.interval(LEVEL), strict=True):
        _save(folder / name, end.cpu() * scan.peak)
    if scan.slice is not None and scan.unit:
        said = f"standard deviation of a CT image reconstructed from {len(scan.sinogram)} views, {how}"
        write_slice(folder / _named(STD, "dcm"), 1000 * std / WATER, scan.slice, said)


def _write(path: Path, values: Float[Tensor, "n n"], top: float) -> None:
    _save(path, values)
    write_grey(path.with_suffix(".png"), values.numpy(), (0.0, top))


def _save(path: Path, values: Float[Tensor, "n n"]) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, values.detach().numpy().astype(np.float32), allow_pickle=False)


def _named(name: str, ending: str) -> str:
    return f"{Path(name).stem}.{ending}"
