"""Shaped transformers: an SDE for the covariance of tokens, finite networks beside it, and their training."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from math import nan
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gramian.core.sde import Paths
from gramian.errors import InputError
from gramian.files import write_json
from gramian.nn.shaped_networks import ShapedNetworks, softmax_attention, uncentred_attention
from gramian.nn.transformer import Shape
from gramian.systems.claims import Finding, paired
from gramian.tasks.covariance import NORM, PAIR, readings
from gramian.tasks.language import Job, Text, run_folder
from gramian.tasks.samples import Distance, Summary, kolmogorov_smirnov, summary
from gramian.tasks.trials import Outcomes, Trial, run_trials
from gramian.theory.covariance_sde import ShapedBlock, simulate
from gramian.train.loop import Training
from gramian.train.run import read_json

CLAIM = """As depth and width grow at a fixed ratio, the covariance of tokens in a transformer with shaped
attention and a shaped ReLU follows a stochastic differential equation: finite networks have its
distribution, the tokens do not collapse as under softmax attention, γ and τ₀ decide whether it is stable,
and the shaped block trains (Noci et al. 2023, arXiv 2306.17759)."""

BASE, SHAPED = "pre_norm", "shaped"
UNMIXED = "shaped_unmixed"
SIDES = {"decoder": "causal", "encoder": "masked"}

APART = 0.03
"""Kolmogorov–Smirnov distance beyond chance's up to which a network follows the SDE."""

SPOILED = 0.2
"""Kolmogorov–Smirnov distance from which a control has left it."""

AS_GOOD = 0.05
"""Nats above the base up to which a block keeps up with it."""

UNSTABLE, STABLE = 0.05, 0.01
"""Shares of paths that blow up, from which on a setting is unstable and below which it is stable."""


@dataclass(frozen=True, kw_only=True)
class Laws:
    """Which distributions are compared."""

    gamma: float = 0.5
    tau0: float = 1.0
    correlation: float = 0.3
    """Of all pairs of tokens at the start."""
    ratios: tuple[float, ...] = (0.1, 0.5, 1.0)
    """Depth over width."""
    tokens: tuple[int, ...] = (2, 4, 8)
    widths: tuple[int, ...] = (128, 256, 512)
    networks: int = 2000
    paths: int = 20_000
    strong: float = -4.0
    """The c₋ of a ReLU whose shape is far from its limit at these widths, so that the approach is seen."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is simulated and trained to see whether the claim holds."""

    job: Job = field(default_factory=Job)
    """Text, shape and training; the seed is that of each repetition."""
    laws: Laws = field(default_factory=Laws)
    trials: tuple[Trial, ...] = ()
    """What is trained; the first trial is what the others are set against."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Repetitions; at least two give a standard error."""
    name: str = "shaped_transformer"
    """Name of the run folder."""


def trials(rates: Mapping[str, float], gain: float) -> tuple[Trial, ...]:
    """Return the standard block, the shaped one without a final norm, and one whose attention is shut off."""
    shape: dict[str, Any] = {"branch_gain": gain, "final_norm": False}
    rate = {"learning_rate": rates[SHAPED]}
    return (
        Trial(BASE, BASE, {"learning_rate": rates[BASE]}),
        Trial(SHAPED, SHAPED, rate, shape),
        Trial(UNMIXED, SHAPED, rate, {**shape, "attention_temperature": 1e9}),
    )


def quick() -> Config:
    """Return settings of about an hour on two cores: 27 laws, then two sides of three trainings a seed."""
    training = Training(steps=600, evaluate_every=100, observe_every=200, checkpoint_every=200, keep=1)
    job = Job(shape=Shape(depth=12), training=training, evaluation_batches=16)
    return Config(job=job, trials=trials({BASE: 4e-3, SHAPED: 4e-3}, gain=0.05), seeds=(0, 1))


def paper(which: str = "encoder") -> Config:
    """Return a setting of a usual size: 12 layers, width 768, for WikiText-103 or another large text.

    Set `job.data.text` to the corpus. The published experiments' settings could not be read: batch, steps
    and learning rates are ours.

    Raises: InputError for another name.
    """
    if which != "encoder":
        raise InputError(f"unknown setting {which!r}; choose quick or encoder")
    training = Training(
        steps=50_000,
        batch=256,
        accumulation=8,
        precision="bf16",
        evaluate_every=1000,
        observe_every=1000,
        checkpoint_every=1000,
    )
    job = Job(
        data=Text(vocabulary=32_000, max_bytes=20_000_000_000),
        shape=Shape(width=768, heads=12, depth=12, context=128, init_std=0.02),
        training=training,
    )
    made = trials({BASE: 1e-3, SHAPED: 1e-3}, gain=0.05)
    return Config(job=job, trials=made, seeds=(0, 1), name="shaped_transformer_paper")


@dataclass(frozen=True)
class Law:
    """A distribution of finite networks beside that of the SDE, at the end; both without what blew up."""

    kind: str
    """shaped, strong, or a control: uncentred, hot (logits that keep their size), softmax."""
    ratio: float
    tokens: int
    width: int
    summaries: dict[str, tuple[Summary, Summary]]
    """By reading: networks, SDE."""
    distances: dict[str, Distance]
    """Kolmogorov–Smirnov distances by reading."""
    blown_up: tuple[float, float]
    """Shares that blew up: networks, SDE."""


