"""Made-up studies whose truth is known: the events of people with planted preferences between models.

A vote is with probability sqrt(icc) decided by a number of the participant's own, else by a new one, so that two votes
of one participant correlate at `icc`. Whatever the correlation, the win rate over participants is the planted one.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from simrl.remote.settings import EndpointSettings
from simrl.study.events import (
    STUDY,
    Arrived,
    Asked,
    Checked,
    Choice,
    Concluded,
    Conduct,
    Consented,
    Event,
    Instructed,
    Mode,
    Opened,
    PairAssigned,
    PlanFrozen,
    Preferred,
    Prepared,
    Replied,
    Retried,
    Side,
    Stored,
    TypeAssigned,
    Voided,
    Withdrew,
    Wrote,
)
from simrl.study.settings import PlanSettings, StudyModel, StudySettings, plan_of
from simrl.study.store import Entry, Store

WORDS = (
    *('river', 'winter', 'letter', 'teacher', 'garden', 'music', 'stranger', 'village', 'morning', 'story', 'lantern'),
    *('bridge', 'market', 'silence', 'journey', 'kitchen', 'window', 'mother', 'harbour', 'summer', 'engine', 'paper'),
    *('mountain', 'shadow', 'orchard', 'thunder', 'machine', 'whisper', 'library', 'island', 'candle', 'forest'),
    *('railway', 'picture', 'holiday', 'captain', 'meadow', 'doctor', 'painter', 'evening', 'festival', 'theatre'),
)
TASKS = {
    'blog': {f'blog-{n}': f'write a blog post about {word} and {word}s' for n, word in enumerate(WORDS[:12], 1)},
    'story': {f'story-{n}': f'invent a short story of a {word}' for n, word in enumerate(WORDS[12:24], 1)},
    'statement': {f'statement-{n}': f'state why you study the {word}' for n, word in enumerate(WORDS[24:36], 1)},
}
# What a cheater does: answers the attention item wrongly; sends within seconds; pastes; writes of something else; sends
# the same message again; writes as an assistant does; prefers the left side always. All of them vote at random.
CHEATS = ('inattentive', 'fast', 'pasted', 'off_task', 'repeats', 'ai', 'left')
AI_TEXT = 'As an AI language model, I do not have personal experiences, but here is a revised version. '
OFF_TASK = 'tell me which lottery numbers win tonight and give me the odds for the football'


@dataclasses.dataclass(frozen=True)
class Planted:
    """The truth of a study.

    Attributes:
        win_rates: by pair, of its first model with a new participant, the mean over both sides, ties one half.
        icc: correlation of two votes of one participant.
        position: win rate of a reply shown on the left less its win rate on the right.
        ties: share of votes.
        by_type: by document type, what is added to every win rate.
        exchanges: fewest and most, alike.
        leaves: probability to leave after a vote: half withdraw, half are not seen again.
        declines, fails: shares who do not consent, and who fail the check.
        voids, named: probability that a turn is void once, and that the reply on the left names its model.
        cheaters: by kind, their share.
    """

    people: int = 100
    win_rates: Mapping[tuple[str, str], float] = dataclasses.field(
        default_factory=lambda: {('trained', 'initial'): 0.58}
    )
    icc: float = 0.1
    position: float = 0.0
    ties: float = 0.2
    by_type: Mapping[str, float] = dataclasses.field(default_factory=dict)
    exchanges: tuple[int, int] = (5, 8)
    leaves: float = 0.0
    declines: float = 0.0
    fails: float = 0.0
    voids: float = 0.0
    named: float = 0.0
    cheaters: Mapping[str, float] = dataclasses.field(default_factory=dict)
    mode: Mode = 'live'
    tasks: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=lambda: TASKS)

    def __post_init__(self) -> None:
        assert set(self.cheaters) <= set(CHEATS)
        reach = (self.ties + abs(self.position)) / 2
        for rate in self.win_rates.values():
            for shift in (0.0, *self.by_type.values()):
                assert reach <= rate + shift <= 1 - reach, 'expected shares of wins and losses of at least 0'


def planted_study(planted: Planted, seed: int = 0, start: float = 1.7e9) -> tuple[list[Stored], dict[str, str]]:
    """The events of all participants, one participant after the other, and the kind of each cheater by id.

    Pairs and document types are assigned by turns.
    """
    random = np.random.default_rng(seed)
    stored: list[Stored] = []
    cheaters: dict[str, str] = {}
    pairs, types = list(planted.win_rates), list(planted.tasks)
    for number in range(planted.people):
        name = random.bytes(8).hex()
        cheat = _drawn(random, planted.cheaters)
        if cheat:
            cheaters[name] = cheat
        pair, document_type = pairs[number % len(pairs)], types[number // len(pairs) % len(types)]
        at = start + 60.0 * number
        for version, (event, seconds) in enumerate(_events(random, planted, pair, document_type, cheat), 1):
            at += seconds
            stored.append(Stored(len(stored) + 1, name, version, at, event))
    return stored, cheaters


def frozen(planted: Planted, **plan: Any) -> PlanFrozen:
    """The plan of a planted study, by the hash that its participants consented to."""
    somewhere = StudyModel(endpoint=EndpointSettings('http://127.0.0.1:9', 'm'))
    settings = StudySettings(
        models={model: somewhere for pair in planted.win_rates for model in pair},
        pairs=tuple(':'.join(pair) for pair in planted.win_rates),
        plan=PlanSettings(**plan),
    )
    return PlanFrozen(plan_of(settings), 'plan', 'config')


def store_planted(url: str, planted: Planted, seed: int = 0, **plan: Any) -> list[Stored]:
    """Puts a planted study into a store, its plan frozen before anybody came; returns the events that are in it."""
    events, _ = planted_study(planted, seed)
    assert planted.mode != 'preview'
    with Store(url, planted.mode) as store:
        store.append([Entry(STUDY, 1, 1.6e9, (Opened('1.0', 'config', ('a', 'b')), frozen(planted, **plan)))])
        store.append([Entry(each.participant, each.version, each.at, (each.event,)) for each in events])
        return store.events()


def _drawn(random: np.random.Generator, shares: Mapping[str, float]) -> str:
    """A key by its share, '' by what they leave."""
    point = random.random()
    for key, share in shares.items():
        if (point := point - share) < 0:
            return key
    return ''


def _events(
    random: np.random.Generator, planted: Planted, pair: tuple[str, str], document_type: str, cheat: str
) -> Iterator[tuple[Event, float]]:
    """The events of one participant, each with the seconds since the last one."""
    yield Arrived(planted.mode), 0.0
    agreed, right = random.random() >= planted.declines, random.random() >= planted.fails
    yield Consented(agreed, 'plan'), 20.0
    if not agreed:
        return
    yield Instructed(), 40.0
    yield Checked((0, 1), right, last=not right), 30.0
    if not right:
        return
    yield TypeAssigned(document_type), 0.0
    tasks = planted.tasks[document_type]
    task = list(tasks)[random.integers(len(tasks))]
    topic = tasks[task].split()
    yield Prepared(task, tuple(_text(random, topic, 12) for _ in range(3)), Conduct(0, 200, 60.0)), 60.0
    yield PairAssigned('training', *pair), 0.0
    yield from _turn(random, planted, pair, cheat, topic, 'left' if random.random() < 0.5 else 'right', 0.5, 0.5)
    yield PairAssigned('main', *pair), 0.0
    own, rate = random.random(), planted.win_rates[pair] + planted.by_type.get(document_type, 0.0)
    first_is_left = False
    for turn in range(int(random.integers(planted.exchanges[0], planted.exchanges[1] + 1))):
        first_is_left = not first_is_left if turn % 2 else bool(random.random() < 0.5)
        point = own if random.random() < planted.icc**0.5 else random.random()
        yield from _turn(random, planted, pair, cheat, topic, 'left' if first_is_left else 'right', point, rate)
        if random.random() < planted.leaves:
            if random.random() < 0.5:
                yield Withdrew('no time'), 10.0
            return
    yield Concluded(), 5.0
    start = AI_TEXT if cheat == 'ai' else ''
    text = start + _text(random, [] if cheat == 'off_task' else topic, 210)
    typed = Conduct(len(text), 2, 20.0) if cheat == 'pasted' else Conduct(0, len(text), 600.0)
    yield Wrote(text, cheat != 'inattentive', typed), typed.seconds or 0.0


def _turn(
    random: np.random.Generator,
    planted: Planted,
    pair: tuple[str, str],
    cheat: str,
    topic: Sequence[str],
    first: Side,
    point: float,
    rate: float,
) -> Iterator[tuple[Event, float]]:
    """A message, its replies and the vote. `first`: the side of the pair's first model; `point`: decides the vote."""
    message = _text(random, topic, 14)
    message = {'off_task': f'{OFF_TASK} {message.split()[-1]}', 'repeats': 'make it better please', 'ai': AI_TEXT}.get(
        cheat, message
    )
    writing = Conduct(0, len(message), 45.0)
    if cheat == 'fast':
        writing = Conduct(0, 3, 1.0)
    elif cheat == 'pasted':
        writing = Conduct(len(message), 2, 4.0)
    yield Asked(message, writing), writing.seconds or 0.0
    if random.random() < planted.voids:
        yield Voided('HTTP 500'), 3.0
        yield Retried(), 5.0
    left, right = pair if first == 'left' else pair[::-1]
    named = ('left',) if random.random() < planted.named else ()
    texts = [_text(random, topic, int(random.integers(20, 60))) for _ in range(2)]
    if named:
        texts[0] = f'I am {left}. {texts[0]}'
    yield Replied(left, right, *texts, 2.0, 3.0, named=named), 3.0
    choice = _choice(random, planted, cheat, first, point, rate)
    kept: Side = choice if choice != 'tie' else ('left' if random.random() < 0.5 else 'right')
    reason = '' if cheat == 'fast' else _text(random, topic, 8)
    yield (
        Preferred(choice, kept, reason, Conduct(0, len(reason), 1.0 if cheat == 'fast' else 25.0)),
        (1.0 if cheat == 'fast' else 25.0),
    )


def _choice(
    random: np.random.Generator, planted: Planted, cheat: str, first: Side, point: float, rate: float
) -> Choice:
    if cheat:
        return 'left' if cheat == 'left' else ('left', 'tie', 'right')[random.integers(3)]
    wins = rate - planted.ties / 2 + (planted.position if first == 'left' else -planted.position) / 2
    if point < wins:
        return first
    return 'tie' if point < wins + planted.ties else 'right' if first == 'left' else 'left'


def _text(random: np.random.Generator, topic: Sequence[str], words: int) -> str:
    """Words of the topic and others."""
    known = [*topic, *WORDS]
    return ' '.join([known[i] for i in random.integers(0, len(known), words)])
