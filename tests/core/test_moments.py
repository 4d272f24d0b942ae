import itertools
import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gramian.core import readings
from gramian.core.gram import gram
from gramian.core.moments import ROWS, Moments
from gramian.errors import InputError
from oracles import centred, moment_readings, unit_rms
from reference import cases, load

NAMES = list(moment_readings(torch.eye(2) + 1))
PAIRS = ["token_correlation_mean", "token_correlation_rms"]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven(*shape: int, seed: int = 0) -> Tensor:
    """Tokens with an outlier neuron, unequal norms and a common direction."""
    x = rows(*shape, seed=seed) + 0.5
    x[..., 3] *= 12
    return x * torch.linspace(0.5, 2, shape[-2])[:, None]


def read(moments: Moments) -> dict[str, float]:
    return {name: getattr(moments, name)().item() for name in NAMES}


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (3, 5, 16), (2, 3, 4, 9), (2, 5)])
def test_equals_the_direct_computation(shape: tuple[int, ...], centre: bool):
    x = uneven(*shape)
    flat = x.reshape(-1, shape[-1])
    expected = moment_readings(centred(flat) if centre else flat)
    assert read(Moments.of(x, centre=centre)) == pytest.approx(expected, rel=1e-9)


def test_more_rows_than_are_taken_at_once():
    x = uneven(2 * ROWS + 3, 5)
    assert read(Moments.of(x)) == pytest.approx(moment_readings(x), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("centre", [False, True])
def test_low_precisions_are_summed_in_float64(dtype: torch.dtype, centre: bool):
    x = (1 + 30 * uneven(200, 24)).to(dtype)
    exact = centred(x.double()) if centre else x.double()
    assert read(Moments.of(x, centre=centre)) == pytest.approx(moment_readings(exact), rel=1e-9)
    s = x.float().square().sum(0) if dtype == torch.float32 else x.square().sum(0)
    naive = (24 * s.square().sum() / s.sum().square()).item()  # control: sums in the tensor's own precision
    assert naive != pytest.approx(moment_readings(x)["neuron_kurtosis"], rel=1e-9)


def test_trace_identity_and_its_control():
    n, d = 30, 12
    x = uneven(n, d)

    def sides(normalised: Tensor) -> tuple[float, float]:
        m = Moments.of(normalised)
        off = m.products.square().sum() - m.products.diagonal().square().sum()
        left = n**2 * d * Moments.of(x).neuron_kurtosis() + off
        return left.item(), (normalised @ normalised.T).square().sum().item()

    left, right = sides(unit_rms(x))
    assert left == pytest.approx(right, rel=1e-10)
    left, right = sides(x / x.square().mean(-1, keepdim=True).sqrt())
    assert left != pytest.approx(right, rel=1e-2)  # control: every token by its own RMS

    m = Moments.of(x)
    y = unit_rms(x)
    mean_square = (y @ y.T / d).square().mean().item()
    assert mean_square == pytest.approx(
        (m.neuron_kurtosis() / d + (1 - 1 / d) * m.feature_correlation_rms() ** 2).item(), rel=1e-10
    )


def test_kurtosis_of_gaussian_tokens_falls_as_2_over_n():
    d, counts = 64, [8, 16, 32, 64, 128]
    excess = []
    for n in counts:
        draws = [Moments.of(rows(n, d, seed=1000 * n + s)).neuron_kurtosis().item() - 1 for s in range(30)]
        excess.append(sum(draws) / len(draws))
    logs = torch.tensor(counts).double().log()
    slope = (torch.cov(torch.stack([logs, torch.tensor(excess).double().log()]))[0, 1] / logs.var()).item()
    # E = 2/n to leading order; at finite d the random sum of squares takes off a factor 1 − 1/d.
    assert slope == pytest.approx(-1, abs=0.06)
    assert excess[-1] * counts[-1] / 2 == pytest.approx(1, abs=0.1)
    x = rows(128, d)
    x[:, 0] *= 3
    assert (Moments.of(x).neuron_kurtosis().item() - 1) * 64 > 10  # control: an outlier does not fall


def test_gaussian_values_at_initialisation():
    n, d = 4000, 768
    m = Moments.of(rows(n, d))
    assert m.max_median_ratio().item() == pytest.approx(5.01, abs=0.03)
    assert m.elementwise_kurtosis().item() == pytest.approx(3, abs=0.02)
    assert m.neuron_kurtosis().item() == pytest.approx(1 + 2 / n, abs=1e-4)
    assert m.token_correlation_rms().item() == pytest.approx(1 / math.sqrt(d), rel=0.02)
    assert m.feature_correlation_rms().item() == pytest.approx(1 / math.sqrt(n), rel=0.02)
    assert m.participation_ratio().item() == pytest.approx(n * d / (n + d), rel=0.02)
    assert m.rms().item() == pytest.approx(1, rel=0.01)


def test_all_but_two_readings_are_free_of_scale():
    x = uneven(20, 9)
    before, after = read(Moments.of(x)), read(Moments.of(1e-3 * x))
    for name in NAMES:
        factor = 1e-3 if name in ("max_abs", "rms") else 1
        assert after[name] == pytest.approx(factor * before[name], rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 30), max_size=4),
    order=st.randoms(use_true_random=False),
    centre=st.booleans(),
)
def test_merge_in_any_split_and_order(cuts: list[int], order, centre: bool):
    x = uneven(30, 6)
    mask = torch.arange(30) % 7 != 2
    edges = [0, *sorted(cuts), 30]
    parts = [Moments.of(x[a:b], mask[a:b], centre) for a, b in itertools.pairwise(edges)]
    order.shuffle(parts)
    while len(parts) > 1:
        at = order.randrange(len(parts) - 1)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    assert read(parts[0]) == pytest.approx(read(Moments.of(x[mask], centre=centre)), rel=1e-9)


