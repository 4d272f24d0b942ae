"""Training on graphs: what a batch is, when it ends, which weights are kept, and how a stopped run ends."""

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from gramian.data.graph_generators import GENERATORS
from gramian.data.graph_splits import Split, consecutive
from gramian.data.graphs import Graph, Graphs, flat
from gramian.errors import DivergedError, InputError, StoppedError
from gramian.nn.recurrence import LinearRecurrence
from gramian.tasks import graph_training
from gramian.tasks.graph_data import Sampler, Source
from gramian.tasks.graph_models import GRED, MODELS, Architecture, build_network, parameters
from gramian.tasks.graph_scores import loss_of
from gramian.tasks.graph_training import (
    BEST,
    GraphLoss,
    Outcome,
    Schedule,
    Trial,
    best_network,
    concluded,
    evaluations,
    predictions,
    prepare,
    training_batches,
)
from gramian.tasks.graphs import GraphsConfig, spread, train_graphs, trial_folder
from gramian.train.run import Run

pytest.importorskip("torch_geometric", reason="the graphs extra is not installed")

QUIET = Console(quiet=True)
SMALL = Architecture(parameters=2_500, layers=1, hops=2, dropout=0.1, r_min=0.0)
SHORT = Schedule(epochs=3, batch=4, learning_rates=(1e-2,), weight_decay=0.1, device="cpu")


def degrees(count: int = 14, nodes: int = 5, seed: int = 0) -> Graphs:
    """Random graphs whose nodes are to tell the share of the others that they are joined to."""
    generator, graphs = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        upper = (torch.rand(nodes, nodes, generator=generator) < 0.5).triu(1)
        joined = upper | upper.T
        y = joined.sum(1, keepdim=True) / (nodes - 1)
        graphs.append(Graph(torch.ones(nodes, 1), joined.nonzero().T.contiguous(), y))
    splits = (consecutive((count - 4, 2, 2)),)
    return flat("degrees", "node_regression", graphs, splits=splits)


@pytest.fixture
def made(monkeypatch) -> Callable[[Graphs], Source]:
    """Give graphs a name under which they can be asked for."""

    def named(graphs: Graphs) -> Source:
        monkeypatch.setitem(GENERATORS, graphs.name, lambda: graphs)
        return Source(data=graphs.name)

    return named


def config(source: Source, folder: Path, **changed) -> GraphsConfig:
    return replace(GraphsConfig(source=source, architecture=SMALL, schedule=SHORT, runs=folder), **changed)


def weights(run: Run) -> dict[str, Tensor]:
    return load_file(sorted(run.checkpoints.glob("step-*"))[-1] / "model.safetensors")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def scripted(monkeypatch, values: list[float]) -> None:
    """Let evaluations of the validation part find what is written here, and the test part 7."""
    left = iter(values)
    monkeypatch.setattr(graph_training, "score_of", lambda *_: next(left, 7.0))


def finished(trial: Trial, graphs: Graphs, folder: Path):
    sampler = Sampler(graphs, graphs.splits[0], trial.architecture)
    trainer = prepare(trial, sampler, folder)
    while not trainer.finished:
        trainer.advance(1)
    return trainer, sampler


def test_an_epoch_takes_every_graph_once_in_an_order_of_its_own() -> None:
    train = torch.tensor([5, 2, 9, 11, 3, 8, 1])
    batches = training_batches(train, 2, 0)
    epochs = [[batches(3 * epoch + place)[:, 0] for place in range(3)] for epoch in range(6)]
    for epoch in epochs:
        numbers = torch.cat(epoch).tolist()
        assert len(set(numbers)) == len(numbers) == 6  # the last that fill no batch are left out
        assert set(numbers) < set(train.tolist())
    assert len({tuple(torch.cat(epoch).tolist()) for epoch in epochs}) == 6
    assert {n for epoch in epochs for n in torch.cat(epoch).tolist()} == set(train.tolist())
    again, other = training_batches(train, 2, 0), training_batches(train, 2, 1)
    assert torch.equal(again(11), batches(11))
    assert any(not torch.equal(other(step), batches(step)) for step in range(3))
    signs = [batches(step)[:, 1].unique() for step in range(9)]
    assert all(len(each) == 1 for each in signs)
    assert len({int(each) for each in signs}) == 9
    assert sorted(training_batches(train, 7, 0)(0)[:, 0].tolist()) == sorted(train.tolist())


