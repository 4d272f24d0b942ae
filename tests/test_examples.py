"""Every example runs and prints something; what README shows of it is what it prints."""

from pathlib import Path

import pytest

from programs import Programs

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
LONG = (
    "infinitely_deep_kernels",
    "long_range_graphs_with_pyg",
    "how_far_does_a_graph_network_see",
    "how_sure_is_a_ct_slice",
)


def marked(path: Path) -> object:
    return pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in LONG else ())


@pytest.mark.parametrize("path", [marked(path) for path in EXAMPLES])
def test_example(path: Path, tmp_path: Path, programs: Programs) -> None:
    done = programs.run(tmp_path, "file", str(path))
    assert done.code == 0, done.stderr
    assert done.stdout.strip()
