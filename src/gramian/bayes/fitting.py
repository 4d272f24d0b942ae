"""Training all members of an ensemble at once: the loss of each, and one optimiser over the stack."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from gramian.bayes.members import seed_of
from gramian.bayes.stack import State
from gramian.core.jacobian import Parameters
from gramian.errors import DivergedError, InputError

Optimiser = Callable[..., torch.optim.Optimizer]
"""Called with a list of tensors and `lr`, as torch's optimisers are; it has to treat every number alone."""

ADAM = partial(torch.optim.Adam, fused=True)
"""The optimiser unless another is given, all its arithmetic in one pass."""

Rows = Tensor | slice
FLOOR = 1e-6
"""The smallest noise variance that a heteroscedastic network can give."""


class Likelihood(Protocol):
    """What a network's outputs say about the targets."""

    per_target: int
    """Outputs of the network for each target."""

    def penalty(self, noise_variance: float) -> float:
        """Return what multiplies ½‖θ − a‖²_Λ / N beside the loss."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor, clean: Tensor) -> Tensor:
        """Return the mean loss of a row for every member, given its own targets and those of all."""
        ...

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the targets' mean."""
        ...

    def variance(self, outputs: Tensor) -> Tensor | None:
        """Return the targets' noise variance, where the network knows it."""
        ...

    def offset(self, values: Tensor) -> Tensor:
        """Return the part of δ that acts."""
        ...


