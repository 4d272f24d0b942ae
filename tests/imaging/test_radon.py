"""The projector: against slow integrals ray by ray, its adjoint, its derivatives, symmetry and cache."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.discretisation import MODELS, MOST, matrix
from gramian.imaging.geometry import Beam, FanBeam, ParallelBeam, evenly, padded
from gramian.imaging.phantoms import disc, random_ellipses, raster, sinogram
from gramian.imaging.radon import Projector, projector_of

TURN = 2 * math.pi
FAN = FanBeam(evenly(16, TURN), 8, 18, source_mm=20.0, detector_mm=10.0, spacing_mm=1.2)
BEAMS: dict[str, Beam] = {
    "parallel": ParallelBeam(evenly(12), 8, 13),
    "parallel, moved": ParallelBeam(
        evenly(7), (7, 9), 15, pixel_mm=0.8, spacing_mm=0.7, offset_mm=0.2, centre_mm=(0.3, -0.4)
    ),
    "flat fan": FAN,
    "curved fan": replace(FAN, curved=True, offset_mm=0.3),
}
CASES = [
    pytest.param(beam, model, id=f"{name}, {model}")
    for name, beam in BEAMS.items()
    for model in ("linear", "area", "rotation")
    if model != "rotation" or isinstance(beam, ParallelBeam)
]


FORWARD_MODE = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:DeprecationWarning"
)  # torch's own, once


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def image_of(beam: Beam, *batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return random(*batch, *beam.shape, dtype=dtype)


def interpolated(image: Tensor, row: float, column: float) -> float:
    """Bilinear value, zero outside."""
    total = 0.0
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < image.shape[0] and 0 <= j < image.shape[1]:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * float(image[i, j])
    return total


def place(beam: Beam, x: float, y: float) -> tuple[float, float]:
    """Row and column of a point."""
    return tuple(at / beam.pixel_mm + (n - 1) / 2 for at, n in zip((y, x), beam.shape, strict=True))  # type: ignore[return-value]


def by_joseph(beam: Beam, image: Tensor, point: list[float], direction: list[float]) -> float:
    """Cross the grid's lines along the ray one by one."""
    axis = 0 if abs(direction[0]) > abs(direction[1]) else 1  # steps along x or along y
    total, count = 0.0, beam.shape[1 - axis]
    for step in range(count):
        at = (step - (count - 1) / 2) * beam.pixel_mm
        t = (at - point[axis]) / direction[axis]
        x, y = (p + t * d for p, d in zip(point, direction, strict=True))
        total += interpolated(image, *place(beam, x, y)) * beam.pixel_mm / abs(direction[axis])
    return total


def by_samples(beam: Beam, image: Tensor, point: list[float], direction: list[float]) -> float:
    total = 0.0
    for k in range(beam.detectors):
        t = (k - (beam.detectors - 1) / 2) * beam.spacing_mm
        x, y = (p + t * d for p, d in zip(point, direction, strict=True))
        total += interpolated(image, *place(beam, x, y)) * beam.spacing_mm
    return total


def by_chords(beam: Beam, image: Tensor, point: list[float], direction: list[float]) -> float:
    """Clip the ray by the four sides of each pixel."""
    total, half = 0.0, beam.pixel_mm / 2
    x, y = beam.pixels()
    for i in range(beam.shape[0]):
        for j in range(beam.shape[1]):
            enter, leave = -math.inf, math.inf
            for p, d, middle in zip(point, direction, (float(x[i, j]), float(y[i, j])), strict=True):
                if abs(d) < 1e-12:
                    if abs(p - middle) > half:
                        leave = -math.inf
                    continue
                ends = sorted(((middle - half - p) / d, (middle + half - p) / d))
                enter, leave = max(enter, ends[0]), min(leave, ends[1])
            total += float(image[i, j]) * max(0.0, leave - enter)
    return total


def ray_by_ray(oracle: Callable[..., float], beam: Beam, image: Tensor) -> Tensor:
    points, directions = beam.rays()
    rays = zip(points.flatten(0, 1).tolist(), directions.flatten(0, 1).tolist(), strict=True)
    return torch.tensor([oracle(beam, image, *ray) for ray in rays], dtype=torch.float64).view(
        points.shape[:2]
    )


