"""The same conversations the slow way: plain Python, token by token, each from a whole forward pass without a cache.

It shares the decoder and the random numbers with `simrl.rollouts`, and nothing else.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import ASSISTANT, TEMPLATE, USER
from simrl.models import transformer
from simrl.models.transformer import Params, TransformerConfig
from simrl.rollouts.agents import Policy
from simrl.rollouts.repeats import Repeats


@dataclasses.dataclass
class Token:
    token: int
    role: int
    message: int
    log_prob: float = 0.0


@dataclasses.dataclass
class Conversation:
    views: tuple[list[Token], list[Token]]
    messages: list[list[int]]
    truncated: list[bool]
    end: str = 'running'
    steps: int = 0
    resamples: int = 0
    stop: tuple[int, ...] = ()


@functools.partial(jax.jit, static_argnames='config')
def _forward(params: Params, tokens: jax.Array, length: jax.Array, config: TransformerConfig) -> jax.Array:
    hidden, _ = transformer.apply(params, config, transformer.Execution(), tokens)
    return transformer.project(params, hidden[0, length - 1])


def next_logits(params: Params, config: TransformerConfig, tokens: list[int]) -> np.ndarray:
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(params, padded, np.int32(len(tokens)), config), np.float64)


def kept(prob: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """Which tokens `[V]` the filters leave, for probabilities without ties."""
    order = np.argsort(-prob)
    if top_k:
        order = order[:top_k]
    before = np.cumsum(prob[order]) - prob[order]
    order = order[before < top_p * prob[order].sum()]
    order = order[prob[order] >= min_p * prob.max()]
    mask = np.zeros(prob.shape, bool)
    mask[order] = True
    return mask


def draw(logits: np.ndarray, policy: Policy, uniform: float) -> tuple[int, float]:
    spec, token_mask = policy.spec, np.asarray(policy.token_mask)
    tempered = np.where(token_mask, logits / policy.temperature, -np.inf)
    prob = np.exp(tempered - tempered.max())
    prob /= prob.sum()
    ids = np.flatnonzero(kept(prob, spec.top_k, spec.top_p, spec.min_p) & token_mask)
    cdf = np.cumsum(prob[ids]) / prob[ids].sum()
    token = int(ids[np.searchsorted(cdf, uniform, side='right')])
    return token, float(np.log(prob[token]))


@functools.partial(jax.jit, static_argnums=1)
def _uniforms(keys: jax.Array, attempt: int = 0) -> jax.Array:
    def one(key: jax.Array, message: jax.Array, token: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, message)
        if attempt:
            key = jax.random.fold_in(key, np.uint32(2**32 - attempt))
        return jax.random.uniform(jax.random.fold_in(key, token))

    for axis in ((None, None, 0), (None, 0, None), (0, None, None)):
        one = jax.vmap(one, axis)
    return one(keys, jnp.arange(8), jnp.arange(16))


def converse(
    policies: tuple[Policy, Policy],
    prompts: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]],
    opening: tuple[int, ...] | None,
    uniforms: np.ndarray,
    turns: int,
    repeats: Repeats | None = None,
    attempts: np.ndarray | None = None,
) -> Conversation:
    """One conversation; `uniforms` is `[messages, tokens]`, prompts are (token, role, message) of both views.

    Args:
        repeats: of the user, which are sampled again with `attempts`, `[attempts, messages, tokens]`.
    """
    views = tuple([Token(*entry) for entry in prompt] for prompt in prompts)
    talk = Conversation(views=views, messages=[], truncated=[])  # type: ignore[arg-type]
    if opening is not None:
        talk.messages.append(list(opening))
        talk.truncated.append(False)
    while talk.end == 'running':
        number = len(talk.messages)
        side = number % 2
        policy, spec, partner = policies[side], policies[side].spec, policies[1 - side].spec
        own, other = talk.views[side], talk.views[1 - side]

        first = own[-1].message == -1
        own += [Token(t, TEMPLATE, number) for t in (spec.own_first_header if first else spec.own_header)]
        header_end, ended = len(own), False
        content: list[int] = []
        for attempt in range(1 if repeats is None or side == 1 else 1 + repeats.rule.tries):
            drawn, sampler = uniforms, policy
            if attempt:
                assert repeats is not None
                assert attempts is not None
                drawn = attempts[attempt - 1]
                temperature = min(
                    repeats.temperature + attempt * repeats.rule.temperature_step, repeats.rule.max_temperature
                )
                sampler = dataclasses.replace(policy, temperature=temperature)
                talk.steps += not ended  # of the discarded message: a forced end is a step, too
                talk.resamples += 1
            del own[header_end:]
            content, ended = [], False
            for i in range(spec.max_new_tokens):
                logits = next_logits(policy.params, spec.config, [entry.token for entry in own])
                token, log_prob = draw(logits, sampler, drawn[number, i])
                own.append(Token(token, spec.role, number, log_prob))
                talk.steps += 1
                if token == spec.end_of_turn:
                    ended = True
                    break
                content.append(token)
                found = [run for run in spec.stop_sequences if content[-len(run) :] == list(run)]
                if found:
                    talk.end, talk.stop = 'signal', found[0]
                    break
            if talk.end == 'signal' or repeats is None or number < 2:
                break
            if repeats.decode(content).strip() != repeats.decode(talk.messages[number - 2]).strip():
                break
        talk.messages.append(content)
        talk.truncated.append(not ended and talk.end == 'running')
        if talk.end == 'signal':
            break
        if not ended:
            own.append(Token(spec.end_of_turn, TEMPLATE, number))
            talk.steps += 1  # the last sampled token is fed in a step of its own

        first = other[-1].message == -1
        header = partner.partner_first_header if first else partner.partner_header
        role = USER if side == 0 else ASSISTANT
        other += [Token(t, TEMPLATE, number) for t in header]
        other += [Token(t, role, number) for t in content]
        other.append(Token(partner.partner_end_of_turn, role if ended else TEMPLATE, number))
        if len(talk.messages) == 2 * turns:
            talk.end = 'turns'
    return talk


def converse_all(  # type: ignore[no-untyped-def]
    scene, rows: list[int], repeats: Repeats | None = None
) -> list[Conversation]:
    """The conversations of `scene.py`."""
    uniforms = np.asarray(_uniforms(scene.keys()))
    attempts = np.asarray([_uniforms(scene.keys(), attempt) for attempt in range(1, 4)])
    return [
        converse(
            scene.policies(),
            (scene.PROMPTS[0][row], scene.PROMPTS[1][row]),
            scene.OPENINGS.get(row),
            uniforms[row],
            scene.TURNS,
            repeats,
            attempts[:, row],
        )
        for row in rows
    ]
