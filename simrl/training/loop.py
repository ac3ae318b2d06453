"""The training loop: steps, metrics, evaluations, checkpoints, progress, and resuming after a kill.

1. Restore the latest checkpoint, if any, and truncate metrics, conversations and TensorBoard to its step.
2. Take a step. Its metrics are read after the next step is dispatched, so the device never waits for the host.
3. Evaluate, log and save a checkpoint at their intervals.

Randomness and data position are functions of the step, so (state, step) is all that a run resumes from. The step of a
log line or a checkpoint is the number of steps done: checkpoint 10 comes after steps 0..9.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from simrl.models.checkpoint import Checkpoints
from simrl.run import compiles, processes, profiling
from simrl.run import metrics as metrics_lib
from simrl.run.compiles import Compiled
from simrl.run.metrics import Metrics, Writer
from simrl.run.progress import Progress

CHECKPOINTS_FOLDER = 'checkpoints'


class State(Protocol):
    """A pytree of arrays that a step changes, such as `TrainState`."""

    @property
    def nonfinite(self) -> jax.Array:
        """int32, number of consecutive updates up to now that were skipped for a non-finite loss or gradient."""


S = TypeVar('S', bound=State)


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """Intervals and amounts of logging. They change nothing that is learned."""

    log_every: int = 1  # steps between lines of metrics.jsonl
    checkpoint_every: int = 20  # steps between checkpoints; the last step has one too
    evaluate_every: int = 0  # steps between evaluations; also before the first step and after the last; 0: never
    keep_checkpoints: int = 1  # number of latest checkpoints kept
    # A folder of another disk, or gs://BUCKET/FOLDER, that checkpoints are saved in; None: the run directory.
    checkpoints: str | None = None
    max_nonfinite: int = 5  # skipped updates in a row that stop the run
    # Share of conversations without a reward, at most 1, that stops a step of RL, a validation or an evaluation.
    max_unjudged: float = 0.5
    saved_conversations: int = 8  # conversations of each step that are written to conversations/*.jsonl
    shown_conversations: int = 2  # conversations of each step, of those written, that TensorBoard shows as text
    profile_step: int = 0  # step that is written to profile/, once a run, counted from 1 in each process; 0: none

    def __post_init__(self) -> None:
        for field in ('log_every', 'checkpoint_every', 'keep_checkpoints', 'max_nonfinite'):
            if getattr(self, field) < 1:
                raise ValueError(f'LoopSettings.{field}: expected at least 1, found {getattr(self, field)}')
        if self.checkpoints is not None and not re.match(r'/|gs://[^/]', self.checkpoints):
            raise ValueError(
                f'LoopSettings.checkpoints: expected an absolute path or gs://BUCKET/FOLDER, found {self.checkpoints!r}'
            )
        if not 0 < self.max_unjudged <= 1:
            raise ValueError(f'LoopSettings.max_unjudged: expected a share in (0, 1], found {self.max_unjudged}')
        for field in ('evaluate_every', 'saved_conversations', 'shown_conversations', 'profile_step'):
            if getattr(self, field) < 0:
                raise ValueError(f'LoopSettings.{field}: expected at least 0, found {getattr(self, field)}')


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Outputs of a step besides the state.

    Attributes:
        metrics: name -> (sum, weight), scalars; averaged over the steps of a log line.
        conversations: JSON-able rows for conversations/NAME.jsonl; 'messages', a list of {'role', 'content'}, is
            shown as text. Reading sampled tokens waits for the device, so not every step should have some.
        tokens: number of tokens that went through the models, for the progress bar.
    """

    metrics: Metrics
    conversations: Sequence[Mapping[str, Any]] = ()
    tokens: jax.Array | int = 0


class NonFiniteError(RuntimeError):
    """Too many consecutive updates had a non-finite loss or gradient."""


class Stopped(SystemExit):
    """The run saved its state and stopped on a signal. The exit code is 128 + the signal: 143 for SIGTERM."""


