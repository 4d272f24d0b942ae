"""Paths of the covariance SDE of shaped transformers, against a dense covariance and against networks.

The straightforward way fills the covariance of all m(m+1)/2 entries of V, takes its Cholesky factor in every
step, and follows Euler and Maruyama. Networks of the given width are sampled in two ways: with every weight
drawn, and by gramian's sampler, which draws covariances alone. A path and a network are one sample each, so
that equal accuracy means equal numbers of them, as long as the steps' own error is below chance: the last
table measures that.
"""

import argparse
import math
import statistics
from collections.abc import Callable

import torch
from side_by_side import timed, write_results
from torch import Tensor

from gramian.core.sde import Paths
from gramian.nn.shaped import shaped_slopes
from gramian.nn.shaped_networks import ShapedNetworks, shaped_attention
from gramian.tasks.covariance import NORM, PAIR, readings
from gramian.tasks.samples import kolmogorov_smirnov
from gramian.theory.covariance_sde import ShapedBlock, covariance, simulate

BLOCK = ShapedBlock(gamma=0.5, tau0=1.0)
TIME, STEPS = 0.5, 32
KEYS = 64
TOKENS = (4, 8, 16, 32)


def start(m: int) -> Tensor:
    return torch.full((m, m), 0.3, dtype=torch.float64).fill_diagonal_(1.0)


def dense_covariance(v: Tensor) -> Tensor:
    """Return Σ(V) of a shaped block on the upper triangle's entries: all pairs of entries, filled at once."""
    m = v.shape[-1]
    a, b = torch.triu_indices(m, m)
    centred = v - v.mean(-1, keepdim=True) - v.mean(-2, keepdim=True) + v.mean((-2, -1), keepdim=True)
    logits = v @ centred @ v / m**2
    square = BLOCK.gamma**2

    def pairs(x: Tensor, y: Tensor) -> Tensor:
        return x[:, a[:, None], a] * y[:, b[:, None], b] + x[:, a[:, None], b] * y[:, b[:, None], a]

    linear = (square * (2 - square) + 2 * square) * pairs(v, v)
    return linear + (square / BLOCK.tau0) ** 2 * (pairs(v, logits) + pairs(logits, v))


def dense_paths(m: int, paths: int, generator: torch.Generator) -> Tensor:
    """Return V at the end by Euler and Maruyama with the Cholesky factor of the dense covariance."""
    v, h = start(m).expand(paths, m, m).clone(), TIME / STEPS
    a, b = torch.triu_indices(m, m)
    jitter = 1e-10 * torch.eye(len(a), dtype=v.dtype)
    for _ in range(STEPS):
        factor = torch.linalg.cholesky_ex(dense_covariance(v) + jitter).L
        noise = math.sqrt(h) * torch.randn(paths, len(a), 1, generator=generator, dtype=v.dtype)
        moved = h * BLOCK.drift(v)[:, a, b] + (factor @ noise)[..., 0]
        v[:, a, b] += moved
        v[:, b, a] = v[:, a, b]
    return v


def drawn_network(m: int, width: int, generator: torch.Generator) -> Tensor:
    """Return the covariance of tokens after a network of which every weight is drawn, in float32."""

    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    x = torch.linalg.cholesky(start(m)).float() @ torch.linalg.qr(weight(width, m)).Q.mT * math.sqrt(width)
    skip, tau = math.sqrt(1 - BLOCK.gamma**2), BLOCK.tau0 * math.sqrt(width * KEYS)
    up, down = shaped_slopes(width, BLOCK.positive, BLOCK.negative)
    gain, spread = BLOCK.gamma / math.sqrt(width), 2 / (up**2 + down**2)
    centring = torch.full((m, m), 1 / m)
    for _ in range(round(TIME * width)):
        logits = (x @ weight(width, KEYS)) @ (x @ weight(width, KEYS)).mT / (width * tau)
        x = skip * x + gain * shaped_attention(logits, centring) @ x @ weight(width, width)
        hidden = x @ weight(width, width) / math.sqrt(width)
        hidden = torch.where(hidden > 0, up * hidden, down * hidden)
        x = skip * x + gain * math.sqrt(spread) * hidden @ weight(width, width)
    return x @ x.mT / width


