"""Inputs of a case, the same for every side: openings of one length in text and ids, or rows to learn from.

Openings are words of one token each, so that a template writes them as the ids that they were made of. Ends of messages
are never sampled, so that all messages have the length of their budget and every side samples equally many tokens.
"""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import ASSISTANT, TEMPLATE, USER, Chat
from simrl.conversations.views import natural_prompt
from simrl.models.transformer import TransformerConfig
from simrl.rollouts.trajectories import Trajectories
from tools.benchmark.job import Job

CONVERSATIONS = ('sampling', 'grpo_step', 'conversations')  # cases that start from openings
FULL, RAGGED, SFT = 'update_full', 'update_ragged', 'sft'
SPANS = 6  # of a ragged row, its prompt the first


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sizes of a case, of one row where not said otherwise; the zeros are of other cases.

    Attributes:
        prompt: tokens before the first header of a sampled message.
        own_header, partner_header: tokens of the assistant's and the user's headers.
        tokens, trained: of all rows that are learned from, padding left out.
    """

    prompt: int = 0
    own_header: int = 0
    partner_header: int = 0
    tokens: int = 0
    trained: int = 0


def message_tokens(chat: Chat, context: int, turns: int) -> int:
    """The tokens of every message of a conversation, its opening included, that fills `context`.

    Raises:
        ValueError: there is no room for one.
    """
    fixed = len(natural_prompt(chat, _words(chat, 1, 1, 0)[0][0]).tokens) - 1
    per_turn = len(chat.header('assistant')) + len(chat.header('user')) + 2
    tokens = (context - fixed - turns * per_turn) // (2 * turns + 1)
    if tokens < 1:
        least = fixed + turns * per_turn + 2 * turns + 1
        raise ValueError(f'--context: expected at least {least} tokens for {turns} turns, found {context}')
    return tokens


def write(job: Job, chat: Chat, vocab_size: int) -> Counts:
    """Writes `job.arrays` and `job.texts`, and counts what is in them."""
    job.inputs.parent.mkdir(parents=True, exist_ok=True)
    if job.case in CONVERSATIONS:
        return _write_openings(job, chat, vocab_size)
    return _write_rows(job, chat)


def _write_openings(job: Job, chat: Chat, vocab_size: int) -> Counts:
    own, partner = chat.header('assistant'), chat.header('user')
    if job.case == 'conversations':
        opening = job.new_tokens
    else:
        fixed = len(natural_prompt(chat, _words(chat, 1, 1, 0)[0][0]).tokens) - 1
        opening = job.context - job.new_tokens - fixed - len(own)
        if opening < 1:
            least = job.new_tokens + fixed + len(own) + 1
            raise ValueError(
                f'--context: expected at least {least} tokens to sample {job.new_tokens}, found {job.context}'
            )
    texts, ids = _words(chat, opening, job.batch // job.samples, seed=0)
    views = [natural_prompt(chat, text).tokens for text in texts]
    for text, row, view in zip(texts, ids, views, strict=True):
        if len(view) != len(views[0]) or view[-len(row) - 1 : -1].tolist() != row:
            raise ValueError(f'the chat template: expected it to leave an opening as it is, found another for {text!r}')
    prompts = np.repeat(np.stack(views), job.samples, axis=0)
    np.savez(job.arrays, prompts=prompts, token_mask=content_ids(chat, vocab_size))
    plain = {
        'openings': texts,
        'own_header': own,
        'partner_header': partner,
        'end_of_turn': chat.end_of_turn['assistant'],
        'partner_end_of_turn': chat.end_of_turn['user'],
    }
    job.texts.write_text(json.dumps(plain) + '\n', encoding='utf-8')
    return Counts(prompt=prompts.shape[1], own_header=len(own), partner_header=len(partner))


def all_ids(config: TransformerConfig) -> jax.Array:
    """All ids, bool `[V]`: the softmax of training runs over them, as a peer's does."""
    return jnp.arange(config.padded_vocab_size) < config.vocab_size


def content_ids(chat: Chat, vocab_size: int) -> np.ndarray:
    """Ids that every side samples from and scores over, those of text, bool `[V]`. No end is among them."""
    token_mask = chat.token_mask(vocab_size, terminal=False, header='assistant')
    token_mask[[*chat.end_of_turn.values()]] = False
    return token_mask


