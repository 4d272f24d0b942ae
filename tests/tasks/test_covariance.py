"""Predictions of shaped transformers: closed forms, finite networks, what is lost, refused input."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from gramian.errors import InputError
from gramian.tasks import covariance_page
from gramian.tasks.covariance import (
    MEAN,
    NORM,
    PAIR,
    CovarianceConfig,
    Distance,
    Region,
    kolmogorov_smirnov,
    predict_covariance,
    readings,
)
from gramian.tasks.covariance_page import (
    largest_gamma,
    report_page,
    sentences,
    smallest_tau,
    terminal_table,
    trouble,
    write_report,
)
from gramian.tasks.samples import Summary

SMALL = CovarianceConfig(depth=16, width=32, tokens=3, gamma=0.4, paths=600, networks=0, region=False)


def normal(count: int, seed: int, shift: float = 0.0) -> list[float]:
    return (np.random.default_rng(seed).normal(size=count) + shift).tolist()


def test_distances_are_those_of_scipy() -> None:
    for seed, shift in enumerate((0.0, 0.2, 3.0)):
        a, b = normal(300, seed), normal(80, seed + 10, shift)
        assert kolmogorov_smirnov(a, b).value == pytest.approx(ks_2samp(a, b).statistic, abs=1e-12)
    ties = [0.0, 0.0, 1.0, 1.0, 2.0], [0.0, 1.0, 1.0, 1.0]
    assert kolmogorov_smirnov(*ties).value == pytest.approx(ks_2samp(*ties).statistic, abs=1e-12)


def test_chance_reaches_its_level_in_five_per_cent() -> None:
    pairs = [kolmogorov_smirnov(normal(300, s), normal(200, 10_000 + s)) for s in range(400)]
    assert 0.02 < sum(each.value > each.noise for each in pairs) / len(pairs) < 0.08
    moved = kolmogorov_smirnov(normal(300, 0), normal(200, 1, 0.4))  # control
    assert moved.value > moved.noise


def test_readings_against_a_loop() -> None:
    x = torch.randn(5, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = x @ x.mT
    found = readings(v)
    for each in range(5):
        rows = x[each].numpy()
        cosines = [
            rows[a] @ rows[b] / math.sqrt((rows[a] @ rows[a]) * (rows[b] @ rows[b]))
            for a in range(4)
            for b in range(a + 1, 4)
        ]
        assert found[PAIR][each].item() == pytest.approx(cosines[0])
        assert found[MEAN][each].item() == pytest.approx(np.mean(cosines))
        assert found[NORM][each].item() == pytest.approx(math.log(rows[0] @ rows[0]))
    assert MEAN not in readings(v[:, :2, :2])  # the one pair again


def test_without_branches_nothing_moves() -> None:
    prediction = predict_covariance(replace(SMALL, gamma=0.0, paths=10, networks=3))
    for ensemble in (prediction.theory, prediction.measured):
        assert ensemble is not None
        for summary in (*ensemble.through[PAIR], *ensemble.through[MEAN]):
            assert summary.quantiles == pytest.approx(
                [0.3] * 5, abs=1e-9 if ensemble is prediction.theory else 0.5
            )
        assert ensemble.blown_up.count == 0
    assert prediction.theory.through[NORM][-1].quantiles == pytest.approx([0.0] * 5, abs=1e-9)


def gap(prediction, gamma: float, name: str = "mean") -> float:
    """Return how many standard errors log norms are from N(−σ²t/2, σ²t), the law for flat attention."""
    summary, count = prediction.theory.through[NORM][-1], len(prediction.theory.final[NORM])
    variance = (2 * gamma**2 * (2 - gamma**2) + 4 * gamma**2) * prediction.time
    if name == "mean":
        return abs(summary.mean + variance / 2) / math.sqrt(variance / count)
    return abs(summary.deviation / math.sqrt(variance) - 1) * math.sqrt(2 * count)


def test_flat_attention_has_log_normal_norms() -> None:
    prediction = predict_covariance(replace(SMALL, tau0=1e4, gamma=0.5, paths=3000, depth=32))
    for name in ("mean", "deviation"):
        assert gap(prediction, 0.5, name) < 4
        assert gap(prediction, 0.4, name) > 8  # control


def test_networks_follow_the_law_and_not_that_of_another_gain() -> None:
    config = replace(SMALL, depth=32, width=128, tokens=4, networks=300, paths=1500, key_width=32)
    prediction = predict_covariance(config)
    assert set(prediction.distances) == {PAIR, MEAN, NORM}
    for each in prediction.distances.values():
        assert each.value < 1.5 * each.noise
    other = predict_covariance(replace(config, gamma=0.2, networks=0)).theory
    assert prediction.measured is not None
    for name in (PAIR, NORM):
        assert kolmogorov_smirnov(other.final[name], prediction.measured.final[name]).value > 0.15
    assert prediction.theory.depths == pytest.approx(prediction.measured.depths)
    for theory, measured in zip(
        prediction.theory.through[NORM], prediction.measured.through[NORM], strict=True
    ):
        assert measured.quantiles[2] == pytest.approx(theory.quantiles[2], abs=0.15)
        assert measured.deviation == pytest.approx(theory.deviation, rel=0.2, abs=1e-6)


V0 = np.array([[1.0, 0.3, 0.1], [0.3, 1.2, 0.4], [0.1, 0.4, 0.8]])


def test_published_depth_is_met(tmp_path) -> None:
    """γ = 0.4 at depth/width 0.5 from V0, against an independent simulation of 8000 paths, 1500 networks."""
    config = replace(
        SMALL, gram=saved(tmp_path / "v0.npy", V0), depth=64, width=128, gamma=0.4, paths=3000, networks=600
    )
    prediction = predict_covariance(config)
    assert prediction.measured is not None
    for ensemble, correlation, error, spread in (
        (prediction.theory, 0.256, 0.005, 0.790),
        (prediction.measured, 0.262, 0.011, 0.786),
    ):
        count = len(ensemble.final[PAIR])
        pair, norm = ensemble.through[PAIR][-1], ensemble.through[NORM][-1]
        assert pair.mean == pytest.approx(correlation, abs=4 * math.hypot(error, 0.444 / math.sqrt(count)))
        assert pair.deviation == pytest.approx(0.443, abs=0.05)
        assert norm.deviation == pytest.approx(spread, rel=4 * math.hypot(0.01, 1 / math.sqrt(2 * count)))
    assert math.exp(prediction.theory.through[NORM][-1].quantiles[2]) == pytest.approx(0.754, rel=0.1)
    assert abs(prediction.theory.through[PAIR][-1].deviation - 0.34) > 0.05  # γ = 0.2


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def test_what_blows_up_is_counted_and_in_no_reading(tmp_path) -> None:
    large = saved(tmp_path / "large.npy", 12 * (0.3 * np.ones((3, 3)) + 0.7 * np.eye(3)))
    config = replace(SMALL, gram=large, gamma=0.6, networks=20)
    prediction = predict_covariance(config)
    lost = prediction.theory.blown_up
    assert 60 < lost.count < lost.total == 600
    assert lost.fraction == lost.count / 600
    assert lost.error == pytest.approx(math.sqrt(lost.fraction * (1 - lost.fraction) / 600))
    assert {len(values) for values in prediction.theory.final.values()} == {600 - lost.count}
    assert all(math.isfinite(value) for value in prediction.theory.final[NORM])
    assert trouble(prediction) == "blow up"
    verdict, *_, advice = sentences(prediction, config)
    assert verdict.startswith("Unstable: ")
    assert f"{100 * lost.fraction:.0f} ± {100 * lost.error:.0f} % of the paths blow up" in verdict
    assert "--gamma" in advice
    assert "--no-region" in advice
    assert trouble(predict_covariance(replace(SMALL, gamma=0.2))) == ""  # control


def test_when_no_path_is_left(tmp_path) -> None:
    huge = saved(tmp_path / "huge.npy", 1e3 * (0.3 * np.ones((3, 3)) + 0.7 * np.eye(3)))
    config = replace(SMALL, gram=huge, gamma=1.0, paths=20, depth=64, output=tmp_path / "out")
    prediction = predict_covariance(config)
    assert prediction.theory.blown_up.count == 20
    assert "no path is left" in sentences(prediction, config)[0]
    write_report(prediction, config)
    written = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert written["theory"]["through"][NORM][-1]["mean"] is None


def test_of_one_path_there_is_no_distribution() -> None:
    prediction = predict_covariance(replace(SMALL, paths=10))
    theory, nothing = prediction.theory, Summary([math.nan] * 5, math.nan, math.nan)
    through = {name: [*rows[:-1], nothing] for name, rows in theory.through.items()}
    final = {name: values[:1] for name, values in theory.final.items()}
    lost = replace(theory.blown_up, count=9, fraction=0.9)
    alone = replace(theory, through=through, final=final, blown_up=lost)
    said = sentences(replace(prediction, theory=alone), SMALL)[0]
    assert said.startswith("Unstable: at depth/width 0.5 one path is left; ")
    assert "nan" not in said


def test_collapse_is_that_at_the_depth_asked_for_whatever_is_looked_at_beyond(tmp_path) -> None:
    """The column of the τ₀ asked for is followed to twice the depth, and paths may blow up there."""
    near = saved(tmp_path / "near.npy", 10 * np.array([[1, 0.985], [0.985, 1]]))
    config = replace(SMALL, gram=near, gamma=0.6, paths=2, region=True)
    regions = [predict_covariance(replace(config, tau0=tau0)).region for tau0 in (0.5, 1.0)]
    one, other = (region for region in regions if region is not None)
    assert one.taus == other.taus
    assert one.collapsed == other.collapsed
    assert max(map(max, one.collapsed)) > 0.3


def test_collapse_is_seen_unless_tokens_start_as_one() -> None:
    near = predict_covariance(replace(SMALL, correlation=0.994, gamma=0.2))
    assert near.theory.collapsed.fraction > 0.02
    assert trouble(near) == "collapse"
    assert sentences(near, SMALL)[0].startswith("Rank collapse: ")
    same = predict_covariance(replace(SMALL, correlation=1.0, gamma=0.2))
    assert same.theory.collapsed.fraction == 1
    one = predict_covariance(replace(SMALL, correlation=1.0, gamma=0.2, networks=50))
    assert one.distances[PAIR].value == one.distances[MEAN].value == 0
    assert trouble(same) == ""
    far = predict_covariance(SMALL)  # control
    assert far.theory.collapsed.fraction < 0.01


def test_stability_falls_with_the_gain_and_rises_with_the_temperature() -> None:
    config = replace(SMALL, depth=32, gamma=0.9, tau0=0.6, paths=200, tokens=4, region=True)
    region = predict_covariance(config).region
    assert region is not None
    table = torch.tensor(region.blown_up)
    assert table.shape == (len(region.gammas), len(region.taus))
    assert {0.9, 1.0} <= set(region.gammas)
    assert 0.6 in region.taus
    assert table[0].max() == 0
    assert table[-1, 0] > 0.1
    assert table[-1, 0] > table[-1, -1]
    best = largest_gamma(region, 0.6)
    assert best is not None
    assert best < 0.9


def test_networks_agree_up_to_chance_and_no_further() -> None:
    prediction = predict_covariance(replace(SMALL, paths=300, networks=100))
    for value, word in ((0.1, "agree"), (0.17, "agree"), (0.2, "differ")):  # chance: 0.157, 0.179 of three
        distances = {**dict.fromkeys((PAIR, MEAN), Distance(0.05, 0.157)), NORM: Distance(value, 0.157)}
        said = sentences(replace(prediction, distances=distances), SMALL)[1]
        assert f"100 finite networks {word}: " in said
        assert f"{value:.3f}, of the log norm" in said


def test_what_a_region_recommends() -> None:
    region = Region(
        gammas=[0.2, 0.4, 0.6],
        taus=[1.0, 2.0],
        paths=200,
        blown_up=[[0.0, 0.0], [0.02, 0.005], [0.005, 0.3]],
        collapsed=[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
        times=[0.5],
        blown_up_by=[[0.0], [0.02], [0.005]],
    )
    assert largest_gamma(region, 1.0) == 0.2  # 0.6 is luck: 0.4 below it is not stable
    assert largest_gamma(region, 2.0) == 0.4
    assert smallest_tau(region, 0.2) == 1.0
    assert smallest_tau(region, 0.4) == 2.0
    assert smallest_tau(region, 0.6) is None
    collapsing = replace(region, collapsed=[[0.5, 0.0]] * 3)
    assert largest_gamma(collapsing, 1.0) is None


def test_blow_up_by_depth_is_a_distribution_function_that_meets_the_table() -> None:
    """Paths that are lost stay lost, and at the time asked for the shares are those of the table."""
    region = predict_covariance(replace(SMALL, gamma=0.8, tau0=0.7, region=True)).region
    assert region is not None
    now = region.times.index(SMALL.time)
    assert region.times[-1] == 2 * SMALL.time
    for row, by in zip(region.blown_up, region.blown_up_by, strict=True):
        assert by[now] == row[region.taus.index(0.7)]
        assert list(by) == sorted(by)
    assert region.blown_up_by[-1][-1] > region.blown_up_by[-1][0]


def test_advice_names_settings_of_the_table() -> None:
    config = replace(SMALL, gamma=0.4, tau0=1.0)
    lost = [[0.0, 0.0], [0.1, 0.0]]
    region = Region([0.2, 0.4], [1.0, 2.0], 200, lost, [[0.0, 0.0], [0.0, 0.0]], [0.5], [[0.0], [0.1]])
    lost = replace(predict_covariance(config).theory.blown_up, count=60, fraction=0.1)
    prediction = predict_covariance(replace(config, paths=10))
    prediction = replace(prediction, theory=replace(prediction.theory, blown_up=lost), region=region)
    assert sentences(prediction, config)[-1].startswith("To change: --gamma 0.2 or --tau0 2;")
    nothing = replace(region, blown_up=[[0.1, 0.1], [0.1, 0.1]])
    assert "fewer blocks" in sentences(replace(prediction, region=nothing), config)[-1]


def test_the_same_seed_gives_the_same_numbers() -> None:
    config = replace(SMALL, paths=40, networks=5)
    one, two, other = (predict_covariance(replace(config, seed=seed)) for seed in (3, 3, 4))
    assert one.theory.final == two.theory.final
    assert one.measured is not None
    assert two.measured is not None
    assert one.measured.final == two.measured.final
    assert one.theory.final != other.theory.final


def test_steps_need_not_meet_the_blocks() -> None:
    prediction = predict_covariance(replace(SMALL, steps=5, paths=50))
    assert prediction.theory.depths[0] == 0
    assert prediction.theory.depths[-1] == pytest.approx(16)
    fine = predict_covariance(replace(SMALL, steps=64, depth=1, width=2, paths=50))
    assert fine.theory.depths == pytest.approx([0, 1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"tokens": 1}, "tokens must be at least 2, got 1"),
        ({"paths": 1}, "paths must be at least 2, got 1"),
        ({"networks": 1}, "or at least 2, got 1"),
        ({"networks": -1}, "networks must be at least 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"key_width": 0}, "key_width must be at least 1"),
        ({"gamma": 1.2}, r"must lie in \[0, 1\], got 1.2"),
        ({"gamma": -0.1}, r"must lie in \[0, 1\]"),
        ({"gamma": math.nan}, r"must lie in \[0, 1\], got nan"),
        ({"tau0": 0.0}, "must be positive and finite, got 0"),
        ({"tau0": math.inf}, "must be positive and finite"),
        ({"tau0": math.nan}, "must be positive and finite"),
        ({"correlation": -0.6}, "3 tokens can all correlate at -0.5 to 1 with one another, got -0.6"),
        ({"correlation": 1.1}, "can all correlate"),
        ({"correlation": math.nan}, "can all correlate"),
        ({"positive": -6.0}, "positive must be above −√width"),
        ({"width": 2, "networks": 9}, "width of at least their 3 tokens, got 2"),
        ({"negative": math.nan}, "c₊ and c₋ of a shaped ReLU must be finite"),
        ({"positive": math.nan}, "c₊ and c₋ of a shaped ReLU must be finite"),
        ({"tau0": 1e-200}, "must be positive and finite"),
    ],
)
def test_settings_that_cannot_be_used(settings, words) -> None:
    with pytest.raises(InputError, match=words):
        predict_covariance(replace(SMALL, **settings))


def test_files_of_covariances(tmp_path) -> None:
    gram = saved(tmp_path / "gram.npy", np.array([[1.0, 0.3, 0.1], [0.3, 1.2, 0.4], [0.1, 0.4, 0.8]]))
    prediction = predict_covariance(replace(SMALL, gram=gram, paths=5))
    assert prediction.theory.through[PAIR][0].mean == pytest.approx(0.3 / math.sqrt(1.2))
    assert prediction.theory.through[NORM][0].mean == pytest.approx(0)
    for name, array, words in (
        ("negative", np.array([[1.0, 2.0], [2.0, 1.0]]), "positive semidefinite"),
        ("lopsided", np.array([[1.0, 0.2], [0.3, 1.0]]), "symmetric"),
        ("zero", np.array([[0.0, 0.0], [0.0, 1.0]]), "positive diagonal"),
        ("nan", np.array([[1.0, math.nan], [math.nan, 1.0]]), "not finite"),
        ("oblong", np.ones((2, 3)), "square"),
        ("text", np.array([["a", "b"], ["c", "d"]]), "matrix of numbers"),
        ("one", np.ones((1, 1)), "two rows"),
    ):
        with pytest.raises(InputError, match=words):
            predict_covariance(replace(SMALL, gram=saved(tmp_path / f"{name}.npy", array)))
    with pytest.raises(InputError, match="no such file"):
        predict_covariance(replace(SMALL, gram=tmp_path / "absent.npy"))
    whole = gram.read_bytes()
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array([{}, []], dtype=object), allow_pickle=True)
    for name, content in (
        ("empty", b""),
        ("words", b"1.0 0.3"),
        ("half", whole[:-40]),
        ("zip", b"PK\x03\x04 and no more"),
        ("pickled", pickled.read_bytes()),
    ):
        (path := tmp_path / f"{name}.npy").write_bytes(content)
        with pytest.raises(InputError, match=r"no \.npy of numbers"):
            predict_covariance(replace(SMALL, gram=path))


def test_a_covariance_too_large_for_floats_blows_up(tmp_path) -> None:
    """Networks need not: their softmax saturates."""
    gram = saved(tmp_path / "huge.npy", 1e200 * np.eye(3))
    prediction = predict_covariance(replace(SMALL, gram=gram, paths=5, networks=3))
    assert prediction.theory.blown_up.count == 5
    assert "no path is left" in sentences(prediction, SMALL)[0]


def test_report(tmp_path) -> None:
    config = replace(SMALL, paths=60, networks=12, region=True, output=tmp_path / "out")
    prediction = predict_covariance(config)
    path = write_report(prediction, config)
    written = json.loads((tmp_path / "out" / "prediction.json").read_text())
    last = written["theory"]["through"][PAIR][-1]
    assert last["quantiles"] == pytest.approx(
        np.quantile(prediction.theory.final[PAIR], [0.05, 0.25, 0.5, 0.75, 0.95])
    )
    assert last["deviation"] == pytest.approx(np.std(prediction.theory.final[PAIR], ddof=1))
    assert "final" not in written["measured"]
    assert written["settings"]["gamma"] == "0.4"
    assert {each.stem for each in (tmp_path / "out" / "figures").iterdir()} >= {
        "correlation_through_depth", "norm_through_depth", "correlation_at_the_end", "norm_at_the_end",
        "stable_region",
    }  # fmt: skip
    text = path.read_text()
    assert all(each.split("; ")[0] in text for each in sentences(prediction, config))
    table = terminal_table(prediction)
    assert len(table.columns) == 1 + 2 * 3
    with pytest.raises(InputError, match="--overwrite"):
        write_report(prediction, config)
    write_report(prediction, config, overwrite=True)


def test_theory_alone(tmp_path) -> None:
    config = replace(SMALL, paths=20, output=tmp_path / "out")
    prediction = predict_covariance(config)
    assert prediction.measured is None
    assert prediction.distances == {}
    assert len(terminal_table(prediction).columns) == 1 + 3
    headings = [section.heading for section in report_page(prediction, config, {}).sections]
    assert headings == ["Through depth", "At the end", "Numbers"]
    write_report(prediction, config)


def test_an_interrupted_report_leaves_nothing(tmp_path, monkeypatch) -> None:
    config = replace(SMALL, paths=20, output=tmp_path / "out")
    prediction = predict_covariance(config)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gramian.tasks.predict_page.write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        covariance_page.write_report(prediction, config)
    assert list(tmp_path.iterdir()) == []
