"""Classical reconstruction of CT slices from few views, with settings chosen on other slices.

DATA is a folder of square slices in [0, 1], val_*.npy and test_*.npy. Data are made as in Vasconcelos et al.
2023 (arXiv 2202.10847): the padded slice is turned by bilinear interpolation and averaged over rows, and one
realisation of noise at 40 dB is added to all slices. Reconstruction uses the interpolating projector, so the
data are not made by the matrix that inverts them. Nothing is chosen on the test slices.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side_by_side import write_results
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, pad

from gramian.imaging.arrays import read_array
from gramian.imaging.classical import METHODS, Choice, stopped, tuned
from gramian.imaging.geometry import ParallelBeam, evenly, padded
from gramian.imaging.iterative import NON_NEGATIVE
from gramian.imaging.noise import GaussianNoise
from gramian.imaging.quality import psnr, snr, ssim
from gramian.imaging.radon import Projector
from gramian.imaging.variation import UNIT

DECIBEL = 40.0
FOUR = {
    ("FBP, ramp", 60): "21.36/11.90",
    ("FBP, Hann", 60): "27.71/18.26",
    ("SART, x ≥ 0", 60): "30.95/21.50",
    ("SIRT, x ≥ 0", 60): "32.15/22.70",
    ("FISTA-TV, anisotropic", 60): "34.87/25.42",
    ("FBP, ramp", 120): "24.73/15.27",
    ("FBP, Hann", 120): "31.48/22.02",
    ("SART, x ≥ 0", 120): "32.43/22.97",
    ("SIRT, x ≥ 0", 120): "33.58/24.13",
    ("FISTA-TV, anisotropic", 120): "36.32/26.87",
}
"""PSNR/SNR measured before with other code (astra, skimage) on test slices 0–3, by method and views."""
EIGHT = {
    ("FBP, ramp", 60): "22.06/12.10",
    ("FBP, Hann", 60): "28.21/18.25",
    ("SART, x ≥ 0", 60): "31.34/21.38",
    ("SIRT, x ≥ 0", 60): "32.66/22.70",
    ("CGLS", 60): "30.44/20.49",
    ("EM", 60): "32.15/22.20",
    ("FISTA-TV, anisotropic", 60): "35.52/25.56",
    ("FBP, ramp", 120): "25.50/15.54",
    ("FBP, Hann", 120): "32.13/22.18",
    ("SART, x ≥ 0", 120): "32.95/23.00",
    ("SIRT, x ≥ 0", 120): "34.13/24.17",
    ("CGLS", 120): "32.57/22.61",
    ("EM", 120): "33.51/23.56",
    ("FISTA-TV, anisotropic", 120): "37.02/27.06",
}
"""The same on test slices 0–7."""


@dataclass(frozen=True)
class Plan:
    """How one method's settings are chosen."""

    name: str
    method: str
    fixed: dict[str, Any]
    most: int = 0
    """Iterations among which the best number is sought; 0 for none."""
    weights: tuple[float, ...] = ()
    """Weights of total variation among which the best is sought."""
    seek: int = 60
    """Iterations while the weight is sought."""
    like: str = ""
    """The plan that has sought the weight, of the same problem."""


WEIGHTS = (1e-5, 2e-5, 4e-5, 8e-5)
PLANS = (
    Plan("FBP, ramp", "fbp", {"filter": "ramp", "box": UNIT}),
    Plan("FBP, Hann", "fbp", {"filter": "hann", "box": UNIT}),
    Plan("SART, x ≥ 0", "sart", {"relaxation": 0.5, "box": NON_NEGATIVE}, most=6),
    Plan("CGLS", "cgls", {}, most=25),
    Plan("SIRT, x ≥ 0", "sirt", {"box": NON_NEGATIVE}, most=250),
    Plan("EM", "em", {}, most=150),
    Plan("FISTA-TV", "fista_tv", {"iterations": 150}, weights=WEIGHTS),
    Plan("FISTA-TV, anisotropic", "fista_tv", {"isotropic": False, "iterations": 150}, weights=WEIGHTS),
    Plan("PDHG-TV", "pdhg_tv", {"iterations": 150}, like="FISTA-TV"),
)


