"""Trajectory geometry: what the check asks, on made-up results always, on tiny runs of every preset too."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from gramian.cli.main import run as command
from gramian.errors import InputError
from gramian.systems.trajectory_geometry import (
    Config,
    Result,
    check,
    given,
    paper,
    path_table,
    quick,
    run,
    table,
)
from gramian.tasks.images import Pictures
from gramian.tasks.language import Text
from gramian.tasks.late_freezing import FULL, READOUT, SCALARS, STATISTICS, STOPPED, Frozen
from gramian.tasks.model_series import ModelPath
from gramian.tasks.trajectory_cases import FALLING, FREE, GRID
from gramian.tasks.trajectory_study import Case, Lessons, Travelled

QUIET = Console(quiet=True)

EXPLORED = {
    "neither": (0.997, 0.968),
    "momentum": (0.994, 0.986),
    "decay": (0.995, 0.950),
    "both": (0.929, 0.906),
    "fast": (0.993, 0.984),
    "fast decay": (0.894, 0.898),
    "slow momentum": (0.996, 0.952),
    "slow both": (0.995, 0.936),
    "strong decay": (0.933, 0.963),
}
"""ω and ω_rel of each cell of the grid."""

SIZED = {
    "mlp": ((0.969, 0.986, 0.95, 80), (0.998, 0.999, 0.95, 24)),
    "resnet": ((0.995, 0.998, 0.96, 40), (0.998, 0.9995, 0.93, 16)),
    f"mlp {FREE}": ((0.97, 0.98, 0.96, 74), (0.99, 0.99, 0.99, 44)),
    f"resnet {FREE}": ((0.99, 0.99, 0.98, 60), (0.99, 0.99, 0.99, 50)),
    "decoder": ((0.994, 0.995, 0.93, 42), (0.986, 0.993, 0.86, 56)),
    FALLING: ((0.95, 0.988, 0.92, 47), (0.99, 0.998, 0.88, 53)),
}
"""ω, a walk's ω, ω_rel and update angle of the smallest and the largest of each family."""


def travelled(
    name: str, width: int, seed: int, mds: float, walk: float, relative: float, angle: float, accuracy: float
) -> Travelled:
    shift = 1e-4 * (seed - 1)
    whole = {
        "mds": mds + shift, "mds_off": mds, "mds_relative": relative + shift, "mean_update_angle": angle,
        "displacement_ratio": 0.5, "relative_displacement": 0.3,
    }  # fmt: skip
    judged = {"loss": 0.1, "training_loss": 0.1, "accuracy": accuracy}
    walks = {"mds": walk + shift, "mds_relative": 0.9}
    return Travelled(name, name.split()[0], width, 2, seed, 100 * width, whole, whole, walks, judged)


def explored(
    changed: Mapping[str, tuple[float, float]] | None = None, accuracy: float = 0.97
) -> list[Travelled]:
    cells = EXPLORED | dict(changed or {})
    return [
        travelled(f"{network} {cell}", 8, seed, cells[cell][0], 0.99, cells[cell][1], 50, accuracy)
        for network in ("mlp", "resnet")
        for cell in GRID
        for seed in range(3)
    ]


def sized(name: str | None = None, part: int = 0) -> list[Travelled]:
    """The sound paths; with a name, one reading of that family is the same at all sizes."""
    found = []
    for family, (small, large) in SIZED.items():
        spoiled = [*large]
        if family == name:
            spoiled[part] = small[part]
        for width, numbers in ((16, small), (64, spoiled)):
            found += [travelled(family, width, seed, *numbers, 0.97) for seed in range(3)]
    return found


def frozen(changed: Mapping[tuple[str, str], float] | None = None, trained: int = 672) -> list[Frozen]:
    ends: dict[tuple[str, str], float] = {
        ("resnet", SCALARS): 0.982, ("resnet", READOUT): 0.981, ("resnet", STATISTICS): 0.97,
        ("resnet", STOPPED): 0.95, ("resnet", FULL): 0.985, ("resnet", "start"): 0.75,
        ("decoder", SCALARS): 6.08, ("decoder", STOPPED): 6.09, ("decoder", FULL): 5.79,
    } | dict(changed or {})  # fmt: skip
    share = {FULL: 1.0, "start": 0.0}
    return [
        Frozen(
            name, seed, share.get(way, 0.5), SCALARS if way == "start" else way,
            trained if way in (SCALARS, "start") else 0, 77_754,
            {"accuracy" if name == "resnet" else "loss": value + 1e-3 * seed, "training_loss": 0.1}
            | ({"loss": 0.1} if name == "resnet" else {}),
        )
        for seed in range(3)
        for (name, way), value in ends.items()
    ]  # fmt: skip


