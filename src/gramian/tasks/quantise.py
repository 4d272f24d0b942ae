"""What smaller numbers do to a language model: loss, size and speed in each scheme, and layer by layer."""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from gramian.compress import torch_ao
from gramian.compress.recipe import Recipe
from gramian.compress.simulate import Simulation, sensitivity
from gramian.data.text import Document
from gramian.errors import InputError, MissingExtraError
from gramian.observe.examine import examine
from gramian.observe.watch import layers
from gramian.tasks.open_model import LanguageModel, Reading, language_loss, open_model
from gramian.tasks.quantised_model import save_quantised
from gramian.train.run import versions

Batches = Sequence[dict[str, Tensor]]

SIMULATED: dict[str, dict[str, Any]] = {
    "static": {},
    "static_linear": {"linear_only": True},
    "fp8": {"number": "fp8_e4m3"},
}
"""Schemes computed in floating point on the values that smaller numbers have: what `Recipe` is given."""

SCHEMES = {
    "bfloat16": "bfloat16",
    "static": "static W8A8 (simulated)",
    "static_linear": "linear W8A8 (simulated)",
    "int8_dynamic": "dynamic W8A8 (torchao)",
    "int8_weight": "int8 weights (torchao)",
    "int4_weight": "int4 weights (torchao)",
    "fp8": "FP8 E4M3 (simulated)",
}
"""The schemes by name, as the table shows them."""

MILDER = {"static_linear": "only linear layers are quantised, static: milder than the published recipe"}
"""What has to be said of a simulated scheme."""

LEAST_CALIBRATION = 4
"""Batches from which ranges are taken at least, unless fewer are asked for; 4 to 16 are published."""


