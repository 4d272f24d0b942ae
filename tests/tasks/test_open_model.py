import json
import math
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    ViTConfig,
)

from gramian.data.text import Document
from gramian.errors import InputError
from gramian.tasks.model_folder import quiet
from gramian.tasks.open_model import Reading, batches, language_loss, open_model
from huggingface_models import written_by_hand
from language_models import FRAMES, MODELS, SIZES, built, save, tokenizer

TEXT = Document("story", "A tired cat sat on a mat. The cat ate a rat, and that was that.\n" * 3)
SHORT = Document("short", "Nobody else came.")

every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def silent_writing():
    with quiet():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    with quiet():
        for name in MODELS:
            save(name, root / name)
    return {name: root / name for name in MODELS}


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A GPT-2 of the test's own, to be spoiled."""
    return Path(shutil.copytree(folders["gpt2"], tmp_path / "model"))


def refusal(where: object, **options) -> str:
    with pytest.raises(InputError) as raised:
        open_model(str(where), **options)
    said = str(raised.value)
    assert "\n" not in said
    assert len(said) < 400
    return said


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@every_model
def test_a_saved_model_opens_to_the_same_function(folders, name) -> None:
    opened = open_model(str(folders[name]), device="cpu")
    assert opened.causal == (name != "bert")
    assert opened.context == 32
    assert opened.name == str(folders[name])
    assert not opened.model.training
    ids = torch.arange(4, 24)[None]
    here = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        ours, theirs = opened.model(**here), built(name)(**here)
    assert torch.equal(ours.logits, theirs.logits)
    assert getattr(ours, "past_key_values", None) is None


def test_a_run_folder_opens(tmp_path) -> None:
    ours, _ = written_by_hand(tmp_path)
    opened = open_model(str(tmp_path), dtype="float64", device="cpu")
    assert opened.causal
    assert opened.context == 32
    (batch,) = batches(opened, [SHORT], context=16, batch=4)
    with torch.no_grad():
        logits = opened.model(**batch).logits
        assert torch.allclose(logits[0, :5], ours.double().eval()(batch["input_ids"])[0, :5], atol=1e-10)


def test_a_position_table_with_rows_for_padding_is_not_overrun(tmp_path) -> None:
    config = RobertaConfig(
        **{**SIZES, "pad_token_id": 2}, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    save("bert", tmp_path, RobertaForMaskedLM(config))
    opened = open_model(str(tmp_path), device="cpu")
    assert opened.context == 29
    longest = torch.full((1, 29), 9)
    with torch.no_grad():
        opened.model(input_ids=longest, attention_mask=torch.ones_like(longest))
        with pytest.raises((IndexError, RuntimeError)):  # control: one more overruns it
            opened.model(input_ids=torch.full((1, 30), 9), attention_mask=torch.ones(1, 30).long())


def test_a_model_without_positions_gets_a_context(tmp_path) -> None:
    save("gpt2", tmp_path, BloomForCausalLM(BloomConfig(**SIZES, hidden_size=16, n_layer=1, n_head=2)))
    assert open_model(str(tmp_path), device="cpu").context == 2048


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_dtype_is_the_models(folders, dtype) -> None:
    opened = open_model(str(folders["llama"]), dtype=dtype, device="cpu")
    assert {value.dtype for value in opened.model.parameters()} == {getattr(torch, dtype)}


@every_model
def test_batches_hold_every_token_once_and_in_order(folders, name) -> None:
    """Against the tokens of the whole text, cut by hand."""
    opened = open_model(str(folders[name]), device="cpu")
    before, after = FRAMES[name]
    rows = []
    for batch in batches(opened, [TEXT, SHORT], context=20, batch=3):
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["input_ids"].shape[1] <= 20
        for ids, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            assert not real[ids == 2].any()
            assert real[: int(real.sum())].all()  # padding is on the right
            rows.append(ids[real].tolist())
    whole = [tokenizer()(document.text, add_special_tokens=False)["input_ids"] for document in (TEXT, SHORT)]
    room = 20 - before - after
    cut = [[0] * before + ids[i : i + room] + [1] * after for ids in whole for i in range(0, len(ids), room)]
    assert rows == cut


def test_special_tokens_in_a_text_are_plain_text(folders) -> None:
    opened = open_model(str(folders["gpt2"]), device="cpu")
    (batch,) = batches(opened, [Document("", "a</s>b")], context=32, batch=1)
    assert batch["input_ids"].shape[1] == 6
    assert not (batch["input_ids"] < 4).any()


def test_batches_are_made_as_they_are_asked_for_and_kept_by_nobody(folders) -> None:
    opened = open_model(str(folders["gpt2"]), device="cpu")
    asked = []

    def documents():
        for number in range(50):
            asked.append(number)
            yield TEXT

    alive, most = weakref.WeakSet(), 0
    for count, batch in enumerate(batches(opened, documents(), context=32, batch=2)):
        assert len(asked) <= count + 2
        alive.add(batch["input_ids"])
        most = max(most, len(alive))
    assert len(asked) == 50
    assert most <= 2


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_loss_of_a_decoder_is_that_of_its_log_probabilities(folders, name) -> None:
    opened = open_model(str(folders[name]), dtype="float64", device="cpu")
    documents = [TEXT, SHORT]
    nats, count = language_loss(opened, batches(opened, documents, context=24, batch=3))
    slow, tokens = 0.0, 0
    for batch in batches(opened, documents, context=24, batch=1):
        ids = batch["input_ids"]
        with torch.no_grad():
            scores = log_softmax(opened.model(ids).logits[0], -1)
        for place in range(1, ids.shape[1]):
            slow -= scores[place - 1, ids[0, place]].item()
            tokens += 1
    assert count == tokens
    assert nats == pytest.approx(slow, rel=1e-12)
    padded = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
              for batch in batches(opened, documents, context=24, batch=3)]  # fmt: skip
    assert language_loss(opened, padded)[1] > count  # control: padding would be predicted


