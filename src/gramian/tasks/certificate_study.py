"""What is certified when more or less of the data makes the prior, by masks, Gaussian weights, or both."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from gramian.compress.learning import Learning
from gramian.errors import InputError
from gramian.files import write_json
from gramian.tasks.evidence import split_evidence
from gramian.tasks.pruning import Plan, prune
from gramian.tasks.pruning_data import Data, Examples
from gramian.tasks.pruning_networks import Network, build, train_dense
from gramian.tasks.self_bounded import Bounding
from gramian.train.run import open_run, read_json

MASKS, WEIGHTS, BOTH = "masks", "Gaussian weights", "both"
"""What the posterior moves: λ of masks on fixed weights; means and deviations of Gaussian weights that are
all kept (PAC-Bayes with backprop); λ, means and deviations (spike and slab)."""

ALL = 1 - 1e-6
"""λ of weights that are as good as always kept."""


@dataclass(frozen=True, kw_only=True)
class CertificateStudy:
    """Which priors, and how the posterior is learnt from each."""

    data: Data = field(default_factory=Data)
    network: str = "mlp"
    """mlp or cnn."""
    widths: tuple[int, ...] = (100,)
    """As `pruning_networks.Network`."""
    train_steps: int = 1000
    """Steps of the prior's network, on the prior set; none where it is empty."""
    fractions: tuple[float, ...] = (0.0, 0.1, 0.5)
    """Shares of the examples that make the prior."""
    ways: tuple[str, ...] = (MASKS, WEIGHTS, BOTH)
    density: float = 0.2
    """Share of the weights that the prior's mask keeps, where examples made it."""
    std: float = 0.01
    """Standard deviation of Gaussian weights in the prior."""
    free_std: float = 0.1
    """The same where the prior is made from no example."""
    learning: Learning = field(default_factory=lambda: Learning(learn="both"))
    """How the prior's masks are learnt, on the prior set."""
    bounding: Bounding = field(default_factory=Bounding)
    """How the posterior is; what it moves is set by the way."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if not self.fractions or not all(0 <= fraction < 1 for fraction in self.fractions):
            raise InputError(f"a study needs prior fractions from 0 to below 1, got {self.fractions}")
        if unknown := set(self.ways) - {MASKS, WEIGHTS, BOTH}:
            raise InputError(f"unknown way {unknown.pop()!r}; choose {MASKS}, {WEIGHTS} or {BOTH}")
        for way in self.ways:
            for fraction in self.fractions:
                self.plan(way, not fraction, 0).check()

    def plan(self, way: str, free: bool, seed: int) -> Plan:
        """Return how a network is pruned and certified one way; `free` of a prior that no data made."""
        learnt = {MASKS: "masks", WEIGHTS: "weights", BOTH: "both"}[way]
        bounding = replace(self.bounding, learning=replace(self.bounding.learning, learn=learnt))
        std = self.free_std if free else self.std
        if way == WEIGHTS:
            start = {"density": 1.0, "high": ALL, "low": 0.5, "learning": replace(self.learning, steps=0)}
            bounding = replace(bounding, clamp=1 - ALL)
        elif free:
            start = {"density": 0.5, "high": 0.5, "low": 0.5, "learning": replace(self.learning, steps=0)}
        else:
            start = {"density": self.density, "learning": self.learning}
        score = "random" if free else "magnitude"
        return Plan(start=score, seed=seed, std=std, bounding=bounding, first_density=None, **start)


@dataclass(frozen=True)
class Certified:
    """What one prior and one way came to; errors and certificates of the 0-1 error."""

    way: str
    fraction: float
    seed: int
    n: int
    """Examples of the bound set."""
    certificate: float
    """Of the random predictor."""
    empirical: float
    """Its error on the bound set, mean over draws."""
    held_out: float
    """Its error on held-out examples, mean over draws."""
    kl: float
    """KL(Q‖P), nats."""
    prior: float
    """The prior's own certificate, KL 0."""
    test_set: float | None
    """Test-set bound of the prior's fixed mask; None where no example made it."""
    bounds: dict[str, float]
    expected: float
    """Mean λ over the weights."""


def run_certificates(
    study: CertificateStudy, seeds: Sequence[int], folder: Path, console: Console
) -> list[Certified]:
    """Certify with every fraction, way and seed; what a stopped study has done is not done again.

    Raises: InputError for settings or data that cannot be used; DivergedError when a loss is not finite.
    """
    study.check()
    run = open_run(folder, study, resume=True)
    wanted = [(seed, fraction, way) for seed in seeds for fraction in study.fractions for way in study.ways]
    loaded: dict[int, Examples] = {}
    found = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("certifying", total=len(wanted))
        for seed, fraction, way in wanted:
            place = run.folder / f"seed-{seed}" / f"{fraction:g}-{way.replace(' ', '-')}.json"
            progress.update(bar, description=f"{way}, prior from {fraction:.0%}, seed {seed}")
            if not place.exists():
                if seed not in loaded:
                    loaded = {seed: replace(study.data, seed=seed).load()}
                write_json(place, asdict(certify_one(study, loaded[seed], fraction, way, seed)))
            found.append(Certified(**read_json(place)))
            progress.advance(bar)
    return found


def certify_one(
    study: CertificateStudy, examples: Examples, fraction: float, way: str, seed: int
) -> Certified:
    """Make a prior from a share of the examples, learn the posterior on its bound, and certify it."""
    evidence = split_evidence(examples, fraction, seed)
    network = Network(study.network, examples.size, examples.classes, study.widths)
    model = build(network, seed)
    free = not len(evidence.prior)
    plan = study.plan(way, free, seed)
    if free and way != WEIGHTS:
        _rescale(model, plan.high)
    if not free:
        x, y = evidence.x[evidence.prior], evidence.y[evidence.prior]
        train_dense(model, x, y, steps=study.train_steps, batch=plan.batch, rate=1e-3, seed=seed)
    found = prune(model, evidence, plan)
    made = None if found is None else found.guarantee
    if found is None or made is None or made.held_out is None:
        raise InputError("nothing was certified")
    return Certified(
        way=way,
        fraction=fraction,
        seed=seed,
        n=made.posterior.n,
        certificate=made.posterior.value,
        empirical=made.posterior.empirical_risk,
        held_out=made.held_out,
        kl=made.posterior.kl,
        prior=made.prior.value,
        test_set=None if made.fixed is None else made.fixed.value,
        bounds=dict(made.bounds),
        expected=found.expected,
    )


@torch.no_grad()
def _rescale(model: nn.Module, chance: float) -> None:
    """Scale random weights so that masks of this λ keep the variance of signals: w / √λ."""
    for value in model.parameters():
        value.mul_(chance**-0.5)


def by_fraction(found: Sequence[Certified], way: str) -> Mapping[float, list[Certified]]:
    """Return what was certified one way, by the prior's share."""
    fractions = sorted({each.fraction for each in found if each.way == way})
    return {f: [each for each in found if each.way == way and each.fraction == f] for f in fractions}
