"""Short trainings whose checkpoints are all kept in memory, so that the geometry of their paths is exact."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from gramian.core.gram import Gram
from gramian.core.trajectory import steps_of, sum_of
from gramian.data.images import Labelled
from gramian.errors import DivergedError, InputError
from gramian.files import write_json
from gramian.nn.mlp import mlp
from gramian.nn.resnet import HE_STD
from gramian.nn.transformer import build
from gramian.observe.hallmarks import hallmarks
from gramian.tasks import images as pictures
from gramian.tasks import language
from gramian.train.loop import Training
from gramian.train.optimisers import build_optimiser
from gramian.train.run import open_run, read_json
from gramian.train.schedule import multiplier

COLUMNS = 2**18
"""Parameters whose path is widened to float64 at a time."""

LAST = 0.05
"""Share of the steps, the last ones, of which the training loss is the mean."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and what differs from the lessons in how."""

    name: str
    """Of the family; width and depth tell its members apart."""
    network: str
    """mlp, resnet (6 · depth + 2 layers, BatchNorm) or decoder (pre-norm)."""
    width: int
    """Features; channels of a residual network's first stage."""
    depth: int = 2
    """Hidden layers, blocks a stage, or blocks."""
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name of this member of the family, fit for a file."""
        return f"{self.name}-{self.width}x{self.depth}".replace(" ", "-")


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What there is to learn, and how."""

    images: pictures.ImageConfig = field(default_factory=pictures.ImageConfig)
    """Of residual networks and perceptrons; their split is drawn by the seed."""
    text: language.Job = field(default_factory=language.Job)
    """Of decoders; shape and seed are those of each case."""

    def training(self, case: Case, seed: int) -> Training:
        """Return how a case is trained with one seed."""
        shared = self.text.training if case.network == "decoder" else self.images.training
        return replace(shared, **{**case.training, "seed": seed})


class Learner:
    """A model that takes steps, all functions of the settings and the step alone, and can be copied midway.

    Args:
        model: what is trained, on the CPU.
        loss: (model, batch) -> scalar mean loss of a batch.
        batches: step -> batch.
        judge: model in evaluation mode -> numbers.
        settings: how to train; precision, accumulation and files are not used.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Tensor], Tensor],
        batches: Callable[[int], Tensor],
        judge: Callable[[nn.Module], dict[str, float]],
        settings: Training,
    ) -> None:
        settings.check()
        self.model, self.settings, self.step = model, settings, 0
        self._loss, self._batches, self._judge = loss, batches, judge
        self._optimiser = build_optimiser(settings.optimiser, model, settings.rates)
        self.losses: list[float] = []

    def advance(self, steps: int) -> None:
        """Take up to `steps` steps; without a trainable parameter only running statistics move.

        Raises: DivergedError at the first loss that is not finite.
        """
        self.model.train()
        for _ in range(min(steps, self.settings.steps - self.step)):
            self._take_step()

    def _take_step(self) -> None:
        settings = self.settings
        share = multiplier(self.step, settings.steps, settings.warmup, settings.schedule)
        for group in self._optimiser.param_groups:
            group["lr"] = share * group["initial_lr"]
        learns = any(parameter.requires_grad for parameter in self.model.parameters())
        with torch.set_grad_enabled(learns):
            loss = self._loss(self.model, self._batches(self.step))
        if not loss.isfinite():
            raise DivergedError(f"the loss is not finite at step {self.step} (try a lower learning rate)")
        if learns:
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
            self._optimiser.step()
            self._optimiser.zero_grad()
        self.losses.append(loss.item())
        self.step += 1

    def branch(self) -> "Learner":
        """Return a copy that goes its own way, the optimiser's state and the data's order with it."""
        other = copy.copy(self)
        other.model, other._optimiser = copy.deepcopy((self.model, self._optimiser))
        other.losses = list(self.losses)
        return other

    def train_only(self, chosen: Iterable[nn.Parameter]) -> int:
        """Freeze all other parameters, where they are, and return how many numbers still learn."""
        kept = {id(parameter) for parameter in chosen}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in kept)
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def judged(self) -> dict[str, float]:
        """Return what the model can do, and the mean training loss of its last steps."""
        self.model.eval()
        with torch.no_grad():
            found = self._judge(self.model)
        last = self.losses[-max(1, round(LAST * self.settings.steps)) :]
        return {**found, "training_loss": sum(last) / len(last)} if last else found


def learner(lessons: Lessons, case: Case, seed: int) -> Learner:
    """Return the untrained model of a case with all that it learns from.

    Raises: InputError for an unknown network and settings or data that cannot be used.
    """
    training = lessons.training(case, seed)
    if case.network == "decoder":
        return _reader(replace(lessons.text, training=training), case)
    if case.network not in ("mlp", "resnet"):
        raise InputError(f"unknown network {case.network!r}; choose mlp, resnet or decoder")
    config = replace(lessons.images, training=training, data=replace(lessons.images.data, split_seed=seed))
    config.check()
    return _viewer(config, case)


def _viewer(config: pictures.ImageConfig, case: Case) -> Learner:
    images, seed = config.data.load(), config.training.seed
    if case.network == "resnet":
        widths = (case.width, 2 * case.width, 4 * case.width)
        shape = pictures.Network(depth=6 * case.depth + 2, widths=widths, rule="none", norm="batch")
        model: nn.Module = shape.build(images, seed)
    else:
        pixels = images.train.images[0].numel()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hidden = (case.width,) * case.depth
            model = nn.Sequential(
                nn.Flatten(), *mlp(pixels, images.classes, widths=hidden, weight_std=HE_STD)
            )
    held_out = images.validation, images.test
    unseen = Labelled(
        torch.cat([part.images for part in held_out]), torch.cat([part.labels for part in held_out])
    )
    loss = pictures.ImageLoss(images.train, config.shift)
    batches = pictures.training_batches(config, images)
    return Learner(model, loss, batches, partial(pictures.judge, data=unseen), config.training)


def _reader(job: language.Job, case: Case) -> Learner:
    heads = max(1, case.width // 32)
    job = replace(job, shape=replace(job.shape, width=case.width, depth=case.depth, heads=heads))
    job.check()
    corpus = job.data.load()
    model = build(language.model_config(job, "pre_norm", corpus), job.training.seed)
    read = language.validation(job, corpus)

    def judge(model: nn.Module) -> dict[str, float]:
        return {"loss": read(model)["validation_loss"]}

    return Learner(model, language.language_loss, language.training_batches(job, corpus), judge, job.training)


@dataclass(frozen=True)
class Travelled:
    """The path of one case with one seed."""

    name: str
    network: str
    width: int
    depth: int
    seed: int
    parameters: int
    whole: dict[str, float]
    """The hallmarks of all parameters together."""
    blocks: dict[str, float]
    """Those of the blocks alone, without embedding, stem and read-out; of a perceptron the whole again."""
    walk: dict[str, float]
    """Those of the random walk with the same start and lengths as the whole."""
    judged: dict[str, float]
    """Loss (nats), of images the accuracy on what was not learnt from, and the last training loss."""


@dataclass(frozen=True, kw_only=True)
class PathStudy:
    """What is trained, and how its paths are recorded."""

    lessons: Lessons = field(default_factory=Lessons)
    cases: tuple[Case, ...] = ()
    checkpoints: int = 40
    """Checkpoints after the start, evenly spaced."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if self.checkpoints < 3:
            raise InputError(f"a path needs at least 3 checkpoints after its start, got {self.checkpoints}")
        labels = [case.label for case in self.cases]
        if len(set(labels)) < len(labels):
            raise InputError(f"every case needs a name or size of its own, got {', '.join(labels)}")
        for case in self.cases:
            steps = self.lessons.training(case, 0).steps
            if steps % self.checkpoints:
                raise InputError(f"steps must be a multiple of {self.checkpoints} checkpoints, got {steps}")


