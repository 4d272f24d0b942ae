"""Transformer blocks as short compositions of parts, registered by the names of the field."""

from dataclasses import replace

from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.attention import Attention, Gate
from gramian.nn.init import Reparametrised
from gramian.nn.mixing import ShapedMixing, SinkMixing, SoftmaxMixing
from gramian.nn.norms import NORMS, identity
from gramian.nn.parts import MLP, Block, Parts, attention_of, mlp_of, pre_normed
from gramian.nn.residual import Chain, Residual, Sum, down_weighted_gain, trainable
from gramian.nn.shaped import shaped
from gramian.nn.skipless import (
    e_spa,
    e_spa_attention_skip,
    e_spa_mlp_skip,
    e_spa_skips,
    u_spa,
    v_skipinit,
)
from gramian.nn.variants import (
    peri_norm,
    pre_norm_clipped,
    pre_norm_gated,
    pre_norm_qk_norm,
    pre_norm_sink,
    pre_norm_softcap,
    pre_norm_softmax1,
)

__all__ = ["BLOCKS", "MLP", "Block", "Parts", "block", "gains"]


def _simplified_attention(parts: Parts) -> Attention:
    """b_SA times shaped attention on the normed input itself; only the first layer keeps a value matrix."""
    value = Reparametrised(parts.width) if parts.layer == 0 else nn.Identity()
    mixing = ShapedMixing(parts.heads, parts.causal, gain=trainable(1.0))
    return attention_of(parts, mixing, value=value, projection=nn.Identity())


def _mlp_gain(parts: Parts) -> nn.Parameter:
    """β_FF of the simplified blocks, carried from 18 layers to this depth."""
    return trainable(down_weighted_gain(parts.depth, parts.mlp_gain))


def pre_norm(parts: Parts) -> nn.Module:
    """Pre-norm block: X' = X + MHA(N₁X), out = X' + MLP(N₂X').

    Source: Xiong et al. 2020, arXiv 2002.04745.
    """
    return pre_normed(parts, attention_of(parts, SoftmaxMixing(parts.causal)))


def post_norm(parts: Parts) -> nn.Module:
    """Post-norm block: X' = N₁(X + MHA(X)), out = N₂(X' + MLP(X')).

    Source: Vaswani et al. 2017, arXiv 1706.03762.
    """
    return Chain(
        Residual(attention_of(parts, SoftmaxMixing(parts.causal))),
        parts.norm(parts.width),
        Residual(mlp_of(parts)),
        parts.norm(parts.width),
    )


def parallel(parts: Parts) -> nn.Module:
    """Parallel block: out = X + MHA(N X) + MLP(N X).

    Source: Wang & Komatsuzaki 2021 (GPT-J); He & Hofmann 2024, arXiv 2311.01906.
    """
    branches = Sum(attention_of(parts, SoftmaxMixing(parts.causal)), mlp_of(parts))
    return Residual(Chain(parts.norm(parts.width), branches))


def value_skipinit(parts: Parts) -> nn.Module:
    """Value-SkipInit block: no attention skip, A ← αI + βA with α = 1, β = 0 at the start.

        X' = b_SA MHA(N₁X),   out = a_FF X' + b_FF MLP(N₂X')

    Source: He et al. 2023, arXiv 2302.10322.
    """
    mixing = ShapedMixing(parts.heads, parts.causal, beta=0.0, centre=False)
    return _skipless_attention(parts, attention_of(parts, mixing))


def sas(parts: Parts) -> nn.Module:
    """Simplified Attention Sub-block: shaped attention without values, projection or skip.

        X' = b_SA MHA(N₁X),   out = a_FF X' + b_FF MLP(N₂X')

    Source: He & Hofmann 2024, arXiv 2311.01906, section 4.
    """
    return Chain(parts.norm(parts.width), _simplified_attention(parts), _weighed_mlp(parts))


def sas_reparametrised(parts: Parts) -> nn.Module:
    """SAS that keeps a value and a projection matrix in every layer, both αI + βΔW with ΔW = 0 at the start.

    Source: He & Hofmann 2024, arXiv 2311.01906, section 4.2.
    """
    maps = {"value": Reparametrised(parts.width), "projection": Reparametrised(parts.width)}
    return _skipless_attention(parts, attention_of(parts, ShapedMixing(parts.heads, parts.causal), **maps))


