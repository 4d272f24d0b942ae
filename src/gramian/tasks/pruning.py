"""Pruning of a trained classifier: masks learnt on its expected loss, fixed, and certified if wished."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramian.bayes.split import Split
from gramian.compress.density import check_density, keep_highest, sizes_of, start_from
from gramian.compress.draws import error_reader
from gramian.compress.layers import maskable
from gramian.compress.learning import Learning, Moment, Sample, learn
from gramian.compress.masks import Units, add_masks, keep, masked, masks_of
from gramian.compress.scores import grasp, iterative_magnitude, magnitude, random_scores, snip, synflow
from gramian.compress.structures import Patterns, Rows, Weights
from gramian.compress.thresholds import most_probable
from gramian.errors import InputError
from gramian.ranks import anywhere
from gramian.tasks.evidence import Evidence
from gramian.tasks.pruning_result import Guarantee, Layer, Pruned
from gramian.tasks.self_bounded import Bounding, drawn_errors, guarantee, learn_posterior
from gramian.train.batches import batch_of

Start = Literal["magnitude", "random", "snip", "grasp", "synflow", "iterative_magnitude"]
DRAWS = 100
"""Masks drawn to estimate the held-out error of the random predictor."""
DATA_FREE = ("magnitude", "random", "synflow")
"""Scores that need no example."""
SCORED = 1024
"""Examples that a score by gradients sees at most."""

Watch = Callable[[str, int, int], None]
"""(what is done, how much of it, how much there is)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a trained network is pruned to one density."""

    density: float = 0.1
    """Share of the masked weights that is kept."""
    start: Start = "magnitude"
    """Score of the mask to start from."""
    structure: str = "weights"
    """weights, neurons (output features, but those of the last layer), or a pattern such as 2:4."""
    layers: tuple[str, ...] = ("*",)
    """Shell patterns of the names of layers to prune."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of the names of layers to leave alone."""
    high: float = 0.9
    """λ at the start where the mask keeps."""
    low: float = 0.1
    """λ at the start where it does not."""
    first_density: float | None = 1.0
    """Mean λ allowed at first, which falls to the density over half of the steps; the density when None."""
    learning: Learning = field(default_factory=lambda: Learning(learn="both"))
    """Probabilistic fine-tuning, relaxed for patterns; no step leaves the start as it is."""
    batch: int = 128
    """Examples of a step."""
    seed: int = 0
    """Seed of batches, masks and random scores."""
    std: float = 0.01
    """Standard deviation at the start of weights that the certificate's posterior moves."""
    bounding: Bounding | None = None
    """How the posterior of a certificate is learnt; nothing is certified without."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        check_density(self.density)
        structure = structure_of(self.structure)
        if isinstance(structure, Patterns) and abs(self.density - structure.n / structure.m) > 1e-12:
            raise InputError(
                f"the structure {self.structure} keeps {structure.n / structure.m} of the weights; a density "
                f"of {self.density:g} is out of its reach"
            )
        if self.patterns and self.start == "iterative_magnitude":
            raise InputError(f"{self.start} prunes step by step, which patterns do not; take another start")
        if self.start not in get_args(Start):
            raise InputError(f"unknown start {self.start!r}; choose one of {', '.join(get_args(Start))}")
        if not 0 < self.low <= self.high < 1:
            raise InputError(f"λ has to start at 0 < low ≤ high < 1, got {self.low:g} and {self.high:g}")
        if self.first_density is not None and not self.density <= self.first_density <= 1:
            raise InputError(f"first_density goes from the density to 1, got {self.first_density:g}")
        if self.batch < 1:
            raise InputError(f"a batch needs at least one example, got {self.batch}")
        self.learning.check()
        if self.learning.mode == "hard_concrete":
            raise InputError("hard concrete masks are no Bernoulli masks; learn by moments or relaxed ones")
        if self.bounding is not None:
            self.bounding.check()

    @property
    def patterns(self) -> bool:
        """Whether n of every m weights are kept, whatever is learnt."""
        return isinstance(structure_of(self.structure), Patterns)

    @property
    def gaussian(self) -> bool:
        """Whether the posterior moves weights, which have to be Gaussian then."""
        return self.bounding is not None and self.bounding.learning.learn != "masks"


def prune(
    model: nn.Module,
    evidence: Evidence,
    plan: Plan,
    *,
    watch: Watch = lambda what, done, total: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Pruned | None:
    """Prune a classifier to a density, say what it costs, and certify the random predictor if wished.

    A mask by score; λ started from it; λ and weights learnt on the expected loss over the prior examples;
    with `plan.bounding` the law at this point is the prior of a certificate, and the posterior is learnt from
    it on the bound, over prior and bound set, with weights fixed (or Gaussian); the most probable units are
    kept. The model ends with masks in the mode "kept": `compress.masks.export_state` and `remove_masks` make
    a plain network of it. What is certified is the random predictor, not this fixed network. All processes of
    `gramian.ranks` learn the same and share the draws.

    Args:
        model: inputs to scores of classes; in evaluation throughout, so statistics of norms stay.
        evidence: examples and their uses.
        plan: what to do.
        watch: told how far each part is.
        stopped: asked at every step; when true, nothing is returned.

    Raises: InputError for settings and examples that cannot be used, such as a module with nothing to
        prune, a density out of reach of the structure, classes that are not among the outputs, and bound
        data that the prior saw.
    Source: Hayou, He, Dziugaite 2021, arXiv 2110.11804 (abstract).
    """
    check(model, evidence, plan)
    add_masks(model, **_masking(model, evidence, plan))
    generator = torch.Generator(evidence.x.device).manual_seed(plan.seed)
    sample = batches(evidence.x, evidence.y, evidence.prior, plan.batch, plan.seed)
    score = scores(model, evidence, plan, generator, watch, stopped)
    if anywhere(stopped()):
        return None
    units = keep_highest(model, score, plan.density)
    keep(model, units)
    baseline = held_out_error(model, evidence)
    start_from(model, units, plan.high, plan.low)
    history: list[Moment] = []
    moved = plan.learning.learn != "weights"
    if plan.learning.steps and len(evidence.prior):
        history = learn(
            model,
            sample,
            cross_entropy,
            _suited(plan.learning, plan),
            density=plan.density if moved else None,
            first_density=plan.first_density if moved else None,
            generator=generator,
            advanced=lambda step: watch("learning the masks", step, plan.learning.steps),
            stopped=stopped,
        )
    if anywhere(stopped()):
        return None
    certified = None
    if plan.bounding is not None and evidence.split is not None:
        certified = _certified(
            model, evidence, evidence.split, plan, plan.bounding, generator, watch, stopped
        )
        if anywhere(stopped()):
            return None
    random = drawn_errors(model, *evidence.judged, DRAWS, generator).mean
    keep(model, most_probable(model, plan.density))
    layers = tuple(
        Layer(name, mask.kept.numel() * size, int(mask.kept.sum()) * size, _mean(mask.probabilities))
        for (name, mask), size in zip(masks_of(model).items(), sizes_of(model).values(), strict=True)
    )
    weights = sum(layer.weights for layer in layers)
    return Pruned(
        density=plan.density,
        kept=sum(layer.kept for layer in layers) / weights,
        expected=sum(layer.expected * layer.weights for layer in layers) / weights,
        baseline=baseline,
        random=random,
        fixed=held_out_error(model, evidence),
        layers=layers,
        history=tuple(history),
        guarantee=certified,
        export={},
    )


def _certified(
    model: nn.Module,
    evidence: Evidence,
    split: Split,
    plan: Plan,
    settings: Bounding,
    generator: torch.Generator,
    watch: Watch,
    stopped: Callable[[], bool],
) -> Guarantee | None:
    """Learn the posterior from the law that the model has now, and certify both."""
    settings = replace(settings, learning=_suited(settings.learning, plan))
    everything = torch.cat((evidence.prior, split.bound)).unique()
    sample = batches(evidence.x, evidence.y, everything, plan.batch, plan.seed + 1)
    fixed = most_probable(model, plan.density) if len(evidence.prior) else None
    prior, _ = learn_posterior(
        model,
        sample,
        split.n,
        settings,
        generator,
        lambda step: watch("learning on the bound", step, settings.learning.steps),
        stopped,
    )
    if anywhere(stopped()):
        return None
    return guarantee(
        model,
        prior,
        fixed,
        evidence.x,
        evidence.y,
        split,
        evidence.made_from,
        settings,
        generator,
        evidence.judged,
        lambda done: watch("drawing masks", done, settings.draws),
    )


def check(model: nn.Module, evidence: Evidence, plan: Plan) -> None:
    """Refuse what `prune` cannot do with a model, which is left as it was, but in evaluation.

    Raises: InputError as `prune`.
    """
    plan.check()
    evidence.check(plan.bounding is not None)
    _check_score(evidence, plan)
    model.eval()
    _check_outputs(model, evidence)
    with masked(model, **_masking(model, evidence, plan)):
        keep_highest(model, magnitude(model), plan.density)


def scores(
    model: nn.Module,
    evidence: Evidence,
    plan: Plan,
    generator: torch.Generator,
    watch: Watch = lambda what, done, total: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Units:
    """Return the scores of a masked model's units, by examples of the prior set where the score needs any.

    Iterative magnitude pruning trains; it tells `watch` so, and once `stopped` its scores are of no use.

    Raises: InputError for a score that needs examples where there are none.
    """
    if plan.start == "random":
        return random_scores(model, generator)
    if plan.start == "magnitude":
        return magnitude(model)
    if plan.start == "synflow":
        return synflow(model, evidence.x.shape[1:], plan.density)
    _check_score(evidence, plan)
    if plan.start == "iterative_magnitude":
        settings = Learning(mode="kept", learn="weights", steps=max(1, plan.learning.steps))
        sample = batches(evidence.x, evidence.y, evidence.prior, plan.batch, plan.seed)

        def train(current: nn.Module) -> None:
            learn(
                current,
                sample,
                cross_entropy,
                settings,
                generator=generator,
                advanced=lambda step: watch("training between prunings", step, settings.steps),
                stopped=stopped,
            )

        kept = iterative_magnitude(model, train, plan.density)
        return {name: unit.float() for name, unit in kept.items()}
    order = torch.randperm(len(evidence.prior), generator=generator, device=generator.device)
    chosen = evidence.prior[order[:SCORED].to(evidence.prior.device)]
    parts = [(evidence.x[part], evidence.y[part]) for part in chosen.split(plan.batch)]
    return (snip if plan.start == "snip" else grasp)(model, parts, cross_entropy)


def batches(x: Tensor, y: Tensor, index: Tensor, size: int, seed: int) -> Sample:
    """Return the batch of every step, drawn by (seed, step): each epoch takes the examples in a new order."""

    def sample(step: int) -> tuple[Tensor, Tensor]:
        chosen = index[batch_of(len(index), size, seed, step)]
        return x[chosen], y[chosen]

    return sample


def structure_of(name: str) -> Weights:
    """Return the structure of a name: weights, neurons, or n:m.

    Raises: InputError for another name.
    """
    if name == "weights":
        return Weights()
    if name == "neurons":
        return Rows()
    if pattern := re.fullmatch(r"(\d+):(\d+)", name):
        return Patterns(int(pattern[1]), int(pattern[2]))
    raise InputError(f"unknown structure {name!r}; choose weights, neurons, or a pattern such as 2:4")


@torch.no_grad()
def held_out_error(model: nn.Module, evidence: Evidence) -> float:
    """Return the 0-1 error of a model on the held-out examples."""
    x, y = evidence.judged
    return _mean(error_reader(y)(model(x)[None]))


def _mean(values: Tensor) -> float:
    return float(values.detach().double().mean())


def _check_score(evidence: Evidence, plan: Plan) -> None:
    if plan.start not in DATA_FREE and not len(evidence.prior):
        raise InputError(f"the score {plan.start} needs prior examples; without any take {DATA_FREE[0]}")


@torch.no_grad()
def _check_outputs(model: nn.Module, evidence: Evidence) -> None:
    outputs = model(evidence.judged[0])
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        raise InputError("a classifier has to return one row of scores for each example")
    low, high, classes = int(evidence.y.min()), int(evidence.y.max()), outputs.shape[1]
    if low < 0 or high >= classes:
        has = f"the model has {classes} outputs, for classes from 0 to {classes - 1}"
        raise InputError(f"labels go from {low} to {high}, but {has}")
    if wrong := int(outputs.isfinite().all(1).logical_not().sum()):
        raise InputError(
            f"the model's outputs are not finite for {wrong} of {len(outputs)} held-out examples; look at "
            "its weights and inputs"
        )


def _masking(model: nn.Module, evidence: Evidence, plan: Plan) -> dict[str, Any]:
    """Return the options of `add_masks`."""
    return {
        "layers": plan.layers,
        "exclude": (*plan.exclude, *(_last(model, evidence.x[:2]) if plan.structure == "neurons" else ())),
        "structure": structure_of(plan.structure),
        "weights": "gaussian" if plan.gaussian else "trainable",
        "std": plan.std,
    }


@torch.no_grad()
def _last(model: nn.Module, x: Tensor) -> list[str]:
    """Return the name of the layer that is called last, whose outputs are the classes."""
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if maskable(module)
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return called[-1:]


def _suited(learning: Learning, plan: Plan) -> Learning:
    """Return how masks are learnt: by patterns, whose moments are not known, relaxed in place of moments."""
    return replace(learning, mode="relaxed") if plan.patterns and learning.mode == "moments" else learning
