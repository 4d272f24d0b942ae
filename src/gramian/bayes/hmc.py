"""Hamiltonian Monte Carlo and the no-U-turn sampler for any differentiable log density.

Own code: of the torch libraries, posteriors 0.1.3 has no sampler that accepts or rejects, and Pyro 1.9.2 runs
chains one after the other or in processes of their own and cannot go on from a file; a leapfrog of its NUTS
took 1.3 ms where one of ours takes 0.7 (5 Gaussian unknowns, one busy core), 1.2 to 1.0 for 1000 unknowns.
BlackJAX is for JAX. Here a chain asks for one gradient at a time, so that all chains share one call by vmap.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.bayes.adaptation import DualAveraging, Variances, windows
from gramian.bayes.chains import Chains
from gramian.bayes.density import LogDensity
from gramian.bayes.flat import Flat, Values
from gramian.bayes.members import seed_of
from gramian.bayes.trajectory import Asking, Motion, Move, Point, hmc, nuts, workable_step
from gramian.errors import InputError

METHODS = ("nuts", "hmc")
"""How a chain may move."""
RECORDS = ("draws", "log_density", "acceptance", "leapfrogs")
"""What is kept of every draw."""
WHOLE = ("settings", "done")
"""What a state holds once; of the rest every chain has its own."""
PLACED = ("draws", "position", "gradient", "inverse_mass", "variance_mean", "variance_squares")
"""What of a state is where the unknowns are; the rest is on the CPU."""


@dataclass(frozen=True, kw_only=True)
class HMCConfig:
    """How chains move, how long, and what they learn in their warm-up."""

    method: str = "nuts"
    """nuts, or hmc of a fixed number of steps."""
    warmup: int = 500
    """Transitions that adapt the sampler and are thrown away."""
    samples: int = 500
    """Draws to keep of each chain."""
    thinning: int = 1
    """Transitions for each draw that is kept."""
    max_depth: int = 8
    """A trajectory of nuts has at most 2^max_depth points."""
    leapfrogs: int = 32
    """Steps of a trajectory of hmc."""
    jitter: float = 0.2
    """Share of ε by which it is drawn larger or smaller for every trajectory of hmc."""
    step_size: float = 1.0
    """ε at the start, in units of posterior standard deviations once the mass is learned."""
    search: bool = True
    """Double or halve ε before the first transition and after every window."""
    target_acceptance: float = 0.8
    adapt_mass: bool = True
    """Learn a diagonal mass; otherwise M stays as it is at the start."""
    temperature: float = 1.0
    """T: the chains sample from π^{1/T}."""
    vectorised: bool = True
    """Let chains share calls by vmap where the density allows."""
    seed: int = 0

    def check(self) -> None:
        """Raise InputError for a setting out of its range."""
        if self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}")
        least = {"warmup": 0, "samples": 1, "thinning": 1, "max_depth": 1, "leapfrogs": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(
                    f"{name} has to be a whole number of at least {low}, got {getattr(self, name)}"
                )
        for name in ("step_size", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} has to be a finite number above 0, got {getattr(self, name)}")
        if not 0 <= self.jitter < 1:
            raise InputError(f"jitter has to be at least 0 and below 1, got {self.jitter}")
        if not 0 < self.target_acceptance < 1:
            raise InputError(f"target_acceptance has to lie between 0 and 1, got {self.target_acceptance}")

    @property
    def transitions(self) -> int:
        """Transitions of each chain in all."""
        return self.warmup + self.samples * self.thinning


@dataclass(frozen=True, eq=False)
class Progress:
    """How far the chains are, after every transition."""

    done: int
    total: int
    warming: bool
    acceptance: float
    """Mean over chains of this transition."""
    step_size: float
    """Geometric mean over chains."""
    leapfrogs: int
    """Gradients of this transition, in all chains."""
    divergences: int
    """After the warm-up, in all chains."""
    log_density: tuple[float, ...]


def sample(
    log_density: Callable[[Any], Tensor],
    start: Values,
    config: HMCConfig,
    *,
    inverse_mass: Values | None = None,
    progress: Callable[[Progress], None] = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
    resume: dict[str, Tensor] | None = None,
    numbers: Sequence[int] | None = None,
) -> Chains:
    """Draw from a density that is known up to a constant, by several chains at once.

        θ ~ π(θ)^{1/T},  ln π = log_density(θ) + constant

    The unknowns are one tensor or a dict of tensors, as `start` holds them with a first axis of chains;
    log_density takes one chain's. Every chain has random numbers of its own, by its number, which counts from
    0 when `numbers` gives no other. In the warm-up, ε comes from dual averaging and M from windows
    (`adaptation`). Before the first of these M⁻¹ is `inverse_mass`, or 1: posterior variances that are known
    about let chains cross an ill-conditioned density from the start. `stop` is asked before every gradient;
    when it says so, the transition that is under way is forgotten, and the chains are returned as they are.
    Their `state`, given back as `resume` with the same settings (`samples` may grow), goes on with its own
    mass to what an uninterrupted run gives.

    Shapes: start (chains, …); log_density (…) -> (); inverse_mass (…).
    Raises: InputError for settings out of range, a start at which the density is not finite, a density that
        is not one number, variances that do not fit or are not above 0, and a state of other settings or
        unknowns.
    Holds: leaves π^{1/T} invariant exactly, once warmed up.
    Source: Hoffman, Gelman 2014, arXiv 1111.4246; Betancourt 2017, arXiv 1701.02434.
    """
    config.check()
    flat = Flat.of(start, leading=1)
    density = LogDensity(log_density, flat, config.temperature, config.vectorised)
    positions = flat.pack(start).detach()
    if len(positions) < 1:
        raise InputError("start has to hold at least one chain along its first axis")
    numbers = range(len(positions)) if numbers is None else numbers
    if len(set(numbers)) != len(positions):
        raise InputError(f"{len(positions)} chains need as many different numbers, got {list(numbers)}")
    if resume is None:
        run = _started(density, positions, config, numbers, _mass(inverse_mass, flat, positions[0]))
    else:
        run = _restored(resume, config, positions)
    while run.done < config.transitions:
        keys = [chain.generator.get_state() for chain in run.chains]
        found = _answered([_transition(chain, config, run.done) for chain in run.chains], density, stop)
        if found is None:
            for chain, key in zip(run.chains, keys, strict=True):
                chain.generator.set_state(key)
            break
        progress(run.take(found))
    return Chains(flat, run.state(), run.done == config.transitions)


def around(point: Values, chains: int, spread: float = 0.0, seed: int = 0) -> Any:
    """Return starts for several chains: one point, such as a mode, with noise of standard deviation `spread`.

    Shapes: (…) -> (chains, …).
    Raises: InputError for fewer than one chain, a negative spread.
    Holds: exactly.
    """
    if chains < 1 or not 0 <= spread < math.inf:
        raise InputError(
            f"starts need at least 1 chain and a spread of at least 0, got {chains} and {spread}"
        )
    flat = Flat.of(point)
    centre = flat.pack(point).detach()
    generator = torch.Generator().manual_seed(seed_of(seed, "around"))
    noise = torch.randn(chains, flat.size, generator=generator, dtype=centre.dtype).to(centre.device)
    return flat.unpack(centre + spread * noise)


@dataclass(eq=False)
class _Chain:
    generator: torch.Generator
    point: Point
    step_size: float
    averaging: DualAveraging
    inverse_mass: Float[Tensor, " dim"]
    variances: Variances


def _mass(inverse_mass: Values | None, flat: Flat, like: Tensor) -> Float[Tensor, " dim"]:
    if inverse_mass is None:
        return torch.ones_like(like)
    if Flat.of(inverse_mass) != flat:
        raise InputError("inverse_mass has to hold one variance for each unknown, in tensors like a start's")
    packed = flat.pack(inverse_mass).detach().to(like)
    if not ((packed > 0) & packed.isfinite()).all():
        raise InputError(f"variances in inverse_mass have to be above 0, not {float(packed.min()):.3g}")
    return packed


def _started(
    density: LogDensity, positions: Tensor, config: HMCConfig, numbers: Sequence[int], inverse_mass: Tensor
) -> "_Run":
    chains = []
    for number, here, (value, gradient) in zip(numbers, positions, density(list(positions)), strict=True):
        if not math.isfinite(value) or not gradient.isfinite().all():
            raise InputError(
                "the log density and its gradient have to be finite where a chain starts, but chain "
                f"{number} starts at {value:.4g} with {int((~gradient.isfinite()).sum())} other derivatives"
            )
        here = here.clone()
        generator = torch.Generator().manual_seed(seed_of(config.seed, "chain", number))
        point = Point(here, torch.zeros_like(here), value, gradient)
        averaging = DualAveraging.around(config.step_size)
        none = Variances.none(here)
        chains.append(_Chain(generator, point, config.step_size, averaging, inverse_mass, none))
    return _Run(config, chains, [0] * len(chains))


def _transition(chain: _Chain, config: HMCConfig, number: int) -> Asking[tuple[float, Move]]:
    """Find a chain's next point, and the step size that it starts from."""
    motion = Motion(chain.step_size, chain.inverse_mass, chain.generator)
    if config.search and number in _fresh(config):
        motion = dataclasses.replace(
            motion, step_size=(yield from workable_step(chain.point, motion, config.target_acceptance))
        )
    if config.method == "nuts":
        return motion.step_size, (yield from nuts(chain.point, motion, config.max_depth))
    return motion.step_size, (yield from hmc(chain.point, motion, config.leapfrogs, config.jitter))


