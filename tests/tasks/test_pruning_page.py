"""What a pruning tells: sentences that follow from numbers, a table, a page with every term, plain JSON."""

import io
import json
import math
from dataclasses import fields, replace

import pytest
import torch
from rich.console import Console

from gramian.bayes.bounds import BOUNDS, chernoff_bound, kl_bound, sampled_risk_bound
from gramian.bayes.certificate import Certificate, certify, certify_fixed
from gramian.bayes.risk import SampledRisk
from gramian.bayes.split import random_split
from gramian.compress.learning import Moment
from gramian.report import Plot, render
from gramian.report import Table as PageTable
from gramian.tasks.pruning_page import HEADINGS, numbers, report_page, write_report
from gramian.tasks.pruning_result import Guarantee, Layer, Pruned, Pruning
from gramian.tasks.pruning_words import (
    FEW,
    SCOPE,
    at_most,
    headline,
    least,
    noise,
    points,
    rounded_up,
    sentences,
    terminal_table,
    verdict,
)

NAN = math.nan
HELD_OUT = 1000
DELTA, DELTA_SAMPLING, DRAWS = 0.025, 0.01, 500


def guarantee(
    risk: float = 0.03,
    kl: float = 20.0,
    prior: float = 0.1,
    fixed: float | None = 0.05,
    *,
    count: int = 4000,
    held_out: float | None = None,
    union: float = 0.0,
) -> Guarantee:
    """Return certificates of empirical risks: of the posterior, of the prior, of the prior's fixed mask."""
    split = random_split(count, 0.0 if fixed is None else 0.5, seed=3)

    def drawn(mean: float, distance: float) -> Certificate:
        risks = SampledRisk(torch.full((DRAWS,), mean, dtype=torch.float64), split.n)
        return certify(
            split, split.prior, risks, distance, delta=DELTA, delta_sampling=DELTA_SAMPLING, union=union
        )

    posterior = drawn(risk, kl)
    losses = torch.zeros(split.n)
    losses[: round((fixed or 0) * split.n)] = 1
    above = posterior.empirical_bound
    return Guarantee(
        posterior,
        drawn(prior, 0.0),
        None if fixed is None else certify_fixed(split, split.prior, losses, bound="binomial"),
        {name: min(1.0, bound(above, kl, split.n, DELTA).item()) for name, bound in BOUNDS.items()},
        held_out,
    )


def history(steps: int = 3) -> tuple[Moment, ...]:
    """Return records whose histograms move from the middle to the ends."""
    rows = [(0,) * 9 + (10 - step, 0) + (step,) + (0,) * 8 for step in range(steps)]
    return tuple(
        Moment(100 * step, 2.0 - step / 4, 2.1 - step / 4, 0.5 - step / 10, {"0": row, "2": row})
        for step, row in enumerate(rows)
    )


def pruned(density: float = 0.1, fixed: float = 0.025, **settings) -> Pruned:
    kept = round(10_000 * density)
    defaults = {
        "kept": density,
        "expected": density,
        "baseline": 0.3,
        "random": 0.03,
        "layers": (Layer("0", 9000, kept - 100, density), Layer("2", 1000, 100, 0.1)),
        "history": history(),
        "guarantee": None,
        "export": {},
    }
    return Pruned(density=density, fixed=fixed, **{**defaults, **settings})


def pruning(*outcomes: Pruned, dense: float = 0.02, held_out: int = HELD_OUT) -> Pruning:
    examples = {"prior": 2000, "bound": 2000, "held_out": held_out}
    return Pruning("mlp 300-100 on digits", examples, dense, outcomes or (pruned(),))


def said(*outcomes: Pruned, **settings) -> str:
    return " ".join(sentences(pruning(*outcomes, **settings)))


def test_noise_is_two_standard_errors_of_a_difference_of_shares() -> None:
    assert noise(0.02, 0.03, 1000) == pytest.approx(2 * math.sqrt(2 * 0.025 * 0.975 / 1000))
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand((2, 20_000, 400), generator=generator) < 0.1
    gaps = errors.double().mean(2).diff(dim=0)
    assert (gaps.abs() > noise(0.1, 0.1, 400)).double().mean().item() == pytest.approx(0.0455, abs=0.012)
    assert noise(0.0, 0.0, 10) == 0


