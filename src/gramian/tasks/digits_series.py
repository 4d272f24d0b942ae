"""A series of checkpoints to look at when none is given: a small network trained on scikit-learn's digits."""

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from gramian.data.images import load_images
from gramian.observe.recorder import TrajectoryRecorder, points

POINTS = 60
"""Checkpoints after the start."""
BETWEEN = 10
"""Optimiser steps between two of them."""


def record_digits(folder: Path, console: Console, seed: int = 0) -> Path:
    """Train a network on digits and return the folder of its checkpoints, beside `folder`.

    Two layers of 128 ReLU units; SGD, learning rate 0.1 falling to 0 as a cosine, momentum 0.9, weight decay
    5e-4, batches of 64. Checkpoints that are there already are used again.
    """
    folder = folder.resolve()
    place = folder.with_name(f"{folder.name}-checkpoints")
    if len(points(place)) == POINTS + 1:
        return place
    generator = torch.Generator().manual_seed(seed)
    train = load_images().train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(train.images[0].numel(), 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
            nn.Linear(128, 10),
        )  # fmt: skip
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, POINTS * BETWEEN)
    recorder = TrajectoryRecorder(model, place, mode="exact")
    recorder.start(0)
    recorder.record(0)
    for point in track(range(1, POINTS + 1), "training on digits", console=console, transient=True):
        for _ in range(BETWEEN):
            batch = train[torch.randint(len(train), (64,), generator=generator)]
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
            optimiser.step()
            schedule.step()
        recorder.record(point * BETWEEN)
    return place
