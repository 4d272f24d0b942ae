"""The layer that filters by distance against loops over nodes and shells, and the laws that it keeps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.nn import graph as module
from gramian.nn.distances import distance_shells
from gramian.nn.graph import DistanceFilter
from gramian.nn.init import initialise_
from gramian.nn.shells import batch_shells
from graphs import edges, layer, normal, random_graph, relaxed, slow_layer, three

CLOSE = {"rtol": 0, "atol": 1e-10}


def of_every_graph(filter: DistanceFilter, h: Tensor, graphs: list[Tensor], sizes, count: int, **options):
    parts = zip(graphs, h.split(list(sizes)), strict=True)
    return torch.cat([slow_layer(filter, x, relaxed(g, len(x)), count, **options) for g, x in parts])


@pytest.mark.parametrize("gate", ["full", "half", "none"])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_the_layer_is_the_loop(gate: str, count: int) -> None:
    filter, h = layer(gate=gate, expand=2), normal(14, 4)
    graphs, shells = three(count)
    expected = of_every_graph(filter, h, graphs, shells.sizes, count)
    torch.testing.assert_close(filter(h, shells), expected, **CLOSE)
    torch.testing.assert_close(filter(h, shells.dense(torch.float64)), expected, **CLOSE)
    if count > 1:  # control: without the constant of empty shells it is another function
        dropped = of_every_graph(filter, h, graphs, shells.sizes, count, skip_empty=True)
        assert (dropped - expected).abs().max() > 1e-3


def test_at_the_start_the_constant_is_zero_and_a_test_would_miss_it() -> None:
    filter, h = DistanceFilter(4, 5).double(), normal(14, 4)
    graphs, shells = three(6)
    dropped = of_every_graph(filter, h, graphs, shells.sizes, 6, skip_empty=True)
    torch.testing.assert_close(filter(h, shells), dropped, **CLOSE)


def test_neutral_empty_shells_are_skipped_and_more_of_them_change_nothing() -> None:
    filter, h = layer(neutral_empty=True), normal(14, 4)
    graphs, shells = three(6)
    expected = of_every_graph(filter, h, graphs, shells.sizes, 6, skip_empty=True)
    torch.testing.assert_close(filter(h, shells), expected, **CLOSE)
    more = shells.with_count(11)
    torch.testing.assert_close(filter(h, more), expected, **CLOSE)
    assert (layer()(h, more) - layer()(h, shells)).abs().max() > 1e-3  # control


def test_one_more_empty_shell_adds_the_constant_once() -> None:
    filter, h = layer(), normal(14, 4)
    shells = three(8)[1]
    own = filter.mlp(h)
    more = filter._state(h, own, shells.with_count(9)) - filter._state(h, own, shells)
    recurrence = filter.recurrence
    constant = filter.norm(filter.mlp(torch.zeros(4, dtype=torch.float64))) @ recurrence.input_map().T
    (c_re, c_im), (v_re, v_im) = constant.chunk(2), recurrence.vandermonde(9)[8].chunk(2)
    expected = torch.cat((c_re * v_re - c_im * v_im, c_re * v_im + c_im * v_re))
    torch.testing.assert_close(more, expected.expand(14, -1), **CLOSE)
    assert expected.abs().max() > 1e-4


def gradients(filter: DistanceFilter, h: Tensor, shells, weights: Tensor) -> list[Tensor]:
    h = h.clone().requires_grad_()
    return list(torch.autograd.grad((filter(h, shells) * weights).sum(), [h, *filter.parameters()]))


def test_gradients_of_both_back_ends_of_blocks_and_of_loops_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    filter, h, weights = layer(), normal(14, 4), normal(14, 4, seed=1)
    graphs, shells = three(5)
    leaf = h.clone().requires_grad_()
    loop = (of_every_graph(filter, leaf, graphs, shells.sizes, 5) * weights).sum()
    expected = torch.autograd.grad(loop, [leaf, *filter.parameters()])
    found = [gradients(filter, h, kind, weights) for kind in (shells, shells.dense(torch.float64))]
    monkeypatch.setitem(module.ROWS_AT_ONCE, "cpu", 7)
    assert len(shells.node) > 2 * 7
    found.append(gradients(filter, h, shells, weights))
    for gradient in found:
        for one, other in zip(gradient, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"neutral_empty": True}, {"expand": 2}])
@pytest.mark.parametrize("size", [1, 8, 11, 20, 1000])
def test_blocks_of_any_size_are_one_block(size: int, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    filter, h, weights = layer(**options), normal(14, 4), normal(14, 4, seed=1)
    shells = three(5)[1]
    monkeypatch.setitem(module.ROWS_AT_ONCE, "cpu", len(shells.node))
    value, expected = filter(h, shells), gradients(filter, h, shells, weights)
    monkeypatch.setitem(module.ROWS_AT_ONCE, "cpu", size)
    for kind in (shells, shells.dense(torch.float64)):
        torch.testing.assert_close(filter(h, kind), value, **CLOSE)
        for one, other in zip(gradients(filter, h, kind, weights), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_one_block_less_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control of the comparison of blocks: it tells a layer that leaves out rows."""
    filter, h, shells = layer(), normal(14, 4), three(5)[1]
    value = filter(h, shells)
    monkeypatch.setitem(module.ROWS_AT_ONCE, "cpu", 7)
    every = type(shells).blocks
    monkeypatch.setattr(type(shells), "blocks", lambda *given: list(every(*given))[1:])
    assert (filter(h, shells) - value).abs().max() > 1e-3


