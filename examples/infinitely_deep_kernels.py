"""What can infinitely many layers learn? Gaussian-process regression on digits, by depth and depth rule."""

import torch
from torch.nn.functional import normalize, one_hot

from gramian.core.conditioning import condition, information_gain
from gramian.data.images import load_images
from gramian.theory.duals import DUALS
from gramian.theory.limits import RULES, infinite_depth, rescaled
from gramian.theory.maps import Activation, Dense, Serial, signal
from gramian.theory.universality import second_eigenvalue

TRAIN, TEST, NOISE = 200, 200, 0.01

images = load_images()
x = torch.cat([images.train.images[:TRAIN], images.validation.images[:TEST]]).flatten(1)
labels = torch.cat([images.train.labels[:TRAIN], images.validation.labels[:TEST]])
y = one_hot(labels[:TRAIN], images.classes).double() - 1 / images.classes
start = signal(normalize(x, dim=1) * x.shape[1] ** 0.5, tangent=False)
block = Serial(Activation(DUALS["relu"]), Dense(2**0.5))


def report(rule: str, depth: str, kernel: torch.Tensor) -> None:
    kernel = kernel / kernel.diagonal().mean()
    train, cross, test = kernel[:TRAIN, :TRAIN], kernel[TRAIN:, :TRAIN], kernel.diagonal()[TRAIN:]
    mean, _ = condition(train, cross, test, y, NOISE)
    accuracy = (mean.argmax(1) == labels[TRAIN:]).double().mean()
    gain = information_gain(train, y, NOISE).mean()
    error = (condition(train, train, train.diagonal(), y, NOISE)[0] - y).square().mean() / y.square().mean()
    print(
        f"{rule:>10} {depth:>5} blocks: test accuracy {accuracy:.1%}, training variance left {error:.1%}, "
        f"second eigenvalue / n {second_eigenvalue(kernel):.1e}, KL to the prior {gain:.1f}"
    )


for name, rule in RULES.items():
    for depth in (1, 10, 100, 1000):
        report(name, str(depth), rescaled(block, rule.gains(depth), start)[0].activation.cross)
    if name != "none":  # without gains there is no limit but a constant
        report(name, "∞", infinite_depth(rule, block, start, tolerance=1e-6).activation.cross)
