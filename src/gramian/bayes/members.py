"""What makes a member a posterior draw: its start, its fixed function δ, its anchor and its targets."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from gramian.bayes.stack import FunctionSum, State, stacked
from gramian.core.jacobian import Function, Parameters, Weights, function, jvp, scales, unwrapped
from gramian.errors import InputError

Make = Callable[[], nn.Module]
"""Makes a fresh network, drawn from its prior by torch's global generator."""


@dataclass(frozen=True)
class Recipe:
    """How δ and the anchor of a member are made of independent draws θ_0, θ̃ of the initialisation.

        δ(x) = network · f(x, θ̃) + J(x; θ_0) · (body θ̃^{≤L} + own θ_0^{≤L}, readout θ̃^{L+1})

    `anchor` is where the regulariser ‖θ − a‖²_Λ is centred: "start" (θ_0), "zero", or None for none. A
    `linear` member is J(x; θ_aux) θ in place of f(x, θ). `noisy` members are trained on targets with noise.
    """

    network: bool = False
    body: float = 0.0
    own: float = 0.0
    readout: float = 0.0
    anchor: str | None = "start"
    linear: bool = False
    noisy: bool = True

    @property
    def splits(self) -> bool:
        """Whether δ treats the read-out apart from the body."""
        return self.body != self.readout or self.own != 0

    @property
    def curved(self) -> bool:
        """Whether δ has a part that the Jacobian makes."""
        return any((self.body, self.own, self.readout))

    @property
    def draws(self) -> bool:
        """Whether δ needs θ̃."""
        return self.network or any((self.body, self.readout))


RECIPES: dict[str, Recipe] = {
    "deep_ensemble": Recipe(anchor=None, noisy=False),
    "rp_param": Recipe(),
    "rp_fn": Recipe(network=True, anchor="zero"),
    "ntkgp_param": Recipe(body=1),
    "ntkgp_fn": Recipe(body=math.sqrt(2), readout=1, anchor="zero"),
    "ntkgp_lin": Recipe(linear=True),
}
"""The members as published: δ, anchor and start by the method's name."""

EXACT: dict[str, Recipe] = {
    "rp_fn": Recipe(network=True, own=1, anchor="zero"),
    "ntkgp_fn": Recipe(body=1, own=1, readout=1, anchor="zero"),
}
"""The methods that need a correction to draw from the posterior they are named after, corrected."""


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """How the members of an ensemble are drawn and trained."""

    method: str = "ntkgp_param"
    """deep_ensemble, rp_param, rp_fn, ntkgp_param, ntkgp_fn or ntkgp_lin."""
    members: int = 10
    noise_variance: float = 0.01
    """Variance σ² of the targets' noise: the strength of the regulariser, and a part of the intervals."""
    exact: bool = False
    """Whether rp_fn and ntkgp_fn are corrected, so that they draw from the posterior they are named after."""
    noisy_targets: bool = True
    """Whether every member has its own targets y + ε; a deep ensemble never has."""
    prior: Weights | None = None
    """Variance of every parameter at initialisation; estimated from draws of make() when None."""
    last_layer: str | Sequence[str] | None = None
    """Name of the read-out's module, or names of its parameters; the last module that holds any when None."""
    solver: str | None = None
    """gradient or exact; exact for ntkgp_lin and gradient for the others when None."""
    steps: int = 2000
    learning_rate: float = 3e-3
    batch: int | None = None
    """Rows of a step; all when None."""
    tolerance: float = 0.0
    """Size of the gradient at which a member is done; 0 takes all steps."""
    seed: int = 0


def recipe(method: str, exact: bool) -> Recipe:
    """Return the recipe of a method.

    Raises: InputError for an unknown method.
    """
    if method not in RECIPES:
        raise InputError(f"unknown method {method!r}; choose one of {', '.join(RECIPES)}")
    return EXACT.get(method, RECIPES[method]) if exact else RECIPES[method]


def seed_of(seed: int, purpose: str, number: int = 0) -> int:
    """Return the seed of one stream of numbers: any two streams of any two seeds are independent."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Give torch's global generators this seed, and afterwards the state that they had."""
    if device.type == "cuda":
        with torch.random.fork_rng([device]):
            torch.manual_seed(seed)
            yield
        return
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


@dataclass(frozen=True)
class Source:
    """Where networks come from: `make` under one seed, on the device and in the precision of the data."""

    make: Make
    seed: int
    device: torch.device
    dtype: torch.dtype | None

    def module(self, purpose: str, number: int) -> nn.Module:
        """Draw one network; layers that draw at random, such as dropout, are off.

        Raises: InputError for anything but a module with trainable parameters, and one with a norm over the
            batch in training mode.
        """
        with seeded(seed_of(self.seed, purpose, number), self.device):
            module = self.make()
        if not isinstance(module, nn.Module):
            raise InputError(f"make() has to return a torch module, but returned {type(module).__name__}")
        module = module.to(device=self.device, dtype=self.dtype)
        function(module)  # with a norm in training mode no row would be a function of itself
        return unwrapped(module).eval()

    def states(self, purpose: str, numbers: Collection[int]) -> State:
        """Draw networks by their numbers and stack them."""
        return stacked([state_of(self.module(purpose, number)) for number in numbers])


