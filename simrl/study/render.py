"""Markdown -> HTML that is safe to show, whoever wrote it: models, participants, the researcher.

HTML in it is shown as text. Links lead to http, https and mailto only, open apart, and tell nothing of where they were
followed; images are shown by their description, since loading one would tell its server who reads. No attribute comes
from the text but an address. Headings begin beneath those of the page, whatever level the text has them at, and what
scrolls can be reached by keyboard.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup, escape

SAFE = re.compile(r'(https?://|mailto:)', re.IGNORECASE)
REPLY_HEADING, PAGE_HEADING = 3, 1  # levels of the highest heading of a reply, and of a page's text
ALIGN = re.compile(r'text-align:(left|center|right)')
KEPT = 4096  # texts whose HTML is kept: a page shows the whole conversation each time


@functools.lru_cache(KEPT)
def to_html(markdown: str) -> Markup:
    """A reply or a message as HTML. Its line breaks are kept, as in a poem."""
    return _to_html(markdown, REPLY_HEADING, breaks=True)


@functools.lru_cache(KEPT)
def page_html(markdown: str, top: int = PAGE_HEADING) -> Markup:
    """A text of the study's own pages as HTML. Lines of a paragraph are joined; `top`: level of its highest heading."""
    return _to_html(markdown, top, breaks=False)


def _to_html(markdown: str, top: int, *, breaks: bool) -> Markup:
    parser = _parser(breaks=breaks)
    tokens = parser.parse(markdown)
    _place_headings(tokens, top)
    return Markup(parser.renderer.render(tokens, parser.options, {}))


@functools.cache
def _parser(*, breaks: bool) -> MarkdownIt:
    parser = MarkdownIt('commonmark', {'html': False, 'breaks': breaks}, renderer_cls=_Renderer)
    parser.enable(['table', 'strikethrough'])
    parser.validateLink = _is_safe  # type: ignore[method-assign]
    return parser


def _is_safe(url: str) -> bool:
    return SAFE.match(url.strip()) is not None


def _place_headings(tokens: Sequence[Token], top: int) -> None:
    """Gives headings the levels from `top` on, without gaps."""
    used = sorted({token.tag for token in tokens if token.type == 'heading_open'})
    for token in tokens:
        if token.type in ('heading_open', 'heading_close'):
            token.tag = f'h{min(top + used.index(token.tag), 6)}'


class _Renderer(RendererHTML):
    """HTML of tokens, where it differs from CommonMark's."""

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Mapping[str, Any]) -> str:
        description = self.renderInlineAsText(tokens[idx].children or [], options, env)  # type: ignore[arg-type]
        return f'<span class="image">[image: {escape(description)}]</span>'

    def link_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Mapping[str, Any]) -> str:
        address = str(tokens[idx].attrs['href'])
        if not _is_safe(address):  # of [text]()
            return '<a>'  # which leads nowhere
        return f'<a href="{escape(address)}" rel="noopener noreferrer nofollow" target="_blank">'

    def fence(self, tokens: Sequence[Token], idx: int, options: Any, env: Mapping[str, Any]) -> str:
        return f'<pre tabindex="0"><code>{escape(tokens[idx].content)}</code></pre>\n'

    code_block = fence

    def table_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Mapping[str, Any]) -> str:
        return '<div class="table" tabindex="0"><table>\n'

    def table_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Mapping[str, Any]) -> str:
        return '</table></div>\n'

    def th_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Mapping[str, Any]) -> str:
        return _cell(tokens[idx])

    td_open = th_open


def _cell(token: Token) -> str:
    """A cell's tag, aligned by a class: the pages allow no style in an attribute."""
    align = ALIGN.fullmatch(str(token.attrs.get('style', '')))
    return f'<{token.tag} class="align-{align[1]}">' if align else f'<{token.tag}>'
