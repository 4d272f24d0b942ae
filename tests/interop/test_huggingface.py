"""Every block as a Hugging Face model: what is saved, loaded, refused, computed and generated."""

import copy
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

from gramian.errors import InputError
from gramian.interop.huggingface_cache import CACHE
from gramian.nn.attention import Attention, ShapedMixing
from gramian.nn.blocks import BLOCKS, Parts, sas_reparametrised
from gramian.nn.init import Reparametrised
from gramian.nn.transformer import TransformerConfig, build
from huggingface_models import (
    AUTO,
    VARIANTS,
    GramianConfig,
    GramianForCausalLM,
    GramianForMaskedLM,
    every_block,
    fresh,
    model_of,
    same,
    tokens_of,
    transformers,
    written_by_hand,
)


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@every_block
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_saved_model_is_loaded_bit_for_bit(name, causal, variant, tmp_path) -> None:
    model, tokens = model_of(name, causal, **VARIANTS[variant]), tokens_of(2, 9)
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"config.json", "model.safetensors"} | ({"generation_config.json"} if causal else set())
    loaded, info = AUTO[causal].from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info.values())
    assert same(loaded, model, tokens)
    assert torch.equal(model.transformer(tokens), model(tokens).logits)
    assert loaded.config.shape() == model.config.shape() == loaded.transformer.config
    tied = loaded.transformer.head.weight is loaded.transformer.embedding.weight
    assert tied is loaded.config.tied is (variant != "untied")
    other = model_of(name, causal, seed=5, **VARIANTS[variant])  # control: other weights, other logits
    assert not torch.equal(other(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_a_stored_base_matrix_of_a_users_own_block_survives(tmp_path, monkeypatch) -> None:
    def rotated(parts: Parts) -> nn.Module:
        block = sas_reparametrised(parts)
        for module in block.modules():
            if isinstance(module, Attention):
                module.value = Reparametrised(parts.width, "orthogonal")
        return block

    monkeypatch.setitem(BLOCKS, "rotated", rotated)
    new = fresh("rotated").transformer.blocks[1][0].branch[1].value
    torch.testing.assert_close(new.base @ new.base.T, torch.eye(24), rtol=0, atol=1e-5)
    model, tokens = model_of("rotated"), tokens_of(2, 9)
    model.save_pretrained(tmp_path)
    assert sum(key.endswith("value.base") for key in load_file(tmp_path / "model.safetensors")) == 3
    assert same(AUTO[True].from_pretrained(tmp_path), model, tokens)


@every_block
def test_a_new_model_starts_as_ours_do(name, causal) -> None:
    model = fresh(name, causal, positions="sinusoidal", width=32)
    ours = build(model.config.shape(), seed=3)
    for (key, got), (own, expected) in zip(
        model.transformer.state_dict().items(), ours.state_dict().items(), strict=True
    ):
        assert key == own
        for special in (0, 1):
            assert torch.equal(got == special, expected == special), key
        if got.numel() > 100:
            assert got.std().item() == pytest.approx(expected.std().item(), rel=0.25), key
    assert torch.equal(model.transformer.positions.weight, ours.positions.weight)
    attentions = [
        m for m in model.modules() if isinstance(m, Attention) and isinstance(m.mixing, ShapedMixing)
    ]
    assert all((m.query_key.weight[:32] == 0).all() for m in attentions if m.mixing.gamma is not None)
    drawn = [fresh(name, causal, seed=seed).transformer.embedding.weight for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@every_block
@torch.no_grad()
def test_bf16_is_close_and_generates(name, causal, tmp_path) -> None:
    model, tokens = fresh(name, causal, positions="sinusoidal").eval(), tokens_of(2, 9)
    mask = torch.arange(9) >= torch.tensor([[0], [3]])
    model.save_pretrained(tmp_path)
    low = AUTO[causal].from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in (*low.parameters(), *low.buffers())} == {torch.bfloat16}
    exact, got = model(tokens, mask).logits, low(tokens, mask).logits
    assert got.dtype == torch.bfloat16
    assert 0 < (got.float() - exact).norm() / exact.norm() < 0.03
    if causal:
        assert low.generate(tokens, attention_mask=mask.long(), max_new_tokens=3).shape == (2, 12)


@every_block
@torch.no_grad()
def test_padding_changes_nothing(name, causal) -> None:
    model, tokens, padded = (
        model_of(name, causal, dtype=torch.float64),
        tokens_of(2, 6),
        tokens_of(2, 10, seed=5),
    )
    for places in (slice(4, 10), slice(0, 6)):
        mask = torch.zeros(2, 10, dtype=torch.int64)
        padded[:, places], mask[:, places] = tokens, 1
        got = model(padded, attention_mask=mask).logits[:, places]
        torch.testing.assert_close(got, model(tokens).logits, rtol=1e-10, atol=1e-10)
        if places.start:
            assert (model(padded).logits[:, places] - got).abs().max() > 1e-3  # control: unmasked it is seen


@every_block
@torch.no_grad()
def test_embeddings_in_and_hidden_states_out(name, causal) -> None:
    model, tokens = model_of(name, causal), tokens_of(2, 9)
    plain = model(tokens, use_cache=False)
    assert plain.hidden_states is None
    embeds = model.get_input_embeddings()(tokens)
    out = model(inputs_embeds=embeds, output_hidden_states=True)
    assert torch.equal(out.logits, plain.logits)
    transformer = model.transformer
    stream = embeds + transformer.positions(torch.arange(9))
    assert len(out.hidden_states) == model.config.depth + 1
    for layer, hidden in zip((*transformer.blocks, nn.Identity()), out.hidden_states, strict=True):
        torch.testing.assert_close(hidden, stream, rtol=1e-5, atol=1e-5)
        stream = layer(stream)
    assert torch.equal(transformer.head(transformer.norm(out.hidden_states[-1])), plain.logits)
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.config.output_hidden_states = True
    assert len(model(tokens, use_cache=False, return_dict=False)[1]) == model.config.depth + 1


@every_block
@torch.no_grad()
def test_packed_documents_are_as_if_alone(name, causal) -> None:
    model = model_of(name, causal, dtype=torch.float64)
    documents = [tokens_of(n, seed=n) for n in (5, 1, 7)]
    collate = transformers.DataCollatorWithFlattening()
    batch = collate([{"input_ids": document.tolist()} for document in documents])
    packed = model(**batch)
    alone = [model(document[None]).logits[0] for document in documents]
    torch.testing.assert_close(packed.logits[0], torch.cat(alone), rtol=1e-10, atol=1e-10)
    unpacked = model(batch["input_ids"]).logits[0]  # control: without positions they see each other
    assert (unpacked[5:] - torch.cat(alone)[5:]).abs().max() > 1e-3
    rows = model(batch["input_ids"].repeat(2, 1), position_ids=batch["position_ids"]).logits
    torch.testing.assert_close(rows, packed.logits.expand(2, -1, -1), rtol=1e-10, atol=1e-10)
    if causal:
        terms = [cross_entropy(a[:-1], d[1:], reduction="sum") for a, d in zip(alone, documents, strict=True)]
        torch.testing.assert_close(packed.loss.double(), sum(terms) / 10, rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "block": ({"block": "pre_norm"}, r"also holds transformer\.blocks\.0\.0\..* blocks 'pre_norm'"),
    "fewer": ({"depth": 2}, r"also holds transformer\.blocks\.2\..* 2 blocks 'sas'"),
    "more": ({"depth": 4}, r"lacks transformer\.blocks\.3\..* 4 blocks 'sas'"),
    "width": ({"width": 32}, r"has transformer\.blocks\.0\..* in another shape"),
    "head": ({"tied": False}, r"lacks transformer\.head\.weight \(1 such"),
    "positions": ({"positions": "sinusoidal"}, r"also holds transformer\.positions\.weight"),
    "objective": ({"causal": False}, "trained with the masked objective; open it as a masked"),
    "name": ({"block": "rotated"}, "unknown block 'rotated'; choose one of pre_norm"),
    "heads": ({"heads": 5}, "not divisible by heads 5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_of_another_model_are_refused(case, tmp_path) -> None:
    changes, message = REFUSED[case]
    model_of("sas").save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        AUTO[True].from_pretrained(tmp_path)


def test_a_damaged_file_is_named(tmp_path) -> None:
    model_of().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for size in (len(whole) - 64, 200, 4):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"the weights in .* are damaged or cut short"):
            AUTO[True].from_pretrained(tmp_path)


@torch.no_grad()
def test_calls_that_cannot_be_answered_are_named() -> None:
    model, tokens = model_of(), tokens_of(2, 5)
    mask = torch.ones_like(tokens)
    with pytest.raises(InputError, match=r"mask must be \(batch, tokens\) = \(2, 5\), got \(2, 1, 5, 5\)"):
        model(tokens, attention_mask=torch.ones(2, 1, 5, 5, dtype=torch.bool))
    with pytest.raises(InputError, match=r"decode with a DynamicCache .* got a StaticCache of 3 layers"):
        model.generate(tokens, attention_mask=mask, max_new_tokens=3, cache_implementation="static")
    if torch.cuda.is_available() or not torch.backends.cuda.is_built():  # else making the cache fails
        with pytest.raises(InputError, match="not offloaded, got a DynamicCache"):
            model.generate(tokens, attention_mask=mask, max_new_tokens=3, cache_implementation="offloaded")
    foreign = transformers.DynamicCache()
    foreign.update(torch.zeros(2, 2, 1, 6), torch.zeros(2, 2, 1, 6), 0)
    with pytest.raises(InputError, match="or their own"):
        model(tokens, **{CACHE: foreign})
    with pytest.raises(InputError, match="position_ids must count on, or begin again at 0"):
        model(tokens, position_ids=torch.arange(1, 6)[None])
    restart = torch.tensor([[0, 1, 0, 1, 2]])
    assert getattr(model(tokens, position_ids=restart), CACHE) is None
    with pytest.raises(InputError, match="packed documents take no cache; pass use_cache=False"):
        model(tokens, position_ids=restart, use_cache=True)
    with pytest.raises(InputError, match="position_ids must count on"):
        model(tokens, position_ids=restart, **{CACHE: getattr(model(tokens), CACHE)})
    for inputs in ({}, {"input_ids": tokens, "inputs_embeds": torch.zeros(2, 5, 24)}):
        with pytest.raises(InputError, match="either input_ids or inputs_embeds"):
            model(**inputs)
    with pytest.raises(InputError, match="trained with the causal objective"):
        fresh(kind=GramianForMaskedLM)
    with pytest.raises(InputError, match="trained with the masked objective"):
        fresh(causal=False, kind=GramianForCausalLM)


@pytest.mark.parametrize("variant", ["tied", "untied"])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_a_vocabulary_can_be_resized(variant, causal, tmp_path) -> None:
    model, tokens = model_of("sas", causal, **VARIANTS[variant]), tokens_of(2, 9)
    before = model(tokens).logits
    model.resize_token_embeddings(40, mean_resizing=False)
    assert model.config.vocabulary == model.transformer.config.vocabulary == 40
    assert (model.transformer.head.weight is model.transformer.embedding.weight) is (variant == "tied")
    torch.testing.assert_close(model(tokens).logits[..., :29], before)
    model.save_pretrained(tmp_path)
    loaded = AUTO[causal].from_pretrained(tmp_path)
    new = torch.full((2, 3), 39)
    assert same(loaded, model, new)
    assert model(new).logits.shape == (2, 3, 40)
    if causal:
        assert model.generate(new, attention_mask=torch.ones_like(new), max_new_tokens=3).shape == (2, 6)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@torch.no_grad()
def test_a_folder_written_by_hand_opens(metadata, tmp_path) -> None:
    ours, ids = written_by_hand(tmp_path, metadata)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    sentences = ["A cat sat", "The rat, and that"]
    batch = tokenizer(sentences, return_tensors="pt", padding=True, padding_side="left")
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"][1].tolist() == ids.encode(sentences[1]).ids
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == sentences
    logits = copy.deepcopy(model)(batch["input_ids"]).logits
    assert torch.equal(logits, ours(batch["input_ids"]))
    assert model.generation_config.eos_token_id == model.config.pad_token_id == 0
    out = model.generate(**batch, max_new_tokens=5, do_sample=False)
    generate = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    got = generate(sentences[1], max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert got == tokenizer.decode(out[1], skip_special_tokens=True)


def test_the_configuration_has_every_field_of_a_transformer() -> None:
    ours, theirs = fields(TransformerConfig), {field.name: field for field in fields(GramianConfig)}
    for field in ours:
        assert str(theirs[field.name].type) == str(field.type)
    assert GramianConfig(vocabulary=29, width=24, heads=4).hidden_size == 24
    assert GramianConfig(num_labels=5).num_labels == 5


COMPILED = """
import torch
from gramian.interop.huggingface import GramianConfig, GramianForCausalLM, GramianForMaskedLM
from gramian.nn.blocks import BLOCKS
for name in BLOCKS:
    for kind in (GramianForCausalLM, GramianForMaskedLM):
        torch._dynamo.reset()
        causal = kind is GramianForCausalLM
        config = GramianConfig(
            vocabulary=29, context=16, width=24, depth=2, heads=4, block=name, causal=causal
        )
        model = kind(config)
        tokens = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(1))
        mask = torch.arange(9) >= torch.tensor([[0], [3]])
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for more in ({}, {"attention_mask": mask}):
            more |= {"labels": tokens, "use_cache": False}
            got, expected = compiled(tokens, **more), model(tokens, **more)
            torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(got.loss, expected.loss)
            got.loss.backward()
        print(name, causal, "whole")
"""


@pytest.mark.slow
def test_compiles_whole() -> None:
    """In a process of its own, where no annotation is checked; a graph break would raise."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("whole") == 2 * len(BLOCKS)