@dataclass(frozen=True, kw_only=True)
class QuantiseConfig:
    """Quantise a language model in several ways on one part of a text, and judge it on the other part."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a Hugging Face language model, run folder of ours, or id of a model on the hub."""
    data: Reading = field(default_factory=Reading)
    schemes: tuple[str, ...] = tuple(name for name in SCHEMES if name != "int4_weight")
    """Which of bfloat16, static, static_linear, int8_dynamic, int8_weight, int4_weight, fp8; int4_weight has
    to be asked for, since a CPU without a kernel for it takes fifty times as long."""
    exact_head: bool = False
    """Leave the layer that gives the logits exact in every scheme; torchao's leave one that is tied to the
    embedding exact in any case."""
    percentile: float = 100.0
    """Static ranges are percentiles (100 − p, p) of a batch; 100 is its minimum and maximum, 99.999 is
    published for OPT."""
    calibration_batches: int = 16
    """Batches of text that static ranges are taken from, at most."""
    group: int = torch_ao.GROUP
    """Weights of a row that share a scale in int4: 32, 64 or 128."""
    layers: bool = True
    """Whether each layer is also quantised alone, by the complete static recipe."""
    rounds: int = 5
    """Timed forward passes of each real scheme."""
    dtype: str = "float32"
    """Of the model that the schemes are compared with: float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    offline: bool = False
    """Never ask the hub; take what was fetched earlier."""
    output: Path | None = None
    """New folder for quantisation.json, report.html and the figures."""
    export: Path | None = None
    """New folder for the model in integers."""
    export_scheme: str = "int8_dynamic"
    """Which of int8_dynamic, int8_weight, int4_weight is exported."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if wrong := [name for name in self.schemes if name not in SCHEMES]:
            raise InputError(f"unknown scheme {wrong[0]!r}; accepted are {', '.join(SCHEMES)}")
        if self.export_scheme not in torch_ao.KINDS:
            raise InputError(
                f"scheme {self.export_scheme!r} cannot be exported; accepted are {', '.join(torch_ao.KINDS)}"
            )
        for name in ("calibration_batches", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.output is not None and self.output == self.export:
            raise InputError(f"output and export need a folder each, got {self.output} for both")
        for folder in (self.output, self.export):
            if folder is not None and folder.exists():
                raise InputError(f"{folder} exists already; name a new folder")
        Recipe(percentile=self.percentile)


@dataclass(frozen=True)
class SchemeResult:
    """What one scheme did to the model; None where it was not measured."""

    scheme: str
    title: str
    loss: float | None
    """Nats a predicted token."""
    size: int | None
    """Bytes that are really stored; None where integers are only simulated."""
    speed: float | None
    """Times faster than the exact model, a forward pass, median over rounds taken in turn."""
    note: str = ""
    """Why the scheme did not run, what it leaves out, or how much of the model it converted."""


@dataclass(frozen=True)
class LayerResult:
    """One layer's share of the damage, beside its outliers."""

    layer: str
    added_loss: float
    """Nats a token that quantising this layer alone adds, everything else exact."""
    neuron_kurtosis: float | None
    """Of the stream that enters the layer, as is max_median_ratio; None for the head."""
    max_median_ratio: float | None


@dataclass(frozen=True)
class Quantisation:
    """The outcome: the exact model first, then every scheme."""

    name: str
    causal: bool
    results: tuple[SchemeResult, ...]
    layers: tuple[LayerResult, ...]
    facts: dict[str, str]
    """What was read and used, in words."""
    versions: dict[str, str]

    @property
    def exact(self) -> float:
        """Loss of the exact model."""
        loss = self.results[0].loss
        assert loss is not None
        return loss

    def added(self, result: SchemeResult) -> float | None:
        """Return the loss that a scheme adds, in nats a token."""
        return None if result.loss is None else result.loss - self.exact


def quantise(config: QuantiseConfig, *, console: Console | None = None) -> Quantisation:
    """Quantise a language model in every scheme asked for, and say what each costs and brings.

    Documents that ranges are calibrated on are never evaluated on; a single document is cut in two.

    Raises: InputError for settings, a model or text that cannot be used; MissingExtraError for an export
        without torchao. A real scheme that does not fit the model, or lacks torchao, is noted in its row.
    """
    config.check()
    torch_ao.quieten()
    console = console or Console()
    with console.status("opening the model and the text"):
        opened = open_model(config.model, dtype=config.dtype, device=config.device, offline=config.offline)
        sample = config.data.sample()
        parts = divide(sample.documents)
        calibration = _calibration(config, opened, parts[0])
        evaluation = list(config.data.batches(opened, parts[1]))
    exact = (head_of(opened.model),) if config.exact_head else None
    try:
        with Progress(console=console, transient=True) as progress:
            judge = _Judge(opened, evaluation, progress)
            results = _results(config, judge, calibration, exact)
            found = _layers(config, judge, calibration, exact) if config.layers else ()
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{opened.device} has too little memory for this; give a smaller batch or context"
        ) from error
    if config.export is not None:
        with console.status("exporting"):
            save_quantised(opened, config.export_scheme, config.export, exact=exact, group=config.group)
    left_out = f", {sample.left_out:,} documents beyond max_bytes left out" if sample.left_out else ""
    return Quantisation(
        name=config.model,
        causal=opened.causal,
        results=results,
        layers=found,
        facts={
            "calibrated on": _amount(parts[0], calibration),
            "evaluated on": _amount(parts[1], evaluation) + left_out,
            "model": f"{type(opened.model).__name__}, {config.dtype}, {opened.device}",
            "static ranges": f"percentile {config.percentile:g}, running over batches with momentum 0.9",
            "head": "exact in every scheme"
            if config.exact_head
            else "quantised (torchao: unless it is tied)",
        },
        versions={**versions(), **torch_ao.version()},
    )


