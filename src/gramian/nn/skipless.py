"""Blocks without norms whose signals a prescribed attention and a tailored MLP carry, with skips or without.

They read tokens of uncorrelated features and equal lengths, Σ_0 = I, which the first block's input
normalisation makes of token embeddings. Rotary positions leave that as it is. Learned positions, which start
as large as the embeddings, do so but for repeated tokens, which correlate by ½. Sinusoidal ones add their own
correlation, Σ_0 = ½ I + ½ (2/d) Σ_i cos((s − t) ω_i), so that correlations end above their targets.
"""

from torch import Tensor, nn

from gramian.core.maximal import Maximal, plain, residual
from gramian.nn.attention import Attention
from gramian.nn.init import ScaledOrthogonal, ZeroLinear
from gramian.nn.mixing import ShapedMixing, SoftmaxMixing
from gramian.nn.norms import NORMS
from gramian.nn.parts import Parts, attention_of
from gramian.nn.prescribed import (
    CausalExponential,
    CausalUniform,
    Exponential,
    PrescribedMixing,
    Uniform,
    decay_rates,
    uniform_correlations,
)
from gramian.nn.residual import Chain, Residual, normalised_skip
from gramian.nn.tailored import Network, TailoredLeakyReLU, tailored

SKIP = 0.98
"""λ of the normalised skips λx + √(1 − λ²) branch(x): likely the published setting."""


