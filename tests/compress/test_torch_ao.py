"""Real integers: what torchao makes of a layer equals the formulas, and every layer gets it."""

import builtins
import copy
import logging
import statistics

import pytest
import torch
from torch import Tensor, nn

from gramian.compress import torch_ao
from gramian.compress.torch_ao import (
    KINDS,
    convert,
    converted,
    restore,
    seconds,
    size,
    stored,
    tied,
    times_faster,
    with_linears,
)
from gramian.errors import InputError, MissingExtraError
from gramian.nn.transformer import Transformer, TransformerConfig, build

torch_ao.quieten()
pytest.importorskip("torchao")
transformers = pytest.importorskip("transformers")
WIDTH, VOCABULARY, SPECIAL = 64, 96, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Logits(nn.Module):
    """One of ours, called as transformers' models are."""

    def __init__(self) -> None:
        super().__init__()
        shape = TransformerConfig(
            vocabulary=VOCABULARY, context=32, width=WIDTH, depth=2, heads=4, block="sas_p"
        )
        self.transformer: Transformer = build(shape, seed=0)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.transformer(input_ids)


def _of(name: str) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, **SPECIAL}
    t, shared = transformers, {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
    if name == "ours":
        return Logits()
    if name == "gpt2":
        config = t.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=32, **SPECIAL
        )
        return t.GPT2LMHeadModel(config)
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**shared, **sizes, intermediate_size=96))
    if name == "opt":
        return t.OPTForCausalLM(t.OPTConfig(**shared, **sizes, ffn_dim=96, word_embed_proj_dim=WIDTH))
    return t.BertForMaskedLM(t.BertConfig(**shared, **sizes, intermediate_size=96))


LINEARS = {"gpt2": 8, "llama": 15, "opt": 12, "bert": 13, "ours": 7}
"""Linear layers beyond a tied head, by hand: 4 a layer of GPT-2; 7 of Llama, and its head; 6 of OPT and BERT,
and BERT's transform; ours: queries with keys, up and down a layer, and a value or projection."""


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    made = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in LINEARS:
            made[name] = _of(name).eval()
            for parameter in made[name].parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape)
    return made


