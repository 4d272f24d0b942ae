from dataclasses import dataclass
from pathlib import Path

import pytest

from gramian.errors import InputError
from gramian.train.run import Run, open_run


@dataclass(frozen=True)
class Config:
    steps: int = 3
    text: tuple[Path, ...] = (Path("a.txt"),)


def test_a_folder_holds_one_run(tmp_path) -> None:
    folder = tmp_path / "one"
    run = open_run(folder, Config())
    assert run.settings == {"steps": 3, "text": ["a.txt"]}
    assert set(run.versions) >= {"python", "torch", "gramian"}
    assert run.result() is None
    run.write_result({"loss": 1.0})
    assert run.result() == {"loss": 1.0}
    with pytest.raises(InputError, match="already holds a run"):
        open_run(folder, Config())
    assert open_run(folder, Config(), resume=True) == Run(folder)
    with pytest.raises(InputError, match=r"has steps = 3 .*not 4"):
        open_run(folder, Config(steps=4), resume=True)
    assert run.result() == {"loss": 1.0}  # nothing was lost by asking
    assert open_run(folder, Config(steps=4), overwrite=True).result() is None


def test_folders_that_are_no_run_are_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="files that are no run"):
        open_run(tmp_path, Config(), overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    with pytest.raises(InputError, match="is a file"):
        open_run(tmp_path / "thesis.tex", Config())


def test_a_damaged_configuration_is_named(tmp_path) -> None:
    run = open_run(tmp_path / "one", Config())
    (run.folder / "settings.json").write_text('{"settings": ')
    with pytest.raises(InputError, match=r"settings\.json cannot be read as JSON"):
        open_run(run.folder, Config(), resume=True)
