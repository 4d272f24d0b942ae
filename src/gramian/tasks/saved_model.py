"""The model in a run folder: described so that Hugging Face's tools open it, loaded for our own."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from safetensors.torch import save_file
from tokenizers import Tokenizer

from gramian.data.tokens import END
from gramian.errors import InputError
from gramian.files import atomic_file, write_json, write_text
from gramian.nn.transformer import Transformer, TransformerConfig
from gramian.reading import explained
from gramian.train.checkpoint import checkpoints, load_weights, newest
from gramian.train.run import Run, read_json

MASK = "<|mask|>"
"""The special token that stands for a hidden one, after all tokens of the text."""

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"


def describe(folder: Path, shape: TransformerConfig, tokenizer: Tokenizer) -> None:
    """Write how to build the model and how to read text, in the files that Hugging Face looks for."""
    special = {"eos_token": END, "bos_token": END, "pad_token": END}
    if not shape.causal:
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.add_special_tokens([MASK])
        special["mask_token"] = MASK
    architecture = "GramianForCausalLM" if shape.causal else "GramianForMaskedLM"
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    write_json(
        folder / CONFIG, {"model_type": "gramian", "architectures": [architecture], **asdict(shape), **ids}
    )
    write_text(folder / TOKENIZER, tokenizer.to_str())
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": shape.context,
            "padding_side": "left" if shape.causal else "right",  # a decoder goes on at the right end
            **special,
        },
    )
    if shape.causal:
        write_json(folder / "generation_config.json", ids)


def publish(run: Run) -> None:
    """Write the newest checkpoint's weights where Hugging Face looks for them; nothing before the first."""
    if not checkpoints(run.checkpoints):
        return
    model = trained_model(run)
    state = {f"transformer.{name}": value.contiguous() for name, value in model.state_dict().items()}
    if model.config.tied:
        del state["transformer.head.weight"]
    with atomic_file(run.folder / WEIGHTS) as temporary:
        save_file(state, temporary, {"format": "pt"})


def open_saved(folder: Path) -> Run:
    """Return the run in a folder.

    Raises: InputError when there is none.
    """
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} is not a run folder of gramian train: it has no {CONFIG}")
    return Run(folder)


def shape_of(run: Run) -> TransformerConfig:
    """Return how the model of a run is built.

    Raises: InputError when its description is damaged or of another kind of model.
    """
    path = run.folder / CONFIG
    found: dict[str, Any] = read_json(path)
    try:
        if found.pop("model_type") != "gramian":
            raise KeyError("model_type gramian")
        kinds = get_type_hints(TransformerConfig)
        known = {field.name: found[field.name] for field in fields(TransformerConfig) if field.name in found}
        for name, value in known.items():
            if not _is_of(value, kinds[name]):
                raise TypeError(f"{name} is {str(value)[:40]!r}")
        return TransformerConfig(**known)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} does not describe a transformer of ours: {error}") from error


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a field's type; a whole number is a number, but true is none."""
    kinds = get_args(kind) or (kind,)
    return type(value) in kinds or (float in kinds and type(value) is int and abs(value) < 2**53)


def trained_model(run: Run) -> Transformer:
    """Return the model of a run with the weights of its newest checkpoint, on the CPU in evaluation mode.

    Raises: InputError when the run has no checkpoint or it cannot be read.
    """
    saved = newest(run.checkpoints, set_aside=False)
    if saved is None:
        raise InputError(f"the run {run.folder} has no checkpoint yet")
    shape, held = shape_of(run), (saved.folder / WEIGHTS).stat().st_size
    table = shape.context * shape.width if shape.positions == "learned" else 0
    if max(shape.least_parameters + table, shape.depth) > held:
        raise InputError(
            f"{run.folder / CONFIG} describes {shape.least_parameters + table:,} parameters or more, and the "
            f"weights in {saved.folder} have {held:,} bytes"
        )
    model = Transformer(shape)
    load_weights(saved.folder, model)
    return model.eval()


def tokenizer_of(run: Run) -> Tokenizer:
    """Return the tokenizer of a run.

    Raises: InputError when it cannot be read.
    """
    path = run.folder / TOKENIZER
    with explained(f"{path} is not a tokenizer"):
        tokenizer = Tokenizer.from_str(json.dumps(read_json(path)))
        tokenizer.encode_special_tokens = True  # in a text, special tokens are plain text
        tokenizer.encode("a b")
    return tokenizer
