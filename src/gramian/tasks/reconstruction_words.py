"""What a reconstruction tells its reader in words: a table of methods, sentences, and what to be wary of."""

import math
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from gramian.imaging.unseen_views import ViewCheck
from gramian.report import number
from gramian.report.distribution import percent
from gramian.tasks.classical_choice import Classical
from gramian.tasks.reconstruct import FITTED, ReconstructConfig, Reconstruction
from gramian.tasks.reconstruction_scores import LEVEL, DoubtScores, ImageScores

HONEST = 0.05
"""Calibration error inside up to which samples are called honest."""
MIXED = 1.05
"""R̂ above which chains are said not to have mixed."""
FEW = 4
"""Unseen views below which what they say is called rough."""
NEAR = 0.1
"""Decibels within which reconstructions are called equally good."""


@dataclass(frozen=True)
class Row:
    """A reconstruction in numbers."""

    name: str
    scores: ImageScores | None
    """Where the truth is known."""
    misfit: float | None
    """Squared residuals of unseen views in units of the noise, a ray, of the image by the kept ones."""
    seconds: float
    settings: str
    """What was chosen, in words."""


def rows(found: Reconstruction, config: ReconstructConfig) -> list[Row]:
    """Return the numbers of all reconstructions, that of the method that was asked for first."""
    scores = found.scores()
    if found.own is not None:
        own = _classical(found.own, scores.get(""))
    else:
        own = Row(asked(config), scores.get(""), misfit(found), seconds(found), "")
    return [own, *(_classical(each, scores.get(each.name)) for each in found.classical)]


def asked(config: ReconstructConfig) -> str:
    """Return the name of the method that was asked for, with its uncertainty."""
    if config.method not in FITTED or config.doubt.uncertainty == "none":
        return config.method
    return f"{config.method}, {config.doubt.uncertainty.replace('_', ' ')}"


def misfit(found: Reconstruction) -> float | None:
    """Return the misfit of unseen views a ray: of the mean of the samples, or of the image without any."""
    if found.check is not None:
        return found.check.misfit
    if found.own is not None:
        return found.own.misfit
    return None if found.before is None else found.before.misfit


def seconds(found: Reconstruction) -> float:
    """Return what the fit, its finish and the last samples took."""
    parts = [each.seconds for each in (found.before, found.drawn) if each is not None]
    if found.fitted is not None and found.fitted is not found.before:
        parts.append(found.fitted.seconds)
    return sum(parts)


def _classical(each: Classical, scores: ImageScores | None) -> Row:
    said = ", ".join(f"{_SETTINGS.get(name, name)} {value:g}" for name, value in each.settings.items())
    return Row(each.name, scores, each.misfit, each.seconds, said)


_SETTINGS = {"weight": "variation"}


