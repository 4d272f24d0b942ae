"""The outlier-feature claim: its arithmetic always, its training quick or slow."""

from dataclasses import replace
from math import inf
from typing import Any

import pytest
from rich.console import Console

from gramian.cli.main import run as command
from gramian.errors import InputError
from gramian.nn.attention import Attention
from gramian.nn.blocks import BLOCKS, Parts
from gramian.nn.residual import Residual
from gramian.systems import outlier_features
from gramian.systems.outlier_features import Config, Result, check, paper, quick, run, table, unprotected
from gramian.tasks.examine import BlockResult

QUIET = Console(quiet=True)


def found(loss: float, kurtosis: float, gap: float) -> BlockResult:
    return BlockResult(
        block="any",
        block_parameters=1,
        parameters=1,
        tokens_per_second=1.0,
        validation_loss=loss,
        bits_per_byte=1.0,
        int8_loss=loss + gap,
        max_neuron_kurtosis=kurtosis,
        max_median_ratio=1.0,
        readings={},
    )


SOUND: dict[str, tuple[float, float, float]] = {
    "pre_norm": (5.0, 18.0, 3e-2),
    "outlier_protected": (4.9, 1.5, 1e-3),
    "pre_norm_soap": (4.8, 4.0, 1e-3),
    "pre_norm_muon": (4.8, 9.0, 1e-3),
    "pre_norm_third_rate": (4.9, 3.0, 1e-3),
    "pre_norm_eps_1e-4": (4.9, 3.0, 1e-3),
    "unprotected": (5.5, 12.0, 1e-2),
}


def result(**changed: Any) -> Result:
    """Two seeds that differ a little; `changed` replaces what was found of a trial."""
    numbers = {**SOUND, **changed}
    return Result(
        {
            name: None
            or [
                None if n is None else found(n[0] + 0.01 * seed, n[1] * (1 + 0.01 * seed), n[2])
                for seed in range(2)
            ]
            for name, n in numbers.items()
        }
    )


def failing(outcome: Result) -> list[str]:
    return [finding.what for finding in check(outcome) if not finding.holds]


def test_the_check_tells_sound_from_spoiled() -> None:
    assert failing(result()) == []
    for trial, numbers, words in (
        ("pre_norm", (5.0, 8.0, 1e-2), "final max kurtosis of pre_norm"),
        ("outlier_protected", (4.9, 3.5, 1e-3), "final max kurtosis of outlier_protected"),
        ("outlier_protected", (5.2, 1.5, 1e-3), "loss of outlier_protected above"),
        ("outlier_protected", (4.9, 1.5, 7e-3), "int8 gap"),
        ("pre_norm_soap", (4.8, 8.0, 1e-3), "less 3 x that of"),
        ("pre_norm_third_rate", (4.9, 19.0, 1e-3), "less that of pre_norm_third_rate"),
        ("pre_norm_eps_1e-4", (4.9, 19.0, 1e-3), "less that of pre_norm_eps"),
        ("unprotected", (4.9, 1.4, 1e-3), "kurtosis of unprotected"),
    ):
        assert any(words in what for what in failing(result(**{trial: numbers}))), trial


def test_what_int8_costs_is_compared_only_where_it_costs_something() -> None:
    cheap = result(pre_norm=(5.0, 18.0, 1e-3), outlier_protected=(4.9, 1.5, 2e-3))
    assert not any("int8" in finding.what for finding in check(cheap))
    assert any("int8" in finding.what for finding in check(result()))


def test_one_good_preconditioner_is_enough_and_a_diverged_control_is_bad_enough() -> None:
    assert failing(result(pre_norm_soap=(4.8, 17.0, 1e-3), pre_norm_muon=(4.8, 2.0, 1e-3))) == []
    broken = check(result(unprotected=None))[-1]
    assert broken.value == inf
    assert broken.holds
    assert any("kurtosis of outlier_protected" in what for what in failing(result(outlier_protected=None)))


def test_the_spoiled_block_has_no_protection_left() -> None:
    parts = Parts(width=8, heads=2, depth=3, layer=1, mlp_width=16)
    for spoiled, block in ((True, unprotected(parts)), (False, BLOCKS["outlier_protected"](parts))):
        gains = [module.gain for module in block.modules() if isinstance(module, Residual)]
        (attention,) = [module for module in block.modules() if isinstance(module, Attention)]
        assert all((gain == 1.0) is spoiled for gain in gains)
        assert (len(list(attention.query_norm.parameters())) == 0) is spoiled


def small(config: Config, story, folder) -> Config:
    """The same settings at a size that takes seconds; everything that is not a size is kept."""
    job = config.job
    shape = replace(job.shape, width=24, heads=2, depth=2, context=16)
    training = replace(job.training, steps=4, batch=4, accumulation=2, evaluate_every=2, checkpoint_every=4)
    data = replace(job.data, text=(story,), vocabulary=300)
    job = replace(job, shape=shape, training=training, data=data, evaluation_batches=2, runs=folder)
    return replace(config, job=job, seeds=(0, 1))


@pytest.mark.parametrize("which", ["quick", "codeparrot", "opt"])
def test_every_preset_runs_and_goes_on(which, story, tmp_path) -> None:
    config = small(quick() if which == "quick" else paper(which), story, tmp_path)
    config = replace(config, trials=config.trials[:1] + config.trials[-1:])
    first = run(config, QUIET)
    assert run(config, QUIET) == first  # nothing is trained anew
    rows = table(first)
    assert [row["trial"] for row in rows] == [trial.name for trial in config.trials]
    assert "±" in rows[0]["max neuron kurtosis"]


def test_bad_settings_are_named(story, tmp_path) -> None:
    with pytest.raises(InputError, match="choose quick, codeparrot or opt"):
        paper("bert")
    with pytest.raises(InputError, match="two different seeds"):
        run(replace(small(quick(), story, tmp_path), seeds=(1, 1)), QUIET)


def test_the_command_says_what_does_not_hold(story, tmp_path, monkeypatch, capsys) -> None:
    config = small(quick(), story, tmp_path)
    monkeypatch.setattr(outlier_features, "quick", lambda: replace(config, trials=config.trials[:2]))
    arguments = [
        "verify",
        "outlier_features",
        "--runs",
        str(tmp_path),
        "--text",
        str(story),
        "--seeds",
        "0",
        "1",
    ]
    assert command(arguments) == 1  # four steps grow no outliers
    captured = capsys.readouterr()
    assert "FAILS final max kurtosis of pre_norm" in captured.out
    assert "the claim does not hold here: final max kurtosis of pre_norm" in captured.err


@pytest.mark.slow
def test_the_claim_holds(tmp_path) -> None:
    config = quick()
    config = replace(config, job=replace(config.job, runs=tmp_path))
    assert [finding.what for finding in check(run(config, QUIET)) if not finding.holds] == []
