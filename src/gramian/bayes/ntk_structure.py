"""How the kernel of a module is put together: by layers where calls are known, by Jacobian elsewhere."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.bayes.ntk_layers import Explicit, Features, Kronecker, Work
from gramian.bayes.ntk_trace import Use, trace
from gramian.core.jacobian import Function, Parameters, check_rows, jacobian
from gramian.errors import InputError

Expected = list[tuple[tuple, torch.Size | None]]
"""The key of every call that is to come, with the shape of one row of its result if it has rows."""


class IrregularError(RuntimeError):
    """A batch went through the module in another way than its first row did."""


@dataclass(frozen=True)
class Layer:
    """Calls that read the same parameters in the same roles, by their places among all calls of a pass."""

    places: tuple[int, ...]
    multiplied: bool
    """Whether the Jacobian is multiplied out."""
    numbers: int
    """Numbers that the features of one row hold."""
    cost: int


@dataclass(frozen=True, eq=False)
class Structure:
    """The layers of a module, and the parameters of which only the Jacobian tells.

        Θ = Σ_layers Θ_layer + Θ_rest

    Holds: exactly.
    """

    f: Function
    scale: Parameters
    outputs: int
    layers: tuple[Layer, ...]
    rest: Function | None
    expected: Expected
    numbers: int
    """Numbers that one row needs, the graph of the backward passes among them."""
    forward: int
    """Multiplications of one row's forward pass that involve parameters."""
    cost: int
    """Multiplications of the whole kernel."""

    def features(self, x: Tensor) -> list[Features]:
        """Return what the kernel of these rows with any others is made of.

        Raises: IrregularError when the rows go another way than the first did.
        """
        found = self._of_layers(x) if self.layers else []
        if self.rest is not None:
            jacobians = jacobian(self.rest, x)
            found += [_weighed(jacobians[name], self.scale[name]) for name in self.rest.parameters]
        return _merged(found)

    def _of_layers(self, x: Tensor) -> list[Features]:
        passed = trace(self.f, x)
        rest = set() if self.rest is None else self.rest.parameters.keys()
        if not _as_expected(passed.uses, self.expected, len(x)) or passed.hidden() - rest:
            raise IrregularError
        uses = [passed.uses[place] for layer in self.layers for place in layer.places]
        pairs = zip(uses, passed.cotangents(uses), strict=True)
        found: list[Features] = []
        for layer in self.layers:
            found += _features([next(pairs) for _ in layer.places], self.scale, layer.multiplied)
        return found


def structure(f: Function, x: Tensor, scale: Parameters, work: Callable[[int], Work]) -> Structure:
    """Find the layers of a module by running it on a row alone and beside another, the first two of x.

    A parameter is left to the Jacobian when a call that is not known reads it, when calls of two kinds do,
    when the result of a call has no row for each row of x, when its weight is not one number, and when it
    shares a call with such a parameter. `work` is told the number of outputs.

    Raises: InputError for a module whose rows depend on their neighbours or on chance.
    """
    single, double = trace(f, x[:1]), trace(f, x[:2])
    check_rows_apart(single.outputs, double.outputs)
    groups: dict[tuple, list[int]] = {}
    left = single.hidden()
    if [use.key for use in single.uses] != [use.key for use in double.uses]:
        return _assembled(f, scale, single.uses, {}, set(f.parameters), work(single.outputs.shape[1]))
    for place, (one, two) in enumerate(zip(single.uses, double.uses, strict=True)):
        groups.setdefault(one.key, []).append(place)
        if not _regular(one, two) or not _uniform(one, scale):
            left |= one.names
    readers: dict[str, set[tuple]] = {}
    for use in single.uses:
        for name in use.names:
            readers.setdefault(name, set()).add(use.key)
    left |= {name for name, keys in readers.items() if len(keys) > 1}
    while dragged := {name for use in single.uses if use.names & left for name in use.names} - left:
        left |= dragged
    return _assembled(f, scale, single.uses, groups, left, work(single.outputs.shape[1]))


def check_rows_apart(alone: Tensor, beside: Tensor) -> None:
    """Raise InputError when a row has other outputs alone than beside another."""
    if not _close(alone, beside[:1]):
        raise InputError(
            "the module has to give a row the same outputs whatever rows stand beside it and however often "
            "it is asked: call module.eval() against dropout, and take no norm over the batch"
        )


