"""Filtering by distance: what the check asks, on made-up results always, and on tiny runs of every preset."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from gramian.cli.main import run as command
from gramian.data.graph_arrays import save_npz
from gramian.data.graphs import Graph, Graphs, flat
from gramian.errors import InputError
from gramian.systems.claims import Finding
from gramian.systems.distance_filtering import (
    Config,
    Result,
    Trained,
    check,
    given,
    paper,
    path_table,
    quick,
    run,
    start_table,
    table,
)
from gramian.tasks.graph_models import GRED
from gramian.tasks.layer_costs import GPS, PAIRS, Cost
from gramian.tasks.long_range import ONE_HOP, Sight
from gramian.tasks.told_apart import CIRCLES, SAME_DISTANCES, Told

QUIET = Console(quiet=True)
NETWORKS = {GRED: 160, ONE_HOP: 4, "gcn": 4, "gps": float("inf")}
SKILLS = {
    GRED: {2: 0.9, 5: 0.9, 20: 0.7},
    ONE_HOP: {5: 0.2, 20: 0.0},
    "gcn": {2: 0.5, 5: 0.2, 20: 0.0},
    "gps": {},
}
"""Skills that the claim would lead to expect; 0.3 where none is said."""


def sights(changed: Mapping[str, Mapping[int, float]] | None = None) -> list[Sight]:
    skills = {**SKILLS, **(changed or {})}
    return [
        Sight(
            "distance_count",
            distance,
            network,
            seed,
            "mae",
            1 - skills[network].get(distance, 0.3) + 0.01 * seed,
            1.0,
            reach,
            9000,
            3,
            1.0,
        )
        for distance in (2, 5, 20)
        for network, reach in NETWORKS.items()
        for seed in range(3)
    ]


APART = {
    ("a, b", GRED): (0.2, 0.01),
    ("a, b", "gine"): (0.0, 1e-16),
    (SAME_DISTANCES[0], GRED): (0.0, 0.0),
    (SAME_DISTANCES[0], "gine"): (0.0, 0.0),
    (CIRCLES, GRED): (0.9, 0.9, 0.9),
    (CIRCLES, "gine"): (0.1, 0.1, 0.1),
}


def told(changed: Mapping[tuple[str, str], tuple[float, ...]] | None = None) -> list[Told]:
    return [Told(*names, apart) for names, apart in {**APART, **(changed or {})}.items()]


def costs(flops: int = 100, peak: int = 100) -> list[Cost]:
    """Costs of a filter, of attention and of features of pairs, on growing graphs of two families."""
    return [
        Cost(family, nodes, layer, 3 * nodes, 50, work, room, 0.01)
        for family in ("tree", "blocks")
        for nodes in (25, 200, 800)
        for layer, work, room in ((GRED, flops, peak), (GPS, nodes, nodes), (PAIRS, nodes**2, nodes**2))
    ]


def trained(gred: float, gine: float, setting: str = "zinc", metric: str = "mae") -> list[Trained]:
    return [
        Trained(setting, network, seed, metric, test + 0.001 * seed, 0.1, 1.5, 483_049)
        for network, test in ((GRED, gred), ("gine", gine))
        for seed in range(3)
    ]


def failing(found: list[Finding]) -> list[str]:
    return [finding.what for finding in found if not finding.holds]


def test_a_result_as_claimed_holds() -> None:
    found = check(Result(sights(), told(), costs(), trained(0.078, 0.1)))
    assert failing(found) == []
    assert len(found) == (3 + 2 + 3) + 6 + 2 * (2 * 2 + 1) + 2
    others = trained(0.71, 0.6, "peptides", "average_precision")
    assert failing(check(Result(trained=others))) == []


@pytest.mark.parametrize(
    ("spoiled", "what"),
    [
        (Result(sights({GRED: {5: 0.9, 20: 0.2}})), "skill of gred, distance_count at 20"),
        (Result(sights({GRED: SKILLS[ONE_HOP]})), "skill of gred, distance_count at 5"),
        (Result(sights({ONE_HOP: {5: 0.2, 20: 0.6}})), "skill of gred, 1 hop, distance_count at 20 (out"),
        (Result(sights({"gcn": {2: 0.1, 5: 0.2, 20: 0.0}})), "skill of gcn, distance_count at 2 (within"),
        (Result(sights({"gcn": {5: 0.85, 20: 0.0}})), "is ahead of gcn, distance_count at 5"),
        (Result([each for each in sights() if each.network != GRED or not each.seed]), "skill of gred"),
        (Result(told=told({("a, b", GRED): (0.2, 1e-12)})), "least difference of a, b by gred"),
        (Result(told=told({("a, b", "gine"): (0.0, 0.2)})), "difference of a, b by gine"),
        (Result(told=told({(SAME_DISTANCES[0], GRED): (0.1, 0.0)})), "Shrikhande by gred"),
        (Result(told=told({(CIRCLES, GRED): (0.8, 0.8, 0.9)})), "skip links by gred"),
        (Result(told=told({(CIRCLES, "gine"): (0.5, 0.5, 0.5)})), "skip links by gine"),
        (Result(told=told({(CIRCLES, GRED): ()})), "skip links by gred"),
        (Result(costs=costs(flops=50_000)), "operations of gred over features of pairs, tree of 200"),
        (Result(costs=costs(peak=50_000)), "memory of gred over features of pairs, blocks of 200"),
        (Result(costs=costs(flops=900)), "operations of gred over gps, blocks of 800"),
        (Result(trained=trained(0.1, 0.2)), "mae on zinc (published 0.077)"),
        (Result(trained=trained(0.078, 0.07)), "is ahead of gine"),
        (Result(trained=trained(0.6, 0.5, "peptides", "average_precision")), "average_precision on peptides"),
    ],
)  # fmt: skip
def test_a_spoiled_result_fails(spoiled: Result, what: str) -> None:
    failed = failing(check(spoiled))
    assert failed
    assert any(what in each for each in failed), failed


def test_tables_show_networks_pairs_layers_and_data() -> None:
    result = Result(sights(), told(), costs())
    rows = table(result)
    assert [row["distance"] for row in rows] == ["2", "5", "20"]
    assert rows[0]["task"] == "distance count"
    assert rows[0][GRED] == "0.890 ± 0.006"
    assert table(Result(sights()[:1]))[0][GRED] == "0.900"
    pairs = start_table(result)
    assert pairs[0] == {
        "network": GRED,
        "a, b": "0.01",
        SAME_DISTANCES[0]: "0",
        CIRCLES: "0.900 ± 0.000",
    }
    layers = path_table(result)
    assert len(layers) == 2 * 3 * 3
    assert layers[0]["graph"] == "tree, 25 nodes"
    assert (layers[0]["rows of shells"], layers[1]["rows of shells"]) == ("75", "")
    data = table(Result(trained=trained(0.078, 0.1)))
    assert data[0]["test mae"] == "0.079 ± 0.001"
    assert (data[0]["published"], data[1]["published"]) == ("0.077", "")


def smallest(config: Config) -> Config:
    """Return the quick settings at a size of seconds."""
    assert config.counts is not None
    assert config.rings is not None
    assert config.apart is not None
    assert config.costs is not None
    architecture = replace(config.counts.architecture, parameters=2000, layers=1)
    schedule = replace(config.counts.schedule, epochs=1)
    tiny = {"architecture": architecture, "schedule": schedule, "distances": (2,), "sizes": (5, 5, 5)}
    counts, rings = replace(config.counts, **tiny), replace(config.rings, **tiny)
    apart = replace(config.apart, folds=(0, 1), schedule=replace(config.apart.schedule, epochs=1))
    costs = replace(config.costs, nodes=(12,), repeats=1, width=8)
    return replace(config, counts=counts, rings=rings, apart=apart, costs=costs)


def test_a_tiny_run_ends_and_goes_on(tmp_path: Path) -> None:
    config = given(smallest(quick()), runs=tmp_path, graphs=None, steps=None, seeds=(0, 1))
    result = run(config, QUIET)
    assert {each.network for each in result.sights} == {GRED, ONE_HOP, "gcn", "gine", "gps"}
    assert len(result.sights) == 2 * 5 * 2
    assert len(result.told) == 5 * 2
    assert len(result.costs) == 2 * 3
    folder = tmp_path / "distance_filtering"
    saved = json.loads((folder / "result.json").read_text())
    assert len(saved["sights"]) == len(result.sights)
    assert (folder / "long_range.svg").read_text().startswith("<?xml")
    assert run(config, QUIET) == result  # reads what is there
    assert len(check(result)) >= 2 + 10 + 2


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["zinc", "peptides", "pattern", "cluster"])
def test_published_settings_run_for_a_step(setting: str, tmp_path: Path) -> None:
    path = tmp_path / "graphs.npz"
    made = setting in ("pattern", "cluster")
    if not made:
        save_npz(path, molecules(setting))
    config = given(paper(setting), runs=tmp_path, graphs=None if made else path, steps=1, seeds=(0, 1))
    assert config.graphs is not None
    source = replace(config.graphs.source, held_out=2)
    if made:
        source = replace(source, sizes=(32, 2, 2))
    config = replace(config, graphs=replace(config.graphs, source=source))
    result = run(config, QUIET)
    assert {each.network for each in result.trained} == {GRED, "gine", "gps"}
    assert len(result.trained) == 6
    assert all(each.test == each.test for each in result.trained)
    expected = {"zinc": 483_049, "peptides": 534_700, "pattern": 400_010, "cluster": 536_390}[setting]
    ours = next(each.parameters for each in result.trained if each.network == GRED)
    assert 0.95 * expected <= ours <= 1.02 * expected
    if setting == "zinc":
        assert ours == expected
    assert [row["network"] for row in table(result)] == [GRED, "gine", "gps"]
    assert len(check(result)) == 3


def molecules(setting: str) -> Graphs:
    """Return paths of 8 nodes with the numbers of types and targets that a data set has."""
    generator = torch.Generator().manual_seed(0)
    here = torch.arange(7)
    edges = torch.cat((torch.stack((here, here + 1)), torch.stack((here + 1, here))), 1)
    sizes, bonds, task = (28,), (4,), "regression"
    if setting == "peptides":
        sizes, bonds, task = (119, 5, 12, 12, 10, 6, 6, 2, 2), (), "multilabel"
    graphs = []
    for _ in range(40):
        x = (torch.rand(8, len(sizes), generator=generator) * torch.tensor(sizes)).long()
        y = torch.randn(1, 10 if bonds == () else 1, generator=generator)
        attributes = torch.randint(4, (14,), generator=generator) if bonds else None
        graphs.append(
            Graph(x if len(sizes) > 1 else x[:, 0], edges, y if bonds else (y > 0).float(), attributes)
        )
    return flat(setting, task, graphs, node_types=sizes, edge_types=bonds)


def test_settings_are_changed_as_asked(tmp_path: Path) -> None:
    config = given(quick(), runs=tmp_path, graphs=None, steps=30, seeds=(3, 4))
    assert config.counts is not None
    assert config.rings is not None
    assert config.apart is not None
    assert config.seeds == config.counts.seeds == config.rings.seeds == (3, 4)
    assert (config.counts.schedule.epochs, config.rings.schedule.epochs) == (2, 3)  # 24 and 10 steps an epoch
    assert config.apart.schedule.epochs == 6  # 5 steps an epoch
    made = given(paper("pattern"), runs=tmp_path, graphs=None, steps=7, seeds=())
    assert made.graphs is not None
    assert made.graphs.source.sizes == (10_000, 2000, 2000)
    assert (made.graphs.source.count, made.graphs.schedule.epochs) == (7 * 32, 1)
    read = given(paper("zinc"), runs=tmp_path, graphs=Path("z.npz"), steps=None, seeds=())
    assert read.graphs is not None
    assert (read.graphs.source.data, read.graphs.schedule.epochs) == ("z.npz", 2000)
    assert read.graphs.seeds == (0, 1, 2)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="choose quick, zinc, peptides, pattern, cluster"):
        paper("cifar")
    for setting in ("zinc", "peptides"):
        with pytest.raises(InputError, match=f"the setting {setting} needs --graphs"):
            given(paper(setting), runs=Path("r"), graphs=None, steps=None, seeds=())
    with pytest.raises(InputError, match="makes its graphs"):
        given(quick(), runs=Path("r"), graphs=Path("x.npz"), steps=None, seeds=())
    with pytest.raises(InputError, match="two different seeds"):
        run(replace(quick(), seeds=(0,)), QUIET)


def test_the_command_knows_which_system_reads_graphs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "t.npz", X=np.zeros((3, 2)), y=np.zeros(3))
    given = str(tmp_path / "t.npz")
    assert command(["verify", "distance_filtering", "--tables", given]) == 1
    assert "distance_filtering reads graphs, not tables" in capsys.readouterr().err
    assert command(["verify", "pac_pruning", "--graphs", given]) == 1
    assert "pac_pruning reads images, not graphs" in capsys.readouterr().err
    assert command(["verify", "scaled_resnet", "--graphs", given]) == 1
    assert "scaled_resnet reads no graphs" in capsys.readouterr().err
