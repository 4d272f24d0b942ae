"""Ensembles by their definition, one plain module after the other."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gramian.bayes.members import EnsembleConfig, Source, seed_of, source_of
from gramian.core.jacobian import function, jacobian
from gramian.nn.mlp import mlp, prior_variances
from ntk_modules import rows

X, Y = rows(12, 2), rows(12, 1, seed=1)
OTHER = 2 * rows(5, 2, seed=2)
LAST = "4."
SPREADS = {  # factors of θ̃ in the body, θ_0 in the body, θ̃ in the last layer, f(x, θ̃)
    ("deep_ensemble", False): (0, 0, 0, 0),
    ("rp_param", False): (0, 0, 0, 0),
    ("rp_fn", False): (0, 0, 0, 1),
    ("rp_fn", True): (0, 1, 0, 1),
    ("ntkgp_param", False): (1, 0, 0, 0),
    ("ntkgp_fn", False): (2**0.5, 0, 1, 0),
    ("ntkgp_fn", True): (1, 1, 1, 0),
}


def network(parametrisation: str = "standard", **options) -> nn.Sequential:
    settings = {"widths": (8, 6), "activation": "erf", "weight_std": 1.4, "bias_std": 0.3, **options}
    return mlp(2, 1, parametrisation=parametrisation, **settings)


PRIOR = prior_variances(network())


def drawn(config: EnsembleConfig, make: Callable[[], nn.Module], purpose: str, m: int) -> nn.Module:
    source: Source = source_of(make, X, config.seed)
    return source.module(purpose, m)


def product(module: nn.Module, x: Tensor, tangent: dict[str, Tensor]) -> Tensor:
    """J v through the whole Jacobian."""
    whole = jacobian(function(module), x)
    return sum(((whole[n] * v).flatten(2).sum(2) for n, v in tangent.items()), torch.zeros(len(x), 1).to(x))


def delta(config: EnsembleConfig, make: Callable[[], nn.Module], m: int, x: Tensor) -> Tensor:
    """δ of one member at x, from its two networks."""
    body, own, last, whole = SPREADS[config.method, config.exact]
    start, other = (drawn(config, make, purpose, m) for purpose in ("start", "other"))
    first = dict(start.named_parameters())
    tangent = {
        n: last * p if n.startswith(LAST) else body * p + own * first[n] for n, p in other.named_parameters()
    }
    with torch.no_grad():
        return whole * other(x) + product(start, x, tangent)


def own_targets(config: EnsembleConfig, m: int, y: Tensor = Y) -> Tensor:
    if not config.noisy_targets or config.method == "deep_ensemble":
        return y
    generator = torch.Generator().manual_seed(seed_of(config.seed, "noise", m))
    draw = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return y + config.noise_variance**0.5 * draw


def trained_alone(config: EnsembleConfig, make: Callable[[], nn.Module], m: int) -> tuple[nn.Module, Tensor]:
    """One member by plain PyTorch: its trained module, and what it predicts at OTHER."""
    module = drawn(config, make, "start", m)
    anchors = {n: p.detach().clone() for n, p in module.named_parameters()}
    if config.method.endswith("fn"):
        anchors = {n: torch.zeros_like(p) for n, p in anchors.items()}
    shift, targets = delta(config, make, m, X), own_targets(config, m)
    optimiser = torch.optim.Adam(module.parameters(), lr=config.learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    for _, batch in zip(range(config.steps), batches(config), strict=False):
        gap = module(X[batch]) + shift[batch] - targets[batch]
        loss = gap.square().sum() / (2 * len(gap))
        if config.method != "deep_ensemble":
            for n, p in module.named_parameters():
                loss = loss + config.noise_variance / (2 * len(X)) * ((p - anchors[n]) ** 2 / PRIOR[n]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        cosine.step()
    return module, module(OTHER).detach() + delta(config, make, m, OTHER)


def batches(config: EnsembleConfig) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed_of(config.seed, "batches"))
    while True:
        if config.batch is None:
            yield torch.arange(len(X))
        else:
            yield from torch.randperm(len(X), generator=generator).split(config.batch)
