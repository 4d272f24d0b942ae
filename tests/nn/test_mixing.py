"""Mixings with a sink and with clipping, against their equations; the others are in test_attention.py."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gramian.errors import InputError
from gramian.nn.mixing import ClippedSoftmaxMixing, SinkMixing, SoftCapMixing, SoftmaxMixing

PADDED = torch.tensor([[True] * 6 + [False] * 3, [True] * 9])
LEFT = torch.tensor([[False] * 3 + [True] * 6, [True] * 9])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sinks(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def visible(mixing: SoftmaxMixing, i: int, queries: int, keys: int, real: Tensor | None) -> list[int]:
    """The keys that query i of one sequence sees; a causal one always sees itself."""
    own = keys - queries + i
    kept = [j for j in range(keys) if real is None or real[j]]
    if mixing.causal:
        return [j for j in range(own + 1) if j in kept or j == own]
    return kept or list(range(keys))


def oracle(mixing: SoftmaxMixing, q: Tensor, k: Tensor, real: Tensor | None = None) -> Tensor:
    """Slow oracle: A entry by entry, from the equations."""
    batch, heads, queries, width = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                seen = visible(mixing, i, queries, keys, None if real is None else real[b])
                exps = torch.exp(k[b, h // group, seen] @ q[b, h, i] / math.sqrt(width))
                total = exps.sum()
                if isinstance(mixing, SinkMixing):
                    sink = mixing.sink
                    total = total + (math.exp(sink) if isinstance(sink, float) else sink[h].exp())
                row = exps / total
                if isinstance(mixing, ClippedSoftmaxMixing):
                    stretched = (1 - mixing.offset) * row + mixing.offset
                    row = torch.where(stretched > 0, stretched, 0)
                rows.append(q.new_zeros(keys).index_put((torch.tensor(seen),), row))
    return torch.stack(rows).view(batch, heads, queries, keys)


def mixings(causal: bool) -> list[SoftmaxMixing]:
    learned = sinks(0.3, -1.2, 2.0, 0.0)
    return [
        SinkMixing(0.0, causal),
        SinkMixing(-0.7, causal),
        SinkMixing(learned, causal),
        ClippedSoftmaxMixing(40, 3.0, causal),
    ]


every_mixing = pytest.mark.parametrize("which", range(4), ids=["softmax1", "number", "learned", "clipped"])


@every_mixing
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("key_heads", "value_heads", "width"), [(4, 4, 6), (2, 2, 6), (2, 4, 8)])
@pytest.mark.parametrize("queries", [9, 4, 1])
@pytest.mark.parametrize("real", [None, PADDED, LEFT], ids=["full", "padded", "left"])
def test_equals_its_equation(which, causal, key_heads, value_heads, width, queries, real) -> None:
    if causal and queries == 9 and real is LEFT:
        real = PADDED  # as many queries as keys under a causal mask: real tokens come first
    mixing = mixings(causal)[which]
    q = normal(2, 4, queries, width).requires_grad_()
    k = normal(2, key_heads, 9, width, seed=1).requires_grad_()
    v = normal(2, value_heads, 9, width, seed=2).requires_grad_()
    matrix = oracle(mixing, q, k, real if not (causal and queries == 9) else None)
    expected = matrix @ v.repeat_interleave(4 // value_heads, 1)
    got = mixing(q, k, v, real)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(mixing.weights(q, k, real), matrix, rtol=0, atol=1e-10)
    cotangent, inputs = normal(*got.shape, seed=3), [q, k, v, *mixing.parameters()]
    ours = torch.autograd.grad((got * cotangent).sum(), inputs)
    theirs = torch.autograd.grad((expected * cotangent).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    plain = SoftmaxMixing(causal)(q, k, v, real)  # control: softmax is something else
    assert (plain - got).abs().max() > 1e-2


@every_mixing
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_by_finite_differences(which, causal) -> None:
    mixing = mixings(causal)[which]
    inputs = [normal(1, 4, 5, 4, seed=s).requires_grad_() for s in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v, *_: mixing(q, k, v), (*inputs, *mixing.parameters()))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sink", [0.0, -2.0, sinks(1.0, -1.0, 0.5)], ids=["softmax1", "number", "learned"])
def test_a_sink_scales_softmax_by_the_sigmoid_of_lse_minus_sink(sink, causal) -> None:
    q, k, v = (normal(2, 3, 11, 8, seed=s) for s in range(3))
    softmax, mixing = SoftmaxMixing(causal), SinkMixing(sink, causal)
    lse = softmax.logits(q, k).logsumexp(-1)
    share = torch.sigmoid(lse - (sink if isinstance(sink, float) else sink[:, None]))
    torch.testing.assert_close(mixing(q, k, v), share[..., None] * softmax(q, k, v), rtol=0, atol=1e-12)
    sums = mixing.weights(q, k).sum(-1)
    torch.testing.assert_close(sums, share, rtol=0, atol=1e-12)
    assert (sums < 1).all()
    wrong = torch.sigmoid(lse - 3.0)[..., None] * softmax(q, k, v)  # control: the sink's logit matters
    assert (wrong - mixing(q, k, v)).abs().max() > 1e-2


@pytest.mark.parametrize("causal", [True, False])
def test_limits_of_the_sink(causal) -> None:
    q, k, v = (normal(1, 2, 7, 8, seed=s) for s in range(3))
    softmax = SoftmaxMixing(causal)(q, k, v)
    gone = SinkMixing(sinks(-1e4, -1e4), causal)(q, k, v)
    torch.testing.assert_close(gone, softmax, rtol=0, atol=1e-12)
    everything = SinkMixing(sinks(1e4, -1e4), causal)(q, k, v)
    assert (everything[:, 0] == 0).all()
    torch.testing.assert_close(everything[:, 1], softmax[:, 1], rtol=0, atol=1e-12)
    q, k = q.abs() + 10, k.abs() + 10  # logits far above zero
    torch.testing.assert_close(SinkMixing(0.0, causal)(q, k, v), SoftmaxMixing(causal)(q, k, v))
    assert (SinkMixing(0.0, causal)(-q, k, v).abs() < 1e-12).all()  # far below: attends to nothing


@pytest.mark.parametrize("causal", [True, False])
def test_clipped_softmax_gives_exact_zeros_where_softmax_is_small(causal) -> None:
    q, k = normal(2, 3, 20, 8), normal(2, 3, 20, 8, seed=1)
    softmax, clipped = (
        SoftmaxMixing(causal).weights(q, k),
        ClippedSoftmaxMixing(20, 3.0, causal).weights(q, k),
    )
    threshold = 3.0 / (20 + 3.0)  # where (1 − g) a + g = 0 with g = −3/20
    assert torch.equal(clipped == 0, softmax <= threshold)
    assert 0.02 < (clipped[softmax > 0] > 0).double().mean() < 0.9  # neither all nor none
    assert (clipped.sum(-1) <= 1 + 1e-12).all()
    torch.testing.assert_close(ClippedSoftmaxMixing(20, 0.0, causal).weights(q, k), softmax)
    sure = ClippedSoftmaxMixing(20, 3.0, causal).weights(1e3 * k, k)
    assert sure.amax().item() == pytest.approx(1)
    uniform = ClippedSoftmaxMixing(20, 3.0, causal).weights(0 * q, k)
    alive = [i for i in range(20) if (uniform[0, 0, i] > 0).any()]
    assert alive == ([i for i in range(20) if i + 1 < 20 / 3 + 1] if causal else [])


class ShapeLog(TorchDispatchMode):
    """Notes the number of elements of every tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
        return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("sink", [0.0, -2.0, sinks(1.0)], ids=["softmax1", "number", "learned"])
