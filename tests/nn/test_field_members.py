"""Members together against each field alone: images, gradients, training, files, copies and types."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from gramian.errors import InputError
from gramian.nn.field import Field, ImageField, Picture, PixelGrid, image
from gramian.nn.field_encodings import FourierFeatures, HashGrid, Sine, coordinates
from gramian.nn.field_members import Members

SIZE = 8
MASK = coordinates(SIZE).norm(dim=-1) < 1.1
MAKERS: dict[str, Callable[..., ImageField]] = {
    "fourier": lambda seed, **more: Field(FourierFeatures(12, 5.0, seed=0), 9, 2, seed=seed, **more),
    "hash": lambda seed, **more: Field(
        HashGrid(3, 2, 2**5, coarsest=2, finest=11, seed=seed), 9, 2, seed=seed, **more
    ),
    "sine": lambda seed, **more: Field(
        sine(seed), 9, 1, activation=partial(Sine, omega=8.0), seed=seed, **more
    ),
    "pixels": lambda seed, **more: pixels(seed),
}


def sine(seed: int) -> Sine:
    found = Sine(2, 10, 10.0, first=True)
    found.initialise_(torch.Generator().manual_seed(seed))
    return found


def pixels(seed: int) -> PixelGrid:
    grid = PixelGrid(SIZE)
    with torch.no_grad():
        grid.logits.add_(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed)))
    return grid


def fields(name: str, count: int, **more: float) -> list[ImageField]:
    return [MAKERS[name](seed, **more) for seed in range(count)]


def energy(picture: Tensor) -> Tensor:
    """Something of an image that no pixel has alone."""
    return (picture.mean((-2, -1)) - 0.1).square() + picture.diff(dim=-1).square().mean((-2, -1))


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", MAKERS)
def test_images_and_gradients_are_those_of_each_field_alone(
    name: str, count: int, chunk: int | None, mask: Tensor | None
) -> None:
    alone = [field.double() for field in fields(name, count)]
    members = Members(alone, SIZE, blocks=(1, 2), mask=mask, chunk=chunk)
    assert (len(members), members.blocks) == (count, (1, 2))
    for block in (1, 2):
        found = members(block)
        wanted = torch.stack([image(one, SIZE, block=block, mask=mask) for one in alone])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        slopes = torch.autograd.grad(energy(found).sum(), list(members.state.values()))
        for slope, key in zip(slopes, members.state, strict=True):
            own = [one.get_parameter(key) for one in alone]
            each = torch.autograd.grad(energy(wanted).sum(), own, retain_graph=True)
            torch.testing.assert_close(slope, torch.stack(each), rtol=1e-9, atol=1e-13)
    if count > 1:
        assert (found[0] - found[1]).abs().max() > 1e-5  # control


def test_no_member_sees_another() -> None:
    members = Members(fields("hash", 3), SIZE)
    slopes = torch.autograd.grad(energy(members()[1]), list(members.state.values()))
    assert all((slope[[0, 2]] == 0).all() for slope in slopes)
    assert all((slope[1] != 0).any() for slope in slopes)


@pytest.mark.parametrize("name", MAKERS)
def test_five_trained_together_are_five_trained_alone(name: str) -> None:
    """Step by step, but for the factor that the mean over members puts on the gradient of each."""
    alone = [field.double() for field in fields(name, 5)]
    members = Members(alone, SIZE, blocks=(1, 2), mask=MASK)
    start = members().detach()
    pictures = {block: [Picture(field, SIZE, block=block, mask=MASK) for field in alone] for block in (1, 2)}
    together = torch.optim.SGD(members.parameters(), 0.5)
    each = [torch.optim.SGD(field.parameters(), 0.1) for field in alone]
    for step in range(12):
        block = 2 if step < 5 else 1
        together.zero_grad()
        energy(members(block)).mean().backward()
        together.step()
        for picture, optimiser in zip(pictures[block], each, strict=True):
            optimiser.zero_grad()
            energy(picture()).backward()
            optimiser.step()
        for key, value in members.state.items():
            wanted = torch.stack([field.get_parameter(key) for field in alone])
            torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12)
    assert (members() - start).abs().max() > 1e-4  # control: something was learned


@pytest.mark.parametrize("count", [1, 3])
def test_dropout_follows_train_and_eval(count: int) -> None:
    members = Members(fields("fourier", count, dropout=0.5), SIZE, blocks=(1, 2))
    torch.manual_seed(0)
    for block in (1, 2):
        assert members.train() is members
        assert not torch.equal(members(block), members(block))
        assert members.eval() is members
        assert torch.equal(members(block), members(block))
    wanted = [image(one.eval(), SIZE) for one in fields("fourier", count, dropout=0.5)]
    torch.testing.assert_close(members(), torch.stack(wanted), rtol=0, atol=1e-6)
    assert not members.picture().training
    assert members.train().picture().training


def test_masks_of_members_differ() -> None:
    twins = [MAKERS["fourier"](0, dropout=0.5) for _ in range(2)]
    members = Members(twins, SIZE)
    torch.manual_seed(0)
    assert (members()[0] - members()[1]).abs().max() > 0.01
    one, other = members.eval()()
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk", [None, 7])
def test_dropout_draws_the_same_masks_again_in_the_backward_pass(chunk: int | None) -> None:
    members = Members(fields("hash", 3, dropout=0.5), SIZE, chunk=chunk).double()
    weight = members.state["readout.weight"]
    direction = torch.linspace(-1, 1, weight.numel(), dtype=torch.float64).view_as(weight)

    def slope(step: float) -> tuple[float, Tensor]:
        with torch.no_grad():
            weight.copy_(start + step * direction)
        torch.manual_seed(3)
        value = energy(members()).sum()
        return value.item(), torch.autograd.grad(value, weight)[0]

    start = weight.detach().clone()
    found = slope(0.0)[1]
    numeric = (slope(1e-6)[0] - slope(-1e-6)[0]) / 2e-6
    assert (found * direction).sum().item() == pytest.approx(numeric, rel=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_the_picture_of_a_member_is_its_own(name: str) -> None:
    alone = fields(name, 3)
    members = Members(alone, SIZE, blocks=(2, 1), mask=MASK)
    with torch.no_grad():
        for value in members.stacked.values():
            value.mul_(1.5)
    images = members().detach()
    for number in range(3):
        picture = members.picture(number)
        torch.testing.assert_close(picture(), images[number], rtol=0, atol=1e-6)
        assert all(parameter.requires_grad and parameter.is_leaf for parameter in picture.parameters())
        energy(picture()).backward()
        torch.optim.SGD(picture.parameters(), 1.0).step()
    assert torch.equal(members(), images)
    assert all(value.grad is None for value in members.parameters())


@pytest.mark.parametrize("name", MAKERS)
def test_states_go_through_files_and_copies(name: str) -> None:
    members, other = (Members(made, SIZE) for made in (fields(name, 3), fields(name, 6)[3:]))
    wanted = members()
    assert not torch.equal(other(), wanted)
    assert set(members.state_dict()) == {f"stacked.{key.replace('.', '/')}" for key in members.state}
    twin = copy.deepcopy(members)
    other.load_state_dict(load(save({key: value.detach() for key, value in members.state_dict().items()})))
    with torch.no_grad():
        for value in members.parameters():
            value.add_(1)
    for each in (twin, other):
        assert torch.equal(each(), wanted)
    assert not torch.equal(members(), wanted)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Members(fields(name, 2), SIZE).load_state_dict(other.state_dict())


def test_a_copy_has_coordinates_and_dropout_of_its_own() -> None:
    members = Members(fields("fourier", 2, dropout=0.5), SIZE)
    twin = copy.deepcopy(members).double().eval()
    assert members().dtype == torch.float32
    assert twin().dtype == torch.float64
    assert members.training
    assert not torch.equal(members(), members())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("count", [1, 3])
def test_types_and_devices_reach_what_is_kept(name: str, count: int) -> None:
    alone = fields(name, count)
    members = Members(alone, SIZE, blocks=(1, 2), mask=MASK)
    single = members(2).detach()
    assert members.double() is members
    for block in (1, 2):
        assert members(block).dtype == torch.float64
    torch.testing.assert_close(members(2).float(), single)
    picture = members.to("meta").picture()
    held = (*members.parameters(), *picture.parameters(), *picture.buffers())
    assert {value.device.type for value in held} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MAKERS)
def test_cuda_equals_cpu(name: str) -> None:
    here, there = (Members(fields(name, 3), SIZE, blocks=(1, 2), mask=MASK).double() for _ in range(2))
    there.to("cuda")
    for block in (1, 2):
        torch.testing.assert_close(there(block).cpu(), here(block))
        slopes = [
            torch.autograd.grad(energy(each(block)).sum(), list(each.state.values()))
            for each in (here, there)
        ]
        for one, other in zip(*slopes, strict=True):
            torch.testing.assert_close(one, other.cpu())


def test_reduced_precision_stays_close() -> None:
    members = Members(fields("hash", 3), SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        found = members()
    assert found.dtype == torch.float32
    assert 0 < (found - members()).abs().max() < 5e-3


def test_parameters_are_told_by_their_names() -> None:
    members = Members(fields("hash", 2), SIZE)
    assert list(members.state) == [name for name, _ in fields("hash", 1)[0].named_parameters()]
    assert all(len(value) == 2 for value in members.state.values())
    given = fields("hash", 2)
    Members(given, SIZE).state["readout.bias"].data.fill_(7.0)
    assert all((field.readout.bias != 7).all() for field in given)  # the fields keep theirs


def test_bad_input() -> None:
    members = Members(fields("hash", 2), SIZE, blocks=(1, 2))
    for call, words in (
        (lambda: Members([], SIZE), "at least one"),
        (lambda: Members([*fields("hash", 1), *fields("fourier", 1)], SIZE), "fields of one architecture"),
        (lambda: Members([PixelGrid(8), PixelGrid(9)], SIZE), "fields of one architecture"),
        (lambda: members(4), r"blocks of \[1, 2\] pixels, not of 4"),
        (lambda: members.picture(2), "members 0 to 1, not 2"),
        (lambda: members.picture(-1), "members 0 to 1, not -1"),
        (lambda: Members(fields("hash", 2), SIZE, blocks=(3,)), "blocks of 3 pixels do not divide"),
        (lambda: Members(fields("hash", 2), SIZE, chunk=0), "at least one pixel"),
        (lambda: Members(fields("hash", 2), SIZE, mask=torch.zeros(SIZE, SIZE)), "a mask is boolean"),
    ):
        with pytest.raises(InputError, match=words):
            call()
