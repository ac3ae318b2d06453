"""A served model beside transformers and its own sampler: the same tokens, log-probabilities and task scores."""

import collections
import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import openai
import pytest

from simrl.conversations.chat import TERMINAL_TEXT, Chat
from simrl.conversations.records import Example, Message
from simrl.experiments.settings import MeshSettings
from simrl.models import sharding
from simrl.models.files.export import export
from simrl.models.transformer import Execution
from simrl.remote.answers import Answer
from simrl.remote.client import Endpoint
from simrl.remote.requests import ChatRequest
from simrl.remote.schema import object_of
from simrl.remote.settings import EndpointSettings
from simrl.rewards.judging import Question
from simrl.rewards.panel import panel
from simrl.rewards.rubric import HELPFULNESS
from simrl.rollouts import completion
from simrl.rollouts.agents import HostConversation, ModelAgent, Reply
from simrl.rollouts.token_sampling import Sampling
from simrl.serving import load, shapes
from simrl.serving.engine import Engine, run
from simrl.serving.jobs import Served
from simrl.serving.listener import raise_file_limit
from simrl.serving.load import find_assistant, find_model, resampled
from simrl.serving.settings import HttpSettings
from simrl.serving.shapes import EngineSettings
from simrl.serving.structured import Grammars
from simrl.simulators.fine_tuned import FineTunedSettings, fine_tuned
from simrl.simulators.remote import chat_simulator, raw_simulator
from simrl.simulators.role_play import RolePlaySettings, role_play
from simrl.simulators.text_view import text_agent
from tests.serving import scene
from tests.serving.scripted import Site, site
from tests.tiny import CHATML, byte_tokenizer
from tools.benchmark.protocol import resident_bytes

NEEDED = ('torch', 'lm_eval')
PROMPTS = ['abc', 'Hi! What is 2 + 2?', 'é', 'one two three four five six']


@contextlib.contextmanager
def serving(name: str, settings: EngineSettings, **http: float) -> Iterator[tuple[Site, Engine]]:
    """A model behind a server in a thread; its programs are as few as may be."""
    wake, stop = threading.Condition(), threading.Event()
    loaded = find_model(name)()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, 'SMALLEST_SIZE', settings.context)
        engine = Engine(loaded.policy, loaded.chat, settings, wake, knows_terminal=loaded.knows_terminal)
    thread = threading.Thread(target=run, args=([engine], wake, stop))
    thread.start()
    try:
        grammars = Grammars.of(loaded.chat, loaded.policy.spec.config.padded_vocab_size)
        model = Served(name='model', chat=loaded.chat, serving=engine, created=0, constrain=grammars.constraint)
        with site({'model': model}, **http) as found:
            yield found, engine
    finally:
        stop.set()
        with wake:
            wake.notify_all()
        thread.join()


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The scene's model as a Hugging Face folder."""
    found = tmp_path_factory.mktemp('model') / 'model'
    tokenizer = scene.TOKENIZER
    tokenizer.eos_token = '<|im_end|>'
    export(scene.params(), dataclasses.replace(scene.CONFIG, vocab_size=len(tokenizer)), tokenizer, found)
    return found


@pytest.fixture(scope='module')
def server(folder: pathlib.Path) -> Iterator[tuple[openai.OpenAI, Site, Engine]]:
    with serving(str(folder), EngineSettings(rows=4, context=128, chunk=16, block=4)) as (found, engine):
        yield openai.OpenAI(base_url=found.url, api_key='none', max_retries=0), found, engine


def test_a_greedy_chat_is_that_of_the_sampler(server, folder) -> None:
    client, _, _ = server
    agent = resampled(find_assistant(str(folder))().agent, temperature=0.0, top_p=1.0, max_new_tokens=24)
    sample = completion.replies(agent, scene.CHAT, prompt_tokens=64, batch_size=4, mesh=MeshSettings(data=1).make())
    chats = [[Message('user', text)] for text in PROMPTS]
    for text, expected in zip(PROMPTS, sample(chats, 0), strict=True):
        found = client.chat.completions.create(
            model='model', messages=[{'role': 'user', 'content': text}], temperature=0, max_tokens=24
        ).choices[0]
        assert (found.message.content, found.finish_reason == 'length') == (expected.text, expected.truncated)


