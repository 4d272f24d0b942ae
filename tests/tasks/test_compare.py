import io
from dataclasses import asdict, replace

import pytest
import torch
from rich.console import Console

from browser import BROWSER, check_page
from gramian.compress.recipe import Recipe
from gramian.compress.simulate import Simulation
from gramian.errors import InputError, StoppedError
from gramian.nn.transformer import Shape
from gramian.tasks.compare import CompareConfig, compare
from gramian.tasks.compare_page import report_page, terminal_table, write_report
from gramian.tasks.language import Text, training_batches, validation
from gramian.tasks.saved_model import trained_model
from gramian.train.loop import Training
from gramian.train.run import Run
from stories import write_story

QUIET = Console(quiet=True)
BLOCKS = ("pre_norm", "sas_p", "outlier_protected")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> CompareConfig:
    folder = tmp_path_factory.mktemp("compare")
    story = write_story(folder / "<b>story & co")
    return CompareConfig(
        data=Text(text=(story,), vocabulary=300),
        shape=Shape(width=32, depth=2, heads=2, context=16),
        training=Training(
            steps=40, batch=8, learning_rate=1e-2, evaluate_every=20, observe_every=20, checkpoint_every=20
        ),
        evaluation_batches=3,
        runs=folder / "runs",
        blocks=BLOCKS,
    )


@pytest.fixture(scope="module")
def comparison(config):
    return compare(config, console=QUIET)


def test_every_block_learns_and_is_measured(config, comparison) -> None:
    assert [result.block for result in comparison.results] == list(BLOCKS)
    for result in comparison.results:
        assert result.validation_loss < 0.7 * comparison.unigram_entropy
        assert 1 <= result.max_neuron_kurtosis <= 32
        assert result.max_median_ratio > 1
        assert result.tokens_per_second > 0
        assert result.parameters > result.block_parameters
    first, simple, _ = comparison.results
    assert simple.block_parameters < 0.9 * first.block_parameters


def test_int8_loss_is_that_of_the_quantised_model(config, comparison) -> None:
    run = Run(comparison.folder / "sas_p")
    corpus = config.data.load()
    judge = validation(config, corpus)
    model = trained_model(run)
    assert judge(model)["validation_loss"] == pytest.approx(comparison.results[1].validation_loss, rel=1e-6)
    batches = training_batches(config, corpus)
    calibration = [batches(step)[:, 0] for step in range(config.calibration_batches)]
    recipe = Recipe(exact=("head",))
    with Simulation(model, recipe).calibrate(calibration):
        int8 = judge(model)["validation_loss"]
    assert int8 == pytest.approx(comparison.results[1].int8_loss, rel=1e-6)
    assert int8 != judge(model)["validation_loss"]
    spoiled = trained_model(run)  # control: a channel a thousand times larger ruins per-tensor int8
    with torch.no_grad():
        for layer in spoiled.blocks:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight[0] *= 1000
    before = judge(spoiled)["validation_loss"]
    with Simulation(spoiled, recipe).calibrate(calibration):
        after = judge(spoiled)["validation_loss"]
    assert abs(after - before) > 20 * abs(comparison.results[1].int8_gap)


def test_a_finished_comparison_resumes_to_the_same_numbers(config, comparison) -> None:
    again = compare(config, resume=True, console=QUIET)
    assert [asdict(result) for result in again.results] == [asdict(result) for result in comparison.results]
    assert again.records == comparison.records
    with pytest.raises(InputError, match="already holds a run"):
        compare(config, console=QUIET)


def test_a_stopped_comparison_goes_on(config, comparison, monkeypatch) -> None:
    """Stopped in the middle and resumed, every block ends in the weights of the uninterrupted comparison."""
    other = replace(config, name="stopped")
    ask = iter([None] * 4 + ["SIGTERM"])

    class Requests:
        def __enter__(self):
            return lambda: next(ask, None)

        def __exit__(self, *failure) -> None:
            pass

    with monkeypatch.context() as patch:
        patch.setattr("gramian.train.side_by_side.stop_requests", Requests)
        with pytest.raises(StoppedError, match="stopped by SIGTERM and saved"):
            compare(other, console=QUIET)
    resumed = compare(other, resume=True, console=QUIET)
    for one, two in zip(comparison.results, resumed.results, strict=True):
        assert one.validation_loss == two.validation_loss
        assert one.readings == two.readings
        ours = trained_model(Run(comparison.folder / one.block)).state_dict()
        theirs = trained_model(Run(resumed.folder / one.block)).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_report_says_what_was_found(comparison) -> None:
    path = write_report(comparison)
    text = path.read_text(encoding="utf-8")
    assert "<b>story" not in text
    assert "&lt;b&gt;story" in text
    page = report_page(comparison)
    assert "sas_p ends" in page.lead
    assert f"{comparison.unigram_entropy:.3f}" in page.lead
    figures = {path.name for path in (comparison.folder / "figures").iterdir()}
    assert {"loss_by_step.svg", "loss_by_time.svg", "kurtosis_by_layer_and_step.svg", "gains.svg"} <= figures
    assert "loss_in_int8.svg" in figures
    for width in (60, 80):
        console = Console(record=True, width=width, file=io.StringIO())
        console.print(terminal_table(comparison))
        printed = console.export_text()
        assert "kurtosis" in printed
        assert "…" not in printed  # nothing is cut


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_report_opens_without_errors_or_network(comparison) -> None:
    assert check_page(write_report(comparison)) == []


def test_bad_comparisons_are_named_before_anything_is_written(config) -> None:
    for change, words in (
        ({"blocks": ()}, "at least one block"),
        ({"blocks": ("sas", "sas")}, "once"),
        ({"blocks": ("sas", "resnet")}, "unknown block 'resnet'"),
        ({"calibration_batches": 0}, "calibration_batches"),
        ({"shape": replace(config.shape, width=33)}, "not divisible"),
        ({"shape": replace(config.shape, norm="batch")}, "unknown norm 'batch'"),
        ({"shape": replace(config.shape, activation="step")}, "unknown activation 'step'"),
        ({"shape": replace(config.shape, context=10**6)}, "context 1000000 needs"),
    ):
        with pytest.raises(InputError, match=words):
            compare(replace(config, name="bad", **change), console=QUIET)
        assert not (config.runs / "bad").exists()
