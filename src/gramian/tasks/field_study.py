"""Fields with error bars beside classical methods, on scans whose truth judges them and nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from rich.console import Console
from torch import Tensor

from gramian.core.predictive import Predictive
from gramian.errors import InputError
from gramian.imaging.unseen_views import TAILS, check_tails, check_views, rescaled, spread_factor
from gramian.imaging.variation import UNIT
from gramian.tasks.classical_choice import LeftOut, check_classical, leave_out, reconstruct
from gramian.tasks.field_fits import Fit, Fitted, Job, Network, finish, fit
from gramian.tasks.image_doubt import Doubt, draw
from gramian.tasks.observed_views import Observed, observe
from gramian.tasks.reconstruction_scores import DoubtScores, doubt_scores, image_scores
from gramian.tasks.scans import Scan

AROUND = ("last_layer", "laplace", "variational", "hmc")
"""Posteriors around one fitted field, in the order of their cost."""
PIXEL_STEPS = 2
"""Steps of a grid of pixels for each of a field: they are cheap."""


@dataclass(frozen=True, kw_only=True)
class FieldStudy:
    """What is fitted to every scan, with every seed."""

    network: Network = field(default_factory=Network)
    fit: Fit = field(default_factory=lambda: Fit(steps=1200))
    doubt: Doubt = field(default_factory=Doubt)
    """Its uncertainty is set from the others."""
    ensembles: bool = True
    """Whether there are ensembles, or one field and one with dropout alone."""
    around: tuple[str, ...] = ()
    """Posteriors around the first field: last_layer, laplace, variational or hmc."""
    classical: tuple[str, ...] = ("fbp", "sirt", "fista_tv")
    held_out: float = 0.1
    """Share of the views that are unseen at first: they end fits, choose iterations of classical methods and
    the factor on the spread of samples; then they are given back."""
    tails: float | None = TAILS
    """Degrees of freedom of samples that are spread; None leaves their own tails."""
    seeds: tuple[int, ...] = (0, 1)

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        self.network.check()
        self.fit.check()
        check_classical(self.classical)
        check_tails(self.tails)
        for name in ("ensemble", "dropout_ensemble", *self.around):
            replace(self.doubt, uncertainty=name).check(pixels=False)


@dataclass(frozen=True)
class Row:
    """One method on one scan with one seed."""

    name: str
    scan: str
    seed: int
    psnr: float
    ssim: float
    seconds: float
    raw: DoubtScores | None = None
    """Of samples as they were drawn."""
    scaled: DoubtScores | None = None
    """Of samples spread by the factor that unseen views ask for."""
    factor: float | None = None
    notes: Mapping[str, float] = field(default_factory=dict)
    """Figures of the method, such as R̂ of chains."""

    def text(self) -> str:
        """Say it in a line."""
        said = f"{self.name}: {self.psnr:.2f} dB, {self.seconds:.0f} s"
        if self.raw is None or self.scaled is None:
            return said
        notes = "".join(f", {name} {value:.3g}" for name, value in self.notes.items())
        return f"{said}, error {self.raw.error:.3f} -> {self.scaled.error:.3f} by {self.factor:.2f}{notes}"


def study(scans: Sequence[Scan], config: FieldStudy, folder: Path, console: Console) -> list[Row]:
    """Reconstruct scans of a known truth by every method; no fit of a stopped study is made again.

    One fit of several members gives the rows of a field, of an ensemble and of the posteriors around the
    first member; another with dropout gives the other two.

    Raises: InputError for settings that cannot be used, and scans without their truth.
    """
    config.check()
    rows: list[Row] = []
    for number, scan in enumerate(scans):
        if scan.truth is None:
            raise InputError(f"the truth of {scan.name} is not known, so nothing can be judged by it")
        for seed in config.seeds:
            observed = observe(scan, held_out=config.held_out, seed=seed, device=config.fit.place)
            place = folder / f"scan-{number}-seed-{seed}"
            left = leave_out(observed)
            assert left is not None
            first_seed = seed == config.seeds[0]
            beside = _without_draws(observed, left, config, place) if first_seed else ()
            for row in chain(beside, _fields(observed, left, seed, config, place)):
                rows.append(row)
                console.print(f"{row.scan}, seed {seed}: {row.text()}", highlight=False, markup=False)
    return rows


def _without_draws(observed: Observed, left: LeftOut, config: FieldStudy, folder: Path) -> Iterator[Row]:
    for name in config.classical:
        found = reconstruct(name, observed, left)
        yield _of_image(name, found.image, observed, config.seeds[0], found.seconds)
    settings = replace(config.fit, steps=PIXEL_STEPS * config.fit.steps, seed=config.seeds[0])
    job = Job(pixels=True, fit=settings).weighed(left.variation)
    judged, grid = _fitted(job, observed, folder / "pixels", Console(quiet=True))
    seconds = judged.seconds + grid.seconds
    yield _of_image("pixels + TV", grid.members(1)[0].detach(), observed, config.seeds[0], seconds)


def _fields(observed: Observed, left: LeftOut, seed: int, config: FieldStudy, folder: Path) -> Iterator[Row]:
    settings, console = replace(config.fit, seed=seed), Console(quiet=True)
    for masks in (False, True):
        members = config.doubt.members if config.ensembles else 1
        job = Job(members=members, dropout=masks, network=config.network, fit=settings)
        job = job.weighed(left.variation)
        fits = _fitted(job, observed, folder / ("dropout" if masks else "plain"), console)
        seconds, count = sum(each.seconds for each in fits), job.members
        alone = first(fits[0], observed), first(fits[1], observed)
        if masks:
            yield _drawn("field, dropout", "dropout", alone, observed, seconds / count, config)
            if config.ensembles:
                yield _drawn(f"{count} fields, dropout", "dropout_ensemble", fits, observed, seconds, config)
            continue
        yield _of_image("field", alone[1].members(1)[0].detach(), observed, seed, seconds / count)
        if config.ensembles:
            yield _drawn(f"{count} fields", "ensemble", fits, observed, seconds, config)
        for name in config.around:
            yield _drawn(f"field, {name}", name, alone, observed, seconds / count, config)


def _fitted(job: Job, observed: Observed, folder: Path, console: Console) -> tuple[Fitted, Fitted]:
    """Return a fit without the unseen views, and the same with all of them."""
    judged = fit(job, observed, folder, console)
    return judged, finish(judged, observed, folder.with_name(f"{folder.name}-end"), console)


def first(fitted: Fitted, observed: Observed) -> Fitted:
    """Return the first member alone."""
    job = replace(fitted.job, members=1)
    alone = job.build(observed)
    alone.load_state_dict({name: value[:1] for name, value in fitted.members.state_dict().items()})
    return replace(fitted, members=alone.to(observed.device).eval(), job=job)


def _of_image(name: str, image: Tensor, observed: Observed, seed: int, seconds: float) -> Row:
    scan = observed.scan
    scores = image_scores(image.cpu(), _truth(scan))
    return Row(name, _said(scan), seed, scores.psnr, scores.ssim, seconds)


def _drawn(
    name: str,
    method: str,
    fits: tuple[Fitted, Fitted],
    observed: Observed,
    seconds: float,
    config: FieldStudy,
) -> Row:
    """Score samples as they are, and spread by what unseen views say of those that have not seen them."""
    truth, unseen, doubt = _truth(observed.scan), observed.unseen, replace(config.doubt, uncertainty=method)
    assert unseen is not None
    judged, last = (
        draw(fitted, seen, doubt, Console(quiet=True))
        for fitted, seen in zip(fits, (observed, observed.whole), strict=True)
    )
    check = check_views(judged.samples, unseen.projector, unseen.sinogram, unseen.std)
    factor = spread_factor(check).factor
    raw = last.samples.cpu()
    laws = [Predictive.from_samples(each) for each in (raw, rescaled(raw, factor, UNIT, config.tails))]
    image = image_scores(laws[1].mean, truth)
    return Row(
        name,
        _said(observed.scan),
        fits[0].job.fit.seed,
        image.psnr,
        image.ssim,
        seconds + last.seconds,
        doubt_scores(laws[0], truth),
        doubt_scores(laws[1], truth),
        factor,
        last.notes,
    )


def _said(scan: Scan) -> str:
    return f"{scan.name}, {len(scan.sinogram)} views"


def _truth(scan: Scan) -> Tensor:
    """Return the true image in units of the peak that images are fitted in."""
    assert scan.truth is not None
    return (scan.truth / scan.peak).float()
