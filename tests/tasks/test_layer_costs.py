"""What layers cost: operations against counts by hand, memory against known tensors, growth."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gramian.errors import InputError
from gramian.tasks.layer_costs import (
    GPS,
    PAIRS,
    Cost,
    CostStudy,
    LiveBytes,
    PairAttention,
    cost_of,
    ratios,
    run_costs,
)

QUIET = Console(quiet=True)
STUDY = CostStudy(nodes=(12, 48), width=8, repeats=1)


def test_a_filters_operations_are_those_of_its_products() -> None:
    """Rows of shells pass two maps and B, nodes C and both gates as well; sums add pairs, both ways."""
    cost = cost_of(replace(STUDY, dropout=0.0), "blocks", 48, "gred")
    d, rows, nodes = 8, cost.shells, 48
    empty = 1
    of_rows, of_nodes = 2 * 2 * d * d + 2 * d * 2 * d, 2 * 2 * d * d + 2 * d * 2 * d
    pairs = nodes * (nodes - 1)
    assert rows < 3.1 * nodes
    expected = 3 * ((rows + empty) * of_rows + nodes * of_nodes) + 2 * pairs * d
    assert cost.flops == pytest.approx(expected, rel=0.03)


def test_features_of_pairs_grow_with_the_square() -> None:
    small, large = (cost_of(STUDY, "tree", nodes, PAIRS) for nodes in (12, 48))
    d, n = 8, 48
    assert large.flops == pytest.approx(3 * 3 * 2 * d * d * n * n, rel=0.25)
    assert 12 < large.flops / small.flops < 16.1
    assert 12 < large.peak / small.peak < 16.1
    assert large.peak > 4 * n * n * d * 4  # a few tensors of pairs at a time


def test_attention_is_counted_with_and_without_dropout() -> None:
    """The fused kernel of CPUs is not known to torch's counter."""
    counts = [cost_of(replace(STUDY, dropout=rate), "tree", 48, GPS).flops for rate in (0.1, 0.0)]
    assert counts[0] == counts[1]


def test_live_bytes_are_the_peak_and_not_the_sum() -> None:
    known = torch.zeros(1000)
    with LiveBytes([known]) as live:
        for _ in range(3):
            made = known + 1  # 4000 bytes
            both = made * 2
            del made, both
        view = known[:10]
    assert live.peak == 3 * 4000 - 4000
    assert live.now == 0
    assert view.shape == (10,)


def test_pair_attention_is_its_equation() -> None:
    torch.manual_seed(0)
    layer = PairAttention(4, heads=2).double()
    h, e = torch.randn(3, 4).double(), torch.randn(3, 3, 4).double()
    found, pairs = layer(h, e)
    for i in range(3):
        hidden = [
            ((layer.query(h[i]) + layer.key(h[j])) * layer.scale(e[i, j]) + layer.shift(e[i, j])).relu()
            for j in range(3)
        ]
        parts = []
        for head in range(2):
            at = slice(2 * head, 2 * head + 2)
            weights = torch.stack([each[at] @ layer.score[head] for each in hidden]).softmax(0)
            parts.append(
                sum(
                    weights[j] * (layer.value(h[j])[at] + hidden[j][at] @ layer.pair_value[head])
                    for j in range(3)
                )
            )
        torch.testing.assert_close(found[i], h[i] + layer.out(torch.cat(parts)))
        torch.testing.assert_close(pairs[i, 0], e[i, 0] + layer.pair_out(hidden[0]))
    with pytest.raises(InputError, match="multiple of the heads"):
        PairAttention(6, heads=4)


def test_what_was_measured_is_read_again(tmp_path: Path) -> None:
    study = replace(STUDY, nodes=(12,), families=("tree",))
    found = run_costs(study, tmp_path, QUIET)
    assert [each.layer for each in found] == ["gred", GPS, PAIRS]
    assert run_costs(study, tmp_path, QUIET) == found  # times as well
    few = run_costs(replace(study, pair_nodes=11), tmp_path / "few", QUIET)
    assert [each.layer for each in few] == ["gred", GPS]
    with pytest.raises(InputError):
        run_costs(replace(study, width=4), tmp_path, QUIET)


def test_ratios_are_over_the_other_layer() -> None:
    costs = [
        Cost("tree", nodes, layer, 1, 1, flops, 1, 1.0)
        for nodes, layer, flops in ((12, "gred", 6), (12, GPS, 3), (24, "gred", 8), (24, PAIRS, 16))
    ]
    assert ratios(costs, GPS, lambda cost: cost.flops) == {("tree", 12): 2.0}
    assert ratios(costs, PAIRS, lambda cost: cost.flops) == {("tree", 24): 0.5}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"layers": ("gat",)}, "layers are one or several of gred, gps, pairs, got gat"),
        ({"families": ()}, "families are one or several of tree, blocks"),
        ({"nodes": (5,)}, "at least 12 nodes"),
        ({"repeats": 0}, "a repetition"),
    ],
)
def test_bad_settings_are_refused(changed, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        run_costs(replace(STUDY, **changed), tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()