def _skipless_attention(parts: Parts, attention: Attention) -> nn.Module:
    """Return an attention sub-block with no skip, then an MLP sub-block with one, all gains trainable."""
    first = Residual(Chain(parts.norm(parts.width), attention), skip=0.0, gain=trainable(1.0))
    return Chain(first, _weighed_mlp(parts))


def _weighed_mlp(parts: Parts) -> nn.Module:
    """a_FF X + b_FF MLP(N X), both gains trainable."""
    mlp = Chain(parts.norm(parts.width), mlp_of(parts))
    return Residual(mlp, skip=trainable(1.0), gain=_mlp_gain(parts))


def sas_p(parts: Parts) -> nn.Module:
    """Parallel simplified block: one norm and no skip at all.

        out = b_SA MHA(N X) + b_FF MLP(N X)

    Source: He & Hofmann 2024, arXiv 2311.01906, section 4.
    """
    branches = Sum(
        _simplified_attention(parts),
        Residual(mlp_of(parts), skip=0.0, gain=_mlp_gain(parts)),
    )
    return Chain(parts.norm(parts.width), branches)


def sas_p_no_norm(parts: Parts) -> nn.Module:
    """SAS-P without norms, but for a LayerNorm at the input of the first block.

    Source: He & Hofmann 2024, arXiv 2311.01906, section 4.
    """
    return sas_p(replace(parts, norm=NORMS["layernorm"] if parts.layer == 0 else identity))


def outlier_protected(parts: Parts) -> nn.Module:
    """Outlier Protected block: no pre-norms, down-weighted branches, normed queries and keys.

        X' = X + β MHA(X),   out = X' + β MLP(X'),   β = 0.2 at 18 layers, O(1/√L)

    The entropy of attention is held by RMSNorm on each head's q and k. The first layer's attention reads
    a LayerNorm of the embeddings.

    Source: He et al. 2024, arXiv 2405.19279, section 4.
    """
    gain = down_weighted_gain(parts.depth, 0.2)
    attention = attention_of(parts, SoftmaxMixing(parts.causal), query_key_norm=NORMS["rmsnorm"])
    first = NORMS["layernorm"](parts.width) if parts.layer == 0 else nn.Identity()
    return Chain(
        Residual(Chain(first, attention), gain=gain),
        Residual(mlp_of(parts), gain=gain),
    )


BLOCKS: dict[str, Block] = {
    function.__name__: function
    for function in (
        pre_norm,
        post_norm,
        parallel,
        value_skipinit,
        sas,
        sas_reparametrised,
        sas_p,
        sas_p_no_norm,
        outlier_protected,
        pre_norm_gated,
        pre_norm_softmax1,
        pre_norm_sink,
        pre_norm_clipped,
        pre_norm_softcap,
        pre_norm_qk_norm,
        peri_norm,
        v_skipinit,
        u_spa,
        e_spa,
        e_spa_attention_skip,
        e_spa_mlp_skip,
        e_spa_skips,
        shaped,
    )
}


def block(name: str) -> Block:
    """Return the block registered under `name`.

    Raises: InputError when the name is unknown.
    """
    if name not in BLOCKS:
        raise InputError(f"unknown block {name!r}; choose one of {', '.join(BLOCKS)}")
    return BLOCKS[name]


def gains(block: nn.Module) -> dict[str, float]:
    """Return a block's trainable gains, sinks and gates by name, averaged over heads.

    "identity", "softmax" and "centring" are the α, β and γ of shaped attention, "attention gain", "mlp gain"
    and "mlp skip" those of the sub-blocks, "value identity" and "value update" those of a re-parametrised
    value matrix. "sink" is the logit of a learned attention sink, "gate opening" σ of a gate's bias.

    Holds: exactly; empty for a block without any.
    """
    found: dict[str, float | Tensor | None] = {}
    for module in block.modules():
        if isinstance(module, ShapedMixing):
            found |= {"identity": module.alpha, "softmax": module.beta, "centring": module.gamma}
            found |= {"attention gain": module.gain}
        elif isinstance(module, SinkMixing):
            found |= {"sink": module.sink}
        elif isinstance(module, Gate):
            found |= {"gate opening": module.bias.sigmoid()}
        elif isinstance(module, Reparametrised):
            found |= {"value identity": module.alpha, "value update": module.beta}
        elif isinstance(module, Residual):
            attends = any(isinstance(part, Attention) for part in module.branch.modules())
            kind = "attention" if attends else "mlp"
            found |= {f"{kind} gain": module.gain, f"{kind} skip": module.skip}
    return {name: value.mean().item() for name, value in found.items() if isinstance(value, Tensor)}
