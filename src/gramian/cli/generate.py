"""`gramian generate`: text from a trained decoder."""

import tyro

from gramian.tasks import generate as task


def generate(config: tyro.conf.OmitArgPrefixes[task.GenerateConfig]) -> None:
    """Continue a prompt with a trained model.

    Args:
        config: the run, the prompt, and how to draw.
    """
    for continuation in task.generate(config):
        print(config.prompt + continuation)
        if config.samples > 1:
            print("-" * 40)
