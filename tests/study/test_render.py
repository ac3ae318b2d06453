"""Markdown of anybody becomes HTML in which no script, style, image or address of another kind can be."""

import html.parser
import re
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from simrl.study.render import page_html, to_html

TAGS = re.compile('p|h[1-6]|strong|em|s|code|pre|blockquote|[uo]l|li|a|br|hr|span|div|table|thead|tbody|t[rhd]')
VOID = {'br', 'hr'}
ATTRIBUTES = {
    'a': {'href', 'rel', 'target'},
    'ol': {'start'},
    'pre': {'tabindex'},
    'div': {'class', 'tabindex'},
    'span': {'class'},
    'th': {'class'},
    'td': {'class'},
}
CLASSES = {'image', 'table', 'align-left', 'align-center', 'align-right'}


class Reader(html.parser.HTMLParser):
    """Reads HTML as a browser does, and refuses what must not be in it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text = ''
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert TAGS.fullmatch(tag)
        found = dict(attrs)
        assert len(found) == len(attrs)
        assert set(found) <= ATTRIBUTES.get(tag, set())
        assert found.get('class', 'table') in CLASSES
        assert found.get('tabindex', '0') == '0'
        assert re.fullmatch(r'\d+', found.get('start') or '1')
        if tag == 'a' and found:
            assert found['rel'] == 'noopener noreferrer nofollow'
            assert found['target'] == '_blank'
            assert re.match(r'(https?://|mailto:)', found['href'] or '', re.IGNORECASE)
            self.links.append(found['href'] or '')
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        assert not attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


def read(markdown: str) -> Reader:
    """What is in a text's HTML, both as a reply and as a text of a page."""
    for made in (page_html(markdown), to_html(markdown)):
        reader = Reader()
        reader.feed(str(made))
        reader.close()
        assert not reader.open
    return reader


@pytest.mark.parametrize(
    'attack',
    [
        '<script>alert(1)</script>',
        '<img src=x onerror=alert(1)>',
        '<svg/onload=alert(1)>',
        '<a href="javascript:alert(1)">x</a>',
        '<!-- x --><style>body{display:none}</style>',
        '<?php x ?><![CDATA[x]]><!DOCTYPE html>',
        '</div></section><form action=/delete method=post><button>',
        '![x](javascript:alert(1))',
        '![x](https://tracker.example/pixel.gif "t")',
        '![x](data:image/svg+xml;base64,PHN2Zz4=)',
        '![" onerror="alert(1)](x)',
        '```"><script>alert(1)</script>\nx\n```',
        '```html onload=alert(1)\n</code></pre><script>\n```',
        '&lt;script&gt;alert(1)&lt;/script&gt;',
        '&#60;script&#62;alert(1)&#60;/script&#62;',
        '| <b onclick=x> | b |\n|:-:|--:|\n| <i> | {{ 7 * 7 }} |',
        '\\<script\\>alert(1)\\</script\\>',
        '`<script>`',
        '<scr<script>ipt>alert(1)</scr</script>ipt>',
        '\0<script\0>alert(1)',
        '# <h1 id=x>\n\n=====\n\n- <li\n\n> <blockquote',
        '{{ config }} {% raw %} ${7*7}',
    ],
)
def test_html_and_images_are_text(attack):
    read(attack)
    read(f'**bold** [x]({attack}) > {attack}\n\n* {attack}\n\n    {attack}\n')


@pytest.mark.parametrize(
    'link',
    [
        '[x](javascript:alert(1))',
        '[x](JaVaScRiPt:alert(1))',
        '[x](java\tscript:alert(1))',
        '[x](&#106;avascript:alert(1))',
        '[x](javascript&colon;alert(1))',
        '[x](%6aavascript:alert(1))',
        '[x](\x01javascript:alert(1))',
        '[x](<javascript:alert(1)>)',
        '[x][1]\n\n[1]: javascript:alert(1)',
        '<javascript:alert(1)>',
        '[x](vbscript:x)',
        '[x](data:text/html,<script>alert(1)</script>)',
        '[x](file:///etc/passwd)',
        '[x](//evil.example)',
        '[x](/delete)',
        '[x](delete?csrf=1)',
        '[x](#now)',
        '[x]()',
        '[x](blob:https://a.b/c)',
    ],
)
def test_links_elsewhere_are_text(link):
    assert not read(link).links


