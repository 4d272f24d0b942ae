"""Ensembles against plain PyTorch, one module after the other."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ensemble_oracles import OTHER, PRIOR, SPREADS, X, Y, network, trained_alone
from gramian.bayes.ensemble import METHODS, EnsembleConfig, fit_ensemble, fit_heteroscedastic, join
from gramian.bayes.fitting import FLOOR
from gramian.bayes.trained import Ensemble, facts_of
from gramian.errors import DivergedError, InputError
from gramian.nn.mlp import mlp
from ntk_modules import Placed, make, rows, tokens

CONFIG = EnsembleConfig(members=3, steps=30, learning_rate=0.02, prior=PRIOR, noise_variance=0.1)


def changed(**settings) -> EnsembleConfig:
    return dataclasses.replace(CONFIG, **settings)


@pytest.mark.parametrize(("method", "exact"), list(SPREADS))
def test_members_are_those_of_a_loop_over_modules(method: str, exact: bool) -> None:
    config = changed(method=method, exact=exact, batch=5 if method == "ntkgp_fn" else None)
    found = fit_ensemble(network, X, Y, config).functions(OTHER)
    expected = torch.stack([trained_alone(config, network, m)[1] for m in range(3)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("method", "spoiled"),
    [
        ("ntkgp_param", {"noisy_targets": False}),
        ("ntkgp_param", {"method": "rp_param"}),
        ("ntkgp_fn", {"exact": True}),
        ("rp_fn", {"exact": True}),
        ("ntkgp_param", {"prior": lambda name, p: 1.0}),
        ("ntkgp_param", {"batch": 5}),
    ],
)
def test_the_loop_tells_what_is_spoiled(method: str, spoiled: dict) -> None:
    expected = trained_alone(changed(method=method), network, 0)[1]
    found = fit_ensemble(network, X, Y, changed(**{"method": method, **spoiled})).functions(OTHER)[0]
    assert (found - expected).abs().max() > 1e-3


def test_it_repeats_and_leaves_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, two = (fit_ensemble(network, X, Y, CONFIG) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.functions(OTHER), two.functions(OTHER))
    other = fit_ensemble(network, X, Y, changed(seed=1)).functions(OTHER)
    assert (other - one.functions(OTHER)).abs().min() > 1e-4


@pytest.mark.parametrize("method", ["ntkgp_param", "rp_fn", "ntkgp_lin"])
def test_shares_join_to_the_whole(method: str) -> None:
    config = changed(method=method, members=5)
    whole = fit_ensemble(network, X, Y, config)
    parts = [fit_ensemble(network, X, Y, config, share=(rank, 3)) for rank in (2, 0, 1)]
    assert [part.numbers for part in parts] == [(2,), (0, 3), (1, 4)]
    found = join(parts)
    assert found.numbers == (0, 1, 2, 3, 4)
    torch.testing.assert_close(found.functions(OTHER), whole.functions(OTHER), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.losses, whole.losses, rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="every member once"):
        join(parts[:2])
    other = fit_ensemble(network, X, Y, changed(method=method, members=5, seed=1), share=(0, 3))
    with pytest.raises(InputError, match="different configurations"):
        join([parts[0], other, parts[2]])


@pytest.mark.parametrize("method", METHODS)
def test_a_file_holds_it(method: str, tmp_path) -> None:
    found = fit_ensemble(network, X, Y[:, 0], changed(method=method, prior=None, steps=3))
    path = tmp_path / "folder" / "ensemble.safetensors"
    found.save(path, note="kept")
    again = Ensemble.load(path, network)
    assert torch.equal(again.functions(OTHER), found.functions(OTHER))
    assert torch.equal(again.predict(OTHER).mean, found.predict(OTHER).mean)
    assert again.config == found.config
    assert facts_of(path) == {"note": "kept"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(InputError, match="another network"):
        Ensemble.load(path, lambda: network(widths=(8, 7)))
    path.write_bytes(path.read_bytes()[:-50])
    for damaged in (path, tmp_path / "none"):
        with pytest.raises(InputError, match="no file of an ensemble"):
            Ensemble.load(damaged, network)


def test_predictions_are_moments_of_the_members() -> None:
    found = fit_ensemble(network, X, Y, CONFIG)
    values = found.functions(OTHER)
    predicted = found.predict(OTHER, rows=2)
    torch.testing.assert_close(predicted.mean, values.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(predicted.variance, values.var(0), rtol=0, atol=1e-12)
    assert predicted.noise is not None
    assert (predicted.noise == 0.1).all()
    flat = fit_ensemble(network, X, Y[:, 0], CONFIG).predict(OTHER)
    assert torch.equal(flat.mean, found.predict(OTHER).mean[:, 0])


def test_a_member_is_done_when_its_gradient_is_small() -> None:
    steps: list[int] = []
    config = changed(method="rp_param", prior=None, tolerance=3e-2, steps=2000)

    def line() -> nn.Module:
        return network(widths=())

    found = fit_ensemble(line, X, Y, config, steps.append)
    assert 10 < len(steps) < 1000
    alone = fit_ensemble(line, X, Y, config, share=(1, 3))
    torch.testing.assert_close(alone.functions(OTHER)[0], found.functions(OTHER)[1], rtol=0, atol=1e-10)
    short = fit_ensemble(line, X, Y, dataclasses.replace(config, tolerance=0.0, steps=len(steps)))
    assert (short.functions(OTHER) - found.functions(OTHER)).abs().max() > 1e-3


def test_what_does_not_vary_at_initialisation_stays() -> None:
    def normed() -> nn.Module:
        body = nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1))
        nn.init.zeros_(body[3].bias)
        return body

    config = changed(prior=None)
    kept = fit_ensemble(normed, X, Y, config)
    assert set(kept.stack.f.parameters) == {"0.weight", "0.bias", "3.weight"}
    held = kept.trained.networks[0]
    assert (held["1.weight"] == 1).all()
    assert (held["3.bias"] == 0).all()
    assert kept.prior is not None
    assert float(kept.prior["0.weight"]) == pytest.approx(1 / 6, rel=0.1)  # uniform on ±1/√2
    free = fit_ensemble(normed, X, Y, dataclasses.replace(config, method="deep_ensemble"))
    assert (free.trained.networks[0]["1.weight"] != 1).all()
    part = torch.ones(6, 2)
    part[0] = 0  # a prior of single entries holds those without
    given = {"0.weight": part, "0.bias": 0.5, "1.weight": 0.0, "1.bias": 0.0, "3.weight": 0.1, "3.bias": 0.0}
    some = fit_ensemble(normed, X, Y, dataclasses.replace(config, prior=given, method="rp_param"))
    start = fit_ensemble(normed, X, Y, dataclasses.replace(config, prior=given, solver="exact"))
    moved = some.trained.networks[0]["0.weight"] != start.trained.networks[0]["0.weight"]
    assert moved[:, 1:].all()
    assert not moved[:, 0].any()


def test_what_has_no_prior_stays_where_the_anchor_is_zero() -> None:
    variance = torch.full((1, 6), PRIOR["4.weight"])
    variance[0, :3] = 0
    given = {**PRIOR, "4.weight": variance}
    for settings in ({"method": "rp_fn"}, {"method": "ntkgp_fn", "exact": True}):
        found = fit_ensemble(network, X, Y, changed(prior=given, solver="exact", **settings)).trained
        assert found.tangent is not None
        moved = found.tangent["4.weight"][:, 0] != 0
        assert not moved[:, :3].any()
        assert moved[:, 3:].all()


class Idle(nn.Module):
    """Holds a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.last = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_never_called_does_no_harm(method: str) -> None:
    config = changed(method=method, prior=None, learning_rate=0.05)
    found = fit_ensemble(Idle, X, Y, config)
    assert found.functions(OTHER).isfinite().all()
    if method == "deep_ensemble":
        start = fit_ensemble(Idle, X, Y, dataclasses.replace(config, learning_rate=1e-9)).trained.networks[0]
        moved = {name: (value - start[name]).abs().max() for name, value in found.trained.networks[0].items()}
        assert moved["idle.weight"] == 0
        assert moved["last.weight"] > 0.1


