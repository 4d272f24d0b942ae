import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gramian.errors import DivergedError, InputError
from gramian.observe.recorder import points, read_sketches

transformers = pytest.importorskip("transformers")

from gramian.interop.trainer_trajectory import TrajectoryCallback  # noqa: E402

LENGTH = 8


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.set_seed(0)
    return transformers.GPT2LMHeadModel(config)


def text() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(40, (64, LENGTH), generator=draw)
    return [{"input_ids": row, "labels": row} for row in rows]


class Spy(transformers.TrainerCallback):
    """Keeps the parameters before the first step and after each, independently of what is tested."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}

    on_step_end = on_train_begin


def trainer(folder: Path, callbacks: Any, model: nn.Module | None = None, **options: Any) -> Any:
    settings = {
        "output_dir": str(folder), "max_steps": 7, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "logging_strategy": "no", "lr_scheduler_type": "constant", **options,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**settings)
    return transformers.Trainer(
        model=model or gpt2(), args=arguments, train_dataset=text(), eval_dataset=text()[:4],
        callbacks=[*callbacks],
    )  # fmt: skip


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_exact_path_is_what_a_spy_sees(tmp_path: Path, accumulation: int) -> None:
    spy = Spy()
    callback = TrajectoryCallback(every=3, mode="exact")
    trainer(tmp_path, [callback, spy], gradient_accumulation_steps=accumulation).train()
    recorded = {step: load_file(path) for step, path in points(tmp_path / "trajectory").items()}
    assert list(recorded) == [0, 3, 6, 7]
    assert all(same(recorded[step], spy.seen[step]) for step in recorded)
    assert not same(recorded[6], spy.seen[5])
    assert list(spy.seen) == list(range(8))


def test_a_resumed_training_has_the_sketches_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def train(name: str, steps: int, resume: bool = False) -> dict[int, dict[str, Tensor]]:
        options = {"save_strategy": "steps", "save_steps": 3, "max_steps": steps}
        training = trainer(tmp_path / name, [TrajectoryCallback(every=2)], **options)
        training.train(resume_from_checkpoint=resume or None)
        files = points(tmp_path / name / "trajectory")
        return {step: load_file(path) for step, path in files.items()}

    whole = train("whole", 8)
    assert list(whole) == [0, 2, 4, 6, 8]
    assert list(train("part", 5)) == [0, 2, 4, 5]
    shutil.rmtree(tmp_path / "part" / "checkpoint-5")
    part = train("part", 8, resume=True)  # from step 3
    assert list(part) == list(whole)
    assert all(same(part[step], whole[step]) for step in whole)
    assert not any(same(part[step], whole[step - 2]) for step in (2, 4, 6, 8))
    assert read_sketches(tmp_path / "part" / "trajectory").steps().cross.shape == (5, 5)
    assert list(train("part", 1)) == [0, 1]  # a new training begins anew


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    def weights(callbacks: list) -> dict[str, Tensor]:
        model = gpt2()
        trainer(tmp_path, callbacks, model).train()
        return model.state_dict()

    assert same(weights([]), weights([TrajectoryCallback(every=1)]))


def test_a_training_that_stops_early_ends_with_its_last_weights(tmp_path: Path) -> None:
    class Stop(Spy):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    spy = Stop()
    options = {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 16}
    trainer(tmp_path, [TrajectoryCallback(tmp_path / "mine", every=3, mode="exact"), spy], **options).train()
    recorded = points(tmp_path / "mine")
    assert list(recorded) == [0, 3, 4]
    assert same(load_file(recorded[4]), spy.seen[4])


def test_the_best_weights_are_not_taken_for_the_last(tmp_path: Path) -> None:
    spy = Spy()
    callback = TrajectoryCallback(tmp_path / "mine", every=2, mode="exact")
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    training = trainer(
        tmp_path, [callback, spy], max_steps=3, learning_rate=1.0, load_best_model_at_end=True, **options
    )
    training.train()
    assert same(load_file(points(tmp_path / "mine")[3]), spy.seen[3])
    assert not same(dict(training.model.named_parameters()), spy.seen[3])


@pytest.mark.parametrize(("setting", "name"), [("deepspeed", "DeepSpeed"), ("fsdp", "FSDP")])
def test_sharded_training_is_refused_in_every_process(tmp_path: Path, setting: str, name: str) -> None:
    callback = TrajectoryCallback()
    training = trainer(tmp_path, [callback])
    training.state.is_world_process_zero = False
    callback.on_train_begin(training.args, training.state, training.control, model=training.model)
    setattr(training.args, setting, "yes")
    with pytest.raises(InputError, match=f"sharded over processes by {name}"):
        callback.on_train_begin(training.args, training.state, training.control, model=training.model)
    assert points(tmp_path / "trajectory") == {}


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1, got 0"):
        TrajectoryCallback(every=0)
    with pytest.raises(InputError, match="unknown mode 'all'"):
        trainer(tmp_path, [TrajectoryCallback(mode="all")]).train()
    with pytest.raises(DivergedError, match="not finite at step 1"):
        trainer(tmp_path, [TrajectoryCallback(every=1)], learning_rate=float("inf")).train()
