"""From settings and data to trained members: what is drawn, in which order, and how it is minimised."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gramian.bayes.fitting import LIKELIHOODS, Likelihood, Optimiser, Regulariser, Rows, Schedule, train
from gramian.bayes.linearised import linear_parts, minimisers
from gramian.bayes.members import (
    Draws,
    EnsembleConfig,
    Make,
    Recipe,
    Source,
    draws,
    prior_of,
    readout_of,
    recipe,
    source_of,
    state_of,
)
from gramian.bayes.stack import FunctionSum, Stack, State
from gramian.bayes.trained import ROWS, Ensemble
from gramian.core.jacobian import Parameters, check_rows, function, unwrapped
from gramian.errors import InputError

SOLVERS = ("gradient", "exact")
"""How members reach their minimum: by steps, or linearised and at once."""


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that is settled before training."""

    config: EnsembleConfig
    recipe: Recipe
    solver: str
    likelihood: str
    stack: Stack
    prior: Parameters | None
    numbers: tuple[int, ...]
    drawn: Draws
    primal: State
    """Where a linear member's Jacobian is taken: θ_aux, or θ_0."""
    shared: bool
    x: Tensor
    y: Tensor
    columns: bool

    @property
    def noisy(self) -> bool:
        """Whether members have targets of their own."""
        return self.recipe.noisy and self.config.noisy_targets

    @property
    def known(self) -> Likelihood:
        """What outputs say about targets."""
        return LIKELIHOODS[self.likelihood]

    @property
    def start(self) -> State:
        """θ_0, the parameters alone; of a linear member only what varies under the prior."""
        found = {name: self.drawn.start[name] for name in self.stack.f.parameters}
        if self.recipe.linear and self.prior is not None:
            return {name: value * (self.prior[name] > 0) for name, value in found.items()}
        return found

    @property
    def scale(self) -> Parameters:
        """Λ, or 1 where no prior is needed."""
        ones = {name: value.new_ones(()) for name, value in self.stack.f.parameters.items()}
        return ones if self.prior is None else self.prior

    def ensemble(self, trained: FunctionSum, losses: Tensor) -> Ensemble:
        """Return the result."""
        return Ensemble(
            dataclasses.replace(self.config, prior=None), self.stack, trained, self.drawn.offset,
            self.likelihood, self.numbers, self.columns, losses, self.prior,
        )  # fmt: skip


def prepared(
    make: Make,
    x: Tensor,
    y: Tensor,
    config: EnsembleConfig,
    likelihood: str,
    share: tuple[int, int],
    auxiliary: nn.Module | None,
) -> Job:
    """Check settings and data, and draw what members start from."""
    made_by = recipe(config.method, config.exact)
    solver = config.solver or ("exact" if made_by.linear else "gradient")
    numbers = _checked(config, solver, share)
    check_rows(x)
    if auxiliary is not None and not made_by.linear:
        raise InputError(f"an auxiliary network is for ntkgp_lin, not for {config.method}")
    source = source_of(make, x, config.seed)
    whole = function(source.module("start", numbers[0]))
    targets = _targets(y, x, next(iter(whole.parameters.values())))
    needs_prior = made_by.anchor is not None or solver == "exact"
    prior = prior_of(source, whole, config.prior) if needs_prior else None
    f = (
        whole
        if prior is None
        else function(whole.module, [n for n, v in prior.items() if bool((v > 0).any())])
    )
    stack = Stack(f)
    outputs, needed = stack.check(x), targets.shape[1] * LIKELIHOODS[likelihood].per_target
    if outputs != needed:
        raise InputError(f"the network needs {needed} outputs for these targets, but has {outputs}")
    readout = readout_of(whole, x, config.last_layer) if made_by.splits else []
    prior = None if prior is None else {name: prior[name] for name in f.parameters}
    drawn = draws(source, made_by, f, prior or {}, readout, numbers)
    primal = _primal(source, made_by, drawn, auxiliary, numbers)
    return Job(
        config, made_by, solver, likelihood, stack, prior, numbers, drawn, primal, auxiliary is not None,
        x, targets, y.ndim == 2,
    )  # fmt: skip


