"""`gramian prune`: which weights to keep, what that costs, and what is certain about it."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from gramian.compress.learning import Estimate, Learnt
from gramian.errors import InputError
from gramian.ranks import is_main
from gramian.tasks.pruning import Plan, Start
from gramian.tasks.pruning_data import Data
from gramian.tasks.pruning_networks import NETWORKS
from gramian.tasks.pruning_page import write_report
from gramian.tasks.pruning_run import Dense, PruneConfig, prune_classifier
from gramian.tasks.pruning_text import CERTIFIED, TextPruning, prune_text
from gramian.tasks.pruning_windows import Amount
from gramian.tasks.pruning_words import sentences, terminal_table
from gramian.train.run import SETTINGS


def prune(
    model: Annotated[str, tyro.conf.Positional] = "mlp",
    data: Path | None = None,
    labels: Path | None = None,
    target: str | None = None,
    leave_out: tuple[str, ...] = (),
    header: bool | None = None,
    count: int | None = None,
    density: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05),
    certify: bool = False,
    prior_fraction: float = 0.5,
    start: Start = "magnitude",
    structure: str = "weights",
    learn: Learnt | None = None,
    estimator: Estimate = "moments",
    steps: int | None = None,
    widths: tuple[int, ...] = (),
    train_steps: int = 1500,
    posterior: Learnt | None = None,
    posterior_steps: int | None = None,
    bound: str = "kl",
    delta: float = 0.025,
    delta_sampling: float = 0.01,
    draws: int | None = None,
    test: float = 0.2,
    seed: int = 0,
    runs: Path = Path("runs"),
    name: str = "prune",
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Learn which weights of a classifier to keep, and certify the error of the random mask if wished.

    Args:
        model: mlp or cnn, trained here; or the run folder of a decoder that `gramian train` made.
        data: images (folder or IDX file in MNIST's format, or .npz), or a table (.csv, .tsv, .parquet, or
            .npz with X and y); scikit-learn's digits when not given. Of a decoder: text.
        labels: labels of an IDX file of images whose name does not tell.
        target: column of the table that holds the classes.
        leave_out: columns of the table that are not to be used.
        header: whether the first line of a .csv or .tsv names the columns; seen in the file when not given.
        count: most examples taken.
        density: share of the weights that is kept; several are pruned one after the other.
        certify: keep a bound set from the network and certify the random predictor with it.
        prior_fraction: share of the examples, held-out ones apart, which make the network and its prior.
        start: score of the mask to start from.
        structure: weights, neurons, or a pattern such as 2:4; of a decoder also heads.
        learn: masks, weights or both, on the expected loss before anything is certified; both of a
            classifier, masks of a decoder when not given.
        estimator: how the gradient of the expected loss is estimated.
        steps: steps of that; 1000, of a decoder 300 when not given.
        widths: features of hidden layers, or channels of convolutions.
        train_steps: steps that the network is trained before; none leaves it at random.
        posterior: what the certificate's posterior moves: masks, or Gaussian weights, or both; masks when
            not given.
        posterior_steps: steps on the bound; 500, of a decoder 20 when not given.
        bound: kl, quadratic, classic, lambda or catoni.
        delta: probability that the bound set misleads.
        delta_sampling: probability that the draws mislead.
        draws: masks drawn for the certificate; 1000, of a decoder 2000 when not given.
        test: share of the examples held out, where no test set comes with them.
        seed: of splits, networks, batches and masks.
        runs: folder of run folders.
        name: name of the run folder.
        resume: go on with a run that was stopped.
        overwrite: replace the run of this name.
    """
    console = Console(markup=False)
    decoder = model not in NETWORKS and (Path(model) / SETTINGS).exists()
    if model not in NETWORKS and not decoder:
        raise InputError(
            f"{model!r} is neither {' nor '.join(NETWORKS)}, nor a run folder of `gramian train`; use one of "
            "these, or gramian.tasks.pruning.prune for a module of your own"
        )
    text, images = TextPruning(run=Path(model)), PruneConfig()
    learning, moved = (text.learning, CERTIFIED) if decoder else (images.plan.learning, images.bounding)
    learning = replace(learning, mode=estimator, **_given(steps=steps, learn=learn))
    bounding = replace(
        moved,
        learning=replace(moved.learning, **_given(steps=posterior_steps, learn=posterior)),
        bound=bound,
        delta=delta,
        delta_sampling=delta_sampling,
        **_given(draws=draws),
    )
    shared: dict[str, Any] = {"densities": density, "runs": runs, "name": name}
    if decoder:
        of_tables = {"target": target, "leave_out": leave_out, "header": header is not None}
        for what, value in {"labels": labels, **of_tables, "count": count, "widths": widths}.items():
            if value:
                raise InputError(f"{what} is for classifiers; a decoder's run folder knows what it is")
        text = replace(
            text,
            amount=Amount(text=() if data is None else (data,)),
            start=start,
            structure=structure,
            learning=learning,
            bounding=bounding if certify else None,
            seed=seed,
            **shared,
        )
        found, folder = prune_text(text, console, resume=resume, overwrite=overwrite), text.folder
    else:
        images = PruneConfig(
            model=model,
            data=Data(
                data=data,
                labels=labels,
                target=target,
                leave_out=leave_out,
                header=header,
                count=count,
                test=test,
                seed=seed,
            ),
            dense=Dense(widths=widths, train_steps=train_steps),
            plan=Plan(start=start, structure=structure, learning=learning, seed=seed),
            certify=certify,
            prior_fraction=prior_fraction,
            bounding=bounding,
            **shared,
        )
        found, folder = prune_classifier(images, console, resume=resume, overwrite=overwrite), images.folder
    if not is_main():
        return
    page = write_report(found, folder)
    console.print(terminal_table(found))
    for sentence in sentences(found):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"pruned networks: {folder}/density-*", markup=False, highlight=False, soft_wrap=True)


def _given(**values: Any) -> dict[str, Any]:
    """Return the values that were given."""
    return {name: value for name, value in values.items() if value is not None}
