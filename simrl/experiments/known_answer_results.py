"""The concierge world's measure, matrix and rates -> a `ResultsSpec`."""

import pathlib

from simrl.evaluation.results import Arm, MeasureWords
from simrl.experiments.known_answer import KnownAnswer, Plan, likelihood_stage, matrix_stage, people_stage, rl_stage
from simrl.experiments.results import (
    AssistantSpec,
    MatrixSpec,
    MeasureSpec,
    ResultsSpec,
    SimulatorSpec,
    write_results,
)
from simrl.run.stages import stage_seconds
from simrl.worlds.concierge.outcomes import vote

PEOPLE = MeasureWords(
    title='Satisfaction of new people',
    score='satisfaction',
    unit='people',
    about=(
        'Satisfaction is the share of the intent met, 0 where the person left, less the effort it took. Of two '
        'assistants that fail, the one that fails sooner wins, as it costs less effort: read win rates, strict ones '
        'most, beside satisfaction and the share of people who left.'
    ),
)
RATES = {
    'messages': ('messages', 'conversations'),
    'words_per_message': ('words', 'messages'),
    'opening_attributes': ('opening_attributes', 'conversations'),
    'typo_rate': ('mistyped', 'values'),
    'against_intent': ('against_intent', 'statements'),
    'left': ('left', 'conversations'),
    'accepted': ('accepted', 'conversations'),
}
CAUTION = (
    'The world is a program with a known answer: it checks the instrument and is no evidence about real people. The '
    'gap between simulators partly restates how its stereotypes were written.'
)


def finish(settings: KnownAnswer, workdir: pathlib.Path) -> None:
    """Writes the results of a run whose stages are done."""
    write_results(results_spec(Plan(settings, workdir)), workdir)


def results_spec(plan: Plan) -> ResultsSpec:
    e = plan.settings.evaluation
    runs = [(arm, seed) for seed in plan.settings.seeds for arm in plan.arms]
    return ResultsSpec(
        arms={arm.name: Arm(arm.kind, oracle=arm.kind == 'oracle') for arm in plan.arms},
        assistants={
            f'{arm.name}/seed-{seed}': AssistantSpec(arm.name, seed, rl_stage(arm.name, seed)) for arm, seed in runs
        },
        measures={
            'people': MeasureSpec(
                PEOPLE,
                {name: [people_stage(name, i) for i in range(e.people // e.block)] for name in plan.assistants},
                vote,
            )
        },
        simulators={
            arm.simulator(seed): SimulatorSpec(arm.name, likelihood_stage(arm.simulator(seed)))
            for arm, seed in runs
            if arm.kind != 'oracle'
        },
        matrix=MatrixSpec(
            'satisfaction',
            {name: {user: matrix_stage(name, user) for user in plan.simulators_met(name)} for name in plan.assistants},
            'people',
        ),
        rates=RATES,
        caution=CAUTION,
        seconds={task.name: stage_seconds(plan.workdir / task.name) for task in plan.tasks()},
    )
