"""How sure an image fitted to a scan is: samples of it, by eight methods that all end in one law."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from gramian.bayes.convergence import bulk_size, r_hat
from gramian.bayes.flat import Call, log_posterior
from gramian.bayes.hmc import HMCConfig, around, sample
from gramian.bayes.laplace import last_layer_posterior, linearised_posterior
from gramian.bayes.members import seeded
from gramian.bayes.variational import VariationalConfig, fit_variational
from gramian.errors import InputError, StoppedError
from gramian.imaging.energy import Energy
from gramian.nn.field import Picture
from gramian.nn.field_encodings import Sine
from gramian.tasks.field_fits import Fitted
from gramian.tasks.observed_views import Observed
from gramian.train.signals import stop_requests

POINTS = ("none", "ensemble")
"""Methods whose samples are the members themselves."""
DROPOUTS = ("dropout", "dropout_ensemble")
UNCERTAINTIES = (*POINTS, *DROPOUTS, "variational", "hmc", "last_layer", "laplace")
"""none, or what samples are drawn by."""
OF_PIXELS = ("none", "variational", "hmc", "laplace")
"""Those that a grid of pixels has: its members would all be the same."""

PROBES = 64
"""Random forms by which the curvature at a fit is known: to 1/√(PROBES/2) of it, 18 %."""


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """How samples of an image are drawn."""

    uncertainty: str = "dropout"
    """none, dropout, ensemble, dropout_ensemble, variational, hmc, last_layer or laplace."""
    samples: int = 50
    """Images that are drawn, over all members or chains."""
    members: int = 5
    """Fields of an ensemble."""
    prior_precision: float = 1.0
    """τ: weights are N(0, 1/(τ inputs)) a priori, learned numbers at nodes of grids and logits N(0, 1/τ)."""
    descents: int = 500
    """Steps that fit a variational posterior."""
    chains: int = 2
    """Of hmc, each from the fitted image."""
    warmup: int = 100
    """Transitions of a chain that adapt it and are thrown away."""
    thinning: int = 2
    """Transitions for each sample of a chain."""
    max_depth: int = 8
    """A trajectory of hmc takes at most 2^max_depth gradients."""

    def check(self, *, pixels: bool) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        allowed = OF_PIXELS if pixels else UNCERTAINTIES
        if self.uncertainty not in allowed:
            raise InputError(
                f"{'a grid of pixels' if pixels else 'a field'} knows no uncertainty {self.uncertainty!r}; "
                f"choose one of {', '.join(allowed)}"
            )
        for name, least in (("samples", 2), ("members", 2), ("descents", 1), ("chains", 1), ("max_depth", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.prior_precision < math.inf:
            raise InputError(f"the precision of the prior must be above 0, got {self.prior_precision:g}")
        if self.uncertainty == "hmc":
            self.hmc(0).check()

    @property
    def fields(self) -> int:
        """Members that are fitted."""
        return self.members if self.uncertainty.endswith("ensemble") else 1

    @property
    def dropout(self) -> bool:
        """Whether members are fitted with dropout."""
        return self.uncertainty in DROPOUTS

    def hmc(self, seed: int) -> HMCConfig:
        """Return the settings of the chains."""
        draws = math.ceil(self.samples / self.chains)
        return HMCConfig(
            warmup=self.warmup,
            samples=draws,
            thinning=self.thinning,
            max_depth=self.max_depth,
            step_size=0.1,
            adapt_mass=False,
            seed=seed,
        )


@dataclass(frozen=True, eq=False)
class Drawn:
    """Samples of an image, and what is known about them."""

    samples: Float[Tensor, "samples n n"]
    """One alone is a point."""
    seconds: float
    """That the samples took after the fit."""
    notes: Mapping[str, float]
    """Figures of the method, such as R̂ of chains."""


def draw(fitted: Fitted, observed: Observed, doubt: Doubt, console: Console) -> Drawn:
    """Draw samples of an image around fitted members.

    Raises: InputError for a method that the image does not have; StoppedError after a signal.
    """
    began, name = time.perf_counter(), doubt.uncertainty
    notes: dict[str, float] = {}
    if name in POINTS:
        with torch.no_grad():
            samples = fitted.members(1)
    elif name in DROPOUTS:
        samples = _masked(fitted, doubt)
    else:
        method = {"variational": _variational, "hmc": _chains, "last_layer": _layer, "laplace": _laplace}[
            name
        ]
        samples, notes = method(fitted, observed, doubt, console)
    return Drawn(samples.detach().float(), time.perf_counter() - began, notes)


def _masked(fitted: Fitted, doubt: Doubt) -> Tensor:
    """Return images under random masks of units, as many of each member."""
    members = fitted.members.train()
    each = math.ceil(doubt.samples / len(members))
    with torch.no_grad(), seeded(fitted.job.fit.seed, next(members.parameters()).device):
        drawn = torch.stack([members(1) for _ in range(each)], 1).flatten(0, 1)
    members.eval()
    return drawn


def _variational(
    fitted: Fitted, observed: Observed, doubt: Doubt, console: Console
) -> tuple[Tensor, dict[str, float]]:
    picture = fitted.members.picture()
    config = VariationalConfig(
        steps=doubt.descents, learning_rate=1e-3, initial_std=0.01, seed=fitted.job.fit.seed
    )
    with stop_requests() as requested, Progress(console=console, transient=True) as bar:
        task = bar.add_task("variational posterior", total=config.steps)
        found = fit_variational(
            picture,
            _log_likelihood(fitted, observed),
            _prior(doubt, picture),
            config,
            progress=lambda step, loss: bar.update(task, completed=step),
            stop=lambda: requested() is not None,
        )
        _stopped(found.finished, requested())
    predicted = found.predict(samples=doubt.samples, seed=config.seed)
    assert predicted.samples is not None
    return predicted.samples, {"kl": found.kl}


def _chains(
    fitted: Fitted, observed: Observed, doubt: Doubt, console: Console
) -> tuple[Tensor, dict[str, float]]:
    picture, config = fitted.members.picture(), doubt.hmc(fitted.job.fit.seed)
    density = log_posterior(picture, _log_likelihood(fitted, observed), _prior(doubt, picture))
    start = {name: value.detach() for name, value in picture.named_parameters()}
    variances = _variances(picture, observed.kept.energy(fitted.job.fit.weight), doubt, config.seed)
    with stop_requests() as requested, Progress(console=console, transient=True) as bar:
        task = bar.add_task("chains", total=config.transitions)
        chains = sample(
            density,
            around(start, doubt.chains),
            config,
            inverse_mass=variances,
            progress=lambda done: bar.update(task, completed=done.done),
            stop=lambda: requested() is not None,
        )
        _stopped(chains.finished, requested())
    images = _of_parameters(picture, chains.flat.unpack(chains.draws.flatten(0, 1)))
    value = chains.log_density[..., None]
    return images, {
        "acceptance": float(chains.acceptance.mean()),
        "divergences": float(chains.divergences.sum()),
        "leapfrogs": float(chains.leapfrogs.double().mean()),
        **_convergence(images.unflatten(0, (doubt.chains, -1)), value),
    }


def _variances(picture: Picture, energy: Energy, doubt: Doubt, seed: int) -> dict[str, Tensor]:
    """Return posterior variances of parameters by the curvature at the fit, each as if the others were known.

    The draws of a warm-up would tell them only after chains have crossed the posterior, for which they need
    its widths: of a field curvatures differ by 10⁷.
    """
    prior, generator = _prior(doubt, picture), torch.Generator().manual_seed(seed)
    names, parameters = zip(*picture.named_parameters(), strict=True)
    precision = [torch.full_like(p, prior(name, p) ** -2) for name, p in zip(names, parameters, strict=True)]
    image = picture()
    for _ in range(PROBES):
        form = energy.probe(image, generator)
        gradients = torch.autograd.grad(form, parameters, retain_graph=True)
        precision = [p + g.square() / PROBES for p, g in zip(precision, gradients, strict=True)]
    return {name: 1 / p for name, p in zip(names, precision, strict=True)}


def _convergence(images: Float[Tensor, "chains draws n n"], value: Tensor) -> dict[str, float]:
    """Return R̂ and effective sizes of what matters, the pixels, and of the log density."""
    pixels = images.flatten(2).double()
    pixels = pixels[..., pixels.flatten(0, 1).std(0) > 0]
    if images.shape[1] < 4 or not pixels.numel():
        return {}
    hats, sizes = r_hat(pixels), bulk_size(pixels)
    return {
        "r_hat_median": float(hats.median()),
        "r_hat_worst": float(hats.max()),
        "effective_samples_median": float(sizes.median()),
        "r_hat_log_density": float(r_hat(value.double())[0]),
    }


def _layer(
    fitted: Fitted, observed: Observed, doubt: Doubt, console: Console
) -> tuple[Tensor, dict[str, float]]:
    picture, rays = fitted.members.picture().eval(), observed.kept
    prior = _prior(doubt, picture)
    with console.status("posterior of the last layer"):
        found = last_layer_posterior(
            picture, rays.projector.A, rays.sinogram, rays.std.double().square(), prior
        )
        generator = torch.Generator().manual_seed(fitted.job.fit.seed)
        predicted = found.predict(doubt.samples, generator)
    assert predicted.samples is not None
    return predicted.samples.clamp(0, 1), {"log_evidence": found.log_evidence}


def _laplace(
    fitted: Fitted, observed: Observed, doubt: Doubt, console: Console
) -> tuple[Tensor, dict[str, float]]:
    picture, rays = fitted.members.picture().eval(), observed.kept
    with console.status("linearised posterior") as status:
        predicted = linearised_posterior(
            picture,
            rays.projector.A,
            rays.projector.A_adjoint,
            rays.sinogram,
            rays.std.square(),
            _prior(doubt, picture),
            draws=doubt.samples,
            generator=torch.Generator().manual_seed(fitted.job.fit.seed),
            tolerance=1e-2,
            iterations=2000,
            progress=lambda step: status.update(f"linearised posterior, iteration {step}"),
        )
    assert predicted.samples is not None
    return predicted.samples.clamp(0, 1), {}


def _log_likelihood(fitted: Fitted, observed: Observed) -> Callable[[Call], Tensor]:
    """Return the log density of the rays and of the image's roughness, given the picture."""
    energy = observed.kept.energy(fitted.job.fit.weight)
    return lambda picture: -energy(picture())


def _prior(doubt: Doubt, picture: Picture) -> Callable[[str, Tensor], float]:
    """Return the standard deviation of a parameter a priori, by its name."""
    inputs = {
        f"{name}.{own}": part.weight.shape[1]
        for name, part in picture.named_modules()
        if isinstance(part, nn.Linear | Sine)
        for own in ("weight", "bias")
    }
    return lambda name, _: (doubt.prior_precision * inputs.get(name, 1)) ** -0.5


def _of_parameters(picture: Picture, parameters: Any) -> Tensor:
    names = [name for name, _ in picture.named_parameters()]
    count = len(parameters[names[0]])
    with torch.no_grad():
        return torch.cat(
            [
                picture.members({n.removeprefix("field."): parameters[n][k : k + 1] for n in names})
                for k in range(count)
            ]
        )


def _stopped(finished: bool, signal: str | None) -> None:
    if not finished:
        raise StoppedError(f"stopped by {signal}; the fitted image is saved, its uncertainty begins anew")
