"""A decoder under pruning masks: which layers carry them, what windows of text cost it, and its export."""

from collections.abc import Callable
from dataclasses import dataclass
from gzip import compress
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramian.bayes.risk import clipped_cross_entropy
from gramian.compress.density import sizes_of
from gramian.compress.masks import add_masks, draw, export_state, masks_of, set_mode
from gramian.compress.structures import Columns, Weights
from gramian.files import atomic_file
from gramian.nn.transformer import Transformer, TransformerConfig
from gramian.ranks import spread
from gramian.tasks.pruning import structure_of
from gramian.tasks.pruning_files import Exported
from gramian.tasks.pruning_result import Layer
from gramian.tasks.pruning_windows import Planes, divided
from gramian.tasks.saved_model import WEIGHTS, describe, tokenizer_of
from gramian.tasks.self_bounded import agree_
from gramian.train.run import Run

TOGETHER = 50
"""Windows that one process reads after another."""

NO_SMALLER = (
    "attention and MLPs keep their sizes; zeros save storage once the file is compressed, but no time"
)


class Decoder(nn.Module):
    """A transformer that reads tokens, and the numbers of their documents if there are any, as one tensor.

    Shapes: (n, 1 or 2, T) -> logits (n, T, vocabulary).
    Holds: exactly.
    """

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, planes: Int[Tensor, "n planes tokens"]) -> Float[Tensor, "n tokens vocabulary"]:
        """Return the logits at every position."""
        tokens, *documents = planes.unbind(1)
        return self.transformer(tokens, documents=documents[0] if documents else None)


@dataclass(frozen=True, eq=False)
class Losses:
    """What the next tokens of each window cost, the mean over its positions."""

    nats: Float[Tensor, " n"]
    clipped: Float[Tensor, " n"]
    """Clipped at p_min and scaled to [0, 1]."""

    @property
    def mean(self) -> float:
        """Mean clipped loss."""
        return self.clipped.double().mean().item()

    def minus(self, other: "Losses") -> tuple[float, float]:
        """Return the mean difference of clipped losses on the same windows, and its standard error."""
        difference = self.clipped.double() - other.clipped.double()
        return difference.mean().item(), difference.std().item() / len(difference) ** 0.5


def window_losses(model: nn.Module, planes: Planes, p_min: float, batch: int) -> Losses:
    """Return what each window costs under the mask that a model has now."""
    return _losses(model, planes, p_min, batch, lambda done: None)


def drawn_losses(
    model: nn.Module,
    planes: Planes,
    p_min: float,
    generator: torch.Generator,
    advanced: Callable[[int], None] = lambda draws: None,
) -> Losses:
    """Return what each window costs under a mask drawn for it alone; processes share the windows.

    A mask takes about as long to draw as a window to read, so sharing masks between windows would save half
    of the time at most, and windows under one mask are not independent draws.

    Raises: InputError when the model has no masks.
    """
    agree_(model, generator)
    set_mode(model, "sample")
    parts = planes.split(TOGETHER)

    def read(number: int) -> dict[str, Tensor]:
        def before(done: int) -> None:
            draw(model, generator)
            advanced(number * TOGETHER + done)

        losses = _losses(model, parts[number], p_min, 1, before)
        return {"nats": losses.nats, "clipped": losses.clipped}

    def passing(number: int) -> None:
        for _ in parts[number]:
            draw(model, generator)

    found = spread(read, range(len(parts)), passing)
    return Losses(*(torch.cat([each[name] for each in found]) for name in ("nats", "clipped")))


@torch.no_grad()
def _losses(
    model: nn.Module, planes: Planes, p_min: float, batch: int, before: Callable[[int], None]
) -> Losses:
    nats, clipped = [], []
    for number, part in enumerate(planes.split(batch)):
        before(number)
        inputs, targets = moved(divided(part), model)
        logits = model(inputs)
        own = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        nats.append(own.reshape(targets.shape).mean(1).cpu())
        clipped.append(clipped_cross_entropy(logits, targets, p_min).mean(1).cpu())
    return Losses(torch.cat(nats), torch.cat(clipped))


def add_decoder_masks(model: Decoder, structure: str, *, trainable: bool = False) -> None:
    """Put masks on the linear layers of attention and MLPs; of heads, on the projections after attention.

    Raises: InputError as `compress.masks.add_masks`.
    """
    shape: TransformerConfig = model.transformer.config
    layers, kind = "transformer.blocks.*", Weights()
    if structure == "heads":
        layers, kind = "transformer.blocks.*.projection", Columns(shape.width // shape.heads)
    elif structure != "weights":
        kind = structure_of(structure)
    add_masks(model, layers=layers, structure=kind, weights="trainable" if trainable else "frozen")


def layers_of(model: Decoder) -> list[Layer]:
    """Return what the masks keep now, and the mean λ, by layer."""
    sizes, found = sizes_of(model), []
    for name, mask in masks_of(model).items():
        kept, units = int(mask.kept.sum()), mask.kept.numel()
        chance = float(mask.probabilities.detach().double().mean())
        found.append(
            Layer(name.removeprefix("transformer."), units * sizes[name], kept * sizes[name], chance)
        )
    return found


def write_decoder(folder: Path, model: Decoder, dense: Decoder, source: Run) -> Exported:
    """Write a masked decoder into a folder as a plain one with zeros, which Hugging Face's tools open."""
    states = [_state(dense.state_dict(), dense), _state(export_state(model), dense)]
    before, after = (save(state, {"format": "pt"}) for state in states)
    describe(folder, dense.transformer.config, tokenizer_of(source))
    with atomic_file(folder / WEIGHTS) as temporary:
        temporary.write_bytes(after)
    counts = [sum(int(value.count_nonzero()) for value in state.values()) for state in states]
    return Exported(
        parameters=sum(value.numel() for value in states[1].values()),
        nonzero_before=counts[0],
        nonzero=counts[1],
        bytes=len(after),
        compressed_before=len(compress(before)),
        compressed=len(compress(after)),
        reason=NO_SMALLER,
    )


def _state(state: dict[str, Tensor], model: Decoder) -> dict[str, Tensor]:
    """Return the tensors of a file, a tied head left out as in a run folder."""
    left_out = {"transformer.head.weight"} if model.transformer.config.tied else set()
    return {name: value.cpu().contiguous() for name, value in state.items() if name not in left_out}


def moved(batch: tuple[Tensor, Tensor], model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return inputs and targets where the model is."""
    inputs, targets = batch
    return inputs.to(device_of(model)), targets.to(device_of(model))


def device_of(model: nn.Module) -> torch.device:
    """Return where the model is."""
    return next(model.parameters()).device
