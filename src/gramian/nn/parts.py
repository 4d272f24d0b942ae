"""What a block is told and composed of: its surroundings, the MLP, and the pre-norm arrangement."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.activations import ACTIVATIONS, Activation
from gramian.nn.attention import Attention
from gramian.nn.mixing import SoftmaxMixing
from gramian.nn.norms import NORMS, Norm
from gramian.nn.residual import Chain, Residual


@dataclass(frozen=True)
class Parts:
    """What a block is told about its surroundings and composed of.

    `layer` counts from 0 to `depth` − 1; `mlp_width` is the hidden width of the MLP; `key_heads` heads of
    keys and values are shared by groups of query heads; `mlp_gain` is the β_FF of the simplified blocks at
    18 layers; `context` is the length of a training sequence; `decay` is the γ_L of E-SPA; `branch_gain`
    and `attention_temperature` are the γ and τ₀ of the shaped transformer; `rotary` makes what rotates
    queries and keys of heads of a given width by their position, if anything does.
    """

    width: int
    heads: int
    depth: int
    layer: int
    mlp_width: int
    causal: bool = True
    norm: Norm = NORMS["rmsnorm"]
    activation: Activation = ACTIVATIONS["relu"]
    gated: bool = False
    key_heads: int | None = None
    mlp_gain: float = 0.1
    context: int = 512
    rotary: Callable[[int], nn.Module] | None = None
    decay: float = 0.005
    branch_gain: float = 0.1
    attention_temperature: float = 1.0


Block = Callable[[Parts], nn.Module]


class MLP(nn.Module):
    """Two linear maps around an elementwise non-linearity, without biases.

        MLP(x) = φ(x W_up) W_down

    When gated, half of the hidden features gate the other half, MLP(x) = (φ(g) ⊙ u) W_down with
    (g, u) = x W_up, and W_down is half as large.

    Shapes: (…, width) -> (…, width).
    Raises: InputError unless both widths are positive, and the hidden one even when gated.
    Holds: exactly.
    Source: Shazeer 2020, arXiv 2002.05202 (gated).
    """

    def __init__(self, width: int, hidden: int, activation: Activation, gated: bool = False) -> None:
        super().__init__()
        if width < 1 or hidden < 1:
            raise InputError(f"an MLP needs positive widths, got {width} and {hidden}")
        if gated and hidden % 2:
            raise InputError(f"a gated MLP needs an even hidden width, got {hidden}")
        self.gated = gated
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden // 2 if gated else hidden, width, bias=False)
        self.activation = activation()

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Apply both maps."""
        hidden = self.up(x)
        if not self.gated:
            return self.down(self.activation(hidden))
        gate, value = hidden.chunk(2, -1)
        return self.down(self.activation(gate) * value)


def mlp_of(parts: Parts) -> MLP:
    """Return the MLP of a block."""
    return MLP(parts.width, parts.mlp_width, parts.activation, parts.gated)


def attention_of(parts: Parts, mixing: SoftmaxMixing, **maps: Any) -> Attention:
    """Return the attention of a block; `maps` are further parts of it."""
    rotary = None if parts.rotary is None else parts.rotary(parts.width // parts.heads)
    return Attention(parts.width, parts.heads, mixing, key_heads=parts.key_heads, rotary=rotary, **maps)


def pre_normed(parts: Parts, attention: Attention) -> nn.Module:
    """Return the pre-norm block around an attention: X' = X + MHA(N₁X), out = X' + MLP(N₂X')."""
    return Chain(
        Residual(Chain(parts.norm(parts.width), attention)),
        Residual(Chain(parts.norm(parts.width), mlp_of(parts))),
    )