def test_losses_that_are_no_errors_scatter_as_they_do() -> None:
    losses = 0.4 + 0.05 * torch.randn((2, 5_000, 400), generator=torch.Generator().manual_seed(1))
    gaps = losses.double().mean(2).diff(dim=0).abs()
    assert (gaps > noise(0.4, 0.4, 400, 0.05)).double().mean().item() == pytest.approx(0.0455, abs=0.012)
    assert not (gaps > noise(0.4, 0.4, 400)).any()  # taken as errors nothing would ever be seen


def test_a_difference_within_chance_is_no_difference() -> None:
    text = said()
    assert (
        "90 % of the weights can go: with 10 % kept, the 0-1 error of the fixed network is 2.5 %, that of "
        "the dense one 2 %: no difference that 1,000 held-out examples can show (up to 1.3 points can be "
        "chance)"
    ) in text
    assert "cost" not in text


def test_more_examples_show_the_same_difference() -> None:
    text = said(held_out=100_000)
    assert "can go" not in text
    assert (
        "Pruning costs with 10 % kept: the 0-1 error of the fixed network is 2.5 %, that of the dense one "
        "2 %, +0.5 points (up to 0.13 can be chance on 100,000 held-out examples)"
    ) in text


def test_equal_and_smaller_errors_are_said_so() -> None:
    assert "that of the dense one 2 %: the same on 1,000 held-out examples" in said(pruned(fixed=0.02))
    assert "less by more than chance on 1,000 held-out examples" in said(pruned(fixed=0.02), dense=0.2)
    assert "no difference that" in said(pruned(fixed=0.018))
    assert "the same on" in said(pruned(fixed=0.0), dense=0.0)


def test_the_sparsest_network_without_loss_is_named_and_what_sparser_ones_cost() -> None:
    outcomes = pruned(0.5, 0.021), pruned(0.1, 0.025), pruned(0.02, 0.2), pruned(0.05, 0.06)
    assert headline(pruning(*outcomes)) is outcomes[1]
    text = said(*outcomes)
    assert "90 % of the weights can go" in text
    assert "Sparser ones cost, in points of the 0-1 error: +4.0 with 5 % kept, +18.0 with 2 % kept." in text
    assert "Look twice" not in text
    odd = said(pruned(0.5, 0.09), pruned(0.1, 0.025))
    assert "Look twice, for denser ones cost as well, in points of the 0-1 error: +7.0 with 50 % kept." in odd


def test_where_every_density_costs_the_least_is_named() -> None:
    outcomes = pruned(0.1, 0.3), pruned(0.5, 0.1), pruned(0.05, 0.7)
    assert headline(pruning(*outcomes)) is outcomes[1]
    text = said(*outcomes)
    assert "Every density tried costs, least with 50 % kept" in text
    assert "10 %, that of the dense one 2 %, +8.0 points" in text
    assert "can go" not in text


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        (0.3, "learning lowered the error by more than chance"),
        (0.026, "learning made no difference that 1,000 examples can show"),
        (0.001, "learning raised the error by more than chance"),
    ],
)
def test_what_learning_did(baseline, words) -> None:
    text = said(pruned(baseline=baseline))
    assert (
        f"The starting mask with 10 % kept, weights untouched, has {100 * baseline:.3g} %: {words}." in text
    )


def test_where_nothing_was_learnt_held_out_or_pruned() -> None:
    assert "Nothing was learnt: this is the starting mask" in said(pruned(history=()))
    assert "Nothing was learnt" not in said(pruned(history=(), guarantee=guarantee()))
    alone = sentences(replace(pruning(), examples={"prior": 100}))
    assert alone == ["No example was held out, so nothing is known of what pruning costs."]
    assert verdict(replace(pruning(), outcomes=())) == ["Nothing was pruned."]


