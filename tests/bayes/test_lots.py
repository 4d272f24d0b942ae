"""Members and chains in lots: those of one stack, whole lots, and in one lot the same as before."""

from functools import partial

import pytest
import torch

from gramian.bayes.ensemble import EnsembleConfig, fit_classifier, fit_ensemble, fit_heteroscedastic, join
from gramian.bayes.hmc import HMCConfig, around, sample
from gramian.bayes.lots import chains_in_lots, count_of
from gramian.bayes.risk import sampled_errors
from gramian.errors import InputError, StoppedError
from gramian.nn.mlp import mlp

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1).sin()
CONFIG = EnsembleConfig(members=5, steps=6, seed=2)
SETTINGS = HMCConfig(warmup=10, samples=6, max_depth=3, seed=1)
network = partial(mlp, 4, 1, widths=(8,), activation="relu", weight_std=1.5, bias_std=0.1)


def density(values: dict[str, torch.Tensor]) -> torch.Tensor:
    return -0.5 * values["a"].square().sum() - values["b"].cosh().log().sum()


START = around({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, 5, 0.5, seed=4)


@pytest.mark.parametrize(
    ("total", "together", "lots"), [(5, 2, 3), (5, 5, 1), (5, 9, 1), (6, 2, 3), (0, 3, 1)]
)
def test_how_many_lots(total: int, together: int, lots: int) -> None:
    assert count_of(total, together) == lots


@pytest.mark.parametrize("method", ["ntkgp_param", "rp_fn", "deep_ensemble", "ntkgp_lin"])
def test_lots_hold_the_members_of_one_stack(method: str) -> None:
    config = EnsembleConfig(method=method, members=5, steps=6, seed=2)
    whole = fit_ensemble(network, X, Y, config)
    one = fit_ensemble(network, X, Y, config, together=5)
    assert torch.equal(one.functions(X), whole.functions(X))
    lots = fit_ensemble(network, X, Y, config, together=2)
    assert lots.numbers == (0, 1, 2, 3, 4)
    torch.testing.assert_close(lots.functions(X), whole.functions(X), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lots.losses, whole.losses, rtol=1e-3, atol=1e-4)
    parts = [fit_ensemble(network, X, Y, config, share=(lot, 3)) for lot in range(3)]
    assert torch.equal(lots.functions(X), join(parts).functions(X))


def test_other_fits_in_lots() -> None:
    two = partial(mlp, 4, 2, widths=(8,), activation="relu", weight_std=1.5, bias_std=0.1)
    whole = fit_heteroscedastic(two, X, Y, CONFIG)
    lots = fit_heteroscedastic(two, X, Y, CONFIG, together=3)
    torch.testing.assert_close(lots.functions(X), whole.functions(X), rtol=1e-4, atol=1e-4)
    labels = (Y > 0).long()
    kind = fit_classifier(two, X, labels, CONFIG, together=3)
    torch.testing.assert_close(
        kind.ensemble.functions(X),
        fit_classifier(two, X, labels, CONFIG).ensemble.functions(X),
        rtol=1e-4,
        atol=1e-4,
    )


def test_chains_are_those_of_one_call() -> None:
    whole, one = sample(density, START, SETTINGS), chains_in_lots(density, START, SETTINGS, 5)
    assert whole.state.keys() == one.state.keys()
    assert all(torch.equal(value, one.state[name]) for name, value in whole.state.items())
    lots = chains_in_lots(density, START, SETTINGS, 2)
    torch.testing.assert_close(lots.draws, whole.draws, rtol=1e-3, atol=1e-3)
    longer = HMCConfig(**{**vars(SETTINGS), "samples": 8})
    on = sample(density, START, longer, resume=lots.state)
    assert torch.equal(on.draws[:, :6], lots.draws)
    assert on.draws.shape[1] == 8


def test_a_chain_goes_by_its_number() -> None:
    part = {name: value[[1, 3]] for name, value in START.items()}
    chosen = sample(density, part, SETTINGS, numbers=[1, 3])
    whole = sample(density, START, SETTINGS)
    torch.testing.assert_close(chosen.draws, whole.draws[[1, 3]], rtol=1e-3, atol=1e-3)
    other = sample(density, part, SETTINGS)  # control: chains 0 and 1
    assert not torch.allclose(other.draws, whole.draws[[1, 3]], rtol=1e-1, atol=1e-1)


def test_stopped_chains() -> None:
    with pytest.raises(StoppedError, match="lot 1 of 3"):
        chains_in_lots(density, START, SETTINGS, 2, stop=lambda: True)


def test_draws_are_the_same_when_they_are_shared() -> None:
    def losses(count: int, stream: torch.Generator) -> torch.Tensor:
        return torch.rand(count, 7, generator=stream).round()

    one, other = (torch.Generator().manual_seed(0) for _ in range(2))
    found = sampled_errors(losses, 150, one)
    shared = sampled_errors(losses, 150, other, passing=losses)
    assert torch.equal(found.risks, shared.risks)
    assert (found.n, found.draws) == (shared.n, shared.draws) == (7, 150)
    assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fit_ensemble(network, X, Y, CONFIG, together=0), "at least 1"),
        (lambda: fit_ensemble(network, X, Y, CONFIG, together=2, share=(0, 2)), "not both"),
        (lambda: chains_in_lots(density, START, SETTINGS, 0), "at least 1"),
        (lambda: sample(density, START, SETTINGS, numbers=[0, 1, 2, 3, 3]), "different numbers"),
        (lambda: sample(density, START, SETTINGS, numbers=[0]), "5 chains need"),
    ],
)
def test_bad_input(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()
