import csv
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.errors import InputError, MissingExtraError
from gramian.observe import Probe, Record
from gramian.observe.watch import summary

lightning = pytest.importorskip("lightning")
transformers = pytest.importorskip("transformers")

from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from gramian.interop.lightning import ObserveCallback  # noqa: E402

ROOT = Path(__file__).parents[2]
LENGTH = 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # advice
    pytest.mark.filterwarnings("ignore:The number of training batches"),  # fewer than between two logs
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),  # as is tested
    pytest.mark.filterwarnings(
        "ignore:`isinstance\\(treespec, LeafSpec\\)`:FutureWarning"
    ),  # Lightning's own
]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=LENGTH, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    transformers.set_seed(0)
    return transformers.GPT2LMHeadModel(config).train()


class Model(lightning.LightningModule):
    """Someone's module around GPT-2 that keeps the batches it was trained on."""

    def __init__(self, manual: bool = False, rate: float = 0.0):
        super().__init__()
        self.net, self.rate = gpt2(), rate
        self.automatic_optimization = not manual
        self.batches: list[dict[str, Tensor]] = []
        self.fail_at: str | None = None

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.batches.append(batch)
        loss = self.net(**batch).loss
        if self.fail_at == "loss":
            raise RuntimeError("planted")
        if not self.automatic_optimization:
            optimiser: Any = self.optimizers()
            optimiser.zero_grad()
            self.manual_backward(loss)
            optimiser.step()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class Validated(Model):
    def validation_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(**batch).loss


def text() -> list[dict[str, Tensor]]:
    draw, rows = torch.Generator().manual_seed(0), []
    for _ in range(40):
        ids = torch.randint(40, (LENGTH,), generator=draw)
        mask = (torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (), generator=draw)).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    return rows


def trainer(folder: Path, callbacks: Any = (), kind: Any = lightning.Trainer, **options: Any) -> Any:
    settings = {
        "max_steps": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, **options,
    }  # fmt: skip
    return kind(default_root_dir=folder, callbacks=[*callbacks], **settings)


def loader() -> Any:
    return torch.utils.data.DataLoader(text(), batch_size=4)  # type: ignore[arg-type]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def by_hand(model: Model, batches: list[dict[str, Tensor]], **options: Any) -> dict[str, dict[str, float]]:
    with torch.no_grad(), Probe(model, "net.transformer.h.*", **options).sample(0) as sample:
        assert sample is not None
        for batch in batches:
            sample.mask = batch["attention_mask"]
            model.net.eval()(**batch)
    return sample.readings()


def close(got: dict[str, dict[str, float]], want: dict[str, dict[str, float]]) -> bool:
    assert got.keys() == want.keys()
    return all(got[site] == pytest.approx(want[site], rel=1e-5) for site in want)


def test_records_what_a_probe_reads_by_hand(tmp_path: Path):
    model = Validated()
    options = {"accumulate_grad_batches": 2, "val_check_interval": 1, "limit_val_batches": 1}
    training = trainer(tmp_path, [ObserveCallback(every=2)], num_sanity_val_steps=1, **options)
    training.fit(model, loader(), loader())  # validates between the micro-batches
    assert hooks(model) == 0
    rows = Record(tmp_path / "observations.jsonl").read()
    assert [(row["kind"], row["step"]) for row in rows] == [("observe", 0), ("observe", 2)]
    assert len(rows[0]["sites"]) == 4
    assert close(rows[0]["sites"], by_hand(model, model.batches[0:2]))
    assert close(rows[1]["sites"], by_hand(model, model.batches[4:6]))
    assert not close(rows[0]["sites"], by_hand(model, model.batches[0:1]))


def test_attention_is_recorded_of_any_model(tmp_path: Path):
    model, options = Model(), {"attentions": "calls", "sequences": 4, "skip_first_token": True}
    training = trainer(
        tmp_path, [ObserveCallback(every=2, **options)], accumulate_grad_batches=2, max_steps=1
    )
    training.fit(model, loader())
    assert hooks(model) == 0
    assert torch._C._len_torch_function_stack() == 0
    (row,) = Record(tmp_path / "observations.jsonl").read()
    assert close(row["sites"], by_hand(model, model.batches[:2], **options))
    model.net.set_attn_implementation("eager")
    rows = []
    for batch in model.batches[:2]:
        with torch.no_grad():
            weights = model.net(**batch, output_attentions=True).attentions[1]
        rows.append(weights.transpose(1, 2)[batch["attention_mask"] == 1].double())
    a = torch.cat(rows)
    entropy = -torch.where(a > 0, a * a.log(), 0).sum(-1).mean().item()
    assert row["sites"]["net.transformer.h.1.attn"] == pytest.approx(
        {"attention_entropy": entropy, "sink_rate": (a[..., 0].mean(0) > 0.3).double().mean().item()},
        rel=1e-5,
    )
    assert row["peaks"].keys() == row["neurons"].keys() < row["sites"].keys()


