from dataclasses import replace

import pytest
from rich.console import Console

from gramian.data.tokens import load_corpus
from gramian.errors import InputError
from gramian.nn.transformer import Shape
from gramian.tasks.language import Job, Text
from gramian.tasks.trials import Trial, run_trials
from gramian.train.loop import Training
from gramian.train.run import Run

QUIET = Console(quiet=True)


@pytest.fixture
def job(story, tmp_path) -> Job:
    return Job(
        data=Text(text=(story,), vocabulary=300),
        shape=Shape(width=16, depth=2, heads=2, context=16),
        training=Training(steps=4, batch=4, evaluate_every=4, checkpoint_every=4),
        evaluation_batches=2,
        runs=tmp_path / "runs",
    )


TRIALS = (
    Trial("plain", "pre_norm"),
    Trial("fast", "pre_norm", {"learning_rate": 0.02}),
    Trial("narrow", "sas_p", shape={"width": 8}),
)


def test_every_trial_has_a_folder_with_its_settings_and_is_done_once(job, tmp_path, monkeypatch) -> None:
    corpus = job.data.load()
    outcomes = run_trials(job, TRIALS, (0, 3), corpus, tmp_path / "study", QUIET)
    assert {name: len(found) for name, found in outcomes.items()} == {"plain": 2, "fast": 2, "narrow": 2}
    settings = {t.name: Run(tmp_path / "study" / "seed-3" / t.name).settings for t in TRIALS}
    assert {s["training"]["seed"] for s in settings.values()} == {3}
    assert settings["fast"]["training"]["learning_rate"] == 0.02
    assert settings["narrow"]["shape"]["width"] == 8
    assert settings["narrow"]["block"] == "sas_p"
    losses = {found[0].validation_loss for found in outcomes.values()}
    assert len(losses) == 3  # they really differ

    def never(*arguments, **more):
        raise AssertionError("trained again")

    monkeypatch.setattr("gramian.tasks.trials.train_side_by_side", never)
    assert run_trials(job, TRIALS, (0, 3), corpus, tmp_path / "study", QUIET) == outcomes


def test_a_trial_that_diverges_is_recorded_and_the_others_go_on(job, tmp_path) -> None:
    wild = Trial("wild", "pre_norm", {"learning_rate": 1e30, "clip": float("inf"), "steps": 30})
    corpus = job.data.load()
    for _ in range(2):
        outcomes = run_trials(job, (wild, TRIALS[0]), (0,), corpus, tmp_path / "study", QUIET)
        assert outcomes["wild"] == [None]
        assert outcomes["plain"][0] is not None
    assert "not finite" in Run(tmp_path / "study" / "seed-0" / "wild").result()["diverged"]


def test_what_cannot_be_tried_is_said_before_anything_is_trained(job, tmp_path) -> None:
    corpus = load_corpus(job.data.text, vocabulary=300)
    for trials, words in (
        ((TRIALS[0], TRIALS[0]), "a name of its own"),
        ((TRIALS[0], Trial("bad", "pre_norm", {"optimiser": "adagrad"})), "unknown optimiser"),
    ):
        with pytest.raises(InputError, match=words):
            run_trials(job, trials, (0,), corpus, tmp_path / "study", QUIET)
    assert not (tmp_path / "study").exists()
    assert replace(job).shape == job.shape
