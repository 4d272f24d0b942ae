"""Laplace posteriors of a fitted network behind a linear map: the network is linearised where it was fitted.

    y = A f(θ) + ε,  ε ~ N(0, σ²),  θ ~ N(m, s²),  f(θ) ≈ f(θ*) + J (θ − θ*)
    covariance of θ = (diag(1/s²) + JᵀAᵀ diag(1/σ²) A J)⁻¹

Where θ* is the mode of the posterior of f itself, it is the mean of the linear model too, and f(θ*) that of
its outputs. A network that was stopped early, or fitted with a penalty that is not this prior, stands
elsewhere. So the mean is f(θ*), unless it is asked to be `recentred`, and the linear model gives the spread
around it, which depends on neither y nor m. Outputs that are squashed are linearised through the squashing:
their draws may leave its range.
"""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from gramian.bayes.flat import Flat, Std, gaussian_prior, under
from gramian.bayes.linear_gaussian import Map, Number, _finite, _variances, sampled_posterior
from gramian.core.jacobian import Function, Parameters, function, unwrapped
from gramian.core.predictive import Predictive
from gramian.errors import InputError

MOST = 5000
"""Parameters of which an exact posterior is taken: beyond, their Jacobian and factors fill the memory."""

PIXELS = 8192
"""Outputs whose variances are computed at once."""


@dataclass(frozen=True, eq=False)
class LayerPosterior:
    """The exact posterior of a few parameters of a network that is taken as linear in them.

        θ = θ* + s z,  z ~ N(g, c² I) a priori,  diag(1/σ) A J diag(s) = U diag(d) Vᵀ,  g = (m − θ*)/s
        posterior of z: mean g + V (c² d/(1 + c² d²)) w,  covariance V diag(c²/(1 + c² d²)) Vᵀ
        w = Uᵀ (y − A f(θ*) − A J (m − θ*))/σ

    All prior standard deviations are c s; `scaled` gives the posterior of another c at no cost. Factors are
    in float64, outputs and their Jacobian as the network computes them. The network has to stay as it is.
    """

    f: Function
    inputs: tuple[Any, ...]
    outputs: Float[Tensor, "*outputs"]
    """f(θ*)."""
    jacobian: Float[Tensor, " n *outputs"]
    """J diag(s), transposed."""
    std: Float[Tensor, " n"]
    offset: Float[Tensor, " n"]
    """g."""
    singular: Float[Tensor, " n"]
    """d, with zeros to as many as there are parameters."""
    basis: Float[Tensor, "n n"]
    """V."""
    projected: Float[Tensor, " n"]
    """w."""
    constant: float
    """What of ln p(y) does not depend on c."""
    scale: float = 1.0
    """c."""

    @property
    def log_evidence(self) -> float:
        """Return ln p(y) under the linear model, with all its constants.

            y ~ N(A f(θ*) + A J (m − θ*), diag(σ²) + c² A J diag(s²) JᵀAᵀ)

        Holds: exactly.
        Source: Rasmussen, Williams 2006, Eq. 2.30; as a criterion MacKay 1992, "Bayesian interpolation".
        """
        return float(self._evidence(self.basis.new_tensor([self.scale])))

    def scaled(self, scale: float) -> "LayerPosterior":
        """Return the posterior for prior standard deviations c s.

        Raises: InputError for c that is not finite and above 0.
        Holds: exactly.
        """
        if not 0 < scale < math.inf:
            raise InputError(f"the scale of the prior has to be finite and above 0, got {scale}")
        return replace(self, scale=scale)

    def evidence_scale(self, lowest: float = 1e-4, highest: float = 1e4) -> float:
        """Return the c of the highest evidence: prior standard deviations that suit the data.

            argmax_c ln p(y | c),  c in [lowest, highest]

        Raises: InputError for a range that is not above 0, finite and in order.
        Holds: to 1e-6 of c, by a grid of 200 that is refined around its best; at an end of the range the
            evidence may rise beyond it.
        """
        if not 0 < lowest < highest < math.inf:
            raise InputError(f"scales run from above 0 to a larger one, got {lowest} and {highest}")
        low, high = math.log(lowest), math.log(highest)
        while high - low > 1e-6:
            grid = torch.linspace(low, high, 200).to(self.basis)
            best = int(self._evidence(grid.exp()).argmax())
            low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 199)])
        return min(max(math.exp((low + high) / 2), lowest), highest)

    def sample(self, count: int, generator: torch.Generator, *, recentred: bool = False) -> Parameters:
        """Draw parameters, of each a tensor (count, …): around θ*, or around the linear model's mean.

        Raises: InputError for a negative count.
        Holds: exactly.
        """
        flat = Flat.of(self.f.parameters)
        z = self._draws(count, generator) + (self._mean() if recentred else 0)
        theta = flat.pack(self.f.parameters)
        drawn = flat.unpack(theta + (self.std * z).to(theta))
        assert isinstance(drawn, dict)
        return drawn

    def predict(
        self, draws: int, generator: torch.Generator, *, recentred: bool = False, through: bool = False
    ) -> Predictive:
        """Return the law of the outputs: Gaussian without draws, and with them the samples (draws, *outputs).

            variance = diag(J Σ Jᵀ),  samples = mean + J (θ_k − E θ);   through: f(θ_k)

        The mean is f(θ*), or the linear model's where it is to be `recentred`. Of draws that go `through` the
        network itself, squashing and all, mean and variance are those of the samples.

        Shapes: -> (*outputs).
        Raises: InputError for fewer than 0 draws, or 2 with `through`.
        Holds: exactly, to the rounding of the Jacobian; `through` as draws → ∞, error O(draws^-1/2).
        Source: Immer, Korzepa, Bauer 2021, arXiv 2008.08400 (why the linear prediction and not the sampled).
        """
        if through:
            return self._through(self.sample(draws, generator, recentred=recentred), draws)
        z = self._draws(draws, generator)
        mean = self.outputs + self._pushed(self._mean()[None])[0] if recentred else self.outputs
        samples = mean + self._pushed(z) if draws else None
        return Predictive(mean, self._variance(), None, samples)

    def _through(self, drawn: Parameters, count: int) -> Predictive:
        with torch.no_grad():
            calls = [under(self.f, {name: v[k] for name, v in drawn.items()}) for k in range(count)]
            every = [call(*self.inputs)[None] for call in calls]
        return Predictive.from_samples(torch.cat([self.outputs[None][:0], *every]))

    def _evidence(self, scales: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        gain = 1 + (scales[:, None] * self.singular).square()
        return self.constant - 0.5 * (self.projected.square() / gain + gain.log()).sum(1)

    def _shrunk(self) -> Float[Tensor, " n"]:
        """Give the variances c²/(1 + c² d²) along V."""
        return self.scale**2 / (1 + (self.scale * self.singular).square())

    def _mean(self) -> Float[Tensor, " n"]:
        return self.offset + self.basis @ (self._shrunk() * self.singular * self.projected)

    def _draws(self, count: int, generator: torch.Generator) -> Float[Tensor, "count n"]:
        if count < 0:
            raise InputError(f"the number of draws has to be at least 0, not {count}")
        shape, place = (count, len(self.std)), generator.device
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=place)
        return noise.to(self.basis) * self._shrunk().sqrt() @ self.basis.mT

    def _pushed(self, z: Float[Tensor, "k n"]) -> Float[Tensor, " k *outputs"]:
        rows = self.jacobian.reshape(len(self.std), -1)
        return (z.to(rows) @ rows).view(len(z), *self.outputs.shape)

    def _variance(self) -> Float[Tensor, "*outputs"]:
        half = self.basis * self._shrunk().sqrt()
        parts = self.jacobian.reshape(len(self.std), -1).split(PIXELS, 1)
        found = torch.cat([(part.to(half).mT @ half).square().sum(1) for part in parts])
        return found.to(self.outputs).view_as(self.outputs)


