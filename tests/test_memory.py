"""What memory there is, in words and numbers; what is refused before it is allocated, and what is not."""

import os
import re
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from gramian import memory
from gramian.cli.main import run
from gramian.errors import InputError
from gramian.memory import check_memory, room, shortage, size
from gramian.nn.blocks import BLOCKS
from gramian.nn.transformer import Transformer, TransformerConfig
from gramian.tasks.architectures import PLAIN, Architecture, network
from gramian.tasks.field_fits import Network

HUGE = "1000000000000"
SAID = re.compile(r"gramian: .* would need about \S+ \S+ of memory, and there are [\d.]+ [kMGT]B")
SMALL = ["--width", "8", "--depth", "1", "--heads", "2", "--context", "8", "--vocabulary", "300"]


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (3.2e12, "3.2 TB"), (23e9, "23 GB"),
     (999.7e9, "1 TB"),
     (5e20, "500 EB"), (10**21, "10^21 bytes"), (7 * 10**300, "10^300 bytes")],
)  # fmt: skip
def test_sizes_in_words(count: float, words: str) -> None:
    assert size(count) == words


def test_the_room_is_that_of_the_machine_or_of_a_limit(tmp_path: Path, monkeypatch) -> None:
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**27 < room() <= max(installed, memory._largest_gpu())
    monkeypatch.setattr(memory, "CONTROL", tmp_path)
    monkeypatch.setattr(memory, "_largest_gpu", lambda: 0)
    (tmp_path / "memory.max").write_text("max\n")
    assert room() <= installed
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    assert room() == 2**30
    check_memory(2**30, "this")
    with pytest.raises(InputError, match=r"^this would need about 1.07 GB of memory, and there are 1.07 GB$"):
        check_memory(2**30 + 1, "this")
    monkeypatch.setattr(memory, "_largest_gpu", lambda: 2**31)
    check_memory(2**31, "this")


def test_a_limit_of_the_shell_is_seen() -> None:
    limit = 3 * 2**30
    done = subprocess.run(
        [sys.executable, "-c", "from gramian.memory import room; print(room())"],
        capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert int(done.stdout) <= limit


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.empty(10**15),
        lambda: torch.empty(10**12, 10**12),
        lambda: torch.empty(10**20),
        lambda: torch.Generator().manual_seed(10**20),
        lambda: np.empty(10**15),
        lambda: np.empty((10**12, 10**12)),
        lambda: bytearray(10**18),
        lambda: 1.0 * 10**400,
    ],
)
def test_what_libraries_say_becomes_a_sentence(ask) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011  (each library has its own)
        ask()
    said = shortage(raised.value)
    assert said is not None
    assert "\n" not in said
    assert re.search(r"more memory than there is|is too large for what it is used for", said)


def test_other_errors_are_left_alone(monkeypatch) -> None:
    for error in (ValueError("a shape does not fit"), RuntimeError("mat1 and mat2"), KeyError("numel")):
        assert shortage(error) is None

    def wrong(*args, **options):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("gramian.tasks.predict.predict", wrong)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run(["predict"])


