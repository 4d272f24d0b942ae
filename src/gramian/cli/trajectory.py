"""`gramian trajectory`: the path that training took, read off checkpoints."""

import tyro
from rich.console import Console

from gramian.ranks import is_main
from gramian.tasks import trajectory as task
from gramian.tasks.trajectory_files import write_report
from gramian.tasks.trajectory_words import sentences, terminal_tables


def trajectory(config: tyro.conf.OmitArgPrefixes[task.TrajectoryConfig], overwrite: bool = False) -> None:
    """Show how training moved through parameter space: its directions, lengths, bends and dead ends.

    Reads a series of checkpoints without loading any whole. A stopped analysis goes on where it was.

    Args:
        config: the checkpoints, and what to do about differences between them.
        overwrite: replace the analysis in the output folder.
    """
    console = Console(markup=False)
    courses = task.trajectory(config, overwrite=overwrite, console=console)
    if not is_main():
        return
    path = write_report(courses, config, overwrite=overwrite)
    for table in terminal_tables(courses):
        console.print(table)
    for course in courses:
        for remark in course.remarks:
            console.print(f"note: {remark}", markup=False, highlight=False, soft_wrap=True)
    for sentence in sentences(courses):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {path}", markup=False, soft_wrap=True)
