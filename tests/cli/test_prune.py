"""`gramian prune` from arguments to exit code: what it prints, what it writes, how it fails."""

import csv
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from gramian.cli.main import run
from gramian.tasks import pruning_run
from gramian.tasks.pruning_files import load_pruned

QUICK = ["--count", "200", "--widths", "12", "--train-steps", "40", "--steps", "5"]
CERTIFY = ["--certify", "--posterior-steps", "5", "--draws", "10"]


class Trap:
    """What leaves a file behind when it is loaded as an object."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return ["--runs", str(tmp_path / "runs")]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two kinds that a number tells apart, and the name of each."""
    path = tmp_path / "kinds.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["length", "width", "name", "kind"])
        for row in range(80):
            writer.writerow([row % 2 + row / 100, row % 7, f"no {row}", ("long", "short")[row % 2]])
    return path


def test_table_report_and_networks(runs, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert run(["prune", "mlp", "--density", "0.5", "0.2", *QUICK, *CERTIFY, *runs]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "runs" / "prune"
    for words in ("density", "0-1 error, %", "dense", "50 %", "20 %", "certi-", "40 held-out examples"):
        assert words in said
    assert f"report: {folder}/report.html" in said
    assert f"pruned networks: {folder}/density-*" in said
    page = (folder / "report.html").read_text()
    for words in (
        "Density path",
        "Certificate",
        "Where weights are kept",
        "Probabilities over time",
        "Export",
    ):
        assert words in page
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert "density_path.svg" in figures
    assert len(figures) >= 5
    numbers = json.loads((folder / "pruning.json").read_text())
    assert [each["density"] for each in numbers["outcomes"]] == [0.5, 0.2]
    for each in numbers["outcomes"]:
        made = each["guarantee"]["posterior"]
        assert (made["n"], made["draws"], made["union"]) == (80, 10, pytest.approx(np.log(2)))
        assert made["confidence"] == pytest.approx(0.965)
        network = load_pruned(folder / f"density-{each['density']:g}")
        assert each["export"]["nonzero"] == sum(int((value != 0).sum()) for value in network.parameters())
    assert numbers["sentences"][0] in said


def test_a_table_whose_columns_are_chosen(runs, table: Path, tmp_path: Path, capsys) -> None:
    arguments = ["prune", "--data", str(table), "--target", "kind", "--density", "0.5", *QUICK, *runs]
    assert run([*arguments, "--leave-out", "name"]) == 0
    assert "16 held-out examples" in capsys.readouterr().out
    about = json.loads((tmp_path / "runs/prune/density-0.5/network.json").read_text())
    assert about["classes"] == ["long", "short"]
    assert about["full"]["size"] == [2]
    bare = tmp_path / "bare.csv"
    bare.write_text("\n".join(f"{row},{row % 7},{row % 2}" for row in range(60)) + "\n")
    arguments = ["prune", "--data", str(bare), "--density", "0.5", *QUICK, *runs]
    assert run([*arguments, "--target", "3", "--header", "False", "--name", "bare"]) == 0
    assert json.loads((tmp_path / "runs/bare/pruning.json").read_text())["examples"]["held_out"] == 12
    assert run([*arguments, "--target", "0", "--header", "True", "--name", "named"]) == 1
    assert "column" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ["cnn", "--widths", "4", "--structure", "neurons", "--density", "0.5"],
        ["--structure", "2:4", "--density", "0.5", *CERTIFY],
        ["--density", "1", "0.3", "--posterior", "both", *CERTIFY],
        ["--density", "0.5", "--prior-fraction", "0", *CERTIFY, "--bound", "quadratic"],
        ["--density", "0.5", "--estimator", "kept", "--learn", "weights"],
        ["--density", "0.5", "--estimator", "relaxed", "--steps", "0", "--train-steps", "0"],
    ],
    ids=" ".join,
)
def test_what_else_can_be_asked(runs, more: list[str], capsys) -> None:
    assert run(["prune", *QUICK, *runs, *more]) == 0
    assert "report: " in capsys.readouterr().out


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["prune", "--help"])
    assert ended.value.code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for words in ("--density", "--certify", "--leave-out", "--header", "--prior-fraction", "--structure"):
        assert words in text


