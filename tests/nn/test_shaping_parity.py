"""Shaped activations against independent reference values: every setting is read from the case's JSON."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gramian.core.maximal import local_curvature, local_slope, plain, residual
from gramian.core.shaping import (
    Shaping,
    dks,
    dks_leaky_relu,
    dks_relu,
    leaky_relu_map,
    local_maps,
    tat,
    tat_leaky_relu,
)
from gramian.errors import InputError
from gramian.nn.activations import ACTIVATIONS
from gramian.nn.tailored import Tailored
from reference import Case, cases, load

KINKED = {"relu": 0.0, "leaky_relu": None}


def of_kind(*words: str) -> list:
    """The cases that have these settings or arrays."""
    found = [parameter for parameter in cases("kernel_shaping") if has(parameter.values[0], words)]
    reason = f"no reference case has {' and '.join(words)}"
    return found or [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")]


def has(path: Path | None, words: tuple[str, ...]) -> bool:
    if path is None:
        return False
    spec = load(path).spec
    return set(words) <= spec["config"].keys() | spec["arrays"].keys()


def module(name: str) -> nn.Module:
    return nn.GELU() if name == "gelu_exact" else ACTIVATIONS[name]()


def row(shaping: Shaping) -> Tensor:
    return torch.tensor(list(vars(shaping).values()), dtype=torch.float64)


def assert_same_root(name: str, found: Tensor, expected: Tensor, rtol: float) -> None:
    """Equal, where an odd function leaves the sign of both shifts open."""
    if name in ("tanh", "erf", "sin"):
        sign = torch.tensor([1, expected[1].sign() * found[1].sign()] * 2)[[0, 1, 1, 0]]
        found = found * sign
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-10)


def assert_transforms(case: Case, name: str, index: int) -> None:
    """The stored transformed values follow from the stored constants in our module."""
    *constants, slope = case.arrays[f"params_{name}"][index].tolist()
    inner = nn.LeakyReLU(slope) if name == "leaky_relu" else module(name)
    y = Tailored(inner, Shaping(*constants))(case.arrays["x_grid"])
    torch.testing.assert_close(y, case.arrays[f"transformed_{name}"][index], rtol=1e-9, atol=1e-10)


@pytest.mark.parity
@pytest.mark.parametrize("path", of_kind("q_grid"))
def test_local_maps(path: Path) -> None:
    case = load(path)
    config, arrays = case.spec["config"], case.arrays
    tolerance = case.spec["suggested_test_tolerance"]["float64"]
    for name in config["activations"]:
        if name in KINKED:
            slope = config["leaky_relu_negative_slope"] if name == "leaky_relu" else 0.0
            found = [leaky_relu_map(slope)(c) for c in config["c_grid"]]
            expected = arrays[f"c_map_{name}"].tolist()
            assert found == pytest.approx(expected, rel=tolerance["rtol"], abs=tolerance["atol"])
            continue
        function = module(name)
        close = partial(pytest.approx, rel=tolerance["rtol"], abs=tolerance["atol"])
        for index, q in enumerate(config["q_grid"]):
            maps = local_maps(lambda x, q=q, function=function: function(math.sqrt(q) * x))
            assert maps.q == close(arrays[f"q_map_{name}"][index].item())
            assert maps.q_slope / q == close(arrays[f"q_slope_{name}"][index].item())
        maps = local_maps(function)
        for index, c in enumerate(config["c_grid"]):
            if c == 0:
                assert maps.c_zero == close(arrays[f"c_map_{name}"][index].item())
            if c == 1:
                assert maps.c_slope == close(arrays[f"c_slope_{name}"][index].item())
                assert maps.c_curvature == close(arrays[f"c_curv_{name}"][index].item())


@pytest.mark.parity
@pytest.mark.parametrize("path", of_kind("local_c_slope_target"))
def test_deep_kernel_shaping(path: Path) -> None:
    case = load(path)
    config, tolerance = case.spec["config"], case.spec["suggested_test_tolerance"]
    for index, depth in enumerate(config["depths"]):
        slope = case.arrays["local_c_slope_target"][index].item()
        assert local_slope(config["zeta"], plain(depth)) == pytest.approx(slope, abs=1e-7)
        for name in config["activations"]:
            assert_transforms(case, name, index)
            params = case.arrays[f"params_{name}"][index]
            rtol = tolerance["params_dks"]["rtol"]
            if name == "relu":
                torch.testing.assert_close(row(dks_relu(slope)), params[:4], rtol=rtol, atol=0)
            elif name == "leaky_relu":
                negative_slope, shaping = dks_leaky_relu(slope)
                found = torch.cat((row(shaping), torch.tensor([negative_slope])))
                torch.testing.assert_close(found, params, rtol=1e-6, atol=1e-7)
            else:
                found = row(dks(module(name), slope))
                assert_same_root(name, found, params[:4], rtol)
                exact = case.arrays[f"params_exact_{name}"][index]
                assert_same_root(name, found, exact, tolerance["params_exact"]["rtol"])


@pytest.mark.parity
@pytest.mark.parametrize("path", of_kind("tau", "depths"))
def test_smooth_tailoring(path: Path) -> None:
    case = load(path)
    config, tolerance = case.spec["config"], case.spec["suggested_test_tolerance"]
    for index, depth in enumerate(config["depths"]):
        curvature = local_curvature(config["tau"], plain(depth))
        assert curvature == pytest.approx(config["tau"] / depth, rel=1e-12)
        for name in config["activations"]:
            found = row(tat(module(name), curvature))
            assert_same_root(
                name, found, case.arrays[f"params_{name}"][index], tolerance["params_dks"]["rtol"]
            )
            exact = case.arrays[f"params_exact_{name}"][index]
            assert_same_root(name, found, exact, tolerance["params_exact"]["rtol"])


@pytest.mark.parity
@pytest.mark.parametrize("path", of_kind("feasible"))
def test_leaky_relu_of_a_chain(path: Path) -> None:
    case = load(path)
    config = case.spec["config"]
    atol = case.spec["suggested_test_tolerance"]["negative_slope"]["atol"]
    for i, eta in enumerate(config["etas"]):
        for j, depth in enumerate(config["depths"]):
            if not case.arrays["feasible"][i, j]:
                with pytest.raises(InputError, match="lower eta or take more layers"):
                    tat_leaky_relu(eta, plain(depth))
                continue
            slope = tat_leaky_relu(eta, plain(depth))
            assert slope == pytest.approx(case.arrays["negative_slope"][i, j].item(), abs=atol)
            scale = math.sqrt(2 / (1 + slope**2))
            assert scale == pytest.approx(case.arrays["output_scale"][i, j].item(), abs=atol)


@pytest.mark.parity
@pytest.mark.parametrize("path", of_kind("dks_local_slope"))
def test_targets_of_a_residual_network(path: Path) -> None:
    case = load(path)
    config, atol = case.spec["config"], case.spec["suggested_test_tolerance"]["all"]["atol"]
    maximal = residual(config["n_blocks"], config["shortcut_weight"], layers=2, last=1)
    slope = case.arrays["dks_local_slope"].item()
    assert local_slope(config["zeta"], maximal) == pytest.approx(slope, abs=atol)
    curvature = case.arrays["tat_local_curvature"].item()
    assert local_curvature(config["tau"], maximal) == pytest.approx(curvature, abs=atol)
    for eta, expected in zip(config["etas"], case.arrays["tat_negative_slope"].tolist(), strict=True):
        if expected < 0:
            with pytest.raises(InputError, match="lower eta"):
                tat_leaky_relu(eta, maximal)
        else:
            assert tat_leaky_relu(eta, maximal) == pytest.approx(expected, abs=atol)


@pytest.mark.parity
@pytest.mark.parametrize("path", of_kind("local_c_slope_target"))
@pytest.mark.parametrize("spoil", [lambda p: p * 1.001, lambda p: p[[0, 2, 1, 3]]], ids=["scaled", "swapped"])
def test_other_constants_are_noticed(path: Path, spoil: Callable[[Tensor], Tensor]) -> None:
    """Control: constants off by a thousandth, or with the shifts swapped, are not the same root."""
    case = load(path)
    name = next(name for name in case.spec["config"]["activations"] if name not in KINKED)
    exact = case.arrays[f"params_exact_{name}"][0]
    with pytest.raises(AssertionError):
        assert_same_root(name, spoil(exact), exact, 1e-7)