def last_layer_posterior(
    module: nn.Module,
    forward: Map,
    targets: Float[Tensor, "*data"],
    noise_variance: Number,
    prior: Std,
    *,
    names: Collection[str] | None = None,
    prior_mean: Parameters | None = None,
    inputs: Sequence[Any] = (),
) -> LayerPosterior:
    """Return the linearised posterior of some parameters of a fitted network, the others held as they are.

        Σ = (diag(1/s²) + JᵀAᵀ diag(1/σ²) A J)⁻¹,   J = ∂f/∂θ of the named parameters at their values

    With all parameters named this is what `linearised_posterior` draws from, for small networks.

    Args:
        module: the fitted network; called with `inputs` it returns its outputs, such as an image.
        forward: A.
        targets: y.
        noise_variance: σ², a number or one for each of the data.
        prior: the standard deviations s: a number, or one for every named parameter by name or by a function
            of its name and value.
        names: of parameters, or of modules that hold them; None takes the last `nn.Linear` that the module
            lists.
        prior_mean: m of the named parameters; None is 0.
        inputs: what the module is called with.

    Shapes: outputs (*outputs); forward (k, *outputs) -> (k, *data).
    Raises: InputError for an unknown name or no linear layer, more parameters than `MOST`, active dropout or
        normalisation over the batch, standard deviations or noise not above 0, shapes that do not fit, and
        numbers that are not finite.
    Holds: exactly, to rounding, for a network that is linear in these parameters; for others as the posterior
        narrows around their values.
    Source: MacKay 1992, "A practical Bayesian framework for backpropagation networks"; Daxberger et al. 2021,
        arXiv 2106.14806.
    """
    f = _fixed(module, _last_linear(module) if names is None else names)
    std, gap = _prior(f, prior, prior_mean)
    if len(std) > MOST:
        raise InputError(
            f"an exact posterior takes at most {MOST} parameters, not {len(std)}; name fewer, or use "
            "linearised_posterior"
        )
    outputs, push, _ = _linearised(f, inputs)
    jacobian = push(std.diag())
    noise_std = _variances("the noise variance", noise_variance, targets).sqrt().flatten()
    std, offset = std.double(), (gap / std).double()
    rows = _projected(forward, jacobian, targets).double().reshape(len(std), -1).mT / noise_std[:, None]
    right = _residual(forward, outputs, targets).flatten() / noise_std - rows @ offset
    singular, basis, projected, rest = _factors(rows, right)
    constant = -0.5 * (rest + len(right) * math.log(2 * math.pi)) - float(noise_std.log().sum())
    return LayerPosterior(
        f, tuple(inputs), outputs, jacobian, std, offset, singular, basis, projected, constant
    )


