import io
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn.modules.module import register_module_forward_hook

import gramian.tasks.observe as module
import gramian.tasks.observe_page as page_module
from browser import BROWSER, check_page
from gramian.data.text import Document
from gramian.errors import InputError
from gramian.observe import Peak
from gramian.tasks.model_folder import quiet
from gramian.tasks.observe import Layer, Observation, ObserveConfig, observe, observe_model
from gramian.tasks.observe_page import HEADINGS, report_page, sentences, terminal_table, write_report
from gramian.tasks.open_model import Reading, batches, open_model
from huggingface_models import written_by_hand
from language_models import FRAMES, LAYERS, MODELS, built, save

QUIET = Console(quiet=True)
TEXT = "a tired cat sat on a mat; the cat ate a rat, and that was that.\n" * 2
NEURON = 7

every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def saved(folder: Path, name: str, model: object = None) -> Path:
    with quiet():
        save(name, folder, model)
    return folder


def said(observation: Observation) -> str:
    return "\n".join(sentences(observation))


def loud_layer(name: str) -> object:
    """A model of which the second layer writes one neuron far above all others."""
    model = built(name)
    layer = model.get_submodule(LAYERS[name])[1]
    with torch.no_grad():
        if name == "gpt2":
            layer.mlp.c_proj.bias[NEURON] = 50
        elif name == "opt":
            layer.fc2.bias[NEURON] = 50
        elif name == "llama":
            layer.mlp.down_proj.weight[NEURON] *= 1e5
        else:
            layer.output.LayerNorm.bias[NEURON] = 50
    return model


@every_model
def test_a_planted_neuron_is_found_with_its_layer(name, tmp_path, text) -> None:
    seen = observe_model(saved(tmp_path / "m", name, loud_layer(name)), text, device="cpu")
    labels = [layer.label for layer in seen.layers]
    assert labels == ["1", "2", "3", "output"]
    assert [layer.site for layer in seen.layers[:3]] == [f"{LAYERS[name]}.{i}" for i in range(3)]
    kurtosis = [layer.readings["neuron_kurtosis"] for layer in seen.layers]
    assert max(kurtosis[:2]) < 3
    assert kurtosis[2] > 10
    assert seen.layers[2].neurons[0][0] == NEURON
    assert f"Neuron {NEURON} is an outlier, first at layer 3 ({LAYERS[name]}.2)" in said(seen)
    plain = observe_model(saved(tmp_path / "plain", name), text, device="cpu")  # control
    assert "No neuron is an outlier" in said(plain)
    assert max(layer.readings["neuron_kurtosis"] for layer in plain.layers) < 3


