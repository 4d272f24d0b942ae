"""`gramian list`: the names that configurations take."""

from rich.console import Console
from rich.table import Table

from gramian.nn.activations import ACTIVATIONS
from gramian.nn.blocks import BLOCKS
from gramian.nn.norms import NORMS
from gramian.train.optimisers import OPTIMISERS
from gramian.train.schedule import SCHEDULES


def list_names() -> None:
    """List the blocks, norms, activations, optimisers and schedules by name."""
    console = Console()
    table = Table("block", "what it is")
    for name, function in BLOCKS.items():
        table.add_row(name, (function.__doc__ or "").split("\n", 1)[0])
    console.print(table)
    kinds = {"norms": NORMS, "activations": ACTIVATIONS, "optimisers": OPTIMISERS, "schedules": SCHEDULES}
    for kind, names in kinds.items():
        console.print(f"{kind}: {', '.join(names)}")