def _fresh(config: HMCConfig) -> tuple[int, ...]:
    """Give the transitions before which the step size is found anew."""
    return (0, *windows(config.warmup)[1]) if config.adapt_mass else (0,)


def _answered(
    asking: Sequence[Asking[tuple[float, Move]]], density: LogDensity, stop: Callable[[], bool]
) -> list[tuple[float, Move]] | None:
    """Answer coroutines together until all have returned; None when stopped."""
    found: dict[int, tuple[float, Move]] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(asking)))
    while answers:
        asked: dict[int, Tensor] = {}
        for number, answer in answers.items():
            try:
                asked[number] = asking[number].send(answer)
            except StopIteration as end:
                found[number] = end.value
        if asked and stop():
            return None
        answers = dict(zip(asked, density(list(asked.values())), strict=True)) if asked else {}
    return [found[number] for number in range(len(asking))]


@dataclass(eq=False)
class _Run:
    """Chains between two transitions, and the draws that they have left."""

    config: HMCConfig
    chains: list[_Chain]
    divergences: list[int]
    done: int = 0
    earlier: dict[str, Tensor] | None = None
    kept: dict[str, list[Tensor]] = dataclasses.field(default_factory=lambda: {name: [] for name in RECORDS})

    def take(self, found: Sequence[tuple[float, Move]]) -> Progress:
        """Move every chain, let it learn, and keep its draw when it is due."""
        warming, moves = self.done < self.config.warmup, [move for _, move in found]
        for chain, (step, move) in zip(self.chains, found, strict=True):
            _learn(chain, self.config, self.done, step, move)
        self.done += 1
        if not warming:
            self.divergences = [n + move.divergent for n, move in zip(self.divergences, moves, strict=True)]
            if (self.done - self.config.warmup) % self.config.thinning == 0:
                self._keep(moves)
        acceptance = sum(move.acceptance for move in moves) / len(moves)
        step_size = math.exp(sum(math.log(step) for step, _ in found) / len(found))
        values = tuple(move.point.log_density for move in moves)
        spent = sum(move.leapfrogs for move in moves)
        total = self.config.transitions
        return Progress(
            self.done, total, warming, acceptance, step_size, spent, sum(self.divergences), values
        )

    def _keep(self, moves: Sequence[Move]) -> None:
        self.kept["draws"].append(torch.stack([move.point.position for move in moves]))
        self.kept["log_density"].append(_numbers([move.point.log_density for move in moves]))
        self.kept["acceptance"].append(_numbers([move.acceptance for move in moves]))
        self.kept["leapfrogs"].append(torch.tensor([move.leapfrogs for move in moves]))

    def state(self) -> dict[str, Tensor]:
        """Return all of it as tensors."""
        chains = self.chains
        state = {
            "settings": _settings(self.config),
            "done": torch.tensor(self.done),
            "divergences": torch.tensor(self.divergences),
            "position": torch.stack([chain.point.position for chain in chains]),
            "gradient": torch.stack([chain.point.gradient for chain in chains]),
            "value": _numbers([chain.point.log_density for chain in chains]),
            "step_size": _numbers([chain.step_size for chain in chains]),
            "averaging": _numbers([dataclasses.astuple(chain.averaging) for chain in chains]),
            "inverse_mass": torch.stack([chain.inverse_mass for chain in chains]),
            "variance_mean": torch.stack([chain.variances.mean for chain in chains]),
            "variance_squares": torch.stack([chain.variances.squares for chain in chains]),
            "variance_count": torch.tensor([chain.variances.count for chain in chains]),
            "generator": torch.stack([chain.generator.get_state() for chain in chains]),
        }
        return state | {name: self._records(name) for name in RECORDS}

    def _records(self, name: str) -> Tensor:
        empty = torch.stack([chain.point.position for chain in self.chains])[:, None][:, :0]
        none = {"draws": empty, "leapfrogs": torch.zeros(len(self.chains), 0, dtype=torch.int64)}
        parts = [] if self.earlier is None else [self.earlier[name]]
        if self.kept[name]:
            parts.append(torch.stack(self.kept[name], 1))
        return torch.cat(parts, 1) if parts else none.get(name, _numbers([[]] * len(self.chains)))


