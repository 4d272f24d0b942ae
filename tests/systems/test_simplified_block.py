"""The simplified-block claim: its arithmetic always, its training quick or slow."""

from dataclasses import replace

import pytest
from rich.console import Console

from gramian.cli.main import run as command
from gramian.errors import InputError
from gramian.nn.transformer import Shape
from gramian.systems import simplified_block
from gramian.systems.claims import Finding, paired
from gramian.systems.simplified_block import (
    Config,
    Result,
    check,
    paper,
    parameters_at_gpt2_size,
    quick,
    run,
    table,
)
from gramian.tasks.language import Text
from gramian.train.loop import Training

QUIET = Console(quiet=True)


def result(**ends: tuple[float, float]) -> Result:
    """A result whose blocks end at these losses, by seed."""
    curves = {name: [[6.0, end] for end in pair] for name, pair in ends.items()}
    return Result(curves, [0, 10], {name: [1.0, 1.0] for name in ends}, dict.fromkeys(ends, 1))


SOUND = {"pre_norm": (5.0, 5.1), "sas": (5.01, 5.1), "sas_p": (4.9, 5.0)}
SPOILED = {"sas_uncentred": (5.3, 5.4), "sas_full_mlp": (5.2, 5.3)}


def failing(outcome: Result) -> list[str]:
    return [finding.what.split(" (")[0] for finding in check(outcome) if not finding.holds]


def test_the_check_tells_sound_from_spoiled() -> None:
    assert failing(result(**SOUND, **SPOILED)) == []
    worse = {**SOUND, "sas_p": (5.1, 5.2)}
    assert failing(result(**worse, **SPOILED)) == ["validation loss of sas_p above pre_norm"]
    harmless = {**SPOILED, "sas_full_mlp": (5.0, 5.12)}
    assert failing(result(**SOUND, **harmless)) == ["validation loss of sas_full_mlp above sas"]


def test_gaps_are_paired_by_seed() -> None:
    mean, error = paired([5.0, 5.2, 5.4], [4.9, 5.1, 5.0])
    assert mean == pytest.approx(0.2)
    assert error == pytest.approx((((0.1**2) * 2 + 0.2**2) / 2) ** 0.5 / 3**0.5)
    assert Finding("x", 0.1, 0.0, 0.05, below=True).holds is False
    assert Finding("x", 0.1, 0.03, 0.05, below=True).holds is True
    assert Finding("x", 0.1, 0.06, 0.0, below=False).holds is False


def test_parameters_are_as_published() -> None:
    assert parameters_at_gpt2_size("pre_norm") / 1e6 == pytest.approx(166.6, abs=0.05)
    assert parameters_at_gpt2_size("sas") / 1e6 == pytest.approx(145.9, abs=0.05)
    assert parameters_at_gpt2_size("sas_p") == parameters_at_gpt2_size("sas")


def small(config: Config, story, folder) -> Config:
    """The same settings at a size that takes seconds; everything that is not a size is kept."""
    job = config.job
    shape = replace(job.shape, width=24, heads=2, depth=2, context=16)
    training = replace(job.training, steps=6, batch=4, accumulation=2, evaluate_every=3, checkpoint_every=6)
    data = replace(job.data, text=(story,), vocabulary=300)
    job = replace(job, shape=shape, training=training, data=data, evaluation_batches=2, runs=folder)
    return replace(config, job=job, seeds=(0, 1))


@pytest.mark.parametrize("which", ["quick", "decoder", "encoder"])
def test_every_preset_runs_and_goes_on(which, story, tmp_path) -> None:
    config = small(quick() if which == "quick" else paper(which), story, tmp_path)
    first = run(config, QUIET)
    assert first.steps == [0, 3, 6]
    assert set(first.losses) == set(config.blocks)
    assert all(len(curves) == 2 for curves in first.losses.values())
    again = run(config, QUIET)  # finished runs are read, not trained again
    assert again.losses == first.losses
    assert [row["block"] for row in table(first)] == list(config.blocks)
    assert {finding.what for finding in check(first)}


def test_published_sizes_are_in_the_presets() -> None:
    decoder, encoder = paper("decoder").job, paper("encoder").job
    assert (decoder.shape.depth, decoder.shape.width, decoder.training.batch) == (18, 768, 128)
    assert decoder.training.steps * 128 * 128 == pytest.approx(700e6, rel=0.01)
    assert (encoder.shape.depth, encoder.objective, encoder.mask_probability) == (16, "masked", 0.25)
    decoder.check()
    encoder.check()
    with pytest.raises(InputError, match="choose quick, decoder or encoder"):
        paper("vision")
    with pytest.raises(InputError, match="two different seeds"):
        run(replace(quick(), seeds=(1,)), QUIET)


def test_the_command_says_what_holds(story, tmp_path, monkeypatch, capsys) -> None:
    tiny = replace(quick(), job=replace(quick().job, shape=Shape(width=24, heads=2, depth=2, context=16)))
    monkeypatch.setattr(simplified_block, "quick", lambda: small(tiny, story, tmp_path))
    arguments = ["verify", "simplified_block", "--text", str(story), "--runs", str(tmp_path), "--steps", "6"]
    code = command(arguments)
    said = capsys.readouterr()
    assert "holds parameters of sas at GPT-2 size" in said.out
    assert code == (1 if "FAILS" in said.out else 0)
    assert ("the claim does not hold here" in said.err) == (code == 1)
    assert command(["verify", "perpetual_motion"]) == 1
    assert "unknown system 'perpetual_motion'; choose simplified_block" in capsys.readouterr().err


@pytest.mark.slow
def test_the_claim_holds_on_the_embedded_text(tmp_path) -> None:
    config = quick()
    training = Training(steps=200, evaluate_every=100, observe_every=200, device="cpu")
    job = replace(config.job, training=training, data=Text(), runs=tmp_path)
    assert failing(run(replace(config, job=job, seeds=(0, 1)), QUIET)) == []
