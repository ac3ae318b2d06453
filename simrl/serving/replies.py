"""Pieces of answers -> the JSON objects of the API, whole or in chunks."""

import contextlib
import dataclasses
import functools
import string
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from simrl.conversations.chat import Chat, EncodingError
from simrl.serving.generation import Piece, Score
from simrl.serving.jobs import Job
from simrl.serving.text import INCOMPLETE, IncrementalDecoder

LEAST_LOG_PROB = -9999.0  # JSON has no infinity; other servers write this, too

Json = dict[str, Any]


class TokenTexts:
    """The texts of single tokens, as they are within a text."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._before: list[int] = []  # a token before: some tokenizers leave out the space at the start of a text
        for letter in string.ascii_letters:
            with contextlib.suppress(EncodingError):
                self._before = chat.encode(letter)[-1:]
                break
        self.text = functools.lru_cache(2**16)(self._text)

    def _text(self, token: int) -> str:
        decoder = IncrementalDecoder(self._chat, self._before)
        return decoder.push([token]) + decoder.rest()


@dataclasses.dataclass
class Answer:
    """One answer as far as it has come."""

    text: str = ''
    tokens: list[int] = dataclasses.field(default_factory=list)
    scores: list[Score] = dataclasses.field(default_factory=list)
    prompt_scores: tuple[Score, ...] = ()
    cached: int = 0
    last: Piece | None = None
    begun: bool = False
    offset: int = 0  # characters of tokens whose log-probabilities are written

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.scores += piece.scores
        self.prompt_scores += piece.prompt_scores
        self.cached += piece.cached or 0
        self.last = piece if piece.finish is not None else None


class Writer(Protocol):
    """Writes the answers of a job."""

    def whole(self, answers: Sequence[Answer]) -> Json:
        """The reply with all answers, which are over."""

    def chunks(self, index: int, answer: Answer, piece: Piece) -> Iterator[Json]:
        """The chunks of a piece, which `answer` has; `answer.begun` is False before the first."""

    def usage_chunk(self, answers: Sequence[Answer]) -> Json:
        """The chunk with the numbers of tokens."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Frame:
    """The fields that all objects of a reply have."""

    job: Job
    texts: TokenTexts
    id: str
    kind: str
    with_ids: bool
    with_usage: bool  # a field `usage`, null but in one chunk
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, kind: str, choices: list[Json], answers: Sequence[Answer]) -> Json:
        return self._reply(kind, choices) | {'usage': usage_of(self.job, answers)}

    def chunk(self, choice: Json) -> Json:
        return self._reply(self.kind, [choice]) | ({'usage': None} if self.with_usage else {})

    def usage_chunk(self, answers: Sequence[Answer]) -> Json:
        return self._reply(self.kind, []) | {'usage': usage_of(self.job, answers)}

    def _reply(self, kind: str, choices: list[Json]) -> Json:
        return {
            'id': self.id,
            'object': kind,
            'created': self.created,
            'model': self.job.served.name,
            'choices': choices,
        }


class ChatWriter:
    """Writes replies of /v1/chat/completions."""

    def __init__(self, job: Job, texts: TokenTexts, *, with_ids: bool, with_usage: bool) -> None:
        self._frame = _Frame(job, texts, f'chatcmpl-{uuid.uuid4().hex}', 'chat.completion.chunk', with_ids, with_usage)

    def whole(self, answers: Sequence[Answer]) -> Json:
        choices = []
        for index, answer in enumerate(answers):
            message = {'role': 'assistant', 'content': answer.text, 'refusal': None}
            choice = {'index': index, 'message': message, 'logprobs': self._log_probs(answer.scores)}
            choices.append(choice | _end_of(answer.last) | self._ids(answer.tokens))
        return self._frame.whole('chat.completion', choices, answers) | self._prompt_ids()

    def chunks(self, index: int, answer: Answer, piece: Piece) -> Iterator[Json]:
        if not answer.begun:
            yield self._chunk(index, {'role': 'assistant', 'content': '', 'refusal': None}) | self._prompt_ids()
        if piece.text or ((self._frame.with_ids or piece.scores) and piece.tokens):
            yield self._chunk(index, {'content': piece.text}, self._log_probs(piece.scores), piece.tokens)
        if piece.finish is not None:
            yield self._chunk(index, {}, None, (), piece)

    def usage_chunk(self, answers: Sequence[Answer]) -> Json:
        return self._frame.usage_chunk(answers)

    def _chunk(
        self, index: int, delta: Json, log_probs: Json | None = None, ids: Sequence[int] = (), last: Piece | None = None
    ) -> Json:
        choice = {'index': index, 'delta': delta, 'logprobs': log_probs} | _end_of(last)
        return self._frame.chunk(choice | (self._ids(ids) if ids else {}))

    def _ids(self, ids: Sequence[int]) -> Json:
        return {'token_ids': list(ids)} if self._frame.with_ids else {}

    def _prompt_ids(self) -> Json:
        return {'prompt_token_ids': list(self._frame.job.generations[0].prompt)} if self._frame.with_ids else {}

    def _log_probs(self, scores: Sequence[Score]) -> Json | None:
        if not self._frame.job.generations[0].log_probs:
            return None

        def entry(token: int, log_prob: float) -> Json:
            text = self._frame.texts.text(token)
            known = None if INCOMPLETE in text else list(text.encode())
            return {'token': text, 'bytes': known, 'logprob': max(log_prob, LEAST_LOG_PROB)}

        content = [
            entry(score.id, score.log_prob) | {'top_logprobs': [entry(*top) for top in score.top]} for score in scores
        ]
        return {'content': content, 'refusal': None}


