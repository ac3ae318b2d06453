"""The words of the concierge world: spellings that cannot be confused, and texts read as what they were written for."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simrl.worlds.concierge import language
from simrl.worlds.concierge.language import ANY, ATTRIBUTES, NAMES, TYPOS, VALUE_OF, Act, Intent, Statement

NONE = (None, None, None, None)


def edits(word: str) -> list[set[str]]:
    """The swaps, drops and doubles of a letter after the first."""
    after = range(1, len(word))
    return [
        {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in after[:-1]},
        {word[:i] + word[i + 1 :] for i in after},
        {word[:i] + word[i] + word[i:] for i in after},
    ]


def test_every_word_for_a_value_has_three_typos_of_its_own_each_one_slip_away():
    assert len(VALUE_OF) == 2 * (6 + 3 + 4 + 4)
    assert set(TYPOS) == set(VALUE_OF)
    for word, typos in TYPOS.items():
        assert len(typos) == 3
        assert all(any(typo in kind for typo in typos) for kind in edits(word)), f'{word}: {typos}'
    typos = [typo for found in TYPOS.values() for typo in found]
    assert len(typos) == len(set(typos)), 'a typo stands for two words'
    assert not set(typos) & language.clean_words()


def test_phrases_say_nothing_of_values():
    phrases = (*language.GREETINGS, *language.LEAD_INS, *language.VAGUE_OPENINGS, *language.REMARKS)
    for phrase in (*phrases, *language.ACCEPTANCES, language.LEAVE):
        assert list(language.read_user(phrase)) == []
    for phrase in language.CHATTER:
        assert language.read_assistant(phrase) == Act('chatter')
    assert language.read_assistant(language.OPEN_QUESTION) == Act('open')


def test_every_intent_is_its_text():
    choices = itertools.product(*((*attribute.values, ANY) for attribute in ATTRIBUTES))
    intents = [Intent(values) for values in choices if set(values) != {ANY}]
    assert len(intents) == 7 * 4 * 5 * 5 - 1
    assert all(Intent.from_text(intent.text) == intent for intent in intents)
    assert Intent(('thai', 'cheap', ANY, 'dinner')).text == 'food thai price cheap area any time dinner'
    assert Intent(('thai', 'cheap', ANY, 'dinner')).cared == (0, 1, 3)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', "form 'food VALUE price VALUE area VALUE time VALUE', found ''"),
        ('food thai price cheap area any', 'expected text of the form'),
        ('food thai price cheap area any time dinner ', 'expected text of the form'),
        ('food  thai price cheap area any time dinner', 'expected text of the form'),
        ('food thai price cheap time dinner area any', 'expected text of the form'),
        ('food satay price cheap area any time dinner', "intent, food: expected one of .*, found 'satay'"),
        ('food thai price lunch area any time dinner', "intent, price: expected one of .*, found 'lunch'"),
        ('food any price any area any time any', 'expected an attribute that matters'),
    ],
)
def test_another_text_is_no_intent(text, message):
    with pytest.raises(ValueError, match=message):
        Intent.from_text(text)


def test_an_intent_has_a_value_for_each_attribute():
    with pytest.raises(ValueError, match='expected 4 values, found'):
        Intent(('thai', 'cheap'))


@pytest.mark.parametrize(
    ('text', 'act'),
    [
        ('try thai', Act('propose', values=('thai', None, None, None))),
        ('How about SUSHI, waterfront?', Act('propose', values=('japanese', None, 'harbor', None))),
        ('try thai or satay', Act('propose', values=('thai', None, None, None))),  # one value, said twice
        ('try thai or sushi near park', Act('propose', values=(None, None, 'park', None))),
        ('which food? try thai', Act('propose', values=('thai', None, None, None))),
        ('try', Act('propose')),
        ('thai near station', Act('chatter')),
        ('about how', Act('chatter')),
        ('which food?', Act('ask', asked=(0,))),
        ('what time and price and time?', Act('ask', asked=(3, 1))),
        ('what food would you like?', Act('ask', asked=(0,))),
        ('food?', Act('chatter')),
        ('what would you like', Act('open')),
        ('what?', Act('chatter')),
        ('which would you like?', Act('chatter')),
        ('', Act('chatter')),
        ('trying to help', Act('chatter')),
    ],
)
def test_acts(text, act):
    assert language.read_assistant(text) == act


VALUES = st.tuples(*(st.sampled_from(attribute.values) for attribute in ATTRIBUTES))


@given(st.sampled_from(language.PROPOSALS), VALUES)
def test_a_proposal_is_read_as_written(word, values):
    assert language.read_assistant(language.proposal(word, values)) == Act('propose', values=values)


@pytest.mark.parametrize('word', language.QUESTIONS)
def test_a_question_is_read_as_written(word):
    for number in range(1, 1 + len(NAMES)):
        for asked in itertools.permutations(range(len(NAMES)), number):
            assert language.read_assistant(language.question(word, asked)) == Act('ask', asked=asked)


def test_a_typo_proposes_nothing():
    for word, typos in TYPOS.items():
        assert language.read_assistant(f'try {word}').values != NONE
        for typo in typos:
            assert language.read_assistant(f'try {typo}').values == NONE


@pytest.mark.parametrize(
    ('text', 'statements'),
    [
        ('hi, i want thai and for dinner please', [Statement(0, 'thai'), Statement(3, 'dinner')]),
        ('no not satay', [Statement(0, 'thai', denied=True)]),
        ('not near park', [Statement(2, 'park')]),
        (f'no not {TYPOS["thai"][2]}', [Statement(0, 'thai', denied=True, mistyped=True)]),
        ('Any price, any food', [Statement(1, ANY), Statement(0, ANY)]),
        ('price any', []),
        ('thai thai', [Statement(0, 'thai'), Statement(0, 'thai')]),
        ('thaithai thaix', []),
    ],
)
def test_what_users_state(text, statements):
    assert list(language.read_user(text)) == statements


def test_every_spelling_of_a_value_is_read():
    for word, (number, value) in VALUE_OF.items():
        assert list(language.read_user(word)) == [Statement(number, value)]
        for typo in TYPOS[word]:
            assert list(language.read_user(typo)) == [Statement(number, value, mistyped=True)]


@pytest.mark.parametrize(
    ('text', 'left'),
    [
        *((text, False) for text in language.ACCEPTANCES),
        (language.LEAVE, True),
        ('thanks', False),
        ('thanks but forget it', True),
        ('', True),
        ('no not thai', True),
        ('greatest', True),
    ],
)
def test_who_ends_without_acceptance_leaves(text, left):
    assert language.says_leave(text) == left


@given(st.text() | st.lists(st.sampled_from(sorted(language.clean_words()))).map(' '.join))
def test_any_text_can_be_read(text):
    act = language.read_assistant(text)
    assert len(act.values) == len(ATTRIBUTES)
    assert (act.kind == 'ask') == bool(act.asked)
    list(language.read_user(text))
    language.says_leave(text)
