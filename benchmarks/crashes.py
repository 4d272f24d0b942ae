"""Whether jobs keep what they had: each is killed (SIGKILL) at random moments and resumed until it ends.

    python benchmarks/crashes.py [--kills 100] [--jobs train compare ...] [--at-once 1] [--seed 0]

Each job runs once undisturbed. Then it is started, killed, resumed, killed, ... until it ends, and started
anew, until it was killed so many times: after a random time, or just before a random change to a file (write,
rename, fsync, removal), in turn. After every kill all files under final names have to be whole and no saved
progress lost; the next life has to go on from there; every result has to equal the undisturbed one, but for
times. It forks from a process that has imported everything, on one thread.
"""

import argparse
import itertools
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from side_by_side import write_results
from torch import nn

from gramian.cli.main import run
from gramian.observe import checkpoints as streams
from gramian.observe import saved_grams
from gramian.observe.recorder import TrajectoryRecorder
from gramian.tasks import kept_ensembles
from gramian.train.checkpoint import checkpoints
from gramian.train.loop import Trainer

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from faults import KILLED, Child, Nursery
from intact import damaged, differences, leftovers
from stories import write_story

LIMIT = 300.0
"""Seconds after which a life that does not end is called hung."""

PRELOADED = (
    "crashes", "gramian.interop.sklearn", "matplotlib.backends.backend_svg", "PIL.Image", "rich.status",
    "torch._dynamo", "torch._decomp.decompositions_for_jvp", "typeguard", "tyro.extras",
)  # fmt: skip
"""What a child finds imported."""

Saved = dict[str, int]
"""How far work got that is kept, by the folder that keeps it: steps, or pieces."""


@dataclass(frozen=True)
class Job:
    """A command that is killed."""

    name: str
    arguments: Callable[[Path], list[str]]
    """Of the command, by the folder where everything of a run goes; it starts or goes on."""
    about: str
    rest: float
    """Share of an undisturbed life, or more, that is left when all work is saved: kills reach its end."""
    marker: str = ""
    """The file by which the result is known, of commands that do not start again when it is there."""


def language(name: str, *more: str) -> Callable[[Path], list[str]]:
    shape = ["--width", "32", "--depth", "2", "--heads", "2", "--context", "32", "--vocabulary", "300"]
    every = ["--steps", "24", "--checkpoint-every", "2", "--evaluate-every", "6", "--observe-every", "3"]
    rest = ["--evaluation-batches", "2", "--log-every", "2", "--device", "cpu", "--resume"]
    return lambda place: [
        *[name, "--text", str(place.parent / "story"), "--runs", str(place)],
        *[*shape, *every, *rest, *more],
    ]


def reconstruct(place: Path) -> list[str]:
    scan = ["--size", "24", "--views", "20", "--compare", "fbp", "--variation", "8", "--device", "cpu"]
    field = ["--uncertainty", "dropout_ensemble", "--members", "2", "--samples", "6", "--steps", "20"]
    return ["reconstruct", *scan, *field, "--runs", str(place), "--resume"]


def regress(place: Path) -> list[str]:
    network = ["--members", "4", "--widths", "16", "16", "--steps", "80", "--no-compare"]
    return [
        "regress",
        str(place.parent / "table.csv"),
        "--target",
        "y",
        "--output",
        str(place / "r"),
        *network,
    ]


def trajectory(place: Path) -> list[str]:
    return ["trajectory", str(place.parent / "series"), "--output", str(place / "t"), "--workers", "1"]


JOBS = (
    Job("train", language("train", "--keep", "2"), "`train`, 24 steps, a checkpoint every 2, 2 kept", 0.5),
    Job(
        "compare",
        language("compare", "--blocks", "pre_norm", "sas", "--calibration-batches", "1"),
        "`compare` of two blocks, 24 steps each, a checkpoint every 2, with its report",
        0.8,
    ),
    Job(
        "recorder",
        language("train", "--trajectory-every", "1", "--trajectory", "exact", "--optimiser", "sgd"),
        "`train` that records all weights at every step",
        0.5,
    ),
    Job(
        "trajectory",
        trajectory,
        "`trajectory` of 12 checkpoints in 40 pieces, each saved, with its report",
        1.0,
        "t/trajectory.json",
    ),
    Job(
        "reconstruct",
        reconstruct,
        "`reconstruct` by 2 fields: 20 steps and 6 to finish, a checkpoint every step, samples, report",
        0.7,
    ),
    Job(
        "regress",
        regress,
        "`regress`: 4 settings tried with 3 members each, then 4 members, with its report",
        1.0,
        "r/regression.json",
    ),
)


