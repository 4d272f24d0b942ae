"""Hooks by module name that turn activations into readings at once, and exist only inside a sample."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gramian.core.moments import Moments
from gramian.errors import InputError
from gramian.observe.attention import AttentionMoments
from gramian.observe.attention_calls import reading_calls
from gramian.observe.inputs import spectral_readings, token_readings
from gramian.observe.names import matching
from gramian.observe.neurons import neuron_readings
from gramian.observe.peaks import Peak, Summit
from gramian.observe.tokens import split_first

Readings = dict[str, dict[str, float]]
"""site -> reading -> value; a site is the name of a module."""

CALLS = "calls"
"""In place of the names of attentions: whatever attention is called."""


@runtime_checkable
class Sums(Protocol):
    """What the hooks of a probe hand their tensors to, at once."""

    mask: Tensor | None

    def add_stream(self, site: str, x: Tensor, mask: Tensor | None, centre: bool) -> None:
        """Add the tokens of a stream that `mask` keeps."""
        ...

    def add_attention(self, site: str, moments: AttentionMoments) -> None:
        """Add what was read of an attention."""
        ...


class Sample:
    """What the hooks of one sample have summed; no activation is kept.

    `mask` (batch, tokens) is 1 at the tokens that count; set it anew before each micro-batch whose
    padding differs.
    """

    def __init__(self, mask: Tensor | None = None):
        self.mask = mask
        self.streams: dict[str, Moments] = {}
        self.summits: dict[str, Summit] = {}
        self.attentions: dict[str, AttentionMoments] = {}

    def add_stream(self, site: str, x: Tensor, mask: Tensor | None, centre: bool) -> None:
        """Add the tokens of a stream that `mask` keeps."""
        merge(self.streams, site, Moments.of(x, mask, centre))
        merge(self.summits, site, Summit.of(x, mask, centre))

    def add_attention(self, site: str, moments: AttentionMoments) -> None:
        """Add what was read of an attention."""
        merge(self.attentions, site, moments)

    def readings(self, spectral: bool = False) -> Readings:
        """Read every site: neuron and token readings of streams, entropy and sink rate of attentions.

        `spectral` adds the readings that need eigenvalues, which cost more than all the others.

        Raises: InputError when no forward pass went through the probed modules.
        """
        if not self.streams and not self.attentions:
            raise InputError(
                "the sample is empty: run the (uncompiled) model inside `with probe.sample(step)`"
            )
        readings = {site: read_stream(moments, spectral) for site, moments in self.streams.items()}
        for site, moments in self.attentions.items():
            readings[site] = readings.get(site, {}) | read_attention(moments)
        return readings

    def peaks(self) -> dict[str, Peak]:
        """Return the entry of largest magnitude of every stream, with its place."""
        found = {site: summit.peak() for site, summit in self.summits.items()}
        return {site: peak for site, peak in found.items() if peak is not None}


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

    `attentions="calls"` needs nobody's cooperation: such modules are read as above, and of all others every
    call of fused attention, of nn.MultiheadAttention and of an attention's softmax (`AttentionCalls`), under
    the name of the innermost module that makes it. A model without attention then has no such readings.

    The first token, of `skip_first_token` and of the sink rate, is the first real one of each sequence.

    Nothing is attached outside a sample and off the steps that are due. Several forward passes inside
    one sample add up; what activation checkpointing computes again in the backward pass is not read twice.

    Raises: InputError when a pattern or class matches no module, an attention has no method `weights`,
        or `every` or `sequences` is below 1; while reading, when a stream has another number of dimensions
        or the mask does not fit it.
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
        self.model = model
        self.streams = matching(model, streams)
        self.calls = attentions == CALLS
        self.attentions = _telling(model) if self.calls else matching(model, attentions)
        for site, module in self.attentions.items():
            if not callable(getattr(module, "weights", None)):
                raise InputError(
                    f"{site} ({type(module).__name__}) has no method weights(q, k) to read attention from; "
                    f'attentions="{CALLS}" reads any attention'
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
        with self.reading_into(sample):
            yield sample

    @contextmanager
    def reading_into(self, sums: Sums) -> Iterator[None]:
        """Attach the hooks for the length of the block and add to sums that there are."""
        with ExitStack() as stack:
            if self.calls:  # before the hooks below, which call modules' methods themselves
                mask, read = (lambda: sums.mask), sums.add_attention
                stack.enter_context(reading_calls(self.model, self.sequences, mask, read, self.attentions))
            for site, module in self.streams.items():
                hook = self._entering(sums, site)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if self.streams:
                site, module = list(self.streams.items())[-1]
                hook = self._leaving(sums, f"{site}.output")
                stack.callback(module.register_forward_hook(hook).remove)
            for site, module in self.attentions.items():
                stack.callback(module.register_forward_pre_hook(self._attending(sums, site)).remove)
            yield

    def _entering(self, sums: Sums, site: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._add_stream(sums, site, (*args, *kwargs.values()))

        return hook

    def _leaving(self, sums: Sums, site: str):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self._add_stream(sums, site, output if isinstance(output, tuple) else (output,))

        return hook

    def _attending(self, sums: Sums, site: str):
        def hook(module: Any, args: tuple) -> None:
            if _recomputing():
                return
            q, k = (x[: self.sequences].detach() for x in args[:2])
            real = None if len(args) < 4 or args[3] is None else args[3][: self.sequences]
            with torch.no_grad():
                weights = module.weights(q, k) if real is None else module.weights(q, k, real)
                if real is None:
                    mask = None if sums.mask is None else sums.mask[: self.sequences]
                    moments = AttentionMoments.of(weights, mask)
                else:
                    moments = AttentionMoments.of(weights, real[:, -q.shape[-2] :], real.int().argmax(1))
            sums.add_attention(site, moments)

        return hook

    def _add_stream(self, sums: Sums, site: str, values: tuple) -> None:
        if _recomputing():
            return
        x = next((value for value in values if isinstance(value, Tensor)), None)
        if x is None or not 2 + self.skip_first_token <= x.ndim <= 3:
            found = "no tensor" if x is None else f"a tensor of shape {tuple(x.shape)}"
            rows = "" if self.skip_first_token else " or rows (batch, d)"
            raise InputError(
                f"the stream at {site} must be (batch, tokens, d){rows}, but {found} passes there"
            )
        mask = sums.mask
        if self.skip_first_token:
            mask = split_first(x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask)[1]
        sums.add_stream(site, x, mask, self.centre)


def observe(model: nn.Module, batches: Iterable[Any], **options: Any) -> Readings:
    """Read a model over batches in evaluation mode and without gradient.

    Each batch is a tensor, run as model(batch), or a mapping, run as model(**batch), whose attention_mask
    (batch, tokens) leaves padding out. The readings are all there are, those that need eigenvalues included;
    `examine` says more.

    `options` are those of `Probe`, without `every`. Every module's training mode is restored.

    Raises: InputError as `Probe`, for an attention_mask of another shape, and when there are no batches.
    """
    sample = Sample()
    run_through(Probe(model, every=1, **options), batches, sample)
    return sample.readings(spectral=True)


def run_through(probe: Probe, batches: Iterable[Any], sums: Sums) -> None:
    """Run the probe's model over batches as `observe` does, and add what it reads to the sums.

    Raises: InputError as `observe`, but not for want of batches.
    """
    modes = [(module, module.training) for module in probe.model.modules()]
    probe.model.eval()
    try:
        with torch.no_grad(), probe.reading_into(sums):
            for batch in batches:
                if isinstance(batch, Mapping):
                    sums.mask = _mask_of(batch)
                    probe.model(**batch)
                else:
                    probe.model(batch)
    finally:
        for module, mode in modes:
            module.training = mode


def _mask_of(batch: Mapping[str, Any]) -> Tensor | None:
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"a batch's attention_mask must be a matrix (batch, tokens), not {found}")
    return mask if mask.is_floating_point() else mask != 0  # packed sequences are numbered 1, 2, ...


def merge(sums: dict[str, Any], site: str, new: Any) -> None:
    """Add new sums to those of a site, if there are any."""
    sums[site] = sums[site] + new if site in sums else new


def read_stream(moments: Moments, spectral: bool) -> dict[str, float]:
    """Read all there is of one stream; `spectral` adds what needs eigenvalues."""
    readings = neuron_readings(moments) | token_readings(moments)
    return readings | spectral_readings(moments) if spectral else readings


def read_attention(moments: AttentionMoments) -> dict[str, float]:
    """Read all there is of one attention."""
    values = torch.stack([moments.attention_entropy(), moments.sink_rate()]).tolist()
    return dict(zip(("attention_entropy", "sink_rate"), values, strict=True))


def _recomputing() -> bool:
    """Whether the backward pass is under way, where activation checkpointing runs the forward pass again."""
    return torch._C._current_graph_task_id() != -1


def _telling(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with a method weights(q, k, ...), by name."""
    methods = {name: (module, getattr(module, "weights", None)) for name, module in model.named_modules()}
    return {
        name: module
        for name, (module, method) in methods.items()
        if inspect.ismethod(method) and [*inspect.signature(method).parameters][:2] == ["q", "k"]
    }
