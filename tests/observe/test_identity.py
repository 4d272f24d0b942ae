import math

import pytest
import torch
from torch import Tensor

from gramian.core.moments import Moments
from gramian.observe.identity import TraceCheck, trace_error


def tokens(n: int = 40, d: int = 12, seed: int = 0) -> Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.4
    x[:, 3 % d] *= 9
    return x


@pytest.mark.parametrize(("n", "d"), [(40, 12), (5, 30), (1, 7), (9, 1)])
def test_both_sides_agree(n: int, d: int):
    assert trace_error(Moments.of(tokens(n, d)), tokens(n, d)) < 1e-14


def test_a_corrupted_stream_is_noticed():
    x = tokens()
    assert trace_error(Moments.of(x), x / x.square().mean(-1, keepdim=True).sqrt()) > 1e-2
    assert trace_error(Moments.of(x), x - x.mean(-1, keepdim=True)) > 1e-3
    assert trace_error(Moments.of(x[1:]), x) > 1e-4
    assert trace_error(Moments.of(x.bfloat16()), x) > 1e-7
    assert trace_error(Moments.of(x), 100 * x) < 1e-14  # the identity is free of scale


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_stream_is_checked_batch_by_batch(centre: bool, dtype: torch.dtype):
    check, x = TraceCheck(centre), tokens(60).view(6, 10, 12).to(dtype)
    mask = torch.arange(10) < torch.tensor([10, 3, 0, 1, 7, 10])[:, None]
    for b in range(6):
        check.add(x[b : b + 1], mask[b : b + 1])
    assert 0 <= check.error() < 1e-14


def test_only_so_many_tokens_are_checked(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(
        "gramian.observe.identity.trace_error", lambda moments, rows: seen.append(len(rows)) or rows.sum()
    )
    check = TraceCheck(tokens=25)
    for _ in range(9):
        check.add(tokens(10))
    assert seen == [10, 10, 5]
    assert TraceCheck().error() != TraceCheck().error()  # nothing was seen


def test_the_check_would_notice_wrong_sums(monkeypatch: pytest.MonkeyPatch):
    def spoiled(self: Moments, other: Moments) -> Moments:
        return self

    monkeypatch.setattr(Moments, "__add__", spoiled)
    check = TraceCheck()
    check.add(tokens())
    assert check.error() > 1e-4


def test_masked_tokens_are_not_checked_and_others_are():
    x = tokens(20)
    x[7] = torch.nan
    for masked in (True, False):
        check = TraceCheck()
        check.add(x, torch.arange(20) != 7 if masked else None)
        assert math.isnan(check.error()) != masked
