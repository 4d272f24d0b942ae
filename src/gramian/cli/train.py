"""`gramian train`: one language model."""

import tyro
from rich.console import Console

from gramian.ranks import is_main
from gramian.tasks import language


def train(
    config: tyro.conf.OmitArgPrefixes[language.TrainConfig], resume: bool = False, overwrite: bool = False
) -> None:
    """Train one language model on text, watched from inside.

    Args:
        config: what to read, build and train.
        resume: go on with the run of this name from its newest checkpoint.
        overwrite: replace the run of this name.
    """
    console = Console(markup=False)
    run = language.train(config, resume=resume, overwrite=overwrite, console=console)
    if not is_main():
        return
    result = run.result() or {}
    console.print(
        f"{config.block}: validation loss {result['validation_loss']:.4f} nats/token, "
        f"{result['bits_per_byte']:.4f} bits/byte, {result['tokens_per_second']:,.0f} tokens/s"
    )
    console.print(f"run folder: {run.folder}", soft_wrap=True)