@dataclass(frozen=True)
class Result:
    """What was measured."""

    laws: list[Law]
    stability: dict[str, float]
    """Share of SDE paths that blow up, by setting."""
    outcomes: dict[str, Outcomes]
    """decoder or encoder -> trial -> what was found, by seed."""

    def losses(self, side: str, trial: str) -> list[float]:
        """Return the validation losses of a trial by seed; NaN where training diverged."""
        return [nan if found is None else found.validation_loss for found in self.outcomes[side][trial]]


CONTROLS: Mapping[str, Mapping[str, Any]] = {
    "uncentred": {"attention": uncentred_attention},
    "hot": {"power": 0.0},
    "softmax": {"attention": softmax_attention},
}
STABILITY = {
    "gamma 0.3, tau0 1": (0.3, 1.0),
    "gamma 0.8, tau0 1": (0.8, 1.0),
    "gamma 0.3, tau0 0.3": (0.3, 0.3),
}


def run(config: Config, console: Console | None = None) -> Result:
    """Compare laws, then train; what a stopped study has done is not done again.

    Raises: InputError for settings that cannot be used; StoppedError after a signal.
    """
    console = console or Console()
    if len(config.seeds) < 2 or len(set(config.seeds)) < len(config.seeds):
        raise InputError(f"a standard error needs two different seeds or more, got {list(config.seeds)}")
    config.job.check()
    folder = run_folder(config.job.runs, config.name)
    laws, stability = compare_laws(config.laws, folder, console), measure_stability(config.laws)
    with console.status("reading and tokenising the text"):
        corpus = config.job.data.load()
    outcomes = {}
    for side, objective in SIDES.items():
        console.print(side)
        job = replace(config.job, objective=objective)
        outcomes[side] = run_trials(job, config.trials, config.seeds, corpus, folder / side, console)
    result = Result(laws, stability, outcomes)
    write_json(folder / "result.json", {"laws": [asdict(law) for law in laws], "stability": stability})
    return result


def compare_laws(laws: Laws, folder: Path, console: Console) -> list[Law]:
    """Simulate all pairs of distributions; each is kept in a file of its own and read again."""
    found = []
    cells = [("shaped", *cell) for cell in product(laws.ratios, laws.tokens, laws.widths)]
    middle = laws.ratios[len(laws.ratios) // 2], laws.tokens[len(laws.tokens) // 2]
    cells += [("strong", middle[0], laws.tokens[0], width) for width in laws.widths]
    cells += [(kind, *middle, laws.widths[0]) for kind in CONTROLS]
    theory: dict[tuple[str, float, int], Paths] = {}
    for number, (kind, ratio, tokens, width) in enumerate(cells, 1):
        path = folder / "laws" / f"{kind}-{ratio:g}-{tokens}-{width}.json"
        settings = asdict(laws)
        known = read_json(path) if path.exists() else None
        if known is None or known["settings"] != _listed(settings):
            what = f"{kind}, depth/width {ratio:g}, {tokens} tokens, width {width}"
            console.print(f"law {number} of {len(cells)}: {what}", highlight=False)
            limit = (kind if kind == "strong" else "shaped", ratio, tokens)
            if limit not in theory:
                theory = {limit: _limit(laws, *limit)}
            law = _compared(kind, ratio, width, theory[limit], _networks(laws, kind, ratio, tokens, width))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"settings": _listed(settings), "law": asdict(law)})
            known = read_json(path)
        found.append(_law(known["law"]))
    return found


def _listed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def _law(plain: Mapping[str, Any]) -> Law:
    summaries = {
        name: (Summary(**networks), Summary(**limit))
        for name, (networks, limit) in plain["summaries"].items()
    }
    distances = {name: Distance(**each) for name, each in plain["distances"].items()}
    rest = {"summaries": summaries, "distances": distances, "blown_up": tuple(plain["blown_up"])}
    return Law(**{**plain, **rest})


def start(laws: Laws, tokens: int) -> torch.Tensor:
    """Return the covariance that all paths and networks start from: unit norms, equal correlations."""
    return torch.full((tokens, tokens), laws.correlation, dtype=torch.float64).fill_diagonal_(1.0)


def _limit(laws: Laws, kind: str, ratio: float, tokens: int) -> Paths:
    negative = laws.strong if kind == "strong" else -1.0
    block = ShapedBlock(laws.gamma, laws.tau0, negative=negative)
    steps = max(16, round(128 * ratio))
    return simulate(block, start(laws, tokens), ratio, paths=laws.paths, steps=steps, seed=tokens)


def _networks(laws: Laws, kind: str, ratio: float, tokens: int, width: int) -> Paths:
    negative = laws.strong if kind == "strong" else -1.0
    networks = ShapedNetworks(width, laws.gamma, laws.tau0, negative=negative, **CONTROLS.get(kind, {}))
    depth = round(ratio * width)
    return networks.simulate(start(laws, tokens), depth, networks=laws.networks, seed=1000 + width)