def test_errors_that_are_not_finite_are_no_success() -> None:
    assert "What pruning costs is not known, as the 0-1 error is not finite." in said(pruned(fixed=NAN))
    assert "is not known" in said(dense=NAN)
    text = said(pruned(0.5, 0.02), pruned(0.1, NAN))
    assert "50 % of the weights can go" in text
    assert "not finite with 10 % kept" in text


def test_without_a_certificate_that_is_said() -> None:
    text = said()
    assert text.endswith("Nothing was certified: errors are estimates from 1,000 held-out examples.")
    assert SCOPE not in text


def test_a_certificate_is_quoted_with_what_the_same_examples_say_of_the_prior() -> None:
    made = guarantee(held_out=0.03)
    text = said(pruned(guarantee=made))
    assert made.posterior.sentence in text
    assert not made.posterior.vacuous
    assert made.fixed is not None
    gain = 100 * (made.prior.value - made.posterior.value)
    assert (
        f"certify the prior itself at {at_most(made.prior.value)}, with KL 0: learning on the bound gained "
        f"{gain:.1f} points."
    ) in text
    assert f"learnt nothing from these examples, at {at_most(made.fixed.value)}." in text
    ratio = made.posterior.value / 0.03
    assert f"of the random predictor is 3 %; the certificate is {ratio:.2f} times as high." in text
    assert SCOPE in text
    assert "At density" not in text


def test_a_certificate_that_learning_did_not_lower_is_said_so() -> None:
    text = said(pruned(guarantee=guarantee(prior=0.03, kl=200.0)))
    assert "with KL 0: learning on the bound gained nothing." in text


def test_a_held_out_error_beyond_the_certificate_is_noticed() -> None:
    assert "more than certified and than chance allows" in said(pruned(guarantee=guarantee(held_out=0.4)))
    value = guarantee().posterior.value
    near = said(pruned(guarantee=guarantee(held_out=value + 0.005)))  # control: within chance of 1000
    assert "more than certified" not in near


def test_vacuous_certificates_say_why() -> None:
    far = guarantee(kl=1e5)
    text = said(pruned(guarantee=far))
    assert far.posterior.vacuous
    assert "Nothing is certified: the bound" in text
    assert (
        "vacuous because learning moved too far from the prior, by 50.0 nats for each example of the bound "
        f"set; the prior itself is certified at {at_most(far.prior.value)}."
    ) in text
    assert SCOPE not in text
    assert "times as high" not in text
    both = said(pruned(guarantee=guarantee(kl=1e5, prior=1.0)))
    assert "the prior itself is not certified either" in both
    assert "give more examples to the bound set, or learn longer on the bound" in both
    free = said(pruned(guarantee=guarantee(kl=1e5, prior=1.0, fixed=None)))
    assert "let part of the examples make the prior" in free
    assert "test-set bound" not in free
    nearly = guarantee(kl=2e4).posterior
    assert 0.9999 < nearly.value < 1
    almost = said(pruned(guarantee=guarantee(kl=2e4)))
    assert "Nothing is certified: the bound" in almost
    assert "The certificate is vacuous" in almost


def test_losses_on_the_same_windows_are_compared_in_pairs() -> None:
    known = {
        "fixed_minus_dense": 0.00312,
        "fixed_minus_dense_standard_error": 0.0004,
        "fixed_minus_start": -0.02,
        "fixed_minus_start_standard_error": 0.001,
    }
    text = said(pruned(export={"clipped_loss": known}))
    assert (
        "Compared window by window, which chance blurs less, the 0-1 error of the fixed network differs by "
        "+0.31 points against the dense network (up to 0.08 can be chance) and by −2.0 points against the "
        "starting mask (up to 0.2 can be chance)."
    ) in text
    one = {**known, "fixed_minus_start_standard_error": math.nan}  # a single window
    assert "starting mask (up to" not in said(pruned(export={"clipped_loss": one}))
    assert "window by window" not in said(pruned())


