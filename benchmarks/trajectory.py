"""What a trajectory's Gram costs against reading its checkpoints once, and against cosines pair by pair.

    python benchmarks/trajectory.py [--folder BIG_ENOUGH] [--checkpoints 40] [--millions 100] [--rounds 5]

Writes a series of bfloat16 checkpoints (8 GB by default), measures, and removes it.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import torch
from safetensors import __version__ as safetensors_version
from safetensors.torch import load_file, save_file
from side_by_side import ratio, timed, write_results

from gramian.core.trajectory import steps_of, sum_of
from gramian.observe.alignment import align
from gramian.observe.checkpoints import stream
from gramian.observe.series import find_series

BIG = (12e9, 154)
"""The series that the projection is for: parameters and checkpoints."""

PAIRS = 6
"""Pairs that the pairwise way is timed on."""


def shapes(millions: float) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a decoder of about so many million parameters."""
    width, layers = 768, max(1, round((millions - 0.0077) / 7.08))
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        of = f"model.layers.{layer}"
        found |= {f"{of}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        found |= {
            f"{of}.mlp.up_proj.weight": (4 * width, width),
            f"{of}.mlp.down_proj.weight": (width, 4 * width),
        }
        found |= {f"{of}.norm.weight": (width,)}
    return found


def write_series(folder: Path, checkpoints: int, millions: float) -> None:
    """Write a random walk in bfloat16; increments repeat a block of noise, turned, to be fast."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes(millions).items()
    }
    noise = 2e-3 * torch.randn(2**20, generator=generator)
    for step in range(checkpoints):
        place = folder / f"step-{step}"
        place.mkdir(parents=True)
        save_file({name: value.bfloat16() for name, value in weights.items()}, place / "model.safetensors")
        for value in weights.values():
            turned = noise.roll(int(torch.randint(len(noise), (), generator=generator)))
            value.view(-1).add_(turned.repeat(-(-value.numel() // len(noise)))[: value.numel()])


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/model.safetensors"))


def forget(folder: Path) -> None:
    """Ask the operating system to drop the files from its memory."""
    for path in files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(folder: Path) -> None:
    """Read all files once, one after another."""
    memory = memoryview(bytearray(4 * 2**20))
    for path in files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(memory):
                pass


def grams(folder: Path) -> object:
    """Take the Gram of every tensor, as `gramian trajectory` does."""
    with tempfile.TemporaryDirectory() as place:
        return stream(align(find_series([folder])[0]).tensors, Path(place))


def cosine(first: Path, second: Path) -> float:
    """Take one cosine the way that a user would write it."""
    x, y = (
        torch.cat([value.float().flatten() for value in load_file(path).values()]) for path in (first, second)
    )
    return float(torch.nn.functional.cosine_similarity(x, y, dim=0))


def peak_memory(folder: Path) -> float:
    """Return the gigabytes that a process of its own has at most while it takes the Grams."""
    program = (
        "import resource, sys; from pathlib import Path; sys.path.insert(0, 'benchmarks'); "
        "import trajectory; trajectory.grams(Path(sys.argv[1])); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], cwd=root, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def accuracy(folder: Path) -> float:
    """Return the largest error of a tensor's Gram, by the product of the rows' norms, against float64."""
    aligned = next(each for each in align(find_series([folder])[0]).tensors if len(each.shape) == 2)
    with tempfile.TemporaryDirectory() as place:
        found = stream([aligned], Path(place))
    assert found is not None
    points = [load_file(stored.file)[aligned.name].double().flatten() for stored in aligned.stored]
    exact = steps_of(torch.stack(points))
    norms = exact.left.sqrt()
    got = sum_of([part.steps for part in found.parts])
    return float(((got.cross - exact.cross).abs() / (norms[:, None] * norms)).max())


def measured(folder: Path, rounds: int, warm: bool) -> dict[str, list[float]]:
    """Time reading and Grams in turn, with the files in the operating system's memory or not."""
    seconds: dict[str, list[float]] = {"plain reads": [], "gramian": []}
    ways: dict[str, Callable[[], object]] = {
        "plain reads": lambda: read_plainly(folder),
        "gramian": lambda: grams(folder),
    }
    for _ in range(rounds):
        for name, way in ways.items():
            if not warm:
                forget(folder)
            seconds[name] += timed({name: way}, rounds=1, warmup=int(warm and not seconds[name]))[name]
    return seconds


