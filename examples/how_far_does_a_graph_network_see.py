"""How far does a graph network see? Counting marked nodes three and ten edges away, with two layers each."""

import tempfile
from pathlib import Path

from rich.console import Console

from gramian.tasks.graph_models import Architecture
from gramian.tasks.graph_training import Schedule
from gramian.tasks.long_range import ONE_HOP, LongRangeStudy, by_network, run_long_range

study = LongRangeStudy(
    tasks=("distance_count",),
    distances=(3, 10),
    networks=("gred", ONE_HOP, "gine", "gps"),
    sizes=(24, 8, 12),
    architecture=Architecture(parameters=6_000, layers=2, dropout=0.0, r_min=0.95),
    schedule=Schedule(epochs=8, batch=2, learning_rates=(4e-3,), weight_decay=0.01, device="cpu"),
    seeds=(0,),
)
with tempfile.TemporaryDirectory() as folder:
    found = run_long_range(study, Path(folder) / "run", Console(quiet=True))
for (_, distance), networks in by_network(found).items():
    print(f"marked nodes at distance {distance}:")
    for name, (sight,) in networks.items():
        print(f"{name:>12} sees {sight.reach:>3.0f} edges far, {sight.parameters:,} parameters: "
              f"{max(sight.skill, 0):.0%} of a constant's error is gone")  # fmt: skip