def test_of_several_certificates_that_of_the_pruned_network_is_quoted() -> None:
    many = (
        pruned(0.5, 0.021, guarantee=guarantee(0.021, 5.0)),
        pruned(0.1, 0.025, guarantee=guarantee(0.03, 20.0)),
        pruned(0.05, 0.2, guarantee=guarantee(0.2, 1e5)),
    )
    text = said(*many)
    assert f"At density 10 %: {many[1].guarantee.posterior.sentence}" in text
    others = f"50 %: {at_most(many[0].guarantee.posterior.value)}, 5 %: nothing."
    assert f"Certified at the other densities: {others}" in text
    assert "all at once with at least 89.5 %." in text  # 1 − 3 (.025 + .01)
    assert SCOPE in text


def test_a_union_that_was_paid_keeps_the_confidence_of_all() -> None:
    paid = [pruned(at, guarantee=guarantee(union=math.log(3))) for at in (0.5, 0.1, 0.05)]
    assert "all at once with at least 96.5 %." in said(*paid)


def test_densities_without_a_certificate_do_not_hide_the_others() -> None:
    made = guarantee()
    text = said(pruned(0.5, 0.02, guarantee=made), pruned(0.1, 0.02))
    assert f"At density 50 %: {made.posterior.sentence}" in text
    assert "other densities" not in text


def test_small_bound_sets_are_said_to_be_loose() -> None:
    made = guarantee()
    risk = sampled_risk_bound(0.0, DRAWS, DELTA_SAMPLING).item()
    assert least(made.posterior) == pytest.approx(kl_bound(risk, 0.0, 2000, DELTA).item(), rel=1e-12)
    assert least(made.posterior) < made.posterior.value
    text = said(pruned(guarantee=made))
    assert "The bound set is small: even a predictor without any error on its 2,000 examples" in text
    assert f"would be certified at {at_most(least(made.posterior))} at best." in text
    exact = replace(made.posterior, draws=None)
    assert least(exact) == pytest.approx(kl_bound(0.0, 0.0, 2000, DELTA).item(), rel=1e-12)
    assert "The bound set is small" not in said(pruned(guarantee=guarantee(count=2 * FEW)))


def test_bounds_are_rounded_up() -> None:
    value = chernoff_bound(0.02, 1000, 0.025).item()
    assert value <= rounded_up(value) / 100 < value + 1e-4
    assert rounded_up(0.010001) == 1.01
    assert rounded_up(1.0) == 100
    assert at_most(0.5) == "50 %"
    assert [points(0.02), points(-0.001), points(0.0), points(1.0)] == ["+2.0", "−0.1", "0", "+100.0"]


def test_other_losses_are_named() -> None:
    text = " ".join(sentences(replace(pruning(), loss="clipped next-token loss")))
    assert "the clipped next-token loss of the fixed network" in text
    assert "0-1" not in text


def shown(table) -> list[str]:
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_the_terminal_table_has_one_row_a_density() -> None:
    made = guarantee()
    far = guarantee(kl=1e5, fixed=None)
    lines = shown(
        terminal_table(
            pruning(pruned(0.5, 0.021, guarantee=made), pruned(0.05, NAN), pruned(0.1, guarantee=far))
        )
    )
    (dense,) = [line.split() for line in lines if "dense" in line]
    assert dense == ["dense", "100", "2.00"]
    rows = {line.split()[0]: line.split()[2:] for line in lines if " % " in line and "0-1" not in line}
    assert made.fixed is not None
    bounds = [made.posterior.value, made.prior.value, made.fixed.value]
    assert rows["50"] == ["50", "30.00", "3.00", "2.10", *(f"{rounded_up(each):g}" for each in bounds)]
    assert rows["5"] == ["5", "30.00", "3.00", "–"]
    assert rows["10"][4:] == ["vacuous", f"{rounded_up(far.prior.value):g}", "–"]
    assert any("1,000 held-out examples" in line for line in lines)
    assert not any("ficate" in line for line in shown(terminal_table(pruning())))


REASON = "no neuron or channel is without weights, so that none can be taken out"
EXPORTS = [
    {
        "parameters": 10_010,
        "nonzero": 1010,
        "small": {"name": "mlp", "widths": (20, 7)},
        "speed": {"ratio": 3.2},
        "reason": None,
    },
    {"parameters": 10_010, "nonzero": 510, "small": None, "speed": None, "reason": REASON},
    {"parameters": 10_010, "nonzero": 210, "small": None, "speed": None, "reason": REASON, "own_fact": 5},
]


