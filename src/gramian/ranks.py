"""One job on several processes: which part each of them does, and how all come to know the whole.

A launcher (torchrun, `accelerate launch`, Slurm) starts the processes, `processes` joins them to a group, and
`spread` divides independent pieces of work among them. Without a group everything here does nothing but the
work: one process has all of it. Results travel as tensors, bit by bit, in the memory of the CPU; nothing is
rebuilt from anything else. What a piece of work gives must not depend on who does it, so it has random
numbers of its own and a size that does not follow the number of processes.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gramian import errors
from gramian.errors import GramianError, InputError

Item = TypeVar("Item")

Tensors = Mapping[str, Tensor]
"""What a piece of work gives: tensors by name."""

LAUNCHED = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "ACCELERATE_USE_FSDP",
)  # fmt: skip
"""Variables of the environment by which a launcher tells a process who it is."""

WAIT = timedelta(days=7)
"""How long processes wait for the slowest one; one that has died is noticed at once."""

SAID, FIRST = "gramian said", timedelta(seconds=5)
"""Where the main process notes that it says why it ends, and how long others leave that to it."""

_stores: list[Any] = []


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _grouped() else 0


def ranks() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if _grouped() else 1


def is_main() -> bool:
    """Tell whether this is the process that writes files and prints."""
    return rank() == 0


def launched() -> int:
    """Return how many processes a launcher has started, by the environment; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def leave_launcher() -> int:
    """Forget the launcher, so that this process works alone, and return the number it had."""
    found = {name: os.environ.pop(name, "0") for name in LAUNCHED}
    return int(found["RANK"])


def barrier() -> None:
    """Wait until all processes are here.

    Raises: GramianError when one has ended.
    """
    if ranks() > 1:
        _exchange({}, None)


def own(items: Sequence[Item]) -> list[Item]:
    """Return those of some items that this process does: every so-manyth, from its number on."""
    return list(items[rank() :: ranks()])


def anywhere(here: bool) -> bool:
    """Tell whether something is so on any of the processes, all of which have to ask."""
    found = spread(lambda _: {"": torch.tensor(here)}, range(ranks()))
    return any(bool(each[""]) for each in found)


def spread(
    function: Callable[[Item], Tensors],
    items: Iterable[Item],
    passing: Callable[[Item], object] | None = None,
) -> list[dict[str, Tensor]]:
    """Call a function for every item, each on one of the processes, and return all results everywhere.

    [f(items[0]), f(items[1]), …], in this order, on every process

    All processes have to call it with the same items. The results are on the CPU, without gradients. Where
    pieces of work take random numbers from one stream, `passing` is called for the items of others, in order,
    to take theirs.

    Raises: on all processes, what f raised for the earliest item, once all have done theirs: a GramianError
        as it was, anything else as a GramianError that names it; InputError for results that are no tensors.
    Holds: exactly, the same bits for any number of processes, if f of an item depends on the item alone.
    """
    items = list(items)
    if ranks() == 1:
        return [_results(function(item)) for item in items]
    found: dict[str, Tensor] = {}
    failed: tuple[int, Exception] | None = None
    for number, item in enumerate(items):
        try:
            if number % ranks() == rank():
                found |= {f"{number}/{name}": each for name, each in _results(function(item)).items()}
            elif passing is not None:
                passing(item)
        except Exception as error:
            failed = number, error
            break
    results: list[dict[str, Tensor]] = [{} for _ in items]
    for key, tensor in _exchange(found, failed).items():
        number, _, name = key.partition("/")
        results[int(number)][name] = tensor
    return results


def on_main(function: Callable[[], Tensors | None]) -> dict[str, Tensor]:
    """Do something on the main process alone, and return what it gives everywhere once it is done.

    Raises: on all processes, as `spread`.
    """
    return spread(lambda _: function() or {}, [None])[0]


@contextmanager
def processes() -> Iterator[None]:
    """Join the group of the processes that a launcher started, if it did, and leave it at the end.

    A group that is there already stays.

    Raises: GramianError when the others cannot be reached.
    """
    if launched() == 1 or not dist.is_available() or dist.is_initialized():
        yield
        return
    from torch.distributed.rendezvous import rendezvous  # not in builds without torch.distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        store, number, count = next(rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=WAIT)
    except (RuntimeError, ValueError) as error:
        raise GramianError(f"the {launched()} processes cannot reach each other: {error}") from error
    _stores.append(store)
    try:
        yield
    finally:
        _stores.clear()
        _gloo.cache_clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def may_say() -> bool:
    """Tell whether this process is to say why it ends, so that what all of them know is said once.

    The main process is; another one when the main process has said nothing for some seconds.
    """
    if is_main() or not _stores:
        return True
    try:
        _stores[0].wait([SAID], FIRST)
    except RuntimeError:
        return True
    return False


def have_said() -> None:
    """Let the others know that the main process has printed why it ends: a launcher may then end all."""
    if is_main() and _stores:
        with suppress(RuntimeError):
            _stores[0].set(SAID, "")


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


@lru_cache(maxsize=1)
def _gloo(world: Any) -> Any:
    """Return a group for tensors on the CPU that waits for long, whatever the first group is for."""
    return dist.new_group(backend="gloo", timeout=WAIT)


def _results(found: Any) -> dict[str, Tensor]:
    """Return results as they travel."""
    if not isinstance(found, Mapping) or not all(isinstance(each, Tensor) for each in found.values()):
        raise InputError(f"a piece of work has to give tensors by name, not {type(found).__name__}")
    return {name: each.detach().cpu() for name, each in found.items()}


def _exchange(tensors: Tensors, failed: tuple[int, Exception] | None) -> dict[str, Tensor]:
    """Return the tensors of all processes, or raise the failure of the earliest item."""
    group, gathered, failures = _gloo(dist.group.WORLD), {}, []
    about = {
        "tensors": [[name, str(each.dtype), list(each.shape)] for name, each in tensors.items()],
        "failed": failed and [failed[0], type(failed[1]).__name__, str(failed[1])],
    }
    try:
        for source in range(ranks()):
            theirs = json.loads(_text(json.dumps(about), source, group))
            failures += [(*theirs["failed"], source)] if theirs["failed"] else []
            for name, dtype, shape in theirs["tensors"]:
                mine = tensors[name] if source == rank() else None
                gathered[name] = _sent(mine, dtype, shape, source, group)
    except RuntimeError as error:
        raise GramianError(f"another of the {ranks()} processes has ended: {error}") from error
    if failures:
        raise _failure(min(failures), failed)
    return gathered


def _failure(earliest: tuple[int, str, str, int], failed: tuple[int, Exception] | None) -> Exception:
    """Return the exception to raise here for the earliest failure anywhere."""
    number, kind, message, source = earliest
    if failed is not None and failed[0] == number:
        return failed[1]
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, GramianError):
        return known(message)
    return GramianError(f"process {source} failed: {kind}: {message}")


def _text(text: str, source: int, group: Any) -> str:
    """Return the text of one process everywhere."""
    written = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    size = torch.tensor(len(written))
    dist.broadcast(size, source, group)
    received = written if source == rank() else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(received, source, group)
    return bytes(received.tolist()).decode()


def _sent(mine: Tensor | None, dtype: str, shape: Sequence[int], source: int, group: Any) -> Tensor:
    """Return a tensor of one process everywhere, as the bytes that it is."""
    kind = getattr(torch, dtype.removeprefix("torch."))
    tensor = torch.empty(shape, dtype=kind) if mine is None else mine.contiguous()
    if tensor.numel():
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), source, group)
    return tensor
