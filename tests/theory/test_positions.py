import math
from itertools import product

import pytest
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.theory.duals import dual
from gramian.theory.maps import (
    Activation,
    AveragePool,
    Convolution,
    Dense,
    Flatten,
    GlobalPool,
    Mixing,
    Serial,
    signal,
)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def offsets(width: int) -> range:
    return range(-((width - 1) // 2), width // 2 + 1)


def window_mean(k: Tensor, size: tuple[int, ...], padding: str, stride: int) -> Tensor:
    """The mean over common offsets for k of shape (*space, *space), by loops over positions and offsets."""
    axes, space = len(size), k.shape[: len(size)]
    out = k.new_zeros([-(-length // stride) for length in space] * 2)
    for place in product(*(range(length) for length in out.shape)):
        for offset in product(*(offsets(width) for width in size)):
            at = [place[i] * stride + offset[i % axes] for i in range(2 * axes)]
            if padding == "circular":
                at = [i % space[j % axes] for j, i in enumerate(at)]
            if all(0 <= i < space[j % axes] for j, i in enumerate(at)):
                out[place] += k[tuple(at)] / math.prod(size)
    return out


CONVOLUTIONS = [
    ((5,), (3,), "circular", 1),
    ((5,), (3,), "zeros", 1),
    ((6,), (2,), "zeros", 1),
    ((5,), (4,), "circular", 2),
    ((3,), (5,), "circular", 1),
    ((2,), (5,), "zeros", 1),
    ((3, 4), (3, 3), "circular", 1),
    ((3, 4), (3, 2), "zeros", 1),
    ((4, 3), (3, 1), "zeros", 2),
]


@pytest.mark.parametrize(("space", "size", "padding", "stride"), CONVOLUTIONS)
def test_convolution_equals_the_loops_over_positions(space, size, padding, stride):
    """Moments, tangent, variances and blocks: of all pairs, and of the same positions among them."""
    x, y = draws(3, *space, 2), draws(2, *space, 2, seed=1)
    count = math.prod(space)
    convolution = Convolution(size, 1.3, 0.4, padding, stride)
    pairs = signal(x, y, positions="all")
    theta = draws(*pairs.activation.cross.shape, seed=2)
    out = convolution(pairs.with_tangent(theta))
    for i, j in product(range(3), range(2)):
        rows, columns = slice(i * count, (i + 1) * count), slice(j * count, (j + 1) * count)
        mean = window_mean(pairs.activation.cross[rows, columns].view(*space, *space), size, padding, stride)
        tangent = window_mean(theta[rows, columns].view(*space, *space), size, padding, stride)
        after = mean.shape[: len(size)]
        assert out.space == tuple(after)
        p = math.prod(after)
        rows, columns = slice(i * p, (i + 1) * p), slice(j * p, (j + 1) * p)
        expected = 1.3**2 * mean.reshape(p, p) + 0.4**2
        torch.testing.assert_close(out.activation.cross[rows, columns], expected)
        torch.testing.assert_close(out.tangent[rows, columns], expected + 1.3**2 * tangent.reshape(p, p))
    own = window_mean(pairs.within[0][1].view(*space, *space), size, padding, stride).reshape(p, p)
    torch.testing.assert_close(out.within[0][1], 1.3**2 * own + 0.4**2)
    torch.testing.assert_close(out.activation.left[p : 2 * p], out.within[0][1].diagonal())
    torch.testing.assert_close(out.activation.right, out.within[1].diagonal(dim1=1, dim2=2).flatten())

    same = signal(x, y, positions="same")
    among = theta.view(3, count, 2, count).diagonal(dim1=1, dim2=3)  # (n, m, P)
    out_same = convolution(same.with_tangent(among.movedim(-1, 0).reshape(*space, 3, 2)))
    for wanted, mine in (
        (out.activation.cross, out_same.activation.cross),
        (out.tangent, out_same.tangent),
    ):
        diagonal = wanted.view(3, p, 2, p).diagonal(dim1=1, dim2=3).movedim(-1, 0)
        torch.testing.assert_close(mine.reshape(p, 3, 2), diagonal)
    torch.testing.assert_close(out_same.activation.left.reshape(p, 3).mT.flatten(), out.activation.left)
    if max(size) > 1:  # control: the other padding is another network
        other = {"circular": "zeros", "zeros": "circular"}[padding]
        wrong = Convolution(size, 1.3, 0.4, other, stride)(pairs)
        assert not torch.allclose(wrong.activation.cross, out.activation.cross)


@pytest.mark.parametrize(
    ("space", "size", "padding", "stride"), [c for c in CONVOLUTIONS if all(width % 2 for width in c[1])]
)
def test_convolution_fits_the_layer(space, size, padding, stride):
    """A sampled torch layer of many channels has these moments."""
    channels, x = 20_000, draws(2, *space, 3)
    weight = draws(channels, 3, *size, seed=1) * 1.2 / math.sqrt(3 * math.prod(size))
    images = x.movedim(-1, 1)
    reach = [width // 2 for width in size]
    if padding == "circular":
        for axis, r in enumerate(reach):
            wrapped = torch.arange(-r, space[axis] + r) % space[axis]
            images, reach[axis] = images.index_select(2 + axis, wrapped), 0
    layer = torch.nn.functional.conv1d if len(size) == 1 else torch.nn.functional.conv2d
    z = layer(images, weight, stride=stride, padding=reach).movedim(1, -1)
    mine = Convolution(size, 1.2, 0.0, padding, stride)(signal(x, positions="all"))
    z = z.flatten(0, -2)
    sampled = z @ z.T / channels
    scale = mine.activation.cross.diagonal().max()
    assert (sampled - mine.activation.cross).abs().max() < 0.05 * scale


def test_pools_by_their_definition():
    """Each mean over pairs of positions by a matrix that pools one side."""
    x, y = draws(3, 4, 6, 2), draws(2, 4, 6, 2, seed=1)
    first = signal(x, y, positions="all")
    first = first.with_tangent(draws(*first.activation.cross.shape, seed=2))
    pool = torch.kron(
        torch.kron(torch.eye(2), torch.full((1, 2), 1 / 2)),
        torch.kron(torch.eye(2), torch.full((1, 3), 1 / 3)),
    ).double()
    for mapped, matrix in (
        (AveragePool((2, 3))(first), pool),
        (GlobalPool()(first), torch.full((1, 24), 1 / 24, dtype=torch.float64)),
    ):
        for mine, before in (
            (mapped.activation.cross, first.activation.cross),
            (mapped.tangent, first.tangent),
        ):
            blocks = matrix @ before.view(3, 24, 2, 24).transpose(1, 2) @ matrix.T
            torch.testing.assert_close(mine, blocks.transpose(1, 2).reshape(mine.shape))
        own = matrix @ first.within[0] @ matrix.T
        torch.testing.assert_close(mapped.activation.left, own.diagonal(dim1=1, dim2=2).flatten())
    assert GlobalPool()(first).space == ()
    assert GlobalPool()(first).within is None
    assert AveragePool((2, 3))(first).space == (2, 2)


def test_flatten_is_the_mean_over_positions_of_either_layout():
    x, y = draws(3, 4, 2, 5), draws(2, 4, 2, 5, seed=1)
    expected = signal(x.flatten(1), y.flatten(1))
    for positions in ("same", "all"):
        first = signal(x, y, positions=positions)
        theta = draws(*first.activation.cross.shape, seed=2)
        out = Flatten()(first.with_tangent(theta))
        assert out.space == ()
        torch.testing.assert_close(out.activation.cross, expected.activation.cross)
        torch.testing.assert_close(out.activation.left, expected.activation.left)
        torch.testing.assert_close(out.activation.right, expected.activation.right)
        if positions == "same":
            torch.testing.assert_close(out.tangent, theta.mean((0, 1)))
        else:
            torch.testing.assert_close(out.tangent, theta.view(3, 8, 2, 8).diagonal(dim1=1, dim2=3).mean(-1))
    flat = signal(x.flatten(1))
    assert Flatten()(flat) is flat


def test_mixing_of_inputs_is_the_mixing_of_tokens():
    x, y, matrix = draws(3, 5, 4), draws(2, 5, 4, seed=1), draws(5, 5, seed=3)
    first = signal(x, y, positions="all")
    theta = draws(15, 10, seed=2)
    out = Mixing(matrix)(first.with_tangent(theta))
    mixed = signal(matrix @ x, matrix @ y, positions="all")
    for name in ("cross", "left", "right"):
        torch.testing.assert_close(getattr(out.activation, name), getattr(mixed.activation, name))
    torch.testing.assert_close(out.within, mixed.within)
    block = matrix @ theta.view(3, 5, 2, 5)[2, :, 1] @ matrix.T
    torch.testing.assert_close(out.tangent.view(3, 5, 2, 5)[2, :, 1], block)
    transposed = Mixing(matrix.T)(first)  # control
    assert not torch.allclose(transposed.activation.cross, out.activation.cross)
    alone = Mixing(matrix)(signal(x, positions="all"))
    torch.testing.assert_close(alone.activation.left, out.activation.left)
    assert alone.symmetric


def test_rectangles_are_the_blocks_of_the_square():
    """Variances after pooling and mixing are those of each input alone, whichever set it is compared with."""
    x, y = draws(3, 4, 4, 2), draws(2, 4, 4, 2, seed=1)
    relu, convolution = Activation(dual("relu")), Convolution((3, 3), 1.2, 0.1, "zeros")
    network = Serial(
        convolution, relu, AveragePool((2, 2)), relu, convolution, relu, GlobalPool(), Dense(1.0)
    )
    square, rectangle = (
        network(signal(torch.cat((x, y)), positions="all")),
        network(signal(x, y, positions="all")),
    )
    for whole, part in (
        (square.activation.cross, rectangle.activation.cross),
        (square.tangent, rectangle.tangent),
    ):
        torch.testing.assert_close(whole[:3, 3:], part, rtol=1e-12, atol=1e-14)


def test_bad_input_is_named():
    vectors, same = signal(draws(2, 4)), signal(draws(2, 4, 6, 1), positions="same")
    pairs = signal(draws(2, 4, 6, 1), positions="all")
    for mapping in (AveragePool((2, 2)), GlobalPool()):
        with pytest.raises(InputError, match="all pairs"):
            mapping(same)
    with pytest.raises(InputError, match="all pairs"):
        Mixing(torch.eye(4))(signal(draws(2, 4, 1), positions="same"))
    for mapping in (GlobalPool(), AveragePool((2,)), Convolution((3,), 1.0), Mixing(torch.eye(4))):
        with pytest.raises(InputError, match="needs some"):
            mapping(vectors)
    with pytest.raises(InputError, match="divide"):
        AveragePool((3, 2))(pairs)
    with pytest.raises(InputError, match="window"):
        Convolution((3,), 1.0)(pairs)
    with pytest.raises(InputError, match="4 tokens"):
        Mixing(torch.eye(4))(signal(draws(2, 5, 1), positions="all"))
