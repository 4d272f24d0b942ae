"""Brownian paths refine into themselves; schemes converge at their order; paths stop where they should."""

import math

import pytest
import torch

from gramian.core.sde import Brownian, euler_maruyama, heun, integrate, joined, square_root
from gramian.errors import InputError

MU, SIGMA, PATHS = 0.5, 0.6, 20_000


def totals(path: Brownian) -> torch.Tensor:
    return torch.stack([increment for _, increment in path])


def slope(steps: list[float], errors: list[float]) -> float:
    """Fitted exponent of error ∝ step^exponent."""
    x, y = torch.tensor(steps).log(), torch.tensor(errors).log()
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x @ x)).item()


def test_a_finer_path_goes_through_the_points_of_a_coarser_one() -> None:
    coarse = Brownian(seed=3, shape=(5, 2), end=1.5, steps=4)
    for times in (1, 2, 3):
        fine = totals(coarse.refined(times))
        assert len(fine) == len(coarse.refined(times)) == 4 * 2**times
        torch.testing.assert_close(fine.unflatten(0, (4, -1)).sum(1), totals(coarse), rtol=0, atol=1e-12)
    assert coarse.refined(2) == coarse.refined().refined()
    other = totals(Brownian(seed=4, shape=(5, 2), end=1.5, steps=4))
    assert (other - totals(coarse)).abs().min() > 1e-6


@pytest.mark.parametrize("refinement", [0, 1, 3])
def test_increments_are_independent_with_the_variance_of_their_step(refinement) -> None:
    path = Brownian(seed=0, shape=(PATHS,), end=2.0, steps=2, refinement=refinement)
    assert {h for h, _ in path} == {2.0 / len(path)}
    found = torch.cov(totals(path)) * len(path) / 2.0
    torch.testing.assert_close(found, torch.eye(len(path), dtype=torch.float64), rtol=0, atol=0.05)


def test_a_path_draws_the_same_again_and_leaves_global_randomness_alone() -> None:
    state = torch.get_rng_state()
    path = Brownian(seed=1, shape=(3,), end=1.0, steps=3, refinement=2)
    assert torch.equal(totals(path), totals(path))
    assert torch.equal(torch.get_rng_state(), state)


def at_the_end(scheme, path: Brownian, mu: float = MU) -> torch.Tensor:
    step = scheme(lambda x: mu * x, lambda x, dw: SIGMA * x * dw)
    return integrate(step, torch.ones(PATHS, dtype=torch.float64), path).states[-1]


def exact(path: Brownian, stratonovich: bool) -> torch.Tensor:
    rate = MU - (0 if stratonovich else SIGMA**2 / 2)
    return (rate * path.end + SIGMA * totals(path).sum(0)).exp()


PATH = Brownian(seed=0, shape=(PATHS,), end=1.0, steps=4)
LEVELS = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("scheme", "stratonovich", "order"), [(euler_maruyama, False, 0.5), (heun, True, 1.0)]
)
def test_strong_order_on_geometric_brownian_motion(scheme, stratonovich, order) -> None:
    """The exact solution on the same path is the oracle; the wrong calculus does not converge to it."""
    paths = [PATH.refined(level) for level in LEVELS]
    errors = [(at_the_end(scheme, p) - exact(p, stratonovich)).square().mean().sqrt().item() for p in paths]
    assert abs(slope([1 / len(p) for p in paths], errors) - order) < 0.1
    wrong = (at_the_end(scheme, paths[-1]) - exact(paths[-1], not stratonovich)).square().mean().sqrt()
    assert wrong > 3 * errors[-1]


@pytest.mark.parametrize(("scheme", "mu"), [(euler_maruyama, MU), (heun, MU - SIGMA**2 / 2)])
@pytest.mark.parametrize("power", [1, 2])
def test_weak_order_one_of_moments(scheme, mu, power) -> None:
    """E X^p = exp(p μ + p (p−1) σ²/2) in Itô's sense; the same paths solved exactly take out the noise."""
    moment = math.exp(power * MU + power * (power - 1) * SIGMA**2 / 2)
    errors = []
    for path in (PATH.refined(level) for level in LEVELS):
        reference = exact(path, stratonovich=False)
        assert (reference**power).mean().item() == pytest.approx(moment, rel=0.04)
        errors.append(abs((at_the_end(scheme, path, mu) ** power - reference**power).mean().item()))
    assert (
        0.75
        < slope([0.25 / 2**level for level in LEVELS], errors)
        < (1.3 if scheme is euler_maruyama else 2.6)
    )


def decay_to_below(h_floor: float = 1.0):
    return lambda x, h, dw: x - h * h_floor * torch.eye(x.shape[-1], dtype=x.dtype)