@every_model
def test_a_planted_token_is_found_with_its_neuron_and_place(name, tmp_path) -> None:
    model = built(name)
    folder = saved(tmp_path / "m", name)
    opened = open_model(str(folder), device="cpu")
    planted = opened.tokenizer("Z", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[planted, NEURON] = -80
    folder = saved(tmp_path / "planted", name, model)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(TEXT.replace("mat", "Zat", 1) if number == 1 else TEXT)
    seen = observe_model(
        folder, *(tmp_path / f"{i}.txt" for i in range(3)), context=18, batch=3, device="cpu"
    )
    where = [
        (sequence, position)
        for sequence, ids in enumerate(
            row
            for batch in batches(opened, _documents(tmp_path), context=18, batch=1)
            for row in batch["input_ids"].tolist()
        )
        for position, token in enumerate(ids)
        if token == planted
    ]
    peak = seen.layers[0].peak
    assert peak is not None
    assert [(peak.sequence, peak.position)] == where
    assert peak.neuron == NEURON
    assert peak.value < 0
    assert seen.layers[0].token == "Z"
    before = seen.layers[0].before.strip()
    assert before
    assert TEXT[: TEXT.index("mat")].strip().endswith(before)


def _documents(folder: Path) -> tuple[Document, ...]:
    return Reading(text=tuple(folder / f"{i}.txt" for i in range(3))).sample().documents


@every_model
def test_the_numbers_are_those_of_all_activations_in_memory(name, tmp_path, text) -> None:
    """Against the hidden states that the model itself returns, concatenated, in float64."""
    (tmp_path / "short.txt").write_text("nobody else came")
    folder = saved(tmp_path / "m", name)
    reading = Reading(text=(text, tmp_path / "short.txt"), context=24, batch=4)
    seen = observe(
        ObserveConfig(model=str(folder), data=reading, dtype="float64", device="cpu"), console=QUIET
    )
    opened = open_model(str(folder), dtype="float64", device="cpu")
    for number in range(3):
        tokens, later, padded = [], [], []
        for batch in reading.batches(opened, reading.sample().documents):
            with torch.no_grad():
                states = opened.model(**batch, output_hidden_states=True).hidden_states[number]
            real = batch["attention_mask"].bool()
            tokens.append(states[real])
            later.append(states[:, 1:][real[:, 1:]])
            padded.append(states.flatten(0, 1))
        layer = seen.layers[number]
        for readings, parts in ((layer.readings, tokens), (layer.without_first, later)):
            for reading_name, value in oracle(torch.cat(parts)).items():
                assert readings[reading_name] == pytest.approx(value, rel=1e-9), reading_name
        wrong = oracle(torch.cat(padded))  # control: padding changes the numbers
        assert any(
            layer.readings[reading_name] != pytest.approx(wrong[reading_name], rel=1e-3)
            for reading_name in wrong
        )
        assert layer.trace_error < 1e-12
    assert seen.tokens == sum(map(len, tokens))


def oracle(x: torch.Tensor) -> dict[str, float]:
    s = x.square().mean(0)
    centred = x - x.mean()
    own = x - x.mean(1, keepdim=True)
    excess = own.pow(4).mean(1) / own.square().mean(1).square() - 3
    magnitude = x.abs()
    gram = x @ x.T / x.shape[1] / x.square().mean()
    n = len(x)
    spectrum = torch.linalg.eigvalsh(x.T @ x).clamp(min=0)
    share = spectrum / spectrum.sum()
    return {
        "neuron_kurtosis": float(s.square().mean() / s.mean().square()),
        "elementwise_kurtosis": float(centred.pow(4).mean() / centred.square().mean().square()),
        "token_excess_kurtosis": float(excess.clamp(min=0).mean()),
        "max_median_ratio": float((magnitude.amax(1) / magnitude.median(1).values).mean()),
        "max_abs": float(magnitude.max()),
        "token_correlation_mean": float((gram.sum() - gram.diagonal().sum()) / (n * (n - 1))),
        "effective_rank": float(torch.special.entr(share).sum().exp()),
    }


def sinking() -> object:
    """A GPT-2 whose first position is loud in one neuron, on which all heads of the first layer rest."""
    model = built("gpt2")
    attention = model.transformer.h[0].attn.c_attn
    with torch.no_grad():
        model.transformer.wpe.weight[0, 3] = 40
        attention.weight[:, :32] = 0
        attention.weight[3, 16:32] = 1
        attention.bias[:16] = 20
    return model


def test_a_sink_at_the_first_token_is_found(tmp_path, text) -> None:
    seen = observe_model(saved(tmp_path / "m", "gpt2", sinking()), text, device="cpu")
    first = seen.layers[0]
    assert first.readings["sink_rate"] == 1
    assert first.readings["attention_entropy"] < 0.01
    assert seen.layers[1].readings["sink_rate"] == 0
    assert "in layer 1 (transformer.h.0) 100% of the heads rest on the first token" in said(seen)
    assert first.readings["neuron_kurtosis"] > 10
    assert first.without_first["neuron_kurtosis"] < 2
    assert "Without each sequence's first token the largest neuron kurtosis falls from" in said(seen)
    plain = observe_model(saved(tmp_path / "plain", "gpt2"), text, device="cpu")  # control
    assert "Attention sinks nowhere" in said(plain)
    assert "falls from" not in said(plain)


def test_memory_does_not_grow_with_the_text(tmp_path) -> None:
    folder = saved(tmp_path / "m", "gpt2")

    def most_alive(times: int, keep: list | None = None) -> int:
        (tmp_path / "text").write_text(TEXT * times)
        alive: list[weakref.ref] = []
        most = 0

        def look(module, arguments, output) -> None:
            nonlocal most
            if isinstance(output, torch.Tensor):
                alive.append(weakref.ref(output))
                if keep is not None:
                    keep.append(output)
            alive[:] = [each for each in alive if each() is not None]
            most = max(most, len(alive))

        handle = register_module_forward_hook(look)
        try:
            observe_model(folder, tmp_path / "text", batch=4, device="cpu")
        finally:
            handle.remove()
        return most

    assert most_alive(10) == most_alive(1) > 0
    assert most_alive(3, keep=[]) > 2 * most_alive(1)  # control: the count sees what is kept


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_run_folder_is_observed(tmp_path, text) -> None:
    ours, _ = written_by_hand(_made(tmp_path / "run"))
    seen = observe_model(tmp_path / "run", text, device="cpu")
    assert [layer.label for layer in seen.layers] == ["1", "2", "output"]
    assert all("sink_rate" in layer.readings for layer in seen.layers[:2])
    assert len(ours.blocks) == 2


def test_centring_and_named_streams(tmp_path, text) -> None:
    folder = saved(tmp_path / "m", "gpt2")
    plain, centred = (observe_model(folder, text, device="cpu", centre=centre) for centre in (False, True))
    assert plain.layers[1].readings["rms"] > centred.layers[1].readings["rms"]
    named = observe_model(folder, text, device="cpu", streams=("transformer.h.*.mlp",), top=1)
    assert [layer.site for layer in named.layers] == [
        *(f"transformer.h.{i}.mlp" for i in range(3)),
        "transformer.h.2.mlp.output",
        *(f"transformer.h.{i}.attn" for i in range(3)),
    ]
    assert [layer.label for layer in named.layers[-3:]] == [layer.site for layer in named.layers[-3:]]
    assert all(len(layer.neurons) == 1 for layer in named.layers[:4])
    assert "sink_rate" in named.layers[-1].readings
    assert report_page(named).sections
    with pytest.raises(InputError, match="no module matches"):
        observe_model(folder, text, device="cpu", streams=("nothing.*",))


def test_bad_settings_are_named(tmp_path, text) -> None:
    folder = saved(tmp_path / "m", "gpt2")
    for settings, words in (
        ({"top": 0}, "top and attention_sequences must be at least 1"),
        ({"attention_sequences": 0}, "top and attention_sequences must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"context": 64}, "context 64 is longer than the 32 tokens"),
        ({"colour": 1}, "unknown setting 'colour'"),
        ({"data": 1}, "unknown setting 'data'"),
        ({"max_bytes": 0}, "max_bytes must be at least 1"),
    ):
        with pytest.raises(InputError, match=words):
            observe_model(folder, text, device="cpu", **settings)


def test_too_little_memory_is_one_sentence(tmp_path, text, monkeypatch) -> None:
    def full(*_, **__):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(module, "examine", full)
    with pytest.raises(InputError, match="not enough for 8 sequences at once; lower batch or context"):
        observe_model(saved(tmp_path / "m", "gpt2"), text, device="cpu")


@pytest.fixture(scope="module")
def observation(tmp_path_factory) -> Observation:
    """A model whose loudest token would be markup."""
    folder = tmp_path_factory.mktemp("observation")
    model = built("gpt2")
    name = folder / "<i>model & co"
    opened = open_model(str(saved(name, "gpt2", model)), device="cpu")
    with torch.no_grad():
        model.get_input_embeddings().weight[opened.tokenizer("<")["input_ids"][0], NEURON] = 80
    saved(name, "gpt2", model)
    (folder / "text").write_text(TEXT + "<b>")
    data = Reading(text=(folder / "text",))
    return observe(
        ObserveConfig(model=str(name), data=data, output=folder / "out" / "seen", device="cpu"), console=QUIET
    )


def test_the_report_is_whole_and_escaped(observation) -> None:
    path = write_report(observation)
    assert path == observation.folder / "report.html"
    text = path.read_text(encoding="utf-8")
    assert "<i>model" not in text
    assert "&lt;i&gt;model &amp; co" in text
    assert "token &#39;&lt;&#39;" in text
    figures = {path.name for path in (observation.folder / "figures").iterdir()}
    assert {f"{name}.svg" for name in HEADINGS} <= figures

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    read = json.loads((observation.folder / "readings.json").read_text(), parse_constant=refuse)
    assert len(read["layers"]) == 4
    for layer, own in zip(read["layers"], observation.layers, strict=True):
        assert layer["site"] == own.site
        assert layer["readings"] == own.readings
        assert layer["without_first"] == own.without_first
        assert layer["peak"]["neuron"] == own.peak.neuron
        assert layer["neurons"][0] == dict(zip(("neuron", "share"), own.neurons[0], strict=True))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_report_opens_without_errors_or_network(observation, tmp_path) -> None:
    assert check_page(write_report(replace(observation, folder=tmp_path / "seen"))) == []


def test_the_table_fits_a_narrow_terminal(observation) -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(terminal_table(observation))
    printed = console.export_text()
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.count("kurtosis") >= 3  # no heading is broken
    for layer in observation.layers:
        assert f"{layer.readings['neuron_kurtosis']:.3g}" in printed
        assert f"{layer.without_first['neuron_kurtosis']:.3g}" in printed


def test_a_folder_is_replaced_only_if_asked_and_only_an_observations(observation, tmp_path) -> None:
    folder = tmp_path / "seen"
    here = replace(observation, folder=folder)
    write_report(here)
    (folder / "extra").write_text("mine")
    with pytest.raises(InputError, match="already holds an observation"):
        write_report(here)
    assert (folder / "extra").exists()
    write_report(here, overwrite=True)
    assert not (folder / "extra").exists()
    (folder / "readings.json").unlink()
    for overwrite in (False, True):
        with pytest.raises(InputError, match="something that is no observation"):
            write_report(here, overwrite=overwrite)
    config = ObserveConfig(model="nowhere/to.be.found", output=folder)
    with pytest.raises(InputError, match="no observation"):  # before anything is opened
        observe(config, console=QUIET)
    assert ObserveConfig(model=str(tmp_path / "m")).folder == Path("observations/m")
    assert ObserveConfig(model="somebody/opt-125m").folder == Path("observations/opt-125m")


def test_an_interrupt_leaves_no_part(observation, tmp_path, monkeypatch) -> None:
    written = []

    def interrupted(figure, path) -> None:
        written.append(path)
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
        if len(written) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(page_module, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_report(replace(observation, folder=tmp_path / "new" / "seen"))
        assert list((tmp_path / "new").iterdir()) == []
        write_again = replace(observation, folder=tmp_path / "old")
        written[:] = [None] * 3
        write_report(write_again)
        before = {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()}
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            write_report(write_again, overwrite=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()}


def made_up(**changes: object) -> Layer:
    readings = {
        "neuron_kurtosis": 1.0, "token_correlation_mean": 0.1, "effective_rank": 9.0, "rms": 2.0,
        "attention_entropy": 1.5, "sink_rate": 0.0,
    }  # fmt: skip
    layer = Layer(
        "1", "h.0", readings, {"neuron_kurtosis": 1.0}, ((4, 2.0),), Peak(-6.0, 5, 1, 4), "x", "", 1e-16
    )
    return replace(layer, **{**changes, "readings": readings | changes.pop("readings", {})})  # type: ignore


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "The largest value is -6, 3 times the layer's RMS, at neuron 4 of layer 1 (h.0), token 'x'"),
        ({}, "No neuron is an outlier: the loudest, 4 of layer 1 (h.0), has 2 times the mean square"),
        ({}, "The largest neuron kurtosis is 1 with and 1 without each sequence's first token."),
        ({}, "Tokens do not collapse: their mean correlation is at most 0.100"),
        ({}, "Attention sinks nowhere"),
        ({}, "self-check: trace identity holds to 1e-16"),
        ({"neurons": ((4, 9.5),)}, "Neuron 4 is an outlier, first at layer 1 (h.0) and in 1 of 1 streams"),
        ({"readings": {"neuron_kurtosis": 12.0}}, "falls from 12 to 1"),
        ({"readings": {"token_correlation_mean": 0.95}}, "Tokens collapse: their mean correlation is"),
        ({"readings": {"sink_rate": 0.25}}, "Attention sinks: in layer 1 (h.0) 25% of the heads"),
        ({"trace_error": 1e-3}, "self-check FAILED: trace identity is off by 1e-03"),
        ({"trace_error": math.nan}, "self-check FAILED"),
        ({"peak": Peak(math.nan, 0, 0, 4)}, "A value is not finite: at neuron 4 of layer 1 (h.0)"),
        ({"peak": Peak(math.inf, 0, 0, 4)}, "A value is not finite: at neuron 4 of layer 1 (h.0)"),
    ],
)  # fmt: skip
def test_sentences_say_what_the_numbers_do(changes, words) -> None:
    seen = Observation("m", Path("m"), (made_up(**changes),), 10, 2, {})
    assert words in said(seen)


