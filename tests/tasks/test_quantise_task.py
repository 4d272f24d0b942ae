"""What the task says of a model equals what is computed by hand, and what it exports opens again."""

import builtins
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gramian.compress import torch_ao
from gramian.data.text import Document
from gramian.errors import InputError, MissingExtraError
from gramian.interop.huggingface import GramianConfig, GramianForCausalLM
from gramian.tasks.model_folder import quiet
from gramian.tasks.open_model import Reading, open_model
from gramian.tasks.quantise import (
    SCHEMES,
    Quantisation,
    QuantiseConfig,
    divide,
    head_of,
    layer_names,
    quantise,
)
from gramian.tasks.quantise_page import layers_table, report_page, schemes_table, sentences, write_report
from gramian.tasks.quantised_model import load_quantised, save_quantised
from language_models import SIZES, save

torch_ao.quieten()
pytest.importorskip("torchao")
QUIET = Console(quiet=True)
KINDS = ("int8_dynamic", "int8_weight", "int4_weight")
LOUD = 1
"""The layer whose MLP has one channel a thousand times louder than it need be."""


def llama(**more) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            **{**SIZES, "vocab_size": 272}, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=32, initializer_range=0.2, **more,
        )
    )  # fmt: skip


def gpt2(**more) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            **SIZES, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2, **more
        )
    )  # fmt: skip


def ours() -> GramianForCausalLM:
    config = GramianConfig(vocabulary=272, context=32, width=32, depth=2, heads=2, block="sas_p")
    return GramianForCausalLM(config)


BUILDERS = {"llama": llama, "gpt2": gpt2, "ours": ours}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Models of three kinds; "loud" is "llama" with a channel louder before and softer after the product."""
    root = tmp_path_factory.mktemp("models")
    with quiet(), torch.random.fork_rng():
        for name, builder in BUILDERS.items():
            torch.manual_seed(0)
            save("gpt2", root / name, builder().eval())
        torch.manual_seed(0)
        loud = llama().eval()
        mlp = loud.model.layers[LOUD].mlp
        with torch.no_grad():
            mlp.up_proj.weight[3] *= 1000
            mlp.down_proj.weight[:, 3] /= 1000
        save("gpt2", root / "loud", loud)
    return {name: root / name for name in (*BUILDERS, "loud")}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    words = ("a", "tired", "cat", "sat", "on", "the", "mat", "and", "ate", "nobody", "else", "came", "so")
    draw = torch.Generator().manual_seed(0)
    for number in range(8):
        drawn = torch.randint(len(words), (36,), generator=draw)
        (folder / f"{number}.txt").write_text(" ".join(words[i] for i in drawn) + "\n")
    return folder


def config_of(folder: Path, text: Path, **more) -> QuantiseConfig:
    data = Reading(text=(text,), batch=4, context=32)
    return QuantiseConfig(model=str(folder), data=data, calibration_batches=4, rounds=1, device="cpu", **more)


@pytest.fixture(scope="module")
def found(folders, text) -> Quantisation:
    return quantise(config_of(folders["llama"], text, schemes=tuple(SCHEMES)), console=QUIET)


@pytest.fixture(scope="module")
def opened(folders) -> dict:
    return {name: open_model(str(folder), device="cpu") for name, folder in folders.items()}


def loss_by_hand(model, tokenizer, documents, context: int = 32) -> float:
    """Each stretch by itself, without padding, one token's probability after the other."""
    nats: list[float] = []
    for document in documents:
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), context):
            stretch = torch.tensor([ids[start : start + context]])
            with torch.no_grad():
                scores = model(input_ids=stretch).logits[0].double()
            for place in range(stretch.shape[1] - 1):
                nats.append(-float(scores[place].log_softmax(0)[stretch[0, place + 1]]))
    return math.fsum(nats) / len(nats)


def evaluated(text: Path) -> tuple[Document, ...]:
    return divide(Reading(text=(text,)).sample().documents)[1]


def by_scheme(found: Quantisation) -> dict:
    return {result.scheme: result for result in found.results}


