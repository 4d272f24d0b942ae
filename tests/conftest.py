"""One thread a worker, so that `pytest -n 2` does not make two cores fight, and a cache of the tests' own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from programs import Programs
from stories import write_story

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test, so that no worker waits for it at the end."""
    items.sort(key=lambda item: "test_readme" not in item.nodeid)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["GRAMIAN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> None:
    """Tests kill processes and never the machine; syncs would take a tenth of their time."""
    os.fsync = lambda descriptor: None


@pytest.fixture(scope="session")
def programs(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    found = Programs(tmp_path_factory.mktemp("programs"))
    yield found
    found.close()


@pytest.fixture
def story(tmp_path: Path) -> Path:
    return write_story(tmp_path / "story")
