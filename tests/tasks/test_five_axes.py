from dataclasses import replace
from math import nan

import pytest
from rich.console import Console

from browser import BROWSER, check_page
from gramian.cli.compare import _laid_over
from gramian.cli.main import run as command
from gramian.errors import InputError
from gramian.nn.transformer import Shape
from gramian.tasks.compare import CompareConfig
from gramian.tasks.examine import BlockResult
from gramian.tasks.five_axes import Axes, Study, StudyConfig, five_axes, ranking
from gramian.tasks.five_axes_page import lead, terminal_table, write_report
from gramian.tasks.language import Job, Text
from gramian.tasks.trials import Trial
from gramian.train.loop import Training

QUIET = Console(quiet=True)


def found(loss: float, kurtosis: float, gap: float, parameters: int) -> BlockResult:
    return BlockResult(
        block="any",
        block_parameters=parameters,
        parameters=parameters,
        tokens_per_second=1.0,
        validation_loss=loss,
        bits_per_byte=1.0,
        int8_loss=loss + gap,
        max_neuron_kurtosis=kurtosis,
        max_median_ratio=1.0,
        readings={},
    )


BASE = [found(5.0, 18.0, 0.1, 100), found(5.2, 17.0, 0.1, 100)]


def test_axes_are_set_against_the_base_seed_by_seed() -> None:
    good = [found(4.9, 1.5, 0.01, 84), found(5.0, 1.9, 0.02, 84)]
    (first, second) = ranking({"pre_norm": BASE, "good": good}, {"pre_norm": 1.0, "good": 1.2})
    assert first.trial == "good"
    assert first.loss_excess == pytest.approx(-0.15)
    assert first.loss_error == pytest.approx(0.05)
    assert (first.parameters, first.speed, first.kurtosis) == (0.84, 1.2, 1.9)  # the worst seed's kurtosis
    assert first.int8 == pytest.approx(0.02 / 5.0)
    assert all(first.met().values())
    assert second.met() == {
        "loss": True, "parameters": False, "speed": False, "kurtosis": False, "int8": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "axis"),
    [
        ({"loss": 5.3}, "loss"),
        ({"kurtosis": 2.0}, "kurtosis"),
        ({"gap": 0.03}, "int8"),
        ({"parameters": 86}, "parameters"),
    ],
)
def test_every_axis_can_be_lost_by_one_seed(changed: dict, axis: str) -> None:
    good = {"loss": 4.9, "kurtosis": 1.5, "gap": 0.01, "parameters": 84}
    outcomes = {"pre_norm": BASE[:1], "good": [found(**{**good, **changed})]}
    met = {each.trial: each.met() for each in ranking(outcomes, {"good": 1.2})}["good"]
    assert [name for name, won in met.items() if not won] == [axis]
    slow = {each.trial: each for each in ranking(outcomes, {"good": 1.1})}["good"]
    assert not slow.met()["speed"]


def test_a_diverged_or_untimed_trial_wins_nothing_it_has_no_number_for() -> None:
    axes = {each.trial: each for each in ranking({"pre_norm": BASE, "lost": [None, BASE[1]]}, {})}
    assert not any(axes["lost"].met().values())
    assert not axes["pre_norm"].met()["speed"]
    assert list(axes) == ["pre_norm", "lost"]


def study(folder, *axes: Axes) -> Study:
    return Study(folder, axes, {"text": "none"})


WIN = Axes("good", 3, 4.9, -0.1, 0.01, 0.84, 1.2, 1.5, 0.001)


def test_a_winner_must_have_won_with_every_seed(tmp_path) -> None:
    base = Axes("pre_norm", 3, 5.0, 0.0, 0.0, 1.0, 1.0, 18.0, 0.02)
    assert study(tmp_path, WIN, base).winners == ["good"]
    once = replace(WIN, seeds=1)
    assert study(tmp_path, once, base).winners == []
    assert "misses seeds" in lead(study(tmp_path, once, base))
    assert "misses max neuron kurtosis" in lead(study(tmp_path, replace(WIN, kurtosis=2.5), base))
    assert "won on all five axes with 3 seeds" in lead(study(tmp_path, WIN, base))


@pytest.mark.skipif(not BROWSER, reason="Chromium is not installed")
def test_the_page_opens_without_a_word_on_the_console(tmp_path) -> None:
    lost = Axes("<b>lost", 1, nan, nan, nan, nan, nan, nan, nan)
    path = write_report(study(tmp_path, WIN, lost))
    check_page(path)
    assert "&lt;b&gt;lost" in path.read_text()
    assert (tmp_path / "figures" / "pareto.svg").exists()


def small(story, folder) -> StudyConfig:
    job = Job(
        data=Text(text=(story,), vocabulary=300),
        shape=Shape(width=16, depth=2, heads=2, context=16),
        training=Training(steps=4, batch=4, evaluate_every=4, checkpoint_every=4),
        evaluation_batches=2,
        runs=folder,
    )
    trials = (Trial("pre_norm", "pre_norm"), Trial("sas_p", "sas_p"), Trial("new", "sas_p_qk_norm"))
    return StudyConfig(
        job=job, trials=trials, seeds=(0, 1), finalists=2, speed_width=64, speed_depth=1, speed_rounds=1
    )


def test_a_study_runs_repeats_its_finalists_and_goes_on(story, tmp_path) -> None:
    config = small(story, tmp_path)
    done = five_axes(config, console=QUIET)
    seeds = {each.trial: each.seeds for each in done.axes}
    assert seeds["pre_norm"] == 2
    assert sorted(seeds.values()) == [1, 2, 2] or sorted(seeds.values()) == [2, 2, 2]
    assert all(each.speed > 0 for each in done.axes)
    assert five_axes(config, console=QUIET) == done
    assert terminal_table(done).row_count == 3
    assert "learning rate 0.002 linear" in done.facts["training"]
    assert "width 64, 1 layers" in done.facts["speed"]
    with pytest.raises(InputError, match="first trial of a study must be pre_norm"):
        five_axes(replace(config, trials=config.trials[1:]), console=QUIET)
    with pytest.raises(InputError, match="each once"):
        five_axes(replace(config, seeds=(1, 1)), console=QUIET)


def test_what_is_given_is_laid_over_the_studys_own_settings() -> None:
    base, default = StudyConfig().job, CompareConfig()
    given = replace(default, training=replace(default.training, steps=7), evaluation_batches=3)
    mixed = _laid_over(base, given, default)
    assert mixed.training == replace(base.training, steps=7)
    assert mixed.evaluation_batches == 3
    assert mixed.shape == base.shape
    assert type(mixed) is Job


def test_the_command_refuses_what_a_study_does_not_take(capsys) -> None:
    assert command(["compare", "--study", "five-axes", "--blocks", "sas"]) == 1
    assert "leave --blocks and" in capsys.readouterr().err
    assert command(["compare", "--study", "five-axes", "--calibration-batches", "3"]) == 1
    assert "calibration of its own" in capsys.readouterr().err
    assert command(["compare", "--study", "five-axes", "--overwrite"]) == 1
    assert "goes on with what is there" in capsys.readouterr().err
    assert command(["compare", "--seeds", "0", "1"]) == 1
    assert "seeds are for a study" in capsys.readouterr().err
