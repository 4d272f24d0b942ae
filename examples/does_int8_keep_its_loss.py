"""Does int8 keep a language model's loss? A network as it is, and the same function with one loud channel."""

import torch
from torch.nn.functional import cross_entropy

from gramian.compress import torch_ao
from gramian.compress.recipe import Recipe
from gramian.compress.simulate import Simulation
from gramian.nn.transformer import TransformerConfig, build

generator = torch.Generator().manual_seed(0)
text = (torch.arange(64 * 33) % 7 * 5 + torch.randint(2, (64 * 33,), generator=generator)).view(64, 33)
model = build(
    TransformerConfig(vocabulary=48, context=32, width=64, depth=2, heads=4, block="pre_norm"), seed=0
)
optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)


def loss(network: torch.nn.Module) -> torch.Tensor:
    return cross_entropy(network(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


for _ in range(60):
    optimiser.zero_grad()
    loss(model).backward()
    optimiser.step()
model.eval()


@torch.no_grad()
def show(name: str) -> None:
    exact = loss(model)
    with Simulation(model, Recipe(exact=("head",))).calibrate(text[:, :-1].split(16)):
        static = loss(model) - exact
    real = torch_ao.convert(model, "int8_weight")
    report, weights = torch_ao.converted(real), loss(real) - exact
    print(f"{name}: {exact:.3f} nats a token exact, static W8A8 {static:+.4f}, int8 weights {weights:+.4f}")
    sizes = f"{torch_ao.size(model):,} -> {torch_ao.size(real):,} bytes"
    print(f"  {len(report.layers)} layers really converted: {sizes}")


show("as trained")
with torch.no_grad():
    mlp = model.get_submodule("blocks.0.1.branch.1")
    mlp.up.weight[3] *= 1000  # ReLU passes it on
    mlp.down.weight[:, 3] /= 1000  # and in float nothing has changed
show("one loud channel")
