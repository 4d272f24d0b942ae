"""Learning of random masks: probabilities by mirror descent under a held density, weights by Adam.

Nothing here is a certificate. A posterior may be learnt on any data; what certifies it must be fresh.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import cos, inf, isfinite, pi
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gramian.compress.density import Scope, cubic, sizes_of
from gramian.compress.draws import MaskedLoss, flat_logits
from gramian.compress.mask_gradients import disarm, hard_concrete_kept, hard_concrete_mean, score_function
from gramian.compress.masks import Mode, StochasticMask, Units, draw, keep, masks_of, originals_of, set_mode
from gramian.compress.structures import Patterns
from gramian.compress.thresholds import most_probable
from gramian.errors import InputError

Sample = Callable[[int], tuple[Tensor, Tensor]]
"""step -> (inputs, targets), made from the step alone, so that a run can be repeated."""
Loss = Callable[[Any, Tensor], Tensor]
"""(outputs, targets) -> a scalar."""
Objective = Callable[[Tensor], Tensor]
"""Mean loss of a batch -> what is minimised: itself, with a penalty, or a PAC-Bayes bound."""

Estimate = Literal[
    "moments", "relaxed", "straight_through", "hard_concrete", "kept", "score_function", "disarm"
]
Learnt = Literal["masks", "weights", "both"]
BLACK_BOX = {"score_function": score_function, "disarm": disarm}
"""Estimates that only evaluate the loss, so that it may be the 0-1 error."""

BINS = 20
"""Bins of a histogram of λ, equal and over [0, 1]."""
LARGEST_LOGIT = 12.0
"""Logits are kept within ± this, where λ is 6e-6 from 0 or 1 and still has a gradient."""
LEAST_VARIANCE = 0.01
"""λ(1 − λ) counts as at least this in the gradient by λ, whose noise would grow without bound."""
MOMENTUM, SCALE_MEMORY = 0.9, 0.99
"""Shares of the past in the mean gradient and in the mean of its square."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How probabilities, weights or both are learnt. Both rates fall to 0 as a cosine.

    | mode | what a step sees |
    |---|---|
    | moments | Gaussian pre-activations of the mask's mean and variance |
    | relaxed | one relaxed mask a batch, at a temperature that falls geometrically |
    | straight_through | one mask a batch, differentiated as if it were its probability; biased |
    | hard_concrete | one hard concrete mask a batch; `fix_hard_concrete` ends it |
    | kept | the fixed units of `masks.keep`; for the weights alone |
    | score_function, disarm | `draws` masks or pairs a batch, and no backward pass; for the masks alone |

    Attributes:
        steps: batches; with none everything stays as it is.
        mode: see the table.
        learn: "masks", "weights" or "both". With Gaussian weights, means and standard deviations are learnt,
            and nothing that has no law. With others, all weights and biases that are not frozen otherwise.
        rate: of the logits, a typical change a step at first; 0.1, for hard concrete masks better 0.3.
        weight_rate: Adam's, of weights and biases.
        temperature: first and last, of the mode relaxed.
        draws: of score_function and disarm; time and memory of a step grow in proportion.
        record_every: steps between two records.
    """

    steps: int = 1000
    mode: Estimate = "moments"
    learn: Learnt = "masks"
    rate: float = 0.1
    weight_rate: float = 1e-3
    temperature: tuple[float, float] = (1.0, 0.1)
    draws: int = 8
    record_every: int = 50

    def check(self) -> None:
        """Refuse settings that cannot be used.

        Raises: InputError for the first one.
        """
        for name, value, kinds in (("mode", self.mode, Estimate), ("learn", self.learn, Learnt)):
            if value not in get_args(kinds):
                raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(get_args(kinds))}")
        for name, least in (
            ("steps", 0),
            ("draws", 1 + (self.mode == "score_function")),
            ("record_every", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("rate", "weight_rate"):
            if not 0 < getattr(self, name) < inf:
                raise InputError(f"{name} must be a positive number, got {getattr(self, name)}")
        if not all(0 < temperature < inf for temperature in self.temperature):
            raise InputError(f"both temperatures must be positive numbers, got {self.temperature}")
        if self.mode == "kept" and self.learn != "weights":
            raise InputError(f"the mode kept has a fixed mask; learn weights, not {self.learn}")
        if self.mode in BLACK_BOX and self.learn != "masks":
            raise InputError(f"{self.mode} has no gradient by weights; learn masks, not {self.learn}")


@dataclass(frozen=True)
class Moment:
    """One record of the history.

    Attributes:
        step: steps made.
        loss: mean since the last record of the loss of the batches, as the mode sees it.
        objective: the same of what is minimised.
        density: mean over weights of λ; of P(z ≠ 0) for hard concrete masks, of what is kept for fixed ones.
        histograms: by layer, how many units have this probability in each of `BINS` bins.
    """

    step: int
    loss: float
    objective: float
    density: float
    histograms: dict[str, tuple[int, ...]]


def learn(
    model: nn.Module,
    sample: Sample,
    loss: Loss,
    settings: Learning,
    *,
    density: float | None = None,
    first_density: float | None = None,
    objective: Objective | None = None,
    generator: torch.Generator,
    advanced: Callable[[int], None] = lambda step: None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Moment]:
    """Learn the masks of a model, its weights or both, from where they are, and return the history.

        s_u ← s_u − η g_u / √⟨g²⟩ − v,   g_u = ∂F/∂λ_u / c_u with momentum

    F is the objective, c_u the number of weights of unit u, ⟨·⟩ the mean over all units and past steps. Gains
    compete as they are; Adam, with one scale a unit, would make small gains as good as large ones. v ≥ 0 is
    the least with mean λ ≤ `density`, the nearest point in relative entropy; from `first_density` on, the
    density falls as a cubic over the first half of the steps. Of n:m patterns the mirror is that of their
    categories, and the density is what it is.

    The masks end in the mode "threshold", "kept" when they were, "hard_concrete" for `fix_hard_concrete`.
    Modes of modules are the caller's; yet with masks alone learnt, norms do not move their statistics and
    use them, and every weight stays as it is. `advanced` is told the steps made; when `stopped` says so the
    history ends early, and the masks are usable as they are. The generator decides all, unless the model
    draws numbers itself, as dropout does in training.

    Shapes: `sample` (inputs (n, …), targets (n, …)).
    Raises: InputError for settings that cannot be used, a model without masks, a mode that a layer does not
        have, a density out of reach or without masks to learn, and a loss that is not a number.
    Holds: empirically; the expected loss has its minimum at λ in {0, 1}, and learning comes near to one.
    Source: Hayou, He, Dziugaite 2021, arXiv 2110.11804 (objective); Beck & Teboulle 2003 (mirror descent).
    """
    settings.check()
    _check_density(model, settings, density, first_density)
    set_mode(model, "mean" if settings.mode in BLACK_BOX else cast(Mode, settings.mode), generator=generator)
    weights = [] if settings.learn == "masks" else _weights(model)
    masks = None if settings.learn == "weights" else _MirrorDescent(model, settings.mode == "hard_concrete")
    adam = torch.optim.Adam(weights, lr=settings.weight_rate) if weights else None
    history, seen = [], []
    with _learning(model, weights, masks is not None):
        for step in range(settings.steps):
            if stopped():
                break
            model.zero_grad()
            mean = _mean_loss(model, *sample(step), loss, settings, step, generator)
            value = mean if objective is None else objective(mean)
            value.backward()
            share = (1 + cos(pi * step / settings.steps)) / 2
            if masks is not None:
                masks.step(settings.rate * share)
                if density is not None:
                    begin = density if first_density is None else first_density
                    masks.hold(cubic(step + 1, 0, max(settings.steps // 2, 1), begin, density))
            if adam is not None:
                adam.param_groups[0]["lr"] = settings.weight_rate * share
                adam.step()
            seen.append((mean.detach(), value.detach()))
            if step in (0, settings.steps - 1) or (step + 1) % settings.record_every == 0:
                history.append(_record(model, step + 1, seen))
                seen = []
            advanced(step + 1)
        model.zero_grad()
    set_mode(model, cast(Mode, settings.mode) if settings.mode in ("kept", "hard_concrete") else "threshold")
    return history


@torch.no_grad()
def fix_hard_concrete(model: nn.Module, density: float, scope: Scope = "model") -> Units:
    """Fix learnt hard concrete masks to the deterministic network that stands for them, and return its units.

        w ← ẑ ∘ w,   ẑ = clip(σ(s)(ζ − γ) + γ, 0, 1),   kept the units of largest ẑ at the density

    A hard concrete mask also scales what it keeps, so ẑ is written into the weights; the units go into the
    mode "kept". Where ẑ is 0 a kept unit is 0 all the same.

    Raises: InputError as `density.keep_highest`, before anything is changed.
    Holds: exactly.
    Source: Louizos, Welling, Kingma 2018, arXiv 1712.01312, Eq. 13.
    """
    units, weights = most_probable(model, density, scope), originals_of(model)
    for name, mask in masks_of(model).items():
        weights[name].mul_(mask.spread(hard_concrete_mean(mask.logits), weights[name]))
    keep(model, units)
    return units


class _MirrorDescent:
    """Descent of the logits of all masks along the gradient by λ, and the shift that holds their density."""

    def __init__(self, model: nn.Module, hard_concrete: bool) -> None:
        self.masks, sizes = masks_of(model), sizes_of(model)
        self.chance = hard_concrete_kept if hard_concrete else torch.sigmoid
        logits = flat_logits(model)
        self.lengths = [mask.logits.numel() for mask in self.masks.values()]
        self.cost = self._laid(float(sizes[name]) for name in self.masks)
        free = self._laid(float(not isinstance(mask.structure, Patterns)) for mask in self.masks.values())
        self.free, self.share = free, self.cost * free / (self.cost * free).sum().clamp(min=1)
        self.mean, self.square, self.steps = torch.zeros_like(logits), torch.zeros(()).to(logits), 0

    def _laid(self, values: Iterator[float]) -> Tensor:
        """Return one number a layer, copied to all of its logits."""
        parts = zip(self.masks.values(), values, strict=True)
        return torch.cat([torch.full_like(mask.logits.detach().flatten(), value) for mask, value in parts])

    def _flat(self) -> Tensor:
        return torch.cat([mask.logits.flatten() for mask in self.masks.values()])

    def _write(self, logits: Tensor) -> None:
        logits = logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        for mask, part in zip(self.masks.values(), logits.split(self.lengths), strict=True):
            mask.logits.copy_(part.reshape(mask.logits.shape))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the logits against the gradient that the last backward pass left."""
        slope = torch.cat([_slope(mask).flatten() for mask in self.masks.values()]) / self.cost
        self.steps += 1
        self.mean.lerp_(slope, 1 - MOMENTUM)
        self.square.lerp_(slope.square().mean(), 1 - SCALE_MEMORY)
        scale = (self.square / (1 - SCALE_MEMORY**self.steps)).sqrt().clamp(min=torch.finfo(slope.dtype).tiny)
        self._write(self._flat() - self.mean * (rate / (1 - MOMENTUM**self.steps) / scale))

    @torch.no_grad()
    def hold(self, density: float) -> None:
        """Shift the logits down until the mean probability over weights is at most the density."""
        logits, down = self._flat(), 0.0
        for _ in range(100):  # Newton's method, at most 1 a step: flat tails would throw it far
            chance = self.chance(logits - down)
            excess = float(chance @ self.share) - density
            if (excess <= 0 and down == 0) or abs(excess) <= 1e-6 * density:
                break
            slope = float((chance * (1 - chance)) @ self.share)
            down = max(0.0, down + min(max(excess / max(slope, 1e-12), -1.0), 1.0))
        if down:
            self._write(logits - down * self.free)


