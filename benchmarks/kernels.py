"""NNGP and NTK of deep networks: dense ones against neural-tangents and direct quadrature, depth, and images.

neural-tangents runs in a process of its own, by `--peer PYTHON`, the interpreter of an environment that has
`jax==0.4.30 jaxlib==0.4.30 tf2jax==0.3.6 neural-tangents==0.6.5` (newer ones of these do not go together);
without it that column stays empty. Direct quadrature is the expectation over a square grid of 32 × 32
Gauss–Hermite nodes for every pair of inputs, on a tenth of the inputs. All kernels are float64.
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from side_by_side import ratio, timed, write_results
from torch import Tensor

from gramian.core.gaussian import Dual, derivative, gauss_hermite
from gramian.theory.duals import dual
from gramian.theory.kernels import Kernels, kernels
from gramian.theory.maps import (
    Activation,
    AveragePool,
    Convolution,
    Dense,
    GlobalPool,
    Map,
    Residual,
    Serial,
    signal,
)

FEATURES, DEPTH = 64, 10


class Grid(Dual):
    """E[φ(u)φ(v)] as the sum over all pairs of nodes."""

    def __init__(self, function: Callable[[Tensor], Tensor], order: int = 32) -> None:
        self._function, self._slope = function, derivative(function)
        self.nodes, self.weights = gauss_hermite(order)

    def function(self, x: Tensor) -> Tensor:
        return self._function(x)

    def both(self, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a = a.clamp(min=1e-30)
        u = a.sqrt()[..., None] * self.nodes
        rest = (b - k * k / a).clamp(min=0).sqrt()[..., None, None]
        v = (k / a)[..., None, None] * u[..., :, None] + rest * self.nodes
        values, slopes = (
            (f(u) * self.weights * (f(v) @ self.weights)).sum(-1) for f in (self._function, self._slope)
        )
        return values, slopes


def dense(expectations: Dual, depth: int = DEPTH) -> Map:
    layer = Dense(1.5, 0.1)
    return Serial(layer, *[Activation(expectations), layer] * depth)


def myrtle(size: int) -> Map:
    """Two convolutions, then pool and convolution down to 4 × 4 positions, then the mean over them."""
    convolution, relu = Convolution((3, 3), math.sqrt(2), 0.0, "zeros"), Activation(dual("relu"))
    layers: list[Map] = [convolution, relu, convolution, relu]
    while size > 4:
        layers += [AveragePool((2, 2)), convolution, relu]
        size //= 2
    return Serial(*layers, GlobalPool(), Dense(1.0))


class Peer:
    """neural-tangents behind a pipe."""

    def __init__(self, python: str, folder: str) -> None:
        program = [python, str(Path(__file__).with_name("kernels_peer.py")), folder]
        self.process = subprocess.Popen(
            [*program, str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.versions = self._answer()

    def ask(self, request: str) -> str:
        assert self.process.stdin is not None
        print(request, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise SystemExit("the peer ended; does its interpreter have neural-tangents?")
        return answer

    def difference(self, mine: Kernels, folder: str) -> float:
        """Return the largest difference of its last kernels from ours, relative to the largest entry."""
        self.ask(f"save {folder}/last.npy")
        theirs = torch.from_numpy(numpy.load(f"{folder}/last.npy"))
        return max(
            float((a - b).abs().max() / b.abs().max())
            for a, b in zip((mine.nngp, mine.ntk), theirs, strict=True)
        )


def milliseconds(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds)


def peak(*arguments: str) -> float:
    """Return the MiB that kernels add to a process of their own."""
    program = [sys.executable, __file__, "--peak", *arguments]
    return float(subprocess.run(program, capture_output=True, text=True, check=True).stdout)


def print_peak(what: str, count: str) -> None:
    def run(n: int) -> None:
        if what in ("relu", "gelu"):
            kernels(dense(dual(what)), torch.randn(n, FEATURES))
        else:
            size = int(what)
            kernels(
                myrtle(size), torch.randn(n, size, size, 3), torch.randn(n, size, size, 3), positions="all"
            )

    run(1)  # what the first call of any size loads
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    before = kib("VmRSS")
    run(int(count))
    print((kib("VmHWM") - before) / 2**10)


def kib(name: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name))
    return int(line.split()[1])


def of_vectors(n: int, rounds: int, peer: Peer | None, folder: str) -> list[str]:
    lines = [
        f"NNGP and NTK of {n} inputs against themselves, {DEPTH} hidden layers. Direct quadrature on "
        f"{n // 10} inputs, its time multiplied by 100.",
        "",
        "| activation | gramian (ms) | neural-tangents (ms) | its time / ours | largest difference "
        "| direct quadrature (ms) | our peak (MiB) |",
        "|---|---|---|---|---|---|---|",
    ]
    x = torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, function in (("relu", torch.relu), ("gelu", torch.nn.functional.gelu)):
        numpy.save(f"{folder}/dense_{name}_x.npy", x.numpy())
        network = dense(dual(name))
        ways: dict[str, Callable[[], object]] = {"gramian": lambda: kernels(network, x)}  # noqa: B023
        if peer is not None:
            ways["peer"] = lambda: peer.ask(f"dense {name} {DEPTH}")  # noqa: B023
        seconds = timed(ways, rounds)
        grid = timed({"grid": lambda: kernels(dense(Grid(function)), x[: n // 10], tile=64)}, 1, 0)  # noqa: B023
        theirs = ["", "", ""]
        if peer is not None:
            difference = peer.difference(kernels(network, x), folder)
            ratios = ratio(seconds, "peer", "gramian")
            theirs = [f"{milliseconds(seconds['peer']):.0f}", f"{ratios:.2f}", f"{difference:.0e}"]
        lines.append(
            f"| {name} | {milliseconds(seconds['gramian']):.0f} | {' | '.join(theirs)} "
            f"| {100 * milliseconds(grid['grid']):.0f} | {peak(name, str(n)):.0f} |"
        )
    return lines


def of_depth(layers: int) -> list[str]:
    lines = [
        "",
        f"Iteration of {layers} ReLU residual blocks with gain 1/√L, NNGP and NTK together.",
        "",
        "| inputs | seconds | µs a block |",
        "|---|---|---|",
    ]
    block = Residual(Serial(Activation(dual("relu")), Dense(math.sqrt(2))), 1 / math.sqrt(layers))
    for n in (2, 30, 100):
        x = torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(0))
        seconds = timed({"depth": lambda: Serial(*[block] * layers)(signal(x))}, 3, 1)["depth"]  # noqa: B023
        took = statistics.median(seconds)
        lines.append(f"| {n} | {took:.2f} | {1e6 * took / layers:.0f} |")
    return lines


def of_images(sizes: dict[int, int], rounds: int, peer: Peer | None, folder: str) -> list[str]:
    lines = [
        "",
        "Myrtle-style kernels of images: two 3 × 3 convolutions with ReLU, then 2 × 2 pool, convolution and",
        "ReLU down to 4 × 4 positions, then a global pool; all pairs of positions, zero padding.",
        "",
        "| image | pairs | gramian (ms a pair) | neural-tangents (ms a pair) | its time / ours "
        "| largest difference | our peak (MiB) |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, n in sizes.items():
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(2, n, size, size, 3, generator=generator, dtype=torch.float64)
        numpy.save(f"{folder}/images_{size}_x.npy", x.numpy())
        numpy.save(f"{folder}/images_{size}_y.npy", y.numpy())
        network = myrtle(size)
        ways: dict[str, Callable[[], object]] = {
            "gramian": lambda: kernels(network, x, y, positions="all")  # noqa: B023
        }
        if peer is not None:
            ways["peer"] = lambda: peer.ask(f"images {size}")  # noqa: B023
        seconds = timed(ways, rounds, 1)
        theirs = ["", "", ""]
        if peer is not None:
            difference = peer.difference(kernels(network, x, y, positions="all"), folder)
            ratios = ratio(seconds, "peer", "gramian")
            took = milliseconds(seconds["peer"]) / n**2
            theirs = [f"{took:.3g}", f"{ratios:.2f}", f"{difference:.0e}"]
        lines.append(
            f"| {size} × {size} | {n * n} | {milliseconds(seconds['gramian']) / n**2:.3g} "
            f"| {' | '.join(theirs)} | {peak(str(size), str(n)):.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", nargs=2)
    parser.add_argument("--peer", help="interpreter with neural-tangents")
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, nargs=3, default=(32, 8, 2), help="images a side: 8², 16², 32²")
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args()
    if chosen.peak:
        print_peak(*chosen.peak)
        return
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(chosen.peer, folder) if chosen.peer else None
        sizes = dict(zip((8, 16, 32), chosen.pairs, strict=True))
        lines = [
            *of_vectors(chosen.inputs, chosen.rounds, peer, folder),
            *of_depth(chosen.layers),
            *of_images(sizes, max(1, chosen.rounds // 3), peer, folder),
        ]
        versions = dict(part.split() for part in peer.versions.split(", ")) if peer else {}
        write_results("kernels", lines, versions)


if __name__ == "__main__":
    main()
