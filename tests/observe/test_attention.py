import math

import pytest
import torch
from torch import Tensor

import oracles
from gramian.errors import InputError
from gramian.observe.attention import AttentionMoments, attention_entropy, sink_rate
from reference import cases, load


def causal(batch: int, heads: int, tokens: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, heads, tokens, tokens, generator=generator, dtype=torch.float64)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, -math.inf).softmax(-1)


def with_sink(amounts: list[float], tokens: int = 40) -> Tensor:
    """One head an amount: every query gives it to token 0 and the rest to itself."""
    heads = [a * torch.eye(tokens)[:1].expand(tokens, -1) + (1 - a) * torch.eye(tokens) for a in amounts]
    return torch.stack(heads)[None].double()


def test_entropy_equals_the_definition():
    weights = causal(3, 2, 9)
    assert attention_entropy(weights).item() == pytest.approx(oracles.attention_entropy(weights), rel=1e-12)
    assert attention_entropy(weights).item() != pytest.approx(
        oracles.attention_entropy(weights.softmax(-1)), rel=1e-2
    )


def test_entropy_of_known_rows():
    tokens = 16
    assert attention_entropy(torch.eye(tokens).expand(2, 3, tokens, tokens)).item() == 0
    uniform = torch.full((2, 3, tokens, tokens), 1 / tokens)
    assert attention_entropy(uniform).item() == pytest.approx(math.log(tokens), rel=1e-6)
    expected = sum(math.log(i + 1) for i in range(tokens)) / tokens
    assert attention_entropy(causal(1, 1, tokens, scale=0)).item() == pytest.approx(expected, rel=1e-12)


def test_entropy_needs_no_weights_of_its_own():
    """The identity H_i = lse_i − scale q_i · SDPA(q, k, k)_i, for plain scaled logits."""
    q, k = torch.randn(2, 2, 3, 8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = q @ k.mT / 2
    entropy = logits.logsumexp(-1) - (q * (logits.softmax(-1) @ k)).sum(-1) / 2
    assert attention_entropy(logits.softmax(-1)).item() == pytest.approx(entropy.mean().item(), rel=1e-10)


def test_sink_rate_counts_heads_above_the_threshold():
    weights = with_sink([0.0, 0.2, 0.5, 0.9])
    assert sink_rate(weights).item() == 0.5
    assert sink_rate(weights, threshold=0.6).item() == 0.25
    assert sink_rate(weights, threshold=0.1).item() == 0.75
    for threshold in (0.1, 0.3, 0.6):
        assert sink_rate(causal(3, 8, 6), threshold).item() == oracles.sink_rate(causal(3, 8, 6), threshold)


def test_sink_rate_averages_before_it_compares():
    sinking, resting = with_sink([0.9]), with_sink([0.0])
    mostly = torch.cat([sinking, resting])
    assert sink_rate(mostly).item() == 1
    assert torch.stack([sink_rate(sinking), sink_rate(resting)]).mean() == 0.5  # control: the other order


def test_query_0_counts():
    assert sink_rate(causal(1, 1, 1)).item() == 1
    assert sink_rate(causal(1, 1, 9, scale=0)).item() == 1
    assert sink_rate(causal(1, 1, 10, scale=0)).item() == 0


def test_masked_queries_count_nowhere():
    weights = causal(2, 3, 8)
    mask = torch.ones(2, 8)
    mask[1, 5:] = 0
    expected = (
        8 * oracles.attention_entropy(weights[:1]) + 5 * oracles.attention_entropy(weights[1:, :, :5])
    ) / 13
    weights[1, :, 5:] = torch.nan
    assert attention_entropy(weights, mask).item() == pytest.approx(expected, rel=1e-12)
    assert not sink_rate(weights, mask=mask).isnan()
    assert attention_entropy(weights).isnan()
    assert sink_rate(weights).isnan()
    with pytest.raises(InputError, match=r"mask of shape \(8, 2\)"):
        attention_entropy(weights, mask.T)


def test_the_first_token_is_the_first_that_the_mask_keeps_or_the_one_that_is_said():
    weights, tokens = causal(3, 2, 8), torch.arange(8)
    left = tokens >= torch.tensor([[0], [3], [7]])
    for mask, first in ((left, [0, 3, 7]), (left.flip(1), [0, 0, 0]), (None, [0, 0, 0])):
        got = AttentionMoments.of(weights, mask)
        kept = torch.ones(3, 8) if mask is None else mask
        want = sum(weights[b, :, i, first[b]] for b in range(3) for i in range(8) if kept[b, i])
        torch.testing.assert_close(got.first, want, rtol=1e-12, atol=0)
    assert not torch.allclose(AttentionMoments.of(weights).first, AttentionMoments.of(weights, left).first)
    said = AttentionMoments.of(weights, left, torch.tensor([1, 1, 1])).first
    torch.testing.assert_close(said, (weights[..., 1] * left[:, None]).sum((0, 2)), rtol=1e-12, atol=0)
    crossing = AttentionMoments.of(weights[:, :, :5], left[:, :5])  # other tokens than the queries
    torch.testing.assert_close(
        crossing.first, (weights[:, :, :5, 0] * left[:, None, :5]).sum((0, 2)), rtol=1e-12, atol=0
    )


def test_other_numbers_of_heads_do_not_merge():
    with pytest.raises(InputError, match="attentions of 3 and 1 heads"):
        _ = AttentionMoments.of(causal(1, 3, 4)) + AttentionMoments.of(causal(1, 1, 4))


def test_no_queries_read_nan():
    weights = causal(2, 3, 4)
    assert attention_entropy(weights, torch.zeros(2, 4)).isnan()
    assert sink_rate(weights, mask=torch.zeros(2, 4)).isnan()


def test_batches_merge():
    weights = causal(5, 3, 6)
    merged = AttentionMoments.of(weights[:1]) + AttentionMoments.of(weights[1:])
    assert merged.attention_entropy().item() == pytest.approx(attention_entropy(weights).item(), rel=1e-12)
    for threshold in (0.2, 0.3, 0.4):
        assert merged.sink_rate(threshold).item() == sink_rate(weights, threshold).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precisions(dtype: torch.dtype):
    weights = causal(2, 3, 32).to(dtype)
    expected = oracles.attention_entropy(weights.double())
    assert attention_entropy(weights).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("path", cases("outlier_metrics"))
def test_parity_with_the_authors_logging_code(path):
    case = load(path)
    names = [name for name, values in case.spec["scalars"].items() if "attention_entropy" in values]
    assert names
    for name in names:
        expected = case.spec["scalars"][name]
        assert {"attention_entropy": attention_entropy(case.arrays[name]).item()} == pytest.approx(
            expected, rel=1e-9
        )
