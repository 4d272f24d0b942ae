"""NNGP and NTK against an independent implementation; every setting is read from the case's JSON."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gramian.theory.duals import dual
from gramian.theory.kernels import kernels, variances
from gramian.theory.maps import (
    Activation,
    Convolution,
    Dense,
    Flatten,
    GlobalPool,
    Map,
    Residual,
    Serial,
)
from reference import Case, cases, load


def named(prefixes: tuple[str, ...]) -> list[Any]:
    """The cases whose names start so; the skipped one where there are none at all."""
    found = [case for case in cases("ntk") if case.values[0] is None or case.id.startswith(prefixes)]
    assert found
    return found


def layers(config: dict[str, Any], activation: str, depth: int) -> list[Map]:
    """A dense layer, then `depth` times activation and dense."""
    dense = Dense(config["W_std"], config["b_std"])
    return [dense, *[Activation(dual(activation)), dense] * depth]


def mlp(config: dict[str, Any], name: str) -> Map:
    return Serial(*layers(config, config["activation"], int(name.rsplit("_", 1)[1])))


def residual_mlp(config: dict[str, Any], name: str) -> Map:
    """`name` is (un)scaled_depth_L, with _readout or without."""
    scaled, depth = name.startswith("scaled"), int(name.split("depth_")[1].split("_")[0])
    dense, activation = (
        Dense(config["W_std"], config["b_std"]),
        Activation(dual(config["activation"])),
    )
    block = Residual(Serial(activation, dense), 1 / math.sqrt(depth) if scaled else 1.0)
    return Serial(dense, *[block] * depth, *([activation, dense] if name.endswith("readout") else []))


def cnn(config: dict[str, Any], name: str) -> Map:
    """`name` is activation_depth_L_readout."""
    activation, rest = name.split("_depth_")
    depth, readout = rest.split("_")
    convolution = Convolution(
        tuple(config["filter_size"]),
        config["W_std"],
        config["b_std"],
        {"circular": "circular", "same": "zeros", "zeros": "zeros"}[config["padding"].lower()],
        config["stride"],
    )
    pool = {"flatten": Flatten(), "gap": GlobalPool()}[readout]
    stack = [convolution, Activation(dual(activation))] * int(depth)
    return Serial(*stack, pool, Dense(config["W_std"], config["b_std"]))


def stored(case: Case) -> Iterator[tuple[str, tuple[Tensor, Tensor | None], Tensor, Tensor]]:
    """Network name, its inputs, the NNGP kernel and the NTK."""
    x1, x2 = case.arrays["x1"], case.arrays["x2"]
    sides = {"11": (x1, None), "12": (x1, x2), "22": (x2, None)}
    for array, nngp in case.arrays.items():
        if array.startswith("nngp_"):
            side, name = array.removeprefix("nngp_").split("_", 1)
            yield name, sides[side], nngp, case.arrays[array.replace("nngp", "ntk", 1)]


def check(case: Case, mine: Tensor, theirs: Tensor) -> None:
    tolerance = case.spec["suggested_test_tolerance"]["float64"]
    torch.testing.assert_close(mine, theirs, rtol=tolerance["rtol"], atol=tolerance["atol"])


@pytest.mark.parity
@pytest.mark.parametrize("path", named(("mlp",)))
def test_dense_kernels(path: Path) -> None:
    case = load(path)
    config = case.spec["config"]
    seen = 0
    for name, (x, y), nngp, ntk in stored(case):
        mine = kernels(mlp(config, name), x, y)
        check(case, mine.nngp, nngp)
        check(case, mine.ntk, ntk)
        seen += 1
    assert seen >= len(config["depths"])


@pytest.mark.parity
@pytest.mark.parametrize("path", named(("residual_mlp",)))
def test_residual_kernels(path: Path) -> None:
    """Both sets of inputs in one fold, whose blocks are the three kernels of each network."""
    case = load(path)
    config, n = case.spec["config"], len(case.arrays["x1"])
    x = torch.cat((case.arrays["x1"], case.arrays["x2"]))
    blocks = {"11": (slice(n), slice(n)), "12": (slice(n), slice(n, None)), "22": (slice(n, None),) * 2}
    names = {array.split("_", 2)[2] for array in case.arrays if array.startswith("nngp_")}
    for name in sorted(names):
        mine = kernels(residual_mlp(config, name), x)
        for side, block in blocks.items():
            for kind in ("nngp", "ntk"):
                if f"{kind}_{side}_{name}" in case.arrays:
                    check(case, getattr(mine, kind)[block], case.arrays[f"{kind}_{side}_{name}"])
    assert len(names) >= 2 * len(config["depths"])


@pytest.mark.parity
@pytest.mark.parametrize("path", named(("cnn",)))
def test_convolutional_kernels(path: Path) -> None:
    case = load(path)
    config = case.spec["config"]
    seen = 0
    for name, (x, y), nngp, ntk in stored(case):
        for positions in ("same", "all") if name.endswith("flatten") else ("all",):
            mine = kernels(cnn(config, name), x, y, positions=positions)
            check(case, mine.nngp, nngp)
            check(case, mine.ntk, ntk)
        seen += 1
    assert seen >= len(config["conv_depths"]) * len(config["activations"])


@pytest.mark.parity
@pytest.mark.parametrize("path", named(("gp_posterior",)))
def test_kernels_of_the_toy_problem(path: Path) -> None:
    case = load(path)
    config = case.spec["config"]
    network = Serial(*layers(config, config["activation"], config["depth"]))
    train, test = case.arrays["x_train"], case.arrays["x_test"]
    square, cross = kernels(network, train), kernels(network, test, train)
    diagonal = variances(network, test)
    for kind in ("nngp", "ntk"):
        check(case, getattr(square, kind), case.arrays[f"{kind}_train_train"])
        check(case, getattr(cross, kind), case.arrays[f"{kind}_test_train"])
        check(case, getattr(diagonal, kind), case.arrays[f"{kind}_test_test_diag"])


@pytest.mark.parity
@pytest.mark.parametrize("path", named(("gp_posterior",)))
def test_posteriors_of_the_toy_problem(path: Path) -> None:
    """Mean k_*(k + v)^-1 y and variance k_** − k_*(k + v)^-1 k_*ᵀ + v, by the kernels."""
    case = load(path)
    config = case.spec["config"]
    network = Serial(*layers(config, config["activation"], config["depth"]))
    train, test = case.arrays["x_train"], case.arrays["x_test"]
    square, cross, diagonal = (
        kernels(network, train),
        kernels(network, test, train),
        variances(network, test),
    )
    for kind, theirs in (("nngp", "nngp"), ("ntk", "ntkgp")):
        noise = config["noise_variance"]
        noisy = getattr(square, kind) + noise * torch.eye(len(train), dtype=torch.float64)
        weights = torch.linalg.solve(noisy, getattr(cross, kind).mT)
        mean = weights.mT @ case.arrays["y_train"].squeeze(-1)
        explained = (getattr(cross, kind) * weights.mT).sum(-1)
        deviation = (getattr(diagonal, kind) - explained + noise).sqrt()
        check(case, mean, case.arrays[f"{theirs}_mean"])
        check(case, deviation, case.arrays[f"{theirs}_std"])


@pytest.mark.parity
@pytest.mark.parametrize("path", named(("mlp", "residual_mlp", "cnn")))
def test_a_changed_setting_is_noticed(path: Path) -> None:
    """Control: with σ_b off by 1e-4, parity fails."""
    case = load(path)
    config = {**case.spec["config"], "b_std": case.spec["config"]["b_std"] + 1e-4}
    network = {"mlp": mlp, "res": residual_mlp, "cnn": cnn}[case.name[:3]]
    name, (x, y), nngp, ntk = next(stored(case))
    mine = kernels(network(config, name), x, y, positions="all" if network is cnn else "none")
    for kernel, reference in ((mine.nngp, nngp), (mine.ntk, ntk)):
        with pytest.raises(AssertionError):
            check(case, kernel, reference)
