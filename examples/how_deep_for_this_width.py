"""How deep may a shaped transformer be for its width? Tokens' correlations by depth, before training."""

import torch

from gramian.tasks.covariance import NORM, PAIR, readings
from gramian.tasks.samples import summary
from gramian.theory.covariance_sde import ShapedBlock, simulate

TOKENS, WIDTH, PATHS = 4, 128, 2000

start = torch.full((TOKENS, TOKENS), 0.3, dtype=torch.float64).fill_diagonal_(1.0)
for gamma in (0.3, 0.6):
    for depth in (16, 64, 128):
        paths = simulate(ShapedBlock(gamma), start, depth / WIDTH, paths=PATHS, steps=depth, seed=0)
        lasting = readings(paths.states[-1][paths.lasting])
        cosine, norm = summary(lasting[PAIR]), summary(lasting[NORM])
        low, high = cosine.quantiles[0], cosine.quantiles[-1]
        print(
            f"gamma {gamma:g}, {depth:3} blocks of width {WIDTH}: cosine of tokens {low:.2f} to {high:.2f}, "
            f"log norm {norm.mean:+.2f} ± {norm.deviation:.2f}, "
            f"blown up {1 - paths.lasting.double().mean().item():.1%}"
        )