def _learn(chain: _Chain, config: HMCConfig, number: int, step: float, move: Move) -> None:
    """Take in what transition `number` has shown of the step size and the mass."""
    chain.point, chain.step_size = move.point, step
    if number in _fresh(config):
        chain.averaging = DualAveraging.around(step)
    if number >= config.warmup:
        return
    chain.averaging = chain.averaging.updated(move.acceptance, config.target_acceptance)
    chain.step_size = chain.averaging.final if number + 1 == config.warmup else chain.averaging.step
    first, ends = windows(config.warmup)
    if not config.adapt_mass or not ends or not first <= number < ends[-1]:
        return
    chain.variances = chain.variances.updated(move.point.position)
    if number + 1 in ends:
        chain.inverse_mass = chain.variances.regularised()
        chain.variances = Variances.none(chain.inverse_mass)


def _restored(state: dict[str, Tensor], config: HMCConfig, start: Tensor) -> _Run:
    needed = {"settings", "done", "divergences", "position", "gradient", "value", "step_size", "averaging"}
    needed |= {"inverse_mass", "variance_mean", "variance_squares", "variance_count", "generator", *RECORDS}
    if not needed <= state.keys():
        raise InputError(f"the state to resume lacks {', '.join(sorted(needed - state.keys()))}")
    if state["settings"].tolist() != _settings(config).tolist():
        raise InputError("the state to resume is of other settings; only samples and vectorised may change")
    if state["position"].shape != start.shape:
        raise InputError(
            f"the state to resume holds chains × unknowns of {tuple(state['position'].shape)}, "
            f"but start holds {tuple(start.shape)}"
        )
    done = int(state["done"])
    if done > config.transitions:
        raise InputError(
            f"the state to resume is {done} transitions on, beyond the {config.transitions} asked"
        )
    state = state | {name: state[name].to(start) for name in PLACED}
    chains = [_chain_of(state, number) for number in range(len(start))]
    return _Run(config, chains, state["divergences"].tolist(), done, {name: state[name] for name in RECORDS})


def _chain_of(state: dict[str, Tensor], number: int) -> _Chain:
    here = {name: value[number] for name, value in state.items() if name not in WHOLE}
    generator = torch.Generator()
    generator.set_state(here["generator"].cpu().clone())
    position, value = here["position"].clone(), float(here["value"])
    point = Point(position, torch.zeros_like(position), value, here["gradient"].clone())
    averaging = DualAveraging(*here["averaging"].tolist())
    variances = Variances(
        here["variance_mean"].clone(), here["variance_squares"].clone(), int(here["variance_count"])
    )
    step = float(here["step_size"])
    return _Chain(generator, point, step, averaging, here["inverse_mass"].clone(), variances)


def _settings(config: HMCConfig) -> Tensor:
    free = {"samples", "vectorised"}
    values = {**vars(config), "method": METHODS.index(config.method)}
    return _numbers([float(value) for name, value in values.items() if name not in free])


def _numbers(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
