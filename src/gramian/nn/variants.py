"""Pre-norm blocks with one part exchanged against outlier neurons and attention sinks."""

import torch
from torch import nn

from gramian.nn.attention import Gate
from gramian.nn.mixing import ClippedSoftmaxMixing, SinkMixing, SoftCapMixing, SoftmaxMixing
from gramian.nn.norms import NORMS
from gramian.nn.parts import Parts, attention_of, mlp_of, pre_normed
from gramian.nn.residual import Chain, Residual


def pre_norm_gated(parts: Parts) -> nn.Module:
    """Pre-norm block whose heads are gated by the attention's input, half open at the start.

        MHA(X) = concat_h(σ(X w_h + b_h) ⊙ A_h V_h) W_P,   σ(b_h) = ½ at the start

    Source: Qiu et al. 2025, arXiv 2505.06708 (head-wise, after the mixing); Bondarenko et al. 2023, arXiv
    2306.12929.
    """
    gate = Gate(parts.width, parts.heads, opening=0.5)
    return pre_normed(parts, attention_of(parts, SoftmaxMixing(parts.causal), gate=gate))


def pre_norm_softmax1(parts: Parts) -> nn.Module:
    """Pre-norm block with softmax-1, e^z / (1 + Σ e^z): a head may attend to nothing.

    Source: Miller 2023, "Attention is off by one"; Kaul et al. 2024, arXiv 2410.17174.
    """
    return pre_normed(parts, attention_of(parts, SinkMixing(0.0, parts.causal)))


def pre_norm_sink(parts: Parts) -> nn.Module:
    """Pre-norm block with a learned sink a head, e^z / (e^{s_h} + Σ e^z), s_h = 0 at the start.

    Source: OpenAI 2025, arXiv 2508.10925.
    """
    sink = nn.Parameter(torch.zeros(parts.heads))
    return pre_normed(parts, attention_of(parts, SinkMixing(sink, parts.causal)))


def pre_norm_clipped(parts: Parts) -> nn.Module:
    """Pre-norm block with clipped softmax, clip((1 + α/T) softmax − α/T, 0, 1), α = 12, T the context.

    Source: Bondarenko et al. 2023, arXiv 2306.12929.
    """
    mixing = ClippedSoftmaxMixing(parts.context, alpha=12.0, causal=parts.causal)
    return pre_normed(parts, attention_of(parts, mixing))


def pre_norm_softcap(parts: Parts) -> nn.Module:
    """Pre-norm block whose attention logits are kept within ±30 by 30 tanh(z / 30).

    Source: Gemma Team 2024, arXiv 2408.00118; He et al. 2024, arXiv 2405.19279 (cap 30).
    """
    return pre_normed(parts, attention_of(parts, SoftCapMixing(30.0, parts.causal)))


def pre_norm_qk_norm(parts: Parts) -> nn.Module:
    """Pre-norm block with RMSNorm on each head's queries and keys.

    Source: Dehghani et al. 2023, arXiv 2302.05442 (LayerNorm there).
    """
    mixing = SoftmaxMixing(parts.causal)
    return pre_normed(parts, attention_of(parts, mixing, query_key_norm=NORMS["rmsnorm"]))


def peri_norm(parts: Parts) -> nn.Module:
    """Peri-norm block: X' = X + N₂ MHA(N₁X), out = X' + N₄ MLP(N₃X').

    The norm on the embeddings that the paper offers beside it is left out.

    Source: Kim et al. 2025, arXiv 2502.02732.
    """
    attend = attention_of(parts, SoftmaxMixing(parts.causal))
    return Chain(
        *(
            Residual(Chain(parts.norm(parts.width), branch, parts.norm(parts.width)))
            for branch in (attend, mlp_of(parts))
        )
    )
