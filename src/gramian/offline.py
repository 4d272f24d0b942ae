"""Whether the network may be asked: for a model of the hub alone, and never where the user says offline."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("GRAMIAN_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Environment variables any of which means offline; the last two are Hugging Face's."""

TRUE = ("1", "on", "true", "yes")


def offline() -> bool:
    """Return whether the environment says that nothing may be fetched."""
    return any(os.environ.get(name, "").strip().lower() in TRUE for name in NAMES)


@contextmanager
def kept_offline() -> Iterator[None]:
    """Say offline, to this library and to Hugging Face's, while the block runs."""
    before = {name: os.environ.get(name) for name in NAMES}
    os.environ.update(dict.fromkeys(NAMES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
