"""Stable ResNets: the arithmetic of the claim and untrained networks always, training quick or slow."""

import json
from dataclasses import replace
from math import acos, log, nan, pi, sqrt
from typing import Any

import pytest
from rich.console import Console

from gramian.errors import InputError
from gramian.nn.resnet import DEFAULT_STD, HE_STD, gains
from gramian.systems.scaled_resnet import (
    Cell,
    Config,
    Result,
    Start,
    at_start,
    check,
    paper,
    quick,
    run,
    start_table,
    table,
)
from gramian.tasks.images import Network, Pictures
from gramian.train.run import Run

QUIET = Console(quiet=True)


def cell(rule: str, norm: str, accuracy: float, **changed: Any) -> Cell:
    near = [accuracy, accuracy + 0.002, accuracy - 0.002]
    plain: dict[str, Any] = {"tried": {"0.1": accuracy, "1": None}, "rate": 0.1, "loss": [0.1] * 3}
    return Cell(
        **{**plain, "depth": 104, "norm": norm, "rule": rule, "accuracy": near}
        | {"gradient": [1.0] * 3, "diverged": 0}
        | changed
    )


def start(rule: str, forward: float, backward: float, cosine: float) -> Start:
    return Start(
        rule, 512, (forward, 0.01), (backward, 0.01), {"none": 355.0}.get(rule, 1.0), (cosine, 0.01), 0.5
    )


SOUND_START = {
    "none": start("none", 345.0, 347.0, 0.999),
    "uniform": start("uniform", 1.0, 1.1, 0.45),
    "decreasing": start("decreasing", 1.2, 1.1, 0.55),
}
SOUND_CELLS = {
    ("none", "none"): cell("none", "none", 0.4),
    ("uniform", "none"): cell("uniform", "none", 0.96),
    ("decreasing", "none"): cell("decreasing", "none", 0.95),
    ("none", "batch"): cell("none", "batch", 0.96),
    ("uniform", "batch"): cell("uniform", "batch", 0.97),
    ("decreasing", "batch"): cell("decreasing", "batch", 0.955),
}


def failing(starts: dict[str, Start], cells: dict[tuple[str, str], Cell]) -> list[str]:
    result = Result(list(starts.values()), list(cells.values()))
    return [finding.what for finding in check(result) if not finding.holds]


def test_the_check_tells_sound_from_spoiled() -> None:
    assert failing(SOUND_START, SOUND_CELLS) == []
    for rule, values, words in (
        ("none", (1.0, 347.0, 0.999), "forward growth of none"),
        ("none", (345.0, 1.0, 0.999), "backward growth of none"),
        ("none", (345.0, 347.0, 0.45), "cosine of inputs of none"),
        ("uniform", (3.0, 1.1, 0.45), "forward growth of uniform"),
        ("decreasing", (1.2, 9.0, 0.55), "backward growth of decreasing"),
        ("uniform", (1.0, 1.1, 0.99), "cosine of inputs of uniform"),
    ):
        spoiled = SOUND_START | {rule: start(rule, *values)}
        (what,) = failing(spoiled, SOUND_CELLS)
        assert words in what
    for place, accuracy, words in (
        (("uniform", "none"), 0.4, "accuracy of uniform above none, 104 layers, norm none"),
        (("decreasing", "none"), 0.1, "accuracy of decreasing above none"),
        (("uniform", "batch"), 0.93, "accuracy of none above uniform, 104 layers, norm batch"),
    ):
        (what,) = failing(SOUND_START, SOUND_CELLS | {place: cell(*place, accuracy)})
        assert words in what


def test_a_part_of_the_study_can_be_judged() -> None:
    alone = {("uniform", "none"): SOUND_CELLS["uniform", "none"]}
    assert failing(SOUND_START, alone) == []
    both = alone | {("none", "none"): cell("none", "none", 0.97)}
    assert len(failing(SOUND_START, both)) == 1


def test_tables() -> None:
    broken = cell("none", "none", 0.1, diverged=3, gradient=[nan] * 3, tried={"0.1": None, "1": 0.4})
    rows = table(Result([], [SOUND_CELLS["uniform", "none"], broken]))
    assert rows[0]["test accuracy"] == "0.96 ± 0.0012"
    assert [row["rates that train"] for row in rows] == ["50%", "0%"]
    assert rows[1]["diverged"] == "3 of 3"
    assert rows[1]["first gradient norm"] == "—"
    (row,) = start_table(Result([SOUND_START["uniform"]], []))
    assert row["cosine"] == "0.450 ± 0.01"


