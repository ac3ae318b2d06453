"""What a prompted simulator is told of a person: by example, from files that are refused where they are wrong."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simrl.conversations.records import Conversation, Example, Message
from simrl.conversations.templates import chat_from_huggingface
from simrl.simulators import prompts
from simrl.simulators.person import (
    FewShotSettings,
    about,
    draw,
    few_shot_part,
    guideline_part,
    intent_part,
    persona_part,
    read_personas,
    spoken_of,
)
from simrl.simulators.prompts import FEW_SHOT, GUIDELINES, INTENT, MANNER, NOTHING_KNOWN
from simrl.simulators.role_play import RolePlaySettings, role_play_text
from tests.tiny import byte_tokenizer

EXAMPLE = Example('e', 'hello', 'to buy a {signal}', 7, 'test', 'train')
CHAT = chat_from_huggingface(byte_tokenizer())


def of_seed(seed: int) -> Example:
    return dataclasses.replace(EXAMPLE, persona_seed=seed)


def test_every_field_is_filled_once_and_what_fills_it_stays_text():
    settings = RolePlaySettings(signal='[END]', instructions='{signal} {person} {opening} {other}')
    opening = dataclasses.replace(EXAMPLE, opening='{person} {signal}')
    text = role_play_text(settings, about([intent_part('required')]))(opening)
    assert text == f'[END] {INTENT}\nto buy a {{signal}} {{person}} {{signal}} {{other}}'


def test_the_prompts_of_today_say_the_same_as_before():
    assert role_play_text(RolePlaySettings())(EXAMPLE) == prompts.INSTRUCTIONS.replace('{signal}', '[END]').replace(
        '{opening}', 'hello'
    )


@pytest.mark.parametrize(
    ('instructions', 'opening', 'person', 'message'),
    [
        (prompts.INSTRUCTIONS, 'given', True, r'expected the field \{person\}, found none'),
        (prompts.PERSON_INSTRUCTIONS, 'given', False, r'expected no field \{person\}, found one'),
        (prompts.PERSON_INSTRUCTIONS, 'written', True, r'expected no field \{opening\}, found one'),
        (prompts.OPENING_INSTRUCTIONS, 'given', True, r'expected the field \{opening\}, found none'),
    ],
)
def test_instructions_have_the_fields_that_are_filled(instructions, opening, person, message):
    settings = RolePlaySettings(instructions=instructions)
    with pytest.raises(ValueError, match=message):
        role_play_text(settings, about([]) if person else None, opening)


def test_an_intent_is_told_where_it_is_known_or_of_every_example():
    unknown = dataclasses.replace(EXAMPLE, intent=None)
    assert about([intent_part('where_known')])(unknown) == about([intent_part('none')])(EXAMPLE) == NOTHING_KNOWN
    assert 'to buy' in about([intent_part('where_known')])(EXAMPLE)
    with pytest.raises(ValueError, match='example e: expected an intent, found none'):
        intent_part('required')(unknown)


def test_guidelines_are_drawn_uniformly_by_the_seed_alone():
    part = guideline_part(list(GUIDELINES))
    found = [part(of_seed(seed)) for seed in range(4000)]
    assert found == [part(dataclasses.replace(of_seed(seed), id='x', opening=None)) for seed in range(4000)]
    for text in GUIDELINES.values():
        assert abs(found.count(f'{MANNER}\n{text}') - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5
    assert {guideline_part(['typo'])(of_seed(seed)) for seed in range(9)} == {f'{MANNER}\n{GUIDELINES["typo"]}'}


@given(st.integers(0, 2**31 - 1), st.integers(1, 50))
def test_draws_of_one_purpose_are_below_their_number(seed, number):
    assert 0 <= draw(seed, 'a', number) < number
    assert draw(seed, 'a', number) == draw(seed, 'a', number)


def test_draws_of_two_purposes_are_independent():
    pairs = [(draw(seed, 'guideline', 4), draw(seed, 'persona', 4)) for seed in range(4000)]
    for pair in itertools.product(range(4), repeat=2):
        assert abs(pairs.count(pair) - 250) < 5 * 250**0.5


def test_personas_are_read_from_lines_and_from_rows(tmp_path):
    text, rows = tmp_path / 'personas.txt', tmp_path / 'personas.jsonl'
    text.write_bytes('\ufeffA nurse.\n Likes trains.\u2028Really. \n'.encode())  # after a byte order mark
    rows.write_text('{"persona": "A nurse."}\n{"persona": "Likes trains.\\u2028Really.", "id": 3}\n')
    assert read_personas(text) == read_personas(rows) == ['A nurse.', 'Likes trains.\u2028Really.']
    part = persona_part(read_personas(text))
    assert {part(of_seed(seed)).splitlines()[1] for seed in range(20)} == {'A nurse.', 'Likes trains.'}


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('p.txt', b'one\n\ntwo\n', r'p\.txt, line 2: expected a persona, found an empty one'),
        ('p.txt', b'one\n\xff\n', r'p\.txt, line 2: expected UTF-8'),
        ('p.txt', b'', r'p\.txt: expected at least one persona, found none'),
        ('p.jsonl', b'{"persona": "a"}\n{"persona": \n', r'p\.jsonl, line 2: expected JSON'),
        ('p.jsonl', b'[' * 100_000 + b'\n', r'p\.jsonl, line 1: expected JSON'),
        ('p.jsonl', b'{"persona": "a\\ud800"}\n', r"p\.jsonl, line 1: expected Unicode, found half .* '\\ud800'"),
        ('p.jsonl', b'{"person": "a"}\n', r"p\.jsonl, line 1: expected an object with the field 'persona'"),
        ('p.jsonl', b'"a"\n', r"p\.jsonl, line 1: expected an object with the field 'persona'"),
        ('p.jsonl', b'{"persona": 3}\n', r'p\.jsonl, line 1: persona: expected a string, found int'),
        ('p.jsonl', b'{"persona": " "}\n', r'p\.jsonl, line 1: expected a persona, found an empty one'),
        ('p.csv', b'a\n', r'p\.csv: expected a name that ends in \.txt or \.jsonl'),
    ],
)
def test_rows_that_are_no_persona_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_personas(tmp_path / name)


PEOPLE = [
    Conversation(
        id=f'c{i}',
        source='made up',
        split='train',
        messages=tuple(
            Message(('user', 'assistant')[j % 2], f'line {i} {j}' * (1 + 20 * (i == 3)), truncated=i == 4 and j == 2)
            for j in range(6 if i else 2)
        ),
    )
    for i in range(12)
]


def shown(text: str) -> list[str]:
    heading, *lines = text.split('\n')
    assert heading == FEW_SHOT
    return [line.removeprefix('- ') for line in lines]


def test_few_shot_shows_whole_messages_of_other_people_within_its_budget():
    people = spoken_of(PEOPLE, openings=False)
    assert [person.id for person in people] == [f'c{i}' for i in range(1, 12)], 'the first has an opening alone'
    assert people[3].messages == ('line 4 4',), 'a cut message is not shown'
    settings = FewShotSettings(messages=4, tokens=60)
    part = few_shot_part(settings, people, CHAT)
    seen: set[str] = set()
    for seed in range(200):
        own = dataclasses.replace(of_seed(seed), id='c5')
        text = part(own)
        assert text == part(own)
        lines = shown(text)
        assert 1 <= len(lines) <= 4
        assert len({line.split()[1] for line in lines}) == len(lines), 'one message of a person'
        assert sum(len(CHAT.encode(f'- {line}\n')) for line in lines) <= settings.tokens
        seen |= set(lines)
    assert {line.split()[1] for line in seen} == {str(i) for i in range(1, 12) if i not in (3, 5)}
    assert {line.split()[2] for line in seen} == {'2', '4'}
    twin = dataclasses.replace(EXAMPLE, id='other', opening='line 6 0')
    assert all('line 6' not in part(dataclasses.replace(twin, persona_seed=seed)) for seed in range(200))


def test_few_shot_of_simulators_that_open_conversations_shows_openings_too():
    assert spoken_of(PEOPLE, openings=True)[0].messages == ('line 0 0',)


def test_few_shot_without_a_message_that_fits_is_refused():
    part = few_shot_part(FewShotSettings(messages=4, tokens=3), spoken_of(PEOPLE, openings=False), CHAT)
    with pytest.raises(ValueError, match='example e: expected a message of another person of at most 3 tokens'):
        part(EXAMPLE)
