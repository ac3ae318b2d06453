"""Cards of the simulators of a run directory: finished, grown, partly finished, and without any result."""

import dataclasses
import json
import re
import shutil

import pytest

from simrl.evaluation import card as card_lib
from simrl.evaluation.fidelity.distances import Distance
from simrl.evaluation.fidelity.measure import SourceFidelity
from simrl.evaluation.report import verdicts
from simrl.evaluation.report.card_page import NOT_MEASURED, document
from simrl.evaluation.results import files as result_files
from simrl.evaluation.statistics import Estimate
from simrl.experiments import cards, plan
from simrl.experiments.concierge import ConciergeScene
from simrl.experiments.experiment import results_spec, scene_of
from simrl.experiments.results import results_of
from simrl.run import config
from simrl.run.config import ConfigError
from simrl.run.stage_files import WorkdirError
from tests.evaluation.report import fake_judges
from tests.experiments.made_run import SECONDS, lose, made_run, undo
from tests.experiments.scene import settings
from tools import card as tool

NOT_ASKED = {  # of a run with the default settings
    'distances from people': 'the run replays no conversations of people: config.evaluation.replayed',
    'forecast': 'the run forecasts nothing: config.evaluation.forecast',
    card_lib.VERDICTS: 'no tool has left any in the run: tools.win_rate, tools.wildbench, tools.study_report',
}
CAUSE = 'a judge failed: <script>alert(1)</script>'
CHANGES = {'held_out_simulators': ('persona',), 'seeds': (0, 1), 'evaluation__people': 8, 'evaluation__block': 8}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A finished run, to read."""
    return made_run(tmp_path_factory.mktemp('whole') / 'run', settings(**CHANGES))


@pytest.fixture
def scene(whole, tmp_path):
    """A copy of it, to change."""
    shutil.copytree(whole.workdir, tmp_path / 'run')
    return scene_of(whole.settings, tmp_path / 'run')


def test_a_card_has_what_the_results_and_the_stages_have(scene):
    lose(scene, 'matrix/initial/role_play', CAUSE)
    results = results_of(results_spec(scene), scene.workdir)
    card = cards.simulator_card(scene, 'role_play')
    assert card.utility['people'].arm == results.measures['people'].arms['role_play']
    assert list(card.utility['people'].assistants) == ['role_play/seed-0', 'role_play/seed-1']
    assert card.transfer.gains == results.matrix.transfers['role_play']
    row = results.matrix.users.index('role_play')
    assert [met.mean for met in card.transfer.met.values()] == list(results.matrix.mean[row])
    assert (card.transfer.met['initial'].conversations, card.transfer.met['initial'].failed) == (5, 1)
    assert card.fidelity == results.fidelity.simulators['role_play']
    assert card.identity.inputs == {'world': 'hash of world', 'simulator': 'hash of base_user'}
    identity = config.identity({**scene.identity(), **scene.simulator_identity('role_play')})
    assert card.identity.depends_on == identity
    assert card.identity.model == 'the user model of the size medium'
    talks = card.conversations
    assert (talks.stages, talks.held, talks.causes) == (7, 42, {CAUSE: 1}), 'of initial, two arms and the oracle'
    assert talks.ends == {'accepted': 41}
    assert talks.counts == {'later_messages': 140, 'repeated': 21, 'resampled': 14, 'missed_signals': 7}
    assert (card.training.runs, card.training.lines) == (2, 4)
    assert card.training.rates == pytest.approx({'reward/unjudged': 0.25, 'rollout/missed_signals': 0.1})
    assert card.training.usage == {'a/b': {'tries': pytest.approx(2 * (10 + 2 * 4))}}, (
        'a line has the mean of its steps'
    )
    seconds = {purpose: sum(found.values()) / SECONDS for purpose, found in card.cost.seconds.items()}
    assert seconds == {
        card_lib.MAKE: 1,
        card_lib.TRAIN: 2,
        card_lib.MEASURE: 2 + 2 * 2,
        card_lib.MEET: 7,
        card_lib.COMPARE: 1,
    }
    assert card.cost.unfinished == {}
    assert card.not_measured == NOT_ASKED


def test_what_judges_said_of_its_assistants_is_on_the_card(scene):
    (scene.workdir / 'results').mkdir()
    fake_judges.add_all(results_of(results_spec(scene), scene.workdir).experiment, scene.workdir)
    card = cards.simulator_card(scene, 'fine_tuned')
    assert card_lib.VERDICTS not in card.not_measured
    over_seeds, *others = card.verdicts
    assert (over_seeds.assistant, over_seeds.against, over_seeds.sample) == (
        'fine_tuned',
        'initial',
        '2 training seeds',
    )
    assert [of.assistant for of in others] == ['fine_tuned/seed-0'] * 4, 'on WildBench'
    text = document(card)
    assert f'<h2>{verdicts.TITLE}</h2>' in text
    assert '<th scope="row">fine_tuned over initial</th><td>win rate</td>' in text
    assert fake_judges.HOSTILE not in document(cards.simulator_card(scene, 'role_play'))


def test_a_held_out_simulator_has_no_utility_and_all_assistants_meet_it(whole):
    card = cards.simulator_card(whole, 'persona')
    assert (card.identity.held_out, card.utility, card.transfer.gains, card.training) == (True, None, None, None)
    assert card.not_measured['utility'] == ('no assistant trains against it: it is one of config.held_out_simulators')
    assert len(card.transfer.met) == 7
    assert {card_lib.TRAIN, card_lib.MEASURE}.isdisjoint(card.cost.seconds)
    assert 'Training against it' not in document(card)
    gains = cards.simulator_card(whole, 'role_play').transfer.gains
    assert gains.held_out.values == gains.simulators['persona'].values


def test_a_simulator_of_each_seed_has_the_inputs_of_each(whole):
    card = cards.simulator_card(whole, 'fine_tuned')
    seeds = {f'simulator of seed {k}': f'hash of seed-{k}' for k in (0, 1)}
    assert card.identity.inputs == {'world': 'hash of world', **seeds}
    assert card.conversations.stages == 2 + 6, 'the initial assistant met both'


def test_a_forecast_is_on_the_card_and_what_is_not_finished_is_told_from_what_is_not_asked(tmp_path):
    few = {'examples': 3, 'samples': 2, 'n': 2}
    scene = made_run(tmp_path / 'run', settings(**CHANGES, evaluation__forecast=few))
    card = cards.simulator_card(scene, 'persona')
    assert card.forecast.own.cosine.mean == pytest.approx(0.5)
    assert card.forecast.own.best_of_n.mean == pytest.approx(0.5)
    assert (card.forecast.examples, card.forecast.samples, card.forecast.n) == (3, 2, 2)
    assert card.cost.seconds[card_lib.FORECAST].keys() == {'people_forecast', 'forecast/persona'}
    assert 'forecast' not in card.not_measured
    why = card.not_measured['rank correlation of the forecast by gradients']
    assert why.startswith('fewer than three arms have it')
    assert '0.500' in document(card)
    for unfinished in ('forecast/persona', 'people_forecast'):
        undo(scene, unfinished)
        card = cards.simulator_card(scene, 'persona')
        assert card.forecast is None
        assert card.not_measured['forecast'].startswith('it is not finished')
        known = cards.simulator_card(scene, 'role_play').forecast
        assert (known is None) == (unfinished == 'people_forecast')


def test_replayed_turns_are_on_the_card_with_what_could_not_be_measured(whole):
    results = results_of(results_spec(whole), whole.workdir)
    distance = Distance(0.01, 0.25, Estimate(0.24, 0.2, 0.3, 12, 12, 0.95), 12)
    missing = {'sentiment': 'vaderSentiment is not installed'}
    measured = SourceFidelity(40, 12, 38, {'it said nothing': 2}, {'punctuation': distance}, {}, None, 3, 1, missing)
    own = dataclasses.replace(results.fidelity.simulators['role_play'], replayed={'wildchat': measured})
    fidelity = dataclasses.replace(results.fidelity, simulators={'role_play': own})
    card = card_lib.card_of(
        'role_play', dataclasses.replace(results, fidelity=fidelity), cards.facts_of(whole, 'role_play')
    )
    assert card.fidelity == own
    assert card.not_measured['sentiment (wildchat)'] == 'vaderSentiment is not installed'
    text = document(card)
    assert '<th scope="row">punctuation</th><td>0.0100</td><td>0.2500</td><td>+0.2400 [0.2000, 0.3000]</td>' in text
    assert '40 turns of 12 conversations; distances are of 38, without those where it said nothing (2).' in text


def test_people_have_a_card_without_what_only_simulators_have(whole):
    card = cards.simulator_card(whole, 'oracle')
    assert card.utility['people'].arm.gap_recovered.mean is not None or 'gap recovered' in card.not_measured
    assert (card.fidelity, card.conversations, card.transfer.met) == (None, None, None)
    assert card.transfer.gains is not None
    assert {'fidelity', 'forecast', 'failures in the evaluation'} <= card.not_measured.keys()
    assert '<th scope="row">parameters</th><td class="words">none</td>' in document(card)


def test_results_that_were_written_serve_until_a_stage_is_run_again(scene):
    written = results_of(results_spec(scene), scene.workdir)
    marked = dataclasses.replace(written, experiment=dataclasses.replace(written.experiment, caution='as written'))
    result_files.write(marked, scene.workdir)
    assert cards.simulator_card(scene, 'role_play').caution == 'as written'
    path = scene.workdir / 'matrix' / 'initial' / 'role_play' / 'done.json'
    done = json.loads(path.read_text())
    path.write_text(json.dumps(done | {'seconds': 3 * SECONDS}))
    assert cards.simulator_card(scene, 'role_play').caution == scene.caution


@pytest.mark.parametrize(
    ('unfinished', 'not_measured'),
    [
        (('rl/role_play/seed-1',), {'utility over training seeds'}),
        (('rl/role_play', 'people/role_play'), {'utility', 'transfer', 'failures in training'}),
        (('matrix/role_play',), {'transfer'}),
        (('matrix/initial',), {'transfer', *ConciergeScene.rates}),
        (('matrix/initial/role_play',), {'assistants with it', *ConciergeScene.rates}),
        (('likelihood/role_play',), {'fidelity'}),
        (
            ('rl', 'people/role_play', 'people/fine_tuned', 'people/oracle', 'matrix', 'likelihood'),
            {'utility', 'transfer', 'fidelity', 'failures in the evaluation', 'failures in training'},
        ),
    ],
)
def test_what_is_not_done_yet_is_not_measured_and_never_zero(scene, unfinished, not_measured):
    undo(scene, *unfinished)
    card = cards.simulator_card(scene, 'role_play')
    asked = not_measured if 'fidelity' in not_measured else not_measured | {'distances from people'}
    assert card.not_measured.keys() == asked | {'forecast', card_lib.VERDICTS}
    assert card.cost.unfinished
    text = document(card)
    for name in not_measured:
        assert f'<th scope="row">{name}</th><td class="words">{card.not_measured[name]}</td>' in text
    for name in not_measured & {'utility', 'transfer', 'fidelity', 'assistants with it'}:
        assert f'{NOT_MEASURED.capitalize()}: {card.not_measured[name]}.' in text


def test_an_assistant_that_has_met_all_is_in_the_matrix_before_the_others_have(scene):
    undo(scene, 'matrix/fine_tuned/seed-1/role_play', 'matrix/oracle')
    found = cards.results_now(scene, 'role_play').matrix
    assert found.assistants == ('initial', 'role_play/seed-0', 'fine_tuned/seed-0', 'role_play/seed-1')
    assert found.transfers['fine_tuned'].seeds == (0,)
    assert {(x.first, x.second, x.seeds) for x in found.differences} == {('fine_tuned', 'role_play', (0,))}
    undo(scene, 'matrix/initial/fine_tuned')
    assert cards.results_now(scene, 'role_play').matrix.users == ('role_play', 'persona', 'people')


def test_an_arm_that_is_added_to_a_finished_run_has_a_card_of_what_is_known(tmp_path):
    few = settings(**CHANGES, arms={'role_play': {'simulator': 'role_play'}, 'persona': {'simulator': 'persona'}})
    scene = made_run(tmp_path / 'run', few)
    result_files.write(results_of(results_spec(scene), scene.workdir), scene.workdir)
    grown = scene_of(settings(**CHANGES), tmp_path / 'run')
    stored = json.loads((tmp_path / 'run' / 'config.json').read_text())
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(stored | config.to_dict(grown.settings)))
    card = cards.simulator_card(grown, 'fine_tuned')
    assert {'utility', 'transfer', 'fidelity', 'hashes of inputs'} <= card.not_measured.keys()
    assert cards.simulator_card(grown, 'role_play').utility['people'].arm.seeds == (0, 1)


def test_the_tool_writes_json_and_a_page_in_which_text_stays_text(scene, capsys):
    lose(scene, 'matrix/initial/role_play', CAUSE)
    tool.main([str(scene.workdir), 'role_play'])
    folder = scene.workdir / 'cards' / 'role_play'
    assert capsys.readouterr().out == f'{folder}: card.json and card.html written\n'
    content = json.loads((folder / 'card.json').read_text())
    assert content['conversations']['causes'] == {CAUSE: 1}
    assert content['transfer']['times'] == 100
    text = (folder / 'card.html').read_text()
    assert '<script' not in text
    assert '&lt;script&gt;alert(1)&lt;/script&gt;' in text
    assert re.findall(r'(?:src|href)="(.*?)"', text) == ['data:,'], 'it loads nothing'
    assert 'url(' not in text
    tool.main([str(scene.workdir), 'persona', f'--output={scene.workdir.parent / "elsewhere"}'])
    assert sorted(path.name for path in (scene.workdir.parent / 'elsewhere').iterdir()) == ['card.html', 'card.json']


def test_what_has_no_card_is_one_line(scene, tmp_path):
    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit) as raised:
            tool.main(list(arguments))
        assert '\n' not in raised.value.code
        return raised.value.code

    expected = 'expected a run directory, with a config.json of simrl, found none'
    assert error(str(tmp_path / 'gone'), 'role_play') == f'error: {tmp_path / "gone"}: {expected}'
    assert error(str(scene.workdir / 'rl'), 'role_play').endswith(expected)
    found = error(str(scene.workdir), 'nobody')
    assert found.endswith("expected one of its arms (role_play, persona, fine_tuned, oracle), found 'nobody'")
    undo(scene, *{stage.name.split('/')[0] for stage in plan.plan(scene)})
    found = error(str(scene.workdir), 'role_play')
    assert found.endswith('run: expected at least people/initial/block-0 finished, found no results yet')
    with pytest.raises(WorkdirError, match='found no results yet'):
        cards.simulator_card(scene, 'role_play')
    with pytest.raises(ConfigError, match='expected one of its arms'):
        cards.simulator_card(scene, 'nobody')
