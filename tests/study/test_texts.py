"""Files of tasks and texts: those of simrl are whole, and wrong ones are refused by file, line and field."""

import dataclasses
import re
import textwrap

import hypothesis
import hypothesis.strategies as st
import pytest

from simrl.rewards.rubric import HELPFULNESS
from simrl.study.render import page_html
from simrl.study.running import Running
from simrl.study.settings import TaskSettings
from simrl.study.text_files import TASKS, TEXTS, TextError, read_tasks, read_texts
from simrl.study.texts import fill
from simrl.study.yaml_files import read_yaml
from tests.study.studies import MemoryStore, echo, settings

SPECIFIC = {'limit', 'found', 'tries_left', 'document_type'}


def all_texts(value):
    if isinstance(value, str):
        return [value]
    if isinstance(value, tuple):
        return [text for x in value for text in all_texts(x)]
    if dataclasses.is_dataclass(value):
        return [text for own in dataclasses.fields(value) for text in all_texts(getattr(value, own.name))]
    return []


def test_36_tasks_are_shipped():
    tasks = read_tasks()
    assert [(own.id, len(own.tasks), len(own.questions)) for own in tasks.types] == [
        ('blog_post', 12, 3),
        ('creative_writing', 12, 3),
        ('personal_statement', 12, 3),
    ]
    assert len({task.brief for own in tasks.types for task in own.tasks}) == 36
    for own in tasks.types:
        assert tasks.type(own.id) is own
        assert own.name.startswith('a ')
        for task in own.tasks:
            assert tasks.task(task.id) is task
            assert 15 <= len(task.brief.split()) <= 60
    with pytest.raises(KeyError):
        tasks.task('none')


def test_texts_are_filled_with_numbers_and_fields():
    texts = read_texts()
    task = TaskSettings(exchanges=7, min_words=1234)
    assert texts.unfilled() == tuple(field.name for field in dataclasses.fields(texts.fields))
    filled = dataclasses.replace(
        texts, fields=dataclasses.replace(texts.fields, **dict.fromkeys(texts.unfilled(), 'Somebody & Co {exchanges}'))
    )
    assert filled.unfilled() == ()
    assert '[payment]' in texts.filled(task).consent
    filled = filled.filled(task)
    assert 'at least 7 messages' in filled.consent
    assert '1,234 words' in filled.final
    assert 'paid Somebody &amp; Co {exchanges}' in page_html(filled.consent)  # what is filled in has no placeholders
    left = {
        name
        for text in all_texts(dataclasses.replace(filled, fields=texts.fields))
        for name in re.findall(r'\{(\w+)\}', text)
    }
    assert left == SPECIFIC | {'exchanges'}
    of_type = filled.of_type('a sonnet')
    assert 'write **a sonnet**' in of_type.choose_task
    assert (
        fill(of_type.errors.too_long, limit=10, found=12) == 'Please shorten this to at most 10 characters. It has 12.'
    )


def test_the_criteria_are_those_of_the_reward():
    texts = read_texts()
    assert [criterion.name for criterion in texts.criteria] == ['Intent', 'Usefulness', 'Clarity']
    for criterion in texts.criteria:
        assert f'\n{criterion.name}:' in HELPFULNESS.text


def test_questions_have_one_right_answer_not_always_at_one_place():
    texts = read_texts()
    assert len({question.right for question in texts.check}) == len(texts.check) == 3
    for question in (*texts.check, texts.attention):
        assert len(set(question.options)) == len(question.options) >= 3
    assert texts.attention.options[texts.attention.right] in texts.attention.text  # it says which to choose
    assert {texts.closing(outcome) for outcome in ('completed', 'withdrawn')} == {
        texts.closings.completed,
        texts.closings.withdrawn,
    }


def test_each_page_has_one_first_heading():
    texts = read_texts()
    pages = [
        texts.consent,
        texts.instructions,
        texts.check_intro,
        texts.choose_task,
        texts.training,
        texts.conversation,
    ]
    for page in (*pages, texts.final, texts.withdraw, *all_texts(texts.closings)):
        assert str(page_html(page)).count('<h1>') == 1
        assert page_html(page).startswith('<h1>')


def test_texts_name_no_model_and_no_side():
    """On a phone one reply is beneath the other."""
    told = ' '.join(' '.join(all_texts(read_texts())).lower().split())
    assert not re.search(r'side by side|\bon the (left|right)|\b(left|right)(-hand|most| (one|reply|side))', told)
    assert not re.search(r'\b(trained|model|simulat|baseline|better model|chatgpt)', told)


