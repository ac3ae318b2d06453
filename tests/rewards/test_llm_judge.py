"""A judge on the device: eleven scores from one prefill are those of eleven rows, and what is not judged says why."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from simrl.conversations.records import Example
from simrl.conversations.templates import chat_from_huggingface
from simrl.models import transformer
from simrl.models.files.export import export
from simrl.models.files.load import load_model
from simrl.models.sharding import make_mesh
from simrl.models.transformer import Execution
from simrl.rewards import llm_judge
from simrl.rewards.judging import Question, judging
from simrl.rewards.llm_judge import (
    batched_log_probs,
    chains_of,
    judge_agent,
    local_judge,
    prompt_tokens,
    score_runs,
    verdict_of,
)
from simrl.rewards.rewards import CAUSES, FAILED, NO_REPLY, TOO_LONG
from simrl.rewards.rubric import HELPFULNESS, Rubric, judge_prompt
from simrl.rollouts.collect import for_sampling
from simrl.rollouts.state import EndReason
from simrl.rollouts.trajectories import Trajectories
from tests.tiny import byte_tokenizer, tiny_config

LENGTHS = (32, 64)
SHORT = Rubric('short', 1, 'Grade.')


@functools.cache
def mesh():
    return make_mesh(1, 1, jax.devices()[:1])


def chat_of(*merges):
    return chat_from_huggingface(byte_tokenizer(merges=merges))


def model_of(vocab_size, **changes):
    """A model of random weights, made without a program."""
    config, random = tiny_config(vocab_size, num_kv_heads=2, **changes), np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(transformer.init_params, config=config), jax.random.key(0))
    return config, jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


def rows_of(chat, *lengths):
    random = np.random.default_rng(0)
    return [random.integers(0, 256, length).astype(np.int32) for length in lengths]


@functools.partial(jax.jit, static_argnames='config')
def logits_of(params, config, tokens):
    return transformer.project(params, transformer.apply(params, config, Execution(), tokens)[0])


def slow_log_probs(params, config, row, run, size):
    """Log-probability of a run after a row: one whole forward pass, softmax over the tokenizer's own ids."""
    tokens = np.zeros(LENGTHS[-1], np.int32)
    tokens[: len(row) + len(run)] = [*row, *run]
    logits = np.asarray(logits_of(params, config, tokens[None]))[0, :, :size].astype(np.float64)
    log_prob = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return sum(log_prob[len(row) - 1 + i, token] for i, token in enumerate(run))


@pytest.mark.parametrize('merges', [(), [('1', '0')]], ids=['digits', '10 is one token'])
def test_one_prefill_scores_as_eleven_rows_do(merges):
    """In float32, whatever a row's bucket and batch-mates; the digits share beginnings or not."""
    chat = chat_of(*merges)
    config, params = model_of(chat.size)
    runs = score_runs(chat)
    assert len(runs[10]) == (2 if merges else 3)
    policy = for_sampling(judge_agent(chat, config, params, Execution(log_prob_chunk=16)), mesh()).policy
    rows = rows_of(chat, 5, 61, 1, 30, 17, 29)
    found = batched_log_probs(policy, rows, runs=runs, lengths=LENGTHS, batch_size=2, mesh=mesh())
    expected = [[slow_log_probs(params, config, row, run, chat.tokenizer.size) for run in runs] for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)
    alone = batched_log_probs(policy, rows[:1], runs=runs, lengths=LENGTHS[1:], batch_size=2, mesh=mesh())
    np.testing.assert_allclose(found[:1], alone, rtol=1e-5, atol=2e-5)


@pytest.mark.parity
def test_equals_the_logits_of_transformers(tmp_path):
    torch = pytest.importorskip('torch', reason='parity with transformers needs torch')
    import transformers

    tokenizer = byte_tokenizer()
    config, params = model_of(len(tokenizer), tied_embedding=True)
    export(params, config, tokenizer, tmp_path / 'model')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'model', dtype=torch.float32).eval()
    _, params, _ = load_model(str(tmp_path / 'model'))
    chat = chat_of()
    question = [{'role': 'user', 'content': judge_prompt(HELPFULNESS, 'tea', [('user', 'hi'), ('assistant', 'tea?')])}]
    row = prompt_tokens(chat, question[0]['content'])
    prompt = theirs.config.max_position_embeddings
    row = row[-prompt + 8 :]  # as much of it as the model has positions for
    log_probs = []
    for score in range(11):
        ids = [*row.tolist(), *tokenizer.encode(f'{score}<|im_end|>', add_special_tokens=False)]
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
        log_probs.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(row), len(ids))))
    grown = dataclasses.replace(config, vocab_size=chat.size)
    policy = for_sampling(judge_agent(chat, grown, params, Execution()), mesh()).policy
    found = batched_log_probs(policy, [row], runs=score_runs(chat), lengths=(256,), batch_size=1, mesh=mesh())[0]
    np.testing.assert_allclose(found, log_probs, rtol=1e-5, atol=1e-4)
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(text, add_special_tokens=False) == prompt_tokens(chat, question[0]['content']).tolist()


def test_chains_feed_every_beginning_once():
    chains, places = chains_of(((1, 9), (1, 2, 9), (3, 9)))
    assert chains == ((1, 2), (3,))
    assert places == [(0, 0), (0, 1), (0, 0), (0, 1), (0, 2), (0, 0), (1, 1)]


