"""Names that one tensor has in different checkpoints: wrappers' prefixes, a user's rules, a guess at one."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher

from gramian.errors import InputError

WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
"""Segments that compiling, sharding and recomputing put into names."""

GUESSES = 200
"""Tensors of one shape that are thought of as another's new name."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Renaming:
    """A rule OLD=NEW for one name, or OLD*=NEW* for all names that begin with OLD."""

    old: str
    new: str
    begins: bool

    @classmethod
    def of(cls, rule: str) -> "Renaming":
        """Read a rule.

        Raises: InputError for one of neither form.
        """
        found = re.fullmatch(r"([^=*]*)(\*?)=([^=*]*)(\*?)", rule)
        if not found or found[2] != found[4] or not (found[2] or (found[1] and found[3])):
            raise InputError(f"the renaming {rule!r} is neither OLD=NEW nor OLD.*=NEW.*")
        return cls(found[1], found[3], bool(found[2]))

    def matches(self, name: str) -> bool:
        """Whether the rule is about a name."""
        return name.startswith(self.old) if self.begins else name == self.old

    def renamed(self, name: str) -> str:
        """Return the new name; of a name that the rule is not about, the name."""
        return self.new + name[len(self.old) :] if self.matches(name) else name


def own_names(names: Iterable[str]) -> dict[str, str]:
    """Return each name without what wrappers of a model put into it, such as `module.` before all names."""
    own = {name: WRAPPERS.sub("", name).removeprefix(".") for name in names}
    while own and all(name.startswith("module.") for name in own.values()):
        own = {name: short.removeprefix("module.") for name, short in own.items()}
    return own


def natural(name: str) -> list[tuple[str, int]]:
    """Return what to sort by so that layers.2 comes before layers.10."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name)]


def suggestion(wanted: Mapping[str, Shape], there: Mapping[str, Shape]) -> str | None:
    """Return the rule by which a tensor that is `there` may be the first that is `wanted`, by shape and name.

    A rule about a prefix is preferred where it explains more than one name.
    """
    if not wanted:
        return None
    new = next(iter(wanted))
    same = [old for old, shape in there.items() if shape == wanted[new]][:GUESSES]
    rules = [Renaming(*_prefixes(old, new), begins=True) for old in same]
    explained = [
        sum(wanted.get(rule.renamed(old)) == shape for old, shape in there.items()) for rule in rules
    ]
    alike = [SequenceMatcher(None, old, new, autojunk=False).ratio() for old in same]
    best = max(range(len(same)), key=lambda index: (explained[index], alike[index]), default=None)
    if best is None:
        return None
    if explained[best] < 2:
        return f"{same[best]}={new}"
    longer = rules[best].new.startswith(rules[best].old)  # would also change the names that are right
    rule = (rules[best].new, rules[best].old) if longer else (rules[best].old, rules[best].new)
    return f"{rule[0]}*={rule[1]}*"


def _prefixes(old: str, new: str) -> tuple[str, str]:
    """Return what two names begin with before the segments that they end with alike."""
    ends, other = old.split("."), new.split(".")
    while ends and other and ends[-1] == other[-1]:
        ends.pop()
        other.pop()
    return "".join(f"{part}." for part in ends), "".join(f"{part}." for part in other)