def test_a_file_changes_what_it_has(tmp_path):
    path = tmp_path / 'own.yaml'
    path.write_text(
        textwrap.dedent("""
            language: pt-BR
            title: "  Mine  "
            fields:
              contact: me@here.org
            labels:
              send: Off with it
            check:
              - text: Is it so?
                options: ["yes", "no"]
                right: "no"
        """)
    )
    own, shipped = read_texts(path), read_texts()
    assert own.title == 'Mine'
    assert own.fields.contact == 'me@here.org'
    assert own.labels == dataclasses.replace(shipped.labels, send='Off with it')
    assert [(question.options, question.right) for question in own.check] == [(('yes', 'no'), 1)]
    assert own.instructions == shipped.instructions
    assert set(shipped.unfilled()) - set(own.unfilled()) == {'contact'}


@pytest.mark.parametrize(
    ('content', 'line', 'field', 'problem'),
    [
        ('title: A\nwelcom: B', 2, 'welcom', 'found an unknown field'),
        ('title: A\nlabels:\n  sent: B', 3, 'labels.sent', "(did you mean 'send'?)"),
        ('title: A\nconsent: B\ntitle: C', 3, 'title', 'expected it once, found it on line 1 too'),
        ('title: A\nconsent: ""', 2, 'consent', 'expected a text, found an empty one'),
        ('title: A\nconsent: |\n\nfinal: x', 2, 'consent', 'expected a text, found an empty one'),
        ('title: A\nconsent:', 2, 'consent', 'expected a text, found nothing'),
        ('title: 2027-01-01', 1, 'title', "expected a text, found '2027-01-01' (a date) (a text"),
        (
            'title: 12',
            1,
            'title',
            "expected a text, found '12' (a number) (a text that reads like that goes in quotes)",
        ),
        ('labels:\n  tie: yes', 2, 'labels.tie', "found 'yes' (yes or no)"),
        ('title: [a, b]', 1, 'title', 'expected a text, found a list'),
        ('title: {a: b}', 1, 'title', 'expected a text, found fields'),
        ('labels: x', 1, 'labels', "expected fields, found 'x' (a text)"),
        ('- a', 1, '', 'expected fields, found a list'),
        ('criteria: x', 1, 'criteria', 'expected a list'),
        ('criteria: []', 1, 'criteria', 'expected at least one, found an empty list'),
        ('criteria:\n  - name: x', 2, 'criteria[0]', "expected the field 'text', found name"),
        ('title: A\nvote: Of {exchange}', 2, 'vote', 'found {exchange} (braces around one word are one)'),
        ('vote: Of {limit}', 1, 'vote', 'found {limit}'),
        ('fields:\n  payment: "{duration}"', 2, 'fields.payment', 'expected placeholders of none here'),
        ('title: !!python/object/apply:os.system ["x"]', 1, 'title', 'expected a text, found a list'),
        ('title: !!python/name:os.system x', 1, 'title', 'expected a text'),
        ('title: !mine x', 1, 'title', 'expected a text, found'),
        ('? [a]\n: b', 1, 'a list', 'unknown field'),
        ('title: "x', 1, 'title', 'expected a quote at the end of the text'),
        ("title: 'It's'", 1, 'title', 'expected nothing after a closing quote or bracket'),
        ('title: {Hello} there', 1, 'title', "closing quote or bracket, and all lines .* found 'title: {Hello} there'"),
        ('title: {payment}', 1, 'title', 'expected a text, found fields (a text that reads like that goes in quotes)'),
        ('vote: {x', 1, 'vote', 'expected the ] or } that ends'),
        ('vote: A\ncheck:\n  - text: Is it? Or: not', 3, 'check[0].text', "in quotes, needed where it has ': ' in it"),
        ('title: ? what', 1, 'title', "or begins with one of .*found 'title: ? what'"),
        ('attention:\n  options: [Why?, Who?]', 2, 'attention.options[0]', 'expected texts in quotes inside [ ]'),
        ('attention:\n  options:\n    - Why: a', 3, 'attention.options[0]', 'found fields (a text that reads like'),
        ('labels:\n  send: A\n tie: B', 3, 'labels', 'expected a line that begins where'),
        ('title: @x', 1, 'title', 'expected a text in quotes'),
        ('title: "a\\q"', 1, 'title', "expected 'single quotes' around a text with \\ in it"),
        ('title\nvote: x', 2, '', "expected a field, a colon and a space; found 'vote: x'"),
        ('title: A\nvote', 2, 'title', 'expected a field, a colon and a space'),
        ('title: A\n\tvote: x', 2, 'title', 'expected spaces at the start of a line'),
        ('title: A\nvote: \x00', 2, '', 'expected YAML, found the character U+0000'),
        ('labels:\n  tie: *x', 2, 'labels.tie', 'expected a text in quotes'),
        ('title: A\n---\ntitle: B', 2, '', 'expected one set of fields'),
        ('language: German', 1, 'language', "expected a tag such as en, de or pt-BR, found 'German'"),
        ('title: A\nattention:\n  text: Choose!', 2, 'attention', "beside text, and a text without 'Once a month'"),
        (
            'attention:\n  options: [Often, Rarely]\n  right: Often',
            1,
            'attention',
            'beside options and right, and a text without',
        ),
        ('check:\n  - {text: a, options: [b], right: b}', 2, 'check[0].options', 'expected two or more that differ'),
        ('check:\n  - {text: a, options: [b, b], right: b}', 2, 'check[0].options', 'expected two or more that differ'),
        ('attention:\n  right: Sometimes', 2, 'attention.right', "found 'Sometimes'"),
        ('attention:\n  options: [Rarely, Often]', 1, 'attention.right', "found 'Once a month'"),
    ],
)
def test_wrong_texts_are_refused_by_line(tmp_path, content, line, field, problem):
    path = tmp_path / 'own.yaml'
    path.write_text(content)
    with pytest.raises(TextError) as error:
        read_texts(path)
    told = str(error.value)
    assert '\n' not in told
    assert told.startswith(f'{path}, line {line}: {field}')
    assert all(part in told for part in problem.split('.*'))


