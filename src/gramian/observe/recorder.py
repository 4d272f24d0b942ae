"""The path of a model's parameters, recorded while it trains: at each point a sketch of them, or all."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gramian.core.gram import Gram
from gramian.core.trajectory import steps_of, sum_of
from gramian.errors import DivergedError, InputError
from gramian.files import atomic_file
from gramian.observe.parts import layer_of
from gramian.observe.sketch import WORD, CountSketch, jackknife
from gramian.observe.weight_files import metadata
from gramian.reading import check_regular

FORMAT = "gramian-trajectory"
"""What every file of a record says it is."""

MODES = ("sketch", "exact")

SIZE = 8192
"""Numbers in a sketch of a model: 64 KiB a record, 6.6 MB for a hundred, whatever the model's size."""

ENDING = ".sketch"
"""Ends the names of sketches, so that a group's layer is found by name as that of a parameter is."""


class TrajectoryRecorder:
    """Writes points of the path that a model's parameters take, one file a point.

    In mode "sketch" a point is a seeded `CountSketch` of each group of parameters: `size` numbers in all,
    64 KiB by default for a model of any size, which take one pass over the parameters to compute (4 to 8 ns a
    parameter on a CPU core) and know a cosine of the whole model to (1 − cos²)/√8192 = 0.011 (1 − cos²)
    standard deviations, one of a group of 512 numbers to 0.044 (1 − cos²). In mode "exact" it is the
    parameters themselves, in their own precision, tied ones once.

    Groups are layers (`parts.layer_of`): the numbers are shared out evenly, and a group that has fewer
    parameters than its share is kept exactly. Beyond size/64 layers, those of a stack are one group; beyond
    that, the model is. The seed is the same for all runs by default, so that the sketches of two runs of one
    model can be compared.

    Parameters may be on any device, of any floating precision, wrapped by DDP or torch.compile. Of several
    processes only the main one may record. What is frozen after the recorder was made is recorded on.

    Args:
        model: what is trained.
        folder: where the points go, as step-00000100.safetensors and so on.
        mode: "sketch" or "exact".
        size: numbers of a sketch, at least 64.
        seed: seed of the sketch.
        trainable_only: whether to leave out parameters that need no gradient.

    Raises: InputError for a mode or size that cannot be, without a parameter to record, and for parameters
        that are sharded over processes or not in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path | str,
        mode: str = "sketch",
        size: int = SIZE,
        seed: int = 0,
        trainable_only: bool = True,
    ):
        if mode not in MODES:
            raise InputError(f"unknown mode {mode!r} of a recorded trajectory; choose sketch or exact")
        if size < WORD:
            raise InputError(f"a model's sketch has at least {WORD} numbers, not {size}")
        self.folder, self.mode = Path(folder), mode
        self._model, self._latest = model, None
        found = _parameters(model)
        self._names = [
            name
            for name, value in found.items()
            if value.requires_grad or (value.is_floating_point() and not trainable_only)
        ]
        if not self._names:
            raise InputError(f"{type(model).__name__} has no parameter to record that is trained")
        for name in self._names:
            _check_whole(name, found[name])
        numbers = {name: found[name].numel() for name in self._names}
        self._groups = groups(numbers, size)
        self._sketches = {group: CountSketch(m, seed, group) for group, (_, m) in self._groups.items()}
        shapes = json.dumps([[name, list(found[name].shape)] for name in self._names])
        self._about = {
            "format": FORMAT,
            "mode": mode,
            "parameters": str(sum(numbers.values())),
            "model": hashlib.blake2b(shapes.encode(), digest_size=8).hexdigest(),
        }
        if mode == "sketch":
            held = {group: sum(map(numbers.__getitem__, names)) for group, (names, _) in self._groups.items()}
            self._about |= {"seed": str(seed), "size": str(size), "groups": json.dumps(held)}

    @property
    def latest(self) -> int | None:
        """The step of the last point recorded; None before the first."""
        return self._latest

    def start(self, step: int) -> None:
        """Begin at a step, 0 or that of a checkpoint: drop the points of this and all later steps.

        Raises: InputError, before anything is dropped, when the folder holds points of another model, mode,
            size or seed, or other files named like points.
        """
        there = points(self.folder)
        for path in there.values():
            self._check(path)
        for path in (path for at, path in there.items() if at >= step):
            path.unlink()
        self._latest = max((at for at in there if at < step), default=None)

    def record(self, step: int) -> Path:
        """Write the parameters' point at a step, atomically, and return its file.

        Raises: InputError for a negative step, and when the parameters are not those of the start any more;
            DivergedError when one is not finite.
        """
        if step < 0:
            raise InputError(f"a step cannot be negative, got {step}")
        found = _parameters(self._model)
        if not found.keys() >= set(self._names):
            missing = next(name for name in self._names if name not in found)
            raise InputError(f"the model has lost the parameter {missing} since its trajectory was begun")
        for name in self._names:
            _check_whole(name, found[name])
        values = {name: found[name].detach() for name in self._names}
        tensors = self._sketched(values) if self.mode == "sketch" else _copied(values)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise self._diverged(values, step)
        path = self.folder / f"step-{step:08d}.safetensors"
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, {**self._about, "step": str(step)})
        self._latest = step
        return path

    def record_if_due(self, step: int, every: int, end: bool = False) -> None:
        """Record a step if it is due."""
        if self.due(step, every, end):
            self.record(step)

    def due(self, step: int, every: int, end: bool = False) -> bool:
        """Whether a step is the first one, a multiple of `every` or the end, and not yet recorded."""
        return step != self._latest and (self._latest is None or step % every == 0 or end)

    def steps_gram(self) -> Gram:
        """Gram `steps` of the path so far, of all groups together, estimated from the sketches.

        Raises: InputError in mode "exact", and as `read_sketches`.
        """
        if self.mode == "exact":
            raise InputError(
                f"exact points are not held in memory; run gramian trajectory {self.folder} to read them"
            )
        return read_sketches(self.folder).steps()

    def _sketched(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            group + ENDING: self._sketches[group].of(values[name] for name in names).cpu()
            for group, (names, _) in self._groups.items()
        }

    def _check(self, path: Path) -> None:
        there = metadata(path)
        if there.get("format") != FORMAT:
            raise InputError(f"{path} is no point of a recorded trajectory; choose another folder")
        for name in sorted(self._about):
            if there.get(name) != self._about[name]:
                raise InputError(
                    f"{path} is of another {name} ({there.get(name)}, not {self._about[name]}); "
                    "choose another folder for this trajectory"
                )

    def _diverged(self, values: Mapping[str, Tensor], step: int) -> DivergedError:
        broken = next(name for name, value in values.items() if not bool(value.isfinite().all()))
        kept = "no point" if self._latest is None else f"step {self._latest}"
        return DivergedError(f"the weights of {broken} are not finite at step {step}; recorded up to {kept}")


@dataclass(frozen=True, eq=False)
class SketchedPath:
    """The points of a path as sketches, read from a record."""

    at: tuple[int, ...]
    """Steps of the n points."""
    sketches: dict[str, Float64[Tensor, "n _"]]
    """The points of each group (n, m_g)."""
    kept: frozenset[str]
    """Groups that are kept exactly."""

    def steps(self, group: str | None = None) -> Gram:
        """Gram `steps` of the path (`core.trajectory`), of one group or of all together.

        Raises: InputError for a group that there is not.
        """
        return sum_of([steps_of(self.sketches[name]) for name in self._wanted(group)])

    def estimate(
        self, reading: Callable[[Gram], Tensor], group: str | None = None, parts: int = 20
    ) -> tuple[Tensor, Tensor]:
        """Estimate a reading of the path, and the standard error of the estimate, as `jackknife` does.

        Raises: InputError for a group that there is not, and as `jackknife`.
        """
        wanted = self._wanted(group)
        drawn = [self.sketches[name] for name in wanted if name not in self.kept]
        kept = [self.sketches[name] for name in wanted if name in self.kept]
        return jackknife(drawn, reading, parts, kept)

    def _wanted(self, group: str | None) -> Sequence[str]:
        if group is not None and group not in self.sketches:
            raise InputError(f"the trajectory has no group {group!r}; it has {', '.join(self.sketches)}")
        return list(self.sketches) if group is None else [group]


def read_sketches(folder: Path | str) -> SketchedPath:
    """Read the points of a record of mode "sketch".

    Raises: InputError when there is none, when one is damaged, or when they are not of one path.
    """
    files = points(Path(folder))
    if not files:
        raise InputError(f"{folder} holds no point of a recorded trajectory (step-*.safetensors)")
    found = {path: metadata(path) for path in files.values()}
    first = found[files[min(files)]]
    for path, about in found.items():
        if about.get("format") != FORMAT or about.get("mode") != "sketch":
            raise InputError(f"{path} is no sketch of a recorded trajectory")
        if any(about.get(name) != first[name] for name in first if name != "step"):
            raise InputError(f"{path} is of another trajectory than the other points of {folder}")
    numbers, loaded = groups_of(first, folder), [_loaded(path) for path in files.values()]
    try:
        sketches = {group: torch.stack([point[group + ENDING] for point in loaded]) for group in numbers}
        kept = frozenset(group for group, count in numbers.items() if count <= sketches[group].shape[1])
    except (LookupError, RuntimeError) as error:  # one that is missing, or of another length or type
        raise InputError(f"the points of {folder} do not hold the sketches that they announce") from error
    return SketchedPath(tuple(files), sketches, kept)


def groups_of(about: Mapping[str, str], where: Path | str) -> dict[str, int]:
    """Return the lengths of the groups that a point's metadata tell; none where they tell of no groups.

    Raises: InputError naming where it was read when they are damaged.
    """
    try:
        found = json.loads(about.get("groups", "{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(type(count) is int for count in found.values()):
        raise InputError(f"{where} does not say what groups its sketches are of")
    return found


def points(folder: Path) -> dict[int, Path]:
    """Return the files of the points in a folder by increasing step."""
    found = {path: re.fullmatch(r"step-([0-9]+)\.safetensors", path.name) for path in folder.glob("step-*")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def groups(numbers: Mapping[str, int], size: int) -> dict[str, tuple[list[str], int]]:
    """Share `size` numbers of a sketch out over groups of parameters, of which `numbers` has the lengths.

    A group is a layer; beyond size/`WORD` layers all of one stack are a group, and beyond that the model is.
    Small groups get what they have, rounded up to `WORD`; what is left is shared out evenly.

    Returns: the names of the parameters in each group, and the numbers of its sketch.
    """
    for group_of in (layer_of, lambda name: re.sub(r"\.\d+$", "", layer_of(name)), lambda name: "weights"):
        members: dict[str, list[str]] = {}
        for name in numbers:
            members.setdefault(group_of(name), []).append(name)
        if len(members) <= size // WORD:
            break
    held = {group: sum(numbers[name] for name in names) for group, names in members.items()}
    shares, left = {}, size // WORD
    for waiting, group in zip(range(len(held), 0, -1), sorted(held, key=held.__getitem__), strict=True):
        shares[group] = min(left // waiting, max(1, -(-held[group] // WORD)))
        left -= shares[group]
    return {group: (names, WORD * shares[group]) for group, names in members.items()}


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters by the names they have without wrappers, each once.

    Raises: InputError when FSDP has cut them up.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise InputError("the parameters are sharded by FSDP; only whole parameters can be recorded")
    found, seen = {}, set()
    for name, value in model.named_parameters():
        memory = (value.device, value.data_ptr(), value.shape, value.stride())
        if value.numel() and memory in seen:
            continue
        seen.add(memory)
        found[name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")] = value
    return found


def _check_whole(name: str, value: Tensor) -> None:
    """Raise InputError for a parameter that is not whole in this process's memory, or not of real numbers."""
    if hasattr(value, "device_mesh") or hasattr(value, "ds_id"):
        raise InputError(f"the parameter {name} is sharded over processes; only whole ones can be recorded")
    if value.is_meta:
        raise InputError(f"the parameter {name} is not in memory (meta device), so it cannot be recorded")
    if not value.is_floating_point():
        raise InputError(f"the parameter {name} is of {value.dtype}; only real floating ones can be recorded")


def _copied(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors on the CPU, none of which shares its memory with another."""
    plain = {name: value.cpu().contiguous() for name, value in values.items()}
    return {
        name: value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
        for name, value in plain.items()
    }


def _loaded(path: Path) -> dict[str, Tensor]:
    check_regular(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
