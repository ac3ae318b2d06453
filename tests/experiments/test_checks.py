"""What cannot be done is refused before anything is trained, and the field to mend is named."""

import dataclasses
import types

import pytest
from jax.sharding import AbstractMesh, AxisType

from simrl.conversations.batches import BatchSettings
from simrl.conversations.records import Conversation, Message, Preference
from simrl.conversations.templates import chat_from_huggingface
from simrl.experiments import checks, fitting
from simrl.experiments.fitting import RewardModelSettings, UserSFTSettings
from simrl.experiments.pretrained_settings import ReplySettings
from simrl.experiments.settings import Compute, EvaluationSettings, MeshSettings
from simrl.experiments.sources import Model, ModelSettings
from simrl.models.transformer import Execution
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.train import RLSettings
from simrl.run.config import ConfigError
from simrl.training.loop import LoopSettings
from simrl.training.optimizer import OptimizerSettings
from simrl.training.preference import PreferenceSettings
from simrl.training.sft import SFTSettings
from tests.tiny import CHATML, byte_tokenizer, tiny_config

COMPUTE = Compute(Execution(), Execution(), LoopSettings(), MeshSettings(1, 1))
USER_SFT = UserSFTSettings(SFTSettings(10, BatchSettings(4, (64, 128)), OptimizerSettings(1e-3)))
REWARD = RewardModelSettings(PreferenceSettings(10, BatchSettings(4, (64, 128)), OptimizerSettings(1e-3)))
RL = RLSettings(2, 2, 2, (512,), AlgorithmSettings(), OptimizerSettings(1e-3))


def model_of(template: str = CHATML) -> Model:
    """A model that is never computed: checks look at its sizes and its chat."""
    tokenizer = byte_tokenizer(template=template)
    chat = chat_from_huggingface(tokenizer)
    config = tiny_config(chat.size, mlp_dim=32, max_positions=2000)
    return Model(ModelSettings('nowhere'), config, config, chat, tokenizer)


MODEL = model_of()


def people(messages: int = 3, splits: tuple[str, ...] = ('train', 'train', 'test')) -> list[Conversation]:
    turns = tuple(Message(('user', 'assistant')[i % 2], f'text {i}') for i in range(messages))
    return [Conversation(f'{split} {i}', 'made up', split, turns) for i, split in enumerate(splits)]


def pairs(*splits: str, opening: str = 'ask') -> list[Preference]:
    return [
        Preference(f'{split} {i}', 'made up', split, (Message('user', opening),), 'yes', 'no')
        for i, split in enumerate(splits)
    ]


PEOPLE, PAIRS = people(), pairs('train', 'test')


def changed(settings, path: str, value):
    """A dataclass with one field, named with dots, of another value."""
    field, _, rest = path.partition('.')
    return dataclasses.replace(settings, **{field: changed(getattr(settings, field), rest, value) if rest else value})


def test_what_can_be_done_passes():
    checks.check_user_sft('config.user_sft', USER_SFT, MODEL, PEOPLE, COMPUTE)
    checks.check_reward_model('config.judge', REWARD, MODEL, PAIRS, COMPUTE)
    checks.check_rl_steps(RL, 2, COMPUTE)


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        ('batch.lengths', (64, 2001), r"batch\.lengths: expected at most the model's max_positions=2000 .* found 2001"),
        ('optimizer.warmup_steps', 10, r'optimizer\.warmup_steps: expected fewer than steps=10, found 10'),
    ],
)
def test_fits_that_would_fail_are_named(path, value, message):
    user_sft = changed(USER_SFT, f'sft.{path}', value)
    with pytest.raises(ConfigError, match=r'^config\.user_sft\.sft\.' + message):
        checks.check_user_sft('config.user_sft', user_sft, MODEL, PEOPLE, COMPUTE)
    judge = changed(REWARD, f'preference.{path}', value)
    with pytest.raises(ConfigError, match=r'^config\.judge\.preference\.' + message):
        checks.check_reward_model('config.judge', judge, MODEL, PAIRS, COMPUTE)


