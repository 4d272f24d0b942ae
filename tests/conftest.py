"""One thread a worker, so that `pytest -n 2` does not make two cores fight, and a cache of the tests' own."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["GRAMIAN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def story(tmp_path):
    """A folder of small texts that a small model can learn from."""
    folder = tmp_path / "story"
    folder.mkdir()
    for number in range(12):
        lines = [
            f"the {kind} number {n} is {(n * 7 + number) % 10}" for n in range(60) for kind in ("cat", "dog")
        ]
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder
