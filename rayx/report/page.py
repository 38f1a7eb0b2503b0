"""The page around the sections: style, escaping, tables and figures as HTML text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

CSS = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f9; --ink: #1b1c1e; --muted: #646a73;
  --grid: #dfe2e7; --line: #e3e6ea; --accent: #0068a3; --good: #00774f; --bad: #b34700;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9;
  --c6: #b8a200; }
@media (prefers-color-scheme: dark) { :root { --paper: #131517; --card: #1c1f23; --ink: #e7e9ec;
  --muted: #9aa2ad; --grid: #2d3238; --line: #2b3036; --accent: #63b6ec; --good: #3fcf9f;
  --bad: #f5935a; --c0: #4ba6e3; --c1: #f0803c; --c2: #2ec796; --c3: #dd9cc0; --c4: #f0b429;
  --c5: #8ed0f5; --c6: #d9c93f; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 66rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
h1, h2 { line-height: 1.25; text-wrap: balance; margin: 0; }
h1 { font-size: clamp(1.4rem, 1.1rem + 1.8vw, 2.1rem); font-weight: 650; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; font-weight: 620; }
p { margin: 0.5rem 0; max-width: 44rem; }
a { color: var(--accent); }
code { font: 0.875em ui-monospace, SFMono-Regular, Menlo, monospace; overflow-wrap: anywhere; }
.eyebrow { color: var(--muted); font-size: 0.875rem; margin: 0 0 0.5rem; }
section { margin-top: 2.75rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
#verdict { margin-top: 0; padding-top: 0; border: 0; }
.lead { font-size: 1.0625rem; margin-top: 0.75rem; }
.note, figcaption { color: var(--muted); font-size: 0.875rem; }
.missing { color: var(--muted); border-left: 3px solid var(--line); padding-left: 0.75rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr));
  gap: 0.75rem; margin: 1.5rem 0 1rem; padding: 0; }
.tiles > div { background: var(--card); border-radius: 10px; padding: 0.8rem 1rem; }
.tiles dt { color: var(--muted); font-size: 0.8125rem; }
.tiles dd { margin: 0; font-size: 1.35rem; font-weight: 620; line-height: 1.35; }
.tiles small { display: block; color: var(--muted); font-size: 0.8125rem; font-weight: 400;
  line-height: 1.4; }
.good { color: var(--good); } .bad { color: var(--bad); }
nav { font-size: 0.875rem; margin-top: 1rem; line-height: 2; }
nav a { margin-right: 0.9rem; white-space: nowrap; text-decoration: none; }
nav a:hover { text-decoration: underline; }
ul.warnings { margin: 0.75rem 0 0; padding: 0; list-style: none; max-width: 52rem; }
ul.warnings li { border-left: 3px solid var(--c4); padding: 0.15rem 0 0.15rem 0.75rem;
  margin: 0.5rem 0; }
.panels { display: grid; gap: 1.5rem 1.75rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.panels > *, .pair > * { min-width: 0; }
.pair { display: grid; gap: 1.5rem 2.5rem; margin-top: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.pair figure { max-width: 34rem; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-family: inherit; } svg * { stroke-linejoin: round; }
figcaption { margin-top: 0.35rem; max-width: 44rem; }
.scroll { overflow-x: auto; max-width: 100%; margin-top: 0.25rem; }
p.caption { color: var(--muted); font-size: 0.875rem; margin: 0.9rem 0 0; }
.pair p.caption:first-child { margin-top: 0; }
.alone { max-width: 34rem; margin-top: 1rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.32rem 0.8rem 0.32rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
thead th { color: var(--muted); font-weight: 500; font-size: 0.8125rem; vertical-align: bottom; }
tbody th { font-weight: 500; max-width: 16rem; overflow-wrap: break-word; min-width: 5.5rem; }
td.n, th.n { text-align: right; } td.n { white-space: nowrap; }
td.t { overflow-wrap: break-word; max-width: 34rem; }
td b { font-weight: 680; }
.dot { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 2px;
  margin-right: 0.5em; }
@media print { nav { display: none; } section { break-inside: avoid; } }
"""


