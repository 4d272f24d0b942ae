"""Molecules from SMILES: atoms as nodes, bonds as edges, both with types; needs rdkit (extra `molecules`)."""

import csv
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from gramian.data.graph_arrays import from_arrays, load_split
from gramian.data.graphs import Graphs
from gramian.errors import InputError, MissingExtraError
from gramian.reading import check_regular, unpacked

ATOM = (119, 5, 12, 12, 10, 6, 6, 2, 2)
"""How many types each column of an atom has: element, chirality, degree, charge, hydrogens, radical
electrons, hybridisation, aromatic, in a ring."""

BOND = (5, 6, 2)
"""How many types each column of a bond has: kind, stereochemistry, conjugated."""

STEREO = (0, 5, 1, 2, 3, 4)
"""Places of RDKit's none, any, Z, E, cis and trans in the published order: none, Z, E, cis, trans, any."""

HYBRIDISATION = {"SP": 0, "SP2": 1, "SP3": 2, "SP3D": 3, "SP3D2": 4}
KINDS = {"SINGLE": 0, "DOUBLE": 1, "TRIPLE": 2, "AROMATIC": 3}

EXAMPLE = "MolLogP"

LONGEST = 10_000
"""Characters of the longest SMILES."""

TEXT = 2**20
"""Bytes of text that any gzipped file may hold."""


@dataclass(frozen=True)
class Row:
    """A molecule of a file: where it is, its SMILES and the cells of the targets."""

    where: str
    smiles: str
    cells: tuple[str, ...] = ()


def load_molecules(
    path: Path,
    target: str | Sequence[str] | None = None,
    *,
    task: str | None = None,
    splits: Path | None = None,
    column: str = "smiles",
) -> Graphs:
    """Read molecules as graphs: nodes are the heavy atoms, edges the bonds in both directions.

    A .smi or .txt file has a SMILES first in each line, a .csv file in a column; both may be gzipped. Atoms
    have nine types and bonds three, numbered as the Open Graph Benchmark does. Targets are columns of
    numbers, a column of lists such as `[0, 1, 1]`, or a property that RDKit computes.

    Args:
        path: what is read.
        target: columns, or the name of one of RDKit's descriptors (MolLogP, TPSA, …); when None, the
            column `labels`, or the only one beside the SMILES.
        task: what is predicted; by the targets when None.
        splits: .npz of row numbers `train`, `val`, `test`; when None, NAME_splits.npz beside the file, NAME
            being the file's or its beginning before an underscore.
        column: the column of the SMILES, in large or small letters.

    Raises: MissingExtraError without rdkit; InputError when the file cannot be read, and naming the line of
        what is no molecule or no target.
    Holds: exactly.
    Source: Hu et al. 2020, arXiv 2005.00687 (types); Dwivedi et al. 2022, arXiv 2206.08164 (peptides).
    """
    parse, quietly = _rdkit()
    name, kind = _parts(path)
    wanted = [target] if isinstance(target, str) else list(target or ())
    rows, columns = _rows(path, kind, column, wanted)
    if not rows:
        raise InputError(f"{path} has no molecules")
    with quietly():
        molecules = [_molecule(parse, row, path) for row in rows]
        computed = wanted and not columns
        y = _computed(molecules, wanted[0]) if computed else _cells(rows, path, columns)
    arrays = _arrays(molecules) | {"y": y}
    if splits := splits or _splits_beside(path, name):
        arrays |= {part: numbers.numpy() for part, numbers in vars(load_split(splits)).items()}
    return from_arrays(name, arrays, task)


def _rdkit() -> tuple[Callable[[str], Any], Callable[[], AbstractContextManager[Any]]]:
    """Return RDKit's reader of SMILES and what keeps it from writing to the terminal."""
    try:
        from rdkit import Chem, rdBase
    except ImportError as error:
        raise MissingExtraError('reading SMILES needs rdkit: pip install "gramian[molecules]"') from error
    return Chem.MolFromSmiles, rdBase.BlockLogs


