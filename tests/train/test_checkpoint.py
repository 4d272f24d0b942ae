import errno
import json
import shutil
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gramian.errors import DivergedError, InputError
from gramian.nn.transformer import TransformerConfig, build
from gramian.train import manifest
from gramian.train.checkpoint import (
    MODEL,
    OPTIMISER,
    STATE,
    check,
    checkpoints,
    load,
    load_weights,
    newest,
    save,
)
from gramian.train.manifest import MANIFEST
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


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with the checkpoints of steps 1, 2 and 3; tests work on copies."""
    folder = tmp_path_factory.mktemp("kept")
    for step in (1, 2, 3):
        save(folder, step, *trained(step), {"seconds": 1.0})
    return folder


def flip(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place // 8 % len(content)] ^= 1 << place % 8
    path.write_bytes(content)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from([MODEL, OPTIMISER, STATE, MANIFEST]), place=st.integers(0, 2**24))
def test_no_flipped_bit_goes_unseen(kept, name, place) -> None:
    saved = checkpoints(kept)[0]
    content = (saved.folder / name).read_bytes()
    flip(saved.folder / name, place)
    try:
        with pytest.raises(InputError, match="cannot be read") as caught:
            check(saved)
        assert str(saved.folder) in str(caught.value)
        assert "\n" not in str(caught.value)
        if name == MODEL:
            with pytest.raises(InputError, match="cannot be read"):
                load_weights(saved.folder, build(SHAPE, 0))
    finally:
        (saved.folder / name).write_bytes(content)
    check(saved)


def test_without_the_manifest_a_flipped_weight_would_pass(kept, tmp_path) -> None:
    """The control: neither safetensors nor the sizes know of it."""
    shutil.copytree(kept, tmp_path / "kept")
    saved = checkpoints(tmp_path / "kept")[0]
    flip(saved.folder / MODEL, 8 * (saved.folder / MODEL).stat().st_size - 1)
    with pytest.raises(InputError, match="by its SHA-256"):
        check(saved)
    (saved.folder / MANIFEST).unlink()
    check(saved)
    load(saved, *trained(4))


def test_checkpoints_of_earlier_versions_load(kept, tmp_path) -> None:
    shutil.copytree(kept, tmp_path / "kept")
    for saved in checkpoints(tmp_path / "kept"):
        (saved.folder / MANIFEST).unlink()
    saved = newest(tmp_path / "kept")
    assert saved is not None
    assert load(saved, *trained(4)) == {"seconds": 1.0, "step": 3}
    (saved.folder / OPTIMISER).write_bytes((saved.folder / OPTIMISER).read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step-00000003 cannot be read"):
        assert newest(tmp_path / "kept").step == 2


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "manifest"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(kept, tmp_path, damage) -> None:
    folder = tmp_path / "kept"
    shutil.copytree(kept, folder)
    path = folder / "step-00000003" / (MANIFEST if damage == "manifest" else OPTIMISER)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        path.unlink()
    else:
        flip(path, 999)
    with pytest.warns(UserWarning, match="is left as step-00000003 and step 2 is used"):
        assert newest(folder, set_aside=False).step == 2
    assert [saved.step for saved in checkpoints(folder)] == [1, 2, 3]
    with pytest.warns(UserWarning, match="is left as damaged-") as told:
        saved = newest(folder)
    assert len(told) == 1
    assert str(path) in str(told[0].message)
    assert "is left as damaged-step-00000003 and step 2 is used" in str(told[0].message)
    assert load(saved, *trained(4))["step"] == 2
    assert [saved.step for saved in checkpoints(folder)] == [1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest(folder).step == 2
    shutil.copytree(folder / "damaged-step-00000003", folder / "step-00000003")
    with pytest.warns(UserWarning, match="damaged-step-00000003-2"):
        newest(folder)
    assert len(list(folder.iterdir())) == 4  # nothing is thrown away


def test_when_all_are_damaged_nothing_is_touched(kept, tmp_path) -> None:
    folder = tmp_path / "kept"
    shutil.copytree(kept, folder)
    assert newest(tmp_path / "none") is None
    for saved in checkpoints(folder):
        flip(saved.folder / MODEL, 12345)
    for _ in range(2):
        with pytest.raises(InputError, match=r"no checkpoint in .* is whole: .*step-00000003.*--overwrite"):
            newest(folder)
    assert [saved.step for saved in checkpoints(folder)] == [1, 2, 3]


def test_old_checkpoints_stay_when_the_new_one_is_not_on_the_disk(kept, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "kept"
    shutil.copytree(kept, folder)
    plain = manifest._described

    def lying(path):
        """Describe what was to be written, then lose a bit of it."""
        about = plain(path)
        if path.parent.suffix == ".part":
            flip(path, 4321)
        return about

    monkeypatch.setattr(manifest, "_described", lying)
    with pytest.raises(InputError, match=r"step-00000004.* cannot be read"):
        save(folder, 4, *trained(4), {}, keep=1)
    monkeypatch.undo()
    assert [saved.step for saved in checkpoints(folder)] == [1, 2, 3, 4]
    with pytest.warns(UserWarning, match="step 3 is used"):
        assert newest(folder).step == 3
    save(folder, 5, *trained(5), {}, keep=1)
    assert [saved.step for saved in checkpoints(folder)] == [5]


def test_a_half_removed_checkpoint_is_none(kept, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "kept"
    shutil.copytree(kept, folder)

    def killed(path) -> None:
        (path / STATE).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(folder, 4, *trained(4), {}, keep=3)
    assert [saved.step for saved in checkpoints(folder)] == [2, 3, 4]


def test_disks_that_fail_are_damage_and_missing_rights_are_not(kept, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "kept"
    shutil.copytree(kept, folder)
    plain = manifest._described

    def failing(number: int):
        def describe(path):
            if path.parent.name == "step-00000003" and path.name == OPTIMISER:
                raise OSError(number, errno.errorcode[number], str(path))
            return plain(path)

        return describe

    monkeypatch.setattr(manifest, "_described", failing(errno.EACCES))
    with pytest.raises(PermissionError):
        newest(folder)
    monkeypatch.setattr(manifest, "_described", failing(errno.EIO))
    with pytest.warns(UserWarning, match=r"optimiser\.safetensors cannot be read: EIO; .*step 2 is used"):
        assert newest(folder).step == 2


def test_the_manifest_is_of_all_files_and_written_last(tmp_path) -> None:
    saved = save(tmp_path, 2, *trained(0), {})
    files = json.loads((saved.folder / MANIFEST).read_text())["files"]
    assert files.keys() == {path.name for path in saved.folder.iterdir()} - {MANIFEST}
    for name, about in files.items():
        assert about["bytes"] == (saved.folder / name).stat().st_size
    last = max(saved.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert last.name == MANIFEST
