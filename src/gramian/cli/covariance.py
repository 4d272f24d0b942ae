"""`gramian predict --sde`: correlations and norms of tokens in a shaped transformer, before it is trained."""

import tyro
from rich.console import Console

from gramian.ranks import is_main, on_main
from gramian.tasks import covariance as task
from gramian.tasks.covariance_page import check_free, sentences, terminal_table, write_report


def predict_covariance(
    config: tyro.conf.OmitArgPrefixes[task.CovarianceConfig], overwrite: bool = False
) -> None:
    """Follow correlations and norms of tokens through a shaped transformer: the limiting SDE, and networks.

    Args:
        config: the network, and how to look at it.
        overwrite: replace the prediction in the output folder.
    """
    console = Console(markup=False)
    on_main(lambda: check_free(config.folder, overwrite))
    prediction = task.predict_covariance(config, console)
    if not is_main():
        return
    path = write_report(prediction, config, overwrite=overwrite)
    console.print(terminal_table(prediction))
    for sentence in sentences(prediction, config):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {path}", markup=False, soft_wrap=True)
