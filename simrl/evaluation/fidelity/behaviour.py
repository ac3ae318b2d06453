"""Behaviour of a simulator beside people's: when it ends, whether it stays in its role, what it says of its intent.

The questions are those of UserLM (arXiv:2510.06552, its sections on termination, roles, intents and first turns), asked
of replayed turns; where its paper sets traps for simulators or has a detector, here stands what texts alone can show.
"""

import dataclasses
import re
from collections.abc import Hashable, Sequence

import numpy as np

from simrl.evaluation.fidelity.features import WORD
from simrl.evaluation.fidelity.turns import Turn
from simrl.evaluation.statistics import Estimate, percentile_interval, resampled_means
from simrl.simulators.replies import AS_ASSISTANT, REASONING

RESAMPLES = 2000
LEAKED_WORDS = 5  # words of the intent in a row, verbatim, that make a message leak it
# What an assistant says of itself or offers. People do at times: their share stands beside the simulator's.
OFFERS = re.compile(
    r"\bas an ai\b|\bi(?:['’]m| am) an? (?:ai|language model|virtual assistant|chatbot)\b|\blanguage model\b"
    r'|\bhow (?:can|may) i (?:help|assist)\b|\b(?:happy|glad|here) to (?:help|assist)\b'
    r'|\bi (?:can|could|would be happy to) (?:help|assist) you\b|\bfeel free to (?:ask|reach|let)\b'
    r'|\blet me know if you\b|\bis there anything else (?:i can|you)\b|\bi hope this helps\b'
    r"|^\W*(?:certainly|absolutely|of course|sure)[!,.]? (?:here|i can|i['’]d|let)"
    r"|^\W*here(?:['’]s| is| are) (?:a|an|the|some|your)\b",
    re.IGNORECASE,
)
# Words that say nothing of a goal.
_STOP_WORDS = (
    'a about after again all also am an and any are as at be because been before being but by can could did do does '
    "doing don't down for from get had has have having he her here him his how i i'm if in into is isn't it it's its "
    'just like me more most my no not now of off on one only or other our out over own please she should so some such '
    "than that that's the their them then there these they this those through to too under until up very want was we "
    "were what what's when where which while who why will with would you your you're ok okay thanks thank yes "
)
STOP_WORDS = frozenset(_STOP_WORDS.split())


@dataclasses.dataclass(frozen=True)
class Termination:
    """Ends of a simulator, of conversations that people ended: it should end with the person's last turn, and no other.

    Precision, recall and F1 of "ends with this turn" over the replayed turns, their intervals over conversations; None
    where nothing can be divided.

    Attributes:
        always: the F1 of one that ends with every turn.
        num_turns, num_ends: turns, and those with which people ended.
        num_conversations: with a natural end that was replayed.
    """

    precision: Estimate | None
    recall: Estimate
    f1: Estimate
    always: float
    num_turns: int
    num_ends: int
    num_conversations: int


def termination(turns: Sequence[Turn], *, level: float = 0.95, seed: int = 0) -> tuple[Termination | None, int, int]:
    """Ends of a simulator; None without a conversation to score.

    Scored are conversations with a natural end, all of whose turns were replayed, the last one included.

    Args:
        turns: replayed, those that failed as well.

    Returns:
        The numbers; of how many conversations the end is not natural; and of how many with a natural end it was not
        replayed, or a turn failed.
    """
    by_conversation: dict[str, list[Turn]] = {}
    for turn in turns:
        by_conversation.setdefault(turn.conversation, []).append(turn)
    natural = [own for own in by_conversation.values() if own[0].end == 'natural']
    whole = [own for own in natural if any(turn.real_end for turn in own) and all(turn.replayed for turn in own)]
    unknown, incomplete = len(by_conversation) - len(natural), len(natural) - len(whole)
    scored = [turn for own in whole for turn in own]
    if not scored:
        return None, unknown, incomplete
    real, found = (np.array([getattr(turn, name) for turn in scored], bool) for name in ('real_end', 'ended'))
    clusters = [turn.conversation for turn in scored]
    counts = np.array([real & found, found, real], np.float64)
    draws = resampled_means(counts, clusters, resamples=RESAMPLES, seed=seed)
    (both, ended, due), drawn = counts.mean(axis=1), draws
    conversations = len(set(clusters))

    def estimate(value: float, values: np.ndarray) -> Estimate:
        low, high = percentile_interval(values, conversations, level=level)
        return Estimate(float(value), low, high, len(scored), conversations, level)

    with np.errstate(invalid='ignore'):
        return (
            Termination(
                precision=estimate(both / ended, drawn[0] / drawn[1]) if ended else None,
                recall=estimate(both / due, drawn[0] / drawn[2]),
                f1=estimate(2 * both / (ended + due), 2 * drawn[0] / (drawn[1] + drawn[2])),
                always=float(2 * due / (1 + due)),
                num_turns=len(scored),
                num_ends=int(real.sum()),
                num_conversations=conversations,
            ),
            unknown,
            incomplete,
        )


