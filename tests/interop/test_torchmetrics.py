import json
import math
import multiprocessing
import os
import re
import runpy
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
from gramian.core.moments import Moments
from gramian.errors import InputError, MissingExtraError
from gramian.observe.attention import attention_entropy, sink_rate

torchmetrics = pytest.importorskip("torchmetrics")

from gramian.interop.torchmetrics import (  # noqa: E402
    READINGS,
    AttentionEntropy,
    EffectiveRank,
    MaxMedianRatio,
    NeuronKurtosis,
    Reading,
    SinkRate,
    TokenCorrelation,
)

ROOT = Path(__file__).parents[2]
WIDTH, HEADS = 6, 3


def activations(seed: int = 0) -> Tensor:
    scale = torch.tensor([1.0, 1, 1, 5, 1, 1], dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(7, 5, WIDTH, generator=draw, dtype=torch.float64) * scale + 0.3


def mask() -> Tensor:
    return torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 5, 1])[:, None]


def weights(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(7, HEADS, 5, 5, generator=draw, dtype=torch.float64).mul(2).softmax(-1)


@pytest.mark.parametrize("name", READINGS)
@pytest.mark.parametrize("centre", [False, True])
def test_a_reading_over_batches_is_that_of_all_in_one(name: str, centre: bool):
    x, kept, metric = activations(), mask(), Reading(name, WIDTH, centre=centre)
    for part in (slice(0, 1), slice(1, 5), slice(5, 7)):
        metric.update(x[part], kept[part])
    want = oracles.moment_readings((oracles.centred(x) if centre else x)[kept])[name]
    assert metric.compute().item() == pytest.approx(want, rel=1e-9)
    assert Reading(name, WIDTH, centre=centre)(x[5:]).item() != pytest.approx(want, rel=1e-3)


def test_readings_are_all_that_moments_have():
    assert set(READINGS) == set(oracles.moment_readings(activations().flatten(0, 1)))


@pytest.mark.parametrize("masked", [True, False])
def test_attention_over_batches_is_that_of_all_in_one(masked: bool):
    a, kept = weights(), mask() if masked else None
    for metric, want in (
        (AttentionEntropy(HEADS), attention_entropy(a, kept)),
        (SinkRate(HEADS), sink_rate(a, mask=kept)),
        (SinkRate(HEADS, threshold=0.1), sink_rate(a, 0.1, kept)),
    ):
        for part in (slice(0, 2), slice(2, 7)):
            metric.update(a[part], None if kept is None else kept[part])
        assert metric.compute().item() == pytest.approx(want.item(), rel=1e-9)
    assert sink_rate(a) != sink_rate(a, 0.1)


def test_the_sink_is_the_first_real_token_where_padding_stands_on_the_left():
    a, left = torch.full((2, HEADS, 5, 5), 0.05), torch.arange(5) >= torch.tensor([[0], [2]])
    a[0, ..., 0] = a[1, ..., 2] = 0.8
    assert SinkRate(HEADS, threshold=0.7)(a, left) == 1
    assert SinkRate(HEADS, threshold=0.7)(a) == 0  # control: column 0 of both
    assert SinkRate(HEADS, threshold=0.7)(a, left.flip(1)) == 0


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (NeuronKurtosis, "neuron_kurtosis"),
        (MaxMedianRatio, "max_median_ratio"),
        (TokenCorrelation, "token_correlation_mean"),
        (EffectiveRank, "effective_rank"),
    ],
)
def test_aliases(metric: Any, name: str):
    x = activations()
    assert metric(WIDTH)(x) == Reading(name, WIDTH)(x) == getattr(Moments.of(x), name)()
    assert metric(WIDTH, centre=True)(x) == getattr(Moments.of(x, centre=True), name)()


def test_forward_gives_the_batch_and_adds_it():
    x, metric = activations(), NeuronKurtosis(WIDTH)
    batches = [metric(x[:3]), metric(x[3:])]
    assert batches == [Moments.of(x[:3]).neuron_kurtosis(), Moments.of(x[3:]).neuron_kurtosis()]
    assert metric.compute().item() == pytest.approx(Moments.of(x).neuron_kurtosis().item(), rel=1e-12)


def test_reset_forgets():
    x, metric = activations(), Reading("max_abs", WIDTH)
    metric.update(100 * x)
    metric.reset()
    metric.update(x)
    assert metric.compute() == x.abs().max()
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metric.compute().isnan()


def test_a_collection_sums_once_for_all_readings_of_a_stream():
    x, kept = activations(), mask()
    metrics = torchmetrics.MetricCollection(
        [NeuronKurtosis(WIDTH), TokenCorrelation(WIDTH), MaxMedianRatio(WIDTH, centre=True)]
    )
    x[0] = oracles.centred(x[0])  # the first batch cannot tell the two kinds of sums apart
    for part in (slice(0, 1), slice(1, 5), slice(5, 7)):
        metrics.update(x[part], mask=kept[part])
    moments, centred = Moments.of(x, kept), Moments.of(x, kept, centre=True)
    want = {
        "NeuronKurtosis": moments.neuron_kurtosis().item(),
        "TokenCorrelation": moments.token_correlation_mean().item(),
        "MaxMedianRatio": centred.max_median_ratio().item(),
    }
    assert {name: value.item() for name, value in metrics.compute().items()} == pytest.approx(want, rel=1e-9)
    assert sorted(map(sorted, metrics.compute_groups.values())) == [
        ["MaxMedianRatio"],
        ["NeuronKurtosis", "TokenCorrelation"],
    ]
    metrics.reset()
    metrics.update(x[:2])
    assert metrics.compute()["NeuronKurtosis"] == Moments.of(x[:2]).neuron_kurtosis()


