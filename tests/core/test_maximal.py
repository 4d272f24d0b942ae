"""Targets of layers from targets of networks, against every sub-network written out."""

import math

import pytest

from gramian.core.maximal import bisect, local_curvature, local_slope, plain, residual
from gramian.errors import InputError


def test_slopes_of_a_chain_multiply_and_curvatures_add() -> None:
    for depth in (1, 3, 36, 1000):
        assert local_slope(1.5, plain(depth)) == pytest.approx(1.5 ** (1 / depth), rel=1e-14)
        assert local_curvature(0.3, plain(depth)) == pytest.approx(0.3 / depth, rel=1e-13)


def subnetworks(blocks: int, skip: float, layers: int, last: int, slope: float) -> list[float]:
    """Slopes at 1 of all sub-networks: some layers of one branch, or some blocks with or without the end."""
    block = skip**2 + (1 - skip**2) * slope**layers
    inside = [slope**n for n in range(layers + 1)]
    stretches = [block**n for n in range(blocks + 1)]
    to_the_end = [block**n * slope**m for n in range(blocks + 1) for m in range(last + 1)]
    return inside + stretches + to_the_end


@pytest.mark.parametrize(
    ("blocks", "skip", "layers", "last"), [(24, 0.6, 2, 1), (3, 0.98, 2, 0), (8, 0.0, 1, 0), (5, 0.9, 1, 2)]
)
def test_maximum_of_a_residual_network_is_over_all_subnetworks(
    blocks: int, skip: float, layers: int, last: int
) -> None:
    maximal = residual(blocks, skip, layers, last)
    for slope in (1.001, 1.05, 1.7):
        expected = max(subnetworks(blocks, skip, layers, last, slope))
        assert maximal(lambda y, s=slope: s * y, 1.0) == pytest.approx(expected, rel=1e-12)
    found = local_slope(1.5, maximal)
    assert max(subnetworks(blocks, skip, layers, last, found)) == pytest.approx(1.5, rel=1e-12)


def test_the_branch_alone_can_be_the_worst() -> None:
    maximal = residual(2, 0.98, layers=3)
    whole = (0.98**2 + (1 - 0.98**2) * 1.2**3) ** 2
    assert whole < 1.2**3
    assert maximal(lambda y: 1.2 * y, 1.0) == pytest.approx(1.2**3)


def test_without_a_skip_it_is_a_chain_and_a_skip_loosens_the_targets() -> None:
    assert local_slope(1.5, residual(12, 0.0)) == local_slope(1.5, plain(12))
    assert local_curvature(0.3, residual(12, 0.5)) > local_curvature(0.3, plain(12))


def test_curvature_of_a_residual_network_in_closed_form() -> None:
    t = local_curvature(0.3, residual(24, 0.6, layers=2, last=1))
    assert 24 * (1 - 0.36) * 2 * t + t == pytest.approx(0.3, rel=1e-12)


def test_bisection_is_to_the_last_bit() -> None:
    assert bisect(lambda x: x >= 1 / 3, 0.0, 1.0) == 1 / 3
    assert bisect(lambda x: x * x >= 2, 1.0, 2.0) in (math.sqrt(2), math.nextafter(math.sqrt(2), 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plain(0), "the number of nonlinear layers must be at least 1, not 0"),
        (lambda: residual(0, 0.5), "the number of blocks must be at least 1, not 0"),
        (lambda: residual(3, 1.0), "normalised skip is at least 0 and below 1, not 1.0"),
        (lambda: residual(3, math.nan), "normalised skip is at least 0 and below 1, not nan"),
        (lambda: residual(3, 0.5, layers=0), "layers in a branch must be at least 1"),
        (lambda: residual(3, 0.5, last=-1), "behind the last block must be at least 0"),
        (lambda: local_slope(1.0, plain(3)), "zeta, .* must be above 1, not 1.0"),
        (lambda: local_slope(math.nan, plain(3)), "zeta, .* must be above 1, not nan"),
        (lambda: local_curvature(0.0, plain(3)), "tau, .* must be above 0, not 0.0"),
    ],
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
