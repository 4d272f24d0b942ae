"""Training image classifiers: what a batch shows, what is kept, and that a stopped run ends in the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

from gramian.data.images import Images, Labelled, load_images
from gramian.errors import DivergedError, InputError, StoppedError
from gramian.tasks import images as task
from gramian.tasks.images import (
    BEST,
    ImageConfig,
    ImageLoss,
    Network,
    Pictures,
    evaluations,
    judge,
    judge_test,
    prepare,
    sgd,
    train_images,
    training_batches,
)
from gramian.train.run import Run

QUIET = Console(quiet=True)


def small(folder: Path, **changed) -> ImageConfig:
    training = sgd(12, 4, batch=32, learning_rate=0.03, device="cpu", log_every=2)
    config = ImageConfig(
        data=Pictures(count=400),
        network=Network(depth=8, widths=(4, 6, 8)),
        training=training,
        runs=folder,
    )
    return replace(config, **changed)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(sorted(run.checkpoints.glob("step-*"))[-1] / "model.safetensors")


def test_batches_are_epochs_of_every_image_and_depend_on_seed_and_step_alone(tmp_path) -> None:
    config = small(tmp_path)
    images = config.data.load()
    count, per_epoch = len(images.train), len(images.train) // 32
    batches = training_batches(config, images)
    epoch = torch.cat([batches(step)[:, 0] for step in range(per_epoch)])
    assert len(epoch.unique()) == len(epoch) == 32 * per_epoch
    assert not torch.equal(batches(0), batches(per_epoch))
    assert torch.equal(batches(3), training_batches(config, images)(3))
    assert not (batches(0)[:, 1:] != 0).any()
    moved = training_batches(replace(config, shift=2, flip=True), images)(0)
    assert set(moved[:, 1].tolist()) == set(range(5))
    assert set(moved[:, 3].tolist()) == {0, 1}
    assert torch.equal(moved[:, 0], batches(0)[:, 0])
    other = replace(config, training=replace(config.training, seed=1))
    assert not torch.equal(training_batches(other, images)(0), batches(0))
    with pytest.raises(InputError, match="fill no batch of 1024"):
        training_batches(replace(config, training=replace(config.training, batch=1024)), images)
    assert count > 32


def test_images_are_moved_and_mirrored_as_a_loop_would() -> None:
    images = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    loss = ImageLoss(Labelled(images, torch.tensor([0, 1, 0])), 1)
    batch = torch.tensor([[2, 0, 2, 0], [0, 1, 1, 1], [1, 2, 0, 1], [0, 1, 1, 0]])
    seen = loss.pictures(*batch.unbind(1))
    for row, (which, down, right, mirrored) in zip(seen, batch.tolist(), strict=True):
        for i in range(4):
            for j in range(5):
                across = (4 - j if mirrored else j) + right - 1
                up = i + down - 1
                inside = 0 <= up < 4 and 0 <= across < 5
                expected = images[which, :, up, across] if inside else torch.zeros(2)
                assert torch.equal(row[:, i, j], expected)
    assert torch.equal(seen[3], images[0])  # neither moved nor mirrored
    model = nn.Sequential(nn.Flatten(), nn.Linear(40, 2))
    expected = cross_entropy(model(seen), torch.tensor([0, 0, 1, 0]))
    assert torch.equal(loss(model, batch), expected)


def test_judging_is_the_mean_over_all_images() -> None:
    data = Labelled(torch.randn(70, 1, 2, 2), torch.arange(70) % 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    found = judge(model, data, batch=32)
    logits = model(data.images)
    assert found["loss"] == pytest.approx(cross_entropy(logits, data.labels).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == data.labels).float().mean().item())


def test_a_run_learns_and_reports_the_best_epoch_on_test_images(tmp_path) -> None:
    training = sgd(60, 10, batch=32, learning_rate=0.05, device="cpu")
    config = small(tmp_path, training=training, network=Network(depth=8), data=Pictures())
    run = train_images(config, console=QUIET)
    result, judged = run.result(), evaluations(run)
    assert [row["step"] for row in judged] == [0, 10, 20, 30, 40, 50, 60]
    best = max(row["validation_accuracy"] for row in judged)
    assert result["validation_accuracy"] == best > 0.7
    assert judged[0]["validation_accuracy"] < 0.4  # control: untrained
    first = next(row for row in judged if row["validation_accuracy"] == best)
    assert result["best_step"] == first["step"]
    images = config.data.load()
    model = config.network.build(images, 0)
    model.load_state_dict(load_file(run.folder / BEST))
    assert judge(model.eval(), images.validation)["accuracy"] == pytest.approx(best)
    assert result["test_accuracy"] == judge(model, images.test)["accuracy"]
    rows = [row for row in run.record.read() if row["kind"] == "train"]
    assert result["first_gradient_norm"] == rows[0]["gradient_norm"] > 0
    assert len(rows) == 60


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_stopped_run_ends_in_the_same_weights(norm, tmp_path, monkeypatch) -> None:
    config = small(tmp_path, network=Network(depth=8, widths=(4, 6, 8), norm=norm), shift=1, flip=True)
    whole = train_images(config, console=QUIET)
    asked = iter([None] * 3 + ["SIGINT"] * 9)

    class Requests:
        def __enter__(self):
            return lambda: next(asked)

        def __exit__(self, *error):
            return None

    stopped = replace(config, name="stopped")
    with monkeypatch.context() as patch:
        patch.setattr("gramian.train.side_by_side.stop_requests", Requests)
        with pytest.raises(StoppedError, match="at step 6"):
            train_images(stopped, console=QUIET)
    assert Run(tmp_path / "stopped").result() is None
    again = train_images(stopped, resume=True, console=QUIET)
    one, two = weights(whole), weights(again)
    assert all(torch.equal(one[name], two[name]) for name in one)
    best, best_again = load_file(whole.folder / BEST), load_file(again.folder / BEST)
    assert all(torch.equal(best[name], best_again[name]) for name in best)
    same = ("best_step", "validation_accuracy", "test_accuracy", "test_loss", "first_gradient_norm")
    assert all(whole.result()[name] == again.result()[name] for name in same)
    other = train_images(
        replace(config, name="other", training=replace(config.training, seed=1)), console=QUIET
    )
    assert any(not torch.equal(one[name], value) for name, value in weights(other).items())


def test_a_network_that_explodes_is_said_to_diverge(tmp_path) -> None:
    network = Network(depth=50, widths=(4, 4, 4), rule="none", weight_std=2.0)
    with pytest.raises(DivergedError, match="not finite"):
        train_images(small(tmp_path, network=network), console=QUIET)
    stable = replace(network, rule="uniform", weight_std=1.0)
    assert train_images(small(tmp_path, network=stable, name="stable"), console=QUIET).result()


def test_settings_that_cannot_be_used_are_named(tmp_path) -> None:
    images = load_images(count=200)
    for changed, words in (
        ({"network": Network(depth=33)}, r"6n \+ 2"),
        ({"network": Network(depth=2)}, r"6n \+ 2"),
        ({"network": Network(widths=(8, 16))}, "three stages, got 2"),
        ({"network": Network(norm="layer")}, "choose none or batch"),
        ({"network": Network(rule="fixup")}, "unknown depth rule"),
        ({"shift": -1}, "shift cannot be negative"),
        ({"training": sgd(4, 2, gradient_checkpointing=True)}, "gradient_checkpointing"),
        ({"training": sgd(4, 2, batch=4096)}, "fill no batch"),
    ):
        with pytest.raises(InputError, match=words):
            prepare(small(tmp_path, **changed), images, tmp_path / "run", resume=False)
        assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="plain folder name"):
        train_images(small(tmp_path, name="a/b"), console=QUIET)
    with pytest.raises(InputError, match="holds no weights of this network"):
        judge_test(small(tmp_path), images, Run(tmp_path))


def test_the_test_images_are_not_looked_at_while_training(tmp_path, monkeypatch) -> None:
    seen: list[int] = []
    known = task.judge
    monkeypatch.setattr(task, "judge", lambda model, data: seen.append(len(data)) or known(model, data))
    config = small(tmp_path)
    images: Images = config.data.load()
    train_images(config, console=QUIET)
    assert len(images.test) != len(images.validation)
    assert seen == [len(images.validation)] * 4 + [len(images.test)]
