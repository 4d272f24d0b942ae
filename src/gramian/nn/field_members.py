"""Several fields of one architecture as one module, rendered and trained together."""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from gramian.errors import InputError
from gramian.nn.field import ImageField, Picture
from gramian.nn.field_encodings import Size


class Members(nn.Module):
    """Pictures of several fields that have their own parameters and share an encoding's fixed numbers.

    Members see each other nowhere: the gradient of a sum over their images is that of each alone. What
    depends on coordinates alone is kept once for all of them, at every resolution that is asked for.

    Args:
        fields: the members, of one architecture; buffers, such as frequencies, are those of the first.
        size: of the image in pixels.
        blocks: resolutions at which images are wanted, as pixels on a side of a block.
        mask: as that of `Picture`.
        chunk: as that of `Picture`.

    Shapes: block -> (members, rows/block, columns/block).
    Raises: InputError for no fields, fields of several architectures, a block that was not asked for, and as
        `Picture`.
    Holds: exactly.
    """

    def __init__(
        self,
        fields: Sequence[ImageField],
        size: Size,
        *,
        blocks: Sequence[int] = (1,),
        mask: Tensor | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        shapes = [{name: p.shape for name, p in field.named_parameters()} for field in fields]
        if not fields or any(each != shapes[0] for each in shapes):
            raise InputError("members have to be fields of one architecture, at least one")
        states = [dict(field.named_parameters()) for field in fields]
        self._names = {name: name.replace(".", "/") for name in shapes[0]}
        self.stacked = nn.ParameterDict(
            {
                flat: torch.stack([state[name].detach() for state in states])
                for name, flat in self._names.items()
            }
        )
        self._pictures = {
            block: Picture(fields[0], size, block=block, mask=mask, chunk=chunk) for block in blocks
        }

    def __len__(self) -> int:
        """Return the number of members."""
        return len(next(iter(self.stacked.values())))

    @property
    def blocks(self) -> tuple[int, ...]:
        """Resolutions at which there are images."""
        return tuple(self._pictures)

    @property
    def state(self) -> dict[str, Tensor]:
        """Parameters of all members by their names in a field, with a first axis of members."""
        return {name: self.stacked[flat] for name, flat in self._names.items()}

    def forward(self, block: int = 1) -> Float[Tensor, "members rows columns"]:
        """Return the images of all members."""
        if block not in self._pictures:
            raise InputError(f"images are kept for blocks of {sorted(self._pictures)} pixels, not of {block}")
        picture = self._pictures[block]
        if len(self) > 1:
            return picture.members(self.state)
        alone = {f"field.{name}": value[0] for name, value in self.state.items()}
        return functional_call(picture, alone, ())[None]

    def picture(self, member: int = 0) -> Picture:
        """Return the picture of one member, with its parameters as a copy that can be trained.

        Raises: InputError for a member that is not there.
        """
        if not 0 <= member < len(self):
            raise InputError(f"there are the members 0 to {len(self) - 1}, not {member}")
        alone = deepcopy(self._pictures[min(self._pictures)])
        with torch.no_grad():
            for name, value in alone.field.named_parameters():
                value.copy_(self.state[name][member])
        return alone

    def train(self, mode: bool = True) -> "Members":
        """Turn dropout on or off."""
        for picture in self._pictures.values():
            picture.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Members":
        for picture in self._pictures.values():  # which are no submodules: their fields are only moulds
            picture._apply(fn, recurse)
        return super()._apply(fn, recurse)
