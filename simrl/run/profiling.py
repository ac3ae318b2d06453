"""One step of a training as a profile: what ran on the host and on the device, op by op, and when.

profile/plugins/profile/TIME/HOST.xplane.pb      for TensorBoard's profile plugin, and `tools.profile_summary`
profile/plugins/profile/TIME/HOST.trace.json.gz  for Perfetto (ui.perfetto.dev)
"""

import pathlib
import shutil
from collections.abc import Callable
from typing import TypeVar

import jax

PROFILE_FOLDER = 'profile'
UNFINISHED_FOLDER = 'profile.unfinished'  # renamed once it is whole

T = TypeVar('T')


def is_due(folder: pathlib.Path, taken: int, profile_step: int) -> bool:
    """Whether the next step of a run in `folder` is to be profiled, by this process.

    Args:
        taken: steps that this process has taken.
        profile_step: which of its steps, counted from 1; 0: none.

    False where the run has a profile: a process that goes on after a kill makes no second one. Of several processes the
    first one makes it.
    """
    wanted = taken + 1 == profile_step and jax.process_index() == 0
    return wanted and not (folder / PROFILE_FOLDER).exists()


def profiled(folder: pathlib.Path, work: Callable[[], T], *, after: object, results: Callable[[T], object]) -> T:
    """Does `work` and writes its profile to folder/profile/.

    Args:
        after: arrays that are waited for before the profile begins: what precedes the work is not in it.
        results: what `work` returned -> arrays that are waited for before it ends: all of the work is in it.
    """
    unfinished = folder / UNFINISHED_FOLDER
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of a Python function would be noted, which takes longer than the calls
    jax.block_until_ready(after)
    jax.profiler.start_trace(unfinished, profiler_options=options)
    try:
        done = work()
        jax.block_until_ready(results(done))
    finally:
        jax.profiler.stop_trace()
    unfinished.rename(folder / PROFILE_FOLDER)
    return done
