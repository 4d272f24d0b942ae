"""The folder of a converted language model: integers in safetensors, configuration, tokenizer."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from gramian.compress import torch_ao
from gramian.errors import InputError
from gramian.files import atomic_folder, write_json
from gramian.reading import check_regular
from gramian.tasks.model_folder import QUANTISED
from gramian.tasks.open_model import LanguageModel, device_of
from gramian.train.run import read_json, versions

ABOUT, CONFIG = QUANTISED, "config.json"

OPEN, OWN = "model.safetensors", "quantised.safetensors"
"""The weights under the name that transformers looks for, and under one that it does not: where it could not
read them, it should find nothing."""


@dataclass(frozen=True, kw_only=True)
class About:
    """How a folder's weights were converted, and how to open it."""

    kind: str
    """As `torch_ao.convert` takes it."""
    exact: list[str]
    """Linear layers left alone."""
    group: int
    """Weights of a row that share one scale in int4."""
    dtype: str
    """Of what is not converted."""
    causal: bool
    context: int
    weights: str
    """Name of the file with the weights."""


def save_quantised(
    opened: LanguageModel,
    kind: str,
    folder: Path,
    *,
    exact: Collection[str] | None = None,
    group: int = torch_ao.GROUP,
) -> nn.Module:
    """Convert a language model, save it as a folder that `load_quantised` opens, and return what was saved.

    In an int8 kind, transformers (with torchao) opens the folder as any other, unless the network has Conv1D
    layers (GPT-2), which are linear layers now. The folder appears whole or not at all.

    Raises: InputError when the folder exists, and as `torch_ao.convert`; MissingExtraError without torchao.
    """
    if folder.exists():
        raise InputError(f"{folder} exists already; give the export a new folder")
    model: Any = torch_ao.convert(opened.model, kind, exact=exact, group=group)
    made = torch_ao.converted(model)
    portable = kind.startswith("int8") and not torch_ao.has_conv1d(opened.model)
    about = About(
        kind=kind,
        exact=list(made.exact),
        group=group,
        dtype=str(next(opened.model.parameters()).dtype).removeprefix("torch."),
        causal=opened.causal,
        context=opened.context,
        weights=OPEN if portable else OWN,
    )
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = about.dtype
    config.use_cache = True
    if set(torch_ao.tied(opened.model)) & set(made.layers):
        config.tie_word_embeddings = False  # transformers ties all that it knows, or nothing
        torch_ao.untie(model)
    if portable:
        config.quantization_config = torch_ao.transformers_config(kind, opened.device, about.exact)
    with atomic_folder(folder) as temporary:
        tensors = {name: tensor.contiguous() for name, tensor in torch_ao.stored(model).items()}
        extra = torch_ao.transformers_metadata(model) if portable else {}
        save_file(tensors, temporary / about.weights, {"format": "pt", **extra})
        config.save_pretrained(temporary)
        opened.tokenizer.save_pretrained(temporary)
        write_json(temporary / ABOUT, {**asdict(about), "versions": versions()})
    return model


def load_quantised(folder: Path, *, device: str = "auto") -> LanguageModel:
    """Open a folder that `save_quantised` wrote.

    Raises: InputError, in one sentence, for a folder that is no such folder, is damaged or cut short, or was
        packed for another kind of device; MissingExtraError without torchao.
    Holds: exactly: the logits are those of the model that was saved, on the same device.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    import gramian.interop.huggingface  # noqa: F401  (registers our models)

    about = _about(folder)
    place = device_of(device)
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        opener = AutoModelForCausalLM if about.causal else AutoModelForMaskedLM
        with torch.random.fork_rng(devices=[]):
            exact = opener.from_config(config, dtype=getattr(torch, about.dtype), trust_remote_code=False)
        check_regular(folder / about.weights)
        tensors = load_file(folder / about.weights, device=str(place))
    except InputError:
        raise
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder} is damaged or cut short: {_reason(error)}") from error
    except Exception as error:  # the packages raise what they like on a damaged file, plain Exception too
        raise InputError(f"{folder} does not describe a model: {_reason(error)}") from error
    try:
        model = torch_ao.convert(exact.to(place), about.kind, exact=about.exact, group=about.group)
        torch_ao.restore(model, tensors)
    except InputError as error:
        raise InputError(f"{folder} does not fit its own {ABOUT}: {error}") from error
    return LanguageModel(str(folder), model, tokenizer, about.context, about.causal, place)


def _about(folder: Path) -> About:
    path = folder / ABOUT
    if not path.is_file():
        raise InputError(f"{folder} is no exported model: it has no {ABOUT}")
    found = read_json(path)
    try:
        found.pop("versions", None)
        about = About(**found)
        if about.weights not in (OPEN, OWN):
            raise ValueError(f"weights {about.weights!r}")
        if getattr(torch, about.dtype) not in torch_ao.DTYPES:
            raise ValueError(f"dtype {about.dtype!r}")
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} does not describe an exported model: {_reason(error)}") from error
    return about


def _reason(error: Exception) -> str:
    """Return the first line of what went wrong, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
