"""The held-out loss: that of every trained token, and that of content alone, against a loop over tokens."""

import jax.numpy as jnp
import numpy as np

from simrl.conversations.batches import stack
from simrl.conversations.records import Message
from simrl.conversations.views import render
from simrl.models import transformer
from simrl.models.transformer import Execution
from simrl.training.sft import eval_step
from tests.rl import scene


def test_the_loss_of_content_leaves_ends_out():
    chat = scene.chat()
    config = scene.config_of(chat)
    params = scene.params_of(config)
    talks = [['hi', 'yes?', 'bye', 'see you'], ['a', 'b', 'c']]
    messages = [[Message(('user', 'assistant')[i % 2], text) for i, text in enumerate(talk)] for talk in talks]
    rows = [render(chat, talk, system=None, train='user', end='natural', terminal=True) for talk in messages]
    batch = stack(rows, 96, 3)
    token_mask = chat.token_mask(config.padded_vocab_size, terminal=True, header='user')
    ends = (chat.terminal, chat.end_of_turn['user'])
    measured = eval_step(params, batch, jnp.asarray(token_mask), config=config, execution=Execution(), ends=ends)

    hidden, _ = transformer.apply(params, config, Execution(), jnp.asarray(batch.tokens))
    logits = np.where(token_mask, np.asarray(transformer.project(params, hidden), np.float64), -np.inf)
    log_prob = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    losses: dict[str, list[float]] = {'loss': [], 'content_loss': []}
    for row, time in np.argwhere(batch.trained):
        token = int(batch.tokens[row, time])
        loss = -log_prob[row, time - 1, token]
        losses['loss'].append(loss)
        if token not in ends:
            losses['content_loss'].append(loss)
    assert len(losses['content_loss']) == len('bye' + 'c')
    assert len(losses['loss']) == len('bye' + 'c') + 3 + 2  # ends of turn, and a terminal token in each row
    for name, values in losses.items():
        total, count = measured[name]
        assert count == len(values)
        np.testing.assert_allclose(total, np.sum(values), rtol=1e-5)