def _parts(path: Path) -> tuple[str, str]:
    """Return the name of a file and its kind, whether gzipped or not."""
    plain = Path(path.name.removesuffix(".gz"))
    if plain.suffix.lower() not in (".smi", ".txt", ".csv"):
        raise InputError(f"{path} must end in .smi, .txt or .csv, or these with .gz")
    return plain.stem, plain.suffix.lower()


def _rows(path: Path, kind: str, column: str, wanted: list[str]) -> tuple[list[Row], list[str]]:
    """Return the molecules and the columns of the targets, none when these are to be computed."""
    try:
        with _open(path) as lines:
            if kind == ".csv":
                return _table(path, lines, column, wanted)
            fields = [(at, line.split(maxsplit=1)) for at, line in enumerate(lines, 1) if line.strip()]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from error
    if fields and fields[0][1][0].lower() == "smiles":
        del fields[0]
    if len(wanted) != 1:
        raise InputError(f"{path} has no columns; name a property of RDKit to predict, such as {EXAMPLE}")
    return [Row(f"line {number}", words[0]) for number, words in fields], []


def _open(path: Path) -> TextIO:
    check_regular(path)
    content = unpacked(path, TEXT) if path.suffix.lower() == ".gz" else path.read_bytes()
    return io.StringIO(content.decode("utf-8-sig"), newline="")


def _table(path: Path, lines: Iterable[str], column: str, wanted: list[str]) -> tuple[list[Row], list[str]]:
    reader = csv.reader(lines)
    header = next(reader, [])
    found = [place for place, name in enumerate(header) if name.strip().lower() == column.lower()]
    if len(found) != 1:
        have = ", ".join(map(repr, header)) or "none"
        raise InputError(f"{path} needs one column {column!r} of SMILES; it has {have}")
    others = [name for name in header if name.strip().lower() != column.lower()]
    columns = _columns(path, others, wanted)
    places = [header.index(name) for name in columns]
    rows = []
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            raise InputError(f"{path} line {reader.line_num} has {len(cells)} cells, not {len(header)}")
        targets = tuple(cells[place] for place in places)
        rows.append(Row(f"line {reader.line_num}", cells[found[0]].strip(), targets))
    return rows, columns


def _columns(path: Path, others: list[str], wanted: list[str]) -> list[str]:
    """Return which columns are the targets; none when a property is to be computed."""
    if not wanted:
        wanted = ["labels"] if "labels" in others else others
        if len(wanted) != 1:
            have = ", ".join(map(repr, others)) or "none"
            raise InputError(
                f"{path}: name what is to be predicted, a column (there are {have}) or a property of RDKit "
                f"such as {EXAMPLE}"
            )
    lost = [name for name in wanted if name not in others]
    if lost and len(wanted) > 1:
        raise InputError(f"{path} has no column {lost[0]!r}; it has {', '.join(map(repr, others)) or 'none'}")
    return [] if lost else wanted


def _molecule(parse: Callable[[str], Any], row: Row, path: Path) -> Any:
    if len(row.smiles) > LONGEST:  # the time that RDKit takes rises with the square
        raise InputError(
            f"{path} {row.where}: a SMILES of {len(row.smiles):,} characters; {LONGEST:,} are accepted"
        )
    molecule = parse(row.smiles)
    if molecule is None or not molecule.GetNumAtoms():
        raise InputError(f"{path} {row.where}: {row.smiles[:60]!r} is no SMILES of a molecule")
    return molecule


def _computed(molecules: Sequence[Any], name: str) -> np.ndarray:
    from rdkit.Chem import Descriptors  # most of a second to import, so only where it is used

    known = dict(Descriptors.descList)
    if name not in known:
        raise InputError(f"{name!r} is neither a column nor a property of RDKit such as {EXAMPLE} or TPSA")
    return np.array([float(known[name](molecule)) for molecule in molecules])


