import pytest
import torch
from torch import Tensor

from gramian.compress.structures import Columns, Patterns, Rows, Weights, weights_per_unit
from gramian.errors import InputError


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STRUCTURES = [Weights(), Rows(), Rows(4), Columns(), Columns(4), Patterns(2, 4), Patterns(1, 4)]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("size", [(8, 4), (8, 4, 3), (4, 8, 3, 2)])
def test_gather_is_the_adjoint_of_spread(structure, size):
    units, values = rows(5, *structure.units(size)), rows(*size, seed=1)
    spread = structure.spread(units, size)
    assert torch.broadcast_shapes(spread.shape[1:], size) == size
    left = (spread * values).flatten(1).sum(1)
    right = (units * structure.gather(values, size)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    ones = torch.ones(structure.units(size))
    assert (structure.gather(torch.ones(size), size) == weights_per_unit(structure, size) * ones).all()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_draws_have_the_probabilities_of_the_logits(structure):
    size, count = (8, 4), 20_000
    logits = rows(*structure.variables(size), seed=2)
    noise = torch.rand(count, *logits.shape, generator=torch.Generator().manual_seed(0))
    units, chance = structure.hard(logits, noise).double(), structure.probabilities(logits)
    assert set(units.unique().tolist()) == {0.0, 1.0}
    error = (units.mean(0) - chance) / (chance * (1 - chance) / count).sqrt()
    assert error.abs().max() < 4.5
    cold = structure.soft(logits, noise[:200], 1e-3)
    assert ((cold - units[:200]).abs() < 1e-3).double().mean() > 0.99  # the same noise, the same mask
    if isinstance(structure, Patterns):
        assert (units.sum(-1) == structure.n).all()
        torch.testing.assert_close(chance.sum(-1), torch.full_like(chance[..., 0], structure.n))


def test_patterns_start_from_independent_weights_conditioned_on_their_number():
    chance = torch.tensor([0.9, 0.6, 0.3, 0.2], dtype=torch.float64)
    logits = Patterns(2, 4).start(chance)
    table = Patterns(2, 4).table(chance)
    joint = torch.where(table > 0, chance, 1 - chance).prod(-1)
    torch.testing.assert_close(logits.softmax(-1), joint / joint.sum(), rtol=1e-12, atol=0)
    assert Patterns(2, 4).top(torch.tensor([1.0, 2.0, 1.0, 1.0])).tolist() == [True, True, False, False]


def test_refusals():
    with pytest.raises(InputError, match="1 ≤ n < m"):
        Patterns(4, 4)
    with pytest.raises(InputError, match="at least one output"):
        Rows(0)
    with pytest.raises(InputError, match="at least one input"):
        Columns(0)
