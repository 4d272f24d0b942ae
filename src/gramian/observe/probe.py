"""Hooks by module name that turn activations into readings at once, and exist only inside a sample."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gramian.core.moments import Moments
from gramian.errors import InputError
from gramian.observe.attention import AttentionMoments
from gramian.observe.inputs import spectral_readings, token_readings
from gramian.observe.neurons import neuron_readings

Readings = dict[str, dict[str, float]]
"""site -> reading -> value; a site is the name of a module."""


class Sample:
    """What the hooks of one sample have summed; no activation is kept.

    `mask` (batch, tokens) is 1 at the tokens that count; set it anew before each micro-batch whose
    padding differs.
    """

    def __init__(self, mask: Tensor | None = None):
        self.mask = mask
        self.streams: dict[str, Moments] = {}
        self.attentions: dict[str, AttentionMoments] = {}

    def readings(self, spectral: bool = False) -> Readings:
        """Read every site: neuron and token readings of streams, entropy and sink rate of attentions.

        `spectral` adds the readings that need eigenvalues, which cost more than all the others.

        Raises: InputError when no forward pass went through the probed modules.
        """
        if not self.streams and not self.attentions:
            raise InputError(
                "the sample is empty: run the (uncompiled) model inside `with probe.sample(step)`"
            )
        readings = {site: neuron_readings(m) | token_readings(m) for site, m in self.streams.items()}
        if spectral:
            for site, moments in self.streams.items():
                readings[site] |= spectral_readings(moments)
        for site, moments in self.attentions.items():
            values = torch.stack([moments.attention_entropy(), moments.sink_rate()]).tolist()
            readings[site] = readings.get(site, {}) | dict(
                zip(("attention_entropy", "sink_rate"), values, strict=True)
            )
        return readings


class Probe:
    """Reads the residual stream and the attention of any model, by module name, every few steps.

    `streams` names modules: the stream entering each one is read (the first tensor it is called with,
    (batch, tokens, d), or rows (batch, d)) under the module's name, and the output of the last one, in
    the order of the model, under "<name>.output". A name matches a pattern segment by segment, so
    "blocks.*" takes "blocks.0" and leaves "blocks.0.norm"; a leading "**." stands for any number of
    segments, none included. A module class in place of patterns takes all its instances.

    `attentions` names modules that are called as module(q, k, v), with q and k (batch, heads, T, d_k),
    and have a method weights(q, k) -> (batch, heads, T, T), the softmax before any shaping gain. It is
    called once more on the first `sequences` sequences of every batch, without gradient. A fourth argument
    (batch, T), true at real tokens, is passed on as weights(q, k, real), and padding is left out.

    Nothing is attached outside a sample and off the steps that are due. Several forward passes inside
    one sample add up; what activation checkpointing computes again in the backward pass is not read twice.

    Raises: InputError when a pattern or class matches no module, an attention has no method `weights`,
        or `every` or `sequences` is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        streams: str | Sequence[str] | type[nn.Module] = "blocks.*",
        attentions: str | Sequence[str] | type[nn.Module] = (),
        every: int = 50,
        centre: bool = False,
        skip_first_token: bool = False,
        sequences: int = 1,
    ):
        if every < 1 or sequences < 1:
            raise InputError(f"every and sequences must be at least 1, not {every} and {sequences}")
        self.streams = _matching(model, streams)
        self.attentions = _matching(model, attentions)
        for site, module in self.attentions.items():
            if not callable(getattr(module, "weights", None)):
                raise InputError(
                    f"{site} ({type(module).__name__}) has no method weights(q, k) to read attention from"
                )
        self.every = every
        self.centre = centre
        self.skip_first_token = skip_first_token
        self.sequences = sequences

    def due(self, step: int) -> bool:
        """Whether a sample at this step reads anything: every `every` steps from 0 on."""
        return step % self.every == 0

    @contextmanager
    def sample(self, step: int, mask: Tensor | None = None) -> Iterator[Sample | None]:
        """Attach the hooks for the length of the block and yield what they sum; None when not due.

        Shapes: mask (batch, tokens).
        """
        if not self.due(step):
            yield None
            return
        sample = Sample(mask)
        handles = []
        try:
            for site, module in self.streams.items():
                hook = self._entering(sample, site)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            if self.streams:
                site, module = list(self.streams.items())[-1]
                handles.append(module.register_forward_hook(self._leaving(sample, f"{site}.output")))
            for site, module in self.attentions.items():
                handles.append(module.register_forward_pre_hook(self._attending(sample, site)))
            yield sample
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, sample: Sample, site: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._add_stream(sample, site, (*args, *kwargs.values()))

        return hook

    def _leaving(self, sample: Sample, site: str):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self._add_stream(sample, site, output if isinstance(output, tuple) else (output,))

        return hook

    def _attending(self, sample: Sample, site: str):
        def hook(module: Any, args: tuple) -> None:
            if _recomputing():
                return
            q, k = (x[: self.sequences].detach() for x in args[:2])
            real = None if len(args) < 4 or args[3] is None else args[3][: self.sequences]
            with torch.no_grad():
                weights = module.weights(q, k) if real is None else module.weights(q, k, real)
                mask = None if sample.mask is None else sample.mask[: self.sequences]
                moments = AttentionMoments.of(weights, mask if real is None else real[:, -q.shape[-2] :])
            before = sample.attentions.get(site)
            sample.attentions[site] = moments if before is None else before + moments

        return hook

    def _add_stream(self, sample: Sample, site: str, values: tuple) -> None:
        if _recomputing():
            return
        x = next((value for value in values if isinstance(value, Tensor)), None)
        if x is None or x.ndim < 2 + self.skip_first_token:
            found = "no tensor" if x is None else f"a tensor of shape {tuple(x.shape)}"
            raise InputError(f"the stream at {site} must be (batch, tokens, d), but {found} passes there")
        mask = sample.mask
        if self.skip_first_token:
            x, mask = x[:, 1:], None if mask is None else mask[:, 1:]
        moments = Moments.of(x, mask, self.centre)
        before = sample.streams.get(site)
        sample.streams[site] = moments if before is None else before + moments


