import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gramian.errors import InputError
from gramian.observe.series import Series, find_series


def weights(path: Path, value: float = 0.0, **about: str) -> Path:
    """A file of weights, with metadata where it is safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {"a": torch.full((3,), value)}
    if path.suffix == ".safetensors":
        save_file(saved, path, about or None)
    else:
        torch.save({"state_dict": saved, **{name: int(step) for name, step in about.items()}}, path)
    return path


def only(*paths: Path) -> Series:
    (series,) = find_series(paths)
    return series


def steps(series: Series) -> list[int]:
    return [checkpoint.step for checkpoint in series.checkpoints]


def files(series: Series) -> list[str]:
    return [file.name for checkpoint in series.checkpoints for file in checkpoint.files]


def fails(match: str, *paths: Path) -> None:
    with pytest.raises(InputError, match=match):
        find_series(paths)


def run_folder(folder: Path, saved: int, recorded: int = 0) -> Path:
    """A run of ours that ended."""
    weights(folder / "model.safetensors")
    for step in range(0, 10 * saved, 10):
        at = folder / "checkpoints" / f"step-{step:08d}"
        weights(at / "model.safetensors")
        weights(at / "optimiser.safetensors")
        (at / "state.json").write_text(json.dumps({"step": step}))
    for step in range(recorded):
        weights(folder / "trajectory" / f"step-{step:08d}.safetensors", seed="0", mode="sketch")
    return folder


def hub_model(folder: Path, refs: dict[str, str], name: str = "model.safetensors") -> Path:
    """A model in the cache of the hub: snapshots link to blobs, refs name commits."""
    for ref, commit in refs.items():
        blob, snapshot = folder / "blobs" / f"of-{commit}", folder / "snapshots" / commit
        weights(folder / "new.safetensors", ord(commit[0]))
        blob.parent.mkdir(exist_ok=True)
        (folder / "new.safetensors").rename(blob)
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return folder


def test_listed_files_by_their_steps_whatever_the_order(tmp_path: Path):
    paths = [weights(tmp_path / f"step{step}.safetensors", step) for step in (10, 2, 100)]
    series = only(*paths)
    assert steps(series) == [2, 10, 100]
    assert [checkpoint.path for checkpoint in series.checkpoints] == [paths[1], paths[0], paths[2]]
    assert series.name == tmp_path.name
    assert series.remarks == ()


@pytest.mark.parametrize(
    ("pattern", "numbers", "expected"),
    [
        ("step{}", (10, 2), [2, 10]),
        ("step-{:08d}", (200, 1000), [200, 1000]),
        ("step_{}", (1, 9), [1, 9]),
        ("checkpoint-{}", (500, 1000), [500, 1000]),
        ("ckpt_{:03d}", (0, 358), [0, 358]),
        ("global_step{}", (5, 10), [5, 10]),
        ("iter_{:07d}", (5, 10), [5, 10]),
        ("epoch=3-step={}", (7, 20), [7, 20]),
        ("epoch={}", (3, 20), [3, 20]),
        ("step{}-tokens4B", (1000, 2000), [1000, 2000]),
        ("step{}k", (1, 10), [1000, 10000]),
        ("llama-7b-v2-{}-loss0.35", (11, 3), [3, 11]),
        ("model_{}", (11, 3), [3, 11]),
        ("{:04d}", (11, 3), [3, 11]),
        ("Step={}", (11, 3), [3, 11]),
    ],
)
@pytest.mark.parametrize("kind", ["/model.safetensors", ".safetensors", ".pt", ".ckpt"])
def test_steps_in_names(
    tmp_path: Path, pattern: str, numbers: tuple[int, ...], expected: list[int], kind: str
):
    for number in numbers:
        weights(tmp_path / f"{pattern.format(number)}{kind}")
    assert steps(only(tmp_path)) == expected


def test_the_number_after_a_word_comes_before_others(tmp_path: Path):
    for step in (1, 2):
        weights(tmp_path / f"epoch={9 - step}-step={step}-val=0.5.ckpt")
    assert steps(only(tmp_path)) == [1, 2]


def test_a_hash_is_no_step(tmp_path: Path):
    for digit in "12":
        weights(tmp_path / (digit * 40) / "model.safetensors")
    fails("has no step in its name or metadata", tmp_path)
    assert steps(only(*sorted(tmp_path.iterdir()))) == [0, 1]


def test_standard_files_are_named_by_their_folders(tmp_path: Path):
    series = only(*(weights(tmp_path / f"step{step}" / "model.safetensors") for step in (10, 9)))
    assert steps(series) == [9, 10]


def test_steps_from_what_checkpoints_say(tmp_path: Path):
    ours, trainer = tmp_path / "a", tmp_path / "b"
    weights(ours / "model.safetensors")
    (ours / "state.json").write_text('{"step": 70}')
    weights(trainer / "model.safetensors")
    (trainer / "trainer_state.json").write_text('{"global_step": 60}')
    series = only(
        ours,
        trainer,
        weights(tmp_path / "c.safetensors", step="50"),
        weights(tmp_path / "d.ckpt", global_step="40"),
    )
    assert steps(series) == [40, 50, 60, 70]
    (ours / "state.json").write_text("{")
    fails(r"a/state\.json cannot be read as JSON", ours, trainer)


def test_without_any_steps_the_order_of_a_list_counts(tmp_path: Path):
    paths = [weights(tmp_path / f"{name}.safetensors") for name in ("start", "middle", "end")]
    series = only(*paths)
    assert steps(series) == [0, 1, 2]
    assert [checkpoint.path for checkpoint in series.checkpoints] == paths
    fails("end.safetensors has no step in its name or metadata; name checkpoints by step, or list", tmp_path)


def test_some_with_and_some_without_steps(tmp_path: Path):
    one, other = weights(tmp_path / "step1.pt"), weights(tmp_path / "start.pt")
    fails(r"start\.pt has no step in its name or metadata, as the others have", one, other)
    weights(tmp_path / "step2.pt")
    fails(r"start\.pt has no step", tmp_path)


@pytest.mark.parametrize("last", ["main", "final", "last", "latest", "best", "model_final", "last-v1"])
def test_the_last_one_without_a_step_is_left_out(tmp_path: Path, last: str):
    for step in (1, 2):
        weights(tmp_path / f"step{step}" / "model.safetensors")
    weights(tmp_path / last / "model.safetensors")
    series = only(tmp_path)
    assert steps(series) == [1, 2]
    assert series.remarks == (f"{tmp_path / last} ({last}) was left out: its name has no step",)


def test_duplicate_steps(tmp_path: Path):
    weights(tmp_path / "step1" / "model.safetensors")
    weights(tmp_path / "step01" / "model.safetensors")
    weights(tmp_path / "step2" / "model.safetensors")
    fails(r"step01 and .*step1 are both of step 1; give only one of them", tmp_path)


def test_names_that_count_different_things(tmp_path: Path):
    fails(
        r"epoch1\.pt is named by epoch and .*step200\.pt by step, so they have no common order",
        weights(tmp_path / "epoch1.pt"),
        weights(tmp_path / "step200.pt"),
    )


def test_checkpoints_of_two_tools_in_one_folder(tmp_path: Path):
    weights(tmp_path / "checkpoint-100" / "model.safetensors")
    weights(tmp_path / "checkpoint-200" / "model.safetensors")
    weights(tmp_path / "step300.pt")
    fails(
        r"both the folder checkpoint-100 and the file step300\.pt, checkpoints that different tools", tmp_path
    )


def test_our_run(tmp_path: Path):
    run = run_folder(tmp_path / "run", saved=4)
    series = only(run)
    assert series.name == "run"
    assert steps(series) == [0, 10, 20, 30]
    assert files(series) == ["model.safetensors"] * 4
    assert series.checkpoints[1].path == run / "checkpoints" / "step-00000010"
    assert steps(only(run / "checkpoints")) == [0, 10, 20, 30]


@pytest.mark.parametrize(
    ("saved", "recorded", "expected"),
    [(3, 5, "model"), (2, 5, "step-"), (0, 5, "step-"), (2, 0, "model"), (1, 2, "step-")],
)
def test_our_run_with_a_recorded_trajectory(tmp_path: Path, saved: int, recorded: int, expected: str):
    series = only(run_folder(tmp_path / "run", saved, recorded))
    assert all(name.startswith(expected) for name in files(series))
    if expected == "step-":
        assert {checkpoint.metadata["mode"] for checkpoint in series.checkpoints} == {"sketch"}


def test_output_of_the_hugging_face_trainer(tmp_path: Path):
    for step in (500, 1000, 1500):
        at = tmp_path / f"checkpoint-{step}"
        weights(at / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"):
            weights(at / name)
        (at / "global_step500").mkdir()
        (at / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    weights(tmp_path / "model.safetensors")
    weights(tmp_path / "training_args.bin")
    weights(tmp_path / "tmp-checkpoint-2000" / "model.safetensors")
    (tmp_path / "runs").mkdir()
    series = only(tmp_path)
    assert steps(series) == [500, 1000, 1500]
    assert files(series) == ["model.safetensors"] * 3


def test_an_adapter_and_old_names(tmp_path: Path):
    weights(tmp_path / "step1" / "adapter_model.safetensors")
    weights(tmp_path / "step2" / "pytorch_model.bin")
    weights(tmp_path / "step3" / "unet.safetensors")
    weights(tmp_path / "step4" / "mp_rank_00_model_states.pt")
    weights(tmp_path / "step4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert files(only(tmp_path)) == [
        "adapter_model.safetensors",
        "pytorch_model.bin",
        "unet.safetensors",
        "mp_rank_00_model_states.pt",
    ]


def test_hidden_and_unfinished_names_are_passed_over(tmp_path: Path):
    for name in ("step1.pt", "step2.pt", ".step3.pt", "step4.pt.tmp", "step5.pt.part", "optimizer-step6.pt"):
        weights(tmp_path / name)
    weights(tmp_path / ".step-7.abc.part" / "model.safetensors")
    assert steps(only(tmp_path)) == [1, 2]


def test_a_folder_that_was_left_empty(tmp_path: Path):
    for step in (1, 2):
        weights(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    weights(tmp_path / "checkpoint-3" / "optimizer.pt")
    series = only(tmp_path)
    assert steps(series) == [1, 2]
    assert series.remarks == (f"{tmp_path / 'checkpoint-3'} was left out: it holds no weights",)


@pytest.mark.parametrize(
    "path", ["optimizer.pt", "optimiser.safetensors", "scheduler.bin", "rng_state_0.pth"]
)
def test_states_of_optimisers_are_no_checkpoints(tmp_path: Path, path: str):
    fails(
        "is no checkpoint: accepted are files of weights",
        weights(tmp_path / path),
        weights(tmp_path / "step2.pt"),
    )
    weights(tmp_path / "in" / path)
    fails("holds no checkpoints", tmp_path / "in")


@pytest.mark.parametrize(
    "name", ["optimal-step1.pt", "string1.safetensors", "scaled-1.pt", "schedule_free_step1.pt"]
)
def test_names_that_only_look_like_those_of_optimisers(tmp_path: Path, name: str):
    assert len(only(weights(tmp_path / name), weights(tmp_path / name.replace("1", "2"))).checkpoints) == 2


def sharded(folder: Path, index: str = "model.safetensors.index.json") -> Path:
    suffix = ".bin" if ".bin" in index else ".safetensors"
    names = [f"model-0000{part}-of-00002{suffix}" for part in (1, 2)]
    for name in names:
        weights(folder / name)
    (folder / index).write_text(json.dumps({"weight_map": {"x": names[0], "y": names[1], "z": names[0]}}))
    return folder


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_shards(tmp_path: Path, index: str):
    for step in (1, 2):
        sharded(tmp_path / f"step{step}", index)
    series = only(tmp_path)
    assert [len(checkpoint.files) for checkpoint in series.checkpoints] == [2, 2]
    assert only(*(tmp_path / f"step{step}" / index for step in (1, 2))).checkpoints[1].files == (
        series.checkpoints[1].files
    )
    series.checkpoints[1].files[0].unlink()
    fails(r"step2 lacks model-00001-of-00002\.\w+, one of the 2 shards", tmp_path)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.txt", "..", "", "a\\x.pt"]
)
def test_shards_lie_beside_their_index(tmp_path: Path, shard: str):
    weights(tmp_path / "x.safetensors")
    folder = sharded(tmp_path / "step1")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    fails("no file of weights beside it", folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"x": 3}}', "[" * 100_000]
)
def test_a_damaged_index(tmp_path: Path, text: str):
    folder = sharded(tmp_path / "step1")
    (folder / "model.safetensors.index.json").write_text(text)
    fails(r"model\.safetensors\.index\.json (has no weight_map|cannot be read)", folder)


def test_shards_without_an_index_are_no_series(tmp_path: Path):
    for part in (1, 2):
        weights(tmp_path / f"model-0000{part}-of-00002.safetensors")
    fails("holds model-00001-of-00002.safetensors, a shard of its weights, without the index", tmp_path)


def test_hub_cache(tmp_path: Path):
    commits = {"step1000": "a" * 40, "step20": "b" * 40, "main": "c" * 40, "pr/step500": "d" * 40}
    folder = hub_model(tmp_path / "models--org--name", commits)
    series = only(folder)
    assert series.name == "org/name"
    assert steps(series) == [20, 500, 1000]
    assert [checkpoint.path.name[0] for checkpoint in series.checkpoints] == ["b", "d", "a"]
    assert "main" in series.remarks[0]
    (folder / "snapshots" / ("b" * 40) / "model.safetensors").unlink()
    series = only(folder)
    assert steps(series) == [500, 1000]
    assert f"the revision step20 of {folder} was left out: its weights were not fetched" in series.remarks


def test_two_revisions_of_one_commit_stay_two_checkpoints(tmp_path: Path):
    """Which is how public series are wrong; that they are equal is for the alignment to say."""
    refs = {"step1": "a" * 40, "step2": "a" * 40, "step3": "b" * 40}
    assert steps(only(hub_model(tmp_path / "models--org--name", refs))) == [1, 2, 3]


def test_a_link_to_a_checkpoint_is_another_name_of_it(tmp_path: Path):
    for step in (1, 2):
        weights(tmp_path / f"step{step}" / "model.safetensors")
    (tmp_path / "step02").symlink_to(tmp_path / "step2")
    series = only(tmp_path)
    assert steps(series) == [1, 2]
    assert series.remarks == (
        f"{tmp_path / 'step02'} was left out: it is another name of {tmp_path / 'step2'}",
    )


def test_a_loop_of_links(tmp_path: Path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    fails("does not exist", tmp_path / "a")
    for step in (1, 2):
        weights(tmp_path / f"step{step}.pt")
    (tmp_path / "inner").symlink_to(tmp_path)
    assert steps(only(tmp_path)) == [1, 2]


def test_the_same_twice(tmp_path: Path):
    one = weights(tmp_path / "a.pt")
    fails(r"a\.pt is given twice$", one, one)
    (tmp_path / "b.pt").symlink_to(one)
    fails(r"b\.pt is given twice, first as .*a\.pt", one, tmp_path / "b.pt")


def test_several_series(tmp_path: Path):
    runs = [run_folder(tmp_path / name, saved=3) for name in ("sgd", "adam")]
    assert [series.name for series in find_series(runs)] == ["sgd", "adam"]
    nested = [run_folder(tmp_path / name / "seed0", saved=3) for name in ("x", "y")]
    assert [series.name for series in find_series(nested)] == ["x/seed0", "y/seed0"]


def test_checkpoints_and_series_together(tmp_path: Path):
    run, one = run_folder(tmp_path / "run", saved=3), weights(tmp_path / "step1.pt")
    fails(r"step1\.pt is one checkpoint and .*run a series of them; give either", run, one)


def test_one_checkpoint_only(tmp_path: Path):
    fails(r"a\.pt is one checkpoint only; a series needs at least two", weights(tmp_path / "a.pt"))
    weights(tmp_path / "in" / "step1" / "model.safetensors")
    fails("in/step1 is one checkpoint only", tmp_path / "in")
    weights(tmp_path / "in" / "final" / "model.safetensors")
    fails("in/step1 is one checkpoint only", tmp_path / "in")


def test_wrong_folders(tmp_path: Path):
    fails(r"nothing does not exist", tmp_path / "nothing")
    fails(r"holds no checkpoints: looked for model\.safetensors, .* checkpoints/ and trajectory/$", tmp_path)
    with pytest.raises(InputError, match="no checkpoints given"):
        find_series([])
    (tmp_path / "notes.txt").write_text("x")
    fails(r"notes\.txt is no checkpoint", tmp_path / "notes.txt")


def test_a_folder_of_runs_is_no_series(tmp_path: Path):
    for seed in (1, 2):
        run_folder(tmp_path / f"seed{seed}", saved=3)
    fails(r"holds no checkpoints: .*; give the folder of a run, such as .*seed1", tmp_path)


def test_a_model_with_parts_in_sub_folders_is_one_checkpoint(tmp_path: Path):
    for name in ("pytorch_model.bin", "1_Pooling/pytorch_model.bin", "2_Dense/pytorch_model.bin"):
        weights(tmp_path / name)
    fails("is one checkpoint only", tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path):
    for step in (1, 2):
        weights(tmp_path / f"step{step}.safetensors")
    (tmp_path / "step2.safetensors").write_bytes(b"short")
    fails(r"step2\.safetensors is damaged or cut short", tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_must_not_be_read(tmp_path: Path):
    tmp_path.chmod(0)
    fails("cannot be read: Permission denied", tmp_path)


def test_a_home_that_does_not_exist():
    fails("cannot be read", Path("~nobody-at-all/checkpoints"))


def test_strings_are_paths(tmp_path: Path):
    for step in (1, 2):
        weights(tmp_path / f"step{step}.pt")
    assert steps(find_series([str(tmp_path)])[0]) == [1, 2]
