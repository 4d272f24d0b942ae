"""Rotary positions alone, and in decoders and encoders with padding, documents and caches."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.nn.attention import Attention
from gramian.nn.rotary import Rotary
from gramian.nn.transformer import Transformer, TransformerConfig, build

CONFIG = TransformerConfig(
    vocabulary=29, context=16, width=24, depth=3, heads=4, key_heads=2, positions="rotary"
)
SOME = ("pre_norm", "pre_norm_qk_norm", "sas", "e_spa")
some_blocks = pytest.mark.parametrize("name", SOME)
both = pytest.mark.parametrize("causal", [True, False])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens_of(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(29, shape, generator=torch.Generator().manual_seed(seed))


def model_of(name: str, causal: bool = True, **more: object) -> Transformer:
    model = build(replace(CONFIG, block=name, causal=causal, **more), seed=0).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def attentions(model: Transformer) -> list[Attention]:
    return [layer for layer in model.modules() if isinstance(layer, Attention)]


def unturned(model: Transformer) -> Transformer:
    model = copy.deepcopy(model)
    for layer in attentions(model):
        layer.rotary = None
    return model


def test_pairs_of_features_turn_like_complex_numbers() -> None:
    x, places = normal(2, 3, 5, 8), torch.tensor([0, 1, 4, 9, 1000])
    number = torch.complex(x[..., :4], x[..., 4:])
    frequency = torch.tensor([10000 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    turned = number * torch.exp(1j * places[:, None] * frequency)
    expected = torch.cat((turned.real, turned.imag), -1)
    got = Rotary(8)(x, places)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1), rtol=0, atol=1e-12)
    rows = torch.stack((places, places.flip(0)))
    torch.testing.assert_close(Rotary(8)(x, rows)[1], Rotary(8)(x[1:], places.flip(0))[0])
    assert Rotary(8)(x.bfloat16(), places).dtype == torch.bfloat16


def test_products_depend_on_the_distance_alone() -> None:
    q, k, rotary = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1), Rotary(8, base=50.0)
    at = {(i, j): (rotary(q, torch.tensor([i])) * rotary(k, torch.tensor([j]))).sum() for i, j in PLACES}
    torch.testing.assert_close(at[3, 1], at[12, 10], rtol=0, atol=1e-12)
    assert (at[3, 1] - at[1, 3]).abs() > 1e-3  # control: the order counts
    assert (at[3, 1] - at[5, 1]).abs() > 1e-3


PLACES = [(3, 1), (12, 10), (1, 3), (5, 1)]


def test_bad_input_is_named() -> None:
    for width in (0, 5):
        with pytest.raises(InputError, match=f"heads of an even width, got {width}"):
            Rotary(width)
    with pytest.raises(InputError, match="base of rotary positions must be above 1, got 1"):
        Rotary(4, base=1.0)


@some_blocks
@both
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_changes_nothing(name, causal, side) -> None:
    model, tokens = model_of(name, causal), tokens_of(3, 9)
    alone = model(tokens)
    places = {"left": range(4, 13), "right": range(9), "between": [0, 1, 4, 5, 6, 9, 10, 12, 13]}[side]
    padded, mask = tokens_of(3, 14, seed=5), torch.zeros(3, 14, dtype=torch.int64)
    padded[:, list(places)], mask[:, list(places)] = tokens, 1
    got = model(padded, mask)[:, list(places)]
    torch.testing.assert_close(got, alone, rtol=1e-10, atol=1e-10)


@some_blocks
@both
def test_order_is_known_by_the_rotation_alone(name, causal) -> None:
    model, tokens = model_of(name, causal), tokens_of(1, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5])
    packed = model(tokens, documents=documents)
    torch.testing.assert_close(packed[:, 4:], model(tokens[:, 4:]), rtol=1e-10, atol=1e-10)
    assert model.positions is None
    swapped = tokens[:, [1, 0, *range(2, 9)]]
    last, other = model(tokens)[:, -1], model(swapped)[:, -1]
    assert (last - other).abs().max() > 1e-4
    if not causal and name != "e_spa":  # control: without it an encoder cannot tell
        model = unturned(model)
        assert (model(tokens)[:, -1] - model(swapped)[:, -1]).abs().max() < 1e-10


@some_blocks
@pytest.mark.parametrize("padded", [False, True])
def test_cached_decoding_equals_the_full_pass(name, padded) -> None:
    model, tokens = model_of(name), tokens_of(3, 11)
    mask = torch.arange(11) >= torch.tensor([[0], [4], [2]]) if padded else None
    full, memory, parts, done = model(tokens, mask), model.memory(), [], 0
    with torch.no_grad():
        for size in (4, 1, 1, 1, 4):
            seen = None if mask is None else mask[:, : done + size]
            parts.append(model(tokens[:, done : done + size], seen, past=memory))
            done += size
    real = torch.ones(3, 11, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(torch.cat(parts, 1)[real], full[real], rtol=1e-10, atol=1e-10)


@both
def test_zero_queries_start_as_without_positions(causal) -> None:
    """With W_Q = 0 a prescribed attention does not see the rotation, until its queries have learnt."""
    model, tokens = build(replace(CONFIG, block="e_spa", causal=causal), 0).double(), tokens_of(2, 9)
    turned = model(tokens)
    torch.testing.assert_close(unturned(model)(tokens), turned, rtol=0, atol=1e-12)
    for layer in attentions(model):
        layer.query_key.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    assert (unturned(model)(tokens) - model(tokens)).abs().max() > 1e-3  # control


@torch.no_grad()
def test_a_hugging_face_model_keeps_them(tmp_path) -> None:
    pytest.importorskip("transformers")
    from gramian.interop.huggingface import GramianConfig, GramianForCausalLM

    shape = {"vocabulary": 29, "context": 16, "width": 24, "depth": 2, "heads": 4, "eos_token_id": None}
    model = GramianForCausalLM(GramianConfig(**shape, block="e_spa", positions="rotary")).eval()
    attention = model.transformer.blocks[0][1]
    assert (attention.query_key.weight[:24] == 0).all()
    assert attention.query_key.weight[24:].std().item() == pytest.approx(24**-0.5, rel=0.2)
    attention.query_key.weight.normal_(generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    loaded, tokens = GramianForCausalLM.from_pretrained(tmp_path), tokens_of(2, 9).clamp(min=1)  # 0 pads
    assert loaded.config.positions == "rotary"
    assert loaded.config.shape() == model.config.shape()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    out, greedy = model.generate(tokens, max_new_tokens=4, do_sample=False), tokens
    for _ in range(4):
        greedy = torch.cat((greedy, model.transformer(greedy)[:, -1:].argmax(-1)), 1)
    assert torch.equal(out, greedy)
