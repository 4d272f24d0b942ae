"""Monte-Carlo dropout against closed forms of the masks' law."""

import pytest
import torch
from torch import nn

from gramian.bayes.dropout import DropoutConfig, DropoutNetwork, fit_dropout
from gramian.errors import InputError

ROWS = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 1))


def test_mean_and_variance_are_those_of_the_masks() -> None:
    """f = Σ_i w_i m_i h_i/(1 − p): mean Σ w_i h_i, variance p/(1 − p) Σ (w_i h_i)²."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Dropout(0.3), nn.Linear(5, 1)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    found = DropoutNetwork(module, DropoutConfig(samples=20_000, noise_variance=0.2)).predict(x)
    last = module[1]
    assert isinstance(last, nn.Linear)
    terms = x * last.weight[0]
    variance = 0.3 / 0.7 * terms.square().sum(-1, keepdim=True)
    torch.testing.assert_close(found.mean, last(x), rtol=0, atol=4 * (variance.max() / 20_000).sqrt().item())
    torch.testing.assert_close(found.variance, variance, rtol=0.06, atol=0)
    assert found.noise is not None
    assert (found.noise == 0.2).all()
    assert (found.variance - 2 * variance).abs().min() > 0.06 * variance.min()


def test_it_learns_and_repeats() -> None:
    y = torch.sin(3 * ROWS)
    config = DropoutConfig(steps=400, learning_rate=1e-2, samples=50)
    steps: list[int] = []
    one = fit_dropout(network, ROWS, y, config, steps.append)
    before = torch.random.get_rng_state()
    two = fit_dropout(network, ROWS, y, config)
    assert torch.equal(before, torch.random.get_rng_state())
    first, second = one.predict(ROWS), two.predict(ROWS)
    assert torch.equal(first.mean, second.mean)
    assert steps == list(range(1, 401))
    assert (first.mean - y).square().mean() < 0.2 * y.square().mean()
    assert first.samples is not None
    assert first.samples.shape == (50, 40, 1)
    assert not one.module.training


def test_batches_take_every_row() -> None:
    config = DropoutConfig(steps=300, learning_rate=1e-2, batch=7, samples=20)
    found = fit_dropout(network, ROWS, ROWS, config).predict(ROWS)
    assert (found.mean - ROWS).square().mean() < 0.05


def test_rows_may_be_tokens() -> None:
    words = torch.arange(40).view(20, 2) % 5

    def reader() -> nn.Module:
        return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 1))

    config = DropoutConfig(steps=200, learning_rate=1e-2, samples=20)
    y = words[:, :1].float()
    found = fit_dropout(reader, words, y, config).predict(words)
    assert (found.mean - y).square().mean() < 0.3 * y.var()


def test_other_layers_stay_as_at_evaluation() -> None:
    module = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    norm = module[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    before = norm.running_mean.clone()
    DropoutNetwork(module, DropoutConfig(samples=3)).predict(ROWS)
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"samples": 1}, "2 samples"), ({"steps": 0}, "1 step")],
)
def test_settings_that_cannot_be_used(change, words) -> None:
    with pytest.raises(InputError, match=words):
        fit_dropout(network, ROWS, ROWS, DropoutConfig(**change))


def test_data_and_modules_that_cannot_be_used() -> None:
    config = DropoutConfig(steps=2)
    with pytest.raises(InputError, match="no dropout layer"):
        fit_dropout(lambda: nn.Linear(1, 1), ROWS, ROWS, config)
    with pytest.raises(InputError, match="one for each of 40"):
        fit_dropout(network, ROWS, ROWS[:-1], config)
    with pytest.raises(InputError, match="finite"):
        fit_dropout(network, ROWS, torch.full_like(ROWS, torch.nan), config)
    with pytest.raises(InputError, match="where targets are"):
        fit_dropout(network, ROWS, ROWS[:, 0], config)
