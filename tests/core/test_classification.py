import itertools
import math

import pytest
import torch
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score
from torch import Tensor

from gramian.core import classification
from gramian.errors import InputError

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def probabilities(*shape: int, seed: int = 0) -> Tensor:
    return (2 * normal(*shape, seed=seed)).softmax(-1)


def labels_of(p: Tensor, seed: int = 5) -> Tensor:
    """Labels drawn from the probabilities: a calibrated classifier."""
    return p.multinomial(1, generator=torch.Generator().manual_seed(seed))[:, 0]


def test_entropy_and_confidence_of_known_predictions() -> None:
    p = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]], dtype=F64)
    expected = torch.tensor([math.log(4), 0, math.log(2)], dtype=F64)
    torch.testing.assert_close(classification.entropy(p), expected, rtol=1e-14, atol=0)
    assert classification.least_confidence(p).tolist() == [0.75, 0, 0.5]
    p = probabilities(5, 3)
    theirs = torch.distributions.Categorical(p).entropy()
    torch.testing.assert_close(classification.entropy(p), theirs, rtol=1e-12, atol=0)


def test_members_inform_where_they_disagree() -> None:
    same = probabilities(1, 6, 4).expand(5, -1, -1)
    torch.testing.assert_close(
        classification.mutual_information(same), torch.zeros(6, dtype=F64), rtol=0, atol=1e-14
    )
    certain = torch.eye(3, dtype=F64)[:, None]  # every member sure of another class
    assert float(classification.mutual_information(certain)) == pytest.approx(math.log(3), rel=1e-12)
    members = probabilities(7, 6, 4)
    mean = members.mean(0)
    divergence = (members * (members / mean).log()).sum(-1).mean(0)  # I = mean KL(p_m ‖ mean)
    found = classification.mutual_information(members)
    torch.testing.assert_close(found, divergence, rtol=1e-10, atol=1e-13)
    assert not torch.allclose(
        found, classification.entropy(mean), rtol=0.1
    )  # control: noise in labels is no doubt


def test_log_loss_equals_scikit_learn() -> None:
    p, labels = probabilities(40, 3), torch.arange(40) % 3
    expected = log_loss(labels.numpy(), p.numpy())
    assert float(classification.log_loss(p, labels)) == pytest.approx(expected, rel=1e-12)
    assert float(classification.log_loss(p, labels.flip(0))) != pytest.approx(expected, rel=1e-3)  # control
    sure = torch.tensor([[1.0, 0.0]], dtype=F64)
    assert float(classification.log_loss(sure, torch.tensor([1]))) == math.inf


def test_brier_equals_a_loop() -> None:
    p, labels = probabilities(20, 4), torch.arange(20) % 4
    expected = sum((float(p[i, c]) - (c == int(labels[i]))) ** 2 for i in range(20) for c in range(4)) / 20
    assert float(classification.brier(p, labels)) == pytest.approx(expected, rel=1e-12)
    even = torch.full((20, 4), 0.25, dtype=F64)
    assert float(classification.brier(even, labels)) == pytest.approx(0.75, rel=1e-14)
    wrong = torch.eye(4, dtype=F64)[(labels + 1) % 4]
    assert float(classification.brier(wrong, labels)) == 2


def test_bins_of_equal_width_close_on_the_right() -> None:
    confidence = torch.tensor([0.0, 0.05, 0.1, 0.1000001, 0.2, 0.3, 0.7, 0.9999, 1.0], dtype=F64)
    assert classification.equal_width(confidence, 10).tolist() == [0, 0, 0, 1, 1, 2, 6, 9, 9]
    assert classification.equal_width(confidence, 1).unique().tolist() == [0]


def test_bins_of_equal_mass_do_not_split_ties() -> None:
    spread = normal(103).sigmoid()
    sizes = classification.equal_mass(spread, 10).bincount(minlength=10)
    assert set(sizes.tolist()) == {10, 11}
    order = spread.argsort()
    assert bool((classification.equal_mass(spread, 10)[order].diff() >= 0).all())
    tied = torch.tensor([0.5, 0.9, 0.5, 0.5, 0.2, 0.5], dtype=F64)
    assert classification.equal_mass(tied, 3).tolist() == [0, 2, 0, 0, 0, 0]