def _words(chat: Chat, length: int, number: int, seed: int) -> tuple[list[str], list[list[int]]]:
    """`number` texts of exactly `length` tokens, and their ids."""
    pieces = {i: chat.decode([i]) for i in np.flatnonzero(content_ids(chat, chat.size)).tolist()}
    first = [i for i, piece in pieces.items() if re.fullmatch('[a-z]+', piece)]
    later = [i for i, piece in pieces.items() if re.fullmatch(' [a-z]+', piece)] or first
    random = np.random.default_rng(seed)
    texts: list[str] = []
    rows: list[list[int]] = []
    for _ in range(20 * number):
        ids = [int(random.choice(first)), *map(int, random.choice(later, length - 1))]
        text = ''.join(pieces[i] for i in ids)
        if chat.encode(text) == ids:
            texts.append(text)
            rows.append(ids)
        if len(texts) == number:
            return texts, rows
    raise ValueError(f'the tokenizer: expected texts that are {length} words of one token each, found {len(texts)}')


def _write_rows(job: Job, chat: Chat) -> Counts:
    """Rows of random content: full ones that are learned whole, or ragged ones in which two roles take turns."""
    batch, context = job.batch, job.context
    if job.case == RAGGED and batch < 2:
        raise ValueError(f'--batch: expected at least 2 rows, which are one group, found {batch}')
    if context < 2 * SPANS:
        raise ValueError(f'--context: expected at least {2 * SPANS} tokens, found {context}')
    random = np.random.default_rng(0)
    content = np.flatnonzero(content_ids(chat, chat.size))
    tokens = random.choice(content, (batch, context)).astype(np.int32)
    length = np.full(batch, context, np.int32)
    if job.case == FULL:
        role = np.full((batch, context), USER, np.int8)
        turn = np.zeros((batch, context), np.int32)
    else:
        length[1:] = random.integers(max(context // 4, SPANS), context + 1, batch - 1)
        role = np.zeros((batch, context), np.int8)
        turn = np.full((batch, context), -1, np.int32)
        for row in range(batch):
            cuts = np.sort(random.choice(np.arange(1, length[row]), SPANS - 1, replace=False))
            for span, (start, end) in enumerate(zip([0, *cuts], [*cuts, length[row]], strict=True)):
                role[row, start:end] = TEMPLATE if span == 0 else (ASSISTANT if span % 2 else USER)
                turn[row, start:end] = (span - 1) // 2 if span % 2 else -1
    real = np.arange(context) < length[:, None]
    tokens, role = np.where(real, tokens, 0), np.where(real, role, 0).astype(np.int8)
    trained = role == (ASSISTANT if job.case == RAGGED else USER)
    trained[:, 0] = False
    reward = random.random(batch).astype(np.float32)
    np.savez(job.arrays, tokens=tokens, role=role, turn=turn, length=length, trained=trained, reward=reward)
    job.texts.write_text('{}\n', encoding='utf-8')
    return Counts(tokens=int(length.sum()), trained=int(trained.sum()))


def check_folder(folder: pathlib.Path) -> None:
    """Refuses to write results over others."""
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f'--output: expected {folder} to be a new or empty folder, found files in it')


def trajectories_of(
    tokens: np.ndarray | jax.Array, role: np.ndarray | jax.Array, turn: np.ndarray | jax.Array, length: jax.Array
) -> Trajectories:
    """Rows to learn from without a conversation: no messages, all rows one group.

    Args:
        tokens, role, turn: `[B, T]`.
        length: `[B]`.
    """
    rows = len(length)
    zeros, no_message = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, 0), jnp.int32)
    return Trajectories(
        tokens=jnp.asarray(tokens),
        role=jnp.asarray(role),
        turn=jnp.asarray(turn),
        log_prob=jnp.zeros(tokens.shape, jnp.float32),
        length=jnp.asarray(length),
        messages=no_message[..., None],
        message_length=no_message,
        truncated=no_message,
        **dict.fromkeys(
            (
                'num_messages',
                'num_given',
                'end_reason',
                'decoded_steps',
                'loop_steps',
                'resamples',
                'example_id',
                'group',
            ),
            zeros,
        ),
    )
