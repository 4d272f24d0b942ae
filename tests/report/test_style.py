"""Numbers, colours and SVG: what a reader can tell apart, and what a page can hold."""

import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from gramian.errors import InputError
from gramian.report import curves, number, palette, save
from gramian.report.style import SERIES, THEME, css, inline, tick

DICHROMATS = {  # Machado, Oliveira, Fernandes 2009, table 1, severity 1
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
MIXING = np.array([[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]])
OKLAB = np.array([[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]])


def linear(colour):
    value = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def least_distance(colours, sight):
    """The smallest distance of two colours in OKLab, as seen through a matrix on linear RGB."""
    seen = np.clip(np.stack([linear(colour) for colour in colours]) @ np.transpose(sight), 0, 1)
    lab = np.cbrt(seen @ MIXING.T) @ OKLAB.T
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return distance[~np.eye(len(lab), dtype=bool)].min()


def contrast(one, other):
    lights = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) + 0.05 for colour in (one, other))
    return lights[1] / lights[0]


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_six_colours_are_told_apart_by_everyone(mode):
    six = [pair[mode] for pair in SERIES[:6]]
    assert least_distance(six, np.eye(3)) > 0.12
    assert min(least_distance(six, sight) for sight in DICHROMATS.values()) > 0.1
    assert least_distance([pair[mode] for pair in SERIES], np.eye(3)) > 0.1


def test_distance_fails_for_red_and_green():
    assert least_distance(["#d62728", "#8c8c00"], np.eye(3)) > 0.12
    assert least_distance(["#d62728", "#8c8c00"], DICHROMATS["deutan"]) < 0.1


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_contrast_with_the_paper(mode):
    paper = THEME["paper"][mode]
    assert min(contrast(pair[mode], paper) for pair in SERIES) >= 3.0
    assert min(contrast(THEME[name][mode], paper) for name in ("ink", "muted")) >= 4.5
    assert contrast(THEME["rule"][mode], paper) < 3.0


def test_palette_follows_order_and_names_variables():
    names = [f"block {index}" for index in range(13)]
    assert palette(names) == palette([*names, *names])
    assert len(set(palette(names[:12]).values())) == 12
    assert palette(names)["block 12"] == palette(names)["block 0"]
    assert css(palette(names)["block 1"]) == "var(--series-1)"
    assert css("#123456") == "#123456"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (1234567, "1,234,567"),
        (np.int64(4096), "4,096"),
        (3.21449, "3.214"),
        (12.8, "12.80"),
        (23456.7, "23,457"),
        (0.041, "0.0410"),
        (0.99996, "1.00"),
        (9999.96, "10,000"),
        (-0.5, "−0.500"),
        (0.0, "0"),
        (1.5e-7, "1.50×10⁻⁷"),
        (2.5e11, "2.50×10¹¹"),
        (float("nan"), "not finite"),
        (float("-inf"), "not finite"),
    ],
)
def test_number(value, text):
    assert number(value) == text


def test_tick_has_no_trailing_zeros():
    assert [tick(value) for value in (2000.0, 0.25, 0.5, 2e9, 1e-6)] == [
        "2,000",
        "0.25",
        "0.5",
        "2×10⁹",
        "1×10⁻⁶",
    ]


def figure(name="a"):
    return curves({name: ([0, 1, 2], [3, 2, 1])}, x="step", y="loss")


def test_inline_prefixes_every_id_and_keeps_no_address():
    svg = inline(figure(), "f7", "A line.")
    identities = re.findall(r'\bid="([^"]+)"', svg)
    assert identities
    assert all(identity.startswith("f7-") for identity in identities)
    assert len(set(identities)) == len(identities)
    used = re.findall(r'href="#([^"]+)"', svg) + re.findall(r"url\(#([^)]+)\)", svg)
    assert used
    assert set(used) <= set(identities)
    assert "http" not in svg
    assert "<style" not in svg
    assert not set(identities) & set(re.findall(r'\bid="([^"]+)"', inline(figure(), "f8", "A line.")))


def test_inline_takes_the_pages_colours_and_font():
    svg = inline(figure(), "f1", "A line.")
    assert "var(--series-0)" in svg
    assert "var(--ink)" in svg
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert "font-family" not in svg


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", 'id="x" & url(#y)', "$\\frac{", "a\x00b\nc", "名\ud800"]
)
def test_inline_escapes_names(name):
    svg = inline(figure(name), "f1", name.replace("\x00", "").replace("\ud800", ""))
    assert "<script" not in svg
    texts = [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]
    assert any(text.startswith(name[:1]) for text in texts)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_save_is_reproducible(tmp_path, suffix):
    for file in ("a", "b"):
        save(figure(), tmp_path / f"{file}.{suffix}")
    first = (tmp_path / f"a.{suffix}").read_bytes()
    assert first == (tmp_path / f"b.{suffix}").read_bytes()
    save(figure("other"), tmp_path / f"b.{suffix}")
    assert first != (tmp_path / f"b.{suffix}").read_bytes()


def test_save_names_the_suffixes(tmp_path):
    with pytest.raises(InputError, match=r"\.png or \.svg"):
        save(figure(), tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())


def test_settings_of_the_user_neither_matter_nor_change():
    plain = inline(figure(), "f1", "A line.")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert inline(figure(), "f1", "A line.") == plain
        assert dict(matplotlib.rcParams) == before


def test_gramian_alone_loads_no_matplotlib_and_the_report_no_pyplot():
    code = (
        "import sys, gramian; assert 'matplotlib' not in sys.modules; import gramian.report; "
        "assert 'matplotlib' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
