"""The projector of computed tomography against SciPy's sparse product, astra-toolbox, and rotate-and-sum.

A parallel beam of 120 views sees an image of N × N pixels by `padded(N)` detectors. The matrix is that of
linear interpolation in float32, for SciPy as for ours; `turns` and `all` hold it for those views alone from
which quarter turns, or mirrors as well, make the others. astra-toolbox takes its `linear` projector on the
CPU, without a matrix. Rotate-and-sum turns the padded image by `grid_sample`, view by view, and autograd
takes it back.

astra-toolbox takes part when this Python has it: it comes with the extra `bench`, or without JAX by

    pip install --no-deps astra-toolbox==2.5.0 nvidia-cuda-runtime-cu12 nvidia-cufft-cu12

(its extension links to CUDA's libraries even where it computes on the CPU). Else that column stays empty.
"""

import argparse
import importlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import scipy
import torch
from side_by_side import ratio, timed, write_results
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

from gramian.imaging.discretisation import MODELS, matrix
from gramian.imaging.geometry import ParallelBeam, evenly, padded
from gramian.imaging.phantoms import raster, shepp_logan
from gramian.imaging.radon import Projector

VIEWS, IMAGES = 120, 8
SYMMETRIES = ("all", "turns", "none")

Ways = dict[str, Callable[[], Any]]


def astra_or_none() -> Any:
    try:
        return importlib.import_module("astra")
    except ImportError:
        return None


class Astra:
    """Projections of one image by astra-toolbox on the CPU, its angles turning the other way."""

    def __init__(self, astra: Any, beam: ParallelBeam) -> None:
        self.astra = astra
        rays = astra.create_proj_geom("parallel", 1.0, beam.detectors, -beam.theta.numpy())
        pixels = astra.create_vol_geom(*beam.shape)
        self.projector = astra.create_projector("linear", rays, pixels)
        self.image = astra.data2d.create("-vol", pixels)
        self.sinogram = astra.data2d.create("-sino", rays)
        self.forward = self._algorithm("FP", "VolumeDataId")
        self.back = self._algorithm("BP", "ReconstructionDataId")

    def _algorithm(self, name: str, volume: str) -> int:
        config = self.astra.astra_dict(name)
        data = {"ProjectorId": self.projector, "ProjectionDataId": self.sinogram, volume: self.image}
        return self.astra.algorithm.create(config | data)

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        self.astra.data2d.store(self.image, x.numpy())
        self.astra.algorithm.run(self.forward)
        return torch.from_numpy(self.astra.data2d.get(self.sinogram))

    def A_adjoint(self, y: Tensor) -> Tensor:  # noqa: N802
        self.astra.data2d.store(self.sinogram, y.numpy())
        self.astra.algorithm.run(self.back)
        return torch.from_numpy(self.astra.data2d.get(self.image))


def rotate_and_sum(x: Tensor, beam: ParallelBeam) -> Tensor:
    """Return the sums over rows of the padded image, turned for each view."""
    margin = (beam.detectors - beam.shape[0]) // 2
    image = pad(x, [margin] * 4)[None, None]
    views = []
    for angle in beam.theta.tolist():
        cos, sin = math.cos(angle), math.sin(angle)
        grid = affine_grid(torch.tensor([[[cos, -sin, 0], [sin, cos, 0]]]), list(image.shape), False)
        views.append(grid_sample(image, grid, align_corners=False)[0, 0].sum(0))
    return torch.stack(views)


