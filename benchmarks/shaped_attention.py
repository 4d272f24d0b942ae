"""Shaped attention without a T×T matrix against the explicit formulation, forward and backward, with memory.

The explicit way forms α I + β softmax(Q Kᵀ/√d_k) − γ C for every head and multiplies the values by it. Peak
memory is what one forward and backward pass adds to a process of its own.
"""

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side import ratio, timed, write_results
from torch import Tensor, nn

from gramian.nn.attention import ShapedMixing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, HEAD_WIDTH = 12, 64


class Explicit(nn.Module):
    """The same function by its definition; I and C are made once, as the usual code does."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.ones(3, HEADS, 1, 1))
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        uniform = (~hidden) / torch.arange(1, tokens + 1)[:, None]
        self.register_buffer("hidden", hidden, persistent=False)
        self.register_buffer("uniform", uniform, persistent=False)
        self.register_buffer("identity", torch.eye(tokens), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        alpha, beta, gamma = self.gains
        logits = (q @ k.transpose(-2, -1) / math.sqrt(HEAD_WIDTH)).masked_fill(self.hidden, -math.inf)
        return (alpha * self.identity + beta * logits.softmax(-1) - gamma * self.uniform) @ v


def pass_of(way: str, batch: int, tokens: int) -> Callable[[], None]:
    """Return a forward and backward pass."""
    mixing = (ShapedMixing(HEADS) if way == "T×T-free" else Explicit(tokens)).to(DEVICE)
    features = torch.randn(4, batch, tokens, HEADS, HEAD_WIDTH, device=DEVICE)
    q, k, v, cotangent = (x.transpose(1, 2) for x in features)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]

    def run() -> None:
        mixing(*inputs).backward(cotangent)
        for x in (*inputs, *mixing.parameters()):
            x.grad = None

    return run


def peak(way: str, batch: int, tokens: int) -> float:
    """Return the MiB that a pass adds, measured in a process of its own."""
    program = [sys.executable, __file__, "--peak", way, str(batch), str(tokens)]
    return float(subprocess.run(program, capture_output=True, text=True, check=True).stdout)


def print_peak(way: str, batch: int, tokens: int) -> None:
    run = pass_of(way, batch, tokens)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    pass_of(way, batch, 16)()  # what the first pass of any size loads
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    before = status_kib("VmRSS")
    run()
    print((status_kib("VmHWM") - before) / 2**10)


def status_kib(name: str) -> int:
    """Return a number of /proc/self/status in KiB."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name))
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", nargs=3)
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args()
    if chosen.peak:
        print_peak(chosen.peak[0], int(chosen.peak[1]), int(chosen.peak[2]))
        return
    lines = [
        f"Forward and backward of causal shaped attention, {HEADS} heads of {HEAD_WIDTH}, float32. Medians",
        "of interleaved rounds; peak memory in MiB.",
        "",
        "| batch × tokens | T×T-free (ms) | explicit (ms) | speed-up | T×T-free peak | explicit peak |",
        "|---|---|---|---|---|---|",
    ]
    for batch, tokens in ((8, 128), (4, 512), (2, 1024), (1, 2048), (1, 4096)):
        ways = {name: pass_of(name, batch, tokens) for name in ("T×T-free", "explicit")}
        seconds = timed(ways, rounds=chosen.rounds)
        free, explicit = (1000 * statistics.median(seconds[name]) for name in ways)
        memory = [peak(name, batch, tokens) for name in ways]
        gain = ratio(seconds, "explicit", "T×T-free")
        lines.append(
            f"| {batch} × {tokens} | {free:.1f} | {explicit:.1f} | {gain:.2f} | {memory[0]:.0f} "
            f"| {memory[1]:.0f} |"
        )
    write_results("shaped_attention", lines, {})


if __name__ == "__main__":
    main()