@pytest.mark.parametrize("beam", BEAMS.values(), ids=BEAMS)
def test_linear_equals_oracle(beam: Beam) -> None:
    image = image_of(beam)
    found = Projector(beam, dtype=torch.float64).A(image)
    torch.testing.assert_close(found, ray_by_ray(by_joseph, beam, image), rtol=1e-10, atol=1e-10)
    other = Projector(beam, "area", dtype=torch.float64).A(image)  # control
    assert (other - found).abs().max() > 0.1


@pytest.mark.parametrize("name", ["parallel", "parallel, moved"])
def test_rotation_equals_oracle(name: str) -> None:
    beam = BEAMS[name]
    image = image_of(beam)
    found = Projector(beam, "rotation", dtype=torch.float64).A(image)
    torch.testing.assert_close(found, ray_by_ray(by_samples, beam, image), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "error"), [("parallel", 3e-3), ("parallel, moved", 3e-3), ("flat fan", 0.03)]
)
def test_area_is_the_mean_over_detectors(name: str, error: float) -> None:
    """Against rays that are 30 times as dense; a fan's rays through one pixel are parallel only nearly."""
    beam = BEAMS[name]
    beam = replace(beam, angles=beam.angles[1:2])
    image, dense = image_of(beam), 30
    fine = replace(beam, detectors=dense * beam.detectors, spacing_mm=beam.spacing_mm / dense)
    expected = ray_by_ray(by_chords, fine, image).unflatten(1, (-1, dense)).mean(2)
    found = Projector(beam, "area", dtype=torch.float64).A(image)
    assert (found - expected).norm() < error * expected.norm()
    middle = ray_by_ray(by_chords, beam, image)  # control: the ray at the middle of each detector
    assert (middle - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("symmetry", ["none", "turns", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("beam", "model"), CASES)
def test_adjoint(beam: Beam, model: str, dtype: torch.dtype, symmetry: str) -> None:
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    projector = Projector(beam, model, dtype=dtype, symmetry=symmetry)
    other = replace(beam, angles=[angle + 0.05 for angle in beam.theta.tolist()])
    control = Projector(other, model, dtype=dtype, symmetry=symmetry)
    x, y = image_of(beam, dtype=dtype), random(*projector.sinogram_shape, seed=1, dtype=dtype)
    left = (projector.A(x).double() * y).sum()
    scale = projector.A(x).double().norm() * y.double().norm()
    assert abs(left - (x * projector.A_adjoint(y).double()).sum()) < tolerance * scale
    assert abs(left - (x * control.A_adjoint(y).double()).sum()) > 1e-4 * scale


@pytest.mark.parametrize(("beam", "model"), CASES)
def test_symmetry_changes_nothing(beam: Beam, model: str) -> None:
    full = Projector(beam, model, dtype=torch.float64, symmetry="none")
    x, y = image_of(beam, 3), random(3, *full.sinogram_shape, seed=1)
    for symmetry in ("turns", "all"):
        folded = Projector(beam, model, dtype=torch.float64, symmetry=symmetry)
        torch.testing.assert_close(folded.A(x), full.A(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(folded.A_adjoint(y), full.A_adjoint(y), rtol=1e-12, atol=1e-12)


def test_symmetry_saves_memory() -> None:
    def memory(beam: Beam, symmetry: str) -> float:
        full = Projector(beam, symmetry="none").memory
        return Projector(beam, symmetry=symmetry).memory / full

    parallel = ParallelBeam(evenly(40), 16, 23)
    fan = FanBeam(evenly(80, TURN), 16, 40, source_mm=50.0, detector_mm=50.0)
    assert memory(parallel, "turns") == pytest.approx(1 / 2, rel=0.02)
    assert memory(parallel, "all") == pytest.approx(11 / 40, rel=0.02)  # 45°, 90° and nine between
    assert memory(fan, "turns") == pytest.approx(1 / 4, rel=0.02)
    assert memory(fan, "all") == pytest.approx(11 / 80, rel=0.02)
    assert memory(replace(fan, offset_mm=0.25), "all") == pytest.approx(1 / 4, rel=0.05)
    irregular = torch.rand(20, generator=torch.Generator().manual_seed(0))
    for beam in (
        replace(parallel, angles=irregular),
        replace(parallel, centre_mm=(0.1, 0.0)),
        replace(parallel, size=(16, 12)),
    ):
        assert memory(beam, "all") == 1


def test_views_may_repeat_and_go_around() -> None:
    """Any order, doubles and half turns: each view is what it is alone."""
    angles = [0.3, 0.3, 0.3 + math.pi, 0.3 - math.pi / 2, -0.3, 6.2, math.pi / 4, 3 * math.pi / 4]
    for beam in (ParallelBeam(angles, 8, 13), replace(FAN, angles=angles)):
        whole = Projector(beam, dtype=torch.float64)
        x, y = image_of(beam), random(*whole.sinogram_shape, seed=1)
        alone = [Projector(replace(beam, angles=[angle]), dtype=torch.float64) for angle in angles]
        torch.testing.assert_close(whole.A(x), torch.cat([one.A(x) for one in alone]))
        back = sum(one.A_adjoint(row[None]) for one, row in zip(alone, y, strict=True))
        torch.testing.assert_close(whole.A_adjoint(y), back)


@pytest.mark.parametrize("symmetry", ["none", "all"])
def test_subset(symmetry: str) -> None:
    for beam in BEAMS.values():
        whole = Projector(beam, dtype=torch.float64, symmetry=symmetry)
        views = [4, 0, 5]
        part = whole.subset(views)
        x, y = image_of(beam, 2), random(2, 3, beam.detectors, seed=1)
        torch.testing.assert_close(part.A(x), whole.A(x)[:, views], rtol=1e-12, atol=1e-12)
        full = torch.zeros(2, *whole.sinogram_shape, dtype=torch.float64)
        full[:, views] = y
        torch.testing.assert_close(part.A_adjoint(y), whole.A_adjoint(full), rtol=1e-12, atol=1e-12)
        assert part.memory < whole.memory or symmetry == "all"
    for views in ([], [-1], [99]):
        with pytest.raises(InputError, match="a subset takes some of the views 0 to"):
            whole.subset(views)


@FORWARD_MODE
def test_derivatives() -> None:
    projector = Projector(BEAMS["parallel"], dtype=torch.float64)
    x = image_of(projector.geometry, 2).requires_grad_()
    y = random(2, *projector.sinogram_shape, seed=1).requires_grad_()
    data = random(2, *projector.sinogram_shape, seed=2)
    (0.5 * (projector.A(x) - data).square().sum()).backward()
    torch.testing.assert_close(x.grad, projector.A_adjoint(projector.A(x) - data))
    small = Projector(ParallelBeam(evenly(3), 3, 4), dtype=torch.float64)
    x, y = random(3, 3).requires_grad_(), random(3, 4).requires_grad_()
    for apply, given in ((small.A, x), (small.A_adjoint, y)):
        assert torch.autograd.gradcheck(apply, given, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda v, f=apply: f(v.sin()).exp(), given)


@FORWARD_MODE
def test_functional_transforms() -> None:
    projector = Projector(BEAMS["parallel"], dtype=torch.float64)
    x = image_of(projector.geometry, 3, 2)
    torch.testing.assert_close(torch.func.vmap(projector.A, 1)(x), projector.A(x).transpose(0, 1))
    value, tangent = torch.func.jvp(projector.A, (x,), (x.sin(),))
    torch.testing.assert_close(tangent, projector.A(x.sin()))
    rows = torch.func.vmap(torch.func.grad(lambda v: projector.A(v).square().sum()))(x)
    torch.testing.assert_close(rows, 2 * projector.A_adjoint(value))


def test_batches_are_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gramian.imaging.radon.COLUMNS", 12)  # three images at once
    projector = Projector(BEAMS["parallel"], dtype=torch.float64)
    x, y = image_of(projector.geometry, 2, 5), random(2, 5, *projector.sinogram_shape, seed=1)
    for apply, given in ((projector.A, x), (projector.A_adjoint, y)):
        one_by_one = torch.stack([torch.stack([apply(one) for one in part]) for part in given])
        torch.testing.assert_close(apply(given), one_by_one, rtol=1e-13, atol=1e-13)
        assert apply(given.transpose(0, 1)).shape == one_by_one.transpose(0, 1).shape
        assert apply(given[:, :0]).shape == one_by_one[:, :0].shape


def test_without_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    projector = Projector(BEAMS["parallel"], dtype=torch.float64)
    x, y = image_of(projector.geometry), random(*projector.sinogram_shape, seed=1)
    expected = projector.A(x), projector.A_adjoint(y)
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: False)
    torch.testing.assert_close((projector.A(x), projector.A_adjoint(y)), expected)


def test_mass_and_disc() -> None:
    """Strips lose nothing, so that each view has the mass of the image; a disc is half an ellipse."""
    beam = ParallelBeam(evenly(9), 64, padded(64), pixel_mm=0.5, spacing_mm=0.5)
    image = raster(random_ellipses(6, 15.0, torch.Generator().manual_seed(0)), 64, 0.5)
    for model, tolerance in (("area", 1e-12), ("linear", 5e-3)):
        masses = Projector(beam, model, dtype=torch.float64).A(image).sum(1) * 0.5
        torch.testing.assert_close(masses, (image.sum() * 0.25).expand(9), rtol=tolerance, atol=0)
    cut = replace(beam, detectors=20)  # control
    assert Projector(cut, "area").A(image.float()).sum(1).max() * 0.5 < 0.9 * image.sum() * 0.25
    found = Projector(beam, dtype=torch.float64, scale=2.0).A(raster(disc(10.0), 64, 0.5))
    expected = 4 * (100 - beam.offsets.square()).clamp(min=0).sqrt().expand(9, -1)
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("model", ["linear", "area"])
@pytest.mark.parametrize("name", ["parallel", "flat fan", "curved fan"])
def test_error_falls_with_resolution(name: str, model: str) -> None:
    """Sinograms of pixels tend to those in closed form; jumps at the boundaries make it order 1, nearly."""
    ellipses = random_ellipses(6, 28.0, torch.Generator().manual_seed(2))
    sizes, errors = (16, 32, 64, 128), []
    for size in sizes:
        step = {"pixel_mm": 64 / size, "spacing_mm": 64 / size}
        beam: Beam = ParallelBeam(evenly(10), size, padded(size), **step)
        if name != "parallel":
            curved = name == "curved fan"
            far = {"source_mm": 100.0, "detector_mm": 40.0, "curved": curved}
            beam = FanBeam(evenly(12, TURN), size, 2 * size, **step, **far)
        exact = sinogram(ellipses, beam)
        found = Projector(beam, model, dtype=torch.float64).A(raster(ellipses, size, 64 / size))
        errors.append(float((found - exact).norm() / exact.norm()))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert -2 < slope < -0.9
    assert errors[-1] < 0.02
    mirrored = sinogram(ellipses, replace(beam, angles=[-angle for angle in beam.theta.tolist()]))  # control
    assert (found - mirrored).norm() > 0.2 * exact.norm()


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def counted(*given: object) -> object:
        built.append(given)
        return matrix(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("gramian.imaging.kept.matrix", counted)
    beam = BEAMS["parallel"]

    def project() -> Tensor:
        return Projector(beam, cache=tmp_path).A(image_of(beam, dtype=torch.float32))

    expected = project()
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    assert torch.equal(project(), expected)
    assert len(built) == 1
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (whole[:-5], flipped, b"", b"\xff" * 99):
        entry.write_bytes(damaged)
        before = len(built)
        assert torch.equal(project(), expected)
        assert len(built) == before + 1
        assert entry.read_bytes() == whole
    before = len(built)
    Projector(beam, "joseph", cache=tmp_path, scale=3.0)  # the same matrix
    assert len(built) == before
    Projector(beam, "area", cache=tmp_path)
    Projector(beam, cache=tmp_path, dtype=torch.float64)
    Projector(replace(beam, pixel_mm=1.1), cache=tmp_path)
    assert len(built) == before + 3
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.warns(UserWarning, match="could not be kept"):
        Projector(beam, cache=taken)


def test_linear_operator() -> None:
    projector = Projector(BEAMS["parallel, moved"], dtype=torch.float64)
    operator = projector.as_linear_operator()
    x, y = image_of(projector.geometry, 4), random(4, *projector.sinogram_shape, seed=1)
    assert operator.dtype == np.float64
    for product, apply, given in (
        (operator.matvec, projector.A, x),
        (operator.rmatvec, projector.A_adjoint, y),
    ):
        expected = apply(given).flatten(1).T.numpy()
        np.testing.assert_allclose(product(given.flatten(1)[0].numpy()), expected[:, 0])
    np.testing.assert_allclose(operator @ x.flatten(1).T.numpy(), projector.A(x).flatten(1).T.numpy())
    np.testing.assert_allclose(
        operator.H @ y.flatten(1).T.numpy(), projector.A_adjoint(y).flatten(1).T.numpy()
    )
    single = Projector(BEAMS["parallel"]).as_linear_operator()
    assert (single @ np.ones(64)).dtype == np.float32


def test_operators_of_others() -> None:
    projector = Projector(BEAMS["parallel"], dtype=torch.float64)

    class Physics:
        def A(self, x: Tensor) -> Tensor:  # noqa: N802
            return projector.A(x)

        def A_adjoint(self, y: Tensor) -> Tensor:  # noqa: N802
            return projector.A_adjoint(y)

    physics = Physics()
    assert projector_of(physics) is physics
    assert projector_of(projector) is projector
    borrowed = projector_of(projector.as_linear_operator(), sinogram_shape=projector.sinogram_shape)
    x, y = image_of(projector.geometry, 2, 3), random(2, 3, *projector.sinogram_shape, seed=1)
    torch.testing.assert_close(borrowed.A(x), projector.A(x))
    torch.testing.assert_close(borrowed.A_adjoint(y), projector.A_adjoint(y))
    assert torch.autograd.gradcheck(borrowed.A, x[0, 0].clone().requires_grad_())
    flat = projector_of(projector.as_linear_operator())
    torch.testing.assert_close(flat.A(x), projector.A(x).flatten(-2)[..., None, :])
    with pytest.raises(InputError, match="images of this operator have 64 entries, not 7 × 9"):
        projector_of(projector.as_linear_operator(), (7, 9))
    with pytest.raises(InputError, match=r"sinograms of this scan are \(…, 12, 13\), got 12 × 12"):
        borrowed.A_adjoint(torch.zeros(12, 12))
    with pytest.raises(InputError, match="has A and A_adjoint, or is a scipy LinearOperator; got ndarray"):
        projector_of(np.eye(3))  # type: ignore[arg-type]


def test_copies_share_the_matrix() -> None:
    projector = Projector(BEAMS["parallel"])
    other = deepcopy(projector)
    x = image_of(projector.geometry, dtype=torch.float32)
    assert torch.equal(other.A(x), projector.A(x))
    assert other._matrix is projector._matrix


def test_types() -> None:
    projector = Projector(BEAMS["parallel"])
    assert projector.A(torch.ones(8, 8, dtype=torch.bfloat16)).dtype == torch.float32
    assert projector(torch.ones(8, 8, dtype=torch.int64)).dtype == torch.float32
    x = image_of(projector.geometry, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = projector.A(x)
    assert torch.equal(under_autocast, projector.A(x))
    with pytest.raises(InputError, match=r"float32 would round images of torch\.float64"):
        projector.A(torch.ones(8, 8, dtype=torch.float64))


def test_bad_input() -> None:
    beam = BEAMS["parallel"]
    with pytest.raises(InputError, match="unknown discretisation 'strip': linear, joseph, area, rotation"):
        Projector(beam, "strip")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown symmetry 'half'"):
        Projector(beam, symmetry="half")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"float32 or float64, not in torch\.bfloat16"):
        Projector(beam, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="'rotation' is one of parallel beams"):
        Projector(FAN, "rotation")
    projector = Projector(beam)
    with pytest.raises(InputError, match="projector is on cpu and images on meta: move one of them"):
        projector.A(torch.zeros(8, 8, device="meta"))
    with pytest.raises(InputError, match=r"images of this scan are \(…, 8, 8\), got 8 × 9"):
        projector.A(torch.zeros(8, 9))
    with pytest.raises(InputError, match=r"sinograms of this scan are \(…, 12, 13\), got 13"):
        projector.A_adjoint(torch.zeros(13))


def test_too_large_a_matrix_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    view = matrix(replace(BEAMS["parallel"], angles=[0.0])).nnz
    assert MOST == 2**31 - 1
    monkeypatch.setattr("gramian.imaging.discretisation.MOST", 12 * view - 1)
    with pytest.raises(InputError, match="beyond 2³¹ entries: fewer views or larger pixels"):
        Projector(BEAMS["parallel"], symmetry="none")
    assert set(MODELS) == {"linear", "joseph", "area", "rotation"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("symmetry", ["none", "all"])
def test_cuda_equals_cpu(symmetry: str) -> None:
    beam = ParallelBeam(evenly(12), 32, padded(32))
    here = Projector(beam, dtype=torch.float64, symmetry=symmetry)
    there = Projector(beam, dtype=torch.float64, symmetry=symmetry, device="cuda")
    x, y = image_of(beam, 3), random(3, *here.sinogram_shape, seed=1)
    torch.testing.assert_close(there.A(x.cuda()).cpu(), here.A(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(there.A_adjoint(y.cuda()).cpu(), here.A_adjoint(y), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(there.subset([3]).A(x.cuda()).cpu(), here.subset([3]).A(x))
    assert torch.autograd.gradcheck(there.A, x[0].cuda().requires_grad_(), fast_mode=True)
