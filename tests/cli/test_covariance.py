"""`gramian predict --sde` from the command line: what it prints and writes, its help, what it refuses."""

import re

import numpy as np
import pytest

from gramian.cli.main import run

QUICK = ["--depth", "6", "--width", "16", "--tokens", "3", "--paths", "30", "--networks", "5", "--no-region"]


def test_it_prints_writes_and_keeps_what_is_there(tmp_path, capsys) -> None:
    arguments = ["predict", "--sde", *QUICK, "--output", str(tmp_path / "out")]
    assert run(arguments) == 0
    said = capsys.readouterr().out
    for words in ("networks", "At depth/width 0.375 correlations of two tokens end between", "report: "):
        assert words in said
    assert (tmp_path / "out" / "report.html").exists()
    assert run(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run([*arguments, "--overwrite", "--causal"]) == 0


def shown(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert ended.value.code == 0
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


def test_help_of_both_modes(capsys) -> None:
    text = shown(["predict", "--sde", "--help"], capsys)
    for words in ("gramian predict --sde", "--gamma FLOAT", "--no-region", "(default: 0.5)", "--tau0"):
        assert words in text
    assert "--sde Follow" not in text
    other = shown(["predict", "--help"], capsys)
    assert "gramian predict --sde --help" in other
    assert "--tau0" not in other


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--gamma", "1.5", "must lie in [0, 1]"),
        ("--tau0", "-1", "must be positive"),
        ("--tau0", "1e-200", "must be positive"),
        ("--tokens", "1", "tokens must be at least 2"),
        ("--width", "0", "width must be at least 1"),
        ("--depth", "0", "depth must be at least 1"),
        ("--correlation", "-0.9", "can all correlate"),
        ("--paths", "1", "paths must be at least 2"),
        ("--gram", "absent.npy", "no such file"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, option, value, words) -> None:
    arguments = ["predict", "--sde", *QUICK, "--output", str(tmp_path / "out"), option, value]
    assert run(arguments) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("gramian: ")
    assert words in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_covariance_that_is_none(tmp_path, capsys) -> None:
    np.save(tmp_path / "v.npy", np.array([[1.0, 3.0], [3.0, 1.0]]))
    arguments = [
        "predict",
        "--sde",
        *QUICK,
        "--gram",
        str(tmp_path / "v.npy"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert run(arguments) == 1
    assert "positive semidefinite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
