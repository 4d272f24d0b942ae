"""Many networks of one architecture held as one: every parameter with a first axis of members."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.func import vmap

from gramian.core.jacobian import Function, Parameters, batches, check_rows, jvp
from gramian.errors import InputError

State = Parameters
"""Parameters and buffers by name, each with a first axis of members."""


class Stack:
    """One architecture for all members, evaluated for all of them at once.

    `f` names the parameters that derivatives are taken by; everything else that a state holds (frozen
    parameters, buffers) is a constant of its member. Members go through `torch.func.vmap` together; a module
    that it cannot run goes member by member.

    Holds: exactly.
    """

    def __init__(self, f: Function) -> None:
        self.f, self.vmapped = f, True

    def check(self, x: Shaped[Tensor, " n *size"]) -> int:
        """Return the number of outputs, and find out whether members can go together.

        Raises: InputError for inputs that are empty or not finite, and a module whose outputs depend on
            chance.
        """
        check_rows(x)
        state = {**self.f.constants, **self.f.parameters}
        with torch.no_grad():
            one, again = (self._alone(state, x[:1]) for _ in range(2))
            if not torch.equal(one, again) and bool(one.isfinite().all()):
                raise InputError(f"{type(self.f.module).__name__} has outputs that depend on chance")
            self.values({name: value[None] for name, value in state.items()}, x[:1])
        return one.shape[1]

    def values(self, state: State, x: Shaped[Tensor, " n *size"]) -> Float[Tensor, "members n o"]:
        """Give f(x, θ_m) for every member; differentiable.

        Shapes: state (members, …), x (n, …) -> (members, n, O).
        """
        return self._each(lambda member: self._alone(member, x), state)

    def derivatives(
        self, primal: State, tangent: State, x: Shaped[Tensor, " n *size"]
    ) -> Float[Tensor, "members n o"]:
        """Give J(x; θ_m) v_m for every member; differentiable by the tangent.

        Shapes: primal, tangent (members, …), x (n, …) -> (members, n, O).
        """

        def along(member: State, direction: State) -> Tensor:
            return jvp(self.at(member), x, direction, len(x))

        return self._each(along, primal, {name: tangent[name] for name in self.f.parameters})

    def at(self, member: State) -> Function:
        """Return the function of one member's trainable parameters."""
        parameters = {name: member[name] for name in self.f.parameters}
        constants = {name: value for name, value in member.items() if name not in parameters}
        return Function(self.f.module, parameters, constants)

    def _alone(self, member: State, x: Tensor) -> Tensor:
        return dataclasses.replace(self.f, constants={})(member, x)

    def _each(self, call: Callable[..., Tensor], *states: State) -> Tensor:
        if self.vmapped:
            try:
                with warnings.catch_warnings():  # of operations that vmap knows no rule for, only a slow way
                    warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                    return vmap(call)(*states)
            except RuntimeError:  # control flow that depends on data, or an operation without a rule
                self.vmapped = False
        count = len(next(iter(states[0].values())))
        return torch.stack([call(*(member_of(state, m) for state in states)) for m in range(count)])


@dataclass(frozen=True, eq=False)
class FunctionSum:
    """For every member a sum of networks and one linear map of its tangent.

        g_m(x) = Σ_k f(x, φ_km) + J(x; θ_m) v_m

    Shapes: every state (members, …).
    Holds: exactly.
    """

    networks: tuple[State, ...] = ()
    primal: State | None = None
    tangent: State | None = None

    def __call__(
        self, stack: Stack, x: Shaped[Tensor, " n *size"], rows: int
    ) -> Float[Tensor, "members n o"]:
        """Return the sum at every row, `rows` of them at a time; zeros that broadcast without terms.

        Shapes: x (n, …) -> (members, n, O), or (1, n, 1) without terms.
        Raises: InputError for inputs that are empty or not finite.
        """
        if not self.networks and self.primal is None:
            return torch.zeros(1, len(x), 1, device=x.device)
        with torch.no_grad():
            return torch.cat([self._batch(stack, batch) for batch in batches(x, rows)], 1)

    def _batch(self, stack: Stack, x: Tensor) -> Tensor:
        terms = [stack.values(state, x) for state in self.networks]
        if self.primal is not None and self.tangent is not None:
            terms.append(stack.derivatives(self.primal, self.tangent, x))
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    def members(self, chosen: Sequence[int]) -> "FunctionSum":
        """Return the sum of these members alone, in this order."""
        return self._mapped(lambda state: {name: value[list(chosen)] for name, value in state.items()})

    def _mapped(self, change: Callable[[State], State]) -> "FunctionSum":
        return FunctionSum(
            tuple(change(state) for state in self.networks),
            None if self.primal is None else change(self.primal),
            None if self.tangent is None else change(self.tangent),
        )

    def flat(self) -> dict[str, Tensor]:
        """Return every tensor by one name, as a file holds them."""
        states = {f"network{k}": state for k, state in enumerate(self.networks)}
        states |= {"primal": self.primal or {}, "tangent": self.tangent or {}}
        return {f"{part}/{name}": value for part, state in states.items() for name, value in state.items()}

    @classmethod
    def of_flat(cls, tensors: dict[str, Tensor]) -> "FunctionSum":
        """Rebuild the sum that `flat` took apart."""
        parts: dict[str, State] = {}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = value
        networks = tuple(parts[key] for key in sorted(parts) if key.startswith("network"))
        return cls(networks, parts.get("primal"), parts.get("tangent"))


def joined(parts: Sequence[FunctionSum]) -> FunctionSum:
    """Put the members of several sums of the same terms one after the other."""
    first = parts[0]
    return FunctionSum(
        tuple(_concatenated([part.networks[k] for part in parts]) for k in range(len(first.networks))),
        None if first.primal is None else _concatenated([part.primal or {} for part in parts]),
        None if first.tangent is None else _concatenated([part.tangent or {} for part in parts]),
    )


def _concatenated(states: Sequence[State]) -> State:
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}


def member_of(state: State, m: int) -> Parameters:
    """Return what one member has of a state."""
    return {name: value[m] for name, value in state.items()}


def stacked(states: Sequence[Parameters]) -> State:
    """Stack the states of single networks.

    Raises: InputError when they are of different architectures.
    """
    names = {name: value.shape for name, value in states[0].items()}
    if any({name: value.shape for name, value in state.items()} != names for state in states):
        raise InputError("make() has to return networks of one architecture, but their parameters differ")
    return {name: torch.stack([state[name] for state in states]) for name in names}
