"""A transformer, decoder or encoder: blocks between token embeddings and a head."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gramian.errors import InputError
from gramian.memory import check_memory
from gramian.nn.activations import activation
from gramian.nn.blocks import Parts, block
from gramian.nn.init import OrthogonalProjection, fan_in_std, initialise_
from gramian.nn.norms import norm
from gramian.nn.residual import through
from gramian.nn.rotary import Rotary
from gramian.nn.view import Past, View, positions

BLOCK = 40_000
"""Bytes that the objects of one block take, whatever its width."""


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
    """rmsnorm, layernorm, none, or another of `gramian.nn.norms.NORMS`."""
    activation: str = "relu"
    """relu, gelu, gelu_tanh, silu or tanh."""
    positions: str = "learned"
    """learned or sinusoidal vectors added to the embeddings, or rotary: turned queries and keys."""
    tied: bool = True
    """Whether the head uses the token embedding's matrix, or one of its own."""
    final_norm: bool = True
    """Whether a norm stands before the head."""
    init_std: float | None = None
    """Standard deviation of initial weights; 0.02 · √(768/width) when not given."""
    key_heads: int | None = None
    """Heads of keys and values, shared by groups of query heads; as many as `heads` when not given."""
    gated: bool = False
    """Whether half of an MLP's hidden features gate the other half."""
    mlp_gain: float = 0.1
    """β_FF that the simplified blocks start with at 18 layers, carried to other depths by 1/√L."""
    decay: float = 0.005
    """γ_L of E-SPA, whose tokens' correlations end as e^(−γ_L distance); a larger one keeps tokens apart."""
    branch_gain: float = 0.1
    """γ of the shaped block, λx + γ branch(x) with λ² + γ² = 1."""
    attention_temperature: float = 1.0
    """τ₀ of the shaped block, whose logits are q·k / (τ₀ √(width · head width))."""
    embedding_projection: bool = False
    """Whether square maps that start orthogonal stand after the token embedding and before the head."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Shape):
    """A transformer: a shape, its vocabulary, its block, and whether it decodes or encodes.

    Raises: InputError for a size below 1, sizes that do not fit each other, and unknown names.
    """

    vocabulary: int
    """Tokens there are."""
    block: str = "pre_norm"
    """Name of the block in `gramian.nn.blocks.BLOCKS`."""
    causal: bool = True
    """True for a decoder, whose tokens see those before; False for an encoder, whose tokens see all."""

    def __post_init__(self) -> None:
        for lookup, name in ((block, self.block), (norm, self.norm), (activation, self.activation)):
            lookup(name)  # an unknown name raises
        for name in ("vocabulary", "context", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mlp_width is not None and self.mlp_width < 1:
            raise InputError(f"mlp_width must be at least 1, got {self.mlp_width}")
        if self.gated and (self.mlp_width or 4) % 2:
            raise InputError(f"a gated MLP needs an even mlp_width, got {self.mlp_width}")
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.key_heads is not None and (self.key_heads < 1 or self.heads % self.key_heads):
            raise InputError(f"key_heads must divide the {self.heads} heads, got {self.key_heads}")
        if self.positions not in ("learned", "sinusoidal", "rotary"):
            raise InputError(f"unknown positions {self.positions!r}; choose learned, sinusoidal or rotary")
        if self.positions == "sinusoidal" and self.width % 2:
            raise InputError(f"sinusoidal positions need an even width, got {self.width}")
        if not 0 < self.decay < math.inf:
            raise InputError(f"decay must be positive and finite, got {self.decay:g}")
        if not 0 <= self.branch_gain <= 1:
            raise InputError(f"branch_gain must lie in [0, 1], got {self.branch_gain:g}")
        if not 0 < self.attention_temperature < math.inf:
            raise InputError(
                f"attention_temperature must be positive and finite, got {self.attention_temperature:g}"
            )
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise InputError(f"rotary positions need heads of an even width, got {self.width // self.heads}")

    @property
    def least_parameters(self) -> int:
        """Numbers that every block has to learn at least, beside the embedding: V w + L w (w + 1.5 m)."""
        mlp = self.mlp_width or 4 * self.width
        return self.width * (self.vocabulary + self.depth * (self.width + 3 * mlp // 2))

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
            causal=self.causal,
            norm=norm(self.norm),
            activation=activation(self.activation),
            gated=self.gated,
            key_heads=self.key_heads,
            mlp_gain=self.mlp_gain,
            context=self.context,
            rotary=Rotary if self.positions == "rotary" else None,
            decay=self.decay,
            branch_gain=self.branch_gain,
            attention_temperature=self.attention_temperature,
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

    Shapes: (…) -> (…, width).
    Holds: exactly.
    """

    def __init__(self, context: int, width: int, rms: float) -> None:
        super().__init__()
        self.rms = rms
        self.register_buffer("weight", torch.empty(context, width), persistent=False)
        self.initialise_()

    def initialise_(self, generator: torch.Generator | None = None) -> None:
        """Compute the vectors, which no state dict holds."""
        weight = self.get_buffer("weight")
        weight.copy_(sinusoids(*weight.shape) * (self.rms * math.sqrt(2)))

    def forward(self, index: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens width"]:
        """Return the vectors of the given positions."""
        return self.get_buffer("weight")[index]


def _check_memory(config: TransformerConfig) -> None:
    """Refuse a transformer that no memory here holds; one without numbers yet has only its objects."""
    table = 0 if config.positions == "rotary" else config.context * config.width
    numbers = config.least_parameters + table
    if torch.get_default_device().type == "meta":
        numbers = 0
    what = f"{config.depth:,} blocks of width {config.width:,} for a vocabulary of {config.vocabulary:,}"
    check_memory(4 * numbers + BLOCK * config.depth, f"{what} and a context of {config.context:,}")


class Transformer(nn.Module):
    """A language model: embeddings, blocks, a final norm and a head.

        X_0 = E[tokens] Q_inᵀ + P,   X_l = block_l(X_{l−1}),   features = N(X_L) Q_outᵀ
        logits = features W_headᵀ

    P are the position vectors; rotary positions have none, and attention rotates its queries and keys. Q_in
    and Q_out are the identity, or the maps of `embedding_projection`. A decoder's logits are those of the
    next token, an encoder's those of the token itself. `mask` is 1 (or true) at real tokens and 0 at
    padding, on either side; `documents` numbers packed documents, which do not see each other, and positions
    restart in each. `past` is what each layer remembers of the tokens before (`memory()`), for decoding; it
    grows by these tokens, and `mask` then covers those before too.

    Shapes: tokens, mask, documents (batch, T) -> logits (batch, T, vocabulary); T ≤ context, or that of
    each document.
    Raises: InputError for sizes that do not fit or that no memory here holds, sequences beyond the context, a
    mask of another shape.
    Holds: exactly: a decoder's logits at t depend on tokens up to t alone, and on none that are padding.
    """

    _gradient_checkpointing_func: Any = staticmethod(partial(checkpoint, use_reentrant=False))
    """How a block is computed again; Hugging Face sets its own."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        _check_memory(config)
        self.config = config
        self.gradient_checkpointing = False
        """Whether training computes every block again in the backward pass, to save memory."""
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions: nn.Module | None = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.context, config.width)
        elif config.positions == "sinusoidal":
            self.positions = Positions(config.context, config.width, config.std)
        build = block(config.block)
        self.blocks = nn.ModuleList(build(config.parts(layer)) for layer in range(config.depth))
        self.norm = norm(config.norm)(config.width) if config.final_norm else nn.Identity()
        project = OrthogonalProjection if config.embedding_projection else nn.Identity
        self.embedding_projection, self.head_projection = project(config.width), project(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        past: Sequence[Past] | None = None,
    ) -> Float[Tensor, "batch tokens vocabulary"]:
        """Return the logits at every position."""
        return self.head(self.features(tokens, mask, documents, past))

    def features(
        self,
        tokens: Int[Tensor, "batch tokens"],
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        past: Sequence[Past] | None = None,
        embedded: Float[Tensor, "batch tokens width"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Return what the head reads; `embedded` takes the place of the tokens' embeddings."""
        length, before = tokens.shape[1], past[0].length if past else 0
        if mask is None and past and past[0].padded:
            raise InputError("the cache holds padding; give the attention mask of all tokens so far")
        view = self._view(tokens, mask, documents, before)
        places = positions(view, before, length, documents, tokens.device)
        longest = before + length if documents is None else int(places.max()) + 1
        if longest > self.config.context:
            raise InputError(f"a sequence of {longest} tokens exceeds the context of {self.config.context}")
        embedded = self.embedding(tokens) if embedded is None else embedded
        x = self.embedding_projection(embedded)
        x = x if self.positions is None else x + self.positions(places)
        for layer, memory in zip(self.blocks, past or [None] * len(self.blocks), strict=True):
            inner = view if memory is None else (view or View()).after(memory)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(through, layer, x, inner)
            else:
                x = through(layer, x, inner)
        return self.head_projection(self.norm(x))

    def _view(
        self, tokens: Tensor, mask: Tensor | None, documents: Tensor | None, before: int
    ) -> View | None:
        """Return what tokens may see; None where causality alone decides."""
        if documents is not None:
            if mask is not None or before:
                raise InputError("packed documents take neither a mask (number padding −1) nor a cache")
            if documents.shape != tokens.shape:
                raise InputError(
                    f"documents must have the shape of the tokens, {tuple(tokens.shape)}, got "
                    f"{tuple(documents.shape)}"
                )
            return View.packed(documents)
        if mask is None:
            return None
        shape = (len(tokens), before + tokens.shape[1])
        if mask.shape != shape:
            raise InputError(f"the attention mask must be (batch, tokens) = {shape}, got {tuple(mask.shape)}")
        return View.padded(mask, tokens.shape[1], self.config.causal)

    def memory(self) -> list[Past]:
        """Return an empty memory for every layer, to decode with.

        Raises: InputError for an encoder, whose tokens see those to come.
        """
        if not self.config.causal:
            raise InputError("an encoder cannot decode with a cache: its tokens see those to come")
        return [Past() for _ in self.blocks]

    def block_parameters(self) -> int:
        """Count the numbers learnt in the blocks, embeddings and head left out."""
        return sum(parameter.numel() for parameter in self.blocks.parameters())


def build(config: TransformerConfig, seed: int) -> Transformer:
    """Return a transformer with initial weights that are a function of the configuration and the seed."""
    with torch.random.fork_rng(devices=[]):  # torch's own constructors draw weights that are overwritten here
        model = Transformer(config)
    initialise_(model, seed, config.std)
    return model
