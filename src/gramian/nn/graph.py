"""Graphs filtered by distance: what lies around a node, shell by shell, read by a linear recurrence."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import glu, linear
from torch.utils.checkpoint import checkpoint

from gramian.errors import InputError
from gramian.nn.recurrence import PUBLISHED_PHASE, LinearRecurrence, multiply, truncated_normal_
from gramian.nn.shells import Block, Shells
from gramian.nn.transforms import under_transform

NORM_EPS = 1e-6
"""The ε of both norms of a layer, as published."""

ROWS_AT_ONCE = {"cpu": 4096}
"""Shells that pass through a layer together, by device type: what fits a processor's cache. More do of more
than twice as many nodes, half as many as nodes: the derivative of every block has all nodes."""

ROWS_AT_ONCE_ELSEWHERE = 262_144
"""The same on other devices: more are more efficient there."""


class Dense(nn.Linear):
    """A linear map that starts with truncated normal weights and no bias.

        y = x Wᵀ + b,   E W² = 1/in,   b = 0 at the start

    Shapes: (…, in) -> (…, out).
    Holds: E y² = mean x² at the start, exactly.
    Source: LeCun et al. 1998, "Efficient BackProp".
    """

    def reset_parameters(self) -> None:
        """Start anew, from torch's global generator."""
        self.initialise_(None)

    def initialise_(self, generator: torch.Generator | None) -> None:
        """Draw the weights and set the bias to zero."""
        truncated_normal_(self.weight, 1 / self.in_features, generator)
        nn.init.zeros_(self.bias)


class FullGate(nn.Module):
    """A linear map gated by another one: G(z) = (W_a z + b_a) ⊙ σ(W_b z + b_b).

    Shapes: (…, width) -> (…, width).
    Holds: exactly; W_a lies above W_b in one matrix.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both = Dense(width, 2 * width)

    def forward(self, z: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Map and gate."""
        return glu(self.both(z), -1)


class HalfGate(nn.Module):
    """Features gated by a linear map of them: G(z) = z ⊙ σ(W z + b).

    Shapes: (…, width) -> (…, width).
    Holds: exactly.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = Dense(width, width)

    def forward(self, z: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Gate."""
        return z * self.gate(z).sigmoid()


GATES: dict[str, Callable[[int], nn.Module]] = {
    "full": FullGate,
    "half": HalfGate,
    "none": lambda width: nn.Identity(),
}
"""What follows the recurrence, by name; each is a factory `width -> module`."""


class ShellMLP(nn.Module):
    """The MLP with its norm and skip that every shell passes through, in the original's form.

        x̃ = x + W₂ gelu(W₁ LN(x) + b₁) + b₂,   gelu in its tanh form, ε = 1e-6

    Shapes: (…, width) -> (…, width).
    Holds: exactly.
    Source: Ding et al. 2024, arXiv 2312.01538.
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.up, self.down = Dense(width, hidden), Dense(hidden, width)
        self.activation, self.dropout = nn.GELU("tanh"), nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Add the branch."""
        hidden = self.dropout(self.activation(self.up(self.norm(x))))
        return x + self.dropout(self.down(hidden))


