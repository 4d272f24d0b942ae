"""The shaped block and its parts: the formulas, and what one of its steps does to the covariance of tokens.

The one-step values are n · E[ΔV] of three tokens at γ = 0.8, τ₀ = 1, c₊ = 0, c₋ = −1, for width → ∞.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gramian.errors import InputError
from gramian.nn.attention import Attention
from gramian.nn.blocks import BLOCKS, gains
from gramian.nn.init import initialise_
from gramian.nn.mixing import SoftmaxMixing
from gramian.nn.parts import Parts
from gramian.nn.residual import Residual
from gramian.nn.shaped import CentredMixing, FanInLinear, ShapedReLU, shaped
from gramian.nn.tailored import TailoredLeakyReLU
from gramian.nn.transformer import TransformerConfig, build
from gramian.tasks.predict import PredictConfig, predict
from gramian.theory.covariance_sde import ShapedAttention, ShapedMLP, covariance

PARTS = Parts(width=64, heads=4, depth=12, layer=1, mlp_width=128, branch_gain=0.4)
START = torch.tensor([[1.0, 0.3, 0.1], [0.3, 1.2, 0.4], [0.1, 0.4, 0.8]], dtype=torch.float64)
UPPER = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
DRIFT = {
    False: (0.0942, 0.0281, 0.0092, 0.0834, 0.0221, 0.0556),
    True: (0.0, 0.0, 0.0061, 0.1229, 0.0241, 0.0556),
}
RELU_DRIFT = {256: (0.0722, 0.0806, 0.0471), 4096: (0.0689, 0.0769, 0.0449), 65536: (0.0681, 0.0760, 0.0444)}
both = pytest.mark.parametrize("causal", [True, False])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class UncentredMixing(CentredMixing):
    """A control: I + A without the mean taken off."""

    def forward(self, q, k, v, real=None, total=None):
        return v + self.weights(q, k, real) @ v


class HotMixing(CentredMixing):
    """A control: logits without the 1/√n that the width asks for."""

    def scale(self, q):
        return super().scale(q) * math.sqrt(q.shape[1] * q.shape[-1])


def attention_drift(mixing: SoftmaxMixing, heads: int, head_width: int) -> tuple[Tensor, Tensor]:
    """n γ² E[A V Aᵀ − V] over drawn queries and keys, and its standard error; the values' part is exact."""
    factor, batch = torch.linalg.cholesky(START), 4096
    q, k = (factor @ normal(batch, heads, 3, head_width, seed=seed) for seed in (1, 2))
    v = factor.expand(batch, heads, 3, 3)
    both = [mixing(sign * q, k, v) for sign in (1, -1)]  # antithetic: terms linear in the logits cancel
    after = torch.stack([mixed @ mixed.mT for mixed in both]).mean(0).flatten(0, 1)
    moved = heads * head_width * 0.64 * (after - START)
    return moved.mean(0), moved.std(0) / len(moved) ** 0.5


@both
@pytest.mark.parametrize(("heads", "head_width"), [(4, 64), (1, 256)])
def test_attention_moves_the_covariance_as_the_limit_says(causal, heads, head_width) -> None:
    drift, error = attention_drift(CentredMixing(causal=causal), heads, head_width)
    for (a, b), expected in zip(UPPER, DRIFT[causal], strict=True):
        assert abs(drift[a, b] - expected) < 4 * error[a, b] + 5e-4, (a, b)
    for control in (UncentredMixing, HotMixing):
        away, _ = attention_drift(control(causal=causal), heads, head_width)
        assert (away - drift).abs().max() > 1