def test_rows_are_held_against_a_sliding_window():
    model = dataclasses.replace(MODEL, config=dataclasses.replace(MODEL.config, sliding_window=127))
    found = r'expected at most the model.s sliding_window=127 \(of max_positions=2000\) tokens, found 128'
    with pytest.raises(ConfigError, match=r'^config\.user_sft\.sft\.batch\.lengths: ' + found):
        checks.check_user_sft('config.user_sft', USER_SFT, model, PEOPLE, COMPUTE)
    with pytest.raises(ConfigError, match=r'^config\.judge\.preference\.batch\.lengths: ' + found):
        checks.check_reward_model('config.judge', REWARD, model, PAIRS, COMPUTE)


def abstract(data: int, model: int) -> AbstractMesh:
    return AbstractMesh((data, model), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)


def compute_on(data: int, model: int, of_simulators: AbstractMesh | None = None):
    """Settings whose mesh has more devices than this machine; its shape is all that checks read."""
    mesh = types.SimpleNamespace(make=lambda: abstract(data, model))
    return types.SimpleNamespace(**{**vars(COMPUTE), 'mesh': mesh}, mesh_of_simulators=lambda: of_simulators)


def test_rows_divide_by_the_devices():
    many = compute_on(8, 1)
    with pytest.raises(
        ConfigError,
        match=r'^config\.user_sft\.sft\.batch\.batch_size: .* the 8 devices of config\.compute\.mesh\.data, found 4 '
        r'rows; with --config\.compute\.mesh\.data=4',
    ):
        checks.check_user_sft('config.user_sft', USER_SFT, MODEL, PEOPLE, many)
    checks.check_reward_model('config.judge', REWARD, MODEL, PAIRS, many)  # four pairs are eight rows
    with pytest.raises(ConfigError, match=r'^config\.scale\.batch_size: .* found 6 rows; with .*data=2 they'):
        checks.check_split('config.scale.batch_size', 6, many)
    with pytest.raises(ConfigError, match=r'^config\.rl\.prompts_per_step x samples_per_prompt: .* found 4 rows'):
        checks.check_rl_steps(RL, 2, many)


def test_a_bucket_needs_its_package(monkeypatch):
    compute = dataclasses.replace(COMPUTE, loop=LoopSettings(checkpoints='gs://bucket/folder'))
    monkeypatch.setattr(checks.importlib.util, 'find_spec', lambda _: object())
    checks.check_runtime(compute)
    monkeypatch.setattr(checks.importlib.util, 'find_spec', lambda _: None)
    with pytest.raises(ConfigError, match=r'^config\.compute\.loop\.checkpoints: expected the package gcsfs for gs:'):
        checks.check_runtime(compute)


def test_models_that_a_mesh_cannot_split_are_named():
    models = {'assistant': MODEL.config}
    checks.check_mesh(models, compute_on(8, 2))
    with pytest.raises(ConfigError, match=r'^config\.compute\.mesh\.data: .*model_dim=16.* found 5 \(assistant\)'):
        checks.check_mesh(models, compute_on(5, 1))
    with pytest.raises(ConfigError, match=r'^config\.compute\.mesh\.model: .*num_heads=2.* found 4'):
        checks.check_mesh(models, compute_on(1, 4))


