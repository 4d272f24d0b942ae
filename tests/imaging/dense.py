"""A small matrix as a projector, for tests of methods that take any."""

import torch
from torch import Tensor

F64 = torch.float64


class Dense:
    """A small matrix as a projector; one detector sees nothing, one pixel is seen by none."""

    def __init__(self, side: int = 4, views: int = 5, detectors: int = 6, blind: bool = True) -> None:
        self.side, self.shape = side, (views, detectors)
        matrix = torch.rand(views * detectors, side * side, generator=generator(), dtype=F64)
        self.matrix = matrix * (torch.rand(matrix.shape, generator=generator(1)) < 0.5)
        if blind:
            self.matrix[3], self.matrix[:, 5] = 0, 0

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        return (x.flatten(-2) @ self.matrix.T.to(x)).unflatten(-1, self.shape)

    def A_adjoint(self, y: Tensor) -> Tensor:  # noqa: N802
        return (y.flatten(-2) @ self.matrix.to(y)).unflatten(-1, (self.side, self.side))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy(projector: Dense, *batch: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    truth = torch.rand(*batch, projector.side, projector.side, generator=generator(seed), dtype=F64)
    exact = projector.A(truth)
    return truth, exact + 0.1 * torch.randn(exact.shape, generator=generator(seed + 1), dtype=F64)


def error(image: Tensor, truth: Tensor) -> float:
    return float((image - truth).norm() / truth.norm())
