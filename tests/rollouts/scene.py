"""Two tiny random models of different sizes and eight ragged conversations for them to have.

The user speaks in a swapped view: under other headers and with another end-of-turn than the assistant hears it with.
Of the rows, 0, 2, 5 and 6 have a given opening; 0 and 2 hold it in the user's view, 5 and 6 only as part of the prompt.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from simrl.conversations.chat import ASSISTANT, TEMPLATE, USER
from simrl.models import transformer
from simrl.models.layouts import layers_apart, output_major
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rollouts.agents import GenerationSpec, Policy
from simrl.rollouts.context import PREFIX, Context, grow_cache, prefill
from simrl.rollouts.dialogue import capacity, conversing
from simrl.rollouts.interleave import interleave
from simrl.rollouts.state import Dialogue, init_dialogue, row_keys

EOT_USER, EOT_ASSISTANT, TERMINAL = 190, 191, 199
CONTENT = range(105, 135)  # on both sides of a sampler block's border
PAIR_STOPS = tuple((a + 1, a) for a in CONTENT[1:-1:2])
TRIPLE_STOP = (121, 115, 123)  # a run that occurs
TURNS = 3
ROWS = 8
OPENINGS = {0: (110, 111, 112), 2: (120,), 5: (107, 108, 109, 106), 6: (133, 105)}
IN_BOTH_VIEWS = (0, 2)
TEMPERATURES = (1.0, 1.1)  # the user's and the assistant's

USER_CONFIG = TransformerConfig(
    vocab_size=200, model_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=32, max_positions=256
)
ASSISTANT_CONFIG = TransformerConfig(
    vocab_size=300, model_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, max_positions=256
)
USER_SPEC = GenerationSpec(
    config=USER_CONFIG,
    execution=Execution(),
    role=USER,
    own_header=(192, 193),
    partner_header=(194, 195, 196),
    own_first_header=(193,),
    partner_first_header=(195, 196),
    end_of_turn=EOT_ASSISTANT,
    partner_end_of_turn=EOT_USER,
    max_new_tokens=7,
    stop_sequences=((TERMINAL,), *PAIR_STOPS, TRIPLE_STOP),
    top_k=24,
    top_p=0.95,
    min_p=0.01,
    feed_chunk=4,
)
ASSISTANT_SPEC = GenerationSpec(
    config=ASSISTANT_CONFIG,
    execution=Execution(),
    role=ASSISTANT,
    own_header=(192, 193),
    partner_header=(192, 194),
    own_first_header=(193,),
    partner_first_header=(194,),
    end_of_turn=EOT_ASSISTANT,
    partner_end_of_turn=EOT_USER,
    max_new_tokens=5,
)
SPECS = (USER_SPEC, ASSISTANT_SPEC)


def _token_masks() -> tuple[np.ndarray, np.ndarray]:
    masks = []
    for spec in SPECS:
        mask = np.zeros(spec.config.padded_vocab_size, bool)
        mask[list(CONTENT)] = True
        mask[spec.end_of_turn] = True
        masks.append(mask)
    masks[0][TERMINAL] = True
    return masks[0], masks[1]


TOKEN_MASKS = _token_masks()


def _prompts(side: int) -> list[list[tuple[int, int, int]]]:
    """Each row's prompt in one view, as (token, role, message)."""
    random = np.random.default_rng(side)
    spec = SPECS[side]
    rows = []
    for row in range(ROWS):
        prompt = [(int(token), TEMPLATE, PREFIX) for token in random.integers(0, 100, random.integers(2, 9))]
        if row in OPENINGS and (side == 1 or row in IN_BOTH_VIEWS):
            header = spec.own_first_header if side == 0 else spec.partner_first_header
            end = spec.end_of_turn if side == 0 else spec.partner_end_of_turn
            prompt += [(token, TEMPLATE, 0) for token in header]
            prompt += [(token, USER, 0) for token in (*OPENINGS[row], end)]
        rows.append(prompt)
    return rows


