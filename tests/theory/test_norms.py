import math

import pytest
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.theory.duals import dual
from gramian.theory.maps import Activation, BatchNorm, Dense, Norm, Residual, Serial, signal


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_norm_makes_cosines():
    x, y = draws(4, 6), draws(3, 6, seed=1)
    out = Norm()(signal(x, y).with_tangent(draws(4, 3, seed=2)))
    norms = x.norm(dim=1)[:, None] * y.norm(dim=1)[None, :]
    torch.testing.assert_close(out.activation.cross, x @ y.T / norms)
    torch.testing.assert_close(out.activation.left, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(out.tangent, draws(4, 3, seed=2) / (norms / 6))


@pytest.mark.parametrize("positions", ["none", "same", "all"])
def test_norm_is_the_layer_on_the_inputs(positions):
    """RMSNorm of the inputs themselves, ε inside the root, gives the same moments."""
    shape = (3, 7) if positions == "none" else (3, 4, 2, 7)
    x, y = draws(*shape), draws(*shape, seed=1)
    layer = torch.nn.RMSNorm(7, eps=0.3, dtype=torch.float64)
    mine = Norm(0.3)(signal(x, y, positions=positions))
    theirs = signal(layer(x).detach(), layer(y).detach(), positions=positions)
    for name in ("cross", "left", "right"):
        torch.testing.assert_close(getattr(mine.activation, name), getattr(theirs.activation, name))
    if positions == "all":
        torch.testing.assert_close(mine.within, theirs.within)
    bare = Norm()(signal(x, y, positions=positions))
    assert not torch.allclose(bare.activation.cross, mine.activation.cross)  # control: ε counts


def test_batch_norm_against_the_layer():
    """Standardised over a batch of many directions, features have the Gram of the map."""
    n, width = 96, 40_000
    x = draws(n, 200)
    limit = Serial(Dense(1.3), Activation(dual("relu")), BatchNorm())
    hidden = (x @ draws(200, width, seed=1) * 1.3 / math.sqrt(200)).relu()
    standardised = (hidden - hidden.mean(0)) / hidden.std(0, correction=0)
    mine, theirs = limit(signal(x)).activation.cross, standardised @ standardised.T / width
    assert (mine - theirs).abs().max() < 0.07
    assert (mine - theirs).square().mean().sqrt() < 0.015
    assert (Norm()(signal(x)).activation.cross - theirs).abs().max() > 0.1  # control: by input, not by batch


def test_batch_norm_residual_network_grows_polynomially():
    """q_l = q_0 + Σ λ² and gradients grow by ∏(1 + κ/q), κ = 1/(1 − 1/π), for independent inputs.

    The tangent of the blocks' own weights is taken off, so that the gradient alone is left.
    """
    n, blocks = 300, 10
    branch = Serial(Activation(dual("relu")), Dense(math.sqrt(2)), BatchNorm())
    network = Serial(*[Residual(branch)] * blocks)
    state = signal(math.sqrt(n) * torch.eye(n, dtype=torch.float64))
    moved = network(state.with_tangent(torch.eye(n, dtype=torch.float64))).tangent - network(state).tangent
    kappa = 1 / (1 - 1 / math.pi)
    expected = math.prod(1 + kappa / (1 + block) for block in range(blocks))
    assert moved.diagonal().mean().item() == pytest.approx(expected, rel=0.08)
    q = network(state).activation.left
    torch.testing.assert_close(q, torch.full_like(q, 1.0 + blocks), rtol=0.02, atol=0)
    assert 2.0**blocks > 30 * expected  # control: without the norm every block doubles both


def test_batch_norm_of_positions_counts_them_as_samples():
    x = draws(3, 5, 4)
    out = BatchNorm()(signal(x, positions="all"))
    rows = x.flatten(0, 1)
    centred = rows - rows.mean(0)
    gram = centred @ centred.T
    torch.testing.assert_close(out.activation.cross, gram / gram.diagonal().mean())
    assert out.activation.left.mean().item() == pytest.approx(1, rel=1e-12)
    assert out.symmetric


def test_bad_input_is_named():
    with pytest.raises(InputError, match="one batch with itself"):
        BatchNorm()(signal(draws(3, 4), draws(3, 4)))
    with pytest.raises(InputError, match="one batch with itself"):
        BatchNorm()(signal(draws(3, 4, 2), positions="same"))
    with pytest.raises(InputError, match="two samples"):
        BatchNorm()(signal(draws(1, 4)))
    with pytest.raises(InputError, match="epsilon"):
        Norm(-1.0)
