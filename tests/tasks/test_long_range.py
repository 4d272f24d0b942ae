"""How far networks see: what is trained, what is remembered, what skill and reach are; costs; pairs."""

import json
from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.report.long_range import skill_by_distance
from gramian.tasks.graph_models import GRED, Architecture
from gramian.tasks.graph_training import Schedule
from gramian.tasks.long_range import (
    ONE_HOP,
    LongRangeStudy,
    Sight,
    by_network,
    reach,
    run_long_range,
)

QUIET = Console(quiet=True)
SMALL = LongRangeStudy(
    distances=(3,),
    networks=(GRED, ONE_HOP, "gcn"),
    sizes=(5, 5, 5),
    architecture=Architecture(parameters=2000, layers=2, dropout=0.0, r_min=0.9),
    schedule=Schedule(epochs=2, batch=2, learning_rates=(5e-3,), device="cpu"),
    seeds=(0, 1),
)


def test_every_network_has_a_row_and_a_stopped_study_goes_on(tmp_path: Path) -> None:
    found = run_long_range(SMALL, tmp_path, QUIET)
    cells = by_network(found)
    assert list(cells) == [("distance_count", 3), ("ring_transfer", 3)]
    for (task, _), networks in cells.items():
        assert list(networks) == [GRED, "gcn", ONE_HOP]
        farthest = 3 if task == "ring_transfer" else 15
        assert 2 * 3 <= networks[GRED][0].reach <= 2 * farthest
        assert networks[ONE_HOP][0].reach == networks["gcn"][0].reach == 2
        assert [each.seed for each in networks["gcn"]] == [0, 1]
        assert {each.metric for group in networks.values() for each in group} == {
            "mae" if task == "distance_count" else "accuracy"
        }
        assert all(each.parameters <= 2000 for group in networks.values() for each in group)
        sizes = {group[0].parameters for name, group in networks.items() if name != "gcn"}
        assert len(sizes) == 1  # the control is the same network
    kept = tmp_path / "distance_count-3.json"
    rows = json.loads(kept.read_text())
    rows[0]["score"] = 7.0
    kept.write_text(json.dumps(rows))
    assert run_long_range(SMALL, tmp_path, QUIET)[0].score == 7.0  # read, not trained
    (tmp_path / "ring_transfer-3.json").unlink()
    weights = list(tmp_path.glob("distance_count-3/*/best.safetensors"))
    assert len(weights) == 4
    again = run_long_range(SMALL, tmp_path, QUIET)  # from the run folders
    assert again[1:] == found[1:]
    with pytest.raises(InputError):
        run_long_range(replace(SMALL, distances=(4,)), tmp_path, QUIET)


def test_skill_is_the_share_of_the_constants_error_that_is_gone() -> None:
    sight = Sight("ring_transfer", 5, GRED, 0, "accuracy", 0.6, 0.2, 20, 100, 1, 1.0)
    assert sight.skill == pytest.approx(0.5)
    assert replace(sight, score=0.2).skill == pytest.approx(0)
    assert replace(sight, score=1.0).skill == 1
    counted = replace(sight, metric="mae", score=0.15, constant=0.6)
    assert counted.skill == pytest.approx(0.75)
    assert replace(counted, score=0.9).skill == pytest.approx(-0.5)


def test_reach_is_what_a_change_far_away_can_touch() -> None:
    """Derivatives of a node's output by features of others end at the reach, and not before it."""
    from gramian.data.graph_generators import ring_transfer
    from gramian.nn.distances import distance_shells
    from gramian.tasks.graph_models import build_network

    graphs = ring_transfer((1, 1, 1), distance=9)
    graph = graphs[0]
    distances = torch.minimum(torch.arange(18), 18 - torch.arange(18))
    for network, hops in ((GRED, 1), (GRED, 3), ("gcn", 1), ("gine", 1)):
        architecture = Architecture(parameters=3000, layers=2, hops=hops, dropout=0.0)
        model: nn.Module = build_network(network, graphs, architecture, 0).double().eval()
        shells = distance_shells(graph.edge_index, 18, hops + 1)

        def output(x: Tensor, model=model, shells=shells) -> Tensor:
            return model(x, shells, graph.edge_index)[0]

        x = graph.x.double() + torch.randn(graph.x.shape, generator=torch.Generator().manual_seed(0))
        slopes = torch.autograd.functional.jacobian(output, x).abs().sum((0, 2))
        assert distances[slopes > 0].max() == reach(network, 2, hops)
    assert reach("gps", 4, 5) == inf


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tasks": ("parity",)}, "unknown task 'parity'; choose distance_count or ring_transfer"),
        ({"distances": ()}, "distances must be one or more"),
        ({"distances": (1, 5)}, "at least 2, got 1"),
        ({"networks": ("gred", "gred")}, "networks must be one or more different"),
        ({"networks": ("gat",)}, "unknown model 'gat'"),
        ({"sizes": (5, 0, 5)}, "sizes must be at least 1"),
        ({"seeds": ()}, "seeds are different numbers"),
    ],
)
def test_bad_settings_are_refused(changed, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        run_long_range(replace(SMALL, **changed), tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


def test_the_figure_shows_means_ranges_and_the_reach() -> None:
    panels = {
        "count": {"gred": {5: [0.8, 1.0], 20: [0.6, 0.7]}, "gcn": {5: [0.1], 20: [-3.0]}},
        "ring": {"gred": {5: [1.0, 1.0]}},
    }
    figure = skill_by_distance(panels, 4)
    first, second = figure.axes
    gred, gcn = (container[0] for container in first.containers)
    assert list(gred.get_ydata()) == pytest.approx([0.9, 0.65])
    assert list(gcn.get_ydata()) == [0.1, -0.2]
    assert any(np.array_equal(line.get_xdata(), [4, 4]) for line in first.lines)
    assert len(second.containers) == 1
    assert {"count", "ring", "gred", "gcn"} <= {text.get_text() for text in figure.texts}
    for spoiled, at in (({}, 4), ({"a": {}}, 4), (panels, 0), ({"a": {"b": {0: [1.0]}}}, 4)):
        with pytest.raises(InputError, match="above 0"):
            skill_by_distance(spoiled, at)
