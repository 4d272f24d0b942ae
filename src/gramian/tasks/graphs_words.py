"""What a comparison of networks on graphs says in words: numbers as they are read, a table, sentences."""

from collections.abc import Sequence
from math import isnan, nan
from statistics import mean, stdev, variance

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from gramian.report import number
from gramian.tasks.graph_models import GRED
from gramian.tasks.graph_scores import LOWER
from gramian.tasks.graph_training import Outcome
from gramian.tasks.graphs import Comparison, GraphsConfig, spread

CONSTANT = "constant"
"""What predicts the same for all graphs: the median, the commonest class, the rates of the labels."""

NAMES = {"mae": "MAE", "accuracy": "accuracy", "average_precision": "average precision"}

MEANINGS = {
    "mae": "MAE is the mean absolute error, in the unit of the targets",
    "accuracy": "Accuracy is the share of graphs whose class is right",
    "accuracy of nodes": "Accuracy is the share of nodes whose class is right, the mean over classes",
    "average_precision": "Average precision is the mean over labels of the area under precision by recall",
}
"""What each metric is, in a sentence."""

LEVEL = 0.95
"""Probability of an interval of a difference."""


def scaled(metric: str, value: float) -> float:
    """Return a metric as it is shown: accuracies as percentages, the others as they are."""
    return 100 * value if metric == "accuracy" else value


def written(metric: str, values: Sequence[float], digits: int = 3) -> str:
    """Write a metric over seeds: the mean, and the standard deviation where there are several."""
    middle, deviation = spread([scaled(metric, value) for value in values])
    error = "" if isnan(deviation) else f" ± {number(deviation, 2)}"
    return f"{number(middle, digits)}{error}{' %' * (metric == 'accuracy')}"


def tests(outcomes: Sequence[Outcome]) -> list[float]:
    """Return the test metrics of some outcomes."""
    return [each.test for each in outcomes]


def by_validation(found: Comparison) -> list[str]:
    """Return the networks that were trained, the best by the mean of their validation metrics first."""
    means = {
        name: mean(each.validation for each in outcomes)
        for name, outcomes in found.outcomes.items()
        if outcomes
    }
    return sorted(means, key=lambda name: means[name], reverse=found.metric not in LOWER)


def gain(found: Comparison, name: str, over: str) -> tuple[float, float]:
    """Return how much better a network is than another, or the constant, on the test part, and the error.

        mean of the differences ± t · s/√n,  of the same seeds; Welch's interval where seeds differ

    The error is half the width of the interval that holds the difference with probability `LEVEL` for seeds
    drawn at random; nan for one seed. The test part is the same, and its own chance is not counted.
    """
    from scipy.special import stdtrit  # a second to import, so only where it is used

    sign = -1 if found.metric in LOWER else 1
    own = {each.seed: sign * each.test for each in found.outcomes[name]}
    if over == CONSTANT:
        other = dict.fromkeys(own, sign * found.constant)
    else:
        other = {each.seed: sign * each.test for each in found.outcomes[over]}
    difference = mean(own.values()) - mean(other.values())
    if min(len(own), len(other)) < 2:
        return difference, nan
    if own.keys() == other.keys():
        error, freedom = stdev(own[seed] - other[seed] for seed in own) / len(own) ** 0.5, len(own) - 1.0
    else:
        shares = [variance(each.values()) / len(each) for each in (own, other)]
        error = sum(shares) ** 0.5
        below = sum(s**2 / (len(each) - 1) for s, each in zip(shares, (own, other), strict=True))
        freedom = sum(shares) ** 2 / below if below else 1.0
    return difference, float(error * stdtrit(freedom, 0.5 + LEVEL / 2))


