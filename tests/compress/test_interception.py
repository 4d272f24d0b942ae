"""Nothing that a model computes passes by the simulation, and masks are told from sums."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from gramian.compress import calls, interception
from gramian.compress.interception import Interception, Point
from gramian.compress.quantise import Grid
from gramian.compress.recipe import Recipe
from gramian.compress.simulate import Simulation
from gramian.errors import InputError
from gramian.nn.transformer import TransformerConfig, build

transformers = pytest.importorskip("transformers")

WIDTH, TOKENS = 8, 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(forward: Callable[..., Tensor], *inputs: Any, **modules: Any) -> tuple[list[str], dict]:
    """Return the points of a model that is one function, in order, and the grids."""
    simulation = Simulation(model_of(forward, **modules), Recipe()).calibrate([inputs])
    return list(map(str, simulation.points)), {str(point): grid for point, grid in simulation.points.items()}


def model_of(function: Callable[..., Tensor], **modules: Any) -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in modules.items():
                setattr(self, name, part)

        def forward(self, inputs: tuple) -> Tensor:
            return function(self, *inputs)

    return Model().double().eval()


class Log(TorchFunctionMode):
    """Counts what a model computes, by the functions and shapes themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (F.linear, torch.addmm):
            self.counts["linear"] += 1
        elif func in (F.scaled_dot_product_attention, F.softmax, torch.softmax, Tensor.softmax):
            self.counts["probabilities"] += 1
        elif func in (F.layer_norm, F.rms_norm):
            self.counts["norm"] += 1
        elif func in (Tensor.add, Tensor.sub, torch.addcmul) and isinstance(out, Tensor):
            terms = [arg for arg in args if isinstance(arg, Tensor)]
            stream = [x for x in terms if x.is_floating_point() and x.numel() % (TOKENS * WIDTH) == 0]
            self.counts["sum"] += len(stream) > 1
        return out


def language_models() -> dict[str, nn.Module]:
    sizes = {"vocab_size": 30, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    heads = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2}
    gpt2 = transformers.GPT2Config(
        **sizes, n_embd=WIDTH, n_head=2, n_layer=3, n_positions=TOKENS, activation_function="gelu"
    )
    opt = transformers.OPTConfig(**sizes, **heads, word_embed_proj_dim=WIDTH, ffn_dim=12)
    bert = transformers.BertConfig(**sizes, **heads, intermediate_size=12)
    shape: Any = {"vocabulary": 30, "context": TOKENS, "width": WIDTH, "depth": 3, "heads": 2}
    return {
        "gpt2": transformers.GPT2LMHeadModel(gpt2),
        "opt": transformers.OPTForCausalLM(opt),
        "bert": transformers.BertForMaskedLM(bert),
        "pre_norm": build(TransformerConfig(**shape, norm="layernorm"), 0),
        "sas": build(TransformerConfig(**shape, block="sas", norm="layernorm", activation="gelu"), 0),
        "parallel": build(TransformerConfig(**shape, block="parallel", norm="layernorm"), 0),
    }


def counted(model: nn.Module, tokens: Tensor) -> tuple[Counter[str], Counter[str]]:
    """Return what a log counts of an exact forward pass, and how many points there are of the same kinds."""
    with torch.no_grad(), Log() as log:
        model(tokens)
    kinds = Simulation(model, Recipe()).calibrate([tokens]).kinds()
    found = Counter({kind: kinds[kind] for kind in log.counts})
    found["linear"] = kinds["weight"]
    return log.counts, found


MODELS = ["gpt2", "opt", "bert", "pre_norm", "sas", "parallel"]


@pytest.mark.parametrize("name", MODELS)
def test_no_linear_layer_softmax_norm_or_sum_is_missed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = language_models()[name].double().eval()
    tokens = torch.arange(2 * TOKENS).reshape(2, TOKENS) + 2
    there, found = counted(model, tokens)
    assert min(there[kind] for kind in ("linear", "probabilities", "norm", "sum")) > 2
    assert found == there
    shortened = {kind: value for kind, value in calls.KINDS.items() if kind not in ("add", "addcmul")}
    monkeypatch.setattr(interception, "KINDS", shortened)
    assert counted(model, tokens)[1] != there  # control: a kind that is not seen is noticed
    monkeypatch.setattr(interception, "KINDS", {**calls.KINDS, "linear": "plain", "addmm": "plain"})
    assert counted(model, tokens)[1] != there


