"""Replayed turns in, measures by source out; what is missing is said."""

import collections
import dataclasses

import numpy as np
import pytest

from simrl.evaluation.fidelity import distances, features
from simrl.evaluation.fidelity.annotators import Annotators, MissingPackageError
from simrl.evaluation.fidelity.measure import (
    ALL,
    AS_ASSISTANT,
    COVERAGE,
    CUT,
    DIVERSITY,
    EARLY_END,
    EMBEDDING,
    LEAK,
    MEANING,
    OVERLAP,
    SourceFidelity,
    make_tools,
    measure,
)
from simrl.evaluation.fidelity.table import about, lines_of, text_table
from simrl.evaluation.fidelity.turns import Turn
from simrl.run.config import from_config_dict, to_dict

HERE = __name__
ALONE = Annotators(words=f'{HERE}:known', tags='', sentiment=f'{HERE}:sentiment', embeddings=f'{HERE}:embed')


def known():
    return {'want', 'a', 'blue', 'red', 'car', 'please', 'yes'}.__contains__


def sentiment():
    return lambda text: 0.8 if 'yes' in text else 0.0


def embed():
    def vectors(texts):
        found = np.array([[text.count('a') + 1.0, len(text)] for text in texts])
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    return vectors


def absent():
    raise MissingPackageError('the package nothing is not installed')


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(distances, 'DRAWS', 40)
    monkeypatch.setattr(distances, 'SPLITS', 20)


def turns_of(source: str, conversations: int, **own) -> list[Turn]:
    said = ['want a blue car', 'yes please', 'a red car, plase', 'yes']
    return [
        Turn(
            f'{source} {c}',
            source,
            t,
            'natural',
            'want a blue car soon',
            real=said[(c + t) % 4],
            real_end=t == 2,
            **{'simulated': 'I want a blue car.', 'ended': t == 2, **own},
        )
        for c in range(conversations)
        for t in range(3)
    ]


def test_features_count_what_their_docstrings_say():
    text = "i WANT a Car, don't you?  Yes. iPhone 2x"
    assert features.word_length(None)(text) == {'total': 1 + 4 + 1 + 3 + 5 + 3 + 3 + 6 + 1, 'number': 9}
    assert [next(iter(features.utterance_length(None)('w ' * n))) for n in (0, 1, 2, 3, 4, 5, 6, 8, 11, 16)] == [
        *(0, 0, 2, 3, 4, 4, 5, 6, 6, 8)
    ]
    assert features.typo_rate({'i', 'a', "don't"}.__contains__)(text) == {'total': 2, 'number': 5}
    assert features.punctuation(None)(text) == {'': 6, ',': 1, '?': 1, '.': 1}
    assert features.capitalisation(None)(text) == {
        (True, 'lower'): 1,
        (False, 'lower'): 4,
        (False, 'capitals'): 1,
        (False, 'first capital'): 2,
        (False, 'mixed'): 1,
    }
    tags = features.parts_of_speech(lambda tokens: [token[:1] for token in tokens])
    assert tags('aa, ab') == {'a': 2, ',': 1}
    assert tags('') == {}
    assert features.sentiment(lambda text: -0.05)('x') == {-1: 1}
    counts = [[collections.Counter(a=1), collections.Counter(b=2)], [collections.Counter(b=3), collections.Counter()]]
    first, second = features.count_table(counts, np.array([1, 1]))
    assert first.tolist() == [[0, 0, 0, 0], [0, 0, 1, 2]]
    assert second.tolist() == [[0, 0, 0, 0], [0, 0, 0, 3]]


