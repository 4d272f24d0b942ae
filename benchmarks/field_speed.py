"""What makes the fit of a field affordable: each saving taken away from the whole, and the published network.

Steps of a field of hash grids, dropout included, on ellipses with air around them, in turn. Without cached
encodings coordinates are prepared at every step; without the outline the air is rendered too; a coarse step
sees pixels of twice the side; autograd's own rule sorts the tables' rows in every backward pass. Five members
take a step together and one after the other. The published network has 363 waves, width 280, depth 5.

Ten sets of views are left out by FISTA-TV, as the weight of total variation is chosen: as many in a call as
`classical_choice` takes, by precisions of 0, and one after the other by projectors of the rest.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from side_by_side import ratio, timed, write_results
from torch import Tensor, nn
from torch.nn.functional import embedding

from gramian.imaging.variation import fista_tv
from gramian.nn.field import Field, Picture
from gramian.nn.field_encodings import HashGrid
from gramian.nn.field_members import Members
from gramian.tasks.classical_choice import together
from gramian.tasks.field_fits import Network
from gramian.tasks.observed_views import Observed, Rays, observe
from gramian.tasks.scans import Source

VARIATION, ITERATIONS = 8.0, 30


class Plain(HashGrid):
    """Hash grids whose tables autograd differentiates."""

    def read(self, *prepared: Tensor) -> Tensor:
        places, weights = prepared
        return (embedding(places, self.tables) * weights[..., None]).sum(-2).flatten(-2)


def step(image: nn.Module, rays: Rays, *, block: int = 1, low: bool = False) -> Callable[[], None]:
    """Return a step of Adam on a picture, or on the pictures of members."""
    energy, optimiser = rays.energy(VARIATION * block), torch.optim.Adam(image.parameters(), 1e-3)

    def take() -> None:
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            found = image()
        energy(found.float()).sum().backward()
        optimiser.step()

    return take


def ways(size: int, observed: Observed) -> dict[str, Callable[[], None]]:
    network, rays, inside = Network(), observed.kept, observed.inside

    def field(seed: int = 0) -> Field:
        made = network.build(size, seed, dropout=True)
        assert isinstance(made, Field)
        return made

    def plain() -> Field:
        grid = Plain(network.levels, network.features, network.entries, coarsest=8, finest=size, seed=0)
        return Field(grid, network.width, network.layers, dropout=network.dropout, seed=0)

    published = Network(encoding="fourier", width=280, depth=5).build(size, 0, dropout=True)
    alone = [step(Picture(field(seed), size, mask=inside), rays) for seed in range(5)]
    together = Members([field(seed) for seed in range(5)], size, mask=inside).train()
    return {
        "the whole": step(Picture(field(), size, mask=inside), rays),
        "coarse": step(Picture(field(), size, mask=inside, block=2), observed.coarse(2), block=2),
        "without cached encodings": step(Picture(field(), size, mask=inside, keep=False), rays),
        "without the outline": step(Picture(field(), size), rays),
        "tables by autograd's rule": step(Picture(plain(), size, mask=inside), rays),
        "bfloat16": step(Picture(field(), size, mask=inside), rays, low=True),
        "five members together": step(together, rays),
        "five members in turn": lambda: [take() for take in alone] and None,
        "published network": step(Picture(published, size, mask=inside), rays),
    }


def leaving_out(observed: Observed) -> dict[str, Callable[[], None]]:
    rays, left = observed.all, observed.left_out()
    weight, parts = VARIATION * float(rays.std.square().mean()), left.split(together(observed.size))
    others = [rays.of_views((~views).nonzero().flatten().tolist()) for views in left]

    def at_once() -> None:
        for views in parts:
            given = rays.sinogram.expand(len(views), *rays.sinogram.shape)
            fista_tv(rays.projector, given, weight, ITERATIONS, precision=(~views[..., None]).to(given))

    def in_turn() -> None:
        for some in others:
            fista_tv(some.projector, some.sinogram, weight, ITERATIONS)

    return {"together": at_once, "in turn": in_turn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    lines = []
    for size in given.sizes:
        observed = observe(Source(scan="ellipses", size=size).load(), held_out=0.1)
        assert observed.inside is not None
        seconds = timed(ways(size, observed), given.rounds, warmup=1)
        share = float(observed.inside.float().mean())
        lines += [
            f"## {size} × {size} pixels, {share:.0%} of them inside, 54 of 60 views",
            "",
            "| step | ms | its time / the whole |",
            "|---|---|---|",
        ]
        for name, taken in seconds.items():
            lines.append(
                f"| {name} | {1e3 * statistics.median(taken):.1f} | {ratio(seconds, name, 'the whole'):.2f} |"
            )
        chosen = timed(leaving_out(observed), given.rounds, warmup=1)
        lines += [
            "",
            f"| ten sets of views left out, {ITERATIONS} iterations | ms | its time / together |",
            "|---|---|---|",
        ]
        for name, taken in chosen.items():
            lines.append(
                f"| {name} | {1e3 * statistics.median(taken):.0f} | {ratio(chosen, name, 'together'):.2f} |"
            )
        lines.append("")
    write_results("field_speed", lines, {})


if __name__ == "__main__":
    main()