def test_losses_are_those_computed_by_hand(found, opened, text) -> None:
    model, tokenizer = opened["llama"].model, opened["llama"].tokenizer
    results = by_scheme(found)
    assert list(results) == ["exact", *SCHEMES]
    assert found.exact == pytest.approx(loss_by_hand(model, tokenizer, evaluated(text)), rel=1e-6)
    calibrated = divide(Reading(text=(text,)).sample().documents)[0]
    assert found.exact != pytest.approx(loss_by_hand(model, tokenizer, calibrated), rel=1e-3)
    for kind in KINDS:
        real = torch_ao.convert(model, kind)
        by_hand = loss_by_hand(real, tokenizer, evaluated(text))
        assert results[kind].loss == pytest.approx(by_hand, rel=2e-3)  # one batch more rounds otherwise
        assert results[kind].size == torch_ao.size(real)
        assert f"{len(torch_ao.converted(real).layers)} layers" in results[kind].note
    assert results["int8_weight"].loss == pytest.approx(found.exact, rel=0.01)
    assert results["int4_weight"].loss != pytest.approx(found.exact, rel=1e-4)
    assert results["exact"].size == sum(4 * p.numel() for p in model.parameters())
    assert results["bfloat16"].size == results["exact"].size / 2


def test_simulated_schemes_have_no_size_and_no_speed(found) -> None:
    for scheme, result in by_scheme(found).items():
        simulated = "simulated" in result.title
        assert (result.size is None, result.speed is None) == (simulated, simulated), scheme
        assert result.loss is not None
        assert math.isfinite(result.loss)
    assert "milder" in by_scheme(found)["static_linear"].note
    assert by_scheme(found)["static_linear"].loss != by_scheme(found)["static"].loss


def test_a_loud_channel_breaks_static_grids_and_is_found(found, folders, text) -> None:
    loud = quantise(config_of(folders["loud"], text, schemes=("static", "int8_weight")), console=QUIET)
    assert loud.exact == pytest.approx(found.exact, rel=1e-4)  # exactly computed, it is the same model
    gaps = [abs(one.added(by_scheme(one)["static"]) or 0) for one in (found, loud)]
    assert gaps[1] > 5 * gaps[0]
    spared = [abs(one.added(by_scheme(one)["int8_weight"]) or 0) for one in (found, loud)]
    assert spared[1] < gaps[1]
    added = {layer.layer: abs(layer.added_loss) for layer in loud.layers}
    plain = {layer.layer: abs(layer.added_loss) for layer in found.layers}
    name = f"model.layers.{LOUD}"
    assert max(added, key=added.__getitem__) == name
    assert added[name] > 5 * plain[name]
    assert added["model.layers.0"] == pytest.approx(plain["model.layers.0"], rel=0.1, abs=1e-3)


def test_layers_stand_beside_their_outliers(found, opened, text) -> None:
    names = [f"model.layers.{number}" for number in range(3)]
    assert [layer.layer for layer in found.layers] == [*names, "lm_head"]
    assert layer_names(opened["llama"].model) == names
    assert head_of(opened["llama"].model) == "lm_head"
    entering = []
    model, tokenizer = opened["llama"].model, opened["llama"].tokenizer
    hook = model.model.layers[1].register_forward_pre_hook(lambda _, args: entering.append(args[0][0]))
    loss_by_hand(model, tokenizer, evaluated(text))
    hook.remove()
    squares = torch.cat(entering).double().square().mean(0)
    kurtosis = float(squares.square().mean() / squares.mean() ** 2)
    assert found.layers[1].neuron_kurtosis == pytest.approx(kurtosis, rel=1e-5)
    assert found.layers[-1].neuron_kurtosis is None


def test_an_exact_head_stays_exact(found, folders, text) -> None:
    config = config_of(folders["llama"], text, schemes=("static", "int8_weight"), exact_head=True)
    spared = quantise(config, console=QUIET)
    assert [layer.layer for layer in spared.layers] == [layer.layer for layer in found.layers[:-1]]
    assert "lm_head" in by_scheme(spared)["int8_weight"].note
    assert "every linear layer" in by_scheme(found)["int8_weight"].note
    for scheme in ("static", "int8_weight"):
        assert by_scheme(spared)[scheme].loss != by_scheme(found)[scheme].loss
    spared_size, size = (by_scheme(one)["int8_weight"].size for one in (spared, found))
    assert spared_size - size == 3 * 272 * 32 - 5 * 272


def test_text_is_divided_without_overlap() -> None:
    documents = tuple(Document(f"{number}", "x" * (number + 1)) for number in range(20))
    parts = divide(documents)
    assert sorted(document.name for part in parts for document in part) == sorted(d.name for d in documents)
    assert parts == divide(documents[::-1])
    sizes = [sum(document.size for document in part) for part in parts]
    assert abs(sizes[0] - sizes[1]) <= 2 * 20
    one = Document("one", "first line\nsecond line\nthird\n")
    (first,), (second,) = divide((one,))
    assert first.text + second.text == one.text
    assert first.text == "first line\n"
    assert [len(part) for part in divide(documents[:2])] == [1, 1]


