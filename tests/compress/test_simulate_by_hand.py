"""The whole recipe for whole models with plain formulas, against the simulation."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gramian.compress.quantise import Grid
from gramian.compress.recipe import Recipe
from gramian.compress.simulate import WEIGHTS, Simulation
from quantised_models import DEPTH, HEADS, TOKENS, WIDTH, bert, gpt2, logits, made, opt, ours, tokens


class ByHand:
    """The recipe with plain formulas, told at every point where it is; it knows nothing of the simulation."""

    def __init__(self, state: dict[str, Tensor], percentile: float = 100.0):
        self.state, self.percentile = state, percentile
        self.ranges: dict[str, tuple[float, float]] = {}
        self.calibrating = True

    def at(self, place: str, x: Tensor) -> Tensor:
        if self.calibrating:
            rank = torch.tensor([1 - self.percentile / 100, self.percentile / 100], dtype=x.dtype)
            low, high = x.flatten().quantile(rank).tolist()
            if place in self.ranges:
                before = self.ranges[place]
                low, high = 0.9 * before[0] + 0.1 * low, 0.9 * before[1] + 0.1 * high
            self.ranges[place] = low, high
        low, high = (min(self.ranges[place][0], 0.0), max(self.ranges[place][1], 0.0))
        scale = (high - low) / 255
        zero = round(-low / scale)
        out = [min(255, max(0, round(v / scale) + zero)) - zero for v in x.flatten().tolist()]
        return scale * torch.tensor(out, dtype=x.dtype).reshape(x.shape)

    def weight(self, name: str) -> Tensor:
        weight = self.state[name]
        scale = max(abs(v) for v in weight.flatten().tolist()) / 127
        out = [min(127, max(-128, round(v / scale))) for v in weight.flatten().tolist()]
        return scale * torch.tensor(out, dtype=weight.dtype).reshape(weight.shape)

    def linear(self, name: str, x: Tensor, then: Callable | None = None, transposed: bool = False) -> Tensor:
        weight = self.weight(f"{name}.weight")
        y = x @ (weight if transposed else weight.T)
        y = y + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else y
        return self.at(name, y if then is None else then(y))

    def layer_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return self.at(name, normed * self.weight(f"{name}.weight") + self.state[f"{name}.bias"])

    def attention(self, name: str, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
        """Mix values (batch, tokens, width), scores quantised before hidden ones are."""
        heads = [x.unflatten(-1, (-1, q.shape[-1] // HEADS)).transpose(1, 2) for x in (q, k, v)]
        scores = self.at(f"{name}.scores", scale * heads[0] @ heads[1].mT)
        weights = scores.masked_fill(hidden, -math.inf).exp()
        weights = self.at(f"{name}.probabilities", weights / weights.sum(-1, keepdim=True))
        return self.at(f"{name}.context", (weights @ heads[2]).transpose(1, 2).flatten(2))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def future(mask: Tensor) -> Tensor:
    """What causality and padding hide: (batch, 1, T, T)."""
    later = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).triu(1)
    return later | (mask == 0)[:, None, None]


def gpt2_by_hand(hand: ByHand, x: Tensor, mask: Tensor) -> Tensor:
    table = hand.weight("transformer.wte.weight")
    x = hand.at("start", table[x] + hand.weight("transformer.wpe.weight")[: x.shape[1]])
    for block in (f"transformer.h.{index}" for index in range(DEPTH)):
        normed = hand.layer_norm(f"{block}.ln_1", x, 1e-5)
        q, k, v = hand.linear(f"{block}.attn.c_attn", normed, transposed=True).chunk(3, -1)
        mixed = hand.attention(f"{block}.attn", q, k, v, future(mask), (WIDTH // HEADS) ** -0.5)
        x = hand.at(f"{block}.middle", x + hand.linear(f"{block}.attn.c_proj", mixed, transposed=True))
        normed = hand.layer_norm(f"{block}.ln_2", x, 1e-5)
        inner = hand.linear(f"{block}.mlp.c_fc", normed, gelu_tanh, transposed=True)
        x = hand.at(f"{block}.end", x + hand.linear(f"{block}.mlp.c_proj", inner, transposed=True))
    return hand.at("lm_head", hand.layer_norm("transformer.ln_f", x, 1e-5) @ table.T)


def opt_by_hand(hand: ByHand, x: Tensor, mask: Tensor) -> Tensor:
    places = (mask.cumsum(1) * mask - 1) + 2
    table, positions = (hand.weight(f"model.decoder.embed_{part}.weight") for part in ("tokens", "positions"))
    x = hand.at("start", table[x] + positions[places])
    for block in (f"model.decoder.layers.{index}" for index in range(DEPTH)):
        normed = hand.layer_norm(f"{block}.self_attn_layer_norm", x, 1e-5)
        q, k, v = (hand.linear(f"{block}.self_attn.{part}_proj", normed) for part in "qkv")
        q = q * (WIDTH // HEADS) ** -0.5
        mixed = hand.attention(f"{block}.self_attn", q, k, v, future(mask), 1.0)
        x = hand.at(f"{block}.middle", x + hand.linear(f"{block}.self_attn.out_proj", mixed))
        normed = hand.layer_norm(f"{block}.final_layer_norm", x, 1e-5)
        inner = hand.linear(f"{block}.fc1", normed, torch.relu)
        x = hand.at(f"{block}.end", x + hand.linear(f"{block}.fc2", inner))
    return hand.at("lm_head", hand.layer_norm("model.decoder.final_layer_norm", x, 1e-5) @ table.T)


def bert_by_hand(hand: ByHand, x: Tensor, mask: Tensor) -> Tensor:
    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    names = ("word", "token_type", "position")
    words, types, places = (hand.weight(f"bert.embeddings.{name}_embeddings.weight") for name in names)
    summed = hand.at("types", words[x] + types[0])
    x = hand.layer_norm("bert.embeddings.LayerNorm", hand.at("places", summed + places[: x.shape[1]]), 1e-12)
    for block in (f"bert.encoder.layer.{index}" for index in range(DEPTH)):
        q, k, v = (hand.linear(f"{block}.attention.self.{part}", x) for part in ("query", "key", "value"))
        hidden = (mask == 0)[:, None, None]
        mixed = hand.attention(f"{block}.attention", q, k, v, hidden, (WIDTH // HEADS) ** -0.5)
        summed = hand.at(f"{block}.middle", x + hand.linear(f"{block}.attention.output.dense", mixed))
        x = hand.layer_norm(f"{block}.attention.output.LayerNorm", summed, 1e-12)
        inner = hand.linear(f"{block}.intermediate.dense", x, gelu)
        summed = hand.at(f"{block}.end", x + hand.linear(f"{block}.output.dense", inner))
        x = hand.layer_norm(f"{block}.output.LayerNorm", summed, 1e-12)
    x = hand.linear("cls.predictions.transform.dense", x, gelu)
    x = hand.layer_norm("cls.predictions.transform.LayerNorm", x, 1e-12)
    return hand.at("decoder", x @ words.T + hand.state["cls.predictions.bias"])


def ours_by_hand(hand: ByHand, x: Tensor, mask: Tensor) -> Tensor:
    def norm(name: str, x: Tensor) -> Tensor:
        gain = hand.weight(f"{name}.weight")
        return hand.at(name, x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain)

    table = hand.weight("embedding.weight")
    x = hand.at("start", table[x] + hand.weight("positions.weight")[: x.shape[1]])
    for block in (f"blocks.{index}" for index in range(DEPTH)):
        part = f"{block}.0.branch"
        normed = norm(f"{part}.0", x)
        q, k = hand.linear(f"{part}.1.query_key", normed).chunk(2, -1)
        v = hand.linear(f"{part}.1.value", normed)
        mixed = hand.attention(part, q, k, v, future(mask), (WIDTH // HEADS) ** -0.5)
        x = hand.at(f"{block}.middle", x + hand.linear(f"{part}.1.projection", mixed))
        part = f"{block}.1.branch"
        inner = hand.linear(f"{part}.1.up", norm(f"{part}.0", x), torch.relu)
        x = hand.at(f"{block}.end", x + hand.linear(f"{part}.1.down", inner))
    return hand.at("head", norm("norm", x) @ table.T)


@pytest.mark.parametrize(
    ("make", "by_hand", "padded", "percentile"),
    [
        (gpt2, gpt2_by_hand, False, 100.0),
        (gpt2, gpt2_by_hand, True, 100.0),
        (opt, opt_by_hand, False, 99.9),
        (opt, opt_by_hand, True, 100.0),
        (bert, bert_by_hand, True, 100.0),
        (ours, ours_by_hand, False, 100.0),
    ],
)
def test_equals_the_recipe_by_hand(make: Any, by_hand: Any, padded: bool, percentile: float) -> None:
    model = made(make)
    mask = torch.ones(3, TOKENS, dtype=torch.int64)
    if padded:
        mask[1, 6:] = 0
    # a value on one grid may lie exactly between two of the next, where rounding errors decide: not in these
    batches = [tokens(seed) for seed in range(10, 14)]
    hand = ByHand(model.state_dict(), percentile)
    for batch in batches[:3]:
        by_hand(hand, batch, mask)
    hand.calibrating = False
    expected = by_hand(hand, batches[3], mask)

    def given(batch: Tensor) -> Any:
        return batch if make is ours else {"input_ids": batch, "attention_mask": mask}

    simulation = Simulation(model, Recipe(percentile=percentile)).calibrate(map(given, batches[:3]))
    last = {"tokens": batches[3]} if make is ours else given(batches[3])
    got, exact = logits(simulation, **last), logits(model, **last)
    torch.testing.assert_close(got[mask > 0], expected[mask > 0], rtol=1e-9, atol=1e-9)
    assert (got - exact)[mask > 0].norm() > 1e-3 * exact[mask > 0].norm()  # control: not the exact model

    scales = [g.scale for p, g in simulation.points.items() if p.kind not in WEIGHTS and isinstance(g, Grid)]
    wanted = [(max(high, 0) - min(low, 0)) / 255 for low, high in hand.ranges.values()]
    assert sorted(scales) == pytest.approx(sorted(wanted), rel=1e-9)  # the same points, none more
