"""A matplotlib figure as inline SVG: text stays text, colours follow the page, bytes repeat."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayx.plots import GRID, INK, MUTED, PALETTE, STYLE

WIDTH = 340  # points: a phone's width, so that a figure's text is never scaled down there
_THEME = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)"}
_THEME |= {color: f"var(--c{i})" for i, color in enumerate(PALETTE)}
_USES = re.compile(r'(?:<use xlink:href="(#\w+)" x="[^"]+" y="[^"]+" style="([^"]*)"/>\n?)+')
_REFERENCE = re.compile(r'(?:url\(#|href="#)([^)"]+)')


def draw(
    plot: Callable[[Axes], None], key: str, alt: str, height: float = 240, width: float = WIDTH
) -> str:
    """Return the SVG of a figure with one axes.

    Args:
        plot: Draws on the axes.
        key: Names the figure within its page: ids inside the SVG depend on it.
        alt: What a reader who cannot see the figure is told.
        height: Points.
        width: Points.
    """
    settings: dict = {"svg.fonttype": "none", "svg.hashsalt": f"rayx {key}", **STYLE}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The page's font draws the glyphs; that matplotlib's own lacks some does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        plot(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), alt)


def _inline(svg: str, alt: str) -> str:
    svg = svg[svg.index("<svg") :].rstrip()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    used = set(_REFERENCE.findall(svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", svg)
    # Inside tags only: numbers between them are the figure's text.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d{2})\d+", r"\1", tag[0]), svg)
    for color, variable in _THEME.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)  # text takes the page's font
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    svg = _USES.sub(_grouped, svg)
    view = re.search(r'viewBox="[^"]+"', svg)
    assert view is not None  # matplotlib always writes one
    head = f'<svg role="img" aria-label="{html.escape(alt)}" {view[0]} '
    head += 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + svg[svg.index(">") + 1 :]


def _grouped(uses: re.Match) -> str:
    """Return markers of one style with the style said once: half the bytes of a scatter."""
    style = f' style="{uses[2]}"/>'
    if uses[0].count(style) < 2 or uses[0].count("<use") != uses[0].count(style):
        return uses[0]
    return f'<g style="{uses[2]}">{uses[0].replace(style, "/>")}</g>'
