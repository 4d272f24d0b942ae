import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gramian.errors import InputError
from gramian.nn.attention import Attention, Gate, ShapedMixing, SoftCapMixing, SoftmaxMixing, uniform_mean
from gramian.nn.init import initialise_
from gramian.nn.view import View


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def explicit_shaped(mixing: ShapedMixing, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slow oracle: the T×T matrix αI + βA − γC, written out row by row."""
    tokens = q.shape[-2]
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    matrix = torch.zeros_like(logits)
    for i in range(tokens):
        seen = i + 1 if mixing.causal else tokens
        exp = (logits[..., i, :seen] - logits[..., i, :seen].amax(-1, keepdim=True)).exp()
        matrix[..., i, :seen] += mixing.beta[:, None] * exp / exp.sum(-1, keepdim=True)
        if mixing.gamma is not None:
            matrix[..., i, :seen] -= mixing.gamma[:, None] / seen
        matrix[..., i, i] += mixing.alpha
    return matrix @ v


def random_shaped(causal: bool, centre: bool, dtype: torch.dtype) -> ShapedMixing:
    mixing = ShapedMixing(3, causal, centre=centre).to(dtype)
    for index, parameter in enumerate(mixing.parameters()):
        parameter.data = normal(3, seed=40 + index, dtype=dtype)
    return mixing


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_shaped_mixing_equals_the_explicit_matrix(causal, centre, dtype, tolerance) -> None:
    mixing = random_shaped(causal, centre, dtype)
    q, k, v = (normal(2, 3, 37, 8, seed=s, dtype=dtype).requires_grad_() for s in range(3))
    fused, explicit = mixing(q, k, v), explicit_shaped(mixing, q, k, v)
    scale = explicit.abs().max().item()
    torch.testing.assert_close(fused, explicit, rtol=0, atol=tolerance * scale)
    cotangent = normal(2, 3, 37, 8, seed=9, dtype=dtype)
    inputs = [q, k, v, *mixing.parameters()]
    ours = torch.autograd.grad((fused * cotangent).sum(), inputs)
    theirs = torch.autograd.grad((explicit * cotangent).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * tolerance * other.abs().max().item())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_shaped_mixing_gradients_by_finite_differences(causal, padded) -> None:
    mixing = random_shaped(causal, True, torch.float64)
    real = torch.tensor([[True] * 3 + [False] * 2]) if padded else None
    inputs = [normal(1, 3, 5, 4, seed=s).requires_grad_() for s in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v: mixing(q, k, v, real), inputs)


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
def test_shaped_mixing_allocates_no_square_of_tokens(causal) -> None:
    tokens, mixing = 512, ShapedMixing(1, causal)
    q, k, v = (normal(1, 1, tokens, 8, seed=s, dtype=torch.float32).requires_grad_() for s in range(3))
    with ShapeLog() as fused:
        mixing(q, k, v).sum().backward()
    assert fused.largest < tokens**2
    with ShapeLog() as explicit:  # control: the log does see a T×T matrix
        SoftCapMixing(30.0, causal)(q, k, v).sum().backward()
    assert explicit.largest >= tokens**2


def view(kind: str, tokens: int, causal: bool) -> View:
    if kind == "documents":  # of very different lengths, which one padded batch would blow up
        lengths = [tokens // 2, 3, 40, 1, *[16] * 8]
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        return View.packed(nn.functional.pad(numbers, (0, tokens - len(numbers)), value=-1)[None])
    real = torch.ones(1, tokens, dtype=torch.bool)
    if kind == "left padding":
        real[:, : tokens // 4] = False
    else:
        real[:, -tokens // 4 :] = False
    return View.padded(real, tokens, causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["left padding", "right padding", "documents"])
def test_attention_with_a_view_allocates_no_square_of_tokens(kind, causal) -> None:
    tokens = 512
    attention = Attention(8, 1, ShapedMixing(1, causal))
    x = normal(1, tokens, 8, dtype=torch.float32).requires_grad_()
    with ShapeLog() as log:
        attention(x, view(kind, tokens, causal)).sum().backward()
    assert log.largest < tokens**2


def test_documents_of_any_lengths_cost_at_most_twice_their_tokens() -> None:
    lengths = torch.randint(1, 100, (40,), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(40).repeat_interleave(lengths)[None]
    laid_out = sum(rows.index.numel() for rows in View.packed(documents).rows)
    assert documents.numel() <= laid_out < 2 * documents.numel()


@pytest.mark.parametrize("causal", [True, False])
def test_shaped_attention_is_the_identity_at_zero_queries(causal) -> None:
    mixing = ShapedMixing(3, causal).double()
    q, k, v = torch.zeros(2, 3, 20, 8, dtype=torch.float64), normal(2, 3, 20, 8), normal(2, 3, 20, 8, seed=1)
    torch.testing.assert_close(mixing(q, k, v), v, rtol=0, atol=1e-12)
    mixing.gamma.data.zero_()  # control: without centring it is not
    assert (mixing(q, k, v) - v).abs().max() > 0.1


def test_uniform_mean_keeps_its_sums_in_float32() -> None:
    v = (normal(1, 1, 4096, 16, dtype=torch.float32) + 1).to(torch.bfloat16)
    sums, counts = uniform_mean(v.double(), 4096, causal=True)
    exact = sums / counts
    sums, counts = uniform_mean(v, 4096, causal=True)
    assert sums.dtype == torch.float32
    torch.testing.assert_close((sums / counts).double(), exact, rtol=0, atol=1e-5)
    running = torch.zeros(16, dtype=torch.bfloat16)  # control: sums in bfloat16 lose the mean
    for row in v[0, 0]:
        running = running + row
    assert (running.double() / 4096 - exact[0, -1, 0]).abs().max() > 0.01


def test_softmax_mixing_is_causal_and_weights_are_what_it_mixes_with() -> None:
    q, k, v = (normal(2, 3, 11, 4, seed=s) for s in range(3))
    for mixing in (SoftmaxMixing(), SoftCapMixing(2.0), SoftmaxMixing(causal=False)):
        weights = mixing.weights(q, k)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        torch.testing.assert_close(mixing(q, k, v), weights @ v, rtol=1e-12, atol=1e-12)
        assert (weights.triu(1) == 0).all() == mixing.causal


def test_a_soft_cap_bounds_the_logits() -> None:
    q, k = normal(1, 1, 6, 4) * 50, normal(1, 1, 6, 4, seed=1) * 50
    assert SoftCapMixing(3.0, causal=False).logits(q, k).abs().max() <= 3.0
    assert SoftmaxMixing(causal=False).logits(q, k).abs().max() > 3.0
    torch.testing.assert_close(SoftCapMixing(1e8).weights(q, k), SoftmaxMixing().weights(q, k))


def test_attention_is_permutation_equivariant_only_without_a_mask() -> None:
    x, order = normal(1, 9, 12), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for causal in (True, False):
        attention = Attention(12, 3, ShapedMixing(3, causal)).double()
        equivariant = torch.allclose(attention(x[:, order]), attention(x)[:, order], atol=1e-10)
        assert equivariant is not causal


def test_values_in_float32_meet_queries_in_bfloat16() -> None:
    """Under autocast the normed input of a value-free block stays in float32."""
    q, k, v = (normal(1, 2, 6, 4, seed=s, dtype=torch.float32) for s in range(3))
    for mixing in (SoftmaxMixing(), ShapedMixing(2)):
        low = mixing(q.bfloat16(), k.bfloat16(), v)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), mixing(q, k, v), rtol=0.05, atol=0.05)


def gated(features: int, mixing: nn.Module, **more: nn.Module) -> Attention:
    attention = Attention(12, 3, mixing, gate=Gate(12, features), **more).double()
    generator = torch.Generator().manual_seed(4)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return attention


@pytest.mark.parametrize("features", [3, 12], ids=["heads", "elements"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shaped", [True, False])
def test_a_gate_multiplies_what_each_head_mixed(features, causal, shaped) -> None:
    maps = {"value": nn.Identity(), "projection": nn.Identity()} if shaped else {}
    attention = gated(features, ShapedMixing(3, causal) if shaped else SoftmaxMixing(causal), **maps)
    x = normal(2, 9, 12).requires_grad_()
    heads = [
        part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in attention.query_key(x).split([12, 12], -1)
    ]
    value = attention.value(x).unflatten(-1, (3, 4)).transpose(1, 2)
    mixed = attention.mixing(*heads, value)
    gated_heads = []
    for head in range(3):
        logits = x @ attention.gate.weight.T + attention.gate.bias
        chosen = logits[..., head : head + 1] if features == 3 else logits[..., 4 * head : 4 * head + 4]
        gated_heads.append(mixed[:, head] / (1 + (-chosen).exp()))
    expected = attention.projection(torch.cat(gated_heads, -1))
    got = attention(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    cotangent, inputs = normal(2, 9, 12, seed=3), [x, *attention.parameters()]
    ours = torch.autograd.grad((got * cotangent).sum(), inputs)
    theirs = torch.autograd.grad((expected * cotangent).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    gate, attention.gate = attention.gate, None  # control: without the gate it is something else
    assert (attention(x) - got).abs().max() > 0.01
    gate.weight.data.zero_()
    gate.bias.data.fill_(40.0)  # fully open: no gate
    open_gate = attention(x)
    attention.gate = gate
    torch.testing.assert_close(attention(x), open_gate, rtol=0, atol=1e-12)
    gate.bias.data.fill_(-800.0)  # fully shut
    assert (attention(x) == 0).all()


@pytest.mark.parametrize("opening", [0.25, 0.5, 0.9])
def test_a_gate_starts_at_its_opening(opening) -> None:
    gate = initialise_(Gate(12, 3, opening).double(), 0, std=1e-3)
    torch.testing.assert_close(gate.bias.sigmoid(), torch.full((3,), opening, dtype=torch.float64))
    assert gate(normal(50, 12)).sigmoid().mean().item() == pytest.approx(opening, abs=0.01)
    assert gate.weight.std() > 1e-4


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="width 10 and heads 3"):
        Attention(10, 3, SoftmaxMixing())
    with pytest.raises(InputError, match="at least one head"):
        ShapedMixing(0)
    with pytest.raises(InputError, match="cap"):
        SoftCapMixing(0.0)
    assert isinstance(Attention(12, 3, SoftmaxMixing(), value=nn.Identity()).value, nn.Identity)
    for opening in (0.0, 1.0, float("nan")):
        with pytest.raises(InputError, match="opened by more than 0 and less than 1"):
            Gate(12, 3, opening)
    with pytest.raises(InputError, match="positive width and number of gates, got 12, 0"):
        Gate(12, 0)
    with pytest.raises(InputError, match="each of 3 heads or of 12 features, got 4"):
        gated(4, SoftmaxMixing())(normal(1, 2, 12))
