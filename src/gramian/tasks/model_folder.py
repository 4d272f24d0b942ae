"""The folder of a saved language model: found, checked, and turned into model and tokenizer."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from gramian.errors import InputError
from gramian.reading import FREE, check_regular, explained, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
QUANTISED = "quantisation.json"
"""What an exported quantised model has beside its configuration."""

CONFIG = "config.json"
COUNTED = re.compile(r"layer|block|expert|depth|stage|head|group")
"""Names of the numbers of parts in a configuration."""

PARTS = 1000
"""Parts of a kind that any model may have; beyond them there has to be a tensor for each."""

PACKED = 16
"""Numbers for each byte of the weights that a model has at most, however they are packed."""

UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""Files in Python's own format for objects, which runs what they say while they are read."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "*vocab*.json", "*vocab*.txt", "*.spm", "*.bpe.model")
"""Files one of which every tokenizer has; without them Hugging Face makes an empty one."""


def located(where: str, offline: bool) -> Path:
    """Return the folder that a path or a hub id means."""
    folder = Path(where).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{where} is a file; give the folder that holds config.json and the weights")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", where):
        raise InputError(f"the folder {where} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    wanted = ["*.json", "*.txt", "*.model", "model*.safetensors"]
    try:
        return Path(snapshot_download(where, allow_patterns=wanted, local_files_only=offline))
    except GatedRepoError as error:
        reason = "its owner asks for a login first"
        raise InputError(f"{where} is no folder, and the model of this name on the hub: {reason}") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{where} is no folder that exists, and the hub has no model of this name"
        ) from error
    except (OSError, ValueError, HfHubHTTPError) as error:
        how = (
            "was not fetched earlier, and offline nothing is"
            if offline
            else "cannot be fetched (is there network?)"
        )
        raise InputError(f"{where} is no folder that exists, and as a model of the hub it {how}") from error


def _class_names(found: Any) -> set[str]:
    """Return the names of no class, one, or several."""
    classes = found if isinstance(found, tuple) else (found,)
    return {one.__name__ for one in classes if one is not None}


def check_files(folder: Path) -> None:
    """Raise InputError unless all weights are there, as safetensors that are whole, and a tokenizer is."""
    if (folder / QUANTISED).is_file():
        raise InputError(
            f"{folder} holds a model that is quantised already, which `load_quantised` of "
            "gramian.tasks.quantised_model opens; give the model that it was made from"
        )
    if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
        raise InputError(f"{folder} has no tokenizer, such as tokenizer.json, tokenizer.model or vocab.txt")
    if (folder / WEIGHTS).is_file():
        _tensors(folder / WEIGHTS)
    elif (folder / INDEX).is_file():
        _check_shards(folder)
    elif unsafe := sorted(path.name for pattern in UNSAFE for path in folder.glob(pattern)):
        raise InputError(
            f"{folder} holds its weights in {unsafe[0]}, a format that can run any code while it is read; "
            f"where you trust it, convert it to {WEIGHTS} with save_pretrained of transformers"
        )
    elif (folder / "checkpoints").is_dir():
        raise InputError(f"the run {folder} has no {WEIGHTS} before it ends: go on with it by --resume")
    else:
        raise InputError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}")


def _check_shards(folder: Path) -> None:
    """Raise InputError naming a shard that is missing or damaged, or lacks a weight of the index."""
    found = read_json(folder / INDEX)
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(at, str) for at in places.values()):
        raise InputError(f"{folder / INDEX} has no weight_map of names and files")
    shards = sorted(set(places.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{folder / INDEX} names {shard!r}, which is no safetensors file beside it")
        if not (folder / shard).is_file():
            raise InputError(f"{folder} lacks {shard}, one of the {len(shards)} shards of its weights")
    for shard in shards:
        lacking = {name for name, at in places.items() if at == shard} - _tensors(folder / shard)
        if lacking:
            raise InputError(f"{folder / shard} lacks the weight {min(lacking)} that the index promises")


def _tensors(path: Path) -> set[str]:
    """Return the names of the tensors in a file of which the length and the table of contents are right."""
    check_regular(path)
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or cut short: {_reason(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from writing to the terminal; what matters in it is checked and said here."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers.utils import logging as bars  # the import itself may warn

            shown = bars.is_progress_bar_enabled()
            bars.disable_progress_bar()
            try:
                yield
            finally:
                if shown:
                    bars.enable_progress_bar()
    finally:
        logging.disable(before)


def _reason(error: Exception) -> str:
    """Return the first line of what went wrong, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def configuration(folder: Path) -> Any:
    """Return the configuration, of an architecture that transformers itself or this library defines."""
    from transformers import CONFIG_MAPPING, AutoConfig

    import gramian.interop.huggingface  # noqa: F401  (registers our models)

    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json, so it is no folder of a model")
    found = read_json(path)
    kind = found.get("model_type") if isinstance(found, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        coded = isinstance(found, dict) and "auto_map" in found
        ours = " without running code of the folder, which is never done" if coded else ""
        raise InputError(f"{path} is of model_type {kind!r}, which transformers does not know{ours}")
    if found.pop("transformers_weights", None):
        raise InputError(f"{path} names its weights by transformers_weights; only {WEIGHTS} is read")
    with explained(f"{path} does not describe a model"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        names = config.architectures or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("architectures are no list of names")
    return config


def kind_of(folder: Path, config: Any) -> tuple[Any, bool]:
    """Return which of Hugging Face's openers takes the model, and whether it is causal."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    openers = ((AutoModelForCausalLM, True), (AutoModelForMaskedLM, False))
    if not getattr(config, "is_encoder_decoder", False):
        names = [_class_names(opener._model_mapping.get(type(config), None)) for opener, _ in openers]
        saved = config.architectures[0] if config.architectures else ""
        for opener, of in zip(openers, names, strict=True):
            if saved in of:
                return opener
        # A body without a head opens when the head is tied to it; otherwise weights will be found missing.
        if not saved or saved.endswith(("Model", "ForPreTraining")):
            order = (0, 1) if getattr(config, "is_decoder", False) or not names[1] else (1, 0)
            for number in order:
                if names[number]:
                    return openers[number]
    what = ", ".join(config.architectures or ()) or config.model_type
    raise InputError(
        f"{folder} holds a {what}, no language model; accepted are decoders (AutoModelForCausalLM) and "
        "encoders that predict hidden tokens (AutoModelForMaskedLM)"
    )


def _check_size(folder: Path, config: Any, kind: Any) -> None:
    """Refuse a configuration of far more parts or numbers than the weights have, before they are made."""
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else list(folder.glob("model*.safetensors"))
    names, held = sum(len(_tensors(file)) for file in files), sum(file.stat().st_size for file in files)
    for name, number in config.to_dict().items():
        if COUNTED.search(name) and isinstance(number, int) and number > max(PARTS, names):
            raise InputError(
                f"{folder / CONFIG} asks for {name} = {number:,}, and the weights are {names:,} tensors"
            )
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=False)
    numbers = sum(value.numel() for value in (*model.parameters(), *model.buffers()))
    if numbers > max(FREE, PACKED * held):
        raise InputError(
            f"{folder / CONFIG} describes a model of {numbers:,} numbers, and the weights have {held:,} bytes"
        )


def loaded(folder: Path, config: Any, kind: Any, dtype: torch.dtype) -> Any:
    """Return the model with every weight from the folder and none left out."""
    with explained(f"the model in {folder} cannot be built"):
        _check_size(folder, config, kind)
        model, info = kind.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    own = dict(model.named_modules())
    wrong = [
        *(f"has {name} in another shape" for name, *_ in info["mismatched_keys"]),
        *(f"lacks {name}" for name in info["missing_keys"]),
        *(f"also holds {name}" for name in info["unexpected_keys"] if _matters(name, own)),
    ]
    if wrong:
        raise InputError(
            f"the checkpoint in {folder} {min(wrong)} ({len(wrong)} such differences): it is not of the "
            f"{type(model).__name__} that config.json describes"
        )
    return model


def _matters(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a weight that the model does not know belongs to what is read, not to a head of another task.

    A weight inside a numbered layer does, and so does one of a module that the model has.
    """
    return bool(re.search(r"\.\d+\.", f".{name}")) or name.rpartition(".")[0] in modules


def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer of a folder that has one."""
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            check_regular(folder / name)
    with explained(f"the tokenizer in {folder} cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer("a b")
    return tokenizer


def check_finite(folder: Path, model: nn.Module, dtype: str) -> None:
    """Raise InputError naming a weight that is not finite."""
    for name, value in model.named_parameters():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(f"the weight {name} in {folder} holds NaN or infinities when read as {dtype}")


def check_vocabulary(folder: Path, model: Any, tokenizer: Any) -> None:
    """Raise InputError for a tokenizer that makes tokens which the model does not embed."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0:
        raise InputError(f"the tokenizer in {folder} has no tokens")
    if largest >= rows:
        raise InputError(
            f"the tokenizer in {folder} has tokens up to {largest}, and the model embeds only {rows}: they "
            "are not of one model"
        )
