"""Maps and planes of trajectories: what is drawn where, what is said of holes, nothing that warns."""

import math
import re

import numpy as np
import pytest

from gramian.errors import InputError
from gramian.report.style import INK, MUTED, RULE, inline, save
from gramian.report.trajectory import SIGNED, UNIFORM, cosine_range, path_plane, similarity_map

NAN = math.nan
EVEN = list(range(0, 4000, 100))
PYTHIA = [0, *(2**power for power in range(10)), *range(1000, 144_000, 1000)]


def walk(steps, seed=0, width=400):
    """A random walk from 0, one row a step."""
    gaps = np.sqrt(np.diff(steps))[:, None]
    moves = gaps * np.random.default_rng(seed).normal(size=(len(steps) - 1, width))
    return np.vstack([np.zeros(width), moves.cumsum(0)])


def cosines(points):
    norms = np.linalg.norm(points, axis=1)
    units = points / np.where(norms, norms, NAN)[:, None]
    return units @ units.T


def scores(points):
    centred = points - points.mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    return left * sizes


def mesh(figure):
    return figure.axes[0].collections[0]


def texts(figure):
    inline(figure, "f1", "A figure.")
    return [text.get_text() for text in figure.texts]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_a_map_has_a_cell_for_each_pair_and_the_first_checkpoint_on_the_top_left() -> None:
    matrix = cosines(1 + 0.01 * walk(EVEN))
    figure = similarity_map(matrix, EVEN, title="weights")
    cells = mesh(figure)
    assert np.array_equal(np.ma.asarray(cells.get_array()), matrix)
    axes = figure.axes[0]
    assert axes.get_xlim() == (-0.5, 39.5)
    assert axes.get_ylim() == (39.5, -0.5)
    box = axes.get_window_extent()
    assert box.width == pytest.approx(box.height)
    assert {"weights", "cosine"} <= set(texts(figure))


def test_cosines_all_near_one_take_all_the_colours() -> None:
    matrix = cosines(1 + 1e-4 * walk(EVEN))
    assert matrix.min() > 0.999
    figure = similarity_map(matrix, EVEN)
    assert mesh(figure).get_clim() == (matrix.min(), 1.0)
    numbers = ticks(figure.axes[1].yaxis)
    assert len(numbers) >= 3
    assert len(set(numbers)) == len(numbers)
    colours = mesh(figure).cmap(mesh(figure).norm(matrix))
    assert np.ptp(colours[..., 1]) > 0.8  # from dark to bright
    fixed = similarity_map(matrix, EVEN, low=-1, high=1)
    assert mesh(fixed).get_clim() == (-1.0, 1.0)
    assert np.ptp(mesh(fixed).cmap(mesh(fixed).norm(matrix))[..., 1]) < 0.01


def test_cosines_of_both_signs_have_white_for_zero_and_an_arrow_for_what_is_beyond() -> None:
    updates = cosines(np.diff(walk(EVEN), axis=0))
    figure = similarity_map(updates, EVEN[1:])
    low, high = mesh(figure).get_clim()
    beside = updates[~np.eye(len(updates), dtype=bool)]
    assert -low == high == pytest.approx(np.abs(beside).max())
    assert mesh(figure).cmap.name == SIGNED
    assert min(mesh(figure).cmap(0.5)[:3]) > 0.95
    arrows = {name: len(fig.axes[1].patches) for name, fig in {
        "beyond": figure,
        "within": similarity_map(cosines(1 + walk(EVEN)), EVEN),
        "both": similarity_map(updates, EVEN[1:], low=-0.01, high=0.01),
    }.items()}  # fmt: skip
    assert arrows == {"beyond": 1, "within": 0, "both": 2}


