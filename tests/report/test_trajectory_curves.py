"""Hallmarks by step, layer and component: what is drawn and named, beside the values of a random walk."""

import math
from itertools import pairwise

import numpy as np
import pytest

from gramian.errors import InputError
from gramian.report.style import MUTED, inline, palette, save
from gramian.report.trajectory_curves import (
    Trace,
    component_shares,
    layer_profile,
    traces,
    update_angles,
    update_lengths,
)

NAN, INF = math.nan, math.inf
AWKWARD = {
    "usual": [3.0, 2.0, 1.5],
    "empty": [],
    "one": [2.0],
    "all nan": [NAN, NAN],
    "hole": [3.0, NAN, 1.0],
    "flat": [2.0, 2.0, 2.0],
    "zero": [0.0, 0.0],
    "negative": [-3.0, 1.0, 2.0],
    "huge": [1e-300, 1e300, INF],
    "wide": [1e-90, 1.0, 1e90],
}


def texts(figure):
    inline(figure, "f1", "A figure.")
    return [text.get_text() for text in figure.texts]


def lines(figure, length):
    """The lines of the first axes with so many points, as colour -> heights."""
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata()) == length]
    return {line.get_color(): list(line.get_ydata()) for line in drawn}


@pytest.mark.parametrize("log_x", [False, True])
@pytest.mark.parametrize("values", AWKWARD.values(), ids=AWKWARD)
def test_awkward_values_are_drawn(values, log_x) -> None:
    steps = np.arange(len(values))
    trace = Trace(steps, np.array(values), np.array(values) - 1, np.array(values) + 1, np.array(values))
    for figure in (
        traces({"a": trace}, y="ω", references={"none": NAN, "level": 2.0}, log_x=log_x),
        update_angles({"a": trace}, log_x=log_x),
        update_lengths({"a": trace}, log_x=log_x),
        layer_profile({"a": values}, [str(step) for step in steps], y="ω", references={"none": NAN}),
        component_shares({"a": values}),
        component_shares({"a": values}, values),
    ):
        assert any(text == "a" or text == "a: none" for text in texts(figure))


def test_a_trace_has_its_band_and_the_palette_of_the_comparison() -> None:
    series = {
        "first": Trace([1, 2, 3], [80.0, 85.0, 90.0], [70, 75, 80], [90, 95, 100]),
        "second": Trace([1, 2, 3], [60.0, 65.0, 70.0]),
    }
    colours = palette(["other", "second", "first"])
    figure = traces(series, y="angle", colours=colours)
    assert lines(figure, 3) == {colours["first"]: [80, 85, 90], colours["second"]: [60, 65, 70]}
    band = figure.axes[0].collections[0]
    box = band.get_datalim(figure.axes[0].transData)
    assert (box.y0, box.y1) == (70, 100)
    low, high = figure.axes[0].get_ylim()
    assert low < 60
    assert high > 100
    assert {"first", "second", "angle"} <= set(texts(figure))
    with pytest.raises(InputError, match="'first'"):
        traces(series, y="angle", colours=palette(["second"]))


def test_angles_stand_beside_a_random_walk_and_jitter() -> None:
    figure = update_angles({"run": Trace([1, 2], [4.0, 5.0])})
    assert {"random walk 90°", "jitter 120°"} <= set(texts(figure))
    levels = {line.get_ydata()[0] for line in figure.axes[0].lines if line.get_color() == MUTED}
    assert levels == {90, 120}
    axis = figure.axes[0].yaxis
    assert [label.get_text() for label in axis.get_ticklabels()][1:-1] == ["0°", "30°", "60°", "90°", "120°"]
    near = update_angles({"run": Trace([1, 2], [89.0, 91.0])})
    assert near.axes[0].get_ylim()[0] > 80


def noise(floor):
    figure = update_lengths({"run": Trace([1, 2, 3], [0.1, 0.01, 0.01], floor=floor)})
    return figure, [shade for shade in figure.axes[0].collections if shade.get_alpha() == 0.16]


def test_rounding_noise_is_shaded_where_it_matters() -> None:
    figure, shades = noise([0.004, 0.004, 0.02])
    assert len(shades) == 1
    assert shades[0].get_datalim(figure.axes[0].transData).y1 == pytest.approx(0.02)
    assert "rounding noise" in texts(figure)
    assert figure.axes[0].get_yscale() == "log"
    for floor in ([], [1e-9] * 3, [NAN] * 3):
        figure, shades = noise(floor)
        assert not shades
        assert "rounding noise" not in texts(figure)
        assert figure.axes[0].get_ylim()[0] > 1e-3


def test_log_steps_leave_out_step_zero() -> None:
    series = {"run": Trace([0, 1, 10, 100_000], [1.0, 2.0, 3.0, 4.0])}
    even, odd = (traces(series, y="ω", log_x=log_x).axes[0] for log_x in (False, True))
    assert even.get_xlim()[0] < 0 < odd.get_xlim()[0] < 1
    assert (even.get_xscale(), odd.get_xscale()) == ("linear", "log")


