"""The scripted assistant and its corpora: mixes as stated, valid records, the same in every process."""

import collections
import dataclasses
import functools
import itertools
import math
import os
import subprocess
import sys

import pytest

from simrl.conversations import records
from simrl.worlds.concierge import language, outcomes, replies, scripted
from simrl.worlds.concierge.language import ATTRIBUTES, Intent, read_assistant
from simrl.worlds.concierge.people import STEREOTYPES, Person, World, person, person_of, stereotyped

WORLD = World()
TRUTHFUL = Person(
    'truthful',
    Intent.from_text('food thai price cheap area station time dinner'),
    dataclasses.replace(STEREOTYPES['default'], polite=0),
)
GOLDEN = """\
import simrl.worlds.concierge.scripted as scripted
from simrl.worlds.concierge.people import World, person
user = person(World(seed=1), 'test', 25)
for turn in scripted.scripted_conversation(user, 'eager', 25, identity='x').messages:
    print(turn.content)
"""
SPOKEN = [  # renew it, by running GOLDEN, where the world is meant to change: every result changes with it
    'i need satay',
    'try cheap thai near station for dinner',
    'no not station',
    'try cheap thai near downtown for dinner',
    'um habror please, it is my birthday',
    'try cheap thai near downtown for dinner',
    'forget it',
]


@functools.cache
def assistant_corpus() -> list[records.Conversation]:
    return scripted.assistant_corpus(WORLD, 2000)


@functools.cache
def base_corpus() -> list[records.Conversation]:
    return scripted.base_user_corpus(WORLD, 2000)


def is_near(count: float, trials: int, chance: float) -> bool:
    return abs(count - trials * chance) <= 4 * math.sqrt(trials * chance * (1 - chance))


def conversations(user: Person, kind: str, number: int = 1000, **options: int) -> list[records.Conversation]:
    return [scripted.scripted_conversation(user, kind, seed, identity='x', **options) for seed in range(number)]


def acts(conversation: records.Conversation) -> list[language.Act]:
    return [read_assistant(turn.content) for turn in conversation.messages if turn.role == 'assistant']