def source_of(make: Make, x: Tensor, seed: int) -> Source:
    """Return the source of networks for these inputs: in their precision, unless they are integers."""
    return Source(make, seed, x.device, x.dtype if x.is_floating_point() else None)


def state_of(module: nn.Module) -> Parameters:
    """Return copies of a module's parameters, trainable or not, and buffers by name."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value.detach().clone() for name, value in named.items()}


def estimated_prior(source: Source, template: Function) -> Parameters:
    """Estimate the variance of every parameter at initialisation, one number for each tensor.

        Λ = mean over entries of the variance over draws of make()

    It is 0 for a parameter that does not vary at initialisation. Between 8 and 256 draws are made, fewer of
    larger networks.

    Raises: InputError when nothing varies.
    Holds: in expectation.
    """
    size = sum(p.numel() for p in template.parameters.values())
    count = min(256, max(8, 10_000_000 // size))
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in template.parameters.items()}
    squares, first = {name: torch.zeros_like(t) for name, t in total.items()}, {}
    for number in range(count):
        drawn = dict(source.module("prior", number).named_parameters())
        for name in total:
            value = drawn[name].detach().double()
            shifted = value - first.setdefault(name, value)
            total[name] += shifted
            squares[name] += shifted.square()
    found = {
        name: ((squares[name] - total[name].square() / count) / (count - 1)).mean().clamp(min=0)
        for name in total
    }
    if not any(bool(value > 0) for value in found.values()):
        raise InputError("make() returned the same parameters every time; it has to draw a fresh network")
    return {name: value.to(template.parameters[name]) for name, value in found.items()}


def prior_of(source: Source, template: Function, given: Weights | None) -> Parameters:
    """Return Λ as tensors that broadcast to the parameters: as given, or estimated from draws of make().

    Raises: InputError for variances that do not fit, are negative, not finite or all 0.
    """
    if given is None:
        return estimated_prior(source, template)
    found = scales(template, given)
    if not any(bool((value > 0).any()) for value in found.values()):
        raise InputError("the prior has no parameter with a variance above 0")
    return found


def readout_of(f: Function, x: Shaped[Tensor, " n *size"], named: str | Sequence[str] | None) -> list[str]:
    """Return the names of the last layer's parameters, if the network is linear in them.

        J^{L+1}(x) θ^{L+1} = f(x, θ)

    Without names it is the last module that holds trainable parameters itself.

    Raises: InputError for names without parameters, and parameters for which the identity fails.
    Holds: exactly; asked of the first rows to the precision of their type.
    """
    if named is None:
        holders = [
            name
            for name, module in f.module.named_modules()
            if any(
                f"{name}.{own}".removeprefix(".") in f.parameters
                for own, _ in module.named_parameters(recurse=False)
            )
        ]
        named = holders[-1]
    names = [named] if isinstance(named, str) else list(named)
    chosen = [
        p for p in f.parameters if any(not name or p == name or p.startswith(f"{name}.") for name in names)
    ]
    tangent = {name: p if name in chosen else torch.zeros_like(p) for name, p in f.parameters.items()}
    with torch.no_grad():
        value = f(f.parameters, x[:8])
        gap = (jvp(f, x[:8], tangent) - value).abs().max()
    if not chosen or gap > 1e3 * torch.finfo(value.dtype).eps * max(1.0, float(value.abs().max())):
        raise InputError(
            f"the network is not linear in {', '.join(names) or 'its parameters'}, which was taken for its "
            "last layer; name the weight and bias of its read-out by last_layer"
        )
    return chosen


@dataclass(frozen=True, eq=False)
class Draws:
    """What members start from: θ_0, the anchor a of their regulariser if they have one, and δ."""

    start: State
    anchor: State | None
    offset: FunctionSum


def draws(
    source: Source,
    made_by: Recipe,
    f: Function,
    prior: Parameters,
    readout: Collection[str],
    numbers: Sequence[int],
) -> Draws:
    """Draw θ_0 and θ̃ of every member and make its anchor and its δ of them.

    Only parameters that vary under the prior enter the tangent of δ and have 0 as an anchor; others keep θ_0.
    """
    start = source.states("start", numbers)
    other = source.states("other", numbers) if made_by.draws else start
    tangent = {}
    for name in f.parameters if made_by.curved else []:
        fresh, again = (made_by.readout, 0.0) if name in readout else (made_by.body, made_by.own)
        tangent[name] = (fresh * other[name] + again * start[name]) * (prior[name] > 0)
    offset = FunctionSum(
        (other,) if made_by.network else (),
        start if made_by.curved else None,
        tangent if made_by.curved else None,
    )
    kept = {name: start[name] * (variance == 0) for name, variance in prior.items()}
    return Draws(start, {None: None, "start": start, "zero": kept}[made_by.anchor], offset)


def noisy(targets: Tensor, variance: Tensor, seed: int, numbers: Sequence[int]) -> Tensor:
    """Give every member its own targets, y + ε with ε ~ N(0, variance), drawn once.

    Shapes: targets (n, O), variance () or (n, O) -> (members, n, O).
    """
    draws = []
    for number in numbers:
        generator = torch.Generator().manual_seed(seed_of(seed, "noise", number))
        draws.append(torch.randn(targets.shape, generator=generator, dtype=torch.float64).to(targets))
    return targets + variance.sqrt() * torch.stack(draws)
