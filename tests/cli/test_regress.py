"""`gramian regress` from the command line: what it prints and writes, its help, what it refuses."""

import csv
import re

import numpy as np
import pytest

from gramian.cli.main import run
from gramian.tasks import regression

QUICK = ["--method", "deep_ensemble", "--members", "2", "--steps", "20", "--widths", "8", "--no-compare"]


@pytest.fixture
def table(tmp_path):
    random = np.random.default_rng(0)
    path = tmp_path / "houses.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["area", "town", "price"])
        for area in random.normal(80, 20, 60):
            town = random.choice(["Ulm", "Köln"])
            writer.writerow([area, town, 2 * area + 50 * (town == "Ulm") + random.normal()])
    return path


def test_it_prints_writes_and_keeps_what_is_there(tmp_path, table, capsys) -> None:
    new = tmp_path / "new.csv"
    new.write_text("town,area\nUlm,70\nKöln,90\n", encoding="utf-8")
    output = tmp_path / "out"
    arguments = ["regress", str(table), "--target", "price", "--output", str(output), *QUICK]
    assert run([*arguments, "--predict", str(new)]) == 0
    said = capsys.readouterr().out
    for words in (
        "RMSE",
        "constant",
        "Learnt from 41 rows",
        "2 new rows",
        f"{output}/predictions.csv",
        "report: ",
    ):
        assert words in said
    with (output / "predictions.csv").open() as stream:
        assert [row["row"] for row in csv.DictReader(stream)] == ["1", "2"]
    assert run(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run([*arguments, "--overwrite"]) == 0
    with (output / "predictions.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 12  # test rows


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["regress", "--help"])
    assert ended.value.code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for words in ("--target", "--predict", "--leave-out", "(default: 0.9)", "--no-compare", "--overwrite"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "cost"], "no column 'cost'; it has 'area', 'town', 'price'"),
        (["--target", "town"], "column 'town' must hold finite numbers"),
        ([], "name the column of houses.csv to predict"),
        (["--target", "price", "--level", "2"], "must lie between 0 and 1"),
        (["--target", "price", "--method", "magic"], "unknown method 'magic'"),
        (["--target", "price", "--members", "1"], "members must be at least 2"),
        (["--target", "price", "--predict", "absent.csv"], "there is no file absent.csv"),
        (["--target", "price", "--learning-rate", "1e12"], "lower the learning rate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, table, capsys, arguments, words) -> None:
    output = tmp_path / "out"
    assert run(["regress", str(table), "--output", str(output), *QUICK, *arguments]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("gramian: ")
    assert words in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == [table]


def test_a_stop_leaves_nothing(tmp_path, table, capsys, monkeypatch) -> None:
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(regression.Fitter, "best", stop)
    output = tmp_path / "out"
    assert run(["regress", str(table), "--target", "price", "--output", str(output), *QUICK]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [table]