def test_signs_are_flipped_in_training_by_seed_and_step_alone(monkeypatch) -> None:
    graphs = degrees()
    architecture = replace(SMALL, encoding="laplacian", encoding_size=2, dropout=0.0)
    sampler = Sampler(graphs, graphs.splits[0], architecture)
    asked: list[int | None] = []
    known = Sampler.sample

    def sample(self, numbers, *, shells=True, flips=None):
        asked.append(flips)
        return known(self, numbers, shells=shells, flips=flips)

    monkeypatch.setattr(Sampler, "sample", sample)
    model = build_network(GRED, graphs, architecture, 0)
    loss = GraphLoss(sampler, sampler.scale, shells=True)
    batches = training_batches(graphs.splits[0].train, 4, 0)
    values = [loss(model, batches(0)).item() for _ in range(2)]
    assert values[0] == values[1]
    flipped = {
        loss(model, torch.stack((batches(0)[:, 0], torch.full((4,), seed)), 1)).item() for seed in range(6)
    }
    assert len(flipped) > 2
    assert asked == [int(batches(0)[0, 1])] * 2 + list(range(6))
    asked.clear()
    first, _ = predictions(model, sampler, graphs.splits[0].test, shells=True)
    second, _ = predictions(model, sampler, graphs.splits[0].test, shells=True, batch=1)
    assert asked == [None] * 3
    torch.testing.assert_close(first, second)


def test_the_recurrence_is_not_decayed_and_the_rest_is(tmp_path) -> None:
    """The gradient of a constant loss is zero, so that decay alone moves the weights."""
    graphs = degrees()
    trial = Trial(architecture=SMALL, learning_rate=1e-2, schedule=SHORT)
    moved: dict[str, float] = {}
    for name, decay in (("decayed", 0.5), ("control", 0.0)):
        sampler = Sampler(graphs, graphs.splits[0], SMALL)
        trainer = prepare(
            replace(trial, schedule=replace(SHORT, weight_decay=decay)), sampler, tmp_path / name
        )
        trainer._loss = lambda model, batch: 0.0 * sum(each.sum() for each in model.parameters())
        start = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
        trainer.advance(4)
        still = {key for key, value in trainer.model.named_parameters() if torch.equal(value, start[key])}
        recurrence = {
            f"{place}.{key}"
            for place, module in trainer.model.named_modules()
            if isinstance(module, LinearRecurrence)
            for key, _ in module.named_parameters()
            if not key.startswith("c_")
        }
        assert len(recurrence) == 5
        assert recurrence <= still
        vectors = {key for key, value in start.items() if value.ndim < 2}
        assert still == (recurrence | vectors if decay else start.keys())
        rates = {group["initial_lr"] for group in trainer._optimiser.param_groups}
        assert rates == {1e-2}
        moved[name] = sum(
            (value - start[key]).abs().sum().item() for key, value in trainer.model.named_parameters()
        )
    assert moved["decayed"] > 0 == moved["control"]


def test_training_ends_when_patience_has_run_out_and_keeps_the_best(tmp_path, monkeypatch) -> None:
    graphs = degrees()  # 10 graphs to learn from: 2 steps of 4 an epoch
    scripted(monkeypatch, [9.0, 5.0, 4.0, 4.0, 6.0, 4.5])
    trial = Trial(architecture=SMALL, learning_rate=1e-2, schedule=replace(SHORT, epochs=9, patience=3))
    kept: list[dict[str, Tensor]] = []
    write = graph_training.save_model
    monkeypatch.setattr(
        graph_training,
        "save_model",
        lambda model, path: (
            kept.append({k: v.clone() for k, v in model.state_dict().items()}) or write(model, path)
        ),
    )
    trainer, sampler = finished(trial, graphs, tmp_path / "run")
    rows = evaluations(trainer.run)
    steps = [0, 2, 4, 6, 8, 10]  # the best at 4, and three epochs without a better
    assert [row["step"] for row in rows] == steps
    assert len(kept) == 3  # the equal one is not better
    assert trainer.step == 10
    assert sorted(path.name for path in trainer.run.checkpoints.iterdir())[-1].endswith("10")
    assert same(load_file(trainer.run.folder / BEST), kept[-1])
    assert not same(load_file(trainer.run.folder / BEST), weights(trainer.run))  # later epochs went elsewhere
    resumed = prepare(trial, sampler, tmp_path / "run")
    assert resumed.finished
    resumed.advance(5)
    assert resumed.step == 10
    outcome = concluded(trial, resumed, sampler)
    assert (outcome.validation, outcome.test) == (4.0, 7.0)
    assert (outcome.epoch, outcome.epochs) == (2, 5)
    assert outcome.parameters == parameters(trainer.model)
    assert Outcome(**trainer.run.result()) == outcome