def rate(count: int, seconds: list[float]) -> float:
    return count / statistics.median(seconds)


def written(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def speeds(m: int, width: int, rounds: int) -> str:
    v = simulate(BLOCK, start(m), 0.1, paths=1, steps=8, seed=0).states[-1, 0]
    torch.testing.assert_close(dense_covariance(v[None])[0], covariance(BLOCK, v), rtol=1e-9, atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    counts = {"ours": 2**18 // m**2, "dense": max(2, 40_000 // m**3), "drawn": 1, "sampled": 2**10 // m}
    networks = ShapedNetworks(width, BLOCK.gamma, BLOCK.tau0, key_width=KEYS)
    depth = round(TIME * width)
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: simulate(BLOCK, start(m), TIME, paths=counts["ours"], steps=STEPS, seed=1),
        "dense": lambda: dense_paths(m, counts["dense"], generator),
        "drawn": lambda: drawn_network(m, width, generator),
        "sampled": lambda: networks.simulate(start(m), depth, networks=counts["sampled"], seed=1),
    }
    seconds = timed(ways, rounds, 1)
    rates = {name: rate(counts[name], each) for name, each in seconds.items()}
    others = [
        f"{written(rates[name])} | {rates['ours'] / rates[name]:,.0f}" for name in ways if name != "ours"
    ]
    return f"| {m} | {written(rates['ours'])} | " + " | ".join(others) + " |"


def errors(m: int, width: int, count: int) -> list[str]:
    """Return rows of Kolmogorov–Smirnov distances from paths of eight times as many steps."""
    fine = simulate(BLOCK, start(m), TIME, paths=count, steps=8 * STEPS, seed=2)
    depth = round(TIME * width)
    networks = ShapedNetworks(width, BLOCK.gamma, BLOCK.tau0, key_width=KEYS)
    samples = {
        f"SDE, {STEPS} steps": simulate(BLOCK, start(m), TIME, paths=count, steps=STEPS, seed=3),
        f"networks of width {width}": networks.simulate(start(m), depth, networks=count, seed=4),
    }
    rows = []
    for name, paths in samples.items():
        mine, reference = lasting(paths), lasting(fine)
        found = [kolmogorov_smirnov(mine[key].tolist(), reference[key].tolist()) for key in (PAIR, NORM)]
        cells = [f"{each.value:.3f} ({each.noise:.3f})" for each in found]
        rows.append(f"| {m} | {name} | " + " | ".join(cells) + " |")
    return rows


def lasting(paths: Paths) -> dict[str, Tensor]:
    return readings(paths.states[-1][paths.lasting])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4000, help="paths and networks of the last table")
    settings = parser.parse_args()
    width, depth = settings.width, round(TIME * settings.width)
    lines = [
        f"Samples of the covariance of m tokens a second, at depth/width {TIME:g}, γ = {BLOCK.gamma:g}, "
        f"τ₀ = {BLOCK.tau0:g}: the SDE in {STEPS} steps, and networks of width {width} and {depth} blocks. "
        "SDE and gramian's sampler are float64, drawn networks float32.",
        "",
        "| m | gramian, paths/s | dense covariance, paths/s | ours / it | drawn networks, 1/s "
        "| ours / it | sampled networks, 1/s | ours / it |",
        "|---|---|---|---|---|---|---|---|",
        *[speeds(m, width, settings.rounds) for m in TOKENS],
        "",
        f"Kolmogorov–Smirnov distance of {settings.samples} samples each from as many paths of {8 * STEPS} "
        "steps; in brackets, what two samples of one distribution stay below 19 times in 20.",
        "",
        "| m | sample | correlation | log norm |",
        "|---|---|---|---|",
        *[row for m in (4, 8) for row in errors(m, width, settings.samples)],
    ]
    write_results("covariance_sde", lines, {})


if __name__ == "__main__":
    main()