class DistanceFilter(nn.Module):
    """The GRED layer: what lies around a node, shell by shell, read by a linear recurrence over distance.

        x_{v,k} = Σ_{u: d(u,v)=k} h_u,   x̃ = ShellMLP(x),   u_{v,k} = LN(x̃_{v,k}) (B ⊙ e^{γ_log})
        s_v = Σ_{k<K} λ^k ⊙ u_{v,k},   h'_v = x̃_{v,0} + drop(G(drop(gelu(Re(s_v C)))))

    A shell without nodes is not neutral: biases give it u = c for x = 0. With the rows that are not empty
    alone, s_v = Σ_k λ^k ⊙ (u_{v,k} − c) + c ⊙ Σ_{k<K} λ^k is the same sum. `neutral_empty` takes c = 0, so
    that K past the largest distance changes nothing.

    In the original the dropout of the shell MLP is never active; `shell_dropout` makes it so, with one draw
    for all empty shells. Many rows pass in blocks that are computed again for the derivative: of them
    nothing is kept, but for x_{v,k} where shells have many members.

    Shapes: (nodes, width), shells -> (nodes, width).
    Raises: InputError for sizes below 1, an unknown gate, a rate outside [0, 1), and for shells of another
        number of nodes.
    Holds: exactly; equivariant under a permutation of the nodes, and one graph of a batch is as alone.
    Source: Ding et al. 2024, arXiv 2312.01538, and the authors' code.
    """

    def __init__(
        self,
        width: int,
        state: int,
        *,
        expand: int = 1,
        gate: str = "full",
        dropout: float = 0.0,
        shell_dropout: float = 0.0,
        neutral_empty: bool = False,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = PUBLISHED_PHASE,
    ) -> None:
        super().__init__()
        if expand < 1:
            raise InputError(f"the hidden width of a shell MLP is at least once the width, got {expand}")
        if gate not in GATES:
            raise InputError(f"unknown gate {gate!r}; choose one of {', '.join(GATES)}")
        for rate in (dropout, shell_dropout):
            if not 0 <= rate < 1:
                raise InputError(f"the rate of dropout must be at least 0 and below 1, got {rate:g}")
        self.recurrence = LinearRecurrence(width, state, r_min=r_min, r_max=r_max, max_phase=max_phase)
        self.mlp = ShellMLP(width, expand * width, shell_dropout)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.gate = GATES[gate](width)
        self.activation, self.dropout = nn.GELU("tanh"), nn.Dropout(dropout)
        self.neutral_empty = neutral_empty

    def forward(self, h: Float[Tensor, "nodes width"], shells: Shells) -> Float[Tensor, "nodes width"]:
        """Filter the features of all nodes."""
        if h.shape[0] != shells.nodes:
            raise InputError(f"the shells are those of {shells.nodes} nodes, got features of {h.shape[0]}")
        own = self.mlp(h)
        z = self.dropout(self.activation(self.recurrence.read(self._state(h, own, shells))))
        return own + self.dropout(self.gate(z))

    def _state(self, h: Tensor, own: Tensor, shells: Shells) -> Tensor:
        """Return s_v; shell 0 is the node itself, λ⁰ = 1."""
        powers, matrix = self.recurrence.vandermonde(shells.count), self.recurrence.input_map()
        state = linear(self.norm(own), matrix).to(powers.dtype)
        if shells.count == 1:
            return state
        empty = None if self.neutral_empty else linear(self.norm(self.mlp(h.new_zeros(h.shape[1]))), matrix)
        if empty is not None:
            state = state + multiply(empty.to(powers.dtype), powers[1:].sum(0))
        return self._filtered(h, state, shells, powers, matrix, empty)

    def _filtered(
        self,
        h: Tensor,
        state: Tensor,
        shells: Shells,
        powers: Tensor,
        matrix: Tensor,
        empty: Tensor | None,
    ) -> Tensor:
        """Add λ^k ⊙ (u_{v,k} − c) of every shell to its node, block by block."""
        maps = powers, matrix, empty
        size = max(ROWS_AT_ONCE.get(h.device.type, ROWS_AT_ONCE_ELSEWHERE), shells.nodes // 2)
        if shells.node.shape[0] <= size or under_transform():
            whole = Block(shells.sums(h), shells.node, shells.hop)
            return state.index_add(0, shells.node, self._weighted(whole, *maps))
        random = self.training and self.mlp.dropout.p > 0
        for block in shells.blocks(h, size):
            weighted = checkpoint(
                self._weighted, block, *maps, use_reentrant=False, preserve_rng_state=random
            )
            place = block.node.long()[:, None].expand_as(weighted)
            state.scatter_add_(0, place, weighted)  # index_add_ would keep what it adds
        return state

    def _weighted(self, block: Block, powers: Tensor, matrix: Tensor, empty: Tensor | None) -> Tensor:
        """Return λ^k ⊙ (u − c) of some rows."""
        inputs = linear(self.norm(self.mlp(block.sums())), matrix, None if empty is None else -empty)
        return multiply(inputs.to(powers.dtype), powers.index_select(0, block.hop))
