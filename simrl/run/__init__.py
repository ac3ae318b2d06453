"""A run directory and the process that works on it; knows nothing of models.

`config`: dataclasses <-> ConfigDict, strictly. `stages`: run what is missing and resume; `directory`: open a run
directory, rerun, plan; `stage_files`: the records, locks and hashes in a stage's folder; `workers`: stages side by side
in processes; `processes`: several processes as one run. `metrics`, `progress` and `profiling`: what a stage logs.
`runtime`: XLA flags, devices, compilation cache; `memory`: what there is of it; `compiles`: which programs were
compiled, and others ahead of their calls; `program`: the terminal and Ctrl-C; `settings_help`: a config's settings for
`--help`.

Read `stages` first, then `config`.
"""
