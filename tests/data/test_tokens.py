import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gramian.data import tokens as module
from gramian.data.tokens import END, Corpus, Windows, bits_per_byte, load_corpus, unigram_entropy
from gramian.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAMIAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(20):
        words = " ".join(f"word{number * k % 7} größe" for k in range(40))
        (folder / f"{number}.txt").write_text(f"# {number}\n{words}\n\n\tend {END} {number} 🙂\r\n")
    return folder


def same(a: Corpus, b: Corpus) -> bool:
    return (
        torch.equal(a.train, b.train)
        and torch.equal(a.validation, b.validation)
        and a.tokenizer.to_str() == b.tokenizer.to_str()
    )


def documents_of(corpus: Corpus, tokens: Tensor) -> list[str]:
    """Decode between the ends of documents."""
    ends = (tokens == 0).nonzero().flatten().tolist()
    starts = [0, *(end + 1 for end in ends)]
    return [corpus.tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=False)]


def test_tokens_give_back_every_document_once(folder: Path) -> None:
    corpus = load_corpus([folder], vocabulary=300)
    back = documents_of(corpus, corpus.train) + documents_of(corpus, corpus.validation)
    texts = [path.read_bytes().decode() for path in folder.iterdir()]
    assert sorted(back) == sorted(texts)
    assert (corpus.train_documents + corpus.validation_documents, corpus.skipped, corpus.left_out) == (
        20,
        0,
        0,
    )
    assert corpus.train_documents == (corpus.train == 0).sum()  # END in a text is no end of a document
    assert corpus.bytes == sum(len(text.encode()) for text in texts)
    assert corpus.bytes == sum(
        int(corpus.token_bytes[side].sum()) for side in (corpus.train, corpus.validation)
    )
    assert corpus.train.dtype == torch.int32
    assert corpus.vocabulary == 300
    assert corpus.tokenizer.token_to_id(END) == 0
    assert corpus.token_bytes[0] == 0
    assert corpus.token_bytes[1:].min() == 1
    assert corpus.name == "texts"


def test_vocabulary_comes_from_the_training_side_alone(folder: Path) -> None:
    first = load_corpus([folder], vocabulary=300)
    held_out = documents_of(first, first.validation)
    for path in folder.iterdir():
        if path.read_bytes().decode() in held_out:
            path.write_text("zzzzqqqq " * 50)
    changed = load_corpus([folder], vocabulary=300)
    assert changed.tokenizer.to_str() == first.tokenizer.to_str()
    assert torch.equal(changed.train, first.train)
    assert not torch.equal(changed.validation, first.validation)
    for path in folder.iterdir():  # control: a change of the training side changes the vocabulary
        path.write_text("zzzzqqqq " * 50)
    assert load_corpus([folder], vocabulary=300).tokenizer.to_str() != first.tokenizer.to_str()


def test_building_twice_gives_the_same_tokens(folder: Path) -> None:
    assert same(load_corpus([folder], cache=False), load_corpus([folder], cache=False))


def test_long_documents_are_encoded_in_pieces_without_loss(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(f"    line {k} é\n" for k in range(12_000)) + "x" * 70_000)
    corpus = load_corpus(str(path), vocabulary=400)
    assert (
        documents_of(corpus, corpus.train)[0] + documents_of(corpus, corpus.validation)[0] == path.read_text()
    )
    assert (corpus.train_documents, corpus.validation_documents) == (1, 1)


def test_a_small_text_gives_a_small_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "small.txt"
    path.write_text("ab ab ab\n" * 3)
    corpus = load_corpus([path], vocabulary=4096)
    assert 257 < corpus.vocabulary < 270
    assert int(corpus.train.max()) < corpus.vocabulary
    with pytest.raises(InputError, match="at least 257 tokens, got 256"):
        load_corpus([path], vocabulary=256)


def test_default_text_is_the_standard_library_and_max_bytes_caps_it() -> None:
    corpus = load_corpus(vocabulary=512, max_bytes=200_000)
    assert "standard library" in corpus.name
    assert 150_000 < corpus.bytes <= 200_000
    assert corpus.left_out > 100
    entropy = unigram_entropy(corpus.train, corpus.validation, corpus.vocabulary)
    assert 4 < entropy < math.log(512)