def test_nothing_is_seen_outside_the_model_or_after_the_block() -> None:
    seen: list[Point] = []

    def quantise(point: Point, values: Tensor, rows: Any) -> None:
        seen.append(point)

    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).double(), normal(3, 3)
    with Interception(model, quantise, lambda name: True) as seeing:
        y = model(x) + F.linear(x, x) @ x
        assert [str(point) for point in seen] == ["0:input", "0:weight", "0:linear", "1:activation"]
        assert seeing.consumed == {Point("0", "linear")}
    model(x)
    assert len(seen) == 4
    assert torch.equal(y, model(x) + F.linear(x, x) @ x)


def test_inputs_off_the_grid_are_quantised_and_those_on_it_are_not_again() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        a = model.one(x)  # x comes from outside
        b = model.two(a.transpose(0, 1).contiguous().transpose(0, 1) * 0.5)  # on its grid, scaled
        c = model.three(a * b)  # a product of two is on none
        return model.four(torch.cat([a[..., :4], c[..., 4:]], -1)) - model.four(c.exp())

    layers = {name: nn.Linear(WIDTH, WIDTH) for name in ("one", "two", "three", "four")}
    names, _ = points(forward, normal(2, TOKENS, WIDTH), **layers)
    assert [name for name in names if name.endswith("input")] == ["one:input", "three:input", "four:input"]
    assert names[-1] == ":sum"


def test_masks_are_told_from_sums() -> None:
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.float64).masked_fill(
        hidden, torch.finfo(torch.float64).min
    )
    bias = normal(TOKENS, TOKENS)

    def attend(scores: Callable[[Tensor], Tensor]) -> tuple[list[str], dict]:
        def forward(model: Any, x: Tensor) -> Tensor:
            q, k, v = model.into(x).chunk(3, -1)
            return scores(q @ k.mT / 2).softmax(-1) @ v

        return points(forward, normal(2, TOKENS, WIDTH), into=nn.Linear(WIDTH, 3 * WIDTH))

    plain = ["into:input", "into:weight", "into:linear", ":scores", ":probabilities", ":context"]
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda s: s + mask,
        lambda s: (s + mask) + mask,
        lambda s: s.add_(mask),
        lambda s: s.masked_fill(hidden, -1e9),
        lambda s: torch.where(hidden, torch.tensor(-1e9, dtype=s.dtype), s),
        lambda s: torch.max(s + mask, torch.tensor(-1e30, dtype=s.dtype)) + mask,
        lambda s: s + torch.zeros_like(mask),
        lambda s: s + (bias + mask),
    ]
    for way in ways:
        names, grids = attend(way)
        assert names == plain
        assert 0 < grids[":scores"].scale < 1
    names, _ = attend(lambda s: s + bias)  # a bias that hides nothing is a sum
    assert names == [*plain[:4], ":sum", *plain[4:]]
    names, _ = attend(lambda s: (1.5 * (s + mask).softmax(-1) - 0.2).clamp(0, 1).log())
    assert names[3:5] == [":scores", ":probabilities[1]"]  # clipped softmax is quantised behind the clip
    names, _ = attend(lambda s: 5 * torch.tanh(s / 5) + mask)  # so is a soft cap an activation function
    assert names == [*plain[:4], ":activation", *plain[4:]]


def test_scores_with_a_bias_in_one_call_are_quantised_before_it() -> None:
    bias = -1e5 * torch.ones(TOKENS, TOKENS, dtype=torch.float64).triu(1)

    def forward(model: Any, x: Tensor) -> Tensor:
        q, k, v = model.into(x).chunk(3, -1)
        return torch.baddbmm(bias, q, k.mT, alpha=0.5).softmax(-1) @ v

    layer = nn.Linear(WIDTH, 3 * WIDTH)
    names, grids = points(forward, normal(2, TOKENS, WIDTH), into=layer)
    assert names[3:] == [":scores", ":probabilities", ":context"]
    assert grids[":scores"].scale < 1

    def apart(model: Any, x: Tensor) -> Tensor:
        q, k, v = model.into(x).chunk(3, -1)
        return (0.5 * torch.bmm(q, k.mT) + bias).softmax(-1) @ v

    x = (normal(2, TOKENS, WIDTH),)
    results = [Simulation(model_of(f, into=layer)).calibrate([x])(x) for f in (forward, apart)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"is_causal": True},
        {"attn_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(-1)},
        {"attn_mask": normal(TOKENS, TOKENS)},
        {"scale": 0.3},
        {"enable_gqa": True},
    ],
    ids=str,
)
def test_explicit_attention_is_the_fused_one(mask: dict) -> None:
    def forward(model: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **mask)

    key_heads = 2 if "enable_gqa" in mask else 4
    inputs = (
        normal(2, 4, TOKENS, WIDTH),
        normal(2, key_heads, TOKENS, WIDTH, seed=1),
        normal(2, key_heads, TOKENS, 3),
    )
    model = model_of(forward)
    with Interception(model, lambda point, values, rows: None, lambda name: True):
        explicit = model(inputs)
    torch.testing.assert_close(explicit, model(inputs), rtol=1e-12, atol=1e-12)


