"""Real int8 and int4: the linear layers of any network converted by torchao, their size, their speed."""

import copy
import logging
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gramian.errors import InputError, MissingExtraError

KINDS = {
    "int8_dynamic": "int8 weights a row, int8 inputs a token, the product in integers (W8A8)",
    "int8_weight": "int8 weights a row, inputs exact",
    "int4_weight": "int4 weights a group of inputs, inputs exact",
}
"""What torchao can make of a linear layer, by name."""

GROUP = 32
"""Weights of a row that share one scale and zero in int4, unless another group is asked for."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Conversion:
    """What of a network really computes with converted weights."""

    layers: tuple[str, ...]
    """Linear layers that were converted."""
    exact: tuple[str, ...]
    """Linear layers that were not."""
    share: float
    """Share of all the network's parameters that lie in converted weights."""


def convert(
    model: nn.Module, kind: str, *, exact: Collection[str] | None = None, group: int = GROUP
) -> nn.Module:
    """Return a copy of a network, in evaluation mode, whose linear layers compute with torchao's integers.

    int8_dynamic   y = s_x s_w (Q_x Q_wᵀ) + b,  s_x = max|x|/127.5 a token, s_w = max|w|/127.5 a row of W
    int8_weight    y = s_w (x Q_wᵀ) + b
    int4_weight    y = x Ŵᵀ + b,  Ŵ = s (Q − 8) + z,  Q in 0 … 15, one (s, z) for `group` weights of a row

    `exact` lists layers to leave alone, by full dotted name or by its last part. None leaves alone the layers
    whose matrix is shared with another module (a head tied to the embedding): converting one unties it, so
    that the network grows by its integers. The Conv1D of transformers' GPT-2, which torchao passes over,
    becomes a linear layer first.

    The model given is not changed; the copy reads the same memory for all that stays exact. Every linear
    layer beyond `exact` is converted, or the call fails.

    Shapes: the model's own.
    Raises: InputError for an unknown kind, when there is no layer to convert, and naming a layer that cannot
        be converted on its device, in its dtype or with its number of inputs or outputs; MissingExtraError
        without torchao.
    Holds: exactly, up to rounding of sums: |w − ŵ| ≤ s/2. On a CPU without integer dot products int8_dynamic
        takes half the range, s = max/63.5, as torchao advises.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind {kind!r}; accepted are {', '.join(KINDS)}")
    if isinstance(exact, str):
        raise InputError(f"exact must be a collection of layer names, got the one name {exact!r}")
    torchao = _torchao()
    copied = with_linears(model).eval()
    layers = _chosen(copied, tied(copied) if exact is None else exact)
    for name, layer in layers.items():
        if refusal := _refusal(layer, kind, group):
            raise InputError(f"layer {name!r} cannot become {kind}: {refusal}; list its name in exact")
    chosen = set(layers.values())
    device = next(iter(chosen)).weight.device
    torchao.quantize_(copied, _settings(kind, device, group), filter_fn=lambda layer, _: layer in chosen)
    if missed := set(layers) - set(converted(copied).layers):
        raise InputError(f"torchao left layer {min(missed)!r} as it was; list its name in exact")
    return copied


def converted(model: nn.Module) -> Conversion:
    """Return which linear layers hold converted weights, read off the weights themselves."""
    found = {True: [], False: []}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[is_traceable_wrapper_subclass(module.weight)].append(name)
    parameters = list(model.parameters())
    inside = sum(p.numel() for p in parameters if is_traceable_wrapper_subclass(p))
    total = sum(p.numel() for p in parameters)
    return Conversion(tuple(found[True]), tuple(found[False]), inside / total if total else 0.0)


def with_linears(model: nn.Module) -> nn.Module:
    """Return a copy that shares the model's weights, with each Conv1D of transformers as a linear layer.

    Conv1D keeps its weight as (in, out); the copy's linear layers hold the transpose.
    Holds: exactly, up to rounding of sums.
    """
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    copied = copy.deepcopy(model, shared)
    home = sys.modules.get("transformers.pytorch_utils")
    if home is None:  # then no model can have one
        return copied
    if isinstance(copied, home.Conv1D):
        return _linear(copied)
    made: dict[nn.Module, nn.Linear] = {}
    for name, module in list(copied.named_modules(remove_duplicate=False)):
        if isinstance(module, home.Conv1D):
            copied.set_submodule(name, made.setdefault(module, _linear(module)))
    return copied


def has_conv1d(model: nn.Module) -> bool:
    """Tell whether a network has layers of transformers' Conv1D, which only `convert` can convert."""
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and any(isinstance(module, home.Conv1D) for module in model.modules())


