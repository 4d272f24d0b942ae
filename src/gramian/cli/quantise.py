"""`gramian quantise`: what smaller numbers do to a language model."""

import tyro
from rich.console import Console

from gramian.tasks import quantise as task
from gramian.tasks.quantise_page import layers_table, schemes_table, sentences, write_report


def quantise(config: tyro.conf.OmitArgPrefixes[task.QuantiseConfig]) -> None:
    """Say what int8, int4 and FP8 do to a language model's loss, size and speed, and which layer suffers.

    Args:
        config: the model, the text, the schemes, and where results and the model in integers go.
    """
    console = Console(markup=False)
    found = task.quantise(config, console=console)
    path = None if config.output is None else write_report(found, config.output)
    console.print(schemes_table(found))
    if found.layers:
        console.print(layers_table(found))
    for sentence in sentences(found):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    for what, where in (("report", path), ("exported model", config.export)):
        if where is not None:
            console.print(f"{what}: {where}", markup=False, highlight=False, soft_wrap=True)
