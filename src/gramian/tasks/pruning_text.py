"""Pruning of a language model that `gramian train` made: masks on attention and MLPs, with a certificate.

The loss is the cross-entropy of the next token, clipped at p_min and scaled to [0, 1]; an example is a window
of text, and its loss the mean over the window's tokens. Clipping at 10⁻⁵ changes the cross-entropy little:
with 2048 tokens a uniform guess has p = 4.9 · 10⁻⁴. A mixture with the uniform distribution of the same range
(α = V p_min) would be a predictor of its own with a loss that is larger for every token it predicts well.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from gramian.bayes.bounds import BOUNDS, finite_union
from gramian.bayes.certificate import Certificate, certify, certify_fixed
from gramian.bayes.risk import SampledRisk, bounded, clipped_cross_entropy
from gramian.compress.density import Scope, check_density, keep_highest, start_from
from gramian.compress.learning import Learning, Moment, learn
from gramian.compress.masks import Units, keep
from gramian.compress.prior import Prior, divergence, law_of, set_law
from gramian.compress.scores import magnitude, random_scores, snip
from gramian.compress.thresholds import most_probable
from gramian.data.tokens import bits_per_byte, unigram_entropy
from gramian.errors import InputError, StoppedError
from gramian.files import write_json
from gramian.ranks import anywhere, is_main, on_main
from gramian.tasks.language import print_facts, run_folder
from gramian.tasks.pruning import Watch, structure_of
from gramian.tasks.pruning_decoder import (
    Decoder,
    Losses,
    add_decoder_masks,
    device_of,
    drawn_losses,
    layers_of,
    moved,
    window_losses,
    write_decoder,
)
from gramian.tasks.pruning_files import Exported
from gramian.tasks.pruning_result import OUTCOME, Guarantee, Pruned, Pruning, pruned_of
from gramian.tasks.pruning_windows import Amount, Planes, WindowSets, window_sets
from gramian.tasks.saved_model import open_saved, shape_of, trained_model
from gramian.tasks.self_bounded import Bounding, learn_posterior
from gramian.train.processes import open_run_once
from gramian.train.run import read_json
from gramian.train.signals import stop_requests

LOSS = "clipped next-token loss"
SCOPES: dict[str, Scope] = {"magnitude": "layer", "snip": "model", "random": "model"}
"""Scores to start from, and whether they compete over the model or within each layer, which of the two gave
the smaller training loss on runs of the standard library."""
SNIP_BATCHES = 16
"""Batches of training text that the sensitivity is taken on."""
ABOUT = (
    "the certificates are about the mean over windows: with the stated confidence they hold as they are for "
    "all {unread:,} unread windows that the bound set was drawn from at random; for other text they take the "
    "windows as independent draws from where it comes from, which windows of one document are not"
)
LEARNT = Learning(steps=300, rate=0.3)
"""How masks are learnt on training text, unless told otherwise."""
CERTIFIED = Bounding(learning=Learning(steps=20, rate=0.003, record_every=10), draws=2000)
"""How a certificate is made, unless told otherwise. A thousand windows pay for hundredths of a nat, so that
few steps are enough."""
P_MIN = 1e-5
"""Where the cross-entropy is clipped when nothing is certified."""
HELD_OUT_DRAWS = 4
"""Masks that each held-out window is judged under."""


@dataclass(frozen=True, kw_only=True)
class TextPruning:
    """Prune the attention and MLPs of a decoder."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of `gramian train` (or a block's folder of `gramian compare`)."""
    amount: Amount = field(default_factory=Amount)
    densities: tuple[float, ...] = (0.5, 0.2, 0.1)
    """Shares of the masked weights that are kept; one pruned network for each."""
    start: str = "magnitude"
    """Score of the mask to start from: magnitude, random or snip."""
    structure: str = "weights"
    """weights, heads (columns of the projection after attention), or a pattern such as 2:4."""
    high: float = 0.9
    """λ at the start where the mask keeps."""
    low: float = 0.1
    """λ at the start where it does not."""
    prior: str = "learnt"
    """learnt on training text, or start: λ as the starting mask has it."""
    learning: Learning = LEARNT
    """Learning on training text. Where moments cannot be matched, which is under heads and patterns, the mode
    is relaxed."""
    bounding: Bounding | None = CERTIFIED
    """Learning of the posterior's masks on the bound, and its certificate; nothing is certified without."""
    batch: int = 8
    """Windows of a step."""
    seed: int = 0
    """Seed of windows, masks and random scores."""
    runs: Path = Path("runs")
    """Folder of run folders."""
    name: str = "prune"
    """Name of the folder for the results."""

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return run_folder(self.runs, self.name)

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        if not self.densities or len(set(self.densities)) < len(self.densities):
            raise InputError(f"densities have to be different numbers, at least one, got {self.densities}")
        for density in self.densities:
            check_density(density)
        if self.start not in SCOPES:
            raise InputError(f"unknown start {self.start!r}; choose one of {', '.join(SCOPES)}")
        if self.structure == "neurons":
            raise InputError("a decoder is pruned by weights, heads or a pattern such as 2:4, not by neurons")
        if self.structure != "heads":
            structure_of(self.structure)
        if self.batch < 1:
            raise InputError(f"a batch needs at least one window, got {self.batch}")
        self.amount.check()
        if self.prior not in ("learnt", "start"):
            raise InputError(f"unknown prior {self.prior!r}; choose learnt or start")
        self.learning.check()
        if self.learning.mode == "hard_concrete":
            raise InputError("hard concrete masks are no Bernoulli masks; learn by moments or relaxed ones")
        if self.bounding is not None:
            self.bounding.check()
            if self.bounding.learning.learn != "masks":
                raise InputError(
                    "the posterior of a language model moves masks alone; learn its weights before"
                )

    @property
    def p_min(self) -> float:
        """Probability at which the cross-entropy is clipped."""
        return P_MIN if self.bounding is None else self.bounding.p_min

    @property
    def union(self) -> float:
        """Nats paid for certificates of several densities that hold together."""
        return finite_union(len(self.densities))


