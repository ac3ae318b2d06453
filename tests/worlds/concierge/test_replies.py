"""People behave as the docstring says, probability by probability, and are a function of what they heard."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.worlds.concierge import language
from simrl.worlds.concierge.language import ANY, Intent, Statement, read_assistant, read_user, words
from simrl.worlds.concierge.people import NEVER, STEREOTYPES, Person, Traits, World, person, stereotyped
from simrl.worlds.concierge.replies import Mind, Said, answer, cost, open_talk, speak

ALL = 'food thai price cheap area station time dinner'
THREE = 'food thai price any area station time dinner'
RIGHT = 'try cheap thai near station for dinner'
SEEDS = range(2000)


def someone(text: str = ALL, **traits: float) -> Person:
    """The default stereotype, without manners, but for these traits."""
    return Person(
        'someone', Intent.from_text(text), dataclasses.replace(STEREOTYPES['default'], **{'polite': 0} | traits)
    )


def is_near(count: float, trials: int, chance: float) -> bool:
    """True if a count is within 4 standard deviations of a binomial variable's mean."""
    return abs(count - trials * chance) <= 4 * math.sqrt(trials * chance * (1 - chance))


def openings(who: Person) -> list[str]:
    return [speak(who, [], seed).text for seed in SEEDS]


def replies(who: Person, text: str, told: Iterable[int] = (), patience: float = NEVER) -> list[Said]:
    mind = Mind(patience, frozenset(told), 1)
    return [answer(who, mind, text, seed)[1] for seed in SEEDS]


def stated(text: str) -> list[int]:
    """The numbers of the attributes stated, in order."""
    return [statement.attribute for statement in read_user(text)]


def check_attributes(texts: list[str], first: tuple[int, ...], others: tuple[int, ...], discloses: float) -> None:
    """Each text states one attribute out of `first` (uniformly), each other one of both with the probability."""
    assert all(text for text in texts)
    each = 1 / len(first) + (1 - 1 / len(first)) * discloses
    counts = collections.Counter(number for text in texts for number in set(stated(text)))
    assert set(counts) == {*first, *others}
    assert all(is_near(counts[number], len(texts), each) for number in first)
    assert all(is_near(counts[number], len(texts), discloses) for number in others)
    sizes = collections.Counter(len(stated(text)) for text in texts)  # they are disclosed independently
    more = len(first) - 1 + len(others)
    for size in range(more + 1):
        share = math.comb(more, size) * discloses**size * (1 - discloses) ** (more - size)
        assert is_near(sizes[size + 1], len(texts), share)


# Opening


def test_an_opening_is_vague_or_tells_one_attribute_that_matters_and_others_by_chance():
    texts = openings(someone(THREE, vague=0.25, discloses=0.3))
    vague = [text for text in texts if text in language.VAGUE_OPENINGS]
    assert is_near(len(vague), len(texts), 0.25)
    assert all(is_near(count, len(vague), 1 / 3) for count in collections.Counter(vague).values())
    check_attributes([text for text in texts if text not in vague], (0, 2, 3), (), 0.3)


def test_the_default_tells_everything_that_matters_and_the_vague_nothing():
    assert all(sorted(stated(text)) == [0, 2, 3] for text in openings(someone(THREE)))
    assert not any(stated(text) for text in openings(someone(THREE, vague=1)))


def test_people_open_with_about_one_attribute_and_stereotypes_with_three():
    people = [len(stated(speak(person(World(), 'test', n), [], n).text)) for n in SEEDS]
    default = [len(stated(speak(stereotyped(World(), 'default', 'test', n), [], n).text)) for n in SEEDS]
    assert sum(people) / len(people) == pytest.approx(1.05, abs=0.06)
    assert sum(default) / len(default) == pytest.approx(3.1, abs=0.06)


# Wording


