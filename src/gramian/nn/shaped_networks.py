"""Finite networks of shaped blocks, many at once, through the covariance of their tokens alone.

Given the tokens, the products of Gaussian weights with them are Gaussian, so that the covariance after a
branch has a distribution of its own: no width × width matrix and, but for the MLP's hidden features, no
token is ever drawn. What is sampled is distributed exactly as in networks that draw every weight.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.sde import Paths, check_covariance, integrate, joined, square_root
from gramian.errors import InputError
from gramian.nn.residual import normalised_skip
from gramian.nn.shaped import shaped_slopes

Covariances = Float[Tensor, "networks m m"]

Mixing = Callable[[Float[Tensor, "networks m m"], Float[Tensor, "m m"]], Float[Tensor, "networks m m"]]
"""From logits, −∞ where a token does not see another, and the centring C, to attention matrices."""

ENTRIES = 2**20
"""Hidden features that are held at once."""


def shaped_attention(logits: Tensor, centring: Tensor) -> Tensor:
    """Return A = I + softmax(Z) − C.

    Source: Noci et al. 2023, arXiv 2306.17759.
    """
    return logits.softmax(-1) - centring + torch.eye(len(centring), dtype=logits.dtype, device=logits.device)


def uncentred_attention(logits: Tensor, centring: Tensor) -> Tensor:
    """Return A = I + softmax(Z), a control: each block adds the mean token again."""
    return shaped_attention(logits, torch.zeros_like(centring))


def softmax_attention(logits: Tensor, centring: Tensor) -> Tensor:
    """Return A = softmax(Z), a control: every block averages tokens."""
    return logits.softmax(-1)


@dataclass(frozen=True)
class ShapedNetworks:
    """Networks of width n whose blocks are X' = λX + γ A X W_V, X'' = λX' + γ s(X' W₁) √c W₂; λ² + γ² = 1.

        Z = X W_K W_Qᵀ Xᵀ / (n τ),   τ = τ₀ n^power √n_k,   A = attention(Z, C),   1/c = (s₊² + s₋²)/2

    All weights are Gaussian with variance 1/fan_in (N(0, 1) in Z). `attention` and `power` are there for
    controls; shaped attention has the power ½. One head, whose queries have n_k = `key_width` features.

    Raises: InputError for settings that cannot be used.
    Holds: exactly in distribution.
    Source: Noci et al. 2023, arXiv 2306.17759; the sampler is our algebra.
    """

    width: int
    gamma: float
    tau0: float = 1.0
    key_width: int = 64
    causal: bool = False
    positive: float = 0.0
    negative: float = -1.0
    attention: Mixing = shaped_attention
    power: float = 0.5

    def __post_init__(self) -> None:
        if self.width < 1 or self.key_width < 1:
            raise InputError(f"width and key_width must be at least 1, got {self.width} and {self.key_width}")
        if not 0 < self.tau0 < math.inf:
            raise InputError(f"tau0 must be positive and finite, got {self.tau0:g}")
        normalised_skip(self.gamma)
        shaped_slopes(self.width, self.positive, self.negative)

    def attended(self, v: Covariances, generator: torch.Generator) -> Covariances:
        """Return covariances after an attention branch and its skip."""
        root, m = square_root(v), v.shape[-1]
        keys = wishart_factor(len(v), m, self.key_width, v, generator)
        queries = torch.randn(
            (len(v), keys.shape[-1], m), generator=generator, dtype=v.dtype, device=v.device
        )
        scale = self.tau0 * self.width**self.power * math.sqrt(self.key_width)
        logits = root @ keys @ queries @ root.mT / scale
        seen = torch.ones(m, m, dtype=torch.bool, device=v.device)
        seen = seen.tril() if self.causal else seen
        centring = seen.to(v.dtype) / seen.sum(-1, keepdim=True)
        mixing = self.attention(logits.masked_fill(~seen, -math.inf), centring)
        return self._added(root, mixing @ root, generator)

    def transformed(self, v: Covariances, generator: torch.Generator) -> Covariances:
        """Return covariances after an MLP branch and its skip."""
        root, (up, down) = square_root(v), shaped_slopes(self.width, self.positive, self.negative)
        normal = torch.randn((*v.shape[:2], self.width), generator=generator, dtype=v.dtype, device=v.device)
        hidden = root @ normal
        shaped = hidden.clamp(max=0).mul_(down - up).add_(hidden, alpha=up)
        scale = 2 / (up**2 + down**2) / self.width
        return self._added(root, square_root(scale * shaped @ shaped.mT), generator)

    def _added(self, root: Tensor, branch: Tensor, generator: torch.Generator) -> Covariances:
        """Return the covariance of λ X + γ B N for X with the root L, a root B, and N of m × width.

        The part of N along X's rows is a square matrix; the rest enters by its Wishart matrix.
        """
        m, gain = root.shape[-1], self.gamma / math.sqrt(self.width)
        along = torch.randn(root.shape, generator=generator, dtype=root.dtype, device=root.device)
        first = normalised_skip(self.gamma) * root + gain * branch @ along
        rest = gain * branch @ wishart_factor(len(root), m, self.width - m, root, generator)
        return first @ first.mT + rest @ rest.mT

    def simulate(
        self,
        start: Float[Tensor, "m m"],
        depth: int,
        *,
        networks: int,
        seed: int,
        records: Sequence[int] = (),
        bound: float = 1e4,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Paths:
        """Return the covariances of networks after the given numbers of blocks, or after all of them.

        A network whose largest entry passes `bound` stops there. `progress` is told how many are done.

        Shapes: start (m, m) -> states (records, networks, m, m); times are blocks/width.
        Raises: InputError for a V₀ that is no covariance, a depth or a number of networks below 1, and a
            width below the tokens'.
        """
        check_covariance(start)
        m, parts, done = len(start), [], 0
        if depth < 1 or networks < 1:
            raise InputError(f"depth and networks must be at least 1, got {depth} and {networks}")
        if self.width < m:
            raise InputError(f"networks need a width of at least their {m} tokens, got {self.width}")
        seeds = torch.Generator().manual_seed(seed)

        def step(v: Tensor, h: float, generator: torch.Generator) -> Tensor:
            return self.transformed(self.attended(v, generator), generator)

        while done < networks:
            count = min(networks - done, max(1, ENTRIES // (m * self.width)))
            generator = torch.Generator(start.device)
            generator.manual_seed(int(torch.randint(2**62, (), generator=seeds)))
            noise = self._blocks(depth, generator)
            times = [each / self.width for each in records]
            parts.append(integrate(step, start.expand(count, m, m), noise, bound=bound, records=times))
            done += count
            progress(done)
        return joined(parts)

    def _blocks(self, depth: int, generator: torch.Generator) -> Iterator[tuple[float, torch.Generator]]:
        for _ in range(depth):
            yield 1 / self.width, generator


def wishart_factor(
    count: int, m: int, freedom: int, like: Tensor, generator: torch.Generator
) -> Float[Tensor, "count m columns"]:
    """Return T with T Tᵀ distributed as N Nᵀ for N of m × freedom standard normal entries.

    T is triangular with T_ii² ~ χ²(freedom − i) and normal entries below, or N itself where that is smaller.

    Shapes: (count, m, min(m, freedom)).
    Holds: exactly in distribution.
    Source: Bartlett 1933, "On the theory of statistical regression".
    """
    normal = torch.randn(
        (count, m, min(m, freedom)), generator=generator, dtype=like.dtype, device=like.device
    )
    if freedom < m:
        return normal
    degrees = (freedom - torch.arange(m, dtype=like.dtype, device=like.device)) / 2
    # that of torch.distributions takes no generator
    gamma = torch._standard_gamma  # pyright: ignore[reportPrivateImportUsage]
    chi = (2 * gamma(degrees.expand(count, m).contiguous(), generator=generator)).sqrt()
    return normal.tril(-1) + torch.diag_embed(chi)
