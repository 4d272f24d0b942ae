"""Many short trainings that differ in one thing or another, each in a run folder of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from gramian.data.tokens import Corpus
from gramian.errors import DivergedError, InputError
from gramian.nn.transformer import Shape
from gramian.tasks.examine import BlockResult, examine
from gramian.tasks.language import Job, prepare
from gramian.tasks.saved_model import publish
from gramian.train.loop import Training
from gramian.train.run import Run
from gramian.train.side_by_side import train_side_by_side


@dataclass(frozen=True)
class Trial:
    """One way to train: a block, and what differs from the job in shape and training."""

    name: str
    block: str
    training: Mapping[str, Any] = field(default_factory=dict)
    shape: Mapping[str, Any] = field(default_factory=dict)

    def job(self, job: Job, seed: int) -> Job:
        """Return the job as this trial does it with one seed."""
        return replace(
            job,
            shape=replace(job.shape, **self.shape),
            training=replace(job.training, **{**self.training, "seed": seed}),
        )


def provoking() -> Job:
    """Return a job of minutes in which a small pre-norm model grows outlier neurons.

    The learning rate is high and stays so after a short warm-up, nothing is decayed, and the head has a
    matrix of its own.
    """
    training = Training(
        steps=800,
        learning_rate=3e-3,
        schedule="constant",
        weight_decay=0.0,
        evaluate_every=200,
        observe_every=50,
        checkpoint_every=400,
        keep=1,
    )
    return Job(shape=Shape(tied=False), training=training, evaluation_batches=16)


Outcomes = dict[str, list[BlockResult | None]]
"""trial -> what was found, by seed; None where training diverged."""


def run_trials(
    job: Job, trials: Sequence[Trial], seeds: Sequence[int], corpus: Corpus, folder: Path, console: Console
) -> Outcomes:
    """Train and examine every trial with every seed; what a stopped study has done is not done again.

    A trial's folder is folder/seed-S/name; a diverged one is recorded there as such and left behind.

    Raises: InputError for settings that cannot be used, before anything is trained; StoppedError after a
        signal, saved.
    """
    names = [trial.name for trial in trials]
    if len(set(names)) < len(names):
        raise InputError(f"every trial needs a name of its own, got {', '.join(names)}")
    for trial in trials:
        trial.job(job, 0).check()
    outcomes: Outcomes = {name: [] for name in names}
    for seed in seeds:
        for number, trial in enumerate(trials, 1):
            place = folder / f"seed-{seed}" / trial.name
            console.print(f"seed {seed}, trial {number} of {len(trials)}: {trial.name}", highlight=False)
            outcomes[trial.name].append(_outcome(trial, trial.job(job, seed), corpus, place, console))
    return outcomes


def _outcome(trial: Trial, job: Job, corpus: Corpus, place: Path, console: Console) -> BlockResult | None:
    """Train one trial, or go on with it, or read what it found before."""
    trainer = prepare(job, trial.block, corpus, place, resume=True)
    known = Run(place).result()
    if known is not None:
        return None if "diverged" in known else BlockResult(**known)
    try:
        train_side_by_side({trial.name: trainer}, console)
    except DivergedError as error:
        console.print(str(error), highlight=False, markup=False)
        trainer.run.write_result({"diverged": str(error)})
        return None
    finally:
        trainer.close()
    result = examine(trainer, job, corpus, calibration_batches=16)
    publish(trainer.run)
    trainer.run.write_result(asdict(result))
    return result
