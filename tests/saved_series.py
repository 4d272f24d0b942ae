"""Series of small models on disk, and how they align."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gramian.errors import InputError
from gramian.observe.alignment import Alignment, Checks, align
from gramian.observe.series import find_series

Weights = Mapping[str, Tensor]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def model(seed: int, **other: Tensor) -> dict[str, Tensor]:
    """The weights of a small model; others by names with __ for points."""
    own = {
        "embed.weight": drawn(50, 4, seed=seed),
        "layers.2.weight": drawn(4, 4, seed=seed + 100),
        "layers.10.weight": drawn(4, 4, seed=seed + 200),
        "norm.bias": drawn(4, seed=seed + 300),
    }
    return own | {name.replace("__", "."): value for name, value in other.items()}


def saved(folder: Path, models: Sequence[Weights], suffix: str = ".safetensors") -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"step{index}{suffix}" for index in range(len(models))]
    for weights, path in zip(models, paths, strict=True):
        if suffix == ".safetensors":
            save_file({name: value.contiguous().clone() for name, value in weights.items()}, path)
        else:
            torch.save(weights, path)
    return paths


def aligned(folder: Path, models: Sequence[Weights], suffix: str = ".safetensors", **checks) -> Alignment:
    (series,) = find_series(saved(folder, models, suffix))
    return align(series, Checks(**checks))


def names(found: Alignment) -> list[str]:
    return [tensor.name for tensor in found.tensors]


def steps(found: Alignment) -> list[int]:
    return [checkpoint.step for checkpoint in found.checkpoints]


def remarks(found: Alignment) -> dict[str, tuple[str, ...]]:
    return {remark.kind: remark.names for remark in found.remarks}


def refused(
    match: str, folder: Path, models: Sequence[Weights], suffix: str = ".safetensors", **checks
) -> None:
    with pytest.raises(InputError, match=match) as caught:
        aligned(folder, models, suffix, **checks)
    assert "\n" not in str(caught.value)
