"""Cases of independent reference implementations: every setting is read from the case's JSON."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(os.environ.get("GRAMIAN_REFERENCE", Path(__file__).parents[2] / "shared" / "reference"))


@dataclass(frozen=True)
class Case:
    name: str
    spec: dict[str, Any]
    arrays: dict[str, Tensor]


def load(path: Path) -> Case:
    spec = json.loads(path.read_text())
    return Case(path.stem, spec, load_file(path.with_name(spec["arrays_file"])))


def cases(system: str) -> list[Any]:
    """Parameters for `pytest.mark.parametrize("path", ...)`; one skipped parameter when there is no case."""
    paths = sorted((FOLDER / system).glob("*.json"))
    if not paths:
        reason = f"no reference cases for {system} under $GRAMIAN_REFERENCE"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")]
    return [pytest.param(path, id=path.stem) for path in paths]