def test_merge_commutes_exactly():
    a, b = Moments.of(uneven(5, 6)), Moments.of(uneven(8, 6, seed=1))
    for field in fields(Moments):
        assert torch.equal(getattr(a + b, field.name), getattr(b + a, field.name))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_tokens_count_nowhere(dtype: torch.dtype):
    x = uneven(3, 8, 6)
    mask = torch.ones(3, 8)
    mask[0, 5:] = 0
    mask[2, :4] = 0
    kept = x[mask.bool()]
    spoiled = x.clone()
    spoiled[mask == 0] = torch.nan
    assert read(Moments.of(spoiled, mask.to(dtype))) == pytest.approx(moment_readings(kept), rel=1e-9)
    zeroed = Moments.of(x * mask[..., None])  # control: zeros in place of a mask
    assert read(zeroed)["rms"] != pytest.approx(moment_readings(kept)["rms"], rel=1e-2)


def test_refuses_other_masks_and_inputs():
    x = rows(3, 8, 6)
    with pytest.raises(InputError, match=r"mask of shape \(8, 3\)"):
        Moments.of(x, torch.ones(8, 3))
    with pytest.raises(InputError, match="0 and 1"):
        Moments.of(x, torch.full((3, 8), 0.5))
    with pytest.raises(InputError, match="int64"):
        Moments.of(torch.ones(3, 8, dtype=torch.int64))
    with pytest.raises(InputError, match="floating-point"):
        Moments.of(torch.ones(3, 0))
    with pytest.raises(InputError, match="widths 6 and 5"):
        _ = Moments.of(x) + Moments.of(x[..., :5])


def test_no_token_reads_nan_and_merges_as_nothing():
    x = uneven(9, 6)
    none = Moments.of(x, torch.zeros(9))
    assert all(math.isnan(value) for value in read(none).values())
    assert all(math.isnan(value) for value in read(Moments.of(x[:0])).values())
    assert read(none + Moments.of(x)) == read(Moments.of(x))


@pytest.mark.parametrize("seed", range(5))
def test_one_token_has_no_pairs(seed: int):
    got = read(Moments.of(uneven(1, 6, seed=seed)))
    assert {name for name, value in got.items() if math.isnan(value)} == set(PAIRS)


def test_one_neuron_has_no_pairs_either():
    got = read(Moments.of(rows(5, 1)))
    assert math.isnan(got["feature_correlation_rms"])
    assert got["neuron_kurtosis"] == 1


@pytest.mark.parametrize("merged", [False, True])
def test_nan_in_nan_out(merged: bool):
    x = uneven(9, 6)
    x[4, 2] = torch.nan
    moments = Moments.of(x)
    if merged:
        moments = Moments.of(uneven(5, 6)) + moments + Moments.of(uneven(5, 6))
    assert all(math.isnan(value) for value in read(moments).values())


def test_tokens_without_a_median_or_a_variance_are_left_out():
    x = uneven(4, 6)
    x[0] = 0
    x[1, 1:] = 0
    x[2] = 7
    got = read(Moments.of(x))
    assert got == pytest.approx(moment_readings(x), rel=1e-9)
    assert got["max_median_ratio"] == pytest.approx((1 + read(Moments.of(x[3:]))["max_median_ratio"]) / 2)
    assert math.isnan(read(Moments.of(x[:2]))["max_median_ratio"])


def test_a_large_common_mean_cancels_nothing_in_the_tokens_kurtosis():
    x = uneven(20, 9)
    exact, shifted = (read(Moments.of(y))["token_excess_kurtosis"] for y in (x, x + 1e5))
    assert shifted == pytest.approx(exact, rel=1e-7)


def test_features_are_the_gram_over_neurons():
    x = uneven(3, 8, 6)
    features, expected = Moments.of(x).features(), gram(x.reshape(-1, 6).T)
    torch.testing.assert_close(features.cross, expected.cross, rtol=1e-12, atol=1e-12)
    assert Moments.of(x).neuron_kurtosis().item() == readings.neuron_kurtosis(features).item()


