"""All that there is to see of a model on some text, in one pass: with the first tokens and without them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gramian.core.moments import Moments
from gramian.errors import InputError
from gramian.observe.attention import AttentionMoments
from gramian.observe.identity import TraceCheck
from gramian.observe.neurons import outlier_neurons
from gramian.observe.peaks import Peak, Summit
from gramian.observe.probe import CALLS, Probe, Readings, merge, read_attention, read_stream, run_through
from gramian.observe.tokens import split_first
from gramian.observe.watch import layers


@dataclass(frozen=True)
class Observed:
    """What `examine` saw, by site: a module's name for the stream entering it, or for its attention."""

    readings: Readings
    """Readings of streams, over all real tokens, and of attentions."""
    without_first: Readings
    """Readings of the streams that have tokens, without the first real token of every sequence."""
    neurons: dict[str, list[tuple[int, float]]]
    """Neurons of largest mean square, each with its share s_j / mean_j s_j, the largest first."""
    peaks: dict[str, Peak]
    """The entry of largest magnitude of each stream; none where no token counted."""
    trace_error: dict[str, float]
    """Relative error of the trace identity, a check of these readings on themselves: about 1e-15."""


def examine(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    streams: str | Sequence[str] | type[nn.Module] | None = None,
    attentions: str | Sequence[str] | type[nn.Module] = CALLS,
    centre: bool = False,
    top: int = 3,
    sequences: int = 1,
) -> Observed:
    """Read all streams and attentions of any model over batches, in one pass of sums.

    The model runs in evaluation mode and without gradient; nothing of a batch outlives it, and what is kept
    does not grow with their number.

    Args:
        model: any module; its training mode is restored.
        batches: tensors, run as model(batch), or mappings, run as model(**batch), whose attention_mask
            (batch, tokens) says which tokens are real: padding, on either side, counts nowhere.
        streams: which modules to read, as `Probe` takes them; None finds the layers (`watch.layers`).
        attentions: "calls" for whatever attention is called, () for none, or names as `Probe` takes them.
        centre: whether every token's mean over its width is subtracted first.
        top: number of neurons listed for each stream.
        sequences: number of sequences of each batch whose attention is read.

    Raises: InputError as `Probe`, for top below 1, for an attention_mask that is not a matrix or does not
        fit a stream, and when no batch went through the modules to be read.
    Holds: exactly: the readings are those of all real tokens in one matrix.
    """
    if top < 1:
        raise InputError(f"top must be at least 1, not {top}")
    streams = layers(model) if streams is None else streams
    probe = Probe(model, streams, attentions, every=1, centre=centre, sequences=sequences)
    sums = _Examination()
    run_through(probe, batches, sums)
    return sums.observed(top)


class _Examination:
    """Sums of streams, those of first tokens apart: all tokens are first ones and others, merged."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.first: dict[str, Moments] = {}
        self.rest: dict[str, Moments] = {}
        self.summits: dict[str, Summit] = {}
        self.checks: dict[str, TraceCheck] = {}
        self.attentions: dict[str, AttentionMoments] = {}

    def add_stream(self, site: str, x: Tensor, mask: Tensor | None, centre: bool) -> None:
        if x.ndim == 3:
            first, rest = split_first(x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask)
            merge(self.first, site, Moments.of(x, first, centre))
            merge(self.rest, site, Moments.of(x, rest, centre))
        else:
            merge(self.rest, site, Moments.of(x, mask, centre))
        merge(self.summits, site, Summit.of(x, mask, centre))
        self.checks.setdefault(site, TraceCheck(centre)).add(x, mask)

    def add_attention(self, site: str, moments: AttentionMoments) -> None:
        merge(self.attentions, site, moments)

    def observed(self, top: int) -> Observed:
        if not self.rest and not self.attentions:
            raise InputError("nothing was read: there was no batch, or none reached the modules to be read")
        total = {
            site: self.first[site] + rest if site in self.first else rest for site, rest in self.rest.items()
        }
        readings = {site: read_stream(moments, spectral=True) for site, moments in total.items()}
        for site, moments in self.attentions.items():
            readings[site] = readings.get(site, {}) | read_attention(moments)
        peaks = {site: summit.peak() for site, summit in self.summits.items()}
        return Observed(
            readings=readings,
            without_first={site: read_stream(self.rest[site], spectral=True) for site in self.first},
            neurons={site: outlier_neurons(moments, top) for site, moments in total.items()},
            peaks={site: peak for site, peak in peaks.items() if peak is not None},
            trace_error={site: check.error() for site, check in self.checks.items()},
        )
