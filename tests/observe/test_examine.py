"""Models of transformers, built here with random weights, against all their activations in memory."""

import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from gramian.errors import InputError
from gramian.observe import Observed, Peak, Probe, examine, observe
from gramian.observe.neurons import outlier_neurons

transformers = pytest.importorskip("transformers")

WIDTH, LENGTH, VOCABULARY = 16, 9, 40
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """An architecture, and where its parts are."""

    config: Any
    model: Any
    layers: str
    embedding: str
    written: str
    """The parameter whose entries, or rows, are neurons of what the first layer writes."""


SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4}
KINDS = {
    "gpt2": Kind(
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=16, n_embd=WIDTH, n_layer=3, n_head=4
        ),
        lambda config: transformers.GPT2LMHeadModel(config),
        "transformer.h",
        "transformer.wte",
        "transformer.h.0.mlp.c_proj.bias",
    ),
    "opt": Kind(
        lambda: transformers.OPTConfig(
            **SIZES, ffn_dim=32, max_position_embeddings=16, word_embed_proj_dim=WIDTH
        ),
        lambda config: transformers.OPTForCausalLM(config),
        "model.decoder.layers",
        "model.decoder.embed_tokens",
        "model.decoder.layers.0.fc2.bias",
    ),
    "llama": Kind(
        lambda: transformers.LlamaConfig(
            **SIZES, intermediate_size=32, num_key_value_heads=2, max_position_embeddings=16
        ),
        lambda config: transformers.LlamaForCausalLM(config),
        "model.layers",
        "model.embed_tokens",
        "model.layers.0.mlp.down_proj.weight",
    ),
    "bert": Kind(
        lambda: transformers.BertConfig(**SIZES, intermediate_size=32, max_position_embeddings=16),
        lambda config: transformers.BertForMaskedLM(config),
        "bert.encoder.layer",
        "bert.embeddings.word_embeddings",
        "bert.encoder.layer.0.output.LayerNorm.bias",
    ),
}
every_kind = pytest.mark.parametrize("name", KINDS)


def build(name: str, implementation: str = "sdpa") -> Any:
    """A model with all parameters away from their start, so that no two tokens or heads are alike."""
    config = KINDS[name].config()
    config._attn_implementation = implementation
    model = KINDS[name].model(config).double().eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
            parameter += parameter.ndim == 1
    return model


