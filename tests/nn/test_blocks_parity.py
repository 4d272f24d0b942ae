"""Every block against an independent reference implementation; all settings come from the case's JSON.

The reference adds the RMSNorm epsilon outside the root and carries per-head and per-branch gains that the
standard blocks leave out; both live here as test-local parts.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.nn.activations import ACTIVATIONS
from gramian.nn.attention import Attention, ShapedMixing, SoftCapMixing
from gramian.nn.blocks import MLP, Parts, block
from gramian.nn.init import Reparametrised
from gramian.nn.residual import Residual, Sum
from reference import Case, cases, load


class RootRMSNorm(nn.Module):
    """scale · x / (rms(x) + ε)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


def registered_name(config: dict[str, Any]) -> str:
    bare = config["norm"].startswith("none")
    if config["shaped_attention"]:
        if config["parallel"]:
            return "sas_p_no_norm" if bare else "sas_p"
        return "value_skipinit" if config["value_proj"] == "full matrices" else "sas"
    if config["parallel"]:
        return "parallel"
    if bare:
        return "outlier_protected"
    return {"pre": "pre_norm", "post": "post_norm"}[config["norm_position"]]


def composed(config: dict[str, Any], layer: int) -> nn.Module:
    """Our block for one layer, with the parts that the reference case has and the standard block has not."""
    norms = {
        "rmsnorm": partial(RootRMSNorm, eps=config["norm_eps"]),
        "layernorm": partial(nn.LayerNorm, eps=config["norm_eps"]),
        "none": nn.Identity,
    }
    first = iter([norms["layernorm"]] if layer == 0 else [])
    norms["none_except_layernorm_in_layer_0"] = lambda width: next(first, nn.Identity)(width)
    width, heads = config["d_model"], config["n_heads"]
    activations = {**ACTIVATIONS, "leaky_relu": partial(nn.LeakyReLU, config["negative_slope"])}
    parts = Parts(
        width,
        heads,
        config["n_layers"],
        layer,
        config["mlp_width"],
        config["causal"],
        norms[config["norm"]],
        activations[config["activation"]],
    )
    built = block(registered_name(config))(parts)
    attention = find(built, Attention)
    query_key_norm = norms[config["qk_norm"]]
    attention.query_norm, attention.key_norm = query_key_norm(width // heads), query_key_norm(width // heads)
    if config["logit_softcap"] is not None:
        attention.mixing = SoftCapMixing(config["logit_softcap"], config["causal"])
    if config["shaped_attention"]:
        attention.mixing = ShapedMixing(heads, config["causal"], gain=attention.mixing.gain)
    full = config["value_proj"] == "full matrices"
    for name, listed in (
        ("value", "layers_with_value_matrix"),
        ("projection", "layers_with_projection_matrix"),
    ):
        if layer not in config[listed]:
            setattr(attention, name, nn.Identity())
        elif not full:
            setattr(attention, name, Reparametrised(width))
    for module in built.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config["norm_eps"]
        if isinstance(module, Sum):  # the reference gives each parallel branch a gain
            module.branches = nn.ModuleList(
                branch if has_gain(branch) else Residual(branch, skip=0.0) for branch in module.branches
            )
    return built.double()


def has_gain(branch: Any) -> bool:
    if isinstance(branch, Attention):
        return isinstance(branch.mixing, ShapedMixing) and branch.mixing.gain is not None
    return isinstance(branch, Residual)


def find(module: nn.Module, kind: type) -> Any:
    return next(part for part in module.modules() if isinstance(part, kind))


def fill(built: nn.Module, layer: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Copy one layer's arrays, weights transposed (the reference stores in × out)."""
    used: set[str] = set()

    def take(name: str) -> Tensor:
        used.add(name)
        return layer[name]

    attention, mlp = find(built, Attention), find(built, MLP)
    heads, shaped = config["n_heads"], config["shaped_attention"]
    with torch.no_grad():
        attention.query_key.weight.copy_(torch.cat((take("q_weight"), take("k_weight")), 1).T)
        attention.query_key.bias.copy_(torch.cat((take("q_bias"), take("k_bias"))))
        for mine, theirs in ((attention.query_norm, "q_norm_scale"), (attention.key_norm, "k_norm_scale")):
            if theirs in layer:
                mine.weight.copy_(take(theirs))
        for mine, theirs in ((attention.value, "v"), (attention.projection, "proj")):
            if isinstance(mine, Reparametrised):
                mine.delta.weight.copy_(take(f"{theirs}_weight").T)
                mine.alpha.copy_(take(f"{theirs}_skip_gain").squeeze())
                mine.beta.copy_(take(f"{theirs}_resid_gain").squeeze())
            elif isinstance(mine, nn.Linear):
                mine.weight.copy_(take(f"{theirs}_weight").T)
        beta = take("attn_mat_resid_gain")
        if shaped:
            attention.mixing.beta.copy_(beta)
            attention.mixing.alpha.copy_(take("attn_mat_skip_gain"))
            attention.mixing.gamma.copy_(take("centre_attn_gain"))
        else:  # β A V = A (β V): the per-head gain goes into the rows of W_V
            attention.value.weight.mul_(beta.repeat_interleave(config["d_model"] // heads)[:, None])
        mlp.up.weight.copy_(take("mlp_in_weight").T)
        mlp.down.weight.copy_(take("mlp_out_weight").T)
        norms = [part for part in norms_of(built) if part not in (attention.query_norm, attention.key_norm)]
        for index, part in enumerate(norms, start=1):
            part.weight.copy_(take(f"norm{index}_scale"))
            if f"norm{index}_bias" in layer:
                part.bias.copy_(take(f"norm{index}_bias"))
    if has_gain(attention):
        attention.mixing.gain.data.copy_(take("attn_block_resid_gain").squeeze())
        if "attn_block_skip_gain" in layer and not config["parallel"]:
            assert constant(take("attn_block_skip_gain")) == 0
    residuals = [part for part in built.modules() if isinstance(part, Residual)]
    for residual in residuals:
        direct = residual.branch
        if any(isinstance(part, Sum) for part in direct.modules()):
            residual.skip = constant(take("mlp_block_skip_gain"))
            continue
        kind = "attn" if any(isinstance(part, Attention) for part in direct.modules()) else "mlp"
        set_gain(residual, "gain", take(f"{kind}_block_resid_gain"))
        if f"{kind}_block_skip_gain" in layer and not config["parallel"]:
            set_gain(residual, "skip", take(f"{kind}_block_skip_gain"))
    assert used == {name for name in layer if name not in ("attn_softmax", "attn_mixing", "output")}


def norms_of(built: nn.Module) -> list[Any]:
    return [part for part in built.modules() if isinstance(part, (RootRMSNorm, nn.LayerNorm))]


def constant(value: Tensor) -> float:
    return float(value.squeeze())


def set_gain(residual: Residual, name: str, value: Tensor) -> None:
    current = getattr(residual, name)
    if isinstance(current, nn.Parameter):
        current.data.copy_(value.squeeze())
    else:
        setattr(residual, name, constant(value))


def layer_arrays(case: Case, layer: int) -> dict[str, Tensor]:
    prefix = f"layer_{layer}."
    return {name[len(prefix) :]: value for name, value in case.arrays.items() if name.startswith(prefix)}


@pytest.mark.parity
@pytest.mark.parametrize("path", cases("transformer_blocks"))
def test_block_equals_reference(path: Path) -> None:
    case = load(path)
    config = case.spec["config"]
    x = case.arrays["input_hidden_states"].clone().requires_grad_()
    hidden = x
    for index in range(config["n_layers"]):
        arrays = layer_arrays(case, index)
        built = composed(config, index)
        fill(built, arrays, config)
        seen: dict[str, Tensor] = {}
        attention = find(built, Attention)
        hook = attention.mixing.register_forward_pre_hook(
            lambda _, qkv, seen=seen: seen.update(q=qkv[0], k=qkv[1])
        )
        hidden = built(hidden)
        hook.remove()
        if "output" in arrays:  # the last layer's is output_hidden_states
            torch.testing.assert_close(hidden, arrays["output"], rtol=1e-9, atol=1e-10)
        weights = attention.mixing.weights(seen["q"], seen["k"])
        torch.testing.assert_close(weights, arrays["attn_softmax"], rtol=1e-9, atol=1e-10)
        if "attn_mixing" in arrays:  # mixing the unit vectors gives the matrix itself
            tokens = x.shape[1]
            unit = torch.eye(tokens, dtype=x.dtype).expand(x.shape[0], config["n_heads"], -1, -1)
            matrix = attention.mixing(seen["q"], seen["k"], unit)
            gain = attention.mixing.gain if has_gain(attention) else 1.0  # of the branch, merged in ours
            torch.testing.assert_close(matrix, gain * arrays["attn_mixing"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(hidden, case.arrays["output_hidden_states"], rtol=1e-9, atol=1e-10)
    (hidden * case.arrays["cotangent"]).sum().backward()
    torch.testing.assert_close(x.grad, case.arrays["grad_input"], rtol=1e-9, atol=1e-10)


@pytest.mark.parity
@pytest.mark.parametrize("path", cases("transformer_blocks"))
def test_a_changed_gain_is_noticed(path: Path) -> None:
    """Control: with one gain off by 1e-6, parity at 1e-9 fails."""
    case = load(path)
    arrays = layer_arrays(case, 0)
    built = composed(case.spec["config"], 0)
    arrays["mlp_block_resid_gain"] = arrays["mlp_block_resid_gain"] + 1e-6
    fill(built, arrays, case.spec["config"])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            built(case.arrays["input_hidden_states"]), arrays["output"], rtol=1e-9, atol=1e-10
        )
