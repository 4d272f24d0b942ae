"""What a pruning tells its reader in words and in a terminal."""

import math

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from gramian.bayes.bounds import BOUNDS, sampled_risk_bound
from gramian.bayes.certificate import Certificate, hundredths
from gramian.report import number
from gramian.tasks.pruning_result import Guarantee, Pruned, Pruning

FEW = 10_000
"""Bound sets of fewer examples are said to be small."""

ERRORS = 2.0
"""Standard errors up to which a difference can be chance."""

SCOPE = (
    "So nothing is certified of the fixed network that is exported, nor for data drawn otherwise than these "
    "examples."
)


def sentences(pruning: Pruning) -> list[str]:
    """Say what pruning costs and what is certified, from the numbers alone."""
    return [*verdict(pruning), *certified(pruning)]


def verdict(pruning: Pruning) -> list[str]:
    """Say how far the network can be pruned, what sparser ones cost, and what learning did."""
    if not pruning.outcomes:
        return ["Nothing was pruned."]
    if not held_out(pruning):
        return ["No example was held out, so nothing is known of what pruning costs."]
    chosen = headline(pruning)
    if difference(pruning, pruning.dense, chosen.fixed) > 0:
        said = [_costly(pruning, chosen)]
    else:
        said = [_free(pruning, chosen), *_costs(pruning, chosen)]
    return [*said, *_learnt(pruning, chosen), *_paired(pruning, chosen)]


def headline(pruning: Pruning) -> Pruned:
    """Return the sparsest outcome that shows no loss, or else the one of least error.

    Raises: ValueError when there is no outcome.
    """
    free = [each for each in pruning.outcomes if difference(pruning, pruning.dense, each.fixed) <= 0]
    if free:
        return min(free, key=lambda each: each.kept)
    return min(pruning.outcomes, key=lambda each: each.fixed if math.isfinite(each.fixed) else math.inf)


def held_out(pruning: Pruning) -> int:
    """Return how many examples errors are reported on."""
    return pruning.examples.get("held_out", 0)


def noise(first: float, second: float, n: int, deviation: float | None = None) -> float:
    """Return the difference of two errors, each on n examples, that can be chance.

        2 √(2 σ²/n),   σ² = p(1 − p) of errors of 0 and 1, p the mean of both; other losses have their own

    Two networks judged by the same examples differ by less.
    """
    p = min(max((first + second) / 2, 0.0), 1.0)
    return ERRORS * math.sqrt(2 * (p * (1 - p) if deviation is None else deviation**2) / n)


def difference(pruning: Pruning, first: float, second: float) -> int:
    """Return 1 where the second error is greater, −1 where it is smaller, 0 where that can be chance.

    An error that is not finite is greater than any other.
    """
    if not math.isfinite(second - first) or not held_out(pruning):
        return 1
    if abs(second - first) <= noise(first, second, held_out(pruning), pruning.deviation):
        return 0
    return 1 if second > first else -1


def _free(pruning: Pruning, chosen: Pruned) -> str:
    dense, n = pruning.dense, held_out(pruning)
    compared = (
        f"the {pruning.loss} of the fixed network is {share(chosen.fixed)}, that of the dense one "
        f"{share(dense)}"
    )
    if difference(pruning, dense, chosen.fixed) < 0:
        meaning = f"less by more than chance on {n:,} held-out examples"
    elif chosen.fixed == dense:
        meaning = f"the same on {n:,} held-out examples"
    else:
        meaning = (
            f"no difference that {n:,} held-out examples can show (up to "
            f"{points(noise(dense, chosen.fixed, n, pruning.deviation), sign=False)} points can be chance)"
        )
    return f"{share(1 - chosen.kept)} of the weights can go: with {_kept(chosen)}, {compared}: {meaning}."


def _costs(pruning: Pruning, chosen: Pruned) -> list[str]:
    """Say what sparser networks cost, and denser ones if they do."""
    costly = [each for each in pruning.outcomes if difference(pruning, pruning.dense, each.fixed) > 0]
    said = []
    for begin, some in (
        ("Sparser ones cost", [each for each in costly if each.kept < chosen.kept]),
        ("Look twice, for denser ones cost as well", [each for each in costly if each.kept > chosen.kept]),
    ):
        rows = sorted(some, key=lambda each: -each.kept)
        listed = ", ".join(f"{points(each.fixed - pruning.dense)} with {_kept(each)}" for each in rows)
        said += [f"{begin}, in points of the {pruning.loss}: {listed}."] if rows else []
    return said


