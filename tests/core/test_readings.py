import math

import pytest
import torch
from torch import Tensor

from gramian.core import readings
from gramian.core.gram import Gram, gram
from gramian.errors import InputError
from oracles import moment_readings, off_diagonal


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven(n: int, d: int) -> Tensor:
    """Rows and columns of very different norms, with a common direction."""
    return rows(n, d) * torch.linspace(0.2, 3, d) * torch.linspace(0.5, 2, n)[:, None] + 1


def rotation(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(rows(d, d, seed=seed)).Q


def test_cosine_and_angle_of_known_directions():
    x = torch.tensor([[1.0, 0], [3, 0], [0, 2], [-1, 0], [1, 1]], dtype=torch.float64)
    cosines = readings.cosine(gram(x[:1], x))[0]
    expected = torch.tensor([1, 1, 0, -1, math.sqrt(0.5)], dtype=torch.float64)
    torch.testing.assert_close(cosines, expected, rtol=1e-12, atol=1e-12)
    angles = readings.apex_angle(gram(x[:1], x))[0]
    torch.testing.assert_close(angles, torch.acos(expected), rtol=1e-12, atol=1e-7)


def test_apex_moves_with_the_rows():
    x, apex = rows(4, 6), rows(6, seed=1)
    seen = readings.apex_angle(gram(x - apex))
    u, v = x[0] - apex, x[1] - apex
    assert seen[0, 1].item() == pytest.approx(math.acos(float(u @ v / (u.norm() * v.norm()))), rel=1e-10)
    assert not torch.allclose(seen, readings.apex_angle(gram(x)))  # control: another apex, other angles


def test_distance_and_path_length():
    x = rows(2, 5, 7)
    torch.testing.assert_close(readings.distance(gram(x)), torch.cdist(x, x), rtol=1e-10, atol=1e-10)
    steps = (x[:, 1:] - x[:, :-1]).norm(dim=-1)
    torch.testing.assert_close(readings.path_length(gram(x)), steps.sum(-1), rtol=1e-10, atol=0)
    reordered = x[:, [0, 2, 1, 3, 4]]
    assert not torch.allclose(readings.path_length(gram(reordered)), steps.sum(-1))  # control: order counts
    assert readings.path_length(gram(x[:, :1])).tolist() == [0, 0]
    assert readings.distance(gram(x)).diagonal(dim1=-2, dim2=-1).abs().max() == 0


def test_kurtosis_is_1_for_equal_neurons_and_d_for_one_active():
    n, d = 9, 12
    signs = rows(n, d).sign()
    one = torch.zeros(n, d, dtype=torch.float64)
    one[:, 5] = rows(n)
    assert readings.neuron_kurtosis(gram(signs.T)).item() == pytest.approx(1, rel=1e-12)
    assert readings.neuron_kurtosis(gram(one.T)).item() == pytest.approx(d, rel=1e-12)
    for seed in range(20):
        assert 1 <= readings.neuron_kurtosis(gram(uneven(n, d).T @ rotation(n, seed))).item() <= d


def test_kurtosis_of_isotropic_features_is_1_in_every_basis():
    n, d = 32, 8
    isotropic = rotation(n, 1)[:, :d]
    for seed in range(5):
        assert readings.neuron_kurtosis(gram((isotropic @ rotation(d, seed)).T)).item() == pytest.approx(
            1, rel=1e-10
        )
    stretched = isotropic * torch.linspace(1, 3, d)
    kurtoses = [readings.neuron_kurtosis(gram((stretched @ rotation(d, s)).T)).item() for s in range(5)]
    assert max(kurtoses) - min(kurtoses) > 0.01  # control: without isotropy the basis counts


def test_correlations_equal_their_definition():
    x = uneven(9, 12)
    expected = moment_readings(x)
    for name, g in {"token": gram(x), "feature": gram(x.T)}.items():
        got = readings.correlation_rms(g).item()
        assert got == pytest.approx(expected[f"{name}_correlation_rms"], rel=1e-10)
    assert readings.correlation_mean(gram(x)).item() == pytest.approx(
        expected["token_correlation_mean"], rel=1e-10
    )


def test_cosine_statistics_ignore_the_norms_of_rows_and_correlations_do_not():
    x = rows(9, 12) + 0.5
    scaled = x * torch.linspace(0.1, 4, 9)[:, None]
    unit = x / x.norm(dim=-1, keepdim=True)
    cosines = off_diagonal(unit @ unit.T)
    assert readings.cosine_mean(gram(scaled)).item() == pytest.approx(cosines.mean().item(), rel=1e-10)
    assert readings.cosine_rms(gram(scaled)).item() == pytest.approx(
        cosines.square().mean().sqrt().item(), rel=1e-10
    )
    for reading in (readings.correlation_mean, readings.correlation_rms):
        assert reading(gram(scaled)).item() != pytest.approx(reading(gram(x)).item(), rel=1e-2)  # control


def test_collapsed_rows_read_1():
    x = rows(1, 6).expand(5, 6)
    for reading in (
        readings.correlation_mean,
        readings.correlation_rms,
        readings.cosine_mean,
        readings.cosine_rms,
        readings.effective_rank,
        readings.participation_ratio,
    ):
        assert reading(gram(x)).item() == pytest.approx(1, rel=1e-10)


def test_spectrum_and_ranks():
    values = torch.tensor([4.0, 2, 1, 1], dtype=torch.float64)
    x = rotation(4, 0) @ values.sqrt().diag() @ rotation(4, 1)
    torch.testing.assert_close(readings.spectrum(gram(x)), values, rtol=1e-10, atol=0)
    entropy = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    assert readings.effective_rank(gram(x)).item() == pytest.approx(math.exp(entropy), rel=1e-10)
    assert readings.participation_ratio(gram(x)).item() == pytest.approx(64 / 22, rel=1e-10)
    orthogonal = gram(rotation(4, 2))
    assert readings.effective_rank(orthogonal).item() == pytest.approx(4, rel=1e-10)
    assert readings.participation_ratio(orthogonal).item() == pytest.approx(4, rel=1e-10)


ALL = [
    readings.cosine,
    readings.distance,
    readings.path_length,
    readings.apex_angle,
    readings.neuron_kurtosis,
    readings.correlation_mean,
    readings.correlation_rms,
    readings.cosine_mean,
    readings.cosine_rms,
    readings.spectrum,
    readings.effective_rank,
    readings.participation_ratio,
]
INVARIANT = [r for r in ALL if r not in (readings.distance, readings.path_length, readings.spectrum)]


@pytest.mark.parametrize("reading", ALL, ids=lambda r: r.__name__)
def test_batches_equal_loops(reading):
    x = rows(2, 3, 5, 4)
    batched = reading(gram(x))
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(batched[i, j], reading(gram(x[i, j])), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("reading", ALL, ids=lambda r: r.__name__)
def test_scale(reading):
    x = uneven(6, 5)
    same = torch.allclose(reading(gram(x)), reading(gram(1e3 * x)), rtol=1e-9, atol=1e-7)
    assert same == (reading in INVARIANT)


@pytest.mark.parametrize("reading", ALL, ids=lambda r: r.__name__)
def test_nan_stays(reading):
    x = rows(2, 4, 3)
    x[1, 2, 0] = torch.nan
    got = reading(gram(x))
    assert not got[0].isnan().any()
    assert got[1].isnan().any()


@pytest.mark.parametrize(
    "reading",
    [readings.correlation_mean, readings.correlation_rms, readings.cosine_mean, readings.cosine_rms],
    ids=lambda r: r.__name__,
)
def test_one_row_has_no_pairs(reading):
    assert reading(gram(rows(1, 4))).isnan()


@pytest.mark.parametrize("reading", [r for r in ALL if r not in (readings.cosine, readings.distance)])
def test_rectangles_are_refused_where_they_mean_nothing(reading):
    rectangle = gram(rows(3, 5), rows(4, 5, seed=1))
    if reading in (readings.apex_angle, readings.neuron_kurtosis):
        reading(rectangle)
    else:
        with pytest.raises(InputError, match="3 rows against 4"):
            reading(rectangle)


def test_a_gram_of_theory_needs_no_rows():
    n = 6
    cross = 0.3 * torch.ones(n, n, dtype=torch.float64) + 0.7 * torch.eye(n, dtype=torch.float64)
    ones = torch.ones(n, dtype=torch.float64)
    state = Gram(2 * cross, 2 * ones, 2 * ones)
    assert readings.correlation_mean(state).item() == pytest.approx(0.3, rel=1e-12)
    assert readings.participation_ratio(state).item() == pytest.approx(n / (1 + (n - 1) * 0.09), rel=1e-12)