def test_measures_are_by_source_and_say_what_is_not_measured():
    tools = make_tools(ALONE)
    found = measure([*turns_of('forum', 6), *turns_of('lab', 4)], tools)
    assert list(found) == [ALL, 'forum', 'lab']
    forum = found['forum']
    assert (forum.num_turns, forum.num_conversations, forum.num_compared) == (18, 6, 18)
    assert set(forum.distances) == {*features.FEATURES, EMBEDDING} - {'part of speech'}
    assert forum.not_measured == {'part of speech': 'no annotator is named for tags'}
    assert forum.distances['word length'].simulated > forum.distances['word length'].people
    assert forum.distances['capitalisation'].excess.low > 0
    assert forum.termination.f1.mean == 1.0
    assert set(forum.rates) == {AS_ASSISTANT, CUT, OVERLAP, LEAK, COVERAGE, EARLY_END, DIVERSITY, MEANING}
    assert forum.rates[EARLY_END].simulated.mean == 0.0
    assert forum.rates[DIVERSITY].simulated.mean == 0.0
    assert forum.rates[COVERAGE].simulated.mean == pytest.approx(2 / 3)
    assert (found[ALL].num_conversations, found[ALL].distances['sentiment'].num_conversations) == (10, 10)
    assert from_config_dict(SourceFidelity, to_dict(forum), 'fidelity.json') == forum
    shown = text_table(('', 'people', 'simulator', 'excess'), lines_of(forum))
    assert 'ends: F1' in shown
    assert 'Not measured: part of speech: no annotator is named for tags.' in about(forum)


def test_people_alone_have_a_floor_and_nothing_simulated():
    turns = [dataclasses.replace(turn, simulated=None, ended=None) for turn in turns_of('forum', 6)]
    found = measure(turns, make_tools(ALONE))['forum']
    assert all(x.people > 0 and x.simulated is None for x in found.distances.values())
    assert found.termination is None
    assert 'ends' not in found.not_measured
    assert found.rates[OVERLAP].people.mean > 0


def test_one_that_copies_people_has_no_excess():
    turns = [dataclasses.replace(turn, simulated=turn.real) for turn in turns_of('forum', 8)]
    found = measure(turns, make_tools(ALONE))['forum']
    assert all(abs(x.excess.mean) < 1e-12 for x in found.distances.values())
    assert found.rates[MEANING].simulated.mean == pytest.approx(0, abs=1e-12)
    assert found.rates[MEANING].people.mean > 0


def test_one_conversation_and_turns_without_words_are_said_to_be_too_few():
    tools = make_tools(dataclasses.replace(ALONE, embeddings=f'{HERE}:absent'))
    found = measure(turns_of('one', 1), tools)['one']
    assert not found.distances
    assert found.not_measured['word length'] == 'expected at least 2 conversations to compare, found 1'
    assert found.not_measured[EMBEDDING] == 'the package nothing is not installed'
    assert DIVERSITY not in found.rates
    marks = [dataclasses.replace(turn, real='?', simulated='!') for turn in turns_of('marks', 4)]
    found = measure(marks, tools)['marks']
    assert found.not_measured['word length'] == 'no half has anything to count'
    assert found.distances['punctuation'].simulated == pytest.approx(1.0)
    silent = [dataclasses.replace(turn, simulated=None, ended=True) for turn in turns_of('silent', 4)]
    found = measure(silent, tools)['silent']
    assert found.left_out == {'the simulator ended without a word': 12}
    assert found.termination.recall.mean == 1.0
    no_end = [dataclasses.replace(turn, end='cut') for turn in turns_of('cut', 4)]
    assert 'no conversation with a natural end' in measure(no_end, tools)['cut'].not_measured['ends']


def test_nothing_and_a_mix_of_people_alone_and_a_simulator_are_refused():
    tools = make_tools(dataclasses.replace(ALONE, embeddings=''))
    with pytest.raises(ValueError, match='expected turns of people, found none'):
        measure([], tools)
    with pytest.raises(ValueError, match='found both'):
        measure([*turns_of('a', 2), *turns_of('b', 2, simulated=None, ended=None)], tools)
    with pytest.raises(ValueError, match=r"Annotators.words: expected a function 'nowhere:x'"):
        make_tools(dataclasses.replace(ALONE, words='nowhere:x'))
    with pytest.raises(ValueError, match=r"Annotators.tags: expected 'module:function' or '', found 'x'"):
        Annotators(tags='x')