def test_manners_and_remarks_come_by_chance():
    texts = openings(someone(polite=0.3, remarks=0.2))
    greeted = [text for text in texts if text.startswith(tuple(f'{word}, ' for word in language.GREETINGS))]
    assert is_near(len(greeted), len(texts), 0.3)
    assert is_near(sum('please' in text for text in texts), len(texts), 0.3)
    assert is_near(sum('please' in text for text in greeted), len(greeted), 0.3)
    assert is_near(sum(text.endswith(language.REMARKS) for text in texts), len(texts), 0.2)
    later = [reply.text for reply in replies(someone(polite=0.3, remarks=0.2), 'which food?')]
    assert not any(text.startswith(language.GREETINGS) for text in later)
    assert is_near(sum('please' in text for text in later), len(later), 0.3)
    assert is_near(sum(text.endswith(language.REMARKS) for text in later), len(later), 0.2)


def test_attributes_come_in_any_order_with_small_words_half_of_the_time():
    texts = openings(someone())
    orders = collections.Counter(tuple(stated(text)) for text in texts)
    assert len(orders) == 24
    assert all(is_near(count, len(texts), 1 / 24) for count in orders.values())
    assert is_near(sum(text.startswith(language.LEAD_INS) for text in texts), len(texts), 0.5)
    assert is_near(sum('and' in words(text) for text in texts), len(texts), 0.5)
    assert all('and' in words(text)[-3:] for text in texts if 'and' in words(text))
    for word, number in (('near', 2), ('for', 3)):
        later = [text for text in texts if stated(text)[0] != number]
        found = sum(word in words(text.removeprefix('looking for')) for text in later)
        assert is_near(found, len(later), 0.5)
        first = [text for text in texts if stated(text)[0] == number]
        assert not any(word in words(text.removeprefix('looking for')) for text in first)


@pytest.mark.parametrize('spread', [0.0, 0.6])
def test_values_are_spelled_by_chance(spread):
    who = someone('food thai price any area any time dinner', vague=0, synonyms=0.3, typos=0.2, typo_spread=spread)
    texts = [reply.text for reply in replies(who, 'which food?', told={3})]
    found = collections.Counter(word for text in texts for word in words(text))
    for word, chance in (('thai', 0.7), ('satay', 0.3)):
        assert is_near(found[word], len(texts), chance * 0.8)
        for typo, weight, first in zip(language.TYPOS[word], (0.5, 0.3, 0.2), (1, 0, 0), strict=True):
            share = spread * weight + (1 - spread) * first
            assert is_near(found[typo], len(texts), chance * 0.2 * share)


# Hearing


@pytest.mark.parametrize(
    ('intent', 'text'),
    [
        (ALL, RIGHT),
        (THREE, RIGHT),
        (THREE, 'try satay near railway for supper'),
        (THREE, 'ok, try any thai station dinner'),
    ],
)
def test_a_proposal_with_nothing_wrong_is_accepted_with_the_last_patience(intent, text):
    answers = replies(someone(intent), text, patience=1e-6)
    texts = collections.Counter(s.text for s in answers)
    assert all(s.end == 'accepted' for s in answers)
    assert set(texts) == set(language.ACCEPTANCES)
    assert all(is_near(count, len(answers), 1 / 3) for count in texts.values())


@pytest.mark.parametrize(
    ('text', 'chance'),
    [
        ('try cheap thai near station for lunch', 0.6),
        ('try cheap thai near station', 0.6),
        ('try cheap thai or sushi near station for dinner', 0.6),
        ('try cheap thia near station for dinner', 0.6),
        ('try fancy thai near station for lunch', 0.6**2),
        ('try fancy thai near park for lunch', 0.6**3),
        ('try fancy sushi near park for lunch', 0),
        ('try', 0),
    ],
)
def test_wrong_proposals_are_tolerated_by_chance_unless_nothing_is_right(text, chance):
    answers = replies(someone(tolerance=0.6), text)
    assert is_near(sum(s.end == 'accepted' for s in answers), len(answers), chance)
    assert not any(s.end == 'left' for s in answers)