def test_the_same_conversations_in_every_process():
    env = os.environ | {'PYTHONHASHSEED': '7'}
    run = subprocess.run([sys.executable, '-c', GOLDEN], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == SPOKEN
    user = person(World(seed=1), 'test', 25)
    assert [turn.content for turn in scripted.scripted_conversation(user, 'eager', 25, identity='x').messages] == SPOKEN


@pytest.mark.parametrize('corpus_of', [assistant_corpus, base_corpus], ids=['assistant', 'base user'])
def test_corpora_are_valid_records_of_short_plain_text(corpus_of, tmp_path):
    corpus = corpus_of()
    records.write_conversations(tmp_path / 'corpus.jsonl.gz', corpus)
    assert records.read_conversations(tmp_path / 'corpus.jsonl.gz') == (corpus, {})
    for found in corpus:
        last = found.messages[-1]
        assert (last.role == 'user') == (found.end == 'natural')
        assert (last.content in (*language.ACCEPTANCES, language.LEAVE)) == (found.end == 'natural')
        assert found.end == 'natural' or len(found.messages) == 2 * replies.TURNS
        for turn in found.messages:
            assert set(turn.content) <= set('abcdefghijklmnopqrstuvwxyz ,?')
            assert len(turn.content.split()) <= (15 if turn.role == 'user' else 8)


def test_partners_and_kinds_are_mixed_as_stated():
    partners = collections.Counter(found.id.split('/')[1].split('-')[0] for found in assistant_corpus())
    assert is_near(partners['people'], len(assistant_corpus()), 1 / 2)
    assert is_near(partners['default'], len(assistant_corpus()), 1 / 4 + 1 / 20)
    names = collections.Counter(found.intent.split(':')[0] for found in base_corpus())
    assert is_near(names['default'], len(base_corpus()), 1 / 3 + 2 / 15)
    for name in set(STEREOTYPES) - {'default'}:
        assert is_near(partners[name], len(assistant_corpus()), 1 / 20)
        assert is_near(names[name], len(base_corpus()), 2 / 15)
    assert set(partners) == {'people', *STEREOTYPES}
    assert set(names) == set(STEREOTYPES)
    for corpus in (assistant_corpus(), base_corpus()):
        kinds = collections.Counter(found.id.split('/')[2] for found in corpus)
        assert all(is_near(kinds[name], len(corpus), kind.share) for name, kind in scripted.KINDS.items())
    assert sum(kind.share for kind in scripted.KINDS.values()) == pytest.approx(1)


def test_corpora_hold_their_partners_conversations():
    for corpus in (assistant_corpus(), base_corpus()):
        for number, found in enumerate(corpus[:100]):
            _, partner, kind = found.id.split('/')
            user = person_of(WORLD, partner)
            again = scripted.scripted_conversation(user, kind, number, identity=found.id)
            assert found.messages == again.messages
            name = partner.split('-')[0]
            assert found.intent == (f'{name}: {user.intent.text}' if corpus is base_corpus() else user.intent.text)
            assert user == person_of(WORLD, f'{name}-train-{number}')


def test_the_user_is_the_person_who_speaks():
    for seed in range(50):
        user = person(WORLD, 'dev', seed)
        found = scripted.scripted_conversation(user, 'chatty', seed, identity='x')
        heard = [turn.content for turn in found.messages if turn.role == 'assistant']
        texts = [turn.content for turn in found.messages if turn.role == 'user']
        spoken = [replies.speak(user, heard[:number], seed) for number in range(len(texts))]
        assert [message.text for message in spoken] == texts
        assert (spoken[-1].end is not None) == (found.end == 'natural')


def test_who_is_told_everything_proposes_it():
    for kind in ('asker', 'eager', 'two_at_once'):
        for found in conversations(TRUTHFUL, kind, 50):
            assert [act.values for act in acts(found)] == [TRUTHFUL.intent.values]


def test_askers_ask_for_what_they_do_not_know():
    closed = dataclasses.replace(TRUTHFUL, traits=dataclasses.replace(TRUTHFUL.traits, vague=1.0, discloses=0.0))
    openly = 0
    for found in conversations(closed, 'asker'):
        done = acts(found)
        openly += done[0].kind == 'open'
        assert [act.kind for act in done] == [done[0].kind, 'ask', 'ask', 'ask', 'propose']
        asked = [number for act in done for number in act.asked]
        assert len(asked) == len(set(asked)) == (3 if done[0].kind == 'open' else 4), 'everything was answered'
    assert is_near(openly, 1000, 0.5)
    assert {len(act.asked) for found in conversations(closed, 'two_at_once', 50) for act in acts(found)} == {0, 1, 2}


def test_the_eager_guess_and_keep_what_was_not_denied():
    vague = dataclasses.replace(TRUTHFUL, traits=STEREOTYPES['vague'])
    firsts = collections.Counter()
    for found in conversations(vague, 'eager'):
        proposals = [act.values for act in acts(found)]
        firsts[proposals[0]] += 1
        assert {act.kind for act in acts(found)} == {'propose'}
        for before, after in itertools.pairwise(proposals):
            assert sum(a != b for a, b in zip(before, after, strict=True)) == 1, 'one thing was corrected'
    for number, attribute in enumerate(ATTRIBUTES):
        for value in attribute.values:
            count = sum(times for first, times in firsts.items() if first[number] == value)
            assert is_near(count, 1000, 1 / len(attribute.values))


def test_what_was_denied_is_not_proposed_again():
    denier = dataclasses.replace(
        TRUTHFUL, traits=dataclasses.replace(STEREOTYPES['vague'], denies=1.0, patience=99.0), intent=TRUTHFUL.intent
    )
    for found in conversations(denier, 'eager', 200, turns=12):
        denied = set()
        for turn in found.messages:
            if turn.role == 'assistant':
                assert not denied & set(read_assistant(turn.content).values)
            else:
                denied |= {statement.value for statement in language.read_user(turn.content) if statement.denied}


def test_four_in_ten_cannot_read_typos():
    mistyping = dataclasses.replace(TRUTHFUL, traits=dataclasses.replace(TRUTHFUL.traits, typos=1.0))
    read = [acts(found)[0].kind == 'propose' for found in conversations(mistyping, 'asker')]
    assert is_near(sum(read), len(read), 0.6)


def test_the_chatty_chatter_and_the_forgetful_forget():
    first = [acts(found)[0] for found in conversations(TRUTHFUL, 'chatty')]
    assert is_near(sum(act.kind == 'chatter' for act in first), len(first), 0.4)
    first = [acts(found)[0] for found in conversations(TRUTHFUL, 'forgetful')]
    assert is_near(sum(act.kind == 'propose' for act in first), len(first), 0.7**4)


def test_people_are_harder_to_serve_the_further_the_dial():
    def satisfaction(dial: float) -> float:
        total = 0.0
        for number in range(400):
            user = person(World(dial=dial), 'test', number)
            kind = tuple(scripted.KINDS)[number % len(scripted.KINDS)]
            found = scripted.scripted_conversation(user, kind, number, identity='x')
            messages = [(turn.role, turn.content) for turn in found.messages]
            total += outcomes.outcome_of(user.intent, messages, found.end == 'natural').satisfaction
        return total / 400

    by_dial = [satisfaction(dial) for dial in (0.0, 0.5, 1.0)]
    assert by_dial == sorted(by_dial, reverse=True)
    assert by_dial[0] - by_dial[-1] > 0.2


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'kind': 'angry'}, r"scripted assistant: expected one of \('asker', .*found 'angry'"),
        ({'turns': 0}, 'turns of the scripted assistant: expected at least 1, found 0'),
    ],
)
def test_bad_values_are_named(change, message):
    arguments = {'kind': 'asker', 'turns': 5} | change
    with pytest.raises(ValueError, match=message):
        scripted.scripted_conversation(stereotyped(WORLD, 'vague', 'test', 0), seed=0, identity='x', **arguments)


def test_a_short_limit_cuts():
    (found,) = conversations(dataclasses.replace(TRUTHFUL, traits=STEREOTYPES['vague']), 'asker', 1, turns=1)
    assert (len(found.messages), found.end) == (2, 'cut')