def test_of_blocks_nothing_is_kept_for_the_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    filter, h, shells = layer(), normal(14, 4).requires_grad_(), three(5)[1]

    def kept(size: int) -> set[int]:
        lengths: set[int] = set()

        def pack(x: Tensor) -> Tensor:
            lengths.update([x.shape[0]] if x.is_floating_point() and x.ndim == 2 else [])
            return x

        monkeypatch.setitem(module.ROWS_AT_ONCE, "cpu", size)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            filter(h, shells)
        return lengths

    rows = len(shells.node)
    assert rows in kept(rows)  # control
    assert kept(7).isdisjoint({7, rows % 7, rows})


def test_second_derivatives_go_through_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    filter, shells = layer(2, 2), distance_shells(edges((0, 1), (1, 2)), 3, 4)
    monkeypatch.setitem(module.ROWS_AT_ONCE, "cpu", 2)
    assert len(shells.node) == 5
    h = normal(3, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: filter(x, shells), (h,))


def test_second_derivatives_go_through() -> None:
    filter, shells = layer(2, 2), distance_shells(edges((0, 1), (1, 2)), 3, 4)
    h = normal(3, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: filter(x, shells), (h,))


def test_transforms_see_the_same_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    filter, h, weights = layer(), normal(14, 4), normal(14, 4, seed=1)
    shells = three(5)[1]
    monkeypatch.setitem(module.ROWS_AT_ONCE, "cpu", 7)
    value, pull = torch.func.vjp(lambda x: filter(x, shells), h)
    torch.testing.assert_close(value, filter(h, shells), **CLOSE)
    torch.testing.assert_close(pull(weights)[0], gradients(filter, h, shells, weights)[0], **CLOSE)
    several = torch.func.vmap(lambda x: filter(x, shells))(torch.stack((h, h + 1)))
    torch.testing.assert_close(several[1], filter(h + 1, shells), **CLOSE)


COMPILED = """
import torch
from graphs import layer, normal, three
filter, h, shells = layer(), normal(14, 4).requires_grad_(), three(5)[1]
compiled = torch.compile(filter, backend="aot_eager", fullgraph=True)
for kind in (shells, shells.dense(torch.float64)):
    torch.testing.assert_close(compiled(h, kind), filter(h, kind), rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(f(h, kind).square().sum(), h)[0] for f in (compiled, filter)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)
print("whole")
"""


