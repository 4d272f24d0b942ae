"""A scan in, an image with error bars out, and classical reconstructions beside it."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from gramian.core.predictive import Predictive
from gramian.errors import InputError, StoppedError
from gramian.imaging.unseen_views import (
    TAILS,
    SpreadFactor,
    ViewCheck,
    check_tails,
    check_views,
    rescaled,
    spread_factor,
)
from gramian.imaging.variation import UNIT
from gramian.memory import check_memory
from gramian.tasks.classical_choice import Classical, LeftOut, check_classical, leave_out, reconstruct
from gramian.tasks.field_fits import BEST, Fit, Fitted, Job, Network, best_members, finish, fit
from gramian.tasks.image_doubt import POINTS, Doubt, Drawn, draw
from gramian.tasks.language import run_folder
from gramian.tasks.observed_views import Observed, observe
from gramian.tasks.reconstruction_files import IMAGE, write_image
from gramian.tasks.reconstruction_scores import (
    DoubtScores,
    ImageScores,
    doubt_scores,
    image_scores,
    peak_of,
)
from gramian.tasks.scans import Scan, Source
from gramian.train.run import open_run

FITTED = ("field", "pixels")
"""Methods that are fitted by gradients and have an uncertainty."""


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Reconstruct an image from the views of a scan."""

    source: Source = field(default_factory=Source)
    method: str = "field"
    """field, pixels, or a classical method: fbp, sirt, sart, cgls, em, fista_tv, anisotropic_tv or
    pdhg_tv."""
    compare: tuple[str, ...] = ("fbp", "sirt", "fista_tv")
    """Classical methods whose images are shown beside it."""
    network: Network = field(default_factory=Network)
    fit: Fit = field(default_factory=Fit)
    doubt: Doubt = field(default_factory=Doubt)
    held_out: float = 0.1
    """Share of the views that nothing is fitted to: they end the fit, judge the error bars and choose
    iterations of classical methods; as many at a time, all views are left out in turn to choose the weight of
    total variation. 0 fits all views and judges nothing."""
    outline: bool = True
    """Leave pixels empty that several views see through."""
    recalibrate: bool = True
    """Multiply the spread of samples by what the unseen views ask for."""
    tails: float | None = TAILS
    """Degrees of freedom of the t distribution that these samples are given, since errors have heavier tails
    than they; None leaves their own."""
    runs: Path = Path("runs")
    """Folder of run folders."""
    name: str = "reconstruct"
    """Name of the run folder."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        self.source.check()
        if self.method not in FITTED:
            try:
                check_classical((self.method,))
            except InputError as error:
                raise InputError(f"{error}, field or pixels") from error
        else:
            self.network.check()
            self.fit.check()
            self.doubt.check(pixels=self.method == "pixels")
            if self.doubt.dropout and not self.network.dropout > 0:
                raise InputError("an uncertainty by dropout needs a rate of dropout above 0, got 0")
        check_classical(self.compare)
        if len(set(self.compare)) < len(self.compare):
            raise InputError(f"every method is compared once, got {' '.join(self.compare)}")
        if not 0 <= self.held_out < 0.5:
            raise InputError(f"held_out is a share from 0 to below ½, got {self.held_out:g}")
        check_tails(self.tails)

    @property
    def job(self) -> Job:
        """What is fitted."""
        return Job(
            pixels=self.method == "pixels",
            members=self.doubt.fields,
            dropout=self.doubt.dropout,
            network=self.network,
            fit=self.fit,
        )


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What became of a scan; images are in units of the scan's peak."""

    observed: Observed
    image: Float[Tensor, "n n"]
    """By the method that was asked for."""
    prediction: Predictive | None
    """Its law, where there are samples."""
    classical: tuple[Classical, ...]
    fitted: Fitted | None
    drawn: Drawn | None
    check: ViewCheck | None
    """Of the samples as they were drawn, by the unseen views."""
    spread: SpreadFactor | None
    """What the unseen views say of the samples' spread."""
    folder: Path
    before: Fitted | None = None
    """The fit before it was finished with the unseen views, by which they judge it."""
    own: Classical | None = None
    """The classical method that was asked for."""

    @property
    def scan(self) -> Scan:
        """What was reconstructed."""
        return self.observed.scan

    def truth(self) -> Float[Tensor, "n n"] | None:
        """Return the true image in units of the scan's peak, where it is known."""
        truth = self.scan.truth
        return None if truth is None else (truth / self.scan.peak).float()

    def scores(self) -> dict[str, ImageScores]:
        """Return the scores of all images where the truth is known."""
        truth = self.truth()
        if truth is None:
            return {}
        peak = peak_of(truth)
        images = {"": self.image, **{each.name: each.image for each in self.classical}}
        return {name: image_scores(image.cpu() / peak, truth / peak) for name, image in images.items()}

    def doubt_scores(self) -> DoubtScores | None:
        """Return the scores of the samples where the truth is known; they are computed once."""
        return self._doubt_scores

    @cached_property
    def _doubt_scores(self) -> DoubtScores | None:
        truth, prediction = self.truth(), self.prediction
        if truth is None or prediction is None or prediction.samples is None:
            return None
        peak = peak_of(truth)
        return doubt_scores(Predictive.from_samples(prediction.samples.cpu() / peak), truth / peak)


