"""The API through real clients, over a socket, before an engine that answers by a script."""

import asyncio
import dataclasses
import json
import math
import urllib.request
from collections.abc import Iterator

import openai
import pytest

from simrl.conversations.records import Message
from simrl.remote.answers import Answer
from simrl.remote.client import Endpoint, check
from simrl.remote.requests import ChatRequest, CompletionRequest
from simrl.remote.schema import object_of
from simrl.remote.settings import EndpointSettings
from simrl.rollouts.token_sampling import Sampling
from simrl.serving.generation import Generation, Piece
from tests.serving.scripted import CHAT, ScriptedEngine, Site, pieces, served, site, words

END = CHAT.end_of_turn['assistant']
HI = [{'role': 'user', 'content': 'hi'}]
PROMPT = CHAT.encode_raw('<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n')


class Wants:
    """A constraint, by the schema that it is of."""

    def __init__(self, schema) -> None:
        if schema.get('type') != 'object':
            raise ValueError('only objects')
        self.schema = schema


ENGINE = ScriptedEngine()


@pytest.fixture(scope='module')
def here() -> Iterator[Site]:
    models = {
        'model': served(ENGINE, constrain=Wants),
        'other/one': served(ENGINE, 'other/one', sampling=Sampling(0.5)),
    }
    with site(models) as found:
        yield found


@pytest.fixture(scope='module')
def client(here: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=here.url, api_key='none', max_retries=0) as found:
        yield found


def said(sample: int = 0, seed: int = 7, temperature: float = 1.0) -> str:
    return f'sample {sample} of {seed} at {temperature:g}'


def test_a_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model='model', messages=HI, seed=7)
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ('assistant', said(), 'stop')
    assert (reply.model, reply.object, choice.logprobs) == ('model', 'chat.completion', None)
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), len(said()) + 1)
    assert usage.total_tokens == len(PROMPT) + len(said()) + 1
    assert usage.prompt_tokens_details.cached_tokens == len(PROMPT) // 2
    asked = ENGINE.asked[-1]
    assert (asked.prompt, asked.vocabulary, asked.seed) == (tuple(PROMPT), 'chat', 7)
    assert asked.max_tokens == ENGINE.context - len(PROMPT)


def test_what_is_asked_for_reaches_the_engine(client: openai.OpenAI) -> None:
    extra = {'top_k': 5, 'min_p': 0.25, 'stop_token_ids': [3], 'include_stop_str_in_output': True}
    client.chat.completions.create(
        model='model',
        messages=[
            {'role': 'developer', 'content': 'S'},
            {'role': 'user', 'content': [{'type': 'text', 'text': 'a'}] * 2},
        ],
        temperature=0,
        top_p=0.5,
        max_completion_tokens=9,
        stop=['x', 'yz'],
        seed=-1,
        extra_body={**extra, 'skip_special_tokens': False},
    )
    asked = ENGINE.asked[-1]
    assert CHAT.decode(asked.prompt).startswith('<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na\na<|im_end|>')
    expected = dataclasses.replace(
        asked,
        max_tokens=9,
        sampling=Sampling(0.0, 5, 0.5, 0.25),
        seed=2**64 - 1,
        stop=('x', 'yz'),
        stop_ids=(3,),
        keep_stop=True,
        keep_special=True,
        log_probs=False,
    )
    assert asked == expected


def test_a_model_s_own_sampling_is_the_default_and_seeds_differ(client: openai.OpenAI) -> None:
    for _ in range(2):
        client.chat.completions.create(model='other/one', messages=HI, extra_body={'top_k': -1})
    first, second = ENGINE.asked[-2:]
    assert first.sampling == second.sampling == Sampling(0.5)
    assert first.seed != second.seed


def test_equal_prompts_of_a_request_differ_unless_it_has_a_seed(client: openai.OpenAI) -> None:
    reply = client.completions.create(model='model', prompt=['a', 'a'], n=2, max_tokens=50)
    assert len({choice.text for choice in reply.choices}) == 4
    assert len({asked.seed for asked in ENGINE.asked[-4:]}) == 2
    reply = client.completions.create(model='model', prompt=['a', 'a'], n=2, seed=7, max_tokens=50)
    assert [choice.text for choice in reply.choices] == [said(0), said(1)] * 2


