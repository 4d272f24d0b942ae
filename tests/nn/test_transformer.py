"""What every block must keep as a decoder and as an encoder, with all parameters away from their start."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.blocks import BLOCKS
from gramian.nn.transformer import Transformer, TransformerConfig, build

CONFIG = TransformerConfig(vocabulary=29, context=16, width=24, depth=3, heads=4, key_heads=2)
EVERY = [
    pytest.param(name, causal, id=f"{name}-{'causal' if causal else 'masked'}")
    for name in BLOCKS
    for causal in (True, False)
]
every_block = pytest.mark.parametrize(("name", "causal"), EVERY)
every_decoder = pytest.mark.parametrize("name", BLOCKS)


def model_of(name: str, causal: bool = True, dtype: torch.dtype = torch.float64, **more: Any) -> Transformer:
    model = build(replace(CONFIG, block=name, causal=causal, **more), seed=0).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += (0.3 * noise).to(dtype)
    return model.eval()


def tokens_of(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(29, shape, generator=torch.Generator().manual_seed(seed))


@every_block
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_changes_nothing(name, causal, side) -> None:
    model, tokens = model_of(name, causal), tokens_of(3, 9)
    alone = model(tokens)
    places = {"left": range(4, 13), "right": range(9), "between": [0, 1, 4, 5, 6, 9, 10, 12, 13]}[side]
    padded, mask = tokens_of(3, 14, seed=5), torch.zeros(3, 14, dtype=torch.int64)
    padded[:, list(places)], mask[:, list(places)] = tokens, 1
    logits = model(padded, mask)
    torch.testing.assert_close(logits[:, list(places)], alone, rtol=1e-10, atol=1e-10)
    unmasked = model(padded)[:, list(places)]  # control: without the mask the padding is seen
    assert (unmasked - alone).abs().max() > 1e-3 or (side == "right" and causal)


@every_block
def test_a_row_does_not_depend_on_the_others(name, causal) -> None:
    model, tokens = model_of(name, causal), tokens_of(3, 14)
    mask = torch.arange(14) < torch.tensor([[14], [5], [9]])
    together = model(tokens, mask)
    for row, length in enumerate((14, 5, 9)):
        alone = model(tokens[row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1, :length], alone, rtol=1e-10, atol=1e-10)


@every_block
def test_a_row_of_padding_is_finite_in_value_and_gradient(name, causal) -> None:
    model, tokens = model_of(name, causal), tokens_of(2, 7)
    mask = torch.tensor([[1] * 7, [0] * 7])
    logits = model(tokens, mask)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:1], model(tokens[:1]), rtol=1e-10, atol=1e-10)
    logits[0].square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_block
def test_packed_documents_are_as_if_alone(name, causal) -> None:
    model, tokens = model_of(name, causal), tokens_of(2, 13)
    documents = torch.tensor([[0] * 5 + [1] * 6 + [2] + [-1], [-1] * 2 + [3] * 3 + [3] * 4 + [1] * 4])
    packed = model(tokens, documents=documents)
    assert packed.isfinite().all()
    for row in range(2):
        for number in documents[row].unique():
            if number >= 0:
                own = documents[row] == number
                alone = model(tokens[row : row + 1, own])
                torch.testing.assert_close(packed[row : row + 1, own], alone, rtol=1e-10, atol=1e-10)
    assert (packed[0, 5:11] - model(tokens)[0, 5:11]).abs().max() > 1e-3  # control: unpacked they see more


def test_packed_documents_may_fill_more_than_a_context() -> None:
    model, tokens = model_of("sas"), tokens_of(1, 30)
    documents = torch.tensor([[0] * 15 + [1] * 15])
    torch.testing.assert_close(model(tokens, documents=documents)[:, 15:], model(tokens[:, 15:]))
    padded = torch.tensor([[0] * 11 + [-1] * 19])  # padding has no length to fit
    torch.testing.assert_close(model(tokens, documents=padded)[:, :11], model(tokens[:, :11]))
    with pytest.raises(InputError, match="17 tokens exceeds the context of 16"):
        model(tokens, documents=torch.tensor([[0] * 17 + [1] * 13]))


@every_decoder
@pytest.mark.parametrize("sizes", [[11], [1] * 11, [4, 1, 1, 1, 4]], ids=["whole", "steps", "chunks"])
@pytest.mark.parametrize("padded", [False, True])
def test_cached_decoding_equals_the_full_pass(name, sizes, padded) -> None:
    model, tokens = model_of(name), tokens_of(3, 11)
    mask = torch.arange(11) >= torch.tensor([[0], [4], [2]]) if padded else None
    full = model(tokens, mask)
    memory, parts, done = model.memory(), [], 0
    with torch.no_grad():
        for size in sizes:
            seen = None if mask is None else mask[:, : done + size]
            parts.append(model(tokens[:, done : done + size], seen, past=memory))
            done += size
    real = torch.ones(3, 11, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(torch.cat(parts, 1)[real], full[real], rtol=1e-10, atol=1e-10)


@every_decoder
def test_a_cache_can_be_cropped_and_reordered(name) -> None:
    model, tokens, order = model_of(name), tokens_of(3, 8), torch.tensor([2, 0, 2])
    mask = torch.arange(8) >= torch.tensor([[0], [3], [1]])
    memory = model.memory()
    with torch.no_grad():
        model(tokens, mask, past=memory)
        for past in memory:
            past.crop(5)
            past.reorder(order)
        got = model(tokens[order, 5:], mask[order], past=memory)
        expected = model(tokens, mask)[order, 5:]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@every_decoder
def test_causality(name) -> None:
    model, tokens = model_of(name), tokens_of(2, 10)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 29
    before, after = model(tokens), model(changed)
    assert (before[:, :6] == after[:, :6]).all()
    assert (before[:, 6:] != after[:, 6:]).any(-1).all()
    encoder = model_of(name, causal=False)  # control: an encoder sees the change from the first token on
    assert (encoder(tokens)[:, 0] != encoder(changed)[:, 0]).any()


@every_block
def test_gradient_checkpointing_gives_equal_gradients(name, causal) -> None:
    tokens = tokens_of(2, 9)
    mask = torch.arange(9) >= torch.tensor([[0], [3]])
    gradients = []
    for checkpointing in (False, True):
        model = model_of(name, causal).train()
        model.gradient_checkpointing = checkpointing
        with CountBlocks(model) as count:
            model(tokens, mask).square().sum().backward()
        assert count.calls == 3 * (1 + checkpointing)  # control: blocks were indeed computed again
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert plain is None or torch.equal(plain, again)


class CountBlocks:
    """Counts how often the first modules of the blocks run."""

    def __init__(self, model: Transformer) -> None:
        self.calls, self.model = 0, model

    def __enter__(self) -> "CountBlocks":
        self.handles = [layer.register_forward_pre_hook(self._count) for layer in self.model.blocks]
        return self

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


@every_block
def test_bf16_autocast_is_close(name, causal) -> None:
    model = build(replace(CONFIG, block=name, causal=causal), seed=0)
    tokens, mask = tokens_of(2, 9), torch.arange(9) >= torch.tensor([[0], [3]])
    exact = model(tokens, mask)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(tokens, mask)
    error = (low.float() - exact).norm() / exact.norm()
    assert 0 < error < 0.03


COMPILED = """
import sys, torch
from gramian.nn.blocks import BLOCKS
from gramian.nn.transformer import TransformerConfig, build
backend, *names = sys.argv[1:]
for name in names:
    for causal in (True, False):
        torch._dynamo.reset()
        config = TransformerConfig(
            vocabulary=29, context=16, width=24, depth=2, heads=4, key_heads=2, block=name, causal=causal
        )
        model = build(config, seed=0)
        tokens = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(1))
        mask = torch.arange(9) >= torch.tensor([[0], [3]])
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for more in ((), (mask,)):
            torch.testing.assert_close(compiled(tokens, *more), model(tokens, *more), rtol=1e-4, atol=1e-5)
            compiled(tokens, *more).square().sum().backward()
        print(name, causal, "whole")
