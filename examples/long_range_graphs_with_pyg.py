"""How far does a graph network see? Convolutions against distance filters on data of PyTorch Geometric.

In small trees each node counts the marked nodes at one distance. Networks of equal size: two layers of either
kind, and as many convolutions as it takes to reach the farthest.
"""

from gramian.data.graph_distances import distance_count
from gramian.interop.pyg import DistanceFilterNet, add_distance_shells, to_pyg

import torch  # isort: skip
from torch import nn  # isort: skip
from torch.nn.functional import l1_loss  # isort: skip
from torch_geometric.loader import DataLoader  # isort: skip
from torch_geometric.nn import GCNConv  # isort: skip

SHELLS, EPOCHS = 7, 12


class Convolutions(nn.Module):
    """Graph convolutions with skips."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.types = nn.Embedding(2, width)
        self.layers = nn.ModuleList(GCNConv(width, width) for _ in range(layers))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, batch) -> torch.Tensor:
        h = self.types(batch.x)
        for layer in self.layers:
            h = h + layer(h, batch.edge_index).relu()
        return self.head(h)


def train(model: nn.Module, graphs: list) -> float:
    """Return the mean absolute error on the graphs that were not trained on."""
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    loader = DataLoader(graphs[:300], batch_size=16, shuffle=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, EPOCHS * len(loader))
    for _ in range(EPOCHS):
        for batch in loader:
            l1_loss(model(batch), batch.y).backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    with torch.no_grad():
        batch = next(iter(DataLoader(graphs[300:], batch_size=100)))
        return l1_loss(model(batch), batch.y).item()


networks = {
    "2 convolutions": lambda: Convolutions(80, 2),
    "6 convolutions": lambda: Convolutions(51, 6),
    "2 filters": lambda: DistanceFilterNet([2], 32, 2, 1, readout="nodes"),
}
print("mean absolute error of " + "".join(f"{name:>16}" for name in ["a constant", *networks]))
for distance in (1, 3, 6):
    graphs = to_pyg(distance_count((300, 50, 50), distance=distance, nodes=24))
    graphs = add_distance_shells(graphs, SHELLS)
    counts = torch.cat([graph.y for graph in graphs])
    errors = [(counts - counts.median()).abs().mean().item()]
    for make in networks.values():
        torch.manual_seed(0)
        errors.append(train(make(), graphs))
    print(f"marked at distance {distance}   " + "".join(f"{error:16.2f}" for error in errors))
sizes = [sum(parameter.numel() for parameter in make().parameters()) for make in networks.values()]
print(f"{'parameters':23}{1:16}" + "".join(f"{size:16,}" for size in sizes))