CROWD = """
import asyncio, collections, json, sys

async def ask(seed):
    async with opening:
        reader, writer = await asyncio.open_connection(*address)
    fields = {'model': 'model', 'prompt': 'abc', 'max_tokens': 8, 'temperature': 1.0, 'seed': seed}
    body = json.dumps(fields).encode()
    head = 'POST /v1/completions HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\nContent-Type: application/json\\r\\n'
    writer.write(f'{head}Content-Length: {len(body)}\\r\\n\\r\\n'.encode() + body)
    reply = await reader.read()
    writer.close()
    head, _, content = reply.decode().partition('\\r\\n\\r\\n')
    return int(head.split()[1]), 'retry-after' in head.lower(), json.loads(content)

async def main():
    return await asyncio.gather(*map(ask, range(int(sys.argv[3]))))

address, opening = (sys.argv[1], int(sys.argv[2])), asyncio.Semaphore(200)
json.dump(asyncio.run(main()), sys.stdout)
"""


@pytest.mark.long
def test_of_ten_thousand_requests_at_once_those_beyond_the_queue_are_refused(folder) -> None:
    """Each is answered as it is alone, or told to come again; afterwards all rows are free and unharmed."""
    number, settings = 10_000, EngineSettings(rows=4, context=64, queue=500, chunk=16, block=4)
    raise_file_limit(HttpSettings(connections=number + 100))
    with serving(str(folder), settings, connections=number + 100) as (found, engine):
        client = openai.OpenAI(base_url=found.url, api_key='none', max_retries=0)

        def alone(seed: int) -> str:
            fields = {'model': 'model', 'prompt': 'abc', 'max_tokens': 8, 'temperature': 1.0, 'seed': seed}
            return client.completions.create(**fields).choices[0].text

        expected = {seed: alone(seed) for seed in range(10)}
        before = resident_bytes()
        command = [sys.executable, '-c', CROWD, *map(str, (*found.address, number))]
        replies = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        grown, load = resident_bytes() - before, engine.load()
        answered = {seed: body for seed, (status, _, body) in enumerate(replies) if status == 200}
        refused = [(told, body['error']['code']) for status, told, body in replies if status == 429]
        assert len(answered) + len(refused) == number, collections.Counter(status for status, *_ in replies)
        assert set(refused) == {(True, 'queue_full')}
        assert len(answered) >= settings.queue
        assert (load.waiting, load.active, load.refused_total, load.compiled) == (0, 0, len(refused), 0)
        assert grown < 512 * 2**20
        for seed in sorted(answered)[:: len(answered) // 40]:
            assert answered[seed]['choices'][0]['text'] == alone(seed)
        assert {seed: alone(seed) for seed in range(10)} == expected


@pytest.fixture(scope='module')
def theirs(folder):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec('torch') is None, reason='needs torch')
def test_greedy_completions_and_log_probs_are_those_of_transformers(server, theirs) -> None:
    import torch

    client, _, _ = server
    for prompt in (list(range(1, 9)), scene.CHAT.encode('abcabc def'), [256, 257, 258, 99]):
        found = client.completions.create(
            model='model',
            prompt=prompt,
            temperature=0,
            max_tokens=16,
            logprobs=3,
            echo=True,
            extra_body={'return_token_ids': True},
        ).choices[0]
        ids = [*prompt, *found.model_extra['token_ids']]
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=0)[0]
        assert ids == expected.tolist()
        with torch.no_grad():
            log_probs = torch.log_softmax(theirs(torch.tensor([ids])).logits[0], dim=-1).numpy()
        want = log_probs[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(found.logprobs.token_logprobs[1:], want, atol=2e-4)
        for row, top in zip(log_probs, found.logprobs.top_logprobs[1:], strict=False):
            # By their texts: bytes that are no characters have one.
            assert max(top.values()) == pytest.approx(row.max(), abs=2e-4)
            assert all(np.abs(row - value).min() < 2e-4 for value in top.values())


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
{rest}
metadata: {{version: 1}}
"""
GENERATE = """doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
LOGLIKELIHOOD = """doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""


@pytest.mark.parity
@pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason=f'needs {", ".join(NEEDED)}')
def test_evaluation_tasks_come_out_as_through_transformers(server, folder, tmp_path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    _, found, _ = server
    random = np.random.default_rng(0)
    rows = [
        {
            'question': ''.join(random.choice(list('abcdefgh '), 12)),
            'answer': 'a',
            'choices': [' ab', ' cde', ' f'],
            'label': int(random.integers(3)),
        }
        for _ in range(12)
    ]
    data = tmp_path / 'rows.jsonl'
    data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    for name, kind, rest in (('writes', 'generate_until', GENERATE), ('chooses', 'multiple_choice', LOGLIKELIHOOD)):
        (tmp_path / f'{name}.yaml').write_text(TASK.format(name=name, kind=kind, rest=rest, data=data))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def evaluated(backend: str, **arguments: object) -> tuple[dict, dict]:
        result = lm_eval.simple_evaluate(
            backend,
            model_args=arguments,
            tasks=['writes', 'chooses'],
            task_manager=tasks,
            bootstrap_iters=0,
            log_samples=True,
        )
        responses = {
            task: [sample['filtered_resps'] for sample in sorted(samples, key=lambda sample: sample['doc_id'])]
            for task, samples in result['samples'].items()
        }
        return responses, {task: dict(scores) for task, scores in result['results'].items()}

    url = f'{found.url}/completions'
    ours, our_scores = evaluated(
        'local-completions', model='model', base_url=url, tokenizer=str(folder), max_length=128, num_concurrent=4
    )
    theirs, their_scores = evaluated('hf', pretrained=str(folder), dtype='float32', device='cpu', max_length=128)
    assert ours['writes'] == theirs['writes']
    for one, other in zip(ours['chooses'], theirs['chooses'], strict=True):
        np.testing.assert_allclose([x for x, _ in one], [x for x, _ in other], atol=1e-3)
        assert [best for _, best in one] == [best for _, best in other]
    metrics = ('exact_match,none', 'acc,none')
    assert [our_scores[task].get(m) for task in our_scores for m in metrics] == [
        their_scores[task].get(m) for task in our_scores for m in metrics
    ]


@pytest.fixture(scope='module')
def simulator_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, pathlib.Path]]:
    """A model that knows the terminal token, with room for the texts of judges and role-play."""
    found = tmp_path_factory.mktemp('simulator') / 'model'
    tokenizer = byte_tokenizer(template='<|endoftext|>' + CHATML, eos_token='<|im_end|>')
    tokenizer.add_tokens([TERMINAL_TEXT], special_tokens=True)
    config = dataclasses.replace(scene.CONFIG, max_positions=8192)
    export(scene.params(), config, tokenizer, found)
    with serving(str(found), EngineSettings(rows=3, context=8192, chunk=512, block=4)) as (site, _):
        yield site, found


CONVERSATIONS = [
    HostConversation(
        Example(f'e{i}', opening, 'to cook', i, 'test', 'train'),
        0,
        (('user', opening), ('assistant', 'What is there?')),
    )
    for i, opening in enumerate(('What can I cook?', 'Tell me a recipe.', 'Soup?'))
]
SEEDS = np.arange(len(CONVERSATIONS), dtype=np.uint32)
GREEDY = Sampling(temperature=0.0)


def on_device(agent: ModelAgent, chat: Chat) -> Sequence[Reply]:
    return text_agent(agent, chat, sharding.make_mesh(1, 1, jax.devices()[:1])).reply(CONVERSATIONS, SEEDS)


def test_simulators_say_behind_it_what_they_say_on_the_device(simulator_server) -> None:
    """A fine-tuned one by raw completions, which show its end; and a prompted one by chats."""
    found, folder = simulator_server
    model = load.open_model(str(folder))
    assert model.knows_terminal
    parts = (model.chat, model.config, model.load_params(), Execution())
    with Endpoint(EndpointSettings(found.url, 'model')) as endpoint:
        raw = fine_tuned(*parts, max_new_tokens=12, settings=FineTunedSettings(sampling=GREEDY))
        for prompt in ('ids', 'text'):
            behind = raw_simulator(endpoint.call, raw, model.chat, GREEDY, prompt=prompt, tries=1)
            assert behind.reply(CONVERSATIONS, SEEDS) == on_device(raw, model.chat)
        settings = RolePlaySettings(sampling=GREEDY)
        prompted = role_play(*parts, max_new_tokens=12, settings=settings)
        behind = chat_simulator(
            *(endpoint.call, settings),
            person=None,
            opening='given',
            max_tokens=12,
            max_new_tokens=12,
            tries=1,
            resampling=None,
        )
        assert behind.reply(CONVERSATIONS, SEEDS) == on_device(prompted, model.chat)


def test_answers_of_a_schema_are_of_the_schema(simulator_server, tmp_path) -> None:
    """Of a random model, which would write no JSON by itself."""
    found, _ = simulator_server
    settings = EndpointSettings(found.url, 'model')
    questions = [Question(c.example.id, c.example.intent, c.messages) for c in CONVERSATIONS]
    with Endpoint(settings) as endpoint:
        verdicts = panel({'a': endpoint}, HELPFULNESS, max_tokens=400).submit(questions)()
        cut = 'a judge failed: judge a: length'  # a thought without an end: never other JSON
        assert {verdict.detail for verdict in verdicts} <= {'', cut}
        schema = object_of(grade={'type': 'integer', 'minimum': 0, 'maximum': 10})
        message = Message('user', 'Grade it.')
        asked = [ChatRequest(messages=(message,), max_tokens=60, schema=schema, seed=seed) for seed in range(4)]
        for outcome in endpoint.call(asked):
            assert isinstance(outcome, Answer), outcome
            assert 0 <= outcome.value['grade'] <= 10