@pytest.mark.parametrize(
    ("matrix", "ends"),
    [
        ([[1, 0.3], [0.5, 1]], (0.3, 0.5)),
        ([[1, 0.3], [0.9, 1]], (0.3, 1.0)),  # near 1
        ([[1, -0.02], [0.5, 1]], (-0.02, 0.5)),  # hardly negative
        ([[1, -0.2], [0.5, 1]], (-0.5, 0.5)),
        ([[1, -0.7], [0.5, 1]], (-0.7, 0.7)),
        ([[1, -0.7], [-0.2, 1]], (-0.7, 0.7)),
        ([[1, 1], [1 - 1e-15, 1]], (0.0, 1.0)),  # a straight line: rounding is no structure
        ([[1, -0.5], [-0.5, 1]], (-1.0, 1.0)),
        ([[NAN, NAN], [NAN, NAN]], (0.0, 1.0)),
        ([[1.0]], (0.0, 1.0)),
    ],
)
def test_the_range_of_colours(matrix, ends) -> None:
    assert cosine_range(matrix) == pytest.approx(ends)
    assert mesh(similarity_map(matrix, range(len(matrix)))).get_clim() == pytest.approx(ends)


def test_several_maps_have_one_range() -> None:
    assert cosine_range([[1, 0.2], [0.2, 1]], [[1, 0.6], [0.6, 1]]) == (0.2, 0.6)
    assert cosine_range() == (0.0, 1.0)


def test_holes_are_hatched_and_whole_rows_are_named() -> None:
    full = cosines(1 + walk(EVEN))
    assert not [patch for patch in similarity_map(full, EVEN).axes[0].patches if patch.get_hatch()]
    for lost, said in (
        ([0], "hatched: no cosine at step 0"),
        ([5, 7], "hatched: no cosine at step 500, 700"),
        ([1, 2, 3, 4, 5], "hatched: no cosine at step 100, 200, 300, 400 …"),
    ):
        matrix = full.copy()
        matrix[lost] = matrix[:, lost] = NAN
        figure = similarity_map(matrix, EVEN)
        assert [patch.get_hatch() for patch in figure.axes[0].patches] == ["////"]
        assert said in texts(figure)
        assert np.array_equal(np.ma.getmaskarray(mesh(figure).get_array()), ~np.isfinite(matrix))
    full[3, 4] = math.inf
    assert "hatched: no cosine" in texts(similarity_map(full, EVEN))


def test_holes_follow_a_dark_page() -> None:
    drawn = inline(similarity_map(cosines(walk(EVEN)), EVEN), "f1", "A map.")
    assert "url(#f1-" in drawn
    assert {RULE, MUTED, INK} & set(re.findall("#[0-9a-f]{6}", drawn)) == set()


def test_a_relative_map_of_displacements_has_no_row_for_its_origin() -> None:
    points = walk(PYTHIA)
    figure = similarity_map(cosines(points), PYTHIA, title="displacements from step 0")
    assert "hatched: no cosine at step 0" in texts(figure)
    assert "hatched: no cosine at step 0" not in texts(similarity_map(cosines(points + 1), PYTHIA))


def test_steps_stand_at_their_checkpoints_whatever_the_grid() -> None:
    for steps in (EVEN, PYTHIA, [0, 1, 2], [3, 30, 300, 3000, 30_000, 300_000, 999_999], [7]):
        count = len(steps)
        axis = similarity_map(np.eye(count), steps).axes[0].xaxis
        named = [float(text.replace(",", "")) for text in ticks(axis)]
        assert 1 <= len(named) <= 7
        assert np.interp(axis.get_ticklocs(), range(count), steps) == pytest.approx(named)
    assert ticks(similarity_map(np.eye(40), EVEN).axes[0].xaxis) == ["0", "1,000", "2,000", "3,000"]
    uneven = ticks(similarity_map(np.eye(154), PYTHIA).axes[0].xaxis)
    assert uneven == ["0", "20,000", "50,000", "80,000", "110,000", "143,000"]


def test_only_an_uneven_grid_says_that_cells_are_checkpoints() -> None:
    words = {
        len(steps): similarity_map(np.eye(len(steps)), steps).axes[0].get_xlabel() for steps in (EVEN, PYTHIA)
    }
    assert words == {40: "step", 154: "step, one cell a checkpoint"}


def test_a_map_that_does_not_fit() -> None:
    for matrix, steps in ((np.eye(3), [0, 1]), (np.ones((2, 3)), [0, 1]), ([], []), ([1.0, 2.0], [0, 1])):
        with pytest.raises(InputError, match="as many rows and columns"):
            similarity_map(matrix, steps)
    with pytest.raises(InputError, match="low below high"):
        similarity_map(np.eye(2), [0, 1], low=1.0, high=0.5)