"""


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        pytest.param(
            "eager",
            ["pre_norm", "sas", "sas_p", "u_spa", "e_spa", "shaped"],
            id="traced",
            marks=pytest.mark.slow,
        ),
        pytest.param("inductor", list(BLOCKS), id="compiled", marks=pytest.mark.slow),
    ],
)
def test_compiles_whole(backend, names) -> None:
    """In a process of its own, where no annotation is checked; a graph break would raise."""
    program = [sys.executable, "-c", COMPILED, backend, *names]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("whole") == 2 * len(names)


@every_block
def test_every_parameter_is_used(name, causal) -> None:
    model = model_of(name, causal)
    model(tokens_of(2, 9)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@every_block
def test_save_and_load_keep_the_logits(name, causal, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    model, tokens = model_of(name, causal), tokens_of(2, 9)
    state = {key: value for key, value in model.state_dict().items() if key != "head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    other = build(replace(CONFIG, block=name, causal=causal), seed=7).double()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(other(tokens), model(tokens))


def test_bad_input_is_named() -> None:
    model, tokens = model_of("sas"), tokens_of(2, 9)
    with pytest.raises(InputError, match=r"17 tokens exceeds the context of 16"):
        model(tokens_of(1, 17))
    with pytest.raises(InputError, match=r"mask must be \(batch, tokens\) = \(2, 9\), got \(2, 8\)"):
        model(tokens, torch.ones(2, 8))
    with pytest.raises(InputError, match="true or 1 at real tokens, got torch"):
        model(tokens, torch.ones(2, 9))
    with pytest.raises(InputError, match="shape of the tokens"):
        model(tokens, documents=torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(InputError, match="whole numbers"):
        model(tokens, documents=torch.zeros(2, 9))
    with pytest.raises(InputError, match="neither a mask"):
        model(tokens, torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.int64))
    with pytest.raises(InputError, match="encoder cannot decode"):
        model_of("sas", causal=False).memory()
    memory = model.memory()
    model(tokens, past=memory)
    with pytest.raises(InputError, match="holds 2 sequences, and 1 came"):
        model(tokens[:1, :1], past=memory)
    memory = model.memory()
    model(tokens, torch.arange(9) >= torch.tensor([[0], [2]]), past=memory)
    with pytest.raises(InputError, match="cache holds padding"):
        model(tokens[:, :1], past=memory)
    with pytest.raises(InputError, match="key_heads must divide the 4 heads, got 3"):
        replace(CONFIG, key_heads=3)
    with pytest.raises(InputError, match="even mlp_width, got 7"):
        replace(CONFIG, gated=True, mlp_width=7)


def test_a_container_that_would_hide_an_attention_is_refused() -> None:
    from gramian.nn.attention import Attention, SoftmaxMixing
    from gramian.nn.residual import Chain, Residual, Sum

    hidden = nn.Sequential(nn.Identity(), Attention(8, 2, SoftmaxMixing()))
    for container in (Chain, Residual, Sum):
        with pytest.raises(InputError, match="Sequential would keep padding and caches from the attention"):
            container(hidden)