def terminal_table(found: Comparison, config: GraphsConfig) -> TerminalTable:
    """Return what the networks came to, one a row, and the best constant prediction below."""
    name = NAMES[found.metric]
    table = TerminalTable(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("")
    headings = ("parameters", "rate", f"test {name}", "validation", "epoch", "training")
    for heading in headings:
        table.add_column(heading, justify="right")
    for model, outcomes in found.outcomes.items():
        if not outcomes:
            table.add_row(model, "", "", "diverged")
            continue
        table.add_row(
            model,
            f"{outcomes[0].parameters:,}",
            f"{outcomes[0].learning_rate:g}",
            written(found.metric, tests(outcomes)),
            written(found.metric, [each.validation for each in outcomes]),
            f"{mean(each.epoch for each in outcomes):.0f}",
            f"{mean(each.seconds for each in outcomes):,.0f} s",
        )
    table.add_row(CONSTANT, "", "", written(found.metric, [found.constant]))
    return table


def sentences(found: Comparison, config: GraphsConfig) -> list[str]:
    """Say which network is best, by how much, how sure that is, and what to try."""
    best, *others = by_validation(found)
    return [
        _best(found, best, len(others)),
        *[_second(found, best, second) for second in others[:1]],
        *_diverged(found, config),
        *_doubts(found, config, best),
    ]


def reading(found: Comparison) -> list[str]:
    """Say what was read, how it was used, and what the metric is."""
    split, metric = found.split, "accuracy of nodes" if found.graphs.task == "node" else found.metric
    look = f"; filters look {found.hops} hops far" if GRED in found.outcomes else ""
    return [
        f"{found.graphs.text()}.",
        f"Learnt from {len(split.train):,} graphs, chosen by {len(split.validation):,}, judged by "
        f"{len(split.test):,}{look}. {MEANINGS[metric]}.",
    ]


def _best(found: Comparison, best: str, others: int) -> str:
    """Compare the network that does best on the validation part with the constant, on the test part."""
    value = written(found.metric, tests(found.outcomes[best]))
    among = f"Of {others + 1} networks {best} is best on the validation part; on" if others else f"{best}: on"
    said = f"{among} the test part its {NAMES[found.metric]} is {value}, that of the best constant prediction"
    said += f" {written(found.metric, [found.constant])}"
    difference, error = gain(found, best, CONSTANT)
    if difference <= 0:
        return f"{said}: nothing was learnt that helps there, with these epochs and rates."
    if difference <= error:
        return f"{said}: no difference that {len(found.outcomes[best])} seeds can show."
    return f"{said}."


def _second(found: Comparison, best: str, second: str) -> str:
    """Say what lies between the best two networks on the test part, and whether seeds can show it."""
    value, metric = written(found.metric, tests(found.outcomes[second])), NAMES[found.metric]
    difference, error = gain(found, best, second)
    unit = " points" if found.metric == "accuracy" else ""
    size = number(scaled(found.metric, abs(difference)), 3)
    said = f"{second} is second there, with {metric} {value} on the test part: {best} is {size}{unit} "
    said += "better" if difference > 0 else "worse"
    if difference == 0:
        said = f"{second} is second there, with {metric} {value} on the test part, the same"
    if isnan(error):
        return f"{said}."
    paired = {e.seed for e in found.outcomes[best]} == {e.seed for e in found.outcomes[second]}
    seeds = min(len(found.outcomes[each]) for each in (best, second))
    interval = (
        f"± {number(scaled(found.metric, error), 2)}{unit}, {100 * LEVEL:g} % interval over {seeds} seeds"
        f"{', paired' * paired}"
    )
    if abs(difference) <= error:
        return f"{said}, no difference that these seeds can show ({interval})."
    return f"{said} ({interval})."


def _diverged(found: Comparison, config: GraphsConfig) -> list[str]:
    """Name the networks, rates and seeds whose loss became infinite."""
    said = []
    for model, outcomes in found.outcomes.items():
        if not outcomes:
            said.append(f"{model} diverged with every learning rate and is left out.")
            continue
        there = {each.learning_rate for each in found.tried if each.model == model}
        rates = [f"{rate:g}" for rate in config.schedule.learning_rates if rate not in there]
        seeds = [str(seed) for seed in config.seeds if seed not in {each.seed for each in outcomes}]
        lost = [f"{what} {' and '.join(each)}" for what, each in (("rate", rates), ("seed", seeds)) if each]
        if lost:
            said.append(f"{model} diverged with {', '.join(lost)}, which the numbers leave out.")
    return said


def _doubts(found: Comparison, config: GraphsConfig, best: str) -> list[str]:
    """Say what the numbers do not show, and what would."""
    said = []
    if len(config.seeds) == 1:
        said.append(
            "One seed: how much of a difference is chance is not known; --seeds 0 1 2 shows it, as a new run "
            "(--name)."
        )
    if all(each.epoch == each.epochs for each in found.outcomes[best]) and config.schedule.patience is None:
        last = found.outcomes[best][0].epochs
        said.append(f"{best} was best after the last of {last} epochs; more --epochs may bring more.")
    if not config.compare:
        rivals = "gine gps trains standard networks" if best == GRED else "gred trains a filter by distance"
        said.append(f"Nothing was trained beside it: --compare {rivals} of its size.")
    return said


def ranked(found: Comparison) -> dict[str, dict[str, float]]:
    """Return the gain of the best network by the validation part over the others and the constant."""
    best, *others = by_validation(found)
    pairs = {over: gain(found, best, over) for over in (*others, CONSTANT)}
    return {over: {"gain": value, "error": error} for over, (value, error) in pairs.items()}