def linearised_posterior(
    module: nn.Module,
    forward: Map,
    adjoint: Map,
    targets: Float[Tensor, "*data"],
    noise_variance: Number,
    prior: Std,
    *,
    draws: int,
    generator: torch.Generator,
    prior_mean: Parameters | None = None,
    inputs: Sequence[Any] = (),
    recentred: bool = False,
    tolerance: float = 1e-3,
    iterations: int = 1000,
    progress: Callable[[int], None] = lambda iteration: None,
) -> Predictive:
    """Return the law of a fitted network's outputs, linearised in all its trainable parameters.

        samples = mean + J (θ_k − E θ),   θ_k ~ N(E θ, (diag(1/s²) + JᵀAᵀ diag(1/σ²) A J)⁻¹)

    Draws come from perturbing the data and solving again (`sampled_posterior`), with products by J and Jᵀ
    alone: each goes back through the graph of one pass, which is held in memory. An iteration of conjugate
    gradients takes draws + 1 products by J, A and their transposes; `progress` is called with its number, and
    `tolerance` is relative to the norm of the right-hand side. The other arguments are those of
    `last_layer_posterior` and its `predict`, and `adjoint` is Aᵀ.

    Shapes: -> (*outputs), samples (draws, *outputs); forward (k, *outputs) -> (k, *data), adjoint back.
    Raises: InputError for fewer than 2 draws, maps that are not each other's adjoints, active dropout or
        normalisation over the batch, standard deviations or noise not above 0, shapes that do not fit, and
        conjugate gradients that do not converge.
    Holds: to the tolerance for a network that is linear in its parameters, the variance to a relative error
        √(2/draws); for others as the posterior narrows around their values.
    Source: Antorán et al. 2023, arXiv 2210.04994; Papandreou, Yuille 2010.
    """
    f = _fixed(module, None)
    std, gap = _prior(f, prior, prior_mean)
    outputs, push, pull = _linearised(f, inputs)
    residual = _residual(forward, outputs, targets).to(outputs)
    _check_adjoint(forward, adjoint, outputs, residual)
    number = itertools.count()

    def ahead(v: Tensor) -> Tensor:
        progress(next(number))
        return forward(push(v))

    solved = sampled_posterior(
        ahead,
        lambda y: pull(adjoint(y)),
        residual if recentred else torch.zeros_like(residual),
        noise_variance,
        std.square(),
        gap if recentred else torch.zeros_like(gap),
        draws=draws,
        generator=generator,
        tolerance=tolerance,
        iterations=iterations,
    )
    assert solved.samples is not None
    deviations = push(solved.samples - solved.mean)
    mean = outputs + push(solved.mean[None])[0] if recentred else outputs
    return Predictive(mean, deviations.square().mean(0), None, mean + deviations)


def _fixed(module: nn.Module, names: Collection[str] | None) -> Function:
    """Return a module that gives the same outputs at every call as a function of parameters."""
    for name, part in module.named_modules():
        if isinstance(part, _DropoutNd) and part.training and part.p > 0:
            raise InputError(f"{name or type(part).__name__} draws its masks anew; call module.eval()")
    return function(module, names)


def _last_linear(module: nn.Module) -> list[str]:
    trainable = {name: p for name, p in unwrapped(module).named_parameters() if p.requires_grad}
    for part in reversed([part for part in module.modules() if isinstance(part, nn.Linear)]):
        own = [name for name, p in trainable.items() if any(p is q for q in part.parameters(recurse=False))]
        if own:
            return own
    raise InputError(f"{type(module).__name__} has no trainable linear layer; name the parameters")


