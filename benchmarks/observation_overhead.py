"""What it costs to watch a model while it trains: readings by streaming hooks against the direct way.

The direct way keeps the hidden states of all layers and forms the (B·T)² Gram matrix of each. Every way takes
the same training step; rounds are interleaved in one process.
"""

import resource
import statistics

import torch
from side_by_side import ratio, timed, write_results
from torch import Tensor, nn

from gramian.core.gram import gram
from gramian.core.readings import correlation_mean, correlation_rms, effective_rank, neuron_kurtosis
from gramian.nn.transformer import Transformer, TransformerConfig, build
from gramian.observe.probe import Probe
from gramian.tasks.language import language_loss
from gramian.train.optimisers import adamw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "demo (6 layers, width 128, 4 × 128 tokens)": (
        TransformerConfig(vocabulary=2048, context=128, width=128, depth=6, heads=4),
        4,
    ),
    "small (6 layers, width 256, 16 × 128 tokens)": (
        TransformerConfig(vocabulary=4096, context=128, width=256, depth=6, heads=4),
        16,
    ),
}
EVERY = 50


class Step:
    """One training step of a model of its own."""

    def __init__(self, config: TransformerConfig, batch: int) -> None:
        self.model: Transformer = build(config, 0).to(DEVICE)
        self.optimiser = adamw(self.model, 1e-3, 0.1, (0.9, 0.999), 1e-8)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocabulary, (batch, config.context + 1), generator=generator)
        self.batch = torch.stack((tokens[:, :-1], tokens[:, 1:]), 1).to(DEVICE)

    def __call__(self) -> None:
        language_loss(self.model, self.batch).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()


class Probed(Step):
    """The step inside a sample of every stream and attention."""

    def __init__(self, config: TransformerConfig, batch: int, attentions: str | tuple[str, ...]) -> None:
        super().__init__(config, batch)
        self.probe = Probe(self.model, "blocks.*", attentions=attentions, every=1)

    def __call__(self) -> None:
        with self.probe.sample(0) as sample:
            super().__call__()
        assert sample is not None
        sample.readings()


class Direct(Step):
    """The step with all hidden states kept, then the Gram matrices over neurons and over inputs."""

    def __call__(self) -> None:
        kept: list[Tensor] = []
        handles = [
            layer.register_forward_hook(lambda _, args, out: kept.append(out.detach()))
            for layer in self.model.blocks
        ]
        first = self.model.blocks[0].register_forward_pre_hook(lambda _, xs: kept.append(xs[0].detach()))
        super().__call__()
        for handle in (*handles, first):
            handle.remove()
        for stream in kept:
            rows = stream.flatten(0, 1).double()
            inputs = gram(rows)
            neuron_kurtosis(gram(rows.mT)).item()
            magnitude = rows.abs()
            (magnitude.amax(-1) / magnitude.median(-1).values).mean().item()
            for reading in (correlation_mean, correlation_rms, effective_rank):
                reading(inputs).item()


def main() -> None:
    lines = [
        "Median training step over interleaved rounds; overhead is the median ratio to the bare step of the",
        "same round, less one. 'Every 50 steps' is the measured overhead of a sampled step divided by 50:",
        "between samples no hook exists.",
        "",
        "| model | way | step (ms) | overhead, every step | every 50 steps |",
        "|---|---|---|---|---|",
    ]
    for name, (config, batch) in SHAPES.items():
        ways = {
            "bare": Step(config, batch),
            "streaming, streams": Probed(config, batch, ()),
            "streaming, streams and attention": Probed(config, batch, "**.mixing"),
            "direct, (B·T)² Gram": Direct(config, batch),
        }
        seconds = timed(ways, rounds=25)
        for way in ways:
            overhead = ratio(seconds, way, "bare") - 1
            shown = "" if way == "bare" else f"{overhead:.1%} | {overhead / EVERY:.2%}"
            median = statistics.median(seconds[way]) * 1e3
            lines.append(f"| {name} | {way} | {median:.1f} | {shown or ' | '} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines += ["", f"Peak memory of the process, the direct way included: {peak:,.0f} MiB."]
    write_results("observation_overhead", lines, {})


if __name__ == "__main__":
    main()