class Compiled(nn.Module):
    """As torch.compile wraps a module, whose import alone takes seconds."""

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self._orig_mod = module or network()

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(x)


def test_a_network_that_torch_compiles_is_the_same() -> None:
    found = fit_ensemble(Compiled, X, Y, CONFIG)
    assert torch.equal(found.functions(OTHER), fit_ensemble(network, X, Y, CONFIG).functions(OTHER))


def test_an_auxiliary_network_may_be_of_another_precision() -> None:
    config = changed(method="ntkgp_lin")
    single = network()
    found = fit_ensemble(network, X, Y, config, auxiliary=single).functions(OTHER)
    for other in (single.double(), Compiled(single.double())):
        assert torch.equal(found, fit_ensemble(network, X, Y, config, auxiliary=other).functions(OTHER))


class Branching(nn.Module):
    """Goes one of two ways by its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x) if float(self.last.bias.detach()) > 0 else -self.last(x)


class Chancy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.rand(len(x), 1)


class Shifted(nn.Module):
    """A network with a buffer of its own, a frozen and a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 1)
        self.register_buffer("shift", torch.randn(4), persistent=False)
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + self.shift) * self.frozen)


def test_members_have_buffers_and_frozen_parameters_of_their_own() -> None:
    found = fit_ensemble(Shifted, X, Y, changed(prior=None, steps=2))
    state = found.trained.networks[0]
    assert len(state["shift"].unique()) == len(state["frozen"].unique()) == 12
    assert "frozen" not in found.stack.f.parameters
    assert found.functions(OTHER).isfinite().all()


