"""Molecules as graphs: types are those of tables worked by hand, counts those of published arrays."""

import csv
import gzip
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gramian.data.graph_files import load_graphs
from gramian.data.molecules import ATOM, BOND, load_molecules
from gramian.errors import InputError, MissingExtraError

MOLECULES = Path(os.environ.get("GRAMIAN_DATA", Path(__file__).parents[3] / "shared" / "data")) / "molecules"
no_molecules = pytest.mark.skipif(not MOLECULES.exists(), reason="no molecules under $GRAMIAN_DATA")


def test_without_rdkit_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.smi").write_text("C\n")
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(MissingExtraError, match=r"gramian\[molecules\]"):
        load_graphs(tmp_path / "a.smi", target="TPSA")


rdkit = pytest.importorskip("rdkit", reason='needs pip install "gramian[molecules]"')


def write(folder: Path, text: str, name: str = "a.csv") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def one(folder: Path, smiles: str) -> tuple[list[list[int]], dict[tuple[int, int], list[int]]]:
    """The types of the atoms and of the bonds of a molecule."""
    graph = load_graphs(write(folder, f"smiles,y\n{smiles},1.5\n"))[0]
    assert graph.edge_attr is not None
    assert graph.y.tolist() == [[1.5]]
    edges = map(tuple, graph.edge_index.T.tolist())
    return graph.x.tolist(), dict(zip(edges, graph.edge_attr.tolist(), strict=True))


def test_ethanol_by_hand(tmp_path: Path) -> None:
    atoms, bonds = one(tmp_path, "CCO")
    # element − 1, chirality, degree with hydrogens, charge + 5, hydrogens, radicals, sp3, aromatic, in a ring
    assert atoms == [[5, 0, 4, 5, 3, 0, 2, 0, 0], [5, 0, 4, 5, 2, 0, 2, 0, 0], [7, 0, 2, 5, 1, 0, 2, 0, 0]]
    assert bonds == {edge: [0, 0, 0] for edge in ((0, 1), (1, 0), (1, 2), (2, 1))}


@pytest.mark.parametrize(
    ("smiles", "atom", "types"),
    [
        ("c1ccccc1", 0, [5, 0, 3, 5, 1, 0, 1, 1, 1]),
        ("[N+](=O)([O-])C", 0, [6, 0, 3, 6, 0, 0, 1, 0, 0]),
        ("[N+](=O)([O-])C", 2, [7, 0, 1, 4, 0, 0, 1, 0, 0]),
        ("N[C@@H](C)O", 1, [5, 1, 4, 5, 1, 0, 2, 0, 0]),
        ("N[C@H](C)O", 1, [5, 2, 4, 5, 1, 0, 2, 0, 0]),
        ("[CH3]", 0, [5, 0, 3, 5, 3, 1, 2, 0, 0]),
        ("C#N", 0, [5, 0, 2, 5, 1, 0, 0, 0, 0]),
        ("*C", 0, [118, 0, 1, 5, 0, 0, 5, 0, 0]),
        ("FS(F)(F)(F)(F)F", 1, [15, 0, 6, 5, 0, 0, 4, 0, 0]),
        ("FP(F)(F)(F)F", 1, [14, 0, 5, 5, 0, 0, 3, 0, 0]),
        ("[C-6]", 0, [5, 0, 0, 11]),
        ("[Og]", 0, [117]),
    ],
)
def test_atoms_by_hand(tmp_path: Path, smiles: str, atom: int, types: list[int]) -> None:
    atoms, _ = one(tmp_path, smiles)
    assert atoms[atom][: len(types)] == types
    assert all(value < size for row in atoms for value, size in zip(row, ATOM, strict=True))