def divide(documents: Sequence[Document]) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Return the documents to calibrate on and those to evaluate on, about half of the bytes each.

    Which is which is drawn from the names; a single document is cut at the end of a line near its middle.
    """
    if len(documents) == 1:
        name, text = documents[0].name, documents[0].text
        cut = text.rfind("\n", len(text) // 4, len(text) // 2) + 1 or len(text) // 2
        return (Document(name, text[:cut]),), (Document(name, text[cut:]),)
    drawn = sorted(documents, key=lambda document: document.rank("calibration"))
    half, size, count = sum(document.size for document in drawn) / 2, 0, 0
    while size < half and count < len(drawn) - 1:
        size += drawn[count].size
        count += 1
    return tuple(drawn[:count]), tuple(drawn[count:])


def head_of(model: Any) -> str:
    """Return the name of the layer that gives the logits.

    Raises: InputError when the model does not tell it.
    """
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and name:
            return name
    raise InputError(f"{type(model).__name__} does not say which layer is its head; leave exact_head off")


def _calibration(config: QuantiseConfig, opened: LanguageModel, documents: Sequence[Document]) -> Batches:
    most = min(config.calibration_batches, sys.maxsize)
    batches = list(islice(config.data.batches(opened, documents), most))
    if len(batches) < (least := min(config.calibration_batches, LEAST_CALIBRATION)):
        raise InputError(
            f"half of the text gives only {len(batches)} calibration batches of {config.data.batch} "
            f"sequences, and {least} are needed; give more text, or a smaller batch or context"
        )
    return batches


def _amount(documents: Sequence[Document], batches: Batches) -> str:
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    word = "document" if len(documents) == 1 else "documents"
    return f"{tokens:,} tokens in {len(batches):,} batches, from {len(documents):,} {word}"


@dataclass(frozen=True)
class _Judge:
    """Measures the loss of a model on the evaluation text, with a bar."""

    opened: LanguageModel
    batches: Batches
    progress: Progress

    def loss(self, model: nn.Module, description: str) -> float:
        shown = self.progress.track(self.batches, description=description)
        nats, tokens = language_loss(replace(self.opened, model=model), shown)
        return nats / tokens


def _results(
    config: QuantiseConfig, judge: _Judge, calibration: Batches, exact: tuple[str, ...] | None
) -> tuple[SchemeResult, ...]:
    model = judge.opened.model
    title = f"{config.dtype}, exact"
    found = {"exact": SchemeResult("exact", title, judge.loss(model, title), torch_ao.size(model), 1.0)}
    real = {"exact": model}
    for scheme in dict.fromkeys(config.schemes):
        title = SCHEMES[scheme]
        if scheme in SIMULATED:
            loss = _simulated_loss(config, judge, calibration, exact, scheme)
            found[scheme] = SchemeResult(scheme, title, loss, None, None, MILDER.get(scheme, ""))
            continue
        try:
            real[scheme] = _real(config, model, exact, scheme)
        except (InputError, MissingExtraError) as error:
            found[scheme] = SchemeResult(scheme, title, None, None, None, str(error))
            continue
        loss = judge.loss(real[scheme], title)
        found[scheme] = SchemeResult(
            scheme, title, loss, torch_ao.size(real[scheme]), None, _note(real[scheme])
        )
    first = next(iter(judge.batches))
    taken = torch_ao.seconds(real, first, rounds=config.rounds)
    for scheme, speed in torch_ao.times_faster(taken, than="exact").items():
        found[scheme] = replace(found[scheme], speed=speed)
    return tuple(found.values())


def _real(config: QuantiseConfig, model: nn.Module, exact: tuple[str, ...] | None, scheme: str) -> nn.Module:
    if scheme == "bfloat16":
        return copy.deepcopy(model).to(torch.bfloat16)
    return torch_ao.convert(model, scheme, exact=exact, group=config.group)


def _note(model: nn.Module) -> str:
    made = torch_ao.converted(model)
    if not made.layers:
        return ""
    exact = f", all linear layers but {', '.join(made.exact)}" if made.exact else ", every linear layer"
    return f"{len(made.layers)} layers hold {100 * made.share:.1f} % of the parameters in integers{exact}"


def _recipe(config: QuantiseConfig, exact: tuple[str, ...] | None, scheme: str) -> Recipe:
    return Recipe(percentile=config.percentile, exact=exact or (), **SIMULATED[scheme])


def _simulated_loss(
    config: QuantiseConfig,
    judge: _Judge,
    calibration: Batches,
    exact: tuple[str, ...] | None,
    scheme: str,
) -> float:
    model = judge.opened.model
    simulation = Simulation(model, _recipe(config, exact, scheme))
    simulation.calibrate(judge.progress.track(calibration, description=f"calibrating {scheme}"))
    with simulation:
        return judge.loss(model, SCHEMES[scheme])


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of a model's layers, in order."""
    patterns = layers(model)
    return [name for name, _ in model.named_modules() if f"{name.rpartition('.')[0]}.*" in patterns]


def _layers(
    config: QuantiseConfig, judge: _Judge, calibration: Batches, exact: tuple[str, ...] | None
) -> tuple[LayerResult, ...]:
    """Quantise each layer, and the head, alone; read its outliers on the evaluation text."""
    model = judge.opened.model
    names = layer_names(model)
    shown = judge.progress.track(judge.batches, description="observing")
    readings = examine(model, shown, attentions=()).readings
    alone = [*names, *(() if config.exact_head else (head_of(model),))]
    loss = partial(judge.loss, model, "one layer at a time")
    added = sensitivity(model, _recipe(config, exact, "static"), calibration, loss, alone)
    return tuple(
        LayerResult(
            name,
            added[name],
            readings[name]["neuron_kurtosis"] if name in readings else None,
            readings[name]["max_median_ratio"] if name in readings else None,
        )
        for name in alone
    )
