"""Samples of fitted images: as many as asked, within [0, 1], by seed, and what each method makes of them."""

import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gramian.bayes.chains import Chains
from gramian.bayes.flat import Call
from gramian.bayes.hmc import sample
from gramian.errors import InputError, StoppedError
from gramian.imaging.quality import psnr
from gramian.tasks import image_doubt
from gramian.tasks.classical_choice import reconstruct
from gramian.tasks.field_fits import Fitted, Job, Network
from gramian.tasks.image_doubt import OF_PIXELS, UNCERTAINTIES, Doubt, Drawn, draw
from gramian.tasks.observed_views import Observed
from tasks.small_scans import NETWORK, QUIET, fitted_in, phantom_scan, seen, settings

BRIEF = {"samples": 6, "members": 3, "descents": 5, "warmup": 6, "thinning": 1, "max_depth": 2}
SCAN = {"side": 12, "share": 0.05}
WHOLE = 60


def doubt(name: str, **more: float) -> Doubt:
    return Doubt(uncertainty=name, **{**BRIEF, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fitted]:
    """One fit of each kind that methods start from."""
    folder = tmp_path_factory.mktemp("fits")
    jobs = {"pixels": Job(pixels=True, fit=settings(WHOLE))}
    for name in ("none", "ensemble", "dropout", "dropout_ensemble"):
        kind = doubt(name)
        network = replace(NETWORK, dropout=0.3)
        jobs[name] = Job(members=kind.fields, dropout=kind.dropout, network=network, fit=settings(WHOLE))
    return {name: fitted_in(folder / name, job, seen(**SCAN)) for name, job in jobs.items()}


def drawn(fits: dict[str, Fitted], name: str, pixels: bool = False, seed: int = 0, **more: float) -> Drawn:
    found = fits["pixels" if pixels else name if name in fits else "none"]
    job = replace(found.job, fit=replace(found.job.fit, seed=seed))
    return draw(replace(found, job=job), seen(**SCAN), doubt(name, **more), QUIET)


CASES = [(name, False) for name in UNCERTAINTIES] + [(name, True) for name in OF_PIXELS]


@pytest.mark.parametrize(("name", "pixels"), CASES)
def test_samples_are_counted_bounded_and_of_the_seed(
    fits: dict[str, Fitted], name: str, pixels: bool
) -> None:
    state = torch.get_rng_state()
    one, same, other = (drawn(fits, name, pixels, seed) for seed in (0, 0, 1))
    count = {"none": 1, "ensemble": 3}.get(name, 6)
    assert one.samples.shape == (count, 12, 12)
    assert one.samples.dtype == torch.float32
    assert ((one.samples >= 0) & (one.samples <= 1)).all()
    assert not one.samples.requires_grad
    assert torch.equal(one.samples, same.samples)
    assert torch.equal(one.samples, other.samples) == (name in ("none", "ensemble"))
    assert torch.equal(torch.get_rng_state(), state)
    if count > 1:
        spread = one.samples.std(0)
        assert 0 < float(spread.max()) < 0.5
        inside = seen(**SCAN).inside
        assert inside is not None
        assert (one.samples[:, ~inside] == 0).all()
    assert all(math.isfinite(value) for value in one.notes.values())
    assert one.seconds > 0


def test_points_are_the_members_themselves(fits: dict[str, Fitted]) -> None:
    for name in ("none", "ensemble"):
        with torch.no_grad():
            assert torch.equal(drawn(fits, name).samples, fits[name].members())
    one, other, _ = drawn(fits, "ensemble").samples
    assert (one - other).abs().max() > 0.01


def test_dropout_shares_samples_out_among_members_and_is_off_afterwards(fits: dict[str, Fitted]) -> None:
    alone, together = (drawn(fits, name).samples for name in ("dropout", "dropout_ensemble"))
    for samples in (alone, *together.split(2)):
        assert (samples[0] - samples[1]).abs().max() > 1e-3
    assert len(drawn(fits, "dropout_ensemble", samples=7).samples) == 9  # as many of each, at least as asked
    for name in ("dropout", "dropout_ensemble"):
        members = fits[name].members
        assert not members.training
        assert torch.equal(members(), members())
    many = drawn(fits, "dropout", samples=200).samples.mean(0)
    with torch.no_grad():
        centre = fits["dropout"].members()[0]
    assert (many - centre).abs().mean() < (alone[0] - centre).abs().mean()


def test_fits_are_left_as_they_are(fits: dict[str, Fitted]) -> None:
    for name, pixels in CASES:
        found = fits["pixels" if pixels else name if name in fits else "none"].members
        before = {key: value.detach().clone() for key, value in found.state_dict().items()}
        drawn(fits, name, pixels)
        assert all(torch.equal(value, before[key]) for key, value in found.state_dict().items())


def test_chains_around_a_grid_of_pixels_find_its_posterior(fits: dict[str, Fitted]) -> None:
    found = drawn(fits, "hmc", True, samples=24, warmup=50, max_depth=4)
    assert found.samples.shape == (24, 12, 12)
    notes = found.notes
    assert {"acceptance", "divergences", "leapfrogs", "r_hat_median", "r_hat_worst"} <= notes.keys()
    assert 0.9 < notes["r_hat_median"] < 1.3
    assert notes["r_hat_worst"] >= notes["r_hat_median"]
    assert notes["effective_samples_median"] > 5
    assert 0.5 < notes["acceptance"] <= 1
    assert 1 <= notes["leapfrogs"] <= 15
    truth, mean = phantom_scan(**SCAN).truth, found.samples.mean(0)
    assert psnr(mean, truth) > psnr(reconstruct("fbp", seen(**SCAN)).image, truth) + 2
    assert psnr(mean, truth) > psnr(found.samples[0], truth)
    kept = seen(**SCAN).kept
    assert 0.7 < float(kept.misfit(mean)) < 1.8
    first, second = found.samples.split(12)  # the two chains are two
    assert not torch.equal(first, second)


def test_chains_start_with_the_mass_of_the_curvature(
    fits: dict[str, Fitted], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Tensor]] = []

    def watched(*arguments: object, inverse_mass: dict[str, Tensor], **more: object) -> Chains:
        given.append(inverse_mass)
        return sample(*arguments, inverse_mass=inverse_mass, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(image_doubt, "sample", watched)
    drawn(fits, "hmc", True, prior_precision=4.0)
    (variances,) = given[0].values()
    inside = seen(**SCAN).inside
    assert inside is not None
    assert (variances[~inside] == 0.25).all()  # which no ray tells of: the prior's
    assert ((variances[inside] > 0) & (variances[inside] <= 0.25)).all()


def test_the_mass_is_the_diagonal_of_the_precision(fits: dict[str, Fitted]) -> None:
    picture, rays = fits["pixels"].members.picture(), seen(**SCAN).kept
    config = doubt("hmc", prior_precision=4.0)
    (variances,) = image_doubt._variances(picture, rays.energy(), config, seed=3).values()
    image = picture().detach()
    columns = rays.projector.A(torch.eye(image.numel()).view(-1, *image.shape)) / rays.std
    exact = 4 + (image * (1 - image)).square() * columns.square().sum((1, 2)).view_as(image)
    ratio = (1 / (variances * exact))[exact > 4.001]
    assert len(ratio) > 50
    assert float(ratio.mean()) == pytest.approx(1, abs=0.06)
    assert 0.1 < float(ratio.std()) < 0.25  # 64 probes know it to 18 %


def test_few_draws_have_no_convergence(fits: dict[str, Fitted]) -> None:
    assert "r_hat_median" not in drawn(fits, "hmc", True).notes  # 3 of each chain
    assert "r_hat_median" in drawn(fits, "hmc", True, samples=8).notes


def test_chains_that_never_moved_tell_nothing_of_convergence() -> None:
    still = torch.full((2, 6, 4, 4), 0.3)
    assert image_doubt._convergence(still, torch.zeros(2, 6, 1)) == {}


def test_more_prior_precision_makes_fewer_doubts(fits: dict[str, Fitted]) -> None:
    for name in ("last_layer", "laplace"):
        loose, tight = (drawn(fits, name, prior_precision=tau, samples=20).samples for tau in (1.0, 1e4))
        assert tight.std(0).mean() < 0.8 * loose.std(0).mean()


def test_the_prior_is_that_of_the_parameter() -> None:
    fields = {
        name: Network(encoding=name, width=16, depth=1, levels=3, entries=2**8, waves=9)
        for name in ("hash", "fourier", "sine")
    }
    jobs = {"pixels": Job(pixels=True), **{name: Job(network=made) for name, made in fields.items()}}
    inputs = {
        "hash": {"encoding.tables": 1, "layers.0": 12, "layers.2": 16, "readout": 16},
        "fourier": {"layers.0": 18, "layers.2": 16, "readout": 16},
        "sine": {"encoding": 2, "layers.0": 16, "layers.2": 16, "readout": 16},
        "pixels": {"logits": 1},
    }
    for name, job in jobs.items():
        picture = job.build(seen(**SCAN)).picture()
        prior = image_doubt._prior(doubt("laplace", prior_precision=4.0), picture)
        for parameter, value in picture.named_parameters():
            count = next(n for part, n in inputs[name].items() if parameter.startswith(f"field.{part}"))
            assert prior(parameter, value) == pytest.approx((4 * count) ** -0.5)


@pytest.mark.parametrize(("name", "pixels"), [("hmc", True), ("variational", False)])
def test_a_signal_stops_long_work_in_a_sentence(
    fits: dict[str, Fitted], name: str, pixels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    likelihood, calls = image_doubt._log_likelihood, []

    def interrupted(fitted: Fitted, observed: Observed) -> Callable[[Call], Tensor]:
        plain = likelihood(fitted, observed)

        def called(picture: Call) -> Tensor:
            calls.append(picture)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(picture)

        return called

    monkeypatch.setattr(image_doubt, "_log_likelihood", interrupted)
    with pytest.raises(StoppedError, match="stopped by SIGTERM; the fitted image is saved"):
        drawn(fits, name, pixels, descents=10_000, warmup=10_000)
    assert len(calls) < 100


def test_fields_and_dropout_follow_the_method() -> None:
    found = {name: (doubt(name).fields, doubt(name).dropout) for name in UNCERTAINTIES}
    assert found == {
        **dict.fromkeys(UNCERTAINTIES, (1, False)),
        "ensemble": (3, False),
        "dropout": (1, True),
        "dropout_ensemble": (3, True),
    }


def test_bad_settings() -> None:
    for name in UNCERTAINTIES:
        doubt(name).check(pixels=False)
    for given, pixels, words in (
        (Doubt(uncertainty="magic"), False, "a field knows no uncertainty 'magic'; choose one of none, ens"),
        (
            Doubt(uncertainty="dropout"),
            True,
            "a grid of pixels knows no uncertainty 'dropout'; .* hmc, laplace",
        ),
        (Doubt(samples=1), False, "samples must be at least 2, got 1"),
        (Doubt(members=1), False, "members must be at least 2, got 1"),
        (Doubt(descents=0), False, "descents must be at least 1, got 0"),
        (Doubt(chains=0), False, "chains must be at least 1, got 0"),
        (Doubt(max_depth=0), False, "max_depth must be at least 1, got 0"),
        (Doubt(prior_precision=0.0), False, "precision of the prior must be above 0, got 0"),
        (Doubt(prior_precision=math.nan), False, "precision of the prior must be above 0, got nan"),
        (Doubt(uncertainty="hmc", warmup=-1), False, "warmup has to be a whole number of at least 0, got -1"),
        (
            Doubt(uncertainty="hmc", thinning=0),
            True,
            "thinning has to be a whole number of at least 1, got 0",
        ),
    ):
        with pytest.raises(InputError, match=words):
            given.check(pixels=pixels)
