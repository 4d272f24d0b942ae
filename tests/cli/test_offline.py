"""Nothing asks the network but the id of a model on the hub, and with --offline not even that."""

import os
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest

from gramian.cli.main import run
from gramian.offline import NAMES, kept_offline, offline

SHAPE = ["--width", "16", "--depth", "1", "--heads", "2", "--context", "16", "--vocabulary", "300"]
SHORT = ["--steps", "3", "--evaluation-batches", "1", "--max-bytes", "60000"]
COMMANDS = {
    "predict": ["predict", "--depth", "3", "--width", "8", "--networks", "1"],
    "predict a block": ["predict", "sas", "--depth", "1", "--width", "8", "--tokens", "4", "--networks", "1"],
    "predict --sde": ["predict", "--sde", "--depth", "4", "--width", "8", "--tokens", "3", "--paths", "4",
                      "--networks", "2", "--no-region"],
    "compare": ["compare", "--blocks", "sas_p", *SHAPE, *SHORT],
    "regress": ["regress", "--members", "2", "--steps", "3", "--widths", "4", "--noise", ".1",
                "--no-compare"],
    "trajectory": ["trajectory"],
    "prune": ["prune", "--widths", "4", "--train-steps", "3", "--steps", "2", "--count", "200",
              "--density", "0.5"],
    "graphs": ["graphs", "--sizes", "8", "4", "4", "--epochs", "1", "--layers", "1", "--parameters", "3000"],
    "reconstruct": ["reconstruct", "--size", "16", "--views", "8", "--steps", "4", "--samples", "2",
                    "--compare", "fbp"],
    "list": ["list"],
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What was asked of the network; every question fails."""
    found: list[str] = []

    def refuse(*args, **kwargs):
        found.append(repr(args[-1]))
        raise OSError("the network is blocked in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # read once, when it is imported
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "trajectory")) for name in COMMANDS]
)
def test_embedded_defaults_ask_nothing(name, place, asked, capfd) -> None:
    assert run(COMMANDS[name]) == 0, capfd.readouterr().err
    assert asked == []


def test_what_reads_a_run_asks_nothing(place, asked, capfd) -> None:
    text = ["--max-bytes", "2000"]
    for command in (
        ["train", *SHAPE, *SHORT],
        ["generate", "runs/train", "--tokens", "2"],
        ["evaluate", "runs/train", *text],
        ["observe", "runs/train", *text],
        ["quantise", "runs/train", *text, "--schemes", "static", "--rounds", "1", "--no-layers"],
        ["trajectory", "runs/train", "--overwrite"],
    ):
        code = run(command)
        said = capfd.readouterr().err
        assert code == 0 or (command[0] == "trajectory" and "checkpoint" in said), said
    assert asked == []


@pytest.mark.parametrize("command", ["observe", "quantise"])
def test_a_hub_id_is_asked_for_only_online(command, place, asked, capfd, monkeypatch) -> None:
    name = "nobody/of-this-name"
    for arguments in (["--offline", command, name], [command, name, "--offline"]):
        assert run(arguments) == 1
        said = capfd.readouterr().err.strip()
        assert "was not fetched earlier, and offline nothing is" in said
        assert said.count("\n") == 0
    for variable in NAMES:
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1")
            assert run([command, name]) == 1
            assert "offline nothing is" in capfd.readouterr().err
    assert asked == []
    assert run([command, name]) == 1
    assert "cannot be fetched" in capfd.readouterr().err
    assert asked != []  # so that the fixture does see what is asked


def test_our_models_are_not_fetched_offline(place, asked, monkeypatch) -> None:
    from gramian.interop.huggingface import GramianForCausalLM

    monkeypatch.setenv("GRAMIAN_OFFLINE", "1")
    with pytest.raises(OSError, match="cached files"):
        GramianForCausalLM.from_pretrained("nobody/of-this-name")
    assert asked == []


def test_the_environment_is_read_and_put_back(monkeypatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert not offline()
    for value, meant in {"1": True, "true": True, "ON": True, " yes ": True, "0": False, "": False}.items():
        monkeypatch.setenv("GRAMIAN_OFFLINE", value)
        assert offline() is meant
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    before = dict(os.environ)
    with pytest.raises(ValueError, match="of the block"), kept_offline():
        assert offline()
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        raise ValueError("of the block")
    assert dict(os.environ) == before