def test_a_verdict_is_the_mean_of_the_distribution_or_its_peak():
    log_probs = np.full(11, -np.inf)
    log_probs[[2, 10]] = np.log([0.1, 0.3])
    assert verdict_of(log_probs, 'expected').score == pytest.approx(0.8)
    assert verdict_of(log_probs, 'argmax').score == 1.0
    assert verdict_of(log_probs, 'expected').parts == pytest.approx({'mass': 0.4})
    tiny = verdict_of(np.full(11, -800.0), 'expected')  # a judge that would hardly ever answer with a number
    assert tiny.score == pytest.approx(0.5)


def judge_of(chat, rubric=SHORT, length=1024, read='expected'):
    config, params = model_of(chat.size, max_positions=2048)
    agent = judge_agent(chat, config, params, Execution())
    return local_judge(agent, chat, rubric, read=read, lengths=(length,), batch_size=3, mesh=mesh())


def test_a_conversation_that_is_too_long_is_not_judged_and_not_cut():
    chat = chat_of()
    empty, full = (Question('e', None, (('user', 'a'), ('assistant', 'b' * n))) for n in (1, 300))
    length = len(prompt_tokens(chat, judge_prompt(SHORT, None, full.messages, answer='number'))) + 3
    verdicts = judge_of(chat, length=length).submit([full, empty])()
    assert [verdict.cause for verdict in verdicts] == ['', '']
    verdicts = judge_of(chat, length=length - 1).submit([full, empty, full])()
    assert [verdict.cause for verdict in verdicts] == [TOO_LONG, '', TOO_LONG]
    assert f'expected at most {length - 4} tokens, found {length - 3}' in verdicts[0].detail
    assert 0 < verdicts[1].score < 1


def test_what_is_submitted_is_judged_together(monkeypatch):
    """Two pieces of a step share a batch; a later one has its own."""
    batches = []

    def counted(policy, tokens, length, *, runs):
        batches.append(len(length))
        return jax.numpy.log(jax.numpy.arange(1.0, 12.0)) - length[:, None]

    monkeypatch.setattr(llm_judge, 'score_log_probs', counted)
    judge = judge_of(chat_of())
    first, second = (judge.submit([Question(e, None, (('user', e), ('assistant', 'b')))]) for e in 'ab')
    assert not batches
    assert len(second()) == len(first()) == 1
    assert batches == [3]
    judge.submit([])()
    assert batches == [3]
    assert judge.submit([Question('c', None, (('user', 'c'), ('assistant', 'b')))])()[0].score == first()[0].score
    assert batches == [3, 3]


def trajectories_of(chat, conversations, ends, turns=2):
    longest = max(len(chat.encode(text)) for texts in conversations for text in texts)
    shape = (len(conversations), 2 * turns)
    messages, length = np.zeros((*shape, longest), np.int32), np.zeros(shape, np.int32)
    for i, texts in enumerate(conversations):
        for j, text in enumerate(texts):
            ids = chat.encode(text)
            messages[i, j, : len(ids)], length[i, j] = ids, len(ids)
    said = {
        'messages': messages,
        'message_length': length,
        'truncated': np.zeros(shape, bool),
        'num_messages': np.array([len(texts) for texts in conversations]),
        'end_reason': np.array(ends, np.int8),
    }
    # Judges read what was said alone.
    unread = {field.name for field in dataclasses.fields(Trajectories)} - said.keys()
    return Trajectories(**said, **dict.fromkeys(unread, np.zeros(shape[0], np.int32)))


def test_a_judge_of_another_tokenizer_scores_rollouts_by_their_text():
    """By conversation, and by turn as that of the conversation up to it; an end that none heard is left out."""
    chat, own = chat_of(('t', 'e')), chat_of()
    judge = judge_of(own)
    talks = [['hi', 'tea ?', 'yes', 'there'], ['hi', 'tea ?', '[END]'], ['hi'], ['hi', 'tea ?', 'yes', 'x']]
    ends = [EndReason.TURNS, EndReason.SIGNAL, EndReason.BUDGET, EndReason.FAILURE]
    examples = [
        Example(f'e{i}', None, intent, i, 'test', 'train') for i, intent in enumerate(['tea', None, None, None])
    ]
    batch = trajectories_of(chat, talks, ends)
    rewards, details = judging(judge, chat.decode, 'conversation').start(batch, examples)()
    assert rewards.valid.tolist() == [True, True, False, False]
    assert [CAUSES[cause] for cause in rewards.cause] == ['', '', NO_REPLY, FAILED]
    assert not details
    messages = [('user', 'hi'), ('assistant', 'tea ?'), ('user', 'yes'), ('assistant', 'there')]
    expected = judge.submit([Question('', 'tea', tuple(messages)), Question('', None, tuple(messages[:2]))])()
    np.testing.assert_allclose(rewards.value[:2], [verdict.score for verdict in expected], rtol=1e-6)
    assert rewards.value.dtype == np.float32
    assert (rewards.parts['mass'][:2] > 0).all()

    turns, _ = judging(judge, chat.decode, 'turn').start(batch, examples)()
    assert turns.valid.tolist() == [[True, True], [True, False], [False, False], [False, False]]
    asked = [Question('', 'tea', tuple(messages[:n]), 'reply') for n in (2, 4)]
    np.testing.assert_allclose(turns.value[0], [verdict.score for verdict in judge.submit(asked)()], rtol=1e-6)
    assert turns.value[0, 0] != turns.value[0, 1]
