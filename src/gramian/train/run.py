"""The folder of a run: its configuration, readings, checkpoints and result."""

import json
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from gramian.errors import InputError
from gramian.files import write_json
from gramian.observe.record import Record

SETTINGS, RESULT, READINGS = "settings.json", "result.json", "readings.jsonl"
PACKAGES = ("gramian", "torch", "accelerate", "safetensors", "tokenizers", "numpy")


@dataclass(frozen=True)
class Run:
    """A run folder.

    settings.json says what was asked and with which versions, readings.jsonl what was seen, checkpoints/
    holds the state to go on from, result.json the outcome.
    """

    folder: Path

    @property
    def record(self) -> Record:
        """The readings of the run, one JSON object a line."""
        return Record(self.folder / READINGS)

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def settings(self) -> dict[str, Any]:
        """What the run was asked to do."""
        return read_json(self.folder / SETTINGS)["settings"]

    @property
    def versions(self) -> dict[str, str]:
        """The versions that the run was started with."""
        return read_json(self.folder / SETTINGS)["versions"]

    def result(self) -> dict[str, Any] | None:
        """Return what the run found, or None when it has not ended."""
        path = self.folder / RESULT
        return read_json(path) if path.exists() else None

    def write_result(self, result: dict[str, Any]) -> None:
        """Write what the run found."""
        write_json(self.folder / RESULT, result)


def open_run(folder: Path, config: Any, *, resume: bool = False, overwrite: bool = False) -> Run:
    """Make the folder of a new run, or open one to go on.

    Args:
        folder: where the run lives.
        config: a dataclass with everything that determines the run.
        resume: go on with the run that is there; start it when there is none.
        overwrite: replace the run that is there.

    Raises: InputError when the folder holds another run, or something that is no run.
    """
    plain = json.loads(json.dumps(asdict(config), default=str))
    marker = folder / SETTINGS
    if folder.is_file():
        raise InputError(f"the run folder {folder} is a file; choose another name")
    if marker.exists():
        if resume:
            _check_same(folder, Run(folder).settings, plain)
            return Run(folder)
        if not overwrite:
            raise InputError(
                f"the folder {folder} already holds a run; pass --resume to go on with it, "
                "--overwrite to replace it, or another --name"
            )
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"the folder {folder} holds files that are no run; choose another name")
    write_json(marker, {"settings": plain, "versions": versions()})
    return Run(folder)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    installed = {package: metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version(), "platform": platform.platform(), **installed}


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises: InputError naming the file when it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error


def _check_same(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    for name in sorted(there.keys() | asked.keys()):
        if there.get(name) != asked.get(name):
            raise InputError(
                f"the run in {folder} has {name} = {there.get(name)!r} not {asked.get(name)!r} as asked; "
                "resume with the same settings or choose another name"
            )
