"""The architecture's rules: who may import whom, how long a file may be, what it may be called."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "gramian"
RANKS = {
    **dict.fromkeys(("errors", "files", "memory", "offline", "ranks", "reading", "core"), 0),
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
WRITING_METHODS = {
    "write_text", "write_bytes", "touch", "save_pretrained", "savefig", "save_as", "to_csv", "tofile",
}  # fmt: skip
WRITING_CALLS = {
    "save_file", "save_model", "imsave", "dcmwrite", "np.save", "np.savez", "np.savez_compressed",
    "np.savetxt", "torch.save", "json.dump", "os.write", "os.truncate", "os.rename", "os.replace",
    "shutil.copy", "shutil.copyfile", "shutil.copytree", "shutil.move", "shutil.rmtree",
    "tempfile.mkstemp", "tempfile.mkdtemp", "SummaryWriter",
}  # fmt: skip
BARE = {
    ("observe/record.py", "open"),  # appends, and mends a torn end
    ("report/style.py", "savefig"),  # into memory
    ("train/checkpoint.py", "os.rename"),  # of a damaged checkpoint
    ("train/run.py", "os.replace"),  # of settings.json, when its run is to go
    ("train/run_lock.py", "os.truncate"),
    ("train/run_lock.py", "os.write"),
    ("cli/main.py", "open"),  # of /dev/null
}
"""What may write without `gramian.files`."""


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
    return imported(source) - lower - {package, "errors", "files", "memory", "__version__"}


def bare_writes(source: str) -> set[str]:
    """Return the calls that write outside a block of `atomic_file` or `atomic_folder`."""
    tree = ast.parse(source)
    atomic = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any("atomic_" in ast.unparse(item) for item in node.items)
        for inner in ast.walk(node)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node not in atomic]
    return {name for call in calls if (name := written_by(call)) is not None}


def written_by(call: ast.Call) -> str | None:
    """Return the name of a call that writes a file."""
    whole, name = ast.unparse(call.func), getattr(call.func, "attr", None)
    if whole in WRITING_CALLS:
        return whole
    if name in WRITING_METHODS:
        return name
    if whole == "open" or name == "open":
        given = [
            *call.args[whole == "open" :][:1],
            *(each.value for each in call.keywords if each.arg == "mode"),
        ]
        modes = (each.value for each in given if isinstance(each, ast.Constant))
        if any(isinstance(mode, str) and re.search("[wax+]", mode) for mode in modes):
            return "open"
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_file(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}
    where = path.relative_to(SOURCE).as_posix()
    assert where == "files.py" or {(where, name) for name in bare_writes(source)} <= BARE
    if path.parent == SOURCE and path.stem == "__init__":
        return
    assert home(path) in RANKS
    assert forbidden(home(path), source) == set()


def test_the_rules_notice_a_breach() -> None:
    assert forbidden("core", "from gramian.nn.blocks import sas") == {"nn"}
    assert forbidden("observe", "def f():\n    import gramian.compress.quantise") == {"compress"}
    assert forbidden("train", "from gramian import tasks") == {"tasks"}
    assert forbidden("tasks", "from gramian.train.loop import Trainer\nimport gramian.nn.init") == set()


def test_the_rules_notice_a_bare_write() -> None:
    assert bare_writes("path.write_text('x')") == {"write_text"}
    assert bare_writes("with path.open('wb') as file:\n    np.save(file, x)") == {"open", "np.save"}
    assert bare_writes("open(path, mode='a')") == {"open"}
    assert bare_writes("with atomic_file(path) as temporary:\n    pass\nsave_file(x, path)") == {"save_file"}
    assert bare_writes("import shutil\nshutil.rmtree(folder)") == {"shutil.rmtree"}
    assert bare_writes("with atomic_file(path) as t, t.open('wb') as file:\n    np.save(file, x)") == set()
    assert bare_writes("write_text(path, 'x'); path.open('rb'); open(path); name.replace('a', 'b')") == set()


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
