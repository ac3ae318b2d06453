"""Chat templates of Hugging Face tokenizers: probes in, the constant token runs of a `Chat` out.

1. The template is rendered with probe messages. The text around them gives the headers and ends of turn.
2. Each place of content is given the tokenizer that encodes a text there as the whole rendering is encoded.
3. Rendering message by message must equal the template's rendering of the whole, token for token, or it is an error.
   Except: where a message starts or ends with punctuation and the template writes text beside it, some tokenizers join
   the two ('.' and the line end of Tulu's header). A message's tokens are those of its own text, as a model samples
   them, and are never joined.
"""

import dataclasses
import itertools
import string
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Literal

from simrl.conversations.chat import Chat, Place
from simrl.conversations.huggingface_tokenizer import HuggingFaceTokenizer, Spans, moved
from simrl.conversations.template_probes import PROBES, Rendering, Template, render_probes

if TYPE_CHECKING:  # importing it takes a second, and the concierge world has no need of it
    import transformers

Rewrites = Literal['error', 'keep', 'omit']


def chat_from_huggingface(
    tokenizer: 'transformers.PreTrainedTokenizerBase', *, rewrites: Rewrites = 'error', date: str | None = None
) -> Chat:
    """Finds the constant runs of a tokenizer's chat template by rendering probes, and checks them against it.

    Args:
        tokenizer: a fast tokenizer with a chat template; of several named ones 'default' is taken.
        rewrites: rule for a template whose assistant header before a reply differs from the one in history. Qwen3 with
            thinking off, for example, adds an empty think block before a reply. 'error'; 'keep' uses the header before
            a reply everywhere; 'omit' uses the header in history everywhere.
        date: today's date for templates that write it, such as '26 Jul 2024'; others ignore it.

    Raises:
        ValueError: no template; a template with today's date but no `date`; rewritten history without a rule; replies
            that do not end with a special token; any other difference between rendering by message and as a whole.
    """
    if rewrites not in ('error', 'keep', 'omit'):
        raise ValueError(f"rewrites: expected 'error', 'keep' or 'omit', found {rewrites!r}")
    return _build(Template.of(tokenizer, date), rewrites)


@dataclasses.dataclass(frozen=True)
class _Survey:
    """The text of a template around messages, without leads and trails, which are encoded with the content."""

    before_system: str  # text before the system message; empty without one
    opening: str  # text before the first message, after a given system text
    user: str  # text between an assistant's content and a user's
    assistant: str  # text between a user's content and an assistant's, in history
    generated: str  # text between a user's content and a reply to be generated
    end: str  # text after the last assistant's content


Places = Mapping[Place, HuggingFaceTokenizer]


def _places(content: HuggingFaceTokenizer, renderings: Sequence[Rendering]) -> dict[Place, HuggingFaceTokenizer]:
    """The tokenizer of each place, by what the template writes before and after content there."""
    longest = renderings[-2]
    found: dict[Place, HuggingFaceTokenizer] = {}
    for number, place in reversed(list(enumerate(longest.places))):  # later headers before the first one
        if place not in found:
            before, after = longest.runs[number : number + 2]
            # A space that is not written before a reply to be generated is the reply's.
            leads = (' ', '') if before == longest.runs[-1] + ' ' else ('', ' ')
            found[place] = _place(content, before, after, [lead for lead in leads if before.endswith(lead)])
    return found


def _place(content: HuggingFaceTokenizer, before: str, after: str, leads: Sequence[str]) -> HuggingFaceTokenizer:
    """The tokenizer of the place between two texts; the plain one if none encodes as the whole is encoded."""
    special = next((start for i, start, _ in content.template_spans(after) if i in content.added), 0)
    trail = after[:special] if after[:special].isspace() else ''
    for inside in (False, True)[: 1 + content.has_prefix]:
        for lead in leads:
            place = content.at(lead, trail, inside=inside)
            run = content.encode_template(before.removesuffix(lead))
            if all(
                run + content.at(lead, inside=inside).encode_unchecked(probe) == content.encode_template(before + probe)
                for probe in (*PROBES, *string.ascii_letters)  # a word that the tokenizer knows joins with a space
                if probe[0].isalnum()
            ):
                return place
    return content.at('', trail)


def _stripped(rendering: Rendering, places: Places) -> list[str]:
    """The texts around contents without leads and trails; also of a reply to be generated, if there is one."""
    tokenizers = [places[place] for place in rendering.places]
    leads = [*(tokenizer.lead for tokenizer in tokenizers), places['assistant'].lead]
    trails = ['', *(tokenizer.trail for tokenizer in tokenizers)]
    return [
        run.removeprefix(trail).removesuffix(lead)
        for run, lead, trail in zip(rendering.runs, leads, trails, strict=True)
    ]