def test_a_shortage_ends_a_command_in_one_sentence(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gramian.tasks.predict.predict", lambda *_: torch.empty(10**15))
    assert run(["predict"]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"gramian: this takes more memory than there is: 4 PB were asked for .*\n", said)


ABSURD = [
    *(
        ["train", *SMALL, option, HUGE]
        for option in ("--width", "--depth", "--mlp-width", "--context", "--batch")
    ),
    ["train", *SMALL, "--vocabulary", HUGE],
    ["train", *SMALL, "--steps", "1" + "0" * 15],
    ["train", *SMALL, "--depth", "1" + "0" * 30],
    ["compare", *SMALL, "--width", HUGE],
    ["compare", *SMALL, "--batch", HUGE],
    *(["predict", option, HUGE] for option in ("--depth", "--width", "--networks")),
    *(["predict", "residual_convolution", option, HUGE] for option in ("--depth", "--width")),
    *(["predict", "sas", option, HUGE] for option in ("--depth", "--width", "--tokens")),
    *(["predict", "--sde", option, HUGE] for option in ("--width", "--tokens", "--paths", "--networks")),
    *(
        ["reconstruct", option, HUGE]
        for option in ("--width", "--depth", "--samples", "--levels", "--features")
    ),
    ["reconstruct", "--size", "16", "--views", "8", "--uncertainty", "ensemble", "--members", HUGE],
    ["reconstruct", "--size", "16", "--views", "8", "--uncertainty", "hmc", "--chains", HUGE],
    ["reconstruct", "--encoding", "fourier", "--waves", HUGE],
    *(["regress", option, HUGE] for option in ("--members", "--widths")),
    ["prune", "--widths", HUGE],
    ["prune", "cnn", "--widths", HUGE],
    ["prune", "--draws", HUGE],
    ["graphs", "--sizes", "8", "4", "4", "--parameters", HUGE, "--layers", "100000"],
]


@pytest.mark.parametrize("arguments", ABSURD, ids=lambda each: " ".join(each)[:70])
def test_absurd_numbers_are_refused_with_what_they_need(
    arguments, tmp_path: Path, story, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    text = ["--text", str(story)] if arguments[0] in ("train", "compare") else []
    assert run([*arguments, *text]) == 1
    said = capsys.readouterr().err.strip()
    assert SAID.fullmatch(said), said
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["graphs", "--layers", HUGE],
        ["graphs", "--encoding", "random_walk", "--encoding-size", HUGE],
        ["graphs", "--sizes", HUGE, "1", "1"],
        ["reconstruct", "--views", HUGE],
        ["reconstruct", "--size", HUGE],
        ["reconstruct", "--detectors", HUGE],
        ["regress", "--seed", HUGE],
        ["train", "--seed", "1" + "0" * 30],
        ["predict", "--seed", "1" + "0" * 30],
    ],
    ids=" ".join,
)
def test_other_numbers_out_of_range_are_one_sentence(
    arguments, tmp_path: Path, story, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    text = ["--text", str(story), *SMALL] if arguments[0] == "train" else []
    assert run([*arguments, *text]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("gramian: ")
    assert "\n" not in said


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "more", [{}, {"gated": True, "mlp_width": 48}, {"key_heads": 1}, {"positions": "rotary"}]
)
def test_no_transformer_is_smaller_than_is_said(block: str, more: dict) -> None:
    config = TransformerConfig(vocabulary=50, width=16, depth=3, heads=4, context=8, block=block, **more)
    try:
        model = Transformer(config)
    except InputError:  # not of this block
        return
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert numbers / 4 < config.least_parameters <= numbers


def test_a_transformer_without_numbers_is_not_refused_for_them() -> None:
    config = TransformerConfig(vocabulary=50, width=2**21, depth=1, heads=4, context=8)
    with pytest.raises(InputError, match=r"1 blocks of width 2,097,152 .* would need about"):
        Transformer(config)
    with torch.device("meta"):
        assert Transformer(config).config.least_parameters > 2**42
    with pytest.raises(InputError, match="would need about"), torch.device("meta"):
        Transformer(TransformerConfig(vocabulary=50, width=4, depth=10**9, heads=2, context=8))


@pytest.mark.parametrize("name", [*PLAIN, "sas_p", "pre_norm"])
def test_no_network_is_smaller_than_is_said(name: str) -> None:
    architecture = Architecture(name=name, depth=4, width=32, tokens=4)
    finite = network(architecture, 3, 0)
    weights = sum(value.numel() for layer in finite.layers for value in layer.parameters())
    assert 8 * weights / 2 < architecture.least_bytes() - 5000 * 4 <= 8 * weights + 8 * 4 * (64 * 32 + 16)


@pytest.mark.parametrize("encoding", ["hash", "fourier", "sine"])
def test_no_field_is_smaller_than_is_said(encoding: str) -> None:
    made = Network(encoding=encoding, width=32, depth=3, waves=20)
    weights = sum(value.numel() for value in made.build(16, 0, dropout=False).parameters())
    assert 0 < made.least_parameters <= weights


def test_sizes_grow_with_their_settings() -> None:
    for smaller, larger in pairwise((1, 10, 100)):
        assert Architecture(depth=smaller).least_bytes() < Architecture(depth=larger).least_bytes()
        assert Architecture(width=smaller).least_bytes() < Architecture(width=larger).least_bytes()
