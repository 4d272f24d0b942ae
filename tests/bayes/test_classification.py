"""Classifiers: what members learn, the temperature against other ways to find it, and who is held out."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from gramian.bayes.classification import (
    TEMPERATURES,
    Classifier,
    calibrated,
    centred_one_hot,
    split,
)
from gramian.bayes.ensemble import EnsembleConfig, fit_classifier, fit_ensemble
from gramian.bayes.members import seed_of
from gramian.errors import InputError
from gramian.nn.mlp import mlp, prior_variances

F64 = torch.float64
CLASSES = 3


def network(outputs: int = CLASSES) -> nn.Module:
    return mlp(2, outputs, widths=(16,), weight_std=1.0, bias_std=0.3)


CONFIG = EnsembleConfig(members=3, steps=60, learning_rate=0.05, prior=prior_variances(network()))


def clusters(count: int = 90, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three clouds that overlap a little."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    centres = torch.tensor([[0.0, 2], [2, -1], [-2, -1]], dtype=F64)
    return centres[labels] + torch.randn(count, 2, generator=draw, dtype=F64), labels


def drawn(rows: int, members: int = 4, spread: float = 1.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores whose softmax, averaged over the members, is the law that the labels are drawn by."""
    draw = torch.Generator().manual_seed(seed)
    common = spread * torch.randn(rows, CLASSES, generator=draw, dtype=F64)
    scores = common + 0.7 * torch.randn(members, rows, CLASSES, generator=draw, dtype=F64)
    labels = torch.multinomial(scores.softmax(-1).mean(0), 1, generator=draw)[:, 0]
    return scores, labels


def cost(scores: Tensor, labels: Tensor, temperature: float) -> float:
    """The cross-entropy of the mixture, and of one more row labelled at random; row by row."""
    s, total, chance = scores.numpy() / temperature, 0.0, []
    for n, label in enumerate(labels.tolist()):
        each = [np.exp(m[n] - m[n].max()) / np.exp(m[n] - m[n].max()).sum() for m in s]
        p = np.mean(each, axis=0)
        total -= math.log(p[label])
        chance.append(np.log(p).mean())
    return total - float(np.mean(chance))