class Modulated(nn.Module):
    """Features gated by others around one.

        y = branch(x) ⊙ (1 + gate(x))

    With a gate that starts at zero it starts as the branch itself; a plain product of two halves would add
    one to the slope of the correlation map of every layer.

    Shapes: (…, width) -> (…, features).
    Holds: exactly.
    """

    def __init__(self, branch: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.branch, self.gate = branch, gate

    def forward(self, x: Tensor) -> Tensor:
        """Gate the branch."""
        y = self.branch(x)
        return y + y * self.gate(x)


def v_skipinit(parts: Parts) -> nn.Module:
    """Value-SkipInit without skips or norms: A ← αI + βA with α = 1, β = 0 at the start.

        X' = (αI + βA) X W_V W_P,   out = φ̂(X' W_up) W_down

    All matrices but W_Q and W_K start orthogonal, φ̂ is the activation tailored for the depth. The first
    block divides its input by its RMS.

    Source: He et al. 2023, arXiv 2302.10322.
    """
    mixing = ShapedMixing(parts.heads, parts.causal, beta=0.0, centre=False)
    projection = ScaledOrthogonal(parts.width, parts.width)
    return Chain(input_norm(parts), orthogonal_attention(parts, mixing, projection), tailored_mlp(parts))


def u_spa(parts: Parts) -> nn.Module:
    """U-SPA without skips or norms: attention that starts with uniform correlation between tokens.

        X' = A_l X W_V,   A_l A_{l−1} … A_1 (…)ᵀ = (1 − ρ_l) I + ρ_l 1 1ᵀ;   out = φ̂(X' W_up) W_down

    Otherwise as `v_skipinit`, with W_Q = 0 and no projection.

    Source: He et al. 2023, arXiv 2302.10322.
    """
    return Chain(input_norm(parts), orthogonal_attention(parts, uniform(parts)), tailored_mlp(parts))


def e_spa(parts: Parts) -> nn.Module:
    """E-SPA without skips or norms: attention that starts with correlation decaying over distance.

        X' = A_l X W_V,   A_l A_{l−1} … A_1 (…)ᵀ = (e^{−γ_l |i−j|})_ij;   out = φ̂(X' W_up) W_down

    Otherwise as `u_spa`.

    Source: He et al. 2023, arXiv 2302.10322.
    """
    return Chain(input_norm(parts), orthogonal_attention(parts, decaying(parts)), tailored_mlp(parts))


def e_spa_attention_skip(parts: Parts) -> nn.Module:
    """E-SPA without norms whose attention alone has a skip: X' = λX + √(1−λ²) A_l X W_V.

    The A_l stay as in `e_spa`. Correlations of tokens and the stream's mean square then fall a little short
    of the target's.

    Source: He et al. 2023, arXiv 2302.10322.
    """
    attention = skipped(orthogonal_attention(parts, decaying(parts)))
    return Chain(input_norm(parts), attention, tailored_mlp(parts))


def e_spa_mlp_skip(parts: Parts) -> nn.Module:
    """E-SPA without norms whose MLP alone has a skip: out = λX' + √(1−λ²) φ̂(X' W_up) W_down.

    φ̂ is tailored for the network of normalised sums, nearer to the plain activation.

    Source: He et al. 2023, arXiv 2302.10322.
    """
    mlp = skipped(tailored_mlp(parts, with_skips))
    return Chain(input_norm(parts), orthogonal_attention(parts, decaying(parts)), mlp)


def e_spa_skips(parts: Parts) -> nn.Module:
    """E-SPA without norms, with both skips: X' = λX + √(1−λ²) A_l X W_V, out = λX' + √(1−λ²) MLP(X').

    Source: He et al. 2023, arXiv 2302.10322.
    """
    attention = skipped(orthogonal_attention(parts, decaying(parts)))
    return Chain(input_norm(parts), attention, skipped(tailored_mlp(parts, with_skips)))


def plain_skipless(parts: Parts) -> nn.Module:
    """Block of a control: no skips or norms, and no shaping either; softmax attention and √2 ReLU.

    Weights are those of `e_spa`. The variance is kept, and tokens and inputs collapse on each other.
    """
    attention = orthogonal_attention(parts, SoftmaxMixing(parts.causal))
    return Chain(input_norm(parts), attention, orthogonal_mlp(parts, TailoredLeakyReLU(0.0)))


def input_norm(parts: Parts) -> nn.Module:
    """Return what the first block divides its input by, x / RMS(x) without parameters; nothing after it."""
    return NORMS["rmsnorm_no_weight"](parts.width) if parts.layer == 0 else nn.Identity()


def decaying(parts: Parts) -> PrescribedMixing:
    """Return E-SPA's mixing of one layer."""
    rates = decay_rates(parts.depth, parts.decay)
    kind = CausalExponential if parts.causal else Exponential
    return PrescribedMixing(kind(rates[parts.layer + 1], rates[parts.layer]), parts.causal)


def uniform(parts: Parts) -> PrescribedMixing:
    """Return U-SPA's mixing of one layer."""
    correlations = uniform_correlations(parts.depth)
    kind = CausalUniform if parts.causal else Uniform
    return PrescribedMixing(kind(correlations[parts.layer + 1], correlations[parts.layer]), parts.causal)


def orthogonal_attention(
    parts: Parts, mixing: SoftmaxMixing, projection: nn.Module | None = None
) -> Attention:
    """Return an attention whose values start orthogonal, without a projection unless one is given."""
    features = parts.width // parts.heads * (parts.key_heads or parts.heads)
    value = ScaledOrthogonal(parts.width, features)
    return attention_of(parts, mixing, value=value, projection=projection or nn.Identity())


def tailored_mlp(parts: Parts, network: Network = plain) -> nn.Module:
    """Return an MLP of orthogonal maps around the activation that is tailored for the network's depth."""
    return orthogonal_mlp(parts, tailored(parts.activation, parts.depth, network))


def orthogonal_mlp(parts: Parts, activation: nn.Module) -> nn.Module:
    """Return φ(x W_up) W_down with scaled orthogonal matrices.

    When gated, half as many hidden features are multiplied by 1 + x W_gate, W_gate = 0 at the start.
    """
    hidden = parts.mlp_width // 2 if parts.gated else parts.mlp_width
    up: nn.Module = nn.Sequential(ScaledOrthogonal(parts.width, hidden), activation)
    if parts.gated:
        up = Modulated(up, ZeroLinear(parts.width, hidden))
    return nn.Sequential(up, ScaledOrthogonal(hidden, parts.width))


def skipped(branch: nn.Module) -> Residual:
    """Return λx + √(1 − λ²) branch(x), which keeps the mean square."""
    return Residual(branch, skip=SKIP, gain=normalised_skip(SKIP))


def with_skips(depth: int) -> Maximal:
    """Return the maximal function of a network whose MLPs have the normalised skip."""
    return residual(depth, SKIP)