@pytest.mark.parametrize(
    ('text', 'told', 'expected'),
    [
        (RIGHT, (), 0.5),
        ('try cheap thai near station for lunch', (), 1.0),
        ('try sushi', (), 2.0),  # price does not matter
        ('which food?', (), 0.2),
        ('which food?', (3,), 0.2),
        ('which food?', (0,), 1.0),
        ('which food and time?', (0,), 0.2),
        ('which food and time?', (0, 3), 1.0),
        ('which price?', (), 0.2),
        ('which price?', (1,), 1.0),
        ('what would you like?', (0, 2), 0.3),
        ('what would you like?', (0, 2, 3), 1.0),
        ('let me think', (), 1.0),
        ('', (), 1.0),
    ],
)
def test_patience_is_spent_as_stated(text, told, expected):
    assert cost(read_assistant(text), Intent.from_text(THREE), frozenset(told)) == expected
    if text == RIGHT:
        return
    who = someone(THREE)
    mind, reply = answer(who, Mind(expected + 0.01, frozenset(told), 1), text, 0)
    assert reply.end is None
    assert mind.patience == pytest.approx(0.01)
    assert answer(who, Mind(expected, frozenset(told), 1), text, 0)[1] == Said('forget it', 'left')


def test_equal_costs_are_equal_whatever_the_rounding():
    """.8 less four times .2 is 0, not 1e-16."""
    who = someone('food thai price cheap area station time dinner', discloses=0, vague=1, patience=0.8)
    asked = ['which food?', 'which price?', 'which area?', 'which time?']
    assert [speak(who, asked[:k], 0).end for k in range(5)] == [None, None, None, None, 'left']


def test_the_default_never_leaves():
    for seed in range(20):
        assert speak(stereotyped(World(), 'default', 'train', seed), ['try'] * 5, seed).end is None


@pytest.mark.parametrize('corrects_more', [0.0, 0.4])
def test_a_wrong_proposal_is_corrected(corrects_more):
    answers = replies(someone(THREE, corrects_more=corrects_more), 'try cheap thai near park for lunch')
    texts = [s.text for s in answers]
    check_attributes(texts, (2, 3), (), corrects_more)
    assert all(
        read == Statement(2, 'station') or read == Statement(3, 'dinner') for t in texts for read in read_user(t)
    )
    assert is_near(sum(text.startswith('no ') for text in texts), len(texts), 0.5)
    assert all(text.startswith(('no ', 'um ')) for text in texts)


def test_a_wrong_value_is_denied_by_chance():
    answers = replies(someone(THREE, denies=0.3, corrects_more=1.0), 'try cheap thai near park for lunch')
    denied = [list(read_user(s.text)) for s in answers if s.text.startswith('no not ')]
    assert is_near(len(denied), len(answers), 0.3)
    kinds = collections.Counter(tuple(statements) for statements in denied)
    assert set(kinds) == {(Statement(2, 'park', denied=True),), (Statement(3, 'lunch', denied=True),)}
    assert all(is_near(count, len(denied), 0.5) for count in kinds.values())
    unnamed = replies(someone(THREE, denies=1.0), 'try cheap thai near park or downtown')
    assert not any('not' in words(s.text) for s in unnamed), 'nothing was named that could be denied'


def test_what_was_corrected_is_told_and_what_was_denied_is_not():
    told, _ = answer(someone(THREE), Mind(NEVER, frozenset(), 1), 'try thai near park for dinner', 0)
    denied, _ = answer(someone(THREE, denies=1), Mind(NEVER, frozenset(), 1), 'try thai near park for dinner', 0)
    assert (told.disclosed, denied.disclosed) == ({2}, set())


def test_questions_are_answered():
    who = someone(THREE, discloses=0.3)
    texts = [reply.text for reply in replies(who, 'which price and time?', told={0})]
    assert all({1, 3} <= set(stated(text)) for text in texts)
    assert all('any price' in text for text in texts)
    assert is_near(sum(2 in stated(text) for text in texts), len(texts), 0.3)
    assert not any(0 in stated(text) for text in texts), 'it was told before'


def test_two_attributes_of_a_question_are_answered():
    answers = replies(someone(discloses=0), 'what time, area, food and price?')
    assert all(sorted(stated(s.text)) == [2, 3] for s in answers)
    mind, _ = answer(someone(discloses=0), Mind(NEVER, frozenset(), 1), 'what time, area, food and price?', 0)
    assert mind.disclosed == {2, 3}


