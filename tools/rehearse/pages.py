"""A page of a study as a browser has it: its forms, the replies that it shows, whether it waits."""

import dataclasses
import urllib.parse
from collections.abc import Mapping

import lxml.html

REPLIES = ('reply-a', 'reply-b')  # ids of their headings


@dataclasses.dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        forms: by the path that they are sent to, their fields with the values that the page gives them; of radio
            buttons and named buttons, all values that can be chosen are in `options`.
        options: by path and field, the values with their labels.
        version: that forms are sent with.
        is_waiting: for replies.
        replies: texts of A and B, white space folded; None where the page shows none.
        task: what the participant writes, in words.
        code: of completion; empty before the end.
        errors: what is wrong with a form that was sent.
    """

    forms: Mapping[str, Mapping[str, str]]
    options: Mapping[str, Mapping[str, Mapping[str, str]]]
    version: int
    is_waiting: bool
    replies: tuple[str, str] | None
    task: str
    code: str
    errors: tuple[str, ...]


def read_page(content: str) -> Page:
    """The page of an HTML text.

    Raises:
        ValueError: it is no page of a participant.
    """
    document = lxml.html.document_fromstring(content)
    body = document.body
    if 'data-version' not in body.attrib:
        raise ValueError(f'expected the page of a participant, found {words(document)[:300]!r}')
    forms: dict[str, dict[str, str]] = {}
    options: dict[str, dict[str, dict[str, str]]] = {}
    for form in document.forms:
        path = urllib.parse.urlsplit(form.action).path
        forms[path], options[path] = {}, {}
        for field in form.xpath('.//input[@name] | .//textarea[@name] | .//button[@name]'):
            name, kind = field.get('name'), field.get('type')
            if kind in ('radio', 'submit'):
                label = field.getparent() if kind == 'radio' else field
                options[path].setdefault(name, {})[field.get('value')] = words(label)
            else:
                forms[path][name] = (field.text or '') if field.tag == 'textarea' else field.get('value', '')
    said = [document.xpath(f'//section[@aria-labelledby="{name}"]//div[contains(@class, "reply")]') for name in REPLIES]
    task, code = document.xpath('//details[@class="task"]'), document.xpath('//p[@class="code"]/strong')
    return Page(
        forms=forms,
        options=options,
        version=int(body.get('data-version')),
        is_waiting='data-waiting' in body.attrib,
        replies=(words(said[0][0]), words(said[1][0])) if all(said) else None,
        task=words(task[0]) if task else '',
        code=words(code[0]) if code else '',
        errors=tuple(words(item) for item in document.xpath('//div[@id="errors"]//li')),
    )


def words(element: lxml.html.HtmlElement) -> str:
    """The text of an element, white space folded."""
    return ' '.join(element.text_content().split())


def words_of(html: str) -> str:
    """As `words`, of a piece of HTML."""
    return words(lxml.html.fragment_fromstring(html, create_parent='div'))
