"""What a profile over depth means for training, in one sentence, and what to change."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gramian.tasks.architectures import Architecture

FAR = 1e4
"""Factor beyond which second moments or squared gradients are said to explode, or below 1/FAR to vanish."""

COLLAPSED = 0.995
"""Correlation from which inputs or tokens are said to be one."""


@dataclass(frozen=True)
class Profile:
    """Numbers at the entrance of the first layer and behind each one."""

    second_moment: Sequence[float]
    """Mean square of the features, averaged over inputs."""
    correlations: Mapping[str, Sequence[float]]
    """Cosines of pairs of inputs or tokens, by the pair's name."""
    gradient: Sequence[float]
    """Squared norm of the gradient there, over that at the last layer."""


@dataclass(frozen=True)
class Verdict:
    """Whether a network will train."""

    kind: str
    """fine, exploding, vanishing or collapsing."""
    layer: int | None
    """Where it goes wrong; none when fine."""
    sentence: str


def judge(profile: Profile, first: int = 0) -> Verdict:
    """Say what a profile means: explosion and vanishing before collapse, since they stop training at once.

    Exploding or vanishing are second moments or squared gradients beyond `FAR`; collapsing are pairs that
    all reach `COLLAPSED`. Layers before the `first` are left out, such as embeddings whose scale is free.

    Holds: empirically.
    """
    moments, gradients = profile.second_moment[first:], profile.gradient[first:]
    depth, start = len(moments) - 1, moments[0]
    growth = moments[-1] / start if start else math.nan
    numbers = (
        f"over {depth} layers the second moment changes by a factor {_factor(growth)}, the squared gradient, "
        f"on its way back, by {_factor(gradients[0])}"
    )
    for values, base, what in (
        (moments, start, "second moments"),
        (gradients[::-1], 1.0, "gradients"),
    ):
        if (layer := _beyond(values, base)) is None:
            continue
        at = first + (layer if what == "second moments" else depth - layer)
        value = values[layer]
        kind = "exploding" if not value < base else "vanishing"
        word = "explode" if kind == "exploding" else "vanish"
        return Verdict(kind, at, f"Will not train: {what} {word}, from layer {at} on; {numbers}.")
    lowest = [min(values) for values in zip(*profile.correlations.values(), strict=True)]
    layer = next((index for index, value in enumerate(lowest) if value >= COLLAPSED), None)
    if layer is not None and lowest[0] < COLLAPSED:
        what = f"Will hardly train: rank collapse at layer {layer}, where all correlations reach {COLLAPSED}"
        return Verdict("collapsing", layer, f"{what}; {numbers}.")
    return Verdict("fine", None, f"Fine: {numbers}, and correlations end at {lowest[-1]:.3f} or above.")


def _beyond(values: Sequence[float], base: float) -> int | None:
    """Return the first index where a value is beyond FAR times the base, below its FAR-th, or not finite."""
    for index, value in enumerate(values):
        if not math.isfinite(value) or not base / FAR <= value <= base * FAR:
            return index
    return None


def _factor(value: float) -> str:
    return "more than numbers hold" if not math.isfinite(value) else f"{value:.3g}"


def remedies(architecture: Architecture, verdict: Verdict) -> Iterator[tuple[str, Architecture]]:
    """Yield changes worth trying in theory, the smallest first, each with how to ask for it."""
    residual, rule = "residual" in architecture.name, architecture.gains
    if verdict.kind == "fine":
        return
    if residual and rule != "uniform":
        yield "scale the branches by 1/√L (--gains uniform)", replace(architecture, gains="uniform")
    if not architecture.transformer:
        he = replace(architecture, weight_std=None, bias_std=0.0)
        if he != architecture:
            yield "draw weights with variance 2/fan_in, biases zero (leave out --weight-std, --bias-std)", he
        words = "shape the activation for this depth (--shaping tat)"
        tailored = replace(he, shaping="tat", weight_std=1.0, activation=architecture.activation)
        yield f"{words} and weights of variance 1/fan_in (--weight-std 1)", tailored
        if not residual:
            name = "residual" if architecture.name == "dense" else "residual_convolution"
            words = f"add skips with branches scaled by 1/√L ({name} --gains uniform)"
            yield words, replace(he, name=name, gains="uniform")
        return
    for block, words in (
        ("e_spa", "prescribe attention, shape the MLP (block e_spa)"),
        ("pre_norm", "use skips and norms before the branches (block pre_norm)"),
    ):
        if block != architecture.name:
            yield words, replace(architecture, name=block, shaping="none")
