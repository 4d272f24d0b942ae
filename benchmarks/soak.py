"""Whether `gramian train` keeps its memory: the resident size of one run, read every few seconds for hours.

    python benchmarks/soak.py [--minutes 120] [--warm-up 10] [--nice 0]

The run observes, evaluates, saves and drops checkpoints all along; it is then asked to stop (Ctrl-C), and
resumed for a few steps to see that what it left is whole. Flat: no minute after the warm-up lies further than
5 % from the median after the warm-up.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import write_results

from gramian.train.run import Run

EVERY = 5.0  # seconds between two readings
STEPS = 10_000_000


def resident(process: int) -> float:
    """Return the resident size of a process in MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def train(folder: Path, *more: str) -> list[str]:
    often = ["--evaluate-every", "50", "--observe-every", "25", "--checkpoint-every", "100"]
    command = [sys.executable, "-m", "gramian", "train", "--runs", str(folder), "--steps", str(STEPS)]
    return [*command, *often, *more]


def watch(process: subprocess.Popen[bytes], minutes: float) -> list[tuple[float, float]]:
    began, read = time.monotonic(), []
    while (passed := time.monotonic() - began) < 60 * minutes:
        if process.poll() is not None:
            raise SystemExit(f"training ended by itself after {passed:.0f} s, exit code {process.returncode}")
        read.append((passed / 60, resident(process.pid)))
        time.sleep(EVERY)
    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--warm-up", type=float, default=10.0)
    parser.add_argument("--nice", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run = Run(Path(place) / "train")
        log = (Path(place) / "log").open("wb")
        process = subprocess.Popen(
            train(Path(place)), stdout=log, stderr=log, preexec_fn=lambda: os.nice(asked.nice)
        )
        try:
            read = watch(process, asked.minutes)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=300)
        saved = sorted(run.checkpoints.glob("step-*"))
        steps = int(saved[-1].name.removeprefix("step-"))
        size = run.record.path.stat().st_size / 2**20
        again = subprocess.Popen(train(Path(place), "--resume"), stdout=log, stderr=log)
        time.sleep(60)
        again.send_signal(signal.SIGINT)
        again.wait(timeout=300)
        after = int(sorted(run.checkpoints.glob("step-*"))[-1].name.removeprefix("step-"))
    later = [(minute, size) for minute, size in read if minute >= asked.warm_up]
    middle = statistics.median(size for _, size in later)
    furthest = max(abs(size / middle - 1) for _, size in later)
    width = max(asked.minutes / 12, 1)
    lines = [
        f"{asked.minutes:g} minutes of `gramian train` (its default model), {steps} steps, evaluated every "
        f"50, observed every 25, saved every 100; nice {asked.nice}.",
        "",
        "| minutes | lowest MiB | median | highest |",
        "|---|---|---|---|",
    ]
    for index in range(int(asked.minutes / width)):
        sizes = [size for minute, size in read if index * width <= minute < (index + 1) * width]
        row = f"{min(sizes):.1f} | {statistics.median(sizes):.1f} | {max(sizes):.1f}"
        lines.append(f"| {index * width:g} to {(index + 1) * width:g} | {row} |")
    lines += [
        "",
        f"After {asked.warm_up:g} minutes of warm-up: median {middle:.1f} MiB, furthest reading "
        f"{furthest:.2%} away: {'flat' if furthest <= 0.05 else '**not flat**'} (aim ±5 %).",
        f"Stopped by Ctrl-C with exit code {process.returncode}, {len(saved)} checkpoints and {size:.1f} MiB "
        f"of readings kept; resumed from step {steps} to {after}.",
    ]
    write_results("soak", lines, {})


if __name__ == "__main__":
    main()
