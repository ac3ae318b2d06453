"""Models behind `transformers serve`: simulators, intents and judges over a server that is not of the tests.

A tiny model shows the protocol; SmolLM2 takes minutes.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from simrl.conversations.chat import TERMINAL_TEXT, Chat
from simrl.conversations.records import Conversation, Example, Message, read_conversations, write_conversations
from simrl.conversations.templates import chat_from_huggingface
from simrl.models import sharding, transformer
from simrl.models.files.export import export
from simrl.models.files.load import load_model, resize_vocabulary
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.remote.cache import Cache
from simrl.remote.client import Endpoint
from simrl.remote.settings import EndpointSettings
from simrl.rewards.judging import Question
from simrl.rewards.panel import panel
from simrl.rewards.rewards import JUDGE_FAILED
from simrl.rewards.rubric import HELPFULNESS
from simrl.rollouts.agents import HostAgent, HostConversation, ModelAgent, Reply
from simrl.rollouts.token_sampling import Sampling
from simrl.simulators.fine_tuned import FineTunedSettings, fine_tuned
from simrl.simulators.remote import chat_simulator, json_simulator, raw_simulator
from simrl.simulators.replies import Call
from simrl.simulators.role_play import RolePlaySettings, role_play
from simrl.simulators.text_view import text_agent
from tests.tiny import byte_tokenizer, tiny_config
from tools import intents

NEEDED = ('torch', 'fastapi', 'uvicorn', 'openai')
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, NEEDED)), reason=f'transformers serve needs {", ".join(NEEDED)}'
    ),
]
GREEDY = Sampling(temperature=0.0)
TOKENS = 12
# Fields of vLLM, which this server refuses. Special tokens are never in its text, and it has no field for the stop.
WITHOUT = ('skip_special_tokens', 'spaces_between_special_tokens', 'include_stop_str_in_output', 'return_token_ids')
EXTRA = json.dumps(dict.fromkeys((*WITHOUT, 'stop_token_ids')))
CONVERSATIONS = [
    HostConversation(
        Example(f'e{i}', opening, 'to cook dinner', i, 'test', 'train'),
        0,
        (('user', opening), ('assistant', 'What do you have at home?')),
    )
    for i, opening in enumerate(('What can I cook with rice?', 'Tell me a quick recipe.'))
]
SEEDS = np.arange(len(CONVERSATIONS), dtype=np.uint32)


@dataclasses.dataclass(frozen=True)
class Served:
    """A model, and the server of its folder."""

    config: TransformerConfig
    params: Params
    chat: Chat
    settings: EndpointSettings


@contextlib.contextmanager
def serving(
    folder: pathlib.Path, config: TransformerConfig, params: Params, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Served]:
    chat = chat_from_huggingface(tokenizer)
    params, config = resize_vocabulary(params, config, chat.size, chat.terminal_start)
    tokenizer.add_tokens([TERMINAL_TEXT], special_tokens=True)
    assert len(tokenizer) == chat.size
    export(params, config, tokenizer, folder / 'model')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    words = ['serve', str(folder / 'model'), '--host=127.0.0.1', f'--port={port}', '--device=cpu']
    with open(folder / 'log', 'wb') as log:
        server = subprocess.Popen(
            [sys.executable, '-c', 'from transformers.cli.transformers import main; main()', *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '2'},
        )
    try:
        wait_for(f'http://127.0.0.1:{port}/v1/models', server, folder / 'log')
        settings = EndpointSettings(
            f'http://127.0.0.1:{port}/v1', str(folder / 'model'), in_flight=2, tries=1, try_seconds=240.0, extra=EXTRA
        )
        yield Served(config, params, chat, settings)
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope='module')
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if 'SIMRL_SMOLLM2' not in os.environ:
        pytest.skip('SIMRL_SMOLLM2, the path of the file that tools/smollm2_gguf.py writes, is not set')
    with serving(tmp_path_factory.mktemp('served'), *load_model(os.environ['SIMRL_SMOLLM2'])) as found:
        yield found


@pytest.fixture(scope='module')
def tiny_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tokenizer = byte_tokenizer(eos_token='<|im_end|>')
    config = tiny_config(len(tokenizer))
    params = transformer.init_params(jax.random.key(0), config)
    with serving(tmp_path_factory.mktemp('tiny'), config, params, tokenizer) as found:
        yield found


def wait_for(url: str, server: subprocess.Popen[bytes], log: pathlib.Path, seconds: float = 240.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.3)
    raise TimeoutError(f'{url}: no answer: {log.read_text()[-3000:]}')


def on_device(agent: ModelAgent, chat: Chat) -> Sequence[Reply]:
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    return text_agent(agent, chat, mesh).reply(CONVERSATIONS, SEEDS)


def behind(settings: EndpointSettings, make: Callable[[Call], HostAgent]) -> Sequence[Reply]:
    """Replies of a simulator behind the server."""
    with Endpoint(settings) as endpoint:
        return make(endpoint.call).reply(CONVERSATIONS, SEEDS)


@pytest.mark.parametrize(
    ('model', 'tokens'), [('tiny_served', TOKENS), pytest.param('served', 20, marks=pytest.mark.long)]
)
def test_raw_completions_say_what_the_model_says_on_the_device(
    request: pytest.FixtureRequest, model: str, tokens: int
) -> None:
    """Greedily: the rendering is ours on both sides, the decoder and its tokenizer are not.

    This server cannot show which end a message came to: what ended on the device is a failure, not a message. Cut
    messages are the same.
    """
    served = request.getfixturevalue(model)
    settings = FineTunedSettings(sampling=GREEDY)
    agent = fine_tuned(
        *(served.chat, served.config, served.params, Execution()), max_new_tokens=tokens, settings=settings
    )
    replies = behind(
        served.settings,
        lambda call: raw_simulator(call, agent, served.chat, GREEDY, prompt='text', tries=1),
    )
    expected = on_device(agent, served.chat)
    unknown = Reply('', failure='no usable reply in 1 tries, the last: does not show how it ended')
    cut = [dataclasses.replace(reply, text=reply.text.strip()) for reply in expected]
    assert replies == [reply if reply.truncated else unknown for reply in cut]
    assert all(reply.text for reply in expected)
    assert any(reply.truncated for reply in expected)


@pytest.mark.long
def test_a_chat_says_what_role_play_says_on_the_device(served: Served) -> None:
    settings = RolePlaySettings(sampling=GREEDY)
    agent = role_play(
        *(served.chat, served.config, served.params, Execution()), max_new_tokens=TOKENS, settings=settings
    )
    replies = behind(
        served.settings,
        lambda call: chat_simulator(
            *(call, settings),
            person=None,
            opening='given',
            max_tokens=TOKENS,
            max_new_tokens=TOKENS,
            tries=1,
            resampling=None,
        ),
    )
    assert replies == on_device(agent, served.chat)
    assert all(reply.text for reply in replies)


@pytest.mark.long
def test_json_that_breaks_the_rules_is_asked_for_again_and_counted(served: Served, tmp_path: pathlib.Path) -> None:
    """This server takes no schema and the model is small: each reply is one that keeps the rules, or a failure."""
    settings = dataclasses.replace(RolePlaySettings(), sampling=GREEDY)
    tries = 2
    with Endpoint(served.settings, cache=Cache(tmp_path / 'answers.sqlite')) as endpoint:
        agent = json_simulator(
            *(endpoint.call, settings),
            person=None,
            opening='given',
            max_tokens=48,
            max_new_tokens=TOKENS,
            tries=tries,
            resampling=None,
        )
        replies = agent.reply(CONVERSATIONS, SEEDS)
        used = endpoint.usage()
    assert len(replies) == len(CONVERSATIONS)
    for reply in replies:
        assert bool(reply.text) != bool(reply.failure)
    assert len(CONVERSATIONS) <= used.calls <= tries * len(CONVERSATIONS)


@pytest.mark.long
def test_intents_and_their_failures_are_all_of_the_data(
    served: Served, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / 'people.jsonl', tmp_path / 'out.jsonl'
    people = [
        Conversation(c.example.id, 'test', 'train', tuple(Message(role, text) for role, text in c.messages))
        for c in CONVERSATIONS
    ]
    write_conversations(data, people)
    fields = ('url', 'model', 'extra', 'try_seconds')
    flags = [f'--endpoint.{name}={getattr(served.settings, name)}' for name in fields]
    with contextlib.suppress(SystemExit):  # where no answer is a sentence
        intents.main([f'--data={data}', f'--output={output}', '--sampling.temperature=0', '--max-tokens=512', *flags])
    printed = capsys.readouterr().out
    written, _ = read_conversations(output)
    left_out = [line for line in printed.splitlines() if line.startswith('left out: ')]
    assert f'written, {len(written)} of {len(people)} conversations' in printed
    assert len(written) + sum(int(line.split()[2]) for line in left_out) == len(people)
    assert all(found.intent for found in written)


@pytest.mark.long
def test_verdicts_are_scores_or_failures_with_their_cause(served: Served) -> None:
    questions = [Question(c.example.id, c.example.intent, c.messages) for c in CONVERSATIONS]
    with Endpoint(served.settings) as endpoint:
        verdicts = panel({'a': endpoint}, HELPFULNESS, max_tokens=48).submit(questions)()
    assert len(verdicts) == len(questions)
    for verdict in verdicts:
        assert (verdict.cause, bool(verdict.detail)) in {('', False), (JUDGE_FAILED, True)}
        assert (verdict.score is None) == (verdict.cause == JUDGE_FAILED)
        assert verdict.score is None or 0 <= verdict.score <= 1
