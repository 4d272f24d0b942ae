"""Which torch functions and modules compute what, by name: the vocabulary of the simulation."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

PRODUCTS = {
    "linear": ("input", "weight", "bias"),
    "conv1d": ("input", "weight", "bias"),
    "conv2d": ("input", "weight", "bias"),
    "conv3d": ("input", "weight", "bias"),
    "matmul": ("input", "other"),
    "mm": ("input", "mat2"),
    "bmm": ("input", "mat2"),
    "addmm": ("input", "mat1", "mat2"),
    "baddbmm": ("input", "batch1", "batch2"),
    "einsum": (),
}
"""Functions that multiply two tensors and sum, with the names of their first arguments."""

ACTIVATIONS = {
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "glu"),
    *("sigmoid", "logsigmoid", "hardsigmoid", "hardswish", "hardtanh", "tanh", "erf", "softplus", "softsign"),
}
"""Elementwise non-linearities."""

KINDS = {
    **dict.fromkeys(PRODUCTS, "product"),
    **dict.fromkeys(ACTIVATIONS, "activation"),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"), "norm"),
    **dict.fromkeys(("add", "sub", "addcmul"), "sum"),
    **dict.fromkeys(("mul", "div"), "scaling"),
    **dict.fromkeys(("where", "masked_fill", "max", "maximum"), "masking"),
    **dict.fromkeys(("clamp", "clip"), "clipping"),
    "softmax": "softmax",
    "embedding": "embedding",
    "scaled_dot_product_attention": "attention",
    "multi_head_attention_forward": "composite",
}
"""What a function is to the simulation."""

REFUSED = {
    *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    *("bilinear", "embedding_bag", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}
"""Functions that multiply by weights where nothing can be quantised in between."""

VIEWS = {
    *("view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone"),
    *("transpose", "permute", "swapaxes", "movedim", "t", "get", "to", "type", "type_as", "float", "double"),
    *("half", "bfloat16", "detach", "dropout", "dropout1d", "dropout2d", "feature_dropout", "alpha_dropout"),
}
"""Functions that keep all values as they are."""

PARTS = {
    *("getitem", "split", "chunk", "unbind", "select", "narrow", "index_select", "gather", "roll", "flip"),
    *(
        "masked_fill",
        "expand",
        "expand_as",
        "repeat",
        "repeat_interleave",
        "cat",
        "stack",
        "pad",
        "neg",
        "tensor_split",
    ),
}
"""Functions that keep some values as they are, repeat them, or change their sign."""

QUERIES = {"get", "size", "dim", "stride", "numel", "is_floating_point", "is_contiguous", "get_device"}
"""What only asks for properties of a tensor."""


def name_of(function: Callable) -> str:
    """Return the plain name of a function, whether it is called in place, by an operator or as a property."""
    name = getattr(function, "__name__", "").strip("_")
    return {"iadd": "add", "isub": "sub", "radd": "add", "rsub": "sub", "truediv": "div"}.get(name, name)


def sides(name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any], list[int]]:
    """Return a product's arguments, those given by name put in their places, and where its sides stand."""
    if name == "einsum":
        operands = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
        return (args[0], *operands), kwargs, list(range(1, len(operands) + 1))
    kwargs = dict(kwargs)
    args = (*args, *(kwargs.pop(part) for part in PRODUCTS[name][len(args) :] if part in kwargs))
    first = 1 if name in ("addmm", "baddbmm") else 0
    return args, kwargs, [first, first + 1]


def rows_of(name: str, side: int, weight: Tensor) -> tuple[int, ...] | None:
    """Return the dimensions of one output feature of a weight on side 0 or 1 of a product."""
    if name == "einsum":
        return None
    if name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm"):
        return (-1,) if name == "linear" or side == 0 else (-2,)
    return tuple(range(1, weight.ndim))


def floating(*values: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors among values and inside lists, tuples and dictionaries of them."""
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                yield value
        elif isinstance(value, dict):
            yield from floating(*value.values())
        elif isinstance(value, (list, tuple)):
            yield from floating(*value)


def unit_of(module: nn.Module) -> str | None:
    """Return "norm" or "activation" for a module whose inner arithmetic counts as one function.

    A norm is a module without modules inside whose class says so; so is an activation function.
    """
    if next(module.children(), None) is not None:
        return None
    name = type(module).__name__.lower()
    if "norm" in name:
        return "norm"
    if any(part in name for part in ("softmax", "softmin", "attention")):
        return None
    known = type(module).__module__ == "torch.nn.modules.activation"
    named = any(
        part in name for part in ("relu", "elu", "silu", "swish", "mish", "sigmoid", "tanh", "activation")
    )
    light = all(parameter.ndim < 2 for parameter in module.parameters())
    return "activation" if light and (known or named) else None