@pytest.mark.parametrize(
    ("smiles", "bond", "types"),
    [
        ("c1ccccc1", (0, 1), [3, 0, 1]),
        ("C#N", (0, 1), [2, 0, 0]),
        ("F/C=C\\F", (1, 2), [1, 1, 0]),
        ("F/C=C/F", (1, 2), [1, 2, 0]),
        ("C=CC=C", (1, 2), [0, 0, 1]),
        ("FC=CF", (1, 2), [1, 0, 0]),
        ("[NH3]->[Fe]", (0, 1), [4, 0, 0]),
    ],
)
def test_bonds_by_hand(tmp_path: Path, smiles: str, bond: tuple[int, int], types: list[int]) -> None:
    _, bonds = one(tmp_path, smiles)
    assert bonds[bond] == bonds[bond[::-1]] == types
    assert all(value < size for row in bonds.values() for value, size in zip(row, BOND, strict=True))


def test_every_kind_of_file_holds_the_same_molecules(tmp_path: Path) -> None:
    smiles = ["CCO", "c1ccccc1", "C", "CC.O"]
    lines, rows = (
        "\n".join(smiles) + "\n",
        "".join(f"{number},{each}\n" for number, each in enumerate(smiles)),
    )
    expected = load_graphs(write(tmp_path, lines, "a.smi"), target="TPSA")
    assert (expected.task, expected.name, len(expected)) == ("regression", "a", 4)
    assert expected.ptr.diff().tolist() == [3, 6, 1, 3]
    assert expected.edge_ptr.diff().tolist() == [4, 12, 0, 2]
    assert (expected.node_types, expected.edge_types) == (ATOM, BOND)
    assert expected.y.flatten().tolist() == pytest.approx([20.23, 0, 0, 31.5])
    for name, text in (
        ("b.smi.gz", lines),
        ("b.txt", "smiles name\n" + "\n\n".join(f"{each} molecule {each}" for each in smiles)),
        ("b.csv", "number,SMILES\n" + rows),
        ("b.csv.gz", "\ufeffnumber,Smiles\n\n" + rows),
    ):
        found = load_graphs(write(tmp_path, text, name), target="TPSA")
        assert torch.equal(found.x, expected.x)
        assert torch.equal(found.edge_index, expected.edge_index)
        assert torch.equal(found.y, expected.y)


def test_a_property_is_what_rdkit_computes(tmp_path: Path) -> None:
    from rdkit import Chem
    from rdkit.Chem import Crippen

    smiles = ["CCO", "c1ccccc1O", "CCCCCC"]
    found = load_graphs(write(tmp_path, "\n".join(smiles), "a.smi"), target="MolLogP")
    expected = [Crippen.MolLogP(Chem.MolFromSmiles(each)) for each in smiles]
    assert found.y.flatten().tolist() == pytest.approx(expected)


TABLE = 'smiles,toxic,dose,labels\nCCO,0,1.5,"[0, 1]"\nC,1,2,"[1, 1]"\nCC,1,3e1,"[0, 0]"\n'


def test_targets_are_columns(tmp_path: Path) -> None:
    path = write(tmp_path, TABLE)
    labels = load_graphs(path)
    assert (labels.task, labels.y.tolist()) == ("multilabel", [[0, 1], [1, 1], [0, 0]])
    assert load_graphs(path, target="toxic").task == "classification"
    dose = load_graphs(path, target="dose")
    assert (dose.task, dose.y.tolist()) == ("regression", [[1.5], [2], [30]])
    both = load_graphs(path, target=["dose", "toxic"])
    assert (both.task, both.y.tolist()) == ("regression", [[1.5, 0], [2, 1], [30, 1]])
    assert load_graphs(path, target="toxic", task="regression").task == "regression"
    other = load_molecules(write(tmp_path, "structure,y\nCC,1\nC,2\n"), column="structure")
    assert other.classes == (1, 2)


