"""Modules by name: patterns that match segment by segment, or a class."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from gramian.errors import InputError


def matching(model: nn.Module, wanted: str | Sequence[str] | type[nn.Module]) -> dict[str, nn.Module]:
    """Modules by name, in the order of the model."""
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(wanted, type):
        found = {name: module for name, module in modules.items() if isinstance(module, wanted)}
        if not found:
            raise _no_match(wanted.__name__, modules)
        return found
    patterns = [wanted] if isinstance(wanted, str) else wanted
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in modules):
            raise _no_match(pattern, modules)
    return {name: m for name, m in modules.items() if any(_matches(pattern, name) for pattern in patterns)}


def _matches(pattern: str, name: str) -> bool:
    wanted, segments = pattern.split("."), name.split(".")
    if wanted[0] == "**":
        wanted = wanted[1:]
        segments = segments[max(0, len(segments) - len(wanted)) :]
    return len(wanted) == len(segments) and all(map(fnmatchcase, segments, wanted))


def _no_match(wanted: str, modules: Iterable[str]) -> InputError:
    shapes = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in modules))
    shown = ", ".join(shapes[:12]) + (f" and {len(shapes) - 12} more" if len(shapes) > 12 else "")
    return InputError(f"no module matches {wanted!r}; the model's modules are {shown or 'none'}")