def test_readings_that_are_not_numbers_are_drawn_and_said() -> None:
    nan = dict.fromkeys(HEADINGS, math.nan) | {"rms": math.nan}
    layer = made_up(
        readings=nan, without_first=nan, neurons=((0, math.nan),), peak=None, trace_error=math.nan
    )
    seen = Observation("m", Path("m"), (layer, layer), 10, 2, {})
    assert "self-check FAILED" in said(seen)
    assert "nan" not in said(seen).split("self-check")[0]
    assert report_page(seen).sections
    assert page_module.readings(seen)["layers"][0]["readings"]["rms"] is None
    blind = replace(
        layer, readings={"neuron_kurtosis": 1.0, "token_correlation_mean": 0.0, "effective_rank": 1.0}
    )
    assert "No attention was seen" in said(Observation("m", Path("m"), (blind,), 10, 2, {}))


def test_attention_alone_has_its_sentences() -> None:
    alone = Layer(
        "h.0.attn", "h.0.attn", {"attention_entropy": 1.0, "sink_rate": 0.5}, {}, (), None, "", "", None
    )
    seen = Observation("m", Path("m"), (alone,), 10, 2, {})
    assert said(seen) == (
        "Attention sinks: in h.0.attn 50% of the heads rest on the first token; "
        "the lowest entropy is 1 nats, in h.0.attn."
    )
    assert [section.heading for section in report_page(seen).sections] == ["Attention", "All layers"]


def test_frames_are_those_of_the_tokenizers(tmp_path, text) -> None:
    """The first token of each sequence is the one that the tokenizer puts there, where it puts one."""
    for name, (before, _) in FRAMES.items():
        opened = open_model(str(saved(tmp_path / name, name)), device="cpu")
        for batch in Reading(text=(text,)).batches(opened, Reading(text=(text,)).sample().documents):
            assert bool((batch["input_ids"][:, 0] == 0).all()) == bool(before)
