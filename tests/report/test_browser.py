"""A whole report opened in a browser: silent and offline; and a page that is neither, to test the check."""

import pytest

from browser import BROWSER, check_page
from gramian.report import render, write
from report.sample import page

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")


def test_report_is_silent_and_offline(tmp_path):
    write(page(), tmp_path / "report.html")
    assert check_page(tmp_path / "report.html") == []


def test_hostile_names_run_nothing(tmp_path):
    hostile = (
        '<script>console.error("ran")</script>',
        '"><img src=x onerror=console.error(1)>',
        "$x^2$",
        "名前",
    )
    write(page(hostile, title='</title><script>console.error("ran")</script>'), tmp_path / "report.html")
    assert check_page(tmp_path / "report.html") == []


def test_the_page_itself_forbids_the_network(tmp_path):
    spoiled = render(page()).replace("<main>", '<main><img src="http://example.com/spoiled.png">')
    (tmp_path / "report.html").write_text(spoiled, encoding="utf-8")
    problems = check_page(tmp_path / "report.html")
    assert any("Content Security Policy" in problem for problem in problems)
    assert not any(problem.startswith("network") for problem in problems)


def test_check_finds_messages_and_requests(tmp_path):
    spoiled = '<!doctype html><html><title>x</title><script>console.error("bad")</script>'
    (tmp_path / "bad.html").write_text(spoiled + '<img src="http://example.com/spoiled.png"></html>')
    problems = check_page(tmp_path / "bad.html")
    assert any(problem.startswith("console") and "bad" in problem for problem in problems)
    assert "network: http://example.com/spoiled.png" in problems
