"""Optimisers by name, with the right parameter groups: who is preconditioned, who is decayed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gramian.errors import InputError, MissingExtraError

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What an optimiser is told."""

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float] | None = None
    """Decay rates of the two moments (of Muon and SGD: the first, of the momentum); None takes `BETAS`."""
    eps: float = 1e-8
    """The term added to the root of the second moment."""
    vector_learning_rate: float | None = None
    """Learning rate of what AdamW trains beside SOAP, Shampoo or Muon; the same when not given."""

    @property
    def beside(self) -> "Settings":
        """What AdamW is told beside another optimiser."""
        rate = self.learning_rate if self.vector_learning_rate is None else self.vector_learning_rate
        return Settings(rate, self.weight_decay, None, self.eps)


BETAS = {
    "adamw": (0.9, 0.99),
    "adafactor": (0.9, 0.999),
    "soap": (0.95, 0.95),
    "shampoo": (0.9, 0.95),
    "muon": (0.95, 0.99),
    "sgd": (0.9, 0.0),
}
"""Decay rates that each optimiser takes when none are given; AdamW beside another takes its own."""


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
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


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable matrices that map features to features: what is worth preconditioning.

    Left out are embeddings, and heads, which are the linear layers of an embedding's shape (tied or not): a
    side of theirs counts tokens.
    """
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    known, shapes = {id(table) for table in tables}, {table.shape for table in tables}
    return [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad
        and parameter.ndim == 2
        and id(parameter) not in known
        and parameter.shape not in shapes
    ]


class Side(torch.optim.Optimizer):
    """Several optimisers side by side, each with parameters of its own, as one.

    The groups are those of the optimisers, so that a schedule reaches them; the states stay theirs.
    """

    def __init__(self, optimisers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimisers = list(optimisers)
        groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        super().__init__([{**group} for group in groups], {})
        self.param_groups = groups

    def step(self, closure: Any = None) -> Any:
        """Let every optimiser take its step."""
        loss = None if closure is None else closure()
        for optimiser in self.optimisers:
            optimiser.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all."""
        return {"optimisers": [optimiser.state_dict() for optimiser in self.optimisers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states of all."""
        for optimiser, state in zip(self.optimisers, state_dict["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.param_groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]


def parts(optimiser: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimisers that one consists of, itself when it is a single one."""
    return optimiser.optimisers if isinstance(optimiser, Side) else [optimiser]


def check(name: str, settings: Settings) -> None:
    """Check an optimiser's name and settings before anything is built.

    Raises: InputError for an unknown name, a learning rate or ε that is not positive, β outside [0, 1) or a
        negative decay; MissingExtraError when the package that has the optimiser is not installed.
    """
    if name not in OPTIMISERS:
        raise InputError(f"unknown optimiser {name!r}; choose one of {', '.join(OPTIMISERS)}")
    for rate in (settings.learning_rate, settings.beside.learning_rate):
        if not rate > 0:
            raise InputError(f"the learning rate must be positive, got {rate:g}")
    betas = settings.betas or BETAS[name]
    if not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"both betas lie in [0, 1), got {betas[0]:g} and {betas[1]:g}")
    if not settings.eps > 0:
        raise InputError(f"the eps of an optimiser must be positive, got {settings.eps:g}")
    if not settings.weight_decay >= 0:
        raise InputError(f"weight decay cannot be negative, got {settings.weight_decay:g}")
    if name in ("soap", "shampoo", "adafactor"):
        _package(name)
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise InputError(f"muon needs torch 2.9 or newer, this is {torch.__version__}")


def build_optimiser(
    name: str,
    model: nn.Module,
    settings: Settings,
    groups_of: Callable[[nn.Module, float], Groups] = parameter_groups,
) -> torch.optim.Optimizer:
    """Return the optimiser of a name over a model's trainable parameters.

    adamw, adafactor and sgd train everything. soap, shampoo and muon train the `hidden_matrices`, and AdamW
    the rest: embeddings, heads, gains, biases and norms. Only matrices and embeddings are decayed, unless
    other `groups_of` (model, weight decay) are given. A group's learning rate at a step is its `initial_lr`
    times the schedule.

    Raises: InputError and MissingExtraError as `check`, and when there is nothing to train.
    Source: AdamW: Loshchilov & Hutter 2019, arXiv 1711.05101. Adafactor: Shazeer & Stern 2018, arXiv
        1804.04235, here with a given learning rate and momentum. SOAP: Vyas et al. 2024, arXiv 2409.11321.
        Shampoo: Gupta et al. 2018, arXiv 1802.09568, with steps of AdamW's size. Muon: Jordan et al. 2024,
        with steps of AdamW's size (Liu et al. 2025, arXiv 2502.16982). SGD: Polyak's momentum, with weight
        decay as a term of the gradient.
    """
    check(name, settings)
    groups = groups_of(model, settings.weight_decay)
    if name in BESIDE:
        hidden = hidden_matrices(model)
        if not hidden:
            raise InputError(f"{name} trains matrices between features, and the model has none; take adamw")
        known = {id(parameter) for parameter in hidden}
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in known]
        rest = [group for group in groups if group["params"]]
        main = OPTIMISERS[name]([{"params": hidden, "weight_decay": settings.weight_decay}], settings)
        optimiser = Side([main, _adamw(rest, settings.beside)] if rest else [main])
    else:
        optimiser = OPTIMISERS[name]([group for group in groups if group["params"]], settings)
    for group in optimiser.param_groups:
        group["initial_lr"] = group["lr"]
    return optimiser


def adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Return AdamW over `parameter_groups`: `build_optimiser` for the usual case.

    Raises: InputError as `build_optimiser`.
    """
    return build_optimiser("adamw", model, Settings(learning_rate, weight_decay, betas, eps))


def _adamw(groups: Groups, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, in its fused form."""
    betas = settings.betas or BETAS["adamw"]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.eps, fused=True)


def _adafactor(groups: Groups, settings: Settings) -> torch.optim.Optimizer:
    """Adafactor: AdamW whose second moment of a matrix is an outer product of two vectors."""
    return _package("adafactor").AdaFactor(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas or BETAS["adafactor"],
        scale_parameter=False,
        relative_step=False,
        momentum_dtype=torch.float32,
    )


def _soap(groups: Groups, settings: Settings) -> torch.optim.Optimizer:
    """SOAP: Adam in the eigenbasis of Shampoo's preconditioner; it learns the basis in its first step."""
    betas = settings.betas or BETAS["soap"]
    return _package("soap").SOAP(groups, lr=settings.learning_rate, betas=betas, eps=settings.eps)


def _shampoo(groups: Groups, settings: Settings) -> torch.optim.Optimizer:
    """Shampoo: M ↦ L^(−1/4) M R^(−1/4), as large as the step that AdamW would take (grafting)."""
    return _package("shampoo").DASH(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas or BETAS["shampoo"],
        inverse_root_method="eigh",
        eps=settings.eps,
    )


def _muon(groups: Groups, settings: Settings) -> torch.optim.Optimizer:
    """Muon: the momentum of a matrix, orthogonalised, as large as an update of AdamW's."""
    return torch.optim.Muon(
        groups,
        lr=settings.learning_rate,
        momentum=(settings.betas or BETAS["muon"])[0],
        adjust_lr_fn="match_rms_adamw",
    )


def _sgd(groups: Groups, settings: Settings) -> torch.optim.Optimizer:
    """Gradient descent with momentum: v ↦ βv + (g + decay · w), w ↦ w − rate · v."""
    momentum = (settings.betas or BETAS["sgd"])[0]
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=momentum, fused=True)


OPTIMISERS: dict[str, Callable[[Groups, Settings], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "soap": _soap,
    "shampoo": _shampoo,
    "muon": _muon,
    "sgd": _sgd,
}
BESIDE = ("soap", "shampoo", "muon")
"""The optimisers of hidden matrices alone, beside which AdamW trains the rest."""


def _package(name: str) -> Any:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise MissingExtraError(
            f'the optimiser {name} needs pytorch_optimizer: pip install "gramian[optimisers]"'
        ) from error
    return pytorch_optimizer
