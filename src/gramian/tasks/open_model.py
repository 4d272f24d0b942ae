"""Any language model of Hugging Face's formats, opened for reading together with its tokenizer."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramian.data.text import Document, Sample, read, sample, standard_library
from gramian.errors import InputError
from gramian.memory import check_memory
from gramian.offline import offline as told_offline
from gramian.reading import check_inside
from gramian.tasks.model_folder import (
    check_files,
    check_finite,
    check_vocabulary,
    configuration,
    kind_of,
    loaded,
    located,
    quiet,
    tokenizer_of,
)

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

IGNORED = -100
"""The target of a place that is not to be predicted."""

HIDDEN = 0.15
"""Share of an encoder's tokens that is hidden."""

LONGEST = 512
"""Tokens of a sequence at most, where the user names no context."""

PIECE = 1 << 16
"""Characters tokenised at once, about."""

UNLIMITED = 2048
"""Context of a model that has no table of positions and names no limit."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A language model with its tokenizer, opened for reading."""

    name: str
    """What the user typed, for reports."""
    model: nn.Module
    """In evaluation mode on `device`; called as model(input_ids=…, attention_mask=…), it returns .logits."""
    tokenizer: Any
    """A tokenizer of transformers."""
    context: int
    """Tokens that a sequence may have at most."""
    causal: bool
    """Decoder, which predicts the next token, or encoder, which predicts hidden ones."""
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which text a model reads, and how much of it at once."""

    text: tuple[Path, ...] = ()
    """Text files, folders, .jsonl or .parquet tables; the Python standard library when none is given."""
    column: str = "text"
    """Column of a table that holds the text."""
    pattern: str = "**/*"
    """Glob that a folder's files match."""
    max_bytes: int = 200_000
    """Bytes of text taken at most, spread over the documents."""
    batch: int = 8
    """Sequences a forward pass sees."""
    context: int | None = None
    """Tokens of a sequence at most; the model's own limit, but no more than 512, when not given."""

    def sample(self) -> Sample:
        """Return the documents taken.

        Raises: InputError for text that cannot be read or is none; MissingExtraError for .parquet.
        """
        chosen = self.text
        found = read(chosen, self.column, self.pattern) if chosen else standard_library()
        return sample(found, self.max_bytes)

    def batches(self, opened: LanguageModel, documents: Sequence[Document]) -> Iterator[dict[str, Tensor]]:
        """Yield the documents as the arguments of a model; see the function of this name."""
        context = min(opened.context, LONGEST) if self.context is None else self.context
        return batches(opened, documents, context=context, batch=self.batch)


def open_model(
    where: str, *, dtype: str = "float32", device: str = "auto", offline: bool = False
) -> LanguageModel:
    """Open the language model in a folder (Hugging Face's or a run's), or one of the hub by its id.

    Weights are read from safetensors alone, no code of the folder is run, and nothing is left at random: a
    checkpoint that lacks a weight, or has one that the model does not know, is refused. A hub id is asked for
    only where no such path exists; `offline`, or GRAMIAN_OFFLINE=1 or HF_HUB_OFFLINE=1 in the environment,
    takes what was fetched earlier.

    Raises: InputError, in one sentence, for a folder that is missing or holds no language model, no
        tokenizer or only weights in a format that can run code, for weights that are missing, damaged or
        not finite, for a tokenizer with more tokens than the model, and for an unknown dtype or device.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    place = device_of(device)
    folder = located(where, offline or told_offline())
    for path in folder.iterdir():
        check_inside(path, folder)
    with quiet():
        config = configuration(folder)
        kind, causal = kind_of(folder, config)
        check_files(folder)
        model = loaded(folder, config, kind, DTYPES[dtype])
        tokenizer = tokenizer_of(folder)
    check_finite(folder, model, dtype)
    check_vocabulary(folder, model, tokenizer)
    model.config.use_cache = False  # whole texts are read: what generation would keep only takes memory
    context = _context(model)
    return LanguageModel(where, model.eval().to(place), tokenizer, context, causal, place)


def device_of(name: str) -> torch.device:
    """Return the device of a name; "auto" is the first CUDA device, or the CPU where there is none.

    Raises: InputError for a name that is no device, or a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device {name!r} cannot be used here; accepted are auto, cpu, and where present cuda or mps"
        ) from error
    if device.type == "meta":
        raise InputError("device 'meta' holds no numbers; accepted are auto, cpu, cuda and mps")
    return device


