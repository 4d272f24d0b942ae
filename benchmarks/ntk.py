"""Empirical NTKs by layers against PyTorch's forms, and ensembles as one stack against a loop over modules.

The forms are those of PyTorch's NTK tutorial. Contraction holds the Jacobian of every row, from
`vmap(jacrev)`, and multiplies it parameter by parameter; NTK-vector products nest `vmap` over both sets of
rows and the outputs. All kernels are float32 and full (all pairs of outputs). Peaks are what one kernel adds
to a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from side_by_side import ratio, timed, write_results
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from gramian.bayes.ensemble import EnsembleConfig, fit_ensemble
from gramian.bayes.ntk import ntk
from gramian.bayes.ntk_operator import NTKOperator
from gramian.nn.mlp import mlp as perceptron
from gramian.nn.mlp import prior_variances
from gramian.nn.resnet import conv_resnet

Way = Callable[[nn.Module, Tensor], Tensor]


def mlp(outputs: int) -> nn.Module:
    hidden = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(1024, outputs))


def tutorial_cnn() -> nn.Module:
    """Three convolutions and a read-out of every position, as in PyTorch's tutorial on the NTK."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(32, 32, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 26 * 26, 10))


def pooled_cnn() -> nn.Module:
    return conv_resnet(3, 32, 10, nn.ReLU, [0.7, 0.7], bias_std=0.1)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-1024-1024-10": (lambda: mlp(10), (784,)),
    "MLP 784-1024-1024-1": (lambda: mlp(1), (784,)),
    "CNN of the tutorial, 32 × 32": (tutorial_cnn, (3, 32, 32)),
    "residual CNN, 5 convolutions, pooled, 16 × 16": (pooled_cnn, (3, 16, 16)),
}


