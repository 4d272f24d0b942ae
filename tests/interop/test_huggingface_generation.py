"""Generation with Hugging Face's tools, against full passes without a cache."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.interop.huggingface_cache import CACHE
from huggingface_models import every_decoder, model_of, tokens_of, transformers


def greedy(model: Any, prompt: Tensor, steps: int) -> Tensor:
    """Continue one sequence by the most likely token, each from a full pass over all tokens."""
    for _ in range(steps):
        best = model.transformer(prompt[None])[0, -1].argmax()
        prompt = torch.cat((prompt, best[None]))
    return prompt


def left_padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    length = max(map(len, prompts))
    padded = [torch.cat((p.new_zeros(length - len(p)), p)) for p in prompts]
    real = [torch.arange(length) >= length - len(p) for p in prompts]
    return {"input_ids": torch.stack(padded), "attention_mask": torch.stack(real).long()}


@every_decoder
@torch.no_grad()
def test_generation_is_the_step_by_step_argmax(name) -> None:
    model = model_of(name, dtype=torch.float64)
    prompts = [tokens_of(5), tokens_of(3, seed=3), tokens_of(1, seed=4)]
    batch = left_padded(prompts)
    expected = [greedy(model, prompt, 9) for prompt in prompts]
    for use_cache in (True, False):
        got = model.generate(**batch, max_new_tokens=9, do_sample=False, use_cache=use_cache)
        assert all(
            torch.equal(row[5 - len(p) :], e) for row, p, e in zip(got, prompts, expected, strict=True)
        )
    unmasked = model.generate(batch["input_ids"], attention_mask=torch.ones(3, 5).long(), max_new_tokens=9)
    assert not torch.equal(unmasked[2, 4:], expected[2])  # control: padding that is not masked is read
    end = int(expected[0][8])
    stopped = model.generate(**batch, max_new_tokens=9, eos_token_id=end, pad_token_id=0)
    for row, prompt, full in zip(stopped, prompts, expected, strict=True):
        new = full[len(prompt) :].tolist()
        new = new[: new.index(end) + 1] if end in new else new
        assert row[5:].tolist() == new + [0] * (len(row) - 5 - len(new))


@every_decoder
@torch.no_grad()
def test_beams_with_and_without_a_cache_agree(name) -> None:
    model, batch = model_of(name, dtype=torch.float64), left_padded([tokens_of(4), tokens_of(2, seed=3)])
    options = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with_cache = model.generate(**batch, **options)
    assert torch.equal(with_cache, model.generate(**batch, **options, use_cache=False))
    assert not torch.equal(with_cache[0], with_cache[1])


@pytest.mark.parametrize("name", ["pre_norm", "sas", "value_skipinit"])
@torch.no_grad()
def test_guessed_tokens_are_taken_back(name) -> None:
    prompt = torch.tensor([[3, 4, 5, 3, 4]])
    model = model_of(name, dtype=torch.float64, eos_token_id=28)
    expected = greedy(model, prompt[0], 10)
    assert 28 not in expected
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options, prompt_lookup_num_tokens=3)[0], expected)
    assistant = model_of("pre_norm", depth=1, seed=7, dtype=torch.float64, eos_token_id=28)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(prompt, **options, assistant_model=model)[0], expected)
    assert len(calls) < 2 * 10  # control: guesses were accepted
    handle.remove()
    assert torch.equal(model.generate(prompt, **options, assistant_model=assistant)[0], expected)


@torch.no_grad()
def test_a_cache_is_continued_and_copied() -> None:
    model, tokens = model_of("sas", dtype=torch.float64), tokens_of(2, 6)
    cache = getattr(model(tokens[:, :4]), CACHE)
    kept = copy.deepcopy(cache)
    expected = torch.stack([greedy(model, row, 5) for row in tokens])
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(tokens, **options, **{CACHE: cache}), expected)
    assert cache.get_seq_length() == 10
    assert kept.get_seq_length() == 4
    assert torch.equal(model.generate(tokens, **options, **{CACHE: kept}), expected)
    kept.reset()
    assert kept.get_seq_length() == 0
    assert torch.equal(model.generate(tokens, **options, **{CACHE: kept}), expected)
    positions = torch.arange(4, 6)[None]
    cache = getattr(model(tokens[:, :4], position_ids=torch.arange(4)[None]), CACHE)
    got = model(tokens[:, 4:], position_ids=positions, **{CACHE: cache}).logits
    torch.testing.assert_close(got, model(tokens).logits[:, 4:], rtol=1e-10, atol=1e-10)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 3]))
    got = model(tokens[:, :1], **{CACHE: cache}).logits
    expected = model(torch.cat((tokens, tokens[:, :1]), 1)).logits[:, -1:]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_sampling_follows_the_seed() -> None:
    model, batch = model_of(), left_padded([tokens_of(4), tokens_of(2, seed=3)])
    drawn = []
    with torch.random.fork_rng():
        for seed in (1, 1, 2):
            transformers.set_seed(seed)
            drawn.append(model.generate(**batch, max_new_tokens=10, do_sample=True))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning")
def test_generation_ends_at_the_context() -> None:
    model, tokens = model_of(), tokens_of(1, 5)
    mask = torch.ones_like(tokens)
    assert model.generate(tokens, attention_mask=mask).shape == (1, 16)  # nothing asked: up to the context
    assert model.generate(tokens, attention_mask=mask, max_new_tokens=12).shape == (1, 17)
    with pytest.raises(InputError, match="17 tokens exceeds the context of 16"):
        model.generate(tokens, attention_mask=mask, max_new_tokens=13)
