from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.attention import Attention, ShapedMixing, SoftmaxMixing
from gramian.nn.blocks import BLOCKS, MLP, Parts, block, outlier_protected, sas, sas_p
from gramian.nn.init import Reparametrised, initialise_
from gramian.nn.norms import NORMS, identity
from gramian.nn.residual import Residual
from gramian.nn.transformer import Transformer, TransformerConfig, build, sinusoids

PARTS = Parts(width=24, heads=3, depth=4, layer=1, mlp_width=48)
SMALL = TransformerConfig(vocabulary=50, context=16, width=24, depth=3, heads=3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at_start(function, parts: Parts = PARTS, seed: int = 0) -> nn.Module:
    """A block with its initial weights; equal seeds give equal MLPs whatever the block's attention."""
    built = function(parts).double()
    initialise_(built, 1, std=0.2)
    for module in built.modules():
        if isinstance(module, MLP):
            initialise_(module, seed, std=0.2)
    return built


def test_sas_equals_sas_p_at_the_start() -> None:
    x = normal(2, 10, 24)
    for layer in (0, 1):
        bare = replace(PARTS, norm=identity, layer=layer)
        torch.testing.assert_close(at_start(sas, bare)(x), at_start(sas_p, bare)(x), rtol=0, atol=1e-12)
        # with norms, SAS norms twice: a relative gap of about ε/2 · (1/r² − 1) for x/√(r² + ε)
        normed = replace(PARTS, norm=lambda width: nn.RMSNorm(width, eps=1e-6), layer=layer)
        one, two = at_start(sas, normed)(x), at_start(sas_p, normed)(x)
        smallest = x.square().mean(-1).min().item()
        gap = (one - two).abs().max() / two.abs().max()
        assert gap < 2e-6 / smallest
    trained = at_start(sas, bare)  # control: away from zero queries they differ
    nn.init.normal_(trained[1].query_key.weight, generator=torch.Generator().manual_seed(5))
    assert (trained(x) - at_start(sas_p, bare)(x)).abs().max() > 1e-3


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_causal(name) -> None:
    built = at_start(BLOCKS[name])
    for module in built.modules():
        if isinstance(module, Attention):  # away from the identity
            nn.init.normal_(module.query_key.weight, generator=torch.Generator().manual_seed(2))
        if isinstance(module, ShapedMixing):
            nn.init.ones_(module.beta)
    x = normal(1, 12, 24)
    changed = x.clone()
    changed[:, 7] += 1
    before, after = built(x), built(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 8:] - after[:, 8:]).abs().max() > 0


@pytest.mark.parametrize("name", BLOCKS)
def test_every_parameter_learns(name) -> None:
    """No dead parameters: after one backward each has a gradient (zero queries still get one)."""
    model = build(replace(SMALL, block=name), seed=0)
    tokens = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(0))
    model(tokens).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_value_skipinit_block_starts_as_its_mlp() -> None:
    x, built = normal(1, 6, 24), at_start(BLOCKS["value_skipinit"], replace(PARTS, norm=identity))
    attention = built[0].branch[1]
    torch.testing.assert_close(attention(x), attention.projection(attention.value(x)), rtol=0, atol=1e-12)


def test_depth_sets_the_gains() -> None:
    gains = {depth: outlier_protected(replace(PARTS, depth=depth))[0].gain for depth in (18, 72)}
    assert gains == {18: pytest.approx(0.2), 72: pytest.approx(0.1)}
    assert sas(replace(PARTS, depth=18))[2].gain.item() == pytest.approx(0.1)


@pytest.mark.parametrize(("name", "millions"), [("pre_norm", 166.6), ("sas", 145.9), ("sas_p", 145.9)])
def test_parameter_counts_at_gpt2_size(name, millions) -> None:
    with torch.device("meta"):
        model = Transformer(
            TransformerConfig(vocabulary=50_000, context=1024, width=768, depth=18, heads=12, block=name)
        )
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total / 1e6 == pytest.approx(millions, abs=0.11)
    # the published count leaves out gains, biases and norms: every parameter with less than two axes
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    d, layers, rest = 768, 18, 50_000 * 768 + 1024 * 768
    assert matrices == rest + layers * (12 if name == "pre_norm" else 10) * d**2 + (name != "pre_norm") * d**2


def test_weights_are_a_function_of_the_seed_and_leave_global_randomness_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = build(SMALL, 3), build(SMALL, 3), build(SMALL, 4)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert one.blocks[0][1].branch[1].up.weight.std().item() == pytest.approx(SMALL.std, rel=0.1)
    assert replace(SMALL, width=768).std == pytest.approx(0.02)  # the published start
    assert replace(SMALL, init_std=0.3).std == 0.3


def test_reparametrised_maps_start_at_their_base() -> None:
    x = normal(5, 8)
    for base in ("identity", "orthogonal", "gaussian"):
        linear = initialise_(Reparametrised(8, base).double(), 0)
        start = torch.eye(8, dtype=torch.float64) if linear.base is None else linear.base
        torch.testing.assert_close(linear(x), x @ start.T)
        assert ("base" in linear.state_dict()) is (base != "identity")
        linear.delta.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        linear.beta.data.fill_(0.5)
        torch.testing.assert_close(linear(x), x @ (start + 0.5 * linear.delta.weight).T)
    orthogonal = initialise_(Reparametrised(8, "orthogonal").double(), 0).base
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(8, dtype=torch.float64))


def test_heads_positions_and_final_norm_are_what_they_say() -> None:
    tied, untied = build(SMALL, 0), build(replace(SMALL, tied=False), 0)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    assert isinstance(build(replace(SMALL, final_norm=False), 0).norm, nn.Identity)
    fixed = build(replace(SMALL, positions="sinusoidal"), 0)
    assert not list(fixed.positions.parameters())
    assert "positions.weight" not in fixed.state_dict()
    rows = fixed.positions(torch.arange(16))
    torch.testing.assert_close(rows.square().mean(-1).sqrt(), torch.full((16,), SMALL.std))
    assert sinusoids(4, 6)[0].tolist() == [0, 1, 0, 1, 0, 1]
    gap = (sinusoids(9, 6)[3] @ sinusoids(9, 6)[5]) - (sinusoids(9, 6)[6] @ sinusoids(9, 6)[8])
    assert abs(gap) < 1e-5  # products depend on the distance alone


def test_bad_configurations_are_named() -> None:
    for change, words in (
        ({"width": 25}, "width 25 is not divisible by heads 3"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"block": "resnet"}, "unknown block 'resnet'"),
        ({"norm": "batch"}, "unknown norm 'batch'"),
        ({"activation": "step"}, "unknown activation 'step'"),
        ({"positions": "alibi"}, "unknown positions"),
        ({"positions": "rotary", "width": 15}, "heads of an even width, got 5"),
        ({"mlp_width": -1}, "mlp_width"),
        ({"width": 27, "positions": "sinusoidal"}, "even width"),
    ):
        with pytest.raises(InputError, match=words):
            build(replace(SMALL, **change), 0)
    with pytest.raises(InputError, match="17 tokens exceeds the context of 16"):
        build(SMALL, 0)(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(InputError, match="positive widths"):
        MLP(3, 0, nn.ReLU)
    with pytest.raises(InputError, match="base"):
        Reparametrised(3, "zero")
    with pytest.raises(InputError, match="cannot be negative"):
        initialise_(nn.Linear(2, 2), 0, std=-1.0)
    assert block("sas") is sas
    assert set(NORMS) > {"layernorm", "rmsnorm", "none"}
    assert isinstance(Residual(SoftmaxMixing()).gain, float)
