"""Tokens of documents: a byte-level vocabulary learnt from the training text, and windows to train on."""

import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import tokenizers
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from gramian.data import text
from gramian.data.text import Document
from gramian.errors import InputError
from gramian.files import atomic_file
from gramian.memory import check_memory
from gramian.reading import check_regular

END = "<|endoftext|>"
"""The special token, id 0, that follows every document."""

SMALLEST_VOCABULARY = 257
"""All bytes and `END`."""

FORMAT = "gramian tokens 1"


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens of a text, split by document, with the vocabulary learnt from the training side alone."""

    name: str
    train: Int[Tensor, " train"]
    validation: Int[Tensor, " validation"]
    """Ids as 32-bit integers; `END` closes every document."""
    tokenizer: Tokenizer
    token_bytes: Int[Tensor, " vocabulary"]
    """Bytes of text that each token stands for; 0 for `END`."""
    train_documents: int
    validation_documents: int
    skipped: int
    """Files and rows that hold no text."""
    left_out: int
    """Documents beyond max_bytes."""
    bytes: int
    """Size of the text taken, in UTF-8."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens, at most what was asked."""
        return len(self.token_bytes)


def load_corpus(
    paths: Iterable[str | Path] = (),
    *,
    vocabulary: int = 4096,
    max_bytes: int = 100_000_000,
    column: str = "text",
    pattern: str = "**/*",
    cache: bool = True,
) -> Corpus:
    """Read documents, split them, learn a byte-level BPE vocabulary on the training side and encode both.

    Without paths the text is the Python standard library of the running interpreter. `paths` may name text
    files, .jsonl and .parquet tables (their `column`) and folders (their files that match `pattern`).
    Beyond `max_bytes` documents are left out, chosen by their names and counted. With `cache` the tokens are
    kept under $GRAMIAN_CACHE (or $XDG_CACHE_HOME/gramian, ~/.cache/gramian) by a digest of text and settings.

    Shapes: train (tokens), validation (tokens), token_bytes (vocabulary).
    Raises: InputError for text that cannot be read or is none, a vocabulary below 257 or max_bytes below 1;
    MissingExtraError for .parquet without pyarrow.
    Holds: exactly: the same text and settings give the same tokens, and the tokens give back the text.
    Source: byte-level BPE as in Radford et al. 2019 (GPT-2), section 2.2.
    """
    if vocabulary < SMALLEST_VOCABULARY:
        raise InputError(f"a vocabulary needs at least {SMALLEST_VOCABULARY} tokens, got {vocabulary}")
    check_memory(64.0 * vocabulary, f"a vocabulary of {vocabulary:,} tokens")
    chosen = [Path(path) for path in ((paths,) if isinstance(paths, (str, Path)) else paths)]
    documents = text.read(chosen, column, pattern) if chosen else text.standard_library()
    taken = text.sample(documents, max_bytes)
    sides = text.split(taken.documents)
    entry = cache_folder() / f"{_digest(sides, vocabulary)}.safetensors"
    built = _load(entry) if cache else None
    if built is None:
        built = _build(sides, vocabulary)
        if cache:
            _save(entry, *built)
    tokenizer, train, validation = built
    return Corpus(
        name=", ".join(path.name or str(path) for path in chosen) or text.standard_library_name(),
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        token_bytes=bytes_of_tokens(tokenizer),
        train_documents=len(sides[0]),
        validation_documents=len(sides[1]),
        skipped=taken.skipped,
        left_out=taken.left_out,
        bytes=sum(document.size for side in sides for document in side),
    )


def bytes_of_tokens(tokenizer: Tokenizer) -> Int[Tensor, " vocabulary"]:
    """Return the bytes of text that each token of a byte-level vocabulary stands for; 0 for special ones.

    The byte-level alphabet writes each byte as one character.
    """
    special = tokenizer.get_added_tokens_decoder()
    sizes = [
        0 if token in special else len(tokenizer.id_to_token(token) or "")
        for token in range(tokenizer.get_vocab_size())
    ]
    return torch.tensor(sizes)


def _pieces(document: Document, length: int = 1 << 16) -> Iterator[str]:
    """Cut a text at ends of lines into pieces of about `length` characters, which bounds the memory used."""
    start, size = 0, len(document.text)
    while start < size:
        stop = document.text.find("\n", start + length) + 1 or size
        yield document.text[start:stop]
        start = stop


