"""Ends, roles, intents and openings, by hand."""

import itertools

import pytest

from simrl.evaluation.fidelity import behaviour
from simrl.evaluation.fidelity.behaviour import diversity, termination
from simrl.evaluation.fidelity.turns import Turn


def conversation(name: str, ends: str, *, end: str = 'natural', failed: bool = False) -> list[Turn]:
    """Turns with the last of which the person leaves; 'e' where the simulator ends, 'c' where it goes on."""
    turns = [
        Turn(name, 's', i, end, real='x', real_end=i == len(ends) - 1, simulated='y', ended=letter == 'e')
        for i, letter in enumerate(ends)
    ]
    return [*turns[:-1], Turn(name, 's', len(ends), end, real='x', real_end=True, failure='x')] if failed else turns


def test_ends_are_scored_where_natural_and_replayed_to_the_last_turn():
    whole = [(f'{letters} {i}', letters) for letters in ('cce', 'ece', 'ccc') for i in range(3)]
    turns = [
        *(turn for name, letters in whole for turn in conversation(name, letters)),
        *conversation('d', 'eee', end='cut'),
        *conversation('e', 'cce', failed=True),
        *conversation('f', 'cce')[:2],
    ]
    found, unknown, incomplete = termination(turns)
    assert (unknown, incomplete) == (1, 2)
    assert (found.num_turns, found.num_ends, found.num_conversations) == (27, 9, 9)
    assert found.precision.mean == pytest.approx(2 / 3)
    assert found.recall.mean == pytest.approx(2 / 3)
    assert found.f1.mean == pytest.approx(2 / 3)
    assert found.f1.low < 2 / 3 < found.f1.high
    assert found.always == pytest.approx(2 * (1 / 3) / (1 + 1 / 3))
    assert termination([*conversation('d', 'cce', end='unknown')]) == (None, 1, 0)


def test_one_that_never_ends_has_no_precision_and_one_that_always_does_has_that_of_always():
    never, always = (
        termination([*conversation('a', letter * 4), *conversation('b', letter * 2)])[0] for letter in 'ce'
    )
    assert (never.precision, never.recall.mean, never.f1.mean) == (None, 0.0, 0.0)
    assert always.f1.mean == pytest.approx(always.always)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('AI: which one?', True),
        ('[assistant]: hello', True),
        ('<think>the user', True),
        ('As an AI language model, I cannot', True),
        ('Sure! Here are some ideas', True),
        ('How can I help you today?', True),
        ("Let me know if you'd like more.", True),
        ('how can i fix this?', False),
        ('sure, sounds good', False),
        ('can you help me with an essay', False),
        ('here is my code: x = 1', False),
    ],
)
def test_what_assistants_say(text, expected):
    assert behaviour.speaks_as_assistant(text) is expected


def test_words_of_the_intent():
    intent = 'You want to write a short blog post about growing tomatoes'
    assert behaviour.intent_overlap('write a blog about my dog', intent) == pytest.approx(2 / 3)
    assert behaviour.intent_overlap('ok thanks', intent) == 0.0
    assert behaviour.intent_coverage(['Write a blog', 'tomatoes!'], intent) == pytest.approx(3 / 6)
    assert behaviour.intent_coverage([], intent) == 0.0
    assert behaviour.leaks_intent('i need a short blog post about growing things', intent)
    assert not behaviour.leaks_intent('a short post about my tomatoes', intent)
    assert behaviour.leaks_intent('Buy milk now', 'buy milk')
    assert not behaviour.leaks_intent('milk', '123')


def test_diversity_is_the_mean_over_pairs_of_conversations():
    texts = ['a b', 'b a c', 'd', 'd', '', 'a d', 'e', 'b']
    sets = [set(text.split()) for text in texts]
    apart = [1 - len(x & y) / len(x | y) for x, y in itertools.combinations(sets, 2)]
    found = diversity(texts, range(8))
    assert found.mean == pytest.approx(sum(apart) / len(apart))
    assert found.low < found.mean < found.high
    same = diversity(['a', 'a', 'b'], ['p', 'p', 'q'])
    assert same.mean == 1.0, 'two openings of one conversation are no pair'
    with pytest.raises(ValueError, match='expected openings of at least 2 conversations, found 1'):
        diversity(['a', 'b'], ['p', 'p'])
