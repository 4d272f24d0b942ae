import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import oracles
from gramian.core.moments import Moments
from gramian.errors import InputError
from gramian.observe import Probe, observe
from gramian.observe.attention import AttentionMoments

WIDTH, HEADS = 12, 3
NAMES = {*oracles.moment_readings(torch.eye(2) + 1)}


class Mixing(nn.Module):
    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
        return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, float("-inf")).softmax(-1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.weights(q, k) @ v


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.into = nn.Linear(WIDTH, 3 * WIDTH)
        self.mixing = Mixing()
        self.dropout = nn.Dropout(0.5)

    def qkv(self, x: Tensor) -> Tensor:
        return self.into(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.mixing(*self.qkv(x)).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, depth: int = 3):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 1)

    def block(self, index: int) -> Block:
        block = self.blocks[index]
        assert isinstance(block, Block)
        return block

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


@pytest.fixture
def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 7, WIDTH, generator=torch.Generator().manual_seed(1))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def streams(model: Model, x: Tensor) -> dict[str, Tensor]:
    """The streams that the probe should see, by an explicit pass."""
    seen = {}
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            seen[f"blocks.{i}"] = x
            x = block(x)
    return seen | {"blocks.2.output": x}


def expected(stream: Tensor) -> dict[str, float]:
    return oracles.moment_readings(stream)


def close(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for site, values in got.items():
        assert values == pytest.approx(want[site], rel=1e-9), site


def test_reads_every_stream_and_the_last_output(model: Model, x: Tensor):
    with Probe(model).sample(0) as sample:
        model(x)
    assert sample is not None
    close(
        sample.readings(spectral=True),
        {site: expected(s.flatten(0, 1)) for site, s in streams(model, x).items()},
    )


def test_centre_mask_and_first_token(model: Model, x: Tensor):
    mask = torch.ones(4, 7)
    mask[1, 4:] = 0
    mask[3, 1:] = 0
    with Probe(model, centre=True, skip_first_token=True).sample(0, mask) as sample:
        model(x)
    kept = mask[:, 1:].bool()
    want = {site: expected(oracles.centred(s[:, 1:].double())[kept]) for site, s in streams(model, x).items()}
    assert sample is not None
    close(sample.readings(spectral=True), want)
    with Probe(model, centre=True, skip_first_token=True).sample(0) as unmasked:
        model(x)
    assert unmasked is not None
    control = unmasked.readings(spectral=True)["blocks.0"]
    assert control.keys() == want["blocks.0"].keys()
    assert control != pytest.approx(want["blocks.0"], rel=1e-2)


def test_micro_batches_add_up_each_with_its_mask(model: Model, x: Tensor):
    mask = torch.ones(4, 7)
    mask[0, 5:] = 0
    mask[2, 2:] = 0
    with Probe(model, attentions="blocks.*.mixing", sequences=2).sample(0) as parts:
        assert parts is not None
        for half in (slice(0, 2), slice(2, 4)):
            parts.mask = mask[half]
            model(x[half])
    with Probe(model, attentions="blocks.*.mixing", sequences=4).sample(0, mask) as whole:
        model(x)
    assert whole is not None
    close(parts.readings(), whole.readings())


def test_training_is_the_same_with_and_without(model: Model, x: Tensor):
    def train(probe: Probe | None) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        model.train()
        if probe is None:
            loss = model(x)
            loss.backward()
        else:
            with probe.sample(0) as sample:
                loss = model(x)
                loss.backward()
            assert sample is not None
            assert not any(m.products.requires_grad for m in sample.streams.values())
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with torch.random.fork_rng():
        plain, probed = train(None), train(Probe(model, attentions="blocks.*.mixing"))
    assert len(plain) > 5
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))


def test_hooks_exist_only_inside_a_sample_that_is_due(model: Model, x: Tensor):
    probe = Probe(model, attentions="blocks.*.mixing", every=10)
    assert [step for step in range(25) if probe.due(step)] == [0, 10, 20]
    assert hooks(model) == 0
    with probe.sample(7) as sample:
        assert sample is None
        assert hooks(model) == 0
        model(x)
    with probe.sample(10) as sample:
        assert sample is not None
        assert hooks(model) == 3 + 1 + 3
    assert hooks(model) == 0