def _cells(rows: Sequence[Row], path: Path, columns: Sequence[str]) -> np.ndarray:
    """Return the numbers of the targets (rows, t)."""
    values = [list(chain.from_iterable(_numbers(cell, row, path) for cell in row.cells)) for row in rows]
    for row, each in zip(rows, values, strict=True):
        if len(each) != len(values[0]) or not each:
            what = f"{len(each)} targets in {', '.join(columns)}, not {len(values[0]) or 'some'}"
            raise InputError(f"{path} {row.where} has {what}")
    try:
        return np.array(values)
    except OverflowError as error:
        raise InputError(f"{path}: a target is too large a number") from error


def _numbers(cell: str, row: Row, path: Path) -> list[int | float]:
    """Return the numbers of a cell, one or a list of them."""
    try:
        found = json.loads(cell) if cell.strip().startswith("[") else [cell]
        return [float(each) if isinstance(each, float) else _number(each) for each in found]
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} {row.where}: a target must be a number or a list such as [0, 1], got {cell[:40]!r}"
        ) from error


def _number(word: str | int) -> int | float:
    try:
        return int(word)
    except ValueError:
        return float(word)


def _arrays(molecules: Sequence[Any]) -> dict[str, np.ndarray]:
    """Return the graphs of molecules laid end to end."""
    sizes = [molecule.GetNumAtoms() for molecule in molecules]
    counts = [2 * molecule.GetNumBonds() for molecule in molecules]
    atoms = np.fromiter(chain.from_iterable(map(_atoms, molecules)), np.int16, sum(sizes) * len(ATOM))
    bonds = np.fromiter(chain.from_iterable(map(_bonds, molecules)), np.int32, sum(counts) // 2 * 5)
    both = np.repeat(bonds.reshape(-1, 5), 2, 0)
    both[1::2, :2] = both[1::2, 1::-1]
    return {
        "node_types": atoms.reshape(-1, len(ATOM)),
        "edge_index": both[:, :2].T,
        "edge_types": both[:, 2:],
        "node_ptr": np.cumsum([0, *sizes]),
        "edge_ptr": np.cumsum([0, *counts]),
        "node_vocabulary": np.array(ATOM),
        "edge_vocabulary": np.array(BOND),
    }


def _atoms(molecule: Any) -> Iterator[int]:
    """Yield the nine types of each atom; what the published lists do not have is the last of its column."""
    for atom in molecule.GetAtoms():
        element, charge = atom.GetAtomicNum(), atom.GetFormalCharge()
        yield element - 1 if element else 118
        yield min(int(atom.GetChiralTag()), 4)
        yield min(atom.GetTotalDegree(), 11)
        yield charge + 5 if -5 <= charge <= 5 else 11
        yield min(atom.GetTotalNumHs(), 9)
        yield min(atom.GetNumRadicalElectrons(), 5)
        yield HYBRIDISATION.get(atom.GetHybridization().name, 5)
        yield atom.GetIsAromatic()
        yield atom.IsInRing()


def _bonds(molecule: Any) -> Iterator[int]:
    """Yield both ends and the three types of each bond."""
    for bond in molecule.GetBonds():
        yield bond.GetBeginAtomIdx()
        yield bond.GetEndAtomIdx()
        yield KINDS.get(bond.GetBondType().name, 4)
        stereo = int(bond.GetStereo())
        yield STEREO[stereo] if stereo < len(STEREO) else 5
        yield bond.GetIsConjugated()


def _splits_beside(path: Path, name: str) -> Path | None:
    """Return the file of splits that belongs to a file by its name, if there is one."""
    words = name.split("_")
    names = ["_".join(words[:count]) for count in range(len(words), 0, -1)]
    return next((found for each in names if (found := path.with_name(f"{each}_splits.npz")).exists()), None)