def test_a_sink_allocates_no_square_of_tokens(sink, padded, causal) -> None:
    tokens = 512
    q, k, v = (normal(1, 1, tokens, 8, seed=s, dtype=torch.float32).requires_grad_() for s in range(3))
    real = (torch.arange(tokens) < 400)[None] if padded else None
    with ShapeLog() as log:
        SinkMixing(sink, causal)(q, k, v, real).sum().backward()
    assert log.largest < tokens**2
    with ShapeLog() as explicit:  # control: the log does see a T×T matrix
        ClippedSoftmaxMixing(512, 1.0, causal)(q, k, v, real).sum().backward()
    assert explicit.largest >= tokens**2


def test_float32_and_bfloat16_are_close_to_float64() -> None:
    q, k, v = (normal(2, 4, 33, 16, seed=s) for s in range(3))
    for mixing in mixings(causal=True)[:3]:
        exact = mixing(q, k, v)
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.03)):
            low = mixing(q.to(dtype), k.to(dtype), v.to(dtype))
            assert low.dtype == dtype
            torch.testing.assert_close(low.double(), exact, rtol=0, atol=tolerance * exact.abs().max().item())
        assert mixing(q.bfloat16(), k.bfloat16(), v.float()).dtype == torch.bfloat16  # as under autocast


def test_bad_input_is_named() -> None:
    for sink in (math.inf, -math.inf, math.nan):
        with pytest.raises(InputError, match="logit of an attention sink must be finite"):
            SinkMixing(sink)
    with pytest.raises(InputError, match=r"a number a head, got \(2, 3\)"):
        SinkMixing(nn.Parameter(torch.zeros(2, 3)))
    with pytest.raises(InputError, match="at least 1, got 0"):
        ClippedSoftmaxMixing(0)
    for alpha in (-1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="zero or above"):
            ClippedSoftmaxMixing(8, alpha)
    with pytest.raises(InputError, match="cap"):
        SoftCapMixing(-1.0)
