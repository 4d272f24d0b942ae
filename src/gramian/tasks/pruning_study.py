"""What learning a random mask buys: against the mask it starts from, plain fine-tuning, and L0 gates."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramian.compress.density import check_density, keep_highest, sizes_of, start_from
from gramian.compress.learning import Learning, Learnt, fix_hard_concrete, learn
from gramian.compress.masks import add_masks, keep, masks_of
from gramian.compress.thresholds import most_probable
from gramian.errors import InputError
from gramian.files import write_json
from gramian.tasks.evidence import Evidence
from gramian.tasks.pruning import DRAWS, Plan, Start, batches, held_out_error, scores
from gramian.tasks.pruning_data import Data, standardised
from gramian.tasks.pruning_networks import Network, build, train_dense
from gramian.tasks.self_bounded import drawn_errors
from gramian.train.run import open_run, read_json

DENSE, UNTOUCHED, STRAIGHT, MASKS, BOTH, SHUFFLED, GATES, AGAIN, AGAIN_BOTH = (
    "dense", "untouched", "straight", "masks", "both", "masks, gradients shuffled", "hard concrete",
    "straight, twice", "straight, then both",
)  # fmt: skip
"""Ways to go on from a mask: nothing; weights alone under the fixed mask; λ alone; λ and weights; λ with the
gradient of every layer in random order (a control); L0 gates and weights; and, from the network that plain
fine-tuning left, the same for as long again, or λ and weights."""


@dataclass(frozen=True, kw_only=True)
class PruningStudy:
    """Which networks are pruned, how far, and how they are fine-tuned."""

    data: Data = field(default_factory=Data)
    network: str = "mlp"
    """mlp or cnn."""
    widths: tuple[int, ...] = ()
    """As `pruning_networks.Network`."""
    train_steps: int = 1000
    """Steps of the dense network."""
    starts: tuple[Start, ...] = ("random", "magnitude", "snip")
    densities: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05)
    learning: Learning = field(default_factory=Learning)
    """How λ and weights are learnt."""
    compute: int = 2
    """Steps of plain fine-tuning for one of these, since moments take two products where weights take one."""
    batch: int = 128

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        for density in self.densities:
            check_density(density)
        if not self.starts or not self.densities or self.compute < 1 or self.train_steps < 1:
            raise InputError("a study needs starts, densities, and at least one step of everything")
        self.learning.check()


@dataclass(frozen=True)
class Tuned:
    """How one way ended."""

    start: str
    density: float
    seed: int
    way: str
    fixed: float
    """Held-out error of the network with a fixed mask."""
    random: float | None
    """Held-out error of the random predictor, mean over draws; None where nothing is random."""
    kept: float
    """Share of the masked weights that the fixed mask keeps."""
    steps: int
    seconds: float


def run_study(study: PruningStudy, seeds: Sequence[int], folder: Path, console: Console) -> list[Tuned]:
    """Prune with every start, density and seed; what a stopped study has done is not done again.

    Raises: InputError for settings or data that cannot be used; DivergedError when a loss is not finite.
    """
    study.check()
    run = open_run(folder, study, resume=True)
    found: list[Tuned] = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("pruning", total=len(seeds) * len(study.starts) * len(study.densities))
        for seed in seeds:
            work: Bench | None = None
            for start in study.starts:
                for density in study.densities:
                    place = run.folder / f"seed-{seed}" / f"{start}-{density:g}.json"
                    progress.update(bar, description=f"{start} at {density:g}, seed {seed}")
                    if not place.exists():
                        work = work or Bench(study, seed)
                        write_json(place, [asdict(each) for each in work.tune(start, density)])
                    found += [Tuned(**row) for row in read_json(place)]
                    progress.advance(bar)
    return found


class Bench:
    """A dense network of one seed with its examples, on which all ways are tried."""

    def __init__(self, study: PruningStudy, seed: int) -> None:
        self.study, self.seed = study, seed
        examples = replace(study.data, seed=seed).load()
        known = examples.known
        self.evidence = Evidence(standardised(examples, known), examples.y, known, examples.held_out)
        network = Network(study.network, examples.size, examples.classes, study.widths)
        self.dense = build(network, seed)
        x, y = self.evidence.x[known], self.evidence.y[known]
        train_dense(self.dense, x, y, steps=study.train_steps, batch=study.batch, rate=1e-3, seed=seed)
        self.sample = batches(self.evidence.x, self.evidence.y, known, study.batch, seed + 1)

    def tune(self, start: Start, density: float) -> Iterator[Tuned]:
        """Yield what every way comes to from one mask."""
        began, settings, study = time.monotonic(), self.study.learning, self.study
        model = deepcopy(self.dense)
        add_masks(model, weights="trainable")
        plan = Plan(start=start, density=density, seed=self.seed)
        kept = keep_highest(model, scores(model, self.evidence, plan, self._stream()), density)
        keep(model, kept)

        def ended(way: str, current: nn.Module, steps: int, random: float | None = None) -> Tuned:
            share = _share(current)
            error, seconds = held_out_error(current, self.evidence), time.monotonic() - began
            return Tuned(start, density, self.seed, way, error, random, share, steps, seconds)

        def straight(current: nn.Module) -> nn.Module:
            plain = replace(settings, mode="kept", learn="weights", steps=study.compute * settings.steps)
            self._learn(current, plain, None)
            return current

        def random_mask(way: str, current: nn.Module, learnt: Learnt) -> Tuned:
            start_from(current, {name: mask.kept for name, mask in masks_of(current).items()})
            with _shuffled(current, self._stream()) if way == SHUFFLED else nullcontext():
                self._learn(current, replace(settings, learn=learnt), density)
            random = self._random(current)
            keep(current, most_probable(current, density))
            return ended(way, current, settings.steps, random)

        yield ended(DENSE, self.dense, study.train_steps)
        yield ended(UNTOUCHED, model, 0)
        learnt: dict[str, Learnt] = {MASKS: "masks", SHUFFLED: "masks", BOTH: "both"}
        for way, what in learnt.items():
            began = time.monotonic()
            yield random_mask(way, deepcopy(model), what)
        began, gates = time.monotonic(), deepcopy(model)
        start_from(gates, kept)
        self._learn(gates, replace(settings, mode="hard_concrete", learn="both"), density)
        fix_hard_concrete(gates, density)
        yield ended(GATES, gates, settings.steps)
        began = time.monotonic()
        tuned = straight(deepcopy(model))
        yield ended(STRAIGHT, tuned, study.compute * settings.steps)
        began = time.monotonic()
        yield ended(AGAIN, straight(deepcopy(tuned)), 2 * study.compute * settings.steps)
        began = time.monotonic()
        yield random_mask(AGAIN_BOTH, tuned, "both")

    def _stream(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _learn(self, model: nn.Module, settings: Learning, density: float | None) -> None:
        learn(model, self.sample, cross_entropy, settings, density=density, generator=self._stream())

    def _random(self, model: nn.Module) -> float:
        x, y = self.evidence.x[self.evidence.held_out], self.evidence.y[self.evidence.held_out]
        return drawn_errors(model, x, y, DRAWS, self._stream()).mean


@contextmanager
def _shuffled(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Give the gradient of each layer's logits to its units in random order, a new one every step."""

    def shuffle(gradient: Tensor) -> Tensor:
        order = torch.randperm(gradient.numel(), generator=generator)
        return gradient.flatten()[order].view_as(gradient)

    handles = [mask.logits.register_hook(shuffle) for mask in masks_of(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _share(model: nn.Module) -> float:
    """Return the share of the masked weights that are kept; 1 without masks."""
    try:
        masks = masks_of(model)
    except InputError:
        return 1.0
    sizes = sizes_of(model)
    kept = sum(int(mask.kept.sum()) * sizes[name] for name, mask in masks.items())
    return kept / sum(mask.kept.numel() * sizes[name] for name, mask in masks.items())