def test_values_that_ask_for_nothing_and_fields_without_effect_are_taken(client: openai.OpenAI) -> None:
    nothing = {'frequency_penalty': 0, 'presence_penalty': 0.0, 'logit_bias': {}, 'tools': [], 'tool_choice': 'none'}
    nothing |= {'response_format': {'type': 'text'}, 'top_logprobs': 0, 'chat_template_kwargs': {}, 'stop': None}
    harmless = {
        'user': 'u',
        'metadata': {'a': 'b'},
        'store': False,
        'service_tier': 'auto',
        'parallel_tool_calls': True,
    }
    messages = [*HI, {'role': 'assistant', 'content': '{}', 'parsed': {}}, HI[0] | {'type': 'text'}]
    reply = client.chat.completions.create(model='model', messages=messages, seed=7, extra_body=nothing | harmless)
    assert reply.choices[0].message.content == said()


def test_choices_are_samples_of_one_seed(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model='model', messages=HI, n=3, seed=7)
    assert [(choice.index, choice.message.content) for choice in reply.choices] == [(i, said(i)) for i in range(3)]
    assert reply.usage.prompt_tokens == len(PROMPT)


def test_log_probs_of_a_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model='model', messages=HI, seed=7, logprobs=True, top_logprobs=2)
    content = reply.choices[0].logprobs.content
    ids = [*CHAT.encode(said()), END]
    assert [entry.token for entry in content] == [*said(), '<|im_end|>']
    assert [entry.logprob for entry in content] == pytest.approx([-i / 100 for i in ids])
    assert [[(top.token, top.logprob) for top in entry.top_logprobs] for entry in content] == [
        [(CHAT.decode([0]), 0.0), (CHAT.decode([1]), -0.01)]
    ] * len(ids)
    assert bytes(content[0].bytes) == b's'


def test_a_streamed_chat_has_the_words_of_the_whole_one(client: openai.OpenAI) -> None:
    options = {'include_usage': True}
    stream = client.chat.completions.create(
        model='model', messages=HI, n=2, seed=7, logprobs=True, stream=True, stream_options=options
    )
    *chunks, last = list(stream)
    for index in range(2):
        (first, *rest) = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert (first.delta.role, first.delta.content, first.finish_reason) == ('assistant', '', None)
        assert ''.join(choice.delta.content or '' for choice in rest) == said(index)
        assert [choice.finish_reason for choice in rest if choice.finish_reason] == ['stop']
        assert (rest[-1].finish_reason, rest[-1].delta.content) == ('stop', None)
        tokens = [entry.token for choice in rest if choice.logprobs for entry in choice.logprobs.content]
        assert ''.join(tokens) == said(index) + '<|im_end|>'
    assert {chunk.id for chunk in chunks} == {last.id}
    assert not last.choices
    assert all(chunk.usage is None for chunk in chunks)
    assert last.usage.completion_tokens == 2 * (len(said()) + 1)


def test_a_stream_s_text_is_never_a_line_end_of_its_events() -> None:
    text = 'a\n\nb\r\u2028\u0085 "c" 漢\x00'
    engine = ScriptedEngine(lambda generation: pieces(generation, text))
    with site(engine) as found, openai.OpenAI(base_url=found.url, api_key='x', max_retries=0) as client:
        stream = client.chat.completions.create(model='model', messages=HI, stream=True)
        parts = [chunk.choices[0].delta.content or '' for chunk in stream]
    assert ''.join(parts) == text


def test_an_asynchronous_client_streams_many_at_once(here: Site) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(model='model', messages=HI, seed=seed, stream=True)
        return ''.join([chunk.choices[0].delta.content or '' async for chunk in stream])

    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=here.url, api_key='x', max_retries=0) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(20)))

    assert asyncio.run(many()) == [said(seed=seed) for seed in range(20)]


@pytest.mark.parametrize('stream', [False, True])
def test_raw_completions_of_several_prompts(client: openai.OpenAI, stream: bool) -> None:
    prompts = [PROMPT, PROMPT[:3]]
    for given in (prompts, [CHAT.decode(prompt) for prompt in prompts]):
        reply = client.completions.create(model='model', prompt=given, n=2, seed=7, max_tokens=4, stream=stream)
        texts = [''] * 4
        for part in reply if stream else [reply]:
            for choice in part.choices:
                texts[choice.index] += choice.text
        assert texts == ['samp'] * 4
        asked = ENGINE.asked[-4:]
        assert [one.prompt for one in asked] == [tuple(prompts[i]) for i in (0, 0, 1, 1)]
        assert [one.sample for one in asked] == [0, 1, 0, 1]
        assert {one.vocabulary for one in asked} == {'all'}


