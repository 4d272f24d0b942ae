"""Whether torch takes an operation apart, in which case a fast path of our own must stand aside."""

import torch
from torch.autograd import forward_ad


def under_transform() -> bool:
    """Whether `torch.compile`, `torch.func` or forward-mode differentiation is at work.

    They need plain operations, without autograd Functions, checkpoints or looks at values. In forward mode
    over forward mode, torch takes the derivative of what a Function's own `jvp` returns for zero (pytorch
    issue 197867).

    Holds: for the thread that asks, at the time it asks.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
