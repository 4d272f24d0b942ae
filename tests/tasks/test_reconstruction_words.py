"""What is said of a reconstruction: each sentence under the numbers that call for it, and not otherwise."""

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from gramian.core.predictive import Predictive
from gramian.imaging.unseen_views import SpreadFactor
from gramian.tasks.classical_choice import Classical
from gramian.tasks.field_fits import Fit
from gramian.tasks.image_doubt import Doubt
from gramian.tasks.observed_views import observe
from gramian.tasks.reconstruct import ReconstructConfig, Reconstruction, reconstructed
from gramian.tasks.reconstruction_words import asked, cautions, misfit, rows, sentences, terminal_table
from gramian.tasks.scans import Source

CONFIG = ReconstructConfig(
    source=Source(size=24, views=20),
    compare=("fbp", "sirt"),
    fit=Fit(steps=20, device="cpu"),
    doubt=Doubt(samples=8),
    held_out=0.2,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Reconstruction:
    observed = observe(CONFIG.source.load(), held_out=CONFIG.held_out)
    return reconstructed(CONFIG, observed, tmp_path_factory.mktemp("run"), Console(quiet=True))


def known(found: Reconstruction, image: torch.Tensor, **changed) -> Reconstruction:
    """Return a reconstruction whose image and samples are given."""
    return replace(found, image=image, **changed)


def said(found: Reconstruction, config: ReconstructConfig = CONFIG) -> str:
    return " ".join(sentences(found, config))


def truth(found: Reconstruction) -> torch.Tensor:
    image = found.truth()
    assert image is not None
    return image


def test_the_table_has_a_row_for_every_method(made) -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(terminal_table(made, CONFIG))
    text = console.file.getvalue()
    for words in ("PSNR", "SSIM", "unseen misfit", "time", "field, dropout", "fbp", "sirt", "dB"):
        assert words in text
    unknown = replace(made, observed=replace(made.observed.whole, scan=replace(made.scan, truth=None)))
    console = Console(file=io.StringIO(), width=120)
    console.print(terminal_table(unknown, CONFIG))
    text = console.file.getvalue()
    assert "PSNR" not in text
    assert "misfit" not in text
    assert "sirt" in text


def test_rows_count_what_unseen_views_say_of_images_that_did_not_see_them(made) -> None:
    own, fbp, sirt = rows(made, CONFIG)
    assert own.misfit == pytest.approx(made.check.misfit)
    assert (fbp.settings, sirt.settings) == ("", f"iterations {made.classical[1].settings['iterations']}")
    unseen = made.observed.unseen
    assert fbp.misfit != pytest.approx(float(unseen.misfit(made.classical[0].image)), rel=1e-3)
    assert own.seconds == made.before.seconds + made.fitted.seconds + made.drawn.seconds
    assert own.scores == made.scores()[""]
    alone = replace(made, check=None, spread=None)
    assert misfit(alone) == made.before.misfit


def test_the_image_is_set_against_the_best_classical_one(made) -> None:
    image, noise = truth(made), torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    good, bad = ((image + size * noise) for size in (0.01, 0.1))
    classical = (Classical("fbp", bad, {}, 0.1), Classical("sirt", bad + 0.2, {}, 0.1))
    better = known(made, good, classical=classical)
    assert "the best of 2 classical methods, fbp, " in said(better)
    assert "the image is 20.00 dB better." in said(better)
    worse = known(made, bad, classical=(Classical("sirt", good, {}, 0.1),))
    assert ", sirt " in said(worse)
    assert "20.00 dB worse" in said(worse)
    assert "the image is as good" in said(known(made, bad, classical=(Classical("fbp", bad, {}, 0.1),)))
    alone = said(known(made, bad, classical=()))
    assert "reaches a PSNR of" in alone
    assert "classical" not in alone


def test_what_was_fitted_is_said(made) -> None:
    text = said(made)
    assert text.startswith("Shepp–Logan phantom: 20 views of 34 detectors, noise Gaussian, 40 dB; the image")
    size = sum(each.numel() for each in made.before.members.parameters())
    assert f"A field (hash) of {size:,} parameters was fitted to 16 views with total variation" in text
    assert "by the unseen views, and by 10 more to all views." in text
    assert "more to all views" not in said(replace(made, fitted=made.before))


def test_what_unseen_views_say_of_the_spread(made) -> None:
    found = replace(made, spread=SpreadFactor(1.25, 0.125, 0.1, False))
    text = said(found)
    assert "deviations of samples should be 1.25 ± 0.12 times as large, and were made so, in a t" in text
    assert "in a t distribution of 4 degrees of freedom." in text
    kept = said(found, replace(CONFIG, recalibrate=False))
    assert "times as large, which was not applied (--no-recalibrate)." in kept
    assert "and were made so." in said(found, replace(CONFIG, tails=None))
    assert "±" not in said(replace(made, spread=SpreadFactor(1.2, math.nan, 0.1, False)))
    assert "no factor makes honest error bars" in said(replace(made, spread=SpreadFactor(100, 1.0, 9, True)))
    assert "ask for no spread at all" in said(replace(made, spread=SpreadFactor(0, 1.0, 9, False)))


def shifted(found: Reconstruction, scale: float) -> Reconstruction:
    """Return samples around a centre that is wrong by a tenth, which deviate so many times a tenth."""
    draw = torch.Generator().manual_seed(0)
    centre = truth(found) + 0.1 * torch.randn(24, 24, generator=draw)
    samples = centre + 0.1 * scale * torch.randn(200, 24, 24, generator=draw)
    return replace(found, prediction=Predictive.from_samples(samples))


def test_honest_narrow_and_wide_samples_are_told_apart(made) -> None:
    assert "(honest calibration error, by ranks): they are honest." in said(shifted(made, 1.0))
    assert "they are too narrow" in said(shifted(made, 0.3))
    assert "they are too wide" in said(shifted(made, 3.0))
    assert "its margin is tuned on the truth" in said(shifted(made, 1.0))
    hidden = replace(made.observed, scan=replace(made.scan, truth=None))
    text = said(replace(made, observed=hidden))
    assert "calibration error" not in text
    assert "unseen views alone judge it" in text
    assert "nothing judges it" in said(replace(made, observed=replace(hidden, unseen=None)))


def test_cautions_come_with_what_they_warn_of(made) -> None:
    text = " ".join(cautions(made, CONFIG))
    assert "Error bars are checked along rays only" in text
    assert "chosen by views that were left out, not by the truth: sirt iterations" in text
    assert "No view was kept" not in text
    assert "Few unseen views" not in text
    few = replace(made, observed=replace(made.observed, unseen_views=(3, 9)))
    assert "Few unseen views: 2 judge the image" in " ".join(cautions(few, CONFIG))
    blind = replace(made, observed=made.observed.whole, check=None, spread=None)
    text = " ".join(cautions(blind, CONFIG))
    assert "nothing tells when to stop or whether error bars are right" in text
    assert "were chosen by the size of the noise" in text
    none = replace(CONFIG, doubt=replace(CONFIG.doubt, uncertainty="none"))
    assert "--uncertainty dropout gives error bars" in " ".join(cautions(made, none))
    assert "No uncertainty" not in " ".join(cautions(made, CONFIG))


def test_the_last_step_being_best_is_told(made) -> None:
    last = replace(made, before=replace(made.before, best=20))
    assert "--steps may help" in said(last)
    assert "--steps may help" not in said(replace(made, before=replace(made.before, best=19)))


def test_chains_that_have_not_mixed_are_told(made) -> None:
    def chained(middle: float, worst: float, divergences: float = 0.0) -> str:
        notes = {
            "r_hat_median": middle, "r_hat_worst": worst, "effective_samples_median": 12.0,
            "divergences": divergences,
        }  # fmt: skip
        return said(replace(made, drawn=replace(made.drawn, notes=notes)))

    assert "R̂ of pixels is 1.30 in the median and 1.90 at worst, with 12 indep" in chained(1.3, 1.9)
    assert "they have not mixed" in chained(1.3, 2.0)
    assert "they have mixed but for some pixels." in chained(1.01, 2.0)
    assert "they have mixed." in chained(1.01, 1.02)
    assert "3 transitions of the chains diverged." in chained(1.01, 1.02, 3.0)
    assert "diverged" not in chained(1.01, 1.02)
    assert "R̂" not in said(made)


def test_names_of_what_was_asked() -> None:
    assert asked(CONFIG) == "field, dropout"
    assert asked(replace(CONFIG, doubt=Doubt(uncertainty="dropout_ensemble"))) == "field, dropout ensemble"
    assert asked(replace(CONFIG, doubt=Doubt(uncertainty="none"))) == "field"
    assert asked(replace(CONFIG, method="sirt")) == "sirt"
