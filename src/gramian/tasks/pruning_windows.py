"""Windows of text for pruning a language model: those that made it, and those that it never read.

`gramian train` keeps the weights of its last step, whatever the validation loss was, so no weight was chosen
by validation text. But its evaluations read some of that text, and whoever ran it saw the losses: only
windows that no evaluation read can be evidence. Windows that stand word for word in the training text, such
as those of a file that is there twice, are left out as well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from gramian.bayes.split import Split
from gramian.data.objectives import NextToken
from gramian.data.text import read, sample
from gramian.data.tokens import Corpus, Windows, encode
from gramian.errors import InputError
from gramian.tasks.language import Text
from gramian.tasks.saved_model import tokenizer_of
from gramian.train.run import Run

LEAST = 8
"""Windows of a bound set, and held-out ones, at least."""
FACTOR = 6364136223846793005
"""Odd factor of the hash of a window, whose arithmetic is modulo 2⁶⁴."""

Planes = Int[Tensor, "windows planes tokens"]
"""Inputs, targets, and the numbers of documents where a run keeps them apart."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """Which text is evidence, and how much of it."""

    text: tuple[Path, ...] = ()
    """Text that the run never read, as files, folders, .jsonl or .parquet tables; what is left of the run's
    own validation text when none is given. Windows of which half stands in the run's text are left out."""
    column: str = "text"
    """Column of a table that holds the text."""
    pattern: str = "**/*"
    """Glob that a folder's files match."""
    max_bytes: int = 4_000_000
    """Bytes of the text taken at most, spread over the documents."""
    context: int | None = None
    """Tokens of a window; the run's context when not given."""
    bound: int = 1024
    """Windows of the bound set at most."""
    held_out: int = 256
    """Windows that losses are reported on at most, and no more than a quarter of the unread ones."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        for name in ("bound", "held_out"):
            if getattr(self, name) < LEAST:
                raise InputError(f"{name} must be at least {LEAST} windows, got {getattr(self, name)}")
        if self.context is not None and self.context < 1:
            raise InputError(f"a window needs a context of at least 1 token, got {self.context}")


@dataclass(frozen=True, eq=False)
class WindowSets:
    """Windows of context + 1 tokens, and what each may be used for.

    They are numbered: first the ⌊N/context⌋ of the training text, then those of the other text, evaluated
    ones first.
    """

    training: Windows
    """Of the training text, by step."""
    objective: NextToken
    bound: Planes
    """Drawn at random from the unread windows."""
    held_out: Planes
    """The unread windows that are not in the bound set, as many as are wanted."""
    unread: int
    """Windows that bound and held-out ones were drawn from."""
    split: Split
    """By number: what may make the prior, and the bound set."""
    seen: Int[Tensor, " seen"]
    """Numbers of the windows that the run was trained on or evaluated by."""
    token_bytes: Int[Tensor, " vocabulary"]
    name: str
    """Of the text."""
    facts: dict[str, str]
    """What was found, in words."""

    def sample(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the training text for a step."""
        return divided(self.objective(self.training(step), step))

    def batches(self, size: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Return a function that gives inputs and targets of the bound set for a step, drawn by the seed."""

        def batch(step: int) -> tuple[Tensor, Tensor]:
            stream = torch.Generator().manual_seed(seed * 1_000_003 + step)
            return divided(self.bound[torch.randint(len(self.bound), (size,), generator=stream)])

        return batch


def divided(planes: Planes) -> tuple[Tensor, Tensor]:
    """Return the inputs, with the numbers of documents if there are any, and the targets.

    Shapes: (n, 2 or 3, T) -> (n, 1 or 2, T), (n, T).
    """
    return torch.cat((planes[:, :1], planes[:, 2:]), 1), planes[:, 1]


def window_sets(run: Run, amount: Amount, *, context: int, batch: int, seed: int) -> WindowSets:
    """Read the text of a decoder's run and divide it into what made the run and what it never read.

    Args:
        run: of `gramian train`, or of a block of `gramian compare`.
        amount: which text is evidence, and how much.
        context: the run's.
        batch: windows of a step on training text.
        seed: of the order of training windows, and of which unread windows are bound and held-out ones.

    Raises: InputError for a run whose text is not there any more or has changed, a context beyond the run's,
        and when too few windows are left that it never read.
    Holds: exactly: no bound or held-out window has a predicted token in common with an evaluated one, and
        none stands word for word in the training text.
    """
    amount.check()
    length = context if amount.context is None else amount.context
    if length > context:
        raise InputError(f"windows of {length} tokens are longer than the run's context of {context}")
    corpus = corpus_of(run)
    tokens, name, evaluated = _evidence(run, amount, corpus)
    rows = epoch(tokens, context)
    evaluated = min(evaluated, len(rows))
    known = occurring(rows, corpus.train)
    if amount.text:
        known |= _partly(rows, corpus.train) | _partly(rows, epoch(corpus.validation, context).flatten())
    known[:evaluated] = False
    fresh = (~known[evaluated:]).nonzero() + evaluated
    left_out = (
        f"{evaluated:,} that the run was evaluated by, {int(known.sum()):,} that stand in its "
        f"{'text' if amount.text else 'training text'}"
    )
    parts = context // length
    windows = rows.unfold(1, length + 1, length).flatten(0, 1)
    fresh = (fresh * parts + torch.arange(parts)).flatten()
    if len(fresh) < 4 * LEAST:
        raise InputError(
            f"of {len(rows):,} windows of the {name} {len(fresh) // parts} are left without {left_out}, and "
            f"{4 * LEAST} are needed; give more text that the run never read"
        )
    held = min(amount.held_out, len(fresh) // 4)
    order = fresh[torch.randperm(len(fresh), generator=torch.Generator().manual_seed(seed))]
    bound = order[held:][: amount.bound].sort().values
    trained = len(corpus.train) // length
    seen = torch.arange(trained + evaluated * parts)
    planes = NextToken(bool(run.settings["separate_documents"]))
    return WindowSets(
        training=Windows(corpus.train, length, batch, seed),
        objective=planes,
        bound=planes(windows[bound], 0),
        held_out=planes(windows[order[:held]], 0),
        unread=len(fresh),
        split=Split(seen, trained + bound, seed),
        seen=seen,
        token_bytes=corpus.token_bytes,
        name=name,
        facts={
            "evidence": f"{len(rows):,} windows of {context} tokens of the {name}, without {left_out}",
            "examples": f"{len(bound):,} bound and {held:,} held-out windows of {length} tokens, drawn at "
            f"random from the {len(fresh):,} left",
        },
    )


def _evidence(run: Run, amount: Amount, corpus: Corpus) -> tuple[Tensor, str, int]:
    """Return the tokens of a text, its name, and how many windows of it the run's evaluations read."""
    if amount.text:
        documents = sample(read(amount.text, amount.column, amount.pattern), amount.max_bytes).documents
        first, *others = amount.text
        more = f" and {len(others)} more" if others else ""
        return encode(corpus.tokenizer, documents), f"text in {first}{more}", 0
    settings = run.settings
    read_first = settings["evaluation_batches"] * settings["training"]["batch"]
    return corpus.validation, f"validation text of {corpus.name}", read_first


def _partly(rows: Tensor, tokens: Tensor) -> Tensor:
    """Tell which windows have a half in a text: those of the same text cut at other places do."""
    half = rows.shape[1] // 2
    return occurring(rows[:, :half], tokens) | occurring(rows[:, -half:], tokens)


def corpus_of(run: Run) -> Corpus:
    """Return the text of a run, read again and tokenised.

    Raises: InputError for settings without a text, text that cannot be read, and one whose vocabulary is not
        the run's: it has changed since.
    """
    try:
        found: dict[str, Any] = run.settings["data"]
        text = Text(**{**found, "text": tuple(Path(path) for path in found["text"])})
    except (KeyError, TypeError) as error:
        raise InputError(f"the settings of {run.folder} do not say which text it was trained on") from error
    corpus = text.load()
    if corpus.tokenizer.to_str() != tokenizer_of(run).to_str():
        raise InputError(
            f"the text that {run.folder} was trained on has changed since: its vocabulary is another now, "
            "and what the run read cannot be told any more"
        )
    return corpus


def epoch(tokens: Int[Tensor, " tokens"], context: int) -> Int[Tensor, "windows window"]:
    """Return the windows of a text in the order in which evaluations read them.

    Shapes: (N) -> (⌊N/context⌋, context + 1).
    Raises: InputError for fewer than context + 1 tokens.
    Holds: exactly: the first b·k are those of k batches of b windows of `language.validation`, where the text
        has as many.
    """
    windows = Windows(tokens, context, 1, seed=0)
    return torch.cat([windows(number) for number in range(len(windows))])


def occurring(windows: Int[Tensor, "windows window"], tokens: Int[Tensor, " tokens"]) -> Tensor:
    """Tell which windows stand word for word, at any place, in a text.

    Shapes: (n, w), (N) -> (n).
    Holds: exactly, but for hashes of 64 bits that are equal by chance.
    """
    width = windows.shape[1]
    places = max(0, len(tokens) - width + 1)
    here = torch.zeros(len(windows), dtype=torch.int64)
    there = torch.zeros(places, dtype=torch.int64)
    for k in range(width):
        here = here * FACTOR + windows[:, k] + 1
        there = there * FACTOR + tokens[k : places + k] + 1
    return torch.isin(here, there)
