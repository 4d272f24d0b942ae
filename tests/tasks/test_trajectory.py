"""What `gramian trajectory` reads off runs, Hugging Face folders, sketches and pairs of series."""

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from browser import BROWSER, check_page
from gramian.core.trajectory import steps_of
from gramian.errors import InputError
from gramian.observe.alignment import Checks
from gramian.observe.hallmarks import hallmarks
from gramian.observe.recorder import TrajectoryRecorder
from gramian.tasks.digits_series import POINTS
from gramian.tasks.trajectory import Course, TrajectoryConfig, trajectory
from gramian.tasks.trajectory_files import GRAMS, numbers, write_report
from gramian.tasks.trajectory_page import report_page
from gramian.tasks.trajectory_words import common, sentences, terminal_tables

QUIET = Console(quiet=True)
WIDTH = 48
SHAPES = {
    "model.embed.weight": (100, WIDTH),
    **{f"model.layers.{i}.attn.{k}_proj.weight": (WIDTH, WIDTH) for i in (0, 1, 10) for k in "qkvo"},
    **{f"model.layers.{i}.mlp.up.weight": (4 * WIDTH, WIDTH) for i in (0, 1, 10)},
    **{f"model.layers.{i}.norm.weight": (WIDTH,) for i in (0, 1, 10)},
    "model.norm.weight": (WIDTH,),
    "lm_head.weight": (100, WIDTH),
}


def walk(
    folder: Path,
    n: int = 20,
    every: int = 10,
    drift: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Tensor]]:
    """Write checkpoints of a random walk with a drift, as a trainer would."""
    generator = torch.Generator().manual_seed(seed)
    value = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    way = {name: drift * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    written = []
    for t in range(n):
        place = folder / f"checkpoint-{every * t}"
        place.mkdir(parents=True)
        written.append({name: tensor.to(dtype) for name, tensor in value.items()})
        save_file(written[-1], place / "model.safetensors")
        torch.save({"state": {}}, place / "optimizer.pt")
        for name, shape in SHAPES.items():
            value[name] = value[name] + 0.05 * torch.randn(shape, generator=generator) + way[name]
    return written


def analysed(*paths: Path, output: Path, written: bool = False, **settings: object) -> tuple[Course, ...]:
    config = TrajectoryConfig(checkpoints=paths, output=output, **settings)  # type: ignore[arg-type]
    courses = trajectory(config, console=QUIET)
    if written:
        write_report(courses, config)
    return courses


def flat(written: list[dict[str, Tensor]], keep: object = None) -> Tensor:
    def chosen(name: str) -> bool:
        return keep is None or keep(name)  # type: ignore[operator]

    return torch.stack(
        [torch.cat([t.double().flatten() for n, t in each.items() if chosen(n)]) for each in written]
    )


def test_a_random_walk_is_read_as_one(tmp_path: Path) -> None:
    written = walk(tmp_path / "run")
    (course,) = analysed(tmp_path / "run", output=tmp_path / "out")
    assert course.times == tuple(range(0, 200, 10))
    assert course.phase.name == "exploring"
    expected = hallmarks(steps_of(flat(written)))
    for name, value in course.whole.numbers.items():
        assert value == pytest.approx(expected[name], rel=1e-9), name
    assert course.whole.numbers["mds_relative"] == pytest.approx(2 / 3, abs=0.05)
    said = " ".join(sentences([course]))
    assert "Exploring" in said
    assert "a straight line 1" in said


def test_layers_and_kinds_are_sums_of_their_tensors(tmp_path: Path) -> None:
    written = walk(tmp_path / "run")
    (course,) = analysed(tmp_path / "run", output=tmp_path / "out")
    layers = [group.layer for group in course.layers]
    assert layers == [
        "model.embed", "model.layers.0", "model.layers.1", "model.layers.10", "model.norm", "lm_head",
    ]  # fmt: skip
    assert [group.kind for group in course.kinds] == [
        "embedding", "query", "key", "value", "projection", "mlp", "norm", "head",
    ]  # fmt: skip
    layer = next(group for group in course.layers if group.layer == "model.layers.1")
    expected = hallmarks(steps_of(flat(written, lambda name: name.startswith("model.layers.1."))))
    assert layer.numbers["mean_update_angle"] == pytest.approx(expected["mean_update_angle"], rel=1e-9)
    kind = next(group for group in course.kinds if group.kind == "query")
    expected = hallmarks(steps_of(flat(written, lambda name: "q_proj" in name)))
    assert kind.numbers["displacement"] == pytest.approx(expected["displacement"], rel=1e-9)
    assert kind.parameters == 3 * WIDTH**2
    assert sum(group.parameters for group in course.layers) == course.whole.parameters
    assert sum(group.parameters for group in course.cells) == course.whole.parameters


def test_what_is_written_is_what_was_read(tmp_path: Path) -> None:
    walk(tmp_path / "run")
    (course,) = analysed(tmp_path / "run", output=tmp_path / "out", written=True)
    found = json.loads((tmp_path / "out" / "trajectory.json").read_text())
    (series,) = found["series"]
    assert series["steps"] == list(course.times)
    assert series["whole"]["hallmarks"]["mds"] == course.whole.numbers["mds"]
    assert len(series["maps"]["relative_map"]) == 19
    assert found["settings"]["checks"]["mismatch"] == "refuse"
    grams = load_file(tmp_path / "out" / GRAMS)
    assert len(grams) == len(course.parts)
    total = torch.stack(list(grams.values())).sum(0)
    assert torch.allclose(total, course.whole.steps.cross, rtol=1e-12)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Relative map" in page
    assert not (tmp_path / "out" / "unfinished").exists()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"trajectory.json", "grams.safetensors", "report.html", "figures"}