SOUND = Result(explored(), sized(), frozen())


def failing(result: Result) -> list[str]:
    return [finding.what for finding in check(result) if not finding.holds]


def test_a_sound_result_holds() -> None:
    assert failing(SOUND) == []
    assert len(check(SOUND)) == 2 * 7 + 15 + 6 + 2
    assert len({finding.what for finding in check(SOUND)}) == len(check(SOUND))


@pytest.mark.parametrize(
    ("cell", "numbers", "words"),
    [
        ("both", (0.99, 0.906), ("ω lost to momentum and decay", "of that, beyond the sum of each alone")),
        ("momentum", (0.93, 0.986), ("of that, beyond the sum of each alone",)),
        ("decay", (0.93, 0.95), ("of that, beyond the sum of each alone",)),
        (
            "both",
            (0.929, 0.968),
            ("ω_rel lost beyond the sum of each alone", "the decay alone keeps above both"),
        ),
        ("fast decay", (0.99, 0.9), ("ω lost to decay at ten times the rate, no momentum",)),
        ("slow both", (0.93, 0.936), ("adds to decay at equal rate/(1 − momentum)",)),
        ("strong decay", (0.933, 0.906), ("ω_rel that ten times the decay alone keeps above both",)),
    ],
)
def test_spoiled_explorations_fail(cell: str, numbers: tuple[float, float], words: tuple[str, ...]) -> None:
    failed = failing(replace(SOUND, explore=explored({cell: numbers})))
    expected = [(network, word) for network in ("mlp", "resnet") for word in words]
    assert len(failed) == len(expected)
    for what, (network, word) in zip(failed, expected, strict=True):
        assert what.startswith(network)
        assert what.endswith(word)


def test_training_that_fails_is_noticed() -> None:
    assert len(failing(replace(SOUND, explore=explored(accuracy=0.5)))) == 2


@pytest.mark.parametrize(
    ("family", "part", "count"),
    [
        ("mlp", 0, 1), ("mlp", 1, 1), ("mlp", 3, 1), ("resnet", 0, 1), ("resnet", 1, 1), ("resnet", 2, 1),
        ("resnet", 3, 1), (f"mlp {FREE}", 2, 1), (f"resnet {FREE}", 2, 1), ("decoder", 0, 1),
        ("decoder", 2, 1), ("decoder", 3, 1), (FALLING, 0, 1), (FALLING, 1, 1), (FALLING, 2, 1),
    ],
)  # fmt: skip
def test_sizes_without_effect_fail(family: str, part: int, count: int) -> None:
    failed = failing(replace(SOUND, scale=sized(family, part)))
    assert len(failed) == count
    assert failed[0].startswith(f"{family}: ")


@pytest.mark.parametrize(
    ("end", "value", "words"),
    [
        (("resnet", SCALARS), 0.95, "norms' scalars alone, from half of the steps, above all"),
        (("resnet", READOUT), 0.95, "read-out alone"),
        (("resnet", STATISTICS), 0.985, "running statistics alone"),
        (("resnet", STOPPED), 0.985, "an end at half"),
        (("resnet", "start"), 0.98, "from the start"),
        (("decoder", FULL), 6.05, "norms' scalars alone, from half of the steps, above all (against"),
        (("decoder", SCALARS), 5.95, "share of what the second half learns"),
    ],
)
def test_spoiled_freezings_fail(end: tuple[str, str], value: float, words: str) -> None:
    failed = failing(replace(SOUND, late=frozen({end: value})))
    assert any(words in what for what in failed)
    assert len(failed) == (2 if end == ("decoder", FULL) else 1)


