"""Fields and grids of pixels fitted to the views of a scan, all members of an ensemble in one loop."""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from accelerate import Accelerator
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.files import atomic_file
from gramian.memory import check_memory
from gramian.nn.field import Field, ImageField, PixelGrid
from gramian.nn.field_encodings import Encoding, FourierFeatures, HashGrid, Sine
from gramian.nn.field_members import Members
from gramian.tasks.observed_views import Observed
from gramian.train.loop import Trainer, Training
from gramian.train.run import Run, open_run
from gramian.train.side_by_side import train_side_by_side

LAYER = 1000
"""Bytes that the objects of one layer take at least, whatever its width."""

BEST = "best.safetensors"
"""Parameters of all members where unseen views were predicted best."""

RATES = {"pixels": 5e-2, "hash": 1e-2, "fourier": 1e-3, "sine": 3e-4}
"""Learning rates of Adam when none is given."""

DEPTHS = {"hash": 0, "fourier": 2, "sine": 2}
"""Hidden layers after the first when no depth is given."""

VARIATION = 8.0
"""Weight of total variation where nothing chooses it."""
FINISH_RATE = 0.3
"""Learning rate of the finish as a share of the first."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """The function of coordinates that becomes the image."""

    encoding: str = "hash"
    """hash: a pyramid of learned grids; fourier: fixed random waves; sine: layers of sines."""
    width: int = 64
    """Units of a hidden layer."""
    depth: int | None = None
    """Hidden layers after the first; none for hash, whose grids do their work, and 2 else when not given."""
    dropout: float = 0.05
    """Rate of dropout, where the uncertainty is told by it."""
    levels: int = 8
    """Grids of the pyramid."""
    features: int = 4
    """Learned numbers at a node of a grid."""
    entries: int = 2**18
    """Longest table of a grid."""
    waves: int = 363
    """Random waves of a fourier encoding."""
    omega: float = 40.0
    """Standard deviation of the waves' frequencies, or the factor inside sines."""
    output: str = "sigmoid"
    """What makes values of outputs: sigmoid, or hard_sigmoid, which reaches 0 and 1."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if self.encoding not in RATES or self.encoding == "pixels":
            raise InputError(f"unknown encoding {self.encoding!r}; choose hash, fourier or sine")
        what = f"a field of {self.layers:,} layers of width {self.width:,} on its {self.encoding} encoding"
        check_memory(4.0 * self.least_parameters + LAYER * max(self.layers, self.levels), what)
        self.build(8, 0, dropout=True)

    @property
    def layers(self) -> int:
        """Hidden layers after the first."""
        return DEPTHS[self.encoding] if self.depth is None else self.depth

    @property
    def least_parameters(self) -> int:
        """Numbers that a field has at least, whatever the size of its image."""
        encoded = {"hash": self.levels * self.features, "fourier": 2 * self.waves, "sine": 2}[self.encoding]
        return self.width * (encoded + self.layers * self.width)

    @torch.random.fork_rng(devices=[])  # layers draw a start from the global generator before the seed's
    def build(self, size: int, seed: int, *, dropout: bool) -> ImageField:
        """Return a field with weights drawn by a seed; fixed waves are those of seed 0."""
        encoding: Encoding
        if self.encoding == "hash":
            coarsest = min(8, size)
            encoding = HashGrid(
                self.levels, self.features, self.entries, coarsest=coarsest, finest=size, seed=seed
            )
        elif self.encoding == "fourier":
            encoding = FourierFeatures(self.waves, self.omega, seed=0)
        else:
            encoding = Sine(2, self.width, self.omega, first=True)
            encoding.initialise_(torch.Generator().manual_seed(seed))
        return Field(
            encoding,
            self.width,
            self.layers,
            dropout=self.dropout if dropout else 0.0,
            activation=partial(Sine, omega=self.omega) if self.encoding == "sine" else "silu",
            output=self.output,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a field or a grid of pixels is fitted."""

    variation: float | None = None
    """Weight of total variation in nats for each unit, of images in units of their peak. When not given, that
    which suits FISTA-TV where it leaves out views in turn; 8 without unseen views."""
    steps: int = 1000
    """Optimiser steps, each with all views."""
    learning_rate: float | None = None
    """Of Adam at its highest; 0.05 for pixels, 0.01 for hash, 0.001 for fourier when not given."""
    finish: float = 0.5
    """Further steps as a share of these, from the best parameters and with the views that were unseen too."""
    coarse: float = 0.4
    """Share of the steps, the first, that see pixels of twice the side."""
    patience: float = 0.5
    """Share of the steps after which a fit ends when unseen views were predicted no better."""
    chunk: int | None = None
    """Pixels that go through a network at a time, to save memory; all when not given."""
    precision: str = "fp32"
    """Arithmetic of the network: fp32, or bf16 for autocast."""
    device: str = "auto"
    """auto takes a GPU when there is one; cpu never does."""
    seed: Annotated[int, tyro.conf.arg(name="fit-seed")] = 0
    """Seed of weights, dropout and samples."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if not 0 <= self.coarse < 1 or not 0 < self.patience <= 1 or not 0 <= self.finish <= 10:
            raise InputError(
                "the share of coarse steps is from 0 to below 1, the patience above 0 and at most 1 and the "
                f"finish from 0 to 10, got {self.coarse:g}, {self.patience:g} and {self.finish:g}"
            )
        if not 0 <= self.weight < math.inf:
            raise InputError(
                f"the weight of total variation has to be finite and at least 0, not {self.weight:g}"
            )
        self.training("hash").check()

    @property
    def weight(self) -> float:
        """Weight of total variation that is used."""
        return VARIATION if self.variation is None else self.variation

    @property
    def place(self) -> torch.device:
        """Where it is done."""
        return Accelerator(cpu=self.device == "cpu").device

    def training(self, kind: str) -> Training:
        """Return the settings of the loop."""
        every = max(1, self.steps // 20)
        return Training(
            steps=self.steps,
            batch=1,
            learning_rate=RATES[kind] if self.learning_rate is None else self.learning_rate,
            schedule="cosine",
            weight_decay=0.0,
            betas=(0.9, 0.99),
            eps=1e-15,  # gradients of a table's entries are tiny, and Adam should not see their scale
            clip=float("inf"),
            precision=self.precision,
            device=self.device,
            seed=self.seed,
            evaluate_every=every,
            checkpoint_every=every,
            keep=1,
            log_every=min(10, every),
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """What determines a fit, beside the scan."""

    pixels: bool = False
    members: int = 1
    dropout: bool = False
    network: Network = field(default_factory=Network)
    fit: Fit = field(default_factory=Fit)

    @property
    def kind(self) -> str:
        """What is fitted: pixels, or the encoding of a field."""
        return "pixels" if self.pixels else self.network.encoding

    def weighed(self, variation: float) -> "Job":
        """Return it with a weight of total variation, unless it was given."""
        if self.fit.variation is not None:
            return self
        return replace(self, fit=replace(self.fit, variation=variation))

    def least_numbers(self, size: int, pixels: int) -> int:
        """Return how many numbers a member holds at least in a fit, at pixels inside the outline."""
        if self.pixels:
            return 4 * size**2
        inside = 0 if self.fit.chunk is not None else pixels * self.network.width * (self.network.layers + 1)
        return 4 * self.network.least_parameters + inside // (2 if self.fit.precision == "bf16" else 1)

    def field(self, size: int, member: int) -> ImageField:
        """Return a member at its start."""
        if self.pixels:
            return PixelGrid(size, output=self.network.output)
        return self.network.build(size, self.fit.seed * 1_000 + member, dropout=self.dropout)

    def build(self, observed: Observed) -> Members:
        """Return all members at their start."""
        fields = [self.field(observed.size, member) for member in range(self.members)]
        blocks = (1, 2) if self.fit.coarse and observed.size % 2 == 0 else (1,)
        inside = None if observed.inside is None else observed.inside.cpu()
        return Members(fields, observed.size, blocks=blocks, mask=inside, chunk=self.fit.chunk)


@dataclass(frozen=True, eq=False)
class Fitted:
    """Members with the parameters that predict unseen views best, or the last ones without any."""

    members: Members
    job: Job
    seconds: float
    """Of training."""
    steps: int
    """Taken."""
    best: int
    """Step of the parameters."""
    misfit: float | None
    """Of unseen views, a ray."""


def fit(job: Job, observed: Observed, folder: Path, console: Console, start: Members | None = None) -> Fitted:
    """Fit all members, with progress; a fit that was stopped goes on, one that has ended is read.

    Raises: StoppedError after a signal, saved; DivergedError for a loss that is not finite; InputError for
        settings that cannot be used.
    """
    trainer = prepare(job, observed, folder, start)
    try:
        train_side_by_side({job.kind: trainer}, console)
    finally:
        trainer.close()
    return fitted(job, observed, trainer)


def finish(fitted: Fitted, observed: Observed, folder: Path, console: Console) -> Fitted:
    """Go on from the best members with all views, for what the unseen ones have to add.

    Raises: as `fit`.
    """
    rate = FINISH_RATE * fitted.job.fit.training(fitted.job.kind).learning_rate
    steps = max(1, round(fitted.job.fit.finish * fitted.job.fit.steps))
    last = replace(fitted.job.fit, steps=steps, learning_rate=rate, coarse=0.0)
    found = fit(replace(fitted.job, fit=last), observed.whole, folder, console, fitted.members)
    return replace(found, job=fitted.job)


def prepare(job: Job, observed: Observed, folder: Path, start: Members | None = None) -> Trainer:
    """Return the loop that fits the members, at its start, which others may give, or where it was left."""
    job.fit.check()
    settings, members = job.fit.training(job.kind), job.build(observed)
    if start is not None:
        members.load_state_dict(start.state_dict())
    run = open_run(folder, job, resume=True)
    coarse = round(job.fit.coarse * settings.steps) if 2 in members.blocks else 0
    rays = {block: observed.coarse(block) for block in members.blocks}

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        block = int(batch[0])
        energy = rays[block].energy(job.fit.weight * block)  # of a coarse image each edge counts 1/block
        return energy(model(block).float()).mean() / rays[block].sinogram.numel()

    def evaluate(model: nn.Module) -> dict[str, float]:
        images = model(1).float()
        numbers = {"kept_misfit": float(rays[1].misfit(images.mean(0)))}
        if observed.unseen is not None:
            numbers["unseen_misfit"] = float(observed.unseen.misfit(images.mean(0)))
        if numbers.get("unseen_misfit", -1.0) < _best(run)[0]:
            with atomic_file(folder / BEST) as temporary:
                save_file({n: p.detach().contiguous() for n, p in model.state_dict().items()}, str(temporary))
        return numbers

    def enough() -> bool:
        if observed.unseen is None:
            return False
        last = max((row["step"] for row in evaluations(run)), default=0)
        return last - max(_best(run)[1], coarse) >= job.fit.patience * settings.steps

    def batches(step: int) -> Tensor:
        return torch.tensor([2 if step < coarse else 1])

    return Trainer(
        members,
        loss,
        batches,
        evaluate,
        None,
        settings,
        run,
        tokens=1,
        resume=True,
        unit="steps",
        groups=lambda model, decay: [{"params": list(model.parameters()), "weight_decay": decay}],
        enough=enough,
    )


def fitted(job: Job, observed: Observed, trainer: Trainer) -> Fitted:
    """Return what a fit has found so far.

    Raises: InputError as `best_members`.
    """
    misfit, step = _best(trainer.run)
    known = observed.unseen is not None
    return Fitted(
        best_members(job, observed, trainer.run.folder),
        job,
        trainer.seconds,
        trainer.step,
        step if known else trainer.step,
        misfit if known else None,
    )


def best_members(job: Job, observed: Observed, folder: Path) -> Members:
    """Return the best members so far of the fit in a folder.

    Raises: InputError when their file is missing, damaged or of another fit.
    """
    path, members = folder / BEST, job.build(observed)
    try:
        members.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{path} holds no parameters of this fit: {str(error).splitlines()[0]}") from error
    return members.to(observed.device).eval()


def evaluations(run: Run) -> list[dict[str, Any]]:
    """Return a fit's evaluations, in order."""
    return [row for row in run.record.read() if row["kind"] == "evaluate"]


def _best(run: Run) -> tuple[float, int]:
    """Return the least misfit of unseen views so far and its step."""
    rows = [(row["unseen_misfit"], row["step"]) for row in evaluations(run) if "unseen_misfit" in row]
    return min(rows, default=(float("inf"), 0))
