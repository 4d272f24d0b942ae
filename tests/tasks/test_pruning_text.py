"""What certifies a pruned decoder was never read, certificates follow from their terms, learning helps."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from gramian.bayes.bounds import BOUNDS, bernstein_risk_bound, chernoff_bound, kl_bound, sampled_risk_bound
from gramian.bayes.split import Split
from gramian.compress.density import keep_highest
from gramian.compress.learning import Learning
from gramian.compress.masks import keep, masks_of
from gramian.compress.prior import prior_of
from gramian.compress.scores import shuffled
from gramian.compress.thresholds import most_probable
from gramian.data.objectives import NextToken
from gramian.data.text import read, sample
from gramian.data.tokens import Windows
from gramian.errors import InputError, StoppedError
from gramian.nn.transformer import Shape, Transformer
from gramian.tasks.language import Text, TrainConfig, train, validation
from gramian.tasks.open_model import open_model
from gramian.tasks.pruning_decoder import Decoder, add_decoder_masks, drawn_losses, window_losses
from gramian.tasks.pruning_files import Exported
from gramian.tasks.pruning_result import Pruning
from gramian.tasks.pruning_text import Job, TextPruning, prune_text
from gramian.tasks.pruning_windows import Amount, corpus_of, epoch, occurring, window_sets
from gramian.tasks.saved_model import trained_model
from gramian.tasks.self_bounded import Bounding
from gramian.train.loop import Training
from gramian.train.run import Run

QUIET = Console(quiet=True)
CONTEXT, P_MIN = 16, 1e-5
ANIMALS = {"cat": "sleeps", "dog": "barks", "owl": "flies", "fox": "runs", "hen": "sits", "bat": "hangs"}


def write_tales(folder: Path, documents: int, seed: int) -> Path:
    """Write sentences whose verb follows from the animal, and whose numbers no one can know."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    names = list(ANIMALS)
    for number in range(documents):
        kinds = torch.randint(len(names), (90,), generator=draw).tolist()
        counts = torch.randint(1000, (90,), generator=draw).tolist()
        lines = [f"the {names[k]} {ANIMALS[names[k]]} at {n}" for k, n in zip(kinds, counts, strict=True)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("decoder")
    config = TrainConfig(
        data=Text(text=(write_tales(folder / "tales", 120, 0),), vocabulary=300),
        shape=Shape(width=32, depth=2, heads=2, context=CONTEXT),
        training=Training(steps=200, batch=16, learning_rate=1e-2, evaluate_every=200, device="cpu"),
        evaluation_batches=3,
        runs=folder / "runs",
        name="dense",
    )
    train(config, console=QUIET)
    return config


@pytest.fixture(scope="module")
def run(trained) -> Run:
    return Run(trained.runs / "dense")


@pytest.fixture(scope="module")
def config(run) -> TextPruning:
    return TextPruning(
        run=run.folder,
        densities=(0.2, 0.4),
        amount=Amount(held_out=32, bound=150),
        learning=Learning(steps=40, rate=0.3, record_every=20),
        bounding=Bounding(learning=Learning(steps=2, rate=0.01), draws=40),
        runs=run.folder.parent,
        name="pruned",
    )


@pytest.fixture(scope="module")
def sets(run, config):
    return window_sets(run, config.amount, context=CONTEXT, batch=8, seed=0)


@pytest.fixture(scope="module")
def dense(run) -> Decoder:
    return Decoder(trained_model(run)).eval()


@pytest.fixture(scope="module")
def found(config) -> Pruning:
    return prune_text(config, QUIET)


def test_no_evidence_was_read(trained, run, sets) -> None:
    corpus = corpus_of(run)
    windows = epoch(corpus.validation, CONTEXT)
    evaluated = torch.cat(list(validation(trained, corpus)))
    assert len(evaluated) == 48
    assert torch.equal(evaluated, NextToken()(windows[:48], 0))
    assert not torch.equal(evaluated, NextToken()(windows[1:49], 0))  # the order is that of the evaluations
    place = epoch(torch.arange(len(corpus.validation)), CONTEXT)
    predicted = place[:, 1:].flatten()
    assert len(predicted.unique()) == len(predicted)  # so windows have no predicted token in common
    trained_on = len(corpus.train) // CONTEXT
    assert sets.split.bound.min() >= trained_on + 48 == len(sets.seen)
    assert len(sets.bound) == sets.split.n == 150
    assert len(sets.held_out) == 32
    assert torch.equal(sets.bound, NextToken()(windows[sets.split.bound - trained_on], 0))
    rows = [tuple(row) for row in torch.cat((sets.bound, sets.held_out)).flatten(1).tolist()]
    others = {tuple(row) for row in evaluated.flatten(1).tolist()}
    assert len(set(rows)) == len(rows)
    assert not others & set(rows)


def test_windows_of_the_training_text_are_left_out(run, sets) -> None:
    tokens = corpus_of(run).train
    draw = torch.Generator().manual_seed(0)
    some = torch.randint(5, (2000,), generator=draw)
    windows = torch.randint(5, (400, 5), generator=draw)
    text = some.tolist()
    known = [any(text[i : i + 5] == row for i in range(1996)) for row in windows.tolist()]
    assert 0 < sum(known) < 400
    assert occurring(windows, some).tolist() == known
    assert not occurring(windows, some[:4]).any()
    evidence = torch.cat((sets.bound, sets.held_out))
    whole = torch.cat((evidence[:, 0], evidence[:, 1, -1:]), 1)
    assert not occurring(whole, tokens).any()
    assert occurring(tokens[3:20][None], tokens).all()


def test_shorter_windows_are_cut_from_the_same_ones(run) -> None:
    tokens = corpus_of(run).validation
    sets = window_sets(run, Amount(context=5, bound=50, held_out=20), context=CONTEXT, batch=8, seed=0)
    assert sets.bound.shape == (50, 2, 5)
    assert sets.held_out.shape == (20, 2, 5)
    trained_on = len(corpus_of(run).train) // 5
    assert len(sets.seen) == trained_on + 48 * 3
    rows = epoch(tokens, CONTEXT)
    for number, (inputs, targets) in zip((sets.split.bound - trained_on).tolist(), sets.bound, strict=True):
        start = number % 3 * 5
        assert torch.equal(inputs, rows[number // 3, start : start + 5])
        assert torch.equal(targets, rows[number // 3, start + 1 : start + 6])


def test_text_that_the_run_has_read_is_refused(trained, run, tmp_path) -> None:
    def of(**more):
        return window_sets(run, Amount(**more), context=CONTEXT, batch=8, seed=0)

    corpus = corpus_of(run)
    folder = tmp_path / "again"
    folder.mkdir()
    documents = sample(read(trained.data.text, "text", "**/*"), 10**6).documents
    for number, document in enumerate(reversed(documents)):  # in another order, so that windows are others
        (folder / f"{number:03}.txt").write_text(document.text)
    with pytest.raises(InputError, match=r" 0 are left .* stand in its text, and 32 are needed"):
        of(text=(folder,))
    fresh = of(text=(write_tales(tmp_path / "fresh", 40, 7),))
    assert len(fresh.seen) == len(corpus.train) // CONTEXT
    assert len(fresh.held_out) + len(fresh.bound) == fresh.unread > 50
    with pytest.raises(InputError, match="longer than the run's context of 16"):
        of(context=17)
    with pytest.raises(InputError, match="not a file or folder that exists"):
        of(text=(tmp_path / "none",))


def spoiled(run: Run, tmp_path: Path, **changes) -> Run:
    """Return a run whose settings say something else."""
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text((run.folder / name).read_text())
    about = {"settings": {**run.settings, **changes}, "versions": {}}
    (folder / "settings.json").write_text(json.dumps(about))
    return Run(folder)


def test_a_run_without_unread_text_is_refused(run, tmp_path) -> None:
    greedy = spoiled(run, tmp_path, evaluation_batches=10_000)
    with pytest.raises(InputError, match=r"0 are left .* give more text that the run never read"):
        window_sets(greedy, Amount(), context=CONTEXT, batch=8, seed=0)


def test_a_run_whose_text_has_changed_is_refused(run, tmp_path) -> None:
    data = {**run.settings["data"], "text": [str(write_tales(tmp_path / "other", 5, 3))]}
    with pytest.raises(InputError, match="has changed since"):
        corpus_of(spoiled(run, tmp_path, data=data))
    with pytest.raises(InputError, match="do not say which text"):
        (tmp_path / "spoiled/settings.json").write_text(json.dumps({"settings": {}, "versions": {}}))
        corpus_of(Run(tmp_path / "spoiled"))


def by_hand(model, planes, p_min: float = P_MIN) -> tuple[list[float], list[float]]:
    nats, clipped = [], []
    for inputs, targets, *documents in planes:
        seen = {"documents": documents[0][None]} if documents else {}
        with torch.no_grad():
            chance = model(inputs[None], **seen)[0].double().softmax(-1)
        own = [float(chance[t, target]) for t, target in enumerate(targets)]
        nats.append(-sum(map(math.log, own)) / len(own))
        clipped.append(sum(math.log(max(p, p_min)) for p in own) / len(own) / math.log(p_min))
    return nats, clipped


def test_losses_are_the_mean_over_a_window(dense, sets) -> None:
    for objective in (NextToken(), NextToken(separate_documents=True)):
        tokens = torch.cat((sets.held_out[:9, 0], sets.held_out[:9, 1, -1:]), 1)
        tokens[:, 7] = 0  # where a document ends
        planes = objective(tokens, 0)
        for p_min in (P_MIN, 0.05):
            losses = window_losses(dense, planes, p_min, batch=4)
            nats, clipped = by_hand(dense.transformer, planes, p_min)
            assert losses.nats.tolist() == pytest.approx(nats, rel=1e-5)
            assert losses.clipped.tolist() == pytest.approx(clipped, rel=1e-5)
    assert min(n / math.log(1 / 0.05) - c for n, c in zip(nats, clipped, strict=True)) > 0.1  # clipping shows


def test_drawn_losses_have_the_mean_of_all_masks(dense, sets) -> None:
    model, planes = copied(dense), sets.held_out[:3]
    add_decoder_masks(model, "heads")
    masks = masks_of(model)
    assert [mask.logits.shape for mask in masks.values()] == [(2,), (2,)]
    with torch.no_grad():
        for k, mask in enumerate(masks.values()):
            mask.logits.copy_(torch.tensor([0.3, -0.8]) + k)
    chances = torch.cat([mask.probabilities.detach() for mask in masks.values()])
    expected = torch.zeros(3)
    for bits in itertools.product((True, False), repeat=4):
        kept = torch.tensor(bits)
        keep(model, dict(zip(masks, kept.split(2), strict=True)))
        weight = torch.where(kept, chances, 1 - chances).prod()
        expected += weight * window_losses(model, planes, P_MIN, 3).clipped
    draws = 80
    drawn = drawn_losses(
        model, planes.repeat(draws, 1, 1), P_MIN, torch.Generator().manual_seed(0)
    ).clipped.reshape(draws, 3)
    error = drawn.std(0) / draws**0.5
    assert ((drawn.mean(0) - expected).abs() < 4 * error).all()
    assert (drawn.std(0) > 0).all()
    pairs = torch.corrcoef(drawn.T)[0, 1:]
    assert pairs.abs().max() < 4 / draws**0.5  # windows do not share masks


def copied(dense: Decoder) -> Decoder:
    model = Decoder(Transformer(dense.transformer.config)).eval()
    model.load_state_dict(dense.state_dict())
    return model


def test_the_densities_are_reached_and_the_export_is_the_pruned_network(found, config, dense, sets) -> None:
    assert [each.density for each in found.outcomes] == [0.2, 0.4]
    for outcome in found.outcomes:
        names = {layer.name.rpartition(".")[2] for layer in outcome.layers}
        assert names == {"query_key", "value", "projection", "up", "down"}
        weights = sum(layer.weights for layer in outcome.layers)
        assert weights == 2 * 12 * 32**2
        assert sum(layer.kept for layer in outcome.layers) == round(outcome.density * weights)
        assert outcome.kept == pytest.approx(outcome.density, abs=1 / weights)
        assert outcome.expected == pytest.approx(outcome.density, abs=0.01)
        folder = config.folder / f"density-{outcome.density:g}"
        state = load_file(folder / "model.safetensors")
        plain = Transformer(dense.transformer.config).eval()
        plain.load_state_dict(
            {name.removeprefix("transformer."): value for name, value in state.items()}, strict=False
        )
        zeros = sum(int((plain.get_parameter(f"{layer.name}.weight") == 0).sum()) for layer in outcome.layers)
        assert zeros == weights - round(outcome.density * weights)
        clipped = torch.tensor(by_hand(plain, sets.held_out)[1])
        assert clipped.mean() == pytest.approx(outcome.fixed, rel=1e-5)
        added = clipped - torch.tensor(by_hand(dense.transformer, sets.held_out)[1])
        error = outcome.export["clipped_loss"]["fixed_minus_dense_standard_error"]
        assert error == pytest.approx(float(added.std()) / len(added) ** 0.5, rel=1e-3)
        kept = outcome.export
        assert kept["nonzero_before"] - kept["nonzero"] == zeros
        assert kept["compressed"] < kept["compressed_before"]
        assert kept["bytes"] == (folder / "model.safetensors").stat().st_size


def test_the_export_opens_as_any_model_of_hugging_face(found, config, sets) -> None:
    folder, tokens = config.folder / "density-0.2", sets.held_out[:, 0]
    opened = open_model(str(folder), device="cpu")
    with torch.no_grad():
        logits = opened.model(input_ids=tokens).logits
    own = cross_entropy(logits.flatten(0, 1), sets.held_out[:, 1].flatten())
    assert own.item() == pytest.approx(found.outcomes[0].export["nats_a_token"]["fixed"], rel=1e-5)


def test_losses_are_told_in_the_units_of_language_models(found, dense, sets) -> None:
    nats, clipped = by_hand(dense.transformer, sets.held_out)
    size = int(sets.token_bytes[sets.held_out[:, 1]].sum())
    for outcome in found.outcomes:
        assert outcome.export["nats_a_token"]["dense"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
        bits = sum(nats) * CONTEXT / math.log(2) / size
        assert outcome.export["bits_a_byte"]["dense"] == pytest.approx(bits, rel=1e-5)
        told, table = outcome.export["nats_a_token"], outcome.export["bits_a_byte"]
        assert {*table, "certified_of_clipped"} == set(told)
        assert told["start"] < told["token_frequencies"] < told["uniform_guess"] == math.log(300)
        assert told["certified_of_clipped"] == outcome.guarantee.posterior.value * math.log(1e5)
        differences = outcome.export["clipped_loss"]
        assert differences["fixed_minus_dense"] == pytest.approx(outcome.fixed - found.dense, abs=1e-6)
        assert differences["fixed_minus_start"] == pytest.approx(outcome.fixed - outcome.baseline, abs=1e-6)
    assert found.dense == pytest.approx(sum(clipped) / len(clipped), rel=1e-5)


def test_certificates_follow_from_their_terms(found, config, sets) -> None:
    settings, n = config.bounding, 150
    for outcome in found.outcomes:
        one = outcome.guarantee
        paid = math.exp(-math.log(2))  # for two densities
        for each in (one.posterior, one.prior):
            delta = settings.delta_sampling * paid / 2  # for two bounds by draws
            mean, draws = each.empirical_risk, settings.draws
            above = min(
                float(sampled_risk_bound(mean, draws, delta)),
                float(bernstein_risk_bound(mean, each.variance, draws, delta)),
            )
            assert each.draws == draws
            assert each.empirical_bound == pytest.approx(above)
            assert each.value == pytest.approx(float(kl_bound(above, each.kl, n, settings.delta * paid)))
            assert each.value > above > mean
            assert each.prior_examples == len(sets.seen)
            assert each.loss == "clipped next-token loss"
            assert each.confidence == pytest.approx(1 - settings.delta - settings.delta_sampling)
        assert one.prior.kl == 0 < one.posterior.kl < 5
        same = one.posterior.empirical_risk - one.prior.empirical_risk
        assert abs(same) < 0.1 * (one.prior.variance / settings.draws) ** 0.5  # by the same random numbers
        bound = float(chernoff_bound(one.fixed.empirical_risk, n, settings.delta * paid))
        assert one.fixed.value == pytest.approx(bound)
        assert one.bounds == {name: pytest.approx(one.bounds[name]) for name in BOUNDS}
        assert (
            one.bounds["kl"]
            == one.posterior.value
            == min(one.bounds[name] for name in BOUNDS if name != "catoni")
        )
        assert one.held_out == outcome.random < one.posterior.value
        assert f"all {sets.unread}" in outcome.export["what_is_certified"]


def job_of(config, sets, dense, **changes) -> Job:
    return Job(replace(config, **changes), sets, dense)


def test_evidence_that_was_read_before_is_refused(config, sets, dense) -> None:
    model = copied(dense)
    add_decoder_masks(model, "weights")
    fixed, prior = most_probable(model, 0.5), prior_of(model)
    settings = replace(config.bounding, draws=4)
    generator = torch.Generator().manual_seed(0)

    def of(split: Split):
        job = job_of(config, replace(sets, split=split), dense)
        return job.guarantee(model, prior, fixed, settings, generator)

    assert of(sets.split).posterior.kl == 0
    bound = sets.split.bound.clone()
    bound[0] = sets.seen[-1]  # a window that the run was evaluated by
    with pytest.raises(InputError, match="1 of the 150 examples of the bound set were seen before"):
        of(Split(sets.seen[:-1], bound))


@pytest.mark.parametrize("seed", [0, 1])
def test_learning_lowers_the_loss_of_the_starting_mask(config, sets, dense, seed) -> None:
    job = job_of(config, sets, dense, seed=seed, bounding=None, learning=Learning(steps=100, rate=0.3))
    trained = Windows(sets.training.tokens, CONTEXT, 8, seed)
    job = replace(job, sets=replace(sets, training=trained))
    seen = []

    def note(model: Decoder) -> Exported:
        learnt = {name: mask.probabilities.detach() for name, mask in masks_of(model).items()}
        fixed = {name: mask.kept for name, mask in masks_of(model).items()}
        keep(model, keep_highest(model, shuffled(learnt, torch.Generator().manual_seed(seed)), 0.2))
        seen.append(window_losses(model, sets.held_out, P_MIN, 50).mean)
        keep(model, fixed)
        return EXPORTED

    outcome = job.prune(0.2, note)
    gap = outcome.baseline - job.dense_losses.mean
    assert outcome.baseline - outcome.fixed > 0.5 * gap > 0
    assert outcome.baseline - outcome.random > 0.5 * gap
    assert outcome.guarantee is None
    assert "what_is_certified" not in outcome.export
    assert seen[0] > outcome.baseline  # the same λ on other weights of the layers do not help
    assert [moment.step for moment in outcome.history] == [1, 50, 100]
    assert outcome.history[-1].loss < outcome.history[0].loss


EXPORTED = Exported(1, 1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("structure", "start"), [("heads", "snip"), ("2:4", "magnitude"), ("weights", "random")]
)
def test_structures_and_starts(config, sets, dense, structure, start) -> None:
    learning = Learning(steps=2, rate=0.1, record_every=1)
    bounding = replace(config.bounding, learning=learning, draws=8)
    job = job_of(config, sets, dense, structure=structure, start=start, learning=learning, bounding=bounding)
    states = []
    outcome = job.prune(0.5, lambda model: states.append(masks_of(model)) or EXPORTED)
    assert outcome.kept == 0.5
    assert outcome.guarantee.posterior.value <= 1
    masks = states[0]
    if structure == "heads":
        assert len(masks) == 2
        assert sum(int(mask.kept.sum()) for mask in masks.values()) == 2
        assert outcome.layers[0].weights == 32 * 32
    if structure == "2:4":
        assert all((mask.kept.sum(-1) == 2).all() for mask in masks.values())
        with pytest.raises(InputError, match=r"a density of 0\.4 is out"):
            job.prune(0.4, lambda model: EXPORTED)


def test_a_prior_can_be_the_start(config, sets, dense) -> None:
    outcome = job_of(config, sets, dense, prior="start", bounding=None).prune(0.2, lambda model: EXPORTED)
    assert outcome.history == ()
    assert outcome.fixed == pytest.approx(outcome.baseline, rel=1e-3)  # a weight or two by rounding
    assert outcome.expected == pytest.approx(0.2 * 0.9 + 0.8 * 0.1, abs=1e-3)


def test_weights_can_be_learnt_on_training_text_too(config, sets, dense) -> None:
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    job = job_of(
        config,
        sets,
        dense,
        learning=replace(config.learning, learn="both", steps=15),
        bounding=replace(config.bounding, draws=8),
    )
    outcome = job.prune(0.2, lambda model: EXPORTED)
    assert math.isfinite(outcome.guarantee.posterior.kl)  # the posterior keeps the prior's weights
    assert outcome.fixed < outcome.baseline
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_what_was_done_is_not_done_again(found, config, monkeypatch) -> None:
    def never(*_):
        raise AssertionError("pruned again")

    monkeypatch.setattr(Job, "prune", never)
    again = prune_text(config, QUIET, resume=True)
    assert again == found
    with pytest.raises(InputError, match="already holds a run"):
        prune_text(config, QUIET)
    monkeypatch.setattr(Job, "prune", lambda *_: None)
    with pytest.raises(StoppedError, match="0 of 2 densities are saved"):
        prune_text(replace(config, name="stopped"), QUIET)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"densities": ()}, "densities have to be different numbers"),
        ({"densities": (0.0,)}, "density must be more than 0"),
        ({"densities": (0.5, 1.5)}, "density must be more than 0"),
        ({"start": "grasp"}, "unknown start 'grasp'; choose one of magnitude, snip, random"),
        ({"structure": "neurons"}, "not by neurons"),
        ({"structure": "blocks"}, "unknown structure 'blocks'"),
        ({"batch": 0}, "at least one window"),
        ({"amount": Amount(bound=7)}, "bound must be at least 8"),
        ({"amount": Amount(context=0)}, "context of at least 1"),
        ({"prior": "none"}, "unknown prior 'none'; choose learnt or start"),
        ({"learning": Learning(mode="hard_concrete")}, "no Bernoulli masks"),
        ({"bounding": Bounding(learning=Learning(learn="both"))}, "moves masks alone"),
        ({"run": Path("nowhere")}, "not a run folder"),
    ],
)
def test_settings_that_cannot_be_used(config, changes, words) -> None:
    with pytest.raises(InputError, match=words):
        prune_text(replace(config, name="wrong", **changes), QUIET)
    assert not (config.runs / "wrong").exists()


def test_an_encoder_is_refused(trained, config, tmp_path) -> None:
    training = replace(trained.training, steps=1)
    masked = replace(trained, objective="masked", training=training, runs=tmp_path, name="encoder")
    encoder = train(masked, console=QUIET)
    with pytest.raises(InputError, match="is an encoder; only a decoder is pruned"):
        prune_text(replace(config, run=encoder.folder), QUIET)
