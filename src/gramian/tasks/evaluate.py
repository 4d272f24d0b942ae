"""How well a trained model predicts a text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import track
from torch import Tensor

from gramian.data import text
from gramian.data.objectives import HiddenTokens, NextToken
from gramian.data.tokens import bits_per_byte, bytes_of_tokens, encode
from gramian.errors import InputError
from gramian.files import write_json
from gramian.tasks.language import predict
from gramian.tasks.saved_model import open_saved, tokenizer_of, trained_model


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Read a text with a run's newest weights, all of it in order, and say how well it was predicted."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of `gramian train` (or a block's folder of `gramian compare`)."""
    text: tuple[Path, ...] = ()
    """Text files, folders, .jsonl or .parquet tables; the Python standard library when none is given."""
    column: str = "text"
    """Column of a table that holds the text."""
    pattern: str = "**/*"
    """Glob that a folder's files match."""
    max_bytes: int = 1_000_000
    """Bytes of text taken at most, spread over the documents."""
    batch: int = 8
    """Sequences a forward pass sees."""
    mask_probability: float = 0.15
    """Share of the tokens that is hidden from a run of the masked objective."""
    output: Path | None = None
    """JSON file for the numbers."""


def evaluate(config: EvaluateConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Return the loss in nats a predicted token, bits a byte, and what they were taken over.

    Every stretch of a context's length is read on its own, so that its first tokens have little to go by.

    Raises: InputError for settings, a run or text that cannot be used.
    """
    if config.batch < 1:
        raise InputError(f"batch must be at least 1, got {config.batch}")
    console = console or Console()
    run = open_saved(config.run)
    model, tokenizer = trained_model(run), tokenizer_of(run)
    shape = model.config
    planes = NextToken() if shape.causal else HiddenTokens(shape.vocabulary - 1, config.mask_probability, 0)
    with console.status("reading and tokenising the text"):
        chosen = config.text
        documents = text.read(chosen, config.column, config.pattern) if chosen else text.standard_library()
        taken = text.sample(documents, config.max_bytes)
        tokens = encode(tokenizer, taken.documents)
    batches = list(stretches(tokens.long(), shape.context, config.batch))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    shown = track(batches, "predicting", console=console, transient=True)
    nats, targets = predict(model, (planes(windows, step) for step, windows in enumerate(shown)))
    result = {
        "loss": nats / len(targets),
        "bits_per_byte": bits_per_byte(nats, bytes_of_tokens(tokenizer)[targets]),
        "predicted_tokens": len(targets),
        "documents": len(taken.documents),
        "left_out_documents": taken.left_out,
        "objective": "causal" if shape.causal else "masked",
        "context": shape.context,
    }
    if config.output is not None:
        about = {"run": str(config.run), "text": [str(path) for path in config.text]}
        write_json(config.output, {**about, **result})
    return result


def stretches(tokens: Tensor, context: int, batch: int) -> Iterator[Tensor]:
    """Yield the whole text in order, as batches of windows that overlap by one token; the last is shorter.

    Shapes: tokens (N) -> (≤ batch, context + 1) each, and at the end perhaps (1, 2 … context).
    """
    windows = [tokens[start : start + context + 1] for start in range(0, len(tokens) - 1, context)]
    short = [windows.pop()] if windows and len(windows[-1]) <= context else []
    for first in range(0, len(windows), batch):
        yield torch.stack(windows[first : first + batch])
    yield from (window[None] for window in short)
