"""Small models of every kind in double precision, with all parameters away from their start."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.nn.transformer import TransformerConfig, build

transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH, HEADS, DEPTH, TOKENS = 40, 16, 2, 2, 9
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def gpt2(**more: Any) -> nn.Module:
    shape = {"n_positions": 16, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **shape, **more))


def opt() -> nn.Module:
    shape = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "num_hidden_layers": DEPTH, "ffn_dim": 24}
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZES, **shape, num_attention_heads=HEADS, max_position_embeddings=16)
    )


def llama() -> nn.Module:
    shape = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": DEPTH}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **shape, **heads))


def bert(**more: Any) -> nn.Module:
    shape = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": DEPTH}
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            **SIZES, **shape, num_attention_heads=HEADS, max_position_embeddings=16, **more
        )
    )


def ours(block: str = "pre_norm", **more: Any) -> nn.Module:
    config = TransformerConfig(
        vocabulary=VOCABULARY, context=16, width=WIDTH, depth=DEPTH, heads=HEADS, block=block, **more
    )
    return build(config, 0)


def made(make: Callable[..., nn.Module], **more: Any) -> nn.Module:
    """A model in double precision with every parameter away from its start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(**more).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def tokens(seed: int, batch: int = 3) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))


def logits(model: Callable, *args: Any, **kwargs: Any) -> Tensor:
    out = model(*args, **kwargs)
    return out if isinstance(out, Tensor) else out.logits
