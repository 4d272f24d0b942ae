"""Which graphs are told apart: pairs by untrained networks, circles by trained ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gramian.data.graph_generators import NODES, SKIPS
from gramian.data.random_graphs import circle
from gramian.errors import InputError
from gramian.nn.distances import distance_shells
from gramian.nn.positional_encodings import walk_positions
from gramian.tasks.graph_training import Schedule
from gramian.tasks.told_apart import CIRCLES, MOST, PAIRS, SAME_DISTANCES, ApartStudy, difference, run_apart

QUIET = Console(quiet=True)


def refined(edges: torch.Tensor, nodes: int) -> list[int]:
    """Sorted colours of the nodes after as many rounds of refinement as there are nodes."""
    colours = [0] * nodes
    for _ in range(nodes):
        seen = [
            (colours[v], tuple(sorted(colours[u] for u, w in edges.T.tolist() if w == v)))
            for v in range(nodes)
        ]
        colours = [hash(each) for each in seen]
    return sorted(colours)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_those_that_colour_refinement_does_not_tell(name: str) -> None:
    one, other = PAIRS[name]
    nodes = int(one.max()) + 1
    assert refined(one, nodes) == refined(other, nodes)
    assert not torch.equal(one, other)
    without = one[:, (one[0] > 0) & (one[1] > 0)]
    assert refined(without, nodes) != refined(one, nodes)  # control


@pytest.mark.parametrize("name", PAIRS)
def test_filters_tell_them_unless_distances_are_the_same(name: str) -> None:
    for seed in range(2):
        filtered = difference("gred", *PAIRS[name], seed)
        assert (filtered < 1e-9) if name in SAME_DISTANCES else (filtered > 1e-3)
        for network in ("gine", "gcn"):
            assert difference(network, *PAIRS[name], seed) < 1e-9
    path = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    star = torch.tensor([[0, 1, 0, 2, 0, 3], [1, 0, 2, 0, 3, 0]])
    assert difference("gine", path, star, 0) > 1e-3  # control: it does tell what refinement tells


def test_two_classes_of_circles_have_the_same_distances_and_no_others_have() -> None:
    shells = [distance_shells(circle(NODES, 1, skip), NODES, 21) for skip in SKIPS]
    numbers = [tuple(each.starts.diff()[each.node == 0].tolist()) for each in shells]
    for each, of_first in zip(shells, numbers, strict=True):
        for v in range(NODES):  # and all nodes of a circle are alike
            assert tuple(each.starts.diff()[each.node == v].tolist()) == of_first
    alike = {SKIPS[place] for place, each in enumerate(numbers) if numbers.count(each) > 1}
    assert alike == {6, 16}
    assert numbers[SKIPS.index(6)] == (4, 8, 12, 10, 6)
    assert len(set(numbers)) / len(SKIPS) == MOST
    one, other = (walk_positions(edges, NODES, 8)[0] for edges in (circle(NODES, 1, 6), circle(NODES, 1, 16)))
    assert (one - other).abs().max() > 1e-4  # they are not the same graph


def test_circles_are_trained_on_by_fold_and_remembered(tmp_path: Path) -> None:
    schedule = Schedule(epochs=1, batch=30, learning_rates=(1e-3,), device="cpu")
    study = replace(ApartStudy(), folds=(0, 1), schedule=schedule)
    found = run_apart(study, (0, 1), tmp_path, QUIET)
    assert [(each.graphs, each.network) for each in found] == [
        (name, network) for name in (*PAIRS, CIRCLES) for network in ("gred", "gine")
    ]
    assert all(len(each.apart) == 2 for each in found)
    kept = tmp_path / "fold-1.json"
    rows = json.loads(kept.read_text())
    rows["gred"]["test"] = 7.0
    kept.write_text(json.dumps(rows))
    assert run_apart(study, (0, 1), tmp_path, QUIET)[-2].apart[1] == 7.0  # read, not trained


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"folds": (0,)}, r"two or more different ones of 0 to 4, got \[0\]"),
        ({"folds": (0, 5)}, r"got \[0, 5\]"),
        ({"networks": ()}, "at least one network"),
    ],
)
def test_bad_settings_are_refused(changed, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        run_apart(replace(ApartStudy(), **changed), (0, 1), tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()