def test_manual_optimisation(tmp_path: Path):
    model = Model(manual=True)
    trainer(tmp_path, [ObserveCallback(every=2)]).fit(model, loader())
    rows = Record(tmp_path / "observations.jsonl").read()
    assert [row["step"] for row in rows] == [0, 2]
    assert close(rows[1]["sites"], by_hand(model, model.batches[2:3]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_passes_that_checkpointing_repeats_do_not_count(tmp_path: Path, reentrant: bool):
    class Checkpointed(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers, self.passes = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), 0

        def training_step(self, x: Tensor) -> Tensor:
            self.batch = x.requires_grad_()
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(self.run, layer, x, use_reentrant=reentrant)
            return x.square().mean()

        def run(self, layer: nn.Module, x: Tensor) -> Tensor:
            self.passes += 1
            return layer(x)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    model = Checkpointed()
    data: Any = torch.utils.data.DataLoader(torch.randn(20, 6), batch_size=5)
    trainer(tmp_path, [ObserveCallback()], max_steps=1).fit(model, data)
    assert model.passes == 6
    (row,) = Record(tmp_path / "observations.jsonl").read()
    with Probe(model, "layers.*").sample(0) as sample:
        model.layers[2](model.layers[1](model.layers[0](model.batch)))
    assert sample is not None
    assert close(row["sites"], sample.readings())  # the readings over pairs would differ if rows came twice


def test_training_is_the_same_with_and_without(tmp_path: Path):
    def weights(callbacks: list) -> list[Tensor]:
        model = Model(rate=0.1)
        trainer(tmp_path, callbacks).fit(model, loader())
        return [parameter.detach().clone() for parameter in model.parameters()]

    plain, observed = weights([]), weights([ObserveCallback(every=1, attentions="calls")])
    assert all(torch.equal(a, b) for a, b in zip(plain, observed, strict=True))
    assert not torch.equal(next(Model().parameters()), plain[0])


def test_loggers_get_the_summary_at_the_steps_that_are_read(tmp_path: Path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer(tmp_path, [ObserveCallback(every=2)], logger=logger).fit(Model(), loader())
    folder = Path(logger.log_dir)
    rows = Record(folder / "observations.jsonl").read()
    with (folder / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["observe/rms_max"]]
    assert [int(row["step"]) for row in logged] == [row["step"] for row in rows] == [0, 2]
    for got, row in zip(logged, rows, strict=True):
        want = summary(row["sites"])
        assert {key: float(got[key]) for key in want} == pytest.approx(want)


def test_a_resumed_training_writes_no_step_twice_and_a_new_one_begins_anew(tmp_path: Path):
    def train(steps: int, resume: Path | None = None) -> list[int]:
        training = trainer(tmp_path, [ObserveCallback(tmp_path / "mine.jsonl", every=2)], max_steps=steps)
        training.fit(Model(), loader(), ckpt_path=resume)
        training.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return [row["step"] for row in Record(tmp_path / "mine.jsonl").read()]

    train(3)
    assert train(5) == [0, 2, 4]
    assert train(8, tmp_path / "3.ckpt") == [0, 2, 4, 6]
    assert train(1) == [0]


@pytest.mark.parametrize("where", ["forward", "loss", "backward", "optimiser", "interrupt"])
def test_an_exception_leaves_no_hook(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt if where == "interrupt" else RuntimeError("planted")

    model = Model()
    if where == "loss":
        model.fail_at = where
    elif where == "backward":
        model.net.transformer.wte.weight.register_hook(fail)
    elif where == "optimiser":
        monkeypatch.setattr(torch.optim.SGD, "step", fail)
    else:
        model.net.transformer.h[1].register_forward_hook(fail)
    already = hooks(model)
    with pytest.raises(SystemExit if where == "interrupt" else RuntimeError):
        trainer(tmp_path, [ObserveCallback(every=1)], accumulate_grad_batches=2).fit(model, loader())
    assert hooks(model) == already


def test_mistakes_are_named_before_the_first_step_is_over(tmp_path: Path):
    with pytest.raises(InputError, match="no module matches"):
        trainer(tmp_path, [ObserveCallback(streams="layers.*")]).fit(Model(), loader())
    with pytest.raises(InputError, match="at least 1"):
        trainer(tmp_path, [ObserveCallback(every=0)]).fit(Model(), loader())
    model = Model()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"through Model that calls unused; .* streams="):
        trainer(tmp_path, [ObserveCallback(streams="unused")]).fit(model, loader())


def test_other_processes_read_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, callback = Model(), ObserveCallback(every=1)
    training = trainer(tmp_path, [callback])
    monkeypatch.setattr(type(training), "is_global_zero", False)
    training.fit(model, loader())
    assert len(model.batches) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_both_packages_take_the_callback(tmp_path: Path, package: str):
    pytorch = pytest.importorskip(package)

    class Own(pytorch.LightningModule):
        training_step, configure_optimizers = Model.training_step, Model.configure_optimizers

        def __init__(self):
            super().__init__()
            self.net, self.rate, self.batches, self.fail_at = gpt2(), 0.0, [], None

    trainer(tmp_path, [ObserveCallback(every=2)], pytorch.Trainer).fit(Own(), loader())
    assert [row["step"] for row in Record(tmp_path / "observations.jsonl").read()] == [0, 2]


def test_a_missing_package_is_named_and_the_older_one_will_do(monkeypatch: pytest.MonkeyPatch):
    source, missing, real = ROOT / "src" / "gramian" / "interop" / "lightning.py", {"lightning"}, find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else real(name))
    callback = runpy.run_path(str(source))["ObserveCallback"]
    assert callback.__base__.__module__.startswith("pytorch_lightning")
    missing.add("pytorch_lightning")
    with pytest.raises(MissingExtraError, match=r'pip install "gramian\[lightning\]"'):
        runpy.run_path(str(source))


def test_the_package_alone_imports_no_framework():
    names = {"lightning", "pytorch_lightning", "torchmetrics", "transformers"}
    program = f"import gramian.interop, sys; assert not {names} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    (program,) = (
        body
        for body in re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
        if "interop.lightning" in body
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "frameworks.md", "exec"), {})
    assert list(tmp_path.rglob("observations.jsonl"))
