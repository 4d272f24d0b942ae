"""Losses and metrics of graph tasks against loops, scikit-learn and its constant predictors."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    mean_absolute_error,
)
from torch import Tensor

from gramian.data.objectives import IGNORED
from gramian.tasks.graph_scores import (
    METRICS,
    Scale,
    better,
    constant_score,
    loss_of,
    score_of,
    worst,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(rows: int, number: int, seed: int = 0) -> Tensor:
    return torch.randint(number, (rows,), generator=torch.Generator().manual_seed(seed))


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(value) for value in row))
    return [value - total for value in row]


def test_scale_standardises_and_leaves_what_does_not_vary() -> None:
    y = torch.cat((3 + 5 * drawn(50, 1), torch.full((50, 1), 0.1), torch.full((50, 1), -7.0)), 1)
    scale = Scale.of(y, "regression")
    assert scale is not None
    values = y.numpy().astype(np.float64)
    np.testing.assert_allclose(scale.mean.numpy(), values.mean(0), rtol=1e-6)
    assert scale.deviation[0].item() == pytest.approx(values[:, 0].std(), rel=1e-6)
    assert scale.deviation[1:].tolist() == [1, 1]
    standard = (y - scale.mean) / scale.deviation
    torch.testing.assert_close(standard.std(0, correction=0), torch.tensor([1.0, 0, 0]))
    one = Scale.of(torch.tensor([[4.0]]), "node_regression")
    assert one is not None
    assert (one.mean.item(), one.deviation.item()) == (4, 1)
    for task in ("classification", "node", "multilabel"):
        assert Scale.of(y, task) is None
    moved = scale.to(torch.device("cpu"))
    assert torch.equal(moved.mean, scale.mean)


@pytest.mark.parametrize("task", ["regression", "node_regression"])
def test_numbers_are_judged_in_their_unit_and_learnt_standardised(task: str) -> None:
    train, y, outputs = 100 + 9 * drawn(40, 2), 100 + 9 * drawn(30, 2, seed=1), drawn(30, 2, seed=2)
    scale = Scale.of(train, task)
    assert scale is not None
    predicted = train.mean(0) + train.std(0, correction=0) * outputs
    assert score_of(task, outputs, y, scale) == pytest.approx(
        mean_absolute_error(y.numpy(), predicted.numpy()), rel=1e-5
    )
    loop = [
        abs(outputs[i, j].item() - (y[i, j].item() - scale.mean[j].item()) / scale.deviation[j].item())
        for i in range(30)
        for j in range(2)
    ]
    assert loss_of(task, outputs, y, scale).item() == pytest.approx(sum(loop) / 60, rel=1e-5)
    exact = (y - scale.mean) / scale.deviation
    assert score_of(task, exact, y, scale) == pytest.approx(0, abs=1e-4)
    assert loss_of(task, exact, y, scale).item() == 0


def test_classes_of_graphs_are_judged_by_accuracy() -> None:
    outputs, y = drawn(50, 3), classes(50, 3)
    found = score_of("classification", outputs, y, None)
    assert found == pytest.approx(accuracy_score(y.numpy(), outputs.argmax(1).numpy()))
    loop = [-log_softmax(row)[label] for row, label in zip(outputs.tolist(), y.tolist(), strict=True)]
    assert loss_of("classification", outputs, y, None).item() == pytest.approx(sum(loop) / 50, rel=1e-5)


def test_classes_of_nodes_are_judged_by_their_mean_accuracy_and_some_nodes_do_not_count() -> None:
    y = classes(80, 3) * (classes(80, 4, seed=1) > 0)  # 0 is the commonest, 3 is absent
    outputs = drawn(80, 4) + torch.tensor([1.0, 0, 0, 0])
    y[::5] = IGNORED
    known = y != IGNORED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class is predicted that does not occur
        right = balanced_accuracy_score(y[known].numpy(), outputs[known].argmax(1).numpy())
    found = score_of("node", outputs, y, None)
    assert found == pytest.approx(right, rel=1e-6)
    assert found != pytest.approx(accuracy_score(y[known].numpy(), outputs[known].argmax(1).numpy()))
    outputs[~known] = drawn(int((~known).sum()), 4, seed=9)
    assert score_of("node", outputs, y, None) == found
    count = {label: int((y == label).sum()) for label in range(4)}
    total, above, below = sum(count.values()), 0.0, 0.0
    for row, label in zip(outputs.tolist(), y.tolist(), strict=True):
        if label != IGNORED:
            weight = 1 - count[label] / total
            above, below = above - weight * log_softmax(row)[label], below + weight
    assert loss_of("node", outputs, y, None).item() == pytest.approx(above / below, rel=1e-5)
    plain = torch.nn.functional.cross_entropy(outputs, y, ignore_index=IGNORED).item()
    assert loss_of("node", outputs, y, None).item() != pytest.approx(plain, rel=1e-3)  # control


def test_a_batch_of_one_class_is_learnt_and_one_without_a_class_changes_nothing() -> None:
    outputs = drawn(6, 3).requires_grad_()
    one = torch.tensor([2, 2, IGNORED, 2, 2, IGNORED])
    loop = [-log_softmax(outputs[row].tolist())[2] for row in (0, 1, 3, 4)]
    loss = loss_of("node", outputs, one, None)
    assert loss.item() == pytest.approx(sum(loop) / 4, rel=1e-5)
    loss.backward()
    assert outputs.grad is not None
    assert outputs.grad.abs().sum() > 0.1
    assert not outputs.grad[[2, 5]].any()
    outputs.grad = None
    loss = loss_of("node", outputs, torch.full((6,), IGNORED), None)
    loss.backward()
    assert loss.item() == 0
    assert outputs.grad is not None
    assert torch.equal(outputs.grad, torch.zeros(6, 3))
    assert math.isnan(score_of("node", outputs.detach(), torch.full((6,), IGNORED), None))


def test_labels_are_judged_by_the_mean_of_those_that_have_both_values() -> None:
    outputs = drawn(40, 4)
    y = (drawn(40, 4, seed=1) > 0.5).float()
    y[:, 1], y[:, 3] = 0, 1  # constant in this part
    each = [average_precision_score(y[:, c].numpy(), outputs[:, c].numpy()) for c in (0, 2)]
    assert score_of("multilabel", outputs, y, None) == pytest.approx(sum(each) / 2)
    assert sum(each) / 2 != pytest.approx((sum(each) + 1) / 3, abs=0.01)  # what counting label 3 would give
    assert math.isnan(score_of("multilabel", outputs[:, [1, 3]], y[:, [1, 3]], None))
    p = [[1 / (1 + math.exp(-value)) for value in row] for row in outputs.tolist()]
    loop = [
        -math.log(q if label else 1 - q)
        for row, labels in zip(p, y.tolist(), strict=True)
        for q, label in zip(row, labels, strict=True)
    ]
    assert loss_of("multilabel", outputs, y, None).item() == pytest.approx(sum(loop) / 160, rel=1e-4)


@pytest.mark.parametrize("task", sorted(METRICS))
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_outputs_that_are_not_finite_have_no_score_and_are_never_better(task: str, wrong: float) -> None:
    outputs = drawn(6, 2)
    y = {"classification": classes(6, 2), "node": classes(6, 2), "multilabel": torch.eye(2).repeat(3, 1)}.get(
        task, drawn(6, 2, seed=1)
    )
    scale = Scale.of(y, task)
    assert math.isfinite(score_of(task, outputs, y, scale))
    outputs[3, 1] = wrong
    value, metric = score_of(task, outputs, y, scale), METRICS[task]
    assert math.isnan(value)
    assert not better(metric, value, worst(metric))
    assert better(metric, 0.5, worst(metric))


def test_less_is_better_of_errors_alone() -> None:
    assert better("mae", 1.0, 2.0)
    assert not better("mae", 2.0, 1.0)
    assert not better("mae", 1.0, 1.0)
    for metric in ("accuracy", "average_precision"):
        assert better(metric, 2.0, 1.0)
        assert not better(metric, 1.0, 2.0)
        assert not better(metric, 1.0, 1.0)
    assert set(METRICS.values()) == {"mae", "accuracy", "average_precision"}


def test_the_best_constant_is_that_of_scikit_learn() -> None:
    nothing = np.zeros((31, 1)), np.zeros((20, 1))
    y, target = drawn(31, 2).exp(), drawn(20, 2, seed=1).exp()  # skewed: the mean would be another constant
    for task in ("regression", "node_regression"):
        dummy = DummyRegressor(strategy="median").fit(nothing[0], y.numpy())
        error = mean_absolute_error(target.numpy(), dummy.predict(nothing[1]))
        assert constant_score(y, target, task) == pytest.approx(error, rel=1e-5)
    mean = DummyRegressor().fit(nothing[0], y.numpy()).predict(nothing[1])
    assert error != pytest.approx(mean_absolute_error(target.numpy(), mean), rel=1e-2)
    label, asked = classes(31, 3).clamp(min=1), classes(20, 4, seed=1)  # class 0 is not learnt, 3 not known
    commonest = DummyClassifier(strategy="most_frequent").fit(nothing[0], label.numpy())
    guessed = commonest.predict(nothing[1])
    assert constant_score(label, asked, "classification") == pytest.approx(
        accuracy_score(asked.numpy(), guessed)
    )
    assert constant_score(label, asked, "node") == pytest.approx(
        balanced_accuracy_score(asked.numpy(), guessed)
    )
    hidden = torch.cat((label, torch.full((40,), IGNORED)))
    more = torch.cat((asked, torch.full((9,), IGNORED)))
    assert constant_score(hidden, more, "node") == constant_score(label, asked, "node")


def test_constant_labels_have_the_precision_of_their_rates() -> None:
    y = (drawn(30, 3) > 0).float()
    target = (drawn(25, 3, seed=1) > 0.7).float()
    target[:, 1] = 1
    same = np.full(25, 0.3)
    each = [average_precision_score(target[:, c].numpy(), same) for c in (0, 2)]
    assert constant_score(y, target, "multilabel") == pytest.approx(sum(each) / 2)
    assert math.isnan(constant_score(y, target[:, 1:2], "multilabel"))
