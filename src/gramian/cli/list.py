"""`gramian list`: the names that configurations take."""

from rich.console import Console
from rich.table import Table

from gramian.data.graph_generators import GENERATORS
from gramian.nn.activations import ACTIVATIONS
from gramian.nn.blocks import BLOCKS
from gramian.nn.norms import NORMS
from gramian.tasks.graph_models import MODELS
from gramian.train.optimisers import OPTIMISERS
from gramian.train.schedule import SCHEDULES


def list_names() -> None:
    """List the blocks, graphs, norms, activations, optimisers and schedules by name."""
    console = Console(markup=False)
    for kind, functions in (("block", BLOCKS), ("graphs", GENERATORS)):
        table = Table(kind, "what it is")
        for name, function in functions.items():
            table.add_row(name, (function.__doc__ or "").split("\n", 1)[0])
        console.print(table)
    kinds = {
        "norms": NORMS,
        "activations": ACTIVATIONS,
        "optimisers": OPTIMISERS,
        "schedules": SCHEDULES,
        "networks on graphs": MODELS,
    }
    for kind, names in kinds.items():
        console.print(f"{kind}: {', '.join(names)}")
