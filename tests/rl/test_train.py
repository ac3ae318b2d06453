"""RL against people off the device: it runs, goes on after a kill as if unbroken, and learns nothing from failures."""

import collections
import dataclasses
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simrl.conversations.chat import ASSISTANT
from simrl.conversations.records import Example
from simrl.conversations.sentencepiece import sentencepiece_chat, train_sentencepiece
from simrl.models import sharding, transformer
from simrl.models.transformer import Execution
from simrl.rewards.rewards import CAUSES, JUDGE_FAILED, Judging, Rewards, Score
from simrl.rl import train
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.judged import causes_of, check_judged
from simrl.rl.train import RLSettings
from simrl.rollouts.agents import HostAgent, HostConversation, Limits, ModelAgent, Reply, assistant
from simrl.rollouts.collect import ConversationError, collect, for_sampling
from simrl.rollouts.state import EndReason, example_hash
from simrl.rollouts.token_sampling import Sampling
from simrl.rollouts.trajectories import Trajectories
from simrl.run.compiles import compilations
from simrl.training import loop
from simrl.training.loop import LoopSettings
from simrl.training.optimizer import OptimizerSettings
from tests import kills
from tests.tiny import tiny_config

CHAT = sentencepiece_chat(
    train_sentencepiece(['i want tea', 'no , tea', 'ok thanks', 'forget it', 'try tea or coffee ?'] * 9, 50)
)
LIMITS = Limits(turns=2, prompt_tokens=4, assistant_tokens=5, user_tokens=8)
EXAMPLES = [Example(f'person-{i}', None, 'tea', i, 'test', 'train') for i in range(4)]
SAMPLES = 4
STEPS = 4
FAILING = 'person-3'
REASON = 'no line to person-3'


class KillError(Exception):
    pass


def helper() -> ModelAgent:
    config = tiny_config(CHAT.size, max_positions=64)
    return assistant(
        CHAT,
        config,
        transformer.init_params(jax.random.key(0), config),
        Execution(log_prob_chunk=16),
        max_new_tokens=LIMITS.assistant_tokens,
        sampling=Sampling(),
    )


