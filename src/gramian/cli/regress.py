"""`gramian regress`: a number predicted from the other columns of a table, with an interval."""

import tyro
from rich.console import Console

from gramian.ranks import is_main, on_main
from gramian.tasks import regression as task
from gramian.tasks.predict_page import UNFINISHED
from gramian.tasks.regression_page import PREDICTIONS, check_place, sentences, terminal_table, write_report


def regress(config: tyro.conf.OmitArgPrefixes[task.RegressConfig], overwrite: bool = False) -> None:
    """Predict a number with an interval from the other columns of a table, and say how far to trust it.

    A regression that was stopped goes on where it was.

    Args:
        config: the table, and how to learn from it.
        overwrite: replace the regression in the output folder.
    """
    console = Console(markup=False)
    on_main(lambda: check_place(config, overwrite))
    found = task.regress(config, console, keep=config.folder / UNFINISHED)
    if not is_main():
        return
    folder = write_report(found, config, overwrite=overwrite)
    console.print(terminal_table(found, config))
    for sentence in sentences(found, config):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    for what, name in (("predictions", PREDICTIONS), ("report", "report.html")):
        console.print(f"{what}: {folder / name}", markup=False, highlight=False, soft_wrap=True)
