"""The covariance SDE: golden values, an entrywise oracle, laws, its semidefinite step, exact moments."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gramian.core.sde import Brownian, euler_maruyama, integrate
from gramian.errors import InputError
from gramian.theory.covariance_sde import (
    ShapedAttention,
    ShapedBlock,
    ShapedMLP,
    check_covariance,
    covariance,
    simulate,
)

GOLDEN = torch.tensor([[1, 0.3, 0.1], [0.3, 1.2, 0.4], [0.1, 0.4, 0.8]], dtype=torch.float64)
ROWS, COLUMNS = torch.tensor([[0, 0, 1, 2], [0, 1, 2, 2]])
CHOSEN = [0, 1, 4, 5]  # the entries 00, 01, 12, 22 of the upper triangle


def positive(m: int, seed: int = 0) -> Tensor:
    x = torch.randn(m, m + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.mT / (m + 2)


@pytest.mark.parametrize(
    ("branch", "expected"),
    [
        (ShapedAttention(0.8), [0.0942, 0.0281, 0.0092, 0.0834, 0.0221, 0.0556]),
        (ShapedAttention(0.8, causal=True), [0, 0, 0.0061, 0.1229, 0.0241, 0.0556]),
        (ShapedMLP(0.8), [0, 0.0678, 0.0757, 0, 0.0442, 0]),
    ],
)
def test_golden_drifts(branch, expected) -> None:
    rows, columns = torch.triu_indices(3, 3)
    found = branch.drift(GOLDEN)
    torch.testing.assert_close(
        found[rows, columns], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-5
    )
    torch.testing.assert_close(found, found.mT, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("branch", "expected"),
    [
        (
            ShapedAttention(0.8),
            [[1.810, 0.516, 0.044, 0.013], [0, 1.154, 0.194, 0.061], [0, 0, 0.999, 0.568], [0, 0, 0, 1.142]],
        ),
        (
            ShapedAttention(0.8, causal=True),
            [[1.741, 0.522, 0.052, 0.017], [0, 1.147, 0.192, 0.064], [0, 0, 0.997, 0.563], [0, 0, 0, 1.142]],
        ),
        (
            ShapedMLP(0.8),
            [[2.560, 0.768, 0.077, 0.026], [0, 1.651, 0.307, 0.102], [0, 0, 1.434, 0.819], [0, 0, 0, 1.638]],
        ),
    ],
)
def test_golden_diffusions(branch, expected) -> None:
    found = covariance(branch, GOLDEN)[CHOSEN][:, CHOSEN].triu()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-4)


class Entrywise:
    """Drift and diffusion of shaped attention as sums over tokens, one entry at a time."""

    def __init__(self, v: Tensor, c: Tensor) -> None:
        self.v, self.c, self.m = v, c, len(v)

    def s1(self, a: int, d: int, b: int, w: int) -> float:
        """Covariance of the first orders of softmax at (a, d) and (b, w), without the weights 1/m."""
        v, ca, cb = self.v, self.c[a], self.c[b]
        return (v[a, b] * (v[d, w] - v[d] @ cb - v[w] @ ca + ca @ v @ cb)).item()

    def s2(self, a: int, d: int) -> float:
        """Mean of twice the second order of softmax at (a, d), without the weight 1/m."""
        v, ca = self.v, self.c[a]
        return (v[a, a] * (v[d, d] - 2 * v[d] @ ca + 2 * ca @ v @ ca - v.diagonal() @ ca)).item()

    def drift(self, a: int, b: int) -> float:
        c, v, tokens = self.c, self.v, range(self.m)
        first = sum(c[a, n] * c[b, k] * v[n, k] * self.s1(a, n, b, k) for n in tokens for k in tokens)
        second = sum(c[a, n] * v[b, n] * self.s2(a, n) + c[b, n] * v[a, n] * self.s2(b, n) for n in tokens)
        return float(first + second / 2)

    def diffusion(self, a: int, b: int, d: int, w: int) -> float:
        c, v = self.c, self.v
        total = 0.0
        for (p, q), (r, s) in ((x, y) for x in ((a, b), (b, a)) for y in ((d, w), (w, d))):
            for n in range(self.m):
                for k in range(self.m):
                    total += c[p, n] * c[r, k] * v[n, q] * v[k, s] * self.s1(p, n, r, k)
        return float(total)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("m", [2, 3, 5])
def test_attention_equals_its_entrywise_sums(m, causal) -> None:
    branch, v = ShapedAttention(0.7, 1.3, causal), positive(m)
    oracle = Entrywise(v, branch.centring(v))
    scale = (0.7 / 1.3) ** 2
    expected = torch.tensor([[scale * oracle.drift(a, b) for b in range(m)] for a in range(m)]).double()
    torch.testing.assert_close(branch.drift(v), expected, rtol=1e-6, atol=1e-6)
    entries = torch.triu_indices(m, m).T.tolist()
    linear = 0.7**2 * (2 - 0.7**2)
    expected = torch.tensor(
        [
            [
                linear * (v[a, d] * v[b, w] + v[a, w] * v[b, d]).item()
                + 0.7**4 / 1.3**2 * oracle.diffusion(a, b, d, w)
                for d, w in entries
            ]
            for a, b in entries
        ]
    ).double()
    torch.testing.assert_close(covariance(branch, v), expected, rtol=1e-6, atol=1e-6)
    if m == 3 and causal:  # the mean of a row's own tokens, in place of the other row's, is wrong
        crossed = oracle.s1
        oracle.s1 = lambda a, d, b, w: (
            crossed(a, d, b, w) + v[a, b] * (v[d] - v[w]) @ (oracle.c[b] - oracle.c[a])
        ).item()
        assert abs(scale * oracle.drift(1, 2) / branch.drift(v)[1, 2].item() - 1) > 0.01


def test_tokens_are_interchangeable_unless_attention_is_causal() -> None:
    v, order = positive(4), torch.tensor([2, 0, 3, 1])
    moved = v[order][:, order]
    for branch in (ShapedAttention(0.6), ShapedMLP(0.6), ShapedBlock(0.6)):
        torch.testing.assert_close(branch.drift(moved), branch.drift(v)[order][:, order])
    causal = ShapedAttention(0.6, causal=True)
    assert (causal.drift(moved) - causal.drift(v)[order][:, order]).abs().max() > 1e-3


def test_what_does_not_move() -> None:
    v, same = positive(4), torch.ones(4, 4, dtype=torch.float64)
    assert (ShapedBlock(0.0).drift(v) == 0).all()
    assert (covariance(ShapedBlock(0.0), v) == 0).all()
    for causal in (False, True):
        assert ShapedAttention(0.9, causal=causal).drift(same).abs().max() < 1e-12
    assert ShapedMLP(0.9).drift(same).abs().max() < 1e-7
    assert (ShapedMLP(0.9, 0.5, 0.5).drift(v) == 0).all()
    assert ShapedAttention(0.9, causal=True).drift(v)[0, 0].abs() < 1e-12
    cold, hot = (covariance(ShapedAttention(0.9, tau0), v) for tau0 in (0.5, 1e6))
    linear = covariance(ShapedMLP(0.9), v) / (2 * 0.81) * 0.81 * (2 - 0.81)
    torch.testing.assert_close(hot, linear)
    assert (cold - linear).abs().max() > 0.01


def test_diagonals_of_the_mlp_are_martingales_and_correlations_rise() -> None:
    drift = ShapedMLP(1.0, 0.3, -0.7).drift(positive(5))
    assert (drift.diagonal() == 0).all()
    assert (drift[~torch.eye(5, dtype=torch.bool)] > 0).all()


BRANCHES = (
    ShapedAttention(0.8, 0.9),
    ShapedAttention(0.8, 0.9, causal=True),
    ShapedMLP(0.8, 0.2, -0.9),
    ShapedBlock(0.8),
)


@pytest.mark.parametrize("branch", BRANCHES, ids=str)
def test_the_semidefinite_step_has_the_drift_and_the_diffusion(branch) -> None:
    """Antithetic noises take the first order out of the mean; what is left of the drift is O(h)."""
    noise = torch.randn(
        40_000, branch.noises, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    v, errors = GOLDEN.expand(len(noise), 3, 3), []
    for h in (4e-3, 1e-3):
        scaled = math.sqrt(h) * noise
        up, down = branch.step(v, h, scaled), branch.step(v, h, -scaled)
        even = ((up + down) / 2 - v) / h
        assert (even.mean(0) - branch.drift(GOLDEN)).abs().max() < 5 * even.std(0).max() / 200 + 20 * h
        odd = (up - down) / 2 - branch.diffusion(v, scaled)
        errors.append((odd.square().mean() / h).sqrt().item())
    assert errors[1] < 0.35 * errors[0]  # O(h) in units of √h


@pytest.mark.parametrize("branch", BRANCHES, ids=str)
def test_the_semidefinite_step_keeps_matrices_semidefinite_where_euler_maruyama_does_not(branch) -> None:
    m, h = 12, 0.05
    shape = (300, branch.noises, m, m)
    start = (0.5 + 0.5 * torch.eye(m, dtype=torch.float64)).expand(300, m, m)
    path = Brownian(0, shape, 0.5, round(0.5 / h))
    kept = integrate(branch.step, start, path, bound=math.inf, semidefinite=True)
    assert not kept.indefinite.any()
    plain = euler_maruyama(branch.drift, branch.diffusion)
    assert integrate(plain, start, path, bound=math.inf, semidefinite=True).indefinite.any()


def squared(v: Tensor) -> Tensor:
    return torch.einsum("...ab,...cd->...abcd", v, v).mean(0)


@pytest.mark.parametrize("kept", [False, True])
def test_weak_order_one_on_moments_in_closed_form(kept) -> None:
    """E V⊗V obeys a linear equation under linear noise alone, solved by a matrix exponential."""
    m, gamma, time = 2, 0.3, 1.0
    branch = ShapedMLP(gamma, 0.0, 0.0)
    start = torch.tensor([[1.0, 0.3], [0.3, 0.8]], dtype=torch.float64)
    rate = torch.zeros(m, m, m, m, m, m, m, m, dtype=torch.float64)
    eye = torch.eye(m, dtype=torch.float64)
    for given in ("ac,bd", "ad,bc"):  # d E[V_ab V_cd] = 2γ² E[V_ac V_bd + V_ad V_bc] dt
        (p, q), (r, s) = (pair for pair in given.split(","))
        rate += torch.einsum(f"{p}w,{q}x,{r}y,{s}z->abcdwxyz", eye, eye, eye, eye)
    solution = torch.linalg.matrix_exp(2 * gamma**2 * time * rate.reshape(m**4, m**4))
    expected = (solution @ torch.einsum("ab,cd->abcd", start, start).flatten()).reshape([m] * 4)
    step = branch.step if kept else euler_maruyama(branch.drift, branch.diffusion)
    path = Brownian(seed=2, shape=(100_000, 1, m, m), end=time, steps=1)
    ends = [
        integrate(step, start.expand(100_000, m, m), path.refined(level), bound=math.inf).states[-1]
        for level in range(5)
    ]
    found = [squared(end) for end in ends]
    assert (found[-1] - expected).abs().max() < 0.02 * expected.abs().max()
    # the same path throughout: what remains between two grids is their difference in bias
    gaps = [(found[level + 1] - found[level]).norm().item() for level in range(3)]
    order = -torch.tensor(gaps).log2().diff().mean().item()
    assert 0.7 < order < 1.5


def test_paths_are_those_of_their_seed_whatever_else_is_drawn() -> None:
    settings = {"paths": 5000, "steps": 2, "seed": 3}
    told = []
    one = simulate(ShapedBlock(0.5), positive(12), 0.1, **settings, records=(0.05, 0.1), progress=told.append)
    torch.rand(3)
    two = simulate(ShapedBlock(0.5), positive(12), 0.1, **settings, records=(0.05, 0.1))
    assert torch.equal(one.states, two.states)
    assert one.states.shape == (2, 5000, 12, 12)
    assert told[-1] == 5000
    assert len(told) > 1
    assert len(one.states[-1, :, 0, 0].unique()) == 5000  # no part repeats another
    other = simulate(ShapedBlock(0.5), positive(12), 0.1, **{**settings, "seed": 4}, records=(0.05, 0.1))
    assert not torch.equal(one.states, other.states)


def test_large_branches_blow_up_and_small_ones_do_not() -> None:
    start = 0.3 + 0.7 * torch.eye(4, dtype=torch.float64)
    wild = simulate(ShapedBlock(0.9, 0.3), start, 1.0, paths=200, steps=64, seed=0)
    calm = simulate(ShapedBlock(0.2, 1.0), start, 1.0, paths=200, steps=64, seed=0)
    assert wild.exploded.float().mean() > 0.3
    assert calm.lasting.all()
    assert wild.states.isfinite().all()
    assert wild.states.abs().max() <= 1e4


def test_a_coarser_scheme_agrees_in_distribution() -> None:
    def correlations(steps: int) -> Tensor:
        found = simulate(ShapedBlock(0.4), GOLDEN, 0.5, paths=4000, steps=steps, seed=steps).states[-1]
        return found[:, 0, 1] / (found[:, 0, 0] * found[:, 1, 1]).sqrt()

    coarse, fine = correlations(16), correlations(128)
    error = math.sqrt(2 * fine.var().item() / 4000)
    assert abs(coarse.mean() - fine.mean()) < 4 * error
    assert abs(coarse.std() / fine.std() - 1) < 0.05


def test_settings_that_cannot_be_used_are_named() -> None:
    for build in (ShapedAttention, ShapedMLP, ShapedBlock):
        for gamma in (-0.1, 1.1, math.nan):
            with pytest.raises(InputError, match=r"gamma.*\[0, 1\]"):
                build(gamma)
    for tau0 in (0.0, -1.0, math.inf, math.nan, 1e-200, 1e200):
        with pytest.raises(InputError, match="tau0"):
            replace(ShapedBlock(0.5), tau0=tau0)
    for wrong in (math.nan, -math.inf, 1e200):
        for name in ("positive", "negative"):
            with pytest.raises(InputError, match=r"c₊ and c₋ .* finite"):
                ShapedMLP(0.5, **{name: wrong})


@pytest.mark.parametrize("far", [{"tau0": 1e-100}, {"tau0": 1e100}, {"negative": -1e100}])
def test_settings_far_out_blow_up_or_stay_but_are_no_error(far) -> None:
    start = 0.3 + 0.7 * torch.eye(3, dtype=torch.float64)
    found = simulate(replace(ShapedBlock(0.5), **far), start, 0.5, paths=20, steps=16, seed=0)
    assert found.exploded.all() if far.get("tau0") != 1e100 else found.lasting.all()
    assert found.states.isfinite().all()


def test_covariances_that_cannot_be_used_are_named() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    for wrong, words in (
        (eye[:2], "square"),
        (eye[None], "square"),
        (eye[:1, :1], "two tokens"),
        (eye * math.nan, "finite"),
        (eye + torch.triu(torch.ones_like(eye), 1), "symmetric"),
        (torch.diag(torch.tensor([1.0, 0.0])).double(), "positive diagonal"),
        (3 - 2 * eye, "positive semidefinite"),
    ):
        with pytest.raises(InputError, match=words):
            check_covariance(wrong)
    with pytest.raises(InputError, match="positive semidefinite"):
        simulate(ShapedBlock(0.5), 3 - 2 * eye, 0.5, paths=1, steps=1, seed=0)
    with pytest.raises(InputError, match="at least one path"):
        simulate(ShapedBlock(0.5), eye, 0.5, paths=0, steps=1, seed=0)
    check_covariance(torch.ones(3, 3, dtype=torch.float64))
