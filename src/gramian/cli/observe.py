"""`gramian observe`: what goes on inside a language model."""

import tyro
from rich.console import Console

from gramian.tasks import observe as task
from gramian.tasks.observe_page import sentences, terminal_table, write_report


def observe(config: tyro.conf.OmitArgPrefixes[task.ObserveConfig], overwrite: bool = False) -> None:
    """Show layer by layer where a language model has outlier neurons, collapsing tokens and attention sinks.

    Args:
        config: the model, the text, and how to read.
        overwrite: replace the observation in the output folder.
    """
    console = Console(markup=False)
    observation = task.observe(config, overwrite=overwrite, console=console)
    path = write_report(observation, overwrite=overwrite)
    console.print(terminal_table(observation))
    for sentence in sentences(observation):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {path}", markup=False, soft_wrap=True)