def test_modules_of_other_kinds() -> None:
    """Dropout is off, rows may be tokens, and what vmap cannot run goes member by member."""
    dropped = fit_ensemble(
        lambda: nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1)), X, Y, changed(prior=None)
    )
    assert torch.equal(dropped.functions(OTHER), dropped.functions(OTHER))
    words = tokens(6, 5, 7, 0)
    placed = fit_ensemble(Placed, words, rows(6, 2).float(), changed(prior=None, steps=3))
    assert placed.stack.vmapped
    assert placed.functions(words).shape == (3, 6, 2)
    normed = fit_ensemble(
        lambda: nn.Sequential(weight_norm(nn.Linear(2, 4)), nn.Tanh(), nn.Linear(4, 1)), X, Y,
        changed(prior=None, steps=3),
    )  # fmt: skip
    assert normed.functions(OTHER).isfinite().all()
    branching = fit_ensemble(Branching, X, Y, changed(prior=None, members=6))
    assert not branching.stack.vmapped
    for m, values in enumerate(branching.functions(OTHER) - branching.offset(branching.stack, OTHER, 9)):
        weight, bias = (branching.trained.networks[0][name][m] for name in ("last.weight", "last.bias"))
        sign = 1 if bias > 0 else -1
        torch.testing.assert_close(values, sign * (OTHER @ weight.T + bias), rtol=0, atol=1e-12)


def two() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 2))


@pytest.mark.parametrize("method", ["deep_ensemble", "ntkgp_param"])
def test_heteroscedastic_members_learn_the_noise(method: str) -> None:
    x = torch.linspace(-2, 2, 400, dtype=torch.float64)[:, None]
    deviation = 0.1 + 0.4 * torch.sigmoid(3 * x)
    y = torch.sin(x) + deviation * rows(400, 1, seed=3)
    config = EnsembleConfig(method=method, members=3, steps=400, learning_rate=0.02)
    found = fit_heteroscedastic(two, x, y, config)
    predicted = found.predict(x)
    assert predicted.noise is not None
    assert predicted.noise.shape == (3, 400, 1)
    assert (predicted.noise >= FLOOR).all()
    ends = predicted.noise.mean(0)[[40, -40], 0]  # that of y: the members' own noise is not counted in
    torch.testing.assert_close(ends, deviation[[40, -40], 0].square(), rtol=0.4, atol=0)
    assert (predicted.mean - torch.sin(x)).square().mean().sqrt() < 0.15


def test_of_heteroscedastic_members_the_offset_moves_the_mean_alone() -> None:
    found = fit_heteroscedastic(two, OTHER[:, :1], Y[:5], EnsembleConfig(members=2, steps=2))
    raw, acting = (part(found.stack, OTHER[:, :1], 9) for part in (found.trained, found.offset))
    assert acting.abs().amin((0, 1)).min() > 1e-3
    torch.testing.assert_close(found.functions(OTHER[:, :1])[..., 1], raw[..., 1])
    torch.testing.assert_close(found.functions(OTHER[:, :1])[..., 0], (raw + acting)[..., 0])