def people(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
    """They want tea, and leave by chance; one of them cannot be reached a second time."""
    replies = []
    for conversation, seed in zip(conversations, seeds.tolist(), strict=True):
        if not conversation.messages:
            replies.append(Reply('i want tea'))
        elif conversation.example.id == FAILING:
            replies.append(Reply('', failure=REASON))
        else:
            replies.append(Reply('ok thanks', ends=True) if seed % 2 else Reply('no , tea'))
    return replies


def share_of_tea(batch: Trajectories) -> Rewards:
    """Of the assistant's tokens, those that 'tea' is made of; far more for conversations that failed."""
    tea = jnp.asarray(CHAT.encode('tea'))
    content = jnp.arange(batch.messages.shape[2]) < batch.message_length[:, 1::2, None]
    share = jnp.mean(content & jnp.isin(batch.messages[:, 1::2], tea), axis=(1, 2), dtype=jnp.float32)
    value = jnp.where(batch.end_reason == EndReason.FAILURE, 1000.0, share)
    return Rewards(value, jnp.ones(value.shape, bool), {'share': share}, jnp.zeros(value.shape, jnp.int32))


def train_tea(
    folder: pathlib.Path,
    score: Score,
    trained: str = 'assistant',
    rows_in_flight: int | None = None,
    compile_threads: int = 0,
) -> None:
    train.train(
        folder,
        HostAgent(people, LIMITS.user_tokens, system=lambda example: f'wants {example.intent}', replayable=True),
        helper(),
        chat=CHAT,
        examples=EXAMPLES,
        score=score,
        limits=LIMITS,
        settings=RLSettings(
            steps=STEPS,
            prompts_per_step=len(EXAMPLES),
            samples_per_prompt=SAMPLES,
            row_buckets=(64,),
            algorithm=AlgorithmSettings(advantage='grpo', kl='none'),
            optimizer=OptimizerSettings(learning_rate=1e-2),
            trained=trained,  # type: ignore[arg-type]
        ),
        execution=Execution(log_prob_chunk=16),
        loop_settings=LoopSettings(log_every=1, checkpoint_every=2, saved_conversations=len(EXAMPLES) * SAMPLES),
        seed=0,
        rows_in_flight=rows_in_flight,
        compile_threads=compile_threads,
        mesh=sharding.make_mesh(1, 1, jax.devices()[:1]),
    )


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp('unbroken')
    train_tea(folder, share_of_tea)
    return folder


@pytest.mark.long
def test_a_run_against_people_goes_on_as_if_unbroken(
    tmp_path: pathlib.Path, unbroken: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def killed_in_the_fourth_step(batch: Trajectories) -> Rewards:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KillError
        return share_of_tea(batch)

    with pytest.raises(KillError):
        train_tea(tmp_path, killed_in_the_fourth_step)
    train_tea(tmp_path, share_of_tea)
    kills.assert_same_run(unbroken, tmp_path)
    assert f'step 3: {SAMPLES} conversations ended by a failure of the other agent: {REASON}' in capsys.readouterr().out


def test_conversations_that_a_failure_ended_are_counted_and_have_no_reward(unbroken: pathlib.Path) -> None:
    lines = [json.loads(line) for line in (unbroken / 'metrics.jsonl').read_text().splitlines()]
    rows = [json.loads(line) for line in (unbroken / 'conversations' / 'rl.jsonl').read_text().splitlines()]
    assert len(lines) == STEPS
    for line in lines:
        assert line['rollout/end_failure'] == line['reward/unjudged'] == 1 / len(EXAMPLES)
        assert line['masked_rows'] == SAMPLES
        assert line['reward/mean'] <= 1
        assert line['rollout/end_signal'] > 0
        assert line['rollout/missed_signals'] == 0
    assert len(rows) == STEPS * len(EXAMPLES) * SAMPLES
    for row in rows:
        failed = row['example'] == FAILING
        assert row.get('failure') == (REASON if failed else None)
        assert row['told'] == 'wants tea'
        assert (row['reward'] is None) == failed
        assert row['messages'][0]['content'] == 'i want tea'
        if row['end_reason'] == 'signal':
            assert row['messages'][-1]['content'] == 'ok thanks<|endconversation|>'


def test_a_judge_scores_pieces_while_others_are_sampled(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is that of the same score at once."""
    events: list[str] = []

    def start(piece: Trajectories, examples: Sequence[Example]) -> Callable[[], tuple[Rewards, Mapping[int, str]]]:
        events.append(f'start {examples[0].id}')
        assert [example_hash(example.id) for example in examples] == piece.example_id.tolist()

        def finish() -> tuple[Rewards, Mapping[int, str]]:
            events.append(f'finish {examples[0].id}')
            time.sleep(0.01)
            return jax.device_get(share_of_tea(piece)), {}

        return finish

    monkeypatch.setattr(sys.modules[__name__], 'STEPS', 2)
    train_tea(tmp_path / 'judged', Judging(start), rows_in_flight=SAMPLES)
    train_tea(tmp_path / 'scored', share_of_tea, rows_in_flight=SAMPLES)
    kills.assert_same_run(tmp_path / 'scored', tmp_path / 'judged')
    orders = [events[i : i + 8] for i in range(0, len(events), 8)]
    assert len(orders) == STEPS
    for order in orders:
        assert [event.split()[0] for event in order] == ['start'] * 4 + ['finish'] * 4
        assert [event.split()[1] for event in order[:4]] == [event.split()[1] for event in order[4:]]
    lines = [json.loads(line) for line in (tmp_path / 'judged/metrics.jsonl').read_text().splitlines()]
    for name in ('judge', 'replies'):
        assert all(0 < line[f'time/waiting_for_{name}'] < 1 for line in lines)


def test_what_a_judge_could_not_judge_has_its_reason(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In rows of its conversation, whichever piece it is in; and in the error that stops the run."""
    failing = 1  # rows of each piece

    def start(piece: Trajectories, _: Sequence[Example]) -> Callable[[], tuple[Rewards, Mapping[int, str]]]:
        rewards = jax.device_get(share_of_tea(piece))
        valid, cause = np.arange(len(rewards.valid)) >= failing, np.zeros(len(rewards.valid), np.int32)
        cause[~valid] = CAUSES.index(JUDGE_FAILED)
        reasons = dict.fromkeys(range(failing), 'judge a: timeout')
        return lambda: (dataclasses.replace(rewards, valid=valid, cause=cause), reasons)

    monkeypatch.setattr(sys.modules[__name__], 'STEPS', 1)
    train_tea(tmp_path / 'some', Judging(start), rows_in_flight=SAMPLES)
    rows = [json.loads(line) for line in (tmp_path / 'some/conversations/rl.jsonl').read_text().splitlines()]
    for i, row in enumerate(rows):
        reason = REASON if row['example'] == FAILING else 'judge a: timeout' if i % SAMPLES == 0 else None
        assert row.get('failure') == reason
        assert (row['reward'] is None) == (reason is not None)
    assert 'step 0: 4 conversations were not judged: judge a: timeout' in capsys.readouterr().out
    failing = 3
    with pytest.raises(ConversationError, match=r'step 0: 13 of 16 conversations have no reward .*: timeout, no'):
        train_tea(tmp_path / 'many', Judging(start), rows_in_flight=SAMPLES)


def test_a_reward_that_is_not_finite_is_no_reward(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other conversations of the step, and of the group, are learned from."""

    def broken(batch: Trajectories) -> Rewards:
        rewards = share_of_tea(batch)
        return dataclasses.replace(
            rewards,
            value=rewards.value.at[0].set(jnp.nan),
            parts={'share': rewards.parts['share'].at[1].set(jnp.inf)},
        )

    monkeypatch.setattr(sys.modules[__name__], 'STEPS', 1)
    train_tea(tmp_path, broken)
    (line,) = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert line['reward/unjudged'] == (SAMPLES + 1) / 16
    assert line['masked_rows'] == SAMPLES + 1
    assert (line['skipped'], line['empty_updates']) == (0, 0)
    assert all(line[name] is not None for name in ('loss', 'reward/mean', 'reward/share'))
    rows = [json.loads(line) for line in (tmp_path / 'conversations' / 'rl.jsonl').read_text().splitlines()]
    assert rows[0]['reward'] is None
    assert rows[1]['reward'] is not None
    assert 'step 0: 1 conversations have no reward: the reward is not finite' in capsys.readouterr().out


def test_too_many_conversations_without_a_reward_stop_a_run() -> None:
    def judged(number: int, *, of: int = 4, cause: int = 0) -> Rewards:
        valid = np.arange(of) < number
        return Rewards(np.zeros(of), valid, {}, np.where(valid, 0, cause))

    def check(rewards: Rewards, reasons: Mapping[int, str], share: float) -> None:
        check_judged('step 7', causes_of(rewards, reasons), len(rewards.valid), share)

    check(judged(3), {3: REASON}, 0.5)
    check(judged(1), {1: REASON}, 1.0)
    with pytest.raises(
        ConversationError,
        match=r'^step 7: 2 of 4 conversations have no reward \(config.compute.loop.max_unjudged=0.5\): '
        'no line to person-3, the reward gave none a value$',
    ):
        check(judged(2), {3: REASON}, 0.5)
    for cause in (1, 3):
        with pytest.raises(ConversationError, match=rf'step 7: 4 of 4 .*=1\): {CAUSES[cause]}$'):
            check(judged(0, cause=cause), {}, 1.0)
    by_turn = Rewards(np.zeros((2, 2)), np.array([[True, False], [False, True]]), {}, np.zeros(2, int))
    check(by_turn, {}, 0.1)
    for share in (0.0, 1.5, float('nan')):
        with pytest.raises(ValueError, match=r'LoopSettings.max_unjudged: expected a share in \(0, 1\], found '):
            LoopSettings(max_unjudged=share)


@pytest.mark.parametrize(
    ('algorithm', 'changes', 'message'),
    [
        ({'advantage': 'grpo'}, {'samples_per_prompt': 1}, 'samples_per_prompt: expected at least 2'),
        ({'advantage': 'dr_grpo'}, {'samples_per_prompt': 1}, 'samples_per_prompt: expected at least 2'),
        ({'advantage': 'rloo'}, {'samples_per_prompt': 1}, "samples_per_prompt: expected at least 2 .*'rloo'"),
        (
            {'advantage': 'reinforce_pp'},
            {'samples_per_prompt': 1, 'prompts_per_step': 1},
            'prompts_per_step x samples_per_prompt: expected at least 2',
        ),
        (
            {'critic_warmup_steps': 6, 'epochs': 2},
            {'steps': 3},
            'algorithm.critic_warmup_steps: expected fewer than the 6 updates of the run',
        ),
        ({'minibatches': 16}, {}, None),
        ({'minibatches': 8}, {'samples_per_prompt': 1}, None),
    ],
)
def test_settings_under_which_nothing_can_be_learned(
    algorithm: dict[str, Any], changes: dict[str, int], message: str | None
) -> None:
    sizes = {'steps': 3, 'prompts_per_step': 4, 'samples_per_prompt': 2} | changes
    expected = rf'RLSettings\.{message}' if message else r'expected to divide the \d rows of a batch'
    with pytest.raises(ValueError, match=expected):
        RLSettings(
            **sizes,
            row_buckets=(64,),
            algorithm=AlgorithmSettings(**algorithm),
            optimizer=OptimizerSettings(learning_rate=1e-2),
        )


def test_one_conversation_of_a_prompt_is_enough_for_what_compares_none() -> None:
    for advantage in ('gae', 'reinforce_pp'):
        RLSettings(1, 2, 1, (64,), AlgorithmSettings(advantage), OptimizerSettings(1e-2))  # type: ignore[arg-type]


def test_only_an_agent_on_the_device_is_trained(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r'RLSettings.trained: expected an agent on the device, found a HostAgent'):
        train_tea(tmp_path, share_of_tea, trained='user')


def test_programs_are_stated_compiled_ahead_and_no_more(tmp_path: pathlib.Path, capsys, monkeypatch) -> None:
    before: list[int] = []
    with compilations() as programs:

        def run(*args: Any, **kwargs: Any) -> Any:
            before.append(len(programs))
            return loop_run(*args, **kwargs)

        loop_run = loop.run
        monkeypatch.setattr(loop, 'run', run)
        jax.clear_caches()  # what other tests compiled
        train_tea(tmp_path, share_of_tea, compile_threads=2)
    names = [program.name for program in programs]
    ahead, later = names[: before[0]], names[before[0] :]
    said = capsys.readouterr().out
    bound = dict(re.findall(r'(\w+) (\d+)', re.search(r'^rl: at most \d+ programs .*: (.*)$', said, re.MULTILINE)[1]))
    for name, number in collections.Counter(names).items():
        assert number <= int(bound.get(name, number)), name
    both = {'start_dialogue', 'add_message', 'add_reply', 'trajectories', 'start_passes', 'add_gradients'}
    assert both | {'minibatch_step'} <= set(ahead)
    assert collections.Counter(ahead)['add_message'] == int(bound['add_message'])
    # What was compiled ahead is what is called: nothing of it is compiled again.
    assert not set(later) & set(ahead) & set(bound)
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [line['time/programs'] for line in lines][1:] == [0] * (STEPS - 1)
    assert re.search(r'^rl: compiling \d+ programs before the first step, in 2 threads$', said, re.MULTILINE)
    assert re.search(r'^rl: step 1: \d+ programs compiled in ', said, re.MULTILINE)
    assert 'rl: step 2: ' not in said
    number = sum(name in bound for name in names)
    assert f'\nrl: {number} of at most {sum(map(int, bound.values()))} programs that differ in their sizes\n' in said


@pytest.mark.long
def test_rows_in_flight_change_nothing_that_is_said() -> None:
    """Pieces of two rows, though each person has four conversations; failures and samples keep their rows."""
    met: list[tuple[str, int]] = []

    def meeting(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
        met.extend((c.example.id, c.sample) for c in conversations if not c.messages)
        return people(conversations, seeds)

    def talked(rows_in_flight: int | None) -> tuple[Trajectories, Mapping[int, str]]:
        mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
        batch, failures = collect(
            HostAgent(meeting, LIMITS.user_tokens),
            for_sampling(helper(), mesh),
            EXAMPLES,
            chat=CHAT,
            limits=LIMITS,
            seed=0,
            step=0,
            view=ASSISTANT,
            mesh=mesh,
            samples=SAMPLES,
            rows_in_flight=rows_in_flight,
        )
        return jax.device_get(batch), failures

    (whole, failures), (pieces, failures_of_pieces) = talked(None), talked(2)
    assert met == [(example.id, sample) for example in EXAMPLES for sample in range(SAMPLES)] * 2
    assert failures == failures_of_pieces == dict.fromkeys(range(12, 16), REASON)
    for field in ('tokens', 'role', 'turn', 'length', 'end_reason', 'example_id', 'group', 'messages', 'truncated'):
        np.testing.assert_array_equal(getattr(pieces, field), getattr(whole, field), err_msg=field)