@pytest.mark.parametrize("heads", [1, 4])
def test_heads_share_the_noise_of_attention(heads) -> None:
    """Σ = γ²(2 − γ²) Σ_linear + γ⁴/(τ₀² H) 𝒜 for H heads: what each adds is independent of the others."""
    gamma, tau0, width = 0.8, 0.4, 64
    factor, mixing = torch.linalg.cholesky(START), CentredMixing(tau0, causal=False)
    x, moved = math.sqrt(width) * nn.functional.pad(factor, (0, width - 3)), []
    for seed in range(0, 24, 3):
        q, k = (factor @ normal(3000, heads, 3, width // heads, seed=seed + each) for each in (0, 1))
        values = x @ normal(3000, width, width, seed=seed + 2) / width**0.5
        values = values.unflatten(-1, (heads, width // heads)).transpose(1, 2)
        new = math.sqrt(1 - gamma**2) * x + gamma * mixing(q, k, values).transpose(1, 2).flatten(2)
        moved.append(new @ new.mT / width)
    rows, columns = torch.triu_indices(3, 3)
    found = width * torch.cov(torch.cat(moved)[:, rows, columns].mT)
    linear = covariance(ShapedAttention(gamma, 1e9), START)
    mixed = covariance(ShapedAttention(gamma, tau0), START) - linear
    share = ((found - linear) * mixed).sum() / mixed.square().sum()
    assert share.item() == pytest.approx(1 / heads, abs=0.15)


@pytest.mark.parametrize("wider", [1, 4])
def test_a_wider_mlp_has_less_noise(wider) -> None:
    """Σ = (2λ²γ² + γ⁴(1 + n/hidden)) Σ_linear, which is 2γ² Σ_linear at hidden = n alone."""
    gamma, width, moved = 0.8, 32, []
    factor, activation = torch.linalg.cholesky(START), ShapedReLU(10**8)
    x = math.sqrt(width) * nn.functional.pad(factor, (0, width - 3))
    for seed in range(0, 12, 2):
        hidden = activation(factor @ normal(3000, 3, wider * width, seed=seed))
        branch = hidden @ normal(3000, wider * width, width, seed=seed + 1) / (wider * width) ** 0.5
        new = math.sqrt(1 - gamma**2) * x + gamma * branch
        moved.append(new @ new.mT / width)
    rows, columns = torch.triu_indices(3, 3)
    found = width * torch.cov(torch.cat(moved)[:, rows, columns].mT)
    linear = covariance(ShapedMLP(1.0, 0.0, 0.0), START) / 2
    share = (found * linear).sum() / linear.square().sum()
    expected = 2 * (1 - gamma**2) * gamma**2 + gamma**4 * (1 + 1 / wider)
    assert share.item() == pytest.approx(expected, rel=0.06)


@both
def test_a_higher_temperature_slows_the_drift_by_its_square(causal) -> None:
    drift, _ = attention_drift(CentredMixing(causal=causal), 4, 64)
    slower, _ = attention_drift(CentredMixing(2.0, causal), 4, 64)
    torch.testing.assert_close(slower, drift / 4, rtol=0, atol=5e-4)
    assert (slower - drift / 2).abs().max() > 0.01  # control


def mean_product(activation: nn.Module, a: int, b: int) -> float:
    """E φ(u)φ(v) of a homogeneous φ under the covariance, by one integral over the angle of the plane."""
    scale = math.sqrt(START[a, a] * START[b, b])
    angle = torch.arange(2**20, dtype=torch.float64) * (2 * math.pi / 2**20)
    shift = math.acos(START[a, b] / scale)
    return 2 * scale * (activation(angle.cos()) * activation((angle - shift).cos())).mean().item()


@pytest.mark.parametrize("width", RELU_DRIFT)
def test_the_shaped_relu_moves_the_covariance_as_published(width) -> None:
    module = ShapedReLU(width)
    for (a, b), expected in zip(((0, 1), (0, 2), (1, 2)), RELU_DRIFT[width], strict=True):
        drift = width * 0.64 * (mean_product(module, a, b) - START[a, b].item())
        assert drift == pytest.approx(expected, abs=1.01e-4)
        assert mean_product(module, a, a) == pytest.approx(START[a, a].item(), rel=1e-9)
        plain = width * 0.64 * (mean_product(ShapedReLU(width, 1.0, 1.0), a, b) - START[a, b].item())
        assert abs(plain) < 1e-3  # control: equal slopes leave all as it was


@pytest.mark.parametrize(("positive", "negative"), [(0.0, -1.0), (1.5, -3.0), (-1.0, 2.0)])
def test_the_shaped_relu_is_its_formula(positive, negative) -> None:
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    above, below = 1 + positive / 4, 1 + negative / 4
    scale = math.sqrt(2 / (above**2 + below**2))
    expected = [scale * (above * max(point, 0) + below * min(point, 0)) for point in x.tolist()]
    module = ShapedReLU(16, positive, negative)
    torch.testing.assert_close(module(x).tolist(), expected, rtol=1e-13, atol=0)
    wide = ShapedReLU(10**8, positive, negative)
    torch.testing.assert_close(wide(x), x, rtol=1e-3, atol=0)
    assert (module(x) - x).abs().max() > 0.05  # control: at width 16 it bends


@both
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("groups", [1, 3])
def test_mixing_equals_the_explicit_matrix(causal, dtype, tolerance, groups) -> None:
    mixing = CentredMixing(0.3, causal)
    q, *kv = normal(2, 6, 37, 8, dtype=dtype), *(normal(2, 6 // groups, 37, 8, seed=s) for s in (1, 2))
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, *kv))
    logits = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(groups, 1)) / (0.3 * math.sqrt(48 * 8))
    seen = torch.ones(37, 37, dtype=torch.bool).tril() if causal else torch.ones(37, 37, dtype=torch.bool)
    softmax = logits.masked_fill(~seen, -math.inf).softmax(-1)
    uniform = seen.to(dtype) / seen.sum(-1, keepdim=True)
    explicit = (torch.eye(37, dtype=dtype) + softmax - uniform) @ v.repeat_interleave(groups, 1)
    got, cotangent = mixing(q, k, v), normal(2, 6, 37, 8, seed=9, dtype=dtype)
    torch.testing.assert_close(got, explicit, rtol=0, atol=tolerance * explicit.abs().max().item())
    torch.testing.assert_close(mixing.weights(q, k), softmax, rtol=0, atol=10 * tolerance)
    ours = torch.autograd.grad((got * cotangent).sum(), (q, k, v))
    theirs = torch.autograd.grad((explicit * cotangent).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=20 * tolerance * other.abs().max().item())


@both
def test_zero_queries_give_the_identity_and_others_do_not(causal) -> None:
    mixing, k, v = CentredMixing(causal=causal), normal(2, 4, 9, 8), normal(2, 4, 9, 8, seed=1)
    torch.testing.assert_close(mixing(torch.zeros_like(k), k, v), v, rtol=0, atol=1e-14)
    assert (mixing(normal(2, 4, 9, 8, seed=2), k, v) - v).abs().max() > 0.01


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *(leaf.numel() for leaf in leaves)])
        return out


@both
def test_no_square_of_tokens_is_formed(causal) -> None:
    q, k, v = (normal(1, 1, 512, 8, seed=seed, dtype=torch.float32) for seed in range(3))
    mixing = CentredMixing(causal=causal)
    with LargestTensor() as fused:
        mixing(q, k, v)
    with LargestTensor() as explicit:  # control
        mixing.weights(q, k)
    assert fused.largest < 512 * 32 < 512 * 512 <= explicit.largest


@both
@pytest.mark.parametrize("key_heads", [None, 2])
def test_weights_start_at_their_fan_in_whatever_the_standard(causal, key_heads) -> None:
    parts = replace(PARTS, causal=causal, key_heads=key_heads)
    for std in (0.0, 0.3):
        built = initialise_(shaped(parts), 0, std)
        linears = [module for module in built.modules() if isinstance(module, nn.Linear)]
        assert len(linears) == 4
        for linear in linears:
            assert isinstance(linear, FanInLinear)
            assert linear.bias is None
            assert linear.weight.std().item() * linear.in_features**0.5 == pytest.approx(1, rel=0.05)
    plain = initialise_(BLOCKS["pre_norm"](parts), 0, 0.3)  # control
    assert plain[1].branch[1].up.weight.std().item() * 8 > 2


def test_the_block_is_made_of_what_its_docstring_says() -> None:
    first, later = shaped(replace(PARTS, layer=0)), shaped(PARTS)
    norms = [sum("norm" in type(m).__name__.lower() for m in built.modules()) for built in (first, later)]
    assert norms == [1, 0]
    for residual in list(later)[1:]:
        assert isinstance(residual, Residual)
        assert residual.gain == 0.4
        assert residual.skip**2 + residual.gain**2 == pytest.approx(1)
    (relu,) = (module for module in later.modules() if isinstance(module, TailoredLeakyReLU))
    assert isinstance(relu, ShapedReLU)
    assert relu.negative_slope == pytest.approx(1 - 64**-0.5)  # the stream's width, not the MLP's
    assert gains(later) == {}
    assert BLOCKS["shaped"] is shaped


@both
def test_a_large_embedding_starts_as_a_small_one(causal) -> None:
    block = initialise_(shaped(replace(PARTS, layer=0, causal=causal)).double(), 0)
    x = normal(2, 9, 64)
    torch.testing.assert_close(block(100 * x), block(x), rtol=1e-4, atol=1e-4)
    later = initialise_(shaped(replace(PARTS, causal=causal)).double(), 0)  # control
    assert (later(100 * x) - later(x)).abs().max() > 10


@both
def test_the_limits_of_the_branch_gain(causal) -> None:
    x = normal(2, 9, 64)
    still = initialise_(shaped(replace(PARTS, causal=causal, branch_gain=0.0)).double(), 0)
    torch.testing.assert_close(still(x), x, rtol=0, atol=0)
    bare = initialise_(shaped(replace(PARTS, causal=causal, branch_gain=1.0)).double(), 0)
    assert bare[1].skip == 0.0
    torch.testing.assert_close(bare(x), bare[2].branch(bare[1].branch(x)), rtol=0, atol=0)


def test_a_gated_mlp_starts_as_an_ungated_one() -> None:
    """Control inside: with a gate away from zero it does not."""
    branch = initialise_(shaped(replace(PARTS, gated=True, mlp_width=256)).double(), 0)[2].branch
    modulated, down = branch
    x = normal(2, 9, 64)
    torch.testing.assert_close(branch(x), down(modulated.branch(x)), rtol=0, atol=0)
    modulated.gate.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    assert (branch(x) - down(modulated.branch(x))).abs().max() > 0.1


def test_settings_reach_the_blocks_of_a_model() -> None:
    config = TransformerConfig(
        vocabulary=29, width=64, depth=2, block="shaped", branch_gain=0.3, attention_temperature=2.5
    )
    model = build(config, 0)
    mixings = [module.mixing for module in model.modules() if isinstance(module, Attention)]
    assert [mixing.temperature for mixing in mixings] == [2.5, 2.5]
    residuals = [module for module in model.modules() if isinstance(module, Residual)]
    assert {residual.gain for residual in residuals} == {0.3}


def test_bad_input_is_named() -> None:
    config = TransformerConfig(vocabulary=29, block="shaped")
    for change, words in (
        ({"branch_gain": -0.1}, r"branch_gain must lie in \[0, 1\], got -0.1"),
        ({"branch_gain": 1.5}, r"branch_gain must lie in \[0, 1\], got 1.5"),
        ({"branch_gain": math.nan}, "branch_gain must lie in"),
        ({"attention_temperature": 0.0}, "attention_temperature must be positive and finite, got 0"),
        ({"attention_temperature": math.inf}, "attention_temperature must be positive and finite, got inf"),
    ):
        with pytest.raises(InputError, match=words):
            replace(config, **change)
    with pytest.raises(InputError, match="activation relu"):
        build(replace(config, activation="gelu"), 0)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="temperature of attention must be positive"):
            CentredMixing(wrong)
    with pytest.raises(InputError, match="width of the stream, at least 1, got 0"):
        ShapedReLU(0)
    with pytest.raises(InputError, match="must be finite, got 0, nan"):
        ShapedReLU(16, 0.0, math.nan)
    with pytest.raises(InputError, match="must be positive, got c₊ = -4, n = 16"):
        ShapedReLU(16, -4.0)


def test_predict_follows_a_deep_shaped_network() -> None:
    """In the limit attention is the identity and the MLP a leaky ReLU of the finite slopes."""
    prediction = predict(PredictConfig(name="shaped", depth=12, width=64, tokens=6, networks=4))
    assert prediction.verdict.kind == "fine"
    moments = prediction.theory.second_moment
    assert moments[1:] == pytest.approx([1.0] * (len(moments) - 1), rel=0.01)
    (profile,) = prediction.measured[:1]
    assert profile.second_moment[-1] == pytest.approx(1, rel=0.3)