def _linear(convolution: Any) -> nn.Linear:
    inputs, outputs = convolution.weight.shape
    with torch.device("meta"):
        linear = nn.Linear(inputs, outputs)
    linear.weight = nn.Parameter(convolution.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = convolution.bias
    return linear.train(convolution.training)


def tied(model: nn.Module) -> list[str]:
    """Return the names of the linear layers whose weight another module holds too."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), set()).add(id(module))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and len(holders[id(module.weight)]) > 1
    ]


def untie(model: nn.Module) -> None:
    """Give every module its own copy of a parameter that it shares with an earlier one."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in seen and parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            seen.add(id(parameter))


def _chosen(model: nn.Module, exact: Collection[str]) -> dict[str, nn.Linear]:
    """Return the linear layers not listed."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not {name, name.rpartition(".")[2]} & set(exact)
    }
    if not layers:
        beyond = f" beyond those left exact ({', '.join(exact)})" if exact else ""
        raise InputError(f"the model has no linear layer to convert{beyond}")
    return layers


def _refusal(layer: nn.Linear, kind: str, group: int) -> str:
    """Say why torchao cannot convert a layer, or nothing."""
    weight = layer.weight
    outputs, inputs = weight.shape
    if type(layer).forward is not nn.Linear.forward:
        return f"its class {type(layer).__name__} changes how a linear layer computes"
    if is_traceable_wrapper_subclass(weight):
        return "it is converted already"
    if weight.dtype not in DTYPES:
        return f"torchao takes float32, bfloat16 and float16, not {str(weight.dtype).removeprefix('torch.')}"
    if not bool(weight.isfinite().all()):
        return "it has a weight that is not finite"
    if kind != "int4_weight":
        return ""
    if group not in (32, 64, 128):
        return f"a group has 32, 64 or 128 weights, not {group}"
    if inputs % group:
        return f"its {inputs} inputs do not divide into groups of {group}"
    if weight.device.type == "cpu":
        return f"its {outputs} outputs are no multiple of 16" if outputs % 16 else ""
    if weight.device.type == "cuda":
        return "" if weight.dtype == torch.bfloat16 else "on cuda int4 takes bfloat16 only"
    return f"torchao has no int4 for the device {weight.device.type}"


def _settings(kind: str, device: torch.device, group: int) -> Any:
    """Return torchao's configuration of a kind; inductor's global settings are left alone."""
    torchao = _torchao()
    if kind == "int8_dynamic":
        from torchao.utils import should_reduce_range

        return torchao.Int8DynamicActivationInt8WeightConfig(
            set_inductor_config=False, reduce_range=should_reduce_range(device)
        )
    if kind == "int8_weight":
        return torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    if device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)
    return torchao.Int4WeightOnlyConfig(
        group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )


class _Expected(logging.Filter):
    """Drops what importing torchao logs on every machine without its optional kernels."""

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        kernel = said.startswith("Failed to load") and "/_C" in said
        return not (kernel or "is an Enum subclass and is now natively supported" in said)


_EXPECTED = _Expected()


def quieten() -> None:
    """Keep torchao's import, also from within transformers, from logging kernels that it does not need."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).addFilter(_EXPECTED)


def _torchao() -> Any:
    """Return the package torchao.quantization.

    Raises: MissingExtraError without torchao.
    """
    quieten()
    try:
        import torchao.quantization
    except ImportError as error:
        raise MissingExtraError('real int8 and int4 need torchao: pip install "gramian[quant]"') from error
    return torchao.quantization


def version() -> dict[str, str]:
    """Return the version of torchao, or nothing where it is not installed."""
    try:
        return {"torchao": metadata.version("torchao")}
    except metadata.PackageNotFoundError:
        return {}


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Return every plain tensor that a network keeps, each once: those of a converted weight by its parts.

    `layer.weight` of integers q and scales s becomes `layer._weight_qdata` and `layer._weight_scale`, as in
    torchao's own files.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in _state(model).items():
        if is_traceable_wrapper_subclass(tensor):
            layer, _, own = name.rpartition(".")
            prefix = f"{layer}._{own}_" if layer else f"_{own}_"
            for part in tensor.__tensor_flatten__()[0]:
                plain[prefix + part] = getattr(tensor, part).detach()
        else:
            plain[name] = tensor
    return plain


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state without the second and later names of a shared tensor."""
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach()
    return state


def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors that `stored` gave into a network converted in the same way.

    Raises: InputError naming a tensor that is missing, unknown, or of another shape or dtype.
    """
    places = stored(model)
    wrong = [
        *(f"lacks {name}" for name in places.keys() - tensors.keys()),
        *(f"also holds {name}" for name in tensors.keys() - places.keys()),
        *(
            f"has {name} as {_described(tensors[name])}, not {_described(place)}"
            for name, place in places.items()
            if name in tensors and _described(tensors[name]) != _described(place)
        ),
    ]
    if wrong:
        raise InputError(f"what was saved {min(wrong)} ({len(wrong)} such differences)")
    for name, place in places.items():
        place.copy_(tensors[name])


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def transformers_config(kind: str, device: torch.device, exact: Collection[str]) -> Any:
    """Return the entry of a transformers configuration that says how an int8 folder was converted."""
    quieten()
    from transformers import TorchAoConfig

    return TorchAoConfig(_settings(kind, device, GROUP), modules_to_not_convert=list(exact))


def transformers_metadata(model: nn.Module) -> dict[str, str]:
    """Return what a safetensors file of `stored` tensors must say so that transformers opens it as int8."""
    _torchao()
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    state: Any = _state(model)  # annotated as nested there, and read as it is here
    return flatten_tensor_state_dict(state)[1]


def size(model: nn.Module) -> int:
    """Return the bytes of everything that a network keeps: integers, scales and what stayed exact.

    A tensor that two modules share counts once; buffers that are never saved do not count.
    """
    return sum(tensor.nbytes for tensor in stored(model).values())


def seconds(
    models: Mapping[str, Callable[..., Any]], batch: Mapping[str, Tensor], *, rounds: int = 5, warmup: int = 1
) -> dict[str, list[float]]:
    """Return the seconds that each network took for a batch in each round, all of them in turn.

    Ratios within a round are fair on a machine whose speed wanders; take their median (`times_faster`).
    """
    taken: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(warmup + rounds):
        for name, model in models.items():
            elapsed = _elapsed(model, batch)
            if turn >= warmup:
                taken[name].append(elapsed)
    return taken


def times_faster(taken: Mapping[str, list[float]], than: str) -> dict[str, float]:
    """Return how many times faster than one network each is, the median over rounds of their ratio."""
    return {
        name: statistics.median(base / own for base, own in zip(taken[than], of_one, strict=True))
        for name, of_one in taken.items()
    }


@torch.no_grad()
def _elapsed(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> float:
    devices = {tensor.device for tensor in batch.values() if tensor.is_cuda}
    for device in devices:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    model(**batch)
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
