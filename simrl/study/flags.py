"""Flags of participants: what screens and judges may find, and the thresholds of screens."""

import dataclasses

MEANINGS = {
    'attention': 'the attention item was answered wrongly',
    'fast': 'votes came before the replies can have been read',
    'fast_writing': 'messages were written faster than people type or speak',
    'pasted': 'what was written was pasted from elsewhere',
    'assistant_phrases': 'messages have phrases or marks of an assistant',
    'off_task': 'what was written is not about the task',
    'copied_task': 'messages are the text of the task',
    'repeated_messages': 'messages are almost alike',
    'repeated_reasons': 'reasons are almost alike',
    'one_side': 'the vote was always the same',
    'little_effort': 'messages are of very few words',
    'like_another': 'texts are those of another participant',
    'other_session': 'the study was entered by several sessions of the panel',
    'judge_borderline': 'a judge finds that the participant took little part in the task',
    'judge_low_quality': 'a judge finds that the participant took no part in the task',
}  # by flag
JUDGE = 'judge_'  # beginning of a judge's verdicts; that of JUDGED_OK is stored and is no flag
JUDGED_OK = 'judge_ok'


@dataclasses.dataclass(frozen=True)
class Flag:
    """Something about a participant that an analysis should know: its name, of `MEANINGS`, and what was found."""

    flag: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ScreenSettings:
    """Thresholds of the screens, with their reasons. Rates on real conversations: see `screens`."""

    # Adults read 240 words a minute and skim a few times as many (Brysbaert 2019). Below `vote_seconds` nobody has seen
    # two replies and typed a reason; above `max_vote_seconds` somebody who skims long replies is not called too fast.
    read_words: float = 1000.0  # words of both replies per minute
    vote_seconds: float = 4.0
    max_vote_seconds: float = 15.0
    fast_share: float = 0.5  # of votes: anyone is sure at once now and then
    # People type 40 to 100 words a minute and dictate 160.
    written_words: float = 200.0  # words per minute
    written_least: int = 25  # words of a message that is timed: short ones depend on delays of the network
    # Pasting is allowed. Passages of replies, of own texts and of the task do not count: they are quoted.
    pasted_share: float = 0.5  # of the characters of the messages, or of the final text
    pasted_chars: int = 200  # at least: a pasted name or line is nothing
    phrases: int = 1  # by which assistants address people
    marks: int = 4  # different words and formats that assistants like
    # Both must be missed: people who write briefly share few words with the task, people who write much a small share.
    shared_stems: int = 3
    shared_share: float = 0.08
    judged_stems: int = 8  # of messages with fewer nothing can be said
    copied_share: float = 0.8  # of a message's words in passages of the task
    copied_messages: int = 2  # once is sensible: the assistants do not see the task
    alike: float = 0.8  # likeness of a message to an earlier one
    repeated_share: float = 0.5  # of messages after the first
    reasons_alike: float = 0.9
    reasons_share: float = 0.8  # of reasons that are alike
    least_reasons: int = 4
    # Of honest people who like what they see on the left as often as on the right 2 (1/2)^6 = 3% are flagged by chance.
    one_side_votes: int = 6  # with the practice round
    effort_words: float = 3.0  # mean words of a message; the least of 51 people is 5
    others_share: float = 0.5  # of the runs of words of a text that another participant has, too
    others_words: int = 20  # of a text that is compared: short messages are often alike
