"""`gramian graphs` from arguments to exit code: what it prints and writes, how it stops, what it refuses."""

import csv
import io
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from gramian.cli.main import run
from gramian.data.graph_generators import GENERATORS
from gramian.tasks import graph_data, graph_models
from gramian.train.loop import Trainer

MADE = ["--data", "distance_count", "--distance", "2", "--sizes", "24", "6", "6"]
QUICK = ["--epochs", "1", "--batch", "2", "--parameters", "2000", "--layers", "1"]
"""Networks of 12 steps on trees of 12 nodes."""

ARRAYS = {
    "x": np.arange(90, dtype=np.float32).reshape(90, 1) / 90,
    "edge_index": np.tile([[0, 1], [1, 0]], 30),
    "node_ptr": np.arange(0, 91, 3),
    "edge_ptr": np.arange(0, 61, 2),
    "y": np.array([0, 1] * 15),
}
"""Thirty graphs of a pair and a single node."""


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return ["--runs", str(tmp_path / "runs")]


def saved(folder: Path, **changed: np.ndarray) -> Path:
    np.savez(folder / "some.npz", **{**ARRAYS, **changed})
    return folder / "some.npz"


def found(folder: Path) -> tuple[dict, str]:
    """Return the outcomes without the time that they took, and the predictions."""
    numbers = json.loads((folder / "graphs.json").read_text())
    outcomes = {
        model: [{key: value for key, value in each.items() if key != "seconds"} for each in outcomes]
        for model, outcomes in numbers["outcomes"].items()
    }
    return outcomes, (folder / "predictions.csv").read_text()


def test_it_prints_writes_and_keeps_what_is_there(runs, tmp_path: Path, capsys) -> None:
    arguments = ["graphs", *MADE, *QUICK, *runs, "--compare", "gine", "--name", "trees"]
    assert run(arguments) == 0
    said, folder = capsys.readouterr().out, tmp_path / "runs" / "trees"
    for words in (
        "36 graphs with 432 nodes",
        "24 to learn from, 6 to choose by, 6 to report on; filters look",
        "test MAE",
        "constant",
        "Of 2 networks",
        "is second there",
        "One seed: how much of a difference is chance is not known",
        f"predictions: {folder}/predictions.csv",
        f"report: {folder}/report.html",
    ):
        assert words in said
    with (folder / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["graph"], row["node"]) for row in rows] == [
        (str(graph), str(node)) for graph in range(30, 36) for node in range(12)
    ]
    errors = [abs(float(row["predicted"]) - float(row["true"])) for row in rows]
    assert found(folder)[0]["gred"][0]["test"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert sorted(path.name for path in (folder / "figures").iterdir()) == [
        "reach_by_layer.svg", "test_scores.svg", "validation_by_epoch.svg", "validation_by_time.svg",
    ]  # fmt: skip
    before = found(folder)
    assert run(arguments) == 1
    assert "already holds a run; pass --resume" in capsys.readouterr().err
    assert run([*arguments, "--resume", "--layers", "2"]) == 1
    assert "resume with the same settings" in capsys.readouterr().err
    assert run([*arguments, "--resume"]) == 0
    assert "step" not in capsys.readouterr().out  # nothing was trained again
    assert found(folder) == before
    assert run([*arguments, "--overwrite", "--seeds", "3"]) == 0
    assert found(folder)[0]["gred"][0]["seed"] == 3


def test_a_stopped_run_goes_on_to_the_same_numbers(runs, tmp_path: Path, capsys, monkeypatch) -> None:
    arguments = ["graphs", *MADE, *QUICK, *runs, "--seeds", "0", "1", "--compare", "gcn", "--epochs", "2"]
    assert run([*arguments, "--name", "whole"]) == 0
    capsys.readouterr()
    advance = Trainer.advance

    def stopping(trainer: Trainer, steps: int) -> None:
        advance(trainer, steps)
        if trainer.settings.seed == 1 and trainer.step == 10:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "advance", stopping)
        assert run([*arguments, "--name", "stopped"]) == 130
    assert "stopped by SIGINT and saved: gred, rate 0.001, seed 1 at step 10" in capsys.readouterr().err
    folder = tmp_path / "runs" / "stopped"
    assert not (folder / "graphs.json").exists()
    assert run([*arguments, "--name", "stopped", "--resume"]) == 0
    assert "seed 0" not in capsys.readouterr().out.split("gcn")[0]  # it was trained before
    assert found(folder) == found(folder.parent / "whole")