def _costly(pruning: Pruning, chosen: Pruned) -> str:
    added, n = chosen.fixed - pruning.dense, held_out(pruning)
    if not math.isfinite(added):
        return f"What pruning costs is not known, as the {pruning.loss} is not finite."
    begin = "Every density tried costs, least" if len(pruning.outcomes) > 1 else "Pruning costs"
    chance = points(noise(pruning.dense, chosen.fixed, n, pruning.deviation), sign=False)
    return (
        f"{begin} with {_kept(chosen)}: the {pruning.loss} of the fixed network is {share(chosen.fixed)}, "
        f"that of the dense one {share(pruning.dense)}, {points(added)} points (up to {chance} can be chance "
        f"on {n:,} held-out examples)."
    )


def _learnt(pruning: Pruning, chosen: Pruned) -> list[str]:
    """Compare the fixed network with the mask it started from, where anything was learnt."""
    if not chosen.history and chosen.guarantee is None:
        return ["Nothing was learnt: this is the starting mask, weights untouched."]
    start = f"The starting mask with {_kept(chosen)}, weights untouched, has {share(chosen.baseline)}"
    way = difference(pruning, chosen.baseline, chosen.fixed)
    meaning = {
        -1: "learning lowered the error by more than chance",
        0: f"learning made no difference that {held_out(pruning):,} examples can show",
        1: "learning raised the error by more than chance",
    }
    return [f"{start}: {meaning[way]}."]


def _paired(pruning: Pruning, chosen: Pruned) -> list[str]:
    """Say the differences of losses on the same windows, which chance blurs less, where they are known."""
    found = chosen.export.get("clipped_loss", {})
    said = []
    for name, network in (("dense", "the dense network"), ("start", "the starting mask")):
        mean, error = (found.get(f"fixed_minus_{name}{end}", math.nan) for end in ("", "_standard_error"))
        if math.isfinite(mean) and math.isfinite(error):
            chance = points(ERRORS * error, sign=False)
            said.append(f"{points(mean)} points against {network} (up to {chance} can be chance)")
    if not said:
        return []
    return [
        f"Compared window by window, which chance blurs less, the {pruning.loss} of the fixed network "
        f"differs by {' and by '.join(said)}."
    ]


def certified(pruning: Pruning) -> list[str]:
    """Say what is certified of the random predictors, how tight it is, and what it is not about."""
    found = {each.density: each.guarantee for each in pruning.outcomes if each.guarantee is not None}
    if not found:
        n = held_out(pruning)
        return [f"Nothing was certified: errors are estimates from {n:,} held-out examples."] if n else []
    chosen = headline(pruning).density
    shown = chosen if chosen in found else min(found, key=lambda each: found[each].posterior.value)
    guarantee = found[shown]
    prefix = f"At density {density(shown)}: " if len(pruning.outcomes) > 1 else ""
    said = [prefix + guarantee.posterior.sentence]
    said += _reason(guarantee) if guarantee.posterior.vacuous else _compared(guarantee)
    said += _beside_held_out(pruning, guarantee)
    if len(found) > 1:
        said.append(_others(found, shown))
    if not all(each.posterior.vacuous for each in found.values()):
        said.append(SCOPE)
    return [*said, *_small(guarantee.posterior)]


def _reason(guarantee: Guarantee) -> list[str]:
    """Say why a certificate is vacuous, and what may help."""
    posterior, prior = guarantee.posterior, guarantee.prior
    cost = f"{number(posterior.kl_per_example, 3)} nats for each example of the bound set"
    if not prior.vacuous:
        return [
            f"The certificate is vacuous because learning moved too far from the prior, by {cost}; the prior "
            f"itself is certified at {at_most(prior.value)}."
        ]
    remedy = (
        "let part of the examples make the prior"
        if not posterior.prior_examples
        else "give more examples to the bound set, or learn longer on the bound"
    )
    return [
        f"The certificate is vacuous: the error of {share(posterior.empirical_risk)} on the bound set and a "
        f"KL of {cost} leave nothing, and the prior itself is not certified either. To get one, {remedy}."
    ]


def _compared(guarantee: Guarantee) -> list[str]:
    """Set the certificate beside what the same examples say of the prior alone."""
    value, prior, fixed = guarantee.posterior.value, guarantee.prior, guarantee.fixed
    own = "not at all" if prior.vacuous else f"at {at_most(prior.value)}"
    gain = (
        f"learning on the bound gained {points(prior.value - value, sign=False)} points"
        if value < prior.value
        else "learning on the bound gained nothing"
    )
    said = [f"The same examples certify the prior itself {own}, with KL 0: {gain}."]
    if fixed is not None:
        said.append(
            "A test-set bound certifies the fixed mask of the prior, which learnt nothing from these "
            f"examples, {'not at all' if fixed.vacuous else f'at {at_most(fixed.value)}'}."
        )
    return said