def test_cache_is_used_and_depends_on_text_and_settings(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = load_corpus([folder], vocabulary=300)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(module, "_build", None)  # any attempt to build fails
    kept = load_corpus([folder], vocabulary=300)
    assert same(built, kept)
    assert kept.tokenizer.encode(END).ids != [0]
    for change in ({"vocabulary": 301}, {"max_bytes": 2000}, {"cache": False}):
        with pytest.raises(TypeError):
            load_corpus([folder], **{"vocabulary": 300, **change})
    (folder / "0.txt").write_text("changed")
    with pytest.raises(TypeError):
        load_corpus([folder], vocabulary=300)


def test_without_cache_nothing_is_written(folder: Path, cache: Path) -> None:
    load_corpus([folder], cache=False)
    assert not cache.exists()


def test_damaged_cache_is_built_again(folder: Path, cache: Path) -> None:
    built = load_corpus([folder], vocabulary=300)
    (entry,) = cache.iterdir()
    good = entry.read_bytes()
    spoiled = [b"", b"x", good[:-1], good[: len(good) // 2], good + b"x"]
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(good), (30,), generator=generator).tolist():
        spoiled.append(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    for content in spoiled:
        entry.write_bytes(content)
        assert module._load(entry) is None
        assert same(load_corpus([folder], vocabulary=300), built)
        assert module._load(entry) is not None


def test_a_cache_that_cannot_be_written_only_warns(folder: Path, cache: Path) -> None:
    cache.write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="could not be kept"):
        assert same(load_corpus([folder], vocabulary=300), load_corpus([folder], vocabulary=300, cache=False))


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.cache_folder() == Path(os.environ["GRAMIAN_CACHE"])
    monkeypatch.delenv("GRAMIAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert module.cache_folder() == Path("/somewhere/gramian")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert module.cache_folder() == Path.home() / ".cache" / "gramian"


sizes = st.tuples(st.integers(2, 60), st.integers(1, 20), st.integers(1, 9), st.integers(0, 3)).filter(
    lambda size: size[0] > size[1]
)


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_an_epoch_takes_disjoint_windows_of_the_ring(size: tuple[int, int, int, int]) -> None:
    length, context, batch, seed = size
    windows = Windows(torch.arange(length, dtype=torch.int32), context, batch, seed)
    assert len(windows) == length // context
    steps = torch.cat([windows(step) for step in range(3 * len(windows) // batch + 1)])
    assert steps.dtype == torch.int64
    assert steps.shape[1] == context + 1
    assert torch.equal(steps[:, 1:], (steps[:, :-1] + 1) % length)
    for epoch in range(3):
        targets = steps[epoch * len(windows) : (epoch + 1) * len(windows), 1:].flatten()
        assert len(targets.unique()) == len(targets)


def test_windows_are_a_pure_function_of_the_step() -> None:
    tokens = torch.arange(1000)
    forward = Windows(tokens, 10, 7, seed=1)
    expected = [forward(step) for step in range(50)]
    backward = Windows(tokens, 10, 7, seed=1)
    for step in reversed(range(50)):
        assert torch.equal(backward(step), expected[step])
    assert not torch.equal(Windows(tokens, 10, 7, seed=2)(0), expected[0])
    epochs = [torch.cat([Windows(tokens, 10, 100, seed=1)(epoch)])[:, 0] for epoch in range(2)]
    assert not torch.equal(epochs[0].sort().values, epochs[1].sort().values)  # another start
    assert not torch.equal(epochs[0], epochs[0].sort().values)  # another order


def test_batch_size_does_not_change_the_order() -> None:
    tokens = torch.arange(500)
    ones = torch.cat([Windows(tokens, 9, 1, seed=3)(step) for step in range(120)])
    assert torch.equal(ones, torch.cat([Windows(tokens, 9, 40, seed=3)(step) for step in range(3)]))


def test_windows_in_order_read_the_text_from_its_start() -> None:
    windows = Windows(torch.arange(32), context=4, batch=3, seed=0)
    batches = list(windows.in_order(10))
    assert [len(batch) for batch in batches] == [3, 3, 1]  # 31 targets: 7 windows
    assert torch.cat(batches)[:, :-1].flatten().tolist() == list(range(28))
    assert torch.cat(batches)[:, 1:].flatten().tolist() == list(range(1, 29))
    assert [len(batch) for batch in windows.in_order(1)] == [3]
    (last,) = Windows(torch.arange(5), context=4, batch=3).in_order(9)
    assert last.tolist() == [[0, 1, 2, 3, 4]]


def test_too_short_a_text_says_what_is_needed() -> None:
    with pytest.raises(InputError, match="has 8 tokens and a window of context 8 needs 9"):
        Windows(torch.arange(8), 8, 1)
    assert Windows(torch.arange(9), 8, 1)(0).shape == (1, 9)
    for context, batch, seed in ((0, 1, 0), (1, 0, 0), (1, 1, -1)):
        with pytest.raises(InputError, match="windows need"):
            Windows(torch.arange(8), context, batch, seed)


def test_unigram_entropy_equals_a_loop_and_bounds() -> None:
    train, validation = [0, 0, 1, 3], [1, 2, 3, 3]
    smoothed = [3 / 9, 2 / 9, 1 / 9, 2 / 9, 1 / 9]
    expected = -sum(math.log(smoothed[token]) for token in validation) / 4
    found = unigram_entropy(torch.tensor(train, dtype=torch.int32), torch.tensor(validation), 5)
    assert found == pytest.approx(expected, rel=1e-12)
    tokens = torch.randint(7, (70_000,), generator=torch.Generator().manual_seed(0))
    assert unigram_entropy(tokens, tokens, 7) == pytest.approx(math.log(7), rel=1e-3)


def test_bits_per_byte_does_not_depend_on_the_vocabulary(folder: Path) -> None:
    def of_uniform_bytes(vocabulary: int) -> float:
        """A model that gives every byte eight bits, and the ends of documents none."""
        corpus = load_corpus([folder], vocabulary=vocabulary)
        sizes = corpus.token_bytes[corpus.validation]
        return bits_per_byte(int(sizes.sum()) * 8 * math.log(2), sizes)

    assert of_uniform_bytes(257) == pytest.approx(8, rel=1e-12)
    assert of_uniform_bytes(300) == pytest.approx(8, rel=1e-12)
    assert bits_per_byte(math.log(2), torch.tensor([0, 3, 1])) == pytest.approx(0.25)
    with pytest.raises(InputError, match="at least one byte"):
        bits_per_byte(1.0, torch.tensor([0]))