def logits(model: nn.Module) -> Tensor:
    tokens = torch.randint(VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(input_ids=tokens)
    return output if isinstance(output, Tensor) else output.logits


def loudest_positive(rows: Tensor) -> Tensor:
    """Turn rows so that their largest entry is positive: −127.5 could be rounded either way."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign()


def weight(outputs: int = 48, inputs: int = 64, seed: int = 0) -> Tensor:
    drawn = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    return loudest_positive(drawn * torch.logspace(-2, 1, outputs)[:, None])


def layer(values: Tensor) -> nn.Linear:
    linear = nn.Linear(values.shape[1], values.shape[0])
    linear.weight.data = values
    return linear


def int8_rows(values: Tensor) -> Tensor:
    """Each row on −128 … 127 times the largest magnitude over 127.5, by loops."""
    rows = []
    for row in values.double():
        scale = row.abs().max() / 127.5
        rows.append(torch.stack([torch.round(x / scale).clamp(-128, 127) * scale for x in row]))
    return torch.stack(rows)


def int4_groups(values: Tensor, group: int) -> Tensor:
    """Each group of a row on its sixteen equally spaced values from smallest to largest, by loops."""
    rows = []
    for row in values.double():
        parts = []
        for part in row.split(group):
            low, high = part.min(), part.max()
            step = (high - low) / 15
            parts.append(low + step * torch.round((part - low) / step))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def effective(linear: nn.Module, inputs: int) -> Tensor:
    """The matrix that a layer really multiplies by, read off its outputs."""
    with torch.no_grad():
        return (linear(torch.eye(inputs)) - linear(torch.zeros(1, inputs))).T.double()


def test_int8_weights_are_those_of_the_formula() -> None:
    values = weight()
    for kind in ("int8_weight", "int8_dynamic"):
        made = convert(layer(values), kind)
        found = made.weight.dequantize().double()
        halved = kind == "int8_dynamic" and made.weight.reduce_range
        if not halved:
            assert found == pytest.approx(int8_rows(values), rel=1e-5, abs=1e-7)
        assert not torch.allclose(found, values.double(), rtol=1e-5)  # something was rounded
    # A scale for the tensor instead would lose the quiet rows; one for each row does not.
    quiet = (found[0] - values[0].double()).norm() / values[0].norm()
    scale = values.abs().max() / 127.5
    assert quiet < 0.02 < 0.5 < (torch.round(values[0] / scale) * scale - values[0]).norm() / values[0].norm()


def test_the_layer_multiplies_by_the_weights_of_the_formula() -> None:
    values = weight()
    int8 = effective(convert(layer(values), "int8_weight"), 64)
    assert int8 == pytest.approx(int8_rows(values), rel=1e-4, abs=1e-6)
    for group in (32, 64):
        int4 = effective(convert(layer(values), "int4_weight", group=group), 64)
        assert (int4 - int4_groups(values, group)).abs().max() < 1e-4 * values.abs().max()
        assert (int4 - int4_groups(values, 96 - group)).norm() > 0.01 * values.norm()  # the other group


def test_int8_dynamic_rounds_each_token_by_itself() -> None:
    values, x = weight(), weight(5, 64, seed=3)
    made = convert(layer(values), "int8_dynamic")
    if made.weight.reduce_range:
        pytest.skip("this CPU has no integer dot products: torchao takes half the range")
    x[1] *= 1000  # a loud token changes no other
    with torch.no_grad():
        found = (made(x) - made.bias).double()
    wanted = int8_rows(x) @ int8_rows(values).T
    assert ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 1e-5
    exact = x.double() @ values.double().T
    assert ((found - exact).norm(dim=1) / exact.norm(dim=1)).min() > 1e-4


@every_kind
@pytest.mark.parametrize("name", LINEARS)
def test_every_linear_layer_of_a_model_is_converted(models, name, kind) -> None:
    model = models[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exact = logits(model)
    made = convert(model, kind)
    report = converted(made)
    assert len(report.layers) == LINEARS[name]
    assert list(report.exact) == tied(model)
    entries = sum(
        made.get_submodule(layer).in_features * made.get_submodule(layer).out_features
        for layer in report.layers
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    assert report.share == pytest.approx(entries / total)
    assert report.share > 0.8
    error = float((logits(made) - exact).norm() / exact.norm())
    assert 1e-4 < error < {"int8_dynamic": 0.05, "int8_weight": 0.04, "int4_weight": 0.4}[kind]
    assert not made.training
    assert torch.equal(logits(model), exact)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_torchao_alone_leaves_gpt2_as_it_is(models) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    alone = copy.deepcopy(models["gpt2"])
    torchao.quantize_(alone.transformer, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    assert converted(alone).share == 0
    assert converted(convert(models["gpt2"], "int8_weight")).share > 0.8


def test_conv1d_as_a_linear_layer_computes_the_same(models) -> None:
    model = copy.deepcopy(models["gpt2"]).double()
    rewritten = with_linears(model)
    assert not any(type(module).__name__ == "Conv1D" for module in rewritten.modules())
    assert logits(rewritten) == pytest.approx(logits(model), abs=1e-10)
    block = rewritten.transformer.h[0]
    block.attn.c_proj.weight = nn.Parameter(block.attn.c_proj.weight.T)  # square: only the numbers can tell
    assert (logits(rewritten) - logits(model)).abs().max() > 1e-3


def test_exact_layers_stay_exact_and_a_tied_head_can_be_converted(models) -> None:
    model = models["opt"]
    kept = convert(model, "int8_weight", exact=("lm_head", "fc1", "model.decoder.layers.1.fc2"))
    exact = ("model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2")
    assert set(converted(kept).exact) == {"lm_head", *exact}
    assert torch.equal(kept.get_submodule(exact[2]).weight, model.get_submodule(exact[2]).weight)
    whole = convert(model, "int8_weight", exact=())
    assert converted(whole).exact == ()
    embedding = whole.get_submodule("model.decoder.embed_tokens").weight
    assert torch.equal(embedding, model.get_submodule("model.decoder.embed_tokens").weight)
    head = whole.get_submodule("lm_head").weight.dequantize()
    steps = embedding.abs().amax(1, keepdim=True) / 127.5
    assert 0.4 < ((head - embedding).abs() / steps).max() < 0.501


def test_size_is_counted_by_hand(models) -> None:
    linear = layer(weight(48, 64))
    assert size(linear) == 4 * (48 * 64 + 48)
    assert size(convert(linear, "int8_weight")) == 48 * 64 + 4 * 48 + 48 + 4 * 48  # q, scales, zeros, bias
    assert size(convert(linear, "int4_weight")) == 48 * 64 // 2 + 2 * 4 * 48 * 2 + 4 * 48
    plain = sum(4 * parameter.numel() for parameter in models["opt"].parameters())
    assert size(models["opt"]) == plain  # a tied head counts once
    head = VOCABULARY * WIDTH + 5 * VOCABULARY
    kept, whole = convert(models["opt"], "int8_weight"), convert(models["opt"], "int8_weight", exact=())
    assert size(whole) == size(kept) + head


@every_kind
def test_what_is_stored_makes_the_same_model_again(models, kind) -> None:
    made, other = convert(models["llama"], kind), convert(_of("llama"), kind)
    tensors = {name: tensor.clone() for name, tensor in stored(made).items()}
    assert not torch.equal(logits(other), logits(made))
    restore(other, tensors)
    assert torch.equal(logits(other), logits(made))
    name = next(name for name in tensors if name.endswith("qdata"))
    for spoiled, what in (
        ({key: value for key, value in tensors.items() if key != name}, f"lacks {name}"),
        ({**tensors, "more": torch.ones(1)}, "also holds more"),
        ({**tensors, name: tensors[name][1:].clone()}, f"has {name} as"),
        ({**tensors, name: tensors[name].to(torch.int32)}, f"has {name} as int32"),
    ):
        with pytest.raises(InputError, match=what):
            restore(other, spoiled)


def test_half_precision_models_are_converted(models) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = copy.deepcopy(models["llama"]).to(dtype)
        for kind in KINDS:
            found = logits(convert(model, kind))
            assert found.dtype == dtype
            assert torch.isfinite(found).all()


def test_refusals_name_the_layer() -> None:
    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    broken = layer(weight())
    broken.weight.data[3, 4] = torch.nan
    cases = (
        (nn.Sequential(layer(weight())), "int3", "unknown kind 'int3'; accepted are int8_dynamic"),
        (nn.Sequential(nn.ReLU()), "int8_weight", "no linear layer to convert"),
        (nn.Sequential(layer(weight().double())), "int8_weight", "'0' .*float64"),
        (nn.Sequential(broken), "int8_dynamic", "'0' .*not finite"),
        (nn.Sequential(Odd(4, 4)), "int8_dynamic", "'0' .*Odd changes"),
        (nn.Sequential(layer(weight(48, 40))), "int4_weight", "'0' .*40 inputs"),
        (nn.Sequential(layer(weight(40, 64))), "int4_weight", "'0' .*40 outputs"),
        (convert(nn.Sequential(layer(weight())), "int8_weight"), "int8_weight", "'0' .*already"),
    )
    for model, kind, said in cases:
        with pytest.raises(InputError, match=said):
            convert(model, kind)
    with pytest.raises(InputError, match="collection of layer names"):
        convert(layer(weight()), "int8_weight", exact="head")
    with pytest.raises(InputError, match="no linear layer to convert beyond"):
        convert(nn.Sequential(layer(weight())), "int8_weight", exact=("0",))
    with pytest.raises(InputError, match="32, 64 or 128"):
        convert(nn.Sequential(layer(weight())), "int4_weight", group=16)
    assert converted(
        convert(nn.Sequential(Odd(4, 4), layer(weight())), "int8_weight", exact=("0",))
    ).layers == ("1",)


def test_a_layer_that_torchao_passes_over_is_noticed(monkeypatch) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    monkeypatch.setattr(torchao, "quantize_", lambda *args, **kwargs: None)
    with pytest.raises(InputError, match="left layer '0' as it was"):
        convert(nn.Sequential(layer(weight())), "int8_weight")


def test_without_torchao_the_extra_is_named(monkeypatch) -> None:
    plain = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name.split(".")[0] == "torchao":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"gramian\[quant\]"):
        convert(layer(weight()), "int8_weight")


def test_only_the_known_messages_of_the_import_are_dropped(caplog) -> None:
    torch_ao.quieten()
    torch_ao.quieten()
    logger = logging.getLogger("torchao")
    with caplog.at_level(logging.WARNING):
        logger.propagate, before = True, logger.propagate
        logger.warning("Failed to load /somewhere/torchao/_C_mxfp8.so: no CUDA")
        logger.warning("something that matters")
        logger.propagate = before
    assert [record.getMessage() for record in caplog.records] == ["something that matters"]
    assert logger.filters.count(torch_ao._EXPECTED) == 1


def test_speed_is_taken_in_turn() -> None:
    calls: list[str] = []

    def way(name: str):
        return lambda x: calls.append(name)

    taken = seconds({"a": way("a"), "b": way("b")}, {"x": torch.ones(1)}, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert [len(times) for times in taken.values()] == [3, 3]
    ratios = times_faster({"a": [1.0, 4.0, 9.0], "b": [2.0, 2.0, 3.0]}, than="a")
    assert ratios == {"a": 1.0, "b": statistics.median([0.5, 2.0, 3.0])}
