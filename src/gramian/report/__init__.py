"""Figures and one self-contained HTML page about runs, made from plain numbers."""

from gramian.report.figures import curves, dumbbells, final_profile, gains, profiles_over_time
from gramian.report.html import Column, Page, Plot, Section, Table, render, write
from gramian.report.style import number, palette, save

__all__ = [
    "Column",
    "Page",
    "Plot",
    "Section",
    "Table",
    "curves",
    "dumbbells",
    "final_profile",
    "gains",
    "number",
    "palette",
    "profiles_over_time",
    "render",
    "save",
    "write",
]
