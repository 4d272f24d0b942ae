"""The report of a reconstruction: what it shows, its numbers, and strings of users that stay strings."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from gramian.report import Plot, Table, render
from gramian.tasks.field_fits import Fit
from gramian.tasks.image_doubt import Doubt
from gramian.tasks.observed_views import observe
from gramian.tasks.reconstruct import ReconstructConfig, Reconstruction, reconstructed
from gramian.tasks.reconstruction_page import learning, numbers, report_page, write_report
from gramian.tasks.scans import Source
from gramian.train.run import RESULT

CONFIG = ReconstructConfig(
    source=Source(size=24, views=20),
    compare=("fbp", "fista_tv"),
    fit=Fit(steps=20, device="cpu"),
    doubt=Doubt(samples=8),
    held_out=0.2,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Reconstruction:
    observed = observe(CONFIG.source.load(), held_out=CONFIG.held_out)
    return reconstructed(CONFIG, observed, tmp_path_factory.mktemp("run"), Console(quiet=True))


def plots(found: Reconstruction, config: ReconstructConfig = CONFIG) -> dict[str, Plot]:
    page = report_page(found, config)
    return {
        block.title: block for section in page.sections for block in section.blocks if isinstance(block, Plot)
    }


def names(plot: Plot) -> list[str]:
    return [text.get_text() for text in plot.figure.texts]


def unknown(found: Reconstruction) -> Reconstruction:
    """Return the same without the truth."""
    return replace(found, observed=replace(found.observed, scan=replace(found.scan, truth=None)))


def test_all_figures_are_there_with_the_same_scale(made) -> None:
    shown = plots(made)
    assert list(shown) == ["Images", "Doubt and error", "Reliability", "Middle row", "Misfit by step"]
    pictures = [axes.images[0] for axes in shown["Images"].figure.axes if axes.images]
    assert {"truth", "reconstruction", "fbp", "fista_tv", "5 mm"} <= set(names(shown["Images"]))
    assert {image.get_clim() for image in pictures} == {(0.0, float(made.scan.truth.max()))}
    np.testing.assert_allclose(pictures[1].get_array(), made.image.numpy(), rtol=1e-6)
    doubt = [axes.images[0] for axes in shown["Doubt and error"].figure.axes if axes.images]
    assert len({image.get_clim() for image in doubt}) == 1
    np.testing.assert_allclose(doubt[0].get_array(), made.prediction.std.numpy(), rtol=1e-6)
    np.testing.assert_allclose(doubt[1].get_array(), (made.image - made.scan.truth).abs(), rtol=1e-4)


def test_the_profile_is_the_middle_row(made) -> None:
    axes = plots(made)["Middle row"].figure.axes[0]
    own, true, classical = (line.get_ydata() for line in axes.get_lines())
    np.testing.assert_allclose(own, made.image[12].numpy(), rtol=1e-6)
    np.testing.assert_allclose(true, made.scan.truth[12].numpy())
    np.testing.assert_allclose(classical, made.classical[1].image[12].numpy())  # total variation, not fbp
    assert axes.get_lines()[0].get_xdata()[[0, -1]].tolist() == [-11.5, 11.5]


def test_reliability_has_pixels_and_rays_before_and_after(made) -> None:
    assert {"pixels", "rays, as drawn", "rays, spread"} <= set(names(plots(made)["Reliability"]))
    kept = names(plots(made, replace(CONFIG, recalibrate=False))["Reliability"])
    assert "rays, spread" not in kept
    assert "pixels" not in names(plots(unknown(made))["Reliability"])
    covered = numbers(made, CONFIG)["coverage"]
    gaps = {name: np.abs(np.subtract(row, covered["levels"])).mean() for name, row in covered.items()}
    assert gaps["rays, spread"] < gaps["rays, as drawn"]


def test_without_truth_samples_or_unseen_views_there_is_less(made) -> None:
    assert "truth" not in names(plots(unknown(made))["Images"])
    assert "absolute error" not in names(plots(unknown(made))["Doubt and error"])
    point = replace(made, prediction=None, check=None, spread=None)
    assert "Reliability" not in plots(point)
    assert "Doubt and error" not in plots(unknown(point))
    tables = [
        b for s in report_page(unknown(made), CONFIG).sections for b in s.blocks if isinstance(b, Table)
    ]
    assert [column.heading for column in tables[0].columns] == [
        "method", "misfit of unseen views", "time", "chosen",
    ]  # fmt: skip


def test_misfits_by_step_are_those_of_the_fit(made) -> None:
    steps, values = learning(made)["unseen views"]
    place = steps.index(made.before.best)
    assert values[place] == pytest.approx(made.before.misfit)
    assert min(values) == values[place]
    assert learning(replace(made, before=None)) == {}


def test_strings_of_users_stay_strings(made) -> None:
    scan = replace(made.scan, name="<script>alert(1)</script>.npy", warnings=("<b>beware</b>",))
    found = replace(made, observed=replace(made.observed, scan=scan))
    text = render(report_page(found, CONFIG))
    assert "<script>" not in text
    assert "<b>beware" not in text
    assert "&lt;b&gt;beware&lt;/b&gt;" in text
    assert text.count("data:image/png;base64") >= 6


def test_the_folder_holds_everything_and_numbers_agree(made) -> None:
    folder = write_report(made, CONFIG)
    assert {path.name for path in folder.iterdir()} == {
        "fit", "finish", "figures", "report.html", "result.json", "image.npy", "image.png", "std.npy",
        "std.png", "lower.npy", "upper.npy",
    }  # fmt: skip
    assert sorted(path.name for path in (folder / "figures").iterdir()) == [
        "doubt_and_error.svg", "images.svg", "middle_row.svg", "misfit_by_step.svg", "reliability.svg",
    ]  # fmt: skip
    found = json.loads((folder / RESULT).read_text())
    image = torch.from_numpy(np.load(folder / "image.npy"))
    error = float((image - made.scan.truth).square().mean())
    assert found["methods"][0]["scores"]["psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    assert found["doubt"]["calibration_error"]["inside"]["by_ranks"] == made.doubt_scores().error
    assert found["spread"]["factor"] == made.spread.factor
    assert found["unseen"]["chi_square"] == made.check.chi_square
    assert found["unseen"]["nll_spread"] <= found["unseen"]["nll"]
    assert found["unseen"]["nll"] - found["unseen"]["nll_spread"] == pytest.approx(made.spread.gain, rel=1e-6)
    assert set(found["chosen"]) == {"fbp", "fista_tv"}
    again = write_report(made, CONFIG)  # replaces what is there
    assert json.loads((again / RESULT).read_text()) == found
