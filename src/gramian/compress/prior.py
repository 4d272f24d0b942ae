"""The law of masked weights frozen as a prior, and the divergence of the law they have later from it."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gramian.compress.masks import masks_of, originals_of
from gramian.compress.structures import Patterns
from gramian.core.divergence import bernoulli_kl_of_logits, categorical_kl_of_logits, gaussian_kl
from gramian.errors import InputError


@dataclass(frozen=True)
class LayerLaw:
    """The law of one layer's masked weight: logits of its units, weights (or means), standard deviations."""

    logits: Tensor
    weight: Tensor
    std: Tensor | None


Prior = dict[str, LayerLaw]


@torch.no_grad()
def law_of(model: nn.Module) -> Prior:
    """Return a copy of the law of the masked weights, in double precision.

    Raises: InputError when the model has no masks.
    Holds: exactly.
    """
    weights = originals_of(model)
    return {
        name: LayerLaw(
            mask.logits.detach().double().clone(),
            weights[name].detach().double().clone(),
            None if mask.log_std is None else mask.log_std.detach().double().exp(),
        )
        for name, mask in masks_of(model).items()
    }


def prior_of(model: nn.Module, clamp: float = 0.01) -> Prior:
    """Return a frozen copy of the law of the masked weights, every λ of single units within [ε, 1 − ε].

    The copy is in double precision. Take it before the posterior is trained, and start the posterior from it.

    Raises: InputError when the model has no masks, or unless 0 < ε < ½.
    Holds: exactly.
    """
    if not 0 < clamp < 0.5:
        raise InputError(f"the clamp of prior probabilities must be more than 0 and less than ½, got {clamp}")
    edge = float(torch.tensor(1 - clamp, dtype=torch.float64).logit())
    masks = masks_of(model)
    return {
        name: law
        if isinstance(masks[name].structure, Patterns)
        else replace(law, logits=law.logits.clamp(-edge, edge))
        for name, law in law_of(model).items()
    }


@torch.no_grad()
def set_law(model: nn.Module, law: Prior) -> None:
    """Give the masks the logits of a prior, and Gaussian weights its means and standard deviations.

    Raises: InputError for a prior of other layers, or of Gaussian weights where the model's are not.
    """
    weights = originals_of(model)
    for name, mask in masks_of(model).items():
        own = _of(law, name, mask.log_std is not None)
        mask.logits.copy_(own.logits)
        weights[name].copy_(own.weight)
        if mask.log_std is not None and own.std is not None:
            mask.log_std.copy_(own.std.log())


def divergence(model: nn.Module, prior: Prior) -> Float[Tensor, ""]:
    """Return the divergence of the law of the masked weights from a prior, in nats and differentiable.

        KL = Σ_j kl(λ_j ‖ λ0_j) + Σ_i λ_i KL(N(w_i, σ_i²) ‖ N(w0_i, σ0_i²))

    With weights that are not Gaussian the second sum is 0 as long as they equal the prior's, and ∞ when one
    has moved. Units that cover several weights count once in the first sum; n:m patterns put the divergence
    of their categories there. It is exact because masks of different weights have disjoint supports.

    Raises: InputError for a prior of other layers, or of Gaussian weights where the model's are not.
    Holds: exactly.
    Source: the chain rule of relative entropy.
    """
    weights = originals_of(model)
    total = torch.zeros((), dtype=torch.float64, device=next(iter(weights.values())).device)
    for name, mask in masks_of(model).items():
        own, weight = _of(prior, name, mask.log_std is not None), weights[name]
        logits = mask.logits.double()
        divergence_of = (
            categorical_kl_of_logits if isinstance(mask.structure, Patterns) else bernoulli_kl_of_logits
        )
        total = total + divergence_of(logits, own.logits).sum()
        if mask.log_std is None or own.std is None:
            if not torch.equal(weight.double(), own.weight):
                total = total + torch.inf
            continue
        slabs = gaussian_kl(weight.double(), mask.log_std.double().exp(), own.weight, own.std)
        total = total + (mask.structure.probabilities(logits) * mask.gather(slabs)).sum()
    return total


def _of(prior: Prior, name: str, gaussian: bool) -> LayerLaw:
    if name not in prior:
        raise InputError(f"the prior has no law for {name!r}; take it by prior_of from the same masks")
    if (prior[name].std is not None) != gaussian:
        raise InputError(f"the weights of {name!r} are Gaussian in one of prior and model, not in the other")
    return prior[name]
