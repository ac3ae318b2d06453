"""Run by `test_panel.py` in two processes: a judge that each of them asks a share of the questions of."""

import dataclasses
import json
from collections.abc import Callable, Sequence

import jax

from simrl.experiments.endpoints import usage_metrics
from simrl.remote.usage import Usage
from simrl.rewards.judging import Judge, Question, Verdict, shared
from simrl.rewards.rewards import JUDGE_FAILED
from tests import many_devices

QUESTIONS = [Question(f'e{i}', None, (('user', 'é' * i), ('assistant', 'b'))) for i in range(5)]


def submit(questions: Sequence[Question]) -> Callable[[], list[Verdict]]:
    """Scores the number of an example; example 3 is not judged, and a question without an example is an error."""

    def verdict(question: Question) -> Verdict:
        number = int(question.example[1:])
        if number == 3:
            return Verdict(None, cause=JUDGE_FAILED, detail='é')
        return Verdict(number / 10, {'part': float(number)})

    return lambda: [verdict(question) for question in questions]


def main() -> None:
    many_devices.join()
    many_devices.meet()
    asked: list[str] = []

    def counted(questions: Sequence[Question]) -> Callable[[], list[Verdict]]:
        asked.extend(question.example for question in questions)
        return submit(questions)

    judge = shared(Judge(counted, ('part',)))
    verdicts = [dataclasses.asdict(verdict) for verdict in judge.submit(QUESTIONS)()]
    try:
        judge.submit([*QUESTIONS[:1], dataclasses.replace(QUESTIONS[0], example='')])()
        error = ''
    except Exception as found:
        error = f'{type(found).__name__}: {found}'
    usage = {'judge': Usage(calls=1)}
    metrics = usage_metrics(lambda: dict(usage))
    usage['judge'] = Usage(calls=3 + jax.process_index(), cost=0.25)
    used = {name: total for name, (total, _) in metrics().items() if total}
    print(json.dumps({'verdicts': verdicts, 'asked': asked[:-1], 'error': error, 'used': used}))


if __name__ == '__main__':
    main()
