"""`gramian observe` on the command line."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gramian.tasks.observe as task
from gramian.cli.main import run
from gramian.tasks.model_folder import quiet
from language_models import built, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    model = built("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.bias[11] = 50
    with quiet():
        save("gpt2", folder, model)
    return folder


@pytest.fixture
def words(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "words.txt"
    path.write_text("A tired cat sat on a mat. The cat ate a rat, and that was that.\n" * 5)
    return path


def test_a_planted_outlier_is_named(folder, words, capsys) -> None:
    arguments = [
        "observe",
        str(folder),
        "--text",
        str(words),
        "--device",
        "cpu",
        "--batch",
        "4",
        "--top",
        "1",
    ]
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert "Neuron 11 is an outlier, first at layer 2 (transformer.h.1) and in 3 of 4 streams" in out
    assert "self-check: trace identity holds to" in out
    assert "report: observations/small/report.html" in out
    assert err == ""
    assert {path.name for path in Path("observations/small").iterdir()} == {
        "readings.json", "report.html", "figures",
    }  # fmt: skip
    assert run(arguments) == 1
    assert "already holds an observation; pass --overwrite" in capsys.readouterr().err
    assert run([*arguments, "--overwrite"]) == 0


def spoiled(folder: Path, copy: Path, what: str) -> Path:
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    if what == "nan":
        state = load_file(weights)
        state["transformer.h.2.ln_1.weight"][0] = float("nan")
        save_file(state, weights, {"format": "pt"})
    elif what == "pickled":
        weights.rename(copy / "pytorch_model.bin")
    elif what == "shard":
        weights.unlink()
        index = '{"weight_map": {"transformer.wte.weight": "model-00002-of-00002.safetensors"}}'
        (copy / "model.safetensors.index.json").write_text(index)
    elif what == "vision":
        (copy / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    else:
        (copy / "tokenizer.json").unlink()
    return copy


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("nan", "the weight transformer.h.2.ln_1.weight in"),
        ("pickled", "holds its weights in pytorch_model.bin, a format that can run any code"),
        ("shard", "lacks model-00002-of-00002.safetensors, one of the 1 shards"),
        ("vision", "holds a ViTModel, no language model"),
        ("tokenizer", "has no tokenizer"),
    ],
)
def test_a_model_that_cannot_be_read_is_one_sentence(folder, words, capsys, what, sentence) -> None:
    where = spoiled(folder, words.parent / "spoiled", what)
    assert sentence in failure(["observe", str(where), "--text", str(words)], capsys)
    assert not Path("observations").exists()


def test_other_bad_input_is_one_sentence(folder, words, capsys) -> None:
    for arguments, sentence in (
        (["observe", "./nowhere"], "the folder ./nowhere does not exist"),
        (["observe", str(folder), "--text", "nothing.txt"], "nothing.txt is not a file or folder"),
        (
            ["observe", str(folder), "--text", str(words), "--context", "99"],
            "context 99 is longer than the 32",
        ),
        (["observe", str(folder), "--text", str(words), "--streams", "a.*"], "no module matches 'a.*'"),
        (["observe", str(folder), "--text", str(words), "--dtype", "int4"], "unknown dtype 'int4'"),
        (["observe", str(folder), "--text", str(words), "--output", str(folder)], "is no observation"),
    ):
        assert sentence in failure(arguments, capsys)
    assert not Path("observations").exists()


def failure(arguments: list[str], capsys) -> str:
    assert run(arguments) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("gramian: ")
    assert "\n" not in said
    return said


def test_an_interrupt_leaves_nothing(folder, words, capsys, monkeypatch) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(task, "examine", interrupted)
    assert run(["observe", str(folder), "--text", str(words)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not Path("observations").exists()
