from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from gramian.errors import InputError
from gramian.observe import Probe, Record
from gramian.observe.watch import Watch, layers, summary

WIDTH = 6


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


class Inner(nn.Module):
    """Layers that may be run again in the backward pass, behind a mask of another form."""

    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


class Model(nn.Module):
    def __init__(self, reentrant: bool | None = None, extend: bool = True):
        super().__init__()
        self.inner, self.extend = Inner(reentrant), extend

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None and self.extend:
            attention_mask = attention_mask[:, None, None, :].to(x.dtype)
        return self.inner(x, attention_mask=attention_mask).square().mean()


@pytest.fixture
def model() -> Model:
    return build()


def build(**options: Any) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(**options).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "run" / "observations.jsonl")


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def by_hand(model: nn.Module, x: Tensor, mask: Tensor | None = None) -> dict[str, dict[str, float]]:
    with Probe(model, "inner.layers.*").sample(0, mask) as sample:
        model(x)
    assert sample is not None
    return sample.readings()


def close(got: dict[str, dict[str, float]] | None, want: dict[str, dict[str, float]]) -> bool:
    assert got is not None
    assert got.keys() == want.keys()
    return all(got[site] == pytest.approx(want[site], rel=1e-9, nan_ok=True) for site in want)


def test_micro_batches_add_up_in_one_row_each_with_its_mask(model: Model, x: Tensor, record: Record):
    watch = Watch(model, record, every=2)
    for step in range(3):
        for half in (slice(0, 2), slice(2, 4)):
            watch.next_pass(step)
            model(x[half], attention_mask=MASK[half]).backward()
        assert hooks(model) == 0
        got = watch.finish()
        assert (got is None) == (step == 1)
        assert got is None or close(got, by_hand(model, x, MASK))
    rows = record.read()
    assert [(row["kind"], row["step"]) for row in rows] == [("observe", 0), ("observe", 2)]
    assert close(rows[1]["sites"], by_hand(model, x, MASK))
    assert not close(rows[1]["sites"], by_hand(model, x))


