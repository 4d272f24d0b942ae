"""A report as `gramian compare` might write it, from made-up numbers of four blocks."""

import math

from gramian.report import (
    Column,
    Page,
    Plot,
    Section,
    Table,
    curves,
    dumbbells,
    final_profile,
    gains,
    palette,
    profiles_over_time,
)

BLOCKS = ("pre_norm", "sas", "sas_p", "outlier_protected")
STEPS = list(range(0, 2001, 40))
LAYERS = 8
SPEED = {"pre_norm": 1.0, "sas": 1.08, "sas_p": 1.14, "outlier_protected": 0.97}
FLOOR = {"pre_norm": 3.412, "sas": 3.447, "sas_p": 3.431, "outlier_protected": 3.398}
KURTOSIS = {"pre_norm": 210.0, "sas": 61.0, "sas_p": 48.0, "outlier_protected": 6.5}
GAP = {"pre_norm": 0.118, "sas": 0.041, "sas_p": 0.036, "outlier_protected": 0.0061}


def loss(name: str, step: int) -> float:
    wobble = 0.03 * math.sin(step / 37 + len(name)) * math.exp(-step / 900)
    return FLOOR[name] + (9.2 - FLOOR[name]) * math.exp(-step / (210 + 9 * len(name))) + wobble


def kurtosis(name: str, step: int, layer: int) -> float:
    return 3 + (KURTOSIS[name] - 3) * (1 - math.exp(-step / 600)) * ((layer + 1) / LAYERS) ** 1.6


