"""How deep can a residual network be? Gradients before training, then accuracy on digits after it."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gramian.data.images import load_images
from gramian.nn.resnet import RULES, dense_resnet, gains, profile

DEPTH, WIDTH, STEPS = 100, 32, 150

images = load_images()
x, labels = images.train.images.flatten(1), images.train.labels
for rule in RULES:
    model = dense_resnet(64, WIDTH, images.classes, nn.ReLU, gains(rule, DEPTH))
    start = profile(model, x[:128])
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for step in range(STEPS):
        batch = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:64]
        cross_entropy(model(x[batch]), labels[batch]).backward()
        optimiser.step()
        optimiser.zero_grad()
    found = model(images.validation.images.flatten(1)).argmax(1)
    accuracy = (found == images.validation.labels).float().mean()
    print(
        f"{rule:>10}: over {DEPTH} blocks gradients grow x {start.backward[0] / start.backward[-1]:.2g}, "
        f"cosine between images {start.cosine[0]:.2f} -> {start.cosine[-1]:.2f}, "
        f"accuracy {accuracy:.0%}"
    )
