"""The programs of documentation pages run as they stand."""

import re
from pathlib import Path

import pytest

from programs import Programs

DOCS = Path(__file__).parents[1] / "docs"


def programs_of(page: str, heading: str) -> list[str]:
    """Return the Python programs of a page's section."""
    text = (DOCS / page).read_text(encoding="utf-8")
    section = text[text.index(heading) + len(heading) :].partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("page", "heading"),
    [
        ("ntk_ensemble.md", "## From Python"),
        ("pac_pruning.md", "## From Python"),
        ("ct_field.md", "## From Python"),
        ("frameworks.md", "## scikit-learn"),
        ("frameworks.md", "## The trajectory of a training"),
        ("frameworks.md", "## PyTorch Geometric"),
        ("scale_out.md", "## From Python"),
    ],
)
def test_programs_run(page: str, heading: str, tmp_path: Path, programs: Programs) -> None:
    (program,) = programs_of(page, heading)
    done = programs.run(tmp_path, "text", program, warned="error")
    assert done.code == 0, done.stderr
    assert done.stdout.strip()
