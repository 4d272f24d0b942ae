"""Small Hugging Face models of every block, with all parameters away from their start."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gramian.data.tokens import load_corpus
from gramian.nn.blocks import BLOCKS
from gramian.nn.transformer import TransformerConfig, build

transformers = pytest.importorskip("transformers")

from gramian.interop.huggingface import (  # noqa: E402
    GramianConfig,
    GramianForCausalLM,
    GramianForMaskedLM,
    GramianForSequenceClassification,  # noqa: F401  (the tests take it from here, where it may be missing)
)

SHAPE: dict[str, Any] = {
    "vocabulary": 29, "context": 16, "width": 24, "depth": 3, "heads": 4, "key_heads": 2,
    "eos_token_id": None,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied": False, "key_heads": None},
    "sinusoidal": {"positions": "sinusoidal", "gated": True, "final_norm": False},
}
KINDS = {True: GramianForCausalLM, False: GramianForMaskedLM}
AUTO = {True: transformers.AutoModelForCausalLM, False: transformers.AutoModelForMaskedLM}
every_decoder = pytest.mark.parametrize("name", BLOCKS)
every_block = pytest.mark.parametrize(
    ("name", "causal"),
    [
        pytest.param(name, causal, id=f"{name}-{'causal' if causal else 'masked'}")
        for name in BLOCKS
        for causal in (True, False)
    ],
)


def fresh(name: str = "sas", causal: bool = True, kind: Any = None, seed: int = 0, **more: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return (kind or KINDS[causal])(GramianConfig(**{**SHAPE, "block": name, "causal": causal, **more}))


def model_of(
    name: str = "sas",
    causal: bool = True,
    kind: Any = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **more: Any,
) -> Any:
    model = fresh(name, causal, kind, seed, **more).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += (0.3 * noise).to(dtype)
    return model.eval()


def tokens_of(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(1, 29, shape, generator=torch.Generator().manual_seed(seed))


def same(loaded: Any, model: Any, tokens: Tensor) -> bool:
    """Tell whether all bits agree; a copy is asked, since sums over weights mapped from a file, which may lie
    at odd addresses, are rounded otherwise."""
    tensors = [{**dict(m.state_dict()), **dict(m.named_buffers())} for m in (loaded, model)]
    bits = all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[1])
    logits = [copy.deepcopy(m)(tokens, use_cache=False).logits for m in (loaded, model)]
    return bits and tensors[0].keys() == tensors[1].keys() and torch.equal(*logits)


def written_by_hand(folder: Path, metadata: dict[str, str] | None = None) -> tuple[Any, Any]:
    """Write the files that a run leaves, with none of Hugging Face's own tools."""
    text = folder / "text.txt"
    text.write_text("A tired cat sat on a mat. The cat ate a rat, and that was that.\n" * 20)
    tokenizer = load_corpus(text, vocabulary=280, cache=False).tokenizer
    text.unlink()
    config = TransformerConfig(
        vocabulary=tokenizer.get_vocab_size(), context=32, width=24, depth=2, block="sas"
    )
    ours = build(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in ours.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    state = {f"transformer.{key}": value for key, value in ours.state_dict().items() if key != "head.weight"}
    save_file(state, folder / "model.safetensors", metadata)
    end, ids = "<|endoftext|>", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    described = {"model_type": "gramian", "architectures": ["GramianForCausalLM"], **asdict(config), **ids}
    special = {"eos_token": end, "bos_token": end, "pad_token": end}
    texts: dict[str, Any] = {
        "config.json": described,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32, **special,
        },
        "generation_config.json": ids,
    }  # fmt: skip
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return ours, tokenizer
