"""Does training on text help a classifier that has 40 labelled lines? Hugging Face's Trainer trains both."""

import random

import transformers

from gramian.interop.huggingface import GramianConfig, GramianForCausalLM, GramianForSequenceClassification
from gramian.train.optimisers import adamw

transformers.set_seed(0)
kinds = [[random.sample(range(1, 100), 4) for _ in range(20)] for _ in range(2)]  # two lists of words


def line(kind: int) -> list[int]:
    """Return a line of 8 words, of which most are of one kind."""
    words = (random.choice(kinds[kind if random.random() < 0.9 else 1 - kind]) for _ in range(8))
    return [letter for word in words for letter in word]


def train(model, data: list[dict], steps: int) -> transformers.Trainer:
    settings = transformers.TrainingArguments(
        "runs/tuned", max_steps=steps, per_device_train_batch_size=20, save_strategy="no", report_to="none",
        disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    optimiser = adamw(model, 1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)  # spares gains and norms
    trainer = transformers.Trainer(model, settings, train_dataset=data, optimizers=(optimiser, None))
    trainer.train()
    return trainer


config = GramianConfig(vocabulary=100, context=32, width=32, depth=3, heads=4, block="sas")
text = [line(i % 2) for i in range(2000)]
writer = GramianForCausalLM(config)
train(writer, [{"input_ids": x, "labels": x} for x in text], 200)
writer.save_pretrained("runs/writer")

labelled = [{"input_ids": line(i % 2), "labels": i % 2} for i in range(540)]
for name in ("a new model", "the same after reading 2000 lines"):
    model = GramianForSequenceClassification(config)
    if name != "a new model":
        model = GramianForSequenceClassification.from_pretrained("runs/writer")
    output = train(model, labelled[:40], 60).predict(labelled[40:])
    right = (output.predictions.argmax(1) == output.label_ids).mean()
    print(f"{name}: {right:.0%} of 500 other lines")