@pytest.mark.parametrize("patience", [None, 1, 8])
def test_without_patience_running_out_all_epochs_are_trained(tmp_path, monkeypatch, patience) -> None:
    scripted(monkeypatch, [9.0, 8.0, 7.0, 6.0] if patience == 1 else [1.0, 8.0, 8.0, 8.0])
    trial = Trial(architecture=SMALL, learning_rate=1e-2, schedule=replace(SHORT, patience=patience))
    trainer, sampler = finished(trial, degrees(), tmp_path / "run")
    assert trainer.step == 6
    assert concluded(trial, trainer, sampler).epoch == (3 if patience == 1 else 0)


def test_the_best_weights_are_judged_on_the_test_part(tmp_path) -> None:
    graphs = degrees()
    trial = Trial(architecture=SMALL, learning_rate=1e-2, schedule=replace(SHORT, epochs=6))
    trainer, sampler = finished(trial, graphs, tmp_path / "run")
    outcome = concluded(trial, trainer, sampler)
    model = build_network(GRED, graphs, SMALL, 0)
    model.load_state_dict(load_file(trainer.run.folder / BEST))
    for part, value in (
        (graphs.splits[0].test, outcome.test),
        (graphs.splits[0].validation, outcome.validation),
    ):
        sample = sampler.sample(part)
        outputs, scale = sample.through(model.eval()), sampler.scale
        assert scale is not None
        error = (scale.mean + scale.deviation * outputs - sample.batch.y).abs().mean().item()
        assert value == pytest.approx(error, rel=1e-5)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    assert same(best_network(trial, sampler, trainer.run).state_dict(), first)
    best = min(evaluations(trainer.run), key=lambda row: row["validation_mae"])
    assert outcome.validation == best["validation_mae"]
    assert outcome.epoch * 2 == best["step"]
    with pytest.raises(InputError, match="holds no weights of this network"):
        best_network(replace(trial, architecture=replace(SMALL, layers=2)), sampler, trainer.run)
    with pytest.raises(InputError, match="holds no weights of this network"):
        best_network(trial, sampler, Run(tmp_path / "empty"))


def test_all_networks_learn(tmp_path, made) -> None:
    schedule = replace(SHORT, epochs=8, learning_rates=(2e-2,), weight_decay=0.0)
    asked = config(made(degrees(28)), tmp_path, compare=MODELS[1:], schedule=schedule)
    found = train_graphs(asked, console=QUIET)
    assert tuple(found.outcomes) == MODELS
    for model, (outcome,) in found.outcomes.items():
        rows = found.evaluations(outcome)
        assert [row["step"] for row in rows] == list(range(0, 49, 6)), model
        assert min(row["validation_loss"] for row in rows) < 0.6 * rows[0]["validation_loss"], model
        assert outcome.validation < rows[0]["validation_mae"], model
        assert outcome.parameters <= 2_500
        assert (
            json.loads((trial_folder(found.folder, model, 2e-2, 0) / "result.json").read_text())["model"]
            == model
        )
    train, test = (part[:, 0] for part in (degrees(28).y[:120], degrees(28).y[130:]))
    assert found.constant == pytest.approx((test - train.median()).abs().mean().item(), rel=1e-5)
    assert found.outcomes[GRED][0].test < 0.7 * found.constant
    assert found.metric == "mae"
    assert len(found.tried) == 5


