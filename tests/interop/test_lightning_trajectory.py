import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gramian.errors import DivergedError, InputError
from gramian.observe.recorder import points, read_sketches

lightning = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from gramian.interop.lightning_trajectory import TrajectoryCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # advice
    pytest.mark.filterwarnings("ignore:The number of training batches"),  # fewer than between two logs
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),  # as is tested
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),  # the other points of this very test
    pytest.mark.filterwarnings(
        "ignore:`isinstance\\(treespec, LeafSpec\\)`:FutureWarning"
    ),  # Lightning's own
]


class Model(lightning.LightningModule):
    def __init__(self, rate: float = 1e-2):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.rate = rate

    def training_step(self, batch: Tensor) -> Tensor:
        return (self.layers(batch)[:, 0] - batch.sum(1)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


class TwoOptimisers(Model):
    """Both of its optimisers step on every batch, so that trainer.global_step goes up by two."""

    automatic_optimization = False

    def training_step(self, batch: Tensor) -> None:
        for optimiser in self.optimizers():
            optimiser.zero_grad()
            self.manual_backward(Model.training_step(self, batch))
            optimiser.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(layer.parameters(), lr=self.rate) for layer in (self.layers[0], self.layers[2])
        ]


class Spy(lightning.Callback):
    """Keeps the parameters before the first step and after each, independently of what is tested."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen[trainer.global_step] = {
            name: p.detach().clone() for name, p in pl_module.named_parameters()
        }

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.on_train_start(trainer, pl_module)


def trainer(folder: Path, callbacks: Any = (), **options: Any) -> Any:
    settings = {
        "max_steps": 7, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, **options,
    }  # fmt: skip
    return lightning.Trainer(default_root_dir=folder, callbacks=[*callbacks], **settings)


def loader(batch: int = 4) -> Any:
    rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(rows, batch_size=batch)  # type: ignore[arg-type]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_exact_path_is_what_a_spy_sees(tmp_path: Path, accumulation: int) -> None:
    spy = Spy()
    callback = TrajectoryCallback(every=3, mode="exact")
    trainer(tmp_path, [callback, spy], accumulate_grad_batches=accumulation).fit(Model(), loader())
    recorded = {step: load_file(path) for step, path in points(tmp_path / "trajectory").items()}
    assert list(recorded) == [0, 3, 6, 7]
    assert all(same(recorded[step], spy.seen[step]) for step in recorded)
    assert not same(recorded[6], spy.seen[5])


def test_a_resumed_training_has_the_sketches_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def train(name: str, steps: int, resume: str | None = None) -> dict[int, dict[str, Tensor]]:
        saver = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        callbacks = [TrajectoryCallback(tmp_path / name / "mine", every=2), saver]
        training = trainer(tmp_path / name, callbacks, max_steps=steps, enable_checkpointing=True)
        path = None if resume is None else str(tmp_path / name / resume)
        training.fit(Model(), loader(64), ckpt_path=path)  # Lightning resumes an epoch at its first batch
        return {step: load_file(path) for step, path in points(tmp_path / name / "mine").items()}

    whole = train("whole", 8)
    assert list(whole) == [0, 2, 4, 6, 8]
    assert list(train("part", 5)) == [0, 2, 4, 5]
    part = train("part", 8, "step=3.ckpt")
    assert list(part) == list(whole)
    assert all(same(part[step], whole[step]) for step in whole)
    assert not any(same(part[step], whole[step - 2]) for step in (2, 4, 6, 8))
    assert read_sketches(tmp_path / "part" / "mine").steps().cross.shape == (5, 5)
    assert list(train("part", 1)) == [0, 1]  # a new training begins anew


def test_steps_of_several_optimisers_do_not_jump_over_a_point(tmp_path: Path) -> None:
    spy = Spy()
    callback = TrajectoryCallback(every=3, mode="exact")
    trainer(tmp_path, [callback, spy], max_steps=10).fit(TwoOptimisers(), loader())
    recorded = points(tmp_path / "trajectory")
    assert list(recorded) == [0, 4, 6, 10]
    assert all(same(load_file(path), spy.seen[step]) for step, path in recorded.items())


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    plain, recorded = Model(), Model()
    trainer(tmp_path).fit(plain, loader())
    trainer(tmp_path, [TrajectoryCallback(every=1)]).fit(recorded, loader())
    assert same(plain.state_dict(), recorded.state_dict())


def test_sharding_strategies_are_refused(tmp_path: Path) -> None:
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

    for strategy in (FSDPStrategy, ModelParallelStrategy):
        training = trainer(tmp_path)
        training.strategy.__class__ = strategy
        with pytest.raises(InputError, match=f"sharded over processes by {strategy.__name__}"):
            TrajectoryCallback().on_train_start(training, Model())
    assert not (tmp_path / "trajectory").exists()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1, got 0"):
        TrajectoryCallback(every=0)
    with pytest.raises(InputError, match="unknown mode 'all'"):
        trainer(tmp_path, [TrajectoryCallback(mode="all")]).fit(Model(), loader())
    with pytest.raises(DivergedError, match="not finite at step 1"):
        trainer(tmp_path, [TrajectoryCallback(every=1)]).fit(Model(float("inf")), loader())


def test_the_missing_extra_is_named() -> None:
    program = (
        "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "import importlib.util as u; u.find_spec = lambda name: None\n"
        "import gramian.interop.lightning_trajectory"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        'MissingExtraError: recording trajectories in Lightning needs lightning: pip install "gramian['
        in (done.stderr)
    )
