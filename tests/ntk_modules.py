"""Modules with every way of using a parameter, and inputs for them: what kernels are compared on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from gramian.nn.residual import Residual, trainable
from gramian.nn.resnet import conv_resnet, dense_resnet
from gramian.nn.transformer import TransformerConfig, build


def rows(n: int, *size: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(n: int, length: int, vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))


class Twice(nn.Module):
    """One layer applied twice, a second layer that shares its weight, and a bias used outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.layer.weight
        self.readout = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(torch.tanh(self.layer(x))))
        return self.readout(torch.tanh(self.tied(x))) + self.readout.bias.square()


class Recurrent(nn.Module):
    """One layer and one norm applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.layer, self.norm = nn.Linear(4, 5), nn.Linear(5, 5), nn.RMSNorm(5)
        self.readout = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        for _ in range(3):
            x = x + torch.tanh(self.layer(self.norm(x)))
        return self.readout(x)


class ByHand(nn.Module):
    """Layers in the NTK parametrisation, written without torch's modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 6))
        self.bias, self.gain = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(1, 3))
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(nn.functional.linear(x, self.first * 0.5) + 0.1 * self.bias)
        return (
            nn.functional.linear(hidden, self.second / 6**0.5) * self.gain
            - hidden[:, :3] @ self.second[:, :3]
        )


class InPlace(nn.Module):
    """Writes into what its layers returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu_()
        return self.second(hidden.tanh()).mul_(0.5).tanh_()


class Transposed(nn.Module):
    """Keeps the batch on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.transpose(0, 1)))
        return self.second(hidden.mean(0))


class Placed(nn.Module):
    """Embeds tokens and their positions, the latter once for all rows."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4, padding_idx=padding)
        self.places, self.start = nn.Embedding(6, 4), nn.Parameter(torch.randn(1, 5, 4))
        self.mixer = nn.MultiheadAttention(4, 2, batch_first=True)
        self.readout = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device))
        hidden = self.tokens(x) + places + self.start[:, : x.shape[1]]
        return self.readout(self.mixer(hidden, hidden, hidden, need_weights=False)[0].mean(1))


class Queried(nn.Module):
    """Hands a parameter to a linear map of torch as its input, and the rows as its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.readout = nn.Parameter(torch.randn(3, 4)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(nn.functional.linear(self.queries, x).T))


class Masked(nn.Module):
    """Reads a parameter only where there is a row of positive sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        self.extra = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden, chosen = torch.tanh(self.first(x)), x.sum(1, keepdim=True) > 0
        if chosen.any():
            hidden = torch.where(chosen, hidden @ self.extra, hidden)
        return self.second(hidden)


class Branching(nn.Module):
    """Sends rows one of two ways by their data."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.ways[int(row.sum() > 0)](row[None]) for row in x])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding="valid", groups=2),
        nn.GroupNorm(3, 6),
        nn.Tanh(),
        nn.InstanceNorm2d(6, affine=True),
        nn.Conv2d(6, 6, 3, padding="same", dilation=2, groups=6, bias=False),
        nn.BatchNorm2d(6).eval(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def residual_net() -> nn.Module:
    branch = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False))
    gained = Residual(branch, skip=trainable(0.9), gain=trainable(0.3))
    return nn.Sequential(nn.Linear(5, 8), gained, nn.LayerNorm(8), nn.Linear(8, 2))


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))
    module[0].weight.requires_grad_(False)
    module[2].bias.requires_grad_(False)
    return module


def transformer(**shape) -> nn.Module:
    settings = {"vocabulary": 7, "width": 8, "depth": 2, "heads": 2, "context": 6, **shape}
    return build(TransformerConfig(**settings), 0)


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Tensor]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)),
        lambda n, seed: rows(n, 5, seed=seed),
    ),
    "positions": (
        lambda: nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 1)),
        lambda n, seed: rows(n, 2, 5, seed=seed),
    ),
    "cnn": (cnn, lambda n, seed: rows(n, 2, 6, 6, seed=seed)),
    "cnn_1d": (
        lambda: conv_resnet(2, 4, 3, nn.ReLU, [0.5, 0.5], dimensions=1, bias_std=0.1),
        lambda n, seed: rows(n, 2, 7, seed=seed),
    ),
    "dense_resnet": (
        lambda: dense_resnet(4, 8, 2, nn.Tanh, [0.5, 0.5], bias_std=0.1, norm=nn.LayerNorm),
        lambda n, seed: rows(n, 4, seed=seed),
    ),
    "residual": (residual_net, lambda n, seed: rows(n, 5, seed=seed)),
    "frozen": (frozen, lambda n, seed: rows(n, 4, seed=seed)),
    "twice": (Twice, lambda n, seed: rows(n, 4, seed=seed)),
    "recurrent": (Recurrent, lambda n, seed: rows(n, 4, seed=seed)),
    "by_hand": (ByHand, lambda n, seed: rows(n, 4, seed=seed)),
    "in_place": (InPlace, lambda n, seed: rows(n, 4, seed=seed)),
    "transposed": (Transposed, lambda n, seed: rows(n, 3, 4, seed=seed)),
    "placed": (Placed, lambda n, seed: tokens(n, 5, 7, seed)),
    "padded": (lambda: Placed(2), lambda n, seed: tokens(n, 5, 7, seed)),
    "queried": (Queried, lambda n, seed: rows(n, 4, seed=seed)),
    "prelu": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 5)),
        lambda n, seed: rows(n, 4, seed=seed),
    ),
    "weight_norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 2)),
        lambda n, seed: rows(n, 4, seed=seed),
    ),
    "masked": (
        Masked,
        lambda n, seed: rows(n, 4, seed=seed).abs() * torch.where(torch.arange(n) < 2, -1, 1)[:, None],
    ),
    "branching": (Branching, lambda n, seed: rows(n, 3, seed=seed)),
    "tied_transformer": (lambda: transformer(depth=1), lambda n, seed: tokens(n, 3, 7, seed)),
    "transformer": (
        lambda: nn.Sequential(transformer(tied=False, block="sas_p"), nn.Flatten(), nn.Linear(21, 2)),
        lambda n, seed: tokens(n, 3, 7, seed),
    ),
}
"""name -> (module, (rows, seed) -> inputs)."""


def make(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODULES[name][0]().double()