@pytest.mark.parametrize("grouping", [classification.equal_width, classification.equal_mass])
def test_calibration_error_equals_a_loop(grouping: classification.Grouping) -> None:
    p = probabilities(200, 3).mul(20).round() / 20
    p[:, 2] = 1 - p[:, :2].sum(1)
    p = p.clamp(min=0)
    p /= p.sum(1, keepdim=True)
    labels = labels_of(probabilities(200, 3, seed=1))
    confidence, answer = p.max(1)
    expected = 0.0
    place = grouping(confidence, 7)
    for b in range(7):
        rows = [i for i in range(200) if int(place[i]) == b]
        if rows:
            right = sum(float(answer[i] == labels[i]) for i in rows)
            expected += abs(right - sum(float(confidence[i]) for i in rows)) / 200
    found = classification.expected_calibration_error(p, labels, 7, grouping)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    again = classification.expected_calibration_error(p[order], labels[order], 7, grouping)
    assert float(again) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("grouping", [classification.equal_width, classification.equal_mass])
def test_calibration_error_tells_calibrated_from_overconfident(grouping: classification.Grouping) -> None:
    p = probabilities(20_000, 5)
    labels = labels_of(p)
    assert float(classification.expected_calibration_error(p, labels, grouping=grouping)) < 0.015
    sharp = p.pow(3) / p.pow(3).sum(1, keepdim=True)
    error = classification.expected_calibration_error(sharp, labels, grouping=grouping)
    bias = float((sharp.amax(1) - p.amax(1)).mean())  # every bin is over-confident
    assert float(error) == pytest.approx(bias, abs=0.015)
    assert bias > 0.1


def test_a_reliability_diagram() -> None:
    confidence = torch.tensor([0.55, 0.6, 0.9, 1.0], dtype=F64)
    found = classification.reliability(confidence, torch.tensor([1, 0, 1, 1]), 5)
    assert found.count.tolist() == [0, 0, 2, 0, 2]
    assert found.confidence[[2, 4]].tolist() == pytest.approx([0.575, 0.95])
    assert found.accuracy[[2, 4]].tolist() == [0.5, 1]
    assert bool(found.accuracy[[0, 1, 3]].isnan().all())


@pytest.mark.parametrize("ties", [False, True])
def test_rankings_equal_scikit_learn_and_all_pairs(ties: bool) -> None:
    positive, negative = normal(30) + 0.7, normal(50, seed=1)
    if ties:
        positive, negative = positive.round(), negative.round()
    truth = [1] * 30 + [0] * 50
    scores = torch.cat((positive, negative)).numpy()
    found = classification.auroc(positive, negative)
    assert float(found) == pytest.approx(roc_auc_score(truth, scores), rel=1e-12)
    pairs = [(s > t) + 0.5 * (s == t) for s, t in itertools.product(positive.tolist(), negative.tolist())]
    assert float(found) == pytest.approx(sum(pairs) / 1500, rel=1e-12)
    precision = classification.average_precision(positive, negative)
    assert float(precision) == pytest.approx(average_precision_score(truth, scores), rel=1e-12)
    assert float(classification.auroc(negative, positive)) == pytest.approx(1 - float(found), rel=1e-12)


def test_rankings_of_extremes() -> None:
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0, 4.0])
    assert float(classification.auroc(high, low)) == 1
    assert float(classification.auroc(low, high)) == 0
    assert float(classification.auroc(low[:1].expand(4), low[:1])) == 0.5
    assert float(classification.average_precision(high, low)) == 1