def test_sixteen_tokens_are_the_default_of_raw_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(model='model', prompt='a', seed=7)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (said()[:16], 'length')
    client.completions.create(model='model', prompt=[5] * (ENGINE.context - 3))
    assert ENGINE.asked[-1].max_tokens == 3


def test_echo_with_log_probs_as_evaluation_harnesses_read_it(client: openai.OpenAI) -> None:
    context, continuation = CHAT.encode('abc'), CHAT.encode('de')
    reply = client.completions.create(
        model='model',
        prompt=[context + continuation, context + continuation[:1]],
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    for choice, rest in zip(reply.choices, (continuation, continuation[:1]), strict=True):
        found = choice.logprobs
        prompt = context + rest
        sampled = CHAT.encode('s')[0]
        assert choice.text == CHAT.decode([*prompt, sampled])
        assert found.tokens == [CHAT.decode([i]) for i in (*prompt, sampled)]
        assert found.text_offset == list(range(len(prompt) + 1))
        assert found.token_logprobs[0] is None
        assert found.top_logprobs[0] is None
        # A harness takes what lies between the context and the one sampled token, and asks whether it is the top.
        assert found.token_logprobs[len(context) : -1] == pytest.approx([-i / 100 for i in rest])
        for token, top in zip(rest, found.top_logprobs[len(context) : -1], strict=True):
            assert top == {CHAT.decode([0]): 0.0, CHAT.decode([token]): -token / 100}
        assert len(found.token_logprobs) == len(prompt) + 1


@pytest.mark.parametrize('stream', [False, True])
def test_a_prompt_alone_is_scored(client: openai.OpenAI, stream: bool) -> None:
    engine = ScriptedEngine(
        lambda generation: [
            dataclasses.replace(pieces(generation, 'x')[0], text='', tokens=(), scores=(), finish='length')
        ]
    )
    with site(engine) as found, openai.OpenAI(base_url=found.url, api_key='x', max_retries=0) as other:
        reply = other.completions.create(
            model='model', prompt='abc', max_tokens=0, echo=True, logprobs=0, stream=stream
        )
        (choice,) = [choice for part in (reply if stream else [reply]) for choice in part.choices]
    assert choice.text == 'abc'
    assert choice.finish_reason == 'length'
    assert choice.logprobs.token_logprobs == [None, *(-i / 100 for i in CHAT.encode('bc'))]
    assert choice.logprobs.top_logprobs[1] == {'b': -CHAT.encode('b')[0] / 100}
    assert engine.asked[0].score_prompt


def test_log_probs_that_json_lacks_and_tokens_of_parts_of_characters() -> None:
    (first, *_) = CHAT.encode('漢')

    def script(generation: Generation) -> list[Piece]:
        scores = [dataclasses.replace(score, log_prob=-math.inf) for score in pieces(generation, '漢')[0].scores]
        return [Piece('', CHAT.encode('漢')[:1], (scores[0],), cached=0, finish='length')]

    with site(ScriptedEngine(script)) as found, openai.OpenAI(base_url=found.url, api_key='x', max_retries=0) as client:
        reply = client.chat.completions.create(model='model', messages=HI, logprobs=True)
        (entry,) = reply.choices[0].logprobs.content
    assert (entry.token, entry.bytes, entry.logprob) == (CHAT.decode([first]), None, -9999.0)


def test_token_ids_are_returned_on_request(client: openai.OpenAI) -> None:
    extra = {'return_token_ids': True}
    ids = [*CHAT.encode(said()), END]
    reply = client.chat.completions.create(model='model', messages=HI, seed=7, extra_body=extra)
    assert (reply.prompt_token_ids, reply.choices[0].token_ids) == (PROMPT, ids)
    stream = client.completions.create(
        model='model', prompt=PROMPT, seed=7, max_tokens=50, stream=True, extra_body=extra
    )
    choices = [chunk.choices[0] for chunk in stream]
    assert choices[0].prompt_token_ids == PROMPT
    assert [i for choice in choices for i in choice.token_ids] == ids


def test_a_stop_is_told(client: openai.OpenAI) -> None:
    engine = ScriptedEngine(lambda _: [Piece('a', (5,), cached=0), Piece('', (), finish='stop', stop='END')])
    with site(engine) as found, openai.OpenAI(base_url=found.url, api_key='x', max_retries=0) as other:
        assert other.chat.completions.create(model='model', messages=HI).choices[0].stop_reason == 'END'
        *_, last = other.completions.create(model='model', prompt='a', stream=True)
        assert (last.choices[0].finish_reason, last.choices[0].stop_reason) == ('stop', 'END')
    assert client.chat.completions.create(model='model', messages=HI).choices[0].stop_reason is None


def test_a_schema_becomes_a_constraint_of_each_answer(client: openai.OpenAI) -> None:
    schema = object_of(score={'type': 'integer'})
    named = {'type': 'json_schema', 'json_schema': {'name': 'a', 'strict': True, 'schema': schema}}
    client.chat.completions.create(model='model', messages=HI, n=2, response_format=named)
    first, second = (asked.constraint for asked in ENGINE.asked[-2:])
    assert first is not second
    assert first.schema == second.schema == schema
    client.chat.completions.create(model='model', messages=HI, response_format={'type': 'json_object'})
    assert ENGINE.asked[-1].constraint.schema == {'type': 'object'}
    named['json_schema']['schema'] = {'type': 'string'}
    with pytest.raises(openai.BadRequestError, match='only objects'):
        client.chat.completions.create(model='model', messages=HI, response_format=named)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ['model', 'other/one']
    assert client.models.retrieve('other/one').max_model_len == ENGINE.context


def test_the_remote_client_of_simrl_works_unchanged() -> None:
    def script(generation: Generation):
        return pieces(generation, '{"score": 3}') if generation.constraint else words(generation)

    engine = ScriptedEngine(script)
    with site({'model': served(engine, constrain=Wants)}) as found:
        settings = EndpointSettings(found.url, 'model', tries=1, deadline=20)
        check(settings)
        chat = ChatRequest(messages=(Message('user', 'hi'),), max_tokens=50, seed=7, sampling=Sampling(0.5, 3, 0.9))
        raw = CompletionRequest(prompt=tuple(PROMPT), max_tokens=50, seed=7, stop_ids=(END,), log_probs=True)
        cut = dataclasses.replace(raw, max_tokens=3, prompt='a', log_probs=False)
        judged = dataclasses.replace(chat, schema=object_of(score={'type': 'integer'}))
        with Endpoint(settings) as endpoint:
            answers = endpoint.call([chat, raw, cut, judged])
    ids = (*CHAT.encode(said()), END)
    tokens = (len(PROMPT), len(ids))
    assert answers[0] == Answer(said(temperature=0.5), input_tokens=tokens[0], output_tokens=tokens[1] + 2)
    assert answers[1] == Answer(
        said(), tokens=ids, log_probs=tuple(-i / 100 for i in ids), input_tokens=tokens[0], output_tokens=tokens[1]
    )
    assert answers[2].truncated
    assert answers[2].tokens == ids[:3]
    assert answers[3].value == {'score': 3}
    asked = {one.constraint is not None or one.vocabulary: one for one in engine.asked}['all']
    assert asked.keep_special
    assert asked.keep_stop


def test_metrics_are_those_of_the_engines(here: Site) -> None:
    for _ in range(2):
        with urllib.request.urlopen(here.url.removesuffix('/v1') + '/metrics') as reply:
            lines = reply.read().decode().splitlines()
            assert reply.headers['Content-Type'].startswith('text/plain')
    assert 'simrl_waiting{model="model"} 3.0' in lines
    assert 'simrl_cached_tokens_total{model="other/one"} 50.0' in lines
    assert 'simrl_first_token_seconds_bucket{le="0.05",model="model"} 2.0' in lines
    assert 'simrl_first_token_seconds_count{model="model"} 4.0' in lines
    assert any(line.startswith('simrl_finished_total{how="stop",model="model"}') for line in lines)


def test_the_schema_of_the_api_names_its_fields(here: Site) -> None:
    with urllib.request.urlopen(here.url.removesuffix('/v1') + '/openapi.json') as reply:
        schemas = json.load(reply)['components']['schemas']
    assert {'messages', 'top_k', 'response_format'} <= schemas['ChatBody']['properties'].keys()
    assert schemas['CompletionBody']['properties']['presence_penalty'] | {'title': ''} == {
        'enum': [None, 0],
        'default': None,
        'title': '',
    }