def terminal_table(found: Reconstruction, config: ReconstructConfig) -> TerminalTable:
    """Return the methods, one a row; scores only where the truth is known."""
    known, judged = found.scan.truth is not None, found.observed.unseen is not None
    table = TerminalTable(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("")
    for heading in (*(("PSNR", "SSIM") if known else ()), *(("unseen misfit",) if judged else ()), "time"):
        table.add_column(heading, justify="right")
    for row in rows(found, config):
        cells = [] if row.scores is None else [f"{row.scores.psnr:.2f} dB", _similarity(row.scores.ssim)]
        if judged:
            cells.append("–" if row.misfit is None else number(row.misfit, 3))
        table.add_row(row.name, *cells, f"{row.seconds:,.1f} s")
    return table


def _similarity(ssim: float) -> str:
    return "–" if math.isnan(ssim) else f"{ssim:.3f}"


def sentences(found: Reconstruction, config: ReconstructConfig) -> list[str]:
    """Say what was fitted, how good the image is, whether its error bars are honest, and what is unsure."""
    return [
        scanned(found),
        *_fitted(found, config),
        *_quality(found, config),
        *_unseen(found, config),
        *_honesty(found),
        *cautions(found, config),
    ]


def scanned(found: Reconstruction) -> str:
    """Say what was scanned, how, and how large the image is."""
    scan = found.scan
    views, detectors = scan.sinogram.shape
    return (
        f"{scan.name}: {_count(views, 'view')} of {detectors:,} detectors, noise {scan.noise}; the image has "
        f"{found.observed.size} × {found.observed.size} pixels of {number(scan.geometry.pixel_mm, 3)} mm."
    )


def _fitted(found: Reconstruction, config: ReconstructConfig) -> list[str]:
    before, last = found.before, found.fitted
    if before is None or last is None:
        return []
    parts, fields = before.members.state.values(), len(before.members)
    size = sum(part.numel() for part in parts) // fields
    what = "A grid of pixels" if config.method == "pixels" else f"A field ({config.network.encoding})"
    if fields > 1:
        what = f"{fields} fields ({config.network.encoding})"
    said = (
        f"{what} of {size:,} parameters{' each' * (fields > 1)} {'were' if fields > 1 else 'was'} fitted to "
        f"{_count(len(found.observed.kept_views), 'view')} with total variation "
        f"{number(before.job.fit.weight, 3)} by {before.steps:,} steps"
    )
    if before.misfit is not None:
        said += f", best at step {before.best:,} by the unseen views"
    if last is not before:
        said += f", and by {last.steps:,} more to all views"
    return [f"{said}."]


def _quality(found: Reconstruction, config: ReconstructConfig) -> list[str]:
    """Compare the image with the truth beside the best classical one."""
    own, *others = rows(found, config)
    if own.scores is None:
        judge = "unseen views alone judge it" if found.observed.unseen is not None else "nothing judges it"
        return [f"The truth is not known, so there are no scores of the image; {judge}."]
    said = f"{own.name} reaches a PSNR of {own.scores.psnr:.2f} dB"
    if not others:
        return [f"{said}."]
    best = max(others, key=lambda row: row.scores.psnr if row.scores else -math.inf)
    assert best.scores is not None
    gap = own.scores.psnr - best.scores.psnr
    among = f"the best of {len(others)} classical methods, {best.name}," if len(others) > 1 else best.name
    verdict = "as good" if abs(gap) < NEAR else f"{abs(gap):.2f} dB {'better' if gap > 0 else 'worse'}"
    return [f"{said}, {among} {best.scores.psnr:.2f} dB: the image is {verdict}."]


def _unseen(found: Reconstruction, config: ReconstructConfig) -> list[str]:
    """Say what views that nothing was fitted to tell of the image and of its error bars."""
    value, count = misfit(found), len(found.observed.unseen_views)
    if value is None:
        return []
    who = f"{_count(count, 'view')} that the image was not fitted to {'differ' if count > 1 else 'differs'}"
    said = f"{who} from it by {number(value, 3)} variances of the noise a ray; 1 is noise alone."
    return [said] if found.check is None else [said, _spread(found, found.check, config)]


def _spread(found: Reconstruction, check: ViewCheck, config: ReconstructConfig) -> str:
    assert found.spread is not None
    factor, error = found.spread.factor, found.spread.error
    said = (
        f"With the spread of the samples added to the noise that is a χ² of {number(check.chi_square, 3)} a "
        f"ray, where honest error bars have 1: deviations of samples should be {number(factor, 3)}"
        f"{'' if math.isnan(error) else f' ± {number(error, 2)}'} times as large, "
    )
    if not config.recalibrate:
        return said + "which was not applied (--no-recalibrate)."
    if config.tails is None:
        return said + "and were made so."
    return said + f"and were made so, in a t distribution of {config.tails:g} degrees of freedom."


def _honesty(found: Reconstruction) -> list[str]:
    """Say by the truth, where it is known, whether samples of the image hold it as often as they should."""
    scores = found.doubt_scores()
    if scores is None:
        return []
    inside = coverage(scores)
    return [
        f"Beside the truth, where it or a sample is above 0, {percent(LEVEL)} intervals hold "
        f"{percent(inside)} of the pixels, and over all levels they miss theirs by {number(scores.error, 2)} "
        f"(honest calibration error, by ranks): {_verdict(scores)}.",
        f"The published calibration error is {number(scores.truth_tuned, 2)}: its margin is tuned on the "
        "truth, so it promises nothing of a scan whose truth is not known.",
    ]


def _verdict(scores: DoubtScores) -> str:
    gaps = scores.inside.randomised - scores.inside.levels
    if scores.error <= HONEST:
        return "they are honest"
    if float(gaps.max()) > HONEST and float(gaps.min()) < -HONEST:
        return "some levels are too wide and others too narrow"
    return "they are too wide" if float(gaps.mean()) > 0 else "they are too narrow"


def coverage(scores: DoubtScores) -> float:
    """Return the share of pixels inside 95 % intervals by ranks."""
    return float(scores.inside.randomised[(scores.inside.levels - LEVEL).abs().argmin()])


def cautions(found: Reconstruction, config: ReconstructConfig) -> list[str]:
    """Say what the numbers do not show, and what would."""
    said = [*_of_views(found), *_of_spread(found), *_of_steps(found, config), *_of_chains(found)]
    if found.prediction is not None and found.check is not None:
        said.append(
            "Error bars are checked along rays only: which pixel of a ray errs, and what no unseen ray "
            "crosses, is not checked."
        )
    if config.method in FITTED and config.doubt.uncertainty == "none":
        said.append("No uncertainty was asked for; --uncertainty dropout gives error bars.")
    chosen = [row for row in rows(found, config) if row.settings]
    if chosen:
        by = "views that were left out" if found.observed.unseen is not None else "the size of the noise"
        names = "; ".join(f"{row.name} {row.settings}" for row in chosen)
        said.append(f"Settings of classical methods were chosen by {by}, not by the truth: {names}.")
    return said


def _of_views(found: Reconstruction) -> list[str]:
    count = len(found.observed.unseen_views)
    if not count:
        judged = "when to stop or whether error bars are right" if found.fitted is not None else "the image"
        return [f"No view was kept from the fit, so nothing tells {judged}; --held-out 0.1 keeps a tenth."]
    if count < FEW:
        return [
            f"Few unseen views: {count} judge the image, so what they say is rough; --held-out keeps more."
        ]
    return []


def _of_spread(found: Reconstruction) -> list[str]:
    if found.spread is None:
        return []
    if found.spread.capped:
        return [
            "That factor is the largest that is looked for: samples hardly differ where the image is wrong, "
            "so no factor makes honest error bars of them."
        ]
    if found.spread.factor == 0:
        return ["The unseen views ask for no spread at all: noise alone explains what they differ by."]
    return []


def _of_steps(found: Reconstruction, config: ReconstructConfig) -> list[str]:
    before = found.before
    if before is None or before.misfit is None or before.best < config.fit.steps:
        return []
    return [f"Unseen views were predicted best after the last of {before.steps:,} steps; --steps may help."]


def _of_chains(found: Reconstruction) -> list[str]:
    notes = {} if found.drawn is None else found.drawn.notes
    said = []
    if "r_hat_median" in notes:
        middle, worst = notes["r_hat_median"], notes["r_hat_worst"]
        verdict = (
            "they have not mixed, and error bars are those of the chains' starts; more --warmup and "
            "--thinning may help"
            if middle > MIXED
            else "they have mixed" + (" but for some pixels" if worst > MIXED else "")
        )
        said.append(
            f"Chains: R̂ of pixels is {number(middle, 3)} in the median and {number(worst, 3)} at worst, with "
            f"{number(notes['effective_samples_median'], 2)} independent samples of a pixel: {verdict}."
        )
    if notes.get("divergences"):
        said.append(f"{number(int(notes['divergences']))} transitions of the chains diverged.")
    return said


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
