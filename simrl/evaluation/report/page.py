"""HTML of a page that is one file: escaped text; tables, figures and conversations that scroll within their box.

No request, no font from elsewhere: it opens offline and reads the same in a year. A page runs no script but the one
that it is made with, whatever the text in it says: its Content-Security-Policy names the script's hash.
"""

import base64
import dataclasses
import hashlib
import html
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

STYLE = """
:root { --paper: #fbfaf8; --card: #ffffff; --ink: #22262b; --soft: #5c646d; --line: #dfdcd6;
  --edge: rgba(0, 0, 0, .28); --shade: 0, 114, 178;
  --user: #e3eef7; --assistant: #f1efea; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #17191c; --card: #1f2226; --ink: #e4e6e8; --soft: #a2a9b1;
  --line: #363b41; --edge: rgba(0, 0, 0, .7); --shade: 86, 180, 233; --user: #24384a; --assistant: #2c2f34; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 12px; }
h2 { font-size: 1.2rem; margin: 44px 0 8px; }
h3 { font-size: 1rem; margin: 24px 0 6px; }
p { max-width: 52em; margin: 8px 0; overflow-wrap: anywhere; }
.lead p { font-size: 1.06rem; }
.note { color: var(--soft); font-size: .9rem; }
.box { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background-color: var(--card);
  margin: 10px 0; }
/* A box with more than it shows has a shadow at the edge where there is more (over which a cover scrolls away), and a
   line below it that says so, in browsers that know how far a box is scrolled. */
.box { background-image: linear-gradient(to right, var(--card) 40%, transparent),
    linear-gradient(to left, var(--card) 40%, transparent),
    linear-gradient(to right, var(--edge), transparent), linear-gradient(to left, var(--edge), transparent);
  background-size: 48px 100%, 48px 100%, 18px 100%, 18px 100%; background-position: 0 0, 100% 0, 0 0, 100% 0;
  background-repeat: no-repeat; background-attachment: local, local, scroll, scroll; }
@supports (animation-timeline: scroll()) {
  @keyframes more { from { height: 1.9em; opacity: 1; } to { height: 1.9em; opacity: .25; } }
  .box::after, .strip::after { content: 'more to the right →'; display: block; position: sticky; left: 0; height: 0;
    width: fit-content; overflow: hidden; padding: 0 8px; color: var(--soft); font-size: .8rem; line-height: 1.9em;
    animation: more linear; animation-timeline: scroll(nearest inline); }
}
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; white-space: normal; min-width: 4.5em; }
th:first-child, th.words, td.words { text-align: left; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--card); }
td small, th small { font-weight: 400; display: block; color: var(--soft); font-size: .8rem; }
td.words { white-space: normal; min-width: 16em; overflow-wrap: anywhere; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em;
  outline: 1px solid var(--line); }
.panels { display: grid; grid-template-columns: minmax(0, 1fr); gap: 12px; margin: 10px 0; }
.panels .box { --card: #ffffff; --edge: rgba(0, 0, 0, .28); --soft: #5c646d; background-color: #ffffff; padding: 6px;
  margin: 0; }
.panels svg { display: block; width: 100%; height: auto; margin: 0 auto; }
.panels .wide { display: none; }
@media (min-width: 860px) {
  .panels { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .panels .lone { grid-column: 1 / -1; }
  .panels .lone .wide { display: block; }
  .panels .lone .narrow { display: none; }
}
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 8px 0; font-size: .9rem; }
.legend i { display: inline-block; width: 1.8em; margin-right: .4em; vertical-align: middle;
  outline: 1px solid var(--line); }
.strip { overflow-x: auto; }
.talks { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(250px, 1fr); gap: 12px;
  align-items: start; padding: 2px 2px 10px; }
.talk { background: var(--card); border: 1px solid var(--line); border-top-width: 4px; border-radius: 8px;
  padding: 10px; }
.talk h4 { margin: 0; font-size: .92rem; }
.bubble { margin: 8px 0; padding: 6px 10px; border-radius: 12px; font-size: .9rem; overflow-wrap: anywhere;
  width: fit-content; max-width: 92%; white-space: pre-wrap; }
.user { background: var(--user); margin-left: auto; border-bottom-right-radius: 3px; }
.assistant { background: var(--assistant); border-bottom-left-radius: 3px; }
.who { display: block; color: var(--soft); font-size: .72rem; }
@media (max-width: 600px) { tbody th { white-space: normal; min-width: 9.4em; } }
details { margin: 10px 0; }
a { color: inherit; }
summary { cursor: pointer; padding: 4px 0; overflow-wrap: anywhere; }
"""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell with more than its text.

    Attributes:
        text: escaped when written.
        under: further lines in small type, such as an interval.
        shade: 0 to 1, how strongly its background is coloured.
        dot: the colour of a dot before the text.
        words: prose: aligned left, lines may break.
    """

    text: str
    under: str = ''
    shade: float = 0.0
    dot: str | None = None
    words: bool = False


def escape(text: str) -> str:
    return html.escape(text, quote=True)


def document(title: str, body: Iterable[str], script: str = '') -> str:
    """A page.

    Args:
        title: of the window.
        body: its parts.
        script: that it runs, once it is read; '' for none.
    """
    parts = '\n'.join(body)
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; img-src data:"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        parts += f'\n<script>{script}</script>'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<link rel="icon" href="data:,">\n'  # none: a server need not be asked for one
        f'<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{parts}\n</main>\n</body>\n'
        '</html>\n'
    )


def section(title: str, *parts: str) -> str:
    inside = '\n'.join(part for part in parts if part)
    return f'<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>'


def heading(title: str) -> str:
    return f'<h3>{escape(title)}</h3>'


def paragraph(text: str, kind: str = '') -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f'<p>{escape(text)}</p>'


def link(file: str, text: str) -> str:
    """A paragraph with a link to a file beside the page."""
    return f'<p><a href="{urllib.parse.quote(file, errors="surrogateescape")}">{escape(text)}</a></p>'


def table(header: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
    """A table in a box of its own, which a keyboard scrolls, too; the first cell of a row names it."""
    words = [any(isinstance(cell, Cell) and cell.words for cell in column) for column in zip(*rows, strict=True)]
    kinds = (' class="words"' if of_words else '' for of_words in [*words, *[False] * (len(header) - len(words))])
    head = ''.join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(header, kinds, strict=True))
    body = '\n'.join(
        '<tr>' + _cell(row[0], header=True) + ''.join(_cell(cell, header=False) for cell in row[1:]) + '</tr>'
        for row in rows
    )
    inside = f'<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>'
    return f'<div class="box" tabindex="0"><table>\n{inside}\n</table></div>'


@dataclasses.dataclass(frozen=True)
class Panel:
    """A figure on the page.

    Attributes:
        text: the same in words.
        narrow: its SVG, as `drawing.svg` makes it, for half of the main column or a phone.
        wide: its SVG for the whole main column; None: another panel is beside it.
    """

    text: str
    narrow: str
    wide: str | None = None


def panels(drawn: Iterable[Panel]) -> str:
    """Figures, two side by side where there is room, and one with a wide form across both."""
    boxes = []
    for panel in drawn:
        forms = {'narrow': panel.narrow} | ({} if panel.wide is None else {'wide': panel.wide})
        inside = ''.join(_svg(svg, panel.text, kind) for kind, svg in forms.items())
        boxes.append(f'<div class="box{"" if panel.wide is None else " lone"}">{inside}</div>')
    inside = '\n'.join(boxes)
    return f'<div class="panels">\n{inside}\n</div>' if boxes else ''


def _svg(svg: str, text: str, kind: str) -> str:
    """An SVG with its text; shown at 0.74 to 1.6 of its own size, below which it scrolls."""
    found = re.search(r'<svg [^>]*?width="([\d.]+)pt"', svg)
    assert found is not None
    width = float(found[1]) * 96 / 72  # CSS pixels
    bounds = f'min-width: {0.74 * width:.0f}px; max-width: {1.6 * width:.0f}px'
    start = f'<svg class="{kind}" role="img" aria-label="{escape(text)}" style="{bounds}" '
    return svg.replace('<svg ', start, 1)


def legend(lines: Mapping[str, tuple[str, str]]) -> str:
    """Names with the colour and CSS style of their lines."""
    entries = ''.join(
        f'<span><i style="border-top: 3px {style} {colour}"></i>{escape(name)}</span>'
        for name, (colour, style) in lines.items()
    )
    return f'<div class="legend">{entries}</div>'


def details(title: str, *parts: str, opened: bool = False) -> str:
    inside = '\n'.join(parts)
    return f'<details{" open" if opened else ""}>\n<summary>{escape(title)}</summary>\n{inside}\n</details>'


def talk(title: str, colour: str, messages: Sequence[tuple[str, str]], outcome: str) -> str:
    """One conversation as chat bubbles; `messages` are (role, text)."""
    bubbles = '\n'.join(
        f'<div class="bubble {escape(who)}" dir="auto"><span class="who" dir="ltr">{escape(who)}</span>'
        f'{escape(text)}</div>'
        for who, text in messages
    )
    return (
        f'<div class="talk" style="border-top-color: {colour}">\n<h4>{escape(title)}</h4>\n{bubbles}\n'
        f'<p class="note">{escape(outcome)}</p>\n</div>'
    )


def side_by_side(talks: Iterable[str]) -> str:
    """Conversations in columns, which scroll."""
    inside = '\n'.join(talks)
    return f'<div class="strip"><div class="talks">\n{inside}\n</div></div>'


def flat(settings: Mapping[str, Any], prefix: str = '') -> list[tuple[str, str]]:
    """Nested settings as dotted names and values."""
    rows = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            rows.extend(flat(value, f'{prefix}{name}.'))
        else:
            rows.append((f'{prefix}{name}', str(value)))
    return rows


def _dot(colour: str) -> str:
    return f'<span class="dot" style="background: {colour}"></span>'


def _cell(cell: str | Cell, *, header: bool) -> str:
    cell = Cell(cell) if isinstance(cell, str) else cell
    dot = _dot(cell.dot) if cell.dot else ''
    under = f'<small>{escape(cell.under)}</small>'.replace('\n', '<br>') if cell.under else ''
    if header:
        return f'<th scope="row">{dot}{escape(cell.text)}{under}</th>'
    style = f' style="background: rgba(var(--shade), {0.45 * cell.shade:.2f})"' if cell.shade else ''
    kind = ' class="words"' if cell.words else ''
    return f'<td{kind}{style}>{dot}{escape(cell.text)}{under}</td>'
