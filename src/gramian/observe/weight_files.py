"""Tensors in files of weights, read a slice at a time; no file is ever held whole."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gramian.errors import InputError
from gramian.reading import check_regular, check_stored

SAFE = ".safetensors"
TORCH = (".pt", ".pth", ".ckpt", ".bin")
"""Endings of files that `torch.save` wrote."""

PLACES = ("state_dict", "model_state_dict", "model", "module", "params")
"""Where training loops put the weights in what they save, if not at the top."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""What safetensors calls its dtypes."""


@dataclass(frozen=True, eq=False)
class Stored(ABC):
    """A tensor that lies in a file; its elements are counted in row-major order."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    within: str = field(default="", kw_only=True)
    """Under which entry of the file the weights lie, such as `model_state_dict`; empty for the top."""
    shares: str = field(default="", kw_only=True)
    """The earlier tensor of the same file that is the very same memory (a tie that was saved as one)."""
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numel", prod(self.shape))

    @abstractmethod
    def read(self, start: int, out: Shaped[Tensor, " count"]) -> None:
        """Fill `out`, contiguous and of the tensor's dtype, with the elements from `start` on.

        Shapes: out (count).
        Raises: InputError naming the file when it is gone or has become shorter.
        Holds: exactly, byte for byte.
        """

    @abstractmethod
    def prefetch(self, start: int, count: int) -> None:
        """Tell the operating system that these elements are wanted soon, where that is possible."""

    def _check(self, start: int, out: Tensor) -> None:
        if out.dtype != self.dtype or not out.is_contiguous() or not 0 <= start <= self.numel - out.numel():
            raise ValueError(
                f"elements {start}..{start + out.numel()} as {out.dtype} asked of {self.name}, which has "
                f"{self.numel} of {self.dtype}"
            )


@dataclass(frozen=True, eq=False)
class InFile(Stored):
    """A tensor that is a run of bytes in its file; the file is open only while it is read."""

    offset: int = field(kw_only=True)

    def read(self, start: int, out: Shaped[Tensor, " count"]) -> None:
        """Read straight into the memory of `out`, with the interpreter's lock released."""
        self._check(start, out)
        if not out.numel():
            return
        room = memoryview(out.view(torch.uint8).numpy().data)
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.offset + start * self.dtype.itemsize)
                while room:
                    got = file.readinto(room)
                    if not got:
                        raise InputError(f"{self.file} was cut short while {self.name} was read from it")
                    room = room[got:]
        except OSError as error:
            raise InputError(f"{self.file} cannot be read any more: {_reason(error)}") from error

    def prefetch(self, start: int, count: int) -> None:
        """Ask for read-ahead of these elements."""
        if hasattr(os, "posix_fadvise"):
            size = self.dtype.itemsize
            with suppress(OSError), open(self.file, "rb", buffering=0) as file:
                place = self.offset + start * size
                os.posix_fadvise(file.fileno(), place, count * size, os.POSIX_FADV_WILLNEED)


@dataclass(frozen=True, eq=False)
class Mapped(Stored):
    """A tensor in a file that is mapped into memory, of which the system holds only what is being read."""

    data: Tensor = field(kw_only=True, repr=False)
    length: int = field(kw_only=True)
    """Bytes of the file when it was mapped: the missing end of a file that was cut must not be touched."""

    def read(self, start: int, out: Shaped[Tensor, " count"]) -> None:
        """Copy from the mapped file, in row-major order whatever the strides are."""
        self._check(start, out)
        if not out.numel():
            return
        if not self.file.is_file() or self.file.stat().st_size < self.length:
            raise InputError(f"{self.file} was cut short while {self.name} was read from it")
        if self.data.is_contiguous():
            out.copy_(self.data.view(-1)[start : start + out.numel()])
            return
        rest, place = torch.arange(start, start + out.numel()), 0
        for size, stride in zip(reversed(self.shape), reversed(self.data.stride()), strict=True):
            place = place + rest % size * stride
            rest = rest // size
        reach = 1 + sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.data.stride(), strict=True)
        )
        torch.index_select(self.data.as_strided((reach,), (1,)), 0, torch.as_tensor(place), out=out)

    def prefetch(self, start: int, count: int) -> None:
        """Leave it to the system, which reads mapped files ahead by itself."""


