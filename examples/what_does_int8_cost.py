"""What does int8 do to a network's loss? Any module of linear layers, simulated on any device."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gramian.compress.quantise import quantise

torch.manual_seed(0)
x = torch.randn(2000, 20)
y = (x[:, :5].sum(1) > 0).long()
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(100):
    loss = cross_entropy(model(x), y)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def show(name: str) -> None:
    int8 = quantise(model, batches=x.split(250), skip=())
    print(f"{name}: float {cross_entropy(model(x), y):.4f}, int8 {cross_entropy(int8(x), y):.4f}")


show("as trained")
with torch.no_grad():
    model[0].weight[3] *= 1000  # one loud neuron takes the whole range of the per-tensor grids
    model[0].bias[3] *= 1000
    model[2].weight[:, 3] /= 1000  # and computes exactly the same function in float
show("with an outlier")
