"""What a reconstruction leaves behind: images, a report page, figures and numbers."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gramian.files import atomic_folder
from gramian.imaging.quality import LEVELS
from gramian.imaging.unseen_views import ViewCheck, rescaled
from gramian.report import Column, Page, Plot, Section, Table, curves, number, save, write
from gramian.report.intervals import reliability
from gramian.report.slices import DOUBT, profile, slices
from gramian.tasks.field_fits import evaluations
from gramian.tasks.predict_page import plain
from gramian.tasks.reconstruct import ReconstructConfig, Reconstruction
from gramian.tasks.reconstruction_files import white, write_doubt, write_image
from gramian.tasks.reconstruction_scores import LEVEL, DoubtScores
from gramian.tasks.reconstruction_words import Row, asked, coverage, misfit, rows, seconds, sentences
from gramian.train.run import Run, versions

REPORT, FIGURES = "report.html", "figures"
OWN = "reconstruction"
"""Name of the image that was asked for, in figures."""


def report_page(found: Reconstruction, config: ReconstructConfig) -> Page:
    """Compose the report: images and scores, error bars and what judges them, the fit."""
    said = sentences(found, config)
    lead = [" ".join(said[:1]), " ".join(said[1:]), " ".join(found.scan.warnings)]
    sections = [_images(found, config), *_doubt(found, config), _profile(found), *_fit(found)]
    return Page(
        title=f"{found.scan.name}, reconstructed from {len(found.scan.sinogram)} views",
        lead="\n\n".join(part for part in lead if part),
        facts=_facts(found, config),
        sections=sections,
    )


def _facts(found: Reconstruction, config: ReconstructConfig) -> dict[str, str]:
    scan, observed = found.scan, found.observed
    beam = scan.geometry
    here = versions()
    return {
        "method": asked(config),
        "rays": f"{type(beam).__name__.removesuffix('Beam').lower()} beam, {len(scan.sinogram)} views of "
        f"{beam.detectors} detectors, {number(beam.spacing_mm, 3)} mm wide, noise {scan.noise}",
        "views": f"{len(observed.kept_views)} fitted, {len(observed.unseen_views)} unseen",
        "image": f"{observed.size} × {observed.size} pixels of {number(beam.pixel_mm, 3)} mm, "
        f"{scan.unit or 'without a unit'}, peak {number(scan.peak, 3)}",
        "pictures": f"in image.png black is 0 and white {number(white(scan, found.image), 3)}"
        + ("" if found.prediction is None else f", in std.png {number(_widest(found), 3)}"),
        "seeds": f"{config.source.seed} of the scan, {config.fit.seed} of the fit",
        "software": ", ".join(f"{name} {here[name]}" for name in ("gramian", "torch")),
    }


def _widest(found: Reconstruction) -> float:
    assert found.prediction is not None
    return float(found.prediction.std.max()) * found.scan.peak


def _images(found: Reconstruction, config: ReconstructConfig) -> Section:
    scan = found.scan
    truth = {} if scan.truth is None else {"truth": scan.truth}
    images = {
        **truth,
        OWN: _in_unit(found, found.image),
        **{each.name: _in_unit(found, each.image) for each in found.classical},
    }
    plots = [
        Plot(
            slices(
                {name: image.numpy() for name, image in images.items()},
                value=_value(found),
                ends=(0.0, white(scan, found.image)),
                pixel_mm=scan.geometry.pixel_mm,
            ),
            f"All on one scale, with a bar of its length. The reconstruction is by {asked(config)}"
            f"{', the mean of its samples' * (found.prediction is not None)}.",
            f"Images of {', '.join(images)}.",
            "Images",
        )
    ]
    if deviations := _deviations(found):
        top = max(float(image.max()) for image in deviations.values()) or scan.peak
        both = ", on one scale" if len(deviations) > 1 else ""
        plots.append(
            Plot(
                slices(
                    {name: image.numpy() for name, image in deviations.items()},
                    value=_value(found),
                    ends=(0.0, top),
                    pixel_mm=scan.geometry.pixel_mm,
                    colours=DOUBT,
                ),
                f"{' and '.join(deviations).capitalize()}{both}: large errors belong to large deviations.",
                f"{' and '.join(deviations)} of the reconstruction.",
                "Doubt and error",
            )
        )
    return Section("Images", "", (_methods(rows(found, config), found), *plots))


def _deviations(found: Reconstruction) -> dict[str, Tensor]:
    """Return maps of the standard deviation and of the error, as far as they are known."""
    known = {}
    if found.prediction is not None:
        known["standard deviation"] = _in_unit(found, found.prediction.std)
    if found.scan.truth is not None:
        known["absolute error"] = (_in_unit(found, found.image) - found.scan.truth).abs()
    return known


def _in_unit(found: Reconstruction, image: Tensor) -> Tensor:
    return image.detach().cpu() * found.scan.peak


def _value(found: Reconstruction) -> str:
    return f"attenuation ({found.scan.unit})" if found.scan.unit else "value"


def _methods(every: list[Row], found: Reconstruction) -> Table:
    known, judged = found.scan.truth is not None, found.observed.unseen is not None
    columns = [Column("method")]
    notes = []
    if known:
        columns += [Column(name, unit, better="high") for name, unit in SCORES.items()]
        notes.append("PSNR and SNR by mean squared errors, SSIM by windows of 11 pixels; images up to 1.")
    if judged:
        columns.append(Column("misfit of unseen views", "variances a ray", better="low"))
        notes.append(
            "Misfit: squared residuals of the unseen views in variances of their noise, of what was "
            "reconstructed from the other views alone; the images use all views."
        )
    columns += [Column("time", "s"), Column("chosen")]
    cells = [
        [
            row.name,
            *([_finite(getattr(row.scores, name.lower())) for name in SCORES] if known else []),
            *([row.misfit] if judged else []),
            row.seconds,
            row.settings or "–",
        ]
        for row in every
    ]
    return Table(columns, cells, notes=notes)


SCORES = {"PSNR": "dB", "SNR": "dB", "SSIM": ""}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _doubt(found: Reconstruction, config: ReconstructConfig) -> list[Section]:
    """Show whether error bars hold what they should, in the image and along unseen rays."""
    lines, scores = _coverages(found, config), found.doubt_scores()
    if not lines:
        return []
    figure = reliability(LEVELS, lines, [0.0] * len(LEVELS))
    caption = (
        "Share of targets inside central intervals, by their level and by ranks among the samples. On the "
        "dotted line intervals hold what they say; below it they are too narrow, above it too wide. Pixels: "
        "true values, where the truth or a sample is above 0. Rays: measurements of the unseen views, among "
        "one noisy measurement of every sample; the spread of the last line was chosen by the same rays."
    )
    alt = "Share of pixels and rays inside intervals against the level of the intervals."
    blocks: list[Plot | Table] = [Plot(figure, caption, alt, "Reliability")]
    if scores is not None:
        blocks.append(_calibration(scores))
    return [Section("Error bars", "", blocks)]


def _coverages(found: Reconstruction, config: ReconstructConfig) -> dict[str, list[float]]:
    """Return the share inside intervals by level: of pixels where truth is known, and of unseen rays."""
    lines, levels = {}, torch.tensor(LEVELS, dtype=torch.float64)
    if (scores := found.doubt_scores()) is not None:
        lines["pixels"] = scores.inside.randomised.tolist()
    if found.check is not None and found.spread is not None:
        checks = {"rays, as drawn": found.check}
        if config.recalibrate:
            spread = rescaled(found.check.prediction, found.spread.factor, tails=config.tails)
            checks["rays, spread"] = ViewCheck(spread, found.check.sinogram)
        for name, check in checks.items():
            generator = torch.Generator().manual_seed(config.fit.seed)
            lines[name] = check.drawn_coverage(generator, levels).tolist()
    return lines


def _calibration(scores: DoubtScores) -> Table:
    judged = {"where truth or a sample is above 0": scores.inside, "everywhere": scores.everywhere}
    columns = (
        Column("pixels"),
        Column("honest calibration error, by ranks", better="low"),
        Column("closed intervals", better="low"),
        Column("closed, against what so many samples can reach", better="low"),
        Column(f"width of {100 * LEVEL:g} % intervals", "of the peak"),
    )
    cells = [
        [name, each.randomised_error, each.error, each.corrected_error, float(each.width[-1])]
        for name, each in judged.items()
    ]
    return Table(
        columns,
        cells,
        title="Calibration beside the truth",
        notes=(
            "Errors: mean distance of the share inside from the level, over 20 levels from 0 to 95 %. "
            "Pixels that are 0 in the truth and in all samples are foretold without doubt and hide what "
            "others get wrong.",
            f"Published form, its margin tuned on the truth: {number(scores.truth_tuned, 2)}. NLL (published "
            f"form): {number(scores.nll)} nats a pixel; CRPS {number(scores.crps)} of the peak.",
        ),
    )


def _profile(found: Reconstruction) -> Section:
    """Show the middle row of the image with its interval, the truth and one classical image."""
    middle, pixel = found.observed.size // 2, found.scan.geometry.pixel_mm
    x = [(place - (found.observed.size - 1) / 2) * pixel for place in range(found.observed.size)]
    shown = {OWN: _in_unit(found, found.image)}
    if found.scan.truth is not None:
        shown["truth"] = found.scan.truth
    beside = {each.name: each.image for each in found.classical}
    if beside:
        name = next((n for n in beside if n.endswith("_tv")), next(iter(beside)))
        shown[name] = _in_unit(found, beside[name])
    band, words = None, ""
    if found.prediction is not None:
        low, high = (_in_unit(found, end)[middle].tolist() for end in found.prediction.interval(LEVEL))
        band, words = (low, high), f" The shade is the {100 * LEVEL:g} % interval."
    figure = profile(
        x,
        {name: image[middle].tolist() for name, image in shown.items()},
        band,
        value=_value(found),
        place="from the centre (mm)",
        interval=f"{100 * LEVEL:g} % interval",
    )
    caption = f"Row {middle + 1} of {found.observed.size}, from left to right.{words}"
    return Section("Middle row", "", (Plot(figure, caption, f"Values of {', '.join(shown)}.", "Middle row"),))


def _fit(found: Reconstruction) -> list[Section]:
    series = learning(found)
    if not any(len(steps) > 1 for steps, _ in series.values()):
        return []
    figure = curves(series, x="step", y="misfit, variances a ray", references={"noise": 1.0}, log=True)
    caption = (
        "Squared residuals in variances of the noise, of the image without dropout, before the finish with "
        "all views. Kept views that fall below 1 are fitted to their noise; the step at which unseen views "
        "are lowest was taken."
    )
    alt = "Misfit of kept and unseen views by step."
    return [Section("The fit", "", (Plot(figure, caption, alt, "Misfit by step"),))]


def learning(found: Reconstruction) -> dict[str, tuple[list[int], list[float]]]:
    """Return the misfits of kept and unseen views by step of the fit."""
    if found.before is None:
        return {}
    seen = evaluations(Run(found.folder / "fit"))
    series = {}
    for name, key in (("kept views", "kept_misfit"), ("unseen views", "unseen_misfit")):
        there = [row for row in seen if key in row]
        if there:
            series[name] = [row["step"] for row in there], [row[key] for row in there]
    return series


def write_report(found: Reconstruction, config: ReconstructConfig) -> Path:
    """Write images, deviations, figures, report.html and last result.json into the run folder; return it."""
    folder, how = found.folder, f"by {asked(config)}"
    write_image(folder, found.scan, found.image, how)
    if found.prediction is not None:
        write_doubt(folder, found.scan, found.prediction, how)
    page = report_page(found, config)
    with atomic_folder(folder / FIGURES, replace=True) as temporary:
        for section in page.sections:
            for block in section.blocks:
                if isinstance(block, Plot):
                    save(block.figure, temporary / f"{block.title.lower().replace(' ', '_')}.svg")
    write(page, folder / REPORT)
    Run(folder).write_result(numbers(found, config))
    return folder


def numbers(found: Reconstruction, config: ReconstructConfig) -> dict[str, Any]:
    """Return what result.json holds: the scan, scores, misfits, spread, calibration, times."""
    scan, observed, doubt = found.scan, found.observed, found.doubt_scores()
    return plain(
        {
            "versions": versions(),
            "scan": {
                "name": scan.name,
                "views": len(scan.sinogram),
                "detectors": scan.geometry.detectors,
                "size": observed.size,
                "pixel_mm": scan.geometry.pixel_mm,
                "unit": scan.unit,
                "peak": scan.peak,
                "noise": scan.noise,
                "unseen_views": observed.unseen_views,
                "warnings": scan.warnings,
            },
            "white": white(scan, found.image),
            "methods": [asdict(row) for row in rows(found, config)],
            "unseen": {} if found.check is None else _judged(found, found.check),
            "misfit": misfit(found),
            "spread": None if found.spread is None else asdict(found.spread),
            "spread_applied": found.spread is not None and config.recalibrate,
            "doubt": None if doubt is None else _doubted(doubt),
            "coverage": {"levels": LEVELS, **_coverages(found, config)},
            "notes": {} if found.drawn is None else dict(found.drawn.notes),
            "steps": [each.steps for each in (found.before, found.fitted) if each is not None],
            "best_step": None if found.before is None else found.before.best,
            "chosen": {
                each.name: dict(each.settings)
                for each in (*found.classical, *([found.own] if found.own else []))
            },
            "seconds": seconds(found) if found.own is None else found.own.seconds,
            "learning": learning(found),
            "sentences": [*sentences(found, config)],
        }
    )


def _judged(found: Reconstruction, check: ViewCheck) -> dict[str, float]:
    """Return what unseen views say of the samples as drawn, and of them with the spread that they chose."""
    assert found.spread is not None
    spread = replace(check, prediction=rescaled(check.prediction, found.spread.factor))
    return {
        "misfit": check.misfit,
        "chi_square": check.chi_square,
        "nll": check.nll,
        "chi_square_spread": spread.chi_square,
        "nll_spread": spread.nll,
    }


def _doubted(scores: DoubtScores) -> dict[str, Any]:
    calibrations = {
        name: {
            "by_ranks": each.randomised_error,
            "closed": each.error,
            "closed_corrected": each.corrected_error,
            "width": float(each.width[-1]),
        }
        for name, each in (("inside", scores.inside), ("everywhere", scores.everywhere))
    }
    return {
        "nll": scores.nll,
        "crps": scores.crps,
        "coverage_95": coverage(scores),
        "truth_tuned_calibration_error": scores.truth_tuned,
        "calibration_error": calibrations,
    }