def _compared(kind: str, ratio: float, width: int, limit: Paths, networks: Paths) -> Law:
    values = [readings(each.states[-1][each.lasting]) for each in (networks, limit)]
    names = [name for name in (PAIR, NORM) if min(len(each[name]) for each in values) > 1]
    return Law(
        kind=kind,
        ratio=ratio,
        tokens=limit.states.shape[-1],
        width=width,
        summaries={name: (summary(values[0][name]), summary(values[1][name])) for name in names},
        distances={
            name: kolmogorov_smirnov(values[0][name].tolist(), values[1][name].tolist()) for name in names
        },
        blown_up=(1 - _share(networks), 1 - _share(limit)),
    )


def _share(paths: Paths) -> float:
    return paths.lasting.double().mean().item()


def measure_stability(laws: Laws) -> dict[str, float]:
    """Return the share of paths that blow up by depth = width, for settings inside and outside the region."""
    found = {}
    for name, (gamma, tau0) in STABILITY.items():
        paths = simulate(
            ShapedBlock(gamma, tau0), start(laws, 4), 1.0, paths=laws.networks, steps=128, seed=0
        )
        found[name] = 1 - _share(paths)
    return found


def check(result: Result) -> list[Finding]:
    """Return what the claim stands or falls with; every control must leave the SDE's distribution."""
    findings = []
    sound = [law for law in result.laws if law.kind == "shaped"]
    for name in (PAIR, NORM):
        excess = max(law.distances[name].value - law.distances[name].noise for law in sound)
        what = f"largest Kolmogorov-Smirnov distance beyond chance's of {len(sound)} laws, {name}"
        findings.append(Finding(what, excess, 0.0, APART, below=True))
    strong = [law.distances[PAIR].value for law in result.laws if law.kind == "strong"]
    if len(strong) > 1:
        what = "distance at the largest width over that at the smallest, strongly shaped ReLU"
        findings.append(Finding(what, strong[-1] / strong[0], 0.0, 1.0, below=True))
    for law in result.laws:
        if law.kind in CONTROLS:
            value = max((each.value for each in law.distances.values()), default=1.0)
            what = f"largest Kolmogorov-Smirnov distance of the control {law.kind}"
            findings.append(Finding(what, value, 0.0, SPOILED, below=False))
    calm, *wild = result.stability.items()
    findings.append(Finding(f"share of paths that blow up, {calm[0]}", calm[1], 0.0, STABLE, below=True))
    findings += [
        Finding(f"share of paths that blow up, {name}", share, 0.0, UNSTABLE, below=False)
        for name, share in wild
    ]
    for side in result.outcomes:
        loss = {name: result.losses(side, name) for name in (BASE, SHAPED, UNMIXED)}
        what = f"validation loss of the shaped {side} above {BASE} (nats/token)"
        findings.append(Finding(what, *paired(loss[SHAPED], loss[BASE]), AS_GOOD, below=True))
        what = f"validation loss of the {side} without mixing above the shaped one (nats/token)"
        findings.append(Finding(what, *paired(loss[UNMIXED], loss[SHAPED]), 0.0, below=False))
    return findings


def start_table(result: Result) -> list[Mapping[str, Any]]:
    """Return one row a law: networks beside the SDE, correlation and log norm."""
    return [_row(law) for law in result.laws]


def _row(law: Law) -> dict[str, Any]:
    row: dict[str, Any] = {
        "kind": law.kind,
        "depth/width": f"{law.ratio:g}",
        "tokens": str(law.tokens),
        "width": str(law.width),
    }
    for name, short in ((PAIR, "correlation"), (NORM, "log norm")):
        distance = law.distances.get(name)
        if distance is None:
            row |= {f"{short}: networks": "—", f"{short}: SDE": "—", f"{short}: KS (chance)": "—"}
            continue
        networks, limit = (_written(each) for each in law.summaries[name])
        row |= {f"{short}: networks": networks, f"{short}: SDE": limit}
        row |= {f"{short}: KS (chance)": f"{distance.value:.3f} ({distance.noise:.3f})"}
    row["blown up"] = f"{law.blown_up[0]:.2%}, {law.blown_up[1]:.2%}"
    return row


def _written(each: Summary) -> str:
    low, median, high = each.quantiles[0], each.quantiles[2], each.quantiles[-1]
    return f"{each.mean:.3f} ± {each.deviation:.3f}; {low:.2f}, {median:.2f}, {high:.2f}"


def table(result: Result) -> list[Mapping[str, Any]]:
    """Return one row a side and trial: loss, and how far above the standard block's."""
    rows = []
    for side, outcomes in result.outcomes.items():
        for trial in outcomes:
            losses = result.losses(side, trial)
            above, error = paired(losses, result.losses(side, BASE))
            rows.append(
                {
                    "side": side,
                    "trial": trial,
                    "loss (nats/token)": f"{sum(losses) / len(losses):.3f}",
                    "above pre_norm": f"{above:+.3f} ± {error:.3f}",
                }
            )
    return rows