@pytest.mark.parametrize("score", [classification.entropy, classification.least_confidence])
def test_doubt_tells_strange_inputs(score: classification.Score) -> None:
    sure, unsure = (5 * normal(300, 4)).softmax(-1), (0.5 * normal(200, 4, seed=1)).softmax(-1)
    found = float(classification.out_of_distribution_auroc(sure, unsure, score))
    assert found == pytest.approx(
        roc_auc_score([0] * 300 + [1] * 200, torch.cat((score(sure), score(unsure))))
    )
    assert found > 0.9
    chance = classification.out_of_distribution_auroc(sure[:150], sure[150:], score)
    assert float(chance) == pytest.approx(0.5, abs=0.12)  # control


def test_error_falls_with_confidence() -> None:
    confidence = torch.tensor([0.9, 0.5, 0.7, 0.6], dtype=F64)
    error = torch.tensor([0, 1, 0, 1])
    curve = classification.error_confidence_curve(confidence, error)
    assert curve.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert classification.error_confidence_curve(-confidence, error).tolist() == pytest.approx(
        [1, 1, 2 / 3, 0.5]
    )
    thresholds = torch.tensor([0.0, 0.55, 0.7, 0.95], dtype=F64)
    above = classification.error_above(confidence, error, thresholds)
    assert above[:3].tolist() == pytest.approx([0.5, 1 / 3, 0])
    assert bool(above[3].isnan())


def test_ties_of_confidence_count_as_over_all_orders() -> None:
    confidence = torch.tensor([0.8, 0.8, 0.9, 0.8, 0.1], dtype=F64)
    error = torch.tensor([1.0, 0.0, 0.5, 4.0, 2.0], dtype=F64)
    curves = []
    for order in itertools.permutations((0, 1, 3)):
        ranked = error[[2, *order, 4]]
        curves.append(ranked.cumsum(0) / torch.arange(1, 6))
    found = classification.error_confidence_curve(confidence, error)
    torch.testing.assert_close(found, torch.stack(curves).mean(0), rtol=1e-12, atol=0)
    assert not torch.allclose(found, curves[0], rtol=1e-3)  # control: one order is not the mean


def test_random_confidence_has_a_flat_curve() -> None:
    error = (normal(4000) > 0.5).double()
    curve = classification.error_confidence_curve(normal(4000, seed=1), error)
    assert float(curve.mean()) == pytest.approx(float(error.mean()), abs=0.03)
    best = classification.error_confidence_curve(-error, error)
    rate = float(error.mean())
    assert float(best.mean()) == pytest.approx(rate + (1 - rate) * math.log(1 - rate), abs=1e-3)


def test_bad_input_is_named() -> None:
    p, labels = probabilities(5, 3), torch.arange(5) % 3
    for spoiled in (2 * p, -p, p * torch.nan):
        with pytest.raises(InputError, match="class probabilities"):
            classification.entropy(spoiled)
        with pytest.raises(InputError, match="class probabilities"):
            classification.mutual_information(spoiled[None])
        with pytest.raises(InputError, match="class probabilities"):
            classification.brier(spoiled, labels)
    for measure in (classification.log_loss, classification.expected_calibration_error):
        for wrong in (labels + 1, labels - 1, labels[:4], labels[:, None]):
            with pytest.raises(InputError, match="a class from 0 to 2 for each of 5 rows"):
                measure(p, wrong)
        with pytest.raises(InputError, match="no prediction to judge"):
            measure(p[:0], labels[:0])
    with pytest.raises(InputError, match="members have to be"):
        classification.mutual_information(p[None][:0])
    with pytest.raises(InputError, match="at least 1 bin"):
        classification.expected_calibration_error(p, labels, 0)
    with pytest.raises(InputError, match="from 0 to 1"):
        classification.reliability(torch.tensor([1.5]), torch.tensor([1]))
    with pytest.raises(InputError, match="both sides"):
        classification.auroc(normal(3), normal(0))
    with pytest.raises(InputError, match="NaN"):
        classification.average_precision(normal(3), normal(3) * torch.nan)
    with pytest.raises(InputError, match="confidence and error have to be"):
        classification.error_confidence_curve(normal(3), normal(4))
    with pytest.raises(InputError, match="hold NaN"):
        classification.error_above(normal(3), normal(3) * torch.nan, normal(2))
