import itertools
import math

import pytest
import torch
from torch import Tensor

from gramian.compress.linear_masks import LinearMasks, divergence_bound
from gramian.compress.mask_gradients import all_masks, expected_loss
from gramian.core.divergence import bernoulli_kl_of_logits
from gramian.errors import InputError


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chances(p: int, seed: int = 3) -> Tensor:
    return torch.rand(p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(p: int = 6, seed: int = 0) -> LinearMasks:
    x = rows(20, p, seed=seed) * torch.linspace(0.3, 2, p)
    return LinearMasks(x, rows(20, seed=seed + 1) + x.sum(1) / 3, rows(p, seed=seed + 2))


def orthogonal(seed: int, n: int = 30, p: int = 5) -> LinearMasks:
    x = torch.linalg.qr(rows(n, p, seed=seed)).Q * torch.linspace(1, 6, p)
    return LinearMasks(x, 2 * rows(n, seed=seed + 1), rows(p, seed=99))


@pytest.mark.parametrize("seed", range(5))
def test_expected_loss_and_slopes_are_those_of_enumeration(seed):
    linear, chance = problem(seed=seed), chances(6, seed).requires_grad_()
    exact = expected_loss(linear.loss, chance)
    torch.testing.assert_close(linear.expected_loss(chance), exact, rtol=1e-10, atol=1e-10)
    (slope,) = torch.autograd.grad(exact, chance)
    torch.testing.assert_close(linear.gradient(chance.detach()), slope, rtol=1e-10, atol=1e-10)
    # control: without the term that straight-through misses the slope is another
    assert not torch.allclose(linear.straight_through(chance.detach()), slope, rtol=1e-3)


def test_learnt_probabilities_are_an_l1_penalty_and_dropout_an_l2_penalty():
    linear, chance = problem(), chances(6)
    beta = chance * linear.weight
    exact = expected_loss(linear.loss, chance)
    torch.testing.assert_close(linear.adaptive_l1(beta), exact, rtol=1e-10, atol=1e-10)
    dropout = LinearMasks(linear.x, linear.y, beta / 0.7)
    exact = expected_loss(dropout.loss, torch.full((6,), 0.7, dtype=torch.float64))
    torch.testing.assert_close(linear.dropout_l2(beta, 0.7), exact, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(linear.dropout_l2(beta, 0.6), exact)  # control: another rate
    # the L1 penalty has no curvature of its own: F is linear in each β_j
    curvature = torch.autograd.functional.hessian(linear.adaptive_l1, beta).diagonal()
    torch.testing.assert_close(curvature, torch.zeros_like(curvature), rtol=0, atol=1e-12)


def test_no_probabilities_beat_the_best_mask():
    linear = problem()
    masks = all_masks(6, linear.weight)
    best = linear.loss(masks).min()
    for seed in range(50):
        assert linear.expected_loss(chances(6, seed)) > best
    for mask in masks:
        torch.testing.assert_close(linear.expected_loss(mask), linear.loss(mask[None])[0])


def test_coordinate_descent_ends_where_no_single_change_helps():
    linear = problem(8)
    mask = linear.coordinate_descent(chances(8))
    assert set(mask.tolist()) <= {0.0, 1.0}
    lowest = linear.loss(mask[None])
    for j in range(8):
        other = mask.clone()
        other[j] = 1 - other[j]
        assert linear.loss(other[None]) >= lowest
    assert torch.equal(linear.kept(mask).double(), mask)


def test_alignment_rule_is_the_best_mask_of_orthogonal_columns_and_magnitude_is_not():
    contradicted = 0
    for seed in range(0, 40, 2):
        linear = orthogonal(seed)
        masks = all_masks(5, linear.weight)
        best = masks[linear.loss(masks).argmin()]
        assert torch.equal((linear.alignment() > 0).double(), best)
        torch.testing.assert_close(linear.gradient(chances(5, seed)), -linear.alignment())
        largest = torch.zeros(5, dtype=torch.float64)
        largest[linear.weight.abs().topk(int(best.sum())).indices] = 1
        contradicted += not torch.equal(largest, best)
    assert contradicted > 5  # control: as many of the largest weights are often another mask
    correlated = problem()
    assert not torch.allclose(correlated.gradient(chances(6)), -correlated.alignment())


def test_mirror_flow_moves_logits_by_the_alignment():
    linear, start = orthogonal(0), rows(5, seed=5)
    moved = linear.mirror_flow(start, 0.7)
    torch.testing.assert_close(moved, start + 0.7 * linear.alignment(), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(linear.gradient_flow(start, 0.7), moved, rtol=1e-2)  # control: another path
    assert linear.expected_loss(moved.sigmoid()) < linear.expected_loss(start.sigmoid())


def test_flow_converges_with_the_fourth_power_of_the_step():
    linear, start = problem(), rows(6, seed=5)
    exact = linear.mirror_flow(start, 1.0, 2000)
    errors = [float((linear.mirror_flow(start, 1.0, steps) - exact).norm()) for steps in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.5)


def test_divergence_is_bounded_by_the_change_of_alignment():
    ratios = []
    for seed, time in itertools.product(range(0, 60, 2), (0.1, 1.0, 5.0)):
        everything, share = orthogonal(seed), orthogonal(seed + 1000)
        start = rows(5, seed=seed + 7)
        posterior, prior = everything.mirror_flow(start, time, 1), share.mirror_flow(start, time, 1)
        bound = divergence_bound(time, everything.alignment(), share.alignment())
        ratios.append(float(bernoulli_kl_of_logits(posterior, prior).sum() / bound))
    assert max(ratios) <= 1
    assert max(ratios) > 0.5  # control: half of the bound is too little


def test_the_constant_of_the_divergence_bound_is_the_smallest():
    u = torch.tensor([1e-3], dtype=torch.float64)
    ratio = bernoulli_kl_of_logits(u, -u) / ((2 * u).square() / 8)
    assert 0.99999 < float(ratio) <= 1


def test_refusals():
    linear = problem()
    with pytest.raises(InputError, match="do not belong together"):
        LinearMasks(linear.x, linear.y[:-1], linear.weight)
    with pytest.raises(InputError, match="between 0 and its weight"):
        linear.adaptive_l1(-linear.weight)
    with pytest.raises(InputError, match="probability to keep"):
        linear.dropout_l2(linear.weight, 0.0)
    with pytest.raises(InputError, match="time"):
        linear.mirror_flow(linear.weight, -1.0)
    with pytest.raises(InputError, match="rounds"):
        linear.coordinate_descent(chances(6), rounds=0)
