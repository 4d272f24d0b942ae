"""Hostile files for every loader: each is accepted, or refused by one sentence; anything else is a finding.

    python tests/fuzzing.py [--count 100000] [--start 0] [--loaders a,b] [--jobs 2] [--seed 0] [--write]
    python tests/fuzzing.py --case LOADER NUMBER --seed 0     (says what becomes of one input)
    python tests/fuzzing.py --atheris LOADER --seconds 600    (guided by coverage; extra `fuzz`)

Input `number` of a loader is a function of the seed, the loader's name and the number. Loaders run in child
processes with 2 GB more of address space than they have when they start; after 10 s of processor time for one
input, or a minute, the system ends the process. Findings are other exceptions, refusals that are no sentence
or come from a failed allocation, death of the process, unpickled code, and programs or connections started.
"""

import argparse
import json
import mmap
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from gramian.errors import GramianError
from mutations import BYTES, CANARY, Mutation

SECONDS = 10.0
"""Processor time of an input; what waits is ended after six times as long."""
LARGEST = 2**16
"""Bytes of the largest damaged file."""
MEMORY = 2 * 2**30
LONGEST = 500
"""Characters of a refusal, but for the folder's name."""
DEATHS = 30
"""Deaths of its process after which a loader is left."""
PIECE = 5000
"""Inputs that a loader is given in one turn."""
STATE = struct.Struct("qqqdqqd")

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Loader:
    """What is fuzzed: valid folders, the damage that suits each file by the ending of its name, the call."""

    make: Callable[[], Sequence[Files]]
    read: Callable[[Path], object]
    damage: Mapping[str, Sequence[Mutation]]
    """Files of other endings are left whole."""
    needs: tuple[str, ...] = ()
    """Packages without which there is nothing to fuzz."""
    control: bool = False
    """Whether it is planted to be found."""


STARTED = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect"}
started: list[str] = []
"""Events of this process that no loader may cause."""

NODES = ("missing", "folder", "loop", "dangling", "fifo", "zeros")
"""What may stand in a file's place."""


@dataclass
class Tally:
    """What became of the inputs of a loader."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    memory: int = 0
    """Bytes by which the resident size of a process rose at most."""
    seconds: float = 0.0
    """Processor time in the loader."""
    findings: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    """The first input of each kind of finding."""

    def add(self, finding: str, number: int) -> None:
        self.findings[finding] += 1
        self.first.setdefault(finding, number)

    def join(self, other: "Tally") -> None:
        self.inputs += other.inputs
        self.accepted += other.accepted
        self.refused += other.refused
        self.slowest, self.memory = max(self.slowest, other.slowest), max(self.memory, other.memory)
        self.seconds += other.seconds
        for finding, count in other.findings.items():
            self.findings[finding] += count
            self.first.setdefault(finding, other.first[finding])


@dataclass
class Case:
    """The folder of a valid sample, one file of which is damaged at a time."""

    folder: Path
    files: Files
    damage: Mapping[str, Sequence[Mutation]]

    def __post_init__(self) -> None:
        for name, content in self.files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)
        self.names = [name for name in self.files if self._mutations(name)]

    def _mutations(self, name: str) -> Sequence[Mutation]:
        return next((known for end, known in self.damage.items() if name.endswith(end)), ())

    def spoil(self, random: Random) -> str:
        """Damage a file and return its name."""
        name = random.choice(self.names)
        if random.random() < 0.004:
            self._replace(name, random.choice(NODES))
            return name
        content, known = self.files[name], self._mutations(name)
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            mutate = random.choice(known if random.random() < 0.75 else BYTES)
            try:
                content = mutate(random, content)
            except Exception:  # too damaged by now for what knows its structure
                content = random.choice(BYTES)(random, content)
            content = content[:LARGEST]
        (self.folder / name).write_bytes(content)
        return name

    def _replace(self, name: str, node: str) -> None:
        path = self.folder / name
        path.unlink()
        if node == "folder":
            path.mkdir()
        elif node == "fifo":
            os.mkfifo(path)
        elif node != "missing":
            path.symlink_to({"loop": path.name, "dangling": "nowhere", "zeros": "/dev/zero"}[node])

    def restore(self, name: str) -> None:
        """Undo the damage, and whatever the loader left in the folder."""
        path = self.folder / name
        if path.is_symlink() or not path.is_file():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.files[name])


def available(loader: Loader) -> bool:
    from importlib.util import find_spec

    return all(find_spec(package) for package in loader.needs)


def cases(loader: Loader, folder: Path) -> list[Case]:
    """Write a loader's samples and check that they are accepted."""
    found = []
    for number, files in enumerate(loader.make()):
        (folder / str(number)).mkdir()
        found.append(Case(folder / str(number), files, loader.damage))
        if not loader.control:
            loader.read(found[-1].folder)
    return found


