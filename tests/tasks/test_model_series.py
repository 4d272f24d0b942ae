"""Several models' checkpoints read from folders as EleutherAI's are: half precision, a folder a step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from gramian.core.trajectory import steps_of
from gramian.errors import InputError
from gramian.observe.hallmarks import hallmarks
from gramian.tasks import model_series
from gramian.tasks.model_series import SeriesStudy, run_series

QUIET = Console(quiet=True)
STEPS = (0, 1, 2, 4, 8, 1000, 2000)
Model = Callable[..., Path]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    def write(name: str, width: int, moved: float, steps: tuple[int, ...] = STEPS) -> Path:
        generator = torch.Generator().manual_seed(width)
        weights = {
            "gpt_neox.embed_in.weight": torch.randn(20, width, generator=generator),
            "gpt_neox.layers.0.attention.dense.weight": torch.randn(width, width, generator=generator),
        }
        for step in steps:
            half = {key: value.half() for key, value in weights.items()}
            (tmp_path / name / f"step{step}").mkdir(parents=True)
            save_file(half, tmp_path / name / f"step{step}" / "model.safetensors")
            for value in weights.values():
                value += moved * torch.randn(value.shape, generator=generator)
        return tmp_path / name

    return write


def points(folder: Path, steps: tuple[int, ...] = STEPS) -> Tensor:
    files = [load_file(folder / f"step{step}" / "model.safetensors") for step in steps]
    return torch.stack([torch.cat([value.flatten() for value in file.values()]) for file in files])


def test_models_are_read_and_ordered_by_size(model: Model, tmp_path: Path) -> None:
    large, small = model("pythia-70m", 16, 0.1), model("pythia-14m", 8, 0.5)
    study = SeriesStudy(folders=(large, small))
    found = run_series(study, tmp_path / "run", QUIET)
    assert [(path.name, path.parameters) for path in found] == [("pythia-14m", 224), ("pythia-70m", 576)]
    assert found[0].steps == STEPS
    expected = hallmarks(steps_of(points(large)))
    assert {name: found[1].whole[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found[0].whole["mds"] < found[1].whole["mds"]
    assert set(found[0].whole) - set(expected) == {"mds_by_time", "mds_relative_by_time"}
    assert found[1].walk["path_length"] == pytest.approx(expected["path_length"], rel=1e-5)
    assert not list((tmp_path / "run").rglob("work/*"))


def test_only_common_steps_are_compared(model: Model, tmp_path: Path) -> None:
    folders = model("a", 8, 0.3), model("b", 8, 0.3, (0, 2, 4, 1000, 3000))
    found = run_series(SeriesStudy(folders=folders), tmp_path / "run", QUIET)
    assert found[0].steps == found[1].steps == (0, 2, 4, 1000)
    whole = next(path for path in found if path.name == "a").whole
    expected = hallmarks(steps_of(points(folders[0], (0, 2, 4, 1000))))
    assert whole["mds_relative"] == pytest.approx(expected["mds_relative"], rel=1e-5)
    other = hallmarks(steps_of(points(folders[0])))
    assert whole["mds_relative"] != pytest.approx(other["mds_relative"], rel=1e-3)


def test_what_was_read_is_not_read_again(model: Model, tmp_path: Path, monkeypatch) -> None:
    study = SeriesStudy(folders=(model("a", 8, 0.3), model("b", 16, 0.3)))
    first = run_series(study, tmp_path / "run", QUIET)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(model_series, "stream", refuse)
    assert run_series(study, tmp_path / "run", QUIET) == first
    with pytest.raises(InputError, match="has folders"):
        run_series(replace(study, folders=study.folders[::-1]), tmp_path / "run", QUIET)


def test_what_cannot_be_compared_is_named(model: Model, tmp_path: Path) -> None:
    first = model("a", 8, 0.3)
    for folders in ((), (first,), (first, first)):
        with pytest.raises(InputError, match="two folders of checkpoints or more, of different names"):
            SeriesStudy(folders=folders).check()
    apart = SeriesStudy(folders=(first, model("b", 8, 0.3, (0, 2, 4, 7))))
    with pytest.raises(InputError, match="these models have 3 in common; at least 4 are needed"):
        run_series(apart, tmp_path / "apart", QUIET)
    both = SeriesStudy(folders=(first, tmp_path))
    with pytest.raises(InputError, match="holds no checkpoints"):
        run_series(both, tmp_path / "both", QUIET)
    frozen = SeriesStudy(folders=(first, model("c", 8, 0.0)))
    with pytest.raises(InputError, match="hold identical weights bit by bit"):
        run_series(frozen, tmp_path / "frozen", QUIET)
