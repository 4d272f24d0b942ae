"""Where in an image there can be an object, told from the rays that meet nothing."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.geometry import Beam

NEIGHBOURS = 3
"""Detectors whose mean is compared with the noise."""
SIGMAS = 2.0
"""Means of neighbours below so many of their standard deviations are taken for empty."""
VIEWS = 4
"""Views that have to find a pixel empty: what thin parts and noise hide from one is seen by others."""


def support(
    geometry: Beam, sinogram: Float[Tensor, "views detectors"], std: float | Tensor
) -> Bool[Tensor, "rows columns"]:
    """Return the pixels in which there may be something: all but those that several views see through.

    A detector is empty where the mean of three neighbours is below two of its standard deviations. A pixel is
    outside where four views see it by empty detectors alone, unless it is beside one that is not outside. For
    a convex object in a clean scan this is its outline as a polygon. Gaps that enough views look through are
    outside; of an object only what is too thin or faint to be told from noise can be.

    Shapes: sinogram (views, detectors), std () or (views, detectors) -> (rows, columns).
    Raises: InputError for a sinogram of another shape.
    Holds: for objects whose integrals are far above the noise; values outside are then 0.
    """
    if sinogram.shape != (len(geometry.theta), geometry.detectors):
        raise InputError(
            f"this scan has sinograms of {len(geometry.theta)} × {geometry.detectors}, got "
            f"{tuple(sinogram.shape)}"
        )
    variance = torch.as_tensor(std).to(sinogram).square().expand_as(sinogram)
    mean = _smooth(sinogram)
    empty = mean <= SIGMAS * (_smooth(variance) / NEIGHBOURS).sqrt()
    x, y = geometry.pixels()
    outside = torch.zeros(geometry.shape, dtype=torch.int64)
    for view, angle in enumerate(geometry.theta.tolist()):
        place, _ = geometry.footprint(x, y, angle)
        index = (place - geometry.offsets[0]) / geometry.spacing_mm
        seen = empty[view].cpu()
        sure = torch.ones(geometry.shape, dtype=torch.bool)
        for near in (index.floor().long(), index.ceil().long()):
            inside = (near >= 0) & (near < geometry.detectors)
            sure &= inside & seen[near.clamp(0, geometry.detectors - 1)]
        outside += sure
    return _grown(outside < VIEWS).to(sinogram.device)


def _smooth(rows: Float[Tensor, "views detectors"]) -> Float[Tensor, "views detectors"]:
    return torch.nn.functional.avg_pool1d(
        rows[:, None], NEIGHBOURS, 1, NEIGHBOURS // 2, count_include_pad=False
    )[:, 0]


def _grown(mask: Bool[Tensor, "rows columns"]) -> Bool[Tensor, "rows columns"]:
    """Add the neighbours of all pixels of a mask."""
    return torch.nn.functional.max_pool2d(mask[None].float(), 3, 1, 1)[0] > 0
