"""Several transformer blocks on the same text: trained side by side, observed, quantised, reported."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gramian.compress.quantise import quantise
from gramian.data.tokens import Corpus, unigram_entropy
from gramian.errors import InputError
from gramian.nn.blocks import block as registered_block
from gramian.observe.probe import Readings, observe
from gramian.tasks.language import (
    Job,
    Validation,
    model_config,
    prepare,
    print_facts,
    run_folder,
    text_facts,
    training_batches,
    validation,
)
from gramian.tasks.saved_model import publish, trained_model
from gramian.train.loop import Trainer
from gramian.train.run import Run, open_run
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
class BlockResult:
    """What was found for one block."""

    block: str
    block_parameters: int
    """Numbers learnt in the blocks, embeddings and head left out."""
    parameters: int
    """Numbers learnt in all."""
    tokens_per_second: float
    """Median training throughput."""
    validation_loss: float
    """Nats a token at the end."""
    bits_per_byte: float
    int8_loss: float
    """Nats a token with the blocks' linear layers in int8 (W8A8)."""
    max_neuron_kurtosis: float
    """Largest over the layers, on validation text at the end."""
    max_median_ratio: float
    """Largest over the layers, on validation text at the end."""
    readings: Readings
    """All readings on validation text at the end, by site."""

    @property
    def int8_gap(self) -> float:
        """Loss added by int8, in nats a token."""
        return self.int8_loss - self.validation_loss


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
) -> Comparison:
    """Run a comparison in its folder; every block has a run folder of its own below it.

    Raises: InputError for settings or text that cannot be used; StoppedError after a signal, all blocks
    saved; DivergedError when a loss is not finite, with the last good checkpoints kept.
    """
    config.check()
    console = console or Console()
    folder = run_folder(config.runs, config.name)
    with console.status("reading and tokenising the text"):
        corpus = config.data.load()
    judge = validation(config, corpus)
    training_batches(config, corpus)  # like the next line: what does not fit fails before anything is written
    model_config(config, config.blocks[0], corpus)
    run = open_run(folder, config, resume=resume, overwrite=overwrite)
    trainers = {name: prepare(config, name, corpus, folder / name, resume=resume) for name in config.blocks}
    entropy = unigram_entropy(corpus.train, corpus.validation, corpus.vocabulary)
    print_facts(console, text_facts(corpus))
    train_side_by_side(trainers, console)
    results = []
    for name, trainer in trainers.items():
        trainer.close()
        with console.status(f"observing and quantising {name}"):
            results.append(_examine(trainer, config, corpus, judge))
        publish(trainer.run)
        trainer.run.write_result(asdict(results[-1]))
    minutes = sum(trainer.seconds for trainer in trainers.values()) / 60
    comparison = Comparison(
        folder=folder,
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


def _examine(trainer: Trainer, config: CompareConfig, corpus: Corpus, judge: Validation) -> BlockResult:
    """Read and quantise the trained model of one block."""
    model = trained_model(trainer.run).to(trainer.device)
    loss = judge(model)
    inputs = (batch[:, 0].to(trainer.device) for batch in judge)
    readings = observe(model, inputs, streams="blocks.*", attentions="**.mixing")
    batches = training_batches(config, corpus)
    calibration = (batches(step)[:, 0].to(trainer.device) for step in range(config.calibration_batches))
    int8 = judge(quantise(model, calibration, skip=("head",)))
    streams = [values for values in readings.values() if "neuron_kurtosis" in values]
    return BlockResult(
        block=model.config.block,
        block_parameters=model.block_parameters(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens_per_second=trainer.tokens_per_second,
        validation_loss=loss["validation_loss"],
        bits_per_byte=loss["bits_per_byte"],
        int8_loss=int8["validation_loss"],
        max_neuron_kurtosis=max(values["neuron_kurtosis"] for values in streams),
        max_median_ratio=max(values["max_median_ratio"] for values in streams),
        readings=readings,
    )


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