def _survey(name: str, renderings: Sequence[Rendering], places: Places) -> _Survey:
    """The text around contents, or an error if it varies."""
    seen: dict[str, set[str]] = {field.name: set() for field in dataclasses.fields(_Survey)}
    for rendering in renderings:
        runs = _stripped(rendering, places)
        if not rendering.with_system:
            runs.insert(0, '')
        length = len(runs) - 2
        seen['before_system'].add(runs[0])
        seen['opening'].add(runs[1])
        for i, run in enumerate(runs[2:], start=1):  # run i precedes message i, or is the tail
            if i % 2 == 0:
                seen['end' if i == length else 'user'].add(run)
            else:  # a template may render the last reply as in history or as a reply to be generated
                seen['generated' if i >= length - 1 else 'assistant'].add(run)
    if not seen['generated'] <= seen['assistant']:
        seen['generated'] -= seen['assistant']
    for place, found in seen.items():
        if len(found) != 1:
            raise ValueError(
                f'{name}: expected the chat template to write the same around every message, found for {place!r}: '
                f'{sorted(found)}'
            )
    return _Survey(**{place: found.pop() for place, found in seen.items()})


def _build(template: Template, rewrites: Rewrites) -> Chat:
    name = template.name
    content = HuggingFaceTokenizer(template.tokenizer)
    renderings = render_probes(template, with_system=False)
    places = _places(content, renderings)
    plain = _survey(name, renderings, places)

    def tokens(run: str) -> list[int]:
        return content.encode_template(run, inside=True)

    assistant = plain.assistant
    if plain.generated != plain.assistant:
        if rewrites == 'error':
            raise ValueError(
                f'{name}: the chat template rewrites history: before a reply it writes {plain.generated!r}, '
                f"in history {plain.assistant!r}. Set `rewrites` to 'keep' (the first) or 'omit' (the second)"
            )
        if tokens(plain.generated)[:1] != tokens(plain.assistant)[:1]:
            raise ValueError(
                f'{name}: the message before a reply ends with {plain.generated!r}, in history with {plain.assistant!r}'
            )
        assistant = plain.generated if rewrites == 'keep' else plain.assistant

    user_end, *assistant_header = tokens(assistant) or [-1]
    assistant_end, *user_header = tokens(plain.user) or [-1]
    if user_end < 0:
        raise ValueError(f"{name}: expected text at the end of the user's message, found ''")
    if assistant_end not in content.added:
        raise ValueError(
            f"{name}: expected a special token at the end of the assistant's message, found {plain.user!r}"
        )
    if tokens(plain.end)[:1] != [assistant_end]:
        raise ValueError(f'{name}: the last message ends with {plain.end!r}, the others with {plain.user!r}')
    default_prefix, first_headers = _first_headers(name, content, plain, user_end, assistant_header)
    for rendering in renderings:
        _check(name, content, rendering, places)

    runs = dataclasses.astuple(plain)
    system_header: tuple[int, ...] | None = None
    system_end, reason = user_end, ''
    headers_after_system: dict[str, tuple[int, ...]] = {}
    try:
        renderings_with_system = render_probes(template, with_system=True)
        places_with_system = _places(content, renderings_with_system)
        survey = _survey(name, renderings_with_system, places_with_system)
        for rendering in renderings_with_system:
            _check(name, content, rendering, places_with_system)
    except ValueError as error:
        reason = str(error)
    else:
        end, *first = tokens(survey.opening) or [-1]
        around = [dataclasses.replace(x, before_system='', opening='') for x in (plain, survey)]
        if around[0] != around[1]:
            reason = 'it writes other headers when one is given'
        elif end < 0:
            reason = 'it writes nothing after one'
        else:
            system_header, system_end = tuple(content.encode_template(survey.before_system)), end
            headers_after_system = {'user': tuple(first)} if first != user_header else {}
            places |= {place: places_with_system[place] for place in ('system', 'first')}
            runs += dataclasses.astuple(survey)
    # Text must not pose as a header, even where the tokenizer does not call its tokens special. A think block that is
    # only written before a reply is ordinary text elsewhere.
    written = {i for run in runs if run != plain.generated or run == plain.assistant for i in tokens(run)}
    if not content.special.issuperset(written & content.added.keys()):
        content = HuggingFaceTokenizer(template.tokenizer, written)
    lead, trail = (max(getattr(tokenizer, part) for tokenizer in places.values()) for part in ('lead', 'trail'))
    tokenizers = {place: content.at(x.lead, x.trail, inside=x.inside) for place, x in places.items()}
    tokenizer = tokenizers['user'].stripping(lead, trail)
    return Chat(
        tokenizer=tokenizer,
        end_of_turn={'user': user_end, 'assistant': assistant_end},
        headers={'user': tuple(user_header), 'assistant': tuple(assistant_header)},
        first_headers=first_headers,
        default_prefix=default_prefix,
        system_header=system_header,
        system_end=system_end,
        no_system_reason=reason,
        reserved=_reserved(name, content),
        elsewhere={place: x for place, x in tokenizers.items() if not x.encodes_as(tokenizer)},
        headers_after_system=headers_after_system,
    )