def everything() -> Pruning:
    first = guarantee(held_out=0.03)
    return pruning(
        pruned(0.5, 0.02, guarantee=first, export=EXPORTS[0]),
        pruned(0.1, guarantee=guarantee(kl=1e5, fixed=None), export=EXPORTS[1]),
        pruned(0.05, NAN, random=math.inf, history=(), export=EXPORTS[2]),
    )


def section(found: Pruning, heading: str):
    (chosen,) = [each for each in report_page(found).sections if each.heading == heading]
    return chosen


def test_the_page_has_all_sections_and_figures() -> None:
    page = report_page(everything())
    assert [each.heading for each in page.sections] == [
        "What was pruned", "Density path", "Certificate", "Where weights are kept", "Probabilities over time",
        "Export",
    ]  # fmt: skip
    titles = [block.title for each in page.sections for block in each.blocks if isinstance(block, Plot)]
    assert titles == [
        "Density path", "Layers at density 0.5", "Layers at density 0.1", "Layers at density 0.05",
        "Probabilities at density 0.5", "Probabilities at density 0.1", "Loss over steps",
    ]  # fmt: skip
    assert verdict(everything())[0] in page.lead
    assert "10,000 weights of 2 layers of mlp 300-100 on digits" in page.sections[0].text
    assert page.facts["held-out examples"] == "1,000"
    assert "prior&#39;s fixed mask" in render(page)


def test_the_table_of_terms_has_every_term_of_a_certificate() -> None:
    found = everything()
    tables = [block for block in section(found, "Certificate").blocks if isinstance(block, PageTable)]
    made = found.outcomes[0].guarantee
    assert made is not None
    assert [table.title for table in tables] == [
        "Density 50 %",
        "Density 10 %",
        "The same evidence under each bound",
    ]
    assert [column.heading for column in tables[0].columns] == [
        "term",
        "random predictor",
        "prior itself",
        "prior's fixed mask",
    ]
    assert [len(row) for row in tables[1].rows] == [3] * len(tables[1].rows)
    rows = {row[0]: row[1:] for row in tables[0].rows}
    named = {field.name for field in fields(Certificate)} - {"loss", "fixed"}
    headings = {HEADINGS.get(name, name.replace("_", " ")) for name in named}
    assert headings <= set(rows)
    assert rows["certificate, %"][0] == rounded_up(made.posterior.value) >= 100 * made.posterior.value
    assert rows["probability that it holds, %"] == [96.5, 96.5, 97.5]
    assert rows["KL, nats"] == [20.0, 0.0, None]
    assert rows["draws m"] == [DRAWS, DRAWS, None]
    assert rows["examples of the bound set n"] == [2000] * 3
    assert rows["fingerprint of the bound set"] == [made.posterior.bound_set] * 3
    assert rows["0-1 error on held-out examples, %"] == [3.0, None, None]
    bounds = dict(zip([column.heading for column in tables[2].columns], tables[2].rows[0], strict=True))
    assert bounds["quadratic"] == rounded_up(made.bounds["quadratic"])
    assert set(bounds) == {"density", *BOUNDS}


def test_the_density_path_of_the_page_has_the_numbers() -> None:
    found = everything()
    plot, table = section(found, "Density path").blocks
    drawn = {line.get_marker(): list(line.get_ydata()) for line in plot.figure.axes[0].lines}
    first, second = (each.guarantee for each in found.outcomes if each.guarantee)
    assert drawn["s"][:2] == [first.posterior.value, second.posterior.value]
    assert drawn["D"][:2] == [first.prior.value, second.prior.value]
    assert drawn["^"][0] == first.fixed.value
    assert all(math.isnan(values[2]) for values in (drawn["s"], drawn["D"], drawn["^"][:3]))
    assert [row[0] for row in table.rows] == ["dense", "50 %", "10 %", "5 %"]
    headings = [column.heading for column in table.columns]
    row = dict(zip(headings, table.rows[2], strict=True))
    assert row["fixed − dense"] == pytest.approx(0.5)
    assert row["chance"] == pytest.approx(100 * noise(0.02, 0.025, HELD_OUT))
    assert row["certificate"] == 100
    assert row["test-set bound"] is None


