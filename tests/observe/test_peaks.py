import math

import pytest
import torch
from torch import Tensor

from gramian.core.moments import Moments
from gramian.observe.peaks import Peak, Summit


def stream(seed: int = 0) -> Tensor:
    return torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow(x: Tensor, kept: Tensor) -> Peak:
    best = Peak(0.0, 0, 0, 0)
    for b, sequence in enumerate(x.tolist()):
        for t, token in enumerate(sequence):
            for j, value in enumerate(token):
                if kept[b, t] and abs(value) > abs(best.value):
                    best = Peak(value, b, t, j)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_the_peak_of_a_batch_is_that_of_a_loop(seed: int):
    x, kept = stream(seed), torch.arange(5) >= torch.tensor([0, 3, 1, 2])[:, None]
    assert Summit.of(x, kept).peak() == slow(x, kept)
    assert Summit.of(x).peak() == slow(x, torch.ones(4, 5))
    centred = x - x.mean(-1, keepdim=True)
    got = Summit.of(x, kept, centre=True).peak()
    assert got == slow(centred, kept)
    assert got != Summit.of(x, kept).peak()
    assert abs(got.value) == Moments.of(x, kept, centre=True).max_abs().item()


@pytest.mark.parametrize("split", [(1, 3), (2, 2), (1, 1, 2), (4,)])
def test_sequences_are_counted_over_batches(split: tuple[int, ...]):
    x = stream()
    x[3, 2, 1] = -9
    parts = [Summit.of(part) for part in x.split(list(split))]
    assert sum(parts[1:], parts[0]).peak() == Peak(-9.0, 3, 2, 1)
    assert parts[-1].peak() != Peak(-9.0, 3, 2, 1) or split == (4,)  # control: within its batch


def test_rows_and_low_precision():
    rows = stream()[0].bfloat16()
    rows[4, 5] = 8
    assert Summit.of(rows).peak() == Peak(8.0, 4, 0, 5)
    assert Summit.of(rows, torch.tensor([1, 1, 1, 1, 0])).peak() != Peak(8.0, 4, 0, 5)


def test_what_is_not_finite_is_the_peak_and_what_is_masked_is_not():
    x, kept = stream(), torch.ones(4, 5)
    kept[1, 2] = 0
    x[1, 2, 3] = torch.nan
    assert Summit.of(x, kept).peak() == slow(torch.where(x.isnan(), 0, x), kept)
    peak = (Summit.of(1e9 * stream(1)) + Summit.of(x)).peak()
    assert peak is not None
    assert math.isnan(peak.value)
    assert (peak.sequence, peak.position, peak.neuron) == (5, 2, 3)
    later = (Summit.of(x) + Summit.of(1e9 * stream(1))).peak()
    assert later is not None
    assert math.isnan(later.value)
    x[1, 2, 3] = -torch.inf
    assert Summit.of(x).peak() == Peak(-math.inf, 1, 2, 3)


def test_the_earliest_of_equal_entries():
    x = torch.ones(2, 2, 2)
    assert (Summit.of(x) + Summit.of(-x)).peak() == Peak(1.0, 0, 0, 0)


def test_without_tokens_there_is_no_peak_but_sequences_count():
    x = stream()
    none = Summit.of(x, torch.zeros(4, 5))
    assert none.peak() is None
    assert Summit.of(x[:0]).peak() is None
    found, alone = (none + Summit.of(x[:0]) + Summit.of(x)).peak(), Summit.of(x).peak()
    assert found is not None
    assert alone is not None
    assert found == Peak(alone.value, alone.sequence + 4, alone.position, alone.neuron)
