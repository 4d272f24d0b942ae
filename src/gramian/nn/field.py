"""Images as functions of coordinates: networks and grids of pixels, rendered pixel by pixel."""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import pad as with_border
from torch.utils.checkpoint import checkpoint

from gramian.errors import InputError
from gramian.nn.activations import activation as activation_named
from gramian.nn.field_encodings import (
    Encoding,
    Prepared,
    Size,
    check_coordinates,
    coordinates,
    corners,
    sides_of,
)
from gramian.nn.transforms import under_transform

OUTPUTS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "hard_sigmoid": nn.Hardsigmoid,
    "identity": nn.Identity,
}
"""Makes values of read-outs z: 1/(1 + e^−z) in (0, 1); z/6 + ½ clipped to [0, 1], which attains 0; or z."""

Layer = Callable[[int, int], nn.Module]
"""Makes a hidden layer of a number of features in and out."""


class FanInLinear(nn.Linear):
    """A linear map that starts with Gaussian weights and a small uniform bias.

        y = x Wᵀ + b,   W ~ N(0, 1/in),   b ~ U(±1/√in)

    Shapes: (…, in) -> (…, out).
    Holds: exactly, at the start.
    Source: Vasconcelos, He, Singh, Teh 2023, arXiv 2202.10847 (code).
    """

    def reset_parameters(self) -> None:
        """Start anew, from torch's global generator."""
        self.initialise_(None)

    def initialise_(self, generator: torch.Generator | None) -> None:
        """Draw weights and bias."""
        std = self.in_features**-0.5
        nn.init.normal_(self.weight, std=std, generator=generator)
        nn.init.uniform_(self.bias, -std, std, generator=generator)