def _prior(f: Function, prior: Std, mean: Parameters | None) -> tuple[Tensor, Tensor]:
    """Give s and m − θ* as vectors."""
    flat, law = Flat.of(f.parameters), gaussian_prior(f, prior, mean)
    std = flat.pack({name: law.std[name].expand_as(p) for name, p in f.parameters.items()})
    return std, flat.pack(law.mean).to(std) - flat.pack(f.parameters)


def _linearised(f: Function, inputs: Sequence[Any]) -> tuple[Tensor, Map, Map]:
    """Give f(θ*), v ↦ J v and u ↦ Jᵀ u of batches, all from one pass through the network.

    J v is the derivative of Jᵀu by u along v: unlike forward mode it needs no pass of its own. The module is
    called with its own parameters, since a checkpoint would find them again, and not others, when it repeats.
    """
    flat, leaves = Flat.of(f.parameters), [f.module.get_parameter(name) for name in f.parameters]
    derivative = partial(torch.autograd.grad, materialize_grads=True)

    def pulled(u: Tensor, **graph: bool) -> Tensor:
        return flat.pack(dict(zip(f.parameters, derivative(y, leaves, u, **graph), strict=True)))

    with torch.enable_grad():
        y = f.module(*inputs)
        if not isinstance(y, Tensor) or not y.is_floating_point() or not y.requires_grad:
            raise InputError("the module has to return one floating tensor that depends on its parameters")
        u = torch.zeros_like(y, requires_grad=True)
        back = pulled(u, create_graph=True)

    def push(v: Tensor) -> Tensor:
        return torch.stack([derivative(back, u, row, retain_graph=True)[0] for row in v])

    def pull(w: Tensor) -> Tensor:
        return torch.stack([pulled(row, retain_graph=True) for row in w])

    _finite("the module's outputs", y.detach())
    return y.detach(), push, pull


def _projected(forward: Map, outputs: Tensor, targets: Tensor) -> Tensor:
    """Apply A, whose results have to be of the targets' shape."""
    found = forward(outputs)
    if found.shape != (len(outputs), *targets.shape):
        raise InputError(
            f"the map takes outputs {tuple(outputs.shape[1:])} to {tuple(found.shape[1:])}, but the targets "
            f"are {tuple(targets.shape)}"
        )
    _finite("what the map returns", found)
    return found


def _residual(forward: Map, outputs: Tensor, targets: Tensor) -> Tensor:
    """Give y − A f(θ*) in float64."""
    return _finite("the targets", targets) - _projected(forward, outputs[None], targets)[0].double()


def _check_adjoint(forward: Map, adjoint: Map, x: Tensor, y: Tensor) -> None:
    """Raise InputError unless ⟨A x, y⟩ = ⟨x, Aᵀ y⟩, for random y and an x that is half Aᵀ y, half random."""
    noise = torch.Generator().manual_seed(0)
    v = torch.randn(y.shape, generator=noise, dtype=y.dtype).to(y.device)
    back = adjoint(v[None])
    if back.shape[1:] != x.shape:
        raise InputError(f"the adjoint gives {tuple(back.shape[1:])}, but the outputs are {tuple(x.shape)}")
    size = back.norm() / math.sqrt(back.numel())
    u = back + size * torch.randn(back.shape, generator=noise, dtype=back.dtype).to(back.device)
    left, right = float((forward(u)[0] * v).sum()), float((u * back).sum())
    if not abs(left - right) <= 1e-4 * float(u.norm() * back.norm()):
        raise InputError(
            f"the maps have to be each other's adjoints, but ⟨A x, y⟩ is {left:.6g} where ⟨x, Aᵀ y⟩ is "
            f"{right:.6g}"
        )


def _factors(rows: Float[Tensor, "m n"], right: Float[Tensor, " m"]) -> tuple[Tensor, Tensor, Tensor, float]:
    """Give d, V and w = Uᵀ right of rows = U diag(d) Vᵀ, and |right|² − |w|².

    By way of the triangle of [rows, right], so that nothing is as large as the rows, and nothing squared.
    """
    triangle = torch.linalg.qr(torch.cat((rows, right[:, None]), 1), mode="r").R
    left, values, basis = torch.linalg.svd(triangle[:, :-1])
    turned, count = left.mT @ triangle[:, -1], len(values)
    singular, projected = (torch.zeros(rows.shape[1]).to(rows) for _ in range(2))
    singular[:count], projected[:count] = values, turned[:count]
    return singular, basis.mT, projected, float(turned[count:].square().sum())
