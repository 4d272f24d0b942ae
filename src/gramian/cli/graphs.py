"""`gramian graphs`: networks trained on graphs, filtered by distance and beside it standard ones."""

import tyro
from rich.console import Console

from gramian.tasks import graphs as task
from gramian.tasks.graphs_page import PREDICTIONS, REPORT, write_report
from gramian.tasks.graphs_words import sentences, terminal_table


def graphs(
    config: tyro.conf.OmitArgPrefixes[task.GraphsConfig], resume: bool = False, overwrite: bool = False
) -> None:
    """Learn from graphs to predict a number or class of each or of its nodes, far neighbours included.

    Args:
        config: the graphs, the networks, and how they are trained.
        resume: go on with a run that was stopped; networks that are trained are not trained again.
        overwrite: replace the run of that name.
    """
    console = Console(markup=False)
    found = task.train_graphs(config, resume=resume, overwrite=overwrite, console=console)
    with console.status("writing the report"):
        folder = write_report(found, config)
    console.print(terminal_table(found, config))
    for sentence in sentences(found, config):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    for what, name in (("predictions", PREDICTIONS), ("report", REPORT)):
        if (folder / name).exists():
            console.print(f"{what}: {folder / name}", markup=False, highlight=False, soft_wrap=True)
