"""Late freezing: who goes on learning, and that branches and the whole are what they are called."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from gramian.errors import InputError
from gramian.nn.resnet import cifar_resnet
from gramian.nn.transformer import TransformerConfig, build
from gramian.tasks.images import ImageConfig, sgd
from gramian.tasks.late_freezing import (
    FULL,
    READOUT,
    SCALARS,
    STATISTICS,
    STOPPED,
    FreezeStudy,
    freeze,
    run_freezing,
    ways,
)
from gramian.tasks.trajectory_study import Case, Lessons, learner

QUIET = Console(quiet=True)
CASE = Case(name="resnet", network="resnet", width=2, depth=1)
STUDY = FreezeStudy(
    lessons=Lessons(images=ImageConfig(training=sgd(8, 8, batch=32), shift=1)),
    cases=(CASE,),
    shares={"resnet": (0.25, 0.5)},
)


def counts(model: nn.Module) -> dict[str, int]:
    return {way: sum(p.numel() for p in parameters) for way, parameters in ways(model).items()}


def test_who_may_go_on_learning() -> None:
    # two numbers a channel: stem, and three blocks of two norms, of which two have one more on the shortcut
    resnet = cifar_resnet(1, (16, 32, 64), 10, [1.0] * 3, channels=1, norm=nn.BatchNorm2d)
    assert counts(resnet) == {SCALARS: 2 * (16 + 2 * 16 + 3 * 32 + 3 * 64), READOUT: 650, STATISTICS: 0}
    assert counts(resnet)[SCALARS] < 0.01 * sum(p.numel() for p in resnet.parameters())
    decoder = build(TransformerConfig(vocabulary=50, width=16, depth=2), seed=0)
    assert counts(decoder) == {SCALARS: 5 * 16}  # the head, of 800 numbers, is no control of this size
    plain = cifar_resnet(1, (4, 4, 4), 10, [1.0] * 3, channels=1, norm=None)
    assert counts(plain) == {SCALARS: 0}


def test_every_way_is_tried_at_every_share() -> None:
    found = list(freeze(STUDY, CASE, 0))
    tried = [(each.share, each.way) for each in found]
    late = [(share, way) for share in (0.25, 0.5) for way in (SCALARS, READOUT, STATISTICS, STOPPED)]
    assert tried == [(0.0, SCALARS), *late, (1.0, FULL)]
    by_way = {each.way: each.trained for each in found}
    assert by_way[FULL] == found[0].parameters
    assert by_way[STOPPED] == by_way[STATISTICS] == 0
    assert 0 < by_way[SCALARS] < by_way[FULL]


def test_the_whole_and_the_ends_are_plain_trainings() -> None:
    by_way = {(each.share, each.way): each.judged for each in freeze(STUDY, CASE, 0)}
    whole = learner(STUDY.lessons, CASE, 0)
    whole.advance(4)
    assert by_way[0.5, STOPPED] == whole.judged()
    whole.advance(4)
    assert by_way[1.0, FULL] == whole.judged()
    scalars = learner(STUDY.lessons, CASE, 0)
    scalars.train_only(ways(scalars.model)[SCALARS])
    scalars.advance(8)
    assert by_way[0.0, SCALARS] == scalars.judged()
    assert by_way[0.0, SCALARS] != by_way[1.0, FULL]


def test_what_was_done_is_not_done_again(tmp_path: Path) -> None:
    first = run_freezing(STUDY, {"resnet": (0, 1)}, tmp_path / "late", QUIET)
    files = sorted((tmp_path / "late").glob("resnet-*.json"))
    before = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 2
    assert run_freezing(STUDY, {"resnet": (0, 1)}, tmp_path / "late", QUIET) == first
    assert [file.stat().st_mtime_ns for file in files] == before
    assert {each.seed for each in first} == {0, 1}


@pytest.mark.parametrize("shares", [(), (0.0, 0.5), (0.5, 0.25), (0.5, 1.0), (0.5, 0.5)])
def test_shares_that_are_none_are_named(shares: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="resnet needs increasing shares of the steps between 0 and 1"):
        FreezeStudy(cases=(CASE,), shares={"resnet": shares}).check()


def test_batches_of_branches_are_those_of_the_trunk() -> None:
    trunk = learner(STUDY.lessons, CASE, 0)
    trunk.advance(3)
    assert torch.equal(trunk._batches(trunk.step), trunk.branch()._batches(3))
