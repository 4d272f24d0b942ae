"""Paths of short trainings: against a plain loop, dense products and drawn walks; branches and freezing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from gramian.core.readings import cosine
from gramian.core.reference_paths import random_walk
from gramian.core.trajectory import displacements, positions, steps_of, updates
from gramian.errors import DivergedError, InputError
from gramian.observe.hallmarks import hallmarks
from gramian.tasks import trajectory_study
from gramian.tasks.images import ImageConfig, sgd
from gramian.tasks.trajectory_study import (
    Case,
    Learner,
    Lessons,
    PathStudy,
    learner,
    path_of,
    random_walk_of,
    run_paths,
    travel,
)

QUIET = Console(quiet=True)
DECAYED = sgd(8, 8, batch=32, learning_rate=0.05, schedule="constant", weight_decay=1e-2)
LESSONS = Lessons(images=ImageConfig(training=DECAYED))
MLP = Case(name="mlp", network="mlp", width=6)
RESNET = Case(name="resnet", network="resnet", width=2, depth=1)


def flat(trainee: Learner) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainee.model.parameters()])


def test_steps_are_those_of_a_plain_loop() -> None:
    trainee, plain = learner(LESSONS, MLP, 3), learner(LESSONS, MLP, 3)
    trainee.advance(5)
    matrices, rest = ([p for p in plain.model.parameters() if (p.ndim > 1) == many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": 1e-2}, {"params": rest}]
    optimiser = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    for step in range(5):
        optimiser.zero_grad()
        plain._loss(plain.model, plain._batches(step)).backward()
        optimiser.step()
    torch.testing.assert_close(flat(trainee), flat(plain))
    assert not torch.allclose(flat(trainee), flat(learner(LESSONS, MLP, 4)))


def test_the_path_read_is_that_of_the_weights() -> None:
    study = PathStudy(lessons=LESSONS, checkpoints=4)
    found = travel(study, RESNET, 1)
    trainee = learner(LESSONS, RESNET, 1)
    points, blocks = [flat(trainee)], [flat_blocks(trainee)]
    for _ in range(4):
        trainee.advance(2)
        points.append(flat(trainee))
        blocks.append(flat_blocks(trainee))
    assert found.parameters == len(points[0])
    assert found.whole == pytest.approx(hallmarks(steps_of(torch.stack(points))), rel=1e-10)
    assert found.blocks == pytest.approx(hallmarks(steps_of(torch.stack(blocks))), rel=1e-10)
    assert found.blocks["displacement"] < found.whole["displacement"]
    assert found.judged == trainee.judged()
    assert set(found.judged) == {"loss", "accuracy", "training_loss"}


def flat_blocks(trainee: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainee.model.get_submodule("blocks").parameters()])


def test_a_path_adds_over_parameters(monkeypatch) -> None:
    points = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(trajectory_study, "COLUMNS", 10)
    torch.testing.assert_close(path_of(points).cross, steps_of(points).cross, rtol=1e-12, atol=0)


def test_the_walk_is_that_of_drawn_directions() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([3.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    p = 100_000
    rows = torch.randn(5, p, generator=generator, dtype=torch.float64) / p**0.5
    line = torch.cat([4 * rows[:1], lengths[:, None] * rows[1]]).cumsum(0)
    drawn = torch.cat([4 * rows[:1], lengths[:, None] * rows[1:]]).cumsum(0)
    walk = random_walk_of(steps_of(line))  # of a straight path: only its start and lengths are taken
    torch.testing.assert_close(updates(walk).left, updates(steps_of(line)).left)
    for rows_of in (positions, displacements):
        expected = cosine(rows_of(steps_of(drawn)))
        torch.testing.assert_close(cosine(rows_of(walk)), expected, rtol=0, atol=0.02)
        assert (cosine(rows_of(steps_of(line))) - expected).abs().max() > 0.1  # the line is none
    even = random_walk_of(random_walk(41))
    assert hallmarks(even)["mds_relative"] == pytest.approx(2 / 3, abs=0.02)


def test_a_branch_goes_its_own_way_with_the_momentum() -> None:
    trunk = learner(LESSONS, MLP, 0)
    trunk.advance(4)
    before = flat(trunk)
    branch, forgetful = trunk.branch(), trunk.branch()
    forgetful._optimiser.state.clear()
    branch.advance(8)
    assert branch.step == 8
    assert (trunk.step, len(trunk.losses)) == (4, 4)
    assert torch.equal(flat(trunk), before)
    trunk.advance(8)
    forgetful.advance(8)
    assert torch.equal(flat(trunk), flat(branch))
    assert not torch.equal(flat(trunk), flat(forgetful))


def test_frozen_parameters_stay_where_they_are() -> None:
    trainee = learner(LESSONS, RESNET, 0)
    trainee.advance(3)
    before = {name: value.clone() for name, value in trainee.model.state_dict().items()}
    kept = [p for name, p in trainee.model.named_parameters() if name.endswith("2.bias")]
    assert trainee.train_only(kept) == 10
    trainee.advance(8)
    moved = {n for n, value in trainee.model.state_dict().items() if not torch.equal(value, before[n])}
    learned = {name for name in moved if "running" not in name and "batches" not in name}
    assert learned == {"readout.2.bias"}
    assert any("running_mean" in name for name in moved)


def test_running_statistics_move_alone() -> None:
    trainee = learner(LESSONS, RESNET, 0)
    before = {name: value.clone() for name, value in trainee.model.state_dict().items()}
    assert trainee.train_only([]) == 0
    trainee.advance(2)
    moved = {n for n, value in trainee.model.state_dict().items() if not torch.equal(value, before[n])}
    assert moved
    assert all("running" in name or "batches" in name for name in moved)
    assert len(trainee.losses) == 2


@pytest.fixture
def reading(story: Path) -> Lessons:
    job = LESSONS.text
    data = replace(job.data, text=(story,), vocabulary=300)
    training = replace(job.training, steps=4, batch=2)
    shape = replace(job.shape, context=16)
    return replace(
        LESSONS, text=replace(job, data=data, training=training, shape=shape, evaluation_batches=2)
    )


def test_decoders_are_cases_too(reading: Lessons) -> None:
    case = Case(name="decoder", network="decoder", width=32, depth=1, training={"learning_rate": 1e-3})
    found = travel(PathStudy(lessons=reading, checkpoints=4), case, 0)
    assert found.whole["mds_relative"] > found.walk["mds_relative"] > 0
    assert set(found.judged) == {"loss", "training_loss"}
    assert reading.training(case, 5).learning_rate == 1e-3
    assert reading.training(case, 5).seed == 5


def test_what_was_done_is_not_done_again(tmp_path, monkeypatch) -> None:
    study = PathStudy(lessons=LESSONS, cases=(MLP, replace(MLP, width=3)), checkpoints=4)
    seeds = {"mlp": (0, 1)}
    first = run_paths(study, seeds, tmp_path / "paths", QUIET)
    assert [(each.width, each.seed) for each in first] == [(6, 0), (6, 1), (3, 0), (3, 1)]
    (tmp_path / "paths" / "mlp-3x2-seed-1.json").unlink()
    done: list[int] = []

    def counted(study: PathStudy, case: Case, seed: int) -> trajectory_study.Travelled:
        done.append(seed)
        return travel(study, case, seed)

    monkeypatch.setattr(trajectory_study, "travel", counted)
    assert run_paths(study, seeds, tmp_path / "paths", QUIET) == first
    assert done == [1]
    with pytest.raises(InputError, match="has checkpoints = 4 not 8"):
        run_paths(replace(study, checkpoints=8), seeds, tmp_path / "paths", QUIET)


def test_bad_settings_are_named() -> None:
    study = PathStudy(lessons=LESSONS, cases=(MLP,), checkpoints=4)
    for changed, words in (
        ({"checkpoints": 2}, "at least 3 checkpoints after its start, got 2"),
        ({"checkpoints": 3}, "steps must be a multiple of 3 checkpoints, got 8"),
        ({"cases": (MLP, MLP)}, "a name or size of its own, got mlp-6x2, mlp-6x2"),
    ):
        with pytest.raises(InputError, match=words):
            replace(study, **changed).check()
    with pytest.raises(InputError, match="unknown network 'vgg'; choose mlp, resnet or decoder"):
        learner(LESSONS, replace(MLP, network="vgg"), 0)
    with pytest.raises(DivergedError, match="not finite at step"):
        learner(LESSONS, replace(MLP, training={"learning_rate": 1e20}), 0).advance(8)
