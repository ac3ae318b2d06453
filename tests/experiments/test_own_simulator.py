"""A simulator of the user's own, from a module outside the tree, in both scenes: README's example runs."""

import json
import pathlib
import sys

import numpy as np
import pytest

from simrl.experiments import experiment
from simrl.experiments.concierge_setup import WORLD_STAGE
from simrl.experiments.experiment import build_stages, scene_of
from simrl.rollouts.agents import HostConversation, told
from simrl.run.config import ConfigError, to_dict
from tests.experiments.scene import settings, tiny_settings

README = pathlib.Path(__file__).parents[2] / 'README.md'
WORKDIR = pathlib.Path('run')


def readme_example() -> str:
    """The Python block of README that defines a simulator."""
    blocks = README.read_text().split('```python\n')[1:]
    return next(text for block in blocks if 'def terse(' in (text := block.partition('```')[0]))


@pytest.fixture
def modules(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder outside the tree that modules are imported from, here and in workers."""
    folder = tmp_path / 'elsewhere'
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith('own_'):
            del sys.modules[name]


OWN = {name: {'simulator': f'own_simulators:{name}'} for name in ('terse', 'hurried')}


def test_the_example_of_the_readme_replies_and_tells(modules, tmp_path, monkeypatch):
    (modules / 'own_simulators.py').write_text(readme_example())
    tiny = tiny_settings(OWN, workers=1)
    experiment.run(to_dict(tiny), tmp_path / 'run', only=(WORLD_STAGE,))  # words
    scene = scene_of(tiny, tmp_path / 'run')
    examples = scene.training_examples()[:2]
    terse = scene.simulator('terse', 0)
    replies = terse.reply([HostConversation(example, 0, ()) for example in examples], np.arange(2))
    assert all(reply.text and not reply.failure for reply in replies)
    config = scene.settings.users['medium'].model.transformer_config(scene.chat.size)
    monkeypatch.setattr(type(scene), 'user_model', lambda _: (config, {}))  # without weights
    hurried = scene.simulator('hurried', 0)
    assert [told(hurried, example) for example in examples] == [f'impatient: {x.intent}' for x in examples]


@pytest.mark.long
def test_the_example_of_the_readme_is_trained_with_and_measured(modules, tmp_path):
    (modules / 'own_simulators.py').write_text(readme_example())
    experiment.run(to_dict(tiny_settings(OWN, workers=2)), tmp_path / 'run')
    rows = (tmp_path / 'run' / 'rl' / 'hurried' / 'seed-0' / 'conversations' / 'rl.jsonl').read_text().splitlines()
    assert 'impatient' in json.loads(rows[0])['told']
    fidelity = json.loads((tmp_path / 'run' / 'results' / 'fidelity.json').read_text())
    assert fidelity['simulators']['terse']['nats_per_token'] is None  # off the device
    assert fidelity['simulators']['hurried']['nats_per_token']['mean'] > 0


def test_an_edited_module_changes_the_stages_of_its_arm_alone(modules):
    (modules / 'own_edited.py').write_text('def f(scene): ...')
    arms = {'mine': {'simulator': 'own_edited:f'}, 'persona': {'simulator': 'persona'}}

    def identities() -> dict[str, str]:
        return {stage.name: repr(stage.settings) for stage in build_stages(settings(arms=arms), WORKDIR)}

    before = identities()
    (modules / 'own_edited.py').write_text('def f(scene): ...  # edited')
    del sys.modules['own_edited']
    after = identities()
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert all('mine' in name for name in changed)


@pytest.mark.parametrize(
    ('source', 'simulator', 'message'),
    [
        (None, 'own_gone:f', r"expected a module 'own_gone' that can be imported, found ModuleNotFound"),
        (
            'raise KeyError(1)',
            'own_broken:f',
            r"expected a module 'own_broken' .*, found KeyError: 1",
        ),
        ('', 'own_empty:f', r"expected a function 'f' in module 'own_empty', found None"),
    ],
)
def test_a_simulator_that_is_not_there_is_refused_before_anything_runs(modules, source, simulator, message):
    if source is not None:
        (modules / f'{simulator.partition(":")[0]}.py').write_text(source)
    with pytest.raises(ConfigError, match=rf'^config\.arms\.mine\.simulator: {message}'):
        build_stages(settings(arms={'mine': {'simulator': simulator}}), WORKDIR)


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('def f(scene):\n    raise OSError("no route")', r'own_called:f raised OSError: no route'),
        (
            'def f(scene):\n    return "hello"',
            r'expected own_called:f to return a ModelAgent or .*, found str',
        ),
    ],
)
def test_a_simulator_that_is_no_agent_is_named(modules, source, message):
    (modules / 'own_called.py').write_text(source)
    sys.modules.pop('own_called', None)
    scene = scene_of(settings(arms={'mine': {'simulator': 'own_called:f'}}), WORKDIR)
    with pytest.raises(ConfigError, match=rf'^config\.arms\.mine\.simulator: {message}'):
        scene.simulator('mine', 0)