def test_untrained_networks_follow_the_theory() -> None:
    config = replace(quick(), start_width=400)
    for rule, cosine in (("uniform", 0.4425), ("decreasing", 0.516), ("none", 0.8)):
        seen = at_start(config, rule, 12)
        expected = sum(log(1 + gain**2) for gain in gains(rule, 12))
        assert seen.growth == pytest.approx(expected)
        assert seen.forward[0] == pytest.approx(expected, abs=0.5)
        assert seen.backward[0] == pytest.approx(expected, abs=0.5)
        assert seen.limit == pytest.approx(cosine, abs=0.02)
        assert seen.cosine[0] == pytest.approx(seen.limit, abs=0.12)


def test_the_limit_beside_a_measured_cosine_is_the_recursion_of_the_theory() -> None:
    for rule, depth in (("uniform", 100), ("decreasing", 100), ("none", 30)):
        c = 0.3
        for gain in gains(rule, depth):
            rectified = c + (sqrt(1 - c * c) - c * acos(c)) / pi
            c = (c + gain**2 * rectified) / (1 + gain**2)
        assert at_start(replace(quick(), start_width=16), rule, depth).limit == pytest.approx(c, abs=1e-12)


def small(config: Config, folder, **changed: Any) -> Config:
    """The same settings at a size that takes seconds; everything that is not a size is kept."""
    steps = {"steps": 4, "batch": 32, "evaluate_every": 2, "checkpoint_every": 4, "device": "cpu"}
    network = replace(config.job.network, widths=(2, 3, 4))
    training = replace(config.job.training, **steps)
    job = replace(config.job, data=Pictures(count=150), network=network, training=training, runs=folder)
    sizes = {"depths": (8,), "start_depths": (2, 4), "start_width": 16, "seeds": (0, 1), "rates": (0.01, 0.1)}
    return replace(config, **{**{"job": job}, **sizes, **changed})


@pytest.mark.parametrize("which", ["quick", "cifar10", "tiny"])
def test_every_preset_runs_and_goes_on(which, tmp_path) -> None:
    preset = quick() if which == "quick" else paper(which)
    assert preset.job.network.weight_std == (HE_STD if which == "quick" else DEFAULT_STD)
    config = small(preset, tmp_path, norms=("batch",), rules=("none", "uniform"), rates=(0.1,))
    first = run(config, QUIET)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    assert run(config, QUIET) == first
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}  # nothing anew
    written = json.loads((tmp_path / config.name / "result.json").read_text())
    assert [row["rule"] for row in written["cells"]] == ["none", "uniform"]
    assert len(table(first)) == 2
    assert len(start_table(first)) == 4


def test_parts_join_to_the_whole_and_rates_are_chosen_on_validation_alone(tmp_path) -> None:
    config = small(quick(), tmp_path, rules=("none", "uniform"), norms=("none",))
    parts = [run(replace(config, rules=(rule,)), QUIET) for rule in config.rules]
    whole = run(config, QUIET)
    assert whole.cells == [part.cells[0] for part in parts]
    for found in whole.cells:
        known = {rate: value for rate, value in found.tried.items() if value is not None}
        assert known[f"{found.rate:g}"] == max(known.values())
        for rate in config.rates:
            place = tmp_path / config.name / f"8-none-{found.rule}" / f"rate-{rate:g}-seed-1000"
            assert "test_accuracy" not in Run(place).result()


def test_a_network_that_always_diverges_guesses(tmp_path) -> None:
    config = small(quick(), tmp_path, rules=("none",), norms=("none",), depths=(50,))
    network = replace(config.job.network, weight_std=3.0)
    config = replace(config, job=replace(config.job, network=network))
    (found,) = run(config, QUIET).cells
    assert found.diverged == 2
    assert found.tried == {"0.01": None, "0.1": None}
    assert found.trainable == 0
    assert 0.1 <= found.accuracy[0] < 0.3


def test_bad_settings_are_named(tmp_path) -> None:
    with pytest.raises(InputError, match="choose quick, cifar10, cifar100, tiny"):
        paper("imagenet")
    for changed, words in (
        ({"seeds": (1, 1)}, "two different seeds"),
        ({"seeds": (0, 1000)}, "selection seed 1000"),
        ({"depths": ()}, "depths must be one or more"),
        ({"rates": (0.1, 0.1)}, "rates must be one or more different"),
        ({"rules": ("fixup",)}, "unknown depth rule 'fixup'"),
    ):
        with pytest.raises(InputError, match=words):
            run(small(quick(), tmp_path, **changed), QUIET)
    with pytest.raises(InputError, match=r"6n \+ 2"):
        run(small(quick(), tmp_path, depths=(9,)), QUIET)
    assert Network(depth=8).norm == "none"


@pytest.mark.slow
def test_the_claim_holds(tmp_path) -> None:
    config = quick()
    job = replace(config.job, runs=tmp_path)
    result = run(replace(config, job=job, depths=(32,), norms=("none",), rates=(1e-3, 1e-2, 1e-1)), QUIET)
    assert [finding.what for finding in check(result) if not finding.holds] == []
