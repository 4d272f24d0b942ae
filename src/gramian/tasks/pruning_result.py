"""What a pruning found: density by density, errors, layers, history, certificates and exports."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gramian.bayes.certificate import Certificate
from gramian.compress.learning import Moment

OUTCOME = "outcome.json"
"""The file of what became of a density."""


@dataclass(frozen=True)
class Layer:
    """A masked layer."""

    name: str
    weights: int
    kept: int
    """Weights that the fixed mask keeps."""
    expected: float
    """Mean λ over the weights."""


@dataclass(frozen=True)
class Guarantee:
    """Certificates from one bound set, which no prior saw."""

    posterior: Certificate
    """Of the random predictor."""
    prior: Certificate
    """Of the prior itself, KL 0."""
    fixed: Certificate | None
    """Test-set bound of the prior's thresholded mask; None without prior examples."""
    bounds: dict[str, float]
    """The same evidence under each bound: kl, quadratic, classic, lambda, catoni."""
    held_out: float | None
    """Error of the random predictor on held-out examples, mean over draws."""


@dataclass(frozen=True)
class Pruned:
    """What one density gave."""

    density: float
    """Share of the weights asked for."""
    kept: float
    """Share of the weights that the fixed mask keeps."""
    expected: float
    """Mean λ over the weights."""
    baseline: float
    """Held-out error of the starting mask, weights untouched."""
    random: float
    """Held-out error of the random predictor, mean over draws."""
    fixed: float
    """Held-out error of the thresholded network."""
    layers: tuple[Layer, ...]
    history: tuple[Moment, ...]
    guarantee: Guarantee | None
    export: dict[str, Any]
    """Parameters, non-zeros, bytes; the small network's parameters and measured speed ratio, or the reason
    why there is none."""


@dataclass(frozen=True)
class Pruning:
    """What pruning one network to one density or more gave."""

    title: str
    """The network and its data, such as "mlp 300-100 on scikit-learn digits"."""
    examples: dict[str, int]
    """Examples called prior, bound and held_out."""
    dense: float
    """Held-out error of the dense network."""
    outcomes: tuple[Pruned, ...]
    """By density as asked for."""
    loss: str = "0-1 error"
    deviation: float | None = None
    """Standard deviation of the dense network's loss over held-out examples, of losses that are no errors."""


def pruned_of(saved: Mapping[str, Any]) -> Pruned:
    """Return what was written of one density as JSON (`dataclasses.asdict`)."""
    guarantee = saved["guarantee"]
    if guarantee is not None:
        names = ("posterior", "prior", "fixed")
        made = {name: guarantee[name] and Certificate(**guarantee[name]) for name in names}
        guarantee = Guarantee(**{**guarantee, **made})
    history = (
        Moment(**{**each, "histograms": {name: tuple(bins) for name, bins in each["histograms"].items()}})
        for each in saved["history"]
    )
    layers = tuple(Layer(**layer) for layer in saved["layers"])
    return Pruned(**{**saved, "layers": layers, "history": tuple(history), "guarantee": guarantee})
