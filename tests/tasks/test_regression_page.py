"""What a regression tells: sentences that follow from numbers, predictions as text, the folder."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from rich.console import Console

from gramian.core.predictive import Predictive
from gramian.data.tables import Standardiser, Table
from gramian.errors import InputError
from gramian.report import Plot, number
from gramian.report import Table as PageTable
from gramian.tasks import predict_page
from gramian.tasks.regression import CONSTANT, RegressConfig, Regression, Rows, judged
from gramian.tasks.regression_fit import DEEP, JITTER, PROCESS, Fitted, Prior, Trial
from gramian.tasks.regression_page import (
    COLUMNS,
    NUMBERS,
    check_place,
    predictions_csv,
    report_page,
    sentences,
    terminal_table,
    write_report,
)
from gramian.tasks.regression_scores import constant

NAME = "ntkgp_param"
CONFIG = RegressConfig(table=Path("houses.csv"), target="price", level=0.8)
Z = NormalDist().inv_cdf(0.9)


def regression(
    noise: float = 1.0, useful: bool = True, new: bool = False, repeated: bool = False
) -> Regression:
    """Return a made-up regression: 100 rows to learn from, 50 to choose by, 50 to report on.

    Targets are standard normal around the mean that a useful method gives; `noise` is what it takes them for.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    if repeated:
        x[1] = x[0]
    truth = 5 * x[:, 0]
    y = truth + torch.randn(200, generator=generator, dtype=torch.float64)
    table = Table("houses.csv", x, y, ("area", "town=Ulm"), "price", {"town": ("Bonn", "Ulm")}, ("roof",))
    train, validation, test = torch.arange(100), torch.arange(100, 150), torch.arange(150, 200)
    scales = Standardiser.of(x[train]), Standardiser.of(y[train])

    def latent(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x[:, 0] if useful else 0 * x[:, 0]), 0.001 * x.square().sum(1)

    trial = Trial(Prior(0.03, 0.5, 0.1), 100, 0.3)
    fitted = Fitted(NAME, latent, noise / float(scales[1].scale) ** 2, *scales, trial)
    own = fitted.predict(x[test])
    predictions = {NAME: own, PROCESS: own, DEEP: own, CONSTANT: constant(y[train], 50)}
    scores = {name: judged(each, y[test], CONFIG.level) for name, each in predictions.items()}
    threshold = fitted.predict(x[validation]).variance.max().item()
    strange = torch.tensor([[0.1, 1.0], [40.0, 0.0], [0.2, 30.0]], dtype=torch.float64)
    known = torch.tensor([0.5, 190.0, 3.0], dtype=torch.float64)
    rows = Rows(torch.arange(3) + 1, strange, fitted.predict(strange), known) if new else None
    trials = trial, replace(trial, nll=float("inf"))
    return Regression(
        table, train, validation, test, trials, fitted, predictions, scores, threshold, 1 / 51,
        Rows(test + 1, x[test], own, y[test]), rows, 12.3,
    )  # fmt: skip


def said(**settings) -> str:
    return " ".join(sentences(regression(**settings), CONFIG))


def test_it_says_what_was_learnt_and_how_good_it_is() -> None:
    found, text = regression(), said()
    for words in (
        "houses.csv: 200 rows, 2 features, target 'price'",
        "Learnt from 100 rows, chosen and calibrated by 50, judged by 50.",
        f"{NAME} misses a test target by {number(found.scores[NAME].rmse, 3)}",
        f"less than the mean of the training rows does ({number(found.scores[CONSTANT].rmse, 3)})",
        "they are honest, within chance",
        "Few rows: the 50 that calibrate fix the width of intervals to ± 10 % only",
    ):
        assert words in text
    assert "may tell nothing" not in text


def test_it_says_when_columns_tell_nothing() -> None:
    assert "no more than chance, so the columns may tell nothing of 'price'" in said(useful=False)