def test_traces_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="at least one series"):
        traces({}, y="ω")
    for trace in (Trace([1, 2], [1.0]), Trace([1], [1.0], low=[1, 2]), Trace([1, 2], [1, 2], floor=[1])):
        with pytest.raises(InputError, match="'run'"):
            traces({"run": trace}, y="ω")


def layered(count):
    """Layers of a transformer, and values of seven kinds, each with one of its own."""
    layers = ["embed", *map(str, range(count)), "final"]
    kinds = {kind: [NAN, *np.linspace(0.5, 0.6 + 0.05 * i, count), NAN] for i, kind in enumerate("QKVO")}
    kinds["MLP"], kinds["norm"] = [NAN, *[0.7] * count, NAN], [NAN, *[0.8] * count, 0.9]
    kinds["embedding"] = [0.4, *[NAN] * count, 0.3]
    return kinds, layers


@pytest.mark.parametrize("count", [1, 12, 48, 200])
def test_every_kind_has_a_mark_of_its_own_in_each_layer(count) -> None:
    kinds, layers = layered(count)
    figure = layer_profile(kinds, layers, y="ω", references={"random walk": 2 / 3})
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata()) == count + 2]
    marked = [line for line in drawn if line.get_marker() != "None"]
    assert len({(line.get_marker(), line.get_color()) for line in marked}) == len(kinds)
    for line, values in zip(marked, kinds.values(), strict=True):
        assert np.array_equal(line.get_ydata(), values, equal_nan=True)
    assert {*kinds, "random walk 0.667", "ω"} <= set(texts(figure))


@pytest.mark.parametrize("count", [1, 12, 48, 200])
def test_names_of_layers_do_not_touch(count) -> None:
    figure = layer_profile(*layered(count), y="ω")
    texts(figure)
    labels = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    boxes = sorted((box.x0, box.x1) for box in (label.get_window_extent() for label in labels))
    assert all(before[1] < after[0] for before, after in pairwise(boxes))
    names = [label.get_text() for label in labels]
    assert names[0] == "embed"
    assert names[-1] == "final"
    assert len(names) >= min(count, 5) + 2


def test_names_of_layers_in_words_are_written_as_fit() -> None:
    layers = [f"stage{i}.block{j} $<&>" for i in range(4) for j in range(6)]
    figure = layer_profile({"conv": range(24)}, layers, y="ω")
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert 3 <= len(shown) < 24
    assert shown[0] == "stage0.bloc…"


def test_many_kinds_wrap_and_wrong_ones_are_refused() -> None:
    kinds = {f"kind of part number {index}": [1.0, 2.0] for index in range(14)}
    figure = layer_profile(kinds, ["0", "1"], y="ω")
    assert set(kinds) <= set(texts(figure))
    inside = [text.get_window_extent().x1 for text in figure.texts]
    assert max(inside) <= figure.bbox.width
    with pytest.raises(InputError, match="'Q'"):
        layer_profile({"Q": [1.0]}, ["0", "1"], y="ω")
    with pytest.raises(InputError, match="at least one series"):
        layer_profile({}, ["0"], y="ω")


def test_shares_stand_beside_those_of_a_random_walk() -> None:
    steps = np.random.default_rng(0).normal(size=(400, 4000)).cumsum(0)
    values = np.linalg.svd(steps - steps.mean(0), compute_uv=False) ** 2
    figure = component_shares({"run": values / values.sum()})
    drawn = lines(figure, 10)
    assert drawn[MUTED][:3] == pytest.approx([0.608, 0.152, 0.0675], abs=1e-3)
    (run,) = (heights for colour, heights in drawn.items() if colour != MUTED)
    assert run == pytest.approx(drawn[MUTED], rel=0.15)
    straight = component_shares({"run": [1.0, 1e-32, 1e-33]})
    assert 1e-5 < straight.axes[0].get_ylim()[0] < 1e-4
    assert lines(component_shares({"run": [0.5]}, [0.9, 0.1]), 2)[MUTED] == [0.9, 0.1]
    with pytest.raises(InputError, match="at least one series"):
        component_shares({})


def test_the_same_figure_gives_the_same_bytes_in_any_words(tmp_path) -> None:
    name = "$x_1 <&> \x00 \ud800 \N{SNOWMAN}"
    for round_ in ("a", "b"):
        save(
            update_lengths({name: Trace([1, 2], [1, 2], [0.5, 1], [2, 4], [1, 1])}),
            tmp_path / f"l{round_}.svg",
        )
        save(layer_profile({name: [1.0]}, [name], y="ω", references={name: 1.0}), tmp_path / f"k{round_}.svg")
        save(component_shares({name: [0.9, 0.1]}), tmp_path / f"s{round_}.png")
    for kind in ("l{}.svg", "k{}.svg", "s{}.png"):
        assert (tmp_path / kind.format("a")).read_bytes() == (tmp_path / kind.format("b")).read_bytes()