def check_both(x: Tensor, y: Tensor) -> None:
    """Raise InputError unless two sets of rows are finite and of one shape."""
    for rows in (x, y):
        check_rows(rows)
    if y.shape[1:] != x.shape[1:]:
        raise InputError(f"rows of shape {tuple(x.shape[1:])} do not fit rows of {tuple(y.shape[1:])}")


def two_rows(x: Tensor, y: Tensor) -> Tensor:
    """Return the first row of x and, of x or else of y, one that differs from it if there is one."""
    for rows in (x, y):
        differs = (rows != x[:1]).reshape(len(rows), -1).any(1)
        if differs.any():
            return torch.cat([x[:1], rows[differs][:1]])
    return x[[0, 0]]


def without_layers(known: Structure, work: Callable[[int], Work]) -> Structure:
    """Return the structure that leaves every parameter to the Jacobian."""
    return _assembled(known.f, known.scale, [], {}, set(known.f.parameters), work(known.outputs))


def _assembled(
    f: Function,
    scale: Parameters,
    uses: list[Use],
    groups: dict[tuple, list[int]],
    left: set[str],
    work: Work,
) -> Structure:
    layers = [
        _layer([uses[place] for place in places], tuple(places), work)
        for places in groups.values()
        if not uses[places[0]].names & left
    ]
    inside = {name: p for name, p in f.parameters.items() if name in left}
    outside = {name: p for name, p in f.parameters.items() if name not in left}
    rest = Function(f.module, inside, {**f.constants, **outside}) if inside else None
    jacobian_size = sum(p.numel() for p in inside.values())
    results = sum(math.prod(use.shape) for use in uses)
    forward = jacobian_size + sum(
        math.prod(_sizes(uses[place])) for layer in layers for place in layer.places
    )
    numbers = (2 + work.outputs) * results + sum(layer.numbers for layer in layers)
    passes = work.rows * (1 + 2 * work.outputs) * forward * (bool(layers) + bool(inside))
    cost = passes + sum(layer.cost for layer in layers) + work.pairs * work.products * jacobian_size
    return Structure(
        f,
        scale,
        work.outputs,
        tuple(layers),
        rest,
        [(use.key, None if use.edge is None else use.shape[1:]) for use in uses],
        1 + numbers + 3 * work.outputs * jacobian_size,
        forward,
        cost,
    )


def _layer(uses: list[Use], places: tuple[int, ...], work: Work) -> Layer:
    positions, inputs, width = _sizes(uses[0])
    positions *= len(uses)
    apart, out = work.by_positions(positions, inputs, width), work.multiplied_out(positions, inputs, width)
    kind, window = uses[0].kind, uses[0].window
    if kind == "lookup":
        return Layer(places, False, work.outputs * positions * (width + 1), apart)
    if kind == "copy" or (window is not None and window.groups > 1) or out < apart:
        return Layer(places, True, work.outputs * inputs * width, out)
    return Layer(places, False, positions * (inputs + work.outputs * width), apart)


def _sizes(use: Use) -> tuple[int, int, int]:
    """Return positions, inputs and results of a call for one row; those of a depthwise one are shared out."""
    shape = use.shape
    if use.inputs is None:
        return 1, 1, math.prod(shape[1:])
    if use.kind == "lookup":
        return math.prod(shape[1:-1]), 1, shape[-1]
    if use.window is None:
        return math.prod(shape[1:-1]), use.inputs.shape[-1] + 1, shape[-1]
    patch = use.inputs.shape[1] // use.window.groups * math.prod(use.window.kernel)
    return math.prod(shape[2:]), patch + 1, shape[1]


def _as_expected(uses: list[Use], expected: Expected, rows: int) -> bool:
    """Whether the calls are those expected, with the rows that they then had and inputs that still stand."""
    if len(uses) != len(expected):
        return False
    for use, (key, row) in zip(uses, expected, strict=True):
        if use.key != key or not use.intact:
            return False
        if row is not None and (use.edge is None or use.shape != (rows, *row)):
            return False
    return True


