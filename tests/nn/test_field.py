"""Fields against loops by hand, and pictures of them: in chunks, under a mask, kept, coarse, many at once."""

import copy
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from gramian.bayes.dropout import DropoutConfig, fit_dropout
from gramian.core.jacobian import function, jacobian_gram
from gramian.errors import InputError
from gramian.nn.field import Field, ImageField, Picture, PixelGrid, image, padded
from gramian.nn.field_encodings import (
    Encoding,
    FourierFeatures,
    HashGrid,
    OctaveFeatures,
    Sine,
    coordinates,
)
from gramian.nn.init import initialise_

ENCODINGS = {
    "identity": Encoding,
    "fourier": partial(FourierFeatures, 12, 5.0, 0),
    "octaves": partial(OctaveFeatures, 3),
    "sine": partial(Sine, 2, 10, 10.0, first=True),
    "hash": partial(HashGrid, 3, 2, 2**5, coarsest=2, finest=11, seed=0),
}


def field(encoding: str = "fourier", seed: int = 0, **options) -> Field:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Field(ENCODINGS[encoding](), 9, 2, seed=seed, **options)


def gradient(picture: nn.Module, of: nn.Module) -> list[Tensor]:
    weights = torch.linspace(-1, 2, picture().numel()).reshape(picture().shape)
    return list(torch.autograd.grad((picture() * weights).sum(), list(of.parameters())))


@pytest.mark.parametrize(("width", "depth", "count"), [(280, 5, 597_241), (200, 4, 306_401)])
def test_the_published_networks_have_the_published_size(width: int, depth: int, count: int) -> None:
    module = Field(FourierFeatures(), width, depth)
    assert sum(parameter.numel() for parameter in module.parameters()) == count
    assert sum(isinstance(part, nn.Linear) for part in module.modules()) == depth + 2
    assert module.encoding.outputs == 726


def test_the_network_by_hand() -> None:
    module, x = field().double(), coordinates((3, 4), dtype=torch.float64)
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    maps = [(state[n], state[n.replace("weight", "bias")]) for n in state if n.endswith("weight")]
    assert len(maps) == 4
    for place in np.ndindex(3, 4):
        phase = state["encoding.frequencies"] @ x[place].numpy() + np.pi / 4
        h = np.concatenate((np.sin(phase), np.cos(phase)))
        for weight, bias in maps[:-1]:
            z = weight @ h + bias
            h = z / (1 + np.exp(-z))
        wanted = 1 / (1 + np.exp(-(maps[-1][0] @ h + maps[-1][1])))
        assert module(x)[place].item() == pytest.approx(wanted.item(), abs=1e-12)


def test_weights_start_as_stated() -> None:
    layer = Field(FourierFeatures(), 280, 5, seed=0).layers[0][0]
    assert layer.weight.std().item() == pytest.approx(726**-0.5, rel=0.01)
    assert float(layer.weight.detach().abs().max()) > 4 * 726**-0.5  # normal, not uniform
    assert 0.95 * 726**-0.5 < float(layer.bias.detach().abs().max()) <= 726**-0.5


def test_draws_come_from_the_seed_or_from_the_global_generator() -> None:
    def same(one: nn.Module, other: nn.Module) -> bool:
        return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))

    assert same(field(seed=1), field(seed=1))
    assert not same(field(seed=1), field(seed=2))
    assert same(*(initialise_(field(seed=s), 5) for s in (1, 2)))  # the house's way draws B too
    with torch.random.fork_rng(devices=[]):
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(Field(FourierFeatures(4), 5, 1))
    assert same(drawn[0], drawn[1])
    assert not same(drawn[0], drawn[2])


def test_dropout_is_on_every_input_but_the_first_and_in_training_alone() -> None:
    module = field(dropout=0.4)
    seen: dict[str, Tensor] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
    x = coordinates(20)
    torch.manual_seed(0)
    one, again = module(x), module(x)
    assert not torch.equal(one, again)
    zeros = [float((value == 0).float().mean()) for value in seen.values()]
    assert zeros[0] == 0
    assert zeros[1:] == pytest.approx([0.4] * 3, abs=0.05)
    module.eval()
    assert torch.equal(module(x), module(x))
    assert all((value != 0).all() for value in seen.values())
    assert list(module.state_dict()) == list(field().state_dict())  # a rate of 0 has the same names