def test_splits_beside_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, TABLE, "some_long_name.csv")
    assert load_graphs(path).splits == ()
    parts = {"train": np.array([2]), "val": np.array([0]), "test": np.array([1])}
    np.savez(tmp_path / "some_splits.npz", **parts)
    (split,) = load_graphs(path).splits
    assert [part.tolist() for part in vars(split).values()] == [[2], [0], [1]]
    np.savez(tmp_path / "mine.npz", **{**parts, "train": np.array([0]), "val": np.array([2])})
    assert load_graphs(path, splits=tmp_path / "mine.npz").splits[0].train.tolist() == [0]
    np.savez(tmp_path / "some_long_splits.npz", **{**parts, "test": np.array([3])})
    with pytest.raises(InputError, match="count the 3 examples"):
        load_graphs(path)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("smiles,y\nCC,1\nC1CC,2\n", {}, r"line 3: 'C1CC' is no SMILES of a molecule"),
        ("smiles,y\nC(C)(C)(C)(C)C,1\n", {}, "line 2: .* is no SMILES"),
        ("smiles,y\n,1\n", {}, "line 2: '' is no SMILES"),
        ("smiles,y\nCC,1\nCC\n", {}, "line 3 has 1 cells, not 2"),
        ("smiles,y\nCC,many\n", {}, "line 2: a target must be a number or a list"),
        ("smiles,y\nCC,\n", {}, "line 2: a target must be a number"),
        ("smiles,y\nCC,nan\nC,1\n", {}, "targets must be finite"),
        ('smiles,y\nCC,"[0, 1]"\nC,"[0]"\n', {}, "line 3 has 1 targets in y, not 2"),
        ('smiles,y\nCC,"[]"\n', {}, "line 2 has 0 targets in y, not some"),
        ('smiles,y\nCC,"[0, [1]]"\n', {}, "line 2: a target must be a number or a list"),
        ('smiles,y\nCC,"[0, null]"\n', {}, "line 2: a target must be a number or a list"),
        ('smiles,y\nCC,"[0, 1"\n', {}, "line 2: a target must be a number or a list"),
        (f"smiles,y\nCC,1{'0' * 30}\nC,1\n", {}, "targets must be numbers, got object"),
        ("smiles,y\nCC,1\nC,1\n", {}, "needs 2 to 1,000 classes"),
        ("smiles\nCC\n", {}, "name what is to be predicted, a column .there are none."),
        ("smiles,a,b\nCC,1,2\n", {}, "a column .there are 'a', 'b'."),
        ("smiles,a,b\nCC,1,2\n", {"target": ["a", "c"]}, "no column 'c'; it has 'a', 'b'"),
        ("smiles,a,b\nCC,1,2\n", {"target": "logP"}, "'logP' is neither a column nor a property of RDKit"),
        ("structure,y\nCC,1\n", {}, "needs one column 'smiles' of SMILES; it has 'structure', 'y'"),
        ("smiles,SMILES\nCC,CC\n", {}, "needs one column 'smiles'"),
        ("", {}, "needs one column 'smiles' of SMILES; it has none"),
        ("smiles,y\n", {}, "has no molecules"),
        (f"smiles,y\n{'C' * 200_000},1\n", {}, "cannot be read as text: field larger"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, text: str, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_graphs(write(tmp_path, text), **settings)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="line 2: 'no' is no SMILES"):
        load_graphs(write(tmp_path, "C\nno molecule\n", "a.smi"), target="TPSA")
    with pytest.raises(InputError, match="has no columns; name a property of RDKit"):
        load_graphs(write(tmp_path, "C\n", "a.smi"))
    with pytest.raises(InputError, match="has no molecules"):
        load_graphs(write(tmp_path, "\n\n", "a.smi"), target="TPSA")
    with pytest.raises(InputError, match=r"must end in \.smi, \.txt or \.csv"):
        load_graphs(write(tmp_path, "C\n", "a.sdf.gz"), target="TPSA")
    whole = gzip.compress(b"smiles,y\nC,1\n")
    for content in (whole[:-9], b"smiles,y", whole[:10] + b"\xff" * 20):
        (tmp_path / "a.csv.gz").write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as text"):
            load_graphs(tmp_path / "a.csv.gz")
    (tmp_path / "a.csv").write_bytes(b"smiles,y\n\xff\xfe,1\n")
    with pytest.raises(InputError, match="cannot be read as text"):
        load_graphs(tmp_path / "a.csv")
    assert capfd.readouterr().err == ""  # RDKit is quiet


