"""Predictions: theory over measurement, verdicts that follow from known recursions, refused inputs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.residual import Chain, Residual
from gramian.tasks.predict import PredictConfig, empirical, predict, predict_module
from gramian.tasks.predict_page import report_page, shown_layers, terminal_table, write_report
from gramian.tasks.verdict import COLLAPSED


def relu_map(c: float) -> float:
    return (math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))) / math.pi


def test_relu_collapses_where_its_map_says() -> None:
    layer, c = 0, 0.0
    while c < COLLAPSED:
        layer, c = layer + 1, relu_map(c)
    prediction = predict(PredictConfig(name="dense", depth=layer + 5, networks=0))
    assert prediction.verdict.kind == "collapsing"
    assert prediction.verdict.layer == layer
    assert prediction.theory.correlations["from 0"][layer] == pytest.approx(c, abs=1e-9)
    assert "--shaping tat" in prediction.advice
    shallow = predict(PredictConfig(name="dense", depth=layer - 5, networks=0))  # control
    assert shallow.verdict.kind == "fine"
    assert shallow.advice == ""


def test_unscaled_resnets_explode_and_scaled_ones_do_not() -> None:
    depth = 40
    bad = predict(PredictConfig(name="residual", depth=depth, networks=0))
    assert bad.verdict.kind == "exploding"
    assert bad.verdict.layer == math.ceil(4 / math.log10(2) + 1e-9)
    assert bad.theory.second_moment[-1] / bad.theory.second_moment[0] == pytest.approx(2.0**depth)
    assert bad.theory.gradient[0] == pytest.approx(2.0**depth)
    assert "--gains uniform" in bad.advice
    for rule in ("uniform", "decreasing"):
        good = predict(PredictConfig(name="residual", depth=depth, gains=rule, networks=0))
        assert good.verdict.kind == "fine"
    assert good.theory.gradient[0] < math.exp(3.39)


def test_small_weights_make_signals_vanish() -> None:
    prediction = predict(PredictConfig(name="dense", depth=30, weight_std=1.0, networks=0))
    assert prediction.verdict.kind == "vanishing"
    assert prediction.verdict.layer == 14  # 2^-14 < 1e-4 < 2^-13


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "dense", "activation": "tanh", "weight_std": 1.2, "bias_std": 0.3},
        {"name": "residual", "gains": "uniform", "activation": "gelu"},
        {"name": "residual", "gains": "decreasing", "norm": "rmsnorm"},
        {"name": "residual", "gains": "uniform", "norm": "batchnorm"},
        {"name": "residual_convolution", "gains": "uniform", "width": 96, "networks": 4},
        {"name": "residual_convolution", "norm": "batchnorm", "depth": 3, "width": 64, "networks": 3},
        {"name": "pre_norm", "depth": 4, "tokens": 12},
        {"name": "sas_p", "depth": 4, "tokens": 12},
        {"name": "e_spa", "depth": 4, "tokens": 12},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_finite_networks_follow_theory(settings) -> None:
    prediction = predict(PredictConfig(**{"depth": 6, "width": 384, "networks": 6} | settings))
    theory = prediction.theory
    for take in (
        lambda p: torch.tensor(p.second_moment),
        lambda p: torch.tensor(p.gradient),
    ):
        measured = torch.stack([take(each) for each in prediction.measured]).log().mean(0)
        assert (measured - take(theory).log()).abs().max() < 0.2
    for name, curve in theory.correlations.items():
        measured = torch.tensor([each.correlations[name] for each in prediction.measured]).mean(0)
        assert (measured - torch.tensor(curve)).abs().max() < 0.06


def test_another_theory_does_not_fit() -> None:
    """Control of the comparison above: gains of another rule are far outside its tolerance."""
    one = predict(PredictConfig(name="residual", gains="uniform", depth=6, width=384, networks=2))
    other = predict(PredictConfig(name="residual", depth=6, networks=0))
    measured = torch.tensor([each.gradient for each in one.measured]).log().mean(0)
    assert (measured - torch.tensor(other.theory.gradient).log()).abs().max() > 1


@pytest.mark.slow
def test_a_thousand_layers() -> None:
    prediction = predict(PredictConfig(name="residual", depth=1000, gains="uniform", networks=0))
    moments = prediction.theory.second_moment
    assert moments[-1] / moments[0] == pytest.approx((1 + 1 / 1000) ** 1000, rel=1e-9)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def block(width: int, seed: int) -> nn.Module:
    linear = nn.Linear(width, width, bias=False)
    nn.init.normal_(linear.weight, std=(2 / width) ** 0.5, generator=torch.Generator().manual_seed(seed))
    return Residual(Chain(nn.ReLU(), linear))


def test_a_module_of_ones_own() -> None:
    first = nn.Linear(10, 512)
    for parameter in first.parameters():
        nn.init.uniform_(parameter, -(10**-0.5), 10**-0.5, generator=torch.Generator().manual_seed(20))
    layers = nn.Sequential(first, *(block(512, seed) for seed in range(20)))
    prediction = predict_module(layers, normal(4, 10).float())
    assert prediction.verdict.kind == "exploding"
    (measured,) = prediction.measured
    ratio = np.log(measured.second_moment) - np.log(prediction.theory.second_moment)
    assert abs(ratio[1:]).max() < 0.5
    assert next(layers.parameters()).dtype == torch.float32  # left as it was
    with pytest.raises(InputError, match="a Bilinear, has no limit"):
        predict_module(nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4)), normal(3, 4))
    with pytest.raises(InputError, match="finite"):
        predict_module(layers, normal(4, 10) * math.nan)


def test_a_convolutional_module_of_ones_own() -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 128, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    prediction = predict_module(layers, normal(5, 3, 6, 6))
    (measured,) = prediction.measured
    for name in prediction.theory.correlations:
        gap = np.array(measured.correlations[name]) - np.array(prediction.theory.correlations[name])
        assert abs(gap).max() < 0.1
    gap = np.log(measured.second_moment) - np.log(prediction.theory.second_moment)
    assert abs(gap).max() < 0.5


def test_gradients_are_those_of_autograd() -> None:
    """The measured gradient of a linear chain is |Wᵀg|²/|g|², computed by hand."""
    from gramian.tasks.architectures import Network

    layers = [nn.Linear(5, 7, bias=False).double(), nn.Linear(7, 3, bias=False).double()]
    x = normal(4, 5)
    profile = empirical(Network(layers), x, {"all": None}, seed=3)
    g = torch.randn(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    one, two = g @ layers[1].weight, g @ layers[1].weight @ layers[0].weight
    expected = [(each.square().sum() / g.square().sum()).item() for each in (two, one, g)]
    assert profile.gradient == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"depth": -1}, "depth must be at least 1, got -1"),
        ({"width": 0}, "width must be at least 1"),
        ({"activation": "swishy"}, "unknown activation 'swishy'"),
        ({"name": "resnet"}, "unknown architecture 'resnet'"),
        ({"correlations": (0.5, 1.5)}, r"must lie in \[-1, 1\], got 1.5"),
        ({"correlations": (math.nan,)}, r"must lie in \[-1, 1\], got nan"),
        ({"correlations": ()}, "at least one correlation"),
        ({"weight_std": -1.0}, "weight_std must be zero or above"),
        ({"weight_std": math.nan}, "weight_std must be zero or above"),
        ({"gains": "quadratic"}, "unknown gains"),
        ({"gains": "uniform"}, "gains are of residual networks"),
        ({"shaping": "dkt"}, "unknown shaping"),
        ({"norm": "groupnorm"}, "unknown norm"),
        ({"networks": -1}, "networks cannot be negative"),
        ({"name": "convolution", "norm": "layernorm"}, "convolutions take the norm none or batchnorm"),
    ],
)
def test_settings_that_cannot_be_used(settings, words) -> None:
    with pytest.raises(InputError, match=words):
        predict(PredictConfig(**{"networks": 0, "depth": 3} | settings))


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def test_files_of_inputs_and_grams(tmp_path) -> None:
    gram = saved(tmp_path / "gram.npy", np.array([[1.0, 0.3], [0.3, 2.0]]))
    prediction = predict(PredictConfig(depth=2, gram=gram, networks=0))
    assert prediction.theory.correlations["mean of all pairs"][0] == pytest.approx(0.3 / math.sqrt(2))
    rows = saved(tmp_path / "rows.npy", np.array([[1.0, 0.0], [1.0, 1.0]]))
    prediction = predict(PredictConfig(depth=2, inputs=rows, networks=1, width=16))
    assert prediction.theory.correlations["mean of all pairs"][0] == pytest.approx(1 / math.sqrt(2))
    for name, array, words in (
        ("negative", np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.9], [0.0, 0.9, 1.0]]), "negative eigenvalue"),
        ("large", np.array([[1.0, 2.0], [2.0, 1.0]]), r"within \[-1, 1\]"),
        ("nan", np.array([[1.0, math.nan], [math.nan, 1.0]]), "not finite"),
        ("oblong", np.ones((2, 3)), "square"),
        ("text", np.array([["a", "b"], ["c", "d"]]), "matrix of numbers"),
    ):
        with pytest.raises(InputError, match=words):
            predict(PredictConfig(gram=saved(tmp_path / f"{name}.npy", array), networks=0))
    with pytest.raises(InputError, match="cannot be read"):
        predict(PredictConfig(gram=tmp_path / "absent.npy", networks=0))
    with pytest.raises(InputError, match="one of them only"):
        predict(PredictConfig(gram=gram, inputs=rows))


def test_report(tmp_path) -> None:
    config = PredictConfig(depth=6, width=32, networks=2, output=tmp_path / "out")
    prediction = predict(config)
    path = write_report(prediction, config)
    written = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert written["theory"]["second_moment"] == prediction.theory.second_moment
    assert len(written["measured"]) == 2
    assert {each.name for each in (tmp_path / "out" / "figures").iterdir()} == {
        "second_moment.svg",
        "correlation.svg",
        "gradient.svg",
    }
    assert prediction.verdict.sentence.split(":")[0] in path.read_text()
    with pytest.raises(InputError, match="--overwrite"):
        write_report(prediction, config)
    write_report(prediction, config, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="no prediction"):
        write_report(prediction, PredictConfig(output=tmp_path / "other"))


@pytest.mark.slow
def test_an_overflow_is_written_as_null(tmp_path) -> None:
    config = PredictConfig(name="residual", depth=1100, networks=0, output=tmp_path / "out")
    prediction = predict(config)
    write_report(prediction, config)
    written = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert written["theory"]["second_moment"][-1] is None
    assert "layer" in str(terminal_table(prediction).columns[0].header)
    assert report_page(prediction, {}).sections


def test_shown_layers() -> None:
    assert shown_layers(10) == [0, 1, 2, 4, 8, 10]
    assert shown_layers(1) == [0, 1]
