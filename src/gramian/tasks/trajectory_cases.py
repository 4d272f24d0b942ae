"""What the study of trajectories trains: momentum with weight decay, and networks of growing size."""

from typing import Any

from gramian.tasks.trajectory_study import Case

NEITHER, MOMENTUM, DECAY, BOTH = "neither", "momentum", "decay", "both"
FAST, FAST_DECAY, SLOW, SLOW_BOTH = "fast", "fast decay", "slow momentum", "slow both"
STRONG = "strong decay"

RATE, BETA, DECAYED = 0.05, 0.9, 5e-3

_HEAVY = {"betas": (BETA, 0.0)}
_DECAYED = {"weight_decay": DECAYED}
_TENFOLD, _TENTH = {"learning_rate": RATE / (1 - BETA)}, {"learning_rate": RATE * (1 - BETA)}

GRID: dict[str, dict[str, Any]] = {
    NEITHER: {},
    MOMENTUM: _HEAVY,
    DECAY: _DECAYED,
    BOTH: _HEAVY | _DECAYED,
    FAST: _TENFOLD,
    FAST_DECAY: _TENFOLD | _DECAYED,
    SLOW: _HEAVY | _TENTH,
    SLOW_BOTH: _HEAVY | _TENTH | _DECAYED,
    STRONG: {"weight_decay": DECAYED / (1 - BETA)},
}
"""Momentum and decay at one learning rate. The controls: without momentum at ten times the rate, with it at a
tenth, so that rate/(1 − momentum) is that of the run with momentum or of the plain one; and without momentum
at ten times the decay, which shrinks weights as much as both together."""

FREE = "without decay"
"""Added to the name of a family of networks that are trained without weight decay."""

FALLING = "decoder at falling rate"


def grid() -> tuple[Case, ...]:
    """Return a perceptron and a residual network with every setting of the grid."""
    return tuple(
        Case(name=f"{network} {cell}", network=network, width=width, depth=depth, training=changed)
        for network, width, depth in (("mlp", 64, 2), ("resnet", 8, 1))
        for cell, changed in GRID.items()
    )


def sizes() -> tuple[Case, ...]:
    """Return networks of growing size, trained alike; decoders also at a rate that falls with the width."""
    images = [("mlp", width, 2) for width in (16, 64, 256)] + [("resnet", width, 1) for width in (8, 16, 32)]
    viewers = [
        Case(name=f"{network}{name}", network=network, width=width, depth=depth, training=changed)
        for name, changed in (("", {}), (f" {FREE}", {"weight_decay": 0.0}))
        for network, width, depth in images
    ]
    readers = [
        Case(name="decoder", network="decoder", width=width, depth=depth)
        for width, depth in ((32, 2), (64, 2), (64, 4), (128, 4))
    ]
    falling = [
        Case(name=FALLING, network="decoder", width=width, depth=depth, training={"learning_rate": rate})
        for width, depth, rate in ((32, 2, 4e-3), (64, 4, 2e-3), (128, 4, 1e-3))
    ]
    return (*viewers, *readers, *falling)