def test_a_mesh_of_simulators_divides_their_heads_and_the_conversations():
    models = {'people': None, 'mine': MODEL.config}
    checks.check_simulator_mesh(models, compute_on(1, 4))
    checks.check_simulator_mesh(models, compute_on(4, 1, abstract(2, 2)))
    with pytest.raises(ConfigError, match=r'compute\.simulator_mesh\.model: .*num_heads=2.* found 4 .*arms\.mine'):
        checks.check_simulator_mesh(models, compute_on(4, 1, abstract(1, 4)))
    split = compute_on(1, 4, abstract(4, 1))
    checks.check_rl_steps(RL, 2, split)
    with pytest.raises(
        ConfigError, match=r'^config\.rl\..* the 4 devices of config\.compute\.simulator_mesh\.data, fou'
    ):
        checks.check_rl_steps(changed(RL, 'samples_per_prompt', 3), 2, split)
    with pytest.raises(ConfigError, match=r'^config\.compute\.rows_in_flight: .* 4 devices .*simulator_mesh.* 2 rows'):
        checks.check_rl_steps(RL, 2, types.SimpleNamespace(**{**vars(split), 'rows_in_flight': 2}))


@pytest.mark.parametrize(
    ('conversations', 'message'),
    [
        (people(splits=('train',)), r"the split 'test' .* found none among 0; all of the data: train \d+$"),
        (people(splits=('test',)), "the split 'train' .* found none among 0"),
        (people(messages=1), "the split 'train' .* found none among 2"),  # a given opening is not learnt
    ],
)
def test_a_split_with_nothing_to_learn_is_named(conversations, message):
    with pytest.raises(ConfigError, match=r'^config\.user_sft: expected .*' + message):
        checks.check_user_sft('config.user_sft', USER_SFT, MODEL, conversations, COMPUTE)


def test_a_half_or_a_split_without_pairs_is_named():
    (pair,) = pairs('train')
    empty = next(half for half in fitting.HALVES if half != fitting.half_of(pair))
    with pytest.raises(ConfigError, match=f"split 'train', half='{empty}'.* found none among 0"):
        checks.check_reward_model('config.judge', changed(REWARD, 'half', empty), MODEL, PAIRS, COMPUTE)
    with pytest.raises(ConfigError, match=r"split 'test'.* found none among 0"):
        checks.check_reward_model('config.judge', REWARD, MODEL, pairs('train'), COMPUTE)
    long = pairs('train', 'test', opening='x' * 200)
    with pytest.raises(ConfigError, match=r'batch\.lengths=128 tokens, found none among 1'):
        checks.check_reward_model('config.judge', REWARD, MODEL, long, COMPUTE)


def test_too_few_openings_are_named():
    with pytest.raises(ConfigError, match=r'^config\.rl\.prompts_per_step: expected at most the 2 examples .* found 3'):
        checks.check_rl_steps(changed(RL, 'prompts_per_step', 3), 2, COMPUTE)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: ReplySettings(openings=1, batch_size=4), r'ReplySettings\.openings: expected at least 2, or None'),
        (lambda: ReplySettings(openings=4, batch_size=0), r'ReplySettings\.batch_size: expected at least 1, found 0'),
        (
            lambda: EvaluationSettings(block=3),
            r'EvaluationSettings\.people: expected a multiple of block=3, found None',
        ),
        (lambda: changed(USER_SFT, 'held_out', 0), r'UserSFTSettings\.held_out: expected at least 1, or None'),
        (lambda: changed(REWARD, 'held_out_seed', -1), r'RewardModelSettings\.held_out_seed: expected at least 0'),
        (lambda: changed(USER_SFT, 'held_out_seed', -1), r'UserSFTSettings\.held_out_seed: expected at least 0'),
        (lambda: changed(USER_SFT, 'sft.batch.seed', -1), r'BatchSettings\.seed: expected at least 0, found -1'),
        (lambda: ReplySettings(seed=2**31), r'ReplySettings\.seed: expected a number from 0 to 2147483647'),
        (
            lambda: ModelSettings('s3://bucket/model'),
            r"ModelSettings\.source: expected a local path, found the URL 's3:",
        ),
        (lambda: changed(REWARD, 'held_out', 0), r'RewardModelSettings\.held_out: expected at least 1, or None'),
    ],
)
def test_numbers_of_nothing(make, message):
    with pytest.raises(ValueError, match=message):
        make()