def test_hooks_go_after_an_error_of_the_block_the_model_or_the_probe(model: Model, x: Tensor):
    probe = Probe(model)
    with pytest.raises(KeyError), probe.sample(0):
        raise KeyError
    assert hooks(model) == 0
    with pytest.raises(RuntimeError), probe.sample(0):
        model(x[..., :3])
    assert hooks(model) == 0
    with pytest.raises(InputError, match=r"mask of shape \(7, 4\)"), probe.sample(0, torch.ones(7, 4)):
        model(x)
    assert hooks(model) == 0


def test_planted_outlier_neuron_is_found(model: Model, x: Tensor):
    def read() -> dict[str, dict[str, float]]:
        with Probe(model).sample(0) as sample:
            model(x)
        assert sample is not None
        return sample.readings(spectral=True)

    def kurtoses(readings: dict[str, dict[str, float]]) -> list[float]:
        return [values["neuron_kurtosis"] for values in readings.values()]

    assert max(kurtoses(read())) < 3
    into = model.block(1).into
    with torch.no_grad():
        into.weight[2 * WIDTH + 5] *= 200  # one value neuron: what block 1 adds is nearly neuron 5 alone
    planted = kurtoses(read())
    assert max(planted[:2]) < 3
    assert min(planted[2:]) > 0.8 * WIDTH


def test_attention_is_read_on_the_first_sequences(model: Model, x: Tensor):
    with Probe(model, streams=(), attentions="blocks.*.mixing", sequences=3).sample(0) as sample:
        model(x)
    assert sample is not None
    got = sample.readings(spectral=True)
    assert list(got) == [f"blocks.{i}.mixing" for i in range(3)]
    for index, stream in enumerate(list(streams(model, x).values())[:3]):
        block = model.block(index)
        q, k, _ = block.qkv(stream)
        weights = block.mixing.weights(q, k).detach()
        want = {
            "attention_entropy": oracles.attention_entropy(weights[:3]),
            "sink_rate": oracles.sink_rate(weights[:3], 0.3),
        }
        assert got[f"blocks.{index}.mixing"] == pytest.approx(want, rel=1e-6)
        assert oracles.attention_entropy(weights) != pytest.approx(want["attention_entropy"], rel=1e-4)


@pytest.mark.parametrize(
    ("pattern", "sites"),
    [
        ("blocks.*", ["blocks.0", "blocks.1", "blocks.2"]),
        ("**.blocks.*", ["blocks.0", "blocks.1", "blocks.2"]),
        ("blocks.[02]", ["blocks.0", "blocks.2"]),
        (["blocks.2", "blocks.0.norm"], ["blocks.0.norm", "blocks.2"]),
        ("**.norm", ["blocks.0.norm", "blocks.1.norm", "blocks.2.norm"]),
        ("*.*.norm", ["blocks.0.norm", "blocks.1.norm", "blocks.2.norm"]),
        (nn.LayerNorm, ["blocks.0.norm", "blocks.1.norm", "blocks.2.norm"]),
        (Block, ["blocks.0", "blocks.1", "blocks.2"]),
    ],
)
def test_names_match_segment_by_segment(model: Model, pattern, sites: list[str]):
    assert list(Probe(model, pattern).streams) == sites
    assert next(iter(Probe(nn.ModuleDict({"inner": model}), "**.norm").streams)) == "inner.blocks.0.norm"


@pytest.mark.parametrize("pattern", ["layers.*", "norm", "blocks.*.*.*", ["blocks.*", "layers.*"], nn.Conv1d])
def test_no_match_lists_what_there_is(model: Model, pattern):
    with pytest.raises(InputError, match=r"no module matches .*blocks, blocks\.\*, blocks\.\*\.norm"):
        Probe(model, pattern)


def test_other_mistakes_are_named(model: Model, x: Tensor):
    with pytest.raises(InputError, match=r"blocks\.0\.norm \(LayerNorm\) has no method weights"):
        Probe(model, attentions="blocks.*.norm")
    with pytest.raises(InputError, match="at least 1"):
        Probe(model, every=0)
    with Probe(model).sample(0) as sample:
        pass
    assert sample is not None
    with pytest.raises(InputError, match="the sample is empty"):
        sample.readings(spectral=True)
    flat = nn.Sequential(nn.Linear(WIDTH, 2))
    with pytest.raises(InputError, match=r"stream at 0 must be .*\(4, 12\)"):
        observe(flat, [x[:, 0]], streams="*", skip_first_token=True)
    with pytest.raises(InputError, match="int64"):
        observe(nn.Sequential(nn.Embedding(5, 2)), [torch.zeros(2, 3, dtype=torch.int64)], streams="*")


