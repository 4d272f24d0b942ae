"""Classifiers to prune: their shapes, their start, and their training by seed and step alone."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramian.compress.draws import draw_outputs
from gramian.compress.masks import add_masks
from gramian.compress.shrink import shrink
from gramian.errors import DivergedError, InputError
from gramian.tasks.pruning_networks import NETWORKS, WIDTHS, Network, build, skeleton, train_dense


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(network: Network, count: int = 5) -> Tensor:
    return torch.randn(count, *network.size, generator=seeded())


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model]


def test_an_mlp_is_its_equation() -> None:
    network = Network("mlp", (1, 4, 5), 3, (7, 6))
    model, x = build(network, 0), inputs(network)
    assert kinds(model) == ["Flatten", "Linear", "ReLU", "Linear", "ReLU", "Linear"]
    h = x.flatten(1)
    for layer in (model[1], model[3]):
        h = (h @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(model(x), h @ model[5].weight.T + model[5].bias)
    assert model(x).shape == (5, 3)
    assert build(Network("mlp", (9,), 2), 0)[1].weight.shape == (300, 9)


@pytest.mark.parametrize(
    ("size", "widths", "pools", "features"),
    [
        ((1, 8, 8), (), 2, 32 * 2 * 2),
        ((1, 28, 28), (), 2, 32 * 7 * 7),
        ((3, 8, 8), (4, 5, 6, 7), 3, 7),
        ((2, 3, 9), (4, 5), 1, 5 * 4),
        ((2, 1, 9), (4,), 0, 4 * 9),
    ],
)
def test_a_cnn_pools_as_long_as_the_side_allows(size, widths, pools, features) -> None:
    network = Network("cnn", size, 10, widths)
    model = build(network, 0)
    assert kinds(model).count("MaxPool2d") == pools
    assert kinds(model).count("Conv2d") == len(widths or WIDTHS["cnn"])
    assert all(layer.kernel_size == (3, 3) for layer in model if isinstance(layer, nn.Conv2d))
    assert model[-1].in_features == features
    assert model(inputs(network)).shape == (5, 10)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_start_by_the_seed_alone(name: str) -> None:
    network = Network(name, (1, 8, 8), 10)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    model = build(network, 3)
    assert torch.equal(torch.rand(1), expected)  # the global generator is where it was
    again, other = build(network, 3), build(network, 4)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
        assert value.dtype == torch.float32
        if value.ndim == 1:
            assert not value.any()
        else:
            assert not torch.equal(value, other.state_dict()[key])
            spread = math.sqrt(2 / value[0].numel())
            assert value.std().item() == pytest.approx(spread, abs=5 * spread / math.sqrt(2 * value.numel()))
    assert all(value.requires_grad for value in model.parameters())
    assert all(value.is_meta for value in skeleton(network).parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_chains_that_shrink_and_draw(name: str) -> None:
    network = Network(name, (1, 8, 8), 10, (6, 5))
    model, x = build(network, 0).eval(), inputs(network)
    assert type(model) is nn.Sequential
    torch.testing.assert_close(shrink(model)(x), model(x))
    add_masks(model)
    assert draw_outputs(model, x, 3, seeded()).shape == (3, 5, 10)


def test_a_network_comes_back_from_json() -> None:
    network = Network("cnn", (1, 8, 8), 10)
    assert network.widths == WIDTHS["cnn"]
    assert Network(**json.loads(json.dumps(asdict(network)))) == network
    assert replace(network, widths=(3, 4)) != network
    assert hash(network) == hash(Network("cnn", [1, 8, 8], 10, [16, 32]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rnn", (4,), 2), "unknown network 'rnn'; choose one of mlp, cnn"),
        (("cnn", (4,), 2), r"a cnn is for images .* not inputs of 4; use an mlp"),
        (("cnn", (4, 4), 2), "not inputs of 4 x 4"),
        (("mlp", (), 2), "positive whole numbers"),
        (("mlp", (0,), 2), "positive whole numbers"),
        (("mlp", (4,), 0), "positive whole numbers"),
        (("mlp", (4,), 2, (3, -1)), r"positive whole numbers .* \(3, -1\)"),
        (("mlp", (4,), 2, (3, 2.5)), "positive whole numbers"),
        (("mlp", (4,), True), "positive whole numbers"),
    ],
)
def test_networks_that_cannot_be_built(arguments: tuple, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Network(*arguments)


def problem(count: int = 200) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 4, generator=seeded(1))
    return x, (x[:, 0] * x[:, 1] > 0).long()


SETTINGS = {"steps": 60, "batch": 20, "rate": 0.01, "seed": 0}


def trained(**changed) -> tuple[nn.Sequential, list[float]]:
    model = build(Network("mlp", (4,), 2, (16,)), 0)
    return model, train_dense(model, *problem(), **{**SETTINGS, **changed})


def test_training_learns_and_is_repeated_bit_for_bit() -> None:
    told: list[int] = []
    model, losses = trained(steps=300, advanced=told.append)
    assert told == list(range(1, 301))
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    assert not model.training
    state = torch.random.get_rng_state()
    again, repeated = trained(steps=300)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert losses == repeated
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert trained(seed=1)[1] != trained()[1]


def test_labels_without_relation_are_not_learnt() -> None:
    """Control of the test above: what falls is the loss of something that can be known."""
    x, y = problem(4000)
    model = build(Network("mlp", (4,), 2, (16,)), 0)
    losses = train_dense(model, x, y[torch.randperm(4000, generator=seeded())], **{**SETTINGS, "steps": 300})
    assert sum(losses[-50:]) > 0.8 * 50 * math.log(2)


def test_a_step_is_adams_at_a_rate_that_falls_as_a_cosine() -> None:
    x, y = problem(20)
    model, expected = (build(Network("mlp", (4,), 2, (3,)), 0) for _ in range(2))
    train_dense(model, x, y, steps=4, batch=500, rate=0.1, seed=0)  # a batch is all there is
    optimiser = torch.optim.Adam(expected.parameters(), lr=0.1)
    for step in range(4):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / 4)) / 2
        optimiser.zero_grad()
        cross_entropy(expected(x), y).backward()
        optimiser.step()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_every_epoch_sees_every_example_once(monkeypatch) -> None:
    seen: list[Tensor] = []

    def watched(outputs: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return outputs.sum() * 0

    monkeypatch.setattr("gramian.tasks.pruning_networks.cross_entropy", watched)
    model = build(Network("mlp", (1,), 2), 0)
    train_dense(model, torch.zeros(10, 1), torch.arange(10), steps=9, batch=3, rate=0.1, seed=0)
    assert [len(batch) for batch in seen] == [3] * 9
    epochs = torch.cat(seen).reshape(3, 9)
    assert all(len(epoch.unique()) == 9 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_training_that_cannot_go_on() -> None:
    x, y = problem()
    model = build(Network("mlp", (4,), 2), 0)
    x[:] = torch.inf
    with pytest.raises(DivergedError, match="the loss of the dense network is nan at step 0"):
        train_dense(model, x, y, **SETTINGS)
    for changed in ({"steps": -1}, {"batch": 0}, {"rate": 0.0}, {"rate": math.nan}, {"rate": math.inf}):
        with pytest.raises(InputError, match="training needs examples, steps ≥ 0, a batch ≥ 1 and a rate"):
            trained(**changed)
    with pytest.raises(InputError, match="got 0 examples"):
        train_dense(model, x[:0], y[:0], **SETTINGS)
    untouched, losses = trained(steps=0)
    assert losses == []
    assert torch.equal(untouched[1].weight, build(Network("mlp", (4,), 2, (16,)), 0)[1].weight)