def batches(side: str = "right", sequences: int = 6, size: int = 2) -> list[Batch]:
    draw = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, LENGTH + 1, (sequences, 1), generator=draw)
    lengths[0] = LENGTH
    mask = (torch.arange(LENGTH) < lengths).long()
    mask = {"right": mask, "left": mask.flip(1), "none": torch.ones_like(mask)}[side]
    ids = torch.randint(2, VOCABULARY - 1, mask.shape, generator=draw)
    return [
        {"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(size), mask.split(size), strict=True)
    ]


def streams(name: str, model: Any, text: list[Batch]) -> dict[str, list[Tensor]]:
    """The streams of all batches, as the model itself returns them, and what its last layer writes."""
    layers = model.get_submodule(KINDS[name].layers)
    sites = [f"{KINDS[name].layers}.{i}" for i in range(len(layers))]
    found: dict[str, list[Tensor]] = {site: [] for site in [*sites, f"{sites[-1]}.output"]}

    def written(module: nn.Module, args: Any, output: Any) -> None:
        found[f"{sites[-1]}.output"].append(output[0] if isinstance(output, tuple) else output)

    handle = layers[-1].register_forward_hook(written)
    with torch.no_grad():
        for batch in text:
            entering = model(**batch, output_hidden_states=True).hidden_states
            for site, x in zip(sites, entering[: len(sites)], strict=True):
                found[site].append(x)
    handle.remove()
    return found


def first_positions(mask: Tensor) -> list[int]:
    return [row.index(1) for row in mask.tolist()]


@every_kind
@pytest.mark.parametrize(("side", "centre"), [("right", False), ("left", False), ("left", True)])
def test_streams_equal_all_activations_in_memory(name: str, side: str, centre: bool):
    model, text = build(name), batches(side)
    got = examine(model, text, centre=centre, attentions=(), top=2)
    mask = torch.cat([batch["attention_mask"] for batch in text])
    rest = mask.clone()
    rest[range(len(mask)), first_positions(mask)] = 0
    memory = {site: torch.cat(parts) for site, parts in streams(name, model, text).items()}
    assert list(got.readings) == list(got.without_first) == list(memory)
    for site, stream in memory.items():
        x = oracles.centred(stream) if centre else stream
        want, without = (oracles.moment_readings(x[kept.bool()]) for kept in (mask, rest))
        assert got.readings[site] == pytest.approx(want, rel=1e-10)
        assert got.without_first[site] == pytest.approx(without, rel=1e-10)
        if site == f"{KINDS[name].layers}.1":  # controls: with padding, and without column 0
            padded, column = (
                oracles.moment_readings(y) for y in (x.flatten(0, 1), x[:, 1:][mask[:, 1:] == 1])
            )
            assert got.readings[site] != pytest.approx(padded, rel=1e-4)
            assert (got.without_first[site] == pytest.approx(column, rel=1e-10)) == (side == "right")
        squares = x[mask.bool()].square().mean(0)
        shares = (squares / squares.mean()).sort(descending=True)
        assert [neuron for neuron, _ in got.neurons[site]] == shares.indices[:2].tolist()
        assert [share for _, share in got.neurons[site]] == pytest.approx(
            shares.values[:2].tolist(), rel=1e-10
        )
        hidden = torch.where(mask[..., None].bool(), x, 0)
        sequence, position, neuron = (int(i) for i in (hidden.abs() == hidden.abs().max()).nonzero()[0])
        value = x[sequence, position, neuron].item()
        assert got.peaks[site].value == pytest.approx(value, rel=1e-12)
        assert got.peaks[site] == Peak(got.peaks[site].value, sequence, position, neuron)
        assert 0 <= got.trace_error[site] < 1e-13


@every_kind
@pytest.mark.parametrize(
    ("implementation", "side"),
    [("sdpa", "right"), ("sdpa", "left"), ("sdpa", "none"), ("eager", "right"), ("eager", "left")],
)
def test_attentions_equal_the_matrices_in_memory(name: str, implementation: str, side: str):
    text = batches(side, sequences=4)
    # In float64 the explicit attention of transformers makes padding on the left NaN, and passes it on.
    dtype = torch.float32 if side == "left" else torch.float64
    model, told = build(name, implementation).to(dtype), build(name, "eager").to(dtype)
    got = examine(model, text, sequences=2).readings
    sites = [site for site in got if "attention_entropy" in got[site]]
    assert len(sites) == 3
    assert all(site.startswith(f"{KINDS[name].layers}.{i}.") for i, site in enumerate(sites))
    rows: list[list[Tensor]] = [[], [], []]
    firsts: list[list[Tensor]] = [[], [], []]
    for batch in text:
        with torch.no_grad():
            attentions = told(**batch, output_attentions=True).attentions
        first = first_positions(batch["attention_mask"])
        for layer, weights in enumerate(attentions):
            for b, i in batch["attention_mask"].nonzero().tolist():
                rows[layer].append(weights[b, :, i].double())
                firsts[layer].append(weights[b, :, i, first[b]].double())
    for layer, site in enumerate(sites):
        a, sinks = torch.stack(rows[layer]), torch.stack(firsts[layer]).mean(0)
        entropy = -torch.where(a > 0, a * a.log(), 0).sum(-1).mean().item()
        want = {"attention_entropy": entropy, "sink_rate": (sinks > 0.3).double().mean().item()}
        assert got[site] == pytest.approx(want, abs=1e-5 if side == "left" else 1e-6)
        assert torch.allclose(a[..., 0].mean(0), sinks) == (side != "left")  # control: column 0


@every_kind
def test_a_planted_neuron_and_its_layer_are_found(name: str):
    kind, text = KINDS[name], batches("right")
    sites = [*(f"{kind.layers}.{i}" for i in range(3)), f"{kind.layers}.2.output"]

    def kurtoses(got: Observed) -> list[float]:
        return [got.readings[site]["neuron_kurtosis"] for site in sites]

    model = build(name)
    before = examine(model, text, attentions=())
    with torch.no_grad():
        model.get_parameter(kind.written)[11] += 3e4
    after = examine(model, text, attentions=())
    assert kurtoses(after)[0] == kurtoses(before)[0] < 4
    assert after.neurons[sites[1]][0] == (11, pytest.approx(WIDTH, rel=0.01))
    assert kurtoses(after)[1] == pytest.approx(WIDTH, rel=0.01)
    assert after.peaks[sites[1]].neuron == 11
    assert before.neurons[sites[1]][0][1] < 6
    assert before.peaks[sites[1]].value < 1e3


@every_kind
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_planted_token_is_found(name: str, side: str):
    kind, text, model = KINDS[name], batches(side), build(name)
    site = f"{kind.layers}.0"
    rare = VOCABULARY - 1  # in no batch
    with torch.no_grad():
        model.get_submodule(kind.embedding).weight[rare, 5] = -4e3
        if name == "bert":  # where a norm follows, which takes a single entry to √(d−1) and all others below
            model.bert.embeddings.LayerNorm.weight.fill_(1)
            model.bert.embeddings.LayerNorm.bias.fill_(0)
    before = examine(model, text, attentions=()).peaks[site]
    padding = text[2]["attention_mask"][1].tolist().index(0)
    text[2]["input_ids"][1, padding] = rare
    assert examine(model, text, attentions=()).peaks[site] == before  # padding counts nowhere
    position = text[1]["attention_mask"][0].nonzero()[-1].item()
    text[1]["input_ids"][0, position] = rare
    after = examine(model, text, attentions=()).peaks[site]
    assert (after.sequence, after.position, after.neuron) == (2, position, 5)
    assert after.value < 0
    assert abs(after.value) > abs(before.value)
    assert (before.sequence, before.position, before.neuron) != (2, position, 5)


class Living(TorchDispatchMode):
    """Counts the tensors that operations have made and that somebody still holds."""

    def __init__(self):
        super().__init__()
        self.made: list[weakref.ref] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else (result,)
        self.made.extend(weakref.ref(x) for x in found if isinstance(x, Tensor))
        return result

    def count(self) -> int:
        self.made = [reference for reference in self.made if reference() is not None]
        return len(self.made)


@pytest.mark.parametrize("leaky", [False, True])
def test_nothing_of_a_batch_outlives_it(leaky: bool):
    """Leaky is the control: it keeps one tensor of each batch."""
    model, seen, alive, counts, leaked = build("gpt2"), [], [], [], []
    batch = batches("left")[1]

    def remember(module: nn.Module, args: tuple, output: Any) -> None:
        found = [x for x in (*args, *(output if isinstance(output, tuple) else (output,))) if x is not None]
        seen.extend(weakref.ref(x) for x in found)
        if leaky and module is model.transformer.h[1]:
            leaked.extend(found[:1])

    handles = [m.register_forward_hook(remember) for m in model.transformer.h.modules()]
    with Living() as living:

        def text() -> Iterator[Batch]:
            for _ in range(7):
                alive.append(sum(reference() is not None for reference in seen))
                counts.append(living.count())
                yield batch

        examine(model, text())
    for handle in handles:
        handle.remove()
    assert len(seen) > 7 * 30
    assert (alive == [0] * 7) != leaky
    assert counts[2] > 50  # the sums
    assert (counts[6] <= counts[2]) != leaky


def test_tensors_rows_and_no_layers():
    x = torch.randn(5, 4, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.Sequential(nn.Linear(WIDTH, 3)).double().train()
    with pytest.raises(InputError, match="no ModuleList"):
        examine(model, [x])
    got = examine(model, [x[:2], x[2:]], streams="0")
    assert model.training
    assert list(got.readings) == ["0", "0.output"]
    assert got.readings["0"] == pytest.approx(oracles.moment_readings(x.flatten(0, 1)), rel=1e-10)
    assert got.without_first["0"] == pytest.approx(oracles.moment_readings(x[:, 1:].flatten(0, 1)), rel=1e-10)
    assert [len(neurons) for neurons in got.neurons.values()] == [3, 3]
    rows = examine(model, [x[:, 0], x[:, 1]], streams="0", top=99)
    assert rows.readings["0"] == pytest.approx(oracles.moment_readings(x[:, :2].flatten(0, 1)), rel=1e-10)
    assert rows.without_first == {}
    assert len(rows.neurons["0"]) == WIDTH
    assert rows.peaks["0"].position == 0


def test_observe_gives_the_readings_of_examine():
    model, text = build("bert"), batches("left")
    got = observe(model, text, streams="bert.encoder.layer.*", attentions="calls")
    want = examine(model, text).readings
    assert got.keys() == want.keys()
    for site in want:
        assert got[site] == pytest.approx(want[site], rel=1e-12)
    skipped = observe(model, text, streams="bert.encoder.layer.*", skip_first_token=True)
    without = examine(model, text).without_first
    for site in without:
        assert skipped[site] == pytest.approx(without[site], rel=1e-12)


def test_packed_sequences_and_floating_masks_are_masks():
    model, text = build("gpt2"), batches("right")
    want = examine(model, text, attentions=()).readings
    for dtype, factor in ((torch.bool, 1), (torch.float64, 1), (torch.long, 2)):
        cast = [{**batch, "attention_mask": (factor * batch["attention_mask"]).to(dtype)} for batch in text]
        got = examine(Renamed(model), cast, streams="model.transformer.h.*", attentions=()).readings
        assert next(iter(got.values())) == want["transformer.h.0"]


class Renamed(nn.Module):
    """Takes the mask and keeps it from the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids).logits


def test_mistakes_are_named():
    model, text = build("gpt2"), batches("right")
    with pytest.raises(InputError, match="top must be at least 1, not 0"):
        examine(model, text, top=0)
    with pytest.raises(InputError, match="sequences must be at least 1"):
        examine(model, text, sequences=0)
    with pytest.raises(InputError, match="nothing was read"):
        examine(model, [])
    wide = text[0] | {"attention_mask": text[0]["attention_mask"][:, None]}
    with pytest.raises(InputError, match=r"attention_mask must be a matrix .*, not \(2, 1, 9\)"):
        examine(model, [wide])
    with pytest.raises(InputError, match=r"must be a matrix .*, not list"):
        observe(model, [text[0] | {"attention_mask": [[1]]}], streams="transformer.h.*")
    with pytest.raises(InputError, match=r"mask of shape \(2, 5\)"):
        short = text[0] | {"attention_mask": text[0]["attention_mask"][:, :5]}
        examine(Renamed(model), [short], streams="model.transformer.h.*")


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (2, 3, 4, 5, 5), (4,)])
def test_images_between_convolutions_are_no_stream(shape: tuple[int, ...]):
    model = nn.Sequential(nn.Identity())
    found = re.escape(f"of shape {shape}")
    with pytest.raises(InputError, match=rf"at 0 must be \(batch, tokens, d\) or rows .*{found}"):
        examine(model, [torch.zeros(shape)], streams="0")
    examine(model, [torch.ones(2, 25, 3)], streams="0")


def test_a_sample_tells_neurons_and_peaks_too():
    model, (text, *_) = build("llama"), batches("left", size=6)
    want = examine(model, [text], attentions=())
    with torch.no_grad(), Probe(model, "model.layers.*").sample(0, text["attention_mask"]) as sample:
        model(**text)
    assert sample is not None
    assert sample.peaks() == want.peaks
    assert outlier_neurons(sample.streams["model.layers.1"], 3) == [
        (neuron, pytest.approx(share, rel=1e-12)) for neuron, share in want.neurons["model.layers.1"]
    ]


def test_the_example_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]):
    page = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text(encoding="utf-8")
    (program,) = (
        body
        for body in re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
        if "import examine" in body
    )
    exec(compile(program, "frameworks.md", "exec"), {})
    assert "model.layers.1.output: kurtosis" in capsys.readouterr().out


@pytest.mark.parametrize("block", ["pre_norm", "sas", "outlier_protected"])
def test_padding_on_the_left_changes_nothing_in_a_model_that_lays_tokens_out_anew(block: str):
    """Models of this library move padding to the end inside attention, which then tells what is real."""
    huggingface_models = pytest.importorskip("huggingface_models")
    model = huggingface_models.model_of(block, dtype=torch.float64)
    ids, mask = huggingface_models.tokens_of(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    padded = examine(model, [{"input_ids": ids, "attention_mask": mask}], sequences=2)
    apart = examine(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:, 4:]}])
    assert padded.readings.keys() == apart.readings.keys()
    assert sum("attention_entropy" in values for values in padded.readings.values()) == 3
    for site in apart.readings:
        assert padded.readings[site] == pytest.approx(apart.readings[site], rel=1e-10)
    for site in apart.without_first:
        assert padded.without_first[site] == pytest.approx(apart.without_first[site], rel=1e-10)
    whole = examine(model, [{"input_ids": ids}], sequences=2).readings  # control
    assert any(whole[site] != pytest.approx(apart.readings[site], rel=1e-3) for site in whole)