def temperature_of(scores: Tensor, labels: Tensor) -> float:
    ensemble: Any = SimpleNamespace(functions=lambda x: scores)
    return calibrated(ensemble, torch.zeros(len(labels), 1), labels).temperature


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [7, 60])
def test_the_temperature_is_the_one_that_scipy_finds(rows: int, seed: int) -> None:
    scores, labels = drawn(rows, seed=seed)
    found = temperature_of(5 * scores, labels)
    best = minimize_scalar(
        lambda t: cost(5 * scores, labels, math.exp(t)),
        bounds=(math.log(found) - 3, math.log(found) + 3),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert math.log(found) == pytest.approx(best.x, abs=1e-5)
    grid = np.geomspace(0.1, TEMPERATURES[1], 60)
    assert cost(5 * scores, labels, found) <= min(cost(5 * scores, labels, t) for t in grid)


def test_the_temperature_of_calibrated_scores_is_one() -> None:
    scores, labels = drawn(6000)
    assert math.log(temperature_of(scores, labels)) == pytest.approx(0, abs=0.1)
    for times in (0.05, 4.0):
        assert temperature_of(times * scores, labels) == pytest.approx(
            times * temperature_of(scores, labels), rel=1e-5
        )
    other = labels.roll(1)  # labels of other rows: no score is worth anything
    assert temperature_of(scores, other) > 10


def test_few_rows_that_are_all_right_leave_doubt() -> None:
    found = {}
    for rows in (9, 900):
        labels = torch.arange(rows) % CLASSES
        found[rows] = temperature_of(centred_one_hot(labels, CLASSES)[None].double(), labels)
        # n ln p + (ln p + 2 ln (1 − p)/2)/3 is largest at p = (n + 1/3)/(n + 1);  e^{1/T} = 2p/(1 − p)
        assert found[rows] == pytest.approx(1 / math.log(3 * rows + 1), rel=1e-4)
    assert found[900] < found[9] / 2


def test_centred_one_hot() -> None:
    found = centred_one_hot(torch.tensor([2, 0], dtype=torch.int32), 4)
    assert found.tolist() == [[-0.25, -0.25, 0.75, -0.25], [0.75, -0.25, -0.25, -0.25]]
    assert found.sum(1).tolist() == [0, 0]
    thirds = torch.eye(3, dtype=F64) - 1 / 3
    assert torch.equal(centred_one_hot(torch.arange(3), 3).double(), thirds)  # not rounded to float32


def test_members_regress_on_classes() -> None:
    x, labels = clusters()
    held = clusters(30, seed=1)
    found = fit_classifier(network, x, labels, CONFIG, held_out=held)
    alone = fit_ensemble(network, x, centred_one_hot(labels, CLASSES).double(), CONFIG)
    assert torch.equal(found.ensemble.functions(x), alone.functions(x))
    assert found.temperature == calibrated(alone, *held).temperature
    tenth = fit_classifier(network, x, labels, CONFIG)
    (train, other), (kept, known) = split(x, labels, 0.1, CONFIG.seed)
    again = fit_classifier(network, train, other, CONFIG, held_out=(kept, known))
    assert torch.equal(tenth.predict_probabilities(x), again.predict_probabilities(x))
    assert not torch.equal(tenth.predict_probabilities(x), found.predict_probabilities(x))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_are_integers_of_any_kind(dtype: torch.dtype) -> None:
    x, labels = clusters(30)
    config = dataclasses.replace(CONFIG, steps=3)
    expected = fit_classifier(network, x, labels, config)
    assert fit_classifier(network, x, labels.to(dtype), config).temperature == expected.temperature


def test_probabilities_are_averaged_after_the_softmax() -> None:
    x, labels = clusters()
    found = fit_classifier(network, x, labels, CONFIG)
    scores = found.ensemble.functions(x)
    each = (scores / found.temperature).exp()
    each = each / each.sum(-1, keepdim=True)
    torch.testing.assert_close(found.member_probabilities(x), each, rtol=1e-12, atol=1e-12)
    probabilities = found.predict_probabilities(x, rows=7)
    torch.testing.assert_close(probabilities, each.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(90, dtype=F64), rtol=1e-12, atol=0)
    assert torch.equal(found.predict(x), probabilities.argmax(1))
    first = (scores.mean(0) / found.temperature).softmax(-1)  # control: averaged before it
    assert (first - probabilities).abs().max() > 0.02
    assert (found.predict(x) == labels).double().mean() > 0.8
    far = 20 * torch.ones(1, 2, dtype=F64)
    assert found.member_probabilities(far).shape == (3, 1, CLASSES)


def test_a_file_holds_it(tmp_path) -> None:
    x, labels = clusters()
    found = fit_classifier(network, x, labels, dataclasses.replace(CONFIG, steps=3))
    path = tmp_path / "classifier.safetensors"
    found.save(path)
    again = Classifier.load(path, network)
    assert again.temperature == found.temperature
    assert torch.equal(again.predict_probabilities(x), found.predict_probabilities(x))
    found.ensemble.save(path)
    with pytest.raises(InputError, match="without a temperature, which is no classifier"):
        Classifier.load(path, network)
    with pytest.raises(InputError, match="no file of an ensemble"):
        Classifier.load(tmp_path / "none", network)


@pytest.mark.parametrize(
    ("rows", "share", "expected"), [(90, 0.1, 9), (90, 0.5, 45), (4, 0.1, 1), (7, 0.2, 1)]
)
def test_the_held_out_rows_are_a_part(rows: int, share: float, expected: int) -> None:
    x = torch.arange(rows)[:, None].double()
    labels = torch.arange(rows) % CLASSES
    (train, learnt), (held, known) = split(x, labels, share, 5)
    assert len(held) == expected
    assert torch.cat((train, held)).flatten().sort().values.tolist() == list(range(rows))
    for part, own in ((train, learnt), (held, known)):
        assert torch.equal(labels[part[:, 0].long()], own)
    assert torch.equal(split(x, labels, share, 5)[1][0], held)
    if rows == 90:
        assert not torch.equal(split(x, labels, share, 6)[1][0], held)


def test_every_class_is_held_out_in_proportion_and_learnt() -> None:
    labels = torch.tensor([0] * 60 + [1] * 29 + [2] * 10 + [3])
    x = torch.arange(100)[:, None].double()
    seen = torch.zeros(100)
    for seed in range(200):
        (_, learnt), (held, known) = split(x, labels, 0.2, seed)
        counts = known.bincount(minlength=4)
        assert len(held) == 20
        assert (counts[:3] - torch.tensor([60, 29, 10]) * 0.2).abs().max() <= 1.5
        assert counts[3] == 0
        assert learnt.unique().tolist() == [0, 1, 2, 3]
        seen[held[:, 0].long()] += 1
    assert seen[99] == 0
    assert (seen[:99] / 200 - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / 200)  # any row of a class may be
    one = torch.Generator().manual_seed(seed_of(0, "held out"))
    plain = labels[torch.randperm(100, generator=one)[:20]].bincount(minlength=4)  # control
    assert (plain[:3] - torch.tensor([60, 29, 10]) * 0.2).abs().max() > 1.5


def test_bad_input() -> None:
    x, labels = clusters(12)

    def fit(wrong: Tensor = labels, **options) -> Classifier:
        return fit_classifier(network, x, wrong, CONFIG, **options)

    for call, words in (
        (lambda: fit(labels + 1), "12 integers from 0 to 2|11 integers from 0 to 2"),
        (lambda: fit(labels - 1), "integers from 0 to 2"),
        (lambda: fit(labels.double()), "integers from 0 to 2"),
        (lambda: fit(labels > 0), "integers from 0 to 2"),
        (lambda: fit(labels[:-1]), "one integer for each of 12 rows"),
        (lambda: fit(labels[:, None]), "one integer for each of 12 rows"),
        (lambda: fit(held_out=0.0), "leaves none to calibrate on"),
        (lambda: fit(held_out=math.nan), "leaves none to calibrate on"),
        (lambda: fit(held_out=1.0), "leaves none to calibrate on"),
        (lambda: fit(held_out=0.9), "a class without one to train on"),
        (lambda: fit(held_out=(x, labels + 1)), "integers from 0 to 2"),
        (lambda: fit(held_out=(x[:0], labels[:0])), "at least one row"),
        (lambda: fit(held_out=(x * math.nan, labels)), "finite"),
        (lambda: split(x[:3], labels[:3], 0.1, 0), "a class without one to train on"),
        (lambda: fit_classifier(lambda: network(1), x, 0 * labels, CONFIG), "at least 2 outputs"),
        (lambda: centred_one_hot(labels, 1), "at least 2 outputs"),
    ):
        with pytest.raises(InputError, match=words):
            call()