@pytest.mark.parametrize(
    ('content', 'problem'),
    [
        (b'', 'expected fields, found an empty file'),
        (b'# nothing', 'expected fields, found an empty file'),
        (b'title: \xff', 'expected UTF-8, found the byte 0xff'),
        (b'title: ' + b'[' * 500, 'expected a few levels, found hundreds'),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path, content, problem):
    path = tmp_path / 'own.yaml'
    path.write_bytes(content)
    with pytest.raises(TextError, match=re.escape(f'{path}: {problem}')):
        read_texts(path)


PIECES = 'title:_A|labels:|__send:_B|check:|-_|:_|"|{|}|[|]|&a|*a|>|#|!!int_|---|?_|<<:_|{limit}|12|null|_'.replace(
    '_', ' '
)
ODD = ['\n', '\t', '\0', '\x85', '|', 'fields: {contact: x}']


@hypothesis.settings(max_examples=100, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(st.lists(st.sampled_from(PIECES.split('|') + ODD), max_size=15).map(''.join))
def test_any_file_is_read_or_refused_in_a_line(tmp_path, content):
    path = tmp_path / 'own.yaml'
    path.write_text(content, encoding='utf-8')
    try:
        told = read_texts(path).title
    except TextError as error:
        told = str(error)
    assert len(told.splitlines()) == 1


def test_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(TextError, match='expected a file that can be read, found: No such file'):
        read_tasks(tmp_path / 'none.yaml')
    with pytest.raises(TextError, match='found: Is a directory'):
        read_tasks(tmp_path)


TASK = """\
types:
  - id: {first}
    name: a poem
    questions: [Why not]
    tasks:
      - {{id: sea, title: The sea, brief: Write it.}}
      - {{id: {second}, title: {title}, brief: {brief}}}
"""


@pytest.mark.parametrize(
    ('changed', 'line', 'field', 'problem'),
    [
        ({'second': 'sea'}, 7, 'types[0].tasks[1].id', "expected another id than of line 6, found 'sea' again"),
        ({'title': 'The sea'}, 7, 'types[0].tasks[1].title', 'expected another title in poem than of line 6'),
        ({'second': 'The Hills'}, 7, 'types[0].tasks[1].id', "found 'The Hills'"),
        ({'first': '../etc'}, 2, 'types[0].id', 'expected small letters, digits'),
        ({'brief': "''"}, 7, 'types[0].tasks[1].brief', 'found an empty one'),
    ],
)
def test_wrong_tasks_are_refused_by_line(tmp_path, changed, line, field, problem):
    path, right = tmp_path / 'tasks.yaml', {'first': 'poem', 'second': 'hills', 'title': 'Hills', 'brief': 'Write it.'}
    path.write_text(TASK.format(**right))
    assert [task.id for task in read_tasks(path).types[0].tasks] == ['sea', 'hills']
    path.write_text(TASK.format(**right | changed))
    with pytest.raises(TextError, match=re.escape(f'{path}, line {line}: {field}: ')) as error:
        read_tasks(path)
    assert problem in str(error.value)


def test_the_hash_of_the_config_follows_what_is_in_the_files_and_not_where_they_are(tmp_path):
    def hash_of(told, **fields):
        return Running(settings(**fields), MemoryStore(), read_tasks(), told, echo).config_hash

    texts = read_texts()
    assert hash_of(texts) == hash_of(texts, texts=tmp_path / 'own.yaml', tasks=tmp_path / 'tasks.yaml')
    assert hash_of(texts) != hash_of(dataclasses.replace(texts, vote='Which one?'))


def test_the_shipped_files_are_read_with_lines():
    _, lines = read_yaml(TASKS, type(read_tasks()))
    written = TASKS.read_text().splitlines()
    assert 'id: mentor' in written[lines.of['types[2].tasks[9].id'] - 1]
    assert TEXTS.exists()