@dataclass(frozen=True, eq=False)
class Job:
    """A decoder, the windows that it is pruned by, and how."""

    config: TextPruning
    sets: WindowSets
    dense: Decoder
    watch: Watch = lambda what, done, total: None
    stopped: Callable[[], bool] = lambda: False

    @cached_property
    def dense_losses(self) -> Losses:
        """Held-out losses of the dense decoder."""
        return self._losses(self.dense, self.sets.held_out)

    def prune(self, density: float, write: Callable[[Decoder], Exported]) -> Pruned | None:
        """Prune a copy to one density; None when it was stopped.

        `write` is given the copy with its fixed mask, by the main process alone.
        """
        config, model = self.config, deepcopy(self.dense)
        generator = torch.Generator(device_of(model)).manual_seed(config.seed)
        add_decoder_masks(model, config.structure, trainable=config.learning.learn != "masks")
        start = keep_highest(model, self._scores(model, generator), density, SCOPES[config.start])
        keep(model, start)
        found = {"dense": self.dense_losses, "start": self._losses(model, self.sets.held_out)}
        start_from(model, start, config.high, config.low)
        history = self._learn(model, density, generator)
        certified = self._certified(model, density, generator)
        if anywhere(self.stopped()):
            return None
        found["random"] = self._drawn(
            model, self.sets.held_out.repeat(HELD_OUT_DRAWS, 1, 1), generator, "judging random masks"
        )
        fixed = most_probable(model, density)
        keep(model, fixed)
        found["fixed"] = self._losses(model, self.sets.held_out)
        layers = layers_of(model)
        weights = sum(layer.weights for layer in layers)
        return Pruned(
            density=density,
            kept=sum(layer.kept for layer in layers) / weights,
            expected=sum(layer.expected * layer.weights for layer in layers) / weights,
            baseline=found["start"].mean,
            random=found["random"].mean,
            fixed=found["fixed"].mean,
            layers=tuple(layers),
            history=tuple(history),
            guarantee=certified and replace(certified, held_out=found["random"].mean),
            export=self._export(write(model), found, certified) if is_main() else {},
        )

    def _losses(self, model: nn.Module, planes: Planes) -> Losses:
        return window_losses(model, planes, self.config.p_min, self.config.batch)

    def _drawn(self, model: nn.Module, planes: Planes, generator: torch.Generator, what: str) -> Losses:
        def advanced(done: int) -> None:
            self.watch(what, done, len(planes))

        return drawn_losses(model, planes, self.config.p_min, generator, advanced)

    def _scores(self, model: Decoder, generator: torch.Generator) -> Units:
        if self.config.start == "random":
            return random_scores(model, generator)
        if self.config.start == "magnitude":
            return magnitude(model)
        batches = (moved(self.sets.sample(step), model) for step in range(SNIP_BATCHES))
        return snip(model, batches, self._mean)

    def _mean(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean clipped loss of a batch."""
        return clipped_cross_entropy(logits, targets, self.config.p_min).mean()

    def _learn(self, model: Decoder, density: float, generator: torch.Generator) -> list[Moment]:
        """Learn on training text what becomes the prior."""
        if self.config.prior == "start":
            return []
        settings = self._possible(self.config.learning)
        free = settings.learn != "weights" and ":" not in self.config.structure
        return learn(
            model,
            lambda step: moved(self.sets.sample(step), model),
            self._mean,
            settings,
            density=density if free else None,
            generator=generator,
            advanced=lambda step: self.watch(f"density {density:g}: learning", step, settings.steps),
            stopped=self.stopped,
        )

    def _possible(self, settings: Learning) -> Learning:
        """Return the settings, relaxed where moments cannot be matched."""
        matched = settings.mode != "moments" or self.config.structure == "weights"
        return settings if matched else replace(settings, mode="relaxed")

    def _certified(self, model: Decoder, density: float, generator: torch.Generator) -> Guarantee | None:
        """Learn the posterior from the law that a model has now, and certify both."""
        settings = self.config.bounding
        if settings is None or anywhere(self.stopped()):
            return None
        learning = self._possible(settings.learning)
        settings = replace(settings, learning=learning, union=self.config.union)
        fixed = most_probable(model, density)
        batches = self.sets.batches(self.config.batch, self.config.seed)
        prior, _ = learn_posterior(
            model,
            lambda step: moved(batches(step), model),
            self.sets.split.n,
            settings,
            generator,
            lambda step: self.watch(f"density {density:g}: learning on the bound", step, learning.steps),
            self.stopped,
        )
        return None if anywhere(self.stopped()) else self.guarantee(model, prior, fixed, settings, generator)

    def guarantee(
        self, model: Decoder, prior: Prior, fixed: Units, settings: Bounding, generator: torch.Generator
    ) -> Guarantee:
        """Certify the law that a masked model has now, that of its prior, and the prior's fixed mask.

        Every draw is a window of the bound set drawn at random, with a mask of its own: the losses are
        independent, alike in law, and have the mean r̂, so that the bounds by draws hold for as many. Prior
        and posterior are scored with the same random numbers, so that they differ by their laws alone.
        """
        sets, posterior, stream = self.sets, law_of(model), generator.get_state()
        shared = {"delta": settings.delta, "union": settings.union, "loss": LOSS}

        def drawn() -> SampledRisk:
            generator.set_state(stream)
            chosen = torch.randint(
                len(sets.bound), (settings.draws,), generator=generator, device=generator.device
            )
            losses = self._drawn(model, sets.bound[chosen.cpu()], generator, "drawing masks")
            return SampledRisk(bounded(losses.clipped.double()), sets.split.n)

        def certified(risk: SampledRisk, kl: float, bound: str) -> Certificate:
            return certify(
                sets.split, sets.seen, risk, kl, bound=bound, sampling=settings.sampling,
                delta_sampling=settings.delta_sampling, **shared,
            )  # fmt: skip

        risk, distance = drawn(), float(divergence(model, prior).detach())
        own = {name: certified(risk, distance, name) for name in BOUNDS}
        set_law(model, prior)
        of_prior = certified(drawn() if distance else risk, 0.0, settings.bound)
        keep(model, fixed)
        losses = bounded(self._losses(model, sets.bound).clipped.double())
        set_law(model, posterior)
        return Guarantee(
            posterior=own[settings.bound],
            prior=of_prior,
            fixed=certify_fixed(sets.split, sets.seen, losses, **shared),
            bounds={name: each.value for name, each in own.items()},
            held_out=None,
        )

    def _export(
        self, exported: Exported, found: dict[str, Losses], certified: Guarantee | None
    ) -> dict[str, Any]:
        """Return what was written, and the held-out losses in the units of language models."""
        sets, targets = self.sets, self.sets.held_out[:, 1]
        target_bytes = sets.token_bytes[targets]
        nats = {name: losses.nats.double().mean().item() for name, losses in found.items()}
        vocabulary = len(sets.token_bytes)
        nats["token_frequencies"] = unigram_entropy(sets.training.tokens, targets.flatten(), vocabulary)
        nats["uniform_guess"] = math.log(vocabulary)
        bits = {name: bits_per_byte(value * targets.numel(), target_bytes) for name, value in nats.items()}
        differences = {}
        for name in ("dense", "start"):
            mean, error = found["fixed"].minus(found[name])
            differences |= {f"fixed_minus_{name}": mean, f"fixed_minus_{name}_standard_error": error}
        about = {}
        if certified is not None:
            nats["certified_of_clipped"] = -math.log(self.config.p_min) * certified.posterior.value
            about = {"what_is_certified": ABOUT.format(unread=sets.unread)}
        return {
            **asdict(exported),
            **about,
            "nats_a_token": nats,
            "bits_a_byte": bits,
            "clipped_loss": differences,
        }


def prune_text(
    config: TextPruning, console: Console, *, resume: bool = False, overwrite: bool = False
) -> Pruning:
    """Prune a decoder to every density, say what it costs in loss, and certify the random predictors.

    For each density: a mask by score on the weights of the run; λ started from it and learnt on the text that
    the run was trained on, which makes the prior; the posterior learnt from it on the bound, over bound
    windows; the most probable units kept. Each is judged on held-out windows; a folder a density holds the
    pruned network as Hugging Face's tools open it. `export` of an outcome has the losses in nats a token and
    bits a byte.

    Raises: InputError for settings, a run or text that cannot be used, such as an encoder and text that the
        run has read; StoppedError after a signal.
    Source: Hayou, He, Dziugaite 2021, arXiv 2110.11804 (abstract).
    """
    config.check()
    source = open_saved(config.run)
    if not shape_of(source).causal:
        raise InputError(f"the run {config.run} is an encoder; only a decoder is pruned here")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense = Decoder(trained_model(source)).eval().to(device)
    with console.status("reading and tokenising the text"):
        context = dense.transformer.config.context
        sets = window_sets(source, config.amount, context=context, batch=config.batch, seed=config.seed)
    print_facts(console, sets.facts)
    run = open_run_once(config.folder, config, resume=resume, overwrite=overwrite)
    outcomes: list[Pruned] = []
    with stop_requests() as requested, Progress(console=console, transient=True) as progress:
        bar = progress.add_task("reading", total=None)

        def watch(what: str, done: int, total: int) -> None:
            progress.update(bar, description=what, completed=done, total=total)

        job = Job(config, sets, dense, watch, lambda: requested() is not None)
        for density in config.densities:
            place = run.folder / f"density-{density:g}"
            if not anywhere(is_main() and (place / OUTCOME).exists()):
                found = job.prune(density, lambda model, at=place: write_decoder(at, model, dense, source))
                if found is None:
                    raise StoppedError(
                        f"stopped by {requested() or 'a signal'}; {len(outcomes)} of {len(config.densities)} "
                        f"densities are saved in {run.folder}, pass --resume to go on"
                    )
                on_main(lambda at=place, found=found: write_json(at / OUTCOME, asdict(found)))
            outcomes += [pruned_of(read_json(place / OUTCOME))] if is_main() else []
    shape = dense.transformer.config
    return Pruning(
        title=f"decoder of {shape.depth} {shape.block} blocks, width {shape.width}, on {sets.name}",
        examples={"prior": len(sets.seen), "bound": len(sets.bound), "held_out": len(sets.held_out)},
        dense=job.dense_losses.mean,
        outcomes=tuple(outcomes),
        loss=LOSS,
        deviation=job.dense_losses.clipped.double().std().item(),
    )