def _first_headers(
    name: str, content: HuggingFaceTokenizer, plain: _Survey, user_end: int, assistant_header: list[int]
) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """The default prefix: the opening without the header in it; and what follows it before the first message."""
    (_, _, end), *header = content.template_spans(plain.user, inside=True)
    pairs = zip(reversed(plain.opening), reversed(plain.user[end:]), strict=False)
    common = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    opening = content.template_spans(plain.opening)
    start = next((k for k, span in enumerate(opening) if span[1] >= len(plain.opening) - common), len(opening))
    # The footer is the header's text after an end-of-turn, which is not written before the first message.
    footer = [i for i, begin, _ in header if begin < len(plain.user) - common] if user_end in content.added else []
    if (header and start == len(opening)) or assistant_header[: len(footer)] != footer:
        raise ValueError(
            f'{name}: the first header {plain.opening!r} and later ones {plain.user!r} have no common form'
        )
    ids = tuple(i for i, *_ in opening)
    return ids[:start], {'user': ids[start:], 'assistant': tuple(assistant_header[len(footer) :])}


def _check(name: str, content: HuggingFaceTokenizer, rendering: Rendering, places: Places) -> None:
    """Refuses runs and contents whose tokens differ from those of the whole rendering."""
    *runs, _ = _stripped(rendering, places)
    ours: Spans = []
    may_join: set[int] = set()  # starts and ends of contents
    at = 0
    for run, text, place in zip(runs, rendering.contents, rendering.places, strict=True):
        ours += moved(content.template_spans(run, inside=at > 0), at)
        at += len(run)
        if not text[0].isalnum():
            may_join.add(at)
        ours += moved(places[place].content_spans(text), at)
        at += len(places[place].lead + text + places[place].trail)
        if not text[-1].isalnum():
            may_join.add(at)
    whole_text = ''.join(part for pair in zip(rendering.runs, rendering.contents, strict=False) for part in pair)
    whole_text += rendering.runs[-1]
    ours += moved(content.template_spans(whole_text[at:], inside=True), at)
    whole = content.template_spans(whole_text)
    i = j = 0
    while i < len(whole) and j < len(ours) and (joined := _after_join(whole[i:], ours[j:], may_join)) is not None:
        i, j = i + joined[0], j + joined[1]
    if (i, j) != (len(whole), len(ours)):
        before = content.decode([k for k, *_ in whole[max(0, i - 8) : i]])
        raise ValueError(
            f'{name}: tokens of the whole rendering differ from those of its parts at token {i}, after {before!r}: '
            f'{[k for k, *_ in whole[i : i + 4]]} against {[k for k, *_ in ours[j : j + 4]]}'
        )


def _after_join(whole: Spans, ours: Spans, may_join: Set[int]) -> tuple[int, int] | None:
    """Returns the numbers of tokens to step over: one of each if equal, those of a join, or None if they differ."""
    if whole[0][0] == ours[0][0]:
        return 1, 1
    i = j = 0
    while whole[i][2] != ours[j][2]:
        if whole[i][2] < ours[j][2]:
            i += 1
        else:
            j += 1
        if i == len(whole) or j == len(ours):
            return None
    start = min(whole[0][1], ours[0][1])
    return (i + 1, j + 1) if any(start < bound < whole[i][2] for bound in may_join) else None


def _reserved(name: str, content: HuggingFaceTokenizer) -> frozenset[int]:
    """Ids that no text encodes to; checks that no text encodes to a special token."""
    for i in sorted(content.special):
        text = content.added[i].content
        if any(i in content.encode_unchecked(written) for written in (text, f'a{text}b', f' {text} ')):
            raise ValueError(f'{name}: the text {text!r} in a message would become the special token {i}')
    return content.special | content.without_text
