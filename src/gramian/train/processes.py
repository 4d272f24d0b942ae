"""All processes of a launch train one model: who takes which rows, and what all of them agree on."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gramian import ranks
from gramian.errors import GramianError, InputError
from gramian.observe.probe import Sample
from gramian.train import sharding
from gramian.train.run import Run, open_run

Found = TypeVar("Found")

FSDP = "ACCELERATE_USE_FSDP"
"""The variable by which `accelerate launch --use_fsdp` asks for parameters that are cut up."""

LARGEST = ("peak",)
"""Sums of a probe that are merged by a maximum."""


class Processes:
    """The processes that train one model; one alone is the smallest case.

    Every process knows the whole batch of a step and takes every so-manyth row of it, from its number on. By
    itself each holds the whole model and the gradients are averaged (DDP); with `accelerate launch
    --use_fsdp`, or ACCELERATE_USE_FSDP=true, each holds a part of every parameter and of what the optimiser
    keeps about it (FSDP2).
    """

    def __init__(self, cpu: bool, folder: Path, *, tensorboard: bool = False) -> None:
        alone = ranks.ranks() == 1  # several without a GPU average nothing unless Accelerate is told
        self.accelerator = Accelerator(
            cpu=cpu or not (alone or torch.cuda.is_available()),
            log_with="tensorboard" if tensorboard else None,
            project_dir=folder,
        )
        asked = os.environ.get(FSDP, "false").lower() in ("1", "true", "yes")
        self.sharded = asked and dist.is_available() and dist.is_initialized()
        self.count, self.index = ranks.ranks(), ranks.rank()

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def check(self, optimiser: str) -> None:
        """Raise InputError for an optimiser that cannot work on parameters that are cut up."""
        if self.sharded:
            sharding.check(optimiser)

    def place(self, model: nn.Module) -> None:
        """Move a model to where a checkpoint is read into it: the device, or the CPU before it is cut up."""
        if not self.sharded:
            model.to(self.device)

    def share(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> nn.Module:
        """Give every process its part of a model and optimiser; return what is called in place of the model.

        All start from the weights of the main process.
        """
        if not self.sharded:
            shared = self.accelerator.prepare_model(model)
            if self.count > 1 and not isinstance(shared, DistributedDataParallel):
                raise GramianError(
                    f"the {self.count} processes do not share their gradients on {self.device}"
                )
            return shared
        sharding.shard_(model, optimiser, self.device)
        return model

    def rows(self, batch: Tensor, accumulation: int) -> tuple[Tensor, ...]:
        """Return the micro-batches of this process.

        Raises: InputError, on all processes, for a batch that they cannot share equally.
        """
        if self.count > 1 and len(batch) % (self.count * accumulation):
            raise InputError(unequal(f"the {len(batch)} rows of a batch", self.count, accumulation))
        return batch[self.index :: self.count].chunk(accumulation)

    def adding_up(self, forward: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Return the context of one micro-batch: gradients are averaged over the processes in the last one.

        Sharded ones are in every micro-batch, so that no process ever holds them all.
        """
        return nullcontext() if last or self.sharded else self.accelerator.no_sync(forward)

    def clip(self, model: nn.Module, largest: float) -> Tensor:
        """Bound the norm of the whole gradient, of all processes, and return what it was."""
        if self.sharded:
            return sharding.clip_(model, largest)
        norm = self.accelerator.clip_grad_norm_(model.parameters(), largest)
        assert norm is not None
        return norm

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of numbers over the processes."""
        return values if self.count == 1 else self._all(values.clone(), dist.ReduceOp.SUM) / self.count

    def largest(self, value: int) -> int:
        """Return the largest of one number of each process."""
        return value if self.count == 1 else int(self._all(torch.tensor(value), dist.ReduceOp.MAX))

    def on_main(self, function: Callable[[], object]) -> None:
        """Do something on the main process alone, and raise on all of them what it raises."""
        failed: Exception | None = None
        if self.is_main:
            try:
                function()
            except Exception as error:
                if self.count == 1:
                    raise
                failed = error
        if self.largest(int(failed is not None)):
            ranks.on_main(lambda: _fail(failed))

    def merge_(self, sample: Sample) -> None:
        """Add up what the hooks of all processes have summed, in place, but for the places of peaks."""
        if self.count == 1:
            return
        for sums in (sample.streams, sample.attentions):
            for site, mine in sums.items():
                sums[site] = self._merged(mine)

    def check_same(self, batch: Tensor) -> None:
        """Raise InputError, on all processes, unless all of them see the same batch."""
        if self.count == 1:
            return
        seen = torch.stack([batch.double().sum(), batch.double().square().sum()])
        found = ranks.spread(lambda _: {"seen": seen}, range(self.count))
        if any(not torch.equal(each["seen"], seen) for each in found):
            raise InputError("the processes read different data; give all of them the same files")

    def _merged(self, sums: Any) -> Any:
        named = {field.name: getattr(sums, field.name) for field in fields(sums)}
        added = [name for name in named if name not in LARGEST]
        flat = torch.cat([named[name].reshape(-1) for name in added]).to(self.device)
        parts = self._all(flat, dist.ReduceOp.SUM).split([named[name].numel() for name in added])
        for name, part in zip(added, parts, strict=True):
            named[name] = part.reshape(named[name].shape)
        for name in named.keys() & set(LARGEST):
            named[name] = self._all(named[name], dist.ReduceOp.MAX)
        return type(sums)(**named)

    def _all(self, values: Tensor, how: Any) -> Tensor:
        """Reduce over all processes."""
        values = values.to(self.device)
        dist.all_reduce(values, how)
        return values


@contextmanager
def others() -> Iterator[None]:
    """Say in one sentence that another process has ended while this one waited for it.

    Raises: GramianError in place of what the network says.
    """
    try:
        yield
    except RuntimeError as error:
        if ranks.ranks() == 1 or not ("gloo" in str(error) or isinstance(error, dist.DistError)):
            raise
        raise GramianError(f"another of the {ranks.ranks()} processes has ended") from error


def unequal(what: str, count: int, accumulation: int) -> str:
    """Say that something cannot be shared equally."""
    each = f" of {accumulation} micro-batches each" if accumulation > 1 else ""
    return f"{what} cannot be shared by {count} processes{each}; take a multiple of {count * accumulation}"


def on_all(function: Callable[[], Found]) -> Found:
    """Do something on every process, and raise on all of them what any raises."""
    found: list[Found] = []

    def take(_: int) -> dict[str, Tensor]:
        found.append(function())
        return {}

    ranks.spread(take, range(ranks.ranks()))
    return found[0]


def main_first(function: Callable[[], Found]) -> Found:
    """Do something on the main process, then on all others; raise on all of them what any raises.

    What the main process leaves on the disk, the others find.
    """
    found: list[Found] = []
    ranks.on_main(lambda: found.append(function()))
    return on_all(lambda: found[0] if found else function())


def open_run_once(folder: Path, config: Any, *, resume: bool = False, overwrite: bool = False) -> Run:
    """Open a run's folder as `open_run` does, on the main process, while all others wait.

    Raises: on all processes, as `open_run`.
    """
    found: list[Run] = []
    ranks.on_main(lambda: found.append(open_run(folder, config, resume=resume, overwrite=overwrite)))
    return found[0] if found else Run(folder)


def _fail(error: Exception | None) -> None:
    if error is not None:
        raise error