def test_it_says_when_intervals_are_not_honest() -> None:
    assert "they are too narrow" in said(noise=0.1)
    assert "they are too wide" in said(noise=9.0)
    # 0.8 ± the root of .8 × .2/50 and (2 z φ(z))²/100
    error = (0.16 / 50 + (2 * Z * NormalDist().pdf(Z)) ** 2 / 100) ** 0.5
    assert f"honest ones hold 80 ± {100 * error:.2g} %" in said()


def test_it_says_which_rows_are_strange_and_what_repeats() -> None:
    found, text = regression(new=True), said(new=True)
    count = int(found.far(found.tested.prediction).sum())
    assert f"Out of distribution: 2 of 3 new rows and {count} of 50 test rows." in text
    assert "as by chance in 2.0 % of rows like those learnt from" in text
    assert "The target of the new rows is known: RMSE" in text
    assert "Repeated features (1 row)" in said(repeated=True)
    assert "Repeated" not in text
    assert re.search(r"Out of distribution: \d of 50 test rows\.", said())


def test_the_table_on_the_terminal() -> None:
    console = Console(width=100, file=io.StringIO())
    found = regression()
    console.print(terminal_table(found, CONFIG))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "inside 80 %" in lines[0]
    rows = [line.split() for line in lines[2:] if line.strip()]
    assert [row[0] for row in rows] == [NAME, PROCESS, DEEP, CONSTANT]
    assert rows[0][1] == number(found.scores[NAME].rmse)


@pytest.mark.parametrize("new", [False, True])
def test_predictions_as_text_are_the_numbers(new) -> None:
    found = regression(noise=4.0, new=new)
    rows = found.new if new else found.tested
    assert rows is not None
    header, *lines = list(csv.reader(io.StringIO(predictions_csv(found, CONFIG))))
    assert tuple(header) == COLUMNS
    cells = dict(zip(header, np.array(lines, dtype=float).T, strict=True))
    prediction = rows.prediction
    assert cells["row"].tolist() == rows.numbers.tolist()
    assert cells["true"].tolist() == (rows.y.tolist() if rows.y is not None else None)
    assert cells["mean"].tolist() == prediction.mean.tolist()
    assert cells["std"] ** 2 == pytest.approx(cells["epistemic_std"] ** 2 + cells["noise_std"] ** 2)
    assert cells["noise_std"] == pytest.approx(2.0)
    assert cells["lower"] == pytest.approx(cells["mean"] - Z * cells["std"])
    assert cells["upper"] == pytest.approx(cells["mean"] + Z * cells["std"])
    assert cells["out_of_distribution"].tolist() == found.far(prediction).tolist()
    assert cells["out_of_distribution"].tolist() == (cells["epistemic_std"] > found.threshold**0.5).tolist()


def test_without_targets_there_is_no_column_of_them() -> None:
    found = regression(new=True)
    assert found.new is not None
    unknown = replace(found, new=replace(found.new, y=None))
    assert predictions_csv(unknown, CONFIG).splitlines()[0] == ",".join(COLUMNS[:-1])
    assert "is known" not in " ".join(sentences(unknown, CONFIG))


def test_the_page() -> None:
    page = report_page(regression(new=True), CONFIG)
    headings = [section.heading for section in page.sections]
    assert headings == [
        "Result", "Calibration", "Does it know when it is wrong", "Out of distribution", "What was tried",
    ]  # fmt: skip
    plots = [block.title for section in page.sections for block in section.blocks if isinstance(block, Plot)]
    assert plots == ["Predicted against true", "Reliability", "Error by confidence", "Doubt by row"]
    tables = {b.title: b for section in page.sections for b in section.blocks if isinstance(b, PageTable)}
    strange = [(row[0], row[-2]) for row in tables["New rows out of distribution"].rows]
    assert strange == [("2", "area = 40.00"), ("3", "town=Ulm")]
    tried = page.sections[-1].blocks[-1]
    assert isinstance(tried, PageTable)
    assert [row[0] for row in tried.rows] == ["1", "2", "chosen, all members"]
    assert any(f"{JITTER:g}" in note for note in tried.notes)
    assert page.facts["rows"].startswith("100 to learn from, 50 to choose and calibrate by, 50 to report on")