def zinc(part: str, source: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """The SMILES that the published index picks, and the published arrays."""
    numbers = [int(each) for each in (MOLECULES / f"zinc12k_{part}.index").read_text().split(",")]
    lines = (MOLECULES / f"zinc_jtnn_{source}.smi.txt").read_text().splitlines()
    with np.load(MOLECULES / f"zinc12k_{part}.npz") as file:
        return [lines[number] for number in numbers], {name: file[name] for name in file.files}


@no_molecules
@pytest.mark.parametrize(("part", "source"), [("val", "valid"), ("test", "test")])
def test_atoms_and_bonds_of_zinc(tmp_path: Path, part: str, source: str) -> None:
    smiles, arrays = zinc(part, source)
    found = load_graphs(write(tmp_path, "\n".join(smiles), "zinc.smi"), target="HeavyAtomCount")
    atoms, bonds = np.diff(arrays["node_ptr"]), np.diff(arrays["edge_ptr"])
    assert found.ptr.diff().tolist() == atoms.tolist()
    assert found.edge_ptr.diff().tolist() == bonds.tolist()
    assert found.y.flatten().tolist() == atoms.tolist()
    assert found.ptr.diff().flip(0).tolist() != atoms.tolist()  # control

    types = counts(arrays["node_types"], arrays["node_ptr"])
    elements = counts(found.x[:, 0].numpy(), found.ptr.numpy())
    for halogen in (8, 16, 34):  # each is one published type, whatever its number
        assert (elements[halogen] == types).all(1).sum() == 1
        assert not (elements[halogen][::-1] == types).all(1).any()  # control
    triple = counts(found.edge_attr[:, 0].numpy(), found.edge_ptr.numpy())[2]
    assert (triple == counts(arrays["edge_types"], arrays["edge_ptr"])[3]).all()


def counts(types: np.ndarray, ptr: np.ndarray) -> np.ndarray:
    """How many nodes or edges of each type each graph has (types, graphs)."""
    graph = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
    found = np.zeros((int(types.max()) + 1, len(ptr) - 1), int)
    np.add.at(found, (types, graph), 1)
    return found


def peptides(rows: int | None, folder: Path) -> Path:
    """The first molecules of the published table, with a split of their own."""
    with gzip.open(MOLECULES / "peptides_functional.csv.gz", "rt", newline="") as stream:
        taken = list(csv.reader(stream))[: None if rows is None else rows + 1]
    with (folder / "peptides_few.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(taken)
    return folder / "peptides_few.csv"


@no_molecules
def test_some_peptides(tmp_path: Path) -> None:
    found = load_graphs(peptides(40, tmp_path))
    assert (found.task, found.outputs, len(found)) == ("multilabel", 10, 40)
    with np.load(MOLECULES / "peptides_splits.npz") as file:
        assert torch.equal(found.y, torch.from_numpy(file["labels"][:40]).float())
    assert not found.directed


@no_molecules
@pytest.mark.slow
def test_all_peptides() -> None:
    found = load_graphs(MOLECULES / "peptides_functional.csv.gz")
    assert (found.task, found.outputs, len(found)) == ("multilabel", 10, 15_535)
    rates = [0.0887, 0.0351, 0.0640, 0.0624, 0.6273, 0.1981, 0.1070, 0.1845, 0.0192, 0.2603]
    assert found.y.mean(0).tolist() == pytest.approx(rates, abs=5e-5)
    (split,) = found.splits
    assert [len(part) for part in vars(split).values()] == [10_873, 2_331, 2_331]
    assert found.ptr.diff().max() == 444  # the padding of the published layer
    with np.load(MOLECULES / "peptides_splits.npz") as file:
        assert torch.equal(found.y, torch.from_numpy(file["labels"]).float())
        assert torch.equal(split.test, torch.from_numpy(file["test"]).long())


def test_a_smiles_that_takes_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.smi"
    path.write_text("CCO\n" + "C" * 10_001 + "\n")
    with pytest.raises(InputError, match=r"line 2: a SMILES of 10,001 characters; 10,000 are accepted"):
        load_molecules(path, "HeavyAtomCount")


def test_a_gzipped_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.smi.gz"
    path.write_bytes(gzip.compress(b"C\n" * 2**20))
    with pytest.raises(InputError, match="would unpack to"):
        load_molecules(path, "HeavyAtomCount")
