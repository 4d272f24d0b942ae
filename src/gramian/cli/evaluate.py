"""`gramian evaluate`: how well a trained model predicts a text."""

import math

import tyro
from rich.console import Console

from gramian.tasks import evaluate as task


def evaluate(config: tyro.conf.OmitArgPrefixes[task.EvaluateConfig]) -> None:
    """Say how well a trained model predicts a text, read whole and in order.

    Args:
        config: the run and the text.
    """
    console = Console(markup=False)
    result = task.evaluate(config, console=console)
    token = "token" if result["objective"] == "causal" else "hidden token"
    console.print(
        f"loss {result['loss']:.4f} nats/{token} (perplexity {math.exp(min(result['loss'], 700)):.2f}), "
        f"{result['bits_per_byte']:.4f} bits/byte over {result['predicted_tokens']:,} tokens",
        highlight=False,
        soft_wrap=True,
    )
    left = f"; {result['left_out_documents']:,} beyond max_bytes left out"
    console.print(
        f"documents: {result['documents']:,}" + (left if result["left_out_documents"] else ""),
        highlight=False,
    )