def run(
    folder: pathlib.Path,
    state: S,
    step_fn: Callable[[S, int], tuple[S, StepResult]],
    settings: LoopSettings,
    *,
    num_steps: int,
    name: str,
    evaluate_fn: Callable[[S, int], Metrics] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
) -> S:
    """Trains to `num_steps` from the latest checkpoint, if any.

    Args:
        folder: of the run, used by no other; gets metrics.jsonl, tensorboard/, conversations/NAME.jsonl, checkpoints/
            and, if asked for, profile/ (see `profiling`).
        state: the state before step 0; with a checkpoint only its structure and shardings matter, and it is deleted.
        step_fn: (state, step) -> (next state, `StepResult`); may donate the state.
        num_steps: total number of steps.
        name: of the training in the progress bar and the file of conversations.
        evaluate_fn: (state, steps done) -> metrics under a prefix of their own; called every `evaluate_every` steps.
        hyperparameters: nested settings for TensorBoard's HParams tab.

    Returns:
        The state after `num_steps` steps, which is also the last checkpoint.

    Raises:
        NonFiniteError: `settings.max_nonfinite` consecutive updates were skipped. That state is not saved.
        Stopped: SIGTERM, SIGINT or SIGHUP arrived; the state was saved after the step in progress.
        CheckpointError: a checkpoint could not be saved or read; older ones are intact.
        WorkdirError: metrics.jsonl does not match the checkpoint.
        ValueError: impossible arguments.
    """
    if (evaluate_fn is None) != (settings.evaluate_every == 0):
        raise ValueError('LoopSettings.evaluate_every: expected 0 if and only if there is no evaluate_fn')
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        Checkpoints(
            folder / CHECKPOINTS_FOLDER, keep=settings.keep_checkpoints, elsewhere=settings.checkpoints
        ) as checkpoints,
        Writer(folder) as writer,
        compiles.compilations() as programs,
        _Signal() as stop,
    ):
        # Resume, or start.
        step = 0
        meta: dict[str, Any] = {'offsets': {}, 'totals': {}}
        if checkpoints.steps:  # callers hold the state, which would stay on the devices beside what is restored
            for array in jax.tree.leaves(state):
                if isinstance(array, jax.Array):
                    array.delete()
        restored = checkpoints.restore(state)
        if restored is not None:
            step, state, meta = restored
        if step > num_steps:
            raise ValueError(
                f'{folder}: expected a run of at most {num_steps} steps, found a checkpoint of step {step}'
            )
        writer.truncate(meta['offsets'], 0 if restored is None else step + 1)
        recorder = _Recorder(writer, settings, num_steps, name, meta['totals'], stop, programs)
        if step < num_steps and jax.process_index() == 0:  # it may take a minute in which nothing else is printed
            print(f'{name}: compiling the first step', file=sys.stderr, flush=True)
        if restored is None:
            if hyperparameters is not None:
                writer.hyperparameters(hyperparameters)
            if evaluate_fn is not None:
                writer.log(0, metrics_lib.mean(evaluate_fn(state, 0)))

        taken, announcer = 0, compiles.Announcer(name, programs)  # steps of this process
        with Progress(name, num_steps, done=step) as progress:
            recorder.progress = progress
            while step < num_steps:
                if profiling.is_due(folder, taken, settings.profile_step):
                    take = functools.partial(_take, step_fn, state, step, name)
                    state, result = profiling.profiled(folder, take, after=state, results=_arrays_of)
                else:
                    state, result = _take(step_fn, state, step, name)
                step, taken = step + 1, taken + 1
                recorder.push(step, result, jnp.copy(state.nonfinite))  # the next step may donate the state

                last, stopping = step == num_steps, stop.requested()
                if evaluate_fn is not None and (last or step % settings.evaluate_every == 0):
                    recorder.flush(metrics_lib.mean(evaluate_fn(state, step)))
                announcer.announce(f'step {step}')
                if last or stopping is not None or step % settings.checkpoint_every == 0:
                    recorder.flush()
                    if last:
                        writer.finished(step)
                    checkpoints.save(step, state, {'offsets': writer.offsets(), 'totals': recorder.totals})
                if stopping is not None:
                    how = f'stopped by {signal.Signals(stopping).name} after step {step} of {num_steps}'
                    with contextlib.suppress(OSError):  # the signal may have ended the terminal or pipe as well
                        print(f'{name}: {how}, saved in {folder}', flush=True)
                    raise Stopped(128 + stopping)
    return state


def _take(step_fn: Callable[[S, int], tuple[S, StepResult]], state: S, step: int, name: str) -> tuple[S, StepResult]:
    """Takes a step under its name and number in profiles."""
    with jax.profiler.StepTraceAnnotation(name, step_num=step):
        return step_fn(state, step)


