from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from gramian.compress import scores
from gramian.compress.density import keep_highest
from gramian.compress.linear_masks import LinearMasks
from gramian.compress.masks import add_masks, key_of, masks_of, originals_of, set_mode
from gramian.compress.structures import Columns, Patterns, Rows, Weights
from gramian.errors import InputError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def network(bias: bool = True) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias)).double()
    for k, value in enumerate(model.parameters()):
        nn.init.normal_(value, generator=seeded(k))
    return model


def data() -> list[tuple[Tensor, Tensor]]:
    return [(rows(6, 4, seed=s), torch.arange(6) % 3) for s in (10, 11)]


def test_magnitude_is_the_root_mean_square_of_a_unit():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
    add_masks(model)
    assert scores.magnitude(model)[""].tolist() == [[3, 4], [0, 1]]
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
    add_masks(model, structure=Rows())
    assert scores.magnitude(model)[""].tolist() == pytest.approx([12.5**0.5, 0.5**0.5])


@pytest.mark.parametrize("structure", [Weights(), Rows(), Columns(2), Patterns(2, 4)])
def test_snip_is_the_slope_of_the_loss_by_each_mask_variable(structure):
    model = network()
    add_masks(model, structure=structure)
    found = scores.snip(model, data(), cross_entropy)

    def loss(name: str, unit: int, step: float) -> float:
        changed = deepcopy(model)
        mask, weight = masks_of(changed)[name], originals_of(changed)[name]
        units = torch.ones(mask.kept.shape, dtype=torch.float64)
        units.view(-1)[unit] += step
        weight.data.mul_(mask.spread(units, weight))
        return sum(float(cross_entropy(changed(x), y).detach()) for x, y in data()) / 2

    for name, score in found.items():
        for unit in range(0, score.numel(), 3):
            slope = (loss(name, unit, 1e-5) - loss(name, unit, -1e-5)) / 2e-5
            assert float(score.flatten()[unit]) == pytest.approx(abs(slope), abs=1e-8)


def test_snip_on_a_linear_model_by_hand():
    model = nn.Linear(3, 1, bias=False).double()
    linear = LinearMasks(rows(10, 3), rows(10, seed=1), model.weight.detach()[0])
    add_masks(model)
    batch = [(linear.x, linear.y[:, None])]
    expected = linear.straight_through(torch.ones(3, dtype=torch.float64)).abs()
    torch.testing.assert_close(scores.snip(model, batch, mse_loss)[""][0], expected)


def test_grasp_on_a_linear_model_by_hand():
    model = nn.Linear(3, 1, bias=False).double()
    add_masks(model)
    x, y = rows(10, 3), rows(10, 1, seed=1)
    w = originals_of(model)[""].detach()[0]
    hessian = 2 * x.mT @ x / 10
    gradient = hessian @ w - 2 * x.mT @ y[:, 0] / 10
    torch.testing.assert_close(scores.grasp(model, [(x, y)], mse_loss)[""][0], w * (hessian @ gradient))


def test_grasp_says_how_the_flow_of_gradients_changes_without_a_unit():
    model = network()
    add_masks(model, structure=Rows())
    found = scores.grasp(model, data()[:1], cross_entropy)

    def flow(name: str, unit: int, step: float) -> float:
        changed = deepcopy(model)
        originals_of(changed)[name].data[unit] *= 1 - step
        weights = [w.requires_grad_() for w in originals_of(changed).values()]
        x, y = data()[0]
        gradients = torch.autograd.grad(cross_entropy(changed(x), y), weights)
        return sum(float(g.square().sum()) for g in gradients)

    for name, score in found.items():
        for unit in range(len(score)):
            slope = (flow(name, unit, 1e-5) - flow(name, unit, -1e-5)) / 2e-5
            assert slope == pytest.approx(-2 * float(score[unit]), rel=1e-5, abs=1e-8)
    assert min(float(score.min()) for score in found.values()) < 0  # it is signed, unlike SNIP


