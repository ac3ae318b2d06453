"""A served model beside transformers and its own sampler: the same tokens, log-probabilities and task scores."""

import contextlib
import importlib.util
import json
import pathlib
import threading
from collections.abc import Iterator

import numpy as np
import openai
import pytest

from simrl.conversations.records import Message
from simrl.experiments.settings import MeshSettings
from simrl.models.files.export import export
from simrl.models.files.load import resize_vocabulary
from simrl.rollouts import completion
from simrl.serving.engine import Engine, run
from simrl.serving.jobs import Served
from simrl.serving.load import find_assistant, find_model, resampled
from simrl.serving.shapes import EngineSettings
from tests.serving import scene
from tests.serving.scripted import Site, site

NEEDED = ('torch', 'lm_eval')
parity = [
    pytest.mark.parity,
    pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason=f'needs {", ".join(NEEDED)}'),
]
PROMPTS = ['abc', 'Hi! What is 2 + 2?', 'é', 'one two three four five six']


@contextlib.contextmanager
def serving(name: str, settings: EngineSettings) -> Iterator[tuple[Site, Engine]]:
    """A model behind a server in a thread."""
    wake, stop = threading.Condition(), threading.Event()
    loaded = find_model(name)()
    engine = Engine(loaded.policy, loaded.chat, settings, wake, knows_terminal=loaded.knows_terminal)
    thread = threading.Thread(target=run, args=([engine], wake, stop))
    thread.start()
    try:
        with site({'model': Served(name='model', chat=loaded.chat, serving=engine, created=0)}) as found:
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
    export(*resize_vocabulary(scene.params(), scene.CONFIG, scene.CHAT.size - 1, 0), tokenizer, found)
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
            np.testing.assert_allclose(sorted(top.values())[-3:], np.sort(row)[-3:], atol=2e-4)


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

    def evaluated(model: str, **arguments: object) -> tuple[dict, dict]:
        result = lm_eval.simple_evaluate(
            model,
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