def _arrays_of(taken: tuple[S, StepResult]) -> object:
    """Lists all arrays that a step makes."""
    state, result = taken
    return state, dict(result.metrics), result.tokens


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A dispatched step whose metrics are not read yet."""

    step: int
    result: StepResult
    nonfinite: jax.Array
    programs: int  # compiled by then


class _Recorder:
    """Writes the results of steps as log lines, each the average over the steps since the previous line.

    `totals`, the sums for the next line, are part of a checkpoint: a line may straddle a kill.
    """

    def __init__(
        self,
        writer: Writer,
        settings: LoopSettings,
        num_steps: int,
        name: str,
        totals: Mapping[str, Any],
        stop: '_Signal',
        programs: Sequence[Compiled],
    ) -> None:
        self.totals: dict[str, tuple[float, float]] = {key: (x, weight) for key, (x, weight) in totals.items()}
        self.progress: Progress | None = None
        self._writer, self._settings, self._num_steps, self._name = writer, settings, num_steps, name
        self._stop = stop
        self._programs, self._line_programs = programs, 0
        self._pending: _Pending | None = None
        self._started_at = self._line_at = time.monotonic()
        self._line_tokens = self._line_steps = 0
        self._note = ''

    def push(self, step: int, result: StepResult, nonfinite: jax.Array) -> None:
        """Queues the result of a step and writes that of the previous step."""
        previous, self._pending = self._pending, _Pending(step, result, nonfinite, len(self._programs))
        if previous is not None:
            self._record(previous, {})

    def flush(self, evaluation: Mapping[str, float] | None = None) -> None:
        """Writes the pending result; an evaluation goes into the line of its step."""
        if self._pending is not None:
            previous, self._pending = self._pending, None
            self._record(previous, evaluation or {})

    def _record(self, pending: _Pending, evaluation: Mapping[str, float]) -> None:
        step, result = pending.step, pending.result
        values, tokens, nonfinite = jax.device_get((dict(result.metrics), result.tokens, pending.nonfinite))
        self.totals = metrics_lib.add(self.totals, metrics_lib.fetch(values))
        self._line_tokens += int(tokens)
        self._line_steps += 1
        self._writer.conversations(self._name, ({'step': step, **row} for row in result.conversations))
        for i, row in enumerate(result.conversations[: self._settings.shown_conversations]):
            self._writer.text(step, f'{self._name}/conversation_{i}', _markdown(row))

        broken = int(nonfinite) >= self._settings.max_nonfinite
        line: dict[str, float] = {}
        if step % self._settings.log_every == 0 or step == self._num_steps or broken:
            line = metrics_lib.mean(self.totals) | self._times(pending.programs)
            self.totals = {}
            self._note = f'loss {line["loss"]:.4g}' if 'loss' in line else ''
        if twice := line.keys() & evaluation.keys():
            raise ValueError(f'{self._name}: the step and the evaluation both have metrics named {sorted(twice)}')
        if line or evaluation:
            self._writer.log(step, line | dict(evaluation))
        if self.progress is not None and self._stop.received is None:  # see where `Stopped` is raised
            self.progress.update(tokens=int(tokens), note=self._note)
        if broken:
            shown = ', '.join(f'{key} {x:.4g}' for key, x in metrics_lib.mean(values).items())
            raise NonFiniteError(
                f'{self._name}: stopped at step {step} of {self._num_steps}: the last {int(nonfinite)} updates in a '
                f'row had a non-finite loss or gradient and were skipped (LoopSettings.max_nonfinite is '
                f'{self._settings.max_nonfinite}); that step: {shown}'
            )

    def _times(self, programs: int) -> dict[str, float]:
        now = time.monotonic()
        seconds, self._line_at = max(now - self._line_at, 1e-9), now
        times = {
            'time/seconds': now - self._started_at,  # of this process
            'time/step_seconds': seconds / self._line_steps,
            'time/tokens_per_second': self._line_tokens / seconds,
            'time/programs': programs - self._line_programs,  # compiled, or read from the disk
            'time/compiling': sum(program.seconds for program in self._programs[self._line_programs : programs]),
        }
        self._line_programs = programs
        self._line_tokens = self._line_steps = 0
        return times


class _Signal:
    """Records SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal closed); the loop stops after the step in progress.

    A second SIGINT raises KeyboardInterrupt at once. A signal that the process ignores stays ignored: `nohup`, and a
    shell that starts a job in the background, set that. Several processes stop after the same step, whichever of them
    received a signal. There a second SIGINT ends the process, which may be waiting for one that is gone. Off the main
    thread no handler can be set, and signals end the process as usual.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> '_Signal':
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was none of Python's
        if self.received is not None and error is None:
            signal.raise_signal(self.received)  # it arrived after the last step's check and must still end the process

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT == self.received:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):  # of a pipe, whose reader the signal has ended as well
                os.write(2, b'\nstops after this step; Ctrl-C again: at once, without saving\n')
            if processes.count() > 1:
                signal.signal(number, signal.SIG_DFL)
        self.received = number

    def requested(self) -> int | None:
        """The signal for which all processes of the run stop after this step. All of them call it after each."""
        return processes.agree_on_signal(self.received)


def _markdown(row: Mapping[str, Any]) -> str:
    """Formats a conversation for TensorBoard's text tab: its messages, then the other fields of the row."""
    messages = row.get('messages', [])
    said = [f'**{message["role"]}**\n\n' + _indented(str(message['content'])) for message in messages]
    rest = {key: value for key, value in row.items() if key != 'messages'}
    return '\n\n'.join([*said, _indented(json.dumps(rest, indent=1))])


def _indented(text: str) -> str:
    """Formats text as a Markdown code block, shown literally."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 100) or ['']]
    return '\n'.join(f'    {line}' for line in lines)