@pytest.mark.parametrize("model", ["gred", "gps"])
def test_a_stopped_job_goes_on_to_the_very_same(tmp_path, made, monkeypatch, model: str) -> None:
    architecture = replace(SMALL, encoding="laplacian", encoding_size=2)
    asked = config(made(degrees(28)), tmp_path, model=model, architecture=architecture, compare=("gcn",))
    whole = train_graphs(asked, console=QUIET)
    calls = [0]
    loss = GraphLoss.__call__

    def signalling(self, network: nn.Module, batch: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, network, batch)

    stopped = replace(asked, name="stopped")
    with monkeypatch.context() as patch:
        patch.setattr(GraphLoss, "__call__", signalling)
        with pytest.raises(StoppedError, match=r"at step 10; go on with --resume"):
            train_graphs(stopped, console=QUIET)
    place = trial_folder(tmp_path / "stopped", model, 1e-2, 0)
    assert Run(place).result() is None
    assert not trial_folder(tmp_path / "stopped", "gcn", 1e-2, 0).exists()
    with pytest.raises(InputError, match="already holds a run"):
        train_graphs(stopped, console=QUIET)
    again = train_graphs(stopped, resume=True, console=QUIET)
    for name in (model, "gcn"):
        one, two = (trial_folder(found.folder, name, 1e-2, 0) for found in (whole, again))
        assert same(weights(Run(one)), weights(Run(two)))
        assert same(load_file(one / BEST), load_file(two / BEST))
        assert replace(whole.outcomes[name][0], seconds=0.0) == replace(again.outcomes[name][0], seconds=0.0)
        rows = [[{**row, "seconds": 0} for row in evaluations(Run(place))] for place in (one, two)]
        assert rows[0] == rows[1]
    other = train_graphs(replace(asked, name="other", seeds=(1,), compare=()), console=QUIET)
    assert not same(weights(Run(trial_folder(other.folder, model, 1e-2, 1))), weights(Run(place)))
    trained: list[int] = []
    monkeypatch.setattr(GraphLoss, "__call__", lambda *given: trained.append(1) or loss(*given))
    third = train_graphs(stopped, resume=True, console=QUIET)
    assert trained == []
    assert third.outcomes == again.outcomes


def test_the_best_learning_rate_is_kept_for_the_other_seeds(tmp_path, made) -> None:
    schedule = replace(SHORT, epochs=4, learning_rates=(1e-7, 1e-2))
    found = train_graphs(config(made(degrees()), tmp_path, schedule=schedule, seeds=(3, 1)), console=QUIET)
    assert [(each.learning_rate, each.seed) for each in found.tried] == [(1e-7, 3), (1e-2, 3)]
    assert [(each.learning_rate, each.seed) for each in found.outcomes[GRED]] == [(1e-2, 3), (1e-2, 1)]
    assert found.tried[1].validation < found.tried[0].validation
    assert found.outcomes[GRED][0] == found.tried[1]
    assert not trial_folder(found.folder, GRED, 1e-7, 1).exists()


def exploding(monkeypatch, *rates_or_models) -> None:
    """Let the loss of some become infinite at their third step."""
    known = graph_training.prepare

    def prepare(trial: Trial, sampler: Sampler, folder: Path):
        trainer, steps, loss = known(trial, sampler, folder), [0], None
        loss = trainer._loss

        def broken(model: nn.Module, batch: Tensor) -> Tensor:
            steps[0] += 1
            return loss(model, batch) * (math.inf if steps[0] == 3 else 1)

        if trial.model in rates_or_models or trial.learning_rate in rates_or_models:
            trainer._loss = broken
        return trainer

    monkeypatch.setattr("gramian.tasks.graphs.prepare", prepare)


def test_one_that_diverges_leaves_the_others(tmp_path, made, monkeypatch) -> None:
    exploding(monkeypatch, "gcn", 0.5)
    schedule = replace(SHORT, learning_rates=(0.5, 1e-2))
    asked = config(made(degrees()), tmp_path, compare=("gcn", "gine"), schedule=schedule)
    for resume in (False, True):  # what diverged is not trained anew
        found = train_graphs(asked, resume=resume, console=QUIET)
        assert found.outcomes["gcn"] == ()
        assert [each.learning_rate for each in found.outcomes[GRED]] == [1e-2]
        assert len(found.outcomes["gine"]) == 1
        assert len(found.tried) == 2
        result = Run(trial_folder(found.folder, "gcn", 1e-2, 0)).result()
        assert "the loss is not finite at step 2" in result["diverged"]
        monkeypatch.undo()
        made(degrees())


def test_all_that_diverge_are_an_error(tmp_path, made, monkeypatch) -> None:
    exploding(monkeypatch, "gred", "gcn")
    asked = config(made(degrees()), tmp_path, compare=("gcn",))
    with pytest.raises(
        DivergedError, match="the training of every network diverged; try a lower learning rate"
    ):
        train_graphs(asked, console=QUIET)


