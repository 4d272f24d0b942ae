import pytest
import torch
from torch import Tensor

from gramian.compress import structures
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


@pytest.mark.parametrize("structure", STRUCTURES)
def test_many_draws_at_once_have_the_same_probabilities(structure):
    size, count = (8, 4), 20_000
    logits = rows(*structure.variables(size), seed=2)
    units = structure.sampler(logits)(count, torch.Generator().manual_seed(1)).double()
    chance = structure.probabilities(logits)
    error = (units.mean(0) - chance) / (chance * (1 - chance) / count).sqrt()
    assert error.abs().max() < 4.5
    wrong = (units.mean(0) - 0.9 * chance) / (chance * (1 - chance) / count).sqrt()
    assert wrong.abs().max() > 10  # control
    pairs = (units - chance).flatten(1).T @ (units - chance).flatten(1) / count
    spread = (chance * (1 - chance)).flatten().sqrt()
    correlation = (pairs / spread / spread[:, None]).fill_diagonal_(0)
    if not isinstance(structure, Patterns):  # weights of a pattern depend on each other
        assert correlation.abs().max() < 4.5 / count**0.5
    after = ((units - chance)[1:] * (units - chance)[:-1]).mean(0).flatten() / spread**2
    assert after.abs().max() < 4.5 / count**0.5  # so do not two draws
    if isinstance(structure, Patterns):
        assert (units.sum(-1) == structure.n).all()


def test_rare_and_nearly_certain_weights_have_their_chances(monkeypatch):
    chance = torch.tensor([0, 2**-32, 3e-7, 0.001, 0.5, 0.7123, 1 - 2e-8, 1], dtype=torch.float64)
    draw = Weights().sampler(chance.logit())
    found = 0.0
    for byte in range(256):  # every first byte, with v just below and above what it takes
        drawn = torch.full((8,), byte, dtype=torch.uint8)
        monkeypatch.setattr(structures, "_bytes", lambda *args, drawn=drawn: drawn)
        rest = 256 * chance - byte
        for v, sure in ((rest - 1e-9, True), (rest + 1e-9, False)):
            tied = ((256 * chance).floor().clamp(max=255) == byte).nonzero()[:, 0]
            monkeypatch.setattr(torch, "rand", lambda count, v=v, tied=tied, **options: v[tied])
            kept = draw(1, None)[0]
            assert kept[tied].all() if sure else not kept[tied].any()
            others = torch.ones(8, dtype=torch.bool).index_fill(0, tied, False)
            assert torch.equal(kept[others], (rest > 0)[others])
        found = found + rest.clamp(0, 1) / 256
    monkeypatch.undo()
    torch.testing.assert_close(found, chance, rtol=1e-12, atol=1e-15)  # of all bytes and v together
    assert draw(100_000, torch.Generator().manual_seed(0))[:, -1].all()
    count = 4_000_000
    found = draw(count, torch.Generator().manual_seed(0)).double().mean(0)
    assert found[0] == 0
    assert ((found - chance).abs() <= 4.5 * (chance * (1 - chance) / count).sqrt()).all()


def test_bytes_are_uniform_in_every_bit():
    count = 99_999
    numbers = structures._bytes(count, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert numbers.shape == (count,)
    bits = (numbers[:, None].long() >> torch.arange(8)) & 1
    signs = 2 * bits.double() - 1
    assert signs.mean(0).abs().max() < 4.5 / count**0.5
    for shift in range(9):  # bits of one byte, of those in a word, of two words
        together = signs[: count - shift].T @ signs[shift:] / count
        together = together.fill_diagonal_(0) if shift == 0 else together
        assert together.abs().max() < 5 / count**0.5


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
