"""Training that goes on with few of its parameters from some step, beside what stops or goes on with all."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from torch import nn

from gramian.errors import InputError
from gramian.files import write_json
from gramian.tasks.trajectory_study import Case, Learner, Lessons, learner
from gramian.train.run import open_run, read_json

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""Normalisations, whose gains and biases are the scalars that go on learning."""

FULL, SCALARS, READOUT, STATISTICS, STOPPED = "full", "norms", "read-out", "statistics", "stopped"
"""What learns on after the freezing: all; gains and biases of norms; the last linear map; nothing but
BatchNorm's running statistics; nothing at all."""


@dataclass(frozen=True)
class Frozen:
    """How one way of freezing ended."""

    name: str
    seed: int
    share: float
    """Share of the steps after which parameters were frozen; 0 at the start, 1 for never."""
    way: str
    trained: int
    """Numbers that went on learning."""
    parameters: int
    judged: dict[str, float]
    """Loss (nats), of images the accuracy, and the last training loss."""


@dataclass(frozen=True, kw_only=True)
class FreezeStudy:
    """What is frozen, and when."""

    lessons: Lessons = field(default_factory=Lessons)
    cases: tuple[Case, ...] = ()
    shares: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By network: the shares of the steps after which parameters are frozen."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        for case in self.cases:
            shares = self.shares.get(case.network, ())
            if not shares or list(shares) != sorted(set(shares)) or not 0 < shares[0] <= shares[-1] < 1:
                raise InputError(
                    f"{case.network} needs increasing shares of the steps between 0 and 1, got {list(shares)}"
                )


def run_freezing(
    study: FreezeStudy, seeds: Mapping[str, Sequence[int]], folder: Path, console: Console
) -> list[Frozen]:
    """Train every case with the seeds of its network; what a stopped study has done is not done again.

    What one training and its branches came to is a JSON file of its own in the folder.

    Raises: InputError for settings that cannot be used; DivergedError when a loss is not finite.
    """
    study.check()
    run = open_run(folder, study, resume=True)
    wanted = [(case, seed) for case in study.cases for seed in seeds[case.network]]
    found = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("freezing", total=len(wanted))
        for case, seed in wanted:
            place = run.folder / f"{case.label}-seed-{seed}.json"
            if not place.exists():
                progress.update(bar, description=f"{case.label}, seed {seed}")
                write_json(place, [asdict(each) for each in freeze(study, case, seed)])
            found += [Frozen(**row) for row in read_json(place)]
            progress.advance(bar)
    return found


def freeze(study: FreezeStudy, case: Case, seed: int) -> Iterator[Frozen]:
    """Train one case fully, and branch off at each share of the steps; branches see the same batches."""
    trunk = learner(study.lessons, case, seed)
    steps = trunk.settings.steps
    count = sum(parameter.numel() for parameter in trunk.model.parameters())

    def ended(share: float, way: str, branch: Learner, trained: int) -> Frozen:
        return Frozen(case.name, seed, share, way, trained, count, branch.judged())

    def gone_on(share: float, way: str) -> Frozen:
        branch = trunk.branch()
        trained = branch.train_only(ways(branch.model)[way])
        branch.advance(steps)
        return ended(share, way, branch, trained)

    yield gone_on(0.0, SCALARS)
    for share in study.shares[case.network]:
        trunk.advance(round(share * steps) - trunk.step)
        for way in ways(trunk.model):
            yield gone_on(share, way)
        yield ended(share, STOPPED, trunk, 0)
    trunk.advance(steps)
    yield ended(1.0, FULL, trunk, count)


def ways(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return what may go on learning, by name.

    The read-out is a control of the same kind where it is as few numbers as the norms', within a factor of
    two, and the statistics are one where there are any.
    """
    scalars = [
        parameter
        for module in model.modules()
        if isinstance(module, NORMS)
        for parameter in module.parameters()
    ]
    found = {SCALARS: scalars}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    readout = list(linear[-1].parameters()) if linear else []
    few, many = sorted(sum(parameter.numel() for parameter in each) for each in (scalars, readout))
    if many <= 2 * few:
        found[READOUT] = readout
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        found[STATISTICS] = []
    return found