def prepared(place: Path) -> None:
    """Write what the jobs read."""
    write_story(place / "story")
    numbers = np.random.default_rng(0).normal(size=(120, 4))
    y = numbers[:, 0] + np.sin(2 * numbers[:, 1]) + 0.1 * numbers[:, 2]
    rows = np.column_stack([numbers, y])
    np.savetxt(place / "table.csv", rows, delimiter=",", header="a,b,c,d,y", comments="")
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 256))
    generator = torch.Generator().manual_seed(0)
    recorder = TrajectoryRecorder(model, place / "series", mode="exact")
    for step in range(12):
        with torch.no_grad():
            for value in model.parameters():
                value.copy_(torch.randn(value.shape, generator=generator) / (1 + step))
        recorder.record(step)


def life(arguments: Sequence[str], trace: str) -> int:
    """Run one command in a child; where its work starts is written into a file."""
    streams.UNIT, saved_grams.EVERY = (2**12, 2**12), 0.0  # small work, as if it were large

    def told(folder: Path, done: int) -> None:
        with open(trace, "a", encoding="utf-8") as file:
            file.write(f"{folder}\t{done}\n")

    def traced(kind: Any, done: Callable[[Any], tuple[Path, int]]) -> None:
        plain = kind.__init__

        def init(self: Any, *given: Any, **named: Any) -> None:
            plain(self, *given, **named)
            told(*done(self))

        kind.__init__ = init

    check = kept_ensembles.check_manifest

    def found(folder: Path, names: Sequence[str]) -> bool:
        whole = check(folder, names)
        told(folder, int(whole))
        return whole

    kept_ensembles.check_manifest = found
    traced(Trainer, lambda trainer: (trainer.run.folder, trainer.step))
    traced(saved_grams.SavedGrams, lambda grams: (grams.folder, len(grams.done)))
    return run(list(arguments))


def saved(place: Path) -> Saved:
    """Return how far what is kept below a folder goes."""
    steps = {
        str(path.parent): max((each.step for each in checkpoints(path)), default=0)
        for path in place.rglob("checkpoints")
        if path.is_dir()
    }
    pieces: Saved = {}
    for path in place.rglob("found-*.safetensors"):
        if not any(part.startswith(".") for part in path.relative_to(place).parts):
            units = {name.split("/")[0] for name in load_file(path)}
            pieces[str(path.parent)] = pieces.get(str(path.parent), 0) + len(units)
    fitted = {str(path.parent): 1 for path in place.rglob(f"unfinished/[!.]*/{kept_ensembles.MEMBERS}")}
    return steps | pieces | fitted


@dataclass
class Counts:
    """What became of a job."""

    kills: Counter[str] = field(default_factory=Counter)
    """By the way."""
    results: int = 0
    """That were complete, and compared."""
    went_on: int = 0
    """Lives that started with saved work, at exactly where it was."""
    failures: list[str] = field(default_factory=list)
    reached: list[float] = field(default_factory=list)
    """Share of all progress that was saved at each kill."""


