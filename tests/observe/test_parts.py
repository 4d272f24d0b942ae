"""Layers, kinds and fused matrices, by the names that well-known models give their parameters."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gramian.nn.transformer import Transformer, TransformerConfig
from gramian.observe.parts import kind_of, layer_of, parts_of


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "model.layers.11", "query"),
        ("model.layers.2.self_attn.o_proj.weight", "model.layers.2", "projection"),
        ("model.layers.2.mlp.gate_proj.weight", "model.layers.2", "mlp"),
        ("model.layers.2.post_attention_layernorm.weight", "model.layers.2", "norm"),
        ("model.embed_tokens.weight", "model.embed_tokens", "embedding"),
        ("lm_head.weight", "lm_head", "head"),
        ("transformer.h.3.attn.c_proj.weight", "transformer.h.3", "projection"),
        ("transformer.h.3.mlp.c_proj.bias", "transformer.h.3", "mlp"),
        ("transformer.wpe.weight", "transformer.wpe", "embedding"),
        ("gpt_neox.layers.0.attention.dense.weight", "gpt_neox.layers.0", "projection"),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h.weight", "gpt_neox.layers.0", "mlp"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "bert.encoder.layer.0", "projection"),
        ("bert.encoder.layer.0.intermediate.dense.weight", "bert.encoder.layer.0", "mlp"),
        ("bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.0", "query"),
        ("blocks.1.0.branch.1.query_key.bias", "blocks.1", "vector"),
        ("blocks.1.1.branches.0.mixing.alpha", "blocks.1", "gain"),
        ("norm.weight", "norm", "norm"),
        ("weight", "weight", "vector"),
    ],
)
def test_names(name: str, layer: str, kind: str) -> None:
    assert layer_of(name) == layer
    assert kind_of(name) == kind


def test_shapes_decide_where_names_say_nothing() -> None:
    assert kind_of("0.weight", (8, 3, 3, 3)) == "convolution"
    assert kind_of("1.weight", (8, 3)) == "matrix"
    assert kind_of("1.bias", (8,)) == "vector"


def pieces(value: torch.Tensor, name: str, config: dict) -> dict[str, torch.Tensor]:
    """Divide a tensor as the parts say, by a loop over its elements."""
    parts = parts_of(name, tuple(value.shape), config)
    found: dict[str, list[float]] = {part.kind: [] for part in parts}
    period = sum(part.size for part in parts)
    for index, element in enumerate(value.flatten().tolist()):
        place = index % period
        for part in parts:
            if place < part.size:
                found[part.kind].append(element)
                break
            place -= part.size
    return {kind: torch.tensor(values) for kind, values in found.items()}


def test_gpt2_fuses_by_columns() -> None:
    value = torch.arange(4.0 * 12).view(4, 12)
    found = pieces(value, "transformer.h.0.attn.c_attn.weight", {"model_type": "gpt2"})
    for kind, expected in zip(("query", "key", "value"), value.split(4, dim=1), strict=True):
        assert torch.equal(found[kind], expected.flatten())


@pytest.mark.parametrize(
    "name", ["gpt_neox.layers.0.attention.query_key_value.weight", "h.0.query_key_value.bias"]
)
def test_neox_fuses_head_by_head(name: str) -> None:
    heads, width = 2, 6
    shape = (3 * width, width) if name.endswith("weight") else (3 * width,)
    value = torch.arange(float(torch.Size(shape).numel())).view(shape)
    found = pieces(value, name, {"model_type": "gpt_neox", "num_attention_heads": heads})
    by_head = value.view(heads, 3, width // heads, *shape[1:])  # the layout of transformers' forward pass
    for index, kind in enumerate(("query", "key", "value")):
        assert torch.equal(found[kind], by_head[:, index].flatten())


def test_the_neox_layout_is_that_of_transformers() -> None:
    config = AutoConfig.for_model(
        "gpt_neox", hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8,
        vocab_size=11, rotary_pct=0.25, use_parallel_residual=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    bias = model.get_parameter(name.replace("weight", "bias"))
    parts = parts_of(name, (24, 8), config.to_dict())
    assert [part.kind for part in parts] == ["query", "key", "value"]
    with torch.no_grad():
        weight = model.get_parameter(name).view(-1)
        owner = torch.arange(weight.numel()) % sum(part.size for part in parts) // parts[0].size
        weight[owner == 0] *= 2  # queries twice, keys half: the products of both stay
        weight[owner == 1] /= 2
        rows = torch.arange(24) % (24 // 2) // 4
        bias[rows == 0] *= 2
        bias[rows == 1] /= 2
    assert torch.allclose(model(ids).logits, before, atol=1e-6)
    with torch.no_grad():
        weight[owner == 2] *= 2
    assert not torch.allclose(model(ids).logits, before, atol=1e-6)


def test_our_queries_and_keys() -> None:
    model = Transformer(
        TransformerConfig(vocabulary=11, context=8, width=8, depth=1, heads=4, key_heads=2, block="pre_norm")
    )
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("query_key.weight"))
    found = pieces(weight.detach(), name, {})
    assert torch.equal(found["query"], weight.detach()[:8].flatten())
    assert torch.equal(found["key"], weight.detach()[8:].flatten())


@pytest.mark.parametrize(
    ("name", "shape", "config", "kinds"),
    [
        ("l.0.qkv_proj.weight", (8 + 4 + 4, 8), {}, ["query", "key", "value"]),
        ("l.0.attn.in_proj_weight", (24, 8), {}, ["query", "key", "value"]),
        ("l.0.attn.in_proj_bias", (24,), {}, ["query", "key", "value"]),
        (
            "l.0.qkv_proj.bias",
            (18,),
            {"num_attention_heads": 4, "num_key_value_heads": 1},
            ["query_key_value"],
        ),
        ("l.0.query_key_value.weight", (24, 8), {}, ["query_key_value"]),
        (
            "l.0.query_key_value.weight",
            (24, 8),
            {"model_type": "falcon", "num_attention_heads": 2},
            ["query_key_value"],
        ),
        ("l.0.qkv.weight", (25, 8), {}, ["matrix"]),
    ],
)
def test_layouts_known_and_unknown(name: str, shape: tuple[int, ...], config: dict, kinds: list[str]) -> None:
    parts = parts_of(name, shape, config)
    assert [part.kind for part in parts] == kinds
    assert torch.Size(shape).numel() % sum(part.size for part in parts) == 0