def test_the_loss_of_an_encoder_hides_tokens_by_the_seed(folders) -> None:
    opened = open_model(str(folders["bert"]), device="cpu")

    def loss(seed: int) -> tuple[float, int]:
        return language_loss(opened, batches(opened, [TEXT] * 30, context=32, batch=8), seed=seed)

    nats, count = loss(1)
    real = 30 * len(TEXT.text)
    assert abs(count / real - 0.15) < 4 * math.sqrt(0.15 * 0.85 / real)
    assert nats / count == pytest.approx(math.log(260), rel=0.05)  # random weights know nothing
    assert loss(1) == (nats, count)
    assert loss(2) != (nats, count)


def test_an_encoder_does_not_see_what_it_is_to_predict(folders) -> None:
    """A model that copies its input predicts what is not hidden, a tenth of the tokens, and no more."""

    class Copy(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            self.logits = 100.0 * torch.nn.functional.one_hot(input_ids, 260)
            return self

    opened = replace(open_model(str(folders["bert"]), device="cpu"), model=Copy())
    nats, count = language_loss(opened, batches(opened, [TEXT] * 30, context=32, batch=8))
    assert nats / count / 100 == pytest.approx(0.9, abs=0.03)


def test_nothing_to_predict_is_said(folders) -> None:
    opened = open_model(str(folders["gpt2"]), device="cpu")
    with pytest.raises(InputError, match="has no token for"):
        language_loss(opened, batches(opened, [Document("", "a")], context=8, batch=1))
    opened = open_model(str(folders["bert"]), device="cpu")
    opened.tokenizer.mask_token = None
    with pytest.raises(InputError, match="no mask token"):
        language_loss(opened, batches(opened, [SHORT], context=8, batch=1))


def test_unusable_text_and_contexts_are_named(folders) -> None:
    opened = open_model(str(folders["bert"]), device="cpu")
    for context, batch, words in (
        (33, 1, "context 33 is longer than the 32 tokens"),
        (2, 1, "context 2 leaves no room for text; 4 would"),
        (8, 0, "batch must be at least 1"),
    ):
        with pytest.raises(InputError, match=words):
            batches(opened, [SHORT], context=context, batch=batch)
    with pytest.raises(InputError, match="makes no token of the text"):
        list(batches(opened, [Document("", "")], context=8, batch=1))
    with pytest.raises(InputError, match="context 99 is longer"):
        Reading(context=99).batches(opened, [SHORT])
    (batch,) = Reading(batch=99).batches(opened, [SHORT])  # by default the model's own
    assert batch["input_ids"].shape == (1, len(SHORT.text) + 2)


def test_a_tokenizer_without_the_alphabet_makes_no_token(folder) -> None:
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    described["model"]["vocab"] = {token: id for token, id in described["model"]["vocab"].items() if id < 60}
    path.write_text(json.dumps(described))
    opened = open_model(str(folder), device="cpu")
    with pytest.raises(InputError, match="makes no token of the text given"):
        list(batches(opened, [Document("", "zzz")], context=8, batch=1))


def test_what_is_no_folder_of_a_model_is_named(tmp_path) -> None:
    assert "does not exist" in refusal(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "model_type None" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {}}')
    assert "running code of the folder, which is never done" in refusal(tmp_path)


def test_a_hub_id_without_network_is_one_sentence(monkeypatch) -> None:
    assert "was not fetched earlier" in refusal("nobody/nothing-of-this-name", offline=True)
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert "cannot be fetched (is there network?)" in refusal("nobody/nothing-of-this-name")


def test_a_hub_id_opens_what_was_fetched(folders, monkeypatch) -> None:
    import huggingface_hub

    asked = {}

    def fetched(where, **options):
        asked.update(options, where=where)
        return str(folders["opt"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert open_model("somebody/opt", device="cpu", offline=True).name == "somebody/opt"
    assert asked["local_files_only"]
    assert not any(".bin" in pattern for pattern in asked["allow_patterns"])


def test_what_is_no_language_model_is_named(folders, tmp_path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(tmp_path / "vit")
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    BertForSequenceClassification(BertConfig(**small)).save_pretrained(tmp_path / "classifier")
    for name, words in (
        ("vit", "ViTForImageClassification, no language model"),
        ("t5", "T5ForConditionalGeneration, no language model"),
        ("classifier", "BertForSequenceClassification, no language model"),
    ):
        assert words in refusal(tmp_path / name)
    body = BertModel(BertConfig(**small, vocab_size=260), add_pooling_layer=False)
    save("bert", tmp_path / "body", body)
    assert "lacks cls.predictions" in refusal(tmp_path / "body")  # no head is drawn at random


def test_missing_files_are_named(folder) -> None:
    (folder / "tokenizer.json").rename(folder / "away")
    assert "has no tokenizer" in refusal(folder)
    (folder / "away").rename(folder / "tokenizer.json")
    (folder / "model.safetensors").rename(folder / "away")
    assert "has no weights" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    said = refusal(folder)
    assert "holds its weights in pytorch_model.bin, a format that can run any code" in said
    assert "convert it to model.safetensors" in said
    (folder / "pytorch_model.bin").unlink()
    (folder / "checkpoints").mkdir()
    assert "has no model.safetensors before it ends" in refusal(folder)


def test_a_model_that_is_quantised_already_is_told_from_one_that_is_not(folder) -> None:
    (folder / "quantisation.json").write_text("{}")
    assert "quantised already, which `load_quantised`" in refusal(folder)


def test_a_pickle_beside_the_weights_is_not_touched(folder) -> None:
    harmful = b"cos\nsystem\n(S'touch " + str(folder / "harm").encode() + b"'\ntR."
    for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl"):
        (folder / name).write_bytes(harmful)
    open_model(str(folder), device="cpu")
    assert not (folder / "harm").exists()


def test_damaged_files_are_named(folder) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-10], whole[:4], b"\xff" * 64, b""):
        weights.write_bytes(damaged)
        assert "model.safetensors is damaged or cut short" in refusal(folder)
    weights.write_bytes(whole)
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer" in refusal(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2", "n_embd": "wide"}')
    assert "config.json does not describe a model" in refusal(folder)


def test_shards_are_checked_before_any_is_read(tmp_path, monkeypatch) -> None:
    save("gpt2", tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    opened = open_model(str(tmp_path), device="cpu").model.state_dict()
    assert all(torch.equal(value, opened[name]) for name, value in built("gpt2").state_dict().items())
    import gramian.tasks.open_model as module

    monkeypatch.setattr(module, "loaded", lambda *_: pytest.fail("weights were read"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    assert f"{shards[1].name} is damaged or cut short" in refusal(tmp_path)
    kept = load_file(shards[0])
    save_file(dict(list(kept.items())[1:]), shards[1], {"format": "pt"})
    assert "that the index promises" in refusal(tmp_path)
    shards[1].unlink()
    assert f"lacks {shards[1].name}, one of the {len(shards)} shards" in refusal(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    edit(index, weight_map={"a": "../outside.safetensors"})
    assert "no safetensors file beside it" in refusal(tmp_path)
    edit(index, weight_map={"a": "pytorch_model.bin"})
    assert "no safetensors file beside it" in refusal(tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(folder, bad) -> None:
    state = load_file(folder / "model.safetensors")
    state["transformer.h.1.mlp.c_fc.weight"][3, 5] = bad
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert "the weight transformer.h.1.mlp.c_fc.weight in" in refusal(folder)


def test_a_weight_too_large_for_the_dtype_is_named(folder) -> None:
    state = load_file(folder / "model.safetensors")
    state["transformer.ln_f.weight"][2] = 1e6
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    open_model(str(folder), device="cpu")
    assert "ln_f.weight" in refusal(folder, dtype="float16")


def test_weights_of_another_model_are_named(folder) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    spoilt = {
        "lacks transformer.h.2.attn.c_proj.bias": {
            name: value for name, value in state.items() if name != "transformer.h.2.attn.c_proj.bias"
        },
        "also holds transformer.h.3.ln_1.weight": {**state, "transformer.h.3.ln_1.weight": torch.ones(16)},
        "has transformer.ln_f.bias in another shape": {**state, "transformer.ln_f.bias": torch.ones(17)},
    }
    for words, weights in spoilt.items():
        save_file(weights, path, {"format": "pt"})
        assert words in refusal(folder)
    save_file({**state, "classifier.weight": torch.ones(3)}, path, {"format": "pt"})
    assert open_model(str(folder), device="cpu")  # a head of another task changes nothing
    save_file(state, path, {"format": "pt"})
    edit(folder / "config.json", n_layer=2)
    assert "also holds transformer.h.2" in refusal(folder)  # not a model cut short in silence


def test_a_tokenizer_of_another_model_is_refused(folder) -> None:
    larger = tokenizer()
    larger.add_tokens(["one more"])
    larger.save_pretrained(folder)
    assert "has tokens up to 260, and the model embeds only 260" in refusal(folder)


def test_unknown_dtypes_and_devices_are_named(folder) -> None:
    assert "unknown dtype 'int8'; choose one of float32" in refusal(folder, dtype="int8")
    for device in ("gpu", "cuda:99", "meta"):
        assert f"device '{device}'" in refusal(folder, device=device)


def test_opening_writes_nothing_and_leaves_the_logging_as_it_was(folders) -> None:
    program = (
        "from gramian.tasks.open_model import open_model\n"
        f"open_model({str(folders['bert'])!r}, device='cpu')\n"
        "from transformers.utils import logging\n"
        "assert logging.is_progress_bar_enabled() and logging.get_verbosity() == logging.WARNING\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"n_layer": 10**9},
            "asks for num_hidden_layers = 1,000,000,000, and the weights are|asks for n_layer",
        ),
        ({"n_embd": 2**20}, r"describes a model of [\d,]+ numbers, and the weights have"),
        ({"vocab_size": 10**18}, "cannot be built|describes a model of"),
        ({"n_positions": 2**20}, r"describes a model of [\d,]+ numbers"),
        ({"architectures": 3}, "does not describe a model"),
        ({"architectures": [{}]}, "does not describe a model"),
    ],
)
def test_a_configuration_of_absurd_size_is_refused_before_it_is_built(folder, changes, words) -> None:
    edit(folder / "config.json", **changes)
    assert re.search(words, refusal(folder))
