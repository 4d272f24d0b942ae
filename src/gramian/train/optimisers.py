"""Optimisers with the right parameter groups."""

from typing import Any

import torch
from torch import nn

from gramian.errors import InputError


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into a decayed group (matrices) and one that is not.

    Gains, biases and the scales of norms have fewer than two axes and are never decayed; embeddings and
    linear weights are. Every trainable parameter is in exactly one group, tied ones once.

    Raises: InputError when the model has no trainable parameter.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("the model has no trainable parameter")
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def check_adamw(learning_rate: float, weight_decay: float, betas: tuple[float, float], eps: float) -> None:
    """Check the settings of `adamw` before anything is built.

    Raises: InputError for a learning rate or ε that is not positive, β outside [0, 1) or a negative decay.
    """
    if not learning_rate > 0:
        raise InputError(f"the learning rate must be positive, got {learning_rate:g}")
    if not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"both betas of AdamW lie in [0, 1), got {betas[0]:g} and {betas[1]:g}")
    if not eps > 0:
        raise InputError(f"the eps of AdamW must be positive, got {eps:g}")
    if not weight_decay >= 0:
        raise InputError(f"weight decay cannot be negative, got {weight_decay:g}")


def adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Return AdamW over `parameter_groups`, in its fused form.

    Raises: InputError as `check_adamw` and `parameter_groups`.
    Source: Loshchilov & Hutter 2019, arXiv 1711.05101.
    """
    check_adamw(learning_rate, weight_decay, betas, eps)
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