def _context(model: Any) -> int:
    """Return how long a sequence may be; some encoders keep rows of their position table for padding."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions")
    limits = [limit for name in names if isinstance(limit := getattr(config, name, None), int) and limit > 0]
    limit = limits[0] if limits else UNLIMITED
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            padding = module.padding_idx
            limit = min(limit, module.num_embeddings - (0 if padding is None else padding + 1))
    return limit


def batches(
    opened: LanguageModel, documents: Sequence[Document], *, context: int, batch: int
) -> Iterator[dict[str, Tensor]]:
    """Yield a text as the arguments of the model, in order, made as they are asked for.

    Each document is read on its own, in stretches of at most `context` tokens; a stretch begins, and for an
    encoder ends, with the special tokens that the tokenizer puts there. Shorter ones are padded on the right.
    What looks like a special token in a text is plain text.

    Shapes: input_ids and attention_mask (≤ batch, T ≤ context), 1 at real tokens.
    Raises: InputError for a batch below 1, a context that leaves no room or exceeds the model's, and, at the
        end, for a text that gave no tokens.
    """
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    if context > opened.context:
        raise InputError(
            f"context {context} is longer than the {opened.context} tokens {opened.name} can take"
        )
    before, after = _frame(opened)
    if (room := context - len(before) - len(after)) < 1 or context < 2:
        raise InputError(f"context {context} leaves no room for text; {len(before) + len(after) + 2} would")
    return _batches(opened, documents, room, batch)


def _batches(
    opened: LanguageModel, documents: Sequence[Document], room: int, batch: int
) -> Iterator[dict[str, Tensor]]:
    before, after = _frame(opened)
    rows: list[list[int]] = []
    found = False
    for document in documents:
        for stretch in _stretches(opened.tokenizer, document, room):
            found = True
            rows.append([*before, *stretch, *after])
            if len(rows) == batch:
                yield _padded(opened, rows)
                rows = []
    if rows:
        yield _padded(opened, rows)
    if not found:
        raise InputError(f"the tokenizer of {opened.name} makes no token of the text given")


def _stretches(tokenizer: Any, document: Document, room: int) -> Iterator[list[int]]:
    """Yield a document's tokens, `room` at a time; a long one is tokenised in pieces that end a line."""
    held: list[int] = []
    start, size = 0, len(document.text)
    while start < size:
        stop = document.text.find("\n", start + PIECE) + 1 or size
        piece = document.text[start:stop]
        held += tokenizer(piece, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        whole = len(held) - len(held) % room
        for first in range(0, whole, room):
            yield held[first : first + room]
        held, start = held[whole:], stop
    if held:
        yield held


def _frame(opened: LanguageModel) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts around a text, before it alone for a decoder."""
    bare = opened.tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = opened.tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1 if bare else 0):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], [] if opened.causal else whole[start + len(bare) :]
    return [], []


def _padded(opened: LanguageModel, rows: list[list[int]]) -> dict[str, Tensor]:
    tokenizer, longest = opened.tokenizer, max(map(len, rows))
    vocabulary = len(tokenizer)
    check_memory(
        4.0 * len(rows) * longest * vocabulary,
        f"the logits of {len(rows):,} sequences of {longest:,} tokens at once, for {vocabulary:,} tokens,",
    )
    padding = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)
    ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids.to(opened.device), "attention_mask": real.to(opened.device)}


def language_loss(
    opened: LanguageModel, batches: Iterable[dict[str, Tensor]], *, seed: int = 0
) -> tuple[float, int]:
    """Return the loss in nats, summed over the tokens predicted, and their number.

    −Σ log p(token | what the model sees), over every real token but each sequence's first (decoder), or over
    15 % of the tokens, drawn by the seed and hidden as in training: 80 % masked, 10 % random, 10 % as
    they are (encoder).

    Raises: InputError when there is no token to predict, and for an encoder without a mask token.
    Holds: exactly; equal batches and seeds hide the same tokens from every model.
    Source: for encoders Devlin et al. 2018, arXiv 1810.04805, section 3.1.
    """
    generator = torch.Generator().manual_seed(seed)
    nats, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            inputs, targets = _targets(opened, batch, generator)
            logits = opened.model(**inputs).logits
            for scores, wanted in zip(logits, targets.to(logits.device), strict=True):
                chosen = wanted != IGNORED
                scores = scores[chosen]
                scores = scores.float() if scores.itemsize < 4 else scores
                nats += float(cross_entropy(scores, wanted[chosen], reduction="none").double().sum())
                count += int(chosen.sum())
    if not count:
        raise InputError(f"the text given has no token for {opened.name} to predict")
    return nats, count


def _targets(
    opened: LanguageModel, batch: dict[str, Tensor], generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the model's arguments and what it is to predict at each place."""
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    if opened.causal:
        targets = torch.full_like(ids, IGNORED)
        targets[:, :-1] = torch.where(real[:, 1:] & real[:, :-1], ids[:, 1:], IGNORED)
        return batch, targets
    if opened.tokenizer.mask_token_id is None:
        raise InputError(f"the tokenizer of {opened.name} has no mask token to hide others by")
    draw, how = (torch.rand(ids.shape, generator=generator).to(ids.device) for _ in range(2))
    random = torch.randint(len(opened.tokenizer), ids.shape, generator=generator).to(ids.device)
    special = torch.isin(ids, torch.tensor(opened.tokenizer.all_special_ids, device=ids.device))
    chosen = real & ~special & (draw < HIDDEN)
    shown = torch.where(how < 0.8, opened.tokenizer.mask_token_id, torch.where(how < 0.9, random, ids))
    inputs = {**batch, "input_ids": torch.where(chosen, shown, ids)}
    return inputs, torch.where(chosen, ids, IGNORED)
