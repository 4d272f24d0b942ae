"""The architecture's rules: who may import whom, how long a file may be, what it may be called."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "gramian"
RANKS = {
    **dict.fromkeys(("errors", "files", "core"), 0),
    **dict.fromkeys(("nn", "observe", "bayes", "compress", "imaging", "data"), 1),
    **dict.fromkeys(("theory", "train", "report"), 2),
    "interop": 3,
    "tasks": 4,
    "systems": 5,
    "cli": 6,
    "__main__": 7,
}
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST = 400


def home(path: Path) -> str:
    """Return the package or top-level module that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(source: str) -> set[str]:
    """Return the packages of gramian that a source imports, function bodies included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("gramian.")}
    return found


def forbidden(package: str, source: str) -> set[str]:
    """Return the imports that do not point strictly downwards (top-level modules serve everyone)."""
    lower = {name for name, rank in RANKS.items() if rank < RANKS[package]}
    return imported(source) - lower - {package, "errors", "files", "__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_file(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}
    if path.parent == SOURCE and path.stem == "__init__":
        return
    assert home(path) in RANKS
    assert forbidden(home(path), source) == set()


def test_the_rules_notice_a_breach() -> None:
    assert forbidden("core", "from gramian.nn.blocks import sas") == {"nn"}
    assert forbidden("observe", "def f():\n    import gramian.compress.quantise") == {"compress"}
    assert forbidden("train", "from gramian import tasks") == {"tasks"}
    assert forbidden("tasks", "from gramian.train.loop import Trainer\nimport gramian.nn.init") == set()


def test_core_imports_torch_alone() -> None:
    allowed = {"torch", "jaxtyping", "gramian", *sys.stdlib_module_names}
    for path in (SOURCE / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).split(".")[0] in allowed


def test_importing_gramian_is_light() -> None:
    heavy = ("transformers", "matplotlib", "scipy", "accelerate", "tokenizers", "jinja2")
    program = f"import sys, gramian; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_executable_is_loaded_from_files() -> None:
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        assert "pickle" not in source.replace("allow_pickle=False", "")
        for line in source.splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line
            assert "np.load(" not in line or "allow_pickle=False" in line
