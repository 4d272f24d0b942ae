"""What goes on inside a language model while it reads a text: outlier neurons, collapsing tokens, sinks."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.text import Text
from torch import Tensor

from gramian.data.text import standard_library_name
from gramian.errors import InputError
from gramian.observe import Observed, examine
from gramian.observe.peaks import Peak
from gramian.tasks.open_model import LanguageModel, Reading, open_model
from gramian.train.run import versions

READINGS = "readings.json"
"""The file by which a folder is known as that of an observation."""

BEFORE = 8
"""Tokens shown before the one at a peak."""


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """Read a text with a language model and say, layer by layer, what its activations look like."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a Hugging Face language model or of a run, or a model's name on the Hugging Face hub."""
    data: Reading = field(default_factory=Reading)
    streams: tuple[str, ...] = ()
    """Names or patterns of the modules whose input is read, such as model.layers.*; the model's layers, found
    by their kind, when none is given."""
    centre: bool = False
    """Subtract every token's mean over the width first."""
    top: int = 3
    """Neurons listed for each layer."""
    attention_sequences: int = 1
    """Sequences of every batch whose attention is read."""
    dtype: str = "float32"
    """Precision to run in: float32, float16, bfloat16 or float64; readings are summed in float64."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, cuda:1, mps."""
    offline: bool = False
    """Take a hub's model only if it was fetched earlier."""
    output: Path | None = None
    """Folder for readings.json, report.html and the figures; observations/<name of the model> by default."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        name = Path(self.model).expanduser().resolve().name
        return Path("observations", name or "model") if self.output is None else self.output


@dataclass(frozen=True, eq=False)
class Layer:
    """What was read of one layer."""

    label: str
    """Its number from 1 on, or "output" for what leaves the last one."""
    site: str
    """The module whose input was read, or its output or attention."""
    readings: dict[str, float]
    """Over all tokens, the attention's included."""
    without_first: dict[str, float]
    """Over all tokens but the first of each sequence; empty where there is no such stream."""
    neurons: tuple[tuple[int, float], ...]
    """Neurons of largest mean square, with its ratio to the mean over the neurons."""
    peak: Peak | None
    """Its entry of largest magnitude."""
    token: str
    """The token at the peak."""
    before: str
    """The text before that token."""
    trace_error: float | None
    """Relative error of the trace identity."""


@dataclass(frozen=True, eq=False)
class Observation:
    """What a model did with a text."""

    model: str
    folder: Path
    layers: tuple[Layer, ...]
    tokens: int
    sequences: int
    facts: dict[str, str]
    """What was read, and how, in words."""


def observe(config: ObserveConfig, *, overwrite: bool = False, console: Console | None = None) -> Observation:
    """Read a text with a model and return what was seen; `observe_page.write_report` writes it down.

    Sums alone are kept of the activations, so that memory does not grow with the text. The text is tokenised
    once before, to count it, and once after, to name the tokens of the peaks.

    Raises: InputError for a model, text or setting that cannot be used, and a folder that is taken.
    Source: He, Noci, Paliotta, Schlag, Hofmann 2024, arXiv 2405.19279.
    """
    check_free(config.folder, overwrite)
    return _observed(config, console or Console())


def _observed(config: ObserveConfig, console: Console) -> Observation:
    if config.top < 1 or config.attention_sequences < 1:
        raise InputError("top and attention_sequences must be at least 1")
    with console.status(Text(f"opening {config.model}")):
        opened = open_model(config.model, dtype=config.dtype, device=config.device, offline=config.offline)
    with console.status("reading and tokenising the text"):
        taken = config.data.sample()
        count, sequences, tokens = _counted(config.data.batches(opened, taken.documents))
    shown = track(
        config.data.batches(opened, taken.documents), "observing", count, console=console, transient=True
    )
    try:
        seen = examine(
            opened.model,
            shown,
            streams=config.streams or None,
            centre=config.centre,
            top=config.top,
            sequences=config.attention_sequences,
        )
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the memory of {opened.device} is not enough for {config.data.batch} sequences at once; lower "
            "batch or context"
        ) from error
    places = _tokens_at(opened, config.data.batches(opened, taken.documents), seen.peaks.values())
    word = "document" if len(taken.documents) == 1 else "documents"
    about = f"{len(taken.documents):,} {word}, {sequences:,} sequences, {tokens:,} tokens"
    return Observation(
        model=config.model,
        folder=config.folder,
        layers=tuple(_layers(seen, places)),
        tokens=tokens,
        sequences=sequences,
        facts={
            "model": f"{config.model} ({type(opened.model).__name__})",
            "text": ", ".join(map(str, config.data.text)) or standard_library_name(),
            "read": about + (f"; {taken.left_out:,} documents beyond max_bytes" if taken.left_out else ""),
            "settings": f"{config.dtype} on {opened.device}, batch {config.data.batch}"
            + (", centred over the width" if config.centre else ""),
            "software": ", ".join(f"{name} {versions()[name]}" for name in ("gramian", "torch")),
        },
    )


