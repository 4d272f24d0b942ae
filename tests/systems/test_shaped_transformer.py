"""The claim of shaped transformers: its arithmetic, small laws for real, resuming; training quick or slow."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gramian.errors import InputError
from gramian.systems.shaped_transformer import (
    BASE,
    CONTROLS,
    SHAPED,
    STABILITY,
    UNMIXED,
    Laws,
    Result,
    check,
    compare_laws,
    measure_stability,
    paper,
    quick,
    run,
    start_table,
    table,
)
from gramian.tasks.covariance import NORM, PAIR
from gramian.tasks.language import Text
from gramian.tasks.samples import Distance

QUIET = Console(quiet=True)
FEW = Laws(ratios=(0.5,), tokens=(3,), widths=(64, 96), networks=400, paths=2000)


@pytest.fixture(scope="module")
def laws(tmp_path_factory):
    return compare_laws(FEW, tmp_path_factory.mktemp("laws"), QUIET)


def test_networks_follow_the_sde_and_controls_do_not(laws) -> None:
    kinds = [("shaped", 64), ("shaped", 96), ("strong", 64), ("strong", 96)]
    assert [(law.kind, law.width) for law in laws[:4]] == kinds
    for law in laws[:2]:
        for name in (PAIR, NORM):
            networks, limit = law.summaries[name]
            assert law.distances[name].value < law.distances[name].noise + 0.03
            assert abs(networks.mean - limit.mean) < 0.15
            assert networks.deviation == pytest.approx(limit.deviation, rel=0.15)
    uncentred, *softer = laws[4:]
    assert uncentred.blown_up[0] > 0.9 > 0.1 > uncentred.blown_up[1]
    assert [law.kind for law in softer] == ["hot", "softmax"]
    for law in softer:
        assert max(each.value for each in law.distances.values()) > 0.2


def test_laws_are_read_again_and_made_anew_for_other_settings(tmp_path: Path) -> None:
    few = replace(FEW, widths=(16,), networks=30, paths=50)
    first = compare_laws(few, tmp_path, QUIET)
    files = sorted((tmp_path / "laws").iterdir())
    before = [file.stat().st_mtime_ns for file in files]
    assert compare_laws(few, tmp_path, QUIET) == first
    assert [file.stat().st_mtime_ns for file in files] == before
    other = compare_laws(replace(few, gamma=0.6), tmp_path, QUIET)
    assert other != first
    assert [file.stat().st_mtime_ns for file in files] != before


def test_gamma_and_temperature_decide_on_stability() -> None:
    calm, *wild = measure_stability(Laws(networks=400)).values()
    assert calm < 0.01
    assert all(share > 0.04 for share in wild)
    assert len(wild) == len(STABILITY) - 1


class Found:
    """What a training found, as far as a check reads it."""

    def __init__(self, validation_loss: float) -> None:
        self.validation_loss = validation_loss


SOUND = {
    BASE: [Found(5.5), Found(5.51)],
    SHAPED: [Found(5.0), Found(5.02)],
    UNMIXED: [Found(5.2), Found(5.22)],
}


def result(laws: list[Any], **changed: Any) -> Result:
    stability = dict(zip(STABILITY, (0.0, 0.1, 0.1), strict=True))
    whole: dict[str, Any] = {"laws": laws, "stability": stability}
    whole |= {"outcomes": {"decoder": SOUND, "encoder": SOUND}}
    return Result(**whole | changed)


def far(law: Any) -> Any:
    return replace(law, distances=dict.fromkeys(law.distances, Distance(0.5, 0.05)))


def test_a_sound_result_holds_and_each_spoiled_one_fails(laws) -> None:
    strong = [
        replace(law, distances=dict.fromkeys(law.distances, Distance(value, 0.01)))
        for law, value in zip(laws[2:4], (0.1, 0.05), strict=True)
    ]
    sound = [*laws[:2], *strong, *map(far, laws[4:])]
    assert all(finding.holds for finding in check(result(sound)))

    def failing(spoiled: Result) -> list[str]:
        return [finding.what for finding in check(spoiled) if not finding.holds]

    off = failing(result([far(sound[0]), *sound[1:]]))
    assert len(off) == 2
    assert "Kolmogorov-Smirnov" in off[0]
    assert "strongly" in failing(result([*sound[:2], strong[1], strong[0], *sound[4:]]))[0]
    near = replace(sound[-1], distances=dict.fromkeys(sound[-1].distances, Distance(0.1, 0.05)))
    assert "control softmax" in failing(result([*sound[:-1], near]))[0]
    wild = dict.fromkeys(STABILITY, 0.2)
    assert "blow up, gamma 0.3, tau0 1" in failing(result(sound, stability=wild))[0]
    assert len(failing(result(sound, stability=dict.fromkeys(STABILITY, 0.0)))) == 2
    worse = {**SOUND, SHAPED: [Found(6.0), Found(6.1)]}
    assert len(failing(result(sound, outcomes={"decoder": worse}))) == 2
    diverged = {**SOUND, SHAPED: [None, Found(5.0)]}
    assert failing(result(sound, outcomes={"encoder": diverged}))


def test_tables_say_all(laws) -> None:
    whole = result(laws)
    assert len(start_table(whole)) == len(laws)
    assert {row["kind"] for row in start_table(whole)} == {"shaped", "strong", *CONTROLS}
    rows = table(whole)
    assert [row["trial"] for row in rows] == [BASE, SHAPED, UNMIXED] * 2
    assert rows[1]["above pre_norm"].startswith("-0.495")


def test_settings() -> None:
    assert [trial.name for trial in quick().trials] == [BASE, SHAPED, UNMIXED]
    assert paper("encoder").job.shape.width == 768
    with pytest.raises(InputError, match="unknown setting"):
        paper("decoder")
    with pytest.raises(InputError, match="two different seeds"):
        run(replace(quick(), seeds=(0, 0)), QUIET)


@pytest.mark.slow
def test_the_whole_of_it_at_a_small_size(tmp_path: Path) -> None:
    """Two steps of every training, and what was done is not done again."""
    config = quick()
    training = replace(config.job.training, steps=2, evaluate_every=2, observe_every=2, checkpoint_every=2)
    shape = replace(config.job.shape, depth=2, width=32, context=32)
    data = Text(vocabulary=300, max_bytes=200_000)
    job = replace(config.job, runs=tmp_path, training=training, shape=shape, data=data, evaluation_batches=1)
    small = replace(config, job=job, laws=replace(FEW, widths=(16,), networks=50, paths=200))
    found = run(small, QUIET)
    assert set(found.outcomes) == {"decoder", "encoder"}
    assert len(found.losses("encoder", SHAPED)) == 2
    assert (tmp_path / "shaped_transformer" / "result.json").exists()
    again = run(small, QUIET)
    assert again.laws == found.laws
    assert again.losses("decoder", UNMIXED) == found.losses("decoder", UNMIXED)
