"""Both simulators in one conversation with an assistant: what each of them sees is its view of the messages."""

import jax
import numpy as np
import pytest

from simrl.conversations.chat import TERMINAL_TEXT
from simrl.conversations.records import Example, Message
from simrl.conversations.templates import chat_from_huggingface
from simrl.conversations.views import render
from simrl.models import transformer
from simrl.models.placement import shard_batch
from simrl.models.sharding import make_mesh
from simrl.models.transformer import Execution
from simrl.rl.train import examples_of_step
from simrl.rollouts.agents import Limits, assistant, fitting
from simrl.rollouts.collect import collect
from simrl.rollouts.prompts import prompts_of
from simrl.rollouts.token_sampling import Sampling
from simrl.rollouts.trajectories import transcripts
from simrl.simulators.fine_tuned import FineTunedSettings, fine_tuned
from simrl.simulators.role_play import RolePlaySettings, role_play
from tests.tiny import byte_tokenizer, tiny_config

INSTRUCTIONS = 'Play a person; end with {signal}. They said: {opening}'
LIMITS = Limits(turns=3, prompt_tokens=128, assistant_tokens=6, user_tokens=6)
EXAMPLES = [
    Example(f'e{i}', text, None, i, 'test', 'train') for i, text in enumerate(['hi {opening}', 'a <|im_end|> b'])
]


@pytest.fixture(scope='module')
def chat():
    return chat_from_huggingface(byte_tokenizer())


@pytest.fixture(scope='module')
def talk(chat):
    """Conversations of each simulator with the same assistant, in the user's view and in the assistant's."""
    config = tiny_config(chat.size, num_kv_heads=2, mlp_dim=32, max_positions=512)
    params = transformer.init_params(jax.random.key(0), config)
    common = (chat, config, params, Execution())
    plain = Sampling()
    prompted = role_play(*common, max_new_tokens=6, settings=RolePlaySettings(plain, '[E]', INSTRUCTIONS))
    tuned = fine_tuned(*common, max_new_tokens=6, settings=FineTunedSettings(plain))
    helper = assistant(*common, max_new_tokens=6, sampling=plain)
    out = {}
    for name, user in (('role_play', prompted), ('fine_tuned', tuned)):
        for role in (2, 3):
            batch, _ = collect(
                user,
                helper,
                EXAMPLES,
                chat=chat,
                limits=LIMITS,
                seed=0,
                step=0,
                view=role,
                mesh=make_mesh(1, 1, jax.devices()[:1]),
                samples=2,
            )
            out[name, role] = jax.device_get(batch)
    return {'batches': out, 'prompted': prompted, 'tuned': tuned, 'helper': helper}


@pytest.mark.parametrize('name', ['role_play', 'fine_tuned'])
@pytest.mark.parametrize('role', [2, 3], ids=['user', 'assistant'])
def test_each_view_is_the_rendering_of_what_was_said(chat, talk, name, role):
    batch = talk['batches'][name, role]
    for i, row in enumerate(transcripts(batch, chat.decode)):
        example = EXAMPLES[i // 2]
        messages = [batch.messages[i, m, : batch.message_length[i, m]].tolist() for m in range(batch.num_messages[i])]
        swapped = name == 'role_play' and role == 2
        system = None
        if swapped:
            system = INSTRUCTIONS.replace('{signal}', '[E]').replace('{opening}', example.opening)
        # Rebuilt from ids, since sampled bytes need not be text: headers as the chat has them, contents as they are.
        expected = list(chat.system_prefix(system))
        heard = messages[:-1] if row['end_reason'] == 'signal' and role == 3 else messages
        first = 1 if swapped else 0
        for number, ids in enumerate(heard):
            if number < first:
                continue
            sender = ('user', 'assistant')[(number + swapped) % 2]
            header = chat.first_header(sender, system) if number == first else chat.header(sender)
            expected += [*header, *ids, chat.end_of_turn[sender]]
        if row['end_reason'] == 'signal' and role == 2:
            expected.pop()  # the signal itself is the end
        assert batch.tokens[i, : batch.length[i]].tolist() == expected


def test_an_opening_stays_text_and_is_filled_in_once(chat, talk):
    """Braces and special tokens of an opening are its own."""
    rendered = talk['prompted'].prompt(EXAMPLES[0])
    assert 'They said: hi {opening}' in chat.decode(rendered.tokens)
    planted = talk['helper'].prompt(EXAMPLES[1])
    assert planted.tokens.tolist() == render(chat, [Message('user', EXAMPLES[1].opening)], system=None).tokens.tolist()
    assert int(np.sum(planted.tokens == chat.end_of_turn['user'])) == 1


def test_only_the_fine_tuned_simulator_may_sample_the_terminal_token(chat, talk):
    assert talk['tuned'].policy.token_mask[chat.terminal]
    assert not talk['prompted'].policy.token_mask[chat.terminal]
    assert not talk['helper'].policy.token_mask[chat.terminal]
    assert talk['tuned'].policy.spec.stop_sequences == ((chat.terminal,),)
    assert talk['tuned'].stop_text == TERMINAL_TEXT
    assert any(chat.decode(run) == '[E]' for run in talk['prompted'].policy.spec.stop_sequences)


def test_prompts_that_are_too_long_are_counted_or_named(chat, talk):
    long = Example('long', 'x' * 200, None, 0, 'test', 'train')
    sides = [talk['prompted'], talk['helper']]
    kept, dropped = fitting([*EXAMPLES, long], sides, chat, LIMITS.prompt_tokens)
    assert (kept, dropped) == (EXAMPLES, 1)
    with pytest.raises(ValueError, match=r'example long: its .* tokens, expected at most 128'):
        prompts_of([long], *sides, chat, samples=1, prompt_tokens=LIMITS.prompt_tokens)


def test_bad_settings():
    with pytest.raises(ValueError, match=r'instructions: expected the field \{opening\}'):
        RolePlaySettings(instructions='end with {signal}')
    with pytest.raises(ValueError, match='signal: expected some text'):
        RolePlaySettings(signal=' ')


def test_every_example_comes_once_an_epoch_and_the_order_is_a_function_of_the_seed():
    steps = [examples_of_step(10, 5, 3, step) for step in range(4)]
    first, second = steps[0] + steps[1], steps[2] + steps[3]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert steps == [examples_of_step(10, 5, 3, step) for step in range(4)]
    assert steps != [examples_of_step(10, 5, 4, step) for step in range(4)]
    uneven = [examples_of_step(10, 4, 3, step) for step in range(40)]
    assert all(len(set(step)) == 4 for step in uneven)
    assert {i for step in uneven for i in step} == set(range(10))


def test_placed_rows_are_the_rows(chat, talk):
    prompts = prompts_of(EXAMPLES, talk['tuned'], talk['helper'], chat, samples=2, prompt_tokens=128)
    placed = shard_batch(prompts, make_mesh(1, 1, jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, placed, prompts)
