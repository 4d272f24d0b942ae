"""Observing a model inside somebody else's training loop: every few steps a sample, one row of a record."""

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.observe.neurons import outlier_neurons
from gramian.observe.probe import Probe, Readings, Sample
from gramian.observe.record import Record

TOP = 3
"""Neurons listed for each stream."""

LEAST = ("participation_ratio", "attention_entropy")
"""The readings of which the smallest over the sites is the one to look at; of all others the largest is."""


class Watch:
    """Reads a model at every `every`-th step and appends a row of kind "observe" to a record.

    A row's "step" is the step, its "sites" are the readings, "neurons" each stream's neurons of largest
    mean square with their share of the mean, and "peaks" its entry of largest magnitude and where that is
    (`observe.peaks.Peak`).

    A training framework calls `attach` before a micro-batch and `detach` after it, or, where it tells nobody
    of exceptions, `next_pass` before it; and `finish` when the step's micro-batches, which add up, are
    through. While attached, torch.compile is suspended; at other times the model is as it was.

    Args:
        model: the model that is trained.
        record: where the rows go.
        every: optimiser steps between two samples.
        streams: which modules to read, as `Probe` takes them; None takes `layers(model)`.
        mask: name of an argument of the model, a matrix (batch, tokens) of integers or booleans, 0 at the
            tokens to leave out; the innermost module around a stream that takes it decides. None reads all
            tokens.
        options: more options of `Probe`.

    Raises: InputError as `Probe`.
    """

    def __init__(
        self,
        model: nn.Module,
        record: Record,
        every: int = 50,
        streams: str | Sequence[str] | type[nn.Module] | None = None,
        mask: str | None = "attention_mask",
        **options: Any,
    ):
        self.model, self.record = model, record
        self.probe = Probe(model, layers(model) if streams is None else streams, every=every, **options)
        self._mask = mask
        sites = [*self.probe.streams, *self.probe.attentions]
        self._around = [
            module
            for name, module in model.named_modules()
            if any(not name or site.startswith(f"{name}.") for site in sites)
        ]
        self._step = 0
        self._sample: Sample | None = None
        self._attached: ExitStack | None = None
        self._armed: ExitStack | None = None
        self._rows = 0

    def start(self, step: int) -> None:
        """Begin at a step, 0 or that of a checkpoint: drop the rows of this and all later steps."""
        self.stop()
        late = (i for i, row in enumerate(self.record.read()) if row.get("step", -1) >= step)
        first = next(late, None)
        if first is not None:
            self.record.keep_first(first)

    def attach(self, step: int) -> None:
        """Attach the hooks if the step is due; several times within one step, the passes add up."""
        self.detach()
        if not self.probe.due(step):
            return
        earlier = self._sample if step == self._step else None
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for module in self._around:
                if self._armed is not None and module is self.model:
                    continue  # it is being called: `next_pass` asks it
                handle = module.register_forward_pre_hook(self._take_mask, with_kwargs=True)
                stack.callback(handle.remove)
            sample = Sample() if earlier is None else earlier
            sample.mask = None
            stack.enter_context(self.probe.reading_into(sample))
            self._sample, self._step, self._attached = sample, step, stack.pop_all()

    def detach(self) -> None:
        """Remove the hooks, and keep what they have summed."""
        if self._attached is not None:
            self._attached.close()
            self._attached = None

    def next_pass(self, step: int) -> None:
        """If the step is due, be attached during the model's next forward pass in training with gradients.

        Nothing stays on the model after that pass, whether it succeeds or fails. A pass that a keyboard
        interrupt ends leaves its hooks until the model is called again: that call removes them unread.
        """
        self._disarm()
        if not self.probe.due(step):
            return
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))

            def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                if self._attached is not None:
                    self._disarm()
                elif module.training and torch.is_grad_enabled():
                    self.attach(step)
                    self._take_mask(module, args, kwargs)

            def after(module: nn.Module, args: tuple, output: Any) -> None:
                if self._attached is not None:
                    self._disarm()

            stack.callback(self.model.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(self.model.register_forward_hook(after, always_call=True).remove)
            self._armed = stack.pop_all()

    def finish(self) -> Readings | None:
        """Append the step's row and return its readings; None when nothing was read.

        Raises: InputError when the first due step has called no module that is to be read.
        """
        sample, waiting, self._sample = self._sample, self._armed is not None, None
        self._disarm()
        if sample is None or not (sample.streams or sample.attentions):
            if self._rows or (sample is None and not waiting):
                return None  # not due, or later a batch that the training loop has left out
            sites = [*self.probe.streams, *self.probe.attentions]
            raise InputError(
                f"the first step to be observed made no training pass through {type(self.model).__name__} "
                f"that calls {', '.join(sites[:3])}{', ...' if sites[3:] else ''}; "
                "say with streams= which modules the training step calls"
            )
        readings = sample.readings()
        neurons = {site: outlier_neurons(moments, TOP) for site, moments in sample.streams.items()}
        peaks = {site: asdict(peak) for site, peak in sample.peaks().items()}
        rest = {"neurons": neurons, "peaks": peaks}
        self.record.append({"kind": "observe", "step": self._step, "sites": readings, **rest})
        self._rows += 1
        return readings

    def stop(self) -> None:
        """Remove all hooks and forget the step at hand."""
        self._disarm()
        self._sample = None

    def _disarm(self) -> None:
        self.detach()
        if self._armed is not None:
            self._armed.close()
            self._armed = None

    def _take_mask(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Let a module around the streams say which tokens count, if it takes the mask's argument."""
        if self._mask is None or self._sample is None:
            return
        if self._mask in kwargs:
            mask = kwargs[self._mask]
        else:
            names = list(inspect.signature(module.forward).parameters)
            if self._mask not in names:
                return
            mask = dict(zip(names, args, strict=False)).get(self._mask)
        if mask is None:
            self._sample.mask = None
        elif isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point():
            self._sample.mask = mask != 0  # packed sequences are numbered 1, 2, ...


def layers(model: nn.Module) -> list[str]:
    """Name, as patterns for `Probe`, a model's layers: the members of its longest list of like modules.

    A list is an nn.ModuleList of modules of one class that is in no other ModuleList; of several longest
    (an encoder's and a decoder's) all are taken.

    Raises: InputError when there is none.
    """
    outer, lengths = [], {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in outer)
        if not name or inside or not isinstance(module, nn.ModuleList):
            continue
        outer.append(name)
        classes = {type(member) for member in module}
        if len(classes) == 1 and not classes & {nn.ModuleList, nn.ModuleDict}:
            lengths[f"{name}.*"] = len(module)
    if not lengths:
        raise InputError(
            f"{type(model).__name__} has no ModuleList of modules of one class to take for its layers; "
            "say with streams= which modules to read"
        )
    return [pattern for pattern, length in lengths.items() if length == max(lengths.values())]


def summary(readings: Readings) -> dict[str, float]:
    """Reduce readings to one number each: observe/<reading>_max over the sites, _min for those in `LEAST`."""
    values: dict[str, list[float]] = {}
    for site in readings.values():
        for name, value in site.items():
            values.setdefault(name, []).append(value)
    result = {}
    for name, found in values.items():
        extreme = "min" if name in LEAST else "max"
        result[f"observe/{name}_{extreme}"] = getattr(
            torch.tensor(found, dtype=torch.float64), extreme
        )().item()
    return result