class Killer:
    """Kills one job and looks at what it leaves."""

    def __init__(self, job: Job, root: Path, nursery: Nursery, seed: int) -> None:
        self.job, self.nursery, self.random = job, nursery, random.Random(f"{job.name} {seed}")
        self.root, self.place, self.whole = root, root / job.name, root / f"{job.name}-undisturbed"
        self.log, self.trace, self.changed = (
            root / f"{job.name}.{end}" for end in ("log", "trace", "changes")
        )
        self.counts, self.most = Counts(), 1
        began = time.perf_counter()
        code = self._start(counted={"below": str(self.place), "into": str(self.changed)}).wait(LIMIT)
        self.seconds, self.changes = time.perf_counter() - began, self.changed.stat().st_size
        if code != 0:
            raise SystemExit(f"{job.name} does not work undisturbed: {self._last_words()}")
        self.place.rename(self.whole)

    def kill(self, times: int) -> Counts:
        """Kill it so many times, and let it end."""
        ways = itertools.cycle(("time", "change"))
        while sum(self.counts.kills.values()) < times:
            self._life(next(ways))
        self._life("")
        return self.counts

    def _life(self, way: str) -> None:
        """Start the job or go on with it, until it ends or is killed, and look at what is there then."""
        before = saved(self.place)
        share = 1 - (1 - self.job.rest) * min(1.0, sum(before.values()) / self.most)
        if way == "time":
            child = self._start()
            code = child.wait(self.random.uniform(0, share * self.seconds))
            code = child.kill() if code is None else code
        else:
            last = self.random.randint(1, max(1, round(share * self.changes)))
            fault = {"killed_at": {"number": last, "below": str(self.place)}} if way else {}
            child = self._start(**fault)
            code = child.wait(LIMIT)
            if code is None:
                child.kill()
                self._fail(f"hung for {LIMIT:g} s")
        self._look(before, code, way)

    def _look(self, before: Saved, code: int | None, way: str) -> None:
        after, counts = saved(self.place), self.counts
        ended = code == 0 or (bool(self.job.marker) and (self.place / self.job.marker).exists())
        if code == KILLED:
            counts.kills[way] += 1
            self.most = max(self.most, sum(after.values()))
            counts.reached.append(sum(after.values()))
        elif code != 0:
            self._fail(f"exit code {code}: {self._last_words()}")
        for what in (*damaged(self.place), *damaged(self.root / "cache")):
            self._fail(f"damaged: {what}")
        for folder, step in before.items():
            if not ended and after.get(folder, 0) < step:
                self._fail(f"lost: {folder} was at {step} and is at {after.get(folder, 0)}")
        self._compare_starts(before)
        if ended:
            counts.results += 1
            for what in differences(self.whole, self.place):
                self._fail(f"another result: {what}")
            # killed after its last rename, a job leaves hidden what that replaced, until the next writer
            for path in leftovers(self.place) if code == 0 else ():
                self._fail(f"left over: {path.relative_to(self.place)}")
        if ended or code != KILLED:
            shutil.rmtree(self.place, ignore_errors=True)

    def _compare_starts(self, before: Saved) -> None:
        """Check that what was begun in this life went on from where it was kept."""
        begun = self.trace.read_text(encoding="utf-8").splitlines() if self.trace.exists() else []
        for line in begun:
            folder, done = line.split("\t")
            kept = before.get(folder, before.get(f"{folder}/checkpoints", 0))
            if int(done) != kept:
                self._fail(f"lost: {folder} was at {kept} and went on from {done}")
        self.counts.went_on += any(not line.endswith("\t0") for line in begun)

    def _start(self, **faults: dict[str, Any]) -> Child:
        self.trace.unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)
        arguments = [self.job.arguments(self.place), str(self.trace)]
        return self.nursery.start("crashes:life", arguments, self.log, **faults)

    def _fail(self, what: str) -> None:
        number = sum(self.counts.kills.values())
        self.counts.failures.append(f"{self.job.name}, after {number} kills: {what}")
        print(self.counts.failures[-1], flush=True)

    def _last_words(self) -> str:
        return " ".join(self.log.read_text(encoding="utf-8", errors="replace").split())[-300:]


def killed(job: Job, root: Path, seed: int, times: int) -> Killer:
    nursery = Nursery(PRELOADED, {"GRAMIAN_CACHE": str(root / "cache"), "COLUMNS": "200"})
    killer = Killer(job, root, nursery, seed)
    killer.kill(times)
    nursery.close()
    print(row(killer), flush=True)
    return killer


def row(killer: Killer) -> str:
    counts = killer.counts
    kept = sum(1 for each in counts.reached if each)
    return (
        f"| {killer.job.name} | {killer.job.about} | {killer.seconds:.1f} s, {killer.changes} | "
        f"{counts.kills['time']} + {counts.kills['change']} | {kept} | {counts.went_on} | {counts.results} | "
        f"{len(counts.failures)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--jobs", nargs="+", default=[job.name for job in JOBS])
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(asked.at_once) as pool:
        root = Path(folder).resolve()
        prepared(root)
        jobs = [job for job in JOBS if job.name in asked.jobs]
        killers = list(pool.map(lambda job: killed(job, root, asked.seed, asked.kills), jobs))
    kills = sum(sum(killer.counts.kills.values()) for killer in killers)
    failures = [failure for killer in killers for failure in killer.counts.failures]
    lines = [
        f"{kills} SIGKILLs, after a random time or just before a random change to a file (write, rename, "
        "fsync, mkdir, removal), and resumed each time; a result is compared with that of an undisturbed "
        f"run, weights and readings bit for bit, all but times. Seed {asked.seed}.",
        "",
        "| job | what | undisturbed, changes to files | kills by time + by change | with saved work | "
        "lives that went on from it | results compared | failures |",
        "|---|---|---|---|---|---|---|---|",
        *map(row, killers),
        "",
        "A failure is a damaged file under a final name, saved progress lost or not gone on from, a result "
        "that differs, a temporary file left beside a result, an error, or a life longer than "
        f"{LIMIT:g} s.",
        *([""] + [f"- {failure}" for failure in failures] if failures else []),
    ]
    write_results("crashes", lines, {})
    if failures:
        raise SystemExit(f"{len(failures)} failures")


if __name__ == "__main__":
    main()