def reconstruct_scan(
    config: ReconstructConfig, console: Console, *, resume: bool = False, overwrite: bool = False
) -> Reconstruction:
    """Fit an image to a scan and draw samples of it, and reconstruct it by classical methods.

    Raises: InputError (MissingExtraError) for settings and scans that cannot be used, before anything is
        written; StoppedError after a signal, with the best image so far kept; DivergedError for a loss that
        is not finite.
    """
    config.check()
    folder = run_folder(config.runs, config.name)
    settings = replace(config, runs=Path())
    with console.status("reading the scan"):
        scan = config.source.load()
    for warning in scan.warnings:
        console.print(f"note: {warning}", highlight=False, markup=False, soft_wrap=True)
    with console.status("building the projector"):
        observed = observe(
            scan,
            held_out=config.held_out,
            outline=config.outline,
            seed=config.fit.seed,
            device=config.fit.place,
        )
    _check_memory(config, observed)
    run = open_run(folder, settings, resume=resume, overwrite=overwrite)
    return reconstructed(config, observed, run.folder, console)


def _check_memory(config: ReconstructConfig, observed: Observed) -> None:
    """Refuse samples and members that no memory here holds."""
    if config.method not in FITTED:
        return
    size, doubt = observed.size, config.doubt
    images = f"images of {size} × {size} pixels"
    if doubt.uncertainty not in POINTS:
        drawn = max(doubt.samples, doubt.chains if doubt.uncertainty == "hmc" else 0)
        check_memory(8.0 * drawn * size**2, f"{drawn:,} samples, {images},")
    pixels = size**2 if observed.inside is None else int(observed.inside.sum())
    numbers = config.job.least_numbers(size, pixels)
    check_memory(4.0 * doubt.fields * numbers, f"fitting {doubt.fields:,} {images}")


def reconstructed(
    config: ReconstructConfig, observed: Observed, folder: Path, console: Console
) -> Reconstruction:
    """Reconstruct what was observed; the fit is kept in a run folder inside."""
    left = _left_out(config, observed, console)
    beside = _beside(config, observed, left, console)
    if config.method not in FITTED:
        with console.status(f"reconstructing by {config.method}"):
            own = reconstruct(config.method, observed, left)
        return Reconstruction(observed, own.image, None, beside, None, None, None, None, folder, own=own)
    job = config.job if left is None else config.job.weighed(left.variation)
    try:
        return _fitted(config, job, observed, beside, folder, console)
    except StoppedError:
        _keep_best(job, observed, folder, console)
        raise


def _left_out(config: ReconstructConfig, observed: Observed, console: Console) -> LeftOut | None:
    """Leave out views in turn where FISTA-TV or a fit needs the weight of total variation."""
    weighed = config.method in FITTED and config.fit.variation is None
    if not weighed and "fista_tv" not in (config.method, *config.compare):
        return None
    with console.status("leaving out views in turn") as status:
        return leave_out(
            observed,
            progress=lambda done: status.update(f"leaving out views in turn, {done} reconstructions"),
        )


def _beside(
    config: ReconstructConfig, observed: Observed, left: LeftOut | None, console: Console
) -> tuple[Classical, ...]:
    """Reconstruct by the methods to compare with; those that cannot do with these views are left out."""
    found = []
    for name in config.compare:
        if name == config.method:
            continue
        try:
            with console.status(f"reconstructing by {name}"):
                found.append(reconstruct(name, observed, left))
        except InputError as error:
            said = f"note: {name} is left out: {error}"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
    return tuple(found)


def _fitted(
    config: ReconstructConfig,
    job: Job,
    observed: Observed,
    beside: tuple[Classical, ...],
    folder: Path,
    console: Console,
) -> Reconstruction:
    """Fit an image, judge it by the unseen views, go on with all views and draw samples."""
    fitted = before = fit(job, observed, folder / "fit", console)
    check = spread = None
    if (unseen := observed.unseen) is not None:
        if config.doubt.uncertainty != "none":
            judged = draw(fitted, observed, config.doubt, console).samples
            check = check_views(judged, unseen.projector, unseen.sinogram, unseen.std)
            spread = spread_factor(check)
        if config.fit.finish:
            fitted = finish(fitted, observed, folder / "finish", console)
    seen = observed.whole if config.fit.finish else observed
    drawn = draw(fitted, seen, config.doubt, console)
    image, prediction = drawn.samples[0], None
    if len(drawn.samples) > 1:
        samples = drawn.samples
        if spread is not None and config.recalibrate:
            samples = rescaled(samples, spread.factor, UNIT, config.tails)
        prediction = Predictive.from_samples(samples)
        image = prediction.mean
    return Reconstruction(
        observed, image, prediction, beside, fitted, drawn, check, spread, folder, before=before
    )


def _keep_best(job: Job, observed: Observed, folder: Path, console: Console) -> None:
    """Write the image of the best parameters so far, if there are any yet."""
    for part in (folder / "finish", folder / "fit"):
        if (part / BEST).exists():
            with torch.no_grad():
                image = best_members(job, observed, part)(1).mean(0)
            write_image(folder, observed.scan, image, "as it was when its fit was stopped")
            console.print(f"image so far: {folder / IMAGE}", highlight=False, markup=False, soft_wrap=True)
            return