class ImageField(nn.Module):
    """A function of coordinates in two halves: v(x) = decode(prepare(x)), where prepare has no parameter.

    Shapes: (*points, 2) -> (*points).
    """

    def prepare(self, x: Tensor) -> Prepared:
        """Do all that depends on no trained parameter."""
        raise NotImplementedError

    def decode(self, *prepared: Tensor) -> Float[Tensor, "*points"]:
        """Return the values at prepared coordinates."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Float[Tensor, "*points"]:
        """Return the values at coordinates."""
        return self.decode(*self.prepare(x))


class Field(ImageField):
    """A network from encoded coordinates to one value, of depth + 2 linear maps.

        h_0 = a(W_0 φ(x) + b_0),   h_l = a(W_l D h_{l−1} + b_l) for l = 1 … depth,   v = s(w·D h_depth + b)

    D is dropout: of every input of a linear map but the first. Weights start as N(0, 1/in), biases as
    U(±1/√in). The read-out and s are computed in the precision of the parameters under an autocast too.

    Args:
        encoding: φ.
        width: of every hidden layer.
        depth: hidden layers after the first.
        dropout: rate of D.
        activation: name of a, or what makes a whole hidden layer, such as partial(Sine, omega=30.0).
        output: s, a name of `OUTPUTS`.
        seed: of the layers' start; None draws from torch's global generator. The encoding keeps its own draw.
            `gramian.nn.init.initialise_` draws both anew.

    Shapes: (*points, 2) -> (*points).
    Raises: InputError for sizes out of range, an unknown activation or output, a rate outside [0, 1); and
        coordinates that are not two floating numbers a point.
    Holds: exactly.
    Source: Vasconcelos, He, Singh, Teh 2023, arXiv 2202.10847 (726 features; width 280, depth 5, dropout 0.2
        or width 200, depth 4, dropout 0).
    """

    def __init__(
        self,
        encoding: Encoding,
        width: int = 280,
        depth: int = 5,
        *,
        dropout: float = 0.0,
        activation: str | Layer = "silu",
        output: str = "sigmoid",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if width < 1 or depth < 0:
            raise InputError(f"a field has a width from 1 and a depth from 0, got {width} and {depth}")
        if not 0 <= dropout < 1:
            raise InputError(f"the rate of dropout must be at least 0 and below 1, got {dropout:g}")
        layer = _dense(activation) if isinstance(activation, str) else activation
        self.encoding = encoding
        self.layers = nn.Sequential(layer(encoding.outputs, width))
        for _ in range(depth):
            self.layers.extend((nn.Dropout(dropout), layer(width, width)))
        self.layers.append(nn.Dropout(dropout))
        self.readout, self.output = FanInLinear(width, 1), _output(output)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            _draw_(self.layers, generator)
            _draw_(self.readout, generator)

    def prepare(self, x: Tensor) -> Prepared:
        """Do what the encoding can do without trained parameters."""
        check_coordinates(x)
        return self.encoding.prepare(x)

    def decode(self, *prepared: Tensor) -> Float[Tensor, "*points"]:
        """Return the values at prepared coordinates."""
        h = self.layers(self.encoding.read(*prepared))
        with torch.autocast(h.device.type, enabled=False):
            return self.output(self.readout(h.to(self.readout.weight.dtype)).squeeze(-1))


class PixelGrid(ImageField):
    """An image of free pixels, and what is between them by bilinear interpolation of the logits.

        v(x) = s(Σ_corners w_c(x) z_c),   z = −1 at the start

    Without coordinates the whole image is returned, s(z).

    Shapes: (*points, 2) -> (*points), or nothing -> (rows, columns).
    Raises: InputError for sides below 2, an unknown output, a start that is not finite; and coordinates that
        are not two floating numbers a point.
    Holds: exactly; at pixels to the rounding of their coordinates.
    Source: Vasconcelos, He, Singh, Teh 2023, arXiv 2202.10847 (grid of pixels).
    """

    def __init__(self, size: Size, *, start: float = -1.0, output: str = "sigmoid") -> None:
        super().__init__()
        if not math.isfinite(start):
            raise InputError(f"the logits of pixels have to start finite, got {start}")
        self.shape, self.start, self.output = sides_of(size), start, _output(output)
        self.logits = nn.Parameter(torch.full(self.shape, start))

    def initialise_(self, generator: torch.Generator | None = None) -> None:
        """Set all logits to the start; there is nothing to draw."""
        nn.init.constant_(self.logits, self.start)

    def prepare(self, x: Tensor) -> Prepared:
        """Return the places of the pixels around points, and their weights."""
        check_coordinates(x)
        rows, columns = self.shape
        row, column, weights = corners(x, (rows - 1, columns - 1))
        return row * columns + column, weights

    def decode(self, *prepared: Tensor) -> Float[Tensor, "*points"]:
        """Return the values at prepared coordinates."""
        places, weights = prepared
        return self.output((self.logits.flatten()[places] * weights).sum(-1))

    def forward(self, x: Tensor | None = None) -> Float[Tensor, "*values"]:
        """Return the values at coordinates, or at all pixels."""
        return self.output(self.logits) if x is None else super().forward(x)


class Picture(nn.Module):
    """A field at the pixels of an image: called without an argument it returns the image.

    What the encoding can do without trained parameters is done once, unless `keep` is False, and costs the
    memory of its result: 4·726 bytes a pixel for the published features. Pixels outside the mask are 0 and
    cost nothing. `chunk` bounds memory: as many pixels go through the network at a time, and again in the
    backward pass, where only their values have been stored.

    Args:
        field: a Field or a PixelGrid; its parameters are this module's.
        size: of the image in pixels.
        block: pixels on a side of a block, of which one value is taken, at its centre: a coarser image, which
            is the mean over blocks where the field is linear in them.
        mask: (rows, columns) of the fine image or of the coarse one, True where there may be an object.
        chunk: pixels at a time; all when None.
        keep: whether prepared coordinates are kept, with the field's buffers as they are now.

    Shapes: nothing -> (rows/block, columns/block).
    Raises: InputError for sides below 2 or no multiple of the block, a mask of another shape or type or
        without a pixel, a chunk below 1.
    Holds: exactly: the same image whatever `chunk` and `keep`, to rounding, where there is no dropout.
    """

    def __init__(
        self,
        field: ImageField,
        size: Size,
        *,
        block: int = 1,
        mask: Tensor | None = None,
        chunk: int | None = None,
        keep: bool = True,
    ) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise InputError(f"a chunk has at least one pixel, got {chunk}")
        self.field, self.chunk, self.keep = field, chunk, keep
        like = next(iter(field.parameters()))
        x = coordinates(size, block=block, dtype=like.dtype, device=like.device)
        self.shape = tuple(x.shape[:2])
        self.index: Tensor | None
        self.register_buffer("index", _index(mask, self.shape, block, like.device), persistent=False)
        x = x.flatten(0, 1) if self.index is None else x.flatten(0, 1)[self.index]
        with torch.no_grad():
            parts = field.prepare(x) if keep else (x,)
        self._parts = [f"prepared_{number}" for number in range(len(parts))]
        for name, part in zip(self._parts, parts, strict=True):
            self.register_buffer(name, part, persistent=False)

    def forward(self) -> Float[Tensor, "rows columns"]:
        """Return the image."""
        call = self.field.decode if self.keep else self.field
        if under_transform():
            return self._placed(self._in_chunks(call))
        # the parameters of this call: a chunk is computed again after functional_call has taken its own back
        held = (*self.field.named_parameters(), *self.field.named_buffers())
        state, half = {f"field.{name}": value for name, value in held}, _Half(self.field, self.keep)
        return self._placed(self._in_chunks(lambda *parts: functional_call(half, state, parts)))

    def members(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor] | None = None,
        *,
        randomness: str = "different",
    ) -> Float[Tensor, "members rows columns"]:
        """Return the images of many fields of one architecture in one call.

        `torch.func.stack_module_state(fields)` makes both arguments, by the names of the field. Buffers, such
        as frequencies of their own, need `keep` False; without them all members have those of this field.

        Shapes: (members, …) -> (members, rows, columns).
        Raises: InputError for buffers where prepared coordinates are kept.
        Holds: exactly, to rounding.
        """
        if buffers and self.keep:
            raise InputError("members with buffers of their own need a picture made with keep=False")
        state = {**parameters, **(buffers or {})}

        def member(state: dict[str, Tensor], *parts: Tensor) -> Tensor:
            return functional_call(
                _Half(self.field, self.keep), {f"field.{n}": t for n, t in state.items()}, parts
            )

        def together(*parts: Tensor) -> Tensor:
            axes = (0, *(None for _ in parts))
            return vmap(member, axes, randomness=randomness)(state, *parts)

        return self._placed(self._in_chunks(together))

    def _in_chunks(self, call: Callable[..., Tensor]) -> Tensor:
        parts = [self.get_buffer(name) for name in self._parts]
        if self.chunk is None or self.chunk >= len(parts[0]):
            return call(*parts)
        stored = torch.is_grad_enabled() and not under_transform()
        pieces = zip(*(part.split(self.chunk) for part in parts), strict=True)
        if not stored:
            return torch.cat([call(*piece) for piece in pieces], -1)
        return torch.cat([checkpoint(call, *piece, use_reentrant=False) for piece in pieces], -1)

    def _placed(self, values: Float[Tensor, "*members points"]) -> Float[Tensor, "*members rows columns"]:
        if self.index is not None:
            empty = values.new_zeros((*values.shape[:-1], math.prod(self.shape)))
            values = empty.index_copy(-1, self.index, values)
        return values.unflatten(-1, self.shape)


class _Half(nn.Module):
    """A field, or its second half, as a module to call by a state."""

    def __init__(self, field: ImageField, prepared: bool) -> None:
        super().__init__()
        self.field, self.prepared = field, prepared

    def forward(self, *parts: Tensor) -> Tensor:
        return self.field.decode(*parts) if self.prepared else self.field(*parts)


def image(
    field: ImageField, size: Size, *, block: int = 1, mask: Tensor | None = None, chunk: int | None = None
) -> Float[Tensor, "rows columns"]:
    """Return a field at the pixels of an image; arguments and errors are those of `Picture`."""
    return Picture(field, size, block=block, mask=mask, chunk=chunk, keep=False)()


def padded(image: Float[Tensor, "*batch rows columns"], pad: int) -> Float[Tensor, "*batch taller wider"]:
    """Return images surrounded by zeros, `pad` on every side.

    Shapes: (*batch, rows, columns) -> (*batch, rows + 2 pad, columns + 2 pad).
    Raises: InputError for a negative padding.
    """
    if pad < 0:
        raise InputError(f"the padding of an image cannot be negative, got {pad}")
    return with_border(image, (pad,) * 4)


def _dense(name: str) -> Layer:
    function = activation_named(name)
    return lambda inputs, outputs: nn.Sequential(FanInLinear(inputs, outputs), function())


def _draw_(module: nn.Module, generator: torch.Generator) -> None:
    for part in module.modules():
        draw = getattr(part, "initialise_", None)
        if callable(draw):
            draw(generator)


def _output(name: str) -> nn.Module:
    if name not in OUTPUTS:
        raise InputError(f"unknown output {name!r}; choose one of {', '.join(OUTPUTS)}")
    return OUTPUTS[name]()


def _index(mask: Tensor | None, shape: tuple[int, ...], block: int, device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    fine = tuple(side * block for side in shape)
    if mask.dtype != torch.bool or mask.shape not in (shape, fine) or not mask.any():
        raise InputError(
            f"a mask is boolean, {shape[0]} × {shape[1]} and True somewhere, got {tuple(mask.shape)} of "
            f"{mask.dtype}"
        )
    if mask.shape != shape:  # a block counts where any pixel of it does
        mask = mask.unflatten(1, (-1, block)).any(2).unflatten(0, (-1, block)).any(1)
    return mask.flatten().nonzero()[:, 0].to(device)
