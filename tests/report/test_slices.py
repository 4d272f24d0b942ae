import numpy as np
import pytest
from matplotlib.image import imread

from gramian.errors import InputError
from gramian.report import save
from gramian.report.slices import profile, round_length, slices, write_grey

RAMP = np.linspace(0, 1, 48).reshape(6, 8)


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def test_a_picture_has_a_pixel_for_a_value_and_cuts_at_the_ends(tmp_path) -> None:
    write_grey(tmp_path / "a.png", RAMP, (0.25, 0.75))
    read = imread(tmp_path / "a.png")
    assert read.shape[:2] == RAMP.shape
    np.testing.assert_allclose(read[..., 0], np.clip((RAMP - 0.25) * 2, 0, 1), atol=0.501 / 255)
    assert (read[..., 0] == read[..., 2]).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("image", "ends"),
    [(RAMP, (1.0, 1.0)), (RAMP, (0.0, np.inf)), (RAMP * np.nan, (0.0, 1.0)), (RAMP[0], (0.0, 1.0))],
)
def test_what_is_no_picture_is_not_written(tmp_path, image, ends) -> None:
    with pytest.raises(InputError):
        write_grey(tmp_path / "a.png", image, ends)
    assert list(tmp_path.iterdir()) == []


def test_slices_share_one_scale_and_keep_their_shape(tmp_path) -> None:
    images = {f"n{k}": RAMP * k for k in range(5)}
    figure = slices(images, value="HU", ends=(0.0, 2.0), pixel_mm=2.5)
    drawn = [axes.images[0] for axes in figure.axes if axes.images]
    assert [image.get_clim() for image in drawn] == [(0, 2)] * 5
    np.testing.assert_array_equal(drawn[3].get_array(), RAMP * 3)
    box = figure.axes[0].get_window_extent()
    assert box.width / box.height == pytest.approx(8 / 6)
    assert {"HU", "n0", "n4", "5 mm"} <= set(texts(figure))
    bar = next(line for line in figure.get_children() if hasattr(line, "get_xdata"))
    width = figure.get_size_inches()[0] * 72 * np.ptp(bar.get_xdata())
    assert width / box.width == pytest.approx(5 / (8 * 2.5))  # as long as it says
    save(figure, tmp_path / "f.svg")
    assert "data:image/png;base64" in (tmp_path / "f.svg").read_text()


def test_lengths_are_round() -> None:
    for most, length in ((1.0, 1), (1.99, 1), (2, 2), (49, 20), (50, 50), (0.0034, 0.002), (3e5, 2e5)):
        assert round_length(most) == pytest.approx(length)


def test_slices_that_do_not_fit() -> None:
    for images, ends, pixel in (
        ({}, (0.0, 1.0), 1.0),
        ({"a": RAMP, "b": RAMP.T}, (0.0, 1.0), 1.0),
        ({"a": RAMP}, (1.0, 0.0), 1.0),
        ({"a": RAMP}, (0.0, 1.0), 0.0),
    ):
        with pytest.raises(InputError):
            slices(images, value="v", ends=ends, pixel_mm=pixel)


def test_a_profile_has_its_interval_and_its_curves() -> None:
    x = [0.0, 1, 2]
    figure = profile(
        x, {"own": [1, 2, 3], "truth": [1, 1, 1]}, ([0, 1, 2], [2, 3, 4]),
        value="HU", place="mm", interval="95 % interval",
    )  # fmt: skip
    axes = figure.axes[0]
    assert [line.get_ydata().tolist() for line in axes.get_lines()] == [[1, 2, 3], [1, 1, 1]]
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().bounds == (0, 0, 2, 4)
    assert {"own", "95 % interval", "truth", "HU"} <= set(texts(figure))
    assert "95 % interval" not in texts(profile(x, {"own": [1, 2, 3]}, value="v", place="mm"))
    with pytest.raises(InputError, match="each of 3 values"):
        profile(x, {"own": [1, 2]}, value="v", place="mm")
    with pytest.raises(InputError, match="one curve or more"):
        profile(x, {}, value="v", place="mm")
