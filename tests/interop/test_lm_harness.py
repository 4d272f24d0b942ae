"""A saved model in the lm-evaluation-harness, on local tasks, against numbers computed by hand."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from huggingface_models import AUTO, written_by_hand

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip('needs pip install "gramian[harness]"', allow_module_level=True)

CONTEXT = 32
QUESTIONS = [
    {"prompt": "A tired cat sat on a", "choices": ["mat", "rat", "cat that sat"], "gold": 0},
    {"prompt": "The cat ate", "choices": ["a rat", "and", "that was that."], "gold": 0},
    {"prompt": "And that", "choices": ["mat", "was that", "zebra"], "gold": 1},
    {"prompt": "On a mat", "choices": ["sat a cat", "tired", "ate"], "gold": 2},
]
PAGES = [{"page": "A cat sat."}, {"page": "The cat ate a rat, and that was that; a zebra looked on. " * 3}]
ROLLING = """
task: pages
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/pages.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""
PAGE = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text(encoding="utf-8")
(CHOICES,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
(PROGRAM,) = (
    body
    for body in re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    if "lm_eval" in body
)
PRINT = """
import json
samples = {name: [sample["filtered_resps"] for sample in each] for name, each in results["samples"].items()}
print(json.dumps({"results": results["results"], "samples": samples}))
"""


def log_probabilities(model: torch.nn.Module, ids: list[int]) -> Tensor:
    """Return the log-probability of each token but the first, from windows as the harness cuts them."""
    found, done = [], 1
    while done < len(ids):
        stop = min(done + CONTEXT, len(ids))
        start = max(stop - CONTEXT - 1, 0) if done > 1 else 0
        window = torch.tensor(ids[start:stop])
        logs = model(window[None, :-1]).logits[0].log_softmax(-1)
        found.append(logs.gather(1, window[1:, None])[-(stop - done) :, 0])
        done = stop
    return torch.cat(found)


def likelihood(model: torch.nn.Module, tokenizer: Tokenizer, prompt: str, choice: str) -> float:
    before, ids = (tokenizer.encode(text).ids for text in (prompt, f"{prompt} {choice}"))
    return float(log_probabilities(model, ids)[len(before) - 1 :].sum())


@torch.no_grad()
def test_the_harness_reads_what_the_model_says(tmp_path: Path) -> None:
    folder, tasks = tmp_path / "runs" / "train", tmp_path / "tasks"
    folder.mkdir(parents=True)
    tasks.mkdir()
    _, tokenizer = written_by_hand(folder)
    (tasks / "choices.yaml").write_text(CHOICES)
    (tasks / "pages.yaml").write_text(ROLLING)
    for name, rows in (("questions", QUESTIONS), ("pages", PAGES)):
        (tasks / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace('["choices"]', '["choices", "pages"]') + PRINT],
        cwd=tmp_path,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])

    model = AUTO[True].from_pretrained(folder)
    right = 0
    for question, got in zip(QUESTIONS, found["samples"]["choices"], strict=True):
        expected = [
            likelihood(model, tokenizer, question["prompt"], choice) for choice in question["choices"]
        ]
        assert [value for value, _ in got] == pytest.approx(expected, abs=1e-4)
        right += max(range(3), key=lambda i: expected[i]) == question["gold"]
    assert found["results"]["choices"]["acc,none"] == right / len(QUESTIONS)
    assert 0 < right < len(QUESTIONS)

    nats = 0.0
    for page, got in zip(PAGES, found["samples"]["pages"], strict=True):
        ids = [0, *tokenizer.encode(page["page"]).ids]
        expected = -float(log_probabilities(model, ids).sum())
        assert got == [pytest.approx(-expected, abs=1e-3)]
        nats += expected
    assert len(ids) > 2 * CONTEXT  # the last page takes several windows
    size = sum(len(page["page"].encode()) for page in PAGES)
    assert found["results"]["pages"]["bits_per_byte,none"] == pytest.approx(
        nats / size / math.log(2), rel=1e-5
    )