def test_facts_count_the_tokens(found, opened, text) -> None:
    tokens = sum(len(opened["llama"].tokenizer(d.text)["input_ids"]) for d in evaluated(text))
    assert found.facts["evaluated on"].startswith(f"{tokens:,} tokens")
    assert " in 4 batches" in found.facts["calibrated on"]


def test_bad_settings_are_named(folders, text, tmp_path) -> None:
    good = config_of(folders["gpt2"], text)
    (tmp_path / "there").mkdir()
    cases = (
        ({"schemes": ("int8_dynamic", "int2")}, r"unknown scheme 'int2'; accepted are bfloat16, static,"),
        ({"export_scheme": "static"}, "'static' cannot be exported; accepted are int8_dynamic"),
        ({"calibration_batches": 0}, "calibration_batches must be at least 1"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"percentile": 20.0}, "percentile"),
        ({"output": tmp_path / "there"}, "there exists already"),
        ({"export": tmp_path / "there"}, "there exists already"),
        ({"output": tmp_path / "a", "export": tmp_path / "a"}, "a folder each"),
        ({"data": replace(good.data, max_bytes=60)}, "only 1 calibration batches .* 4 are needed"),
        ({"model": str(tmp_path / "nowhere/at all")}, "nowhere"),
    )
    for changes, said in cases:
        with pytest.raises(InputError, match=said):
            quantise(replace(good, **changes), console=QUIET)


def test_calibration_takes_the_batches_that_there_are(folders, text) -> None:
    config = config_of(folders["gpt2"], text, schemes=("static_linear",), layers=False)
    found = quantise(replace(config, calibration_batches=10**20), console=QUIET)
    plenty = quantise(replace(config, calibration_batches=1000), console=QUIET)
    assert found.facts["calibrated on"] == plenty.facts["calibrated on"]


def without_torchao(monkeypatch) -> None:
    plain = builtins.__import__

    def importing(name: str, *args, **kwargs):
        if name.split(".")[0] == "torchao":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_without_torchao_rows_say_so_and_an_export_fails(folders, text, tmp_path, monkeypatch) -> None:
    config = config_of(folders["llama"], text, schemes=("static_linear", "int8_dynamic"), layers=False)
    open_model(str(folders["llama"]), device="cpu")
    without_torchao(monkeypatch)
    results = by_scheme(quantise(config, console=QUIET))
    assert results["int8_dynamic"].loss is None
    assert "gramian[quant]" in results["int8_dynamic"].note
    assert results["static_linear"].loss is not None
    with pytest.raises(MissingExtraError, match=r"gramian\[quant\]"):
        quantise(replace(config, schemes=(), export=tmp_path / "out"), console=QUIET)
    assert not (tmp_path / "out").exists()