PROMPTS = (_prompts(0), _prompts(1))
CAPACITIES = tuple(
    capacity(spec, SPECS[1 - side].max_new_tokens, max(map(len, PROMPTS[side])), TURNS)
    for side, spec in enumerate(SPECS)
)


@functools.cache
def params_of_both() -> tuple[Params, Params]:
    """Both models' parameters for sampling, scaled so that what is said depends strongly on what was said before."""
    both = []
    for seed, spec in enumerate(SPECS):
        tree = jax.tree.map(np.asarray, transformer.init_params(jax.random.key(seed), spec.config))
        decoder = tree['decoder']
        scaled = {**decoder, 'head': decoder['head'] * 20, 'embedding': decoder['embedding'] * 50}
        both.append({'decoder': output_major(layers_apart(scaled))})
    return jax.device_put((both[0], both[1]))


@functools.cache
def policies() -> tuple[Policy, Policy]:
    """The user's and the assistant's."""
    user, assistant = (
        Policy(params=params, token_mask=mask, temperature=temperature, spec=spec)
        for params, mask, temperature, spec in zip(params_of_both(), TOKEN_MASKS, TEMPERATURES, SPECS, strict=True)
    )
    return user, assistant


def keys(rows: range | list[int] = range(ROWS)) -> jax.Array:
    return row_keys(7, 3, np.asarray(rows, np.uint32), np.zeros(len(rows), np.int32))


jit_prefill = jax.jit(prefill, static_argnames='capacity')


def prompts(side: int, rows: list[int], extra: int = 0) -> tuple[np.ndarray, ...]:
    """What `prefill` takes of the prompts of `rows` in one view: tokens, role, message and length; `extra` padding."""
    chosen = [PROMPTS[side][row] for row in rows]
    width = max(map(len, PROMPTS[side])) + extra
    padded = np.array([prompt + [(77, USER, 5)] * (width - len(prompt)) for prompt in chosen])  # junk after the end
    tokens, role, message = (padded[..., i].astype(dtype) for i, dtype in enumerate(('int32', 'int8', 'int16')))
    return tokens, role, message, np.array([len(prompt) for prompt in chosen], np.int32)


def context(side: int, rows: list[int], extra: int = 0, room: bool = True) -> Context:
    """The prompts of `rows` in one view; `extra` more capacity and padding; no `room`: its cache holds them alone."""
    view = jit_prefill(
        policies()[side],
        *prompts(side, rows, extra),
        capacity=CAPACITIES[side] + extra,
    )
    return grow_cache(view, view.capacity) if room else view


@jax.jit
def _begin(user: Context, assistant: Context, *opening: jax.Array) -> Dialogue:
    return init_dialogue(
        user,
        assistant,
        *opening,
        turns=TURNS,
        max_new_tokens=(USER_SPEC.max_new_tokens, ASSISTANT_SPEC.max_new_tokens),
    )


def start(rows: list[int], extra: int = 0, room: bool = True) -> Dialogue:
    """The conversations of `rows` before their first sampled message; see `context`."""
    openings = [OPENINGS.get(row, (9, 9)) for row in rows]  # what is not given is junk
    padded = np.array([[*opening, *[9] * 4][:4] for opening in openings], np.int32)
    length = np.array([len(opening) for opening in openings], np.int32)
    given = np.array([row in OPENINGS for row in rows])
    return _begin(context(0, rows, extra, room), context(1, rows, extra, room), padded, length, given)


def without_caches(dialogue: Dialogue) -> Dialogue:
    """The same on the host, caches left out."""
    views = {name: dataclasses.replace(getattr(dialogue, name), cache=None) for name in ('user', 'assistant')}
    return jax.device_get(dataclasses.replace(dialogue, **views))


def converse(*arguments: Any, **settings: Any) -> Dialogue:
    """`conversing` to its end."""
    (dialogue,) = interleave([conversing(*arguments, **settings)], 1)
    return dialogue
