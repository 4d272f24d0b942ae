import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from gramian.data.tokens import unigram_entropy
from gramian.errors import InputError
from gramian.nn.transformer import Shape
from gramian.tasks.language import (
    Text,
    TrainConfig,
    language_loss,
    run_folder,
    train,
    validation,
)
from gramian.tasks.saved_model import trained_model
from gramian.train.checkpoint import checkpoints
from gramian.train.loop import Training

QUIET = Console(quiet=True)


@pytest.fixture
def config(story, tmp_path) -> TrainConfig:
    return TrainConfig(
        data=Text(text=(story,), vocabulary=300),
        shape=Shape(width=32, depth=2, heads=2, context=16),
        training=Training(
            steps=60, batch=8, learning_rate=1e-2, evaluate_every=20, observe_every=20, checkpoint_every=25
        ),
        evaluation_batches=3,
        runs=tmp_path / "runs",
        block="sas",
        name="one",
    )


def test_a_run_learns_and_leaves_all_that_is_needed_to_use_it(config) -> None:
    run = train(config, console=QUIET)
    corpus = config.data.load()
    result = run.result()
    entropy = unigram_entropy(corpus.train, corpus.validation, corpus.vocabulary)
    assert result["validation_loss"] < 0.6 * entropy
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        ".lock",
        "settings.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "readings.jsonl",
        "checkpoints",
        "result.json",
    }
    model = trained_model(run)
    judged = validation(config, corpus)(model)
    assert judged["validation_loss"] == pytest.approx(result["validation_loss"], rel=1e-5)
    assert judged["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-5)
    rows = run.record.read()
    seen = next(row for row in rows if row["kind"] == "observe")
    assert {site.count(".") for site in seen["sites"]} == {1, 2, 3}  # blocks, last output, mixings
    mixing = next(values for site, values in seen["sites"].items() if site.endswith("mixing"))
    uniform = sum(math.log(i) for i in range(1, 17)) / 16  # zero queries: uniform attention
    assert mixing["attention_entropy"] == pytest.approx(uniform, rel=1e-5)
    gains = [row["gains"] for row in rows if row["kind"] == "evaluate"]
    assert gains[0][0]["identity"] == gains[0][1]["softmax"] == 1.0
    assert gains[-1] != gains[0]


def test_the_loss_is_the_mean_over_next_tokens(config) -> None:
    corpus = config.data.load()
    judge = validation(config, corpus)
    batches = list(judge)
    assert [tuple(batch.shape) for batch in batches] == [(8, 2, 16)] * 3
    assert all(torch.equal(one, two) for one, two in zip(batches, judge, strict=True))

    def uniform(tokens):
        return torch.zeros(*tokens.shape, corpus.vocabulary)

    assert language_loss(uniform, batches[0]).item() == pytest.approx(math.log(corpus.vocabulary))


def test_short_validation_text_is_read_whole(config) -> None:
    corpus = config.data.load()
    judge = validation(replace(config, evaluation_batches=10_000), corpus)
    targets = torch.cat([batch[:, 1].flatten() for batch in judge])
    assert torch.equal(targets, corpus.validation[1 : len(targets) + 1].long())
    assert len(corpus.validation) - len(targets) <= config.shape.context


def test_settings_that_do_not_fit_leave_no_folder(config, story) -> None:
    (story.parent / "short.txt").write_text("too short")
    for change, words in (
        ({"block": "resnet"}, "unknown block"),
        ({"shape": replace(config.shape, depth=0)}, "depth"),
        ({"shape": replace(config.shape, heads=5)}, "not divisible by heads"),
        ({"training": replace(config.training, learning_rate=-1.0)}, "learning rate"),
        ({"training": replace(config.training, seed=-1)}, "seed"),
        ({"evaluation_batches": 0}, "evaluation_batches"),
        ({"data": replace(config.data, text=(story.parent / "none",))}, "not a file or folder"),
        ({"data": replace(config.data, text=(story.parent / "short.txt",))}, "context 16 needs 17"),
        ({"name": "a/b"}, "plain folder name"),
    ):
        with pytest.raises(InputError, match=words):
            train(replace(config, **change), console=QUIET)
        assert not config.runs.exists()


def test_damaged_runs_are_named(config) -> None:
    run = train(replace(config, training=replace(config.training, steps=2)), console=QUIET)
    with pytest.raises(InputError, match="already holds a run"):
        train(config, console=QUIET)
    weights = checkpoints(run.checkpoints)[-1].folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        trained_model(run)
    weights.write_bytes(whole)
    model = json.loads((run.folder / "config.json").read_text())
    (run.folder / "config.json").write_text(json.dumps({**model, "model_type": "mint"}))
    with pytest.raises(InputError, match="does not describe a transformer"):
        trained_model(run)
    for saved in checkpoints(run.checkpoints):
        for path in saved.folder.iterdir():
            path.unlink()
        saved.folder.rmdir()
    with pytest.raises(InputError, match="no checkpoint yet"):
        trained_model(run)
    with pytest.raises(InputError, match="plain folder name"):
        run_folder(config.runs, "..")
