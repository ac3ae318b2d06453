"""A profile of one training step: which ops ran when, on the host and on the device.

profile/plugins/profile/TIME/HOST.xplane.pb      for TensorBoard's profile plugin, and `tools.profile_summary`
profile/plugins/profile/TIME/HOST.trace.json.gz  for Perfetto (ui.perfetto.dev)
"""

import pathlib
import shutil
from collections.abc import Callable
from typing import TypeVar

import jax

PROFILE_FOLDER = 'profile'
UNFINISHED_FOLDER = 'profile.unfinished'  # renamed when complete

T = TypeVar('T')


def is_due(folder: pathlib.Path, taken: int, profile_step: int) -> bool:
    """True if this process should profile the next step of the run in `folder`.

    Args:
        taken: steps done by this process.
        profile_step: the step to profile, counted from 1 in this process; 0: none.

    Only the first of several processes profiles. A run that has a profile gets no second one after a resume.
    """
    wanted = taken + 1 == profile_step and jax.process_index() == 0
    return wanted and not (folder / PROFILE_FOLDER).exists()


def profiled(folder: pathlib.Path, work: Callable[[], T], *, after: object, results: Callable[[T], object]) -> T:
    """Calls `work` and writes its profile to folder/profile/.

    Args:
        after: arrays to wait for first, so that earlier computations are not in the profile.
        results: selects from what `work` returns the arrays to wait for, so that all of it is in the profile.
    """
    unfinished = folder / UNFINISHED_FOLDER
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing every Python call takes longer than the calls
    jax.block_until_ready(after)
    jax.profiler.start_trace(unfinished, profiler_options=options)
    try:
        done = work()
        jax.block_until_ready(results(done))
    finally:
        jax.profiler.stop_trace()
    unfinished.rename(folder / PROFILE_FOLDER)
    return done
