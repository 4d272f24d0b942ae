"""Fits of fields to scans: their quality, their best, stopping and going on, and what is kept unseen."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gramian.errors import InputError, StoppedError
from gramian.imaging.quality import psnr
from gramian.nn.field import Field, PixelGrid
from gramian.nn.field_encodings import FourierFeatures, HashGrid, Sine
from gramian.tasks import field_fits
from gramian.tasks.classical_choice import reconstruct
from gramian.tasks.field_fits import (
    BEST,
    Fit,
    Fitted,
    Job,
    Network,
    evaluations,
    finish,
    fitted,
    prepare,
)
from gramian.tasks.observed_views import Observed, observe
from gramian.tasks.scans import Source
from gramian.train.checkpoint import checkpoints
from gramian.train.run import Run
from tasks.small_scans import NETWORK, QUIET, fitted_in, phantom_scan, seen, settings

DROPPED = replace(NETWORK, dropout=0.3)
JOBS = {
    "field": Job(network=NETWORK, fit=settings()),
    "pixels": Job(pixels=True, fit=settings()),
    "ensemble with dropout": Job(members=2, dropout=True, network=DROPPED, fit=settings(patience=1.0)),
    "fourier in chunks": Job(network=Network(encoding="fourier", width=16, waves=16), fit=settings(chunk=50)),
}


def parameters(found: Fitted) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in found.members.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def shown(found: Fitted) -> Tensor:
    with torch.no_grad():
        return found.members().mean(0)


def written(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_small_field_beats_filtered_backprojection(tmp_path: Path) -> None:
    """With data in closed form, which no matrix of ours made."""
    scan = Source(size=24, views=20).load()
    observed = observe(scan, held_out=0.1)
    job = Job(network=Network(width=32), fit=settings(500, learning_rate=0.05, patience=1.0))
    found = fitted_in(tmp_path / "fit", job, observed)
    fbp = reconstruct("fbp", observed).image
    assert psnr(shown(found), scan.truth) > psnr(fbp, scan.truth) + 3
    assert ((shown(found) >= 0) & (shown(found) <= 1)).all()


@pytest.mark.parametrize("name", JOBS)
def test_stopped_and_resumed_it_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    job, state = JOBS[name], torch.get_rng_state()
    whole = fitted_in(tmp_path / "whole", job)
    trainer = prepare(job, seen(), tmp_path / "stopped")
    trainer.advance(17)  # and no more, as after a loss of power
    trainer.close()
    assert checkpoints(tmp_path / "stopped" / "checkpoints")[-1].step == 16
    resumed = fitted_in(tmp_path / "stopped", job)
    assert equal(parameters(resumed), parameters(whole))
    assert (resumed.steps, resumed.best, resumed.misfit) == (whole.steps, whole.best, whole.misfit)
    runs = (Run(tmp_path / name) for name in ("whole", "stopped"))
    rows = [[{**row, "seconds": 0} for row in evaluations(run)] for run in runs]
    assert rows[0] == rows[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_signal_stops_it_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = JOBS["field"]

    def interrupted(job: Job, observed: Observed, folder: Path, start: Any = None) -> Any:
        trainer = prepare(job, observed, folder, start)
        advance = trainer.advance

        def advanced(steps: int) -> None:
            advance(steps)
            if trainer.step == 10:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(trainer, "advance", advanced)
        return trainer

    monkeypatch.setattr(field_fits, "prepare", interrupted)
    with pytest.raises(StoppedError, match="hash at step 10"):
        fitted_in(tmp_path / "fit", job)
    monkeypatch.undo()
    so_far = fitted(job, seen(), prepare(job, seen(), tmp_path / "fit"))
    assert (so_far.steps, so_far.best) == (10, 10)
    assert equal(parameters(fitted_in(tmp_path / "fit", job)), parameters(fitted_in(tmp_path / "whole", job)))


def test_what_has_ended_is_read_and_not_fitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = {
        "whole": JOBS["ensemble with dropout"],
        "early": Job(network=NETWORK, fit=settings(40, learning_rate=0.3, patience=0.05)),
    }
    found = {name: fitted_in(tmp_path / name, job) for name, job in jobs.items()}
    assert 18 <= found["early"].steps < 40 == found["whole"].steps  # 16 are coarse, and 2 its patience
    before = written(tmp_path)

    def never(*_: object) -> None:
        raise AssertionError("it was fitted again")

    monkeypatch.setattr(field_fits.Trainer, "_take_step", never)
    for name, job in jobs.items():
        again = fitted_in(tmp_path / name, job)
        assert equal(parameters(again), parameters(found[name]))
        assert (again.steps, again.best, again.misfit) == (
            found[name].steps,
            found[name].best,
            found[name].misfit,
        )
    assert written(tmp_path) == before


def test_it_keeps_the_members_that_predict_unseen_views_best(tmp_path: Path) -> None:
    job = Job(members=2, network=NETWORK, fit=settings(40, learning_rate=0.2, patience=1.0))
    found, observed = fitted_in(tmp_path / "fit", job), seen()
    rows = evaluations(Run(tmp_path / "fit"))
    assert [row["step"] for row in rows] == list(range(0, 41, 2))
    best = min(rows, key=lambda row: row["unseen_misfit"])
    assert (found.best, found.misfit) == (best["step"], best["unseen_misfit"])
    assert found.best < 40 == found.steps  # control: the last is not the best
    assert observed.unseen is not None
    assert float(observed.unseen.misfit(shown(found))) == pytest.approx(found.misfit, rel=1e-5)
    assert float(observed.kept.misfit(shown(found))) == pytest.approx(best["kept_misfit"], rel=1e-5)
    assert not found.members.training


def test_without_unseen_views_it_keeps_the_last(tmp_path: Path) -> None:
    found = fitted_in(tmp_path / "fit", JOBS["field"], seen().whole)
    assert (found.steps, found.best, found.misfit) == (40, 40, None)
    trainer = prepare(JOBS["field"], seen().whole, tmp_path / "fit")
    assert equal(parameters(found), dict(trainer.model.state_dict()))


def test_unseen_views_are_unseen(tmp_path: Path) -> None:
    """Whatever they measure, step after step the parameters are the same to the last bit."""
    scan, job = phantom_scan(), Job(network=NETWORK, fit=settings(patience=1.0))
    views = seen().unseen_views

    def ended(name: str, changed: Callable[[Tensor], None]) -> tuple[dict[str, Tensor], Fitted]:
        sinogram = scan.sinogram.clone()
        changed(sinogram)
        observed = observe(replace(scan, sinogram=sinogram), held_out=0.2)
        trainer = prepare(job, observed, tmp_path / name)
        trainer.advance(40)
        return dict(trainer.model.state_dict()), fitted(job, observed, trainer)

    last, found = ended("as they are", lambda y: None)
    for name, value in (("loud", 50.0), ("silent", 0.0)):
        other, chosen = ended(name, lambda y, value=value: _set(y, views, value))
        assert equal(other, last)
        assert chosen.misfit != found.misfit  # control: they were measured by it
    kept, _ = ended("a kept one", lambda y: _set(y, seen().kept_views[:1], 5.0))
    assert not equal(kept, last)  # control


def _set(y: Tensor, views: tuple[int, ...], value: float) -> None:
    y[list(views)] = value


def test_the_finish_goes_on_from_the_best_with_all_views(tmp_path: Path) -> None:
    observed = seen()
    job = Job(network=NETWORK, fit=settings(60, finish=0.5))
    first = fitted_in(tmp_path / "fit", job)
    last = finish(first, observed, tmp_path / "finish", QUIET)
    begun = evaluations(Run(tmp_path / "finish"))[0]
    assert begun["kept_misfit"] == pytest.approx(float(observed.all.misfit(shown(first))), rel=1e-5)
    assert "unseen_misfit" not in begun
    assert (last.steps, last.best, last.misfit, last.job) == (30, 30, None, job)
    assert observed.all.misfit(shown(last)) <= observed.all.misfit(shown(first))
    energy = observed.all.energy(job.fit.weight)
    assert energy(shown(last)) <= energy(shown(first))
    assert equal(parameters(finish(first, observed, tmp_path / "finish", QUIET)), parameters(last))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "holds no parameters of this fit"),
        (lambda path: path.write_bytes(b"not at all"), "holds no parameters of this fit"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes((path.parents[1] / "other" / BEST).read_bytes()), "of this fit"),
    ],
)
def test_damaged_parameters_are_told_in_a_sentence(
    damage: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    short = Job(network=NETWORK, fit=settings(2))
    fitted_in(tmp_path / "fit", short)
    fitted_in(tmp_path / "other", replace(short, network=replace(NETWORK, width=9)))
    damage(tmp_path / "fit" / BEST)
    with pytest.raises(InputError, match=said) as told:
        fitted_in(tmp_path / "fit", short)
    assert str(tmp_path / "fit" / BEST) in str(told.value)
    assert "\n" not in str(told.value)


def test_another_fit_is_not_gone_on_with(tmp_path: Path) -> None:
    fitted_in(tmp_path / "fit", Job(network=NETWORK, fit=settings(2)))
    with pytest.raises(InputError, match="has fit = "):
        fitted_in(tmp_path / "fit", Job(network=NETWORK, fit=settings(3)))


def test_the_first_steps_see_coarse_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[int] = []
    forward = field_fits.Members.forward

    def watched(self: Any, block: int = 1) -> Tensor:
        if self.training:
            blocks.append(block)
        return forward(self, block)

    monkeypatch.setattr(field_fits.Members, "forward", watched)
    for coarse, observed, wanted in (
        (0.4, seen(), [2] * 4 + [1] * 6),
        (0.0, seen(), [1] * 10),
        (0.4, seen(side=15), [1] * 10),  # an odd side has no blocks of two
    ):
        job = Job(network=NETWORK, fit=settings(10, coarse=coarse, patience=1.0))
        fitted_in(tmp_path / f"{coarse} {observed.size}", job, observed)
        assert blocks == wanted
        blocks.clear()


def test_losses_are_energies_a_ray_with_the_variation_of_their_pixels(tmp_path: Path) -> None:
    job, observed = Job(members=2, network=NETWORK, fit=settings(20, variation=300.0)), seen()
    trainer = prepare(job, observed, tmp_path / "fit")
    for step, block in ((0, 2), (8, 1)):
        trainer.advance(step - trainer.step)
        with torch.no_grad():
            images = trainer.model(block)
        trainer.advance(1)
        rays = observed.coarse(block)
        losses = {row["step"]: row["loss"] for row in Run(tmp_path / "fit").record.read() if "loss" in row}
        wanted = rays.energy(300.0 * block)(images).mean() / rays.sinogram.numel()
        assert losses[step] == pytest.approx(float(wanted), rel=1e-4)
        other = rays.energy(300.0 * (3 - block))(images).mean() / rays.sinogram.numel()
        assert losses[step] != pytest.approx(float(other), rel=1e-3)  # control


def test_settings_of_memory_and_precision_change_little(tmp_path: Path) -> None:
    jobs = {
        name: Job(network=NETWORK, fit=settings(6, patience=1.0, **more))
        for name, more in (("whole", {}), ("chunks", {"chunk": 30}), ("bf16", {"precision": "bf16"}))
    }
    images = {name: shown(fitted_in(tmp_path / name, job)) for name, job in jobs.items()}
    torch.testing.assert_close(images["chunks"], images["whole"], rtol=0, atol=1e-4)
    assert 0 < float((images["bf16"] - images["whole"]).abs().max()) < 0.05


def test_seeds_make_members() -> None:
    job = Job(members=3, network=NETWORK, fit=settings())
    one, same, other = (
        replace(job, fit=settings(seed=seed)).build(seen()).state_dict() for seed in (0, 0, 1)
    )
    assert equal(one, same)
    for name in ("stacked.encoding/tables", "stacked.readout/weight"):
        rows = [*one[name], *other[name]]
        assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])
    waves = [Network(encoding="fourier").build(16, seed, dropout=False).encoding for seed in (0, 1)]
    assert torch.equal(waves[0].frequencies, waves[1].frequencies)  # members share what is fixed


def test_networks_are_what_their_settings_say() -> None:
    made = {name: Network(encoding=name).build(32, 0, dropout=True) for name in ("hash", "fourier", "sine")}
    kinds = {"hash": HashGrid, "fourier": FourierFeatures, "sine": Sine}
    for name, field in made.items():
        assert isinstance(field, Field)
        assert isinstance(field.encoding, kinds[name])
        rates = [part.p for part in field.modules() if isinstance(part, torch.nn.Dropout)]
        assert rates == [0.05] * (1 if name == "hash" else 3)
    assert made["hash"].encoding.resolutions[-1] == 32
    assert sum(isinstance(part, Sine) for part in made["sine"].modules()) == 4
    plain = Network().build(32, 0, dropout=False)
    assert all(part.p == 0 for part in plain.modules() if isinstance(part, torch.nn.Dropout))
    assert isinstance(Job(pixels=True).field(16, 0), PixelGrid)
    assert Job(pixels=True).kind == "pixels"


def test_bad_settings() -> None:
    for call, words in (
        (Network(encoding="pixels").check, "unknown encoding 'pixels'; choose hash, fourier or sine"),
        (Network(encoding="waves").check, "unknown encoding 'waves'"),
        (Network(width=0).check, "width from 1"),
        (Network(dropout=1.0).check, "rate of dropout"),
        (Network(entries=1000).check, "power of 2, got 1000"),
        (Network(levels=0).check, "number of levels"),
        (Network(encoding="fourier", waves=0).check, "number of Fourier features"),
        (Network(encoding="sine", omega=-1.0).check, "positive and finite"),
        (Network(output="tanh").check, "unknown output 'tanh'"),
        (Fit(coarse=1.0).check, "got 1, 0.5 and 0.5"),
        (Fit(patience=0.0).check, "got 0.4, 0 and 0.5"),
        (Fit(finish=-1.0).check, "got 0.4, 0.5 and -1"),
        (Fit(variation=-1.0).check, "total variation has to be finite and at least 0, not -1"),
        (Fit(variation=float("inf")).check, "total variation .* not inf"),
        (Fit(steps=0).check, "steps must be at least 1, got 0"),
        (Fit(learning_rate=0.0).check, "learning"),
        (Fit(precision="fp8").check, "unknown precision 'fp8'"),
        (Fit(device="tpu").check, "unknown device 'tpu'"),
        (Fit(seed=-1).check, "seed cannot be negative"),
        (lambda: Job(network=NETWORK, fit=Fit(chunk=0)).build(seen()), "at least one pixel, got 0"),
    ):
        with pytest.raises(InputError, match=words):
            call()
