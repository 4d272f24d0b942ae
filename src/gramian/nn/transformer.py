"""A decoder of blocks between token embeddings and a head."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.activations import activation
from gramian.nn.blocks import Parts, block
from gramian.nn.init import fan_in_std, initialise_
from gramian.nn.norms import norm


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How a transformer is built, whatever its text and block; the defaults train in minutes on a CPU."""

    width: int = 128
    """Features of the residual stream."""
    depth: int = 6
    """Blocks."""
    heads: int = 4
    """Attention heads; they divide the width."""
    context: int = 128
    """Tokens a sequence has at most."""
    mlp_width: int | None = None
    """Hidden features of the MLPs; four times the width when not given."""
    norm: str = "rmsnorm"
    """rmsnorm, layernorm or none."""
    activation: str = "relu"
    """relu, gelu, gelu_tanh, silu or tanh."""
    positions: str = "learned"
    """learned or sinusoidal."""
    tied: bool = True
    """Whether the head uses the token embedding's matrix, or one of its own."""
    final_norm: bool = True
    """Whether a norm stands before the head."""
    init_std: float | None = None
    """Standard deviation of initial weights; 0.02 · √(768/width) when not given."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Shape):
    """A decoder transformer: a shape, its vocabulary and its block.

    Raises: InputError for a size below 1, sizes that do not fit each other, and unknown names.
    """

    vocabulary: int
    """Tokens there are."""
    block: str = "pre_norm"
    """Name of the block in `gramian.nn.blocks.BLOCKS`."""

    def __post_init__(self) -> None:
        for lookup, name in ((block, self.block), (norm, self.norm), (activation, self.activation)):
            lookup(name)  # an unknown name raises
        for name in ("vocabulary", "context", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mlp_width is not None and self.mlp_width < 1:
            raise InputError(f"mlp_width must be at least 1, got {self.mlp_width}")
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.positions not in ("learned", "sinusoidal"):
            raise InputError(f"unknown positions {self.positions!r}; choose learned or sinusoidal")
        if self.positions == "sinusoidal" and self.width % 2:
            raise InputError(f"sinusoidal positions need an even width, got {self.width}")

    @property
    def std(self) -> float:
        """The standard deviation of initial weights."""
        return fan_in_std(self.width) if self.init_std is None else self.init_std

    def parts(self, layer: int) -> Parts:
        """Return what the block of one layer is composed of."""
        return Parts(
            width=self.width,
            heads=self.heads,
            depth=self.depth,
            layer=layer,
            mlp_width=self.mlp_width or 4 * self.width,
            norm=norm(self.norm),
            activation=activation(self.activation),
        )


def sinusoids(context: int, width: int) -> Float[Tensor, "context width"]:
    """Return the fixed position vectors of sines and cosines.

        p_{t, 2i} = sin(t ω_i),   p_{t, 2i+1} = cos(t ω_i),   ω_i = 10000^(−2i/width)

    Shapes: (context, width), width even; the RMS of each row is √½.
    Holds: exactly.
    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(context)[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)


class Positions(nn.Module):
    """Fixed sinusoidal positions at the RMS that token embeddings start with.

        P_t = √2 · rms · p_t,   p_t as in `sinusoids`

    Shapes: (tokens) -> (tokens, width).
    Holds: exactly.
    """

    def __init__(self, context: int, width: int, rms: float) -> None:
        super().__init__()
        self.register_buffer("weight", sinusoids(context, width) * (rms * math.sqrt(2)), persistent=False)

    def forward(self, index: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens width"]:
        """Return the vectors of the given positions."""
        return self.get_buffer("weight")[index]


class Transformer(nn.Module):
    """A causal language model: embeddings, blocks, a final norm and a head.

        X_0 = E[tokens] + P,   X_l = block_l(X_{l−1}),   logits = N(X_L) W_headᵀ

    Shapes: tokens (batch, T) with T ≤ context -> logits (batch, T, vocabulary).
    Raises: InputError for sizes that do not fit and for sequences longer than the context.
    Holds: causal exactly: logits at t depend on tokens up to t alone.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.context, config.width)
        else:
            self.positions = Positions(config.context, config.width, config.std)
        build = block(config.block)
        self.blocks = nn.ModuleList(build(config.parts(layer)) for layer in range(config.depth))
        self.norm = norm(config.norm)(config.width) if config.final_norm else nn.Identity()
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens vocabulary"]:
        """Return the logits of the next token at every position."""
        length = tokens.shape[-1]
        if length > self.config.context:
            raise InputError(f"a sequence of {length} tokens exceeds the context of {self.config.context}")
        x = self.embedding(tokens) + self.positions(torch.arange(length, device=tokens.device))
        for layer in self.blocks:
            x = layer(x)
        return self.head(self.norm(x))

    def block_parameters(self) -> int:
        """Count the numbers learnt in the blocks, embeddings and head left out."""
        return sum(parameter.numel() for parameter in self.blocks.parameters())


def build(config: TransformerConfig, seed: int) -> Transformer:
    """Return a transformer with initial weights that are a function of the configuration and the seed."""
    with torch.random.fork_rng(devices=[]):  # torch's own constructors draw weights that are overwritten here
        model = Transformer(config)
    initialise_(model, seed, config.std)
    return model