def test_histograms_are_summed_over_layers() -> None:
    plot = section(everything(), "Probabilities over time").blocks[0]
    cells = plot.figure.axes[0].collections[0].get_array()
    assert cells.shape == (20, 3)
    assert [int(value) for value in cells.sum(0)] == [20, 20, 20]
    assert int(cells[9, 0]) == 20
    assert [int(value) for value in cells[11].filled(0)] == [0, 2, 4]


def test_shares_by_layer_are_those_of_the_fixed_mask() -> None:
    plot, *_, table = section(everything(), "Where weights are kept").blocks
    bars = [bar.get_width() for bar in plot.figure.axes[0].patches if bar.get_alpha() is None]
    assert bars == [4900 / 9000, 0.1]
    assert table.rows == [["0", 9000, 4900, 900, 400], ["2", 1000, 100, 100, 100]]


def test_exports_are_a_table_with_reasons_below() -> None:
    (table,) = section(everything(), "Export").blocks
    assert [column.heading for column in table.columns] == ["density", "50 %", "10 %", "5 %"]
    assert table.rows == [
        ["parameters", 10_010, 10_010, 10_010],
        ["non-zero", 1010, 510, 210],
        ["small network", "mlp", None, None],
        ["its widths", "20, 7", None, None],
        ["dense / small", 3.2, None, None],
        ["own fact", None, None, 5],
    ]
    assert table.notes == [f"Reason: {REASON} (10 %, 5 %)."]
    assert section(pruning(), "Export").text == "Nothing was exported."


@pytest.mark.parametrize(
    "found",
    [
        pruning(),
        pruning(pruned(history=(), layers=())),
        replace(pruning(), examples={}, dense=NAN),
        replace(pruning(), outcomes=()),
        pruning(pruned(history=(Moment(0, NAN, NAN, 0.1, {}),))),
        pruning(pruned(1.0, guarantee=guarantee(kl=1e5, prior=1.0, fixed=None))),
    ],
    ids=["one density", "nothing learnt", "no examples", "no outcome", "no histograms", "vacuous"],
)
def test_pages_of_less_are_written_too(found, tmp_path) -> None:
    path = write_report(found, tmp_path)
    assert path == tmp_path / "report.html"
    assert path.stat().st_size > 1000


def test_a_report_leaves_the_run_alone_and_replaces_the_last_one(tmp_path) -> None:
    (tmp_path / "dense.safetensors").write_bytes(b"weights")
    write_report(everything(), tmp_path)
    assert (tmp_path / "figures" / "layers_at_density_0.05.svg").exists()
    write_report(pruning(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "dense.safetensors", "pruning.json", "report.html", "figures"
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "density_path.svg", "layers_at_density_0.1.svg", "probabilities_at_density_0.1.svg",
        "loss_over_steps.svg",
    }  # fmt: skip
    assert json.loads((tmp_path / "pruning.json").read_text(encoding="utf-8")) == numbers(pruning())


def test_numbers_are_plain_json_without_nan() -> None:
    found = everything()
    text = json.dumps(numbers(found), allow_nan=False)
    read = json.loads(text)
    assert read["outcomes"][2]["fixed"] is None
    assert read["outcomes"][2]["random"] is None
    posterior = read["outcomes"][0]["guarantee"]["posterior"]
    assert posterior["confidence"] == pytest.approx(0.965)
    assert posterior["vacuous"] is False
    assert read["outcomes"][1]["guarantee"]["posterior"]["vacuous"] is True
    assert read["outcomes"][1]["guarantee"]["fixed"] is None
    assert read["outcomes"][0]["history"][1]["histograms"]["2"][11] == 1
    assert read["sentences"] == sentences(found)
    with pytest.raises(ValueError, match="Out of range"):
        json.dumps({"fixed": found.outcomes[2].fixed}, allow_nan=False)  # control
