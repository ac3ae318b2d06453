"""A tiny random model behind an engine, and a slow loop that answers the same requests."""

import dataclasses
import functools
import threading
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simrl.conversations.templates import chat_from_huggingface
from simrl.models import sharding, transformer
from simrl.models.transformer import Execution
from simrl.rollouts.agents import ModelAgent, assistant
from simrl.rollouts.collect import for_sampling
from simrl.rollouts.token_sampling import Sampling, sample_token
from simrl.serving import engine as engines
from simrl.serving import shapes
from simrl.serving.engine import Engine
from simrl.serving.generation import Event, Failure, Generation, Piece
from simrl.serving.shapes import EngineSettings
from tests.tiny import CHATML, byte_tokenizer, tiny_config

TOKENIZER = byte_tokenizer(template='<|endoftext|>' + CHATML)
CHAT = chat_from_huggingface(TOKENIZER)
CONFIG = tiny_config(CHAT.size)
CONTEXT = 64
SETTINGS = EngineSettings(rows=5, context=CONTEXT, queue=100, chunk=8, block=3)


def params() -> transformer.Params:
    """Scaled so that what is said depends strongly on what was said before, and ends are frequent."""
    decoder = transformer.init_params(jax.random.key(3), CONFIG)['decoder']
    return {'decoder': {**decoder, 'head': decoder['head'] * 8, 'embedding': decoder['embedding'] * 50}}


@functools.cache
def agent() -> ModelAgent:
    """Of few kinds of bytes, so that ends and repeats are frequent."""
    made = assistant(CHAT, CONFIG, params(), Execution(), max_new_tokens=8, sampling=Sampling())
    allowed = [*CHAT.encode('abcdefgh[] .é'), CHAT.end_of_turn['assistant']]
    mask = np.isin(np.arange(CONFIG.padded_vocab_size), allowed)
    made = dataclasses.replace(made, policy=dataclasses.replace(made.policy, token_mask=mask))
    return for_sampling(made, sharding.make_mesh(1, 1, jax.devices()[:1]))


def make_engine(settings: EngineSettings = SETTINGS, smallest: int = 16) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, 'SMALLEST_SIZE', smallest)
        return Engine(agent().policy, CHAT, settings, threading.Condition(), knows_terminal=False)


@functools.cache
def engine() -> Engine:
    """One for all tests that leave it idle: compiling takes longer than what they do."""
    return make_engine()


def answers(engine: Engine, asked: Iterable[Generation]) -> list[list[Event]]:
    """The events of requests that are submitted at once."""
    found: list[list[Event]] = []
    for generation in asked:
        found.append([])
        engine.submit(generation, found[-1].append)
    while engine.busy:
        engine.step()
    return found


def joined(events: list[Event]) -> Piece:
    """The pieces of an answer as one."""
    assert not any(isinstance(event, Failure) for event in events), events
    pieces = [event for event in events if isinstance(event, Piece)]
    assert [piece.finish is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert [piece.cached is None for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    last = pieces[-1]
    return Piece(
        ''.join(piece.text for piece in pieces),
        tuple(i for piece in pieces for i in piece.tokens),
        tuple(score for piece in pieces for score in piece.scores),
        pieces[0].prompt_scores,
        pieces[0].cached,
        last.finish,
        last.stop,
    )


@jax.jit
def _logits(tokens: jax.Array) -> jax.Array:
    hidden, _ = transformer.apply(params(), CONFIG, Execution(), tokens[None])
    return transformer.project(params(), hidden[0])


def logits_of(ids: list[int]) -> np.ndarray:
    """Logits after each of the ids, of one pass over the whole row, float32 `[N, V]`."""
    padded = np.zeros(CONTEXT, np.int32)
    padded[: len(ids)] = ids
    return np.asarray(_logits(padded))[: len(ids)]


_sample = jax.jit(sample_token, static_argnames=('top_k', 'top_p', 'min_p'))


def slow(generation: Generation) -> tuple[list[int], bool]:
    """The sampled ids and whether an end ended them: each from a pass over the whole row."""
    masks = {'chat': np.asarray(agent().policy.token_mask), 'all': np.arange(CONFIG.padded_vocab_size) < CHAT.size - 1}
    key = jax.random.key(0)
    for number in (generation.seed & 0xFFFFFFFF, generation.seed >> 32, generation.sample):
        key = jax.random.fold_in(key, number)
    ids, ends = list(generation.prompt), engines.end_ids(CHAT) | set(generation.stop_ids)
    settings = dataclasses.asdict(generation.sampling)
    temperature = settings.pop('temperature')
    for i in range(generation.max_tokens):
        uniform = jax.random.uniform(jax.random.fold_in(key, i))
        logits = jnp.asarray(logits_of(ids)[-1:])
        token, _ = _sample(logits, masks[generation.vocabulary], uniform[None], temperature, **settings)
        ids.append(int(token[0]))
        if ids[-1] in ends:
            return ids[len(generation.prompt) :], True
    return ids[len(generation.prompt) :], False