def _build(sides: Sequence[Sequence[Document]], vocabulary: int) -> tuple[Tokenizer, Tensor, Tensor]:
    """Return the vocabulary learnt from the first side, and the tokens of both."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for document in sides[0] for piece in _pieces(document)), trainer)
    tokenizer.encode_special_tokens = True  # a text may contain END; there it is plain text
    train, validation = (encode(tokenizer, side) for side in sides)
    return tokenizer, train, validation


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> Int[Tensor, " tokens"]:
    """Return the ids of the documents in their order, each followed by `END`."""
    ids: list[np.ndarray] = []
    for document in documents:
        ids += [
            np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch_fast([*_pieces(document)])
        ]
        ids.append(np.zeros(1, np.int32))
    return torch.from_numpy(np.concatenate(ids))


def cache_folder() -> Path:
    """Return where tokens are kept: $GRAMIAN_CACHE, $XDG_CACHE_HOME/gramian or ~/.cache/gramian."""
    if named := os.environ.get("GRAMIAN_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gramian"


def _digest(sides: Sequence[Sequence[Document]], vocabulary: int) -> str:
    """Return a name for the tokens that every text, split and setting they depend on changes."""
    digest = hashlib.sha256(f"{FORMAT} tokenizers {tokenizers.__version__} {vocabulary}".encode())
    for side in sides:
        digest.update(f"|{len(side)}".encode())
        for document in side:
            digest.update(f"|{document.size}|".encode() + document.text.encode())
    return digest.hexdigest()


def _checksum(tokenizer: str, train: Tensor, validation: Tensor) -> str:
    digest = hashlib.sha256(tokenizer.encode())
    for tokens in (train, validation):
        digest.update(f"|{tokens.dtype}{tuple(tokens.shape)}|".encode() + tokens.numpy().tobytes())
    return digest.hexdigest()


def _save(entry: Path, tokenizer: Tokenizer, train: Tensor, validation: Tensor) -> None:
    """Keep the tokens; where that is not possible the next run only has to make them again."""
    written = tokenizer.to_str()
    about = {"tokenizer": written, "checksum": _checksum(written, train, validation)}
    try:
        with atomic_file(entry) as temporary:
            save_file({"train": train, "validation": validation}, temporary, about)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"the tokens could not be kept in {entry.parent}: {error}", stacklevel=3)


def _load(entry: Path) -> tuple[Tokenizer, Tensor, Tensor] | None:
    """Return the tokens kept, or None where there are none or they are damaged."""
    try:
        check_regular(entry)
        with safe_open(entry, "pt") as file:
            about = file.metadata() or {}
            train, validation = file.get_tensor("train"), file.get_tensor("validation")
        if about.get("checksum") != _checksum(about.get("tokenizer", ""), train, validation):
            return None
    except (OSError, SafetensorError, TypeError, ValueError):  # an InputError among them
        return None
    tokenizer = Tokenizer.from_str(about["tokenizer"])
    tokenizer.encode_special_tokens = True
    return tokenizer, train, validation


class Windows:
    """Batches of windows of context + 1 tokens, as a pure function of the step.

    The tokens form a ring. An epoch starts at a random place of it and takes its ⌊N/context⌋
    non-overlapping windows, each once, in random order; window i of step t is number t·batch + i of the
    endless row of epochs. A window's last token is the next one's first, so that every token is predicted
    at most once an epoch. Resuming at a step needs nothing but the step.

    Shapes: tokens (N), windows(step) -> (batch, context + 1).
    Raises: InputError for fewer than context + 1 tokens, and when context, batch or seed is out of range.
    Holds: exactly.
    """

    def __init__(self, tokens: Int[Tensor, " tokens"], context: int, batch: int, seed: int = 0):
        if context < 1 or batch < 1 or seed < 0:
            raise InputError(f"windows need context ≥ 1, batch ≥ 1, seed ≥ 0, got {context}, {batch}, {seed}")
        if len(tokens) <= context:
            raise InputError(
                f"the text has {len(tokens)} tokens and a window of context {context} needs {context + 1}; "
                "give more text or a shorter context"
            )
        self.tokens, self.context, self.batch, self.seed = tokens, context, batch, seed
        self._starts = lru_cache(maxsize=2)(self._draw)

    def __len__(self) -> int:
        """Return the number of windows an epoch has."""
        return len(self.tokens) // self.context

    def _draw(self, epoch: int) -> np.ndarray:
        """Return where the windows of an epoch start, in their order."""
        random = np.random.default_rng((self.seed, epoch))
        return random.integers(len(self.tokens)) + self.context * random.permutation(len(self))

    def _at(self, starts: np.ndarray) -> Int[Tensor, "windows length"]:
        places = torch.from_numpy(starts)[:, None] + torch.arange(self.context + 1)
        return self.tokens[places % len(self.tokens)].long()

    def __call__(self, step: int) -> Int[Tensor, "batch length"]:
        """Return the windows of a step, counted from 0."""
        numbers = range(step * self.batch, (step + 1) * self.batch)
        return self._at(np.array([self._starts(n // len(self))[n % len(self)] for n in numbers]))

    def in_order(self, batches: int) -> Iterator[Int[Tensor, "batch length"]]:
        """Yield the first batches of the text from its start, fewer (the last one shorter) at its end."""
        starts = np.arange((len(self.tokens) - 1) // self.context) * self.context
        for first in range(0, min(batches * self.batch, len(starts)), self.batch):
            yield self._at(starts[first : first + self.batch])


def unigram_entropy(
    train: Int[Tensor, " train"], validation: Int[Tensor, " validation"], vocabulary: int
) -> float:
    """Return the loss of predicting each validation token by its frequency alone, in nats a token.

    H = −mean_t log p(v_t),   p(k) = (count_k + 1) / (N + vocabulary)
    Shapes: (N), (M) -> a number: the loss a language model must beat to have used any context.
    Holds: exactly.
    """
    counts = torch.bincount(train, minlength=vocabulary).double() + 1
    return float(-(counts / counts.sum()).log()[validation.long()].mean())


def bits_per_byte(nats: float, target_bytes: Int[Tensor, "..."]) -> float:
    """Return a summed loss per byte of the text it predicts, which does not depend on the vocabulary.

    bits/byte = Σ nats / (ln 2 · Σ bytes),   target_bytes = corpus.token_bytes[targets]
    Shapes: (…) -> a number.
    Raises: InputError when the targets stand for no byte.
    Holds: exactly.
    """
    size = int(target_bytes.sum())
    if size == 0:
        raise InputError("bits per byte need targets that stand for at least one byte of text")
    return nats / math.log(2) / size
