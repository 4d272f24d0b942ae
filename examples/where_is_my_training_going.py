"""Where is a training going? A few kilobytes a point, kept while it runs, answer without any checkpoint."""

import torch
from torch import nn

from gramian.core.trajectory import displacement, displacement_ratio
from gramian.data.images import load_images
from gramian.observe.hallmarks import SCALARS
from gramian.observe.phase import phase
from gramian.observe.recorder import TrajectoryRecorder, read_sketches

digits = load_images().train
generator = torch.Generator().manual_seed(0)
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
optimiser = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)

recorder = TrajectoryRecorder(model, "runs/sketches", size=2048)
recorder.start(0)
recorder.record(0)
for step in range(1, 401):
    batch = digits[torch.randint(len(digits), (64,), generator=generator)]
    optimiser.zero_grad()
    nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
    optimiser.step()
    if step % 10 == 0:
        recorder.record(step)

path = read_sketches("runs/sketches")
print(phase(path.steps(), path.at).sentence)
for name in ("mds_relative", "displacement_ratio", "mean_update_angle"):
    value, error = path.estimate(SCALARS[name].function)
    print(f"{SCALARS[name].meaning}: {value:.3f} ± {error:.3f}")
for group in path.sketches:
    steps = path.steps(group)
    print(f"layer {group}: moved {displacement(steps)[-1]:.2f}, straight {displacement_ratio(steps):.2f}")
