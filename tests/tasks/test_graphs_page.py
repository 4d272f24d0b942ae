"""What a comparison of networks on graphs tells: sentences from numbers, predictions as text, the folder."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_model
from scipy.stats import t as student
from scipy.stats import ttest_ind

from gramian.data.graph_splits import Split
from gramian.data.graphs import IGNORED, Graph, flat
from gramian.report import Plot, Table
from gramian.tasks import graphs_page
from gramian.tasks.graph_data import Source
from gramian.tasks.graph_models import Architecture, build_network
from gramian.tasks.graph_scores import METRICS, score_of
from gramian.tasks.graph_training import BEST, Outcome, Schedule
from gramian.tasks.graphs import Comparison, GraphsConfig, trial_folder
from gramian.tasks.graphs_page import by_target, judge, predictions_csv, report_page, write_report
from gramian.tasks.graphs_words import CONSTANT, by_validation, gain, reading, sentences, terminal_table
from gramian.train.run import Run

CONFIG = GraphsConfig(
    compare=("gine", "gcn"),
    architecture=Architecture(parameters=2000, layers=2),
    schedule=Schedule(epochs=5, learning_rates=(1e-3, 1e-2)),
    seeds=(0, 1, 2),
)
PATH = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])


def graphs(task: str = "regression", name: str = "paths", outputs: int = 2):
    """Return twelve paths of three nodes, six to learn from, three to choose by, three to report on."""
    draw = torch.Generator().manual_seed(0)
    rows = 3 if task in ("node", "node_regression") else 1
    made = []
    for number in range(12):
        y = torch.randn(rows, outputs, generator=draw)
        if task in ("classification", "node"):
            y = (torch.arange(rows) + number) % 2
            y = torch.where(torch.arange(rows) == 2, IGNORED, y)
        elif task == "multilabel":
            y = (torch.tensor([[number, number // 2]]) % 2).float()
        made.append(Graph(torch.randn(3, 1, generator=draw), PATH, y))
    split = Split(torch.arange(6), torch.arange(6, 9), torch.tensor([11, 9, 10]))
    classes = (4, 7) if task in ("classification", "node") else ()
    return flat(name, task, made, classes=classes, splits=(split,))


def outcome(model: str, seed: int, test: float, validation: float | None = None, epoch: int = 3) -> Outcome:
    validation = test if validation is None else validation
    return Outcome(model, 1e-3, seed, 1900, validation, test, epoch, 5, 12.0)


def compared(
    scores: dict[str, list[float]],
    task: str = "regression",
    constant: float = 1.0,
    folder: Path = Path(),
    **options,
) -> Comparison:
    """Return a comparison with test metrics by seed, which are the validation metrics as well."""
    outcomes = {
        model: tuple(outcome(model, seed, test) for seed, test in enumerate(tests))
        for model, tests in scores.items()
    }
    some = graphs(task, **options)
    tried = tuple(each[0] for each in outcomes.values() if each)
    return Comparison(some, some.splits[0], 2, METRICS[task], constant, outcomes, tried, folder)


def said(scores: dict[str, list[float]], config: GraphsConfig = CONFIG, **options) -> str:
    return " ".join(sentences(compared(scores, **options), config))


def trained(folder: Path, task: str = "regression", **options) -> tuple[Comparison, GraphsConfig]:
    """Return a comparison of one network whose weights are as drawn, in a folder as training leaves it."""
    config = replace(CONFIG, compare=(), seeds=(0,))
    found = compared({"gred": [0.5]}, task, folder=folder, **options)
    run = Run(trial_folder(folder, "gred", 1e-3, 0))
    run.folder.mkdir(parents=True)
    network = build_network("gred", found.graphs, config.architecture, 0)
    with torch.no_grad():
        for layer in network.layers:
            layer.recurrence.nu_log.add_(0.5)  # looks less far than at the start
    save_model(network, str(run.folder / BEST))
    for epoch in range(6):
        row = {"kind": "evaluate", "step": epoch, "seconds": 2.0 * epoch}
        run.record.append({**row, f"validation_{found.metric}": 1 - epoch / 10})
    return found, config


def test_the_best_by_validation_is_set_against_the_constant_and_the_second() -> None:
    text = said({"gred": [0.21, 0.20, 0.22], "gine": [0.40, 0.42, 0.41], "gcn": [0.6, 0.61, 0.6]})
    assert text.startswith(
        "Of 3 networks gred is best on the validation part; on the test part its MAE is 0.210 ± 0.010, that "
        "of the best constant prediction 1."
    )
    assert "gine is second there, with MAE 0.410 ± 0.010 on the test part: gred is 0.200 better (±" in text
    assert "95 % interval over 3 seeds, paired)" in text
    assert "no difference" not in text
    assert "One seed" not in text


def test_validation_decides_and_not_the_test() -> None:
    found = compared({"gred": [0.3, 0.3], "gine": [0.2, 0.2]})
    assert by_validation(found) == ["gine", "gred"]
    lucky = tuple(replace(each, validation=0.1) for each in found.outcomes["gred"])
    found = replace(found, outcomes={**found.outcomes, "gred": lucky})
    assert by_validation(found) == ["gred", "gine"]
    assert "gred is 0.100 worse" in " ".join(sentences(found, CONFIG))
    accurate = compared({"gred": [0.3], "gine": [0.2]}, "classification")
    assert by_validation(accurate) == ["gred", "gine"]


def test_differences_within_noise_are_called_so() -> None:
    text = said({"gred": [0.2, 0.5, 0.3], "gine": [0.4, 0.3, 0.4], "gcn": [2.0, 2.0, 2.0]})
    assert "no difference that these seeds can show" in text
    assert "no difference" not in said(
        {"gred": [0.2, 0.5, 0.3], "gine": [0.3, 0.6, 0.4]}
    )  # the same each time
    assert "no difference that 3 seeds can show" in said({"gred": [0.2, 0.5, 2.0]})
    assert "nothing was learnt that helps there" in said({"gred": [1.2, 1.5, 1.3]})


def test_intervals_are_those_of_student_and_welch() -> None:
    first, second = [0.2, 0.5, 0.3], [0.4, 0.3, 0.7]
    found = compared({"gred": first, "gine": second})
    difference, error = gain(found, "gred", "gine")
    each = np.array(second) - np.array(first)
    assert difference == pytest.approx(each.mean())
    assert error == pytest.approx(student.ppf(0.975, 2) * each.std(ddof=1) / 3**0.5)
    shorter = replace(found, outcomes={**found.outcomes, "gine": found.outcomes["gine"][:2]})
    difference, error = gain(shorter, "gred", "gine")
    welch = ttest_ind(second[:2], first, equal_var=False).confidence_interval(0.95)
    assert (difference - error, difference + error) == pytest.approx((welch.low, welch.high))
    against = gain(found, "gred", CONSTANT)
    assert against[0] == pytest.approx(1 - np.mean(first))
    assert against[1] == pytest.approx(student.ppf(0.975, 2) * np.std(first, ddof=1) / 3**0.5)
    higher = compared({"gred": first, "gine": second}, "classification")
    assert gain(higher, "gred", "gine")[0] == pytest.approx(-each.mean())


def test_one_seed_has_no_error_and_nothing_beside_is_said() -> None:
    config = replace(CONFIG, seeds=(0,), compare=())
    text = said({"gred": [0.2]}, config)
    assert text.startswith("gred: on the test part its MAE is 0.200, that of the best")
    assert "One seed: how much of a difference is chance is not known" in text
    assert "--compare gine gps trains standard networks" in text
    assert math.isnan(gain(compared({"gred": [0.2]}), "gred", CONSTANT)[1])
    assert "--compare gred" in said({"gine": [0.2]}, replace(config, model="gine"))


def test_what_diverged_is_named() -> None:
    text = said({"gred": [0.2, 0.21], "gine": [], "gcn": [0.4, 0.4, 0.4]})
    assert "gine diverged with every learning rate and is left out." in text
    assert "gred diverged with rate 0.01, seed 2, which the numbers leave out." in text
    assert "paired" not in text


def test_the_last_epoch_is_a_sign_of_more() -> None:
    found = compared({"gred": [0.2]})
    assert "more --epochs" not in " ".join(sentences(found, CONFIG))
    last = replace(found, outcomes={"gred": (outcome("gred", 0, 0.2, epoch=5),)})
    assert "gred was best after the last of 5 epochs" in " ".join(sentences(last, CONFIG))


def test_what_was_read_and_what_is_measured() -> None:
    text = " ".join(reading(compared({"gred": [0.2]})))
    assert text.startswith("paths: 12 graphs with 36 nodes")
    assert "Learnt from 6 graphs, chosen by 3, judged by 3; filters look 2 hops far." in text
    assert "hops" not in " ".join(reading(compared({"gcn": [0.2]})))
    words = {
        "node": "the mean over classes",
        "classification": "graphs whose class",
        "multilabel": "precision by",
    }
    for task, meaning in words.items():
        assert meaning in reading(compared({"gred": [0.5]}, task))[1]


def test_the_table_on_the_terminal() -> None:
    console = Console(width=100, file=io.StringIO())
    found = compared({"gred": [0.875, 0.885], "gine": []}, "classification", constant=0.5)
    console.print(terminal_table(found, CONFIG))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    rows = [" ".join(line.split()) for line in lines[2:] if line.strip()]
    assert rows == ["gred 1,900 0.001 88.0 ± 0.71 % 88.0 ± 0.71 % 3 12 s", "gine diverged", "constant 50.0 %"]


@pytest.mark.parametrize("task", sorted(METRICS))
def test_predictions_are_those_of_the_saved_weights(tmp_path: Path, task) -> None:
    found, config = trained(tmp_path, task)
    judged = judge(found, config)
    assert judged is not None
    rows = list(csv.DictReader(io.StringIO(predictions_csv(found, judged))))
    places = [11, 9, 10]
    if task in ("node", "node_regression"):
        assert [(row["graph"], row["node"]) for row in rows] == [
            (str(g), str(n)) for g in places for n in range(3)
        ]
        true = torch.cat([found.graphs[g].y for g in places])
    else:
        assert [row["graph"] for row in rows] == [str(g) for g in places]
        assert "node" not in rows[0]
        true = torch.cat([found.graphs[g].y for g in places])
    if found.graphs.classifies:
        assert [row["true"] for row in rows] == [{0: "4", 1: "7", IGNORED: ""}[y] for y in true.tolist()]
        known = [row for row in rows if row["true"]]
        if task == "classification":
            share = np.mean([row["predicted"] == row["true"] for row in known])
            assert share == pytest.approx(score_of(task, judged.outputs, judged.y, judged.scale))
        assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)
    else:
        assert [[float(row[f"true_{i}"]) for i in range(2)] for row in rows] == pytest.approx(
            true.numpy(), rel=1e-5
        )
    if task == "multilabel":
        assert all(0 < float(row["predicted_0"]) < 1 for row in rows)
    if found.metric == "mae":
        errors = [abs(float(r[f"predicted_{i}"]) - float(r[f"true_{i}"])) for r in rows for i in range(2)]
        score = score_of(task, judged.outputs, judged.y, judged.scale)
        assert np.mean(errors) == pytest.approx(score, rel=1e-4)
        assert np.mean([row[2] for row in by_target(found, judged)]) == pytest.approx(score, rel=1e-5)


def test_one_target_has_no_number(tmp_path: Path) -> None:
    found, config = trained(tmp_path, outputs=1)
    judged = judge(found, config)
    assert judged is not None
    assert predictions_csv(found, judged).splitlines()[0] == "graph,predicted,true"


def test_the_reach_is_that_of_the_weights(tmp_path: Path) -> None:
    found, config = trained(tmp_path)
    judged = judge(found, config)
    assert judged is not None
    assert judged.reach is not None
    now, before = judged.reach
    assert len(now) == len(before) == 2
    for trained_layer, start in zip(now, before, strict=True):
        assert trained_layer.shape == (3, start.shape[1])
        torch.testing.assert_close(trained_layer[0], torch.ones_like(trained_layer[0]))
        torch.testing.assert_close(trained_layer[2], trained_layer[1] ** 2)
        torch.testing.assert_close(trained_layer[1].log(), start[1].log() * math.exp(0.5))
    assert judge(replace(found, hops=0), config).reach is None  # type: ignore[union-attr]
    assert judge(replace(found, outcomes={"gred": ()}), config) is None


def test_the_page_and_the_folder(tmp_path: Path) -> None:
    found, config = trained(tmp_path)
    page = report_page(found, config, judge(found, config))
    headings = [section.heading for section in page.sections]
    assert headings == ["Result", "Learning", "How far it looks", "By target", "What was tried"]
    assert headings[:2] == [each.heading for each in report_page(found, config, None).sections[:-1]]
    plots = [b for section in page.sections for b in section.blocks if isinstance(b, Plot)]
    line = plots[1].figure.axes[0].get_lines()[0]
    assert list(line.get_xdata()) == list(range(6))
    assert list(line.get_ydata()) == pytest.approx([1 - epoch / 10 for epoch in range(6)])
    table = page.sections[0].blocks[0]
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == ["gred", "constant"]
    folder = write_report(found, config)
    written = json.loads((folder / "graphs.json").read_text())
    assert written["outcomes"]["gred"][0]["test"] == 0.5
    assert written["gain_of_best"]["constant"] == {"gain": 0.5, "error": None}
    assert len(written["reach"]) == 2
    assert "torch_geometric" not in written["versions"]
    assert len(list((folder / "figures").iterdir())) == len(plots) == 4
    (folder / "figures" / "old.svg").touch()
    write_report(found, config)
    assert not (folder / "figures" / "old.svg").exists()


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    found, config = trained(tmp_path, name="<b>&paths</b>")
    text = (write_report(found, replace(config, source=Source(data="<i>a</i>"))) / "report.html").read_text()
    assert "<b>&paths" not in text
    assert "&lt;b&gt;&amp;paths" in text
    assert "<script" not in text


def test_a_stop_while_writing_keeps_the_old_figures(tmp_path: Path, monkeypatch) -> None:
    found, config = trained(tmp_path)
    write_report(found, config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}

    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(graphs_page, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        write_report(found, config)
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]
