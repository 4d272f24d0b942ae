"""`gramian compare`: several blocks side by side, with a report."""

import tyro
from rich.console import Console

from gramian.tasks import compare as task
from gramian.tasks.compare_page import terminal_table, write_report


def compare(
    config: tyro.conf.OmitArgPrefixes[task.CompareConfig], resume: bool = False, overwrite: bool = False
) -> None:
    """Train several blocks side by side on text, watch their insides, quantise them, write a report.

    Args:
        config: what to read, build, train and compare.
        resume: go on with the comparison of this name from its newest checkpoints.
        overwrite: replace the comparison of this name.
    """
    console = Console()
    comparison = task.compare(config, resume=resume, overwrite=overwrite, console=console)
    console.print(terminal_table(comparison))
    console.print(f"report: {write_report(comparison)}", soft_wrap=True)
