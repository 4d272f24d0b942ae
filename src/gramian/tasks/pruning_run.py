"""`gramian prune` on images and tables: train a classifier, prune it density by density, and certify."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gramian.bayes.bounds import finite_union
from gramian.errors import InputError, StoppedError
from gramian.files import atomic_file, write_json
from gramian.ranks import anywhere, is_main, on_main
from gramian.tasks.evidence import Evidence, split_evidence
from gramian.tasks.language import run_folder
from gramian.tasks.pruning import Plan, check, held_out_error, prune
from gramian.tasks.pruning_data import Data, Examples, standardised, standardiser
from gramian.tasks.pruning_files import write_pruned
from gramian.tasks.pruning_networks import Network, build, train_dense
from gramian.tasks.pruning_result import OUTCOME, Pruned, Pruning, pruned_of
from gramian.tasks.self_bounded import Bounding
from gramian.train.processes import open_run_once
from gramian.train.run import read_json
from gramian.train.signals import stop_requests

DENSE = "dense.safetensors"
"""The trained network before it is pruned."""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """The network that is trained before it is pruned."""

    widths: tuple[int, ...] = ()
    """Features of the hidden layers (300, 100), or channels of the convolutions (16, 32)."""
    train_steps: int = 1500
    """Optimiser steps; none leaves the network at random."""
    train_batch: int = 128
    """Examples of a step."""
    train_rate: float = 1e-3
    """Learning rate of Adam at the start; it falls to 0 as a cosine."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if self.train_steps < 0 or self.train_batch < 1 or not self.train_rate > 0:
            raise InputError(
                "training the network needs steps ≥ 0, a batch ≥ 1 and a rate above 0, got "
                f"{self.train_steps}, {self.train_batch} and {self.train_rate}"
            )


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Prune a classifier of images or of a table."""

    model: str = "mlp"
    """Network: mlp or cnn."""
    data: Data = field(default_factory=Data)
    dense: Dense = field(default_factory=Dense)
    densities: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05)
    """Shares of the weights that are kept; one pruned network for each."""
    plan: Plan = field(default_factory=Plan)
    """Its density and bounding are set from the others."""
    certify: bool = False
    """Whether a bound set is kept from the network, and a certificate made with it."""
    prior_fraction: float = 0.5
    """Share of the examples that are not held out which make the network and its prior."""
    bounding: Bounding = field(default_factory=Bounding)
    """How the certificate is made."""
    runs: Path = Path("runs")
    """Folder of run folders."""
    name: str = "prune"
    """Name of the run folder."""

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return run_folder(self.runs, self.name)

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if not self.densities or len({f"{each:g}" for each in self.densities}) < len(self.densities):
            raise InputError(
                "densities have to be numbers that differ in six digits, at least one, got "
                f"{', '.join(map(str, self.densities)) or 'none'}"
            )
        self.dense.check()
        self.bounding.check()
        for density in self.densities:
            self.plan_for(density).check()
        if not 0 <= self.prior_fraction < 1:
            raise InputError(
                f"the prior's fraction of the examples has to be from 0 to below 1, not {self.prior_fraction}"
            )

    def plan_for(self, density: float) -> Plan:
        """Return the plan of one density; priors of several share the confidence."""
        union = finite_union(len(self.densities))
        bounding = replace(self.bounding, union=union) if self.certify else None
        return replace(self.plan, density=density, bounding=bounding)


def prune_classifier(
    config: PruneConfig, console: Console, *, resume: bool = False, overwrite: bool = False
) -> Pruning:
    """Train a classifier, prune it to every density, and certify the random predictors if wished.

    A run that was stopped goes on where it was with `resume`: the trained network and every density that was
    finished are kept. Of several processes the main one has all outcomes, and writes.

    Raises: InputError for settings, data or a folder that cannot be used; StoppedError after a signal.
    """
    config.check()
    examples = config.data.load()
    evidence = evidence_of(config, examples)
    network = Network(config.model, examples.size, examples.classes, config.dense.widths)
    model = build(network, config.plan.seed)
    for density in config.densities:
        check(model, evidence, config.plan_for(density))
    run = open_run_once(config.folder, config, resume=resume, overwrite=overwrite)
    outcomes: list[Pruned] = []
    with stop_requests() as requested, Progress(console=console, transient=True) as progress:
        bar = progress.add_task("training", total=None)

        def watch(what: str, done: int, total: int) -> None:
            progress.update(bar, description=what, completed=done, total=total)

        def stop() -> StoppedError:
            return StoppedError(
                f"stopped by {requested() or 'a signal'}; {len(outcomes)} of {len(config.densities)} "
                f"densities are saved in {run.folder}, pass --resume to go on"
            )

        def stopped() -> bool:
            return requested() is not None

        def trained() -> dict[str, Tensor]:
            if not dense_of(config, model, evidence, run.folder / DENSE, watch, stopped):
                raise stop()
            return model.state_dict()

        model.load_state_dict(on_main(trained))
        dense = held_out_error(model, evidence)
        for density in config.densities:
            place = run.folder / f"density-{density:g}"
            if anywhere(is_main() and (place / OUTCOME).exists()):
                outcomes += [pruned_of(read_json(place / OUTCOME))] if is_main() else []
                continue
            if anywhere(stopped()):
                raise stop()
            current = deepcopy(model)
            found = prune(
                current,
                evidence,
                config.plan_for(density),
                watch=lambda what, done, total, at=density: watch(f"density {at:g}: {what}", done, total),
                stopped=stopped,
            )
            if found is None:
                raise stop()
            on_main(partial(_write, outcomes, place, current, network, model, examples, evidence, found))
    return Pruning(
        title=f"{config.model} {'-'.join(map(str, network.widths))} on {examples.name}",
        examples={
            "prior": len(evidence.prior),
            "bound": 0 if evidence.split is None else evidence.split.n,
            "held_out": len(evidence.held_out),
        },
        dense=dense,
        outcomes=tuple(outcomes),
    )


def _write(
    outcomes: list[Pruned],
    place: Path,
    pruned: nn.Sequential,
    network: Network,
    dense: nn.Sequential,
    examples: Examples,
    evidence: Evidence,
    found: Pruned,
) -> None:
    """Write what became of a density, and add it to the outcomes."""
    exported = write_pruned(
        place,
        pruned,
        network,
        dense,
        evidence.x[evidence.held_out],
        scaling=standardiser(examples, evidence.prior),
        names=examples.names,
    )
    outcomes.append(replace(found, export=asdict(exported)))
    write_json(place / OUTCOME, asdict(outcomes[-1]))


def evidence_of(config: PruneConfig, examples: Examples) -> Evidence:
    """Divide examples into prior, bound and held-out ones, and standardise them by the prior set alone.

    Raises: InputError when the bound set would be too small, and without prior examples for inputs whose
        range is not known before.
    """
    if config.certify:
        return split_evidence(examples, config.prior_fraction, config.data.seed)
    known = examples.known
    return Evidence(standardised(examples, known), examples.y, known, examples.held_out)


def dense_of(
    config: PruneConfig,
    model: nn.Module,
    evidence: Evidence,
    place: Path,
    watch: Callable[[str, int, int], Any],
    stopped: Callable[[], bool],
) -> bool:
    """Train the network on the prior examples, or read the one that was trained before.

    Returns whether it is there; of a training that was stopped nothing is kept.

    Raises: InputError for a file that is damaged; DivergedError when the loss is not finite.
    """
    if place.exists():
        try:
            model.load_state_dict(load_file(place))
        except (SafetensorError, RuntimeError) as error:
            raise InputError(f"{place} is damaged; remove it to train the network again") from error
        return True
    steps = config.dense.train_steps if len(evidence.prior) else 0
    if steps:
        train_dense(
            model,
            evidence.x[evidence.prior],
            evidence.y[evidence.prior],
            steps=steps,
            batch=config.dense.train_batch,
            rate=config.dense.train_rate,
            seed=config.plan.seed,
            advanced=lambda step: watch("training the network", step, steps),
            stopped=stopped,
        )
        if stopped():
            return False
    state: dict[str, Tensor] = {name: value.contiguous() for name, value in model.state_dict().items()}
    with atomic_file(place) as temporary:
        save_file(state, temporary)
    return True