def _slope(mask: StochasticMask) -> Float[Tensor, "..."]:
    """Return the gradient by the probabilities from that by the logits."""
    gradient = torch.zeros_like(mask.logits) if mask.logits.grad is None else mask.logits.grad
    if isinstance(mask.structure, Patterns):
        slope = gradient / mask.logits.softmax(-1).clamp(min=LEAST_VARIANCE)
        return slope - slope.mean(-1, keepdim=True)
    return gradient / (mask.logits.sigmoid() * (-mask.logits).sigmoid()).clamp(min=LEAST_VARIANCE)


def _mean_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    settings: Learning,
    step: int,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Return the loss of a batch with the gradient that the mode gives it."""
    if settings.mode in BLACK_BOX:
        return _estimated(model, MaskedLoss(model, x, y, loss), settings, generator)
    if settings.mode == "relaxed":
        first, last = settings.temperature
        for mask in masks_of(model).values():
            mask.temperature = first * (last / first) ** (step / max(settings.steps - 1, 1))
    if settings.mode in ("relaxed", "straight_through", "hard_concrete"):
        draw(model, generator)
    return loss(model(x), y)


def _estimated(
    model: nn.Module, loss: MaskedLoss, settings: Learning, generator: torch.Generator
) -> Float[Tensor, ""]:
    """Return the mean loss of the masks that an estimator drew, whose gradient is the estimate."""
    losses: list[Tensor] = []

    def noted(masks: Tensor) -> Tensor:
        losses.append(loss(masks))
        return losses[-1]

    gradient = partial(BLACK_BOX[settings.mode], draws=settings.draws)(noted, flat_logits(model), generator)
    logits = torch.cat([mask.logits.flatten() for mask in masks_of(model).values()])
    return torch.cat(losses).mean() + gradient @ (logits - logits.detach())


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """Return what is learnt beside the logits: all that has a law, or else all that is not frozen."""
    masks, originals = masks_of(model), list(originals_of(model).values())
    stds = [mask.log_std for mask in masks.values() if mask.log_std is not None]
    if stds:
        return [*originals, *stds]
    others = {*originals, *(mask.logits for mask in masks.values())}
    return [
        *originals,
        *(value for value in model.parameters() if value.requires_grad and value not in others),
    ]


@contextmanager
def _learning(model: nn.Module, weights: Sequence[nn.Parameter], masks: bool) -> Iterator[None]:
    """Let only what is learnt have gradients, and hold the statistics of norms where no weight is learnt."""
    before = {value: value.requires_grad for value in model.parameters()}
    learnt = {*weights, *(mask.logits for mask in masks_of(model).values() if masks)}
    norms = [] if weights else [m for m in model.modules() if isinstance(m, _NormBase) and m.training]
    try:
        for value in before:
            value.requires_grad_(value in learnt)
        for norm in norms:
            norm.eval()
        yield
    finally:
        for value, required in before.items():
            value.requires_grad_(required)
        for norm in norms:
            norm.train()


def _check_density(model: nn.Module, settings: Learning, density: float | None, first: float | None) -> None:
    if density is None and first is None:
        masks_of(model)
        return
    if density is None:
        raise InputError("first_density is where the density starts from; give density too")
    if settings.learn == "weights":
        raise InputError("the density is held where masks are learnt; leave it out, or learn masks or both")
    most_probable(model, density)
    if first is not None and not density <= first <= 1:
        raise InputError(f"first_density must be from the density of {density:g} to 1, got {first:g}")


@torch.no_grad()
def _record(model: nn.Module, step: int, seen: Sequence[tuple[Tensor, Tensor]]) -> Moment:
    loss, objective = (float(torch.stack(values).mean()) for values in zip(*seen, strict=True))
    if not (isfinite(loss) and isfinite(objective)):
        raise InputError(f"the loss is not a number by step {step}; lower the rates or look at the data")
    sizes, chances = sizes_of(model), {n: _chance(mask).double() for n, mask in masks_of(model).items()}
    kept = sum(float(chance.sum()) * sizes[name] for name, chance in chances.items())
    total = sum(chance.numel() * sizes[name] for name, chance in chances.items())
    counts = {n: torch.histc(chance.clamp(0, 1), BINS, 0, 1) for n, chance in chances.items()}
    return Moment(step, loss, objective, kept / total, {n: tuple(map(int, c)) for n, c in counts.items()})


def _chance(mask: StochasticMask) -> Float[Tensor, "..."]:
    """Return the probability that a unit is not 0."""
    if mask.mode == "kept":
        return mask.kept.float()
    return hard_concrete_kept(mask.logits) if mask.mode == "hard_concrete" else mask.probabilities
