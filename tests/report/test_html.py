"""The page: structure, escaping, the same bytes twice, and nothing fetched from anywhere."""

import math
import re
from html.parser import HTMLParser

import pytest

from gramian.errors import InputError
from gramian.report import Column, Page, Plot, Section, Table, curves, render, write
from report.sample import BLOCKS, page

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Reader(HTMLParser):
    """Collects elements and fails on tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def outside(text):
    """All addresses that a browser would fetch."""
    reader = Reader(text)
    addresses = [
        attrs.get(name) or "" for _, attrs in reader.elements for name in ("src", "href", "srcset", "data")
    ]
    addresses += re.findall(r"url\(([^)]*)\)", text) + re.findall(r"@import[^;]*", text)
    return [address for address in addresses if address and not address.startswith(("#", "data:"))]


def table_page(*blocks):
    return Page("t", "l", {}, [Section("h", "", blocks)])


def cells(text):
    """The body of the first table as text: rows of cells."""
    body = text[text.index("<tbody>") : text.index("</tbody>")]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [
        [
            " ".join(re.sub(r"<[^>]+>", " ", cell).split())
            for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)
        ]
        for row in rows
    ]


@pytest.fixture(scope="module")
def sample():
    return render(page())


def test_structure(sample):
    text = sample
    reader = Reader(text)
    assert [reader.count(tag) for tag in ("h1", "h2", "table", "figure", "svg", "script")] == [
        1,
        5,
        1,
        7,
        7,
        0,
    ]
    assert reader.count("figcaption") == 7
    assert all(
        attrs.get("role") == "img" and attrs["aria-label"] for tag, attrs in reader.elements if tag == "svg"
    )
    identities = [attrs["id"] for _, attrs in reader.elements if "id" in attrs]
    assert len(identities) == len(set(identities))
    assert text.count("Figure 7.") == 1
    assert text.startswith("<!doctype html>")


def test_swatches_have_the_colours_of_the_lines(sample):
    text = sample
    for index in range(len(BLOCKS)):
        assert f'class="swatch" style="background: var(--series-{index})"' in text
        assert f"stroke: var(--series-{index})" in text


def test_light_and_dark_define_the_same_variables(sample):
    text = sample
    light, dark = text.split("@media screen and (prefers-color-scheme: dark)")
    names = re.findall(r"(--[\w-]+): #", light)
    assert names == re.findall(r"(--[\w-]+): #", dark)
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= set(names)


def test_nothing_comes_from_outside(sample):
    text = sample
    assert outside(text) == []
    assert re.findall(r"https?://[^'\" ]*", text) == ["http://www.w3.org/2000/svg"]  # the icon's xmlns
    assert outside(text.replace("<main>", '<main><img src="//example.com/a.png">')) == ["//example.com/a.png"]


def test_same_content_gives_the_same_bytes(sample, tmp_path):
    write(page(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == sample.encode()
    assert render(page(title="Another")) != sample


def test_every_string_is_escaped(sample):
    bad = "</style></title><script>alert(1)</script>\"'&"
    figure = curves({bad: ([0, 1], [1.0, 2.0])}, x=bad, y=bad, references={bad: 1.5})
    plot = Plot(figure, bad, bad, bad)
    table = Table(
        [Column(bad, bad), Column("n", "", "low", True)], [(bad, 1.0), (bad, bad)], bad, [bad], {bad: bad}
    )
    reader = Reader(render(Page(bad, bad, {bad: bad}, [Section(bad, bad, [plot, table])])))
    assert reader.count("script") == 0
    assert reader.count("style") == 1
    assert "".join(reader.words).count("<script>alert(1)") >= 14
    control = sample.replace("<main>", "<main><script>alert(1)</script>")
    assert Reader(control).count("script") == 1


def test_best_and_ratio():
    columns = [
        Column("block"),
        Column("loss", "nats", "low", ratio=True),
        Column("speed", "", "high"),
        Column("n"),
    ]
    rows = [("a", 4.0, 10.0, 5), ("b", 2.0, 20.0, None), ("c", math.inf, 20.0, "few")]
    text = render(table_page(Table(columns, rows)))
    assert cells(text) == [
        ["a", "4.000", "10.00", "5"],
        ["b", "2.000 best · 0.500×", "20.00 best", "–"],
        ["c", "not finite", "20.00 best", "few"],
    ]
    assert text.count("<b>") == 3
    assert "↓ low is good" in text
    assert "↑ high is good" in text


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0], [math.nan, 1.0], [None, 1.0]])
def test_nothing_is_best_where_nothing_differs(values):
    rows = [(str(index), value) for index, value in enumerate(values)]
    text = render(table_page(Table([Column("a"), Column("b", "", "low", ratio=True)], rows)))
    assert "best" not in text[text.index("<tbody>") :]


def test_no_ratio_to_nothing():
    rows = [("a", 0.0), ("b", 1.0)]
    assert cells(render(table_page(Table([Column("a"), Column("b", ratio=True)], rows)))) == [
        ["a", "0"],
        ["b", "1.000"],
    ]


def test_plots_stand_two_by_two():
    plots = [Plot(curves({"a": ([0], [1.0])}, x="x", y="y"), "caption", "alt") for _ in range(3)]
    text = render(table_page(*plots))
    assert text.count('<div class="plots">') == 1
    assert text.count('<div class="plots alone">') == 1


def test_an_unprintable_path_does_not_stop_the_page(tmp_path):
    write(Page("t", "", {"data": "/data/\udcff.txt"}, []), tmp_path / "report.html")
    assert "/data/?.txt" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_input_errors():
    figure = curves({"a": ([0], [1.0])}, x="x", y="y")
    with pytest.raises(InputError, match="caption"):
        Plot(figure, " ", "alt")
    with pytest.raises(InputError, match="row of 1 cells"):
        Table([Column("a"), Column("b")], [("a",)])
