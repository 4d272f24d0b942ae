"""Losses, gradients, classifiers, and training with Hugging Face's Trainer."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramian.errors import InputError
from gramian.train.optimisers import adamw
from huggingface_models import (
    GramianForSequenceClassification,
    every_block,
    fresh,
    model_of,
    same,
    tokens_of,
    transformers,
    written_by_hand,
)

Classifier = transformers.AutoModelForSequenceClassification


def test_losses_are_plain_cross_entropies() -> None:
    tokens = tokens_of(3, 8)
    labels = tokens.masked_fill(torch.arange(8) < torch.tensor([[0], [3], [5]]), -100)
    decoder, encoder = model_of("sas"), model_of("sas", causal=False)
    out = decoder(tokens, labels=labels)
    keep = labels[:, 1:] != -100
    terms = cross_entropy(out.logits[:, :-1][keep], labels[:, 1:][keep], reduction="none")
    torch.testing.assert_close(out.loss, terms.mean())
    torch.testing.assert_close(decoder(tokens, labels=labels, num_items_in_batch=7).loss, terms.sum() / 7)
    out = encoder(tokens, labels=labels)
    expected = cross_entropy(out.logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(out.loss, expected)
    changed = labels.masked_fill(labels == -100, 1)  # control: −100 does leave tokens out
    assert abs(encoder(tokens, labels=changed).loss - out.loss) > 1e-3


@every_block
def test_gradient_checkpointing_recomputes_the_same_gradients(name, causal) -> None:
    tokens, mask = tokens_of(2, 9), torch.arange(9) >= torch.tensor([[0], [3]])
    gradients = []
    for checkpointing in (False, True):
        model = model_of(name, causal).train()
        if checkpointing:
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)()
        calls = []
        for layer in model.transformer.blocks:
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        out = model(tokens, mask, labels=tokens, output_hidden_states=True)
        assert len(out.hidden_states) == 4
        out.loss.backward()
        assert len(calls) == 3 * (1 + checkpointing)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


@every_block
@torch.no_grad()
def test_a_classifier_keeps_a_language_models_weights(name, causal, tmp_path) -> None:
    tied = name != "post_norm"  # a head of its own is left out too
    model = model_of(name, causal, tied=tied, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    classifier, info = Classifier.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight", "score.bias"}
    assert not info["unexpected_keys"]
    weights = classifier.transformer.state_dict()
    own = {key: value for key, value in model.transformer.state_dict().items() if key != "head.weight"}
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[key], own[key]) for key in own)
    assert classifier.score.weight.shape == (3, 24)
    assert classifier.score.weight.std() > 0

    tokens, place, lengths = tokens_of(3, 7), torch.arange(7), torch.tensor([[7], [4], [1]])
    for mask in (place < lengths, place >= 7 - lengths):
        got = classifier(tokens, attention_mask=mask.long()).logits
        for row in range(3):
            alone = tokens[row][mask[row]][None]
            features = model.transformer.features(alone)[0]
            pooled = features[-1] if causal else features.mean(0)
            torch.testing.assert_close(got[row], classifier.score(pooled), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(got[row], classifier(alone).logits[0], rtol=1e-10, atol=1e-10)
    classifier.save_pretrained(tmp_path / "classifier")
    assert same(Classifier.from_pretrained(tmp_path / "classifier"), classifier, tokens)


def test_classifier_losses_and_another_number_of_labels(tmp_path) -> None:
    tokens, labels = tokens_of(3, 7), torch.tensor([0, 1, 1])
    model = model_of(kind=GramianForSequenceClassification)
    out = model(tokens, labels=labels)
    torch.testing.assert_close(out.loss, cross_entropy(out.logits, labels))
    regression = model_of(kind=GramianForSequenceClassification, num_labels=1)
    out = regression(tokens, labels=labels.float())
    torch.testing.assert_close(out.loss, (out.logits[:, 0] - labels).square().mean())
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"score\.bias in another shape"):
        Classifier.from_pretrained(tmp_path, num_labels=5)
    reshaped = Classifier.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert reshaped(tokens).logits.shape == (3, 5)


def trainer(model: nn.Module, folder: Path, data: list[dict[str, Any]], **options: Any) -> Any:
    passed = {
        key: options.pop(key) for key in ("optimizers", "data_collator", "compute_metrics") if key in options
    }
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 16, "per_device_eval_batch_size": 64,
        "use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no", "logging_strategy": "no",
        "report_to": "none", "disable_tqdm": True, **options,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**settings)
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data[:128], **passed
    )


def ours(model: nn.Module, learning_rate: float = 1e-2) -> Any:
    return adamw(model, learning_rate, 0.1, (0.9, 0.95), 1e-8), None


def corpus(causal: bool, lines: int = 256) -> list[dict[str, Any]]:
    """Sentences of words of four letters; in a masked one a letter of each word is hidden behind a 0."""
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(1, 29, (5, 4), generator=draw)
    text = words[torch.randint(5, (lines, 4), generator=draw)].flatten(1)
    if causal:
        return [{"input_ids": line, "labels": line} for line in text]
    hidden = torch.arange(16) % 4 == torch.randint(4, (lines, 1), generator=draw)
    read, asked = text.masked_fill(hidden, 0), text.masked_fill(~hidden, -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(read, asked, strict=True)]


@pytest.mark.parametrize("causal", [True, False])
def test_the_trainer_fine_tunes_a_language_model_and_goes_on_where_it_stopped(causal, tmp_path) -> None:
    fresh("sas", causal).save_pretrained(tmp_path)

    def run(resume: str | None) -> tuple[Any, float, float]:
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
        model = auto.from_pretrained(tmp_path)
        options = {"max_steps": 60, "save_strategy": "steps", "save_steps": 40, "optimizers": ours(model)}
        training = trainer(model, tmp_path / "runs", corpus(causal), **options)
        start = training.evaluate()["eval_loss"]
        training.train(resume_from_checkpoint=resume)
        return model, start, training.evaluate()["eval_loss"]

    model, start, end = run(None)
    assert start > 2.5  # about log 29
    assert end < 0.5 * start
    resumed, _, same_end = run(str(tmp_path / "runs" / "checkpoint-40"))
    assert same_end == end
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_the_trainer_fine_tunes_a_classifier(causal, tmp_path) -> None:
    def score(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    model_folder = tmp_path / "language model"
    fresh("sas_p", causal).save_pretrained(model_folder)
    model = Classifier.from_pretrained(model_folder)
    tokens = tokens_of(512, 8)
    labels = (tokens[:, 0] > 14).long()  # an easy question of the first token
    lengths = torch.randint(1, 9, (512, 1), generator=torch.Generator().manual_seed(3))
    rows = zip(tokens, (torch.arange(8) < lengths).long(), labels, strict=True)
    data = [{"input_ids": x, "attention_mask": mask, "labels": y} for x, mask, y in rows]
    options = {"max_steps": 100, "optimizers": ours(model), "compute_metrics": score}
    training = trainer(model, tmp_path / "runs", data[128:], **options)
    held_out = data[:128]
    assert training.evaluate(held_out)["eval_accuracy"] < 0.8
    training.train()
    assert training.evaluate(held_out)["eval_accuracy"] > 0.9


@every_block
def test_gains_norms_and_biases_are_not_decayed(name, causal, tmp_path) -> None:
    model = fresh(name, causal, tied=causal, depth=2)
    training = trainer(model, tmp_path, corpus(causal, 16), max_steps=1, optimizers=ours(model))
    training.train()
    decayed, kept = training.optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    places = [id(parameter) for group in (decayed, kept) for parameter in group["params"]]
    assert sorted(places) == sorted(id(parameter) for parameter in model.parameters())  # each exactly once
    undecayed = {id(parameter) for parameter in kept["params"]}
    for module in model.modules():
        linear = isinstance(module, (nn.Linear, nn.Embedding))
        for kind, parameter in module.named_parameters(recurse=False):
            assert (id(parameter) not in undecayed) is (linear and kind == "weight")
    default = trainer(model, tmp_path, corpus(causal, 16), max_steps=1, weight_decay=0.1)
    wrongly = [p for p in default.create_optimizer().param_groups[0]["params"] if p.ndim < 2]
    biased = name in ("outlier_protected", "u_spa", "shaped")  # or none but biases, which it spares
    biased = biased or name.startswith("e_spa")
    assert bool(wrongly) is not biased  # control: the Trainer's own groups do decay some


def stepped(model: nn.Module, folder: Path, data: list[dict[str, Any]], batch: int) -> list[Tensor]:
    training = trainer(
        model, folder, data, max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=batch,
        gradient_accumulation_steps=8 // batch, optimizers=(torch.optim.SGD(model.parameters(), 1.0), None),
    )  # fmt: skip
    training.train()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", ["causal", "masked", "classes", "numbers"])
def test_accumulated_batches_make_the_step_of_one_batch(kind, tmp_path) -> None:
    causal = kind != "masked"
    classifier = {"kind": GramianForSequenceClassification} if kind in ("classes", "numbers") else {}
    labels_of = {"classes": lambda i: i % 2, "numbers": lambda i: float(i)}
    data = corpus(causal, 8)
    for i, row in enumerate(data):
        if classifier:
            row["labels"] = labels_of[kind](i)
        else:
            row["labels"] = row["labels"].masked_fill(
                torch.arange(16) < i, -100
            )  # unequal numbers of targets

    def model() -> Any:
        return fresh("sas", causal, num_labels=1 if kind == "numbers" else 2, **classifier)

    whole, parts = stepped(model(), tmp_path, data, 8), stepped(model(), tmp_path, data, 2)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if kind == "numbers":
        wrong = model()
        wrong.accepts_loss_kwargs = True  # control: the Trainer would then not divide
        moved = stepped(wrong, tmp_path, data, 2)
        assert any((one - other).abs().max() > 1e-2 for one, other in zip(whole, moved, strict=True))


def test_packed_documents_are_evaluated_as_if_alone(tmp_path) -> None:
    model = model_of("sas")
    documents = [tokens_of(n, seed=n) for n in (5, 3, 7, 2, 6, 4)]
    data = [{"input_ids": document.tolist()} for document in documents]
    flat = transformers.DataCollatorWithFlattening()
    training = trainer(
        model, tmp_path, data, data_collator=flat, max_steps=2, learning_rate=0.0,
        per_device_train_batch_size=3, per_device_eval_batch_size=3,
    )  # fmt: skip
    got = training.evaluate()["eval_loss"]
    with torch.no_grad():
        logits = [model(document[None]).logits[0] for document in documents]
    losses = [cross_entropy(x[:-1], d[1:], reduction="none") for x, d in zip(logits, documents, strict=True)]
    batches = [torch.cat(losses[:3]).mean(), torch.cat(losses[3:]).mean()]
    assert got == pytest.approx(float(sum(batches) / 2), rel=1e-5)
    training.train()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument:UserWarning"
)  # the Trainer's default, without a GPU
def test_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    program = "".join(block for block in blocks if "lm_eval" not in block)  # test_lm_harness.py runs that
    (tmp_path / "runs" / "train").mkdir(parents=True)
    written_by_hand(tmp_path / "runs" / "train")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(program, "huggingface.md", "exec"), names)
    assert names["loss"].isfinite()
    assert any((tmp_path / "runs" / "tuned").glob("checkpoint-*"))
