"""Several transformer blocks on the same text: trained side by side, observed, quantised, reported."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gramian.data.tokens import Corpus, unigram_entropy
from gramian.errors import InputError
from gramian.nn.blocks import block as registered_block
from gramian.ranks import is_main, on_main
from gramian.tasks.examine import BlockResult, examine
from gramian.tasks.language import (
    Job,
    affordable,
    model_config,
    prepare,
    print_facts,
    run_folder,
    text_facts,
    training_batches,
)
from gramian.tasks.saved_model import publish
from gramian.train.loop import Trainer
from gramian.train.processes import main_first, open_run_once
from gramian.train.run import Run
from gramian.train.side_by_side import train_side_by_side


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Job):
    """Train several blocks side by side, watch their insides, quantise them, and write a report."""

    blocks: tuple[str, ...] = ("pre_norm", "sas", "sas_p", "outlier_protected")
    """Blocks to compare; the first one is what the others are set against."""
    calibration_batches: int = 8
    """Batches of training text that the int8 ranges are taken from."""
    name: str = "compare"
    """Name of the run folder."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        super().check()
        if not self.blocks:
            raise InputError("a comparison needs at least one block; `gramian list` shows them")
        if len(set(self.blocks)) < len(self.blocks):
            raise InputError(f"every block can be compared once, got {', '.join(self.blocks)}")
        for name in self.blocks:
            registered_block(name)
        if self.calibration_batches < 1:
            raise InputError(f"calibration_batches must be at least 1, got {self.calibration_batches}")


@dataclass(frozen=True)
class Comparison:
    """The outcome of a comparison."""

    folder: Path
    results: tuple[BlockResult, ...]
    unigram_entropy: float
    """Nats a token of predicting the validation text by token frequency alone."""
    facts: dict[str, str]
    """What was read, trained and used, in words."""
    records: dict[str, list[dict[str, Any]]]
    """Readings over time, by block."""


def compare(
    config: CompareConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Comparison | None:
    """Run a comparison in its folder; every block has a run folder of its own below it.

    Several processes train together; the main one alone examines the models and gets the comparison.

    Raises: InputError for settings or text that cannot be used; StoppedError after a signal, all blocks
    saved; DivergedError when a loss is not finite, with the last good checkpoints kept.
    """
    config.check()
    console = console or Console(quiet=not is_main())
    folder = run_folder(config.runs, config.name)
    with console.status("reading and tokenising the text"):
        corpus = main_first(config.data.load)
    training_batches(config, corpus)  # like the next line: what does not fit fails before anything is written
    affordable(model_config(config, config.blocks[0], corpus), config.training)
    run = open_run_once(folder, config, resume=resume, overwrite=overwrite)
    trainers = {name: prepare(config, name, corpus, folder / name, resume=resume) for name in config.blocks}
    print_facts(console, text_facts(corpus))
    train_side_by_side(trainers, console)
    for trainer in trainers.values():
        trainer.close()
    found: list[Comparison] = []
    on_main(lambda: found.append(_concluded(config, run, trainers, corpus, console)))
    return found[0] if found else None


def _concluded(
    config: CompareConfig, run: Run, trainers: dict[str, Trainer], corpus: Corpus, console: Console
) -> Comparison:
    """Examine what was trained and write what was found."""
    entropy = unigram_entropy(corpus.train, corpus.validation, corpus.vocabulary)
    results = []
    for name, trainer in trainers.items():
        with console.status(f"observing and quantising {name}"):
            results.append(examine(trainer, config, corpus, config.calibration_batches))
        publish(trainer.run)
        trainer.run.write_result(asdict(results[-1]))
    minutes = sum(trainer.seconds for trainer in trainers.values()) / 60
    comparison = Comparison(
        folder=run.folder,
        results=tuple(results),
        unigram_entropy=entropy,
        facts=_facts(config, corpus, run, minutes),
        records={name: trainer.run.record.read() for name, trainer in trainers.items()},
    )
    run.write_result(
        {
            "unigram_entropy": entropy,
            "facts": comparison.facts,
            "blocks": [asdict(result) for result in results],
        }
    )
    return comparison


def _facts(config: CompareConfig, corpus: Corpus, run: Run, minutes: float) -> dict[str, str]:
    """Say what the numbers were obtained from."""
    training, shape = config.training, config.shape
    tokens = training.steps * training.batch * shape.context
    versions = run.versions
    return {
        **text_facts(corpus),
        "model": f"{shape.depth} layers, width {shape.width}, {shape.heads} heads, context {shape.context}, "
        f"{shape.norm}, {shape.activation}",
        "training": f"{training.steps:,} steps of {training.batch} sequences, {tokens:,} tokens a block",
        "optimiser": f"{training.optimiser}, peak learning rate {training.learning_rate:g}, "
        f"{training.schedule} schedule, weight decay {training.weight_decay:g}, {training.precision}",
        "seed": str(training.seed),
        "training took": f"{minutes:.1f} minutes for all blocks",
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("gramian", "torch", "python")),
    }