def test_scores_look_at_all_weights_and_change_nothing():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    add_masks(model)
    batches = [(torch.randn(5, 1, 5, 5, generator=seeded()), torch.tensor([0, 1, 0, 1, 0]))]
    before, training = deepcopy(model.state_dict()), [m.training for m in model.modules()]
    first = scores.snip(model, batches, cross_entropy)
    scores.grasp(model, batches, cross_entropy)
    scores.synflow(model, (1, 5, 5), 0.5, rounds=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == training
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        masks_of(model)["0"].kept.zero_()
    set_mode(model, "kept")
    again = scores.snip(model, batches, cross_entropy)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_one_round_of_synflow_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    model[2].weight.data = torch.tensor([[-5.0, 6.0]])
    add_masks(model)
    found = scores.synflow(model, (2,), 1.0, rounds=1)
    assert found["0"].tolist() == [[5, 10], [18, 24]]  # |w₁| times the sum of what it leads to
    assert found["2"].tolist() == [[15, 42]]
    assert float(found["0"].sum()) == float(found["2"].sum())  # what flows in flows out


def test_synflow_conserves_the_flow_and_does_not_collapse_layers():
    model = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(6)])
    for k, value in enumerate(model.parameters()):
        nn.init.normal_(value, std=0.1 * 4.0 ** (k % 3), generator=seeded(k))
    add_masks(model)
    one_shot = scores.synflow(model, (16,), 1.0, rounds=1)
    totals = [float(value.sum()) for value in one_shot.values()]
    assert totals == pytest.approx([totals[0]] * 6)
    kept = keep_highest(model, scores.synflow(model, (16,), 0.03), 0.03)
    assert sum(int(value.sum()) for value in kept.values()) == round(0.03 * 6 * 256)
    assert min(int(value.sum()) for value in kept.values()) > 0
    largest = keep_highest(model, scores.magnitude(model), 0.03)
    assert min(int(value.sum()) for value in largest.values()) == 0  # control: magnitude empties a layer


def test_synflow_takes_no_statistics_and_does_not_overflow():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 1, bias=False))
    add_masks(model)
    first = scores.synflow(model, (2,), 1.0, rounds=1)
    assert isinstance(model[1], nn.BatchNorm1d)
    model[1].running_var.fill_(100)
    model[1].running_mean.fill_(7)
    again = scores.synflow(model, (2,), 1.0, rounds=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    deep = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(30)])
    for k, value in enumerate(deep.parameters()):
        nn.init.normal_(value, generator=seeded(k))
    add_masks(deep)
    found = scores.synflow(deep, (64,), 0.5, rounds=1)
    assert max(float(value.max()) for value in found.values()) > torch.finfo(torch.float32).max
    assert all(value.isfinite().all() for value in found.values())


def test_random_and_shuffled_scores():
    model = network()
    add_masks(model)
    first, again = scores.random_scores(model, seeded()), scores.random_scores(model, seeded())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(scores.random_scores(model, seeded(1))["0"], first["0"])
    mixed = scores.shuffled(first, seeded())
    for name, value in first.items():
        assert not torch.equal(mixed[name], value)
        assert torch.equal(mixed[name].flatten().sort().values, value.flatten().sort().values)


def test_iterative_magnitude_rewinds_and_drops_in_rounds():
    model = network()
    add_masks(model, weights="trainable")
    start = {name: w.detach().clone() for name, w in originals_of(model).items()}
    seen = []

    def train(trained: nn.Module) -> None:
        masks = masks_of(trained)
        seen.append(sum(int(mask.kept.sum()) for mask in masks.values()))
        assert all(torch.equal(w.detach(), start[name]) for name, w in originals_of(trained).items())
        with torch.no_grad():
            for name, w in originals_of(trained).items():
                w.copy_(rows(*w.shape, seed=len(seen)))
                w[~masks[name].kept] = 100  # what is pruned does not come back, however large

    kept = scores.iterative_magnitude(model, train, 0.5, drop=0.2)
    assert seen == [56, 45, 36, 29]  # 1, .8, .64, .512 of 56
    assert sum(int(value.sum()) for value in kept.values()) == 28
    assert all(torch.equal(w.detach(), start[name]) for name, w in originals_of(model).items())
    assert all(torch.equal(mask.kept, kept[name]) for name, mask in masks_of(model).items())
    early = {name: value + 1 for name, value in model.state_dict().items() if name.endswith("original")}
    early = {**model.state_dict(), **early}
    start = {name: early[key_of(name, "original")].clone() for name in start}
    originals_of(model)["0"].data += 1
    originals_of(model)["2"].data += 1
    scores.iterative_magnitude(model, train, 0.8, rewind=early)
    assert torch.equal(originals_of(model)["0"].detach(), start["0"])


def test_refusals():
    model = network()
    with pytest.raises(InputError, match="no masks"):
        scores.magnitude(model)
    add_masks(model)
    with pytest.raises(InputError, match="at least one batch"):
        scores.snip(model, [], cross_entropy)
    with pytest.raises(InputError, match="density"):
        scores.synflow(model, (4,), 0.0)
    with pytest.raises(InputError, match="round"):
        scores.synflow(model, (4,), 0.5, rounds=0)
    with pytest.raises(InputError, match="drop"):
        scores.iterative_magnitude(model, lambda _: None, 0.5, drop=1.0)
    norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    add_masks(norm)
    with pytest.raises(InputError, match="running statistics"):
        scores.synflow(norm, (2,), 0.5)
    originals_of(model)["2"].data.fill_(torch.inf)
    with pytest.raises(InputError, match="not finite"):
        scores.synflow(model, (4,), 0.5)
