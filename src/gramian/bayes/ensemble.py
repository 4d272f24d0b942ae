"""Deep ensembles of any torch module whose members are draws from a posterior, trained all at once."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from gramian.bayes.classification import Classifier, calibrated, centred_one_hot, split
from gramian.bayes.fitting import ADAM, LIKELIHOODS, Optimiser
from gramian.bayes.job import prepared, solved, trained
from gramian.bayes.lots import ensemble_in_lots
from gramian.bayes.members import RECIPES, EnsembleConfig, Make, noisy, seed_of, source_of
from gramian.bayes.stack import Stack, joined
from gramian.bayes.trained import Ensemble
from gramian.core.jacobian import function
from gramian.errors import InputError

METHODS = tuple(RECIPES)
"""What members may be."""


def fit_ensemble(
    make: Make,
    x: Shaped[Tensor, " n *size"],
    y: Float[Tensor, " n *outputs"],
    config: EnsembleConfig,
    progress: Callable[[int], None] = lambda step: None,
    *,
    share: tuple[int, int] = (0, 1),
    together: int | None = None,
    optimiser: Optimiser = ADAM,
    auxiliary: nn.Module | None = None,
) -> Ensemble:
    """Train networks so that each is a draw from a posterior over functions.

        min_θ 1/(2N) Σ_n |f(x_n, θ) + δ(x_n) − ỹ_n|² + σ²/(2N) ‖θ − a‖²_Λ,  ‖v‖²_Λ = Σ_j v_j²/Λ_j
        δ: 0, but f(x, θ̃) for rp_fn, J(x)·(θ̃ without the last layer) for ntkgp_param,
           J(x)·(√2 θ̃ without the last layer, θ̃ of it) for ntkgp_fn;  J = ∂f(x, θ_0)/∂θ
        a: θ_0; 0 for rp_fn and ntkgp_fn; a deep ensemble has no second term
        ntkgp_lin: f(x, θ) = J(x; θ_aux) θ
        ỹ_n = y_n + ε_n, drawn once for each member;  θ starts at θ_0;  θ_0, θ̃, θ_aux independent

    `make` draws a network by torch's global generator, which is seeded for every draw and restored. It may
    return any module of any parametrisation whose rows are independent; members have its parameters and
    buffers each of their own, and dropout is off. Λ are the variances at initialisation, which is taken to
    have mean 0: `config.prior`, or the variance over draws of `make`, pooled over the entries of a tensor. A
    parameter that does not vary there, such as the gain of a norm or a bias that starts at 0, has no prior
    and stays as it is, except in a deep ensemble. Networks and data are in the precision and on the device
    of x.

    solver "exact" replaces every network by its linearisation at θ_0 and solves for the minimum through the
    kernel of its Jacobian: it is not trained, and costs (N O)³ or, for more than 10 000 rows times outputs,
    conjugate gradients. `auxiliary` is a network to take θ_aux of all members of ntkgp_lin from, such as a
    trained one. `share` (rank, world) trains every world-th member from `rank` on, with the numbers that one
    process would give them: `join` puts the parts together. With `together`, so many members at most are one
    stack, and the processes of `gramian.ranks` share the stacks.

    Shapes: x (n, …), y (n) or (n, O).
    Raises: InputError for data that are not finite or do not fit, settings out of range, and a network
        without a linear last layer where δ needs one; DivergedError when a loss is not finite.
    Holds: ntkgp_lin draws from the posterior of its kernel, exactly; ntkgp_param and the exact variants from
        that of the NTK as width → ∞, error O(width^-1/2); rp and deep_ensemble from narrower laws.
    Source: He, Lakshminarayanan, Teh 2020, arXiv 2007.05864; rp: Osband, Aslanides, Cassirer 2018, arXiv
        1806.03335; deep_ensemble: Lakshminarayanan, Pritzel, Blundell 2017, arXiv 1612.01474.
    """
    if together is not None:
        more = {"optimiser": optimiser, "auxiliary": auxiliary}
        return _in_lots(
            lambda lot: fit_ensemble(make, x, y, config, progress, share=lot, **more), config, share, together
        )
    job = prepared(make, x, y, config, "squared_error", share, auxiliary)
    variance = job.y.new_tensor(config.noise_variance if job.noisy else 0.0)
    targets = noisy(job.y, variance, config.seed, job.numbers)
    if job.solver == "exact":
        return solved(job, targets, progress)
    return trained(job, targets, progress, optimiser)


def fit_heteroscedastic(
    make: Make,
    x: Shaped[Tensor, " n *size"],
    y: Float[Tensor, " n *outputs"],
    config: EnsembleConfig,
    progress: Callable[[int], None] = lambda step: None,
    *,
    share: tuple[int, int] = (0, 1),
    together: int | None = None,
    optimiser: Optimiser = ADAM,
) -> Ensemble:
    """Train members that give the noise variance of every row beside its mean.

        min_θ 1/N Σ_n ½ [ln σ²(x_n) + (μ(x_n) + δ(x_n) − ỹ_n)²/σ²(x_n)] + 1/(2N) ‖θ − a‖²_Λ

    `make` returns networks of twice as many outputs as targets: the means, then what a softplus makes the
    variances, so targets of about unit variance suit it. δ acts on the means alone. The targets' noise is
    drawn with the mean variance that a first ensemble, of at most five members and without noise, finds; the
    variances are then fitted to the targets without it.
    `config.noise_variance` is not used.

    Shapes: x (n, …), y (n) or (n, O).
    Raises: InputError and DivergedError as `fit_ensemble`, and InputError for ntkgp_lin or the exact solver.
    Holds: empirically; the members are a uniform mixture of Gaussians.
    Source: Lakshminarayanan, Pritzel, Blundell 2017, arXiv 1612.01474, with the δ of He, Lakshminarayanan,
        Teh 2020, arXiv 2007.05864.
    """
    if together is not None:
        return _in_lots(
            lambda lot: fit_heteroscedastic(make, x, y, config, progress, share=lot, optimiser=optimiser),
            config, share, together,
        )  # fmt: skip
    job = prepared(make, x, y, config, "heteroscedastic", share, None)
    if job.solver == "exact" or job.recipe.linear:
        raise InputError(
            "members that give their noise are not linear; take solver gradient and no ntkgp_lin"
        )
    variance = torch.zeros_like(job.y)
    if job.noisy:
        first = dataclasses.replace(
            config, noisy_targets=False, members=min(config.members, 5), seed=seed_of(config.seed, "first")
        )
        pilot = fit_heteroscedastic(make, x, y, first, optimiser=optimiser)
        known = LIKELIHOODS["heteroscedastic"].variance(pilot.functions(x))
        assert known is not None
        variance = known.mean(0)
    return trained(job, noisy(job.y, variance, config.seed, job.numbers), progress, optimiser)


def fit_classifier(
    make: Make,
    x: Shaped[Tensor, " n *size"],
    labels: Int[Tensor, " n"],
    config: EnsembleConfig,
    progress: Callable[[int], None] = lambda step: None,
    *,
    held_out: tuple[Tensor, Tensor] | float = 0.1,
    together: int | None = None,
    optimiser: Optimiser = ADAM,
) -> Classifier:
    """Train members by regression on classes, and turn them into probabilities by one temperature.

        y_nk = [label_n = k] − 1/K,   p(k | x) = mean_m softmax_k(f̃_m(x)/T)

    T minimises the cross-entropy of p on data that no member saw and on one more row of random label
    (`calibrated`). The data are `held_out` (inputs, labels), or that share of the rows, drawn by the seed and
    left out of training. `make` returns networks of K outputs, which sets the number of classes.

    Shapes: x (n, …), labels (n) from 0 to K − 1.
    Raises: InputError and DivergedError as `fit_ensemble`, and InputError for labels that are no integers
        from 0 to K − 1, one row or none held out.
    Holds: empirically.
    Source: He, Lakshminarayanan, Teh 2020, arXiv 2007.05864; temperature: Guo et al. 2017, arXiv 1706.04599.
    """
    (x, labels), (other, known) = split(x, labels, held_out, config.seed)
    source = source_of(make, x, config.seed)
    classes = Stack(function(source.module("start", 0))).check(x)
    targets = centred_one_hot(labels, classes).to(source.dtype or torch.get_default_dtype())
    ensemble = fit_ensemble(make, x, targets, config, progress, together=together, optimiser=optimiser)
    return calibrated(ensemble, other, known)


def _in_lots(
    fit: Callable[[tuple[int, int]], Ensemble], config: EnsembleConfig, share: tuple[int, int], together: int
) -> Ensemble:
    if share != (0, 1):
        raise InputError(f"an ensemble is trained in lots or by shares, not both; got the share {share}")
    return join(ensemble_in_lots(fit, config.members, together))


def join(parts: Sequence[Ensemble]) -> Ensemble:
    """Put the parts of an ensemble, trained by `share`, together.

    Raises: InputError unless the parts are of one configuration and hold every member once.
    Holds: exactly.
    """
    numbers = [number for part in parts for number in part.numbers]
    if not parts or sorted(numbers) != list(range(parts[0].config.members)):
        raise InputError(f"the parts must hold every member once, but hold {sorted(numbers)}")
    first = parts[0]
    if any(part.config != first.config or part.likelihood != first.likelihood for part in parts):
        raise InputError("the parts are of different configurations")
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    return dataclasses.replace(
        first,
        trained=joined([part.trained for part in parts]).members(order),
        offset=joined([part.offset for part in parts]).members(order),
        numbers=tuple(sorted(numbers)),
        losses=torch.cat([part.losses for part in parts])[order],
    )