def test_a_path_is_drawn_on_one_scale_with_its_ends() -> None:
    points = scores(walk(EVEN))
    figure = path_plane(points, EVEN, shares=[0.61, 0.15])
    axes = figure.axes[0]
    pieces = np.array(axes.collections[0].get_segments())
    assert np.array_equal(pieces[:, 0], points[:-1, :2])
    assert np.array_equal(pieces[:, 1], points[1:, :2])
    box = axes.get_window_extent()
    assert np.ptp(axes.get_xlim()) / box.width == pytest.approx(np.ptp(axes.get_ylim()) / box.height)
    _, first, last = (line.get_xydata() for line in axes.lines)
    assert np.array_equal(first[0], points[0, :2])
    assert np.array_equal(last[0], points[-1, :2])
    said = texts(figure)
    assert {"first", "last", "component 2 (15 % of the variance)"} <= set(said)
    assert "random walk, on average" not in said
    assert axes.get_xlabel() == "component 1 (61 % of the variance)"


def average_walk(steps):
    """Scores of the mean Gram of a random walk with variance in proportion to the steps."""
    centre = np.eye(len(steps)) - 1 / len(steps)
    values, vectors = np.linalg.eigh(centre @ np.minimum.outer(steps, steps) @ centre)
    return (vectors * np.sqrt(np.clip(values, 0, None)))[:, ::-1]


@pytest.mark.parametrize("steps", [EVEN, PYTHIA], ids=["even", "pythia"])
def test_the_average_walk_lies_on_a_random_walk_and_not_on_a_line_with_noise(steps) -> None:
    def gap(points) -> float:
        turned = -scores(points)[:, :2]
        drawn = path_plane(turned, steps, walk=average_walk(steps)).axes[0].lines[0].get_xydata()
        return float(np.linalg.norm(drawn - turned) / np.linalg.norm(turned))

    points = walk(steps, width=20_000)
    way = np.asarray(steps)[:, None] / steps[-1]
    assert gap(points) < 0.1
    assert gap(points + 3 * np.abs(points).max() * way) > 0.3


@pytest.mark.parametrize(
    "points",
    [
        [[1.0, 2.0]],
        [[-1.0, 0.0], [1.0, 0.0]],
        [[0.0, 0.0]] * 3,
        [[2.0, 2.0]] * 3,
        [[NAN, 0.0], [1.0, 1.0], [math.inf, 3.0]],
        [[NAN, NAN]] * 4,
        [[1e-30, 0.0], [0.0, 1e-40]],
        [[1e90, -1e90], [0.0, 1e-90]],
    ],
)
def test_awkward_paths_are_drawn(points) -> None:
    for other in (None, points, [[0.0, 0.0]] * len(points)):
        figure = path_plane(points, range(len(points)), walk=other)
        assert {"first", "last"} <= set(texts(figure))
        limits = [*figure.axes[0].get_xlim(), *figure.axes[0].get_ylim()]
        assert np.isfinite(limits).all()


def test_a_path_that_does_not_fit() -> None:
    for bad in ([[1.0], [2.0]], [[1.0, 2.0]], [], [1.0, 2.0]):
        with pytest.raises(InputError, match="two scores for each"):
            path_plane(bad, [0, 1])
        with pytest.raises(InputError, match="two scores for each"):
            path_plane([[0.0, 1.0], [1.0, 0.0]], [0, 1], walk=bad)


def test_the_same_figure_gives_the_same_bytes_in_any_words(tmp_path) -> None:
    holes = cosines(walk(EVEN))
    for round_ in ("a", "b"):
        save(
            similarity_map(holes, EVEN, title="$x_1 <&> \x00 \ud800 \N{SNOWMAN}"),
            tmp_path / f"map-{round_}.svg",
        )
        save(path_plane(scores(walk(EVEN)), EVEN, x="<step> $"), tmp_path / f"path-{round_}.png")
    assert (tmp_path / "map-a.svg").read_bytes() == (tmp_path / "map-b.svg").read_bytes()
    assert (tmp_path / "path-a.png").read_bytes() == (tmp_path / "path-b.png").read_bytes()
    first, second = (inline(similarity_map(holes, EVEN), "f7", "A map.") for _ in range(2))
    assert first == second
    assert mesh(similarity_map(holes, EVEN)).cmap.name == UNIFORM