def test_bad_input() -> None:
    nan = torch.full_like(Y, math.nan)
    norm = lambda: nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))  # noqa: E731
    fixed, narrow, linear = network(), network(widths=(7, 6)), changed(method="ntkgp_lin")
    for call, words in (
        (lambda: fit_ensemble(network, X, Y, changed(members=1)), "at least 2 members"),
        (lambda: fit_ensemble(network, X, Y, changed(method="swag")), "unknown method 'swag'"),
        (lambda: fit_ensemble(network, X, Y, changed(noise_variance=0.0)), "noise variance"),
        (lambda: fit_ensemble(network, X, Y, changed(solver="newton")), "unknown solver"),
        (lambda: fit_ensemble(network, X, Y, changed(steps=0)), "needs a step"),
        (lambda: fit_ensemble(network, X, Y, changed(batch=0)), "at least one row"),
        (lambda: fit_ensemble(network, X, Y, changed(batch=4, tolerance=1e-3)), "full batch"),
        (lambda: fit_ensemble(network, X, Y, changed(prior={"0.weight": 1.0})), "one entry for each"),
        (lambda: fit_ensemble(network, X, Y, changed(prior=lambda name, p: 0.0)), "variance above 0"),
        (lambda: fit_ensemble(network, X, Y, changed(last_layer="9")), "last_layer"),
        (lambda: fit_ensemble(network, X, Y, changed(last_layer="2")), "not linear in 2"),
        (lambda: fit_ensemble(network, X, Y, CONFIG, share=(3, 3)), "rank < world"),
        (lambda: fit_ensemble(network, X, Y, CONFIG, auxiliary=fixed), "for ntkgp_lin"),
        (lambda: fit_ensemble(network, X, Y, linear, auxiliary=nn.Linear(2, 1)), "another architecture"),
        (lambda: fit_ensemble(network, X, Y, linear, auxiliary=narrow), "another architecture"),
        (lambda: fit_ensemble(network, X, Y[:-1], CONFIG), "for these inputs"),
        (lambda: fit_ensemble(network, X, nan, CONFIG), "finite"),
        (lambda: fit_ensemble(network, X * math.inf, Y, CONFIG), "finite"),
        (lambda: fit_ensemble(network, X, Y.expand(12, 2), CONFIG), "needs 2 outputs"),
        (lambda: fit_ensemble(lambda: fixed, X, Y, changed(prior=None)), "fresh network"),
        (lambda: fit_ensemble(norm, X, Y, changed(prior=None)), "over the batch"),
        (lambda: fit_ensemble(Chancy, X, Y, changed(prior=None)), "depend on chance"),
        (lambda: fit_heteroscedastic(network, X, Y, CONFIG), "needs 2 outputs"),
        (lambda: fit_ensemble(lambda: make, X, Y, CONFIG), "torch module"),  # type: ignore[arg-type]
        (lambda: fit_ensemble(network, X, Y, CONFIG, share=(0, 3)).predict(OTHER), "2"),
    ):
        with pytest.raises(InputError, match=words):
            call()
    with pytest.raises(DivergedError, match="learning rate"):
        fit_ensemble(network, X, 1e200 * Y, CONFIG, optimiser=torch.optim.SGD)
    with pytest.raises(InputError, match="ntkgp_lin"):
        fit_heteroscedastic(lambda: mlp(2, 2), X, Y, changed(method="ntkgp_lin", prior=None))


@pytest.mark.parametrize("lost", ["losses", "config", "likelihood", "trainable"])
def test_a_file_that_lacks_a_part_of_it_is_refused(lost: str, tmp_path) -> None:
    path = tmp_path / "ensemble.safetensors"
    fit_ensemble(network, X, Y[:, 0], changed(steps=1)).save(path)
    with safe_open(path, "pt") as file:
        described, tensors = json.loads(file.metadata()["gramian"]), load_file(path)
    tensors.pop(lost, None)
    described.pop(lost, None)
    save_file(tensors, path, {"gramian": json.dumps(described)})
    with pytest.raises(InputError, match="does not hold the ensemble that it describes"):
        Ensemble.load(path, network)
    save_file(tensors, path, {"gramian": "[]"})
    with pytest.raises(InputError, match="holds no ensemble"):
        facts_of(path)