def test_states_are_saved_only_when_asked():
    x, metric = activations(), TokenCorrelation(WIDTH)
    metric.update(x[:3])
    assert metric.state_dict() == {}
    metric.persistent(True)
    again = TokenCorrelation(WIDTH)
    again.persistent(True)
    again.load_state_dict(metric.state_dict())
    again.update(x[3:])
    want = Moments.of(x).token_correlation_mean().item()
    assert again.compute().item() == pytest.approx(want, rel=1e-12)


def test_merge_clone_and_half_precision():
    x, metric = activations(), Reading("max_abs", WIDTH)
    metric.update(x[:3])
    other = metric.clone().half()
    assert other.products.dtype == torch.float64  # torchmetrics converts no state unless told to
    other.reset()
    other.update(x[3:])
    other.merge_state(metric)
    assert other.compute() == x.abs().max()


def test_no_gradient_is_kept():
    x = activations().requires_grad_()
    assert not NeuronKurtosis(WIDTH)(x).requires_grad


def share(rank: int) -> slice:
    return slice(0, 2) if rank == 0 else slice(2, 7)


def metrics() -> dict[str, Any]:
    return {
        **{
            name: Reading(name, WIDTH)
            for name in ("neuron_kurtosis", "token_correlation_rms", "max_abs", "rms")
        },
        "entropy": AttentionEntropy(HEADS),
        "sinks": SinkRate(HEADS, threshold=0.2),
    }


def values(ranks: list[int], empty: tuple[str, ...] = ()) -> dict[str, float]:
    found = {}
    for name, metric in metrics().items():
        data = weights() if isinstance(metric, AttentionEntropy | SinkRate) else activations()
        for rank in ranks:
            metric.update(data[share(rank)][: 0 if name in empty and rank == 1 else None])
        found[name] = metric.compute().item()
    return found


def synchronised(rank: int, folder: str) -> list[dict[str, float]]:
    meeting, patience = f"file://{folder}/meeting", timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2, timeout=patience)
    return [values([rank]), values([rank], empty=("rms",))]


def second(folder: str) -> None:
    (Path(folder) / "second.json").write_text(json.dumps(synchronised(1, folder)))
    os._exit(0)  # two processes that leave a gloo group at the same time may wait for each other


def test_two_processes_give_the_value_of_one(tmp_path: Path):
    child = multiprocessing.get_context("spawn").Process(target=second, args=(str(tmp_path),))
    child.start()
    try:
        first = synchronised(0, str(tmp_path))
        child.join(60)
    finally:
        child.kill()
        torch.distributed.destroy_process_group()
    whole = values([0, 1])
    for rank, (got, lacking) in enumerate([first, json.loads((tmp_path / "second.json").read_text())]):
        assert got == pytest.approx(whole, rel=1e-12)
        assert got != pytest.approx(values([rank]), rel=1e-3)
        assert lacking["rms"] == pytest.approx(values([0])["rms"], rel=1e-12)  # the other had no data


def test_mistakes_are_named():
    x = activations()
    with pytest.raises(
        InputError, match=r"unknown reading 'kurtosis'; choose one of neuron_kurtosis, .*rank"
    ):
        Reading("kurtosis", WIDTH)
    with pytest.raises(InputError, match="width must be at least 1, not 0"):
        NeuronKurtosis(0)
    with pytest.raises(InputError, match="heads must be at least 1, not 0"):
        SinkRate(0)
    with pytest.raises(InputError, match="widths 4 and 6 cannot be merged"):
        NeuronKurtosis(4).update(x)
    with pytest.raises(InputError, match=r"\(batch, 2 heads, queries, keys\), not \(7, 3, 5, 5\)"):
        AttentionEntropy(2).update(weights())
    metric = NeuronKurtosis(WIDTH)
    metric.update(x)
    with pytest.raises(InputError, match="mask of shape"):
        metric.update(x, mask()[:3])
    assert math.isclose(metric.compute(), Moments.of(x).neuron_kurtosis())  # what failed left no trace


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(MissingExtraError, match=r'pip install "gramian\[torchmetrics\]"'):
        runpy.run_path(str(ROOT / "src" / "gramian" / "interop" / "torchmetrics.py"))


def test_the_example_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]):
    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    (program,) = (
        body
        for body in re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
        if "interop.torchmetrics" in body
    )
    exec(compile(program, "frameworks.md", "exec"), {})
    assert "kurtosis" in capsys.readouterr().out
