"""Training under masks against the dense step, and many masks at once against a Python loop over them.

    python benchmarks/pruning.py [--rounds 15] [--draws 10000] [--only steps products certificates all]

Inputs are normal numbers; classes are those of the network without masks. A posterior is a share of weights
with a high λ, the others with a low one; "learnt" has the shares found after training masks of density 0.1
on MNIST. The loop is what one would write without this library: draw with `torch.bernoulli`, multiply, one
pass over all examples, compare the largest output with the class.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from side_by_side import ratio, timed, write_results
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from gramian.bayes.risk import SampledRisk, sampled_errors
from gramian.compress.chains import Chain, steps_of
from gramian.compress.draws import draw_outputs, error_reader
from gramian.compress.masks import Mode, add_masks, draw, keep, masks_of, originals_of, set_mode

Step = Callable[[], object]

MLP = (784, 300, 100, 10)
SIZES = ((20, 50, 2), (64, 32, 10), (64, 100, 100, 10), (784, 100, 10), MLP)
DENSITY = 0.1
BATCH = 500
"""Draws that `sampled_errors` asks for at once."""


@dataclass(frozen=True)
class Posterior:
    """λ of a share of the weights and of the others."""

    name: str
    high: float
    low: float
    share: float

    def probabilities(self, shape: torch.Size, seed: int) -> Tensor:
        chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < self.share
        return torch.where(chosen, self.high, self.low)


POSTERIORS = (
    Posterior("0.5 everywhere", 0.5, 0.5, 0.5),
    Posterior("0.9 for a tenth, 0.1", 0.9, 0.1, 0.1),
    Posterior("learnt: 0.95 for a tenth, 0.02", 0.95, 0.02, 0.1),
)


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Two convolutions for images of 28 × 28."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "MLP 784-300-100-10": (lambda: mlp(MLP), (784,), (128, 512, 2048)),
    "CNN 16-32, 28 × 28": (cnn, (1, 28, 28), (128, 512)),
}

WAYS: dict[str, tuple[Mode, str]] = {
    "fixed mask, weights": ("kept", "weights"),
    "relaxed, masks": ("relaxed", "masks"),
    "relaxed, both": ("relaxed", "both"),
    "straight-through, masks": ("straight_through", "masks"),
    "straight-through, both": ("straight_through", "both"),
    "moments, masks": ("moments", "masks"),
    "moments, both": ("moments", "both"),
}
"""What is trained, and how."""


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def trained(model: nn.Module, x: Tensor, y: Tensor, before: Step = lambda: None) -> Step:
    """Return a step of Adam on whatever wants a gradient."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3, fused=True)

    def step() -> None:
        before()
        optimiser.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimiser.step()

    return step


def masked_step(model: nn.Module, x: Tensor, y: Tensor, mode: Mode, learn: str) -> Step:
    masks, generator = add_masks(model, weights="trainable"), torch.Generator().manual_seed(0)
    chosen = {id(mask.logits) for mask in masks.values()}
    for parameter in model.parameters():
        is_logit = id(parameter) in chosen
        parameter.requires_grad_(learn == "both" or is_logit == (learn == "masks"))
    if mode == "kept":
        keep(model, {name: random_units(mask.kept.shape) for name, mask in masks.items()})
        return trained(model, x, y)
    set_mode(model, mode, temperature=0.5, generator=generator)
    return trained(model, x, y, (lambda: None) if mode == "moments" else (lambda: draw(model, generator)))


