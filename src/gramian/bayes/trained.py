"""An ensemble once it is trained: what it predicts, and the file it is kept in."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gramian.bayes.fitting import LIKELIHOODS
from gramian.bayes.members import EnsembleConfig, Make, Source
from gramian.bayes.stack import FunctionSum, Stack
from gramian.core.jacobian import Parameters, function
from gramian.core.predictive import Predictive
from gramian.errors import InputError
from gramian.files import atomic_file
from gramian.reading import check_regular

ROWS = 1024
"""Rows that go through all members at once at prediction, unless told otherwise."""

FORMAT = "gramian ensemble 1"
"""What a file says that it is."""


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Trained members, each a function f̃_m(x) = f(x, θ_m) + δ_m(x)."""

    config: EnsembleConfig
    stack: Stack
    trained: FunctionSum
    offset: FunctionSum
    likelihood: str
    numbers: tuple[int, ...]
    """Which members these are, of all."""
    columns: bool
    """Whether targets had an axis of outputs."""
    losses: Float[Tensor, " members"]
    """Every member's loss at the last step; of exact members the mean squared residual, halved."""
    prior: Parameters | None = None
    """The prior variances that were used."""

    def functions(self, x: Shaped[Tensor, " n *size"], rows: int = ROWS) -> Float[Tensor, "members n o"]:
        """Return f̃ of every member, all outputs of the network.

        Shapes: x (n, …) -> (members, n, O).
        Raises: InputError for inputs that are empty or not finite.
        """
        values = self.trained(self.stack, x, rows)
        return values + LIKELIHOODS[self.likelihood].offset(self.offset(self.stack, x, rows))

    def predict(self, x: Shaped[Tensor, " n *size"], rows: int = ROWS) -> Predictive:
        """Return mean and variance over members, and the noise.

        Shapes: x (n, …) -> (n) or (n, O), as the targets were; samples (members, …).
        Raises: InputError for inputs that are empty or not finite, and a part of an ensemble of one member.
        """
        outputs, known = self.functions(x, rows), LIKELIHOODS[self.likelihood]
        noise = known.variance(outputs)
        own = self.config.noise_variance if noise is None else self._as_targets(noise)
        return Predictive.from_samples(self._as_targets(known.mean(outputs)), own)

    def _as_targets(self, values: Tensor) -> Tensor:
        return values if self.columns else values[..., 0]

    def save(self, path: Path | str, **facts: Any) -> None:
        """Write everything but the network's code to one safetensors file, with the settings as JSON in it.

        `facts` are JSON values to keep beside, which `facts_of` gives back.
        """
        tensors = {f"trained/{name}": value for name, value in self.trained.flat().items()}
        tensors |= {f"offset/{name}": value for name, value in self.offset.flat().items()}
        tensors |= {f"prior/{name}": value for name, value in (self.prior or {}).items()}
        tensors["losses"] = self.losses
        described = {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "likelihood": self.likelihood,
            "numbers": list(self.numbers),
            "columns": self.columns,
            "trainable": list(self.stack.f.parameters),
            "facts": facts,
        }
        with atomic_file(Path(path)) as temporary:
            copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
            save_file(copies, temporary, {"gramian": json.dumps(described)})

    @classmethod
    def load(cls, path: Path | str, make: Make, device: torch.device | str = "cpu") -> "Ensemble":
        """Read an ensemble; `make` builds the network whose parameters the file holds.

        Raises: InputError for a file that is missing, damaged or no ensemble, and a network that it does not
            fit.
        """
        described, tensors = _read(Path(path), torch.device(device))
        try:
            return cls._of(described, tensors, path, make, torch.device(device))
        except InputError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} does not hold the ensemble that it describes: {error}") from error

    @classmethod
    def _of(
        cls,
        described: dict[str, Any],
        tensors: dict[str, Tensor],
        path: Path | str,
        make: Make,
        device: torch.device,
    ) -> "Ensemble":
        parts: dict[str, dict[str, Tensor]] = {"trained": {}, "offset": {}, "prior": {}}
        losses = tensors.pop("losses")
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        trained, offset = (FunctionSum.of_flat(parts[part]) for part in ("trained", "offset"))
        source = Source(make, 0, device, losses.dtype)
        module = source.module("start", 0)
        state = trained.networks[0] if trained.networks else trained.primal or {}
        held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if {n: v.shape for n, v in held.items()} != {n: v.shape[1:] for n, v in state.items()}:
            raise InputError(f"make() returns another network than the one that {path} holds")
        stack = Stack(function(module, described["trainable"]))
        config = EnsembleConfig(**described["config"])
        numbers, columns = tuple(described["numbers"]), described["columns"]
        prior = parts["prior"] or None
        return cls(config, stack, trained, offset, described["likelihood"], numbers, columns, losses, prior)


def facts_of(path: Path | str) -> dict[str, Any]:
    """Return what was kept beside an ensemble.

    Raises: InputError as `Ensemble.load`.
    """
    return _read(Path(path), torch.device("cpu"))[0].get("facts") or {}


def _read(path: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file says of itself, and its tensors."""
    try:
        check_regular(path)
        with safe_open(path, "pt", device=str(device)) as file:
            described = json.loads((file.metadata() or {}).get("gramian", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no file of an ensemble, or damaged: {error}") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise InputError(f"{path} holds no ensemble of this version of gramian")
    return described, tensors