def _beside_held_out(pruning: Pruning, guarantee: Guarantee) -> list[str]:
    error, value, n = guarantee.held_out, guarantee.posterior.value, held_out(pruning)
    if error is None or not n or not math.isfinite(error):
        return []
    line = f"On {n:,} held-out examples the {pruning.loss} of the random predictor is {share(error)}"
    if error > value and error - value > ERRORS * math.sqrt(value * (1 - value) / n):
        return [
            f"{line}, more than certified and than chance allows: the held-out examples are not drawn like "
            "the bound set, or the prior saw the bound set, or this is the rare case that confidence leaves."
        ]
    if guarantee.posterior.vacuous or not error:
        return [f"{line}."]
    return [f"{line}; the certificate is {number(value / error, 3)} times as high."]


def _others(found: dict[float, Guarantee], shown: float) -> str:
    """Say the certificates of the other densities, and the confidence that all hold at once."""
    listed = ", ".join(
        f"{density(each)}: {'nothing' if (c := guarantee.posterior).vacuous else at_most(c.value)}"
        for each, guarantee in sorted(found.items(), reverse=True)
        if each != shown
    )
    return (
        f"Certified at the other densities: {listed}. Each of the {len(found)} certificates holds with its "
        f"own probability, all at once with at least {_all_at_once(found)} %."
    )


def _all_at_once(found: dict[float, Guarantee]) -> str:
    """Return 1 − Σ (δ + δ')e^(−union) in percent, rounded down; a union that was paid for counts."""
    each = (guarantee.posterior for guarantee in found.values())
    failing = sum((c.delta + c.delta_sampling) * math.exp(-c.union) for c in each)
    return f"{math.floor(max(0.0, 1 - failing) * 1e4 + 1e-6) / 100:g}"


def _small(certificate: Certificate) -> list[str]:
    """Say what few examples of a bound set allow at best."""
    if certificate.n >= FEW:
        return []
    return [
        f"The bound set is small: even a predictor without any error on its {certificate.n:,} examples, at "
        f"KL 0, would be certified at {at_most(least(certificate))} at best."
    ]


def least(certificate: Certificate) -> float:
    """Return the least that the same bound, examples, draws and confidence give, at no error and KL 0."""
    paid, risk = math.exp(-certificate.union), 0.0
    if certificate.draws is not None:
        risk = sampled_risk_bound(0.0, certificate.draws, certificate.delta_sampling * paid).item()
    return BOUNDS[certificate.bound](risk, 0.0, certificate.n, certificate.delta * paid).item()


def terminal_table(pruning: Pruning) -> TerminalTable:
    """Return one row a density below the dense network: errors and certificates, in percent."""
    table = TerminalTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.title = f"{pruning.loss}, %"
    for heading in ("density", "kept", "starting\nmask", "random\npredictor", "fixed\nmask"):
        table.add_column(heading, justify="right")
    guarantees = any(each.guarantee for each in pruning.outcomes)
    for heading in ("certi-\nficate", "prior's\nown", "test-set\nbound") if guarantees else ():
        table.add_column(heading, justify="right")
    empty = [""] * (3 if guarantees else 0)
    table.add_row("dense", "100", "", "", _cell(pruning.dense), *empty, style="dim")
    for each in pruning.outcomes:
        cells = [f"{100 * each.kept:.3g}", *map(_cell, (each.baseline, each.random, each.fixed))]
        if (guarantee := each.guarantee) is not None:
            cells += map(_bound, (guarantee.posterior, guarantee.prior, guarantee.fixed))
        elif guarantees:
            cells += empty
        table.add_row(density(each.density), *cells)
    table.caption = f"errors on {held_out(pruning):,} held-out examples" + (
        "; bounds of the random predictor, of the prior, and of the prior's fixed mask" if guarantees else ""
    )
    return table


def _cell(error: float) -> str:
    return f"{100 * error:.2f}" if math.isfinite(error) else "–"


def _bound(certificate: Certificate | None) -> str:
    if certificate is None:
        return "–"
    return "vacuous" if certificate.vacuous else at_most(certificate.value).removesuffix(" %")


def _kept(outcome: Pruned) -> str:
    return f"{share(outcome.kept)} kept"


def density(value: float) -> str:
    """Write a density as it was asked for."""
    return f"{100 * value:.6g} %"


def share(value: float) -> str:
    """Write a share to three significant figures."""
    return f"{100 * value:.3g} %" if math.isfinite(value) else "not finite"


def rounded_up(bound: float) -> float:
    """Return a bound in percent, rounded up to a hundredth; at most 100."""
    return min(hundredths(bound) / 100, 100.0)


def at_most(bound: float) -> str:
    """Write a bound, rounded up to a hundredth of a percent."""
    return f"{rounded_up(bound):g} %"


def points(value: float, sign: bool = True) -> str:
    """Write a difference of shares in percentage points."""
    if not math.isfinite(value):
        return "not finite"
    size = 100 * abs(value)
    text = f"{size:.1f}" if size >= 1 else f"{size:.2g}"
    return text if not sign or not value else f"{'+' if value > 0 else '−'}{text}"