def pruned(model: nn.Module) -> nn.Module:
    """Put a fixed mask on as torch.nn.utils.prune does."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            prune.custom_from_mask(module, "weight", random_units(module.weight.shape).float())
    return model


def random_units(shape: torch.Size) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < DENSITY


def of_steps(rounds: int) -> list[str]:
    lines = [
        "A step of training (fused Adam, cross-entropy) without masks, median ms, and the time of the others",
        "over that in the same round, median. Moments take two products a layer.",
        "",
        "| network | batch | dense (ms) | torch.nn.utils.prune | " + " | ".join(WAYS) + " |",
        "|---" * (4 + len(WAYS)) + "|",
    ]
    for name, (make, size, batches) in NETWORKS.items():
        for batch in batches:
            x, y = torch.randn(batch, *size), torch.randint(10, (batch,))
            steps = {"dense": trained(made(make), x, y), "prune": trained(pruned(made(make)), x, y)}
            steps |= {way: masked_step(made(make), x, y, *how) for way, how in WAYS.items()}
            seconds = timed(steps, rounds, 3)
            ratios = [f"{ratio(seconds, way, 'dense'):.2f}" for way in steps if way != "dense"]
            once = f"{1000 * statistics.median(seconds['dense']):.2f}"
            lines.append(f"| {name} | {batch} | {once} | " + " | ".join(ratios) + " |")
    return lines


@torch.no_grad()
def of_products(rounds: int) -> list[str]:
    """Return the rows of a pass under a fixed mask of which nothing is removed."""
    lines = [
        "",
        f"A pass without gradients under one fixed mask of density {DENSITY:g}, against the plain network.",
        "",
        "| network | batch | plain (ms) | torch.nn.utils.prune | gramian |",
        "|---|---|---|---|---|",
    ]
    for name, (make, size, batches) in NETWORKS.items():
        for batch in batches:
            x, ours = torch.randn(batch, *size), made(make)
            masks = add_masks(ours)
            keep(ours, {layer: random_units(mask.kept.shape) for layer, mask in masks.items()})
            models = {"plain": made(make), "prune": pruned(made(make)), "gramian": ours}
            torch.testing.assert_close(models["prune"](x), ours(x), rtol=1e-4, atol=1e-5)
            seconds = timed({way: lambda m=m: m(x) for way, m in models.items()}, rounds, 3)  # noqa: B023
            ratios = " | ".join(f"{ratio(seconds, way, 'plain'):.2f}" for way in ("prune", "gramian"))
            lines.append(
                f"| {name} | {batch} | {1000 * statistics.median(seconds['plain']):.2f} | {ratios} |"
            )
    return lines


def bias_of(model: nn.Module, layer: str) -> Tensor:
    module = model.get_submodule(layer)
    assert isinstance(module, nn.Linear)
    return module.bias


class Case:
    """A network, a posterior and a bound set."""

    def __init__(self, sizes: tuple[int, ...], examples: int, posterior: Posterior) -> None:
        self.sizes, self.examples, self.posterior = sizes, examples, posterior
        self.model, self.generator = made(lambda: mlp(sizes)).eval(), torch.Generator().manual_seed(0)
        self.x = torch.randn(examples, sizes[0], generator=self.generator)
        with torch.no_grad():
            self.y = self.model(self.x).argmax(-1)
        for k, (name, mask) in enumerate(add_masks(self.model).items()):
            chance = posterior.probabilities(originals_of(self.model)[name].shape, k)
            mask.logits.data = chance.logit()
        self.layers = [
            (originals_of(self.model)[name].detach(), bias_of(self.model, name), mask.probabilities)
            for name, mask in masks_of(self.model).items()
        ]

    def ours(self, draws: int) -> SampledRisk:
        read = error_reader(self.y)
        return sampled_errors(
            lambda count, generator: draw_outputs(self.model, self.x, count, generator, read=read),
            draws,
            self.generator,
            BATCH,
        )

    @torch.no_grad()
    def looped(self, draws: int) -> SampledRisk:
        risks = []
        for _ in range(draws):
            h = self.x
            for k, (weight, bias, chance) in enumerate(self.layers):
                h = functional.linear(h.relu() if k else h, weight * torch.bernoulli(chance), bias)
            risks.append((h.argmax(-1) != self.y).double().mean())
        return SampledRisk(torch.stack(risks), self.examples)

    def row(self, draws: int, looped: int, rounds: int) -> str:
        """Time both, and hold their mean risks against each other."""
        with torch.no_grad():
            chain = Chain(self.model, steps_of(self.model, self.x) or [], self.x)
        few = "".join("s" if layer.is_sparse else "p" for layer in chain.layers.values())
        seconds = timed({"ours": lambda: self.ours(draws), "loop": lambda: self.looped(looped)}, rounds, 1)
        once = {"ours": draws, "loop": looped}
        a_draw = {way: [s / once[way] for s in each] for way, each in seconds.items()}
        mine, other = self.ours(draws), self.looped(looped)
        error = math.sqrt(mine.variance * (1 / mine.draws + 1 / other.draws))
        ours, loop = (1000 * statistics.median(a_draw[way]) for way in ("ours", "loop"))
        times, apart = ratio(a_draw, "loop", "ours"), (mine.mean - other.mean) / max(error, 1e-12)
        return (
            f"| {'-'.join(map(str, self.sizes))} | {self.examples} | {self.posterior.name} | {few} "
            f"| {ours:.3f} | {loop:.3f} | {times:.1f} | {apart:+.1f} |"
        )


def of_certificates(rounds: int, scale: float) -> list[str]:
    lines = [
        "",
        "Risks of drawn masks, each on all examples: ms a draw, batched against the loop. By layer, s is a",
        "sum over the weights kept (of the first layer: over those that are not as most probable), p a",
        "product with zeros. The last column is the difference of the mean risks in its standard errors.",
        "",
        "| MLP | examples | λ | layers | batched (ms) | loop (ms) | its time / ours | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for sizes in SIZES:
        weights = sum(a * b for a, b in pairwise(sizes))
        for examples in (100, 1000, 10_000):
            for posterior in POSTERIORS:
                looped = max(5, min(300, round(scale * 5e10 / (weights * examples))))
                case = Case(sizes, examples, posterior)
                lines.append(case.row(min(3000, 10 * looped), looped, rounds))
    return lines


def of_all_draws(draws: int) -> list[str]:
    """Time every draw of a certificate; the loop is timed on fewer and scaled."""
    lines = [
        "",
        f"{draws:,} draws on 10,000 examples: batched in full, once; the loop on {max(2, draws // 100)}, "
        "before and after, and scaled in proportion.",
        "",
        "| MLP | λ | batched (s) | loop (s) | its time / ours |",
        "|---|---|---|---|---|",
    ]
    for sizes in SIZES[-2:]:
        for posterior in POSTERIORS:
            case, few, spent = Case(sizes, 10_000, posterior), max(2, draws // 100), []
            for way, count in ((case.looped, few), (case.ours, draws), (case.looped, few)):
                start = time.perf_counter()
                way(count)
                spent.append((time.perf_counter() - start) * draws / count)
            loop = (spent[0] + spent[2]) / 2
            lines.append(
                f"| {'-'.join(map(str, sizes))} | {posterior.name} | {spent[1]:.0f} | {loop:.0f} "
                f"| {loop / spent[1]:.1f} |"
            )
    return lines


PARTS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "steps": lambda chosen: of_steps(chosen.rounds),
    "products": lambda chosen: of_products(chosen.rounds),
    "certificates": lambda chosen: of_certificates(max(1, chosen.rounds // 3), chosen.draws / 10_000),
    "all": lambda chosen: of_all_draws(chosen.draws),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    chosen = parser.parse_args()
    write_results("pruning", [line for part in chosen.only for line in PARTS[part](chosen)], {})


if __name__ == "__main__":
    main()