def odd_targets(task: str, number: int, nodes: int) -> Tensor:
    if task == "node":
        return torch.where(torch.arange(nodes) == 0, number % 2, -100)
    if task == "classification":
        return torch.tensor([number // 4 % 3])
    if task == "multilabel":
        return torch.tensor([[float(number // 4 % 2), 1.0]])  # the second label is always there
    return torch.full((nodes if task == "node_regression" else 1, 2), 0.3)  # without variance


def odd(task: str) -> Graphs:
    """Graphs of one node, without edges, in parts, with isolated nodes, and one-way edges."""
    none, generator = torch.zeros(2, 0, dtype=torch.long), torch.Generator().manual_seed(0)
    shapes = [
        (none, 1),
        (none, 3),
        (torch.tensor([[0, 1, 3], [1, 2, 4]]), 6),
        (torch.tensor([[0, 1], [1, 0]]), 2),
    ]
    graphs = []
    for number in range(20):
        edges, nodes = shapes[number % 4]
        x = torch.randn(nodes, 2, generator=generator)
        graphs.append(Graph(x, edges, odd_targets(task, number, nodes)))
    return flat("odd", task, graphs, splits=(Split(*torch.arange(20).split([8, 8, 4])),))


@pytest.mark.parametrize("task", ["regression", "node_regression", "classification", "node", "multilabel"])
def test_odd_graphs_are_learnt_by_all(tmp_path, made, task: str) -> None:
    graphs = odd(task)
    assert graphs.directed
    schedule = replace(SHORT, epochs=1, batch=32)  # more than there are
    architecture = replace(SMALL, hops=None)
    if task == "multilabel":
        graphs = replace(graphs, splits=(Split(*torch.arange(20).split([8, 4, 8])),), y=graphs.y.roll(2, 0))
    asked = config(made(graphs), tmp_path, compare=MODELS[1:], schedule=schedule, architecture=architecture)
    found = train_graphs(asked, console=QUIET)
    assert found.hops == 2
    for model, (outcome,) in found.outcomes.items():
        assert math.isfinite(outcome.validation), model
        assert math.isfinite(outcome.test), model
        assert outcome.epochs == 1
        losses = [
            row["loss"]
            for row in Run(trial_folder(found.folder, model, 1e-2, 0)).record.read()
            if "loss" in row
        ]
        assert len(losses) == 1
        assert math.isfinite(losses[0])
    assert math.isfinite(found.constant)


def test_a_batch_in_which_no_node_has_a_class_does_not_diverge(tmp_path) -> None:
    graphs = odd("node")
    y = graphs.y.clone()
    y[: int(graphs.ptr[7])] = -100  # of eight graphs to learn from, one has a class
    graphs = replace(graphs, y=y, splits=(Split(*torch.arange(20).split([8, 6, 6])),))
    trial = Trial(architecture=SMALL, learning_rate=1e-2, schedule=replace(SHORT, epochs=2, batch=1))
    trainer, sampler = finished(trial, graphs, tmp_path / "run")
    losses = [row["loss"] for row in trainer.run.record.read() if row["kind"] == "train"]
    assert sorted(map(bool, losses)) == [False] * 14 + [True] * 2
    assert math.isfinite(concluded(trial, trainer, sampler).test)


def test_networks_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, made) -> None:
    source = made(degrees())
    for changed, words in (
        (
            {"compare": ("gps",), "architecture": replace(SMALL, parameters=250)},
            r"width 4 has .* more than 250",
        ),
        ({"compare": ("gred",)}, "every model is trained once"),
        ({"model": "gat"}, "unknown model 'gat'"),
        ({"seeds": ()}, "seeds are different numbers from 0 on"),
        ({"seeds": (1, 1)}, "seeds are different numbers"),
        ({"seeds": (-1,)}, "seeds are different numbers"),
        ({"schedule": replace(SHORT, epochs=0)}, "epochs must be at least 1"),
        ({"schedule": replace(SHORT, patience=0)}, "patience must be at least 1 epoch"),
        ({"schedule": replace(SHORT, batch=0)}, "batch must be at least 1"),
        ({"schedule": replace(SHORT, learning_rates=())}, "learning_rates are one or several different ones"),
        ({"schedule": replace(SHORT, learning_rates=(0.1, 0.1))}, "learning_rates are one or several"),
        ({"schedule": replace(SHORT, learning_rates=(0.1, -0.1))}, "learning rate must be positive"),
        ({"schedule": replace(SHORT, weight_decay=-0.1)}, "decay"),
        ({"name": "a/b"}, "plain folder name"),
    ):
        with pytest.raises(InputError, match=words):
            train_graphs(config(source, tmp_path / "runs", **changed), console=QUIET)
        assert not (tmp_path / "runs").exists()


def test_an_overwritten_job_starts_anew_and_a_changed_one_is_refused(tmp_path, made) -> None:
    asked = config(made(degrees()), tmp_path)
    first = train_graphs(asked, console=QUIET)
    with pytest.raises(InputError, match="resume with the same settings"):
        train_graphs(replace(asked, schedule=replace(SHORT, epochs=4)), resume=True, console=QUIET)
    anew = train_graphs(replace(asked, schedule=replace(SHORT, epochs=1)), overwrite=True, console=QUIET)
    assert (first.outcomes[GRED][0].epochs, anew.outcomes[GRED][0].epochs) == (3, 1)


def test_the_test_part_is_not_looked_at_while_training(tmp_path, monkeypatch) -> None:
    seen: list[list[int]] = []
    known = graph_training.predictions

    def watched(model, sampler, numbers, **more):
        seen.append(numbers.tolist())
        return known(model, sampler, numbers, **more)

    monkeypatch.setattr(graph_training, "predictions", watched)
    trial = Trial(architecture=SMALL, learning_rate=1e-2, schedule=SHORT)
    trainer, sampler = finished(trial, degrees(), tmp_path / "run")
    assert seen == [[10, 11]] * 4
    concluded(trial, trainer, sampler)
    assert seen[4:] == [[12, 13]]


def test_the_loss_of_a_batch_is_that_of_its_graphs() -> None:
    graphs = degrees()
    sampler = Sampler(graphs, graphs.splits[0], SMALL)
    model = build_network(GRED, graphs, SMALL, 0).eval()
    batch = torch.tensor([[1, 0], [7, 0], [4, 0]])
    found = GraphLoss(sampler, sampler.scale, shells=True)(model, batch)
    each = []
    for number in (1, 7, 4):
        sample = sampler.sample(torch.tensor([number]))
        each.append(loss_of(graphs.task, sample.through(model), sample.batch.y, sampler.scale))
    torch.testing.assert_close(found, torch.stack(each).mean())


def test_means_and_deviations_over_seeds() -> None:
    assert spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    one, none = spread([4.0]), spread([])
    assert one[0] == 4
    assert math.isnan(one[1])
    assert all(math.isnan(value) for value in none)


@pytest.mark.slow
def test_skip_links_are_told_apart_as_far_as_the_sizes_of_shells_do(tmp_path) -> None:
    """Links of 6 and of 16 have shells of the same sizes: all others are right, and one of these two."""
    schedule = Schedule(epochs=40, batch=30, learning_rates=(1e-2,), weight_decay=0.0, device="cpu")
    architecture = Architecture(parameters=3_000, layers=1, dropout=0.0)
    asked = GraphsConfig(
        source=Source(data="csl"),
        architecture=architecture,
        schedule=schedule,
        compare=("gine",),
        runs=tmp_path,
    )
    found = train_graphs(asked, console=QUIET)
    assert found.outcomes[GRED][0].test == pytest.approx(0.9)
    assert found.outcomes["gine"][0].test == pytest.approx(0.1) == found.constant
    sampler = Sampler(found.graphs, found.split, replace(architecture, hops=found.hops))
    model = best_network(asked.trial(GRED, 1e-2, 0), sampler, Run(trial_folder(found.folder, GRED, 1e-2, 0)))
    outputs, y = predictions(model, sampler, found.split.test, shells=True)
    wrong = y[outputs.argmax(1) != y]
    assert {found.graphs.classes[label] for label in wrong.tolist()} < {6, 16}
    walks = replace(architecture, parameters=8_000, layers=2, encoding="random_walk")
    longer = replace(
        asked, architecture=walks, schedule=replace(schedule, epochs=60), compare=(), name="walks"
    )
    assert train_graphs(longer, console=QUIET).outcomes[GRED][0].test == 1