def page(names: tuple[str, ...] = BLOCKS, title: str = "Four transformer blocks on WikiText-2") -> Page:
    """The sample with its blocks under the names given, which may be hostile."""
    called = dict(zip(BLOCKS, names, strict=True))
    colours = palette(names)
    losses = {called[name]: (STEPS, [loss(name, step) for step in STEPS]) for name in BLOCKS}
    times = {
        called[name]: ([step * 0.081 / SPEED[name] for step in STEPS[5:]], losses[called[name]][1][5:])
        for name in BLOCKS
    }
    tables = {
        called[name]: (STEPS, [[kurtosis(name, step, layer) for layer in range(LAYERS)] for step in STEPS])
        for name in BLOCKS
    }
    correlation = {
        called[name]: [min(0.97, 0.08 + 0.11 * layer * (0.4 + 0.2 * index)) for layer in range(LAYERS)]
        for index, name in enumerate(BLOCKS)
    }
    shrinking = [math.exp(-step / 800) for step in STEPS]
    curves_of_gains = {
        called["pre_norm"]: {},
        called["sas"]: {
            "identity": (STEPS, [0.55 + 0.45 * s for s in shrinking]),
            "attention": (STEPS, [0.42 - 0.42 * s for s in shrinking]),
            "centring": (STEPS, [0.25 + 0.75 * s for s in shrinking]),
        },
        called["sas_p"]: {
            "identity": (STEPS, [0.61 + 0.39 * s for s in shrinking]),
            "attention": (STEPS, [0.37 - 0.37 * s for s in shrinking]),
            "centring": (STEPS, [0.31 + 0.69 * s for s in shrinking]),
            "MLP": (STEPS, [0.12 + 0.05 * s for s in shrinking]),
        },
        called["outlier_protected"]: {
            "attention": (STEPS, [0.31 - 0.2 * s for s in shrinking]),
            "MLP": (STEPS, [0.28 - 0.18 * s for s in shrinking]),
        },
    }
    quantised = {called[name]: (FLOOR[name], FLOOR[name] + GAP[name]) for name in BLOCKS}
    rows = [
        (
            called[name],
            FLOOR[name],
            math.exp(FLOOR[name]),
            FLOOR[name] + GAP[name],
            GAP[name],
            KURTOSIS[name],
            round(24_310 * SPEED[name]),
            3_221_504 - 61_440 * index,
        )
        for index, name in enumerate(BLOCKS)
    ]
    summary = Table(
        columns=(
            Column("block"),
            Column("validation loss", "nats / token", "low"),
            Column("perplexity", "", "low"),
            Column("loss in int8", "nats / token", "low"),
            Column("int8 gap", "nats / token", "low", ratio=True),
            Column("neuron kurtosis, last layer", "", "low", ratio=True),
            Column("throughput", "tokens / s", "high", ratio=True),
            Column("parameters", "", None, ratio=True),
        ),
        rows=rows,
        notes=("Small figures are ratios to the first row. One seed each: gaps below 0.01 nats are noise.",),
        colours=colours,
    )
    return Page(
        title=title,
        lead=(
            "outlier_protected ends with the lowest loss, 3.398 nats per token, and loses least in int8. "
            "sas_p is fastest. pre_norm grows the strongest outlier neurons and pays for them with a gap "
            "of 0.118 nats."
        ),
        facts={
            "data": "wikitext-2, 2.4 M tokens, BPE of 4,096",
            "model": "8 layers, width 192",
            "training": "2,000 steps of 16 × 128 tokens",
            "optimiser": "AdamW, peak rate 0.001, cosine",
            "seed": "0",
            "device": "CPU, 2 threads, float32",
            "library": "gramian 0.1.0, torch 2.13.0",
            "command": "gramian compare --data wiki.txt",
        },
        sections=(
            Section(
                "The result in one table", "What each block reached, and what int8 took away.", (summary,)
            ),
            Section(
                "Learning",
                "The same data in the same order, so curves may be compared step by step; the second figure "
                "charges each block for the time that its steps take.",
                (
                    Plot(
                        curves(
                            losses,
                            x="step",
                            y="validation loss (nats / token)",
                            colours=colours,
                            references={"unigram entropy": 6.72},
                        ),
                        "Validation loss after each step; lower is better. The dotted line is the entropy of "
                        "single tokens: a model above it has learnt nothing of their order.",
                        "Loss falls from 9.2 to about 3.4 nats for all four blocks.",
                        "Loss by step",
                    ),
                    Plot(
                        curves(
                            times, x="time (s)", y="validation loss (nats / token)", colours=colours, log=True
                        ),
                        "The same losses by wall-clock time from step 200 on, vertical axis logarithmic. At "
                        "equal height, further left is faster.",
                        "sas_p reaches each loss first.",
                        "Loss by time",
                    ),
                ),
            ),
            Section(
                "Outlier neurons",
                "Kurtosis of the neurons' root mean squares within a layer: 1 when all are equally active, "
                "the width when one neuron does everything. High values are bad for low precision.",
                (
                    Plot(
                        profiles_over_time(tables, reading="kurtosis", colours=colours, log=True),
                        "Neuron kurtosis by layer (upwards) and step (rightwards); one logarithmic scale for "
                        "all panels. Dark is good, yellow is bad.",
                        "Kurtosis grows in the last layers of pre_norm and hardly in outlier_protected.",
                        "Where and when outliers grow",
                    ),
                    Plot(
                        final_profile(
                            {name: rows[-1] for name, (_, rows) in tables.items()},
                            y="neuron kurtosis",
                            colours=colours,
                            references={"Gaussian": 3.0},
                            log=True,
                        ),
                        "Neuron kurtosis after the last step, layer 1 nearest the input, vertical axis "
                        "logarithmic. Lower is better; normally distributed neurons have 3.",
                        "pre_norm ends at 210, outlier_protected at 6.5.",
                        "At the end of training",
                    ),
                ),
            ),
            Section(
                "Tokens and gains",
                "",
                (
                    Plot(
                        final_profile(
                            correlation,
                            y="mean cosine between tokens",
                            colours=colours,
                            references={"collapse": 1.0},
                        ),
                        "Mean cosine between different tokens of a sequence by layer. At 1 all tokens look "
                        "alike (rank collapse), which is bad; the level at layer 1 comes from the embedding.",
                        "Cosine rises with depth.",
                        "Token correlation",
                    ),
                    Plot(
                        gains(curves_of_gains, y="gain", colours=colours),
                        "Learnt gains of each block, means over layers, without unit. A gain near 0 means "
                        "that its part is not used; pre_norm has none to learn.",
                        "The gain of attention grows in every block that has one.",
                        "Gains while training",
                    ),
                ),
            ),
            Section(
                "Eight bits",
                "Weights by channel and activations by token, both int8, with scales from 32 batches.",
                (
                    Plot(
                        dumbbells(
                            quantised,
                            value="validation loss (nats / token)",
                            before="float32",
                            after="int8 (W8A8)",
                            colours=colours,
                        ),
                        "Ring: validation loss in float32. Dot: the same model in int8. The further apart, "
                        "the more was lost; the gap and its share of the loss stand on the right.",
                        "The gap is 0.118 nats for pre_norm and 0.0061 for outlier_protected.",
                        "Loss before and after quantisation",
                    ),
                ),
            ),
        ),
    )
