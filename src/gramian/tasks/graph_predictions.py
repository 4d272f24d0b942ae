"""What one network makes of the test part: its predictions as text, its hits by class, how far it looks."""

import csv
import io
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gramian.data.graphs import NODE_TASKS
from gramian.data.objectives import IGNORED
from gramian.nn.graph import DistanceFilter
from gramian.tasks.graph_data import Sampler
from gramian.tasks.graph_models import GRED, build_network
from gramian.tasks.graph_scores import Scale, score_of
from gramian.tasks.graph_training import Outcome, best_network, predictions
from gramian.tasks.graphs import Comparison, GraphsConfig, trial_folder
from gramian.train.run import Run


@dataclass(frozen=True, eq=False)
class Judged:
    """What the network asked for makes of the test part, with the weights of its first seed."""

    outcome: Outcome
    rows: Tensor
    """Number of the graph, and where nodes are predicted of the node in it: (rows, 1 or 2)."""
    outputs: Tensor
    y: Tensor
    scale: Scale | None
    reach: tuple[list[Tensor], list[Tensor]] | None
    """|λ|^k by distance and unit for each layer, trained and at the start, where the network filters."""

    def predicted(self, task: str) -> Tensor:
        """Return numbers in the unit of the targets, probabilities of labels, or of classes."""
        if self.scale is not None:
            return self.scale.mean + self.scale.deviation * self.outputs
        return self.outputs.sigmoid() if task == "multilabel" else self.outputs.softmax(1)


def judge(found: Comparison, config: GraphsConfig) -> Judged | None:
    """Predict the test part with the network asked for; None where it diverged."""
    if not found.outcomes[config.model]:
        return None
    outcome = found.outcomes[config.model][0]
    architecture = replace(config.architecture, hops=found.hops)
    sampler = Sampler(found.graphs, found.split, architecture)
    trial = config.trial(outcome.model, outcome.learning_rate, outcome.seed)
    folder = trial_folder(found.folder, outcome.model, outcome.learning_rate, outcome.seed)
    model = best_network(trial, sampler, Run(folder))
    outputs, y = predictions(model, sampler, found.split.test, shells=outcome.model == GRED)
    looks = None
    if outcome.model == GRED and found.hops:
        start = build_network(GRED, found.graphs, config.architecture, outcome.seed)
        looks = _weights(model, found.hops), _weights(start, found.hops)
    return Judged(outcome, _rows(found), outputs, y, sampler.scale, looks)


def _weights(model: nn.Module, hops: int) -> list[Tensor]:
    """Return |λ|^k of every layer: (hops + 1, units)."""
    layers = [each for each in model.modules() if isinstance(each, DistanceFilter)]
    k = torch.arange(hops + 1)[:, None]
    return [each.recurrence.magnitudes().detach() ** k for each in layers]


def _rows(found: Comparison) -> Tensor:
    test = found.split.test
    if found.graphs.task not in NODE_TASKS:
        return test[:, None]
    sizes = found.graphs.ptr.diff()[test]
    nodes = torch.cat([torch.arange(size) for size in sizes.tolist()])
    return torch.stack((test.repeat_interleave(sizes), nodes), 1)


def predictions_csv(found: Comparison, judged: Judged) -> str:
    """Return the test part as text: graph, node, then predicted and true, a pair for each target or label.

    Of classes there is the one predicted, as the file numbers it, its probability and the true one, empty
    where a node has none. Labels are predicted as probabilities.
    """
    graphs, predicted = found.graphs, judged.predicted(found.graphs.task)
    names = ["graph", "node"][: judged.rows.shape[1]]
    if graphs.classifies:
        best = predicted.max(1)
        label = [graphs.classes[place] for place in best.indices.tolist()]
        true = ["" if place == IGNORED else graphs.classes[place] for place in judged.y.tolist()]
        names += ["predicted", "probability", "true"]
        columns = [label, _short(best.values), true]
    else:
        ends = [f"_{place}" * (graphs.outputs > 1) for place in range(graphs.outputs)]
        names += [f"{kind}{end}" for end in ends for kind in ("predicted", "true")]
        pairs = zip(predicted.unbind(1), judged.y.unbind(1), strict=True)
        columns = [_short(each) for pair in pairs for each in pair]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(zip(*judged.rows.T.tolist(), *columns, strict=True))
    return stream.getvalue()


def _short(values: Tensor) -> list[str]:
    return [f"{value:.7g}" for value in values.tolist()]


def by_target(found: Comparison, judged: Judged) -> list[list[Any]]:
    """Return name, number of rows and metric for each class, label or target of the test part."""
    graphs, y = found.graphs, judged.y
    if graphs.classifies:
        right = judged.outputs.argmax(1) == y
        hits = [right[y == place] for place in range(graphs.outputs)]
        return [
            [str(name), len(each), 100 * each.double().mean().item() if len(each) else None]
            for name, each in zip(graphs.classes, hits, strict=True)
        ]
    rows = []
    for place in range(graphs.outputs):
        part = slice(place, place + 1)
        scale = judged.scale and Scale(judged.scale.mean[part], judged.scale.deviation[part])
        value = score_of(graphs.task, judged.outputs[:, part], y[:, part], scale)
        count = len(y) if scale else int(y[:, place].sum())
        rows.append([str(place), count, value])
    return rows
