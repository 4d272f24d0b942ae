"""`gramian predict`: whether a network will train, before it is trained."""

import tyro
from rich.console import Console

from gramian.tasks import predict as task
from gramian.tasks.predict_page import check_free, sentences, terminal_table, write_report


def predict(
    config: tyro.conf.OmitArgPrefixes[task.PredictConfig], overwrite: bool = False, sde: bool = False
) -> None:
    """Follow variances, correlations and gradients through depth: infinite width, and finite networks.

    Args:
        config: the network, and how to look at it.
        overwrite: replace the prediction in the output folder.
        sde: follow the covariance of tokens in a shaped transformer by its SDE instead;
            `gramian predict --sde --help` shows the settings of that.
    """
    assert not sde, "read before: it is a command of its own"
    console = Console(markup=False)
    check_free(config.folder, overwrite)
    prediction = task.predict(config, console)
    path = write_report(prediction, config, overwrite=overwrite)
    console.print(terminal_table(prediction))
    for sentence in sentences(prediction):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {path}", markup=False, soft_wrap=True)