def _regular(one: Use, two: Use) -> bool:
    """Whether the first axis of a call's result counts the rows, in their order."""
    if one.output is None or two.output is None:
        return False
    grown = two.shape == (2, *one.shape[1:]) and two.output.shape == (2, *one.output.shape[1:])
    return grown and one.intact and two.intact and _close(one.output, two.output[:1])


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same but for the rounding of another batch size."""
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    return bool((a - b).abs().max() <= torch.finfo(a.dtype).eps ** 0.4 * a.abs().max())


def _uniform(use: Use, scale: Parameters) -> bool:
    return use.kind == "copy" or all(scale[name].ndim == 0 for name in use.names)


def _features(calls: Sequence[tuple[Use, Tensor]], scale: Parameters, multiplied: bool) -> list[Features]:
    """Return the features of a layer from its calls and their cotangents."""
    use = calls[0][0]
    if use.kind == "copy":
        (name,) = use.names
        total = torch.stack([g.flatten(2) * use.factors[0] for use, g in calls]).sum(0)
        return [_weighed(total, scale[name].reshape(-1))]
    if use.kind == "lookup":
        indices, cotangents = zip(*(_looked_up(use, g, scale) for use, g in calls), strict=True)
        return [Kronecker(_joined(indices, 1), _joined(cotangents, 2))]
    inputs, cotangents = zip(*(_affine(use, g) for use, g in calls), strict=True)
    roots = [[_root(use, place, scale) for place in (0, 1)] for use, _ in calls]
    if multiplied:
        return _multiplied(inputs, cotangents, roots)
    columned = [_columned(a, *root)[:, :, 0] for a, root in zip(inputs, roots, strict=True)]
    return [Kronecker(_joined(columned, 1), _joined(cotangents, 2)[:, :, :, 0])]


def _multiplied(
    inputs: Sequence[Tensor], cotangents: Sequence[Tensor], roots: list[list[float | None]]
) -> list[Features]:
    """Return Σ_calls Σ_s g_s ⊗ a_s of the weight, and Σ_calls Σ_s g_s of the bias."""
    weights, biases = [], []
    for a, g, (weight, bias) in zip(inputs, cotangents, roots, strict=True):
        if weight is not None:
            product = torch.einsum("noshd,nshi->nohdi", g, a)
            weights.append(product if weight == 1 else product.mul_(weight))
        if bias is not None:
            biases.append(g.sum(2) * bias)
    return [Explicit(sum(parts[1:], parts[0]).flatten(2)) for parts in (weights, biases) if parts]


def _looked_up(use: Use, cotangent: Tensor, scale: Parameters) -> tuple[Tensor, Tensor]:
    """Return indices (n, S) and cotangents (n, O, S, D), zero at the padding."""
    assert use.inputs is not None
    index, factor = use.inputs.flatten(1), _root(use, 0, scale) or 0.0
    cotangent = cotangent.reshape(*cotangent.shape[:2], index.shape[1], -1) * factor
    if use.padding is not None:
        cotangent = cotangent * (index != use.padding)[:, None, :, None]
    return index, cotangent


def _affine(use: Use, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs (n, S, H, I) and cotangents (n, O, S, H, D), H groups."""
    assert use.inputs is not None
    if use.window is None:
        a = use.inputs.reshape(len(use.inputs), -1, 1, use.inputs.shape[-1])
        return a, cotangent.reshape(*cotangent.shape[:2], a.shape[1], 1, -1)
    groups, patches = use.window.groups, use.window.patches(use.inputs)
    a = patches.reshape(len(patches), groups, -1, cotangent[0, 0, 0].numel()).permute(0, 3, 1, 2)
    return a, cotangent.flatten(3).unflatten(2, (groups, -1)).movedim(4, 2)


def _columned(a: Tensor, weight: float | None, bias: float | None) -> Tensor:
    """Return the columns of inputs if the weight counts, and a column of ones if the bias does."""
    columns = [] if weight is None else [a if weight == 1 else a * weight]
    if bias is not None:
        columns.append(a.new_full((), bias).expand(*a.shape[:-1], 1))
    return _joined(columns, 3)


def _root(use: Use, place: int, scale: Parameters) -> float | None:
    """Return what the Jacobian of a call's parameter is multiplied by; None where nothing varies."""
    name = use.roles[place]
    return None if name is None else use.factors[place] * math.sqrt(float(scale[name]))


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def _weighed(jacobian: Tensor, scale: Tensor) -> Explicit:
    """Return a parameter's Jacobian (n, O, *shape), each number times the root of its weight."""
    return Explicit((jacobian * scale.sqrt())[..., None].flatten(2))


def _merged(features: list[Features]) -> list[Features]:
    """Return the same features with small Jacobians side by side in one, so that they make one product."""
    small = [f.jacobian for f in features if isinstance(f, Explicit) and f.jacobian.shape[2] <= 1024]
    if len(small) < 2:
        return features
    others = [f for f in features if not isinstance(f, Explicit) or f.jacobian.shape[2] > 1024]
    return [*others, Explicit(torch.cat(small, 2))]
