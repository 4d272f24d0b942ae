"""What a parameter is, by its name: its layer, its kind, and how a fused matrix of Q, K and V divides."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

KINDS = (
    ("norm", r"(\w*norm\w*|\w*layernorm|ln_?\w*|bn\d*|batch_?norm\d*)"),
    ("embedding", r"(wte|wpe|\w*embed\w*|positions?)"),
    ("head", r"(lm_head|embed_out|classifier|head|score|decoder|fc)"),
    ("query", r"(q|wq|query|q_proj|q_lin|to_q|query_proj)"),
    ("key", r"(k|wk|key|k_proj|k_lin|to_k|key_proj)"),
    ("value", r"(v|wv|value|v_proj|v_lin|to_v|value_proj)"),
    ("projection", r"(o_proj|out_proj|wo|out_lin|to_out|projection)"),
    ("mlp", r"(\w*mlp\w*|up|down|gate|up_proj|down_proj|gate_proj|c_fc|fc\d+|dense_\w+|w\d|lin\d|experts?)"),
    ("gain", r"(gains?|alpha|beta|gamma|delta|scale)"),
)
"""Kinds and the module names that mean them; the innermost segment of a name that matches decides."""

ORDER = ("embedding", "query", "key", "value", "projection", "mlp", "norm", "gain", "head")
"""The order in which kinds are shown; others follow."""

INTERLEAVED = ("gpt_neox", "bloom")
"""Architectures that lay Q, K and V out head by head."""


@dataclass(frozen=True)
class Part:
    """A kind of parameter, and how many neighbouring numbers of it there are in each period of a tensor."""

    kind: str
    size: int


def layer_of(name: str) -> str:
    """Return a parameter's layer: its name up to the first number in it, else the module that holds it."""
    segments = name.split(".")
    for index, segment in enumerate(segments):
        if segment.isdigit():
            return ".".join(segments[: index + 1])
    return ".".join(segments[:-1]) or name


def kind_of(name: str, shape: tuple[int, ...] = ()) -> str:
    """Return a parameter's kind, one of `ORDER`, or "convolution", "matrix" or "vector" by its shape."""
    segments = [segment for segment in name.lower().split(".") if not segment.isdigit()]
    if segments and segments[-1] in ("weight", "bias"):
        segments.pop()
    for index in range(len(segments) - 1, -1, -1):
        inner = segments[index]
        if inner in ("c_proj", "dense"):  # attention's output or the MLP's: the module around decides
            around = ".".join(segments[:index])
            return "projection" if "att" in around and "intermediate" not in around else "mlp"
        for kind, pattern in KINDS:
            if re.fullmatch(pattern, inner):
                return kind
    return "convolution" if len(shape) > 2 else "matrix" if len(shape) == 2 else "vector"


def parts_of(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return the parts that repeat through a flattened tensor; one part for all but fused Q, K and V.

    Element i belongs to the part into which i modulo the sum of the sizes falls.

    Args:
        name: the parameter's name.
        shape: its shape.
        config: what a config.json beside it says; model_type and num_attention_heads are looked at.

    Holds: for the layouts of GPT-2 (columns), GPT-NeoX and Bloom (head by head, heads from the
        configuration) and of rows in the order Q, K, V, where Q is square. An unknown layout stays whole,
        as does a bias that is not in thirds.
    """
    module, _, last = name.rpartition(".")
    inner = last if last.startswith("in_proj_") else module.rpartition(".")[2]
    whole = (Part(kind_of(name, shape), prod(shape)),)
    if inner == "query_key" and len(shape) == 2:
        return _rows(shape, ("query", "key"), (shape[1], shape[0] - shape[1]), whole)
    if inner == "query_key_value":
        heads = config.get("num_attention_heads", config.get("n_head"))
        if config.get("model_type") not in INTERLEAVED or not isinstance(heads, int) or heads < 1:
            return (Part("query_key_value", prod(shape)),)
        if shape[0] % (3 * heads):
            return (Part("query_key_value", prod(shape)),)
        return _rows((shape[0] // heads, *shape[1:]), _QKV, (shape[0] // (3 * heads),) * 3, whole)
    if inner == "c_attn":
        third = shape[-1] // 3
        return tuple(Part(kind, third) for kind in _QKV) if shape[-1] % 3 == 0 else whole
    if inner in ("qkv", "qkv_proj", "Wqkv", "in_proj_weight", "in_proj_bias"):
        if len(shape) == 1:
            third, rest = divmod(shape[0], 3)
            equal = not rest and config.get("num_key_value_heads") in (
                None,
                config.get("num_attention_heads"),
            )
            return _rows(shape, _QKV, (third,) * 3, whole) if equal else (Part("query_key_value", shape[0]),)
        rest = shape[0] - shape[1]
        return _rows(shape, _QKV, (shape[1], rest // 2, rest - rest // 2), whole)
    return whole


_QKV = ("query", "key", "value")


def _rows(
    shape: tuple[int, ...], kinds: tuple[str, ...], rows: tuple[int, ...], whole: tuple[Part, ...]
) -> tuple[Part, ...]:
    """Return parts of neighbouring rows, or the whole where the rows do not come out."""
    if min(rows) < 1 or sum(rows) != shape[0] or len(set(rows[1:])) != 1:
        return whole
    return tuple(Part(kind, size * prod(shape[1:])) for kind, size in zip(kinds, rows, strict=True))


def bounds(parts: tuple[Part, ...]) -> tuple[int, ...]:
    """Return where the parts of one period begin, and where the last one ends."""
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.size)
    assert all(low < high for low, high in pairwise(ends)) or len(parts) == 1
    return tuple(ends)
