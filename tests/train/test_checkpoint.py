import shutil

import pytest
import torch
from torch import nn

from gramian.errors import DivergedError, InputError
from gramian.nn.transformer import TransformerConfig, build
from gramian.train.checkpoint import MODEL, OPTIMISER, STATE, checkpoints, load, save
from gramian.train.optimisers import OPTIMISERS, Settings, adamw, build_optimiser

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 brought Muon")
EVERY = [pytest.param(name, marks=[needs_muon] if name == "muon" else []) for name in OPTIMISERS]
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


@pytest.mark.parametrize("name", EVERY)
def test_going_on_from_a_checkpoint_is_going_on(tmp_path, name: str) -> None:
    """Twelve steps at once, and five, a checkpoint, a fresh model and optimiser, and seven: the same bits."""

    def steps(model, optimiser, numbers) -> None:
        for step in numbers:
            tokens = torch.randint(20, (2, 8), generator=torch.Generator().manual_seed(step))
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimiser.step()
            optimiser.zero_grad()

    models = [build(SHAPE, seed) for seed in (0, 0, 1)]
    whole, half, rest = models
    optimisers = [build_optimiser(name, model, Settings(1e-2, 0.1)) for model in models]
    steps(whole, optimisers[0], range(12))
    steps(half, optimisers[1], range(5))
    saved = save(tmp_path, 5, half, optimisers[1], {})
    load(saved, rest, optimisers[2])
    steps(rest, optimisers[2], range(5, 12))
    for one, two in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(one, two)

    forgetful = build(SHAPE, 1)  # control: the weights alone are not enough
    fresh = build_optimiser(name, forgetful, Settings(1e-2, 0.1))
    load(saved, forgetful, build_optimiser(name, forgetful, Settings(1e-2, 0.1)))
    steps(forgetful, fresh, range(5, 12))
    assert not torch.equal(forgetful.embedding.weight, whole.embedding.weight)


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
