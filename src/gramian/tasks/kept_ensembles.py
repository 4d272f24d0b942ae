"""Ensembles that a command has fitted so far, on disk so that a stopped one goes on."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from gramian.bayes.members import Make
from gramian.bayes.trained import Ensemble
from gramian.errors import InputError
from gramian.files import atomic_folder
from gramian.ranks import ranks
from gramian.train.manifest import check_manifest, write_manifest
from gramian.train.run import versions

MEMBERS = "members.safetensors"


def kept_ensemble(
    folder: Path | None, about: Any, rows: tuple[Tensor, Tensor], make: Make, fit: Callable[[], Ensemble]
) -> Ensemble:
    """Return the ensemble that was fitted to these rows before, or fit it and keep it.

    It is kept under a digest of all that it depends on: `about`, as JSON or words, the rows and the versions.
    Several processes keep nothing, nor does one without a folder.

    Raises: what `fit` raises; OSError when the folder cannot be written.
    Holds: bit for bit; what is damaged on disk is fitted again.
    """
    if folder is None or ranks() > 1:
        return fit()
    said = json.dumps(
        [about, versions(), [[str(each.dtype), list(each.shape)] for each in rows]], default=repr
    )
    digest = hashlib.sha256(said.encode())
    for each in rows:
        digest.update(each.contiguous().numpy().tobytes())
    place = folder / digest.hexdigest()[:32]
    try:
        if check_manifest(place, [MEMBERS]):
            return Ensemble.load(place / MEMBERS, make)
    except InputError:
        pass
    found = fit()
    with atomic_folder(place, replace=True) as temporary:
        found.save(temporary / MEMBERS)
        write_manifest(temporary)
    return found
