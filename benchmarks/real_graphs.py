"""Networks on graphs of real data: filtered by distance beside standard layers, in one loop, of equal size.

    python benchmarks/real_graphs.py THEME --data FILE --parameters 100000 --seeds 0 1 2 ...

Takes the options of `gramian graphs`; all five networks are trained unless some are named. Every network has
the same number of layers, at most the same number of parameters, the same epochs and the same learning rates
on trial, of which each keeps the one that is best on the validation part with the first seed. What a stopped
run has done is not done again. The table is written as results of the theme. Beside labels of molecules read
from a .csv file stands what boosted trees make of the fingerprints of the same molecules, with no tuning.
"""

import csv
import gzip
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from side_by_side import write_results

from gramian.tasks.graph_models import GRED, MODELS
from gramian.tasks.graph_scores import LOWER
from gramian.tasks.graphs import Comparison, GraphsConfig, spread, train_graphs

DEFAULT = GraphsConfig(compare=tuple(name for name in MODELS if name != GRED))


def lines(found: Comparison, config: GraphsConfig, splits: int) -> list[str]:
    architecture, schedule = config.architecture, config.schedule
    side = "less" if found.metric in LOWER else "more"
    rates = ", ".join(f"{rate:g}" for rate in schedule.learning_rates)
    rows = [
        found.graphs.text() + ".",
        f"{len(found.split.train):,} graphs to learn from, {len(found.split.validation):,} to choose by, "
        f"{len(found.split.test):,} to report on. {architecture.layers} layers, filters look {found.hops} "
        f"hops far, {schedule.epochs} epochs, batches of {schedule.batch}, rates on trial {rates}, decay "
        f"{schedule.weight_decay:g}, dropout {architecture.dropout:g}, read-out {architecture.readout}, "
        f"positions {architecture.encoding}. Mean ± standard deviation over {splits} split"
        f"{'s' * (splits > 1)} and {len(config.seeds)} seed{'s' * (len(config.seeds) > 1)} of each; "
        f"{side} {found.metric} is better; the best constant has {found.constant:.4f}.",
        "",
        f"| network | parameters | rate | test {found.metric} | validation | best epoch | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, outcomes in found.outcomes.items():
        if not outcomes:
            rows.append(f"| {model} | diverged |")
            continue
        test, validation = spread([o.test for o in outcomes]), spread([o.validation for o in outcomes])
        epoch, seconds = spread([o.epoch for o in outcomes])[0], spread([o.seconds for o in outcomes])[0]
        rows.append(
            f"| {model} | {outcomes[0].parameters:,} | {outcomes[0].learning_rate:g} | {test[0]:.4f} ± "
            f"{test[1]:.4f} | {validation[0]:.4f} ± {validation[1]:.4f} | {epoch:.0f} | {seconds:.0f} |"
        )
    return rows


def fingerprints(path: Path, rows: np.ndarray) -> np.ndarray:
    """Return counts of substructures of up to three bonds around an atom, hashed to 2,048 columns."""
    from rdkit.Chem import MolFromSmiles, rdFingerprintGenerator

    with gzip.open(path, "rt", encoding="utf-8") as lines:
        smiles = [row["smiles"] for row in csv.DictReader(lines)]
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=3, fpSize=2048)
    return np.stack([generator.GetCountFingerprintAsNumPy(MolFromSmiles(smiles[row])) for row in rows])


def boosted(found: Comparison, path: Path) -> str:
    """Return the average precision of boosted trees on fingerprints, a forest of its own for each label."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import average_precision_score

    train, test = found.split.train.numpy(), found.split.test.numpy()
    x, new, y = fingerprints(path, train), fingerprints(path, test), found.graphs.y.numpy()
    scores = []
    for label in range(y.shape[1]):
        if len(set(y[train, label])) == len(set(y[test, label])) == 2:
            trees = HistGradientBoostingClassifier(random_state=0).fit(x, y[train, label])
            scores.append(average_precision_score(y[test, label], trees.predict_proba(new)[:, 1]))
    return f"| boosted trees on fingerprints | | | {np.mean(scores):.4f} | | | |"


def over_folds(config: GraphsConfig, folds: tuple[int, ...]) -> Comparison:
    """Train on every fold and put the outcomes of each network together."""
    console, parts = Console(), []
    for fold in folds:
        source = replace(config.source, fold=fold)
        parts.append(
            train_graphs(
                replace(config, source=source, name=f"{config.name}-{fold}"), resume=True, console=console
            )
        )
    outcomes = {name: tuple(o for part in parts for o in part.outcomes[name]) for name in config.models}
    return replace(parts[0], outcomes=outcomes, constant=mean(part.constant for part in parts))


def main(
    theme: Annotated[str, tyro.conf.Positional],
    config: tyro.conf.OmitArgPrefixes[GraphsConfig] = DEFAULT,
    folds: tuple[int, ...] = (),
) -> None:
    found = over_folds(config, folds or (config.source.fold,))
    packages = {name: __import__(name).__version__ for name in ("torch_geometric",)}
    rows, path = lines(found, config, max(len(folds), 1)), Path(config.source.data)
    if path.name.endswith(".csv.gz") and found.graphs.task == "multilabel":
        rows.append(boosted(found, path))
    write_results(theme, rows, packages)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes))
