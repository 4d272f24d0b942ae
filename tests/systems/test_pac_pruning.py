"""Pruning masks: what the check asks, on made-up results always, and on tiny runs of every preset."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from gramian.cli.main import run as command
from gramian.compress.learning import Learning
from gramian.errors import InputError
from gramian.systems.claims import Finding
from gramian.systems.pac_pruning import Config, Result, check, given, paper, quick, run, start_table, table
from gramian.tasks.certificate_study import Certified
from gramian.tasks.pruning_data import Data
from gramian.tasks.pruning_study import (
    AGAIN,
    AGAIN_BOTH,
    BOTH,
    DENSE,
    GATES,
    MASKS,
    SHUFFLED,
    STRAIGHT,
    UNTOUCHED,
    Tuned,
)

QUIET = Console(quiet=True)
ENDED = {
    DENSE: 0.03,
    UNTOUCHED: 0.5,
    MASKS: 0.05,
    SHUFFLED: 0.5,
    BOTH: 0.04,
    GATES: 0.05,
    STRAIGHT: 0.06,
    AGAIN: 0.05,
    AGAIN_BOTH: 0.03,
}
"""Held-out errors that the claim would lead to expect."""


def tuned(changed: Mapping[str, float] | None = None, random: float = 0.0) -> list[Tuned]:
    """Return results of one start and density for three seeds."""
    drawn = (MASKS, SHUFFLED, BOTH, AGAIN_BOTH)
    return [
        Tuned(
            "snip",
            0.1,
            seed,
            way,
            error + 0.001 * seed,
            error + random if way in drawn else None,
            0.1,
            1,
            1.0,
        )
        for seed in range(3)
        for way, error in {**ENDED, **(changed or {})}.items()
    ]


def certified(certificate: float, prior: float, fraction: float = 0.0) -> list[Certified]:
    return [
        Certified(
            way="masks",
            fraction=fraction,
            seed=seed,
            n=1000,
            certificate=certificate + 0.01 * seed,
            empirical=0.3,
            held_out=0.3,
            kl=200.0,
            prior=prior + 0.01 * seed,
            test_set=0.2 if fraction else None,
            bounds={"kl": certificate},
            expected=0.5,
        )
        for seed in range(3)
    ]


def failing(found: list[Finding]) -> list[str]:
    return [finding.what for finding in found if not finding.holds]


def test_a_result_as_claimed_holds() -> None:
    found = check(Result(tuned(), tuned(), certified(0.7, 0.9)))
    assert failing(found) == []
    assert len(found) == 2 * 5 + 2


@pytest.mark.parametrize(
    ("spoiled", "what"),
    [
        (Result(tuned({BOTH: 0.6}), [], []), "snip at 0.1"),
        (Result(tuned(random=0.7), [], []), "the random mask"),
        (Result(tuned({MASKS: 0.5, SHUFFLED: 0.4}), [], []), "shuffled"),
        (Result(tuned({STRAIGHT: 0.01}), [], []), "plain fine-tuning"),
        (Result(tuned({GATES: 0.01}), [], []), "hard concrete"),
        (Result([], tuned({BOTH: 0.6}), []), "cnn"),
        (Result([], [], certified(0.95, 0.99)), "without data"),
        (Result([], [], certified(0.8, 0.7)), "gained"),
    ],
    ids=["both", "random", "shuffled", "straight", "gates", "cnn", "vacuous", "no gain"],
)
def test_a_spoiled_result_fails(spoiled: Result, what: str) -> None:
    failed = failing(check(spoiled))
    assert failed
    assert any(what in each for each in failed), failed


def test_tables_show_every_way_and_every_prior() -> None:
    result = Result(tuned(), tuned(), certified(0.7, 0.9) + certified(0.2, 0.25, 0.5))
    rows = table(result)
    assert [row["mask"] for row in rows] == ["mlp snip 0.1", "cnn snip 0.1"]
    assert rows[0]["untouched"] == "50.1±0.1"
    assert rows[0]["λ and w"] == "4.1±0.1"
    shown = start_table(result)
    assert [row["prior from"] for row in shown] == ["0%", "50%"]
    assert shown[0]["certificate"] == "71.0±0.6"
    assert shown[0]["test-set bound"] == ""
    assert shown[1]["KL / n"] == "0.2"


def smallest(config: Config, data: Data) -> Config:
    learning = Learning(steps=2)
    shared: dict[str, Any] = {"data": data, "train_steps": 2, "widths": (6,)}
    tuning = {**shared, "learning": learning, "densities": (0.5,), "starts": ("random",)}
    bounding = replace(config.certificates.bounding, learning=learning, draws=20)
    return replace(
        config,
        tuning=replace(config.tuning, **tuning),
        convolutions=replace(config.convolutions, **tuning),
        certificates=replace(
            config.certificates,
            **shared,
            fractions=(0.0, 0.5),
            learning=replace(learning, learn="both"),
            bounding=bounding,
        ),
        seeds=(0, 1),
    )


@pytest.mark.parametrize("setting", ["quick", "mnist"])
def test_a_tiny_run_ends_and_goes_on(setting: str, tmp_path: Path) -> None:
    config = quick() if setting == "quick" else paper(setting)
    config = replace(smallest(config, Data(count=120)), runs=tmp_path)
    result = run(config, QUIET)
    ways = {each.way for each in result.tuning}
    assert ways == set(ENDED)
    assert {each.way for each in result.convolutions} == ways
    assert {(each.way, each.fraction) for each in result.certificates} == {
        (way, fraction) for way in ("masks", "Gaussian weights", "both") for fraction in (0.0, 0.5)
    }
    assert all(each.kept == pytest.approx(0.5, abs=0.02) for each in result.tuning if each.way != DENSE)
    saved = json.loads((tmp_path / config.name / "result.json").read_text())
    assert len(saved["tuning"]) == 2 * len(ENDED)
    again = run(config, QUIET)  # reads what is there
    assert again == result
    assert len(check(result)) == 2 * 3 + 3 * 3  # a density of ½ is not sparse
    for name in ("errors.svg", "certificates.svg"):
        assert (tmp_path / config.name / name).read_text().startswith("<?xml")


def test_settings_are_changed_as_asked() -> None:
    config = given(quick(), runs=Path("r"), images=Path("x.npz"), steps=7, seeds=(3, 4))
    assert config.seeds == (3, 4)
    for study in (config.tuning, config.convolutions):
        assert study.learning.steps == 7
        assert study.data.data == Path("x.npz")
    assert config.certificates.bounding.learning.steps == 7
    assert config.certificates.learning.steps == 7
    assert config.certificates.data.data == Path("x.npz")


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="choose quick or mnist"):
        paper("cifar")
    with pytest.raises(InputError, match="needs --images"):
        given(paper(), runs=Path("r"), images=None, steps=None, seeds=())
    with pytest.raises(InputError, match="two different seeds"):
        run(replace(quick(), seeds=(0,)), QUIET)


def test_the_command_refuses_other_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "t.npz", X=np.zeros((3, 2)), y=np.zeros(3))
    assert command(["verify", "pac_pruning", "--tables", str(tmp_path / "t.npz")]) == 1
    assert "pac_pruning reads images, not tables" in capsys.readouterr().err
