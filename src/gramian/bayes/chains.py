"""What a sampler returns: draws of several chains, how they moved, and whether they have met."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gramian.bayes.convergence import bulk_size, r_hat, tail_size
from gramian.bayes.flat import Flat, Values
from gramian.core.predictive import Predictive
from gramian.errors import InputError


@dataclass(frozen=True, eq=False)
class EffectiveSamples:
    """How many independent draws the chains are worth, for every unknown."""

    bulk: Values
    """For means and medians."""
    tail: Values
    """For the 5 % and 95 % quantiles."""


@dataclass(frozen=True, eq=False)
class Chains:
    """Draws from a posterior by several chains, and all that is needed to go on with them.

    `state` holds tensors alone, of which safetensors makes a file: give it to `sample` to go on.
    """

    flat: Flat
    state: dict[str, Tensor]
    finished: bool
    """False when the sampler was stopped before the end."""

    @property
    def draws(self) -> Float[Tensor, "chains draws dim"]:
        """Every unknown in one vector."""
        return self.state["draws"]

    @property
    def samples(self) -> Any:
        """The draws as the unknowns are: one tensor (chains, draws, …) or a dict of such tensors."""
        return self.flat.unpack(self.draws)

    @property
    def log_density(self) -> Float[Tensor, "chains draws"]:
        """The log density of every draw, divided by the temperature."""
        return self.state["log_density"]

    @property
    def acceptance(self) -> Float[Tensor, "chains draws"]:
        """Mean acceptance of the transition to every draw."""
        return self.state["acceptance"]

    @property
    def leapfrogs(self) -> Int[Tensor, "chains draws"]:
        """Gradients that the transition to every draw has cost."""
        return self.state["leapfrogs"]

    @property
    def divergences(self) -> Int[Tensor, " chains"]:
        """Divergent transitions after the warm-up, also of those that thinning left out."""
        return self.state["divergences"]

    @property
    def step_sizes(self) -> Float[Tensor, " chains"]:
        """The step size of every chain."""
        return self.state["step_size"]

    @property
    def inverse_mass(self) -> Float[Tensor, "chains dim"]:
        """The diagonal of M⁻¹, about the posterior variances."""
        return self.state["inverse_mass"]

    @cached_property
    def r_hat(self) -> Any:
        """Rank-normalised split R̂ of every unknown, shaped as it; see `convergence.r_hat`."""
        return self.flat.unpack(r_hat(self.draws))

    @cached_property
    def effective_samples(self) -> EffectiveSamples:
        """Effective sample sizes of every unknown; see `convergence.bulk_size` and `tail_size`."""
        bulk, tail = (self.flat.unpack(size(self.draws)) for size in (bulk_size, tail_size))
        return EffectiveSamples(bulk, tail)

    def predict(self, function: Callable[[Any], Tensor], noise: float | Tensor | None = None) -> Predictive:
        """Return the law of a function of the unknowns, the mixture over all draws of all chains.

        Shapes: function (…) -> (*batch); samples (chains · draws, *batch), chain after chain.
        Raises: InputError without two draws, and as `Predictive`.
        Holds: as draws → ∞, error O(N_eff^-1/2).
        """
        flat = self.draws.flatten(0, 1)
        if len(flat) < 2:
            raise InputError(f"a prediction needs at least 2 draws, but the chains hold {len(flat)}")
        with torch.no_grad():
            return Predictive.from_samples(torch.stack([function(self.flat.unpack(d)) for d in flat]), noise)