def speaks_as_assistant(text: str) -> bool:
    """True if a text is labelled as an assistant's, shows its reasoning, or offers what an assistant does."""
    return bool(AS_ASSISTANT.match(text) or REASONING.search(text) or OFFERS.search(text))


def content_words(text: str) -> frozenset[str]:
    """The words of a text in lower case, but for those that say nothing of a goal."""
    return frozenset(word.lower().replace('’', "'") for word in WORD.findall(text)) - STOP_WORDS


def intent_overlap(text: str, intent: str) -> float:
    """The share of a message's content words that the intent has: 1 of a copy; 0 of a message without any."""
    said = content_words(text)
    return len(said & content_words(intent)) / len(said) if said else 0.0


def leaks_intent(text: str, intent: str) -> bool:
    """True if a message has `LEAKED_WORDS` words of the intent in a row, or all words of a shorter one."""

    def words(of: str) -> tuple[str, ...]:
        return tuple(word.lower() for word in WORD.findall(of))

    said, told = words(text), words(intent)
    size = min(LEAKED_WORDS, len(told))
    runs = {told[i : i + size] for i in range(len(told) - size + 1)} if size else set()
    return any(said[i : i + size] in runs for i in range(len(said) - size + 1))


def intent_coverage(texts: Sequence[str], intent: str) -> float:
    """The share of the intent's content words that a user's messages have together: how far they follow it."""
    told = content_words(intent)
    said = frozenset[str]().union(*map(content_words, texts))
    return len(said & told) / len(told) if told else 0.0


def diversity(texts: Sequence[str], clusters: Sequence[Hashable], *, level: float = 0.95, seed: int = 0) -> Estimate:
    """The mean over pairs of openings of 1 less the Jaccard index of their sets of words: |A & B| / |A | B|.

    The interval resamples openings; pairs are of different ones, whatever their copies.

    Args:
        texts: openings.
        clusters: of each, the conversation; pairs are between different ones.

    Raises:
        ValueError: all openings are of one conversation.
    """
    ids = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    member = np.array([ids[cluster] for cluster in clusters])
    if len(ids) < 2:
        raise ValueError(f'diversity: expected openings of at least 2 conversations, found {len(ids)}')
    sets = [frozenset(word.lower() for word in text.split()) for text in texts]
    column = {word: number for number, word in enumerate(sorted(frozenset[str]().union(*sets)))}
    there = np.zeros((len(sets), max(len(column), 1)))
    for row, words in enumerate(sets):
        there[row, [column[word] for word in words]] = 1.0
    size, common = there.sum(axis=1), there @ there.T
    union = size[:, None] + size - common
    apart = 1 - np.divide(common, union, out=np.ones_like(common), where=union > 0)
    groups = np.zeros((len(ids), len(sets)))
    groups[member, np.arange(len(sets))] = 1.0
    apart, pairs = groups @ apart @ groups.T, np.outer(groups.sum(axis=1), groups.sum(axis=1))
    for matrix in (apart, pairs):
        np.fill_diagonal(matrix, 0.0)
    random = np.random.default_rng(seed)
    weights = random.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), RESAMPLES).astype(np.float64)
    with np.errstate(invalid='ignore'):
        draws = np.einsum('rc,rc->r', weights @ apart, weights) / np.einsum('rc,rc->r', weights @ pairs, weights)
    low, high = percentile_interval(draws, len(ids), level=level)
    return Estimate(float(apart.sum() / pairs.sum()), low, high, len(sets), len(ids), level)
