"""Training throughput of every block against pre_norm and against Hugging Face's GPT-2 of the same size.

Eager and compiled, interleaved in one process. GPT-2 has biases everywhere, GELU and LayerNorm; its size
(layers, width, heads, vocabulary, tied head) is the same.
"""

import argparse
import statistics
import time
from dataclasses import replace
from importlib.metadata import version

import torch
from side_by_side import ratio, timed, write_results
from torch import Tensor, nn

from gramian.nn.blocks import BLOCKS
from gramian.nn.transformer import TransformerConfig, build
from gramian.tasks.language import language_loss
from gramian.train.optimisers import adamw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEER = "Hugging Face GPT-2"


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


class Step:
    """One training step."""

    def __init__(self, model: nn.Module, windows: Tensor, compiled: bool) -> None:
        self.model = model.to(DEVICE).train()
        self.forward = torch.compile(self.model) if compiled else self.model
        self.optimiser = adamw(self.model, 1e-3, 0.1, (0.9, 0.999), 1e-8)
        self.windows = windows

    def __call__(self) -> None:
        language_loss(self.forward, self.windows).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args()
    config = TransformerConfig(
        vocabulary=chosen.vocabulary,
        context=chosen.context,
        width=chosen.width,
        depth=chosen.depth,
        heads=chosen.heads,
    )
    generator = torch.Generator().manual_seed(0)
    size = (chosen.batch, chosen.context + 1)
    windows = torch.randint(chosen.vocabulary, size, generator=generator).to(DEVICE)
    lines = [
        f"Training steps (forward, backward, clipping, AdamW): {config.depth} layers, width {config.width},",
        f"{config.heads} heads, {chosen.batch} × {config.context} tokens, vocabulary {config.vocabulary}, in",
        "float32. Throughput is that of the median step; ratios are medians over interleaved rounds, each",
        "within one round; above 1 is faster than the column's peer.",
        "",
        f"| mode | model | parameters (M) | tokens/s | × pre_norm | × {PEER} |",
        "|---|---|---|---|---|---|",
    ]
    for compiled in (False, True):
        shapes = {name: replace(config, block=name) for name in BLOCKS}
        models: dict[str, nn.Module] = {name: build(shape, 0) for name, shape in shapes.items()}
        models[PEER] = Gpt2(config)
        ways = {name: Step(model, windows, compiled) for name, model in models.items()}
        started = time.perf_counter()
        for way in ways.values():
            way()
        print(f"first steps took {time.perf_counter() - started:.0f} s")
        seconds = timed(ways, rounds=chosen.rounds)
        for name, model in models.items():
            speed = chosen.batch * chosen.context / statistics.median(seconds[name])
            against = [1 / ratio(seconds, name, base) for base in ("pre_norm", PEER)]
            count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
            mode = "compiled" if compiled else "eager"
            lines.append(
                f"| {mode} | {name} | {count:.2f} | {speed:,.0f} | {against[0]:.2f} | {against[1]:.2f} |"
            )
    write_results(
        f"block_speed-{config.depth}x{config.width}", lines, {"transformers": version("transformers")}
    )


if __name__ == "__main__":
    main()
