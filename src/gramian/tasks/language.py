"""Language models on a user's text: what to read, what to build, how to train and judge it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramian.data.objectives import IGNORED, HiddenTokens, NextToken, Objective
from gramian.data.tokens import Corpus, Windows, bits_per_byte, load_corpus
from gramian.errors import DivergedError, InputError, StoppedError
from gramian.memory import check_memory
from gramian.nn.blocks import block as registered_block
from gramian.nn.blocks import gains
from gramian.nn.transformer import Shape, TransformerConfig, build
from gramian.observe.probe import Probe
from gramian.ranks import is_main, on_main, ranks
from gramian.tasks.saved_model import describe, publish
from gramian.train.loop import Trainer, Training
from gramian.train.processes import main_first, open_run_once
from gramian.train.run import Run
from gramian.train.side_by_side import train_side_by_side


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is read."""

    text: tuple[Path, ...] = ()
    """Text files, folders, .jsonl or .parquet tables; the Python standard library when none is given."""
    column: str = "text"
    """Column of a table that holds the text."""
    pattern: str = "**/*"
    """Glob that a folder's files match."""
    max_bytes: int = 6_000_000
    """Bytes of text taken at most, spread over the documents."""
    vocabulary: int = 2048
    """Tokens of the byte-level BPE vocabulary."""

    def load(self) -> Corpus:
        """Read, split and tokenise the text, or take the tokens from the cache."""
        return load_corpus(
            self.text,
            vocabulary=self.vocabulary,
            max_bytes=self.max_bytes,
            column=self.column,
            pattern=self.pattern,
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every job on text is told."""

    data: Text = field(default_factory=Text)
    shape: Shape = field(default_factory=Shape)
    training: Training = field(default_factory=Training)
    objective: str = "causal"
    """causal predicts each next token (a decoder), masked predicts hidden tokens (an encoder)."""
    mask_probability: float = 0.15
    """Share of the tokens that the masked objective hides."""
    separate_documents: bool = False
    """Whether the documents that share a window are kept from seeing each other."""
    evaluation_batches: int = 24
    """Batches of validation text that every evaluation reads, the same ones each time."""
    runs: Path = Path("runs")
    """Folder of run folders."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        self.training.check()
        if self.objective not in ("causal", "masked"):
            raise InputError(f"unknown objective {self.objective!r}; choose causal or masked")
        if not 0 < self.mask_probability < 1:
            raise InputError(f"mask_probability must lie between 0 and 1, got {self.mask_probability:g}")
        if self.evaluation_batches < 1:
            raise InputError(f"evaluation_batches must be at least 1, got {self.evaluation_batches}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Job):
    """Train one language model."""

    block: str = "pre_norm"
    """Block of the transformer; `gramian list` shows them."""
    name: str = "train"
    """Name of the run folder."""


def model_config(job: Job, block: str, corpus: Corpus) -> TransformerConfig:
    """Return the transformer that a job builds of one block for a text.

    Raises: InputError as `TransformerConfig`.
    """
    causal = job.objective == "causal"
    vocabulary = corpus.vocabulary if causal else corpus.vocabulary + 1  # with the mask token
    return TransformerConfig(vocabulary=vocabulary, block=block, causal=causal, **asdict(job.shape))


def affordable(shape: TransformerConfig, training: Training) -> None:
    """Refuse a transformer or batch that no memory here holds, before any of it is allocated.

        bytes ≥ s P + (b/a) T (8 V + 4 L (5 w + m))

    P parameters, s = 16 bytes each for weight, gradient and two moments (8 for optimisers that keep fewer), L
    blocks of width w with m hidden features, b/a sequences of T tokens at once, V tokens of the vocabulary.

    Readings are 100 bytes a look at the loss and 400 bytes a block and observation.

    Raises: InputError with what is needed.
    """
    width, state = shape.width, 16 if training.optimiser in ("adamw", "soap", "shampoo") else 8
    what = f"training {shape.depth:,} blocks of width {width:,} on a vocabulary of {shape.vocabulary:,}"
    check_memory(state * shape.least_parameters / ranks(), what)
    kept = width if training.gradient_checkpointing else 5 * width + (shape.mlp_width or 4 * width)
    number, at_once = 2 if training.precision == "bf16" else 4, training.batch // training.accumulation
    needed = at_once * shape.context * number * (2 * shape.vocabulary + shape.depth * kept) / ranks()
    rows = training.steps // training.log_every + 4 * shape.depth * training.steps // training.observe_every
    check_memory(100.0 * rows, f"the readings of {training.steps:,} steps")  # a file and a page hold them all
    check_memory(needed, f"{what}, {at_once:,} sequences of {shape.context:,} tokens at once,")


def objective(job: Job, corpus: Corpus, seed: int) -> Objective:
    """Return what a job's model is to predict in a window of the text."""
    if job.objective == "causal":
        return NextToken(job.separate_documents)
    return HiddenTokens(corpus.vocabulary, job.mask_probability, seed, job.separate_documents)


def run_folder(runs: Path, name: str) -> Path:
    """Return the folder of a run.

    Raises: InputError for a name that is no plain folder name, or of a hidden folder.
    """
    if not name.isprintable() or name[:1] in ("", ".") or Path(name).name != name:
        raise InputError(f"a run's name must be a plain folder name, got {name!r}")
    return runs / name


def text_facts(corpus: Corpus) -> dict[str, str]:
    """Say what was read, and what of it was not taken."""
    left = f"; {corpus.left_out:,} beyond max_bytes left out" if corpus.left_out else ""
    skipped = f"; {corpus.skipped:,} files or rows without text skipped" if corpus.skipped else ""
    sides = f"{corpus.train_documents:,} training, {corpus.validation_documents:,} validation"
    tokens = f"{len(corpus.train):,} training, {len(corpus.validation):,} validation"
    return {
        "text": f"{corpus.name}, {corpus.bytes:,} bytes",
        "documents": sides + left + skipped,
        "tokens": f"{tokens}; vocabulary {corpus.vocabulary:,}",
    }


def print_facts(console: Console, facts: dict[str, str]) -> None:
    """Print what was read, a fact a line."""
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", markup=False, highlight=False)


def language_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean loss of the targets that are to be predicted, in nats a token.

    Shapes: batch (batch, 2 or 3, T), inputs, targets and perhaps documents -> ().
    """
    inputs, targets, *documents = batch.unbind(1)
    logits = model(inputs, documents=documents[0]) if documents else model(inputs)
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def predicted(batch: Tensor) -> int:
    """Return how many targets of a batch are to be predicted."""
    return int((batch[:, 1] != IGNORED).sum())


def predict(model: nn.Module, batches: Iterable[Tensor]) -> tuple[float, Tensor]:
    """Return the summed loss in nats over batches, and the tokens that were predicted."""
    device = next(model.parameters()).device
    nats, found = 0.0, []
    with torch.no_grad():
        for batch in batches:
            targets = batch[:, 1][batch[:, 1] != IGNORED]
            nats += language_loss(model, batch.to(device)).item() * len(targets)
            found.append(targets)
    return nats, torch.cat(found)


@dataclass(frozen=True)
class Validation:
    """A fixed sample of the validation text."""

    windows: Windows
    objective: Objective
    batches: int
    token_bytes: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the batches: random windows without repetition, or the whole text in order if it is short."""
        windows = self.windows.in_order(self.batches)
        if len(self.windows) >= self.batches * self.windows.batch:
            windows = map(self.windows, range(self.batches))
        return map(self.objective, windows, count())

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the loss in nats a predicted token and in bits a byte of those tokens."""
        nats, tokens = predict(model, self)
        return {
            "validation_loss": nats / len(tokens),
            "bits_per_byte": bits_per_byte(nats, self.token_bytes[tokens]),
        }


def training_batches(job: Job, corpus: Corpus) -> Callable[[int], Tensor]:
    """Return the batches that a job trains on, by step.

    Raises: InputError when the text is shorter than one context.
    """
    seed = job.training.seed
    windows = Windows(corpus.train, job.shape.context, job.training.batch, seed)
    planes = objective(job, corpus, seed)
    return lambda step: planes(windows(step), step)


def validation(job: Job, corpus: Corpus) -> Validation:
    """Return the validation sample of a job."""
    windows = Windows(corpus.validation, job.shape.context, job.training.batch, seed=0)
    return Validation(windows, objective(job, corpus, 0), job.evaluation_batches, corpus.token_bytes)


def prepare(
    job: Job, block: str, corpus: Corpus, folder: Path, *, resume: bool, overwrite: bool = False
) -> Trainer:
    """Make or open the run folder of one block and return its trainer.

    Raises: InputError for settings that do not fit, before anything is written.
    """
    shape = model_config(job, block, corpus)
    affordable(shape, job.training)
    model = build(shape, job.training.seed)
    model.gradient_checkpointing = job.training.gradient_checkpointing
    batches = training_batches(job, corpus)
    judge = validation(job, corpus)
    probe = Probe(model, "blocks.*", attentions="**.mixing", every=job.training.observe_every)

    def evaluate(forward: nn.Module) -> dict[str, Any]:
        return {**judge(forward), "gains": [gains(layer) for layer in model.blocks]}

    shared = {each.name: getattr(job, each.name) for each in fields(Job)}
    config = TrainConfig(**shared, block=block, name=folder.name)
    run = open_run_once(folder, config, resume=resume, overwrite=overwrite)
    on_main(lambda: describe(folder, shape, corpus.tokenizer))
    return Trainer(
        model,
        language_loss,
        batches,
        evaluate,
        probe,
        job.training,
        run,
        tokens=job.training.batch * job.shape.context,
        resume=resume,
        count=predicted,
    )


def train(
    config: TrainConfig, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Run:
    """Train one language model in a run folder.

    Raises: InputError for settings or text that cannot be used; StoppedError after a signal, saved;
    DivergedError when the loss is not finite, with the last good checkpoint kept.
    """
    console = console or Console(quiet=not is_main())
    config.check()
    registered_block(config.block)
    folder = run_folder(config.runs, config.name)
    with console.status("reading and tokenising the text"):
        corpus = main_first(config.data.load)
    trainer = prepare(config, config.block, corpus, folder, resume=resume, overwrite=overwrite)
    print_facts(console, text_facts(corpus))
    with _published(trainer.run):
        train_side_by_side({config.block: trainer}, console)
    trainer.close()
    result = {**trainer.latest, "tokens_per_second": trainer.tokens_per_second}
    on_main(lambda: trainer.run.write_result(result))
    return trainer.run


@contextmanager
def _published(run: Run) -> Iterator[None]:
    """Publish the newest checkpoint however training ends; all processes wait where all end alike."""
    try:
        yield
    except (StoppedError, DivergedError):
        on_main(lambda: publish(run))
        raise
    except BaseException:
        if is_main():
            publish(run)
        raise
    on_main(lambda: publish(run))
