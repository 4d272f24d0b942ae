import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.observe import Probe, Record
from gramian.observe.watch import summary

transformers = pytest.importorskip("transformers")

from gramian.interop.trainer import ObserveCallback  # noqa: E402

ROOT = Path(__file__).parents[2]
WIDTH, LENGTH = 16, 8


def gpt2(**options: Any) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=LENGTH, n_embd=WIDTH, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **options,
    )  # fmt: skip
    transformers.set_seed(0)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.set_seed(0)
    return transformers.BertForMaskedLM(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    transformers.set_seed(0)
    return transformers.LlamaForCausalLM(config)


class Text(list):
    """Sequences of random tokens and lengths, padded; `batches` are those that training has asked for."""

    def __init__(self, sequences: int = 64):
        draw = torch.Generator().manual_seed(0)
        for _ in range(sequences):
            ids = torch.randint(40, (LENGTH,), generator=draw)
            mask = (torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (), generator=draw)).long()
            self.append({"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)})
        self.batches: list[dict[str, Tensor]] = []

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.batches.append({key: torch.stack([row[key] for row in rows]) for key in rows[0]})
        return self.batches[-1]


def trainer(
    model: nn.Module,
    folder: Path,
    text: Text,
    callbacks: Any = (),
    kind: Any = transformers.Trainer,
    **options: Any,
) -> Any:
    settings = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.0,
        "use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "logging_strategy": "no", **options,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**settings)
    return kind(
        model=model, args=arguments, train_dataset=text, data_collator=text.collate, callbacks=[*callbacks]
    )


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def by_hand(
    model: nn.Module, streams: str, batches: list[dict[str, Tensor]], masked: bool = True, **options: Any
) -> dict[str, dict[str, float]]:
    model.eval()
    with torch.no_grad(), Probe(model, streams, **options).sample(0) as sample:
        assert sample is not None
        for batch in batches:
            sample.mask = batch["attention_mask"] if masked else None
            model(**batch)
    return sample.readings()


def close(got: dict[str, dict[str, float]], want: dict[str, dict[str, float]]) -> bool:
    assert got.keys() == want.keys()
    return all(got[site] == pytest.approx(want[site], rel=1e-5) for site in want)


@pytest.mark.parametrize(
    ("build", "streams", "layers"),
    [(gpt2, "transformer.h.*", 3), (bert, "bert.encoder.layer.*", 2), (llama, "model.layers.*", 2)],
)
def test_records_what_a_probe_reads_by_hand(tmp_path: Path, build: Any, streams: str, layers: int):
    model, text = build(), Text()
    trainer(model, tmp_path, text, [ObserveCallback(every=2)], gradient_accumulation_steps=2).train()
    assert hooks(model) == 0
    rows = Record(tmp_path / "observations.jsonl").read()
    assert [(row["kind"], row["step"]) for row in rows] == [("observe", 0), ("observe", 2)]
    assert len(rows[0]["sites"]) == layers + 1
    assert close(rows[0]["sites"], by_hand(model, streams, text.batches[0:2]))
    assert close(rows[1]["sites"], by_hand(model, streams, text.batches[4:6]))
    assert not close(rows[0]["sites"], by_hand(model, streams, text.batches[0:1]))
    assert not close(rows[0]["sites"], by_hand(model, streams, text.batches[0:2], masked=False))


def checkpointing(**options: Any) -> dict[str, Any]:
    new = "activation_checkpointing" in transformers.TrainingArguments.__dataclass_fields__
    return {
        f"{'activation' if new else 'gradient'}_checkpointing{key}": value for key, value in options.items()
    }


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once(tmp_path: Path, reentrant: bool):
    model, text = gpt2(use_cache=False), Text()
    options = checkpointing(**{"": True, "_kwargs": {"use_reentrant": reentrant}})
    passes = []
    handle = model.transformer.h[1].ln_1.register_forward_hook(lambda *args: passes.append(args))
    trainer(model, tmp_path, text, [ObserveCallback()], max_steps=1, **options).train()
    assert len(passes) == 2
    handle.remove()
    (row,) = Record(tmp_path / "observations.jsonl").read()
    assert close(row["sites"], by_hand(model, "transformer.h.*", text.batches[:1]))


def told(model: Any, batches: list[dict[str, Tensor]], layer: int) -> dict[str, float]:
    """Entropy and sinks of a layer, from the matrices that the model itself returns."""
    model.eval()
    model.set_attn_implementation("eager")
    rows = []
    for batch in batches:
        with torch.no_grad():
            weights = model(**batch, output_attentions=True).attentions[layer]
        rows.append(weights.transpose(1, 2)[batch["attention_mask"] == 1].double())
    model.set_attn_implementation("sdpa")
    a = torch.cat(rows)
    entropy = -torch.where(a > 0, a * a.log(), 0).sum(-1).mean().item()
    return {"attention_entropy": entropy, "sink_rate": (a[..., 0].mean(0) > 0.3).double().mean().item()}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("build", "streams", "sites"),
    [
        (gpt2, "transformer.h.*", "transformer.h.{}.attn"),
        (bert, "bert.encoder.layer.*", "bert.encoder.layer.{}.attention.self"),
        (llama, "model.layers.*", "model.layers.{}.self_attn"),
    ],
)
def test_attention_is_recorded_of_any_model(
    tmp_path: Path, build: Any, streams: str, sites: str, checkpointed: bool
):
    model, text = build(), Text()
    with torch.no_grad():
        for parameter in model.parameters():  # heads apart
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    options = checkpointing(**{"": True, "_kwargs": {"use_reentrant": False}}) if checkpointed else {}
    callback = ObserveCallback(every=2, attentions="calls", sequences=4, skip_first_token=True)
    trainer(model, tmp_path, text, [callback], gradient_accumulation_steps=2, max_steps=1, **options).train()
    assert hooks(model) == int(checkpointed)  # one of the Trainer's own
    assert torch._C._len_torch_function_stack() == 0
    (row,) = Record(tmp_path / "observations.jsonl").read()
    want = by_hand(model, streams, text.batches[:2], attentions="calls", sequences=4, skip_first_token=True)
    assert close(row["sites"], want)
    for layer in range(2):
        got = row["sites"][sites.format(layer)]
        assert got == pytest.approx(told(model, text.batches[:2], layer), rel=1e-5)
        assert got != pytest.approx(told(model, text.batches[:1], layer), rel=1e-3)
    assert {"value", "sequence", "position", "neuron"} == row["peaks"][streams.replace("*", "0")].keys()
    assert all(len(neurons) == 3 for neurons in row["neurons"].values())


def test_training_is_the_same_with_and_without(tmp_path: Path):
    def weights(callbacks: list) -> list[Tensor]:
        model = gpt2()
        trainer(model, tmp_path, Text(), callbacks, learning_rate=1e-2).train()
        return [parameter.detach().clone() for parameter in model.parameters()]

    plain, observed = weights([]), weights([ObserveCallback(every=1, attentions="calls")])
    assert all(torch.equal(a, b) for a, b in zip(plain, observed, strict=True))
    assert not torch.equal(next(gpt2().parameters()), plain[0])


class Tracker(transformers.TrainerCallback):
    """Stands for TensorBoard and W&B, which come before the user's own callbacks."""

    def __init__(self):
        self.logs: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append((state.global_step, dict(logs)))


def test_trackers_see_the_summary_and_miss_nothing_else(tmp_path: Path):
    tracker, model = Tracker(), gpt2()
    training = trainer(
        model, tmp_path, Text(), [tracker], logging_strategy="steps", logging_steps=1, max_steps=4
    )
    assert isinstance(ObserveCallback(tmp_path / "mine.jsonl", every=2).add_to(training), ObserveCallback)
    training.train()
    rows = Record(tmp_path / "mine.jsonl").read()
    seen = [(step, logs) for step, logs in tracker.logs if "observe/neuron_kurtosis_max" in logs]
    assert [step for step, _ in seen] == [0, 2]
    for (_, logs), row in zip(seen, rows, strict=True):
        assert {key: value for key, value in logs.items() if key != "epoch"} == summary(row["sites"])
    assert [step for step, logs in tracker.logs if "loss" in logs] == [1, 2, 3, 4]
    assert [entry["step"] for entry in training.state.log_history if "observe/rms_max" in entry] == [0, 2]


def test_without_the_trainer_the_log_history_has_the_summary(tmp_path: Path):
    tracker = Tracker()
    training = trainer(gpt2(), tmp_path, Text(), [ObserveCallback(every=2), tracker])
    training.train()
    entries = [entry for entry in training.state.log_history if "observe/rms_max" in entry]
    assert [entry["step"] for entry in entries] == [0, 2]
    assert not any("observe/rms_max" in logs for _, logs in tracker.logs)


def test_a_resumed_training_writes_no_step_twice_and_a_new_one_begins_anew(tmp_path: Path):
    def train(resume: bool, steps: int) -> list[int]:
        callback = ObserveCallback(every=2)
        training = trainer(
            gpt2(), tmp_path, Text(), [callback], max_steps=steps, save_strategy="steps", save_steps=3
        )
        training.train(resume_from_checkpoint=resume or None)
        return [row["step"] for row in Record(tmp_path / "observations.jsonl").read()]

    assert train(False, 5) == [0, 2, 4]
    shutil.rmtree(tmp_path / "checkpoint-5")
    assert train(True, 8) == [0, 2, 4, 6]
    assert train(False, 1) == [0]


@pytest.mark.parametrize("where", ["forward", "loss", "backward", "optimiser"])
def test_an_exception_leaves_no_hook(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch):
    class Failing(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if where == "loss":
                raise RuntimeError("planted")
            return loss

    def fail(*args: Any) -> None:
        raise RuntimeError("planted")

    model, text = gpt2(), Text()
    training = trainer(
        model, tmp_path, text, [ObserveCallback(every=1)], Failing, gradient_accumulation_steps=2
    )
    if where == "forward":
        model.transformer.h[1].register_forward_hook(fail)
    elif where == "backward":
        model.transformer.wte.weight.register_hook(fail)
    elif where == "optimiser":
        monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    already = hooks(model)
    with pytest.raises(RuntimeError, match="planted"):
        training.train()
    assert hooks(model) == already


def test_a_step_that_never_reaches_the_model_is_cleaned_up_by_the_next_training(tmp_path: Path):
    model, text = gpt2(), Text()
    training = trainer(model, tmp_path, text, [ObserveCallback(every=1)])
    training.compute_loss = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        training.train()
    del training.compute_loss
    text.batches.clear()
    training.train()
    assert hooks(model) == 0
    rows = Record(tmp_path / "observations.jsonl").read()
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert close(rows[0]["sites"], by_hand(model, "transformer.h.*", text.batches[:1]))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch asks while compiling
def test_compiled_training_is_observed_uncompiled(tmp_path: Path):
    model, text = gpt2(), Text()
    options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4}
    trainer(model, tmp_path, text, [ObserveCallback(every=3)], **options).train()
    torch.compiler.reset()
    rows = Record(tmp_path / "observations.jsonl").read()
    assert [row["step"] for row in rows] == [0, 3]
    assert close(rows[1]["sites"], by_hand(model, "transformer.h.*", text.batches[3:4]))


def test_mistakes_are_named_before_the_first_step(tmp_path: Path):
    class Perceptron(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(LENGTH, 1)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": self.linear(input_ids.float()).mean()}

    def train(model: nn.Module, callback: ObserveCallback, **options: Any) -> list[dict[str, Any]]:
        trainer(model, tmp_path, Text(), [callback], **options).train()
        return Record(tmp_path / "observations.jsonl").read()

    with pytest.raises(InputError, match="no ModuleList"):
        train(Perceptron(), ObserveCallback())
    with pytest.raises(InputError, match="no module matches"):
        train(Perceptron(), ObserveCallback(streams="layers.*"))
    with pytest.raises(InputError, match="at least 1"):
        train(gpt2(), ObserveCallback(every=0))
    with pytest.raises(InputError, match=r"mask of shape \(4, 8\)"):
        train(Perceptron(), ObserveCallback(streams=nn.Linear))
    assert [row["step"] for row in train(Perceptron(), ObserveCallback(streams=nn.Linear, mask=None))] == [0]


def test_several_gpus_in_one_process_are_refused(tmp_path: Path):
    training = trainer(gpt2(), tmp_path, Text(), [callback := ObserveCallback()])
    training.args._n_gpu = 2
    with pytest.raises(InputError, match="2 GPUs in one process"):
        callback.on_train_begin(training.args, training.state, training.control, model=training.model)


def test_other_processes_read_nothing(tmp_path: Path):
    training = trainer(gpt2(), tmp_path, Text(), [callback := ObserveCallback()])
    training.state.is_world_process_zero = False
    callback.on_train_begin(training.args, training.state, training.control, model=training.model)
    callback.on_step_begin(training.args, training.state, training.control)
    assert hooks(training.model) == 0
    callback.on_pre_optimizer_step(training.args, training.state, training.control)
    assert not (tmp_path / "observations.jsonl").exists()


@pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument:UserWarning"
)  # the Trainer's default, without a GPU
def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    (program,) = (
        body
        for body in re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
        if "interop.trainer import" in body
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "frameworks.md", "exec"), {})
    assert list(tmp_path.rglob("observations.jsonl"))
