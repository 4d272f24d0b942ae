import pytest
import torch
from torch import nn

from gramian.errors import InputError
from gramian.nn.transformer import TransformerConfig, build
from gramian.train.optimisers import adamw, parameter_groups


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
