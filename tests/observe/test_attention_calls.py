import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, softmax

import oracles
from gramian.errors import InputError
from gramian.observe import Probe, attention_calls, observe
from gramian.observe.attention import AttentionMoments
from gramian.observe.attention_calls import fused_attention

HEADS, WIDTH, TOKENS = 4, 8, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights as the documentation of scaled_dot_product_attention defines them."""
    bias = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype)
    if is_causal:
        bias = bias.masked_fill(~torch.ones_like(bias, dtype=torch.bool).tril(), -math.inf)
    if attn_mask is not None:
        bias = (
            bias + attn_mask
            if attn_mask.is_floating_point()
            else torch.where(attn_mask, bias, torch.tensor(-math.inf, dtype=q.dtype))
        )
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    return (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias).softmax(-1)


def lower(batch: int = 3) -> Tensor:
    return torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(batch, 1, -1, -1)


CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.9},
    "boolean": {"attn_mask": lower()},
    "boolean of two dimensions": {"attn_mask": lower()[0, 0]},
    "additive": {"attn_mask": torch.where(lower(), draw(3, HEADS, TOKENS, TOKENS, seed=5), -1e9)},
    "shared keys": {"enable_gqa": True, "is_causal": True},
}


class Fused(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, k, **self.options)


class Model(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.inner = nn.ModuleDict({"mix": Fused(**options)})

    def forward(self, qk: tuple[Tensor, Tensor]) -> Tensor:
        return self.inner["mix"](*qk)


@pytest.mark.parametrize("entries", [1, 3 * HEADS * TOKENS * 4, 1 << 23])
@pytest.mark.parametrize("name", CALLS)
def test_fused_attention_equals_the_explicit_matrix(name: str, entries: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_calls, "ENTRIES", entries)
    options = CALLS[name]
    q = 2 * draw(3, HEADS, TOKENS, WIDTH)
    k = draw(3, 2 if options.get("enable_gqa") else HEADS, TOKENS, WIDTH, seed=1)
    weights = explicit(q, k, **options)
    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, k, **options),
        weights @ k.repeat_interleave(HEADS // k.shape[1], 1),
    )
    got = observe(Model(**options), [(q, k)], streams=(), attentions="calls", sequences=3)
    assert got == {
        "inner.mix": pytest.approx(
            {
                "attention_entropy": oracles.attention_entropy(weights),
                "sink_rate": oracles.sink_rate(weights, 0.3),
            },
            rel=1e-12,
        )
    }
    first = observe(Model(**options), [(q, k)], streams=(), attentions="calls")["inner.mix"]
    assert first["attention_entropy"] == pytest.approx(oracles.attention_entropy(weights[:1]), rel=1e-12)
    assert first["attention_entropy"] != pytest.approx(got["inner.mix"]["attention_entropy"], rel=1e-4)


def test_the_entropy_is_that_of_the_fused_identity():
    """H_i = lse_i − scale q_i · SDPA(q, k, k)_i, where no matrix of weights is formed."""
    q, k = draw(2, HEADS, TOKENS, WIDTH), draw(2, HEADS, TOKENS, WIDTH, seed=1)
    for causal in (False, True):
        logits = q @ k.mT / WIDTH**0.5
        if causal:
            logits = logits.masked_fill(~lower(2), -math.inf)
        mixed = scaled_dot_product_attention(q, k, k, is_causal=causal)
        entropy = logits.logsumexp(-1) - (q * mixed).sum(-1) / WIDTH**0.5
        got = fused_attention(q, k, is_causal=causal)
        torch.testing.assert_close(got.entropy, entropy.sum((0, 2)), rtol=1e-12, atol=1e-12)
        other = fused_attention(q, k, is_causal=not causal)
        assert not torch.allclose(other.entropy, entropy.sum((0, 2)), rtol=1e-2)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("told", ["by the mask of tokens", "by the mask of keys", "both"])
def test_the_first_token_is_the_first_real_one(left: bool, told: str):
    real = torch.arange(TOKENS) < torch.tensor([[6], [4], [2]])
    real = real.flip(1) if left else real
    q, k = draw(3, HEADS, TOKENS, WIDTH), draw(3, HEADS, TOKENS, WIDTH, seed=1)
    first = real.int().argmax(1)
    k[range(3), :, first] = 4 * q.mean(2)  # all look at the first real token
    seen = lower() & real[:, None, None]
    options = {"attn_mask": None if told == "by the mask of tokens" else seen}
    kept = None if told == "by the mask of keys" else real
    got = fused_attention(q, k, **options, kept=kept)
    weights = explicit(q, k, **options)
    count, total = 0, torch.zeros(HEADS, dtype=torch.float64)
    for b in range(3):
        for i in range(TOKENS):
            # by the keys' mask alone, padding on the right also asks, and on the left sees nothing
            if real[b, i] or (kept is None and not left):
                count += 1
                total += weights[b, :, i, first[b]]
    assert got.count == count
    torch.testing.assert_close(got.first, total, rtol=1e-12, atol=0)
    column = weights[..., 0].nan_to_num().sum((0, 2))
    assert torch.allclose(column, total) == (not left and kept is None)


def test_queries_that_see_nothing_are_left_out_and_nan_is_not():
    q, k = draw(2, HEADS, TOKENS, WIDTH), draw(2, HEADS, TOKENS, WIDTH, seed=1)
    seen = lower(2).clone()
    seen[:, :, 3] = False
    got = fused_attention(q, k, attn_mask=seen)
    assert got.count == 2 * (TOKENS - 1)
    assert got.attention_entropy().isfinite()
    q[0, 0, 2, 0] = torch.nan
    assert fused_attention(q, k, attn_mask=seen).attention_entropy().isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precisions_are_read_in_float32(dtype: torch.dtype, autocast: bool):
    q, k = (draw(1, HEADS, TOKENS, WIDTH, seed=s).to(dtype) for s in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = observe(Model(), [(q, k)], streams=(), attentions="calls")["inner.mix"]
    assert got["attention_entropy"] == pytest.approx(
        oracles.attention_entropy(explicit(q.double(), k.double())), rel=1e-6
    )


def test_three_dimensions_are_one_head():
    q, k = draw(3, TOKENS, WIDTH), draw(3, TOKENS, WIDTH, seed=1)
    got = observe(Model(), [(q, k)], streams=(), attentions="calls", sequences=2)["inner.mix"]
    want = oracles.attention_entropy(explicit(q, k)[:2, None])
    assert got["attention_entropy"] == pytest.approx(want, rel=1e-12)


class SelfAttention(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.soft = kind, nn.Softmax(-1)

    def forward(self, logits: Tensor) -> Tensor:
        if self.kind == "method":
            return logits.softmax(-1)
        if self.kind == "function":
            return softmax(logits, dim=3, dtype=torch.float64)
        if self.kind == "torch":
            return torch.softmax(logits, -1)
        if self.kind == "special":
            return torch.special.softmax(logits, -1)
        if self.kind == "module":
            return self.soft(logits)
        return logits.softmax(1)


class Router(SelfAttention):
    pass


SINK = torch.tensor([3.0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("kind", ["method", "function", "torch", "special", "module"])
def test_a_softmax_in_an_attention_is_read(kind: str):
    logits = draw(3, HEADS, TOKENS, TOKENS) + SINK
    model = nn.ModuleDict({"layer": SelfAttention(kind)})
    model.forward = model["layer"].__call__  # type: ignore[method-assign]
    (site, values), *more = observe(model, [logits], streams=(), attentions="calls", sequences=2).items()
    assert site == ("layer.soft" if kind == "module" else "layer")
    assert not more
    want = logits.softmax(-1)[:2]
    assert values == pytest.approx(
        {"attention_entropy": oracles.attention_entropy(want), "sink_rate": 1.0}, rel=1e-12
    )


@pytest.mark.parametrize("module", [Router("method"), SelfAttention("other dimension")])
def test_another_softmax_is_not(module: nn.Module):
    model = nn.ModuleDict({"layer": module})
    model.forward = module.__call__  # type: ignore[method-assign]
    with pytest.raises(InputError, match="empty"):
        observe(model, [draw(3, HEADS, TOKENS, TOKENS)], streams=(), attentions="calls")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_multihead_attention_is_read_also_where_it_would_be_fast(padded: bool, causal: bool):
    layer = nn.TransformerEncoderLayer(HEADS * WIDTH, HEADS, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval().double()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * draw(*parameter.shape, seed=index) + (parameter.ndim == 1))
    real = torch.arange(TOKENS) < torch.tensor([[6], [4], [3]])
    hidden = ~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() if causal else None
    options = {"mask": hidden, "src_key_padding_mask": ~real if padded else None}
    x, entering = draw(3, TOKENS, HEADS * WIDTH), []
    handles = [m.register_forward_pre_hook(lambda m, a: entering.append(a[0])) for m in model.layers]
    with torch.no_grad(), Probe(model, (), "calls", sequences=2).sample(0) as sample:
        model(x, **options)
    assert sample is not None
    for handle in handles:
        handle.remove()
    assert list(sample.attentions) == ["layers.0.self_attn", "layers.1.self_attn"]
    for stream, layer, got in zip(entering, model.layers, sample.attentions.values(), strict=True):
        weight, bias = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
        q, k, _ = (stream @ weight.T + bias).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        seen = torch.ones(3, 1, 1, TOKENS, dtype=torch.bool)
        seen = seen & ~hidden if causal else seen
        weights = explicit(q, k, attn_mask=seen & real[:, None, None] if padded else seen)[:2].detach()
        want = AttentionMoments.of(weights, real[:2] if padded else None)
        assert got.count == (10 if padded else 12)
        torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got.first, want.first, rtol=1e-10, atol=1e-10)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*(m.entropy for m in sample.attentions.values()))


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_in_training_is_untouched(need_weights: bool):
    attention = nn.MultiheadAttention(HEADS * WIDTH, HEADS, dropout=0.5).double()
    model = nn.ModuleDict({"attention": attention})
    x = draw(TOKENS, 3, HEADS * WIDTH)

    def run() -> tuple[Tensor, ...]:
        model.zero_grad()
        torch.manual_seed(0)
        y = attention(x, x, x, need_weights=need_weights)[0]
        y.square().sum().backward()
        return y, *(p.grad.clone() for p in model.parameters() if p.grad is not None)

    with torch.random.fork_rng():
        plain = run()
        with Probe(model, (), "calls").sample(0) as sample:
            read = run()
    assert sample is not None
    assert list(sample.attentions) == ["attention"]
    assert all(torch.equal(a, b) for a, b in zip(plain, read, strict=True))


class Telling(Fused):
    """Tells other weights than those it calls for."""

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        return softmax(1e6 * torch.eye(TOKENS, dtype=q.dtype).expand(len(q), HEADS, -1, -1), -1)


class OwnAttention(Model):
    def __init__(self):
        super().__init__()
        self.inner["mix"] = Telling()


def test_a_module_that_tells_its_weights_is_asked_instead():
    q, k = draw(2, HEADS, TOKENS, WIDTH), draw(2, HEADS, TOKENS, WIDTH, seed=1)
    got = observe(OwnAttention(), [(q, k)], streams=(), attentions="calls")
    assert got == {"inner.mix": {"attention_entropy": 0.0, "sink_rate": 0.0}}


class Bare(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, q, q)


def test_calls_of_the_model_itself_bear_its_class_and_those_of_others_are_not_read():
    model, q = Bare(), draw(2, HEADS, TOKENS, WIDTH)
    with Probe(model, (), "calls").sample(0) as sample:
        Model()((q, q))
        scaled_dot_product_attention(q, q, q)
        q.softmax(-1)
    assert sample is not None
    assert sample.attentions == {}
    assert list(observe(model, [q], streams=(), attentions="calls")) == ["Bare"]


def modes() -> int:
    return torch._C._len_torch_function_stack()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_stays_behind():
    model, probe = Model(), Probe(model_ := Model(), (), "calls")
    before = modes()
    with probe.sample(0):
        assert modes() == before + 1
    with probe.sample(7):
        assert modes() == before
    with pytest.raises(KeyError), probe.sample(0):
        raise KeyError
    with pytest.raises(RuntimeError), probe.sample(0):
        model_((draw(2, 2), draw(3, 3)))
    assert modes() == before
    assert hooks(model) == hooks(model_) == 0


def test_a_mode_that_was_left_above_stays_and_ours_goes():
    mode, before = torch.overrides.BaseTorchFunctionMode(), modes()
    with Probe(Model(), (), "calls").sample(0):
        mode.__enter__()
    assert modes() == before + 1
    assert torch.overrides._get_current_function_mode() is mode
    mode.__exit__(None, None, None)
    with Probe(Model(), (), "calls").sample(0):
        torch.overrides._pop_mode()
    assert modes() == before


def test_a_failed_call_does_not_move_later_sites():
    class Twice(Model):
        def forward(self, qk: tuple[Tensor, Tensor]) -> Tensor:
            with pytest.raises(RuntimeError):
                self.inner["mix"](qk[0], draw(2, 2))
            return scaled_dot_product_attention(*qk, qk[1])

    got = observe(
        Twice(),
        [(draw(2, HEADS, TOKENS, WIDTH), draw(2, HEADS, TOKENS, WIDTH))],
        streams=(),
        attentions="calls",
    )
    assert list(got) == ["Twice"]


def test_a_mask_of_other_tokens_is_named():
    q = draw(2, HEADS, TOKENS, WIDTH)
    model = Model()
    with (
        pytest.raises(InputError, match=r"at inner\.mix has 1 x 6 queries where the mask has 1 x 5 tokens"),
        Probe(model, (), "calls").sample(0, torch.ones(2, 5)),
    ):
        model((q, q))
    with pytest.raises(InputError, match=r"mask of shape \(2, 5\) does not fit 2 x 6 queries"):
        fused_attention(q, q, kept=torch.ones(2, 5))
    with pytest.raises(InputError, match="attentions of 4 and 2 heads"):
        observe(Model(), [(q, q), (q[:, :2], q[:, :2])], streams=(), attentions="calls")
