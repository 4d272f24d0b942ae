import sys

import pytest
import torch
from torch import nn

from gramian.errors import InputError, MissingExtraError
from gramian.nn.transformer import TransformerConfig, build
from gramian.train import optimisers
from gramian.train.optimisers import (
    BESIDE,
    OPTIMISERS,
    Settings,
    adamw,
    build_optimiser,
    hidden_matrices,
    parameter_groups,
    parts,
)

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 brought Muon")
EVERY = [pytest.param(name, marks=[needs_muon] if name == "muon" else []) for name in OPTIMISERS]
PLAIN = Settings(learning_rate=1e-2, weight_decay=0.1)


def small(block: str = "pre_norm", **shape):
    return build(
        TransformerConfig(vocabulary=20, context=8, width=12, depth=2, heads=2, block=block, **shape), 0
    )


def train(model, optimiser, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        tokens = torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(step % 3))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def test_gains_norms_and_biases_are_never_decayed() -> None:
    for block in ("pre_norm", "sas", "outlier_protected"):
        model = build(
            TransformerConfig(
                vocabulary=20, context=8, width=12, depth=2, heads=2, block=block, norm="layernorm"
            ),
            0,
        )
        names = {parameter: name for name, parameter in model.named_parameters()}
        decayed, free = parameter_groups(model, 0.1)
        assert [decayed["weight_decay"], free["weight_decay"]] == [0.1, 0.0]
        both = [*decayed["params"], *free["params"]]
        assert len(both) == len({id(p) for p in both}) == len(names)  # each once, the tied head too
        for parameter in decayed["params"]:
            assert parameter.ndim == 2, names[parameter]
        last = {names[parameter].rsplit(".", 1)[-1] for parameter in free["params"]}
        allowed = {"bias", "weight", "alpha", "beta", "gamma", "gain", "skip"}
        assert last <= allowed


def test_frozen_parameters_are_in_no_group() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == 1


def test_adamw_takes_one_known_step() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    optimiser = adamw(model, 0.1, 0.5, (0.9, 0.99), 1e-8)
    model.weight.grad = torch.tensor([[3.0]])
    optimiser.step()  # first Adam step is lr · sign(gradient), after decay by lr · 0.5
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1)


def test_sgd_takes_two_known_steps() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    optimiser = build_optimiser("sgd", model, Settings(0.1, 0.5))
    for gradient in (3.0, -1.0):
        model.weight.grad = torch.tensor([[gradient]])
        optimiser.step()
    first = 3.0 + 0.5 * 2.0  # decay is a term of the gradient
    weight = 2.0 - 0.1 * first
    second = 0.9 * first + (-1.0 + 0.5 * weight)
    assert model.weight.item() == pytest.approx(weight - 0.1 * second)
    plain = build_optimiser("sgd", model, Settings(0.1, 0.5, betas=(0.0, 0.0)))
    assert plain.param_groups[0]["momentum"] == 0.0


def test_bad_settings_are_named() -> None:
    model = nn.Linear(2, 2)
    for rate, decay, betas, eps, words in (
        (0.0, 0.1, (0.9, 0.99), 1e-8, "learning rate"),
        (float("nan"), 0.1, (0.9, 0.99), 1e-8, "learning rate"),
        (0.1, -0.1, (0.9, 0.99), 1e-8, "decay"),
        (0.1, 0.1, (0.9, 1.0), 1e-8, "betas"),
        (0.1, 0.1, (0.9, 0.99), 0.0, "eps"),
    ):
        with pytest.raises(InputError, match=words):
            adamw(model, rate, decay, betas, eps)
    with pytest.raises(InputError, match="no trainable parameter"):
        parameter_groups(nn.ReLU(), 0.1)


def test_hidden_matrices_are_neither_embeddings_nor_heads_nor_vectors() -> None:
    for tied in (True, False):
        model = small("sas", tied=tied)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found = {names[id(parameter)] for parameter in hidden_matrices(model)}
        assert found == {name for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2}
        assert "embedding.weight" in names.values()
        assert found < set(names.values())
    frozen = small()
    frozen.requires_grad_(False)
    assert hidden_matrices(frozen) == []


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_is_in_one_group_and_vectors_are_not_decayed(name: str) -> None:
    model = small("sas", tied=False)
    optimiser = build_optimiser(name, model, PLAIN)
    placed = [(p, group) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(id(p) for p, _ in placed) == sorted(id(p) for p in model.parameters())
    for parameter, group in placed:
        assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0)
        assert group["lr"] == group["initial_lr"] == 1e-2
    if name in BESIDE:
        main, beside = parts(optimiser)
        assert isinstance(beside, torch.optim.AdamW)
        trained = {id(p) for group in main.param_groups for p in group["params"]}
        assert trained == {id(p) for p in hidden_matrices(model)}
    else:
        assert len(parts(optimiser)) == 1


