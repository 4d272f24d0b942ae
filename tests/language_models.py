"""Small language models of transformers with a tokenizer, saved as anybody's would be."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<s>", "</s>", "<pad>", "<mask>"]
SIZES: dict[str, Any] = {"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def gpt2(**more: Any) -> Any:
    return GPT2LMHeadModel(GPT2Config(**SIZES, n_positions=32, n_embd=16, n_layer=3, n_head=2, **more))


def opt() -> Any:
    return OPTForCausalLM(
        OPTConfig(
            **SIZES, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=3, num_attention_heads=2,
            ffn_dim=32, max_position_embeddings=32,
        )
    )  # fmt: skip


def llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            **SIZES, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32,
        )
    )  # fmt: skip


def bert() -> Any:
    return BertForMaskedLM(
        BertConfig(
            **SIZES, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=32,
        )
    )  # fmt: skip


MODELS = {"gpt2": gpt2, "opt": opt, "llama": llama, "bert": bert}
LAYERS = {
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "llama": "model.layers",
    "bert": "bert.encoder.layer",
}
"""Where the layers of each are."""

FRAMES = {"gpt2": (0, 0), "opt": (1, 0), "llama": (1, 0), "bert": (1, 1)}
"""Special tokens that its tokenizer puts before and after a text."""


def tokenizer(before: int = 0, after: int = 0) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes: token 4 + b is byte b, in the order of the byte-level alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    bytes_alone = Tokenizer(models.BPE(vocabulary, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bytes_alone.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    template = " ".join(["<s>"] * before + ["$A"] + ["</s>"] * after)
    bytes_alone.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        mask_token="<mask>",
    )


def built(name: str, seed: int = 0) -> Any:
    """Return a model with random weights, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name]().eval()


def save(name: str, folder: Path, model: Any = None, **options: Any) -> Any:
    """Write a model and its tokenizer into a folder and return the model."""
    model = built(name) if model is None else model
    model.save_pretrained(folder, **options)
    tokenizer(*FRAMES[name]).save_pretrained(folder)
    return model