def observe(model: nn.Module, batches: Iterable[Any], **options: Any) -> Readings:
    """Read a model over batches, each run as model(batch) in evaluation mode and without gradient.

    The readings are all there are, those that need eigenvalues included.

    `options` are those of `Probe`, without `every`. Every module's training mode is restored.

    Raises: InputError as `Probe`, and when there are no batches.
    """
    probe = Probe(model, every=1, **options)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), probe.sample(0) as sample:
            for batch in batches:
                model(batch)
    finally:
        for module, mode in modes:
            module.training = mode
    assert sample is not None
    return sample.readings(spectral=True)


def _recomputing() -> bool:
    """Whether the backward pass is under way, where activation checkpointing runs the forward pass again."""
    return torch._C._current_graph_task_id() != -1


def _matching(model: nn.Module, wanted: str | Sequence[str] | type[nn.Module]) -> dict[str, nn.Module]:
    """Modules by name, in the order of the model."""
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(wanted, type):
        found = {name: module for name, module in modules.items() if isinstance(module, wanted)}
        if not found:
            raise _no_match(wanted.__name__, modules)
        return found
    patterns = [wanted] if isinstance(wanted, str) else wanted
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in modules):
            raise _no_match(pattern, modules)
    return {name: m for name, m in modules.items() if any(_matches(pattern, name) for pattern in patterns)}


def _matches(pattern: str, name: str) -> bool:
    wanted, segments = pattern.split("."), name.split(".")
    if wanted[0] == "**":
        wanted = wanted[1:]
        segments = segments[max(0, len(segments) - len(wanted)) :]
    return len(wanted) == len(segments) and all(map(fnmatchcase, segments, wanted))


def _no_match(wanted: str, modules: Iterable[str]) -> InputError:
    shapes = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in modules))
    shown = ", ".join(shapes[:12]) + (f" and {len(shapes) - 12} more" if len(shapes) > 12 else "")
    return InputError(f"no module matches {wanted!r}; the model's modules are {shown or 'none'}")
