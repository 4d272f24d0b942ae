"""What is read off a trained language model: its loss, its insides, and what int8 does to it."""

from dataclasses import dataclass

from gramian.compress.recipe import Recipe
from gramian.compress.simulate import Simulation
from gramian.data.tokens import Corpus
from gramian.observe.probe import Readings, observe
from gramian.tasks.language import Job, training_batches, validation
from gramian.tasks.saved_model import trained_model
from gramian.train.loop import Trainer


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
    """Nats a token with weights and all activations in int8 (static W8A8, one scale a tensor, exact head)."""
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


def examine(trainer: Trainer, job: Job, corpus: Corpus, calibration_batches: int) -> BlockResult:
    """Read and quantise the trained model of one run, on the validation text.

    Raises: InputError when the run has no checkpoint.
    """
    model = trained_model(trainer.run).to(trainer.device)
    judge = validation(job, corpus)
    loss = judge(model)
    inputs = (batch[:, 0].to(trainer.device) for batch in judge)
    readings = observe(model, inputs, streams="blocks.*", attentions="**.mixing")
    batches = training_batches(job, corpus)
    calibration = (batches(step)[:, 0].to(trainer.device) for step in range(calibration_batches))
    with Simulation(model, Recipe(exact=("head",))).calibrate(calibration):
        int8 = judge(model)
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
