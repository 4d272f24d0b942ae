"""Speed of blocks against pre_norm and against Hugging Face's GPT-2 of the same size.

Training steps (eager and compiled), forward passes and cached decoding, interleaved in one process, at
several lengths. GPT-2 has biases everywhere, GELU and LayerNorm; its size (layers, width, heads, vocabulary,
tied head) is the same. The arithmetic floor of a training step is the time that its matrix products alone
would take at the rate of one large product, measured in the same rounds.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version

import torch
from side_by_side import ratio, timed, write_results
from torch import Tensor, nn

from gramian.interop.huggingface_cache import CACHE
from gramian.nn.blocks import BLOCKS
from gramian.nn.transformer import Transformer, TransformerConfig, build
from gramian.tasks.language import language_loss
from gramian.train.optimisers import adamw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEER = "Hugging Face GPT-2"
PRODUCT = "one large matrix product"
SIDE = 2048


class Gpt2(nn.Module):
    """Hugging Face's GPT-2 as a module tokens -> logits, without dropout and with fused attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocabulary,
                n_positions=config.context,
                n_embd=config.width,
                n_layer=config.depth,
                n_head=config.heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
                attn_implementation="sdpa",
                bos_token_id=0,
                eos_token_id=0,
            )
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


def training_step(model: nn.Module, batch: Tensor, compiled: bool) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW."""
    model.train()
    forward = torch.compile(model) if compiled else model
    optimiser = adamw(model, 1e-3, 0.1, (0.9, 0.999), 1e-8)

    def step() -> None:
        language_loss(forward, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def forward_pass(model: nn.Module, batch: Tensor) -> Callable[[], None]:
    def forward() -> None:
        model.eval()
        with torch.no_grad():
            model(batch[:, 0])

    return forward


def decoding(model: nn.Module, tokens: Tensor, steps: int) -> Callable[[], None]:
    """Return cached steps of one token after a prompt that leaves just room; the prompt is read once."""
    model.eval()
    prompt = tokens[:, : tokens.shape[1] - steps]
    if isinstance(model, Transformer):
        memory = model.memory()
        with torch.no_grad():
            model(prompt, past=memory)

        def ours() -> None:
            for past in memory:
                past.crop(prompt.shape[1])
            with torch.no_grad():
                for _ in range(steps):
                    model(tokens[:, :1], past=memory)

        return ours
    assert isinstance(model, Gpt2)
    with torch.no_grad():
        cache = getattr(model.model(prompt, use_cache=True), CACHE)

    def theirs() -> None:
        cache.crop(prompt.shape[1] - cache.get_seq_length())
        with torch.no_grad():
            for _ in range(steps):
                model.model(tokens[:, :1], **{CACHE: cache}, use_cache=True)

    return theirs


def product() -> Callable[[], None]:
    a, b = torch.randn(SIDE, SIDE, device=DEVICE), torch.randn(SIDE, SIDE, device=DEVICE)

    def multiply() -> None:
        a @ b

    return multiply


def step_flops(model: nn.Module, config: TransformerConfig, batch: int) -> float:
    """Floating-point operations of a training step in matrix products, attention's causal half included.

    6 a weight and token (an embedding's look-up none, a tied head once); attention 2 T² d forward and 2.5
    times that backward, a sequence and layer.
    """
    tokens = batch * config.context
    entries = sum(p.numel() for p in model.parameters() if p.ndim == 2) - config.context * config.width
    attention = 3.5 * 2 * config.context**2 * config.width * batch * config.depth
    return 6 * entries * tokens + attention


def rows_of(
    title: str, seconds: Mapping[str, list[float]], tokens: int, floors: Mapping[str, float] | None = None
) -> list[str]:
    """One row a model; `floors` are the seconds below which it cannot go."""
    lines = []
    for name in seconds:
        if name == PRODUCT:
            continue
        speed = tokens / statistics.median(seconds[name])
        against = " | ".join(f"{1 / ratio(seconds, name, base):.2f}" for base in ("pre_norm", PEER))
        floor = "" if floors is None else f"{floors[name] / statistics.median(seconds[name]):.0%}"
        lines.append(f"| {title} | {name} | {speed:,.0f} | {against} | {floor} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128])
    parser.add_argument("--tokens", type=int, default=1024, help="a step, at least one sequence")
    parser.add_argument("--decode", type=int, default=16, help="steps of decoding")
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS))
    parser.add_argument("--compiled", type=int, nargs="*", default=[128], help="contexts to compile at")
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args()
    lines = [
        f"{chosen.depth} layers, width {chosen.width}, {chosen.heads} heads, vocabulary",
        f"{chosen.vocabulary}, float32, about {chosen.tokens} tokens a step. Training is forward, backward,",
        f"clipping and AdamW; decoding is {chosen.decode} cached steps at the end of the context. Throughput",
        "is that of the median step; ratios are medians over interleaved rounds, each within one round;",
        "above 1 is faster than the column's peer. The last column is the time that the matrix products take",
        f"at the measured rate of one {SIDE} x {SIDE} product, as a share of the step.",
        "",
        f"| what | model | tokens/s | × pre_norm | × {PEER} | floor / measured |",
        "|---|---|---|---|---|---|",
    ]
    generator = torch.Generator().manual_seed(0)
    for context in chosen.contexts:
        batch = max(1, chosen.tokens // context)
        config = TransformerConfig(
            vocabulary=chosen.vocabulary,
            context=context,
            width=chosen.width,
            depth=chosen.depth,
            heads=chosen.heads,
        )
        tokens = torch.randint(chosen.vocabulary, (batch, context + 1), generator=generator).to(DEVICE)
        planes = torch.stack((tokens[:, :-1], tokens[:, 1:]), 1)
        models: dict[str, nn.Module] = {n: build(replace(config, block=n), 0) for n in chosen.blocks}
        models[PEER] = Gpt2(config)
        models = {name: model.to(DEVICE) for name, model in models.items()}
        size, count = f"{batch} × {context}", batch * context
        for compiled in (False, True) if context in chosen.compiled else (False,):
            ways = {name: training_step(model, planes, compiled) for name, model in models.items()}
            seconds = timed({**ways, PRODUCT: product()}, rounds=chosen.rounds)
            rate = 2 * SIDE**3 / statistics.median(seconds[PRODUCT])
            floors = {name: step_flops(model, config, batch) / rate for name, model in models.items()}
            title = f"training, {'compiled' if compiled else 'eager'}, {size}"
            lines += rows_of(title, seconds, count, floors)
            print(f"{title}: {rate / 1e9:.0f} GFLOP/s in {PRODUCT}", flush=True)
            print("\n".join(lines[-len(models) :]), flush=True)
        seconds = timed({n: forward_pass(m, planes) for n, m in models.items()}, rounds=chosen.rounds)
        lines += rows_of(f"forward, {size}", seconds, count)
        ways = {n: decoding(m, tokens[:, :-1], chosen.decode) for n, m in models.items()}
        seconds = timed(ways, rounds=chosen.rounds)
        lines += rows_of(f"decoding, {size}", seconds, batch * chosen.decode)
    name = f"block_speed-{chosen.depth}x{chosen.width}"
    write_results(name, lines, {"transformers": version("transformers")})


if __name__ == "__main__":
    main()