class Html(str):
    """Text that is HTML already; everything else is escaped."""


def esc(value: object) -> Html:
    """Return a value as HTML text; signs that do not print become a visible mark."""
    if isinstance(value, Html):
        return value
    clean = "".join(c if c.isprintable() else "\ufffd" for c in str(value))
    return Html(html.escape(clean))


def missing(text: str) -> Html:
    """Return what a section says when its evidence is not there."""
    return Html(f'<p class="missing">{esc(text)}</p>')


def paragraph(text: str, kind: str = "") -> Html:
    """Return a paragraph, escaped, of a class."""
    return Html(f'<p class="{kind}">{esc(text)}</p>' if kind else f"<p>{esc(text)}</p>")


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], text: Sequence[int] = ()
) -> Html:
    """Return a table in a box of its own that scrolls; the first column names the row.

    Args:
        caption: What the table shows.
        head: Names of the columns.
        rows: Cells; escaped unless Html.
        text: Columns that hold text (aligned left, broken into lines); the others hold numbers.
    """
    kinds = ["t" if i in text else "n" for i in range(len(head))]
    cells = [
        f'<th scope="col"{"" if i == 0 or i in text else " class=n"}>{esc(name)}</th>'
        for i, name in enumerate(head)
    ]
    body = []
    for first, *rest in rows:
        tail = "".join(
            f'<td class="{kind}">{esc(cell)}</td>'
            for kind, cell in zip(kinds[1:], rest, strict=True)
        )
        body.append(f'<tr><th scope="row">{esc(first)}</th>{tail}</tr>')
    # The caption stands outside the box: inside, a phone would cut it where the table scrolls.
    return Html(
        f'<p class="caption">{esc(caption)}</p><div class="scroll" role="region" tabindex="0" '
        f'aria-label="{esc(caption)}"><table aria-label="{esc(caption)}"><thead><tr>'
        f"{''.join(cells)}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def figure(svg: str, caption: str = "", scroll_width: float = 0.0) -> Html:
    """Return a figure; one wider than a phone scrolls in a box of its own."""
    if scroll_width:
        inside = f'<div style="min-width:{scroll_width:.0f}px">{svg}</div>'
        svg = f'<div class="scroll" role="region" tabindex="0" aria-label="figure">{inside}</div>'
    below = f"<figcaption>{esc(caption)}</figcaption>" if caption else ""
    return Html(f"<figure>{svg}{below}</figure>")


def swatch(color: int) -> Html:
    """Return a small square in a colour of the palette."""
    return Html(f'<span class="dot" style="background:var(--c{color})" aria-hidden="true"></span>')


def tiles(entries: Iterable[tuple[str, object, str]]) -> Html:
    """Return key numbers: (name, value, what stands below it)."""
    inside = "".join(
        f"<div><dt>{esc(name)}</dt><dd>{esc(value)}<small>{esc(below)}</small></dd></div>"
        for name, value, below in entries
    )
    return Html(f'<dl class="tiles">{inside}</dl>')


def document(title: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """Return the page.

    Args:
        title: Name of the page.
        sections: (id, heading, HTML); the first is the verdict and carries its own heading.
    """
    links = "".join(f'<a href="#{key}">{esc(name)}</a>' for key, name, _ in sections[1:])
    (first, name, verdict), *rest = sections
    parts = [
        f'<section id="{first}" aria-label="{esc(name)}"><p class="eyebrow">{esc(title)}</p>'
        f'{verdict}<nav aria-label="Sections">{links}</nav></section>'
    ]
    parts += [
        f'<section id="{key}" aria-labelledby="h-{key}"><h2 id="h-{key}">{esc(name)}</h2>{body}'
        "</section>"
        for key, name, body in rest
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )
