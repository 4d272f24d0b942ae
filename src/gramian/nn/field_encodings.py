"""Coordinates of pixels, and encodings, without which a network learns the smooth part of an image alone.

Coordinates are (row, column) in [−1, 1]². An encoding has two halves: `prepare`, which depends on nothing
that is trained and so can be kept while a field is fitted, and `read`, which has the trained parameters.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.nn.functional import embedding, embedding_bag, linear

from gramian.core.linear_map import mapped
from gramian.errors import InputError

Prepared = tuple[Tensor, ...]
"""What an encoding makes of coordinates before its trained parameters act; first axes are those of points."""

Size = int | tuple[int, int]
"""The side of a square image in pixels, or its rows and columns."""

PRIME = 2_654_435_761
"""Multiplier of columns in the spatial hash."""

HASH_START = 1e-4
"""Largest feature of a hash grid at the start."""


def coordinates(
    size: Size,
    *,
    block: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "rows columns 2"]:
    """Return (row, column) of every pixel, or of the centre of every block of pixels.

        row_i = −1 + 2 i/(rows − 1),   i = 0 … rows − 1;   the mean of it over a block

    Shapes: -> (rows/block, columns/block, 2).
    Raises: InputError for sides below 2, a block that does not divide them.
    Holds: exactly.
    """
    sides = sides_of(size)
    if block < 1 or any(side % block for side in sides):
        raise InputError(f"blocks of {block} pixels do not divide an image of {sides[0]} × {sides[1]}")
    axes = [
        torch.linspace(-1, 1, side, dtype=torch.float64).unflatten(0, (-1, block)).mean(1) for side in sides
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).to(device, dtype)


def sides_of(size: Size) -> tuple[int, int]:
    """Return rows and columns.

    Raises: InputError for sides below 2.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 2:
        raise InputError(f"an image has a side, or rows and columns, of at least 2 pixels, got {size}")
    return sides


def check_coordinates(x: Tensor) -> None:
    """Refuse what is not two floating numbers a point.

    Raises: InputError.
    """
    if x.shape[-1:] != (2,) or not x.is_floating_point():
        raise InputError(f"coordinates are floats (…, 2), got {tuple(x.shape)} of {x.dtype}")


class Encoding(nn.Module):
    """A map of coordinates to features: φ(x) = read(prepare(x)).

    Alone it is the identity, φ(x) = x.

    Shapes: (*points, 2) -> (*points, outputs).
    Holds: exactly.
    """

    outputs = 2
    """Number of features."""

    def prepare(self, x: Float[Tensor, "*points 2"]) -> Prepared:
        """Do all that depends on no trained parameter."""
        return (x,)

    def read(self, *prepared: Tensor) -> Float[Tensor, "*points features"]:
        """Return the features of prepared coordinates."""
        return prepared[0]

    def forward(self, x: Float[Tensor, "*points 2"]) -> Float[Tensor, "*points features"]:
        """Encode coordinates."""
        return self.read(*self.prepare(x))


class FourierFeatures(Encoding):
    """Waves of random frequencies, which are drawn once and stay.

        φ(x) = [sin(B x + π/4), cos(B x + π/4)],   B = ω₀ G,   G ~ N(0, 1)

    B is a buffer of the state dict. Without a seed it is drawn by torch's global generator. Phases are never
    computed in the reduced precision of an autocast, in which they would be off by radians.

    Shapes: (*points, 2) -> (*points, 2·features); B is (features, 2).
    Raises: InputError for fewer features than one, ω₀ that is not positive and finite.
    Holds: exactly; as features → ∞, φ(x)·φ(x')/features = exp(−½ ω₀² |x − x'|²), error O(features^-1/2).
    Source: Tancik et al. 2020, arXiv 2006.10739; without 2π: Vasconcelos, He, Singh, Teh 2023, arXiv
        2202.10847 (363 features, ω₀ 40 to 60).
    """

    def __init__(self, features: int = 363, omega: float = 40.0, seed: int | None = None) -> None:
        super().__init__()
        self.outputs, self.omega = 2 * _whole("Fourier features", features), _frequency(omega)
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.empty(features, 2))
        self.initialise_(None if seed is None else torch.Generator().manual_seed(seed))

    def initialise_(self, generator: torch.Generator | None) -> None:
        """Draw B."""
        nn.init.normal_(self.frequencies, std=self.omega, generator=generator)

    def prepare(self, x: Float[Tensor, "*points 2"]) -> Prepared:
        """Return φ(x)."""
        rows, columns = self.frequencies.unbind(1)
        phase = x[..., :1] * rows + x[..., 1:] * columns + math.pi / 4
        return (torch.cat((phase.sin(), phase.cos()), -1),)


class OctaveFeatures(Encoding):
    """Coordinates, and waves along the axes whose frequencies double.

        φ(x) = [x, sin(2⁰π x), cos(2⁰π x), …, sin(2^{K−1}π x), cos(2^{K−1}π x)]

    Shapes: (*points, 2) -> (*points, 2 + 4·octaves).
    Raises: InputError for fewer octaves than one.
    Holds: exactly.
    Source: Mildenhall et al. 2020, arXiv 2003.08934.
    """

    def __init__(self, octaves: int = 4) -> None:
        super().__init__()
        self.octaves = _whole("octaves", octaves)
        self.outputs = 2 + 4 * octaves

    def prepare(self, x: Float[Tensor, "*points 2"]) -> Prepared:
        """Return φ(x)."""
        phases = [x * (2**octave * math.pi) for octave in range(self.octaves)]
        return (torch.cat([x, *(wave for phase in phases for wave in (phase.sin(), phase.cos()))], -1),)


class Sine(Encoding):
    """A linear map and a sine: an encoding that is learned, or a hidden layer.

        y = sin(ω₀ (W x + b)),   b ~ U(±1/√in)
        W ~ U(±1/in) where `first`, and U(±√(6/in)/ω₀) elsewhere

    `Field(Sine(2, w, ω₀, first=True), w, depth, activation=partial(Sine, omega=ω₀))` is a network of them
    alone. The first computes its phases, which are large, in full precision under an autocast too. Draws
    come from torch's global generator, and from an explicit one by `initialise_`.

    Shapes: (*points, in) -> (*points, out).
    Raises: InputError for fewer features than one, ω₀ that is not positive and finite.
    Holds: as widths → ∞, pre-activations ω₀ W x of later layers have variance 1 at the start.
    Source: Sitzmann et al. 2020, arXiv 2006.09661.
    """

    def __init__(self, inputs: int, outputs: int, omega: float = 30.0, *, first: bool = False) -> None:
        super().__init__()
        self.outputs, self.omega, self.first = _whole("features", outputs), _frequency(omega), first
        self.weight = nn.Parameter(torch.empty(outputs, _whole("features", inputs)))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.initialise_(None)

    def initialise_(self, generator: torch.Generator | None) -> None:
        """Draw weights and biases."""
        fan_in = self.weight.shape[1]
        bound = 1 / fan_in if self.first else math.sqrt(6 / fan_in) / self.omega
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.bias, -(fan_in**-0.5), fan_in**-0.5, generator=generator)

    def prepare(self, x: Float[Tensor, "*points inputs"]) -> Prepared:
        """Return x."""
        return (x,)

    def read(self, *prepared: Tensor) -> Float[Tensor, "*points features"]:
        """Map and take the sine."""
        if not self.first:
            return torch.sin(self.omega * linear(prepared[0], self.weight, self.bias))
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.sin(self.omega * linear(prepared[0], self.weight, self.bias))

    def forward(self, x: Float[Tensor, "*points inputs"]) -> Float[Tensor, "*points features"]:
        """Map and take the sine."""
        return self.read(x)