def test_a_stop_while_reading_leaves_nothing(runs, tmp_path: Path, capsys, monkeypatch) -> None:
    def stop(_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(graph_data.Source, "load", stop)
    assert run(["graphs", *MADE, *QUICK, *runs]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["classification", "multilabel", "node"])
def test_files_of_every_kind_of_target(runs, tmp_path: Path, capsys, task) -> None:
    y = {
        "classification": np.array([3, 8] * 15),
        "multilabel": np.array([[0, 1], [1, 0], [1, 1]] * 10, np.float32),
        "node": np.array([5, 7, -100] * 30),
    }[task]
    arguments = ["graphs", "--data", str(saved(tmp_path, y=y)), *QUICK, *runs, "--task", task]
    assert run([*arguments, "--encoding", "random_walk"]) == 0
    capsys.readouterr()
    text = (tmp_path / "runs" / "graphs" / "predictions.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    if task == "multilabel":
        assert list(rows[0]) == ["graph", "predicted_0", "true_0", "predicted_1", "true_1"]
        assert all(0 <= float(row["predicted_1"]) <= 1 for row in rows)
    elif task == "node":
        assert {(row["node"], row["true"]) for row in rows} == {("0", "5"), ("1", "7"), ("2", "")}
    else:
        assert {row["true"] for row in rows} <= {"3", "8"} >= {row["predicted"] for row in rows}
        assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)


def test_a_network_that_diverges_is_named(runs, tmp_path: Path, capsys) -> None:
    assert run(["graphs", *MADE, *QUICK, *runs, "--learning-rates", "1e-3", "1e30"]) == 0
    assert "gred diverged with rate 1e+30, which the numbers leave out." in capsys.readouterr().out
    assert run(["graphs", *MADE, *QUICK, *runs, "--learning-rates", "1e30", "--name", "b"]) == 1
    assert "the training of every network diverged" in capsys.readouterr().err


def test_help_and_names(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["graphs", "--help"])
    assert ended.value.code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for words in (
        "--data", "--task", "--model", "--compare", "--parameters", "--layers", "--hops", "--epochs",
        "--batch", "--learning-rates", "--seeds", "(default: eccentricity)", "--resume", "--overwrite",
    ):  # fmt: skip
        assert words in text
    assert run(["list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in [*GENERATORS, *graph_models.MODELS])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nothing"], "there is no file or folder nothing; graphs that can be made: cluster, csl"),
        (["--model", "magic"], "unknown model 'magic'; choose one of gred, gcn"),
        (["--compare", "magic"], "unknown model 'magic'"),
        (["--compare", "gred"], "every model is trained once"),
        (["--task", "magic"], "unknown task 'magic'"),
        (["--task", "classification"], "is node_regression, not classification"),
        (["--encoding", "magic"], "unknown encoding 'magic'"),
        (["--readout", "max"], "choose mean or sum"),
        (["--parameters", "10"], "a network of width 4 has"),
        (["--parameters", "-1"], "parameters must be at least 1"),
        (["--layers", "0"], "layers must be at least 1"),
        (["--hops", "-1"], "hops cannot be negative"),
        (["--encoding-size", "0"], "encoding_size must be at least 1"),
        (["--dropout", "1"], "rate of dropout"),
        (["--r-min", "1"], "r_min must be at least 0 and below 1"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--patience", "0"], "patience must be at least 1"),
        (["--learning-rates"], "learning_rates are one or several"),
        (["--learning-rates", "1e-3", "1e-3"], "learning_rates are one or several different ones"),
        (["--learning-rates", "0"], "learning"),
        (["--learning-rates", "nan"], "learning"),
        (["--weight-decay", "-1"], "decay"),
        (["--precision", "fp8"], "unknown precision 'fp8'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--seeds", "0", "0"], "seeds are different numbers from 0 on"),
        (["--seeds", "-1"], "seeds are different numbers from 0 on"),
        (["--fold", "-1"], "fold cannot be negative"),
        (["--fold", "1"], "has one split, 0; there is no fold 1"),
        (["--count", "0"], "count must be at least 1"),
        (["--held-out", "0"], "held_out must be at least 1"),
        (["--sizes", "9", "0", "9"], "three numbers of examples of at least 1"),
        (["--sizes", "9", "9", "1000000000"], "at most 100,000 graphs are made"),
        (["--distance", "100000"], "for distances up to 1,000"),
        (["--distance", "-3"], "distance and window must be at least 1"),
        (["--target", "logP"], "target is for files of molecules, not for distance_count"),
        (["--splits", "some.npz"], "splits is for files of molecules"),
        (["--name", "../a"], "a run's name must be a plain folder name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_settings_are_one_sentence_and_leave_nothing(
    runs, tmp_path: Path, capsys, arguments, words
) -> None:
    assert run(["graphs", *MADE, *QUICK, *runs, *arguments]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("gramian: ")
    assert words in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


LEAVES = np.arange(1, 20_000)
STAR = np.hstack((np.stack((0 * LEAVES, LEAVES)), np.stack((LEAVES, 0 * LEAVES))))
"""Any two leaves are two steps apart: 400 million pairs."""


@pytest.mark.parametrize(
    ("changed", "arguments", "words"),
    [
        ({"x": np.full((90, 1), np.nan, np.float32)}, [], "features of node 0 are not finite"),
        ({"node_ptr": np.array([0, 3, 3, *range(9, 91, 3)])}, [], "graph 1 has no nodes"),
        ({"y": np.zeros(30, int)}, [], "needs 2 to 1,000 classes"),
        ({"y": np.full(30, np.inf)}, [], "must be finite numbers"),
        ({"edge_index": ARRAYS["edge_index"] + 2}, [], "nodes are counted from 0 in each graph"),
        ({"y": np.array([[1.0, 0.0]] * 30)}, [], "no label has both values in the validation part"),
        ({"y": np.array([0, 1, -100] + [-100] * 87)}, ["--task", "node"], "no node of the"),
        ({"train": np.array([0]), "val": np.array([1]), "test": np.array([1])}, [], "have none in common"),
        ({"train": np.array([0]), "val": np.array([1]), "test": np.array([2])}, ["--fold", "1"], "no fold 1"),
        ({}, ["--task", "regression", "--target", "y"], "target is for files of molecules"),
        ({}, ["--distance", "3"], "distance and sizes are for graphs that are made"),
        (
            {
                "x": np.zeros((20_029, 1), np.float32),
                "edge_index": STAR,
                "node_ptr": np.array([0, *range(20_000, 20_030)]),
                "edge_ptr": np.array([0, *[39_998] * 30]),
            },
            ["--hops", "3"],
            "shells of a graph of 20000 nodes need about",
        ),
    ],
    ids=range(12),
)
def test_bad_files_are_one_sentence_and_leave_nothing(
    runs, tmp_path: Path, capsys, changed, arguments, words
) -> None:
    path = saved(tmp_path, **changed)
    assert run(["graphs", "--data", str(path), *QUICK, *runs, *arguments]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("gramian: ")
    assert words in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_files(runs, tmp_path: Path, capsys) -> None:
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-300])
    assert run(["graphs", "--data", str(path), *QUICK, *runs]) == 1
    assert "cannot be read as .npz of plain arrays" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_package_is_named(runs, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(graph_models, "find_spec", lambda name: None)
    assert run(["graphs", *MADE, *QUICK, *runs, "--model", "gine"]) == 1
    assert 'pip install "gramian[graphs]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
