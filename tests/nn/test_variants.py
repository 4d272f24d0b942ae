"""Where pre-norm blocks with one part exchanged meet the plain one; equations: test_blocks_oracle.py."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gramian.nn.attention import Attention
from gramian.nn.blocks import BLOCKS, gains
from gramian.nn.init import initialise_
from gramian.nn.mixing import ClippedSoftmaxMixing, SinkMixing, SoftCapMixing
from gramian.nn.norms import NORMS, identity
from gramian.nn.parts import Parts
from gramian.nn.transformer import TransformerConfig, build

PARTS = Parts(width=24, heads=3, depth=4, layer=1, mlp_width=48, context=100)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block(name: str, parts: Parts = PARTS) -> nn.Module:
    """A block with the weights of the plain one where they have the same names."""
    plain = initialise_(BLOCKS["pre_norm"](parts).double(), 0, std=0.3)
    built = initialise_(BLOCKS[name](parts).double(), 1, std=0.3)
    built.load_state_dict(plain.state_dict(), strict=False)
    return built


def part(built: nn.Module) -> Attention:
    return next(module for module in built.modules() if isinstance(module, Attention))


def test_every_limit_is_the_plain_block() -> None:
    x, plain = normal(2, 9, 24), block("pre_norm")
    built = {name: block(name) for name in BLOCKS if name.startswith("pre_norm_")}
    for other in built.values():  # control: none is the plain block as it stands
        assert (other(x) - plain(x)).abs().max() > 1e-5
    part(built["pre_norm_gated"]).gate.weight.data.zero_()
    part(built["pre_norm_gated"]).gate.bias.data.fill_(50.0)
    part(built["pre_norm_softmax1"]).mixing = SinkMixing(-50.0)
    part(built["pre_norm_sink"]).mixing.sink.data.fill_(-50.0)
    part(built["pre_norm_clipped"]).mixing = ClippedSoftmaxMixing(100, alpha=0.0)
    part(built["pre_norm_softcap"]).mixing.cap = 1e8
    part(built["pre_norm_qk_norm"]).query_norm = part(built["pre_norm_qk_norm"]).key_norm = nn.Identity()
    for other in built.values():
        torch.testing.assert_close(other(x), plain(x), rtol=0, atol=1e-10)


def test_peri_norm_without_norms_is_pre_norm_without() -> None:
    bare, x = replace(PARTS, norm=identity), normal(2, 9, 24)
    torch.testing.assert_close(block("peri_norm", bare)(x), block("pre_norm", bare)(x), rtol=0, atol=1e-12)
    assert (block("peri_norm")(x) - block("pre_norm")(x)).abs().max() > 0.1  # control


def test_peri_norm_bounds_what_a_branch_adds() -> None:
    x = normal(2, 9, 24)
    peri, pre = BLOCKS["peri_norm"](PARTS).double(), BLOCKS["pre_norm"](PARTS).double()
    for built in (peri, pre):
        initialise_(built, 0, std=30.0)
    added = (peri(x) - x).square().mean(-1).sqrt()
    assert added.max() <= 2 + 1e-9  # two branches of RMS 1 each
    assert (pre(x) - x).square().mean(-1).sqrt().min() > 100  # control


def test_starts_and_readings() -> None:
    assert gains(block("pre_norm_gated")) == {"gate opening": pytest.approx(0.5)}
    assert gains(block("pre_norm_sink")) == {"sink": 0.0}
    assert gains(block("pre_norm_softmax1")) == gains(block("pre_norm")) == {}
    x = normal(2, 9, 24)
    torch.testing.assert_close(block("pre_norm_sink")(x), block("pre_norm_softmax1")(x), rtol=0, atol=1e-12)
    built = block("pre_norm_sink")
    part(built).mixing.sink.data = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    assert gains(built) == {"sink": pytest.approx(3.0)}
    assert part(block("pre_norm_clipped")).mixing.offset == pytest.approx(-12 / 100)
    mixing = part(block("pre_norm_softcap")).mixing
    assert isinstance(mixing, SoftCapMixing)
    assert mixing.cap == 30


def test_a_transformer_tells_its_context_to_clipped_softmax() -> None:
    config = TransformerConfig(
        vocabulary=29, context=64, width=24, depth=2, heads=4, block="pre_norm_clipped"
    )
    offsets = [part(layer).mixing.offset for layer in build(config, 0).blocks]
    assert offsets == [pytest.approx(-12 / 64)] * 2


@pytest.mark.parametrize("name", NORMS)
def test_every_norm_in_a_transformer_learns(name) -> None:
    config = TransformerConfig(vocabulary=29, context=16, width=24, depth=2, heads=4, norm=name)
    model = build(config, 0)
    tokens = torch.randint(29, (4, 16), generator=torch.Generator().manual_seed(0))
    model(tokens).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for p in model.norm.parameters())
