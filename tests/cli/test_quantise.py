"""`gramian quantise` from arguments to exit code: what it prints, what it writes, how it fails."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gramian.cli.main import run
from gramian.compress import torch_ao
from gramian.tasks import quantise as task
from gramian.tasks.model_folder import quiet
from gramian.tasks.quantised_model import load_quantised
from language_models import SIZES, save

torch_ao.quieten()
pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(**SIZES, n_positions=32, n_embd=32, n_layer=2, n_head=2)
        save("gpt2", folder, GPT2LMHeadModel(config))
    return str(folder)


@pytest.fixture
def arguments(model, story) -> list[str]:
    small = ["--batch", "2", "--context", "32", "--max-bytes", "700", "--calibration-batches", "4"]
    return ["quantise", model, "--text", str(story), "--rounds", "1", "--device", "cpu", *small]


def test_tables_report_and_export(arguments, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    folders = ["--output", str(tmp_path / "out"), "--export", str(tmp_path / "int8")]
    assert run([*arguments, "--schemes", "static", "int8_dynamic", *folders]) == 0
    said = capsys.readouterr().out
    for part in ("static W8A8 (simulated)", "dynamic W8A8 (torchao)", "transformer.h.1", "neuron kurtosis"):
        assert part in said
    for part in ("calibrated on: ", "evaluated on: ", "report: ", "exported model: ", "does not predict"):
        assert part in said
    assert "int8 weights" not in said
    rows = json.loads((tmp_path / "out" / "quantisation.json").read_text())["results"]
    assert [row["scheme"] for row in rows] == ["exact", "static", "int8_dynamic"]
    assert (tmp_path / "out" / "report.html").is_file()
    made = torch_ao.converted(load_quantised(tmp_path / "int8", device="cpu").model)
    assert len(made.layers) == 8  # Conv1D layers, which torchao alone would have passed over


def test_failures_are_one_sentence(arguments, tmp_path: Path, capsys) -> None:
    for more, said in (
        (["--schemes", "int2"], "unknown scheme 'int2'; accepted are"),
        (["--max-bytes", "50"], "calibration batches"),
        (["--output", str(tmp_path)], "exists already"),
        (["--context", "999"], "999"),
        (["--export", str(tmp_path / "x"), "--export-scheme", "fp8"], "cannot be exported"),
    ):
        assert run([*arguments, *more]) == 1
        captured = capsys.readouterr()
        assert said in captured.err
        assert captured.err.count("\n") == 1
    assert list(tmp_path.glob("x*")) == []


@pytest.mark.parametrize("place", ["_layers", "save_quantised"])
def test_an_interrupt_leaves_nothing(arguments, tmp_path: Path, capsys, monkeypatch, place) -> None:
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(task, place, stop)
    there = ["--output", str(tmp_path / "new" / "out"), "--export", str(tmp_path / "new" / "int8")]
    assert run([*arguments, "--schemes", "int8_weight", *there]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