def test_a_path_that_explodes_stops_there_and_the_others_go_on() -> None:
    """x' = x² is infinite at t = 1/x₀."""
    start = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    path = Brownian(seed=0, shape=(3,), end=1.5, steps=6000)
    found = integrate(lambda x, h, dw: x + h * x * x, start, path, bound=1e3, records=[0.0, 0.25, 1.5])
    assert found.exploded.tolist() == [False, True, True]
    assert not found.indefinite.any()
    assert found.lasting.tolist() == [True, False, False]
    torch.testing.assert_close(
        found.stopped[1:], torch.tensor([1.0, 0.5], dtype=torch.float64), rtol=0, atol=0.01
    )
    torch.testing.assert_close(found.states[0], start)
    torch.testing.assert_close(found.states[1], start / (1 - 0.25 * start), rtol=2e-3, atol=0)
    assert found.states[2, 0].item() == pytest.approx(0.1 / (1 - 0.15), rel=1e-3)
    assert (found.states[2, 1:] <= 1e3).all()
    assert (found.states[2, 1:] > 100).all()  # frozen at the last state within
    assert found.times.tolist() == pytest.approx([0.0, 0.25, 1.5])


def test_a_state_that_is_not_finite_counts_as_exploded() -> None:
    start = torch.ones(2, dtype=torch.float64)
    step = lambda x, h, dw: torch.stack((x[0] * math.nan, x[1]))  # noqa: E731
    found = integrate(step, start, Brownian(seed=0, shape=(2,), end=1.0, steps=3))
    assert found.exploded.tolist() == [True, False]
    assert found.stopped[0].item() == pytest.approx(1 / 3)
    assert torch.equal(found.states[-1], start)


def test_a_matrix_that_leaves_the_semidefinite_ones_stops() -> None:
    """V' = −I takes the smallest eigenvalue to zero at t = λ_min; unwatched it goes on."""
    values = torch.tensor([[1.0, 0.6, 2.0], [5.0, 4.0, 3.0]], dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    start = rotation @ torch.diag_embed(values) @ rotation.mT
    path = Brownian(seed=0, shape=(2,), end=1.0, steps=100)
    found = integrate(decay_to_below(), start, path, semidefinite=True)
    assert found.indefinite.tolist() == [True, False]
    assert not found.exploded.any()
    assert found.stopped[0].item() == pytest.approx(0.6, abs=0.011)
    assert torch.linalg.eigvalsh(found.states[-1]).min() > -1e-6
    free = integrate(decay_to_below(), start, path)
    assert free.lasting.all()
    assert torch.linalg.eigvalsh(free.states[-1]).min() < -0.3


def test_semidefinite_matrices_of_lower_rank_are_no_loss() -> None:
    start = torch.ones(1, 4, 4, dtype=torch.float64)
    found = integrate(lambda x, h, dw: x, start, Brownian(0, (1,), 1.0, 3), semidefinite=True)
    assert found.lasting.all()


def test_parts_join() -> None:
    path = Brownian(seed=0, shape=(2,), end=1.0, steps=2)
    one = integrate(lambda x, h, dw: x + dw, torch.zeros(2, dtype=torch.float64), path, records=[0.5, 1.0])
    both = joined([one, one])
    assert both.states.shape == (2, 4)
    assert torch.equal(both.stopped, torch.cat((one.stopped, one.stopped)))


def test_square_roots_of_definite_deficient_and_indefinite_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, 4, generator=generator, dtype=torch.float64)
    definite = x @ x.mT
    deficient = x[..., :2] @ x[..., :2].mT
    for v in (definite, deficient, torch.cat((definite, deficient)), torch.zeros_like(definite)):
        root = square_root(v)
        torch.testing.assert_close(root @ root.mT, v, rtol=1e-9, atol=1e-9)
    assert (square_root(definite).triu(1) == 0).all()
    indefinite = torch.diag(torch.tensor([2.0, -1.0], dtype=torch.float64))
    root = square_root(indefinite)
    torch.testing.assert_close(root @ root.mT, indefinite.clamp(min=0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("m", [2, 3, 8])
def test_what_is_not_finite_has_no_square_root_and_spoils_no_other(m, bad) -> None:
    eye = torch.eye(m, dtype=torch.float64)
    lost = torch.full_like(eye, bad)
    root = square_root(torch.stack((eye, lost, torch.ones_like(eye))))
    assert not root[1].isfinite().all()
    torch.testing.assert_close(root[[0, 2]] @ root[[0, 2]].mT, torch.stack((eye, torch.ones_like(eye))))
    noise = torch.tensor([1, bad])[:, None, None]
    found = integrate(lambda v, h, dw: square_root(v * dw), eye.expand(2, m, m), [(1.0, noise)])
    assert found.exploded.tolist() == [False, True]


def test_what_cannot_be_followed_is_named() -> None:
    path = Brownian(seed=0, shape=(1,), end=1.0, steps=2)
    start = torch.ones(1, dtype=torch.float64)
    for change in ({"end": 0.0}, {"end": math.inf}, {"steps": 0}, {"refinement": -1}):
        with pytest.raises(InputError, match="Brownian path"):
            Brownian(**{"seed": 0, "shape": (1,), "end": 1.0, "steps": 1, **change})
    for records, words in (([0.5, 0.2], "increase"), ([-1.0], "increase"), ([2.0], "lie within")):
        with pytest.raises(InputError, match=words):
            integrate(lambda x, h, dw: x, start, path, records=records)
    with pytest.raises(InputError, match="start with entries within"):
        integrate(lambda x, h, dw: x, 1e9 * start, path)
    with pytest.raises(InputError, match="semidefinite"):
        integrate(lambda x, h, dw: x, -torch.eye(2)[None].double(), path, semidefinite=True)
