"""Progress of a long stage: a bar on a terminal, a line every 15 seconds in a log file."""

import sys
import time
from typing import TextIO

import jax
import tqdm

LINE_SECONDS = 15.0  # between two lines of a log file
SMOOTHING = 0.3  # weight of the newest step: the estimate soon forgets a slow first step (compilation)


class Progress:
    """Prints steps done, tokens per second and the time left to stderr, in the first process only.

    Args:
        name: printed first, for instance 'sft'.
        total: number of steps.
        done: steps done before a resume.
    """

    def __init__(self, name: str, total: int, *, done: int = 0, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self._shown = jax.process_index() == 0
        self._name, self._total, self._done = name, total, done
        self._shown_at = self._updated_at = time.monotonic()
        self._pace = 0.0  # seconds per step, smoothed
        self._tokens_per_second = 0.0
        self._bar = None
        if self._shown and self._file.isatty():
            self._bar = tqdm.tqdm(
                total=total, initial=done, desc=name, unit='step', dynamic_ncols=True, file=self._file
            )

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, steps: int = 1, *, tokens: float = 0, note: str = '') -> None:
        """Adds steps, and the tokens that they processed; prints `note`, for instance the loss, beside them."""
        now = time.monotonic()
        seconds = max(now - self._updated_at, 1e-9)
        self._pace = _smooth(self._pace, seconds / max(steps, 1))
        self._tokens_per_second = _smooth(self._tokens_per_second, tokens / seconds)
        self._updated_at = now
        self._done += steps
        rate = f'{self._tokens_per_second:,.0f} tokens/s' if self._tokens_per_second else ''
        if self._bar is not None:
            self._bar.set_postfix_str(', '.join(filter(None, (rate, note))), refresh=False)
            self._bar.update(steps)
        elif self._shown and (now - self._shown_at >= LINE_SECONDS or self._done >= self._total):
            self._shown_at = now
            left = tqdm.tqdm.format_interval((self._total - self._done) * self._pace)
            line = filter(None, (f'{self._name}: step {self._done}/{self._total}', rate, f'{left} left', note))
            print(', '.join(line), file=self._file, flush=True)


def _smooth(old: float, new: float) -> float:
    return new if not old else (1 - SMOOTHING) * old + SMOOTHING * new
