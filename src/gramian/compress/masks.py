"""Stochastic pruning masks on the weights of linear and convolutional layers of any module.

A layer's weight w becomes m ∘ w with random m. Nothing is drawn inside a forward pass: `draw` draws one mask
for the whole model, and every pass until the next draw sees that one hypothesis.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gramian.compress.layers import check_layer, chosen, transposed
from gramian.compress.moments import add_noise, can_match
from gramian.compress.structures import Patterns, Sampler, Size, Weights
from gramian.errors import InputError

Mode = Literal[
    "sample", "straight_through", "relaxed", "hard_concrete", "mean", "moments", "threshold", "kept"
]
WeightKind = Literal["frozen", "trainable", "gaussian"]
Units = dict[str, Tensor]
"""A tensor of the shape of the mask variables for every masked layer, by the layer's name."""

STRETCH = (-0.1, 1.1)
"""γ and ζ of the hard concrete distribution."""
CONCRETE_TEMPERATURE = 2 / 3
"""b of the hard concrete distribution."""


class StochasticMask(nn.Module):
    """A random mask on one weight.

        m ∘ w,   m_j ~ Bernoulli(λ_j),   λ = σ(s);   with Gaussian weights w_j ~ N(μ_j, σ_j²)

    | mode | what the weight is |
    |---|---|
    | sample | m ∘ w of the mask that was drawn; the logits get no gradient |
    | straight_through | the same, with ∂m/∂λ = 1 in the backward pass |
    | relaxed | z ∘ w, z a relaxed mask at `temperature` |
    | hard_concrete | z ∘ w, z clipped at 0 and 1 after stretching |
    | mean | λ ∘ w |
    | moments | λ ∘ w, and the layer adds the noise of its pre-activations |
    | threshold | 1[λ > ½] ∘ w |
    | kept | the units of the buffer `kept`, ∘ w |

    Shapes: weight -> weight; logits as the structure says.
    Raises: InputError when a mode needs a draw and nothing was drawn.
    Holds: exactly.
    Source: Hayou, He, Dziugaite 2021, arXiv 2110.11804 (abstract); Louizos, Welling, Kingma 2018,
    arXiv 1712.01312 (hard concrete).
    """

    noise: Tensor | None
    weight_noise: Tensor | None
    given: Tensor | None
    kept: Tensor

    def __init__(
        self,
        weight: Tensor,
        structure: Weights,
        probability: float,
        *,
        transposed: bool = False,
        std: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.structure, self.transposed = structure, transposed
        self.mode, self.temperature = "sample", CONCRETE_TEMPERATURE
        self.generator: torch.Generator | None = None
        self.was_trainable = weight.requires_grad
        size, device = self.size_of(weight), weight.device
        units = torch.full(structure.units(size), probability, dtype=dtype, device=device)
        self.logits = nn.Parameter(structure.start(units))
        self.log_std = None if std is None else nn.Parameter(torch.full_like(weight, std).log())
        self.register_buffer("kept", torch.ones(units.shape, dtype=torch.bool, device=device))
        for name in ("noise", "weight_noise", "given"):
            self.register_buffer(name, None, persistent=False)

    @property
    def probabilities(self) -> Float[Tensor, "..."]:
        """λ of every unit."""
        return self.structure.probabilities(self.logits)

    def size_of(self, weight: Tensor) -> Size:
        """Return the weight's size with the output features first."""
        size = tuple(weight.shape)
        return (size[1], size[0], *size[2:]) if self.transposed else size

    def spread(self, units: Shaped[Tensor, "..."], weight: Tensor) -> Shaped[Tensor, "..."]:
        """Return units, batched or not, in a shape that broadcasts to the weight's; numbers in its dtype."""
        mask = self.structure.spread(units, self.size_of(weight))
        mask = mask if mask.dtype == torch.bool else mask.to(weight.dtype)
        return mask.transpose(-weight.ndim, 1 - weight.ndim) if self.transposed else mask

    def gather(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Sum values of the weight's shape over the weights of each unit."""
        size = self.size_of(values)
        return self.structure.gather(values.transpose(0, 1) if self.transposed else values, size)

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the weight that the mode makes of w; `given` goes before everything."""
        if self.given is not None:
            return self.given
        values = weight
        if self.log_std is not None and self.mode in _DRAWN:
            values = weight + self.log_std.exp() * _drawn(self.weight_noise)
        return values * self.spread(self.current(), weight).to(weight.dtype)

    def current(self) -> Shaped[Tensor, "..."]:
        """Return the units of the mode as it is now."""
        match self.mode:
            case "mean" | "moments":
                return self.probabilities
            case "threshold":
                return self.structure.best(self.logits)
            case "kept":
                return self.kept
            case "relaxed":
                return self.structure.soft(self.logits, _drawn(self.noise), self.temperature)
            case "hard_concrete":
                return hard_concrete(self.logits, _drawn(self.noise))
            case "straight_through":
                return self.structure.straight_through(self.logits, _drawn(self.noise))
        return self.structure.hard(self.logits.detach(), _drawn(self.noise))

    def draw(self, generator: torch.Generator | None) -> None:
        """Draw the noise of one mask, and of Gaussian weights."""
        self.noise = torch.rand(self.logits.shape, generator=generator, device=self.logits.device)
        if self.log_std is not None:
            self.weight_noise = self.log_std.new_empty(self.log_std.shape).normal_(generator=generator)

    def draws(
        self, weight: Tensor, count: int, generator: torch.Generator | None, sampler: Sampler | None = None
    ) -> Float[Tensor, "..."]:
        """Return `count` independent draws of the weight, (count, …); a `sampler` saves making it anew."""
        sampler = sampler or self.structure.sampler(self.logits)
        mask = self.spread(sampler(count, generator), weight).to(weight.dtype)
        if self.log_std is None:
            return weight * mask
        normal = weight.new_empty(count, *weight.shape).normal_(generator=generator)
        return (weight + self.log_std.exp() * normal) * mask

    def skip(self, weight: Tensor, count: int, generator: torch.Generator | None, sampler: Sampler) -> None:
        """Take the random numbers of as many `draws`."""
        sampler(count, generator)
        if self.log_std is not None:
            weight.new_empty(count, *weight.shape).normal_(generator=generator)


def hard_concrete(logits: Float[Tensor, "..."], noise: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the units of the hard concrete distribution, which are 0 and 1 with positive probability.

    z = clip(σ((s − ln u + ln(1 − u)) / b) (ζ − γ) + γ, 0, 1),   P(z ≠ 0) = σ(s − b ln(−γ/ζ))

    Holds: exactly. It is no Bernoulli mask: its P(z ≠ 0) does not enter a Bernoulli KL.
    Source: Louizos, Welling, Kingma 2018, arXiv 1712.01312, with b = 2/3, γ = −0.1, ζ = 1.1.
    """
    low, high = STRETCH
    return (Weights().soft(logits, noise, CONCRETE_TEMPERATURE) * (high - low) + low).clamp(0, 1)


def add_masks(
    model: nn.Module,
    *,
    layers: str | Sequence[str] = "*",
    exclude: Sequence[str] = (),
    structure: Weights | None = None,
    weights: WeightKind = "frozen",
    probability: float = 0.9,
    std: float = 0.01,
    dtype: torch.dtype = torch.float32,
) -> dict[str, StochasticMask]:
    """Put masks on the weights of linear and convolutional layers, and return them by layer.

    `layers` and `exclude` are shell patterns of full module names. Biases, norms, embeddings and weights that
    several modules share stay as they are. Every λ starts at `probability`, standard deviations of Gaussian
    weights at `std`. The mode is "kept" with everything kept: the model computes what it did.

    Raises: InputError when nothing is left to prune, a pattern matches no layer, a layer is parametrised
        already or its features do not suit the structure, and for a setting out of range.
    Holds: exactly.
    """
    structure = structure or Weights()
    _check(weights, probability, std, dtype)
    found = chosen(model, [layers] if isinstance(layers, str) else layers, exclude)
    for name, layer in found.items():
        check_layer(name, layer, structure)
    masks = {}
    for name, layer in found.items():
        masks[name] = mask = StochasticMask(
            layer.weight,
            structure,
            probability,
            transposed=transposed(layer),
            std=std if weights == "gaussian" else None,
            dtype=dtype,
        )
        mask.mode = "kept"
        parametrize.register_parametrization(layer, "weight", mask)
        layer.train(layer.training)  # the mask too
        if weights == "frozen":
            original_of(layer).requires_grad_(False)
        layer.register_forward_hook(add_noise, with_kwargs=True)
    return masks


def remove_masks(model: nn.Module, *, apply: bool = False) -> None:
    """Take the masks off: the layers, their weights and the order of their parameters are as before.

    With `apply` the weights become what the mode makes of them now, zeros included.

    Raises: InputError when the model has no masks.
    Holds: exactly.
    """
    for layer, mask in _layers(model).values():
        value = layer.weight.detach() + 0.0 if apply else None  # no −0
        others = [name for name in layer._parameters if name != "weight"]
        _own_class(layer)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        for name in others:  # the weight was put last; torch's layers have it first
            layer._parameters[name] = layer._parameters.pop(name)
        for handle in [key for key, hook in layer._forward_hooks.items() if hook is add_noise]:
            del layer._forward_hooks[handle]
            layer._forward_hooks_with_kwargs.pop(handle, None)
        layer.weight.requires_grad_(mask.was_trainable)
        if value is not None:
            layer.weight.data.copy_(value)


def masks_of(model: nn.Module) -> dict[str, StochasticMask]:
    """Return the masks of a model by the names of their layers.

    Raises: InputError when the model has no masks.
    """
    return {name: mask for name, (_, mask) in _layers(model).items()}


def originals_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the unmasked weights of the masked layers by the names of the layers.

    Raises: InputError when the model has no masks.
    """
    return {name: original_of(layer) for name, (layer, _) in _layers(model).items()}


def original_of(layer: nn.Module) -> nn.Parameter:
    """Return the unmasked weight of a masked layer."""
    parametrizations: Any = layer.parametrizations
    return parametrizations.weight.original


def key_of(layer: str, part: str) -> str:
    """Return the key of a mask's parameter or buffer in a state dict or a functional call."""
    return f"{layer}.parametrizations.weight.{part}".lstrip(".")


def set_mode(
    model: nn.Module,
    mode: Mode,
    *,
    temperature: float | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Set what all masks of a model do; the generator is that of "moments".

    Raises: InputError for an unknown mode, a temperature that is not positive, and where moments or a
        hard concrete mask do not exist for a layer or a structure.
    """
    if mode not in get_args(Mode):
        raise InputError(f"unknown mode {mode!r}; choose one of {', '.join(get_args(Mode))}")
    if temperature is not None and not temperature > 0:
        raise InputError(f"a temperature must be positive, got {temperature}")
    layers = _layers(model)
    for name, (layer, mask) in layers.items():
        if mode == "moments" and not can_match(layer, mask.structure):
            raise InputError(
                f"moments are matched for linear and convolutional layers with masks on single weights or "
                f"rows, which {name!r} is not; use another mode"
            )
        if mode == "hard_concrete" and isinstance(mask.structure, Patterns):
            raise InputError(f"the patterns of {name!r} have no hard concrete mask; use another mode")
    for _, mask in layers.values():
        mask.mode = mode
        mask.temperature = mask.temperature if temperature is None else temperature
        mask.generator = generator


def draw(model: nn.Module, generator: torch.Generator | None) -> None:
    """Draw one mask for the whole model, which all passes see until the next draw.

    Raises: InputError when the model has no masks.
    """
    for mask in masks_of(model).values():
        mask.draw(generator)


def keep(model: nn.Module, kept: dict[str, Bool[Tensor, "..."]]) -> None:
    """Fix the masks to the units given, and set the mode that uses them.

    Raises: InputError when a layer is missing or its units have another shape.
    """
    for name, mask in masks_of(model).items():
        if name not in kept or kept[name].shape != mask.kept.shape:
            raise InputError(f"the units kept of {name!r} must have the shape {tuple(mask.kept.shape)}")
        mask.kept = kept[name].to(mask.kept.device).bool()
    set_mode(model, "kept")


@contextmanager
def masked(model: nn.Module, **options: Any) -> Iterator[dict[str, StochasticMask]]:
    """Put masks on a model inside a `with` block and take them off afterwards, whatever happens."""
    masks = add_masks(model, **options)
    try:
        yield masks
    finally:
        remove_masks(model)


def export_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict of the model without masks, its weights as the mode makes them, zeros included.

    Raises: InputError when the model has no masks.
    Holds: exactly: loaded into the unmasked model it gives the same outputs.
    """
    state = {name: value for name, value in model.state_dict().items()}
    for name, (layer, _) in _layers(model).items():
        prefix = key_of(name, "")
        state = {key: value for key, value in state.items() if not key.startswith(prefix)}
        state[f"{name}.weight".lstrip(".")] = layer.weight.detach() + 0.0  # no −0
    return state


_DRAWN = ("sample", "straight_through", "relaxed", "hard_concrete")


def _drawn(noise: Tensor | None) -> Tensor:
    if noise is None:
        raise InputError("no mask has been drawn; call draw(model, generator) before the forward pass")
    return noise


def _own_class(layer: nn.Module) -> None:
    """Give a layer a class of its own: a deep copy shares it, and torch takes `weight` out of the class."""
    shared: Any = type(layer)
    layer.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))


def _layers(model: nn.Module) -> dict[str, tuple[Any, StochasticMask]]:
    found: dict[str, tuple[Any, StochasticMask]] = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            held: Any = module.parametrizations
            if isinstance(held.weight[0], StochasticMask):
                found[name] = (module, held.weight[0])
    if not found:
        raise InputError("the model has no masks; call add_masks first")
    return found


def _check(weights: str, probability: float, std: float, dtype: torch.dtype) -> None:
    if weights not in get_args(WeightKind):
        raise InputError(f"unknown weights {weights!r}; choose one of {', '.join(get_args(WeightKind))}")
    if not 0 < probability < 1:
        raise InputError(f"the probability must be more than 0 and less than 1, got {probability}")
    if not std > 0:
        raise InputError(f"the standard deviation must be positive, got {std}")
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"logits must be float32 or float64, got {dtype}")