def open_weights(files: Sequence[Path]) -> dict[str, Stored]:
    """Return the tensors of one checkpoint's files by name, without reading them.

    Raises: InputError naming a file that is damaged, of another format, or not safe to open; or a tensor
    that two of the files hold.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for stored in _tensors(Path(file)):
            if stored.name in found:
                raise InputError(f"{found[stored.name].file} and {file} both hold the tensor {stored.name}")
            found[stored.name] = stored
    return found


def metadata(file: Path) -> dict[str, str]:
    """Return what a file says about itself: the metadata of safetensors, or the plain values beside weights.

    Raises: InputError as `open_weights`.
    """
    check_regular(file)
    if file.suffix == SAFE:
        return _header(file)[0]
    plain = _saved(file).items()
    return {str(key): str(value) for key, value in plain if type(value) in (int, float, str)}


def _tensors(file: Path) -> Iterator[Stored]:
    check_regular(file)
    if file.suffix == SAFE:
        return _safe(file)
    if file.suffix in TORCH:
        return _torch(file)
    raise InputError(f"{file} is no file of weights: accepted are {', '.join((SAFE, *TORCH))}")


def _safe(file: Path) -> Iterator[Stored]:
    _, table, begin = _header(file)
    for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise InputError(
                f"{file} holds {name} as {entry['dtype']}, which cannot be read as numbers: dequantise first"
            )
        offset = begin + entry["data_offsets"][0]
        yield InFile(name, tuple(entry["shape"]), DTYPES[entry["dtype"]], file, offset=offset)


def _header(file: Path) -> tuple[dict[str, str], dict[str, Any], int]:
    """Return the metadata, the table of contents and where the data begin, both checked by safetensors."""
    try:
        with safe_open(file, "pt"), open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            table = json.loads(opened.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} is damaged or cut short: {_reason(error)}") from error
    return table.pop("__metadata__", None) or {}, table, 8 + length


def _torch(file: Path) -> Iterator[Stored]:
    found = _weights(_saved(file))
    if found is None:
        raise InputError(
            f"{file} holds no weights: tensors by name are looked for at its top and under "
            f"{', '.join(PLACES)}"
        )
    within, tensors = found
    first: dict[Any, str] = {}
    length = file.stat().st_size
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise InputError(f"{file} holds {name} as no plain tensor of numbers; save a plain state dict")
        if tensor.data_ptr() % tensor.element_size():  # some of torch's loops crash on such
            raise InputError(f"{file} holds {name} at no multiple of its elements' size, as torch.save would")
        if tensor.numel() > length:
            raise InputError(f"{file} announces {tensor.numel():,} elements of {name}, more than it holds")
        shape = tuple(tensor.shape)
        memory = (tensor.data_ptr(), shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        same = first.setdefault(memory, name)
        shares = "" if same == name else same
        about = {"within": within, "shares": shares, "length": length}
        yield Mapped(name, shape, tensor.dtype, file, data=tensor.detach(), **about)


def _saved(file: Path) -> Mapping[Any, Any]:
    """Return what `torch.save` wrote, its tensors mapped and its code refused."""
    trusted = "where you trust it, load it and save its state dict with safetensors.torch.save_file"
    try:
        with open(file, "rb") as opened:
            start = opened.read(4)
        if start != b"PK\x03\x04":
            raise InputError(
                f"{file} is damaged or in the format of torch before 1.6, not read in slices; {trusted}"
            )
        check_stored(file)
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file} cannot be read: {_reason(error)}") from error
    except Exception as error:  # a damaged archive fails in any way, and so does one that holds code
        raise InputError(
            f"{file} is damaged or holds more than tensors and plain values; {trusted}"
        ) from error
    return saved if isinstance(saved, Mapping) else {}


def _weights(saved: Mapping[Any, Any], depth: int = 3) -> tuple[str, dict[str, Tensor]] | None:
    """Return where in a saved object the weights lie, and the weights."""
    for place in PLACES if depth else ():
        inner = saved.get(place)
        found = _weights(inner, depth - 1) if isinstance(inner, Mapping) else None
        if found:
            return ".".join(filter(None, (place, found[0]))), found[1]
    tensors = {
        name: value for name, value in saved.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    return ("", tensors) if tensors else None


def _reason(error: Exception) -> str:
    """Return the first line of what went wrong, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