def test_a_layer_that_does_not_fit_is_a_note(folders, text) -> None:
    config = config_of(folders["gpt2"], text, schemes=("int4_weight",), group=128, layers=False)
    (_, result) = quantise(config, console=QUIET).results
    assert result.loss is None
    assert "c_attn" in result.note
    assert "groups of 128" in result.note


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("exact", [None, ()], ids=["tied", "untied"])
def test_an_export_opens_again_with_the_same_logits(opened, name, kind, exact, tmp_path) -> None:
    if (name, kind, exact) == ("gpt2", "int4_weight", ()):
        pytest.skip("its head of 260 outputs does not fit int4")
    before = opened[name]
    folder = tmp_path / "export"
    made = save_quantised(before, kind, folder, exact=exact)
    after = load_quantised(folder, device="cpu")
    tokens = torch.randint(260, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, loaded, plain = (m(input_ids=tokens).logits for m in (made, after.model, before.model))
    assert torch.equal(loaded, wanted)
    assert not torch.equal(wanted, plain)
    assert (after.context, after.causal) == (before.context, before.causal)
    assert after.tokenizer("a cat")["input_ids"] == before.tokenizer("a cat")["input_ids"]
    (weights,) = folder.glob("*.safetensors")
    assert weights.stat().st_size == pytest.approx(torch_ao.size(made), abs=40_000)  # names and shapes
    portable = name != "gpt2" and kind != "int4_weight"
    with quiet():
        if portable:
            theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
            with torch.no_grad():
                assert torch.equal(theirs(input_ids=tokens).logits, wanted)
        else:  # what transformers cannot read it does not find, and so fills nothing at random
            with pytest.raises(OSError, match=r"model\.safetensors"):
                AutoModelForCausalLM.from_pretrained(folder)


def test_a_damaged_export_is_one_sentence(opened, tmp_path) -> None:
    good = tmp_path / "good"
    save_quantised(opened["llama"], "int8_weight", good)
    number = 0

    def refused(spoil, said: str) -> None:
        nonlocal number
        folder = Path(shutil.copytree(good, tmp_path / f"bad{(number := number + 1)}"))
        spoil(folder)
        with pytest.raises(InputError, match=said) as raised:
            load_quantised(folder, device="cpu")
        assert "\n" not in str(raised.value)

    def edit(name: str, **changes):
        def change(folder: Path) -> None:
            path = folder / name
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

        return change

    def tensors(change):
        def apply(folder: Path) -> None:
            path = folder / "model.safetensors"
            held = load_file(path)
            change(held)
            save_file(held, path)

        return apply

    head, about = "lm_head._weight_qdata", "quantisation.json"
    refused(lambda folder: (folder / about).unlink(), "is no exported model")
    refused(lambda folder: (folder / about).write_text("{"), "cannot be read as JSON")
    refused(lambda folder: (folder / about).write_text("[]"), "does not describe an exported model")
    refused(edit(about, kind="int3"), "unknown kind 'int3'")
    refused(edit(about, exact=["model.layers.0.mlp.up_proj"]), "also holds model.layers.0.mlp.up_proj")
    refused(edit(about, weights="../model.safetensors"), "does not describe")
    refused(edit(about, dtype="load"), "does not describe")
    refused(edit(about, more=1), "does not describe")
    refused(edit("config.json", hidden_size=64), r"has \S+ as \w+ \(")
    refused(edit("config.json", model_type="nobody"), "does not describe a model")
    refused(lambda folder: (folder / "config.json").unlink(), "config.json")
    refused(lambda folder: (folder / "tokenizer.json").write_text("{"), "does not describe a model")
    refused(lambda folder: (folder / "model.safetensors").unlink(), "cannot be read: No such file")
    refused(
        lambda folder: (folder / "model.safetensors").write_bytes(
            (good / "model.safetensors").read_bytes()[:999]
        ),
        "damaged or cut short",
    )
    refused(tensors(lambda held: held.pop(head)), f"lacks {head}")
    refused(tensors(lambda held: held.update(more=torch.ones(1))), "also holds more")
    refused(tensors(lambda held: held.update({head: held[head][1:].clone()})), f"has {head}")
    with pytest.raises(InputError, match="exists already"):
        save_quantised(opened["llama"], "int8_weight", good)
    assert load_quantised(good, device="cpu").causal


def test_an_interrupted_export_leaves_nothing(opened, tmp_path, monkeypatch) -> None:
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(opened["llama"].tokenizer, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        save_quantised(opened["llama"], "int8_weight", tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_report_holds_every_number(found, tmp_path) -> None:
    shown = replace(found, name="<models>/tiny")
    path = write_report(shown, tmp_path / "out")
    page = path.read_text(encoding="utf-8")
    assert "&lt;models&gt;/tiny" in page
    assert "<models>" not in page
    for result in found.results:
        assert result.title in page
    for layer in found.layers:
        assert layer.layer in page
    assert "does not predict" in page
    written = json.loads((path.parent / "quantisation.json").read_text())
    assert [row["loss"] for row in written["results"]] == [result.loss for result in found.results]
    assert [row["neuron_kurtosis"] for row in written["layers"]] == [x.neuron_kurtosis for x in found.layers]
    figures = sorted(figure.name for figure in (path.parent / "figures").iterdir())
    assert figures == ["added_loss_by_layer.svg", "kurtosis_by_layer.svg", "loss_by_scheme.svg"]
    with pytest.raises(OSError, match="not empty"):
        write_report(shown, tmp_path / "out")  # an existing folder is not replaced


def test_a_scheme_that_did_not_run_has_a_dash_and_a_reason(found) -> None:
    failed = replace(found.results[1], loss=None, size=None, speed=None, note="it would not")
    partial = replace(found, results=(found.results[0], failed), layers=())
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(schemes_table(partial))
    row = next(line for line in console.export_text().splitlines() if "bfloat16" in line)
    assert row.count("–") == 6
    assert any("it would not" in sentence for sentence in sentences(partial))
    assert len(report_page(partial).sections) == 1
    assert layers_table(partial).row_count == 0
