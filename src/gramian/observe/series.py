"""Series of checkpoints on disk: found whatever wrote them, and ordered by their steps."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gramian.errors import InputError
from gramian.observe.checkpoint_files import (
    INDEX,
    LOOKED_FOR,
    STANDARD,
    UNFINISHED,
    is_shard,
    is_weights,
    weights_of,
)
from gramian.observe.weight_files import SAFE, metadata
from gramian.reading import read_json

COUNTERS = {
    "step": r"(?:global_?)?steps?",
    "iteration": r"iter(?:ation)?s?",
    "checkpoint": r"(?:checkpoint|ch?kpt)",
    "epoch": r"(?:epoch|ep)",
}
"""What a number in a name may count, in order of preference; all else is a plain number."""

LAST = re.compile(
    r"(model[-_]?)?(main|master|final|last|latest|best|model|ema)([-_]?(model|checkpoint))?(-v[0-9]+)?",
    re.IGNORECASE,
)
"""Names of checkpoints that repeat another one, when the others have steps."""

STEP_FILES = {"state.json": "step", "trainer_state.json": "global_step"}
"""Where a training loop says in a checkpoint's folder how many steps it took."""


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model after some step."""

    step: int
    path: Path
    files: tuple[Path, ...]
    metadata: dict[str, str]
    """What the first of the files says about itself, where it is a safetensors file."""


@dataclass(frozen=True)
class Series:
    """The checkpoints of one run, at least two, by increasing step."""

    name: str
    checkpoints: tuple[Checkpoint, ...]
    remarks: tuple[str, ...] = ()
    """Sentences on what was left out."""


@dataclass(frozen=True)
class _Member:
    """A checkpoint of a series before its step is known."""

    name: str
    path: Path
    files: tuple[Path, ...]


def find_series(paths: Sequence[Path | str]) -> tuple[Series, ...]:
    """Return the series of checkpoints that paths mean: the paths themselves as one, or one in each folder.

    A checkpoint is a file of weights or a folder with one, or with an index and shards. A series is a folder
    of checkpoints (a run of ours, `checkpoint-*` of Hugging Face's Trainer, `step*` or numbered files), a
    record of a trajectory, or a model in the cache of the hub with a revision for each step. A step comes
    from the name, else from what the checkpoint says; listed checkpoints without any keep their order.

    Raises: InputError naming the path for anything from which no series with clear steps can be made.
    """
    if not paths:
        raise InputError("no checkpoints given: list at least two, or a folder that holds them")
    try:
        return _found([Path(path).expanduser() for path in paths])
    except RuntimeError as error:  # a user after ~ who has no home
        raise InputError(f"a path cannot be read: {error}") from error
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def _found(places: list[Path]) -> tuple[Series, ...]:
    missing = [path for path in places if not path.exists()]
    if missing:
        raise InputError(f"{missing[0]} does not exist")
    _check_once(places)
    folders: dict[Path, list[_Member]] = {}
    remarks: dict[Path, list[str]] = {path: [] for path in places}
    for path in places:
        members = _members(path, remarks[path]) if path.is_dir() else []
        if len(members) > 1 or (members and not weights_of(path)):
            folders[path] = members
        elif not weights_of(path):
            raise InputError(_nothing(path))
    if not folders:
        listed = [_Member(_name(path), path, weights_of(path)) for path in places]
        return (_series(places[0].resolve().parent.name, listed, [], listed=True),)
    if len(folders) < len(places):
        single = next(path for path in places if path not in folders)
        raise InputError(
            f"{single} is one checkpoint and {next(iter(folders))} a series of them; give either checkpoints "
            "of one series, or folders that each hold a series"
        )
    return tuple(_series(name, folders[path], remarks[path]) for path, name in _names(places).items())


def _check_once(places: list[Path]) -> None:
    seen: dict[Path, Path] = {}
    for path in places:
        before = seen.setdefault(path.resolve(), path)
        if before is not path:
            raise InputError(f"{path} is given twice" + (f", first as {before}" if before != path else ""))


def _nothing(path: Path) -> str:
    """Return the sentence for a path that is no checkpoint and holds none."""
    if path.is_file():
        return f"{path} is no checkpoint: accepted are files of weights, not states of optimisers or others"
    inner = sorted(sub for sub in path.iterdir() if sub.is_dir() and _is_run(sub))
    hint = f"; give the folder of a run, such as {inner[0]}" if inner else ""
    return (
        f"{path} holds no checkpoints: looked for {LOOKED_FOR}, and for folders or files of these that are "
        f"numbered by step, there and in checkpoints/ and trajectory/{hint}"
    )


def _is_run(folder: Path) -> bool:
    """Whether a folder holds a series, whatever weights lie beside that."""
    names = [sub.name for sub in folder.iterdir() if sub.is_dir() and not UNFINISHED.search(sub.name)]
    return bool({"checkpoints", "trajectory"} & set(names)) or sum(map(_counts, names)) > 1


def _members(folder: Path, remarks: list[str]) -> list[_Member]:
    """Return the checkpoints in the folder of a series, wherever its kind has them."""
    if (folder / "snapshots").is_dir() and (folder / "refs").is_dir():
        return _revisions(folder, remarks)
    saved, recorded = ([], []), ([], [])
    for name, (members, said) in (("checkpoints", saved), ("trajectory", recorded)):
        if (folder / name).is_dir():
            members += _listed(folder / name, said)
    members, said = saved if len(saved[0]) >= 3 or not recorded[0] else recorded
    if not members:
        return _listed(folder, remarks)
    remarks += said
    return members


def _listed(folder: Path, remarks: list[str]) -> list[_Member]:
    """Return the checkpoints directly in a folder: sub-folders, or else numbered files."""
    entries = [path for path in sorted(folder.iterdir()) if not UNFINISHED.search(path.name)]
    whole = any((folder / f"{name}{end}").is_file() for name in STANDARD for end in ("", INDEX))
    inner = [
        path for path in entries if path.is_dir() and (_counts(path.name) or not (whole or _is_run(path)))
    ]
    found = [_Member(path.name, path, weights_of(path)) for path in inner]
    folders = [member for member in found if member.files]
    empty = [member for member in found if folders and not member.files and _counts(member.name)]
    remarks += [f"{member.path} was left out: it holds no weights" for member in empty]
    files = [] if whole else [path for path in entries if is_weights(path) and not is_shard(path)]
    numbered = [path for path in files if _number(_name(path))[0]]
    if folders and numbered:
        raise InputError(
            f"{folder} holds both the folder {folders[0].name} and the file {numbered[0].name}, checkpoints "
            "that different tools wrote; give those of one by listing them"
        )
    return folders or [_Member(_name(path), path, (path,)) for path in files]


def _revisions(folder: Path, remarks: list[str]) -> list[_Member]:
    """Return the revisions of a model in the cache of the hub: refs/NAME says which snapshot NAME is."""
    members = []
    for ref in sorted(path for path in (folder / "refs").rglob("*") if path.is_file()):
        name = str(ref.relative_to(folder / "refs"))
        commit = ref.read_text(encoding="utf-8", errors="replace").strip()
        snapshot = folder / "snapshots" / Path(commit).name
        files = weights_of(snapshot) if commit else ()
        if files:
            members.append(_Member(name, snapshot, files))
        else:
            remarks.append(f"the revision {name} of {folder} was left out: its weights were not fetched")
    return members


def _series(name: str, members: list[_Member], remarks: list[str], listed: bool = False) -> Series:
    """Return the series of some checkpoints once each has a step of its own."""
    last = [] if listed else [member for member in members if LAST.fullmatch(member.name)]
    if any(_number(member.name)[0] for member in members if member not in last):
        remarks = remarks + [f"{one.path} ({one.name}) was left out: its name has no step" for one in last]
        members = [member for member in members if member not in last]
    _check_several(members)
    steps = _steps(members, listed)
    chosen: dict[int, _Member] = {}
    ordered = sorted(zip(members, steps, strict=True), key=lambda pair: (pair[1], pair[0].path.is_symlink()))
    for member, step in ordered:
        other = chosen.setdefault(step, member)
        if other is member:
            continue
        if other.path.resolve() != member.path.resolve():
            raise InputError(f"{other.path} and {member.path} are both of step {step}; give only one of them")
        remarks = [*remarks, f"{member.path} was left out: it is another name of {other.path}"]
    _check_several(list(chosen.values()))
    checkpoints = [
        Checkpoint(step, member.path, member.files, _about(member)) for step, member in chosen.items()
    ]
    return Series(name, tuple(checkpoints), tuple(remarks))


def _check_several(members: list[_Member]) -> None:
    if len(members) < 2:
        raise InputError(
            f"{members[0].path} is one checkpoint only; a series needs at least two: list them, or give the "
            "folder that holds them"
        )


def _about(member: _Member) -> dict[str, str]:
    return metadata(member.files[0]) if member.files[0].suffix == SAFE else {}


def _steps(members: list[_Member], listed: bool) -> list[int]:
    """Return the step of each checkpoint: all by name or by what they say, or by the order of a list."""
    read = [_number(member.name) for member in members]
    steps = [number if unit else _said(member) for member, (unit, number) in zip(members, read, strict=True)]
    without = [member for member, step in zip(members, steps, strict=True) if step is None]
    if len(without) == len(members) and listed:
        return list(range(len(members)))
    if without:
        some = "" if len(without) == len(members) else ", as the others have"
        raise InputError(
            f"{without[0].path} has no step in its name or metadata{some}; name checkpoints by step, or list "
            "them in order with no numbers in their names"
        )
    units = {unit: member for member, (unit, _) in zip(members, read, strict=True) if unit}
    if len(units) > 1:
        (one, first), (other, second) = list(units.items())[:2]
        raise InputError(
            f"{first.path} is named by {one} and {second.path} by {other}, so they have no common order; "
            "list checkpoints that are counted alike"
        )
    return [step for step in steps if step is not None]


def _said(member: _Member) -> int | None:
    """Return the step that the files of a checkpoint state."""
    for name, key in STEP_FILES.items():
        file = member.path / name
        if member.path.is_dir() and file.is_file():
            found = read_json(file)
            step = found.get(key) if isinstance(found, dict) else None
            if type(step) is int:
                return step
    about = metadata(member.files[0])
    stated = [about[key] for key in ("step", "global_step") if key in about]
    return int(stated[0]) if stated and re.fullmatch(r"[0-9]{1,18}", stated[0]) else None


def _name(path: Path) -> str:
    """Return what names a checkpoint: its file without the ending, or the folder of a standard file."""
    if path.is_dir():
        return path.resolve().name if path.name in ("", "..") else path.name
    if path.name.removesuffix(INDEX) in STANDARD:
        return path.resolve().parent.name if path.parent.name in ("", "..") else path.parent.name
    return path.stem


def _number(name: str) -> tuple[str, int]:
    """Return what a name counts and how far, ("", 0) for nothing; the last whole number if it has no word."""
    for unit, words in COUNTERS.items():
        found = re.findall(rf"(?<![a-z]){words}[-_=. ]?([0-9]+)(k?)(?![a-z0-9])", name, re.IGNORECASE)
        if found:
            digits, thousands = found[-1]
            return unit, int(digits) * (1000 if thousands else 1)
    if re.fullmatch(r"[0-9a-f]{32,64}", name):  # the name of a commit or of a content
        return "", 0
    found = re.findall(r"(?<![0-9.])[0-9]+(?![0-9]|\.[0-9])", name)
    return ("number", int(found[-1])) if found else ("", 0)


def _counts(name: str) -> bool:
    """Whether a name has a number with a word for what it counts."""
    return _number(name)[0] in COUNTERS


def _names(folders: list[Path]) -> dict[Path, str]:
    """Return a short name for each folder, longer where two would be called the same."""
    whole = {path: path.resolve() for path in folders}
    cached = {path: re.fullmatch(r"models--(.+)--(.+)", at.name) for path, at in whole.items()}
    short = {path: f"{hub[1]}/{hub[2]}" if hub else whole[path].name for path, hub in cached.items()}
    counts = list(short.values())
    return {
        path: name if counts.count(name) == 1 else "/".join(whole[path].parts[-2:])
        for path, name in short.items()
    }
