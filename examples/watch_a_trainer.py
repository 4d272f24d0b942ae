"""Do outlier neurons grow while a GPT-2 is trained? Hugging Face's Trainer trains, gramian records."""

import random

import transformers

from gramian.interop.trainer import ObserveCallback
from gramian.observe import Record

transformers.set_seed(0)
words = [random.sample(range(100), 4) for _ in range(20)]  # a language of 20 words, 4 letters each
lines = [[letter for word in random.choices(words, k=8) for letter in word] for _ in range(1000)]
config = transformers.GPT2Config(
    vocab_size=100, n_positions=32, n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
)
trainer = transformers.Trainer(
    model=transformers.GPT2LMHeadModel(config),
    args=transformers.TrainingArguments(
        "runs/watched",
        max_steps=81,
        learning_rate=1e-2,
        logging_steps=40,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    ),
    train_dataset=[{"input_ids": line, "labels": line} for line in lines],
    callbacks=[ObserveCallback(every=20)],  # finds the layers by itself
)
trainer.train()

for row in Record("runs/watched/observations.jsonl").read():
    kurtosis = (f"{values['neuron_kurtosis']:6.2f}" for values in row["sites"].values())
    print(f"step {row['step']:2}  neuron kurtosis layer by layer {' '.join(kurtosis)}")