def test_too_many_scalars_fail() -> None:
    (what,) = failing(replace(SOUND, late=frozen(trained=1000)))
    assert what == "share that norms' scalars are of a network"


def test_a_part_of_the_study_can_be_judged() -> None:
    assert check(Result([], [], [])) == []
    alone = [path for path in SOUND.explore if path.name != "mlp both"]
    assert len(check(Result(alone, [], []))) == 7
    assert check(Result([], SOUND.scale[:3], [])) == []


def published(*values: float) -> list[ModelPath]:
    hallmarks = {name: 0.9 for name in (*SOUND.scale[0].whole, "mds_by_time")}
    return [
        ModelPath(f"pythia-{size}m", size * 10**6, (0, 1, 2, 4), {**hallmarks, "mds": value}, {"mds": 0.9})
        for size, value in zip((14, 70, 160, 410), values, strict=True)
    ]


def test_published_models_must_grow_regular() -> None:
    assert failing(Result([], [], [], published(0.5, 0.6, 0.55, 0.7))) == []
    assert len(failing(Result([], [], [], published(0.5, 0.4, 0.45, 0.4)))) == 2
    assert failing(Result([], [], [], published(0.5, 0.9, 0.8, 0.7))) == [
        "share of the steps in size at which ω rises"
    ]
    row = path_table(Result([], [], [], published(0.5, 0.6, 0.55, 0.7)))[1]
    assert row["case"] == "pythia-70m (70,000,000)"
    assert (row["ω"], row["ω by time"]) == ("0.6", "0.9")


def test_the_tables_have_a_row_a_case_and_a_row_a_way() -> None:
    rows = path_table(SOUND)
    assert len(rows) == 2 * len(GRID) + 2 * len(SIZED)
    assert rows[3]["case"] == "mlp both (800)"
    assert rows[3]["ω"] == "0.929 ± 6e-05"
    assert [row["goes on"] for row in table(SOUND)][:3] == [SCALARS, READOUT, STATISTICS]
    assert table(SOUND)[0]["trained"] == "0.86%"
    assert table(SOUND)[4]["from"] == "never"


def small(config: Config, folder: Path, text: Path) -> Config:
    """The same settings at a size of seconds, with a case of every kind; what is not a size is kept."""

    def taught(lessons: Lessons, steps: int) -> Lessons:
        job = lessons.text
        data, shape = Text(text=(text,), vocabulary=300), replace(job.shape, context=16)
        reading = replace(job.training, steps=steps, batch=2)
        viewing = replace(lessons.images.training, steps=steps, batch=16)
        return Lessons(
            images=replace(lessons.images, data=Pictures(count=100), training=viewing),
            text=replace(job, data=data, shape=shape, training=reading, evaluation_batches=2),
        )

    def narrow(case: Case) -> Case:
        return replace(case, width=32 if case.network == "decoder" else 4, depth=1)

    explore, scale, late = config.explore, config.scale, config.late
    families = {case.name: narrow(case) for case in scale.cases}
    return replace(
        config,
        explore=replace(
            explore, lessons=taught(explore.lessons, 4), cases=explore.cases[8:10], checkpoints=4
        ),
        scale=replace(scale, lessons=taught(scale.lessons, 4), cases=tuple(families.values()), checkpoints=4),
        late=replace(late, lessons=taught(late.lessons, 20), cases=tuple(narrow(c) for c in late.cases)),
        image_seeds=(0, 1),
        text_seeds=(0, 1),
        runs=folder,
    )


def test_the_quick_preset_runs_and_goes_on(tmp_path: Path, story: Path) -> None:
    config = small(quick(), tmp_path, story)
    result = run(config, QUIET)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*seed*.json")}
    assert len(files) == 2 * (2 + 6 + 2)
    assert run(config, QUIET) == result
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*seed*.json")}
    written = json.loads((tmp_path / "trajectory_geometry" / "result.json").read_text())
    assert len(written["explore"]) == 2 * 2
    assert len(path_table(result)) == 2 + 6
    assert len(table(result)) == (1 + 3 * 4 + 1) + (1 + 3 * 2 + 1)
    assert len(check(result)) == 6 + 2