def test_sums_in_place_and_with_tables_and_without() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        stream = model.table(x)
        stream = stream + model.places[:TOKENS]  # a table of positions
        stream += model.layer(stream)
        stream = torch.addcmul(stream, model.gain, model.layer(stream))
        stream = stream + model.shift  # a bias: not a sum of activations
        return stream + 1

    parts = {
        "table": nn.Embedding(9, WIDTH), "layer": nn.Linear(WIDTH, WIDTH),
        "places": nn.Parameter(normal(9, WIDTH)), "gain": nn.Parameter(torch.tensor(0.5)),
        "shift": nn.Parameter(normal(WIDTH)),
    }  # fmt: skip
    names, grids = points(forward, torch.arange(TOKENS)[None], **parts)
    assert [name for name in names if "sum" in name] == [":sum", ":sum[1]", ":sum[2]"]
    assert grids[":sum"] != grids[":sum[1]"]
    assert names[:3] == ["table:embedding", ":sum", "layer:weight"]


def test_functions_of_every_kind() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        x = F.gelu(x @ model.matrix)
        x = F.layer_norm(x, (WIDTH,))
        x = torch.einsum("btd,ed->bte", x, model.matrix)
        x = F.relu_(model.conv(x.mT)).mT
        return model.double(x) if x.shape[-1] == 3 else model.prelu(torch.tanh(x))

    modules = {
        "matrix": nn.Parameter(normal(WIDTH, WIDTH)),
        "conv": nn.Conv1d(WIDTH, WIDTH, 1),
        "prelu": nn.PReLU(),
    }

    def embedded(model: Any, x: Tensor) -> Tensor:
        return forward(model, model.table(x))

    names, _ = points(embedded, torch.arange(TOKENS)[None], table=nn.Embedding(9, WIDTH), **modules)
    assert names == [
        "table:embedding", ":weight", ":activation", ":norm", ":weight[1]", ":linear[1]", "conv:weight",
        ":activation[1]", ":activation[2]", "prelu:activation",
    ]  # fmt: skip


@pytest.mark.skipif(not hasattr(torch.overrides, "redispatch_function"), reason="needs torch 2.13")
def test_the_encoder_of_torch_itself() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    x, padding = normal(2, TOKENS, WIDTH), torch.zeros(2, TOKENS, dtype=torch.bool)
    padding[0, 4:] = True
    batch = {"src": x, "src_key_padding_mask": padding}
    simulation = Simulation(model, Recipe(weight_bits=16, activation_bits=16)).calibrate([batch])
    assert simulation.kinds() == {
        "weight": 8, "linear": 6, "sum": 4, "gain": 4, "norm": 4, "scores": 2, "probabilities": 2,
        "context": 2, "activation": 2, "input": 1,
    }  # fmt: skip
    scores = [grid for point, grid in simulation.points.items() if point.kind == "scores"]
    assert all(isinstance(grid, Grid) and grid.scale < 1 for grid in scores)
    torch.testing.assert_close(simulation(**batch)[~padding], model(**batch)[~padding], rtol=1e-2, atol=1e-3)


def test_a_composite_that_cannot_be_seen_into_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.overrides, "redispatch_function", raising=False)
    model = nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True).double()
    with pytest.raises(InputError, match="'self_attn' computes by multi_head_attention_forward"):
        Simulation(model).calibrate([normal(2, TOKENS, WIDTH)])
    Simulation(model, Recipe(exact=("self_attn",))).calibrate([normal(2, TOKENS, WIDTH)])


def test_units_are_found_by_class() -> None:
    found = {
        type(module).__name__: calls.unit_of(module)
        for module in (
            nn.LayerNorm(3), nn.RMSNorm(3), nn.BatchNorm1d(3), nn.GELU(), nn.PReLU(), nn.Tanh(),
            nn.Softmax(-1), nn.Linear(3, 3), nn.MultiheadAttention(4, 2), nn.Sequential(nn.GELU()),
            nn.Identity(),
        )
    }  # fmt: skip
    assert [name for name, unit in found.items() if unit == "norm"] == ["LayerNorm", "RMSNorm", "BatchNorm1d"]
    assert [name for name, unit in found.items() if unit == "activation"] == ["GELU", "PReLU", "Tanh"]
    assert math.prod(unit is None for unit in list(found.values())[6:])
