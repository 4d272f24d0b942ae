"""Sentences for profiles that are what they should be by construction."""

import math

import pytest

from gramian.tasks.architectures import Architecture
from gramian.tasks.verdict import Profile, Verdict, judge, remedies


def profile(moments, gradient, correlation) -> Profile:
    return Profile(moments, {"a": correlation, "b": [max(0.5, c) for c in correlation]}, gradient)


FLAT = [1.0] * 5


@pytest.mark.parametrize(
    ("moments", "gradient", "correlation", "kind", "layer"),
    [
        (FLAT, FLAT, [0.0, 0.1, 0.2, 0.3, 0.4], "fine", None),
        ([1, 1e2, 1e5, 1e6, 1e7], FLAT, [0.0] * 5, "exploding", 2),
        ([1, 1e-2, 1e-3, 1e-6, 0], FLAT, [0.0] * 5, "vanishing", 3),
        (FLAT, [1e6, 1e4, 1e3, 1e2, 1], [0.0] * 5, "exploding", 0),
        (FLAT, [1e-6, 1e-5, 1e-3, 1e-2, 1], [0.0] * 5, "vanishing", 1),
        ([1, 1e200, math.inf, math.inf, math.inf], FLAT, [0.0] * 5, "exploding", 1),
        (FLAT, FLAT, [0.0, 0.5, 0.9, 0.996, 1.0], "collapsing", 3),
        (FLAT, FLAT, [0.996, 0.99, 0.99, 0.99, 0.99], "fine", None),  # they were one from the start
    ],
)
def test_kinds_and_layers(moments, gradient, correlation, kind, layer) -> None:
    verdict = judge(profile(moments, gradient, correlation))
    assert (verdict.kind, verdict.layer) == (kind, layer)
    assert verdict.sentence.endswith(".")
    assert verdict.sentence.startswith("Fine" if kind == "fine" else "Will")


def test_a_nan_is_no_growth_that_is_fine() -> None:
    assert judge(profile([1, math.nan, 1, 1, 1], FLAT, [0.0] * 5)).kind == "exploding"


def test_remedies_fit_the_architecture() -> None:
    bad = Verdict("exploding", 1, "")
    assert not list(remedies(Architecture(name="dense"), Verdict("fine", None, "")))
    first, changed = next(remedies(Architecture(name="residual"), bad))
    assert "--gains uniform" in first
    assert changed.gains == "uniform"
    assert {changed.name for _, changed in remedies(Architecture(name="sas"), bad)} == {"e_spa", "pre_norm"}
    for name in ("dense", "residual", "convolution", "residual_convolution", "sas"):
        for _, changed in remedies(Architecture(name=name), bad):
            assert changed != Architecture(name=name)