class SquaredError:
    """Targets are the outputs with noise of one known variance σ².

        ℓ = ½ Σ_o (f_o − y_o)²,  and σ² times the regulariser

    Shapes: outputs (members, n, O), targets (members, n, O) -> (members).
    Holds: exactly.
    """

    per_target = 1

    def penalty(self, noise_variance: float) -> float:
        """Return σ²."""
        return noise_variance

    def loss(
        self,
        outputs: Float[Tensor, "members n o"],
        targets: Float[Tensor, "members n o"],
        clean: Float[Tensor, "n o"],
    ) -> Float[Tensor, " members"]:
        """Return half of the mean squared error, summed over outputs."""
        return 0.5 * (outputs - targets).square().sum(-1).mean(-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the outputs."""
        return outputs

    def variance(self, outputs: Tensor) -> Tensor | None:
        """Return None: the noise is not the network's to say."""
        return None

    def offset(self, values: Tensor) -> Tensor:
        """Return all of δ."""
        return values


class Heteroscedastic:
    """Targets are Gaussian with the mean and the variance that the network gives, O outputs for each.

        ℓ = Σ_o ½ ln σ_o² + (μ_o − y_o)²/(2σ_o²),  (μ, s) = f,  σ² = softplus(s) + floor

    The mean is drawn to the member's own noisy targets, the variance to the spread of those without that
    noise around the mean; where both are the same this is the gradient of ℓ. δ acts on the mean alone.
    Targets of unit variance suit the start of σ².

    Shapes: outputs (members, n, 2 O), targets (members, n, O), clean (n, O) -> (members).
    Holds: exactly.
    Source: the likelihood of Lakshminarayanan, Pritzel, Blundell 2017, arXiv 1612.01474.
    """

    per_target = 2

    def penalty(self, noise_variance: float) -> float:
        """Return 1: the likelihood is divided by its noise already."""
        return 1.0

    def loss(
        self,
        outputs: Float[Tensor, "members n _"],
        targets: Float[Tensor, "members n o"],
        clean: Float[Tensor, "n o"],
    ) -> Float[Tensor, " members"]:
        """Return the mean negative log-likelihood of the member's targets, without its constant."""
        mean, variance = self.mean(outputs), self.variance(outputs)
        fit = (mean - targets).square() / variance.detach()
        spread = (mean.detach() - clean).square() * (1 / variance - 1 / variance.detach())  # 0 but its slope
        return 0.5 * (variance.log() + fit + spread).sum(-1).mean(-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the first half of the outputs."""
        return outputs.chunk(2, -1)[0]

    def variance(self, outputs: Tensor) -> Tensor:
        """Return the softplus of the second half, above the floor."""
        return softplus(outputs.chunk(2, -1)[1]) + FLOOR

    def offset(self, values: Tensor) -> Tensor:
        """Return δ with its second half set to zero."""
        count = values.shape[-1]
        return values * (torch.arange(count, device=values.device) < count // 2)


LIKELIHOODS: dict[str, Likelihood] = {"squared_error": SquaredError(), "heteroscedastic": Heteroscedastic()}


@dataclass(frozen=True, eq=False)
class Regulariser:
    """The weighted distance of every member from its anchor.

        ½ weight ‖θ − a‖²_Λ,  ‖v‖²_Λ = Σ_j v_j²/Λ_j over parameters with Λ_j > 0

    Shapes: θ, a (members, …), `precision` = weight/Λ broadcasts to a member's.
    Holds: exactly.
    """

    anchor: State
    precision: Parameters

    @classmethod
    def of(cls, anchor: State, prior: Parameters, weight: float) -> "Regulariser":
        """Make it of the variances Λ."""
        return cls(anchor, {name: weight * reciprocal(variance) for name, variance in prior.items()})

    def value(self, parameters: State) -> Float[Tensor, " members"]:
        """Return it for every member."""
        terms = [
            ((value.detach() - self.anchor[name]).square() * self.precision[name]).flatten(1).sum(1)
            for name, value in parameters.items()
        ]
        return 0.5 * torch.stack(terms).sum(0)

    def slope(self, name: str, parameter: Tensor) -> Tensor:
        """Return its gradient by one parameter of every member."""
        return (parameter.detach() - self.anchor[name]).mul_(self.precision[name])


def reciprocal(variance: Tensor) -> Tensor:
    """Return 1/Λ, and 0 where Λ is."""
    return torch.where(variance > 0, 1 / variance, torch.zeros_like(variance))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How many steps of which size: a cosine from the learning rate to 0."""

    steps: int
    learning_rate: float
    batch: int | None
    tolerance: float
    seed: int
    optimiser: Optimiser = ADAM


def train(
    start: State,
    loss: Callable[[State, Rows], Float[Tensor, " members"]],
    prior: Parameters,
    count: int,
    schedule: Schedule,
    progress: Callable[[int], None],
    regulariser: Regulariser | None = None,
) -> tuple[State, Float[Tensor, " members"]]:
    """Minimise loss and regulariser of every member by one optimiser; no member touches another.

    Parameters stay where Λ is 0. A member is done at the first step at which √(Σ_j Λ_j (∂ℓ/∂θ_j)²) is at most
    the tolerance; training ends when all are, or after the last step. All members see the same batches.

    Returns: the parameters, and every member's loss at the last step that was taken.
    Raises: DivergedError when a loss is not finite; InputError for steps, rates or batches out of range.
    """
    _check(schedule)
    theta = {name: value.clone().requires_grad_() for name, value in start.items()}
    leaves = list(theta.values())
    optimiser = schedule.optimiser(leaves, lr=schedule.learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, schedule.steps)
    held = {name: variance == 0 for name, variance in prior.items() if bool((variance == 0).any())}
    done = _Done(theta, prior, schedule.tolerance)
    losses = torch.zeros(len(leaves[0])).to(leaves[0])
    for step, rows in zip(range(schedule.steps), _batches(count, schedule), strict=False):
        losses = loss(theta, rows)
        gradients = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
        for (name, leaf), gradient in zip(theta.items(), gradients, strict=True):
            # contiguous, since the fused optimisers read memory as it lies
            slope = regulariser.slope(name, leaf).add_(gradient) if regulariser else gradient.contiguous()
            leaf.grad = slope.masked_fill_(held[name], 0) if name in held else slope
        ended = (schedule.tolerance > 0 and done.all(theta)) or step == schedule.steps - 1
        if ended and regulariser is not None:
            losses = losses + regulariser.value(theta)
        if ended or step % 100 == 0:
            _check_finite(losses, step)
        if ended and done.reached.all():
            break
        optimiser.step()
        cosine.step()
        progress(step + 1)
    return done.parameters(theta), losses.detach()


class _Done:
    """Keeps the parameters of members whose gradient has become small."""

    def __init__(self, theta: State, prior: Parameters, tolerance: float) -> None:
        self.prior, self.tolerance = prior, tolerance
        self.kept = {name: value.detach().clone() for name, value in theta.items()} if tolerance else {}
        self.reached = torch.zeros(len(next(iter(theta.values()))), dtype=torch.bool)

    def all(self, theta: State) -> bool:
        """Keep the members that have just got there, and tell whether all have."""
        gradients = {name: value.grad for name, value in theta.items()}
        squares = [
            (gradient.square() * self.prior[name]).flatten(1).sum(1)
            for name, gradient in gradients.items()
            if gradient is not None
        ]
        small = (torch.stack(squares).sum(0).sqrt() <= self.tolerance).cpu()
        for m in torch.nonzero(small & ~self.reached).flatten().tolist():
            for name, value in theta.items():
                self.kept[name][m] = value[m].detach()
        self.reached |= small
        return bool(self.reached.all())

    def parameters(self, theta: State) -> State:
        """Return what was kept, and the present parameters of the others."""
        found = {name: value.detach().clone() for name, value in theta.items()}
        for m in torch.nonzero(self.reached).flatten().tolist():
            for name, value in found.items():
                value[m] = self.kept[name][m]
        return found


def _batches(count: int, schedule: Schedule) -> Iterator[Rows]:
    generator = torch.Generator().manual_seed(seed_of(schedule.seed, "batches"))
    while True:
        if schedule.batch is None or schedule.batch >= count:
            yield slice(None)
        else:
            yield from torch.randperm(count, generator=generator).split(schedule.batch)


def _check(schedule: Schedule) -> None:
    if schedule.steps < 1 or schedule.learning_rate <= 0:
        raise InputError(
            f"training needs a step and a positive learning rate, got {schedule.steps} and "
            f"{schedule.learning_rate:g}"
        )
    if schedule.batch is not None and schedule.batch < 1:
        raise InputError(f"a batch needs at least one row, got {schedule.batch}")
    if schedule.tolerance < 0 or (schedule.tolerance and schedule.batch is not None):
        raise InputError(
            "the tolerance of the gradient has to be 0 (all steps are taken) or positive with the full batch"
        )


def _check_finite(losses: Tensor, step: int) -> None:
    if not bool(losses.isfinite().all()):
        bad = int((~losses.isfinite()).sum())
        raise DivergedError(
            f"the loss of {bad} of {len(losses)} members is not finite at step {step}; lower the learning "
            "rate"
        )
