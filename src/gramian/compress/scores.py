"""Scores that say which weights to keep: random, magnitude, SNIP, GraSP, SynFlow, iterative magnitude.

Every score is a tensor of the masks' units by layer; `keep_highest` makes exact counts of them. Gradients are
taken at the full weights, whatever the masks do, and leave the model, its statistics included, as it is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from gramian.compress.density import check_density, highest, keep_highest, sizes_of
from gramian.compress.masks import Units, keep, key_of, masks_of, originals_of
from gramian.errors import InputError

Loss = Callable[[Any, Tensor], Tensor]
"""(outputs, targets) -> a scalar."""
Batches = Iterable[tuple[Tensor, Tensor]]


def random_scores(model: nn.Module, generator: torch.Generator) -> Units:
    """Return independent uniform scores.

    Raises: InputError when the model has no masks.
    """
    return {
        name: torch.rand(mask.kept.shape, generator=generator, device=generator.device).to(mask.kept.device)
        for name, mask in masks_of(model).items()
    }


def magnitude(model: nn.Module) -> Units:
    """Return the root mean square of the weights of each unit: |w| for single weights.

    Raises: InputError when the model has no masks.
    Holds: exactly.
    """
    weights, sizes = originals_of(model), sizes_of(model)
    return {
        name: (mask.gather(weights[name].detach().square()) / sizes[name]).sqrt()
        for name, mask in masks_of(model).items()
    }


def snip(model: nn.Module, batches: Batches, loss: Loss) -> Units:
    """Return the sensitivity of the loss to each mask variable at m = 1.

        |∂L/∂m_u| = |Σ_{i∈u} w_i ∂L/∂w_i|,  L the mean loss of the batches

    Raises: InputError when the model has no masks, and without batches.
    Holds: exactly.
    Source: Lee, Ajanthan, Torr 2019, arXiv 1810.02340.
    """
    weights = _leaves(model)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    batches = _some(batches)
    for x, y in batches:
        gradients = torch.autograd.grad(_loss(model, weights, x, y, loss), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += gradient / len(batches)
    return {name: mask.gather(weights[name] * total[name]).abs().detach() for name, mask in _masks(model)}


def grasp(model: nn.Module, batches: Batches, loss: Loss) -> Units:
    """Return how much each unit serves the flow of gradients; units of the highest score are kept.

        Σ_{i∈u} w_i (H g)_i,  g = ∂L/∂w and H = ∂²L/∂w² over the masked weights, L the mean loss

    To first order, taking a unit away changes |g|² by −2 times its score.

    Raises: InputError when the model has no masks, and without batches.
    Holds: exactly; the second derivative of a piecewise linear activation counts as 0.
    Source: Wang, Zhang, Grosse 2020, arXiv 2002.07376.
    """
    weights, batches = _leaves(model), _some(batches)
    tensors = list(weights.values())
    with sdpa_kernel(SDPBackend.MATH):  # the fast kernels have no second derivative
        losses = [_loss(model, weights, x, y, loss) for x, y in batches]
        gradients = torch.autograd.grad(torch.stack(losses).mean(), tensors, create_graph=True)
        square = torch.stack([gradient.square().sum() for gradient in gradients]).sum() / 2
        products = torch.autograd.grad(square, tensors)
    named = dict(zip(weights, products, strict=True))
    return {name: mask.gather(weights[name] * named[name]).detach() for name, mask in _masks(model)}


def synflow(model: nn.Module, shape: Sequence[int], density: float, rounds: int = 100) -> Units:
    """Return the share of each unit in the flow through the network, after pruning round by round.

        score_u = Σ_{i∈u} |w_i ∂R/∂w_i|,  R = sum of the outputs at an input of ones with all parameters |θ|;
        round k of N keeps the share ρ^{k/N} of the weights, ρ the density

    Units that earlier rounds dropped score −1. No data are used; normalisation over the batch has mean 0 and
    variance 1. The arithmetic is in double precision, where deep products do not overflow.

    Shapes: `shape` is that of one example, without the batch.
    Raises: InputError for a density out of range, less than one round, and when the flow is not finite.
    Holds: exactly.
    Source: Tanaka, Kunin, Yamins, Ganguli 2020, arXiv 2006.05467, Algorithm 1.
    """
    check_density(density)
    if rounds < 1:
        raise InputError(f"synflow needs at least one round, got {rounds}")
    masks, sizes, weights = masks_of(model), sizes_of(model), originals_of(model)
    values = {name: weight.detach().double().abs() for name, weight in weights.items()}
    kept = {name: torch.ones_like(mask.kept) for name, mask in masks.items()}
    scores: Units = {}
    for k in range(1, rounds + 1):
        live = {
            name: (mask.spread(kept[name], weights[name]).double() * values[name]).requires_grad_()
            for name, mask in masks.items()
        }
        flow = _flow(model, live, next(iter(weights.values())), shape)
        gradients = torch.autograd.grad(flow, list(live.values()))
        for (name, mask), gradient in zip(masks.items(), gradients, strict=True):
            score = mask.gather((live[name] * gradient).abs().detach())
            scores[name] = torch.where(kept[name], score, -1.0)
        kept = highest(scores, sizes, density ** (k / rounds))
    return scores


def iterative_magnitude(
    model: nn.Module,
    train: Callable[[nn.Module], None],
    density: float,
    *,
    drop: float = 0.2,
    rewind: Mapping[str, Tensor] | None = None,
) -> Units:
    """Return the units that survive training, dropping the smallest weights and rewinding, again and again.

        train; d <- max((1 − drop) d, density); keep the share d of largest |w|; weights <- rewind point

    The rewind point is a state dict of the masked model: that of an early step, or the state now. The model
    ends there with the survivors kept, ready to be trained.

    Raises: InputError for a density out of range and unless 0 < drop < 1.
    Holds: exactly.
    Source: Frankle & Carbin 2019, arXiv 1803.03635; Frankle, Dziugaite, Roy, Carbin 2020, arXiv 1912.05671.
    """
    check_density(density)
    if not 0 < drop < 1:
        raise InputError(f"the share to drop a round must be more than 0 and less than 1, got {drop}")
    start = {name: value.detach().clone() for name, value in (rewind or model.state_dict()).items()}
    kept = {name: torch.ones_like(mask.kept) for name, mask in masks_of(model).items()}
    share = 1.0
    while share > density:
        keep(model, kept)
        train(model)
        share = max(share * (1 - drop), density)
        scores = magnitude(model)
        kept = keep_highest(model, {n: v.masked_fill(~kept[n], -1) for n, v in scores.items()}, share)
        model.load_state_dict(start)
    keep(model, kept)
    return kept


def shuffled(scores: Units, generator: torch.Generator) -> Units:
    """Return the scores of each layer in random order: the control that a score carries no information."""
    order = {k: torch.randperm(v.numel(), generator=generator).to(v.device) for k, v in scores.items()}
    return {name: value.flatten()[order[name]].reshape(value.shape) for name, value in scores.items()}


def _masks(model: nn.Module) -> Iterable[tuple[str, Any]]:
    return masks_of(model).items()


def _leaves(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone().requires_grad_() for name, weight in originals_of(model).items()}


def _some(batches: Batches) -> list[tuple[Tensor, Tensor]]:
    found = list(batches)
    if not found:
        raise InputError("a score by gradients needs at least one batch of inputs and targets")
    return found


def _call(model: nn.Module, weights: Mapping[str, Tensor], values: dict[str, Tensor], x: Tensor) -> Any:
    """Return the model's outputs with these masked weights and these other tensors, changing nothing."""
    own = {key_of(name, "0.given"): weight for name, weight in weights.items()}
    return functional_call(model, {**values, **own}, (x,))


def _loss(model: nn.Module, weights: Mapping[str, Tensor], x: Tensor, y: Tensor, loss: Loss) -> Tensor:
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    return loss(_call(model, weights, buffers, x), y)


def _flow(model: nn.Module, weights: dict[str, Tensor], like: Tensor, shape: Sequence[int]) -> Tensor:
    values = {name: value.detach().double().abs() for name, value in model.named_parameters()}
    for name, value in model.named_buffers():
        values[name] = value.double() if value.is_floating_point() else value.clone()
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is None or module.running_var is None:
                raise InputError(f"synflow needs running statistics, which {name!r} does not keep")
            prefix = f"{name}." if name else ""
            values[prefix + "running_mean"] = torch.zeros_like(module.running_mean, dtype=torch.float64)
            values[prefix + "running_var"] = torch.ones_like(module.running_var, dtype=torch.float64)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        ones = torch.ones(1, *shape, dtype=torch.float64, device=like.device)
        flow = _call(model, weights, values, ones).sum()
    finally:
        for module, training in modes.items():
            module.training = training
    if not flow.isfinite():
        raise InputError("the flow through the network is not finite; use another score")
    return flow
