import pytest
import torch

from gramian.core.moments import Moments
from gramian.observe.inputs import spectral_readings, token_readings
from oracles import moment_readings


def test_readings():
    x = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    got = token_readings(Moments.of(x))
    expected = moment_readings(x.flatten(0, 1))
    assert got == pytest.approx({name: expected[name] for name in got}, rel=1e-9)
    assert tuple(got) == ("token_correlation_mean", "token_correlation_rms", "participation_ratio")
    spectral = spectral_readings(Moments.of(x))
    assert spectral == pytest.approx({"effective_rank": expected["effective_rank"]}, rel=1e-9)


def test_collapsed_tokens_read_1_and_others_do_not():
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    collapsed = token_readings(Moments.of(x[:1].expand(20, 16)))
    assert collapsed == pytest.approx(dict.fromkeys(collapsed, 1.0), rel=1e-10)
    apart = token_readings(Moments.of(x))
    assert apart["token_correlation_rms"] < 0.4
    assert apart["participation_ratio"] > 5
