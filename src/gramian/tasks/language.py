"""Language models on a user's text: what to read, what to build, how to train and judge it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramian.data.tokens import Corpus, Windows, bits_per_byte, load_corpus
from gramian.errors import InputError
from gramian.files import write_json, write_text
from gramian.nn.blocks import block as registered_block
from gramian.nn.blocks import gains
from gramian.nn.transformer import Shape, Transformer, TransformerConfig, build
from gramian.observe.probe import Probe
from gramian.train.checkpoint import checkpoints, load_weights
from gramian.train.loop import Trainer, Training
from gramian.train.run import Run, open_run, read_json
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
    evaluation_batches: int = 24
    """Batches of validation text that every evaluation reads, the same ones each time."""
    runs: Path = Path("runs")
    """Folder of run folders."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        self.training.check()
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
    return TransformerConfig(vocabulary=corpus.vocabulary, block=block, **asdict(job.shape))


def run_folder(runs: Path, name: str) -> Path:
    """Return the folder of a run.

    Raises: InputError for a name that is no plain folder name.
    """
    if not name or name in (".", "..") or Path(name).name != name:
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


def language_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean loss of predicting each next token, in nats a token.

    Shapes: windows (batch, T + 1) -> ().
    """
    logits = model(windows[:, :-1])
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@dataclass(frozen=True)
class Validation:
    """A fixed sample of the validation text."""

    windows: Windows
    batches: int
    token_bytes: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the batches: random windows without repetition, or the whole text in order if it is short."""
        if len(self.windows) >= self.batches * self.windows.batch:
            return (self.windows(step) for step in range(self.batches))
        return self.windows.in_order(self.batches)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the loss in nats a token and in bits a byte."""
        device = next(model.parameters()).device
        nats, targets = 0.0, []
        with torch.no_grad():
            for windows in self:
                nats += language_loss(model, windows.to(device)).item() * windows[:, 1:].numel()
                targets.append(windows[:, 1:].flatten())
        tokens = torch.cat(targets)
        return {
            "validation_loss": nats / len(tokens),
            "bits_per_byte": bits_per_byte(nats, self.token_bytes[tokens]),
        }


def training_windows(job: Job, corpus: Corpus) -> Windows:
    """Return the batches that a job trains on.

    Raises: InputError when the text is shorter than one context.
    """
    return Windows(corpus.train, job.shape.context, job.training.batch, job.training.seed)


def validation(job: Job, corpus: Corpus) -> Validation:
    """Return the validation sample of a job."""
    windows = Windows(corpus.validation, job.shape.context, job.training.batch, seed=0)
    return Validation(windows, job.evaluation_batches, corpus.token_bytes)


def prepare(
    job: Job, block: str, corpus: Corpus, folder: Path, *, resume: bool, overwrite: bool = False
) -> Trainer:
    """Make or open the run folder of one block and return its trainer.

    Raises: InputError for settings that do not fit, before anything is written.
    """
    shape = model_config(job, block, corpus)
    model = build(shape, job.training.seed)
    batches = training_windows(job, corpus)
    judge = validation(job, corpus)
    probe = Probe(model, "blocks.*", attentions="**.mixing", every=job.training.observe_every)

    def evaluate(forward: nn.Module) -> dict[str, Any]:
        return {**judge(forward), "gains": [gains(layer) for layer in model.blocks]}

    shared = {each.name: getattr(job, each.name) for each in fields(Job)}
    config = TrainConfig(**shared, block=block, name=folder.name)
    run = open_run(folder, config, resume=resume, overwrite=overwrite)
    write_json(folder / "model.json", asdict(shape))
    write_text(folder / "tokenizer.json", corpus.tokenizer.to_str())
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
    )


def train(
    config: TrainConfig, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Run:
    """Train one language model in a run folder.

    Raises: InputError for settings or text that cannot be used; StoppedError after a signal, saved;
    DivergedError when the loss is not finite, with the last good checkpoint kept.
    """
    console = console or Console()
    config.check()
    registered_block(config.block)
    folder = run_folder(config.runs, config.name)
    with console.status("reading and tokenising the text"):
        corpus = config.data.load()
    trainer = prepare(config, config.block, corpus, folder, resume=resume, overwrite=overwrite)
    print_facts(console, text_facts(corpus))
    train_side_by_side({config.block: trainer}, console)
    trainer.close()
    trainer.run.write_result({**trainer.latest, "tokens_per_second": trainer.tokens_per_second})
    return trainer.run


def trained_model(run: Run) -> Transformer:
    """Return the model of a run with the weights of its newest checkpoint, on the CPU in evaluation mode.

    Raises: InputError when the run has no checkpoint or it cannot be read.
    """
    saved = checkpoints(run.checkpoints)
    if not saved:
        raise InputError(f"the run {run.folder} has no checkpoint yet")
    try:
        shape = TransformerConfig(**read_json(run.folder / "model.json"))
    except TypeError as error:
        raise InputError(f"{run.folder / 'model.json'} does not describe a transformer: {error}") from error
    model = Transformer(shape)
    load_weights(saved[-1].folder, model)
    return model.eval()
