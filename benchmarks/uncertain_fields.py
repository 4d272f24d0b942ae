"""Fields with error bars beside classical methods, on slices whose truth judges them and nothing else.

    python benchmarks/uncertain_fields.py DATA --size 128 --views 60

DATA is a folder of square slices in [0, 1], test_*.npy, and val_*.npy for the data of
`classical_reconstruction.py`, by which sinograms are made here too. One fit of five members gives the rows of
one field, of an ensemble, and of the posteriors around the first member; one with dropout the other two. A
tenth of the views is unseen at first: it ends fits, chooses iterations of the classical methods and the
factor on the spread of samples; then it is given back. What a stopped run has fitted is not fitted again.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import torch
from classical_reconstruction import DECIBEL, measured, slices
from rich.console import Console
from side_by_side import write_results

from gramian.imaging.geometry import ParallelBeam, evenly, padded
from gramian.imaging.unseen_views import TAILS
from gramian.tasks.field_fits import Fit, Network
from gramian.tasks.field_study import AROUND, FieldStudy, Row, study
from gramian.tasks.image_doubt import Doubt
from gramian.tasks.scans import Scan


def scans(folder: Path, pattern: str, size: int, views: int, count: int) -> list[Scan]:
    """Return slices as scans, with the published noise."""
    truths, side = slices(folder, pattern, size, count), padded(size)
    beam = ParallelBeam(evenly(views), size, side)
    found = []
    for number, (truth, sinogram) in enumerate(zip(truths, measured(truths, views) * side, strict=True)):
        std = float(sinogram.square().mean().sqrt()) * 10 ** (-DECIBEL / 20)
        name = f"slice {number}"
        found.append(Scan(name, beam, sinogram, std, f"{DECIBEL:g} dB", 1.0, "", truth, None, ()))
    return found


def tails(text: str) -> float | None:
    return None if text == "none" else float(text)


def spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def lines(rows: list[Row]) -> Iterator[str]:
    names = list(dict.fromkeys(row.name for row in rows))
    yield (
        "| method | PSNR | SSIM | error, honest, as drawn | spread by unseen views | factor | coverage of "
        "95 % as drawn / spread | error, closed | error, published | NLL as drawn / spread | CRPS | "
        "width of 95 % | s |"
    )
    yield "|" + 13 * "---|"
    for name in names:
        own = [row for row in rows if row.name == name]
        cells = [
            spread([r.psnr for r in own], 2),
            f"{mean(r.ssim for r in own):.3f}",
        ]
        raw, scaled = [r.raw for r in own if r.raw], [r.scaled for r in own if r.scaled]
        if raw and scaled:
            cells += [
                spread([r.error for r in raw], 3),
                spread([r.error for r in scaled], 3),
                spread([r.factor for r in own if r.factor is not None], 2),
                f"{mean(float(r.inside.randomised[-1]) for r in raw):.2f} / "
                f"{mean(float(r.inside.randomised[-1]) for r in scaled):.2f}",
                f"{mean(r.everywhere.error for r in scaled):.3f}",
                f"{mean(r.truth_tuned for r in scaled):.3f}",
                f"{mean(r.nll for r in raw):.2f} / {mean(r.nll for r in scaled):.2f}",
                f"{mean(r.crps for r in scaled):.5f}",
                f"{mean(r.width for r in scaled):.3f}",
            ]
        else:
            cells += 9 * [""]
        yield f"| {name} | " + " | ".join([*cells, f"{mean(r.seconds for r in own):.0f}"]) + " |"


def one_by_one(rows: list[Row]) -> Iterator[str]:
    """Yield a table with a column for every scan and seed."""
    names, places = dict.fromkeys(r.name for r in rows), dict.fromkeys((r.scan, r.seed) for r in rows)
    yield "| method | " + " | ".join(f"{scan.split(',')[0]}, {seed}" for scan, seed in places) + " |"
    yield "|" + (1 + len(places)) * "---|"
    for name in names:
        own = {(r.scan, r.seed): r for r in rows if r.name == name}
        cells = [_cell(own[place]) if place in own else "" for place in places]
        yield f"| {name} | " + " | ".join(cells) + " |"


def _cell(row: Row) -> str:
    return f"{row.psnr:.2f}" + (f" ({row.scaled.error:.3f})" if row.scaled else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--views", type=int, default=60)
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--finish", type=float, default=Fit.finish)
    parser.add_argument("--variation", type=float, help="chosen by unseen views when not given")
    parser.add_argument("--dropout", type=float, default=Network.dropout)
    parser.add_argument(
        "--around", nargs="*", default=["last_layer", "laplace", "variational"], choices=AROUND
    )
    parser.add_argument("--warmup", type=int, default=Doubt.warmup)
    parser.add_argument("--max-depth", type=int, default=Doubt.max_depth)
    parser.add_argument("--tails", type=tails, default=TAILS, help="of spread samples; none leaves their own")
    parser.add_argument("--prior-precision", type=float, default=Doubt.prior_precision)
    parser.add_argument("--pattern", default="test_*.npy", help="of the slices' names")
    parser.add_argument("--single", action="store_true", help="no ensembles")
    parser.add_argument("--device", default="cpu", choices=["cpu", "auto"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs/uncertain-fields"))
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    config = FieldStudy(
        network=Network(dropout=given.dropout),
        fit=Fit(steps=given.steps, finish=given.finish, device=given.device, variation=given.variation),
        doubt=Doubt(warmup=given.warmup, max_depth=given.max_depth, prior_precision=given.prior_precision),
        ensembles=not given.single,
        around=tuple(given.around),
        classical=(*FieldStudy.classical, "anisotropic_tv"),
        tails=given.tails,
        seeds=tuple(given.seeds),
    )
    measurements = scans(given.data, given.pattern, given.size, given.views, given.slices)
    rows = study(measurements, config, given.runs / f"{given.size}-{given.views}", Console(soft_wrap=True))
    count = f"{given.slices} slices {given.pattern}, seeds {', '.join(map(str, given.seeds))}"
    law = "no t distribution" if given.tails is None else f"a t distribution of {given.tails:g} degrees"
    weight = "as views left out choose" if given.variation is None else f"{given.variation:g}"
    head = [
        f"{given.size} × {given.size} pixels, {given.views} views, noise of {DECIBEL:g} dB, {count}: mean ± "
        f"standard deviation over both. Fields: hash grids, {given.steps} steps and {given.finish:g} as many "
        f"with all views, total variation {weight}, dropout {given.dropout:g}; {Doubt.samples} "
        f"samples where they are drawn, in {law} once they are spread. Seconds are of fit and samples, "
        "of one field a fifth of five's.",
        "",
        "Errors of calibration are means over levels 0 to .95: honest is by ranks where truth or a sample is "
        "above 0, as drawn and with the spread that unseen views ask for; closed is that of closed "
        "intervals on all pixels, and published has open intervals widened by a margin fitted on the truth.",
        "",
    ]
    theme = f"uncertain_fields-{given.size}-{given.views}-views"
    singly = ["", "PSNR (dB) by slice and seed, with the honest error once samples are spread:", ""]
    write_results(theme, [*head, *lines(rows), *singly, *one_by_one(rows)], {})


if __name__ == "__main__":
    main()
