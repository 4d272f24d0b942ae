"""Scans as a user gives them: what is simulated, what is read, what is told, and what is refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.dicom import WATER, CTSlice, attenuation, example_slice, read_slice, write_slice
from gramian.imaging.geometry import FanBeam, ParallelBeam, evenly
from gramian.imaging.noise import GaussianNoise
from gramian.imaging.phantoms import disc, random_ellipses, raster, shepp_logan, sinogram
from gramian.imaging.radon import Projector
from gramian.tasks import scan_beams
from gramian.tasks.scan_beams import affordable
from gramian.tasks.scan_files import estimated_noise, in_radians, kind_of, read_angles
from gramian.tasks.scans import Scan, Source

F64 = torch.float64
needs_pydicom = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("pydicom"), reason="needs pydicom"
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saved(folder: Path, name: str, values: Any) -> Path:
    np.save(folder / name, values.numpy() if isinstance(values, Tensor) else np.asarray(values))
    return folder / name


def measured(folder: Path, views: int = 24, side: int = 48, detectors: int | None = None) -> Path:
    """A noisy sinogram y.npy of a phantom, with its angles in radians and in degrees."""
    beam = ParallelBeam(evenly(views), side, detectors or 68)
    exact = sinogram(shepp_logan(float(side)), beam)
    saved(folder, "y.npy", GaussianNoise.at_snr(exact, 40).sample(exact, seeded()))
    saved(folder, "radians.npy", beam.theta)
    np.savetxt(folder / "degrees.txt", beam.theta.rad2deg().numpy(), header="angles of the views")
    return folder / "y.npy"


def difference(scan: Scan, image: Tensor) -> float:
    exact = scan.projector()(image)
    return float((exact - scan.sinogram).norm() / scan.sinogram.norm())


def test_the_phantom_is_its_closed_form_with_noise() -> None:
    state = torch.get_rng_state()
    scan = Source(size=32, views=20).load()
    beam = ParallelBeam(evenly(20), 32, 46)
    within = ParallelBeam(evenly(20), 32, 4 * 46, spacing_mm=0.25)
    exact = sinogram(shepp_logan(32.0), within).unflatten(1, (46, 4)).mean(-1)
    assert scan.geometry == beam
    assert scan.noise_std == pytest.approx(0.01 * float(exact.square().mean().sqrt()), rel=1e-12)
    z = (scan.sinogram.double() - exact) / scan.noise_std
    assert abs(float(z.mean())) < 4 / math.sqrt(z.numel())
    assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / z.numel())
    torch.testing.assert_close(scan.truth, raster(shepp_logan(32.0), 32).float())
    assert (scan.peak, scan.unit, scan.slice, scan.noise) == (1.0, "", None, "Gaussian, 40 dB")
    assert scan.sinogram.dtype == torch.float32
    assert scan.warnings == ()
    assert scan.to_hounsfield(scan.truth) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["phantom", "ellipses"])
def test_seeds_are_streams(name: str) -> None:
    one, same, other = (Source(scan=name, size=16, views=20, seed=seed).load() for seed in (1, 1, 2))
    assert torch.equal(one.sinogram, same.sinogram)
    assert not torch.equal(one.sinogram, other.sinogram)
    assert torch.equal(one.truth, other.truth) == (name == "phantom")
    assert float(one.truth.max()) == pytest.approx(1, abs=1e-6 if name == "ellipses" else 0.7)


@pytest.mark.parametrize("beam", ["parallel", "fan"])
@pytest.mark.parametrize("name", ["phantom", "ellipses", "image"])
def test_no_simulation_is_by_the_matrix_that_inverts_it(name: str, beam: str, tmp_path: Path) -> None:
    if name == "image":
        name = str(saved(tmp_path, "image.npy", raster(shepp_logan(64.0), 64)))
    scan = Source(scan=name, size=64, views=24, noise_db=120, beam=beam).load()
    assert scan.truth is not None
    assert 1e-3 < difference(scan, scan.truth) < 0.05
    assert difference(scan, scan.truth.T) > 0.05  # control


def test_an_image_keeps_its_mass_in_every_view(tmp_path: Path) -> None:
    """Strips as wide as detectors share out all of an image."""
    image = torch.rand(24, 24, generator=seeded(), dtype=F64)
    scan = Source(scan=str(saved(tmp_path, "x.npy", image)), noise_db=120, pixel_mm=0.5, size=12).load()
    assert scan.geometry.pixel_mm == 1
    mass = scan.sinogram.sum(1) * scan.geometry.spacing_mm
    torch.testing.assert_close(mass, torch.full_like(mass, float(image.sum()) * 0.25), rtol=2e-5, atol=0)
    means = image.reshape(12, 2, 12, 2).mean((1, 3)).float()
    torch.testing.assert_close(scan.truth, means)
    assert scan.peak == 1


@needs_pydicom
def test_the_example_is_attenuation_with_the_files_geometry(tmp_path: Path) -> None:
    source = example_slice()
    scan = Source(scan="example", views=20).load(tmp_path / "cache")
    assert scan.truth is not None
    assert scan.slice is not None
    torch.testing.assert_close(scan.truth, attenuation(source.hounsfield), rtol=1e-5, atol=1e-8)
    assert (scan.unit, scan.geometry.pixel_mm) == ("1/mm", source.pixel_mm)
    assert 1 < scan.peak / float(scan.truth.max()) < 1.7
    torch.testing.assert_close(scan.to_hounsfield(scan.truth), scan.slice.hounsfield.float())
    coarse = Source(scan="example", views=20, size=32).load()
    assert coarse.slice is not None
    torch.testing.assert_close(coarse.truth.mean(), scan.truth.mean())
    middles = []
    for one in (source, coarse.slice):
        ways, reach = one.orientation, (len(one.hounsfield) - 1) / 2 * one.pixel_mm
        middles.append([one.position[k] + reach * (ways[k] + ways[3 + k]) for k in range(3)])
    assert middles[0] == pytest.approx(middles[1], abs=1e-9)
    assert source.position != pytest.approx(coarse.slice.position, abs=0.1)  # control
    write_slice(tmp_path / "x.dcm", coarse.to_hounsfield(coarse.truth), coarse.slice, "as it was")
    assert read_slice(tmp_path / "x.dcm").pixel_mm == 4 * source.pixel_mm


@needs_pydicom
def test_photons_count(tmp_path: Path) -> None:
    scan = Source(scan="example", views=20, size=64, photons=2e4).load()
    exact = Source(scan="example", views=20, size=64, noise_db=120).load().sinogram
    assert isinstance(scan.noise_std, Tensor)
    counts = scan.noise_std.double() ** -2
    torch.testing.assert_close(counts, counts.round(), rtol=1e-5, atol=0)  # variance 1/n
    torch.testing.assert_close((counts / 2e4).log(), -scan.sinogram.double(), rtol=0, atol=1e-5)
    z = ((scan.sinogram - exact) / scan.noise_std).double()
    assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / z.numel())
    assert (scan.noise, scan.warnings) == ("Poisson, 20000 photons a ray", ())
    dark = Source(size=16, photons=2).load()
    assert dark.sinogram.isfinite().all()
    assert "counted no photon" in dark.warnings[0]


def test_what_has_no_unit_attenuates_as_water() -> None:
    bright, exact = Source(size=32, photons=1e9).load(), Source(size=32, noise_db=120).load().sinogram
    assert isinstance(bright.noise_std, Tensor)
    top = float(bright.truth.max())
    expected = (exact * WATER / top).exp().div(1e9).sqrt() / (WATER / top)
    torch.testing.assert_close(bright.noise_std, expected, rtol=1e-3, atol=0)
    assert float(((bright.sinogram - exact) / bright.noise_std).square().mean()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("more", [{}, {"curved": True}, {"source_mm": 40.0}, {"offset_mm": 3.0}])
def test_detectors_cover_the_image(more: dict[str, Any]) -> None:
    for given in ({}, {"detectors": 40}, {"spacing_mm": 0.7}):
        fan = Source(size=32, views=20, beam="fan", **given, **more).load()
        assert isinstance(fan.geometry, FanBeam)
        assert fan.warnings == ()
        assert fan.geometry.angles == evenly(20, 2 * math.pi)
        seen, whole = fan.geometry.coverage()
        assert seen > whole * (1 - 1e-6)
        assert seen < whole * 1.1
        if not set(more) & {"curved", "source_mm"}:
            parallel = Source(size=32, views=20, **given, **more).load()
            assert parallel.geometry.coverage().seen_mm == pytest.approx(seen, rel=0.05)


def test_narrow_detectors_are_told_with_the_numbers() -> None:
    scan = Source(size=32, views=20, detectors=20, spacing_mm=1.0).load()
    seen, whole = scan.geometry.coverage(scan.truth)
    assert seen == 20
    assert f"a disc of {seen:.4g} mm" in scan.warnings[0]
    assert f"over {whole:.4g} mm" in scan.warnings[0]
    few = Source(size=32, views=5).load()
    assert "5 views are few" in few.warnings[0]
    assert "wedge" not in " ".join(few.warnings)


def test_sinograms_are_read(tmp_path: Path) -> None:
    path, beam = measured(tmp_path), ParallelBeam(evenly(24), 48, 68)
    exact = sinogram(shepp_logan(48.0), beam)
    for angles in ("radians.npy", "degrees.txt"):
        scan = Source(scan=str(path), angles=tmp_path / angles).load()
        assert scan.geometry.shape == (48, 48)
        assert (scan.geometry.pixel_mm, scan.geometry.spacing_mm) == (1, 1)
        torch.testing.assert_close(scan.geometry.theta, beam.theta)
        true = 0.01 * float(exact.square().mean().sqrt())
        assert 0.9 < scan.noise_std / true < 1.7
        assert 1 < scan.peak < 1.8
        assert (scan.truth, scan.slice, scan.unit, scan.warnings) == (None, None, "", ())
        assert "estimated" in scan.noise
    given = Source(
        scan=str(path), angles=tmp_path / "radians.npy", noise_std=0.25, size=40, pixel_mm=1.1
    ).load()
    assert (given.noise_std, given.geometry.shape, given.geometry.pixel_mm) == (0.25, (40, 40), 1.1)
    assert "as given" in given.noise


def test_the_image_of_a_sinogram_holds_the_object(tmp_path: Path) -> None:
    beam = ParallelBeam(evenly(24), 60, 60)
    angles = saved(tmp_path, "angles.npy", beam.theta)
    for radius, side, told in ((29.0, 60, "reaches beyond the largest square"), (20.0, 42, "")):
        path = saved(tmp_path, "y.npy", sinogram(disc(radius, 1.0), beam))
        scan = Source(scan=str(path), angles=angles).load()
        assert scan.geometry.shape == (side, side)
        assert told in " ".join(scan.warnings)
    flat = Source(scan=str(saved(tmp_path, "flat.npy", np.ones((24, 60)))), angles=angles).load()
    assert "80 dB below" in " ".join(flat.warnings)
    assert flat.noise_std == pytest.approx(1e-4)
    small = Source(scan=str(path), angles=angles, size=24).load()
    assert "beside the image of 24 pixels" in " ".join(small.warnings)
    path = saved(tmp_path, "y.npy", sinogram(disc(50.0, 1.0), beam))
    cut = Source(scan=str(path), angles=angles).load()
    assert "beyond the 60 mm of detectors" in " ".join(cut.warnings)
    third = saved(tmp_path, "third.npy", beam.theta / 3 + 1)
    assert "no view is from a wedge of 12" in " ".join(
        Source(scan=str(path), angles=third, angle_unit="radians").load().warnings
    )


def test_a_fans_sinogram_is_read(tmp_path: Path) -> None:
    beam = FanBeam(evenly(30, 2 * math.pi), 40, 66, spacing_mm=2.0, source_mm=90.0, detector_mm=90.0)
    path = saved(tmp_path, "y.npy", sinogram(shepp_logan(40.0), beam))
    fan = {"beam": "fan", "source_mm": 90.0, "spacing_mm": 2.0}
    angles = saved(tmp_path, "angles.npy", beam.theta.rad2deg() - 400)
    scan = Source(scan=str(path), angles=angles, detector_mm=90.0, **fan).load()
    assert scan.geometry.pixel_mm == 1
    assert scan.geometry.coverage().seen_mm >= scan.geometry.coverage().object_mm
    turned = (scan.geometry.theta - beam.theta + math.radians(400)) % (2 * math.pi)
    assert float(turned.minimum(2 * math.pi - turned).max()) < 1e-6
    with pytest.raises(InputError, match="needs source_mm and detector_mm"):
        Source(scan=str(path), angles=angles, **fan).check()


def test_views_of_the_projector(tmp_path: Path) -> None:
    scan = Source(size=16, views=20).load()
    whole, part = scan.projector(cache=tmp_path), scan.projector([3, 19, 4])
    assert whole.model == "linear"
    torch.testing.assert_close(part(scan.truth), whole(scan.truth)[[3, 19, 4]])
    for wrong in ([], [20], [-1]):
        with pytest.raises(InputError, match="views 0 to 19"):
            scan.projector(wrong)


@pytest.mark.parametrize(
    ("angles", "unit"),
    [
        (np.arange(180.0), "degrees"),
        (np.arange(0, 180, 7.5), "degrees"),
        (np.arange(-90.0, 90, 3), "degrees"),
        (np.arange(20) * 111.246, "degrees"),
        (np.arange(60) * math.pi / 60, "radians"),
        (np.arange(60) * math.pi / 30, "radians"),
        (np.linspace(-math.pi / 4, math.pi / 4, 20), "radians"),
        (np.arange(20) * 1.941611 % math.pi, "radians"),
        (np.round(np.arange(60) * math.pi / 60, 3), "radians"),
        (np.array([0.0, math.pi / 2]), "radians"),
        (np.zeros(1), "radians"),
        (np.arange(7.0), "asked"),
        (np.arange(60) * 0.1, "asked"),
        (np.arange(60) * 0.0233, "asked"),
        (np.array([1.5]), "asked"),
        (np.linspace(-5.1, 5.2, 40), "asked"),
    ],
)
def test_degrees_and_radians_are_told_apart_or_asked_for(angles: np.ndarray, unit: str) -> None:
    given = torch.from_numpy(angles)
    if unit == "asked":
        with pytest.raises(InputError, match="are these degrees or radians"):
            in_radians(given)
        torch.testing.assert_close(in_radians(given, "degrees"), given.deg2rad())
        assert torch.equal(in_radians(given, "radians"), given)
    else:
        expected = torch.fmod(given, 360).deg2rad() if unit == "degrees" else given
        torch.testing.assert_close(in_radians(given), expected)
        torch.testing.assert_close(in_radians(given, unit), expected)
    if unit == "degrees":
        with pytest.raises(InputError, match="beyond a full turn of 2π radians; are these degrees"):
            in_radians(given, "radians")


def test_degrees_that_look_like_radians_are_told(tmp_path: Path) -> None:
    path = measured(tmp_path)
    scan = Source(scan=str(path), angles=tmp_path / "radians.npy", angle_unit="degrees").load()
    assert "within 3.01° of 0; --angle-unit radians" in " ".join(scan.warnings)


@pytest.mark.parametrize(
    "text",
    [
        "0 1.5\n2.25\n",
        "0,1.5,2.25",
        "\ufeff0;1.5;\r\n2.25",
        "# degrees\n0\t1.5 # two\n\n+2.25e0",
        "0\n1.5\n2.25",
    ],
)
def test_texts_of_angles(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert read_angles(tmp_path / "a.txt").tolist() == [0, 1.5, 2.25]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 angles"),
        (b"# none\n\n", "0 angles"),
        (b"0 1\n2 two 3", "line 2 of .*'two'"),
        (b"0 nan", "'nan', which is no angle"),
        (b"0 1e999", "'1e999'"),
        (b"\xff\xfe\x00", "neither"),
        (b"0\x000", "no angle"),
        (b"1 " * 20_001, "20,001 angles"),
        (b"1" * (2**20 + 1), "at most 1,048,576"),
    ],
)
def test_texts_that_are_no_angles(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read_angles(tmp_path / "a.txt")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_arrays_of_angles(tmp_path: Path) -> None:
    for shape in ((3,), (3, 1), (1, 3)):
        assert read_angles(saved(tmp_path, "a.npy", np.arange(3).reshape(shape))).tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r"one number a view in one row, .* is 2 × 2"):
        read_angles(saved(tmp_path, "a.npy", np.zeros((2, 2))))
    for wrong in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"is no file|there is no file"):
            read_angles(wrong)


def objects() -> dict[str, Tensor]:
    beam = ParallelBeam(evenly(30), 128, 182)
    return {
        "phantom": sinogram(shepp_logan(128.0), beam),
        "ellipses": sinogram(random_ellipses(12, 57.0, seeded()), beam),
        "nothing": sinogram(disc(20.0, 1e-9), beam),
    }


@pytest.mark.parametrize("name", ["phantom", "ellipses", "nothing"])
@pytest.mark.parametrize(("decibel", "most"), [(20, 1.1), (30, 1.15), (40, 1.3), (50, 1.6)])
def test_noise_is_estimated_within_a_stated_factor(name: str, decibel: float, most: float) -> None:
    exact = objects()[name]
    noise = GaussianNoise.at_snr(exact, decibel)
    measured = noise.sample(exact, seeded(1))
    assert (
        0.93 < estimated_noise(measured) / noise.std < (1.07 if name == "nothing" and decibel < 20 else most)
    )
    first = float(measured.diff(dim=-1).abs().median()) / 0.6744897501960817 / math.sqrt(2)
    if decibel >= 40 and name != "nothing":
        assert first / noise.std > most  # control: first differences see the object


def test_noise_is_estimated_beside_detectors_that_were_filled_in() -> None:
    measured = torch.zeros(30, 400, dtype=F64)
    measured[:, 150:250] = 3 + 0.1 * torch.randn(30, 100, generator=seeded(), dtype=F64)
    assert estimated_noise(measured) == pytest.approx(0.1, rel=0.1)
    assert estimated_noise(torch.ones(3, 9)) == 0
    with pytest.raises(InputError, match="at least 4 detectors"):
        estimated_noise(torch.ones(9, 3))


def test_negative_values_that_noise_explains_are_kept(tmp_path: Path) -> None:
    beam = ParallelBeam(evenly(24), 48, 68)
    exact = sinogram(disc(10.0), beam)
    noisy = GaussianNoise.at_snr(exact, 20).sample(exact, seeded())
    assert float(noisy.min()) < -0.01 * float(noisy.max())
    angles = saved(tmp_path, "angles.npy", beam.theta)
    scan = Source(scan=str(saved(tmp_path, "y.npy", noisy)), angles=angles).load()
    assert torch.equal(scan.sinogram, noisy.float())
    noisy[3, 4] = noisy[5, 6] = -8.5
    with pytest.raises(InputError, match=r"holds 2 values below -.*the least -8\.5"):
        Source(scan=str(saved(tmp_path, "y.npy", noisy)), angles=angles).load()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beam": "cone"}, "unknown beam 'cone'"),
        ({"angle_unit": "grad"}, "unknown angle_unit"),
        ({"views": 0}, "views has to be from 1 to 20,000, got 0"),
        ({"views": 20_001}, "views has to be"),
        ({"size": 7}, "size has to be from 8 to 4,096"),
        ({"size": 10**9}, "size has to be"),
        ({"detectors": 0}, "detectors has to be"),
        ({"noise_db": math.nan}, "noise_db has to be"),
        ({"noise_db": 1e3}, "noise_db has to be"),
        ({"photons": 0.0}, "photons has to be"),
        ({"photons": math.inf}, "photons has to be"),
        ({"photons": 1e4, "noise_db": 30.0}, "noise_db is for Gaussian noise"),
        ({"pixel_mm": 0.0}, "pixel_mm has to be"),
        ({"spacing_mm": -1.0}, "spacing_mm has to be"),
        ({"offset_mm": math.inf}, "offset_mm has to be"),
        ({"source_mm": 100.0}, "source_mm is for --beam fan"),
        ({"curved": True}, "curved is for --beam fan"),
        ({"seed": -1}, "seed has to be"),
        ({"noise_std": 0.1}, "noise_std is for a sinogram"),
        ({"angle_unit": "degrees"}, "angle_unit is for a sinogram"),
        ({"angles": Path("a.txt")}, "not for phantom"),
        ({"scan": "x.npy", "angles": Path("a.txt"), "photons": 1e5}, "photons is for what is simulated"),
        ({"scan": "x.npy", "angles": Path("a.txt"), "views": 30}, "views is for what is simulated"),
        ({"scan": "x.npy", "angles": Path("a.txt"), "detectors": 30}, "detectors is for what is simulated"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Source(**settings).check()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scan": "absent.npy"}, "there is no file absent"),
        ({"scan": "sheep"}, "a scan is one of phantom, ellipses, example"),
        ({"scan": "\0"}, "there is no file|cannot be read"),
        ({"scan": "~nobody-of-this-name/x"}, "home of nobody"),
        ({"scan": "x" * 5000}, "cannot be read"),
        ({"scan": "."}, "is no file"),
        ({"scan": "example", "pixel_mm": 1.0}, "pixel_mm is in the DICOM file"),
        ({"scan": "example", "size": 100}, "does not divide the 128 pixels .* are 32, 64, 128"),
        ({"beam": "fan", "source_mm": 1.0}, "outside the image"),
        ({"spacing_mm": 1e-3}, "181,020 detectors of 0.001 mm"),
        ({"offset_mm": -1e4, "detectors": 20, "spacing_mm": 1.0}, "no ray meets the object"),
        ({"size": 4096, "views": 20_000}, "would take about .* GiB"),
        ({"size": 8, "views": 20_000, "detectors": 20_000}, "20,000 views by 20,000 detectors"),
    ],
)
@needs_pydicom
def test_scans_that_cannot_be_made(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Source(**settings).load()
    assert "\n" not in str(caught.value)


IMAGE = np.ones((16, 16))


def changed(*values: float) -> np.ndarray:
    image = IMAGE.copy()
    image[0, : len(values)] = values
    return image


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.ones((16, 20)), "16 × 20: a square is projected as an image; a sinogram .* --angles"),
        (np.ones((4, 4)), "4 × 4 pixels; 8 to 4096"),
        (np.ones(16), "of 2 axes"),
        (np.zeros((16, 16)), "0 everywhere"),
        (changed(-1, -2), "2 negative values, the least -2"),
        (changed(math.nan), "finite"),
        (IMAGE * 1e30, "reach 1e[+]30"),
        (IMAGE * 1e-30, "reach 1e-30"),
    ],
)
def test_images_that_cannot_be_projected(image: np.ndarray, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        Source(scan=str(saved(tmp_path, "x.npy", image))).load()


def test_images_of_other_ranges_have_a_peak_from_the_data(tmp_path: Path) -> None:
    image = raster(shepp_logan(64.0), 64) * 255
    image[0, 0] = -1e-3
    scan = Source(scan=str(saved(tmp_path, "x.npy", image))).load()
    assert 1 < scan.peak / 255 < 1.8
    assert float(scan.truth.min()) == 0
    huge = Source(scan=str(saved(tmp_path, "x.npy", image * 1e9)), photons=1e5).load()
    assert 1 < huge.peak / 255e9 < 1.8


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.ones((30, 24)), "30 views .* × 24 detectors .* there are 24 angles.*; its transpose"),
        (np.ones((30, 40)), "30 views .* × 40 detectors .* there are 24 angles, one a view is needed$"),
        (np.ones((24, 7)), "7 detectors; 8 to 20,000"),
        (np.zeros((24, 30)), "0 everywhere"),
        (-np.ones((24, 30)), "720 values below"),
        (np.full((24, 30), np.inf), "NaN or infinite"),
        (np.ones((2, 24, 30)), "of 2 axes"),
    ],
)
def test_sinograms_that_cannot_be_used(values: np.ndarray, said: str, tmp_path: Path) -> None:
    angles = saved(tmp_path, "a.npy", evenly(24))
    with pytest.raises(InputError, match=said):
        Source(scan=str(saved(tmp_path, "y.npy", values)), angles=angles).load()


def test_detectors_that_see_no_image(tmp_path: Path) -> None:
    path = measured(tmp_path)
    for more in ({"pixel_mm": 20.0}, {"offset_mm": 50.0}, {"pixel_mm": 1e-4}):
        with pytest.raises(InputError, match="every view sees a disc of"):
            Source(scan=str(path), angles=tmp_path / "radians.npy", **more).load()


@needs_pydicom
def test_dicom_is_known_by_its_mark(tmp_path: Path) -> None:
    like = CTSlice(torch.zeros(8, 8), 2.0)
    write_slice(tmp_path / "nameless", torch.full((8, 8), 40.0), like, "x")
    assert kind_of(str(tmp_path / "nameless")) == "dicom"
    scan = Source(scan=str(tmp_path / "nameless")).load()
    assert scan.geometry.pixel_mm == 2
    with pytest.raises(InputError, match="angles is for a sinogram"):
        Source(scan=str(tmp_path / "nameless"), angles=tmp_path / "a").load()
    write_slice(tmp_path / "air.dcm", torch.full((8, 8), -1000.0), like, "x")
    with pytest.raises(InputError, match="is air everywhere"):
        Source(scan=str(tmp_path / "air.dcm")).load()
    (tmp_path / "x.dcm").write_bytes(b"no")
    with pytest.raises(InputError, match="no DICOM file"):
        Source(scan=str(tmp_path / "x.dcm")).load()
    (tmp_path / "x.png").write_bytes(b"no")
    with pytest.raises(InputError, match=r"neither DICOM nor \.npy"):
        Source(scan=str(tmp_path / "x.png")).load()


@pytest.mark.parametrize("beam", ["parallel", "fan"])
def test_memory_is_foretold(beam: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Source(beam=beam, views=17, offset_mm=1.0).simulated(17, 64, 1.0)
    fine = Source(beam=beam, views=17, offset_mm=1.0).simulated(17, 64, 1.0)
    linear, area = Projector(geometry).memory, Projector(fine, "area").memory
    views = len(Projector(geometry).folding.geometry.angles)
    assert 1 < scan_beams._bytes(geometry, None, views) / linear < 2.5
    both = scan_beams._bytes(geometry, fine, views) - scan_beams._bytes(geometry, None, views)
    assert 1 < both / area < 2.5
    affordable(geometry, fine)
    monkeypatch.setattr(scan_beams, "ROOM", linear)
    with pytest.raises(InputError, match="17 views by"):
        affordable(geometry)
