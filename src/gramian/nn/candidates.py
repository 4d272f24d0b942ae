"""Blocks put together from published parts, to be tried against each other; none is published itself."""

from dataclasses import replace

from torch import nn

from gramian.nn.attention import Attention, Gate
from gramian.nn.blocks import Block, Parts, sas_p, sas_p_no_norm
from gramian.nn.norms import NORMS


def _query_key_normed(block: nn.Module) -> nn.Module:
    """Put an RMSNorm on every head's queries and keys."""
    for module in block.modules():
        if isinstance(module, Attention):
            module.query_norm = NORMS["rmsnorm"](module.head_width)
            module.key_norm = NORMS["rmsnorm"](module.head_width)
    return block


def sas_p_qk_norm(parts: Parts) -> nn.Module:
    """SAS-P whose attention's entropy is held by RMSNorm on queries and keys."""
    return _query_key_normed(sas_p(parts))


def sas_p_no_norm_qk_norm(parts: Parts) -> nn.Module:
    """SAS-P without norms but those on queries and keys."""
    return _query_key_normed(sas_p_no_norm(parts))


def _gated(parts: Parts, block: nn.Module) -> nn.Module:
    """Put a gate, half open, on every head."""
    for module in block.modules():
        if isinstance(module, Attention):
            module.gate = Gate(parts.width, parts.heads, opening=0.5)
    return block


def sas_p_gated(parts: Parts) -> nn.Module:
    """SAS-P whose heads are gated by the block's input."""
    return _gated(parts, sas_p(parts))


def sas_p_no_norm_gated(parts: Parts) -> nn.Module:
    """SAS-P without norms whose heads are gated by the block's input."""
    return _gated(parts, sas_p_no_norm(parts))


def sas_p_quiet_mlp(parts: Parts) -> nn.Module:
    """SAS-P whose MLP starts with half the usual weight."""
    return sas_p(replace(parts, mlp_gain=parts.mlp_gain / 2))


CANDIDATES: dict[str, Block] = {
    function.__name__: function
    for function in (
        sas_p_qk_norm,
        sas_p_no_norm_qk_norm,
        sas_p_gated,
        sas_p_no_norm_gated,
        sas_p_quiet_mlp,
    )
}
"""The blocks that the five-axes study tries beside the registered ones."""