def observe_model(model: str | Path, *text: str | Path, **settings: Any) -> Observation:
    """Observe a model from Python in one line, writing nothing.

    observe_model("folder", "book.txt", context=128).layers[3].readings["neuron_kurtosis"]

    `settings` are those of `ObserveConfig` and of `Reading`, such as context or centre.

    Raises: as `observe`, and InputError for a setting of another name.
    """
    reading = {name: settings.pop(name) for name in [*settings] if name in Reading.__dataclass_fields__}
    if unknown := settings.keys() - (ObserveConfig.__dataclass_fields__.keys() - {"model", "data"}):
        raise InputError(f"unknown setting {min(unknown)!r} of an observation")
    data = Reading(text=tuple(map(Path, text)), **reading)
    config = ObserveConfig(model=str(model), data=data, **settings)
    return _observed(config, Console(quiet=True))


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise InputError unless results may go into a folder: a new or empty one, or an observation's."""
    if folder.is_dir() and (folder / READINGS).exists():
        if not overwrite:
            raise InputError(
                f"the folder {folder} already holds an observation; pass --overwrite to replace it, or "
                "another --output"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something that is no observation; choose another --output")


def _counted(batches: Iterable[dict[str, Tensor]]) -> tuple[int, int, int]:
    """Return the number of batches, sequences and real tokens."""
    count = sequences = tokens = 0
    for batch in batches:
        count += 1
        sequences += len(batch["input_ids"])
        tokens += int(batch["attention_mask"].sum())
    return count, sequences, tokens


def _tokens_at(
    opened: LanguageModel, batches: Iterable[dict[str, Tensor]], peaks: Collection[Peak]
) -> dict[tuple[int, int], tuple[str, str]]:
    """Return the token of each (sequence, position) where there is a peak, and the text before it."""
    wanted = {(peak.sequence, peak.position) for peak in peaks}

    def text(ids: Tensor, special: bool) -> str:
        return opened.tokenizer.decode(ids.tolist(), skip_special_tokens=not special)

    found, first = {}, 0
    for batch in batches:
        ids = batch["input_ids"]
        for sequence, position in wanted:
            if first <= sequence < first + len(ids):
                row = ids[sequence - first]
                before = row[max(0, position - BEFORE) : position]
                found[sequence, position] = (text(row[position : position + 1], True), text(before, False))
        first += len(ids)
    return found


def _layers(seen: Observed, places: dict[tuple[int, int], tuple[str, str]]) -> Iterator[Layer]:
    """Yield the streams in the model's order, each with the attention inside it, then attention alone."""
    streams = list(seen.trace_error)  # the last one leaves the last module
    inside: dict[str, list[str]] = {}
    for site in seen.readings:
        if site not in streams:
            around = [stream for stream in streams if site.startswith(f"{stream}.")]
            inside.setdefault(max(around, key=len, default=site), []).append(site)
    attention = {site: _mean([seen.readings[each] for each in sites]) for site, sites in inside.items()}
    for number, site in enumerate([*streams, *(site for site in inside if site not in streams)], 1):
        peak = seen.peaks.get(site)
        token, before = places.get((peak.sequence, peak.position), ("", "")) if peak else ("", "")
        own = seen.readings[site] if site in streams else {}
        yield Layer(
            label="output" if site == streams[-1] else str(number) if site in streams else site,
            site=site,
            readings=own | attention.get(site, {}),
            without_first=seen.without_first.get(site, {}),
            neurons=tuple(seen.neurons.get(site, ())),
            peak=peak,
            token=token,
            before=before,
            trace_error=seen.trace_error.get(site),
        )


def _mean(readings: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each reading over several attentions of one layer."""
    return {name: sum(each[name] for each in readings) / len(readings) for name in readings[0]}
