"""Molecules with the labels of ZINC-12k: the published validation and test graphs, other ones to learn from.

    python benchmarks/zinc_molecules.py MOLECULES OUT.npz [--count 10000]

The published 12,000 molecules are picked from three lists of SMILES, of which the longest, with the training
molecules, is not among the data of this project. To learn from are other molecules of the list that the
validation molecules are picked from, of the same kind and disjoint from both published parts:

    y = (logP − 2.457)/1.434 + (−SA + 3.053)/.834 + (cycle + .0486)/.286

logP, SA (synthetic accessibility) and the largest ring's excess over six by RDKit. All 2,000 published graphs
and labels are made in the same way and compared with the published ones; what was found is printed. Rings are
the smallest ones here, those of a cycle basis there: labels of a few bridged molecules differ.
RDKit's own file of fragment scores, which comes with the package, is read by its script `sascorer`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from rdkit import Chem, RDConfig, rdBase
from rdkit.Chem import Crippen

from gramian.data.graph_arrays import load_npz, save_npz
from gramian.data.graph_files import joined
from gramian.data.graphs import Graph, Graphs, flat

ATOMS = (
    "C", "O", "N", "F", "C H1", "S", "Cl", "O -", "N H1 +", "Br", "N H3 +", "N H2 +", "N +", "N -", "S -",
    "I", "P", "O H1 +", "N H1 -", "O +", "S +", "P H1", "P H2", "C H2 -", "P +", "S H1 +", "C H1 -", "P H1 +",
)  # fmt: skip
"""Types of atoms in the order of the published files: element, hydrogens that the SMILES writes, charge."""


def scores(molecule: Chem.Mol) -> float:
    """Return the label of a molecule."""
    sys.path.append(str(Path(RDConfig.RDContribDir) / "SA_Score"))
    import sascorer

    rings = [len(ring) for ring in Chem.GetSymmSSSR(molecule)]
    cycle = -max(max(rings, default=0) - 6, 0)
    values = (Crippen.MolLogP(molecule), -sascorer.calculateScore(molecule), cycle)
    return sum(
        (v - m) / s for v, m, s in zip(values, (2.457, -3.053, -0.0486), (1.434, 0.834, 0.286), strict=True)
    )


def graph(smiles: str) -> Graph | None:
    """Return a molecule as a graph; None when its atoms have no published type."""
    molecule = Chem.MolFromSmiles(smiles)
    label = scores(molecule)
    Chem.Kekulize(molecule, clearAromaticFlags=True)
    names = [_name(atom) for atom in molecule.GetAtoms()]
    if set(names) - set(ATOMS):
        return None
    ends = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in molecule.GetBonds()]
    kinds = [int(b.GetBondTypeAsDouble()) for b in molecule.GetBonds()]
    edges = torch.tensor([*ends, *(end[::-1] for end in ends)]).T
    types = torch.tensor([ATOMS.index(name) for name in names])
    return Graph(types, edges, torch.tensor([[label]]), torch.tensor(kinds * 2))


def _name(atom: Chem.Atom) -> str:
    hydrogens, charge = atom.GetNumExplicitHs(), atom.GetFormalCharge()
    parts = [atom.GetSymbol(), f"H{hydrogens}" * (hydrogens > 0), {0: "", 1: "+", -1: "-"}.get(charge, "?")]
    return " ".join(part for part in parts if part)


def made_again(folder: Path, part: str, list_name: str) -> tuple[Graphs, set[int]]:
    """Return a published part, whose graphs are made again from SMILES and compared, and its lines."""
    published = load_npz(folder / f"zinc12k_{part}.npz")
    lines = (folder / list_name).read_text().split("\n")
    chosen = [int(word) for word in (folder / f"zinc12k_{part}.index").read_text().split(",")]
    same, far = 0, []
    for number, line in enumerate(chosen):
        made, there = graph(lines[line].split()[0]), published[number]
        far.append(abs(made.y.item() - there.y.item()) if made else np.inf)
        same += made is not None and signature(made) == signature(there)
    print(
        f"{part}: {same} of {len(chosen)} graphs have the published atoms, neighbours and valences; labels "
        f"differ by {np.median(far):.4f} (median), by more than .05 in {(np.array(far) > 0.05).sum()}"
    )
    return published, set(chosen)


def signature(each: Graph) -> list[tuple[int, ...]]:
    """Return what does not depend on the numbering nor on where double bonds stand in an aromatic ring.

    Of every atom its type, the sum of its bonds, and the types of its neighbours.
    """
    rows: list[list[int]] = [[int(kind), 0] for kind in each.x]
    for (source, target), kind in zip(each.edge_index.T.tolist(), each.edge_attr.tolist(), strict=True):
        rows[target][1] += kind
        rows[target].append(int(each.x[source]))
    return sorted((*row[:2], *sorted(row[2:])) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("molecules", type=Path, help="folder of zinc12k_val.npz and the lists of SMILES")
    parser.add_argument("out", type=Path, help="file of graphs that is written")
    parser.add_argument("--count", type=int, default=10_000, help="molecules to learn from")
    given = parser.parse_args()
    rdBase.DisableLog("rdApp.*")
    validation, taken = made_again(given.molecules, "val", "zinc_jtnn_valid.smi.txt")
    test, _ = made_again(given.molecules, "test", "zinc_jtnn_test.smi.txt")
    lines = (given.molecules / "zinc_jtnn_valid.smi.txt").read_text().split()
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()
    made: list[Graph] = []
    for line in (line for line in order if line not in taken):
        if len(made) == given.count:
            break
        if (each := graph(lines[line])) is not None:
            made.append(each)
    types = {"node_types": (len(ATOMS),), "edge_types": (4,)}
    train = flat("ZINC molecules", "regression", made, **types)
    parts = {"train": train, "validation": validation, "test": test}
    whole = joined("ZINC molecules", parts)
    save_npz(given.out, whole)
    print(whole.text())


if __name__ == "__main__":
    main()
