"""Will it train at this depth? Theory's answer for a network of one's own, before and after a change."""

import torch
from torch import nn

from gramian.nn.activations import ACTIVATIONS
from gramian.nn.tailored import tailored
from gramian.tasks.predict import predict_module

DEPTH, WIDTH = 100, 128


def network(activation, std: float) -> nn.Sequential:
    """Plain layers without skips or norms, weights N(0, std²/fan_in)."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, WIDTH))
    for _ in range(DEPTH):
        layers.append(nn.Sequential(activation(), nn.Linear(WIDTH, WIDTH)))
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std / module.in_features**0.5)
            nn.init.zeros_(module.bias)
    return layers


x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
for name, activation, std in (
    ("torch's ReLU, He's weights", nn.ReLU, 2**0.5),
    ("ReLU, weights of variance 1/fan_in", nn.ReLU, 1.0),
    ("GELU tailored for 100 layers", lambda: tailored(ACTIVATIONS["gelu"], DEPTH), 1.0),
):
    prediction = predict_module(network(activation, std), x)
    (measured,) = prediction.measured
    pairs = "mean of all pairs"
    print(f"{name}: {prediction.verdict.sentence}")
    print(
        f"  last layer, theory and this network: second moment {prediction.theory.second_moment[-1]:.3g}, "
        f"{measured.second_moment[-1]:.3g}; correlation {prediction.theory.correlations[pairs][-1]:.3f}, "
        f"{measured.correlations[pairs][-1]:.3f}"
    )
