"""Small jobs for several processes; `python -m torch.distributed.run … ranked.py JOB FOLDER` runs one.

Every process writes what it knows in the end to a file of its own.
"""

import math
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from gramian import ranks
from gramian.bayes.ensemble import EnsembleConfig, fit_ensemble
from gramian.bayes.hmc import HMCConfig, around
from gramian.bayes.lots import chains_in_lots
from gramian.bayes.risk import sampled_errors
from gramian.compress.draws import draw_outputs, error_reader, skip_draws
from gramian.compress.masks import add_masks
from gramian.errors import DivergedError
from gramian.nn.mlp import mlp

KINDS = (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64)


def pieces() -> dict[str, Tensor]:
    """Spread tensors of every kind; each has the number of its item in it."""

    def piece(number: int) -> dict[str, Tensor]:
        stream = torch.Generator().manual_seed(number)
        values = torch.randn(number, 3, generator=stream, dtype=torch.float64)
        return {str(kind): values.to(kind) for kind in KINDS} | {"one": torch.tensor(number / 7)}

    found = ranks.spread(piece, range(7))
    return {f"{number}/{name}": value for number, each in enumerate(found) for name, value in each.items()}


def ensemble(together: int) -> dict[str, Tensor]:
    """Train seven members of a regression."""
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(90, 6, generator=stream)
    make = partial(mlp, 6, 1, widths=(33, 33), activation="relu", weight_std=1.5, bias_std=0.1)
    config = EnsembleConfig(members=7, steps=25, batch=32, seed=1)
    found = fit_ensemble(make, x, x.sum(1).sin(), config, together=together)
    return {"functions": found.functions(x), "losses": found.losses}


def chains(together: int) -> dict[str, Tensor]:
    """Sample five chains of a density that mixes its unknowns by a matrix product."""
    stream = torch.Generator().manual_seed(0)
    mixing = torch.randn(40, 20, generator=stream)
    start = around(torch.zeros(20), 5, 0.5, seed=1)
    config = HMCConfig(warmup=20, samples=10, max_depth=4, seed=2)
    found = chains_in_lots(lambda p: -(mixing @ p).cosh().log().sum() - p @ p, start, config, together)
    return found.state


def certificate(model: nn.Module, x: Tensor, *, passing: bool = True) -> dict[str, Tensor]:
    """Draw masks of a model afresh, and tell where their stream ends."""
    torch.manual_seed(0)
    add_masks(model.eval(), weights="gaussian", probability=0.7)
    stream, y = torch.Generator().manual_seed(3), torch.arange(len(x)) % 3
    found = sampled_errors(
        lambda count, generator: draw_outputs(model, x, count, generator, read=error_reader(y)),
        300,
        stream,
        passing=lambda count, generator: skip_draws(model, x, count, generator) if passing else None,
    )
    return {"risks": found.risks, "stream": stream.get_state()}


def linear(*, passing: bool = True) -> dict[str, Tensor]:
    """Draw masks of a chain of linear layers."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 3))
    return certificate(model, torch.randn(50, 8), passing=passing)


def convolution() -> dict[str, Tensor]:
    """Draw masks of a network that is no such chain."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return certificate(model, torch.randn(20, 1, 6, 6))


def decoder() -> dict[str, Tensor]:
    """Draw a mask for every window of a small decoder."""
    from gramian.nn.transformer import TransformerConfig, build
    from gramian.tasks.pruning_decoder import Decoder, add_decoder_masks, drawn_losses

    model = Decoder(build(TransformerConfig(vocabulary=30, width=16, heads=2, depth=2, context=8), 0)).eval()
    add_decoder_masks(model, "weights")
    stream = torch.Generator().manual_seed(ranks.rank())  # that of the first process counts
    windows = torch.arange(120 * 9).reshape(120, 9) % 29
    found = drawn_losses(model, torch.stack((windows[:, :-1], windows[:, 1:]), 1), 1e-5, stream)
    return {"nats": found.nats, "clipped": found.clipped, "stream": stream.get_state()}