def images(folder: Path, labels: np.ndarray, pixels: np.ndarray | None = None, name: str = "a.npz") -> str:
    shape = (len(labels), 4, 4)
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8) if pixels is None else pixels
    np.savez(folder / name, images=pixels, labels=labels)
    return str(folder / name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--density", "0"], "the density must be more than 0 and at most 1, got 0.0"),
        (["--density", "1.5"], "the density must be more than 0 and at most 1, got 1.5"),
        (["--density", "0.5", "0.5"], "densities have to be numbers that differ in six digits"),
        (["--density", "0.0001"], "a density of 0.0001 keeps no unit of the model"),
        (["--data", "absent.npz"], "absent.npz"),
        (["--data", "KINDS"], "target"),
        (
            ["--data", "KINDS", "--target", "colour"],
            "no column 'colour'; it has 'length', 'width', 'name', 'kind'",
        ),
        (["--target", "kind"], "target, leave_out and header are for tables"),
        (["--leave-out", "kind"], "target, leave_out and header are for tables"),
        (["forest"], "'forest' is neither mlp nor cnn, nor a run folder of `gramian train`"),
        (["cnn", "--data", "KINDS", "--target", "kind", "--leave-out", "name"], "a cnn is for images"),
        (
            ["--structure", "3:4", "--density", "0.1"],
            "3:4 keeps 0.75 of the weights; a density of 0.1 is out",
        ),
        (["--structure", "4:4", "--density", "1"], "needs 1 ≤ n < m, got 4:4"),
        (["--structure", "rows"], "unknown structure 'rows'"),
        (["cnn", "--structure", "2:4", "--density", "0.5"], "1 input features of '0' are not a multiple of"),
        (["--certify", "--prior-fraction", "1"], "has to be from 0 to below 1, not 1.0"),
        (["--certify", "--prior-fraction", "0.99"], "a bound set of 8 examples or more, not 2"),
        (["--certify", "--prior-fraction", "0", "--start", "snip"], "the score snip needs prior examples"),
        (["--certify", "--delta", "0.6", "--delta-sampling", "0.4"], "with a sum below 1, not 0.6 and 0.4"),
        (["--certify", "--draws", "1"], "at least two draws, got 1"),
        (["--bound", "hoeffding"], "there is no bound 'hoeffding'; take one of kl, quadratic, classic"),
        (["--estimator", "hard_concrete"], "hard concrete masks are no Bernoulli masks"),
        (["--estimator", "disarm"], "disarm has no gradient by weights; learn masks, not both"),
        (["--train-steps", "-1"], "training the network needs steps ≥ 0"),
        (["--count", "1"], "count must be at least 2 examples, got 1"),
        (["--test", "1"], "the share that is held out must lie between 0 and 1, got 1"),
        (["--name", "../x"], "a run's name must be a plain folder name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    runs, table: Path, tmp_path: Path, capsys, arguments: list[str], words: str
) -> None:
    given = [str(table) if each == "KINDS" else each for each in arguments]
    refused(["prune", *QUICK, *runs, *given], words, capsys)
    assert list(tmp_path.iterdir()) == [table]


def refused(arguments: list[str], words: str, capsys) -> None:
    assert run(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gramian: ")
    assert words in said.err
    assert said.err.count("\n") == 1
    assert not re.search(r"\. [A-Z]", said.err)


def test_data_that_cannot_be_used(runs, tmp_path: Path, capsys) -> None:
    """Labels out of range, words, and objects, which are not loaded."""
    trap, objects = tmp_path / "sprung", np.empty(20, dtype=object)
    objects[:] = [Trap(trap)] * 20
    small = np.arange(20)
    for name, labels, pixels, words in (
        ("below", small - 1, None, "label"),
        ("beyond", small * 1000, None, "labels count at most 1,000 classes"),
        ("single", small * 0, None, "has a single class; at least two are needed"),
        ("words", small.astype(str), None, "labels"),
        ("objects", objects, None, "cannot be read as .npz of plain arrays"),
        ("pixels", small, objects, "cannot be read as .npz of plain arrays"),
    ):
        path = images(tmp_path, labels, pixels, f"{name}.npz")
        refused(["prune", "--data", path, *QUICK, *runs], words, capsys)
    assert not trap.exists()
    np.load(tmp_path / "objects.npz", allow_pickle=True)["labels"]  # control: it would spring
    assert trap.exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "option",
    [["--leave-out", "a"], ["--header", "False"], ["--target", "a"], ["--widths", "3"]],
    ids=" ".join,
)
def test_a_decoder_has_no_columns(runs, tmp_path: Path, capsys, monkeypatch, option: list[str]) -> None:
    (tmp_path / "mlp").mkdir()
    (tmp_path / "mlp" / "settings.json").write_text("{}")
    what = f"{option[0][2:].replace('-', '_')} is for classifiers"
    refused(["prune", str(tmp_path / "mlp"), *option, *runs], what, capsys)
    monkeypatch.chdir(tmp_path)
    refused(["prune", "mlp", "--leave-out", "a", *runs], "leave_out and header are for tables", capsys)


def test_a_stop_is_said_and_can_be_resumed(runs, tmp_path: Path, capsys, monkeypatch) -> None:
    prune = pruning_run.prune

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        return prune(*args, **options)

    arguments = ["prune", "--density", "0.5", *QUICK, *runs]
    with monkeypatch.context() as patch:
        patch.setattr(pruning_run, "prune", interrupted)
        assert run(arguments) == 130
    said = capsys.readouterr().err
    assert "stopped by SIGTERM; 0 of 1 densities are saved in" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "runs/prune/report.html").exists()
    assert run([*arguments, "--resume"]) == 0
    assert (tmp_path / "runs/prune/report.html").exists()


def test_a_run_is_resumed_or_replaced_when_asked(runs, tmp_path: Path, capsys) -> None:
    arguments, found = ["prune", "--density", "0.5", *QUICK, *runs], tmp_path / "runs/prune/pruning.json"
    assert run(arguments) == 0
    numbers = json.loads(found.read_text())
    capsys.readouterr()
    refused(arguments, "pass --resume to go on with it, --overwrite to replace it", capsys)
    refused([*arguments, "--resume", "--seed", "1"], "resume with the same settings", capsys)
    assert run([*arguments, "--resume"]) == 0
    assert json.loads(found.read_text()) == numbers
    assert run([*arguments, "--overwrite", "--start", "random", "--learn", "masks"]) == 0
    assert json.loads(found.read_text())["outcomes"][0]["baseline"] != numbers["outcomes"][0]["baseline"]


def test_text_named_npz_gets_one_sentence_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.npz"
    path.write_text("a,b\n1,2\n")
    assert run(["prune", "mlp", "--data", str(path), "--runs", str(tmp_path / "runs")]) == 1
    said = capsys.readouterr().err
    assert "cannot be read as .npz of plain arrays: File is not a zip file" in said
    assert "unsafe" not in said
    assert not (tmp_path / "runs").exists()
