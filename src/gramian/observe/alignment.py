"""The tensors that all checkpoints of a series share; what is wrong with a series before it is trusted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch

from gramian.errors import InputError
from gramian.observe.equal_weights import Told, identical, tied
from gramian.observe.renaming import Renaming, natural, own_names, suggestion
from gramian.observe.series import Checkpoint, Series
from gramian.observe.weight_files import Stored, open_weights

READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

BUFFERS = re.compile(
    r"(^|\.)(running_mean|running_var|num_batches_tracked|(original_)?inv_freq|position_ids|masked_bias|tril"
    r"|(attn_|causal_)?mask|(cos|sin)_cached|exp_avg(_sq)?|max_exp_avg_sq|momentum_buffer)$"
)
"""Names of tensors that training does not learn: statistics, tables, masks, states of optimisers."""

MASK = re.compile(r"(^|\.)\w*att\w*\.(bias|mask)$")
"""Names that causal masks have in GPT-2 and GPT-NeoX, if they are of shape (1, 1, T, T)."""


@dataclass(frozen=True)
class Checks:
    """What to do about a series that is not as it should be."""

    mismatch: str = "refuse"
    """Tensors that some checkpoints lack or have in another shape: refuse, or leave_out of all."""
    duplicates: str = "refuse"
    """Checkpoints with the same weights bit by bit: refuse, or keep_one, the last of each."""
    mixed_dtypes: bool = False
    """Take tensors of which the precision changes between checkpoints."""
    rename: tuple[str, ...] = ()
    """Tensors under another name in some checkpoints: OLD=NEW, or OLD.*=NEW.* for all that begin so."""
    skip: tuple[str, ...] = ()
    """Patterns of names, such as *.bias, to leave out."""
    only: tuple[str, ...] = ()
    """Patterns of names to keep; all when empty."""

    def check(self) -> None:
        """Raise InputError for a choice that there is not."""
        for name, choices in (("mismatch", ("refuse", "leave_out")), ("duplicates", ("refuse", "keep_one"))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}; accepted are {' and '.join(choices)}")
        for rule in self.rename:
            Renaming.of(rule)


@dataclass(frozen=True)
class Remark:
    """Something that a reader of the numbers should know."""

    kind: str
    sentence: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Aligned:
    """One tensor through all checkpoints."""

    name: str
    shape: tuple[int, ...]
    stored: tuple[Stored, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, eq=False)
class Alignment:
    """The checkpoints and tensors of a series that can be compared, and what was left out."""

    checkpoints: tuple[Checkpoint, ...]
    tensors: tuple[Aligned, ...]
    remarks: tuple[Remark, ...]


Row = tuple[Stored, ...]
Table = dict[str, Stored]


def align(series: Series, checks: Checks | None = None, progress: Told | None = None) -> Alignment:
    """Return the parameters that all checkpoints of a series have, in natural order of their names.

    Buffers that are not learned and tensors of whole numbers are left out, tensors that are one are counted
    once, and checkpoints with the same weights found: each with a remark.

    Args:
        series: from `find_series`.
        checks: what to do about differences.
        progress: told how many bytes more of suspicious checkpoints were compared.

    Raises: InputError naming tensor and checkpoint for what `checks` refuses, for quantised weights, for
        different architectures, and when fewer than two checkpoints or no tensors are left.
    Holds: exactly.
    """
    checks = checks or Checks()
    checks.check()
    _check_series(series)
    remarks = [Remark("series", sentence) for sentence in series.remarks]
    tables = _learned(_tables(series.checkpoints, checks, remarks), remarks)
    rows = _common(series.checkpoints, _selected(tables, checks), checks, remarks)
    kept = _distinct(series.checkpoints, _comparable(tables), checks, remarks, progress)
    rows = _once({name: tuple(row[index] for index in kept) for name, row in rows.items()}, remarks)
    tensors = tuple(Aligned(name, row[0].shape, row) for name, row in rows.items())
    return Alignment(tuple(series.checkpoints[index] for index in kept), tensors, tuple(remarks))


def _check_series(series: Series) -> None:
    """Raise InputError for fewer than two checkpoints, and for sketches that were drawn differently."""
    if len(series.checkpoints) < 2:
        raise InputError(f"the series {series.name} has fewer than two checkpoints")
    drawn = {}
    for checkpoint in series.checkpoints:
        about = checkpoint.metadata
        seed = about.get("seed") if about.get("mode") == "sketch" else None
        drawn.setdefault(seed, checkpoint.path)
    if len(drawn) > 1:
        first, second = list(drawn.values())[:2]
        raise InputError(
            f"{first} and {second} are not sketches of one recording, so they cannot be compared"
        )


def _tables(checkpoints: Sequence[Checkpoint], checks: Checks, remarks: list[Remark]) -> list[Table]:
    """Return the tensors of each checkpoint by the names that are to be compared."""
    rules = [Renaming.of(rule) for rule in checks.rename]
    used: set[Renaming] = set()
    wrapped: list[str] = []
    places: set[str] = set()
    tables = []
    for checkpoint in checkpoints:
        weights = open_weights(checkpoint.files)
        own = own_names(weights)
        wrapped += [name for name, short in own.items() if name != short]
        places |= {stored.within for stored in weights.values() if stored.within}
        table: Table = {}
        for name, short in own.items():
            for rule in rules:
                if rule.matches(short):
                    used.add(rule)
                    short = rule.renamed(short)
            if short in table:
                raise InputError(
                    f"{checkpoint.path} has two tensors for {short}: {table[short].name} and {name}"
                )
            table[short] = weights[name]
        tables.append(table)
    for rule, text in zip(rules, checks.rename, strict=True):
        if rule not in used:
            raise InputError(f"the renaming {text!r} fits no tensor of the series")
    if wrapped:
        sentence = "prefixes such as module. and _orig_mod. of wrapped models were taken off the names"
        remarks.append(Remark("wrapped", sentence, tuple(dict.fromkeys(wrapped))))
    if places:
        remarks.append(Remark("place", f"weights were read from the entry {', '.join(sorted(places))}"))
    return tables


def _learned(tables: Sequence[Table], remarks: list[Remark]) -> list[Table]:
    """Return the tables without what training does not learn."""
    buffers = {name for table in tables for name, stored in table.items() if _is_buffer(name, stored.shape)}
    filled = {name for table in tables for name, stored in table.items() if stored.numel}
    buffers |= {name for table in tables for name in table} - filled
    if buffers:
        names = sorted(buffers, key=natural)
        sentence = f"left out, since training does not learn them: {_some(names)}"
        remarks.append(Remark("buffers", sentence, tuple(names)))
    return [{name: one for name, one in table.items() if name not in buffers} for table in tables]


def _is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    square = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return bool(BUFFERS.search(name)) or (square and bool(MASK.search(name)))


def _selected(tables: Sequence[Table], checks: Checks) -> list[Table]:
    """Return the tables with the tensors that the user wants."""
    names = {name for table in tables for name in table}
    for pattern in (*checks.only, *checks.skip):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"the pattern {pattern!r} fits no tensor, such as {min(names, default='none')}")

    def wanted(name: str) -> bool:
        kept = not checks.only or any(fnmatchcase(name, pattern) for pattern in checks.only)
        return kept and not any(fnmatchcase(name, pattern) for pattern in checks.skip)

    return [{name: one for name, one in table.items() if wanted(name)} for table in tables]


def _comparable(tables: Sequence[Table]) -> dict[str, Row]:
    """Return the tensors that all have in one shape, by natural order of names."""
    shared = set.intersection(*map(set, tables))
    rows = {name: tuple(table[name] for table in tables) for name in sorted(shared, key=natural)}
    return {name: row for name, row in rows.items() if len({one.shape for one in row}) == 1}


def _common(
    checkpoints: Sequence[Checkpoint], tables: Sequence[Table], checks: Checks, remarks: list[Remark]
) -> dict[str, Row]:
    """Return the tensors that can be compared, once what differs is refused or left out."""
    tables = _real(checkpoints, tables, remarks)
    rows = _comparable(tables)
    names = sorted({name for table in tables for name in table}, key=natural)
    if not names:
        raise InputError("no tensors are left to compare; give other patterns to --only and --skip")
    if not rows:
        raise _strangers(checkpoints, tables)
    missing = [name for name in names if any(name not in table for table in tables)]
    reshaped = [name for name in names if name not in missing and name not in rows]
    unread = [name for name, row in rows.items() if any(one.dtype not in READABLE for one in row)]
    if missing and checks.mismatch == "refuse":
        raise _missing(missing, checkpoints, tables)
    if reshaped and checks.mismatch == "refuse":
        raise _differs(
            reshaped, "shape", checkpoints, tables, "--mismatch leave_out to leave such tensors out"
        )
    if unread and checks.mismatch == "refuse":
        raise _differs(unread, "dtype", checkpoints, tables, "--mismatch leave_out to leave such tensors out")
    rows = {name: row for name, row in rows.items() if name not in unread}
    retyped = [name for name, row in rows.items() if len({one.dtype for one in row}) > 1]
    if retyped and not checks.mixed_dtypes:
        raise _differs(retyped, "dtype", checkpoints, tables, "--mixed-dtypes to compare them all the same")
    if retyped:
        sentence = f"compared although changes of precision move them by rounding: {_some(retyped)}"
        remarks.append(Remark("retyped", sentence, tuple(retyped)))
    if left := [*missing, *reshaped, *unread]:
        remarks.append(_left_out(left, rows, tables))
    return rows


def _real(checkpoints: Sequence[Checkpoint], tables: Sequence[Table], remarks: list[Remark]) -> list[Table]:
    """Return the tables without tensors that are of whole numbers, or of eight bits, wherever they are."""
    for checkpoint, table in zip(checkpoints, tables, strict=True):
        size = {True: 0, False: 0}
        for stored in table.values():
            size[stored.dtype in READABLE] += stored.numel * stored.dtype.itemsize
        if size[False] > size[True]:
            kinds = sorted({_short(one.dtype) for one in table.values() if one.dtype not in READABLE})
            raise InputError(
                f"most of {checkpoint.path} is {', '.join(kinds)}, so it is quantised: dequantise it first"
            )
    real = {name for table in tables for name, stored in table.items() if stored.dtype in READABLE}
    whole = sorted({name for table in tables for name in table} - real, key=natural)
    if whole:
        sentence = f"left out, since they hold no real numbers: {_some(whole)}"
        remarks.append(Remark("integers", sentence, tuple(whole)))
    return [{name: one for name, one in table.items() if name in real} for table in tables]


def _missing(names: Sequence[str], checkpoints: Sequence[Checkpoint], tables: Sequence[Table]) -> InputError:
    """Return the error for a tensor that is not everywhere, with a guess at its other name."""
    name = names[0]
    lacking = next(index for index, table in enumerate(tables) if name not in table)
    having = next(index for index, table in enumerate(tables) if name in table)
    rule = _rule(tables[having], tables[lacking], name)
    rename = f"--rename '{rule}' if that is its other name, or " if rule else ""
    return InputError(
        f"{checkpoints[lacking].path} lacks the tensor {name} of {checkpoints[having].path}{_more(names)}; "
        f"pass {rename}--mismatch leave_out to leave such tensors out"
    )


def _differs(
    names: Sequence[str],
    what: str,
    checkpoints: Sequence[Checkpoint],
    tables: Sequence[Table],
    how: str,
) -> InputError:
    """Return the error for a tensor whose shape or dtype changes."""
    name = names[0]
    values = [getattr(table[name], what) for table in tables]
    other = next(index for index, value in enumerate(values) if value != values[0])
    shown = [str(value).removeprefix("torch.") for value in (values[0], values[other])]
    return InputError(
        f"the tensor {name} has {what} {shown[0]} in {checkpoints[0].path} and {shown[1]} in "
        f"{checkpoints[other].path}{_more(names)}; pass {how}"
    )


def _strangers(checkpoints: Sequence[Checkpoint], tables: Sequence[Table]) -> InputError:
    """Return the error for checkpoints that share nothing, naming the first two of these if there are."""
    sets = [{(name, stored.shape) for name, stored in table.items()} for table in tables]
    other = next((index for index, each in enumerate(sets) if not each & sets[0]), len(sets) - 1)
    rule = _rule(tables[0], tables[other], min(tables[0], key=natural, default=""))
    rename = f", unless names were changed: then pass --rename '{rule}'" if rule else ""
    return InputError(
        f"{checkpoints[0].path} and {checkpoints[other].path} have no tensor of one name and shape in common "
        f"with all others, so they are of different architectures{rename}"
    )


def _rule(having: Table, lacking: Table, first: str) -> str | None:
    """Return a renaming in `lacking` that would give it the tensor `first` of `having`, if one is likely."""
    wanted = {name: having[name].shape for name in sorted(having, key=natural) if name not in lacking}
    there = {name: lacking[name].shape for name in sorted(lacking, key=natural) if name not in having}
    return suggestion({first: wanted.pop(first), **wanted}, there) if first in wanted else None


def _left_out(left: Sequence[str], rows: Mapping[str, Row], tables: Sequence[Table]) -> Remark:
    used = sum(row[0].numel for row in rows.values())
    whole = max(sum(stored.numel for stored in table.values()) for table in tables)
    sentence = (
        f"left out of all checkpoints, since they differ between them: {_some(left)}; "
        f"{100 * used / whole:.4g} % of the parameters of the largest are used"
    )
    return Remark("left_out", sentence, tuple(left))


def _distinct(
    checkpoints: Sequence[Checkpoint],
    rows: Mapping[str, Row],
    checks: Checks,
    remarks: list[Remark],
    progress: Told | None,
) -> list[int]:
    """Return the checkpoints of which no later one has the same weights.

    Not the first of equal ones: early steps have been published with the weights of the last.
    """
    real = [row for row in rows.values() if all(one.dtype in READABLE for one in row)]
    groups = identical(real, progress)
    said = [
        f"{_listed([f'step {checkpoints[i].step}' for i in group])} hold identical weights"
        for group in groups
    ]
    if groups and checks.duplicates == "refuse":
        first, second = (checkpoints[index].path for index in groups[0][:2])
        more = f", and {len(groups) - 1} more groups of checkpoints do" if len(groups) > 1 else ""
        raise InputError(
            f"{said[0]} bit by bit ({first} and {second}){more}; pass --duplicates keep_one to keep only the "
            "last of each"
        )
    dropped = {index for group in groups for index in group[:-1]}
    for group, sentence in zip(groups, said, strict=True):
        names = tuple(str(checkpoints[index].path) for index in group)
        remarks.append(Remark("duplicates", f"{sentence} bit by bit: only the last was kept", names))
    kept = [index for index in range(len(checkpoints)) if index not in dropped]
    if len(kept) < 2:
        raise InputError(f"all checkpoints have the same weights as {checkpoints[0].path}, so nothing moved")
    return kept


def _once(rows: dict[str, Row], remarks: list[Remark]) -> dict[str, Row]:
    """Return the tensors without those that repeat another one."""
    repeats = tied(rows)
    if repeats:
        pairs = [f"{one} to {other}" for one, other in repeats.items()]
        sentence = f"counted once, since they are tied in every checkpoint: {_some(pairs)}"
        remarks.append(Remark("tied", sentence, tuple(repeats)))
    return {name: row for name, row in rows.items() if name not in repeats}


def _some(names: Sequence[str]) -> str:
    """Return how many tensors there are, and the first."""
    return f"1 tensor, {names[0]}" if len(names) == 1 else f"{len(names)} tensors, such as {names[0]}"


def _more(names: Sequence[str]) -> str:
    return f", one of {len(names)} tensors with such differences" if len(names) > 1 else ""


def _listed(words: Sequence[str]) -> str:
    """Return a list in words, cut after five."""
    shown = [*words[:5], *([f"{len(words) - 5} more"] if len(words) > 5 else [])]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
