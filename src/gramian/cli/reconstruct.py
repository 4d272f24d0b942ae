"""`gramian reconstruct`: a scan of few views in, an image with error bars out."""

import tyro
from rich.console import Console

from gramian.tasks import reconstruct as task
from gramian.tasks.reconstruction_files import IMAGE, STD
from gramian.tasks.reconstruction_page import REPORT, write_report
from gramian.tasks.reconstruction_words import sentences, terminal_table


def reconstruct(
    config: tyro.conf.OmitArgPrefixes[task.ReconstructConfig], resume: bool = False, overwrite: bool = False
) -> None:
    """Reconstruct an image with error bars from the views of a CT scan, beside classical methods.

    Args:
        config: the scan, the method, and how it is fitted and doubted.
        resume: go on with a run that was stopped.
        overwrite: replace the run of that name.
    """
    console = Console(markup=False)
    found = task.reconstruct_scan(config, console, resume=resume, overwrite=overwrite)
    with console.status("writing the report"):
        folder = write_report(found, config)
    console.print(terminal_table(found, config))
    for sentence in sentences(found, config):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    for what, name in (("image", IMAGE), ("standard deviation", STD), ("report", REPORT)):
        if (folder / name).exists():
            console.print(f"{what}: {folder / name}", markup=False, highlight=False, soft_wrap=True)