def run_paths(
    study: PathStudy, seeds: Mapping[str, Sequence[int]], folder: Path, console: Console
) -> list[Travelled]:
    """Train every case with the seeds of its network; what a stopped study has done is not done again.

    An outcome is a JSON file of its own in the folder.

    Raises: InputError for settings that cannot be used; DivergedError when a loss is not finite.
    """
    study.check()
    run = open_run(folder, study, resume=True)
    wanted = [(case, seed) for case in study.cases for seed in seeds[case.network]]
    found = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("paths", total=len(wanted))
        for case, seed in wanted:
            place = run.folder / f"{case.label}-seed-{seed}.json"
            if not place.exists():
                progress.update(bar, description=f"{case.label}, seed {seed}")
                write_json(place, asdict(travel(study, case, seed)))
            found.append(Travelled(**read_json(place)))
            progress.advance(bar)
    return found


def travel(study: PathStudy, case: Case, seed: int) -> Travelled:
    """Train one case and read its path off the checkpoints, the start included."""
    trainee = learner(study.lessons, case, seed)
    parts = _parts(trainee.model)
    points = [[_point(part) for part in parts]]
    for _ in range(study.checkpoints):
        trainee.advance(trainee.settings.steps // study.checkpoints)
        points.append([_point(part) for part in parts])
    grams = [path_of(torch.stack(list(rows))) for rows in zip(*points, strict=True)]
    steps = sum_of(grams)
    return Travelled(
        case.name, case.network, case.width, case.depth, seed,
        parameters=sum(parameter.numel() for part in parts for parameter in part),
        whole=hallmarks(steps), blocks=hallmarks(grams[0]), walk=hallmarks(random_walk_of(steps)),
        judged=trainee.judged(),
    )  # fmt: skip


def _parts(model: nn.Module) -> list[list[nn.Parameter]]:
    """Divide the parameters into those of the blocks, all where there are no blocks, and the rest."""
    blocks = list(getattr(model, "blocks", model).parameters())
    inside = {id(parameter) for parameter in blocks}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return [blocks, rest] if rest else [blocks]


def _point(part: Sequence[nn.Parameter]) -> Float[Tensor, " p"]:
    return torch.cat([parameter.detach().flatten() for parameter in part])


def path_of(points: Float[Tensor, "n p"]) -> Gram:
    """Take `steps_of` many parameters, some at a time: Grams of a path add over its parameters.

    Shapes: points (n, p) -> steps (n, n).
    Holds: exactly.
    """
    return sum_of([steps_of(part) for part in points.split(COLUMNS, dim=1)])


def random_walk_of(steps: Gram) -> Gram:
    """Return the path from the same start whose updates have the same lengths and random directions.

    ⟨θ_0, δ_t⟩ = 0 and ⟨δ_s, δ_t⟩ = 0 for s ≠ t

    Shapes: steps (n, n) -> (n, n).
    Holds: as p → ∞, error O(p^−½) in the cosines of a drawn walk.
    """
    return Gram(steps.left.diag_embed(), steps.left, steps.left)