def test_the_clipped_output_attains_0_and_the_sigmoid_does_not() -> None:
    for output, attains in (("sigmoid", False), ("hard_sigmoid", True)):
        module = field(output=output)
        with torch.no_grad():
            module.readout.weight.mul_(40)
            found = image(module, 16)
        assert bool((found == 0).any()) == attains
        assert found.min() >= 0
        assert found.max() <= 1


def test_a_network_of_sines() -> None:
    module = Field(
        Sine(2, 9, 30.0, first=True), 9, 2, activation=partial(Sine, omega=30.0), output="identity"
    )
    x = coordinates(5)
    h = x
    for part in (module.encoding, *module.layers):
        h = torch.sin(30 * (h @ part.weight.T + part.bias)) if isinstance(part, Sine) else h
    torch.testing.assert_close(module(x), (h @ module.readout.weight.T + module.readout.bias)[..., 0])
    assert sum(isinstance(part, Sine) for part in module.modules()) == 4


def test_a_grid_of_pixels() -> None:
    grid = PixelGrid((5, 7))
    assert grid().shape == (5, 7)
    torch.testing.assert_close(grid(), torch.full((5, 7), 0.26894142))
    with torch.no_grad():
        grid.logits.copy_(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(image(grid, (5, 7)), grid(), rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient(Picture(grid, (5, 7)), grid), gradient(grid, grid), rtol=0, atol=1e-5)
    middle = grid(torch.tensor([[-0.75, -1.0]]))  # half-way between the first pixels of two rows
    torch.testing.assert_close(middle, torch.sigmoid(grid.logits[:2, :1].mean(0)))
    initialise_(grid, 0)
    assert (grid.logits == -1).all()


@pytest.mark.parametrize("name", [*ENCODINGS, "pixels"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("chunk", [None, 7, 1000])
def test_kept_and_in_chunks_it_is_the_same_picture(name: str, keep: bool, chunk: int | None) -> None:
    module: ImageField = PixelGrid((5, 6)) if name == "pixels" else field(name)
    wanted = module(coordinates((8, 6)))
    picture = Picture(module, (8, 6), keep=keep, chunk=chunk)
    torch.testing.assert_close(picture(), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        gradient(picture, module), gradient(Picture(module, (8, 6), keep=False), module), rtol=1e-4, atol=1e-5
    )
    with torch.no_grad():
        torch.testing.assert_close(picture(), wanted, rtol=0, atol=1e-6)
    assert set(picture.state_dict()) == {f"field.{key}" for key in module.state_dict()}


def test_a_picture_follows_its_fields_parameters_but_not_its_frequencies() -> None:
    module = field()
    kept, fresh = Picture(module, 6), Picture(module, 6, keep=False)
    with torch.no_grad():
        module.layers[0][0].weight.mul_(2)
    torch.testing.assert_close(kept(), fresh())
    initialise_(module.encoding, 9)
    assert (kept() - fresh()).abs().max() > 1e-3


def test_chunks_store_less_than_the_whole() -> None:
    def stored(chunk: int | None) -> int:
        numbers = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal numbers
            numbers += tensor.numel()
            return tensor

        picture = Picture(field(), 32, chunk=chunk, keep=False)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            picture()
        return numbers

    assert stored(64) < 0.1 * stored(None)


def test_dropout_draws_the_same_masks_again_in_the_backward_pass() -> None:
    """The gradient through a recomputed chunk is the derivative of the value that was returned."""
    module = field(dropout=0.5).double()
    picture = Picture(module, 6, chunk=9)
    weight = module.readout.weight
    direction = torch.linspace(-1, 1, weight.numel(), dtype=torch.float64)

    def value(step: float) -> Tensor:
        torch.manual_seed(3)
        with torch.no_grad():
            weight.add_(step * direction)
        try:
            return picture().sum()
        finally:
            with torch.no_grad():
                weight.sub_(step * direction)

    start = value(0.0)
    (slope,) = torch.autograd.grad(start, weight)
    numeric = (value(1e-5) - value(-1e-5)).item() / 2e-5
    assert (slope * direction).sum().item() == pytest.approx(numeric, rel=1e-6)


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("name", [*ENCODINGS, "pixels"])
def test_under_a_mask_it_is_the_same_inside_and_zero_outside(name: str, chunk: int | None) -> None:
    module: ImageField = PixelGrid(8) if name == "pixels" else field(name)
    mask = coordinates(8).norm(dim=-1) < 0.8
    found = image(module, 8, mask=mask, chunk=chunk)
    torch.testing.assert_close(found[mask], image(module, 8)[mask], rtol=0, atol=1e-6)
    assert (found[~mask] == 0).all()
    assert (image(module, 8)[~mask] != 0).all()  # control
    assert len(Picture(module, 8, mask=mask).get_buffer("prepared_0")) == int(mask.sum()) < 64


def test_coarse_pictures_are_means_of_fine_ones_where_the_field_is_linear() -> None:
    module = Field(Encoding(), 4, 0, activation="identity", output="identity", seed=0).double()
    pooled = torch.nn.functional.avg_pool2d(image(module, 12)[None], 4)[0]
    torch.testing.assert_close(image(module, 12, block=4), pooled, rtol=0, atol=1e-12)
    assert (image(module, 3) - pooled).abs().max() > 0.01  # control: the grid of a small image is not theirs
    smooth = Field(FourierFeatures(30, 1.0, seed=0), 20, 1, seed=0).double()
    gaps = []
    for size in (16, 64):  # and to second order in the size of a pixel elsewhere
        pooled = torch.nn.functional.avg_pool2d(image(smooth, size)[None], 2)[0]
        gaps.append((image(smooth, size, block=2) - pooled).abs().max().item())
    assert 12 < gaps[0] / gaps[1] < 24


def test_a_fine_mask_covers_every_block_that_it_touches() -> None:
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[0, 0] = mask[4, 3] = True
    found = image(field(), 6, block=2, mask=mask)
    assert found.nonzero().tolist() == [[0, 0], [2, 1]]


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("name", [*ENCODINGS])
def test_members_in_one_call_are_those_one_by_one(name: str, chunk: int | None) -> None:
    fields = [field(name, seed) for seed in range(3)]
    parameters, buffers = stack_module_state(fields)  # type: ignore[arg-type]
    mask = coordinates(6).norm(dim=-1) < 1.2
    for keep in (True, False):
        picture = Picture(fields[0], 6, mask=mask, chunk=chunk, keep=keep)
        found = picture.members(parameters, None if keep else buffers)
        wanted = torch.stack([image(one, 6, mask=mask) for one in fields])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        slopes = torch.autograd.grad(found.square().sum(), list(parameters.values()))
        for slope, key in zip(slopes, parameters, strict=True):
            for one, row in zip(fields, slope, strict=True):
                (alone,) = torch.autograd.grad(
                    image(one, 6, mask=mask).square().sum(), [one.get_parameter(key)]
                )
                torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-4


@pytest.mark.parametrize("chunk", [None, 10])
def test_members_with_frequencies_and_dropout_of_their_own(chunk: int | None) -> None:
    fields = [initialise_(field(dropout=0.3), seed) for seed in range(2)]
    parameters, buffers = stack_module_state(fields)  # type: ignore[arg-type]
    picture = Picture(fields[0], 6, keep=False, chunk=chunk)
    torch.manual_seed(0)
    assert not torch.equal(picture.members(parameters, buffers), picture.members(parameters, buffers))
    twins = {name: value[:1].expand_as(value) for name, value in parameters.items()}
    alike = {name: value[:1].expand_as(value) for name, value in buffers.items()}
    one, other = picture.members(twins, alike)
    assert (one - other).abs().max() > 0.01
    one, other = picture.members(twins, alike, randomness="same")
    torch.testing.assert_close(one, other)
    picture.eval()
    wanted = torch.stack([image(member.eval(), 6) for member in fields])  # type: ignore[arg-type]
    torch.testing.assert_close(picture.members(parameters, buffers), wanted, rtol=0, atol=1e-6)
    mixed = picture.members(parameters)  # control: all with the frequencies of the first
    assert (mixed[1] - wanted[1]).abs().max() > 0.01


COMPILED = """
import torch
from gramian.nn.field import Field, Picture, PixelGrid
from gramian.nn.field_encodings import *
torch.manual_seed(0)
encodings = Encoding(), FourierFeatures(8), OctaveFeatures(), Sine(2, 8, first=True), HashGrid(3, 2, 32)
for module in (*(Field(encoding, 9, 2) for encoding in encodings), PixelGrid(6)):
    for keep in (True, False):
        picture = Picture(module, 6, mask=coordinates(6).norm(dim=-1) < 1, keep=keep)
        compiled = torch.compile(picture, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), picture(), rtol=0, atol=1e-6)
        losses = [f().square().sum() for f in (compiled, picture)]
        slopes = [torch.autograd.grad(loss, [*module.parameters()]) for loss in losses]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)
        torch.compiler.reset()
print("whole")
"""


@pytest.mark.slow
def test_compiled_it_is_the_same_picture() -> None:
    """In a process without the annotation checks of the tests."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


@pytest.mark.parametrize("name", [*ENCODINGS])
def test_reduced_precision_stays_close_and_returns_full_precision(name: str) -> None:
    module = field(name)
    for keep in (True, False):
        picture = Picture(module, 16, keep=keep)
        with torch.autocast("cpu", torch.bfloat16):
            found = picture()
        assert found.dtype == torch.float32
        found.sum().backward()
        difference = (found - picture()).abs().max().item()
        assert difference < 5e-3
        assert difference > 0
    assert image(copy.deepcopy(module).double(), 4).dtype == torch.float64


def test_it_is_a_function_of_its_parameters_to_the_rest_of_the_library() -> None:
    module, x = field().double(), coordinates(3, dtype=torch.float64).flatten(0, 1)
    kernel = jacobian_gram(function(module), x)[:, 0, :, 0]
    slopes = [torch.autograd.grad(module(x)[row], list(module.parameters())) for row in range(9)]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in slopes])
    torch.testing.assert_close(kernel, jacobian @ jacobian.T, rtol=1e-10, atol=1e-12)
    data = module(x).detach().float()
    config = DropoutConfig(steps=2, samples=3)
    assert fit_dropout(lambda: field(dropout=0.2), x.float(), data, config).predict(x.float()).mean.shape == (
        9,
    )


def test_padding() -> None:
    x = torch.ones(2, 3, 4)
    found = padded(x, 2)
    assert found.shape == (2, 7, 8)
    assert torch.equal(found[:, 2:-2, 2:-2], x)
    assert found.sum() == x.sum()
    assert torch.equal(padded(x, 0), x)


def test_bad_input() -> None:
    module = field()
    parameters, buffers = stack_module_state([module])  # type: ignore[arg-type]
    whole = torch.ones(6, 6, dtype=torch.bool)
    for call, words in (
        (lambda: Field(Encoding(), 0), "width from 1 and a depth from 0, got 0 and 5"),
        (lambda: Field(Encoding(), 4, -1), "depth from 0"),
        (lambda: Field(Encoding(), dropout=1.0), "rate of dropout"),
        (lambda: Field(Encoding(), activation="cube"), "unknown activation 'cube'"),
        (lambda: Field(Encoding(), output="exp"), "unknown output 'exp'; choose one of sigmoid"),
        (lambda: PixelGrid(1), "at least 2 pixels"),
        (lambda: PixelGrid(4, start=float("nan")), "start finite"),
        (lambda: PixelGrid(4, output="exp"), "unknown output"),
        (lambda: module(torch.zeros(4, 2).long()), "coordinates are floats .*got .4, 2. of torch.int64"),
        (lambda: module(torch.zeros(4, 3)), "coordinates are floats"),
        (lambda: PixelGrid(4)(torch.zeros(3)), "coordinates are floats"),
        (lambda: Picture(module, 6, chunk=0), "at least one pixel, got 0"),
        (lambda: Picture(module, 6, block=4), "do not divide an image of 6 × 6"),
        (lambda: Picture(module, 6, mask=whole[:5]), "a mask is boolean, 6 × 6 and True somewhere, got"),
        (lambda: Picture(module, 6, mask=whole.float()), "of torch.float32"),
        (lambda: Picture(module, 6, mask=~whole), "True somewhere"),
        (lambda: Picture(module, 6).members(parameters, buffers), "keep=False"),
        (lambda: padded(torch.ones(2, 2), -1), "cannot be negative, got -1"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_chunks_have_the_gradient_of_borrowed_parameters() -> None:
    """Called by other parameters than its own, a picture in chunks has their gradient and not its own's."""
    fields = [Field(OctaveFeatures(2), 8, 1, seed=seed) for seed in (0, 1)]
    borrowed = {f"field.{name}": value for name, value in fields[1].named_parameters()}
    gradients = []
    for chunk in (None, 7):
        image = functional_call(Picture(fields[0], 6, chunk=chunk), borrowed, ())
        gradients.append(torch.autograd.grad(image.square().sum(), list(borrowed.values())))
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole)