class HashGrid(Encoding):
    """Grids of learned features from coarse to fine, the fine ones in tables that are shorter than they are.

        φ(x) = [φ_1(x), …, φ_L(x)],   φ_l(x) = Σ_corners w_c(x) T_l[h_l(c)]
        N_l = ⌊N_1 (N_L/N_1)^{(l−1)/(L−1)}⌋ cells a side;   w_c: bilinear weights in the cell of x
        h_l(i, j) = i (N_l + 1) + j  if (N_l + 1)² ≤ entries,  else (i xor 2 654 435 761 j) mod entries

    Features start at U(±10⁻⁴). Where entries suffice for the finest level there are no collisions, and this
    is a learned pyramid of grids. Points outside [−1, 1]² are taken to its border. Without a seed draws come
    from torch's global generator.

    Shapes: (*points, 2) -> (*points, levels·features).
    Raises: InputError for sizes below 1, entries that are no power of 2, a finest grid that is coarser than
        the coarsest.
    Holds: exactly; φ_l is T_l at the nodes of level l, and continuous.
    Source: Müller et al. 2022, arXiv 2201.05989, equations 1 to 4.
    """

    def __init__(
        self,
        levels: int = 12,
        features: int = 2,
        entries: int = 2**14,
        *,
        coarsest: int = 8,
        finest: int = 256,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.outputs = _whole("levels", levels) * _whole("features", features)
        if _whole("entries", entries) & (entries - 1):
            raise InputError(f"the entries of a hash table are a power of 2, got {entries}")
        if not 1 <= coarsest <= finest:
            raise InputError(f"grids go from 1 cell or more to as many or more, got {coarsest}, {finest}")
        self.entries, self.resolutions = entries, _resolutions(levels, coarsest, finest)
        lengths = [min((n + 1) ** 2, entries) for n in self.resolutions]
        self.tables = nn.Parameter(torch.empty(sum(lengths), features))
        self._offsets = [sum(lengths[:level]) for level in range(levels)]
        self.initialise_(None if seed is None else torch.Generator().manual_seed(seed))

    def initialise_(self, generator: torch.Generator | None) -> None:
        """Draw the features."""
        nn.init.uniform_(self.tables, -HASH_START, HASH_START, generator=generator)

    def prepare(self, x: Float[Tensor, "*points 2"]) -> Prepared:
        """Return the rows of the tables at the corners of every level's cell, and their weights."""
        found = [corners(x, (n, n)) for n in self.resolutions]
        places = [self._hashed(level, i, j) for level, (i, j, _) in enumerate(found)]
        return torch.stack(places, -2), torch.stack([weights for *_, weights in found], -2)

    def read(self, *prepared: Tensor) -> Float[Tensor, "*points features"]:
        """Return the weighted sums of features over corners, level after level."""
        places, weights = prepared
        found = _weighed(self.tables, places.flatten(0, -2), weights.flatten(0, -2))
        return found.unflatten(0, places.shape[:-1]).flatten(-2)

    def _hashed(self, level: int, rows: Tensor, columns: Tensor) -> Tensor:
        side = self.resolutions[level] + 1
        direct = side**2 <= self.entries
        place = rows * side + columns if direct else (rows ^ (columns * PRIME)) & (self.entries - 1)
        return (place + self._offsets[level]).int()


def corners(x: Float[Tensor, "*points 2"], cells: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, column and bilinear weight of the four nodes around points, on a grid over [−1, 1]².

        w = (1 − t or t)_row (1 − t or t)_column,   t: the place within the cell, in [0, 1]

    Shapes: (*points, 2) -> three times (*points, 4); nodes are 0 … cells on every axis.
    Holds: exactly; weights are at least 0 and sum to 1.
    """
    most = x.new_tensor(cells)
    place = (x.clamp(-1, 1) + 1) / 2 * most
    low = torch.minimum(place.floor(), (most - 1).clamp(min=0))
    t = place - low
    near, far = (1 - t).unbind(-1), t.unbind(-1)
    weights = torch.stack((near[0] * near[1], near[0] * far[1], far[0] * near[1], far[0] * far[1]), -1)
    row, column = low.long().unbind(-1)
    rows, columns = (row, row, row + 1, row + 1), (column, column + 1, column, column + 1)
    return torch.stack(rows, -1), torch.stack(columns, -1), weights


def _weighed(
    table: Float[Tensor, "entries features"], rows: Tensor, weights: Float[Tensor, "sums terms"]
) -> Float[Tensor, "sums features"]:
    """Return Σ_t weights[n, t] table[rows[n, t]], with a gradient that gathers no row twice.

    Autograd's own sorts all rows in every backward pass, which costs eight times the sum. It is left to do so
    where points are differentiated or mapped over, and under `torch.compile`.
    """
    if torch.compiler.is_compiling() or not _fixed(weights):
        return (embedding(rows, table) * weights[..., None]).sum(-2)

    def apply(table: Tensor) -> Tensor:
        wide = table.movedim(-2, 0).flatten(1)  # leading axes, of members say, are more features
        found = embedding_bag(rows, wide, mode="sum", per_sample_weights=weights.to(table.dtype))
        return found.unflatten(1, (*table.shape[:-2], table.shape[-1])).movedim(0, -2)

    def adjoint(sums: Tensor) -> Tensor:
        wide = sums.movedim(-2, 0).flatten(1)
        terms = (weights.to(sums.dtype)[..., None] * wide[:, None]).flatten(0, 1)
        places = rows.flatten().long()[:, None].expand_as(terms)
        found = wide.new_zeros(entries, wide.shape[1]).scatter_add_(0, places, terms)
        return found.unflatten(1, (*sums.shape[:-2], sums.shape[-1])).movedim(0, -2)

    entries = len(table)
    return mapped(table, apply, adjoint)


def _fixed(x: Tensor) -> bool:
    """Whether a tensor is the same number by number for all derivatives and maps that are being taken."""
    wrapped = is_functorch_wrapped_tensor(x)
    return not (wrapped or x.requires_grad or forward_ad.unpack_dual(x).tangent is not None)


def _resolutions(levels: int, coarsest: int, finest: int) -> list[int]:
    growth = math.log(finest / coarsest) / max(levels - 1, 1)
    return [math.floor(coarsest * math.exp(level * growth) + 1e-9) for level in range(levels)]


def _whole(name: str, value: int) -> int:
    if value < 1:
        raise InputError(f"the number of {name} has to be at least 1, got {value}")
    return value


def _frequency(omega: float) -> float:
    if not 0 < omega < math.inf:
        raise InputError(f"the frequency ω₀ has to be positive and finite, got {omega:g}")
    return omega