@pytest.mark.slow
def test_a_compiled_layer_is_the_layer() -> None:
    """In a process without the annotation checks of the tests."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


def test_nodes_can_be_renumbered() -> None:
    filter, h, graph = layer(), normal(9, 4), random_graph(9, 9, 1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    number = order.argsort()  # old node -> new
    plain, moved = distance_shells(graph, 9, 6), distance_shells(number[graph], 9, 6)
    torch.testing.assert_close(filter(h[order], moved), filter(h, plain)[order], **CLOSE)
    assert (filter(h[order], plain) - filter(h, plain)[order]).abs().max() > 1e-2  # control


def test_a_graph_of_a_batch_is_as_alone_and_padding_as_nothing() -> None:
    filter, h = layer(), normal(14, 4)
    graphs, shells = three(5)
    parts = zip(graphs, h.split(list(shells.sizes)), strict=True)
    alone = torch.cat([filter(x, distance_shells(g, len(x), 5)) for g, x in parts])
    torch.testing.assert_close(filter(h, shells), alone, **CLOSE)
    padded = distance_shells(graphs[0], 10, 5)  # three more nodes that nothing reaches
    found = filter(torch.cat((h[:7], 9 * normal(3, 4, seed=2))), padded)[:7]
    torch.testing.assert_close(found, alone[:7], **CLOSE)
    other = distance_shells(graphs[0], 7, 6)
    assert (filter(h[:7], other) - alone[:7]).abs().max() > 1e-4  # control: K is part of the function


def test_one_shell_sees_the_node_alone() -> None:
    filter, h = layer(), normal(9, 4)
    one, other = (distance_shells(random_graph(9, 12, seed), 9, 1) for seed in (1, 2))
    assert torch.equal(filter(h, one), filter(h, other))
    changed = h.clone()
    changed[0] += 1
    assert torch.equal(filter(changed, one)[1:], filter(h, one)[1:])
    one, other = (distance_shells(random_graph(9, 12, seed), 9, 2) for seed in (1, 2))
    assert (filter(h, one) - filter(h, other)).abs().max() > 1e-2  # control


def test_shells_reach_as_far_as_their_number() -> None:
    """On a path, K shells let features pass K − 1 edges in one layer."""
    path = edges(*((u, u + 1) for u in range(9)))
    for count in (2, 4, 7):
        jacobian = torch.autograd.functional.jacobian(
            lambda h, count=count: layer()(h, distance_shells(path, 10, count))[0].sum(), normal(10, 4)
        )
        reached = jacobian.abs().sum(1) > 0
        assert reached.tolist() == [node < count for node in range(10)]


def test_dropout_of_shells_is_off_as_published_unless_it_is_asked_for() -> None:
    h, shells = normal(14, 4), three(5)[1]

    def twice(**options) -> list[Tensor]:
        filter = layer(**options)
        outputs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            outputs.append(filter(h, shells))
        return outputs

    with torch.random.fork_rng(devices=[]):
        assert torch.equal(*twice())
        for options in ({"dropout": 0.5}, {"shell_dropout": 0.5}):
            assert not torch.equal(*twice(**options))
        filter = layer(dropout=0.5)
        seen: list[bool] = []
        filter.mlp.dropout.register_forward_hook(lambda part, x, y: seen.append(torch.equal(x[0], y)))
        filter(h, shells)
        assert all(seen)
        assert len(seen) == 6  # two places; the nodes, the empty shell, the others
        filter = layer(dropout=0.5, shell_dropout=0.5).eval()
        assert torch.equal(filter(h, shells), layer()(h, shells))


def test_blocks_repeat_their_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The derivative of a fixed draw is what differences say, though blocks are computed twice."""
    filter, h, shells = layer(shell_dropout=0.3), normal(14, 4), three(5)[1]
    monkeypatch.setitem(module.ROWS_AT_ONCE, "cpu", 7)
    direction, step = normal(14, 4, seed=3), 1e-6

    def value(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return filter(x, shells).sum()

    with torch.random.fork_rng(devices=[]):
        leaf = h.clone().requires_grad_()
        slope = (torch.autograd.grad(value(leaf), leaf)[0] * direction).sum()
        difference = (value(h + step * direction) - value(h - step * direction)) / (2 * step)
    assert slope.item() == pytest.approx(difference.item(), rel=1e-6)


def test_lower_precision_stays_close() -> None:
    filter, h, shells = layer(), normal(14, 4), three(5)[1]
    exact = filter(h, shells)
    scale = exact.abs().max()
    single = filter.float()(h.float(), shells)
    assert (single - exact).abs().max() < 1e-5 * scale
    with torch.autocast("cpu", torch.bfloat16):
        mixed = filter(h.float(), shells)
    assert mixed.isfinite().all()
    assert (mixed - exact).abs().max() < 0.1 * scale
    half = filter.bfloat16()(h.bfloat16(), shells)
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().max() < 0.1 * scale


def test_equal_seeds_give_equal_layers() -> None:
    one, other, third = (initialise_(DistanceFilter(6, 4), seed) for seed in (0, 0, 1))
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.mlp.up.weight, third.mlp.up.weight)
    assert one.mlp.up.weight.var().item() == pytest.approx(1 / 6, rel=0.5)
    assert torch.equal(one.gate.both.bias, torch.zeros(12))


@pytest.mark.parametrize("options", [{}, {"gate": "half"}, {"gate": "none"}, {"expand": 3}])
def test_the_number_of_parameters(options: dict) -> None:
    d, v, expand = 7, 5, options.get("expand", 1)
    after = {"full": 2 * (d * d + d), "half": d * d + d, "none": 0}[options.get("gate", "full")]
    mlp = 2 * d + 2 * expand * d * d + expand * d + d
    number = sum(p.numel() for p in DistanceFilter(d, v, **options).parameters())
    assert number == mlp + 2 * d + 3 * v + 4 * d * v + after


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: DistanceFilter(0, 4), "positive sizes, got 0, 4"),
        (lambda: DistanceFilter(4, 0), "positive sizes, got 4, 0"),
        (lambda: DistanceFilter(4, 4, expand=0), "at least once the width, got 0"),
        (
            lambda: DistanceFilter(4, 4, gate="double"),
            "unknown gate 'double'; choose one of full, half, none",
        ),
        (lambda: DistanceFilter(4, 4, dropout=1.0), "below 1, got 1"),
        (lambda: DistanceFilter(4, 4, shell_dropout=-0.1), r"got -0\.1"),
        (lambda: layer()(normal(13, 4), three(5)[1]), "shells are those of 14 nodes, got features of 13"),
        (lambda: batch_shells([]), "got none"),
    ],
)
def test_bad_input_is_named(build, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build()