def test_straight_against_wandering(tmp_path: Path) -> None:
    walk(tmp_path / "straight", drift=0.5)
    walk(tmp_path / "wandering", n=25, seed=1)
    courses = analysed(tmp_path / "straight", tmp_path / "wandering", output=tmp_path / "out")
    assert [course.phase.name for course in courses] == ["going straight", "exploring"]
    times, found = common(courses)
    assert times == tuple(range(0, 200, 10))
    assert found["straight"]["displacement_ratio"] > 0.9 > found["wandering"]["displacement_ratio"]
    said = sentences(courses)
    assert said[0].startswith("straight: Going straight")
    assert "compared at the 20 steps that all have" in said[-1]
    assert len(list(terminal_tables(courses))) == 3
    page = report_page(courses)
    assert page.sections[0].heading == "Side by side"


def test_series_with_other_steps_are_not_compared(tmp_path: Path) -> None:
    walk(tmp_path / "a")
    walk(tmp_path / "b", every=7)
    courses = analysed(tmp_path / "a", tmp_path / "b", output=tmp_path / "out")
    assert common(courses) == ((), {})
    assert "too few steps to be compared" in sentences(courses)[-1]


def test_checkpoints_one_by_one_and_a_part_of_them(tmp_path: Path) -> None:
    written = walk(tmp_path / "run")
    paths = [tmp_path / "run" / f"checkpoint-{10 * t}" for t in (7, 3, 15, 11)]
    (course,) = analysed(*paths, output=tmp_path / "out")
    assert course.times == (30, 70, 110, 150)
    rows = [written[t] for t in (3, 7, 11, 15)]
    assert course.whole.numbers["mds"] == pytest.approx(hallmarks(steps_of(flat(rows)))["mds"], rel=1e-9)
    (part,) = analysed(tmp_path / "run", output=tmp_path / "part", first=30, last=150, every=4)
    assert part.times == (30, 70, 110, 150)
    assert part.whole.numbers == course.whole.numbers
    with pytest.raises(InputError, match="1 of the 20 checkpoints of run"):
        analysed(tmp_path / "run", output=tmp_path / "none", first=190)


def test_rounding_is_seen_beside_small_updates(tmp_path: Path) -> None:
    written = walk(tmp_path / "run", n=14)
    generator = torch.Generator().manual_seed(5)
    value = {name: tensor.double() for name, tensor in written[0].items()}
    for t in range(14):  # what is rounded moves, far below the precision that it is stored in
        save_file(
            {name: tensor.bfloat16() for name, tensor in value.items()},
            tmp_path / "run" / f"checkpoint-{10 * t}" / "model.safetensors",
        )
        for name, tensor in value.items():
            value[name] = tensor + 2e-4 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    (course,) = analysed(tmp_path / "run", output=tmp_path / "out")
    assert course.phase.name == "rounding"
    assert any("can be rounding to the stored precision" in sentence for sentence in sentences([course]))
    (exact,) = analysed(tmp_path / "run", output=tmp_path / "x", checks=Checks(only=("*norm*",)))
    assert exact.phase.name == "rounding"