class CompletionWriter:
    """Writes replies of /v1/completions."""

    def __init__(self, job: Job, texts: TokenTexts, *, with_ids: bool, with_usage: bool) -> None:
        self._frame = _Frame(job, texts, f'cmpl-{uuid.uuid4().hex}', 'text_completion', with_ids, with_usage)

    def whole(self, answers: Sequence[Answer]) -> Json:
        choices = []
        for index, answer in enumerate(answers):
            text = self._echoed(index) + answer.text
            choice = {'index': index, 'text': text, 'logprobs': self._log_probs(index, answer, answer.scores)}
            choices.append(choice | _end_of(answer.last) | self._ids(answer.tokens) | self._prompt_ids(index))
        return self._frame.whole('text_completion', choices, answers)

    def chunks(self, index: int, answer: Answer, piece: Piece) -> Iterator[Json]:
        first = not answer.begun
        text = self._echoed(index) * first + piece.text
        log_probs = self._log_probs(index, answer, piece.scores)
        if text or piece.finish is not None or log_probs is not None or (self._frame.with_ids and piece.tokens):
            choice = {'index': index, 'text': text, 'logprobs': log_probs}
            choice |= _end_of(piece) | self._ids(piece.tokens) | (self._prompt_ids(index) if first else {})
            yield self._frame.chunk(choice)

    def usage_chunk(self, answers: Sequence[Answer]) -> Json:
        return self._frame.usage_chunk(answers)

    def _echoed(self, index: int) -> str:
        job = self._frame.job
        return job.prompt_texts[index // job.n] if job.prompt_texts else ''

    def _ids(self, ids: Sequence[int]) -> Json:
        return {'token_ids': list(ids)} if self._frame.with_ids else {}

    def _prompt_ids(self, index: int) -> Json:
        return {'prompt_token_ids': list(self._frame.job.generations[index].prompt)} if self._frame.with_ids else {}

    def _log_probs(self, index: int, answer: Answer, scores: Sequence[Score]) -> Json | None:
        """The log-probabilities of some tokens; before the answer's own ones come those of an echoed prompt."""
        generation = self._frame.job.generations[index]
        if not generation.log_probs:
            return None
        given: list[tuple[int, Score | None]] = [(score.id, score) for score in scores]
        if generation.score_prompt and not answer.begun:
            of_prompt = zip(generation.prompt, (None, *answer.prompt_scores), strict=True)
            given = [*of_prompt, *given]
        texts, offsets = [], []
        for token, _ in given:
            texts.append(self._frame.texts.text(token))
            offsets.append(answer.offset)
            answer.offset += len(texts[-1])
        return {
            'tokens': texts,
            'token_logprobs': [None if score is None else max(score.log_prob, LEAST_LOG_PROB) for _, score in given],
            'top_logprobs': [None if score is None else self._top(score) for _, score in given],
            'text_offset': offsets,
        }

    def _top(self, score: Score) -> dict[str, float]:
        """The most probable tokens by their text, and the token itself; of equal texts the most probable counts."""
        found: dict[str, float] = {}
        for token, log_prob in (*score.top, (score.id, score.log_prob)):
            text = self._frame.texts.text(token)
            found[text] = max(found.get(text, LEAST_LOG_PROB), log_prob)
        return found


def usage_of(job: Job, answers: Sequence[Answer]) -> Json:
    """The numbers of tokens. A prompt counts once, whatever the number of its answers."""
    prompts = sum(len(generation.prompt) for generation in job.generations[:: job.n])
    sampled = sum(len(answer.tokens) for answer in answers)
    return {
        'prompt_tokens': prompts,
        'completion_tokens': sampled,
        'total_tokens': prompts + sampled,
        'prompt_tokens_details': {'cached_tokens': sum(answer.cached for answer in answers[:: job.n])},
    }


def _end_of(last: Piece | None) -> Json:
    """The reason why an answer ended; nulls before that."""
    return {'finish_reason': last and last.finish, 'stop_reason': last and last.stop}
