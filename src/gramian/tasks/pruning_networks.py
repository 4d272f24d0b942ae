"""Classifiers to prune: plain chains of linear or convolutional layers, on which masks are fast."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramian.errors import DivergedError, InputError
from gramian.memory import check_memory
from gramian.train.batches import batch_of
from gramian.train.schedule import multiplier


@dataclass(frozen=True)
class Network:
    """What is needed to build a classifier again.

    Raises: InputError for an unknown name, numbers that are not positive and whole, and a cnn of tables.
    """

    name: str
    """mlp or cnn."""
    size: tuple[int, ...]
    """Of one input: (channels, height, width), or (d,)."""
    classes: int
    widths: tuple[int, ...] = ()
    """Features of the hidden layers, or channels of the convolutions; of `WIDTHS` when none are given."""

    def __post_init__(self) -> None:
        if self.name not in NETWORKS:
            raise InputError(f"unknown network {self.name!r}; choose one of {', '.join(NETWORKS)}")
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "widths", tuple(self.widths) or WIDTHS[self.name])
        numbers = (*self.size, self.classes, *self.widths)
        if not self.size or any(type(number) is not int or number < 1 for number in numbers):
            raise InputError(
                "a network needs positive whole numbers for the size of its inputs, its classes and widths, "
                f"got {self.size}, {self.classes} and {self.widths}"
            )
        if self.name == "cnn" and len(self.size) != 3:
            what = " x ".join(map(str, self.size))
            raise InputError(
                f"a cnn is for images (channels, height, width), not inputs of {what}; use an mlp"
            )


def mlp(network: Network) -> nn.Sequential:
    """Return a chain of linear layers with ReLU between them.

        f(x) = W_L φ(… φ(W_1 x + b_1) …) + b_L

    Shapes: (n, …) -> (n, classes).
    """
    widths = (math.prod(network.size), *network.widths)
    parts: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        parts += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(widths[-1], network.classes))


def cnn(network: Network) -> nn.Sequential:
    """Return a chain of 3 × 3 convolutions with ReLU, and a linear layer on all that is left.

    2 × 2 pixels are pooled to their largest after each convolution, as long as the smaller side has two.

    Shapes: (n, channels, height, width) -> (n, classes).
    """
    channels, height, width = network.size
    parts: list[nn.Module] = []
    for outputs in network.widths:
        parts += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU()]
        channels = outputs
        if min(height, width) >= 2:
            parts.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(channels * height * width, network.classes))


NETWORKS: dict[str, Callable[[Network], nn.Sequential]] = {"mlp": mlp, "cnn": cnn}
"""What can be built, by name."""

WIDTHS = {"mlp": (300, 100), "cnn": (16, 32)}
"""Widths by name when none are given."""


def skeleton(network: Network) -> nn.Sequential:
    """Return a network whose parameters have shapes but no values yet (on the device meta)."""
    with torch.device("meta"):
        return NETWORKS[network.name](network)


def build(network: Network, seed: int) -> nn.Sequential:
    """Return a network with weights drawn from a seed alone.

        W_ij ~ N(0, 2/fan_in),   b = 0

    Raises: InputError for one that no memory here holds.
    Holds: exactly; the global generator is not used.
    Source: He, Zhang, Ren, Sun 2015, arXiv 1502.01852, equation 10.
    """
    _check_memory(network)
    generator = torch.Generator().manual_seed(seed)
    model = skeleton(network).to_empty(device="cpu")
    for value in model.parameters():
        if value.ndim == 1:
            nn.init.zeros_(value)
        else:
            nn.init.kaiming_normal_(value, nonlinearity="relu", generator=generator)
    return model


def _check_memory(network: Network) -> None:
    """Refuse a network that no memory here holds, with at least a gradient and a λ beside every weight."""
    first, taps = (network.size[0], 9) if network.name == "cnn" else (math.prod(network.size), 1)
    weights = taps * sum(inputs * outputs for inputs, outputs in pairwise((first, *network.widths)))
    widths = " ".join(f"{width:,}" for width in network.widths)
    check_memory(12.0 * (weights + network.widths[-1] * network.classes), f"layers of widths {widths}")


def train_dense(
    model: nn.Module,
    x: Float[Tensor, "n ..."],
    y: Int64[Tensor, " n"],
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    advanced: Callable[[int], Any] = lambda step: None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Train a classifier by Adam on its cross-entropy and return the loss of every step, in nats.

        rate_t = rate · (1 + cos(π t/T))/2

    The batch of a step depends on seed and step alone, and `advanced` is told how many steps are done;
    when `stopped` says so training ends early. The model ends in evaluation.

    Raises: InputError for no example, steps below 0, a batch below 1 and a rate that is not positive;
        DivergedError when the loss is not finite.
    """
    if not len(x) or steps < 0 or batch < 1 or not 0 < rate < math.inf:
        raise InputError(
            "training needs examples, steps ≥ 0, a batch ≥ 1 and a rate above 0, got "
            f"{len(x)} examples, {steps}, {batch} and {rate:g}"
        )
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    losses = []
    model.train()
    for step in range(steps):
        if stopped():
            break
        chosen = batch_of(len(x), batch, seed, step).to(x.device)
        loss = cross_entropy(model(x[chosen]), y[chosen])
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise DivergedError(
                f"the loss of the dense network is {losses[-1]} at step {step}, and nothing of it is kept; "
                "lower the rate"
            )
        optimiser.zero_grad()
        loss.backward()
        optimiser.param_groups[0]["lr"] = rate * multiplier(step, steps, 0.0, "cosine")
        optimiser.step()
        advanced(step + 1)
    model.eval()
    return losses
