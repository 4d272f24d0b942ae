"""The Gram of a series of checkpoints, streamed from disk: every number is read once, none is kept.

For every tensor the rows θ_0, θ_1 − θ_0, …, θ_T − θ_{T−1} are formed a few thousand columns at a time and
their products added up, so that memory depends neither on the model nor on its largest tensor. Differences
are taken before products: what follows from their Gram (`core/trajectory.py`) suffers no cancellation.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gramian.core.gram import Gram
from gramian.errors import InputError
from gramian.observe.alignment import Aligned
from gramian.observe.increments import add_products, columns, symmetric, thread_memory
from gramian.observe.parts import Part, layer_of, parts_of
from gramian.observe.saved_grams import SavedGrams

BUFFER = 32 * 2**20
"""Bytes that a thread reads before it computes."""

AHEAD = 64 * 2**20
"""Bytes that the operating system is asked to have ready for each thread."""

UNIT = (2**18, 2**24)
"""Parameters of the smallest and of the largest piece of work."""

UNITS = 64
"""Pieces of work that a model is divided into, within these limits."""


@dataclass(frozen=True, eq=False)
class PartGram:
    """The path of one part of one tensor through a series of checkpoints."""

    name: str
    layer: str
    kind: str
    parameters: int
    steps: Gram
    """Of θ_0 and the updates, (n, n) in float64."""
    rounding: tuple[float, float]
    """Variance that rounding to the stored precision adds, summed, at the first and the last checkpoint."""


@dataclass(frozen=True)
class Streamed:
    """What was read of a series."""

    parts: tuple[PartGram, ...]
    broken: Mapping[str, Path]
    """Tensors left out since they are not finite, and the file of the first checkpoint where they are not."""


@dataclass(frozen=True)
class _Piece:
    """A run of elements of one tensor."""

    tensor: int
    start: int
    stop: int


def stream(
    tensors: Sequence[Aligned],
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    workers: int | None = None,
    leave_out: bool = False,
    share: tuple[int, int] = (0, 1),
    anew: bool = False,
    advanced: Callable[[int], None] = lambda done: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Streamed | None:
    """Read every tensor of every checkpoint once and return the Gram of each part's path.

    What was found is saved in `folder` every few seconds; the same call goes on from there, and ends in the
    same bits however often it was stopped and however many threads or processes there were.

    Args:
        tensors: the tensors that all checkpoints have (`alignment.align`).
        folder: where to keep what was found so far; whoever calls removes it in the end.
        config: the model's config.json, which says how a fused matrix of Q, K and V divides.
        workers: threads; as many as there are cores, up to eight, when not given.
        leave_out: leave out a tensor that is not finite, instead of raising.
        share: (rank, processes): the part of the work that is done here. All processes use one folder; when
            they have ended, a call with (0, 1) gathers what they found.
        anew: drop what `folder` holds of the work on other files.
        advanced: told, from any thread, how many bytes more are done.
        stopped: asked several times a second whether to save and return.

    Returns: None when the work is not complete, since it was stopped or others share in it.

    Shapes: n checkpoints -> Grams (n, n). Values of 64 and 32 bits are multiplied in float64, halves in
        float32 by some thousands; all is added up in float64.
    Raises: InputError when a tensor is not finite, a file was cut or changed meanwhile, or `folder` holds
        the work on other files.
    Holds: up to rounding, 1e-14 of the product of the rows' norms, 1e-6 for halves.
    """
    work = _units(tensors)
    parts = [parts_of(tensor.name, tensor.shape, config or {}) for tensor in tensors]
    plan = _plan(tensors, parts)
    saved = SavedGrams(folder, plan, share[0], anew)
    for unit in saved.done:
        advanced(sum(_bytes(tensors[piece.tensor], piece) for piece in work[unit]))
    own = [unit for unit in range(share[0], len(work), share[1]) if unit not in saved.done]
    halt = threading.Event()

    def grams(unit: int) -> dict[str, Tensor] | None:
        found: dict[str, Tensor] = {}
        for piece, following in zip_longest(work[unit], work[unit][1:]):
            if following is not None:
                _prefetch(tensors[following.tensor], following.start, following.stop)
            sums = _piece_grams(tensors[piece.tensor], parts[piece.tensor], piece, leave_out, advanced, halt)
            if sums is None:
                return None
            found |= {f"{piece.tensor}/{part}": each for part, each in enumerate(sums)}
        return found

    try:
        _in_threads(grams, own, workers or min(os.cpu_count() or 1, 8), halt, stopped, saved.add)
    finally:
        saved.flush()
    if len(saved.done) < len(work):
        return None
    if _plan(tensors, parts) != plan:
        raise InputError("a checkpoint was changed while it was read; start again with --overwrite")
    found = _gathered(tensors, parts, saved.totals())
    if found.broken and not leave_out:  # seen by an earlier call that was to leave it out
        raise _not_finite(*next(iter(found.broken.items())))
    return found


def begin(
    tensors: Sequence[Aligned], folder: Path, *, config: Mapping[str, Any] | None = None, anew: bool = False
) -> None:
    """Make the folder for what `stream` finds, before several processes share it.

    Raises: InputError when it holds the work on other files, unless `anew`.
    """
    parts = [parts_of(tensor.name, tensor.shape, config or {}) for tensor in tensors]
    SavedGrams(folder, _plan(tensors, parts), anew=anew)


def _units(tensors: Sequence[Aligned]) -> list[list[_Piece]]:
    """Divide all parameters into pieces of work of like size, in order; small tensors share one."""
    size = min(max(sum(tensor.numel for tensor in tensors) // UNITS, UNIT[0]), UNIT[1])
    units: list[list[_Piece]] = [[]]
    room = size
    for index, tensor in enumerate(tensors):
        start = 0
        while start < tensor.numel:
            if not room:
                units.append([])
                room = size
            stop = min(start + room, tensor.numel)
            units[-1].append(_Piece(index, start, stop))
            room -= stop - start
            start = stop
    return units


def _plan(tensors: Sequence[Aligned], parts: Sequence[Sequence[Part]]) -> Any:
    """Return what the work depends on, as JSON holds it."""
    files = {stored.file for tensor in tensors for stored in tensor.stored}
    states = {file: file.stat() for file in files}
    return {
        "files": sorted([str(file), state.st_size, state.st_mtime_ns] for file, state in states.items()),
        "tensors": [
            [tensor.name, list(tensor.shape), [str(stored.dtype) for stored in tensor.stored]]
            for tensor in tensors
        ],
        "parts": [[[part.kind, part.size] for part in each] for each in parts],
        "units": [UNITS, *UNIT, columns(len(tensors[0].stored)) if tensors else 0],
    }


def _bytes(tensor: Aligned, piece: _Piece) -> int:
    return sum(stored.dtype.itemsize for stored in tensor.stored) * (piece.stop - piece.start)


def _in_threads(
    task: Callable[[int], dict[str, Tensor] | None],
    units: Sequence[int],
    workers: int,
    halt: threading.Event,
    stopped: Callable[[], bool],
    keep: Callable[[int, dict[str, Tensor]], None],
) -> None:
    """Do pieces of work, keeping what each gives, until none is left or `stopped` says so."""
    threads, waiting = torch.get_num_threads(), iter(units)
    running: dict[Future[dict[str, Tensor] | None], int] = {}
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            while True:
                while len(running) < 2 * workers and not halt.is_set():
                    if (unit := next(waiting, None)) is None:
                        break
                    running[pool.submit(task, unit)] = unit
                if not running:
                    break
                for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    unit = running.pop(future)
                    if (found := future.result()) is not None:
                        keep(unit, found)
                if stopped():
                    halt.set()
        finally:
            halt.set()
            torch.set_num_threads(threads)


def _piece_grams(
    tensor: Aligned,
    parts: Sequence[Part],
    piece: _Piece,
    leave_out: bool,
    advanced: Callable[[int], None],
    halt: threading.Event,
) -> Tensor | None:
    """Return the Grams (parts, n + 1, n) over a run of elements of one tensor, or None when halted."""
    n = len(tensor.stored)
    sums = torch.zeros(len(parts), n + 1, n, dtype=torch.float64)
    largest = max(stored.dtype.itemsize for stored in tensor.stored)
    work = torch.float32 if largest == 2 else torch.float64
    width = max(1, BUFFER // (n * largest) // columns(n)) * columns(n)
    window = max(1, AHEAD // 2 // (n * largest) // width) * width
    for start in range(piece.start, piece.stop, width):
        if halt.is_set():
            return None
        if (start - piece.start) % window == 0:
            _prefetch(tensor, start + (window if start > piece.start else 0), piece.stop)
        rows = _rows(tensor, start, min(start + width, piece.stop))
        before = sums.clone()
        add_products(sums, rows, start, parts, work)
        if not sums.isfinite().all() and before.isfinite().all():
            bad = next((index for index, row in enumerate(rows) if not row.isfinite().all()), None)
            if bad is None:  # large halves, whose squares float32 cannot hold
                sums = before
                add_products(sums, rows, start, parts, torch.float64)
            elif not leave_out:
                raise _not_finite(tensor.name, tensor.stored[bad].file)
        advanced(sum(row.nbytes for row in rows))
    return sums


def _prefetch(tensor: Aligned, start: int, stop: int) -> None:
    """Ask the operating system for the next elements of a tensor in all checkpoints."""
    count = AHEAD // sum(stored.dtype.itemsize for stored in tensor.stored)
    for stored in tensor.stored:
        if start < stop:
            stored.prefetch(start, min(count, stop - start))


def _rows(tensor: Aligned, start: int, stop: int) -> Tensor | list[Tensor]:
    """Return elements of a tensor in all checkpoints, in one matrix where they share a precision.

    The memory is the thread's own and serves the next call again.
    """
    n, width = len(tensor.stored), stop - start
    kinds = [stored.dtype for stored in tensor.stored]
    if len(set(kinds)) == 1:
        rows = thread_memory("rows", (n, width), kinds[0])
    else:
        rows = [thread_memory(f"row {index}", (width,), kind) for index, kind in enumerate(kinds)]
    for stored, row in zip(tensor.stored, rows, strict=True):
        stored.read(start, row)
    return rows


def _not_finite(name: str, file: Path) -> InputError:
    return InputError(
        f"{name} in {file} holds NaN or infinities; pass --mismatch leave_out to go on without this tensor"
    )


def _gathered(
    tensors: Sequence[Aligned], parts: Sequence[Sequence[Part]], totals: Mapping[str, Tensor]
) -> Streamed:
    """Return the parts' Grams, without tensors that are not finite."""
    found, broken = [], {}
    for index, tensor in enumerate(tensors):
        for number, part in enumerate(parts[index]):
            total = totals.get(f"{index}/{number}")
            if total is None:  # an empty tensor
                continue
            steps, rounding = symmetric(total[:-1]), total[-1]
            if not steps.isfinite().all():
                first = int(steps.diagonal().isfinite().logical_not().nonzero()[0])
                broken[tensor.name] = tensor.stored[first].file
                continue
            found.append(
                PartGram(
                    name=tensor.name,
                    layer=layer_of(tensor.name),
                    kind=part.kind,
                    parameters=tensor.numel * part.size // sum(each.size for each in parts[index]),
                    steps=Gram(steps, steps.diagonal(), steps.diagonal()),
                    rounding=(rounding[0].item(), rounding[-1].item()),
                )
            )
    return Streamed(tuple(part for part in found if part.name not in broken), broken)
