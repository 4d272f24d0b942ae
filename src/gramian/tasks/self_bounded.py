"""Self-bounded learning: random masks and weights learnt on the bound of their own risk, then certified.

The prior is the law that a masked model has before: its weights, masks and settings come from the prior set
alone. The posterior may be learnt on everything; the certificate takes its risk from the bound set, under
hypotheses drawn afresh.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gramian.bayes.bounds import BOUNDS
from gramian.bayes.certificate import SAMPLING, Certificate, certify, certify_fixed
from gramian.bayes.risk import SampledRisk, clipped_cross_entropy, sampled_errors
from gramian.bayes.split import Seen, Split
from gramian.compress.draws import draw_outputs, error_reader, skip_draws
from gramian.compress.learning import Learning, Moment, Sample, learn
from gramian.compress.masks import Units, keep, masks_of
from gramian.compress.prior import Prior, divergence, law_of, prior_of, set_law
from gramian.errors import InputError
from gramian.memory import check_memory
from gramian.ranks import on_main, ranks
from gramian.tasks.pruning_result import Guarantee

STREAM = "/stream"
"""Name of a generator's state among a model's tensors."""


@dataclass(frozen=True, kw_only=True)
class Bounding:
    """How a posterior is learnt on the bound of its own risk, and what is certified of it."""

    learning: Learning = field(default_factory=lambda: Learning(steps=500))
    """What is moved (masks, weights, both) and how fast."""
    bound: str = "kl"
    """Bound that is minimised and certified: kl, quadratic, classic, lambda or catoni."""
    delta: float = 0.025
    """Probability δ that the bound set misleads."""
    delta_sampling: float = 0.01
    """Probability δ' that the draws mislead."""
    draws: int = 1000
    """Hypotheses drawn for the certificate, each scored on the whole bound set."""
    sampling: str = "smaller"
    """How the draws bound the risk on the bound set: kl, bernstein, or the smaller at δ'/2 for each."""
    p_min: float = 1e-5
    """Probability at which cross-entropy is clipped, so that it lies in [0, 1] after scaling."""
    clamp: float = 1e-3
    """The prior's λ are kept within [ε, 1 − ε]."""
    union: float = 0.0
    """Nats paid for having several priors (`bayes.bounds.finite_union`)."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        self.learning.check()
        if self.learning.mode == "hard_concrete":
            raise InputError("hard concrete masks are no Bernoulli masks, whose divergence the bound takes")
        if self.bound not in BOUNDS:
            raise InputError(f"there is no bound {self.bound!r}; take one of {', '.join(BOUNDS)}")
        if not 0 < self.delta < 1 or not 0 < self.delta_sampling < 1 or self.delta + self.delta_sampling >= 1:
            raise InputError(
                f"δ and δ' have to be above 0 with a sum below 1, not {self.delta} and {self.delta_sampling}"
            )
        if self.sampling not in SAMPLING:
            raise InputError(f"there is no sampling {self.sampling!r}; take one of {', '.join(SAMPLING)}")
        if self.draws < 2:
            raise InputError(f"a certificate needs at least two draws, got {self.draws}")
        check_memory(8 * self.draws, f"the risks of {self.draws:,} draws")
        if not 0 < self.p_min < 1:
            raise InputError(f"p_min has to be above 0 and below 1, not {self.p_min}")
        if not 0 < self.clamp < 0.5:
            raise InputError(f"the clamp of the prior must be more than 0 and less than ½, got {self.clamp}")


def learn_posterior(
    model: nn.Module,
    sample: Sample,
    n: int,
    settings: Bounding,
    generator: torch.Generator,
    advanced: Callable[[int], None] = lambda step: None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[Prior, list[Moment]]:
    """Freeze the law of a masked model as the prior, and learn the posterior from it on the bound.

        minimise  bound(r̂, KL(Q‖P), n, δ),   r̂ the mean clipped cross-entropy under Q, in [0, 1]

    The clipped cross-entropy stands for the 0-1 error, which has no slope. Which of the bounds is minimised
    is one of `BOUNDS`; that of the inverse divergence is differentiated implicitly.

    Args:
        model: masked, in evaluation; its law becomes the posterior.
        sample: step -> batch; may be drawn from all data, bound set included.
        n: examples of the bound set.
        settings: what is moved, and on which bound.
        generator: of the masks drawn on the way.
        advanced: told the steps done.
        stopped: asked at every step whether to leave off.

    Returns: the prior, and what was seen on the way.
    Raises: InputError for a model in training, whose statistics would learn from the bound set, and where
        weights are to be moved that are not Gaussian.
    Source: Hayou, He, Dziugaite 2021, arXiv 2110.11804 (abstract); Pérez-Ortiz et al. 2021, JMLR 22(227).
    """
    settings.check()
    _check_movable(model, settings.learning)
    prior = prior_of(model, settings.clamp)
    set_law(model, prior)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return clipped_cross_entropy(outputs, labels, settings.p_min).mean()

    def objective(risk: Tensor) -> Tensor:
        delta = settings.delta
        return BOUNDS[settings.bound](risk.double().clamp(0, 1), divergence(model, prior), n, delta)

    history = learn(
        model,
        sample,
        loss,
        settings.learning,
        objective=objective,
        generator=generator,
        advanced=advanced,
        stopped=stopped,
    )
    return prior, history


def guarantee(
    model: nn.Module,
    prior: Prior,
    fixed: Units | None,
    x: Tensor,
    y: Tensor,
    split: Split,
    seen: Seen,
    settings: Bounding,
    generator: torch.Generator,
    held_out: tuple[Tensor, Tensor] | None = None,
    advanced: Callable[[int], None] = lambda draws: None,
) -> Guarantee:
    """Certify the law that a masked model has now, that of its prior, and the prior's fixed mask.

    Args:
        model: masked, in evaluation, with the posterior's law; left as it was.
        prior: what `learn_posterior` returned.
        fixed: the prior's thresholded units, on the prior's weights; None where no data made the prior.
        x: all inputs that the indices of `split` count.
        y: their classes.
        split: prior and bound set.
        seen: examples that made the prior, its network included.
        settings: bound, δ and draws.
        generator: of the hypotheses drawn afresh.
        held_out: inputs and classes that nothing was learnt from, for an estimate beside the bounds.
        advanced: told the draws done.

    Raises: InputError as `certify`.
    Holds: each certificate with its own confidence.
    """
    inputs, labels = x[split.bound], y[split.bound]
    posterior, masks = law_of(model), masks_of(model)
    before = {name: (mask.mode, mask.kept, mask.generator) for name, mask in masks.items()}
    distance = float(divergence(model, prior).detach())
    risk = drawn_errors(model, inputs, labels, settings.draws, generator, advanced)

    def certified(bound: str, found: SampledRisk, kl: float) -> Certificate:
        return certify(
            split,
            seen,
            found,
            kl,
            bound=bound,
            sampling=settings.sampling,
            delta=settings.delta,
            delta_sampling=settings.delta_sampling,
            union=settings.union,
        )

    own = {name: certified(name, risk, distance) for name in BOUNDS}
    estimate = None
    if held_out is not None:
        draws = min(settings.draws, 200)
        estimate = drawn_errors(model, *held_out, draws, generator).mean
    set_law(model, prior)
    try:
        of_prior = certified(
            settings.bound, drawn_errors(model, inputs, labels, settings.draws, generator, advanced), 0.0
        )
        test = None
        if fixed is not None:
            keep(model, fixed)
            with torch.no_grad():
                errors = error_reader(labels)(model(inputs)[None])[0]
            test = certify_fixed(
                split, seen, errors, delta=settings.delta, bound="binomial", union=settings.union
            )
    finally:
        set_law(model, posterior)
        for name, mask in masks.items():
            mask.mode, mask.kept, mask.generator = before[name]
    return Guarantee(
        posterior=own[settings.bound],
        prior=of_prior,
        fixed=test,
        bounds={name: each.value for name, each in own.items()},
        held_out=estimate,
    )


def drawn_errors(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    draws: int,
    generator: torch.Generator,
    advanced: Callable[[int], None] = lambda draws: None,
) -> SampledRisk:
    """Return the 0-1 errors of masks drawn afresh, each on all examples; processes share the draws.

    Raises: InputError as `draw_outputs`.
    """
    agree_(model, generator)
    read = error_reader(y)
    return sampled_errors(
        lambda count, stream: draw_outputs(model, x, count, stream, read=read),
        draws,
        generator,
        progress=advanced,
        passing=lambda count, stream: skip_draws(model, x, count, stream),
    )


def agree_(model: nn.Module, generator: torch.Generator) -> None:
    """Give all processes the weights, masks and random stream of the main one, bit by bit."""
    if ranks() > 1:
        found = on_main(lambda: {**model.state_dict(), STREAM: generator.get_state()})
        generator.set_state(found.pop(STREAM))
        model.load_state_dict(found)


def _check_movable(model: nn.Module, learning: Learning) -> None:
    if any(module.training for module in model.modules()):
        raise InputError("a posterior is learnt by a model in evaluation; call model.eval() first")
    if learning.learn == "masks":
        return
    for name, mask in masks_of(model).items():
        if mask.log_std is None:
            raise InputError(
                f"the posterior moves weights, which those of {name!r} may not, as they are not Gaussian; "
                "learn the masks alone, or add masks with weights='gaussian'"
            )