def paths() -> dict[str, Tensor]:
    """Predict a shaped transformer: paths, networks and the region."""
    from gramian.tasks.covariance import CovarianceConfig, predict_covariance

    settings = CovarianceConfig(depth=6, width=16, tokens=3, paths=1200, networks=600, gamma=0.4)
    found = predict_covariance(settings)
    assert found.measured is not None
    assert found.region is not None
    values = {f"theory/{name}": each for name, each in found.theory.final.items()}
    values |= {f"networks/{name}": each for name, each in found.measured.final.items()}
    values |= {"blown up": found.region.blown_up, "collapsed": found.region.collapsed}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def trajectory(folder: Path) -> dict[str, Tensor]:
    """Read a trajectory of half a million parameters off the disk."""
    from gramian.tasks.trajectory import TrajectoryConfig, trajectory

    checkpoints = folder / "checkpoints"

    def written() -> None:
        stream = torch.Generator().manual_seed(0)
        weights = {name: torch.randn(700, 400, generator=stream) for name in ("a.weight", "b.weight")}
        for step in range(4):
            place = checkpoints / f"step-{step}"
            place.mkdir(parents=True)
            moved = {name: value + step * value.roll(step) for name, value in weights.items()}
            save_file(moved, place / "model.safetensors")

    ranks.on_main(written)
    config = TrajectoryConfig(checkpoints=(checkpoints,), workers=1, output=folder / "found")
    found = trajectory(config, console=Console(quiet=True))
    assert len(found) == ranks.is_main()
    return {name: value for course in found for name, value in _grams(course).items()}


def _grams(course) -> dict[str, Tensor]:
    return {f"{part.name} {part.kind}": part.steps.cross for part in course.parts}


def failure() -> dict[str, Tensor]:
    """Fail in two pieces of work, then on the last process by a defect; tell what is raised here."""

    def piece(number: int) -> dict[str, Tensor]:
        if number in (2, 3):
            raise DivergedError(f"piece {number} diverged")
        return {}

    said = []
    try:
        ranks.spread(piece, range(6))
    except DivergedError as error:
        said.append(str(error))
    try:
        ranks.spread(lambda number: {"": torch.zeros(1)[number]}, range(ranks.ranks()))
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    return {each: torch.tensor(1) for each in said}


def death() -> dict[str, Tensor]:
    """Kill the last process in the middle of its work."""

    def piece(number: int) -> dict[str, Tensor]:
        if number == ranks.ranks() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    ranks.spread(piece, range(ranks.ranks()))
    return {}


def quick() -> dict[str, Tensor]:
    """Return what takes no long imports."""
    jobs = {"pieces": pieces(), "ensemble": ensemble(2), "chains": chains(2)}
    jobs |= {"linear": linear(), "convolution": convolution()}
    jobs["any"] = {
        "": torch.tensor([ranks.anywhere(ranks.rank() == ranks.ranks() - 1), ranks.anywhere(False)])
    }
    return {f"{job} {name}": value for job, found in jobs.items() for name, value in found.items()}


def wrong() -> dict[str, Tensor]:
    """Divide work by the number of processes, and draw from a stream that others did not pass over."""
    each = math.ceil(7 / ranks.ranks())
    jobs = {"ensemble": ensemble(each), "linear": linear(passing=False)}
    return {f"{job} {name}": value for job, found in jobs.items() for name, value in found.items()}


def main(job: str, folder: Path) -> None:
    """Run one job on all processes."""
    with ranks.processes():
        jobs = {"paths": paths, "trajectory": partial(trajectory, folder), "quick": quick, "wrong": wrong}
        jobs |= {"decoder": decoder, "failure": failure, "death": death}
        found = {name: value.contiguous() for name, value in jobs[job]().items()}
        save_file(found or {"none": torch.zeros(1)}, folder / f"{ranks.rank()}.safetensors")
        ranks.barrier()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