def row(name: str, seconds: dict[str, list[float]]) -> str:
    plain, ours = (statistics.median(seconds[way]) for way in ("plain reads", "gramian"))
    spread = f"{min(seconds['gramian']):.2f}–{max(seconds['gramian']):.2f}"
    return (
        f"| {name} | {plain:.2f} | {ours:.2f} ({spread}) | {ratio(seconds, 'gramian', 'plain reads'):.2f} |"
    )


def wrapped(*pieces: str) -> list[str]:
    return textwrap.wrap(" ".join(pieces), 120, subsequent_indent="  " if pieces[0].startswith("-") else "")


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--checkpoints", type=int, default=40)
    parser.add_argument("--millions", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    n = arguments.checkpoints
    place = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="gramian-trajectory-"))
    try:
        write_series(place / "series", n, arguments.millions)
        size = sum(path.stat().st_size for path in files(place / "series"))
        parameters = sum(torch.Size(shape).numel() for shape in shapes(arguments.millions).values())
        from_disk = measured(place / "series", arguments.rounds, warm=False)
        from_memory = measured(place / "series", arguments.rounds, warm=True)
        peak, wrong = peak_memory(place / "series"), accuracy(place / "series")
        pairs = list(combinations(files(place / "series"), 2))
        chosen = pairs[:: max(1, len(pairs) // PAIRS)][:PAIRS]
        pair = statistics.median(
            timed({"pair": lambda: [cosine(*each) for each in chosen]}, 1, 0)["pair"]
        ) / len(chosen)
        shutil.rmtree(place / "series")
        write_series(place / "long", BIG[1], arguments.millions / 10)
        long = measured(place / "long", arguments.rounds, warm=True)
        long_parameters = sum(torch.Size(shape).numel() for shape in shapes(arguments.millions / 10).values())
    finally:
        shutil.rmtree(place, ignore_errors=True)
    ours = statistics.median(from_disk["gramian"])
    disk = size / statistics.median(from_disk["plain reads"])
    rate = long_parameters / statistics.median(long["gramian"])
    hours, bytes_ = BIG[0] / rate / 3600, BIG[0] * BIG[1] * 2
    reading = bytes_ / disk / 3600
    whole_map = pair * len(pairs)
    lines = [
        *wrapped(
            f"{n} checkpoints of {parameters / 1e6:.1f} M bfloat16 parameters, {size / 1e9:.2f} GB.",
            "`plain reads` reads every file once, 4 MiB at a time, and does nothing with it; `gramian` takes",
            "the Gram of every tensor and saves what it found as it goes. Interleaved, medians of",
            f"{arguments.rounds} rounds (range); the ratio is the median of the rounds' ratios. From",
            "disk: the operating system was asked to forget the files before each run.",
        ),
        "",
        "| files | plain reads, s | gramian, s | ratio |",
        "|---|---|---|---|",
        row("from disk", from_disk),
        row("in the operating system's memory", from_memory),
        row(f"{BIG[1]} checkpoints of {long_parameters / 1e6:.1f} M, in memory", long),
        "",
        *wrapped(
            f"- Peak memory of a process that does it: {peak:.2f} GB. Largest error of a Gram's entry:",
            f"{wrong:.1e} of the product of the rows' norms.",
        ),
        *wrapped(
            f"- Pair by pair (load two files, flatten, cosine): {pair:.2f} s a pair with the files in",
            f"memory, {len(pairs)} pairs, {whole_map / 60:.0f} min for one map of the whole model:",
            f"{whole_map / ours:.0f} × gramian from disk, which gives all maps of all layers.",
        ),
        *wrapped(
            f"- Projection to {BIG[1]} checkpoints of {BIG[0] / 1e9:.0f} B: {bytes_ / 1e12:.2f} TB.",
            f"At this disk's {disk / 1e9:.2f} GB/s reading alone takes {reading:.2f} h;",
            f"at {BIG[1]} checkpoints these cores do {rate / 1e6:.2f} M parameters/s,",
            f"so {hours:.2f} h of arithmetic. {max(hours, reading):.2f} h if both overlap wholly,",
            f"{hours + reading:.2f} h if not at all. Not run.",
        ),
    ]
    write_results("trajectory", lines, {"safetensors": safetensors_version})


if __name__ == "__main__":
    main()
