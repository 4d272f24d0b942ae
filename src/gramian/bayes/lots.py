"""Members and chains in lots of a fixed size, which processes share: the same bits however many there are.

A batched product may round a member otherwise beside three others than beside nine. So what is computed
together does not depend on how many processes there are, and a lot is on one of them as a whole.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gramian.bayes.chains import Chains
from gramian.bayes.flat import Flat, Values
from gramian.bayes.hmc import PLACED, WHOLE, HMCConfig, Progress, sample
from gramian.bayes.stack import FunctionSum
from gramian.bayes.trained import Ensemble
from gramian.errors import InputError, StoppedError
from gramian.ranks import own, spread


def count_of(total: int, together: int) -> int:
    """Return how many lots hold all, at most so many each.

    Raises: InputError unless a lot holds one at least.
    """
    if together < 1:
        raise InputError(f"at least 1 is computed together, got {together}")
    return max(1, -(-total // together))


def ensemble_in_lots(
    fit: Callable[[tuple[int, int]], Ensemble], members: int, together: int
) -> tuple[Ensemble, ...]:
    """Train the shares of an ensemble, each on one process, and return all of them everywhere.

    `fit` trains a share (number, of how many), as `ensemble.fit_ensemble` does.

    Raises: InputError for fewer than one member together, and what `fit` raises, on all processes.
    Holds: exactly: the numbers do not depend on the processes.
    """
    lots = count_of(members, together)
    fitted: dict[int, Ensemble] = {}

    def tensors(lot: int) -> dict[str, Tensor]:
        fitted[lot] = part = fit((lot, lots))
        named = {f"trained/{name}": value for name, value in part.trained.flat().items()}
        named |= {f"offset/{name}": value for name, value in part.offset.flat().items()}
        return named | {"losses": part.losses}

    if not own(range(lots)):  # what is not a tensor is known from any lot, and this process has none to do
        fitted[0] = fit((0, lots))
    found = spread(tensors, range(lots))
    like = next(iter(fitted.values()))
    return tuple(
        fitted[lot] if lot in fitted else _rebuilt(like, named, tuple(range(lot, members, lots)))
        for lot, named in enumerate(found)
    )


def chains_in_lots(
    log_density: Callable[[Any], Tensor],
    start: Values,
    config: HMCConfig,
    together: int,
    *,
    progress: Callable[[Progress], None] = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
) -> Chains:
    """Draw as `hmc.sample` does, so many chains together at most and each lot on one process.

    Chains of a lot share calls of the density. `progress` is told of the lots of this process, one after the
    other. The chains go on from their `state` by `hmc.sample`.

    Shapes: start (chains, …); log_density (…) -> ().
    Raises: InputError as `hmc.sample`; StoppedError when a lot was stopped, with nothing kept.
    Holds: exactly: the numbers do not depend on the processes.
    """
    flat = Flat.of(start, leading=1)
    positions = flat.pack(start).detach()
    lots = count_of(len(positions), together)

    def drawn(lot: int) -> dict[str, Tensor]:
        numbers = range(lot, len(positions), lots)
        begin = flat.unpack(positions[list(numbers)])
        found = sample(log_density, begin, config, progress=progress, stop=stop, numbers=numbers)
        if not found.finished:
            raise StoppedError(f"lot {lot + 1} of {lots} of the chains was stopped, and none are kept")
        return found.state

    found = spread(drawn, range(lots))
    order = torch.cat([torch.arange(lot, len(positions), lots) for lot in range(lots)]).argsort()
    state = {name: torch.cat([each[name] for each in found])[order] for name in found[0].keys() - WHOLE}
    placed = {name: value.to(positions.device) for name, value in state.items() if name in PLACED}
    return Chains(flat, {name: found[0][name] for name in WHOLE} | state | placed, True)


def _rebuilt(like: Ensemble, named: dict[str, Tensor], numbers: tuple[int, ...]) -> Ensemble:
    """Return a share of an ensemble from the tensors of it that are its own."""
    parts: dict[str, dict[str, Tensor]] = {"trained": {}, "offset": {}}
    for key, value in named.items():
        part, _, name = key.partition("/")
        if name:
            parts[part][name] = value.to(like.losses.device)
    trained, offset = (FunctionSum.of_flat(parts[part]) for part in ("trained", "offset"))
    losses = named["losses"].to(like.losses.device)
    return dataclasses.replace(like, trained=trained, offset=offset, numbers=numbers, losses=losses)
