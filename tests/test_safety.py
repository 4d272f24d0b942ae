"""What the source never does with what it was given: run it, unpickle it, follow it out of its folder."""

import ast
import builtins
from pathlib import Path

import pytest

from gramian.cli.main import run
from gramian.data.text import read
from gramian.errors import InputError
from gramian.reading import check_inside
from gramian.tasks.language import run_folder
from gramian.tasks.model_folder import quiet
from gramian.tasks.open_model import open_model
from language_models import save

SOURCE = Path(__file__).parents[1] / "src" / "gramian"
MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "xmlrpc", "code",
    "codeop", "requests", "urllib", "http", "ftplib", "telnetlib", "smtplib", "httpx", "aiohttp",
}  # fmt: skip
"""Modules that rebuild objects from bytes, run code or reach the network."""

CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
ENDS = {
    "system", "popen", "read_pickle", "to_pickle", "extractall", "mktemp", "unsafe_load",
    "load_state_dict_from_url", "all_gather_object", "broadcast_object_list", "gather_object",
    "scatter_object_list",
}  # fmt: skip
"""Functions by the last part of their name, whoever has them."""

NEEDED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "format.read_array": ("allow_pickle", False),
}
"""Readers, and the argument that they have to be given."""

FORBIDDEN = {
    "shell": True,
    "trust_remote_code": True,
    "allow_pickle": True,
    "weights_only": False,
    "use_safetensors": False,
}


def named(node: ast.expr) -> str:
    """Return the dotted name of what is called, or of its last parts."""
    if isinstance(node, ast.Attribute):
        return f"{named(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "…"


def dangers(source: str) -> list[str]:
    """Return what a source does that is never to be done with data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names if each.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = named(node.func)
            given = {
                each.arg: each.value.value if isinstance(each.value, ast.Constant) else None
                for each in node.keywords
            }
            needed = next((rule for key, rule in NEEDED.items() if f".{name}".endswith(f".{key}")), None)
            if (
                name in CALLS
                or name.rpartition(".")[2] in ENDS
                or name.startswith(("torch.hub.", "torch.jit.load"))
            ):
                found.append(name)
            if needed is not None and given.get(needed[0]) is not needed[1]:
                found.append(f"{name} without {needed[0]}")
            found += [f"{key}={value}" for key, value in FORBIDDEN.items() if given.get(key) is value]
            if {"shell", "trust_remote_code"} & {key for key, value in given.items() if value is None}:
                found.append(f"{name} with what is not constant")
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_source(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from joblib import load",
        "import urllib.request",
        "eval('1')",
        "exec(x)",
        "import os\nos.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=wanted)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=wanted)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.lib.format.read_array(stream)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=config.trust)",
        "AutoModel.from_pretrained(path, use_safetensors=False)",
        "zipfile.ZipFile(path).extractall(folder)",
        "torch.hub.load('a', 'b')",
        "dist.all_gather_object(a, b)",
    ],
)
def test_the_rules_notice_a_breach(source: str) -> None:
    assert dangers(source) != []


def test_the_rules_allow_what_is_safe() -> None:
    assert (
        dangers(
            "model.eval()\nmake().eval()\nre.compile('a')\ntorch.load(p, weights_only=True)\nself.load(p)"
        )
        == []
    )
    assert dangers("np.load(p, allow_pickle=False)\nnp.lib.format.read_array(s, allow_pickle=False)") == []
    assert set(CALLS) <= set(dir(builtins))


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "../../x", "/x", "/etc/passwd", "a/b", "a/../b", "a/", ".hidden", "a\0b", "a\nb",
     "a\x1b[31m", "\ud800", "./a"],
)  # fmt: skip
def test_a_run_stays_in_its_folder(name: str) -> None:
    with pytest.raises(InputError, match="plain folder name") as refused:
        run_folder(Path("runs"), name)
    assert "\n" not in str(refused.value)
    assert "\0" not in str(refused.value)


@pytest.mark.parametrize("name", ["a", "two words", "été", "a.b", "-x", "a..b", "CON", "<b>", "日本"])
def test_names_that_are_used(name: str) -> None:
    assert run_folder(Path("runs"), name) == Path("runs", name)


def test_links_out_of_a_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("what nobody asked for")
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_text("what was asked for")
    (folder / "again.txt").symlink_to(folder / "a.txt")
    assert len(list(read([folder], "text", "**/*"))) == 2
    link = folder / "inner" / "b.txt"
    link.symlink_to("../../secret.txt")
    with pytest.raises(InputError, match=r"b.txt is a link to .*secret.txt, out of the folder"):
        list(read([folder], "text", "**/*"))
    link.unlink()
    (folder / "outer").symlink_to(tmp_path)
    (folder / "outer2.txt").symlink_to(folder / "outer" / "secret.txt")
    with pytest.raises(InputError, match="is a link to"):
        list(read([folder], "text", "*"))
    assert list(read([secret], "text", "*"))  # what is named itself is read


def test_links_of_a_snapshot_lead_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    blobs = tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "x").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/x")
    check_inside(snapshot / "config.json", snapshot)
    (tmp_path / "other").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../../other")
    with pytest.raises(InputError, match="is a link to"):
        check_inside(snapshot / "tokenizer.json", snapshot)


def test_a_failure_is_told_without_control_characters(capsys) -> None:
    assert run(["train", "--text", "no\x1b[31m\nsuch\udcff", "--name", "a"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("gramian: no [31m such  is not a file")
    assert said.count("\n") == 1


def test_a_model_whose_file_is_a_link_out_of_it(tmp_path: Path) -> None:
    with quiet():
        save("gpt2", tmp_path / "model")
    assert open_model(str(tmp_path / "model"), device="cpu").causal
    (tmp_path / "model" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (tmp_path / "model" / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer.json is a link to .*, out of the folder"):
        open_model(str(tmp_path / "model"), device="cpu")