def test_attach_and_detach_read_every_pass_between(model: Model, x: Tensor, record: Record):
    watch = Watch(model, record)
    for half in (slice(0, 2), slice(2, 4)):
        watch.attach(0)
        model(x[half], MASK[half])  # by position
        watch.detach()
        model(x)  # a validation between the micro-batches
    assert hooks(model) == 0
    assert close(watch.finish(), by_hand(model, x, MASK))
    watch.attach(0)
    model(x[:1])
    model(x[1:])
    assert close(watch.finish(), by_hand(model, x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("each_pass", [True, False])
def test_passes_that_checkpointing_repeats_do_not_count(
    x: Tensor, record: Record, reentrant: bool, each_pass: bool
):
    model, x, calls = build(reentrant=reentrant), x.requires_grad_(), []
    model.inner.layers[1].linear.register_forward_pre_hook(lambda *args: calls.append(args))
    watch = Watch(model, record)
    (watch.next_pass if each_pass else watch.attach)(0)
    model(x).backward()
    assert len(calls) == 2
    assert watch._sample is not None
    assert watch._sample.streams["inner.layers.1"].count == 20
    assert close(watch.finish(), by_hand(model, x))


def test_only_a_training_pass_is_read(model: Model, x: Tensor, record: Record):
    watch = Watch(model, record)
    watch.next_pass(0)
    model.eval()(x)
    model.train()
    with torch.no_grad():
        model(x)
    model(x[:2])
    model(x[2:])
    assert close(watch.finish(), by_hand(model, x[:2]))


@pytest.mark.parametrize("failing", [Layer, Model])
def test_a_failed_pass_leaves_no_hook(
    model: Model, x: Tensor, record: Record, failing: type, monkeypatch: pytest.MonkeyPatch
):
    watch = Watch(model, record)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(failing, "forward", fail)
        watch.next_pass(0)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(x)
    assert hooks(model) == 0
    watch.start(0)
    watch.next_pass(0)
    model(x)
    assert close(watch.finish(), by_hand(model, x))
    with pytest.raises(InputError, match=r"mask of shape \(4, 3\)"):
        watch.next_pass(0)
        model(x, MASK[:, :3])
    assert hooks(model) == 0


def test_an_interrupt_leaves_hooks_that_the_next_pass_removes_unread(
    model: Model, x: Tensor, record: Record, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    watch = Watch(model, record)
    watch.next_pass(0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Inner, "forward", interrupt)
        model(x)
    model.eval()(x)
    assert hooks(model) == 0
    assert watch._sample is not None
    assert watch._sample.streams == {}


def test_stop_removes_what_was_armed_or_attached(model: Model, record: Record):
    watch = Watch(model, record)
    for begin in (watch.attach, watch.next_pass):
        begin(0)
        assert hooks(model) > 0
        watch.stop()
        assert hooks(model) == 0
        assert watch.finish() is None
        begin(7)
        assert hooks(model) == 0
    assert record.read() == []


@pytest.mark.parametrize("each_pass", [True, False])
def test_compiled_models_are_read_uncompiled(x: Tensor, record: Record, each_pass: bool):
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = build()
    compiled = torch.compile(model, backend=backend)
    watch = Watch(model, record, every=2)
    for step in range(3):
        before = len(graphs)
        (watch.next_pass if each_pass else watch.attach)(step)
        compiled(x)
        got = watch.finish()
        assert (got is not None) == (step != 1)
        assert got is None or close(got, by_hand(model, x))
        compiled(x)
        assert len(graphs) - before == (step == 0)  # compiled once, by the pass outside the sample
    with Probe(model, "inner.layers.*").sample(0) as control:
        compiled(x)
    assert control is not None
    assert control.streams == {}
    torch.compiler.reset()


def test_a_resumed_run_writes_no_step_twice(model: Model, x: Tensor, record: Record):
    def run(steps: range) -> None:
        watch = Watch(model, record, every=2)
        watch.start(steps.start)
        for step in steps:
            watch.next_pass(step)
            model(x)
            watch.finish()

    record.append({"kind": "note"})
    run(range(7))
    assert [row.get("step") for row in record.read()] == [None, 0, 2, 4, 6]
    run(range(3, 6))  # from the checkpoint after step 2
    assert [row.get("step") for row in record.read()] == [None, 0, 2, 4]
    run(range(0, 1))
    assert [row.get("step") for row in record.read()] == [None, 0]


def test_the_innermost_module_that_takes_the_mask_decides(x: Tensor, record: Record):
    model = build(extend=False)

    def read(given: Tensor | None, **options: Any) -> dict[str, dict[str, float]] | None:
        watch = Watch(model, record, **options)
        watch.next_pass(0)
        model(x, attention_mask=given)
        return watch.finish()

    packed = MASK * torch.tensor([1, 1, 2, 2, 3])
    assert close(read(packed), by_hand(model, x, MASK))
    assert close(read(MASK.bool()), by_hand(model, x, MASK))
    assert close(read(None), by_hand(model, x))
    assert close(read(MASK, mask=None), by_hand(model, x))
    assert close(read(MASK, mask="another"), by_hand(model, x))
    assert close(read(MASK.double().log()), by_hand(model, x))  # added to logits: says nothing
    model.inner.forward = lambda x, attention_mask: Inner.forward(model.inner, x)  # type: ignore[method-assign]
    model.forward = lambda *args, attention_mask: model.inner(*args, None).mean()  # type: ignore[method-assign]
    assert close(read(MASK), by_hand_of(model, x))


def by_hand_of(model: Model, x: Tensor) -> dict[str, dict[str, float]]:
    with Probe(model, "inner.layers.*").sample(0) as sample:
        model(x, attention_mask=None)
    assert sample is not None
    return sample.readings()


@pytest.mark.parametrize("each_pass", [True, False])
def test_a_first_step_without_the_streams_is_an_error(
    model: Model, x: Tensor, record: Record, each_pass: bool
):
    watch = Watch(model, record)
    begin = watch.next_pass if each_pass else watch.attach
    begin(0)
    model.inner.layers[0].linear(x)  # around the model itself
    with pytest.raises(InputError, match=r"through Model that calls inner\.layers\.0, .*\.2; .* streams="):
        watch.finish()
    assert hooks(model) == 0
    begin(0)
    model(x)
    watch.finish()
    begin(50)
    assert watch.finish() is None  # later a batch may be left out
    assert len(record.read()) == 1


def test_layers_are_the_longest_lists_of_like_modules():
    def stack(*classes: type[nn.Module]) -> nn.ModuleList:
        return nn.ModuleList(each() for each in classes)

    class Expert(Layer):
        def __init__(self):
            super().__init__()
            self.experts = stack(*[Layer] * 8)

    assert layers(build()) == ["inner.layers.*"]
    both = nn.ModuleDict(
        {
            "encoder": Inner(),
            "decoder": Inner(),
            "heads": stack(Layer, Layer),
            "odd": stack(*[Layer] * 4, Expert),
        }
    )
    assert layers(both) == ["encoder.layers.*", "decoder.layers.*"]
    assert list(Probe(both, layers(both)).streams)[2:4] == ["encoder.layers.2", "decoder.layers.0"]
    assert layers(nn.ModuleDict({"model": nn.ModuleDict({"layers": stack(Expert, Expert)})})) == [
        "model.layers.*"
    ]
    pairs = nn.ModuleList(stack(Layer, Expert) for _ in range(5))
    for none in (nn.Sequential(Layer(), Layer()), nn.ModuleDict({"pairs": pairs}), nn.ModuleList([Layer()])):
        with pytest.raises(InputError, match=r"no ModuleList of modules of one class .* streams="):
            layers(none)


def test_a_row_tells_neurons_and_peaks(model: Model, x: Tensor, record: Record):
    x[3, 2, 4], x[0, 4, 1] = -50, 99  # the second at padding
    watch = Watch(model, record)
    for half in (slice(0, 2), slice(2, 4)):
        watch.next_pass(0)
        model(x[half], attention_mask=MASK[half])
    watch.finish()
    (row,) = record.read()
    site = "inner.layers.0"
    assert row["peaks"][site] == {"value": -50.0, "sequence": 3, "position": 2, "neuron": 4}
    squares = x[MASK.bool()].square().mean(0)
    (neuron, share), *others = row["neurons"][site]
    assert (neuron, share) == (4, pytest.approx((squares[4] / squares.mean()).item()))
    assert len(others) == 2
    assert row["sites"].keys() == row["peaks"].keys() == row["neurons"].keys()


class Attending(Layer):
    def forward(self, x: Tensor) -> Tensor:
        q = self.linear(x)[:, None]
        return x + scaled_dot_product_attention(q, q, q)[:, 0]


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_calls_of_attention_are_read_once(
    x: Tensor, record: Record, reentrant: bool | None, compiled: bool, monkeypatch: pytest.MonkeyPatch
):
    torch.compiler.reset()
    monkeypatch.setitem(globals(), "Layer", Attending)
    model, x = build(reentrant=reentrant), x.requires_grad_()
    run = torch.compile(model, backend="eager") if compiled else model
    watch = Watch(model, record, attentions="calls", sequences=2)
    for each_pass in (True, False):
        (watch.next_pass if each_pass else watch.attach)(0)
        run(x, attention_mask=MASK).backward()
        assert watch._sample is not None
        assert [m.count for m in watch._sample.attentions.values()] == [8, 8, 8]
        got = watch.finish()
        assert got is not None
        q = model.inner.layers[0].linear(x[:2]).detach()
        weights = (q @ q.mT / WIDTH**0.5).softmax(-1)
        rows = weights[MASK[:2].bool()]
        assert got["inner.layers.0"]["attention_entropy"] == pytest.approx(
            -(rows * rows.log()).sum(-1).mean().item(), rel=1e-10
        )
        assert hooks(model) == 0
        assert torch._C._len_torch_function_stack() == 0
    torch.compiler.reset()


def test_the_summary_takes_the_worst_site():
    readings = {"a": {"rms": 1.0, "participation_ratio": 3.0}, "b": {"rms": 2.0, "participation_ratio": 2.0}}
    assert summary(readings) == {"observe/rms_max": 2.0, "observe/participation_ratio_min": 2.0}
    readings["b"]["rms"] = float("nan")
    assert summary(readings)["observe/rms_max"] != summary(readings)["observe/rms_max"]