def contraction(module: nn.Module, x: Tensor) -> Tensor:
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def outputs(p: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(module, p, (row[None],))[0]

    jacobians = vmap(jacrev(outputs), (None, 0))(parameters, x)
    flat = [j.flatten(2) for j in jacobians.values()]
    total = torch.einsum("nof,mpf->nomp", flat[0], flat[0])
    for j in flat[1:]:
        total += torch.einsum("nof,mpf->nomp", j, j)
    return total


def vector_products(module: nn.Module, x: Tensor) -> Tensor:
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def of_pair(left: Tensor, right: Tensor) -> Tensor:
        value, pull = vjp(lambda p: functional_call(module, p, (right[None],))[0], parameters)

        def push(unit: Tensor) -> Tensor:
            tangent = pull(unit)
            return jvp(lambda p: functional_call(module, p, (left[None],))[0], (parameters,), tangent)[1]

        return vmap(push)(torch.eye(len(value))).mT

    return vmap(vmap(of_pair, (None, 0)), (0, None))(x, x).permute(0, 2, 1, 3)


WAYS: dict[str, Way] = {
    "gramian": ntk,
    "contraction": contraction,
    "NTK-vector products": vector_products,
}


@dataclass(frozen=True)
class Case:
    """A module and how many inputs it gets."""

    name: str
    rows: int

    def given(self) -> tuple[nn.Module, Tensor]:
        make, size = CASES[self.name]
        torch.manual_seed(0)
        return make(), torch.randn(self.rows, *size)


def product(module: nn.Module, x: Tensor) -> Tensor:
    operator = NTKOperator(module, x)
    return operator @ torch.ones(operator.shape[1])


def peak(case: Case, way: str, threads: int) -> float:
    """Return the MiB that a kernel adds to a process of its own."""
    arguments = ["--peak", case.name, str(case.rows), way, str(threads)]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else float("nan")


def print_peak(name: str, rows: str, way: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    run = {**WAYS, "product": product}[way]
    module, x = Case(name, int(rows)).given()
    run(module, x[:2])  # what the first call of any size loads
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    before = kib("VmRSS")
    run(module, x)
    print((kib("VmHWM") - before) / 2**10)


def kib(name: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name))
    return int(line.split()[1])


def compared(cases: dict[Case, tuple[str, ...]], rounds: int) -> list[str]:
    lines = [
        "Ways in turn, medians; ratios are medians of those within a round.",
        "",
        "| module | inputs | way | ms | its time / ours | MiB | its memory / ours | largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    threads = torch.get_num_threads()
    for case, names in cases.items():
        module, x = case.given()
        ways = {name: lambda name=name: WAYS[name](module, x) for name in names}  # noqa: B023
        seconds, ours = timed(ways, rounds, 1), ntk(module, x)
        base = peak(case, "gramian", threads)
        for name in names:
            difference = float((WAYS[name](module, x) - ours).abs().max() / ours.abs().max())
            held = base if name == "gramian" else peak(case, name, threads)
            took, times = 1000 * statistics.median(seconds[name]), ratio(seconds, name, "gramian")
            lines.append(
                f"| {case.name} | {case.rows} | {name} | {took:.1f} | {times:.1f} | {held:.0f} "
                f"| {held / base:.1f} | {difference:.0e} |"
            )
    return lines


def of_many(cases: list[Case], rounds: int) -> list[str]:
    lines = [
        "",
        "Many inputs: the whole kernel, and one product with it that never forms it.",
        "",
        "| module | inputs | kernel (s) | of which result (MiB) | MiB | product (s) | MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    threads = torch.get_num_threads()
    for case in cases:
        module, x = case.given()
        ways = {"kernel": lambda: ntk(module, x), "product": lambda: product(module, x)}  # noqa: B023
        seconds = timed(ways, rounds, 1)
        result = ntk(module, x).numel() * 4 / 2**20
        whole, once = (statistics.median(seconds[name]) for name in ("kernel", "product"))
        held, alone = peak(case, "gramian", threads), peak(case, "product", threads)
        lines.append(
            f"| {case.name} | {case.rows} | {whole:.2f} | {result:.0f} | {held:.0f} | {once:.2f} "
            f"| {alone:.0f} |"
        )
    return lines


def looped(config: EnsembleConfig, widths: tuple[int, ...], x: Tensor, y: Tensor) -> None:
    """Train the members of rp_param one plain module after the other, as PyTorch's users write it."""
    for m in range(config.members):
        generator = torch.Generator().manual_seed(m)
        torch.manual_seed(m)
        module = perceptron(x.shape[1], 1, widths=widths)
        prior = prior_variances(module)
        anchors = [p.detach().clone() for p in module.parameters()]
        targets = y + config.noise_variance**0.5 * torch.randn(y.shape, generator=generator)
        optimiser = torch.optim.Adam(module.parameters(), lr=config.learning_rate, fused=True)
        for _ in range(config.steps):
            rows = torch.randint(len(x), (config.batch or len(x),), generator=generator)
            loss = 0.5 * (module(x[rows])[:, 0] - targets[rows]).square().mean()
            apart = [
                (p - anchor).square().sum() / prior[name]
                for (name, p), anchor in zip(module.named_parameters(), anchors, strict=True)
            ]
            optimiser.zero_grad()
            (loss + 0.5 * config.noise_variance / len(x) * torch.stack(apart).sum()).backward()
            optimiser.step()


def of_ensembles(rounds: int) -> list[str]:
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    y = torch.sin(x[:, 0])
    lines = [
        "",
        "Twenty regularised members on 1000 rows of 8 features, batches of 128: one stack against a loop.",
        "",
        "| hidden layers | steps | stack (ms a step of all) | loop (ms) | its time / ours |",
        "|---|---|---|---|---|",
    ]
    for widths, steps in (((50,), 200), ((50, 50), 200), ((128, 128), 100), ((512, 512), 30)):
        make = partial(perceptron, 8, 1, widths=widths)
        config = EnsembleConfig(
            method="rp_param", members=20, steps=steps, batch=128, prior=prior_variances(make())
        )
        ways = {
            "stack": lambda: fit_ensemble(make, x, y, config),  # noqa: B023
            "loop": lambda: looped(config, widths, x, y),  # noqa: B023
        }
        seconds = timed(ways, rounds, 1)
        once = {name: 1000 * statistics.median(each) / steps for name, each in seconds.items()}
        lines.append(
            f"| {' × '.join(map(str, widths))} | {steps} | {once['stack']:.2f} | {once['loop']:.2f} "
            f"| {ratio(seconds, 'loop', 'stack'):.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", nargs=4)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    if chosen.peak:
        print_peak(*chosen.peak)
        return
    wide, single, tutorial, pooled = CASES
    cases: dict[Case, tuple[str, ...]] = {
        Case(wide, 64): ("gramian", "contraction"),
        Case(wide, 4): tuple(WAYS),
        Case(single, 128): ("gramian", "contraction"),
        Case(tutorial, 20): ("gramian", "contraction"),
        Case(tutorial, 64): ("gramian", "contraction"),
        Case(tutorial, 2): tuple(WAYS),
        Case(pooled, 32): ("gramian", "contraction"),
    }
    many = [Case(single, 1000), Case(single, 4000), Case(wide, 1000)]
    lines = [*compared(cases, chosen.rounds), *of_many(many, chosen.rounds), *of_ensembles(chosen.rounds)]
    write_results("ntk", lines, {})


if __name__ == "__main__":
    main()