def test_errors_by_confidence_are_those_of_the_surest_rows() -> None:
    found = regression()
    section = report_page(found, CONFIG).sections[2]
    (plot,) = section.blocks
    assert isinstance(plot, Plot)
    line = plot.figure.axes[0].get_lines()[0]
    assert line.get_xdata()[-1] == 100
    assert line.get_ydata()[-1] == pytest.approx(found.scores[NAME].rmse)
    order = found.tested.prediction.variance.argsort()
    squares = (found.tested.prediction.mean - found.table.y[found.test])[order].square()
    assert line.get_xdata()[0] == 10
    assert line.get_ydata()[0] == pytest.approx(squares[:5].mean().sqrt().item())
    sure, unsure = (number(float(half.mean().sqrt()), 3) for half in (squares[:25], squares[25:]))
    assert f"has an RMSE of {sure}, the other half one of {unsure}" in section.text


def test_the_folder_and_who_may_take_it(tmp_path) -> None:
    config, found = replace(CONFIG, output=tmp_path / "out"), regression(new=True)
    folder = write_report(found, config)
    figures = ["doubt_by_row.svg", "error_by_confidence.svg", "predicted_against_true.svg", "reliability.svg"]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == figures
    assert (folder / "predictions.csv").read_text() == predictions_csv(found, config)
    written = json.loads((folder / NUMBERS).read_text())
    assert written["scores"][NAME]["rmse"] == found.scores[NAME].rmse
    assert written["rows"] == {"train": 100, "validation": 50, "test": 50}
    assert written["tried"][1]["nll"] is None  # it diverged
    assert written["out_of_distribution"]["rows"]["new"] == 2
    assert "gramian" in written["versions"]
    with pytest.raises(InputError, match="already holds a regression; pass --overwrite"):
        write_report(found, config)
    (folder / "old").touch()
    write_report(found, config, overwrite=True)
    assert not (folder / "old").exists()


@pytest.mark.parametrize("name", ["result.json", "prediction.json", "predictions.csv"])
def test_folders_of_others_are_left_alone(tmp_path, name) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(InputError, match="holds something that is no regression"):
        check_place(replace(CONFIG, output=tmp_path / "run"), overwrite=True)


def test_a_stop_while_writing_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    config, found = replace(CONFIG, output=tmp_path / "out"), regression()

    def stop(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(predict_page, "write", stop)
        write_report(found, config)
    assert list(tmp_path.iterdir()) == []
    write_report(found, config)
    before = (tmp_path / "out" / NUMBERS).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(predict_page, "write", stop)
        write_report(replace(found, seconds=1.0), config, overwrite=True)
    assert (tmp_path / "out" / NUMBERS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_are_shown_as_they_are(tmp_path) -> None:
    found = regression()
    odd = replace(found, table=replace(found.table, target="<b>&price</b>", name="a<i>.csv"))
    text = (write_report(odd, replace(CONFIG, output=tmp_path / "out")) / "report.html").read_text()
    assert "<b>&price" not in text
    assert "&lt;b&gt;&amp;price" in text


def test_three_test_rows_make_a_page(tmp_path) -> None:
    found = regression()
    few = {
        name: Predictive(each.mean[:3], each.variance[:3], each.aleatoric[:3])
        for name, each in found.predictions.items()
    }
    test = found.test[:3]
    tested = Rows(test + 1, found.tested.x[:3], few[NAME], found.table.y[test])
    small = replace(found, test=test, predictions=few, tested=tested)
    assert write_report(small, replace(CONFIG, output=tmp_path / "out")).is_dir()