def verdict(read: Callable[[Path], object], folder: Path) -> str:
    """Return "accepted", "refused" or what is wrong."""
    try:
        read(folder)
    except GramianError as error:
        said = _wrong(error, folder)
    except Exception as error:
        said = f"{type(error).__name__} in {_where(error)}"
    else:
        said = "accepted"
    if os.path.exists(CANARY):
        os.rmdir(CANARY)
        said = "code was run"
    if started:
        said = f"started {started.pop()}"
    return said


def _wrong(error: GramianError, folder: Path) -> str:
    """Return "refused", or what a refusal lacks to be a sentence."""
    said = str(error).replace(str(folder), "")
    if not said.strip() or not said.isprintable() or len(said) > LONGEST:
        return f"no sentence ({len(said)} characters) in {_where(error)}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
            return f"{type(cause).__name__} before it was refused in {_where(error)}"
        cause = cause.__cause__ or cause.__context__
    return "refused"


def _where(error: BaseException) -> str:
    """Return the innermost line of ours that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/src/gramian/" in frame.filename] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].name}"


def draw(seed: int, name: str, number: int) -> Random:
    return Random(f"{seed}/{name}/{number}")


def fuzz(
    name: str,
    loader: Loader,
    numbers: Sequence[int],
    folder: Path,
    seed: int = 0,
    began: Callable[[int, Tally], None] = lambda number, tally: None,
) -> Tally:
    """Give a loader its inputs of some numbers."""
    tally, known = Tally(), cases(loader, folder)
    for number in numbers:
        random = draw(seed, name, number)
        case = random.choice(known)
        spoilt = case.spoil(random)
        began(number, tally)
        start = time.process_time()
        said = verdict(loader.read, case.folder)
        passed = time.process_time() - start
        tally.seconds += passed
        tally.slowest = max(tally.slowest, passed)
        tally.inputs += 1
        if said == "accepted":
            tally.accepted += 1
        elif said == "refused":
            tally.refused += 1
        else:
            tally.add(said, number)
        case.restore(spoilt)
    return tally


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _child(name: str, loader: Loader, numbers: range, seed: int, shared: mmap.mmap, report: Path) -> None:
    """Fuzz in this process, which may die of it; what it had found by then is in `shared` and `report`."""
    warnings.simplefilter("ignore")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    base, first = [0], [True]

    def put(number: int, tally: Tally) -> None:
        counts = tally.accepted, tally.refused, tally.slowest, tally.memory, tally.inputs, tally.seconds
        STATE.pack_into(shared, 0, number, *counts)

    def began(number: int, tally: Tally) -> None:
        if first[0]:
            first[0], base[0] = False, _resident()
            sys.addaudithook(lambda event, given: started.append(event) if event in STARTED else None)
            _limit_memory()
        tally.memory = _resident() - base[0]
        put(number, tally)
        if len(tally.findings) != len(tally.first) or sum(tally.findings.values()) != began_with[0]:
            began_with[0] = sum(tally.findings.values())
            report.write_text(json.dumps([tally.findings, tally.first]))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)

    began_with = [0]
    with tempfile.TemporaryDirectory(dir=_memory_folder(), prefix="gramian-fuzz-") as place:
        tally = fuzz(name, loader, numbers, Path(place), seed, began)
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        tally.memory = _resident() - base[0]
    put(numbers.stop, tally)
    report.write_text(json.dumps([tally.findings, tally.first]))


def _memory_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def guarded(name: str, loader: Loader, numbers: range, seed: int) -> Tally:
    """Fuzz in child processes, a new one after each death."""
    total, deaths = Tally(), 0
    while numbers:
        shared = mmap.mmap(-1, STATE.size)
        STATE.pack_into(shared, 0, -1, 0, 0, 0.0, 0, 0, 0.0)
        with tempfile.NamedTemporaryFile(suffix=".json") as report:
            status = _forked(lambda: _child(name, loader, numbers, seed, shared, Path(report.name)))  # noqa: B023
            number, accepted, refused, slowest, memory, inputs, seconds = STATE.unpack_from(shared, 0)
            said = Path(report.name).read_text()
        found, first = json.loads(said) if said else ({}, {})
        tally = Tally(inputs, accepted, refused, slowest, memory, seconds, Counter(found), first)
        if status == 0:
            numbers = range(0)
        else:
            if number < 0:
                raise SystemExit(f"the samples of {name} are not accepted; see --case {name} 0")
            tally.inputs += 1
            how = {-signal.SIGPROF: "took too long", -signal.SIGALRM: "waited too long"}
            tally.add(how.get(status, f"process ended by {status}"), number)
            deaths += 1
            numbers = range(number + 1, numbers.stop) if deaths < DEATHS else range(0)
        total.join(tally)
    return total


def _forked(work: Callable[[], None]) -> int:
    """Do something in a child process; return 0, its exit code, or the signal that ended it, negated."""
    child = os.fork()
    if not child:
        said = os.dup(2)  # for failures of the fuzzer itself, since `work` may silence the process
        try:
            work()
            os._exit(0)
        except BaseException:
            os.write(said, traceback.format_exc().encode())
            os._exit(70)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def shared_out(names: Sequence[str], inputs: range, jobs: int, seed: int) -> Iterator[tuple[str, Tally]]:
    """Fuzz loaders in turn, so many at a time, a piece of the inputs of each in every turn."""
    starts = range(inputs.start, inputs.stop, PIECE)
    tasks = [(name, range(at, min(at + PIECE, inputs.stop))) for at in starts for name in names]
    running: dict[int, tuple[str, Path]] = {}
    with tempfile.TemporaryDirectory() as place:
        while tasks or running:
            while tasks and len(running) < jobs:
                name, numbers = tasks.pop(0)
                report = Path(place) / f"{name}-{numbers.start}"
                if not (child := os.fork()):
                    _serve(name, numbers, seed, report)
                running[child] = (name, report)
            child, _ = os.wait()
            name, report = running.pop(child)
            if not report.exists():
                raise SystemExit(f"fuzzing {name} failed")
            values = json.loads(report.read_text())
            yield name, Tally(**{**values, "findings": Counter(values["findings"])})


def _serve(name: str, numbers: range, seed: int, report: Path) -> None:
    from fuzzed_loaders import LOADERS

    try:
        report.write_text(json.dumps(vars(guarded(name, LOADERS[name], numbers, seed))))
        os._exit(0)
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(1)


def table(tallies: Mapping[str, Tally]) -> list[str]:
    lines = [
        "| loader | inputs | accepted | refused | findings | slowest, ms | memory, MB | mean, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in tallies.items():
        mean = 1000 * each.seconds / max(each.inputs, 1)
        lines.append(
            f"| `{name}` | {each.inputs:,} | {each.accepted:,} | {each.refused:,} "
            f"| {sum(each.findings.values()):,} | {1000 * each.slowest:,.0f} | {each.memory / 1e6:,.0f} "
            f"| {mean:.2f} |"
        )
    return lines


def main() -> None:
    import torch  # noqa: F401  (once, not in every child)

    from fuzzed_loaders import LOADERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0, help="leave out the inputs before this one")
    parser.add_argument(
        "--loaders", default=",".join(name for name, each in LOADERS.items() if not each.control)
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the table beside the benchmarks")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="processor time that an input may take"
    )
    parser.add_argument("--json", type=Path, help="write the counts to a file")
    parser.add_argument("--case", nargs=2, metavar=("LOADER", "NUMBER"))
    parser.add_argument("--atheris", metavar="LOADER")
    asked = parser.parse_args()
    if asked.atheris:
        _guided(LOADERS[asked.atheris], asked.seconds)
        return
    if asked.case:
        _explain(asked.case[0], LOADERS[asked.case[0]], int(asked.case[1]), asked.seed)
        return
    globals()["SECONDS"] = asked.seconds  # children are forked from here
    names = [name for name in asked.loaders.split(",") if available(LOADERS[name])]
    tallies = {name: Tally() for name in names}
    for name, tally in shared_out(names, range(asked.start, asked.count), asked.jobs, asked.seed):
        tallies[name].join(tally)
        each = tallies[name]
        print(
            f"{name}: {each.inputs:,} inputs, {each.seconds:.0f} s, {sum(each.findings.values())} findings",
            flush=True,
        )
        if asked.json:
            asked.json.write_text(json.dumps({name: vars(each) for name, each in tallies.items()}, indent=1))
    print("\n".join(table(tallies)))
    for name, each in tallies.items():
        for finding, count in each.findings.most_common():
            print(f"{name}: {count} × {finding} (first: {each.first[finding]})")
    if asked.write:
        _write(tallies, asked)


def _write(tallies: Mapping[str, Tally], asked: Any) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from importlib import metadata

    from side_by_side import write_results

    found = [
        f"- `{name}`: {count} × {finding} (first: input {each.first[finding]})"
        for name, each in tallies.items()
        for finding, count in each.findings.most_common()
    ]
    packages = ("transformers", "pyarrow", "pydicom", "rdkit")
    write_results(
        "fuzzing",
        [
            f"Hostile inputs by loader: valid samples damaged by `tests/mutations.py`, seed {asked.seed}, "
            f"{asked.jobs} processes at a time. A refusal is one sentence of at most {LONGEST} characters. "
            "A finding is anything else: another exception, a failed allocation, more than 10 s, more than "
            "2 GB, code that ran. Times are of the processor in the loader; memory is the most by which a "
            "process grew from its first input on.",
            "",
            *table(tallies),
            "",
            *(found or ["No findings."]),
        ],
        {name: metadata.version(name) for name in packages},
    )


def _explain(name: str, loader: Loader, number: int, seed: int) -> None:
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as place:
        known = cases(loader, Path(place))
        random = draw(seed, name, number)
        case = random.choice(known)
        spoilt = case.spoil(random)
        path = case.folder / spoilt
        print(spoilt, os.lstat(path).st_size if path.is_symlink() or path.exists() else "missing")
        if path.is_file() and not path.is_symlink():
            print(path.read_bytes()[:3000])
        signal.alarm(int(SECONDS))
        try:
            print("accepted:", repr(loader.read(case.folder))[:500])
        except Exception as error:
            traceback.print_exc()
            print(len(str(error)), repr(str(error))[:3000])


def _guided(loader: Loader, seconds: float) -> None:
    """Let atheris look for files that reach new lines of ours, from the first sample on."""
    import atheris

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as place, tempfile.TemporaryDirectory() as corpus:
        with atheris.instrument_imports(include=["gramian"]):
            case = cases(loader, Path(place))[0]
        for name in case.names:
            shutil.copy(case.folder / name, corpus)

        def once(data: bytes) -> None:
            (case.folder / case.names[0]).write_bytes(data)
            said = verdict(loader.read, case.folder)
            if said not in ("accepted", "refused"):
                raise AssertionError(said)

        atheris.Setup([sys.argv[0], f"-max_total_time={seconds:.0f}", "-rss_limit_mb=4096", corpus], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
