"""Monte-Carlo dropout: a network whose dropout stays on at prediction, each draw of masks a member."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.modules.dropout import _DropoutNd

from gramian.bayes.members import Make, seeded
from gramian.core.jacobian import check_rows
from gramian.core.predictive import Predictive
from gramian.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DropoutConfig:
    """How a network with dropout is trained and read."""

    noise_variance: float = 0.01
    """Variance σ² of the targets' noise."""
    weight_decay: float = 1e-4
    """Decoupled decay of AdamW."""
    steps: int = 2000
    learning_rate: float = 3e-3
    batch: int | None = None
    """Rows of a step; all when None."""
    samples: int = 100
    """Draws of masks at prediction."""
    seed: int = 0


@dataclass(frozen=True, eq=False)
class DropoutNetwork:
    """A trained network whose dropout is drawn anew for every prediction."""

    module: nn.Module
    config: DropoutConfig

    def predict(self, x: Shaped[Tensor, " n *size"]) -> Predictive:
        """Return the mean and variance over draws of masks; the same draws for the same seed.

        Shapes: (n, …) -> (n) or (n, O), as the targets were; samples (draws, …).
        Raises: InputError for x without rows, with NaN or infinity.
        """
        check_rows(x)
        with torch.no_grad(), _drawing(self.module, self.config.seed, x.device):
            draws = torch.stack([self.module(x) for _ in range(self.config.samples)])
        return Predictive.from_samples(draws, self.config.noise_variance)


def fit_dropout(
    make: Make,
    x: Shaped[Tensor, " n *size"],
    y: Float[Tensor, " m *outputs"],
    config: DropoutConfig,
    progress: Callable[[int], None] = lambda step: None,
) -> DropoutNetwork:
    """Train a network with dropout on the squared error by AdamW with a cosine to zero.

        q(f(x)): the law of f(x, θ ∘ mask) over masks;  y = f + ε, ε ~ N(0, σ²)

    Shapes: x (n, …), y as the module returns it.
    Raises: InputError for a module without an active dropout layer, data that are not finite or do not fit,
        fewer than two samples.
    Holds: empirically; as a variational posterior, for the prior that the weight decay stands for.
    Source: Gal, Ghahramani 2016, arXiv 1506.02142.
    """
    check_rows(x)
    if config.samples < 2 or config.steps < 1:
        raise InputError(f"dropout needs 2 samples and 1 step or more, got {config.samples}, {config.steps}")
    if len(y) != len(x) or not bool(y.isfinite().all()):
        raise InputError(f"targets must be finite, one for each of {len(x)} rows, got {tuple(y.shape)}")
    with seeded(config.seed, x.device):
        module = make().to(device=x.device, dtype=x.dtype if x.is_floating_point() else None)
    if not any(layer.p > 0 for layer in _dropouts(module)):
        raise InputError(f"{type(module).__name__} has no dropout layer with a rate above 0")
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    with seeded(config.seed + 1, x.device):
        for step, rows in zip(range(config.steps), _batches(len(x), config.batch), strict=False):
            found = module(x[rows])
            if found.shape != y[rows].shape:
                raise InputError(
                    f"the module returns {tuple(found.shape)} where targets are {tuple(y[rows].shape)}"
                )
            optimiser.zero_grad()
            mse_loss(found, y[rows]).backward()
            optimiser.step()
            schedule.step()
            progress(step + 1)
    return DropoutNetwork(module.eval(), config)


def _batches(n: int, batch: int | None) -> Iterator[slice | Tensor]:
    while True:
        if batch is None or batch >= n:
            yield slice(None)
        else:
            yield from torch.randperm(n).split(batch)


def _dropouts(module: nn.Module) -> list[_DropoutNd]:
    return [layer for layer in module.modules() if isinstance(layer, _DropoutNd)]


@contextmanager
def _drawing(module: nn.Module, seed: int, device: torch.device) -> Iterator[None]:
    """Turn dropout layers on, and nothing else, while randomness is that of the seed."""
    module.eval()
    for layer in _dropouts(module):
        layer.train()
    try:
        with seeded(seed, device):
            yield
    finally:
        module.eval()