def test_leaves_the_input_and_its_graph_alone():
    x = uneven(6, 5).requires_grad_()
    before = x.detach().clone()
    for dtype in (torch.float64, torch.float32):
        for centre in (False, True):
            assert not Moments.of(x.to(dtype), centre=centre).products.requires_grad
    assert torch.equal(x.detach(), before)
    with torch.inference_mode():
        assert read(Moments.of(x)) == read(Moments.of(before))


@pytest.mark.parity
@pytest.mark.parametrize("path", cases("outlier_metrics"))
def test_parity_with_the_authors_logging_code(path):
    case = load(path)
    config, scalars = case.spec["config"], case.spec["scalars"]
    assert config["items"]
    for item in config["items"]:
        x = case.arrays[item["name"]]
        assert x.shape == (item["B"], item["T"], item["D"])
        assert set(scalars[item["name"]]) == {"centred", "uncentred"}
        for variant, expected in scalars[item["name"]].items():
            m = Moments.of(x, centre=variant == "centred")
            d = item["D"]
            # The authors divide x by (its RMS + epsilon): their second moments shrink by this factor.
            rms = m.rms().item()
            shrunk = (rms / (rms + config["epsilon_added_to_x_rms"])) ** 2
            got = {
                "x_rms": rms + config["epsilon_added_to_x_rms"],
                "kurtosis": (m.neuron_kurtosis().item() - 1) * d / (d - 1) * shrunk**2,
                "feat_corr_rms": m.feature_correlation_rms().item() * shrunk,
                "batch_corr_mean": m.token_correlation_mean().item() * shrunk,
                "batch_corr_rms": m.token_correlation_rms().item() * shrunk,
                "max_median_ratio": m.max_median_ratio().item(),
                "population_kurtosis": m.neuron_kurtosis().item(),
            }
            assert set(got) == set(expected)
            assert got == pytest.approx(expected, rel=1e-9, abs=0), (item, variant)


@pytest.mark.parity
@pytest.mark.parametrize("path", cases("outlier_metrics"))
def test_parity_leaves_no_array_of_the_reference_out(path):
    """Streams are compared above, attentions in tests/observe/test_attention.py."""
    case = load(path)
    streams = {item["name"] for item in case.spec["config"]["items"]}
    attentions = {name for name, values in case.spec["scalars"].items() if "attention_entropy" in values}
    assert streams | attentions == set(case.arrays) == set(case.spec["arrays"]) == set(case.spec["scalars"])
    assert all(set(case.spec["scalars"][name]) == {"attention_entropy"} for name in attentions)


def laplace(*shape: int, seed: int = 0) -> Tensor:
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs())


@pytest.mark.parametrize("split", [1, 7])
def test_equal_neurons_read_1_and_one_active_neuron_reads_d(split: int):
    d = 12

    def kurtosis(x: Tensor) -> float:
        first, *others = [Moments.of(part) for part in x.tensor_split(split)]
        return sum(others, first).neuron_kurtosis().item()

    signs = rows(40, d).sign() * torch.linspace(1, 3, 40)[:, None]
    assert kurtosis(signs) == pytest.approx(1, rel=1e-12)
    assert kurtosis(rows(40, d)) > 1.01
    alone = torch.zeros(40, d, dtype=torch.float64)
    alone[:, 5] = rows(40)
    assert kurtosis(alone) == pytest.approx(d, rel=1e-12)
    alone[3, 4] = 9
    assert kurtosis(alone) < 0.9 * d


@pytest.mark.parametrize(("draw", "kurtosis"), [(rows, 3), (laplace, 6)])
def test_each_convention_has_its_own_closed_form(draw, kurtosis: int):
    """For independent entries of kurtosis κ: elementwise κ; neuron 1 + (κ−1)/n; token κ − 3 as d → ∞."""
    n, d = 600, 2000
    wide = Moments.of(draw(n, d))
    assert wide.elementwise_kurtosis().item() == pytest.approx(kurtosis, rel=0.02)
    assert wide.neuron_kurtosis().item() - 1 == pytest.approx((kurtosis - 1) / n, rel=0.05)
    # The sample kurtosis of a Gaussian token spreads as √(24/d), of which the positive part is kept.
    excess = math.sqrt(12 / (math.pi * d)) if kurtosis == 3 else kurtosis - 3
    assert wide.token_excess_kurtosis().item() == pytest.approx(excess, rel=0.15)


def test_a_planted_neuron_has_its_closed_form_in_each_convention():
    """One neuron of variance c² among d: neuron K = d(d−1+c⁴)/(d−1+c²)², elementwise 3K."""
    n, d, c = 20_000, 50, 12.0
    x = rows(n, d)
    x[:, 17] *= c
    m, inequality = Moments.of(x), d * (d - 1 + c**4) / (d - 1 + c**2) ** 2
    assert m.neuron_kurtosis().item() == pytest.approx(inequality, rel=0.02)
    assert m.elementwise_kurtosis().item() == pytest.approx(3 * inequality, rel=0.03)
    assert Moments.of(x[:, :17]).neuron_kurtosis().item() == pytest.approx(1, rel=0.01)
