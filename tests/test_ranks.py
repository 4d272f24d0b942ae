"""Work spread over processes: the same bits on 1, 2 and 4, failures that end all, one process alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gramian import ranks
from gramian.errors import InputError

JOBS = Path(__file__).with_name("ranked.py")
SECONDS = 400
"""After which processes count as hanging; the machine may be busy."""


def launched(count: int, *command: object) -> subprocess.CompletedProcess[str]:
    """Start processes that find each other, each with one thread."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [*launcher, *map(str, command)], env=environment, capture_output=True, text=True, timeout=SECONDS
    )


def known(count: int, job: str, folder: Path) -> list[dict[str, Tensor]]:
    """Return what every process knows at the end of a job."""
    place = folder / f"{job}-{count}"
    place.mkdir()
    done = launched(count, JOBS, job, place)
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(place / f"{number}.safetensors") for number in range(count)]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, bool]:
    """Tell which tensors are the same bits."""
    assert one.keys() == other.keys()
    return {name: one[name].dtype == other[name].dtype and _equal(one[name], other[name]) for name in one}


def _equal(one: Tensor, other: Tensor) -> bool:
    first, second = (each.reshape(-1).view(torch.uint8) for each in (one, other))
    return one.shape == other.shape and torch.equal(first, second)


def test_one_process_does_all_of_it() -> None:
    assert (ranks.rank(), ranks.ranks(), ranks.is_main()) == (0, 1, True)
    assert ranks.own([5, 6, 7]) == [5, 6, 7]
    leaf = torch.ones(2, requires_grad=True)
    found = ranks.spread(lambda number: {"x": number * leaf}, [2, 3], passing=lambda number: 1 / 0)
    assert [each["x"].tolist() for each in found] == [[2, 2], [3, 3]]
    assert not found[0]["x"].requires_grad
    assert ranks.spread(lambda _: {}, []) == []
    assert ranks.on_main(lambda: None) == {}
    assert ranks.anywhere(True)
    assert not ranks.anywhere(False)
    assert ranks.may_say()
    ranks.barrier()
    with ranks.processes():
        assert ranks.ranks() == 1


@pytest.mark.parametrize("wrong", [3.0, {"x": 3.0}, None, [torch.ones(1)]])
def test_results_are_tensors(wrong: object) -> None:
    with pytest.raises(InputError, match="tensors by name"):
        ranks.spread(lambda _: wrong, [1])  # type: ignore[arg-type]


def test_errors_of_one_process_are_its_own() -> None:
    with pytest.raises(ZeroDivisionError):
        ranks.spread(lambda number: {"x": torch.ones(1 // number)}, [1, 0])


def test_who_launched(monkeypatch) -> None:
    for name in ranks.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert ranks.launched() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")  # of something else
    assert ranks.launched() == 1
    monkeypatch.setenv("RANK", "3")
    assert ranks.launched() == 4
    assert ranks.leave_launcher() == 3
    assert ranks.launched() == 1


def test_two_processes_know_the_same_as_one(tmp_path: Path) -> None:
    (alone,) = known(1, "quick", tmp_path)
    first, second = known(2, "quick", tmp_path)
    assert {name for name, equal in same(alone, first).items() if not equal} == set()
    assert {name for name, equal in same(first, second).items() if not equal} == set()
    assert alone["any "].tolist() == [True, False]
    assert alone["pieces 5/torch.float64"].shape == (5, 3)


def test_failures_are_raised_on_all(tmp_path: Path) -> None:
    found = known(2, "failure", tmp_path)
    (expected, first), (again, second) = (sorted(each, reverse=True) for each in found)
    assert expected == again == "piece 2 diverged"
    assert first.startswith("GramianError: process 1 failed: IndexError: index 1")
    assert second.startswith("IndexError: index 1")


@pytest.mark.slow
def test_a_death_ends_all(tmp_path: Path) -> None:
    assert launched(3, JOBS, "death", tmp_path).returncode != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("job", ["quick", "decoder", "paths", "trajectory"])
def test_any_number_of_processes(job: str, tmp_path: Path) -> None:
    alone, *others = (known(count, job, tmp_path)[0] for count in (1, 2, 4))
    assert len(alone) > 1
    for each in others:
        assert {name for name, equal in same(alone, each).items() if not equal} == set()


@pytest.mark.slow
def test_the_comparison_sees_what_depends_on_processes(tmp_path: Path) -> None:
    alone, two = (known(count, "wrong", tmp_path)[0] for count in (1, 2))
    equal = same(alone, two)
    assert not equal["ensemble functions"]
    assert not equal["linear risks"]
    assert not equal["linear stream"]
    assert torch.allclose(alone["ensemble functions"], two["ensemble functions"], atol=1e-3)  # it is rounding


COMMANDS = {
    "regress": (
        "regress --steps 20 --members 7 --widths 16 --noise 0.1 0.3 --output OUT",
        "regression.json",
        {"seconds", "output"},
    ),
    "sde": (
        "predict --sde --depth 6 --width 16 --tokens 3 --paths 1200 --networks 20 --output OUT",
        "prediction.json",
        {"output"},
    ),
    "prune": (
        "prune mlp --train-steps 30 --steps 10 --posterior-steps 5 --widths 20 --density 0.3 0.1 --certify "
        "--draws 200 --runs OUT --name run",
        "run/density-0.1/outcome.json",
        {"export"},
    ),
}


def without(value: object, names: set[str]) -> object:
    """Leave out what tells of time and place."""
    if isinstance(value, dict):
        return {name: without(each, names) for name, each in value.items() if name not in names}
    return [without(each, names) for each in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name: str, tmp_path: Path) -> None:
    command, result, left_out = COMMANDS[name]
    found = []
    for count in (1, 2):
        place = tmp_path / str(count)
        done = launched(count, "-m", "gramian", *command.replace("OUT", str(place)).split())
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("report: ") == 1
        found.append(without(json.loads((place / result).read_text()), left_out))
    assert found[0] == found[1]


@pytest.mark.slow
def test_commands_fail_with_one_sentence(tmp_path: Path) -> None:
    done = launched(2, "-m", "gramian", "regress", "--members", 1, "--output", tmp_path / "out")
    assert done.returncode != 0
    assert len(re.findall(r"^gramian: members must be at least 2, got 1$", done.stderr, re.MULTILINE)) == 1
    assert done.stderr.count("gramian: ") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_other_commands_are_run_once() -> None:
    done = launched(2, "-m", "gramian", "list")
    assert done.returncode == 0
    assert done.stdout.count("outlier_protected") == 1