def test_links_to_the_web_open_apart_and_attributes_cannot_be_added():
    assert read('[a](https://a.b/c?d=1&e=2) <mailto:f@g.h> [i](HTTP://j.k)').links == [
        'https://a.b/c?d=1&e=2',
        'mailto:f@g.h',
        'HTTP://j.k',
    ]
    assert read('[a](https://a.b/" onclick="x) [b](https://a.b/%22onclick=%22x "t\\" onclick=\\"x")').links == [
        'https://a.b/%22onclick=%22x'
    ]


def test_an_image_is_its_description():
    assert 'src' not in to_html('![a *cat*](https://a.b/c.png)')
    assert read('![a *cat*](https://a.b/c.png)').text.strip() == '[image: a cat]'


def test_what_models_write_is_shown():
    made = str(to_html('Roses\nViolets\n\n1. a\n2. **b**\n\n| x | y |\n|--:|---|\n| 1 | `2` |\n\n~~no~~'))
    assert 'Roses<br />\nViolets' in made
    assert '<th class="align-right">x</th>' in made
    assert '<li><strong>b</strong></li>' in made
    assert '<s>no</s>' in made
    assert 'style' not in made
    assert '<p>one two</p>' in str(page_html('one\ntwo')).replace('\n', ' ')


def test_headings_are_beneath_those_of_the_page_and_leave_no_gap():
    assert re.findall(r'<(h\d)>', str(to_html('## a\n\n#### b\n\n## c'))) == ['h3', 'h4', 'h3']
    assert re.findall(r'<(h\d)>', str(page_html('# a\n\n### b'))) == ['h1', 'h2']
    assert re.findall(r'<(h\d)>', str(page_html('# a\n\n### b', 2))) == ['h2', 'h3']
    assert re.findall(r'<(h\d)>', str(to_html('\n\n'.join(f'{"#" * n} x' for n in range(1, 7))))) == [
        *('h3', 'h4', 'h5', 'h6', 'h6', 'h6')
    ]


@pytest.mark.parametrize(
    'piece',
    [
        '> ',
        '- ',
        '1. ',
        '* * ',
        '[',
        '![',
        '](',
        '**a ',
        '_a_ ',
        '`',
        '<',
        '&',
        '\\',
        '|a',
        '# ',
        '\n> \n',
        '[a](b',
        '<a ',
        '~~',
    ],
)
def test_nested_and_broken_markdown_takes_no_long_time(piece):
    """Of the longest message that the pages take."""
    text = piece * (8000 // len(piece))
    start = time.perf_counter()
    read(text + 'x')
    assert time.perf_counter() - start < 3


def test_nothing_of_a_text_is_lost():
    words = [f'word{n}' for n in range(300)]
    markdown = ' '.join(words[:100]) + '\n\n- ' + '\n- '.join(words[100:200]) + '\n\n> <b>' + ' '.join(words[200:])
    assert re.findall(r'word\d+', read(markdown).text) == words


PIECES = '< > " \' & [ ] ( ) ! ` ``` # | -- * _ \\ : // a javascript: https://a.b script onclick= &#x3c; \u202e \0 ='
SPACES = ['\n', '\n\n', ' ', '    ', '> ', '- ']


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    st.one_of(st.lists(st.sampled_from(PIECES.split(' ') + SPACES), max_size=40).map(''.join), st.text(max_size=60))
)
def test_whatever_is_written_is_safe(markdown):
    read(markdown)