@dataclass(frozen=True)
class Scan:
    """Slices, their noisy sinograms and the projector that inverts them."""

    projector: Projector
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def slices(folder: Path, pattern: str, size: int, count: int) -> Tensor:
    """Read slices, averaged over squares of pixels to the size asked for."""
    paths = sorted(folder.glob(pattern))[:count]
    whole = torch.stack([read_array(path, 2) for path in paths])
    return avg_pool2d(whole, whole.shape[-1] // size)


def measured(images: Tensor, views: int) -> Tensor:
    """Project by turning and averaging, and add the one realisation of noise."""
    n, side = images.shape[-1], padded(images.shape[-1])
    wide, rows = pad(images, ((side - n) // 2,) * 4)[None], []
    for angle in evenly(views):
        cos, sin = math.cos(angle), math.sin(angle)
        grid = affine_grid(
            torch.tensor([[[cos, -sin, 0], [sin, cos, 0]]]), [1, 1, side, side], align_corners=False
        )
        rows.append(grid_sample(wide, grid, align_corners=False)[0].mean(-2))
    clean = torch.stack(rows, 1)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((views, side))).float()
    return torch.stack([one + GaussianNoise.at_snr(one, DECIBEL).std * noise for one in clean])


def scan(folder: Path, views: int, size: int, quick: bool) -> Scan:
    side = padded(size)
    projector = Projector(ParallelBeam(evenly(views), size, side), scale=1 / side)
    validation = slices(folder, "val_*.npy", size, 1 if quick else 2)
    test = slices(folder, "test_*.npy", size, 1 if quick else 4)
    return Scan(projector, (measured(validation, views), validation), (measured(test, views), test))


def chosen(plan: Plan, one: Scan, quick: bool) -> Choice:
    """Choose a plan's settings on the validation slices."""
    method = METHODS[plan.method]
    if plan.most:
        most = min(plan.most, 12) if quick else plan.most
        return stopped(method, one.projector, one.validation, most, patience=5, **plan.fixed)
    if not plan.weights:
        return Choice(plan.fixed, math.nan, ())
    grid = [{**plan.fixed, "weight": w, "iterations": 10 if quick else plan.seek} for w in plan.weights]
    found = tuned(method, grid, one.projector, one.validation)
    return replace(found, settings={**found.settings, **plan.fixed, **({"iterations": 15} if quick else {})})


def of_views(one: Scan, views: int, quick: bool, plans: tuple[Plan, ...]) -> Iterator[str]:
    (sinograms, truths), choices = one.test, dict[str, Choice]()
    for plan in plans:
        start = time.perf_counter()
        choice = choices[plan.name] = chosen(plan, one, quick)
        if plan.like:
            choice = replace(choice, settings={"weight": choices[plan.like].settings["weight"], **plan.fixed})
        sought, start = time.perf_counter() - start, time.perf_counter()
        method: Callable[..., Tensor] = METHODS[plan.method]
        images = method(one.projector, sinograms, **choice.settings)
        took = (time.perf_counter() - start) / len(truths)
        scores = [psnr(images, truths), snr(images, truths)]
        each = " | ".join(f"{p:.2f}/{s:.2f}" for p, s in zip(*scores, strict=True))
        mean = "/".join(f"{float(score.mean()):.2f}" for score in scores)
        known = truths.shape[-1] == 512
        anchors = " | ".join(table.get((plan.name, views), "–") if known else "–" for table in (FOUR, EIGHT))
        said = ", ".join(f"{name} {value}" for name, value in choice.settings.items() if name != "box")
        line = (
            f"| {plan.name} | {views} | {each} | {mean} | {anchors} "
            f"| {float(ssim(images, truths).mean()):.3f} | {said} | {took:.1f} | {sought:.0f} |"
        )
        print(line, flush=True)
        yield line


def head(one: Scan) -> list[str]:
    """Say what the table shows, and begin it."""
    count, size = one.test[1].shape[:2]
    numbered = " | ".join(f"slice {k}" for k in range(count))
    return [
        f"{size} × {size} pixels, noise of {DECIBEL:g} dB, PSNR/SNR in dB; settings chosen on "
        f"{len(one.validation[1])} validation slices. Known figures are of other code, at 512 × 512 on "
        "test slices 0–3 and 0–7. Seconds are of one slice in a batch of all, and of the whole choice.",
        "",
        f"| method | views | {numbered} | mean | known, 0–3 | known, 0–7 | SSIM | settings | s | choice |",
        "|" + (8 + count) * "---|",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--views", type=int, nargs="+", default=[60, 120])
    parser.add_argument(
        "--quick", action="store_true", help="one slice each and few iterations; writes no file"
    )
    parser.add_argument("--only", nargs="+", help="names of plans; writes no file")
    given = parser.parse_args()
    wanted = {*(given.only or ()), *(plan.like for plan in PLANS if plan.name in (given.only or ()))}
    plans = tuple(plan for plan in PLANS if not wanted or plan.name in wanted)
    lines: list[str] = []
    for views in given.views:
        one = scan(given.data, views, given.size, given.quick)
        lines += [] if lines else head(one)
        lines += of_views(one, views, given.quick, plans)
    if given.quick or given.only:
        print("\n".join(lines))
        return
    write_results("classical_reconstruction", lines, {"numpy": np.__version__})


if __name__ == "__main__":
    main()
