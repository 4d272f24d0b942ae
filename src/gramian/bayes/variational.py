"""Bayes by backprop: independent Gaussians over parameters, as close to the posterior as they can be."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from gramian.bayes.flat import Flat, GaussianPrior, LogLikelihood, Std, gaussian_prior, under
from gramian.bayes.members import seed_of, seeded
from gramian.core.divergence import gaussian_kl
from gramian.core.jacobian import Function, Parameters, function
from gramian.core.predictive import Predictive
from gramian.errors import DivergedError, InputError


@dataclass(frozen=True, kw_only=True)
class VariationalConfig:
    """How the Gaussians are fitted."""

    steps: int = 2000
    learning_rate: float = 1e-2
    """Of Adam at the start; it falls to 0 by a cosine."""
    draws: int = 1
    """Draws of the parameters for each step."""
    kl_weight: float = 1.0
    """λ, the temperature: 1 approximates the posterior, less a colder one."""
    initial_std: float = 0.01
    """Standard deviation at the start, in standard deviations of the prior."""
    seed: int = 0

    def check(self) -> None:
        """Raise InputError for a setting out of its range."""
        for name in ("steps", "draws"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} has to be a whole number of at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "initial_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} has to be a finite number above 0, got {getattr(self, name)}")
        if not 0 <= self.kl_weight < math.inf:
            raise InputError(f"kl_weight has to be a finite number of at least 0, got {self.kl_weight}")


@dataclass(frozen=True, eq=False)
class Variational:
    """Independent Gaussians N(μ, σ²) over the trainable parameters of a module.

    `state` holds tensors alone, of which safetensors makes a file: give it to `fit_variational` to go on.
    """

    module: nn.Module
    mean: Parameters
    std: Parameters
    losses: Float[Tensor, " steps"]
    """λ KL − the mean log likelihood, at every step."""
    kl: float
    """KL(q ‖ prior) in nats."""
    state: dict[str, Tensor]
    finished: bool
    """False when the fit was stopped before the end."""

    def sample(self, count: int, seed: int = 0) -> Parameters:
        """Draw parameters: of each a tensor (count, …).

        Raises: InputError for fewer than one draw.
        Holds: exactly.
        """
        if count < 1:
            raise InputError(f"at least one draw is needed, got {count}")
        generator = torch.Generator().manual_seed(seed_of(seed, "variational draws"))
        return {
            name: mean + self.std[name] * _noise(count, mean, generator) for name, mean in self.mean.items()
        }

    def predict(
        self, *inputs: Any, samples: int = 100, noise: float | Tensor | None = None, seed: int = 0
    ) -> Predictive:
        """Return the mixture of the module's outputs over draws of its parameters.

        Shapes: what the module takes -> (*batch) as it returns; samples (samples, *batch).
        Raises: InputError for fewer than two samples.
        Holds: as samples → ∞, error O(samples^-1/2).
        """
        drawn, f = self.sample(samples, seed), function(self.module)
        with torch.no_grad():
            every = [under(f, {n: v[k] for n, v in drawn.items()})(*inputs) for k in range(samples)]
        return Predictive.from_samples(torch.stack(every), noise)


def fit_variational(
    module: nn.Module,
    log_likelihood: LogLikelihood,
    prior: Std,
    config: VariationalConfig,
    *,
    prior_mean: Parameters | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    stop: Callable[[], bool] = lambda: False,
    resume: dict[str, Tensor] | None = None,
) -> Variational:
    """Fit a mean-field Gaussian posterior by stochastic gradients, from the weights that the module has.

        min_{μ, ρ} λ KL(q ‖ N(m, s²)) − E_q ln p(data | θ),   q = N(μ, σ²),  σ = softplus(ρ),  θ = μ + σ ε

    The KL is in closed form and the expectation over `draws` of ε. log_likelihood is called with the module
    under drawn parameters, as `lambda net: -0.5 * (net(x) - y).square().sum() / noise`; an unbiased estimate
    from some of the data will do. It may use torch's global random numbers, which are seeded anew for every
    step. The module is left as it is. `prior` gives the standard deviations s: a number, or one for every
    parameter by name or by a function of its name and value. After `stop`, give `state` back as `resume`.

    Raises: InputError for settings out of range, a likelihood that is not one number, and a state of another
        module; DivergedError when the loss is not finite.
    Holds: a minimum of the bound empirically; for a linear module with Gaussian noise μ is the posterior mean
        and σ² = 1/diag(precision).
    Source: Blundell et al. 2015, arXiv 1505.05424, Eq. 2–4 and section 3.2.
    """
    config.check()
    f = function(module)
    law, flat = gaussian_prior(f, prior, prior_mean), Flat.of(f.parameters)
    start = flat.pack(f.parameters).clone()
    spread = flat.pack({name: law.std[name].expand_as(p) for name, p in f.parameters.items()})
    mean = start.requires_grad_()
    rho = inverse_softplus(config.initial_std * spread).requires_grad_()
    optimiser = torch.optim.Adam([mean, rho], lr=config.learning_rate)
    losses = [] if resume is None else _restored(resume, optimiser, config)
    for step in range(len(losses), config.steps):
        if stop():
            break
        optimiser.param_groups[0]["lr"] = _rate(config, step)
        optimiser.zero_grad()
        with seeded(seed_of(config.seed, "variational", step), mean.device):
            losses.append(_descended(f, flat, law, log_likelihood, mean, rho, config))
        if not math.isfinite(losses[-1]):
            raise DivergedError(
                f"the loss is {losses[-1]} at step {step + 1}; lower the learning rate or initial_std"
            )
        optimiser.step()
        progress(step + 1, losses[-1])
    centre, std = mean.detach(), softplus(rho).detach()
    means, stds = flat.unpack(centre), flat.unpack(std)
    assert isinstance(means, dict)
    assert isinstance(stds, dict)
    kl = float(_divergence(flat, law, centre, std))
    finished = len(losses) == config.steps
    state = _state(optimiser, losses, config)
    return Variational(f.module, means, stds, torch.tensor(losses, dtype=torch.float64), kl, state, finished)


def _descended(
    f: Function,
    flat: Flat,
    prior: GaussianPrior,
    log_likelihood: LogLikelihood,
    mean: Tensor,
    rho: Tensor,
    config: VariationalConfig,
) -> float:
    """Add the gradients of λ KL − E ln p(data | θ) to mean and rho, one draw after the other."""
    std = softplus(rho)
    loss = config.kl_weight * _divergence(flat, prior, mean, std)
    loss.backward(retain_graph=True)
    total = float(loss.detach())
    for _ in range(config.draws):
        drawn = flat.unpack(mean + softplus(rho) * torch.randn_like(mean))
        assert isinstance(drawn, dict)
        value = log_likelihood(under(f, drawn))
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise InputError("log_likelihood has to return one number as a tensor that depends on the module")
        part = -value.sum() / config.draws
        part.backward()
        total += float(part.detach())
    return total


def _divergence(flat: Flat, prior: GaussianPrior, mean: Tensor, std: Tensor) -> Tensor:
    means, stds = flat.unpack(mean), flat.unpack(std)
    assert isinstance(means, dict)
    assert isinstance(stds, dict)
    terms = [gaussian_kl(means[n], stds[n], prior.mean[n], prior.std[n]).sum() for n in means]
    return torch.stack(terms).sum()


def inverse_softplus(values: Float[Tensor, "*size"]) -> Float[Tensor, "*size"]:
    """Return ρ with softplus(ρ) = values, for values above 0.

    Holds: exactly.
    """
    return values + torch.log(-torch.expm1(-values))


def _noise(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(count, *like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _rate(config: VariationalConfig, step: int) -> float:
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))


MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _settings(config: VariationalConfig) -> Tensor:
    return torch.tensor([float(value) for value in vars(config).values()], dtype=torch.float64)


def _state(
    optimiser: torch.optim.Optimizer, losses: list[float], config: VariationalConfig
) -> dict[str, Tensor]:
    state = {"losses": torch.tensor(losses, dtype=torch.float64), "settings": _settings(config)}
    for name, value in zip(("mean", "rho"), optimiser.param_groups[0]["params"], strict=True):
        state[name] = value.detach().clone()
        state |= {f"{name}.{moment}": x.clone() for moment, x in optimiser.state[value].items()}
    return state


def _restored(
    state: dict[str, Tensor], optimiser: torch.optim.Optimizer, config: VariationalConfig
) -> list[float]:
    """Put parameters and Adam's moments back; give the losses so far."""
    values = dict(zip(("mean", "rho"), optimiser.param_groups[0]["params"], strict=True))
    shapes = {name: value.shape for name, value in state.items() if name in values}
    if {"losses", "settings"} - state.keys() or shapes != {name: v.shape for name, v in values.items()}:
        raise InputError("the state to resume is not that of a fit of this module")
    if state["settings"].tolist() != _settings(config).tolist():
        raise InputError("the state to resume is of other settings, which have to stay as they were")
    for name, value in values.items():
        value.data.copy_(state[name])
        if len(state["losses"]):
            optimiser.state[value] = {moment: state[f"{name}.{moment}"].clone() for moment in MOMENTS}
    return state["losses"].tolist()
