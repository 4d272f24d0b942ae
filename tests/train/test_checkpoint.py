import shutil

import pytest
import torch
from torch import nn

from gramian.errors import DivergedError, InputError
from gramian.nn.transformer import TransformerConfig, build
from gramian.train.checkpoint import MODEL, OPTIMISER, STATE, checkpoints, load, save
from gramian.train.optimisers import adamw

SHAPE = TransformerConfig(vocabulary=20, context=8, width=12, depth=2, heads=2, block="sas")


def trained(seed: int, steps: int = 2):
    model = build(SHAPE, seed)
    optimiser = adamw(model, 0.01, 0.1, (0.9, 0.99), 1e-8)
    for step in range(steps):
        tokens = torch.randint(20, (2, 8), generator=torch.Generator().manual_seed(step))
        model(tokens).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    return model, optimiser


def test_what_is_loaded_is_what_was_saved(tmp_path) -> None:
    model, optimiser = trained(0)
    saved = save(tmp_path, 2, model, optimiser, {"seconds": 1.5})
    other, fresh = trained(1)
    state = load(saved, other, fresh)
    assert state == {"seconds": 1.5, "step": 2}
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert other.head.weight is other.embedding.weight  # still tied
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimiser.state[one].items():
            assert torch.equal(value, fresh.state[two][key])


def test_keeps_the_newest_and_leaves_nothing_half_written(tmp_path, monkeypatch) -> None:
    model, optimiser = trained(0)
    for step in (5, 10, 15, 100):
        save(tmp_path, step, model, optimiser, {}, keep=2)
    assert [saved.step for saved in checkpoints(tmp_path)] == [15, 100]

    def fail(*arguments, **settings) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("gramian.train.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 200, model, optimiser, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015", "step-00000100"]


def test_broken_weights_are_not_saved(tmp_path) -> None:
    model, optimiser = trained(0)
    model.blocks[0][2].branch[1].up.weight.data[0, 0] = float("nan")
    with pytest.raises(DivergedError, match=r"blocks\.0\.2\.branch\.1\.up\.weight are not finite"):
        save(tmp_path, 3, model, optimiser, {})
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("name", [MODEL, OPTIMISER, STATE])
@pytest.mark.parametrize("damage", ["truncated", "missing", "garbage"])
def test_damaged_checkpoints_are_refused_by_name(tmp_path, name, damage) -> None:
    model, optimiser = trained(0)
    saved = save(tmp_path, 2, model, optimiser, {})
    path = saved.folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "garbage":
        path.write_bytes(b"\x80\x04not what it says" * 20)
    with pytest.raises(InputError, match="cannot be read") as caught:
        load(saved, *trained(1))
    assert str(saved.folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_models_checkpoint_is_refused(tmp_path) -> None:
    saved = save(tmp_path, 2, *trained(0), {})
    other = nn.Linear(3, 3)
    with pytest.raises(InputError, match="of another model"):
        load(saved, other, adamw(other, 0.1, 0.0, (0.9, 0.99), 1e-8))
    shutil.rmtree(saved.folder)
    assert checkpoints(tmp_path) == []