def _primal(
    source: Source, made_by: Recipe, drawn: Draws, auxiliary: nn.Module | None, numbers: Sequence[int]
) -> State:
    if auxiliary is None:
        return source.states("auxiliary", numbers) if made_by.linear else drawn.start
    one = state_of(unwrapped(auxiliary))
    if {n: v.shape for n, v in one.items()} != {n: v.shape[1:] for n, v in drawn.start.items()}:
        raise InputError("the auxiliary network is of another architecture than the networks of make()")
    return {name: one[name].to(value).expand_as(value) for name, value in drawn.start.items()}


def trained(job: Job, targets: Tensor, progress: Callable[[int], None], optimiser: Optimiser) -> Ensemble:
    """Train the members on their targets (members, n, O) by gradient steps."""
    offset = job.known.offset(job.drawn.offset(job.stack, job.x, ROWS))
    constants = {name: value for name, value in job.drawn.start.items() if name not in job.start}

    def outputs(theta: State, x: Tensor) -> Tensor:
        if job.recipe.linear:
            return job.stack.derivatives(job.primal, theta, x)
        return job.stack.values({**constants, **theta}, x)

    regulariser = None
    if job.drawn.anchor is not None:
        anchor = job.start if job.recipe.linear else job.drawn.anchor
        weight = job.known.penalty(job.config.noise_variance) / len(job.x)
        regulariser = Regulariser.of(anchor, job.scale, weight)

    def loss(theta: State, rows: Rows) -> Tensor:
        return job.known.loss(outputs(theta, job.x[rows]) + offset[:, rows], targets[:, rows], job.y[rows])

    config = job.config
    schedule = Schedule(
        steps=config.steps, learning_rate=config.learning_rate, batch=config.batch,
        tolerance=config.tolerance, seed=config.seed, optimiser=optimiser,
    )  # fmt: skip
    theta, losses = train(job.start, loss, job.scale, len(job.x), schedule, progress, regulariser)
    if job.recipe.linear:
        return job.ensemble(FunctionSum((), job.primal, theta), losses)
    return job.ensemble(FunctionSum(({**constants, **theta},)), losses)


def solved(job: Job, targets: Tensor, progress: Callable[[int], None]) -> Ensemble:
    """Solve for the members, linear or linearised, that fit their targets (members, n, O)."""
    anchor = None if job.recipe.linear else job.drawn.anchor
    before = linear_parts(job.primal, job.start, anchor, job.recipe.linear)
    values = before(job.stack, job.x, ROWS) + job.drawn.offset(job.stack, job.x, ROWS)
    noise = 0.0 if job.recipe.anchor is None else job.config.noise_variance
    steps = minimisers(job.stack, job.primal, job.scale, job.x, targets - values, noise, job.shared, progress)
    assert before.tangent is not None
    tangent = {name: before.tangent[name] + step for name, step in steps.items()}
    found = dataclasses.replace(before, tangent=tangent)
    after = found(job.stack, job.x, ROWS) + job.drawn.offset(job.stack, job.x, ROWS)
    return job.ensemble(found, 0.5 * (targets - after).square().sum(-1).mean(-1))


def _checked(config: EnsembleConfig, solver: str, share: tuple[int, int]) -> tuple[int, ...]:
    """Return the members of this share."""
    if config.members < 2:
        raise InputError(f"an ensemble needs at least 2 members, got {config.members}")
    if not 0 < config.noise_variance < math.inf:
        raise InputError(f"the noise variance must be positive and finite, got {config.noise_variance:g}")
    if solver not in SOLVERS:
        raise InputError(f"unknown solver {solver!r}; choose {' or '.join(SOLVERS)}")
    rank, world = share
    if not 0 <= rank < world <= config.members:
        raise InputError(
            f"a share is (rank, world) with 0 ≤ rank < world ≤ {config.members} members, got {share}"
        )
    return tuple(range(rank, config.members, world))


def _targets(y: Tensor, x: Tensor, like: Tensor) -> Tensor:
    if y.ndim not in (1, 2) or len(y) != len(x) or 0 in y.shape:
        raise InputError(
            f"targets must be ({len(x)}) or ({len(x)}, outputs) for these inputs, got {tuple(y.shape)}"
        )
    if not y.is_floating_point() or not bool(y.isfinite().all()):
        raise InputError("targets have to be finite floating-point numbers")
    return y.detach().to(like).reshape(len(y), -1)
