"""The claim about transformers without shortcuts: its arithmetic always, its training at a tiny size."""

from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from rich.console import Console

from gramian.errors import InputError
from gramian.systems import shortcut_free
from gramian.systems.shortcut_free import (
    FACTOR,
    Result,
    check,
    paper,
    quick,
    run,
    table,
    unigram_loss,
)
from gramian.tasks.examine import BlockResult
from gramian.tasks.language import Job
from gramian.tasks.trials import Trial

QUIET = Console(quiet=True)

SOUND: dict[str, float] = {
    "pre_norm": 5.5,
    "e_spa_skips": 5.4,
    "e_spa": 6.2,
    "e_spa_5x": 5.5,
    "plain_skipless": 6.41,
    "plain_skipless_5x": 6.41,
}


def found(loss: float) -> BlockResult:
    return BlockResult("any", 1, 1, 1.0, loss, 1.0, loss, 1.0, 1.0, {})


def result(**changed: Any) -> Result:
    """Two seeds that differ a little; None stands for a divergence."""
    losses = SOUND | changed
    by_seed = {
        name: [None if loss is None else found(loss + 0.01 * seed) for seed in range(2)]
        for name, loss in losses.items()
    }
    return Result(by_seed, 6.41)


def failing(outcome: Result) -> list[str]:
    return [finding.what for finding in check(outcome) if not finding.holds]


def test_the_check_tells_sound_from_spoiled() -> None:
    assert failing(result()) == []
    assert failing(result(plain_skipless=None, plain_skipless_5x=None)) == []
    for trial, loss, words in (
        ("e_spa_5x", 6.40, "frequencies less that of e_spa_5x"),
        ("e_spa_5x", None, "frequencies less that of e_spa_5x"),
        ("e_spa_5x", 5.8, "after 5 x the steps"),
        ("e_spa_skips", 5.8, "norm-free with skips"),
        ("plain_skipless_5x", 6.2, "least loss of plain_skipless_5x"),
    ):
        assert any(words in what for what in failing(result(**{trial: loss}))), (trial, loss)


def test_rows_are_what_a_reader_compares() -> None:
    rows = {row["trial"]: row for row in table(result(plain_skipless=None))}
    assert rows["pre_norm"]["above pre_norm"] == "+0.000 ± 0.000"
    assert rows["e_spa"]["above pre_norm"].startswith("+0.700")
    assert rows["plain_skipless"]["loss (nats/token)"] == "diverged"


def test_the_loss_of_frequencies() -> None:
    class Text:
        vocabulary = 2
        train = torch.tensor([0] * 7 + [1])
        validation = torch.tensor([0, 1])

    assert unigram_loss(Text()) == pytest.approx(-(log(0.8) + log(0.2)) / 2)  # type: ignore[arg-type]


def test_settings() -> None:
    config = quick()
    by_name = {trial.name: trial for trial in config.trials}
    assert config.job.shape.depth == 36
    assert by_name["e_spa_near"].shape["decay"] == 0.2
    assert by_name["e_spa_5x"].training["steps"] == FACTOR * config.job.training.steps
    assert not by_name["e_spa"].shape["final_norm"]
    assert "final_norm" not in by_name["pre_norm"].shape
    assert paper().job.shape.width == 768
    with pytest.raises(InputError, match="choose quick or wikitext"):
        paper("c4")


def tiny(config: shortcut_free.Config, story, runs) -> shortcut_free.Config:
    job: Job = config.job
    shape = replace(job.shape, width=16, depth=3, heads=2, context=16, init_std=None)
    training = replace(
        job.training, steps=2, batch=2, accumulation=1, evaluate_every=2, precision="fp32", device="cpu"
    )
    data = replace(job.data, text=(story,), vocabulary=300)
    trials = tuple(
        Trial(
            trial.name,
            trial.block,
            {**trial.training, **({"steps": 4} if "steps" in trial.training else {})},
            trial.shape,
        )
        for trial in config.trials
    )
    job = replace(job, shape=shape, training=training, data=data, runs=runs, evaluation_batches=1)
    return replace(config, job=job, trials=trials, seeds=(0, 1))


def test_the_quick_setting_runs_at_a_tiny_size_and_resumes(story, tmp_path) -> None:
    config = tiny(quick(), story, tmp_path)
    first = run(config, QUIET)
    assert set(first.outcomes) == {trial.name for trial in config.trials}
    assert all(len(by_seed) == 2 for by_seed in first.outcomes.values())
    assert len(check(first)) == 4
    assert len(table(first)) == len(config.trials)
    again = run(config, QUIET)
    assert again.losses("e_spa") == first.losses("e_spa")


def test_the_published_setting_runs_at_a_tiny_size(story, tmp_path) -> None:
    config = tiny(paper(), story, tmp_path)
    few = tuple(trial for trial in config.trials if trial.name in ("pre_norm", "e_spa", "e_spa_skips"))
    assert len(run(replace(config, trials=few), QUIET).losses("e_spa")) == 2


def test_one_seed_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="two different seeds"):
        run(replace(quick(), seeds=(0,)), QUIET)