def gradient(project: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of ½‖A x − y‖², by autograd."""
    x = x.clone().requires_grad_()
    (0.5 * (project(x) - y).square().sum()).backward()
    assert x.grad is not None
    return x.grad


def table(title: str, seconds: Mapping[str, list[float]], base: str) -> list[str]:
    lines = ["", title, "", "| way | ms | its time / ours |", "|---|---|---|"]
    for name, each in seconds.items():
        times = ratio(seconds, name, base)
        lines.append(f"| {name} | {1000 * statistics.median(each):.1f} | {times:.2f} |")
    return lines


def built(beam: ParallelBeam, models: list[str]) -> list[str]:
    lines = [
        "",
        f"{beam.shape[0]} × {beam.shape[0]}: building matrix and transpose, once each.",
        "",
        "| discretisation | symmetry | views held | entries (M) | MiB | built in (s) |",
        "|---|---|---|---|---|---|",
    ]
    for model in models:
        for symmetry in SYMMETRIES:
            start = time.perf_counter()
            made = Projector(beam, model, symmetry=symmetry)
            took = time.perf_counter() - start
            views = len(made.folding.geometry.theta)
            entries = made.memory / 16e6
            lines.append(
                f"| {model} | {symmetry} | {views} | {entries:.1f} | {made.memory / 2**20:.0f} | {took:.2f} |"
            )
    return lines


def compared(size: int, rounds: int, astra: Any) -> tuple[list[str], list[str]]:
    """Return the tables of a size, and a line of what was aimed at."""
    beam = ParallelBeam(evenly(VIEWS), size, padded(size))
    ours = {name: Projector(beam, symmetry=name) for name in SYMMETRIES}
    rows = matrix(beam)
    columns = rows.T.tocsr()
    x = raster(shepp_logan(size), size, samples=4).float()
    y = ours["all"].A(x)
    images, sinograms = x.expand(IMAGES, -1, -1).contiguous(), y.expand(IMAGES, -1, -1).contiguous()
    flat = {name: t.reshape(-1).numpy() for name, t in (("x", x), ("y", y))}
    many = {name: t.flatten(1).T.contiguous().numpy() for name, t in (("x", images), ("y", sinograms))}
    peer = Astra(astra, beam) if astra else None
    forward: Ways = {f"gramian, {name}": lambda p=p: p.A(x) for name, p in ours.items()}
    adjoint: Ways = {f"gramian, {name}": lambda p=p: p.A_adjoint(y) for name, p in ours.items()}
    forward["SciPy CSR"] = lambda: rows @ flat["x"]
    adjoint["SciPy CSR of the transpose"] = lambda: columns @ flat["y"]
    adjoint["SciPy's view of the transpose"] = lambda: rows.T @ flat["y"]
    if peer:
        forward["astra-toolbox"] = lambda: peer.A(x)
        adjoint["astra-toolbox"] = lambda: peer.A_adjoint(y)
    forward["rotate and sum"] = lambda: rotate_and_sum(x, beam)
    both: Ways = {"gramian, all": lambda: gradient(ours["all"].A, x, y)}
    both["rotate and sum"] = lambda: gradient(lambda v: rotate_and_sum(v, beam), x, y)
    forward_many: Ways = {f"gramian, {name}": lambda p=p: p.A(images) for name, p in ours.items()}
    adjoint_many: Ways = {f"gramian, {name}": lambda p=p: p.A_adjoint(sinograms) for name, p in ours.items()}
    forward_many["SciPy CSR"] = lambda: rows @ many["x"]
    adjoint_many["SciPy CSR of the transpose"] = lambda: columns @ many["y"]
    base, name = "gramian, all", f"{size} × {size}, {beam.detectors} detectors, {VIEWS} views"
    one = {way: timed(ways, rounds, 1) for way, ways in (("forward", forward), ("adjoint", adjoint))}
    some = {
        way: timed(ways, rounds, 1) for way, ways in (("forward", forward_many), ("adjoint", adjoint_many))
    }
    taken = timed(both, max(1, rounds // 3), 1)
    lines = [f"\n## {name}"]
    for way in ("forward", "adjoint"):
        lines += table(f"One image, {way}.", one[way], base)
    lines += table("Gradient of ½‖A x − y‖², forward and backward.", taken, base)
    for way in ("forward", "adjoint"):
        lines += table(f"{IMAGES} images at once, {way}.", some[way], base)
    return lines, [aims(size, one, taken, ours, difference(y, x, beam, peer))]


def difference(y: Tensor, x: Tensor, beam: ParallelBeam, peer: Astra | None) -> str:
    """Return how far ours is from the others, relative in L2."""
    others = {"rotate and sum": rotate_and_sum(x, beam)}
    if peer:
        others["astra"] = peer.A(x)
    return ", ".join(f"{name} {float((y - t).norm() / t.norm()):.0e}" for name, t in others.items())


def aims(
    size: int, one: dict[str, Any], taken: dict[str, Any], ours: dict[str, Projector], apart: str
) -> str:
    scipy_names = {"forward": "SciPy CSR", "adjoint": "SciPy CSR of the transpose"}
    cells = []
    for symmetry in ("all", "none"):
        mine = f"gramian, {symmetry}"
        cells.append(" / ".join(f"{ratio(one[way], mine, scipy_names[way]):.2f}" for way in one))
    astra = [ratio(one[way], "astra-toolbox", "gramian, all") for way in one if "astra-toolbox" in one[way]]
    cells.append(" / ".join(f"{times:.1f}" for times in astra) or "absent")
    cells.append(f"{ratio(taken, 'rotate and sum', 'gramian, all'):.0f}")
    shares = [ours[name].memory / ours["none"].memory for name in ("turns", "all")]
    cells.append(" / ".join(f"{share:.2f}" for share in shares))
    return f"| {size} | {' | '.join(cells)} | {apart} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--threads", type=int, help="of torch; SciPy and astra-toolbox take one")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    astra = astra_or_none()
    summary = [
        "Aims: 1.3 of SciPy's time at most, twice as fast as astra-toolbox and 5 times as fast as",
        "rotate-and-sum with autograd, half the memory, built in 5 s. Forward / adjoint; medians over rounds",
        "of ratios within each. Ours is `all` unless said; SciPy and astra-toolbox use one thread.",
        "",
        "| N | ours / SciPy | `none` / SciPy | astra / ours | rotate-and-sum / ours "
        "| memory of `turns` / `all` | relative difference from |",
        "|---|---|---|---|---|---|---|",
    ]
    details: list[str] = []
    for size in chosen.sizes:
        lines, row = compared(size, chosen.rounds, astra)
        details += lines
        summary += row
    largest = max(chosen.sizes)
    beam = ParallelBeam(evenly(VIEWS), largest, padded(largest))
    summary += built(beam, [name for name in MODELS if name in ("linear", "area")])
    used = {"scipy": scipy.__version__, **({"astra-toolbox": astra.__version__} if astra else {})}
    write_results("projector", summary + details, used)


if __name__ == "__main__":
    main()
