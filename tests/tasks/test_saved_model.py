"""What a run folder is good for afterwards: Hugging Face's tools, generation, evaluation."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

import gramian.interop.huggingface  # noqa: F401  (registers the models)
from gramian.cli.main import run as command
from gramian.data.objectives import HiddenTokens
from gramian.errors import InputError
from gramian.nn.transformer import Shape
from gramian.tasks.evaluate import EvaluateConfig, evaluate, stretches
from gramian.tasks.generate import GenerateConfig, generate
from gramian.tasks.language import Text, TrainConfig, train
from gramian.tasks.saved_model import open_saved, tokenizer_of, trained_model
from gramian.train.loop import Training
from gramian.train.run import Run
from stories import write_story

QUIET = Console(quiet=True)
OBJECTIVES = ("causal", "masked")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    """A short run of each objective, documents kept apart."""
    folder = tmp_path_factory.mktemp("saved")
    config = TrainConfig(
        data=Text(text=(write_story(folder / "story"),), vocabulary=300),
        shape=Shape(width=32, depth=2, heads=4, key_heads=2, context=32),
        training=Training(steps=120, batch=8, learning_rate=1e-2, evaluate_every=120, device="cpu"),
        evaluation_batches=3,
        separate_documents=True,
        runs=folder / "runs",
        block="sas_p",
    )
    return {name: train(replace(config, objective=name, name=name), console=QUIET) for name in OBJECTIVES}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_learns_its_objective(runs, objective) -> None:
    losses = [row["validation_loss"] for row in runs[objective].record.read() if row["kind"] == "evaluate"]
    assert losses[0] == pytest.approx(math.log(300), rel=0.05)
    assert losses[-1] < 0.75 * losses[0]


def test_hugging_face_opens_a_run_folder(runs) -> None:
    for objective, opener in (("causal", AutoModelForCausalLM), ("masked", AutoModelForMaskedLM)):
        folder = runs[objective].folder
        tokenizer, model = AutoTokenizer.from_pretrained(folder), opener.from_pretrained(folder).eval()
        encoded = tokenizer("once upon a time", return_tensors="pt")
        assert (
            encoded["input_ids"][0].tolist() == tokenizer_of(runs[objective]).encode("once upon a time").ids
        )
        with torch.no_grad():
            ours = trained_model(runs[objective])(encoded["input_ids"])
            assert torch.equal(model(**encoded).logits, ours)
    assert tokenizer.mask_token_id == model.config.vocabulary - 1
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0


def test_generation_continues_the_prompt(runs) -> None:
    folder = runs["causal"].folder
    greedy = generate(GenerateConfig(run=folder, prompt="once upon", tokens=6, temperature=0.0))
    model, tokenizer = trained_model(runs["causal"]), tokenizer_of(runs["causal"])
    tokens = tokenizer.encode("once upon").ids
    for _ in range(6):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] == 0:
            break
    assert greedy == [tokenizer.decode(tokens[len(tokenizer.encode("once upon").ids) :])]
    drawn = GenerateConfig(run=folder, tokens=12, samples=3, temperature=1.5)
    before = torch.get_rng_state()
    assert generate(drawn) == generate(drawn)
    assert torch.equal(before, torch.get_rng_state())
    assert generate(drawn) != generate(replace(drawn, seed=1))
    assert len(set(generate(drawn))) > 1
    assert len(generate(GenerateConfig(run=folder, tokens=4, beams=3, samples=2))) == 2


def test_evaluation_reads_every_token_once() -> None:
    tokens = torch.arange(45)
    batches = list(stretches(tokens, context=8, batch=2))
    targets = torch.cat([window[:, 1:].flatten() for window in batches])
    assert torch.equal(targets, tokens[1:])
    assert [tuple(window.shape) for window in batches] == [(2, 9), (2, 9), (1, 9), (1, 5)]
    assert [tuple(window.shape) for window in stretches(tokens[:17], 8, 2)] == [(2, 9)]
    assert list(stretches(tokens[:1], 8, 2)) == []


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_evaluation_equals_a_slow_sum(runs, objective, tmp_path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("once upon a time there was a fox. " * 20)
    output = tmp_path / "result.json"
    found = evaluate(
        EvaluateConfig(run=runs[objective].folder, text=(text,), batch=3, output=output), console=QUIET
    )
    assert json.loads(output.read_text())["loss"] == found["loss"]
    model, tokenizer = trained_model(runs[objective]), tokenizer_of(runs[objective])
    ids = [*tokenizer.encode(text.read_text()).ids, 0]
    total = 0.0
    if objective == "masked":
        hide, count = HiddenTokens(model.config.vocabulary - 1, 0.15, seed=0), 0
        for step, windows in enumerate(stretches(torch.tensor(ids), context=32, batch=3)):
            for inputs, targets in hide(windows, step):
                with torch.no_grad():
                    chances = model(inputs[None])[0].log_softmax(-1)
                places = [place for place, target in enumerate(targets.tolist()) if target >= 0]
                total -= sum(float(chances[place, targets[place]]) for place in places)
                count += len(places)
        assert found["predicted_tokens"] == count
        assert found["loss"] == pytest.approx(total / count, rel=1e-5)
        return
    for start in range(0, len(ids) - 1, 32):
        piece = torch.tensor([ids[start : start + 33]])
        with torch.no_grad():
            chances = model(piece[:, :-1]).log_softmax(-1)
        total -= float(chances[0, torch.arange(piece.shape[1] - 1), piece[0, 1:]].sum())
    assert found["predicted_tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    read = sum(len(tokenizer.id_to_token(i)) for i in ids[1:-1])
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / read, rel=1e-5)


def test_commands(runs, capsys, tmp_path) -> None:
    folder = str(runs["causal"].folder)
    (tmp_path / "a.txt").write_text("once upon a time. " * 30)
    assert command(["generate", folder, "--prompt", "once", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("once")
    assert command(["evaluate", folder, "--text", str(tmp_path / "a.txt")]) == 0
    assert "nats/token" in capsys.readouterr().out
    for arguments, words in (
        (["generate", str(tmp_path)], "is not a run folder of gramian train"),
        (["generate", str(runs["masked"].folder)], "only a causal run generates text"),
        (["generate", folder, "--tokens", "33"], "exceed the run's context of 32"),
        (["generate", folder, "--temperature", "-1"], "temperature cannot be negative"),
        (["generate", folder, "--top-p", "0"], "top_p must lie in"),
        (["generate", folder, "--samples", "2", "--temperature", "0"], "all samples are the same"),
        (["evaluate", folder, "--text", str(tmp_path / "none.txt")], "none.txt"),
        (["evaluate", folder, "--batch", "0"], "batch must be at least 1"),
        (["train", "--objective", "spelling"], "unknown objective 'spelling'; choose causal or masked"),
        (["train", "--objective", "masked", "--mask-probability", "1"], "mask_probability"),
    ):
        assert command(arguments) == 1
        assert words in capsys.readouterr().err


def test_a_checkpoint_of_another_block_is_named(runs, tmp_path) -> None:
    import shutil

    folder = tmp_path / "other"
    shutil.copytree(runs["causal"].folder, folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "block": "pre_norm"}))
    with pytest.raises(InputError, match="are of another model"):
        trained_model(open_saved(folder))
    with pytest.raises(InputError, match=r"checkpoint .*blocks.*: it is not of 2 blocks 'pre_norm'"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer"):
        tokenizer_of(open_saved(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 10**7}, "describes .* parameters or more, and the weights in"),
        ({"vocabulary": 10**8}, "describes .* parameters or more, and the weights in"),
        ({"width": "x"}, "does not describe a transformer of ours: width is 'x'"),
        ({"causal": 1}, "does not describe a transformer of ours: causal is '1'"),
        ({"decay": 10**400}, "does not describe a transformer of ours: decay is"),
    ],
)
def test_a_description_of_another_size_is_refused_before_it_is_built(runs, tmp_path, changes, words) -> None:
    folder = shutil.copytree(runs["causal"].folder, tmp_path / "run")
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **changes}))
    with pytest.raises(InputError, match=words):
        trained_model(open_saved(folder))
