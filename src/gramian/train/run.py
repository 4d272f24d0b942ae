"""The folder of a run: its configuration, readings, checkpoints and result."""

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from gramian.errors import InputError
from gramian.files import remove, remove_leftovers, write_json
from gramian.observe.record import Record
from gramian.reading import read_json
from gramian.train.run_lock import LOCK, OWNER, RunLock, lock_run

SETTINGS, RESULT, READINGS = "settings.json", "result.json", "readings.jsonl"
REPLACED = ".replaced.json"
"""What settings.json is called while --overwrite removes its run."""

PACKAGES = ("gramian", "torch", "accelerate", "safetensors", "tokenizers", "numpy")


@dataclass(frozen=True)
class Run:
    """A run folder.

    settings.json says what was asked and with which versions, readings.jsonl what was seen, checkpoints/
    holds the state to go on from, result.json the outcome. No other process opens the run to write while
    this object, as `open_run` made it, lives; reading asks for no lock.
    """

    folder: Path
    lock: RunLock | None = field(default=None, repr=False, compare=False)

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
        return _part_of(self.folder / SETTINGS, "settings")

    @property
    def versions(self) -> dict[str, str]:
        """The versions that the run was started with."""
        return _part_of(self.folder / SETTINGS, "versions")

    def result(self) -> dict[str, Any] | None:
        """Return what the run found, or None when it has not ended."""
        path = self.folder / RESULT
        return _dictionary(path, "remove it and go on with --resume") if path.exists() else None

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

    Raises: InputError when the folder holds another run, or something that is no run, or when another
        process writes the run; OSError when the folder cannot be written.
    """
    plain = json.loads(json.dumps(asdict(config), default=str))
    _check_free(folder, plain, resume, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, lock_run(folder))
    _check_free(folder, plain, resume, overwrite)  # another process may have begun or ended a run meanwhile
    if not resume or not (folder / SETTINGS).exists():
        _empty(folder)
    for place in _places(folder):
        remove_leftovers(place, alone=True)
    if not (folder / SETTINGS).exists():
        write_json(folder / SETTINGS, {"settings": plain, "versions": versions()})
    return run


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    installed = {package: metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version(), "platform": platform.platform(), **installed}


def _part_of(path: Path, name: str) -> dict[str, Any]:
    """Return one of the dictionaries in settings.json."""
    found = _dictionary(path, advice := "restore it, or begin anew with --overwrite").get(name)
    if not isinstance(found, dict):
        raise InputError(f"{path} does not hold {name} of a run; {advice}")
    return found


def _dictionary(path: Path, advice: str) -> dict[str, Any]:
    """Read a JSON file of a run, with advice on one that is damaged."""
    try:
        found = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; {advice}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object; {advice}")
    return found


def _check_free(folder: Path, asked: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Raise InputError unless the folder is free for a run, or holds the one to go on with or to replace."""
    if folder.is_file():
        raise InputError(f"the run folder {folder} is a file; choose another name")
    if not (folder / SETTINGS).exists():
        if folder.exists() and not _is_ours(folder):
            raise InputError(f"the folder {folder} holds files that are no run; choose another name")
    elif resume:
        _check_same(folder, Run(folder).settings, asked)
    elif not overwrite:
        raise InputError(
            f"the folder {folder} already holds a run; pass --resume to go on with it, "
            "--overwrite to replace it, or another --name"
        )


def _check_same(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    for name in sorted(there.keys() | asked.keys()):
        if there.get(name) != asked.get(name):
            raise InputError(
                f"the run in {folder} has {name} = {there.get(name)!r} not {asked.get(name)!r} as asked; "
                "resume with the same settings or choose another name"
            )


def _is_ours(folder: Path) -> bool:
    """Whether a folder without settings.json holds nothing but what a killed start or --overwrite left."""
    if (folder / REPLACED).exists():
        return True
    return all(path.name in (LOCK, OWNER) or path.match(".*.part") for path in folder.iterdir())


def _empty(folder: Path) -> None:
    """Remove all but the lock; whoever is killed here leaves REPLACED, by which the next one goes on."""
    if (folder / SETTINGS).exists():
        os.replace(folder / SETTINGS, folder / REPLACED)
    for path in list(folder.iterdir()):
        if path.name not in (LOCK, OWNER, REPLACED) and not path.match(".*.part"):
            remove(path)
    (folder / REPLACED).unlink(missing_ok=True)


def _places(folder: Path) -> Iterator[Path]:
    """Give a run's folder and the folders in it that are not runs of their own."""
    for place, folders, _ in os.walk(folder):
        folders[:] = [name for name in folders if not Path(place, name, SETTINGS).exists()]
        yield Path(place)