def test_a_tensor_that_is_not_finite_is_left_out_if_asked(tmp_path: Path) -> None:
    written = walk(tmp_path / "run", n=6)
    written[2]["lm_head.weight"][3, 3] = math.nan
    save_file(written[2], tmp_path / "run" / "checkpoint-20" / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight in .*checkpoint-20.* NaN or infinities"):
        analysed(tmp_path / "run", output=tmp_path / "out")
    (course,) = analysed(tmp_path / "run", output=tmp_path / "out", checks=Checks(mismatch="leave_out"))
    assert course.whole.parameters == flat(written).shape[1] - 100 * WIDTH
    assert any("lm_head.weight is left out" in remark for remark in course.remarks)


def test_frozen_tensors_are_named(tmp_path: Path) -> None:
    written = walk(tmp_path / "run", n=10)
    for t, each in enumerate(written):
        each["model.embed.weight"] = written[0]["model.embed.weight"]
        save_file(each, tmp_path / "run" / f"checkpoint-{10 * t}" / "model.safetensors")
    (course,) = analysed(tmp_path / "run", output=tmp_path / "out")
    assert any("1 tensors are the same" in remark and "model.embed" in remark for remark in course.remarks)
    frozen = course.layers[0]
    assert frozen.layer == "model.embed"
    assert math.isnan(frozen.numbers["mean_update_angle"])
    assert numbers(course)["groups"]


def test_sketches_come_with_errors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 200))
    exact, sketch = (TrajectoryRecorder(model, tmp_path / mode, mode) for mode in ("exact", "sketch"))
    for step in range(0, 160, 10):
        for recorder in (exact, sketch):
            recorder.record(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    (known,) = analysed(tmp_path / "exact", output=tmp_path / "a")
    (guessed,) = analysed(tmp_path / "sketch", output=tmp_path / "b", written=True)
    assert not known.whole.errors
    for name in ("mds_relative", "mean_update_angle", "displacement", "path_length"):
        error = guessed.whole.errors[name]
        assert error > 0
        assert abs(guessed.whole.numbers[name] - known.whole.numbers[name]) < 4 * error
    assert [group.layer for group in guessed.layers] == [group.layer for group in known.layers] == ["0", "1"]
    assert "±" in " ".join(sentences([guessed]))
    assert any("sketched" in text for text in guessed.facts.values())
    assert guessed.whole.bands["update_angles"].shape == (14,)
    found = json.loads((tmp_path / "b" / "trajectory.json").read_text())
    assert found["series"][0]["whole"]["standard_errors"]["mds_relative"] > 0


def test_the_default_is_a_network_on_digits(tmp_path: Path) -> None:
    config = TrajectoryConfig(output=tmp_path / "digits")
    (course,) = trajectory(config, console=QUIET)
    assert len(course.times) == POINTS + 1
    assert course.whole.numbers["mds_relative"] > 0.7
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "digits-checkpoints").iterdir()}
    again = trajectory(config, console=QUIET)[0]
    assert again.whole.numbers == course.whole.numbers
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "digits-checkpoints").iterdir()}


def test_a_taken_folder_is_kept(tmp_path: Path) -> None:
    walk(tmp_path / "run", n=5)
    analysed(tmp_path / "run", output=tmp_path / "out", written=True)
    with pytest.raises(InputError, match="already holds a trajectory"):
        analysed(tmp_path / "run", output=tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="no trajectory"):
        analysed(tmp_path / "run", output=tmp_path / "mine")
    (tmp_path / "mine" / "unfinished").mkdir()
    with pytest.raises(InputError, match="no trajectory"):
        analysed(tmp_path / "run", output=tmp_path / "mine")
    assert (tmp_path / "mine" / "note.txt").read_text() == "mine"


def test_short_paths_have_no_phase(tmp_path: Path) -> None:
    walk(tmp_path / "run", n=2)
    (course,) = analysed(tmp_path / "run", output=tmp_path / "out", written=True)
    assert course.phase.name == "too short"
    assert math.isnan(course.whole.numbers["mean_update_angle"])
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_the_page_fits_a_browser(tmp_path: Path) -> None:
    walk(tmp_path / "run")
    analysed(tmp_path / "run", output=tmp_path / "out", written=True)
    check_page(tmp_path / "out" / "report.html")
