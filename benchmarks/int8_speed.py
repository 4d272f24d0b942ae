"""Speed and size of a decoder in float32, bfloat16, and in torchao's integers.

Hugging Face's GPT-2, built here with random weights: reading a prompt (prefill) and cached decoding of one
token after another, interleaved in one process. Size is what safetensors holds on disk. The head is tied to
the embedding and stays exact, as `gramian.compress.torch_ao.convert` leaves it.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from side_by_side import ratio, timed, write_results
from torch import Tensor, nn

from gramian.compress import torch_ao
from gramian.interop.huggingface_cache import CACHE

torch_ao.quieten()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL, GPT2 = (6, 256, 4, 4096), (12, 768, 12, 50257)
"""Layers, width, heads, vocabulary."""


def decoder(depth: int, width: int, heads: int, vocabulary: int, context: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=context,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval().to(DEVICE)


def variants(model: nn.Module, kinds: list[str]) -> dict[str, nn.Module]:
    """Return the model in each format; what stays exact is float32, or bfloat16 where the name says so."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    found = {"float32": model, "bfloat16": half}
    for kind in kinds:
        found[kind] = torch_ao.convert(model, kind)
        found[f"{kind} + bfloat16"] = torch_ao.convert(half, kind)
    return found


def on_disk(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in torch_ao.stored(model).items()}, path)
        return path.stat().st_size


def prefill(model: nn.Module, tokens: Tensor, compiled: bool) -> Callable[[], None]:
    run = torch.compile(model) if compiled else model

    def forward() -> None:
        with torch.no_grad():
            run(input_ids=tokens, use_cache=False)

    return forward


def decoding(model: nn.Module, tokens: Tensor, steps: int) -> Callable[[], None]:
    """Return cached steps of one token at the end of the context; the prompt is read once."""
    with torch.no_grad():
        cache = getattr(model(input_ids=tokens[:, :-steps], use_cache=True), CACHE)
    length = cache.get_seq_length()

    def decode() -> None:
        cache.crop(length - cache.get_seq_length())
        with torch.no_grad():
            for _ in range(steps):
                model(input_ids=tokens[:, :1], **{CACHE: cache}, use_cache=True)

    return decode


def rows_of(title: str, seconds: Mapping[str, list[float]], tokens: int) -> list[str]:
    return [
        f"| {title} | {name} | {tokens / statistics.median(seconds[name]):,.0f} "
        f"| {1 / ratio(seconds, name, 'float32'):.2f} | {1 / ratio(seconds, name, 'bfloat16'):.2f} |"
        for name in seconds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=4, action="append", help="layers width heads vocabulary")
    parser.add_argument("--kinds", nargs="+", default=list(torch_ao.KINDS))
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--decode", type=int, default=16, help="steps of decoding")
    parser.add_argument("--compiled", action="store_true", help="also time compiled prefill")
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    shapes = [tuple(shape) for shape in chosen.shape or (SMALL, GPT2)]
    speeds, sizes = [], []
    for shape in shapes:
        name = "{} layers, width {}".format(*shape)
        models = variants(decoder(*shape, chosen.context), chosen.kinds)
        exact = on_disk(models["float32"])
        for kind, model in models.items():
            size, made = on_disk(model), torch_ao.converted(model)
            sizes.append(
                f"| {name} | {kind} | {size / 1e6:,.1f} | {size / exact:.2f} | {len(made.layers)} "
                f"| {made.share:.0%} |"
            )
        for batch in chosen.batches:
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(shape[-1], (batch, chosen.context), generator=generator).to(DEVICE)
            for compiled in (False, True) if chosen.compiled else (False,):
                ways = {kind: prefill(model, tokens, compiled) for kind, model in models.items()}
                seconds = timed(ways, rounds=chosen.rounds)
                title = f"{name}: prefill, {'compiled' if compiled else 'eager'}, {batch} × {chosen.context}"
                speeds += rows_of(title, seconds, batch * chosen.context)
                print("\n".join(speeds[-len(models) :]), flush=True)
            ways = {kind: decoding(model, tokens, chosen.decode) for kind, model in models.items()}
            seconds = timed(ways, rounds=chosen.rounds)
            speeds += rows_of(f"{name}: decoding, eager, batch {batch}", seconds, batch * chosen.decode)
            print("\n".join(speeds[-len(models) :]), flush=True)
    lines = [
        f"Hugging Face's GPT-2 with random weights, context {chosen.context}; decoding is {chosen.decode}",
        "cached steps at its end. Throughput is that of the median; ratios are medians over interleaved",
        "rounds, each within one round; above 1 is faster than the column's peer.",
        "",
        "| what | numbers | tokens/s | × float32 | × bfloat16 |",
        "|---|---|---|---|---|",
        *speeds,
        "",
        "| model | numbers | MB on disk | × float32 | layers converted | share of parameters |",
        "|---|---|---|---|---|---|",
        *sizes,
    ]
    used = {name: version(name) for name in ("torchao", "transformers")}
    name = "int8_speed-" + "-".join(f"{depth}x{width}" for depth, width, *_ in shapes)
    write_results(name, lines, used)


if __name__ == "__main__":
    main()
