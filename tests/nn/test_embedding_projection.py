"""Square maps after the embedding and before the head, alone and in a saved model."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gramian.nn.init import OrthogonalProjection, initialise_
from gramian.nn.transformer import Transformer, TransformerConfig, build

CONFIG = TransformerConfig(vocabulary=29, context=16, width=24, depth=2, heads=4, embedding_projection=True)
every_head = pytest.mark.parametrize("tied", [True, False])


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(29, shape, generator=torch.Generator().manual_seed(seed))


def model_of(**more: object) -> Transformer:
    model = build(replace(CONFIG, **more), seed=0).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def test_it_starts_as_a_rotation() -> None:
    model = build(CONFIG, seed=0)
    for projection in (model.embedding_projection, model.head_projection):
        assert isinstance(projection, OrthogonalProjection)
        weight = projection.weight
        torch.testing.assert_close(weight @ weight.T, torch.eye(24), rtol=0, atol=1e-5)
        assert (weight - torch.eye(24)).abs().max() > 0.1
    assert not torch.equal(model.embedding_projection.weight, model.head_projection.weight)
    again, other = build(CONFIG, seed=0), build(CONFIG, seed=1)
    assert torch.equal(model.head_projection.weight, again.head_projection.weight)
    assert not torch.equal(model.head_projection.weight, other.head_projection.weight)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kept = initialise_(OrthogonalProjection(24).double(), 0)(x)
    torch.testing.assert_close(kept @ kept.T, x @ x.T, rtol=0, atol=1e-10)
    plain = initialise_(nn.Linear(24, 24, bias=False).double(), 0)(x)  # control
    assert (plain @ plain.T - x @ x.T).abs().max() > 1


@every_head
def test_it_equals_a_model_whose_tables_are_multiplied_out(tied) -> None:
    """Absorbed: embeddings E Q_inᵀ and a head W Q_out give the same logits without projections."""
    model, batch = model_of(tied=tied), tokens(2, 9)
    plain = build(replace(CONFIG, embedding_projection=False, tied=False), seed=3).double()
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    assert set(missing.unexpected_keys) == {"embedding_projection.weight", "head_projection.weight"}
    assert (plain(batch) - model(batch)).abs().max() > 1e-2  # control
    plain.embedding.weight.data = model.embedding.weight.data @ model.embedding_projection.weight.T
    plain.head.weight.data = model.head.weight.data @ model.head_projection.weight
    torch.testing.assert_close(plain(batch), model(batch), rtol=0, atol=1e-10)
    got = model.features(batch, embedded=model.embedding(batch))
    torch.testing.assert_close(got, model.features(batch), rtol=0, atol=0)


def test_without_it_nothing_is_added() -> None:
    model = build(replace(CONFIG, embedding_projection=False), seed=0)
    assert not any(
        "projection.weight" in name and "blocks" not in name for name, _ in model.named_parameters()
    )
    added = sum(p.numel() for p in build(CONFIG, 0).parameters()) - sum(p.numel() for p in model.parameters())
    assert added == 2 * 24**2


@every_head
@torch.no_grad()
def test_a_saved_hugging_face_model_keeps_it(tied, tmp_path) -> None:
    pytest.importorskip("transformers")
    from gramian.interop.huggingface import GramianConfig, GramianForCausalLM

    shape = {"vocabulary": 29, "context": 16, "width": 24, "depth": 2, "heads": 4, "eos_token_id": None}
    variant = {"block": "pre_norm_sink", "norm": "dynamic_tanh", "tied": tied, "embedding_projection": True}
    model, batch = GramianForCausalLM(GramianConfig(**shape, **variant)).eval(), tokens(2, 9)
    for projection in (model.transformer.embedding_projection, model.transformer.head_projection):
        torch.testing.assert_close(projection.weight @ projection.weight.T, torch.eye(24), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = GramianForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.embedding_projection
    assert loaded.config.shape() == model.config.shape()
    torch.testing.assert_close(loaded(batch).logits, model(batch).logits)
    embedded = model.get_input_embeddings()(batch)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(batch).logits)
    out = [each.generate(batch, max_new_tokens=4, do_sample=False) for each in (model, loaded)]
    assert torch.equal(*out)
    greedy = batch
    for _ in range(4):
        greedy = torch.cat((greedy, model.transformer(greedy)[:, -1:].argmax(-1)), 1)
    assert torch.equal(out[0], greedy)