def test_groups_of_the_callers_own_take_the_place_of_ours() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    asked: list[tuple[nn.Module, float]] = []

    def groups(given: nn.Module, decay: float) -> list[dict]:
        asked.append((given, decay))
        first, second = given.children()
        return [
            {"params": list(first.parameters()), "lr": 0.5, "weight_decay": 0.25},
            {"params": list(second.parameters()), "weight_decay": 0.0},
        ]

    optimiser = build_optimiser("adamw", model, PLAIN, groups)
    assert asked == [(model, 0.1)]
    assert [group["initial_lr"] for group in optimiser.param_groups] == [0.5, 1e-2]
    assert [group["weight_decay"] for group in optimiser.param_groups] == [0.25, 0.0]
    assert [len(group["params"]) for group in optimiser.param_groups] == [2, 2]
    ours = build_optimiser("adamw", model, PLAIN)  # control: matrices and vectors apart
    assert [group["weight_decay"] for group in ours.param_groups] == [0.1, 0.0]
    assert {parameter.ndim for parameter in ours.param_groups[0]["params"]} == {2}
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for place, (parameter, was) in enumerate(zip(model.parameters(), before, strict=True)):
        torch.testing.assert_close(parameter, was * (1 - 0.5 * 0.25 if place < 2 else 1))


@pytest.mark.parametrize("name", EVERY)
def test_every_optimiser_learns(name: str) -> None:
    model = small()
    losses = train(model, build_optimiser(name, model, Settings(1e-2, 0.0)), 40)
    assert losses[-1] < 0.5 * losses[0]
    if name in BESIDE:  # both sides moved
        fresh = small()
        for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
            assert not torch.equal(one, two)


@needs_muon
def test_muon_takes_one_orthogonal_step_of_adamws_size() -> None:
    model = nn.Linear(6, 4, bias=False)
    before = model.weight.detach().clone()
    optimiser = build_optimiser("muon", model, Settings(0.1, 0.0))
    model.weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    optimiser.step()
    step = (before - model.weight.detach()) / (0.1 * 0.2 * 6**0.5)
    values = torch.linalg.svdvals(step)
    assert ((values > 0.6) & (values < 1.3)).all()  # five Newton-Schulz iterations come that near to 1
    assert torch.linalg.svdvals(model.weight.grad).max() > 1.5 * torch.linalg.svdvals(model.weight.grad).min()


def test_soap_turns_with_the_basis_and_adam_does_not() -> None:
    """Rotating inputs and outputs rotates what SOAP does; Adam depends on the basis."""
    random = torch.Generator().manual_seed(1)
    turns = [torch.linalg.qr(torch.randn(n, n, generator=random, dtype=torch.float64))[0] for n in (5, 5)]
    gradients = torch.randn(4, 5, 5, generator=random, dtype=torch.float64)

    def walked(name: str, turned: bool):
        model = nn.Linear(5, 5, bias=False, dtype=torch.float64)
        nn.init.zeros_(model.weight)
        optimiser = build_optimiser(name, model, Settings(0.1, 0.0, eps=1e-30))
        for gradient in gradients:
            model.weight.grad = turns[0] @ gradient @ turns[1].T if turned else gradient.clone()
            optimiser.step()
        weight = model.weight.detach()
        return turns[0].T @ weight @ turns[1] if turned else weight

    torch.testing.assert_close(walked("soap", True), walked("soap", False), rtol=1e-6, atol=1e-9)
    assert (walked("adamw", True) - walked("adamw", False)).abs().max() > 0.05  # control


@needs_muon
def test_a_learning_rate_of_its_own_for_what_adamw_trains_beside() -> None:
    optimiser = build_optimiser("muon", small(), Settings(0.1, 0.1, vector_learning_rate=0.01))
    assert [group["initial_lr"] for group in optimiser.param_groups] == [0.1, 0.01, 0.01]


def test_what_cannot_be_built_is_said(monkeypatch) -> None:
    with pytest.raises(InputError, match="unknown optimiser 'lion'; choose one of adamw, adafactor"):
        build_optimiser("lion", small(), PLAIN)
    with pytest.raises(InputError, match="soap trains matrices between features"):
        build_optimiser("soap", nn.LayerNorm(3), PLAIN)
    with pytest.raises(InputError, match="learning rate"):
        build_optimiser("adamw", small(), Settings(0.1, 0.1, vector_learning_rate=-1.0))
    with pytest.raises(InputError, match="learning rate"):
        build_optimiser("adamw", small(), Settings(0.1, 0.1, vector_learning_rate=0.0))
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(MissingExtraError, match=r"gramian\[optimisers\]"):
        build_optimiser("soap", small(), PLAIN)
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(InputError, match=r"torch 2\.9"):
        optimisers.check("muon", PLAIN)
