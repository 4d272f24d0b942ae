"""Markup in every string that a command takes stays text: in pages, in figures and on the terminal."""

import csv
import html
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gramian.cli.main import run
from gramian.report import Column, Page, Plot, Section, Table, curves, render
from gramian.tasks.model_folder import quiet
from language_models import save

EVIL = "<script>alert(1)</script>\"'&[/red]$x$]]>-->"
"""Markup of pages, of XML, of the terminal and of formulas."""

FILE = "<img src=x onerror=alert(1)>\"'&[red]$x$]]>--"
"""The same as the name of a file, which has no slash."""

ALLOWED = ("#", "data:image/")


class Shown(HTMLParser):
    """What a page or a figure could do: its elements, and the addresses and handlers in their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        if tag in {"script", "img", "iframe", "object", "embed", "base", "form", "input", "foreignobject"}:
            self.wrong.append(tag)
        for name, value in attrs:
            link = name.rpartition(":")[2] in {"href", "src", "action"} and not (value or "").startswith(
                ALLOWED
            )
            if name.startswith("on") or link:
                self.wrong.append(f"{tag} {name}={value}")

    def handle_data(self, data) -> None:
        self.words.append(data)


def harmless(folder: Path, *shown: str) -> None:
    """Check all pages and figures below a folder, and that some of them show what was given."""
    pages = [path for path in folder.rglob("*") if path.suffix in (".html", ".svg")]
    assert any(path.suffix == ".html" for path in pages)
    for path in pages:
        assert Shown(path.read_text(encoding="utf-8")).wrong == [], path
    for words in shown:
        assert any(words in "".join(Shown(path.read_text(encoding="utf-8")).words) for path in pages), words


def test_the_check_sees_what_is_not_escaped() -> None:
    assert Shown(f"<p>{EVIL}</p>").wrong == ["script"]
    assert Shown(f"<p>{FILE}</p>").wrong == ["img", "img src=x", "img onerror=alert(1)"]
    assert Shown('<a href="javascript:alert(1)">x</a>').wrong == ["a href=javascript:alert(1)"]
    assert Shown('<a xlink:href="http://x">x</a>').wrong == ["a xlink:href=http://x"]
    escaped = Shown(f"<p title='{html.escape(EVIL)}'>{html.escape(EVIL)}</p>")
    assert escaped.wrong == []
    assert "".join(escaped.words) == EVIL


def test_every_part_of_a_page() -> None:
    lines = curves({EVIL: ([0, 1], [1.0, 2.0])}, x=EVIL, y=EVIL)
    table = Table([Column(EVIL, EVIL), Column("b")], [[EVIL, EVIL]], EVIL, [EVIL], {EVIL: EVIL})
    page = Page(EVIL, EVIL, {EVIL: EVIL}, [Section(EVIL, EVIL, (Plot(lines, EVIL, EVIL, EVIL), table))])
    found = Shown(render(page))
    assert found.wrong == []
    assert "".join(found.words).count(EVIL) >= 14


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def done(capfd):
    """Run a command that has to end well, and return what it printed."""

    def call(*arguments: str) -> str:
        assert run(list(arguments)) == 0, capfd.readouterr().err
        return capfd.readouterr().out

    return call


def test_regress(here: Path, done) -> None:
    with (here / f"{FILE}.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([EVIL, f"b{EVIL}", f"y{EVIL}"])
        writer.writerows([row % 5 + 0.1 * row, row % 3, row % 7] for row in range(40))
    done("regress", f"{FILE}.csv", "--target", f"y{EVIL}", "--members", "2", "--steps", "3", "--widths", "4",
         "--noise", ".1", "--no-compare")  # fmt: skip
    harmless(here / "regressions", FILE, EVIL)


def test_prune(here: Path, done) -> None:
    with (here / f"{FILE}.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["length", EVIL, f"kind{EVIL}"])
        kinds = (f"one{EVIL}", f"two{EVIL}")
        writer.writerows([row % 2 + row / 100, row % 7, kinds[row % 2]] for row in range(80))
    done("prune", "--data", f"{FILE}.csv", "--target", f"kind{EVIL}", "--widths", "4", "--train-steps", "5",
         "--steps", "2", "--density", ".5", "--certify", "--posterior-steps", "2", "--draws", "5",
         "--name", FILE)  # fmt: skip
    harmless(here / "runs", FILE)


def test_graphs(here: Path, done) -> None:
    np.savez(
        here / f"{FILE}.npz",
        x=np.arange(90, dtype=np.float32).reshape(90, 1) / 90,
        edge_index=np.tile([[0, 1], [1, 0]], 30),
        node_ptr=np.arange(0, 91, 3),
        edge_ptr=np.arange(0, 61, 2),
        y=np.array([0, 1] * 15),
    )
    done("graphs", "--data", f"{FILE}.npz", "--epochs", "1", "--parameters", "2000", "--layers", "1",
         "--name", FILE)  # fmt: skip
    harmless(here / "runs", FILE)


def test_molecules(here: Path, done) -> None:
    pytest.importorskip("rdkit")
    with (here / f"{FILE}.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["smiles", EVIL])
        writer.writerows(["C" * (2 + row % 6) + "O", row % 5 + 0.5] for row in range(30))
    done("graphs", "--data", f"{FILE}.csv", "--target", EVIL, "--epochs", "1", "--parameters", "2000",
         "--layers", "1", "--name", FILE)  # fmt: skip
    harmless(here / "runs", FILE)


@pytest.mark.parametrize("kind", ["npy", "dcm"])
def test_reconstruct(kind: str, here: Path, done) -> None:
    path = here / f"{FILE}.{kind}"
    if kind == "npy":
        np.save(path, np.eye(16))
    else:
        pydicom = pytest.importorskip("pydicom")
        from pydicom.data import get_testdata_file

        dataset = pydicom.dcmread(str(get_testdata_file("CT_small.dcm", download=False)))
        for field in ("PatientName", "PatientID", "StudyDescription", "SeriesDescription", "Manufacturer"):
            setattr(dataset, field, EVIL)
        dataset.save_as(path)
    done("reconstruct", path.name, "--size", "16", "--views", "8", "--steps", "3", "--samples", "2",
         "--compare", "fbp", "--name", FILE)  # fmt: skip
    harmless(here / "runs", FILE)


def test_text_and_models(here: Path, done) -> None:
    (here / FILE).mkdir()
    for number in range(4):
        (here / FILE / f"{number}{FILE}.txt").write_text(f"{EVIL} and again {EVIL}\n" * 40, encoding="utf-8")
    done("compare", "--blocks", "sas_p", "--text", FILE, "--width", "16", "--depth", "1", "--heads", "2",
         "--context", "16", "--vocabulary", "300", "--steps", "3", "--evaluation-batches", "1",
         "--name", FILE)  # fmt: skip
    harmless(here / "runs", FILE)


def test_models(here: Path, done) -> None:
    with quiet():
        save("gpt2", here / FILE)
    (here / "words.txt").write_text(EVIL * 20, encoding="utf-8")
    done("observe", FILE, "--text", "words.txt", "--device", "cpu")
    harmless(here / "observations", FILE)
    done("quantise", FILE, "--text", "words.txt", "--device", "cpu", "--schemes", "static",
         "--rounds", "1", "--batch", "1",
         "--output", "quantised")  # fmt: skip
    harmless(here / "quantised", FILE)


def test_predict(here: Path, done) -> None:
    np.save(here / f"{FILE}.npy", np.eye(3))
    done(
        "predict",
        "--gram",
        f"{FILE}.npy",
        "--depth",
        "2",
        "--width",
        "8",
        "--networks",
        "1",
        "--output",
        FILE,
    )
    harmless(here / FILE)
    done("predict", "--sde", "--gram", f"{FILE}.npy", "--depth", "2", "--width", "8", "--paths", "4",
         "--networks", "2", "--no-region", "--output", f"sde{FILE}")  # fmt: skip
    harmless(here / f"sde{FILE}")


def test_trajectory(here: Path, done) -> None:
    (here / FILE).mkdir()
    for step in range(4):
        weights = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        tensors = {f"layers.{layer}.{EVIL}": weights + layer for layer in (0, 1)}
        save_file({**tensors, EVIL: weights}, here / FILE / f"step{step}.safetensors", {"name": EVIL})
        assert EVIL in load_file(here / FILE / f"step{step}.safetensors")
    done("trajectory", FILE)
    harmless(here / "trajectories", FILE, EVIL)
