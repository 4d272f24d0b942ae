import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gramian.errors import InputError
from gramian.nn.penalty import ActivationPenalty, blocks_of, penalised, penalty
from gramian.nn.transformer import Transformer, TransformerConfig, build

CONFIG = TransformerConfig(vocabulary=29, context=16, width=12, depth=3, heads=3)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(29, shape, generator=torch.Generator().manual_seed(seed))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def model_of(**more: object) -> Transformer:
    return build(replace(CONFIG, **more), seed=0).double().train()


def written_out(outputs: list[Tensor], threshold: float, power: float) -> Tensor:
    """The mean over layers of means over entries, one by one."""
    layers = []
    for output in outputs:
        terms = [(abs(entry) / (threshold + 1e-6)) ** power for entry in output.flatten()]
        layers.append(sum(terms) / len(terms))
    return sum(layers) / len(layers)


def streams(model: Transformer, batch: Tensor) -> list[Tensor]:
    """What the blocks return, without hooks."""
    x, out = model.embedding(batch) + model.positions(torch.arange(batch.shape[1])), []
    for layer in model.blocks:
        x = layer(x)
        out.append(x)
    return out


@pytest.mark.parametrize(("threshold", "power"), [(3.0, 4.0), (0.5, 2.0)])
def test_equals_its_equation_with_gradients(threshold, power) -> None:
    model, batch = model_of(), tokens(2, 7)
    parameters = list(model.parameters())
    got = penalised(loss, 0.7, threshold, power)(model, batch)
    expected = loss(model, batch) + 0.7 * written_out(streams(model, batch), threshold, power)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    ours, theirs = torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    plain = torch.autograd.grad(loss(model, batch), parameters)  # control: the term has a gradient
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(ours, plain, strict=True))
    assert torch.equal(penalised(loss, 0.0)(model, batch), loss(model, batch))


def test_the_penalty_itself() -> None:
    x = torch.tensor([0.0, 3.0, -6.0], dtype=torch.float64, requires_grad=True)
    assert penalty(x, eps=0.0).item() == pytest.approx((0 + 1 + 16) / 3)
    assert penalty(100 * x).item() == pytest.approx(1e8 * penalty(x).item())
    assert penalty(x, power=2.0, eps=0.0).item() == pytest.approx((0 + 1 + 4) / 3)
    assert torch.autograd.gradcheck(penalty, (x,))
    low = torch.full((8,), 1000.0, dtype=torch.float16)
    assert penalty(low).dtype == torch.float32
    assert penalty(low).isfinite()  # the fourth power would overflow
    assert (low**4).isinf().all()


def test_gradient_checkpointing_gives_equal_gradients() -> None:
    batch, gradients = tokens(2, 7), []
    for checkpointing in (False, True):
        model = model_of()
        model.gradient_checkpointing = checkpointing
        calls = []
        handle = model.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        penalised(loss, 5.0)(model, batch).backward()
        handle.remove()
        assert len(calls) == 1 + checkpointing  # control: blocks were indeed computed again
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=1e-14)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_is_refused() -> None:
    model = model_of()
    model.gradient_checkpointing = True
    model._gradient_checkpointing_func = lambda *args: checkpoint(*args, use_reentrant=True)
    with pytest.raises(InputError, match="use_reentrant=False"):
        penalised(loss)(model, tokens(2, 7))
    with torch.no_grad():  # nothing to differentiate: nothing to refuse
        assert penalised(loss)(model, tokens(2, 7)).isfinite()


def test_accumulated_parts_give_the_whole_batch() -> None:
    batch, gradients = tokens(4, 7), []
    for parts in (1, 2, 4):
        model = model_of()
        for part in batch.chunk(parts):
            (penalised(loss, 5.0)(model, part) / parts).backward()
        gradients.append([p.grad for p in model.parameters()])
    for others in gradients[1:]:
        for whole, part in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(part, whole, rtol=0, atol=1e-12)


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model = model_of()

    def failing(model: nn.Module, batch: Tensor) -> Tensor:
        model(batch)
        raise KeyError("batch")

    with pytest.raises(KeyError):
        penalised(failing)(model, tokens(2, 7))
    penalised(loss)(model, tokens(2, 7)).backward()
    assert not any(layer._forward_hooks for layer in model.blocks)
    with ActivationPenalty(model.blocks) as activations:
        assert all(layer._forward_hooks for layer in model.blocks)
        loss(model, tokens(2, 7))
    activations.value()
    with pytest.raises(InputError, match="saw no output"):  # a value is read once
        activations.value()


def test_any_module_of_any_model_with_tuples_and_several_calls() -> None:
    class Tupled(nn.Linear):
        def forward(self, input: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return super().forward(input), None

    layer = Tupled(3, 3).double()
    x, y = torch.ones(2, 3, dtype=torch.float64), 5 * torch.ones(4, 3, dtype=torch.float64)
    with ActivationPenalty([layer], weight=1.0) as activations:
        outputs = [layer(x)[0], layer(y)[0]]
    torch.testing.assert_close(activations.value(), written_out(outputs, 3.0, 4.0))
    wrapped = nn.Sequential(model_of())  # as a parallel wrapper holds it
    assert list(blocks_of(wrapped)) == list(wrapped[0].blocks)
    first = penalised(loss, modules=lambda model: [model.blocks[0]])(model_of(), tokens(2, 7))
    assert first.item() != penalised(loss)(model_of(), tokens(2, 7)).item()


def test_training_with_the_penalty_lowers_the_largest_activation() -> None:
    largest = []
    for weight in (0.0, 1.0):
        model = build(replace(CONFIG, init_std=0.5), seed=0)
        optimiser, wrapped = torch.optim.SGD(model.parameters(), 0.01), penalised(loss, weight)
        for step in range(20):
            optimiser.zero_grad()
            wrapped(model, tokens(4, 12, seed=step)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        with torch.no_grad():
            largest.append(max(x.abs().max().item() for x in streams(model, tokens(4, 12))))
    assert largest[1] < 0.9 * largest[0]


def test_bad_input_is_named() -> None:
    layer = nn.Linear(2, 2)
    for settings in ((-1.0, 3.0, 4.0), (0.1, 0.0, 4.0), (0.1, 3.0, 0.0)):
        with pytest.raises(InputError, match="positive threshold and a positive power"):
            ActivationPenalty([layer], *settings)
    with pytest.raises(InputError, match="at least one module"):
        ActivationPenalty([])
    with pytest.raises(InputError, match="Linear has no list `blocks`"):
        blocks_of(layer)
    with pytest.raises(InputError, match="saw no output"):
        penalised(lambda model, batch: torch.zeros(()))(model_of(), tokens(2, 7))
    assert math.isfinite(penalised(loss)(model_of(), tokens(2, 7)).item())