def models(folder: Path, moves: tuple[float, ...]) -> tuple[Path, ...]:
    """Write checkpoints as EleutherAI's are, in half precision, of models that move as far as asked."""
    generator = torch.Generator().manual_seed(0)
    for index, move in enumerate(moves):
        weight = torch.randn(16 << index, 16, generator=generator)
        for step in (0, 1, 2, 4, 512, 1000):
            place = folder / f"model-{index}" / f"step{step}"
            place.mkdir(parents=True)
            save_file({"gpt_neox.embed_in.weight": weight.half()}, place / "model.safetensors")
            weight = weight + move * torch.randn(weight.shape, generator=generator)
    return tuple(folder / f"model-{index}" for index in range(len(moves)))


def test_the_published_preset_reads_folders(tmp_path: Path, capsys) -> None:
    folders = models(tmp_path / "regular", (0.8, 0.4, 0.2))
    asked = ["verify", "trajectory_geometry", "--setting", "pythia", "--runs", str(tmp_path / "runs")]
    assert command([*asked, "--series", *map(str, folders)]) == 0
    shown = capsys.readouterr().out
    assert "holds rise of ω from the smallest model to the largest" in shown
    assert "4,096" not in shown
    assert "1,024" in shown
    wild = models(tmp_path / "wild", (0.2, 0.4, 0.8))
    config = given(
        paper(), runs=tmp_path / "wild-runs", text=(), images=None, series=wild, steps=None, seeds=()
    )
    assert len(failing(run(config, QUIET))) == 2


def test_settings_as_asked(tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "runs": Path("runs"),
        "text": (),
        "images": None,
        "series": (),
        "steps": None,
        "seeds": (),
    }
    assert given(quick(), **asked) == quick()
    found = given(quick(), **asked | {"text": (tmp_path,), "images": tmp_path, "steps": 40, "seeds": (3, 4)})
    for lessons in (found.explore.lessons, found.scale.lessons, found.late.lessons):
        assert lessons.text.data.text == (tmp_path,)
        assert lessons.images.data.path == tmp_path
        assert lessons.text.training.steps == lessons.images.training.steps == 40
    assert found.seeds == dict.fromkeys(("mlp", "resnet", "decoder"), (3, 4))
    assert found.late.lessons.images.shift == 1
    with pytest.raises(InputError, match="unknown setting 'olmo'; choose quick or pythia"):
        paper("olmo")
    with pytest.raises(InputError, match="read by --setting pythia"):
        given(quick(), **asked | {"series": (tmp_path,)})
    unused: list[dict[str, Any]] = [
        {"text": (tmp_path,)},
        {"steps": 3},
        {"seeds": (1, 2)},
        {"images": tmp_path},
    ]
    for changed in unused:
        with pytest.raises(InputError, match="takes no text, images or steps"):
            given(paper(), **asked | changed)
    with pytest.raises(InputError, match="two different seeds or more, got"):
        run(replace(quick(), image_seeds=(1,), runs=tmp_path), QUIET)
    with pytest.raises(InputError, match="two folders of checkpoints or more"):
        run(replace(paper(), runs=tmp_path), QUIET)


def test_files_of_another_kind_are_refused(capsys) -> None:
    assert command(["verify", "trajectory_geometry", "--tables", "a.npz"]) == 1
    assert "trajectory_geometry reads text, images and series, not tables" in capsys.readouterr().err
    assert command(["verify", "outlier_features", "--series", "folder"]) == 1
    assert "outlier_features reads no series" in capsys.readouterr().err
    assert command(["verify", "ntk_ensemble", "--series", "folder"]) == 1
    assert "ntk_ensemble reads tables and images, not series" in capsys.readouterr().err


@pytest.mark.slow
def test_the_claim_holds(tmp_path: Path) -> None:
    config = quick()
    explore = replace(config.explore, cases=config.explore.cases[: len(GRID)])
    scale = replace(config.scale, cases=tuple(case for case in config.scale.cases if case.network == "mlp"))
    late = replace(config.late, cases=config.late.cases[:1], shares={"resnet": (0.5,)})
    result = run(replace(config, explore=explore, scale=scale, late=late, runs=tmp_path), QUIET)
    assert len(check(result)) == 7 + 4 + 6
    assert failing(result) == []