def test_tuples_keywords_and_plain_rows(x: Tensor):
    class Layer(nn.Module):
        def forward(self, scale: float, hidden: Tensor) -> tuple[Tensor, None]:
            return scale * hidden, None

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()

        def forward(self, hidden: Tensor) -> Tensor:
            return self.layer(2.0, hidden=hidden)[0]

    rows = x[:, 0]
    got = observe(Outer(), [rows], streams="layer")
    close(got, {"layer": expected(rows), "layer.output": expected(2 * rows)})


def test_observe_reads_batches_in_evaluation_mode_and_restores_training(model: Model, x: Tensor):
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    calls = []
    handle = model.head.register_forward_hook(lambda m, a, out: calls.append(out.requires_grad))
    got = observe(model, (part for part in x.split(1)))
    handle.remove()
    assert calls == [False] * 4
    assert [module.training for module in model.modules()] == modes
    model.eval()
    close(got, {site: expected(s.flatten(0, 1)) for site, s in streams(model, x).items()})

    model.train()
    with pytest.raises(InputError, match="empty"):
        observe(model, [])
    with pytest.raises(RuntimeError):
        observe(model, [x[..., :3]])
    assert model.training
    assert hooks(model) == 0


def test_autocast_does_not_touch_the_sums(model: Model, x: Tensor):
    with torch.autocast("cpu", torch.bfloat16), Probe(model).sample(0) as sample:
        model(x)
    assert sample is not None
    assert sample.streams["blocks.0"].products.dtype == torch.float64
    assert sample.readings(spectral=True)["blocks.0"] == pytest.approx(expected(x.flatten(0, 1)), rel=1e-9)


def test_keeps_no_activation(model: Model, x: Tensor):
    with Probe(model, attentions="blocks.*.mixing").sample(0) as sample:
        model(x.repeat(50, 1, 1))
    assert sample is not None
    kept = [t for m in [*sample.streams.values(), *sample.attentions.values()] for t in vars(m).values()]
    assert max(t.untyped_storage().nbytes() for t in kept) <= 8 * WIDTH**2
    assert all(isinstance(m, Moments) for m in sample.streams.values())


class Paddable(Mixing):
    """Also told which tokens are real."""

    def weights(self, q: Tensor, k: Tensor, real: Tensor | None = None) -> Tensor:
        weights = super().weights(q, k)
        return weights if real is None else (weights * real[:, None, None]) / real.sum(1)[:, None, None, None]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None) -> Tensor:
        return self.weights(q, k, real) @ v


def test_attention_is_read_at_real_tokens_alone():
    q, k, v = (torch.randn(3, 2, 6, 4, generator=torch.Generator().manual_seed(s)) for s in range(3))
    real = torch.arange(6) < torch.tensor([[6], [4], [1]])
    model = nn.ModuleDict({"mixing": Paddable()})
    probe = Probe(model, streams=(), attentions="mixing", sequences=2)
    with probe.sample(0) as sample:
        model["mixing"](q, k, v, real)
    assert sample is not None
    weights = model["mixing"].weights(q, k, real)[:2]
    moments = AttentionMoments.of(weights, real[:2])
    assert sample.attentions["mixing"].count == 10
    torch.testing.assert_close(sample.attentions["mixing"].entropy, moments.entropy)
    unmasked = AttentionMoments.of(weights)  # control
    assert not torch.allclose(unmasked.entropy, moments.entropy)


def test_recomputed_activations_are_not_read_twice(model: Model, x: Tensor):
    def once(recompute: bool) -> dict:
        with Probe(model, attentions="blocks.*.mixing").sample(0) as sample:
            y = x
            for block in model.blocks:
                y = checkpoint(block, y, use_reentrant=False) if recompute else block(y)
            y.sum().backward()
        assert sample is not None
        return {site: moments.count for site, moments in (sample.streams | sample.attentions).items()}

    assert once(True) == once(False)
