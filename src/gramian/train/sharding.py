"""Parameters cut up over processes (FSDP2): cutting, gathering, clipping."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gramian.errors import InputError

CUTTABLE = ("adamw",)
"""The optimisers to which a part of a parameter is enough, and whose arithmetic takes one."""


def check(optimiser: str) -> None:
    """Raise InputError for an optimiser that needs whole matrices, and for a torch that is too old."""
    if optimiser not in CUTTABLE:
        raise InputError(
            f"{optimiser} cannot train parameters that FSDP cuts up over processes; "
            f"take {' or '.join(CUTTABLE)}, or start without FSDP"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        raise InputError(f"FSDP needs torch 2.7 or newer, this is {torch.__version__}")


def shard_(model: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device) -> None:
    """Cut a model's parameters and what its optimiser keeps about them up over all processes, in place.

    Row i of a parameter (its first axis) lies on one process; a parameter without axes is on all of them, and
    `clip_` averages its gradient. The modules of the model's outermost lists are gathered one at a time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    before = dict(model.named_parameters())
    for parameter in before.values():
        shared = parameter.data.to(device)
        dist.broadcast(shared, 0)
        parameter.data.copy_(shared)
    scalars = {parameter for parameter in before.values() if parameter.ndim == 0}
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*_units(model), model):
        fully_shard(module, mesh=mesh, ignored_params=scalars)
    for scalar in scalars:
        scalar.data = scalar.data.to(device)
    now = dict(model.named_parameters())
    _follow(optimiser, {parameter: now[name] for name, parameter in before.items()})


class Whole(nn.Module):
    """The whole parameters and buffers of a model that is cut up, under its names, as when last gathered."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._cut, self._held = (model,), {}  # a tuple, so that it does not become a part of this one

    def gather(self, *, keep: bool) -> None:
        """Gather them in the host's memory; without `keep` the process only helps the others.

        All processes have to ask for it.
        """
        found: dict[int, Tensor] = {}
        self._held: dict[str, Tensor] = {}
        for name, value in self._cut[0].state_dict(keep_vars=True).items():
            if id(value) not in found:
                tensor = gathered(value.detach())
                found[id(value)] = nn.Parameter(tensor, value.requires_grad) if keep else tensor.new_empty(0)
            self._held[name] = found[id(value)]

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        """Return all tensors; tied ones are one."""
        return {name: value.detach() for name, value in self._held.items()}

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Give the parameters, tied ones once."""
        for name, _ in self._cut[0].named_parameters():
            held = self._held[name]
            assert isinstance(held, nn.Parameter)
            yield name, held


def whole(model: nn.Module, *, keep: bool) -> nn.Module:
    """Return a model, or one's whole parameters if it is cut up, on the processes that keep them.

    All processes have to ask for it.
    """
    if not any(hasattr(module, "unshard") for module in model.modules()):
        return model
    gathering = Whole(model)
    gathering.gather(keep=keep)
    return gathering


def gathered(value: Tensor) -> Tensor:
    """Return a tensor with the parts of all processes, in the host's memory; one that is whole as it is.

    All processes have to ask for it.
    """
    full = getattr(value, "full_tensor", None)
    return value if full is None else torch.empty(value.shape, dtype=value.dtype).copy_(full())


def clip_(model: nn.Module, largest: float) -> Tensor:
    """Bound the norm of a gradient that is cut up over processes, and return what it was.

    ‖g‖² = Σ_processes ‖g_part‖² + Σ_scalars g²,   g of a scalar its mean over the processes
    """
    parts, scalars = _gradients(model)
    for scalar in scalars:
        dist.all_reduce(scalar)
        scalar /= dist.get_world_size()
    square = torch.stack([part.square().sum() for part in parts]).sum()
    dist.all_reduce(square)
    norm = torch.stack([square, *(scalar.square() for scalar in scalars)]).sum().sqrt()
    factor = (largest / (norm + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_ has it
    for gradient in (*parts, *scalars):
        gradient *= factor
    return norm


def _gradients(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return this process's parts of the gradients, and those of parameters that are on all processes."""
    parts, scalars = [], []
    for parameter in model.parameters():
        if parameter.grad is not None:
            cut = hasattr(parameter.grad, "to_local")
            gradient: Any = parameter.grad
            (parts if cut else scalars).append(gradient.to_local() if cut else gradient)
    return parts, scalars


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """Give the modules of the outermost lists and sequences."""
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from (module for module in child if any(True for _ in module.parameters()))
        else:
            yield from _units(child)


def _follow(optimiser: torch.optim.Optimizer, renewed: dict[Tensor, Tensor]) -> None:
    """Let an optimiser go on with the parameters that took the place of its own."""
    groups: list[dict[str, Any]] = []
    for group in optimiser.param_groups:
        parameters = [renewed[parameter] for parameter in group["params"]]
        for cut in (True, False):  # its fused arithmetic takes no mixture
            some = [parameter for parameter in parameters if hasattr(parameter, "to_local") == cut]
            groups += [{**group, "params": some}] if some else []
    state = {
        renewed[parameter]: {name: _like(value, renewed[parameter]) for name, value in kept.items()}
        for parameter, kept in optimiser.state.items()
    }
    optimiser.param_groups = groups
    optimiser.state = defaultdict(dict, state)


def _like(value: Any, parameter: Any) -> Any:
    """Return what an optimiser keeps about a parameter, where the parameter is, cut up as it is."""
    from torch.distributed.tensor import distribute_tensor

    if not isinstance(value, Tensor):
        return value
    value = value.to(parameter.device)
    if not hasattr(parameter, "to_local") or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