def test_answers_are_beside_the_point_by_chance():
    texts = [reply.text for reply in replies(someone(beside=0.4, discloses=0), 'which food?', told={1})]
    beside = [text for text in texts if stated(text) != [0]]
    assert is_near(len(beside), len(texts), 0.4)
    found = collections.Counter(tuple(stated(text)) for text in beside)
    assert set(found) == {(2,), (3,)}
    assert all(is_near(count, len(beside), 0.5) for count in found.values())
    nothing_left = [s.text for s in replies(someone(beside=0.4, polite=1, remarks=1), 'which food?', told={1, 2, 3})]
    remarks = [text for text in nothing_left if text in language.REMARKS]
    assert is_near(len(remarks), len(nothing_left), 0.4)
    assert all(is_near(count, len(remarks), 1 / 5) for count in collections.Counter(remarks).values())
    assert all(stated(text) == [0] for text in nothing_left if text not in remarks)


@pytest.mark.parametrize('text', ['what would you like?', 'let me think', 'thai?', '', '\ud800 \x00'])
def test_to_all_else_something_is_told(text):
    who = someone(discloses=0.3)
    check_attributes([reply.text for reply in replies(who, text, told={0})], (1, 2, 3), (), 0.3)
    check_attributes([reply.text for reply in replies(who, text, told={0, 1, 2, 3})], (0, 1, 2, 3), (), 0.3)


# Whole conversations

TEXTS = st.one_of(
    st.text(),
    st.lists(st.sampled_from(sorted(language.clean_words())), max_size=8).map(' '.join),
    st.sampled_from(['which food?', 'what price and time?', 'try thai', RIGHT, language.OPEN_QUESTION]),
)


@st.composite
def anyone(draw: st.DrawFn) -> Person:
    world = World(seed=draw(st.integers(0, 3)), dial=draw(st.sampled_from([0.0, 0.5, 1.0])))
    name, number = draw(st.sampled_from([None, *STEREOTYPES])), draw(st.integers(0, 10**6))
    return person(world, 'train', number) if name is None else stereotyped(world, name, 'train', number)


@settings(max_examples=100, deadline=None)
@given(anyone(), st.lists(TEXTS, max_size=6), st.integers(0, 2**63))
def test_a_person_replays_itself_whatever_it_hears(who, heard, seed):
    answers = [speak(who, heard[:number], seed) for number in range(len(heard) + 1)]
    mind, step = open_talk(who, seed)
    for number, text in enumerate(heard):
        assert answers[number] == step
        if step.end is not None:
            break
        mind, step = answer(who, mind, text, seed)
    assert all(later == step for later in answers[mind.said - 1 :]), 'nothing new is said after the end'
    for message in answers:
        assert re.fullmatch(r'[a-z]([a-z ,]*[a-z])?', message.text)
        assert len(words(message.text)) <= 15
        assert (message.end == 'accepted') == (message.text in language.ACCEPTANCES)
        assert (message.end == 'left') == (message.text == language.LEAVE)
        statements = [s for s in read_user(message.text) if s.value != ANY]
        assert all((s.value == who.intent.values[s.attribute]) != s.denied for s in statements), 'people tell the truth'


def test_other_seeds_and_other_people_draw_anew():
    assert len({speak(someone(discloses=0.5, remarks=0.5), [], seed).text for seed in range(100)}) > 50
    ids = [dataclasses.replace(someone(discloses=0.5, remarks=0.5), id=str(number)) for number in range(100)]
    assert len({speak(who, [], 0).text for who in ids}) > 50


def test_every_trait_is_used():
    """Changing any one changes the replies."""
    heard = ['which food?', 'try thai near park', 'what would you like?']
    names = [field.name for field in dataclasses.fields(Traits)]
    base = Traits(**dict.fromkeys(names, 0.4) | {'patience': 4.0})
    spoken = {}
    for field in (None, *names):
        traits = base if field is None else dataclasses.replace(base, **{field: getattr(base, field) * 0.3})
        who = Person('someone', Intent.from_text(ALL), traits)
        spoken[field] = tuple(speak(who, heard[:k], seed) for seed in range(100) for k in range(4))
    assert len(set(spoken.values())) == len(spoken)
