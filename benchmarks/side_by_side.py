"""Timing several ways of doing a thing in one process, in turn, so that they share the machine's moods."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import torch

from gramian.train.run import versions


def timed(ways: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Call every way once a round, in turn, and return the seconds of each call after the warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warmup + rounds):
        for name, way in ways.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Return the median over rounds of a way's time over the base's time in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def hardware() -> str:
    """Name the machine for a results file."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{torch.get_num_threads()}-threads"


def write_results(theme: str, lines: list[str], more_versions: Mapping[str, str]) -> Path:
    """Write a results file named by theme, hardware and date beside the scripts, and print it."""
    used = {**versions(), **more_versions}
    head = [
        f"# {theme} on {hardware()}, {date.today().isoformat()}",
        "",
        f"{platform.machine()}, {torch.get_num_threads()} threads. Versions: "
        + ", ".join(f"{name} {version}" for name, version in used.items())
        + ".",
        "",
    ]
    path = Path(__file__).with_name(f"{theme}_{hardware()}_{date.today().isoformat()}.md")
    text = "\n".join([*head, *lines]) + "\n"
    path.write_text(text, encoding="utf-8")
    print(text)
    return path
